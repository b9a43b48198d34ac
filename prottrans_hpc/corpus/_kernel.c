/* The hot loops of the corpus: parse FASTA and clean its residues, digest and count them, gather them for a batch.
 *
 * Optional: prottrans_hpc/corpus/kernel.py gives the same bytes in Python. Every buffer is the caller's and is
 * used again for the next block: fresh output arrays cost four times more than the parsing. The AVX-512 paths are
 * chosen at run time. The GIL is released, and no Python object is touched, inside the loops.
 *
 * The residue table maps an input byte to: 0 drop; 1..0x7f that letter; 0x80 drop and count; 0x80|letter (upper
 * case) that letter, and count; 0x80|'x' an invalid byte: write X, count, and blame the record.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "_blake2b.h"

typedef uint8_t u8;

#define SLACK 64 /* vector stores may write this far behind the last residue */
#define IS_INVALID(v) (((v) & 0xa0) == 0xa0)

#define SPECIAL 6

typedef struct {
    const u8 *table;
    int64_t *counted;    /* [256] input bytes that were counted */
    int64_t invalid;     /* invalid bytes of the record in work */
    u8 special[SPECIAL]; /* the letters that are not simply kept, in upper case; unused places hold 0 */
    int plain;           /* whether all other letters are kept, lower case as upper case */
} cleaner;

/* What the loop over plain letters needs to know of the table. */
static cleaner new_cleaner(const u8 *table, int64_t *counted) {
    cleaner c = {table, counted, 0, {0}, 1};
    int n = 0;
    for (int letter = 'A'; letter <= 'Z'; letter++) {
        if (table[letter] == letter && table[letter | 0x20] == letter) continue;
        if (n < SPECIAL) c.special[n++] = letter;
        else c.plain = 0;
    }
    return c;
}

/* Clean one run of bytes the slow way, looking at every one. */
static u8 *clean_bytes(cleaner *c, const u8 *p, const u8 *end, u8 *out) {
    for (; p < end; p++) {
        u8 v = c->table[*p];
        if (v & 0x80) {
            c->counted[*p]++;
            c->invalid += IS_INVALID(v);
            v &= 0x5f; /* letter in upper case; 0x80 becomes 0 */
        }
        *out = v;
        out += v != 0;
    }
    return out;
}

/* Copy n letters in upper case; whether anything but plain letters was met. Inlined with a constant n it is a few vector instructions. */
static inline __attribute__((always_inline)) u8 copy_some(const u8 *s, const u8 *p, size_t n, u8 *out) {
    u8 bad = 0;
    for (size_t i = 0; i < n; i++) {
        u8 v = p[i] & 0xdf;
        out[i] = v;
        bad |= ((u8)(v - 'A') > 25) | (v == s[0]) | (v == s[1]) | (v == s[2]) | (v == s[3]) | (v == s[4]) | (v == s[5]);
    }
    return bad;
}

static u8 copy_letters(const cleaner *c, const u8 *p, size_t n, u8 *out) {
    u8 s[SPECIAL];
    memcpy(s, c->special, SPECIAL); /* a copy that no store to `out` can change */
    if (n < 16) return copy_some(s, p, n, out);
    /* The last 16 once more, rather than a loop over what is left. */
    return copy_some(s, p, n & ~(size_t)15, out) | copy_some(s, p + n - 16, 16, out + n - 16);
}

/* memchr per line, then a loop over plain letters; a line that holds more is done again the slow way. */
static u8 *clean_portable(cleaner *c, const u8 *p, const u8 *end, u8 *out) {
    while (p < end) {
        const u8 *line_end = memchr(p, '\n', end - p);
        const u8 *next = line_end ? line_end + 1 : end;
        if (!line_end) line_end = end;
        if (line_end > p && line_end[-1] == '\r') line_end--;
        size_t n = line_end - p;
        out = !c->plain || copy_letters(c, p, n, out) ? clean_bytes(c, p, line_end, out) : out + n;
        p = next;
    }
    return out;
}

static void widen_portable(const u8 *p, int64_t n, const u8 *table, int64_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = table[p[i]];
}

static u8 *(*clean)(cleaner *, const u8 *, const u8 *, u8 *) = clean_portable;
static void (*widen)(const u8 *, int64_t, const u8 *, int64_t *) = widen_portable;
static void (*digest_many)(const uint64_t *, const u8 *, const int64_t *, int64_t, u8 *) = blake_many_portable;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")))

/* 64 bytes at once: two registers hold the table of the 128 ASCII codes, all other bytes share one entry. */
AVX512 static u8 *clean_avx512(cleaner *c, const u8 *p, const u8 *end, u8 *out) {
    const __m512i low = _mm512_loadu_si512(c->table), high = _mm512_loadu_si512(c->table + 64);
    const __m512i beyond = _mm512_set1_epi8((char)c->table[128]);
    while (p < end) {
        size_t n = (size_t)(end - p) < 64 ? (size_t)(end - p) : 64;
        __mmask64 use = n == 64 ? ~0ULL : (1ULL << n) - 1;
        __m512i in = _mm512_maskz_loadu_epi8(use, p);
        __m512i v = _mm512_permutex2var_epi8(low, in, high);
        v = _mm512_mask_mov_epi8(v, _mm512_movepi8_mask(in), beyond);
        __mmask64 keep = _mm512_test_epi8_mask(v, v) & use;
        if (_mm512_movepi8_mask(v) & use) {
            out = clean_bytes(c, p, p + n, out);
        } else {
            _mm512_storeu_si512(out, keep == ~0ULL ? v : _mm512_maskz_compress_epi8(keep, v));
            out += _mm_popcnt_u64(keep);
        }
        p += n;
    }
    return out;
}

/* Eight tokens at once: a byte permutation puts each into the lowest byte of its 64 bits. */
AVX512 static void widen_avx512(const u8 *p, int64_t n, const u8 *table, int64_t *out) {
    const __m512i low = _mm512_loadu_si512(table), high = _mm512_loadu_si512(table + 64);
    const __m512i low2 = _mm512_loadu_si512(table + 128), high2 = _mm512_loadu_si512(table + 192);
    const __m512i eighth = _mm512_set1_epi64(8);
    for (; n > 0; n -= 64, p += 64, out += 64) {
        __m512i in = _mm512_maskz_loadu_epi8(n >= 64 ? ~0ULL : (1ULL << n) - 1, p);
        __m512i v = _mm512_permutex2var_epi8(low, in, high);
        v = _mm512_mask_mov_epi8(v, _mm512_movepi8_mask(in), _mm512_permutex2var_epi8(low2, in, high2));
        __m512i from = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
        int64_t i = 0;
        for (; i < 64 && n - i >= 8; i += 8, from = _mm512_add_epi64(from, eighth))
            _mm512_storeu_si512(out + i, _mm512_maskz_permutexvar_epi8(0x0101010101010101ULL, from, v));
        if (i < 64 && n > i) _mm512_mask_storeu_epi64(out + i, (__mmask8)((1 << (n - i)) - 1), _mm512_maskz_permutexvar_epi8(0x0101010101010101ULL, from, v));
    }
}
#endif

/* ---- FASTA ---- */

typedef struct {
    u8 *residues, *names;
    int64_t *offsets, *name_offsets, *starts, *invalid;
    int64_t capacity;
} records;

/* The '>' that opens the next record: the first one at the start of a line. */
static const u8 *next_header(const u8 *p, const u8 *end) {
    for (const u8 *hit = p; (hit = memchr(hit, '>', end - hit)) != NULL; hit++)
        if (hit[-1] == '\n') return hit;
    return end;
}

/* Records of `data`, which begins with '>' and ends with a whole record; returns the bytes used. A record whose header has a carriage return inside gets -1 invalid bytes: lines that end in CR alone. */
static int64_t parse_fasta(cleaner *c, const u8 *data, int64_t length, records *r, int64_t *count) {
    const u8 *p = data, *end = data + length;
    u8 *out = r->residues, *names = r->names;
    int64_t n = 0;
    for (; p < end && n < r->capacity; n++) {
        const u8 *line_end = memchr(p, '\n', end - p);
        if (!line_end) line_end = end;
        const u8 *name = p + 1, *name_end;
        while (name < line_end && (*name == ' ' || *name == '\t')) name++;
        for (name_end = name; name_end < line_end && *name_end > ' '; name_end++) {}
        memcpy(names, name, name_end - name);
        names += name_end - name;
        const u8 *body = line_end < end ? line_end + 1 : end, *next = next_header(body, end);
        r->starts[n] = p - data;
        c->invalid = 0;
        out = clean(c, body, next, out);
        r->offsets[n + 1] = out - r->residues;
        r->name_offsets[n + 1] = names - r->names;
        const u8 *cr = memchr(p, '\r', line_end - p);
        r->invalid[n] = cr && cr + 1 != line_end ? -1 : c->invalid;
        p = next;
    }
    *count = n;
    return p - data;
}

/* One sequence a line; lines that are blank are no records. */
static int64_t parse_lines(cleaner *c, const u8 *data, int64_t length, records *r, int64_t *count) {
    const u8 *p = data, *end = data + length;
    u8 *out = r->residues;
    int64_t n = 0;
    while (p < end && n < r->capacity) {
        const u8 *line_end = memchr(p, '\n', end - p), *q = p;
        if (!line_end) line_end = end;
        while (q < line_end && c->table[*q] == 0) q++;
        if (q < line_end) {
            r->starts[n] = p - data;
            c->invalid = 0;
            out = clean(c, q, line_end, out);
            r->offsets[n + 1] = out - r->residues;
            r->name_offsets[n + 1] = 0;
            r->invalid[n++] = c->invalid;
        }
        p = line_end < end ? line_end + 1 : end;
    }
    *count = n;
    return p - data;
}

static PyObject *parse_block(PyObject *self, PyObject *args) {
    Py_buffer data, table, residues, offsets, names, name_offsets, starts, invalid, counted;
    int lines;
    if (!PyArg_ParseTuple(args, "y*y*pw*w*w*w*w*w*w*", &data, &table, &lines, &residues, &offsets, &names, &name_offsets, &starts, &invalid, &counted))
        return NULL;
    int64_t count = 0, used = 0;
    records r = {residues.buf, names.buf, offsets.buf, name_offsets.buf, starts.buf, invalid.buf, starts.len / 8};
    int fits = table.len == 256 && counted.len == 2048 && residues.len >= data.len + SLACK && names.len >= data.len &&
               offsets.len >= 8 * (r.capacity + 1) && name_offsets.len >= 8 * (r.capacity + 1) && invalid.len >= 8 * r.capacity && r.capacity > 0;
    int header_first = lines || data.len == 0 || *(const u8 *)data.buf == '>';
    if (fits && header_first) {
        cleaner c = new_cleaner(table.buf, counted.buf);
        r.offsets[0] = r.name_offsets[0] = 0;
        Py_BEGIN_ALLOW_THREADS
        used = (lines ? parse_lines : parse_fasta)(&c, data.buf, data.len, &r, &count);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, fits ? "a block of FASTA must begin with '>'" : "parse_block: a buffer is too small");
    }
    Py_buffer *all[] = {&data, &table, &residues, &offsets, &names, &name_offsets, &starts, &invalid, &counted};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) PyBuffer_Release(all[i]);
    return fits && header_first ? Py_BuildValue("LL", (long long)count, (long long)used) : NULL;
}

/* ---- digest, count, gather ---- */

#define PREFETCHED 512 /* bytes of the next sequence; the processor itself runs ahead from there */
#ifdef __GNUC__
#define PREFETCH(p) __builtin_prefetch(p)
#else
#define PREFETCH(p) (void)(p)
#endif


static PyObject *digest(PyObject *self, PyObject *args) {
    Py_buffer data, offsets, person, out;
    if (!PyArg_ParseTuple(args, "y*y*y*w*", &data, &offsets, &person, &out)) return NULL;
    int64_t count = offsets.len / 8 - 1;
    const int64_t *at = offsets.buf;
    int fits = count >= 0 && person.len == 16 && out.len >= 16 * count && (count < 0 || (at[0] >= 0 && at[count] <= data.len));
    for (int64_t i = 0; fits && i < count; i++) fits = at[i] <= at[i + 1];
    if (fits) {
        uint64_t start[8];
        blake_start(start, person.buf);
        Py_BEGIN_ALLOW_THREADS
        digest_many(start, data.buf, at, count, out.buf);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "digest: offsets, person or out do not fit the data");
    }
    PyBuffer_Release(&data); PyBuffer_Release(&offsets); PyBuffer_Release(&person); PyBuffer_Release(&out);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

/* Eight tables, so that runs of one letter do not wait for the store of the count before. */
static void count_bytes(const u8 *p, int64_t n, int64_t *counts) {
    uint32_t part[8][256];
    while (n > 0) {
        int64_t take = n < (1 << 30) ? n : (1 << 30), i = 0;
        memset(part, 0, sizeof part);
        for (; i + 8 <= take; i += 8) {
            uint64_t w;
            memcpy(&w, p + i, 8);
            for (int j = 0; j < 8; j++) part[j][(w >> (8 * j)) & 255]++;
        }
        for (; i < take; i++) part[0][p[i]]++;
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 256; k++) counts[k] += part[j][k];
        p += take;
        n -= take;
    }
}

static PyObject *count(PyObject *self, PyObject *args) {
    Py_buffer data, counts;
    if (!PyArg_ParseTuple(args, "y*w*", &data, &counts)) return NULL;
    int fits = counts.len == 2048;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        count_bytes(data.buf, data.len, counts.buf);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "count: counts must be 256 int64");
    }
    PyBuffer_Release(&data); PyBuffer_Release(&counts);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

static PyObject *collect(PyObject *self, PyObject *args) {
    Py_buffer data, firsts, lasts, out;
    if (!PyArg_ParseTuple(args, "y*y*y*w*", &data, &firsts, &lasts, &out)) return NULL;
    const int64_t *first = firsts.buf, *last = lasts.buf, count = firsts.len / 8;
    int64_t room = out.len;
    int fits = lasts.len / 8 == count;
    for (int64_t i = 0; fits && i < count; i++) {
        fits = first[i] >= 0 && first[i] <= last[i] && last[i] <= data.len && last[i] - first[i] <= room;
        room -= last[i] - first[i];
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        u8 *to = out.buf;
        for (int64_t i = 0; i < count; to += last[i] - first[i], i++) memcpy(to, (const u8 *)data.buf + first[i], last[i] - first[i]);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "collect: a span lies outside the data, or the spans do not fit into out");
    }
    PyBuffer_Release(&data); PyBuffer_Release(&firsts); PyBuffer_Release(&lasts); PyBuffer_Release(&out);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

static int spans_fit(const int64_t *starts, const int64_t *lengths, const int64_t *out_starts, int64_t count, int64_t size, int64_t out_size) {
    for (int64_t i = 0; i < count; i++) {
        int64_t n = lengths[i];
        if (n < 0 || starts[i] < 0 || out_starts[i] < 0 || n > size || starts[i] > size - n || n > out_size || out_starts[i] > out_size - n) return 0;
    }
    return 1;
}

static PyObject *gather(PyObject *self, PyObject *args) {
    Py_buffer residues, starts, lengths, table, out, out_starts;
    if (!PyArg_ParseTuple(args, "y*y*y*y*w*y*", &residues, &starts, &lengths, &table, &out, &out_starts)) return NULL;
    int64_t count = starts.len / 8;
    const int64_t *from = starts.buf, *n = lengths.buf, *to = out_starts.buf;
    int fits = table.len == 256 && lengths.len / 8 == count && out_starts.len / 8 == count && spans_fit(from, n, to, count, residues.len, out.len / 8);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (int64_t i = 0; i < count; i++) {
            /* Sequences lie far apart: without this, each would begin with a wait for memory. */
            if (i + 1 < count)
                for (int64_t j = 0; j < n[i + 1] && j < PREFETCHED; j += 64) PREFETCH((const u8 *)residues.buf + from[i + 1] + j);
            widen((const u8 *)residues.buf + from[i], n[i], table.buf, (int64_t *)out.buf + to[i]);
        }
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "gather: a span lies outside its array, or the arrays differ in length");
    }
    Py_buffer *all[] = {&residues, &starts, &lengths, &table, &out, &out_starts};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) PyBuffer_Release(all[i]);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

/* ---- module ---- */

static const char *vector_path = "portable";

static void use_portable(void) {
    clean = clean_portable;
    widen = widen_portable;
    digest_many = blake_many_portable;
    vector_path = "portable";
}

static void use_best(void) {
    use_portable();
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("popcnt")) {
        clean = clean_avx512;
        widen = widen_avx512;
        digest_many = blake_many_avx512;
        vector_path = "avx512";
    }
#endif
}

/* For tests and benchmarks: take the portable path on a machine that has the other one. */
static PyObject *select_path(PyObject *self, PyObject *args) {
    int best;
    if (!PyArg_ParseTuple(args, "p", &best)) return NULL;
    (best ? use_best : use_portable)();
    return PyUnicode_FromString(vector_path);
}

static PyObject *path_in_use(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    return PyUnicode_FromString(vector_path);
}

static PyMethodDef methods[] = {
    {"parse_block", parse_block, METH_VARARGS,
     "parse_block(data, table, lines, residues, offsets, names, name_offsets, starts, invalid, counted) -> (records, bytes used)"},
    {"digest", digest, METH_VARARGS, "digest(data, offsets, person, out): BLAKE2b-128 of each data[offsets[i]:offsets[i + 1]]"},
    {"count", count, METH_VARARGS, "count(data, counts): add how often each byte occurs"},
    {"gather", gather, METH_VARARGS, "gather(residues, starts, lengths, table, out, out_starts): out[out_starts[i]:] = table[residues[starts[i]:][:lengths[i]]]"},
    {"collect", collect, METH_VARARGS, "collect(data, firsts, lasts, out): copy data[firsts[i]:lasts[i]] end to end into out"},
    {"select_path", select_path, METH_VARARGS, "select_path(best) -> name of the path now in use"},
    {"path_in_use", path_in_use, METH_NOARGS, "path_in_use() -> its name"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", "Hot loops of the corpus; see kernel.py.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) {
    use_best();
    return PyModule_Create(&module);
}

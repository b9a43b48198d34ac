/* BLAKE2b (RFC 7693) with a 16-byte digest, unkeyed, with a 16-byte personalisation: what
 * hashlib.blake2b(data, digest_size=16, person=...) gives, for many short messages at once.
 *
 * With AVX-512 eight messages run in the eight 64-bit lanes of a register; a lane that finishes takes the next
 * message. Elsewhere one message at a time.
 */
#include <stdint.h>
#include <string.h>

#define BLAKE_BLOCK 128

static const uint64_t blake_iv[8] = {
    0x6a09e667f3bcc908ULL, 0xbb67ae8584caa73bULL, 0x3c6ef372fe94f82bULL, 0xa54ff53a5f1d36f1ULL,
    0x510e527fade682d1ULL, 0x9b05688c2b3e6c1fULL, 0x1f83d9abfb41bd6bULL, 0x5be0cd19137e2179ULL};

static const uint8_t blake_sigma[12][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3}};

/* One compression, for V = uint64_t or a vector of lanes; unrolled by the compiler because sigma is constant. */
#define BLAKE_ROTATE(x, n) (((x) >> (n)) | ((x) << (64 - (n))))
#define BLAKE_G(a, b, c, d, x, y)                                                                                     \
    a += b + (x); d = BLAKE_ROTATE(d ^ a, 32); c += d; b = BLAKE_ROTATE(b ^ c, 24);                                    \
    a += b + (y); d = BLAKE_ROTATE(d ^ a, 16); c += d; b = BLAKE_ROTATE(b ^ c, 63);
#define BLAKE_ROUNDS(v, m)                                                                                            \
    _Pragma("GCC unroll 12") for (int r = 0; r < 12; r++) {                                                           \
        const uint8_t *s = blake_sigma[r];                                                                            \
        BLAKE_G(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]])                                                             \
        BLAKE_G(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]])                                                             \
        BLAKE_G(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]])                                                            \
        BLAKE_G(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]])                                                            \
        BLAKE_G(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]])                                                            \
        BLAKE_G(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]])                                                          \
        BLAKE_G(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]])                                                           \
        BLAKE_G(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]])                                                           \
    }

/* The state before the first block: IV xor the parameter block (digest 16, fanout 1, depth 1, personalisation). */
static void blake_start(uint64_t h[8], const uint8_t person[16]) {
    uint64_t words[2];
    memcpy(words, person, 16);
    memcpy(h, blake_iv, 64);
    h[0] ^= 0x01010010ULL;
    h[6] ^= words[0];
    h[7] ^= words[1];
}

static void blake_one(const uint64_t start[8], const uint8_t *data, size_t length, uint8_t out[16]) {
    uint64_t h[8], m[16];
    size_t done = 0;
    memcpy(h, start, 64);
    for (;;) {
        size_t take = length - done < BLAKE_BLOCK ? length - done : BLAKE_BLOCK;
        int last = done + take == length;
        if (take < BLAKE_BLOCK) memset(m, 0, sizeof m);
        memcpy(m, data + done, take);
        done += take;
        uint64_t v[16];
        memcpy(v, h, 64);
        memcpy(v + 8, blake_iv, 64);
        v[12] ^= done;
        if (last) v[14] = ~v[14];
        BLAKE_ROUNDS(v, m)
        for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
        if (last) break;
    }
    memcpy(out, h, 16);
}

static void blake_many_portable(const uint64_t start[8], const uint8_t *data, const int64_t *offsets, int64_t count, uint8_t *out) {
    for (int64_t i = 0; i < count; i++) blake_one(start, data + offsets[i], (size_t)(offsets[i + 1] - offsets[i]), out + 16 * i);
}

#if defined(__x86_64__) && defined(__GNUC__)
typedef uint64_t lanes __attribute__((vector_size(64)));

typedef struct {
    const uint8_t *data;
    size_t left, done;
    int64_t message; /* -1: the lane has run out of messages */
} blake_lane;

__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq"))) static void blake_many_avx512(
    const uint64_t start[8], const uint8_t *data, const int64_t *offsets, int64_t count, uint8_t *out) {
    static const uint8_t zeros[BLAKE_BLOCK];
    union { lanes v[8]; uint64_t w[8][8]; } h;
    uint8_t padded[8][BLAKE_BLOCK];
    blake_lane lane[8];
    int64_t next = 0;
    int busy = 0;
    memset(&h, 0, sizeof h);
    for (int j = 0; j < 8; j++) lane[j].message = -1;
    for (int j = 0; j < 8 && next < count; j++, next++, busy++) {
        lane[j] = (blake_lane){data + offsets[next], (size_t)(offsets[next + 1] - offsets[next]), 0, next};
        for (int i = 0; i < 8; i++) h.w[i][j] = start[i];
    }
    while (busy) {
        const uint8_t *block[8];
        union { lanes v; uint64_t w[8]; } counter, final;
        for (int j = 0; j < 8; j++) {
            blake_lane *l = &lane[j];
            if (l->message < 0) { block[j] = zeros; counter.w[j] = final.w[j] = 0; continue; }
            size_t take = l->left < BLAKE_BLOCK ? l->left : BLAKE_BLOCK;
            block[j] = l->data;
            if (take < BLAKE_BLOCK) {
                memset(padded[j], 0, BLAKE_BLOCK);
                memcpy(padded[j], l->data, take);
                block[j] = padded[j];
            }
            l->data += take; l->left -= take; l->done += take;
            counter.w[j] = l->done;
            final.w[j] = l->left ? 0 : ~0ULL;
        }
        lanes m[16], v[16];
        for (int i = 0; i < 16; i++) {
            uint64_t w[8];
            for (int j = 0; j < 8; j++) memcpy(&w[j], block[j] + 8 * i, 8);
            m[i] = (lanes){w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]};
        }
        for (int i = 0; i < 8; i++) { v[i] = h.v[i]; v[i + 8] = blake_iv[i] - (lanes){0}; }
        v[12] ^= counter.v;
        v[14] ^= final.v;
        BLAKE_ROUNDS(v, m)
        for (int i = 0; i < 8; i++) h.v[i] ^= v[i] ^ v[i + 8];
        for (int j = 0; j < 8; j++) {
            blake_lane *l = &lane[j];
            if (l->message < 0 || l->left) continue;
            memcpy(out + 16 * l->message, &h.w[0][j], 8);
            memcpy(out + 16 * l->message + 8, &h.w[1][j], 8);
            if (next < count) {
                *l = (blake_lane){data + offsets[next], (size_t)(offsets[next + 1] - offsets[next]), 0, next};
                for (int i = 0; i < 8; i++) h.w[i][j] = start[i];
                next++;
            } else {
                l->message = -1;
                busy--;
            }
        }
    }
}
#endif

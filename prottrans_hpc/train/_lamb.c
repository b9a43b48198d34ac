/* LAMB for fp32 tensors on the CPU (You et al. 2020, algorithm 2; lamb.py has the equations) and the sum of squares
 * that gradient clipping needs.
 *
 * An update is bound by memory: 24 bytes a parameter are moved to renew the moments and to add up the norms, 16 more to
 * apply the result, which is computed a second time because that costs less than to store and read it. Consecutive
 * tensors are taken together until they fill a group; the second sweep over a group goes backwards, so that it begins
 * with what the caches still hold. Where ranks hold pieces of tensors, the norms are sums over ranks: then each sweep is
 * a call of its own.
 *
 * Work is cut into chunks of a fixed number of elements. Each chunk is summed by itself, in double precision and in
 * eight interleaved parts, and the sums of chunks are added in their order: so the result depends neither on the number
 * of threads nor on the instruction set. setup.py compiles with -ffp-contract=off, without which a product might or
 * might not be rounded before it is added, and with -fno-math-errno, without which sqrtf is not vectorised.
 *
 * Threads are started afresh in each call (20 microseconds each, next to tens of milliseconds) rather than taken from
 * OpenMP: torch brings an OpenMP of its own, and two pools of busy-waiting threads would fight for the cores.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

/* One build for every x86-64 machine: the loader picks the widest version that the processor has. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

enum { CHUNK = 16384, BLOCK = 512, GROUP = 1 << 20, LANES = 8, MAX_THREADS = 256 };

typedef struct {
    float gradient_factor, beta1, one_minus_beta1, beta2, one_minus_beta2, epsilon, weight_decay, correction1, correction2;
} numbers;

typedef struct {
    float *x, *g, *m, *v;
    int64_t size;
    int adapts;
    float rate; /* learning rate times trust ratio, once the norms are known */
} tensor;

typedef struct {
    int64_t tensor, start, size;
    double x_squares, r_squares;
} chunk;

static inline double add_lanes(const double *lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

static inline void add_squares(const float *restrict a, int64_t size, double *restrict lanes) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += (double)a[i + k] * (double)a[i + k];
    for (int k = 0; i < size; i++, k++) lanes[k] += (double)a[i] * (double)a[i];
}

WIDEST static double squares_of(const float *restrict a, int64_t size) {
    double lanes[LANES] = {0};
    add_squares(a, size, lanes);
    return add_lanes(lanes);
}

/* Equations 1 to 4 for a few elements: renew the moments, and give the direction r + lambda x that follows. */
static inline void renew(const numbers *n, float decay, const float *restrict x, const float *restrict g, float *restrict m, float *restrict v,
                         float *restrict r, int64_t size) {
    const numbers c = *n;
    for (int64_t i = 0; i < size; i++) {
        float scaled = g[i] * c.gradient_factor;
        float m_i = m[i] * c.beta1 + scaled * c.one_minus_beta1, v_i = v[i] * c.beta2 + scaled * scaled * c.one_minus_beta2;
        m[i] = m_i;
        v[i] = v_i;
        r[i] = (m_i * c.correction1) / (sqrtf(v_i * c.correction2) + c.epsilon) + decay * x[i];
    }
}

WIDEST static void first_sweep(const numbers *n, const tensor *t, chunk *c) {
    const float decay = t->adapts ? n->weight_decay : 0.0f;
    double x_lanes[LANES] = {0}, r_lanes[LANES] = {0};
    float r[BLOCK];
    for (int64_t i = 0; i < c->size; i += BLOCK) {
        const int64_t at = c->start + i, size = c->size - i < BLOCK ? c->size - i : BLOCK;
        renew(n, decay, t->x + at, t->g + at, t->m + at, t->v + at, r, size);
        add_squares(r, size, r_lanes);
        add_squares(t->x + at, size, x_lanes);
    }
    c->x_squares = add_lanes(x_lanes);
    c->r_squares = add_lanes(r_lanes);
}

/* Equation 5. */
WIDEST static void second_sweep(const numbers *n, const tensor *t, const chunk *c) {
    float *restrict x = t->x + c->start;
    const float *restrict m = t->m + c->start, *restrict v = t->v + c->start;
    const numbers u = *n;
    const float decay = t->adapts ? u.weight_decay : 0.0f, rate = t->rate;
    for (int64_t i = 0; i < c->size; i++) {
        float r = (m[i] * u.correction1) / (sqrtf(v[i] * u.correction2) + u.epsilon) + decay * x[i];
        x[i] -= rate * r;
    }
}

enum part { UPDATE, MOMENTS, PARAMETERS, SQUARES };

typedef struct {
    enum part part;
    const numbers *numbers;
    double learning_rate;
    tensor *tensors;
    chunk *chunks;
    int64_t num_chunks;
    int num_threads;
    pthread_mutex_t gate;
    pthread_barrier_t barrier;
} job;

typedef struct {
    job *job;
    int index;
} worker;

static void set_rate(const job *j, int64_t first, int64_t end) {
    double x_squares = 0.0, r_squares = 0.0;
    for (int64_t i = first; i < end; i++) {
        x_squares += j->chunks[i].x_squares;
        r_squares += j->chunks[i].r_squares;
    }
    tensor *t = &j->tensors[j->chunks[first].tensor];
    double ratio = t->adapts && x_squares != 0.0 && r_squares != 0.0 ? sqrt(x_squares) / sqrt(r_squares) : 1.0;
    t->rate = (float)(j->learning_rate * ratio);
}

/* The trust ratios of the tensors whose chunks are [first, end): a group never cuts a tensor in two. */
static void set_rates(const job *j, int64_t first, int64_t end) {
    for (int64_t i = first, next; i < end; i = next) {
        for (next = i; next < end && j->chunks[next].tensor == j->chunks[i].tensor; next++)
            ;
        set_rate(j, i, next);
    }
}

static int64_t end_of_group(const job *j, int64_t first) {
    int64_t end = first, size = 0;
    while (end < j->num_chunks) {
        size += j->chunks[end].size;
        end++;
        int tensor_ends = end == j->num_chunks || j->chunks[end].tensor != j->chunks[end - 1].tensor;
        if (tensor_ends && size >= GROUP) break;
    }
    return end;
}

static void meet(job *j) {
    if (j->num_threads > 1) pthread_barrier_wait(&j->barrier);
}

/* One sweep over a chunk. */
static void sweep(const job *j, enum part part, chunk *c) {
    const tensor *t = &j->tensors[c->tensor];
    if (part == MOMENTS)
        first_sweep(j->numbers, t, c);
    else if (part == PARAMETERS)
        second_sweep(j->numbers, t, c);
    else
        c->x_squares = squares_of(t->x + c->start, c->size);
}

static void *work(void *argument) {
    const worker *w = argument;
    job *j = w->job;
    const int is_whole = j->part == UPDATE;
    for (int64_t first = 0, end; first < j->num_chunks; first = end) {
        end = is_whole ? end_of_group(j, first) : j->num_chunks;
        const int64_t count = end - first;
        const int64_t own = first + count * w->index / j->num_threads, own_end = first + count * (w->index + 1) / j->num_threads;
        for (int64_t i = own; i < own_end; i++) sweep(j, is_whole ? MOMENTS : j->part, &j->chunks[i]);
        if (!is_whole) break;
        meet(j);
        if (w->index == 0) set_rates(j, first, end);
        meet(j);
        for (int64_t i = own_end; i-- > own;) sweep(j, PARAMETERS, &j->chunks[i]);
    }
    return NULL;
}

static void *enter(void *argument) {
    job *j = ((const worker *)argument)->job;
    pthread_mutex_lock(&j->gate);
    pthread_mutex_unlock(&j->gate);
    return work(argument);
}

/* Run with as many threads as can be had, this one included; the result is the same with any number. */
static void run(job *j, int wanted) {
    pthread_t threads[MAX_THREADS];
    worker workers[MAX_THREADS];
    int started = 1;
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    pthread_mutex_lock(&j->gate); /* closed until it is known how many have come */
    for (; started < wanted; started++) {
        workers[started] = (worker){j, started};
        if (pthread_create(&threads[started], NULL, enter, &workers[started]) != 0) break;
    }
    j->num_threads = started;
    pthread_barrier_init(&j->barrier, NULL, (unsigned)started);
    pthread_mutex_unlock(&j->gate);
    workers[0] = (worker){j, 0};
    work(&workers[0]);
    for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&j->barrier);
}

/* Fills j->chunks. -1 and a Python error when there is no memory. */
static int cut(job *j, Py_ssize_t num_tensors) {
    int64_t count = 0;
    for (Py_ssize_t i = 0; i < num_tensors; i++) count += (j->tensors[i].size + CHUNK - 1) / CHUNK;
    j->chunks = PyMem_RawMalloc(sizeof(chunk) * (size_t)(count ? count : 1));
    if (!j->chunks) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < num_tensors; i++)
        for (int64_t start = 0; start < j->tensors[i].size; start += CHUNK) {
            int64_t left = j->tensors[i].size - start;
            j->chunks[j->num_chunks++] = (chunk){i, start, left < CHUNK ? left : CHUNK, 0.0, 0.0};
        }
    return 0;
}

/* Tensors from a table of addresses, uint64 [tensors][columns], and sizes, int64 [tensors]. NULL and an error when they do not match. */
static tensor *read_tensors(const Py_buffer *addresses, const Py_buffer *sizes, const Py_buffer *adapts, int columns) {
    const Py_ssize_t count = sizes->len / 8;
    if (sizes->len % 8 || addresses->len != count * 8 * columns || (adapts && adapts->len != count)) {
        PyErr_SetString(PyExc_ValueError, "the tables of addresses, sizes and flags do not describe the same tensors");
        return NULL;
    }
    tensor *tensors = PyMem_RawCalloc((size_t)(count ? count : 1), sizeof(tensor));
    if (!tensors) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint64_t *row = (const uint64_t *)addresses->buf + i * columns;
        tensor *t = &tensors[i];
        t->x = (float *)(uintptr_t)row[0];
        if (columns == 4) {
            t->g = (float *)(uintptr_t)row[1];
            t->m = (float *)(uintptr_t)row[2];
            t->v = (float *)(uintptr_t)row[3];
        }
        t->size = ((const int64_t *)sizes->buf)[i];
        t->adapts = adapts ? ((const uint8_t *)adapts->buf)[i] : 0;
        if (t->size < 0 || (t->size && (!t->x || (columns == 4 && !(t->g && t->m && t->v))))) {
            PyErr_SetString(PyExc_ValueError, "a tensor has a negative size or no memory");
            PyMem_RawFree(tensors);
            return NULL;
        }
    }
    return tensors;
}

static int cut_and_run(job *j, Py_ssize_t num_tensors, int num_threads) {
    if (cut(j, num_tensors) < 0) return -1;
    Py_BEGIN_ALLOW_THREADS;
    pthread_mutex_init(&j->gate, NULL);
    run(j, num_threads);
    pthread_mutex_destroy(&j->gate);
    Py_END_ALLOW_THREADS;
    return 0;
}

/* The rates of an update whose trust ratios, fp64 [tensors], are known. -1 and a Python error when they do not match. */
static int take_ratios(job *j, Py_ssize_t num_tensors, const Py_buffer *ratios) {
    if (!ratios->buf || ratios->len != num_tensors * 8) {
        PyErr_SetString(PyExc_ValueError, "there must be one trust ratio for each tensor");
        return -1;
    }
    for (Py_ssize_t i = 0; i < num_tensors; i++) j->tensors[i].rate = (float)(j->learning_rate * ((const double *)ratios->buf)[i]);
    return 0;
}

/* bytes: fp64 [tensors][2], the squares of x and of r + lambda x. */
static PyObject *squares_by_tensor(const job *j, Py_ssize_t num_tensors) {
    PyObject *result = PyBytes_FromStringAndSize(NULL, num_tensors * 16);
    if (!result) return NULL;
    double *squares = (double *)PyBytes_AS_STRING(result);
    for (Py_ssize_t i = 0; i < 2 * num_tensors; i++) squares[i] = 0.0;
    for (int64_t i = 0; i < j->num_chunks; i++) {
        squares[2 * j->chunks[i].tensor] += j->chunks[i].x_squares;
        squares[2 * j->chunks[i].tensor + 1] += j->chunks[i].r_squares;
    }
    return result;
}

/* An update, or one of its sweeps. */
static PyObject *update(PyObject *arguments, enum part part) {
    Py_buffer addresses, sizes, adapts, ratios = {0};
    double learning_rate, factor, beta1, beta2, epsilon, weight_decay, correction1, correction2;
    int num_threads;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(arguments, "y*y*y*ddddddddi|y*", &addresses, &sizes, &adapts, &learning_rate, &factor, &beta1, &beta2, &epsilon, &weight_decay,
                          &correction1, &correction2, &num_threads, &ratios))
        return NULL;
    const numbers n = {(float)factor,         (float)beta1,        (float)(1.0 - beta1), (float)beta2,      (float)(1.0 - beta2), (float)epsilon,
                       (float)weight_decay, (float)correction1, (float)correction2};
    const Py_ssize_t count = sizes.len / 8;
    job j = {.part = part, .numbers = &n, .learning_rate = learning_rate};
    j.tensors = read_tensors(&addresses, &sizes, &adapts, 4);
    if (j.tensors && (part != PARAMETERS || take_ratios(&j, count, &ratios) == 0) && cut_and_run(&j, count, num_threads) == 0)
        result = part == MOMENTS ? squares_by_tensor(&j, count) : Py_NewRef(Py_None);
    PyMem_RawFree(j.chunks);
    PyMem_RawFree(j.tensors);
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&adapts);
    if (ratios.obj) PyBuffer_Release(&ratios);
    return result;
}

static PyObject *step(PyObject *self, PyObject *arguments) {
    (void)self;
    return update(arguments, UPDATE);
}

static PyObject *moments(PyObject *self, PyObject *arguments) {
    (void)self;
    return update(arguments, MOMENTS);
}

static PyObject *parameters(PyObject *self, PyObject *arguments) {
    (void)self;
    return update(arguments, PARAMETERS);
}

static PyObject *sum_of_squares(PyObject *self, PyObject *arguments) {
    Py_buffer addresses, sizes;
    int num_threads;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "y*y*i", &addresses, &sizes, &num_threads)) return NULL;
    job j = {.part = SQUARES};
    j.tensors = read_tensors(&addresses, &sizes, NULL, 1);
    if (j.tensors && cut_and_run(&j, sizes.len / 8, num_threads) == 0) {
        double sum = 0.0;
        for (int64_t i = 0; i < j.num_chunks; i++) sum += j.chunks[i].x_squares;
        result = PyFloat_FromDouble(sum);
    }
    PyMem_RawFree(j.chunks);
    PyMem_RawFree(j.tensors);
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&sizes);
    return result;
}

static PyMethodDef methods[] = {
    {"step", step, METH_VARARGS,
     "step(addresses, sizes, adapts, learning_rate, gradient_factor, beta1, beta2, epsilon, weight_decay, 1/(1-beta1^t), 1/(1-beta2^t), num_threads)\n\n"
     "One update. addresses: uint64 [tensors][4] of parameter, gradient, first and second moment, fp32 and contiguous."},
    {"moments", moments, METH_VARARGS,
     "moments(...) -> bytes\n\nThe first sweep of `step`, with its arguments: renews the moments. fp64 [tensors][2]: squares of parameters and of directions."},
    {"parameters", parameters, METH_VARARGS,
     "parameters(..., ratios)\n\nThe second sweep of `step`, with its arguments and the trust ratios, fp64 [tensors]: renews the parameters."},
    {"sum_of_squares", sum_of_squares, METH_VARARGS, "sum_of_squares(addresses, sizes, num_threads) -> float\n\nOver all elements. addresses: uint64 [tensors][1]."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_lamb", "LAMB in C; see lamb.py.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__lamb(void) {
    return PyModuleDef_Init(&definition);
}

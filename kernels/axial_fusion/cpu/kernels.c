/* Attention across slices on a CPU: y = softmax(scale · q kᵀ) v of each position and head, and its gradients.

   The rows of one position and head are copied into a thread's scratch memory in fp32, where scores and softmax stay.
   A query sees keys 0 .. end - 1, and every sum stops there: what a query does not see may hold any inf or NaN.
   Scores lie in vectors of 16 keys, results in vectors of 16 channels.

   axial_attention.h is compiled once for each instruction set; the widest that the processor has runs. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WIDTH 16
#define MAX_ROWS 64 /* slices of a group: at most four vectors of scores a query */
#define BLOCK 3     /* rows whose sums are in registers at a time: 5 and 9 slices leave few or none over */
#define INLINE static inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Rows r and r + s of a square exchange every other piece of s numbers: row r takes those that are listed. */
#define EXCHANGE(to, from, s, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)                                    \
    for (int r = 0; r < WIDTH; r++)                                                                              \
        if (!(r & s)) {                                                                                          \
            to[r] = __builtin_shufflevector(from[r], from[r + s], a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p); \
            to[r + s] = __builtin_shufflevector(from[r], from[r + s], a + s, b + s, c + s, d + s, e + s, f + s,  \
                                                g + s, h + s, i + s, j + s, k + s, l + s, m + s, n + s, o + s, p + s); \
        }

typedef struct { /* a tensor (B, N, P, M, D) by its strides in elements, D dense */
    char *data;
    int64_t batch, slice, position, head;
} View;

typedef struct {
    View q, k, v, y, dy, dq, dk, dv;
    const int64_t *lengths; /* (B,), or NULL */
    int64_t batch, queries, keys, positions, heads, dim, dtype, causal, threads, group;
    double scale;
} Axial; /* compiled.py packs it */

_Static_assert(sizeof(void *) == 8, "compiled.py packs pointers as 64 bits");

typedef struct { /* one position and some of its heads */
    int64_t b, p, m, heads;
} Place;

typedef struct {
    const Axial *call;
    void (*run)(const Axial *, float *, Place);
    float *scratch; /* of every thread */
    int64_t items, chunk, next, workers;
} Job;

typedef struct { /* which rows of a sum each row of a result takes: first .. end - 1 */
    int64_t first[MAX_ROWS], end[MAX_ROWS];
} Range;

typedef struct { /* weights of a sum: at[i * row + j * step] is that of row j in row i of the result */
    const float *at;
    int64_t row, step;
} Weights;

typedef struct { /* where a thread's scratch memory holds what, and its size, in numbers */
    int64_t rows, padded, lanes, q, dy, k, v, out, kt, vt, s, ds, size;
} Layout;

/* torch's own GOMP_parallel: a second pool of threads would fight with it for the cores. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static int64_t whole(int64_t size, int64_t of) { return (size + of - 1) / of * of; }

static Layout layout(const Axial *c) {
    Layout l = {whole(c->queries, BLOCK), whole(c->dim, WIDTH), whole(c->keys, WIDTH), .q = 0};
    int64_t more = c->dq.data != NULL, all = c->group * l.padded; /* a row of all heads */
    l.dy = all * l.rows;
    l.k = l.dy + more * all * l.rows;
    l.v = l.k + all * c->keys;
    l.out = l.v + all * c->keys;
    l.kt = l.out + BLOCK * l.padded;
    l.vt = l.kt + l.padded * l.lanes;
    l.s = l.vt + more * l.padded * l.lanes;
    l.ds = l.s + l.rows * l.lanes;
    l.size = l.ds + more * l.rows * l.lanes;
    return l;
}

/* What queries see: the keys of each, and the queries of each key. Gives how many keys are seen at all. */
static int64_t seen(const Axial *c, int64_t b, Range *keys, Range *queries) {
    int64_t used = 0;
    for (int64_t i = 0; i < c->queries; i++) {
        int64_t end = c->causal ? i + 1 + c->keys - c->queries : c->keys;
        if (c->lengths && end > c->lengths[b]) end = c->lengths[b];
        keys->first[i] = 0;
        keys->end[i] = end > 0 ? end : 0;
        for (; used < end; used++) queries->first[used] = i;
    }
    for (int64_t j = used; j < c->keys; j++) queries->first[j] = c->queries;
    for (int64_t j = 0; j < c->keys; j++) queries->end[j] = c->queries;
    return used;
}

static int64_t bytes(const Axial *c) { return c->dtype == FLOAT32 ? 4 : 2; }

static char *address(const View *t, Place at, const Axial *c) {
    return t->data + (at.b * t->batch + at.p * t->position + at.m * t->head) * bytes(c);
}

static void work(void *data) {
    Job *job = data;
    const Axial *c = job->call;
    int64_t worker = __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED), start;
    int64_t groups = whole(c->heads, c->group) / c->group;
    if (worker >= c->threads) return;
    float *scratch = job->scratch + worker * layout(c).size;
    while ((start = __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED)) < job->items)
        for (int64_t item = start; item < start + job->chunk && item < job->items; item++) {
            int64_t m = item % groups * c->group, position = item / groups;
            int64_t heads = c->heads - m < c->group ? c->heads - m : c->group;
            job->run(c, scratch, (Place){position / c->positions, position % c->positions, m, heads});
        }
}

#define LEVEL(name) name##_plain
#define TARGET
#include "axial_attention.h"
#undef LEVEL
#undef TARGET
#ifdef __x86_64__
#define LEVEL(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "axial_attention.h"
#undef LEVEL
#undef TARGET
#define LEVEL(name) name##_avx512
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#include "axial_attention.h"
#undef LEVEL
#undef TARGET
#endif

/* What compiled.py checks: raised whenever `Axial` or a function here changes. */
int64_t kernels_version(void) { return 1; }

/* Which instruction set runs: 0 plain, 1 AVX2, 2 AVX-512. */
int64_t axial_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Forward, or backward where dq is given, on `call->threads` threads; on one where `parallel` is NULL. Gives 0, or 1
   where there is no memory. */
int64_t axial_attention(const Axial *call, Parallel parallel, int64_t level) {
    Job job = {.call = call, .run = call->dq.data ? backward_plain : forward_plain};
#ifdef __x86_64__
    if (level == 1) job.run = call->dq.data ? backward_avx2 : forward_avx2;
    if (level == 2) job.run = call->dq.data ? backward_avx512 : forward_avx512;
#endif
    size_t size = sizeof(float) * (size_t)(call->threads * layout(call).size);
    job.scratch = aligned_alloc(sizeof(Lanes), size);
    if (!job.scratch) return 1;
    memset(job.scratch, 0, size);
    job.items = call->batch * call->positions * (whole(call->heads, call->group) / call->group);
    job.chunk = job.items / (8 * call->threads) + 1;
    if (parallel && call->threads > 1)
        parallel(work, &job, (unsigned)call->threads, 0);
    else
        work(&job);
    free(job.scratch);
    return 0;
}

/* The compiled kernels of a CPU: attention across slices, y = softmax(scale · q kᵀ) v of each position and head,
   attention within slices, of each slice and head, and group norm of images whose channels lie last, all with their
   gradients.

   Attention: scores and softmax stay in a thread's scratch memory, in fp32. Scores have a row for each key and a column
   for each query: a sum over keys adds whole vectors. Rows are copied into scratch memory and back; across slices fp32
   rows whose length is a multiple of the vector are read and written in place.
   Across slices a query sees keys 0 .. end - 1, and every sum stops there: what a query does not see may hold any inf or
   NaN.

   Group norm: an image is read twice, the second time from the cache: for its sums, and for its results, with an
   addition and a ReLU behind them.

   level.h is compiled once for each instruction set; the widest that the processor has runs. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define MAX_ROWS 64 /* slices of a group */
#define BLOCK 5     /* rows of a result that are computed together, in registers: 5 slices are one block, 9 are two */
#define WIDEST 16   /* numbers of the widest vector */
#define LINE 64     /* bytes of a cache line */
#define TILE 32     /* queries of a tile within a slice */
#define KEYS 128    /* keys that a tile meets at a time: their scores stay in the first cache */
#define STREAMED (3 << 20) /* bytes from which a result exceeds the cache: non-temporal stores write it */
#define INLINE static inline __attribute__((always_inline))

static const int32_t NUMBERS[WIDEST] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Rows r and r + s of a square exchange every other piece of s numbers: the lists say what each takes. */
#define EXCHANGE(to, from, s, first, second)                                                                     \
    for (int r = 0; r < WIDTH; r++)                                                                              \
        if (!(r & s)) {                                                                                          \
            to[r] = __builtin_shufflevector(from[r], from[r + s], UNPACK first);                                 \
            to[r + s] = __builtin_shufflevector(from[r], from[r + s], UNPACK second);                            \
        }
#define UNPACK(...) __VA_ARGS__

typedef struct { /* a tensor (B, N, P, M, D) by its strides in elements, D dense; attention is along the rows, which are
                    slices at a position, or for attention within slices the other way round */
    char *data;
    int64_t batch, row, position, head;
} View;

typedef struct {
    View q, k, v, y, dy, dq, dk, dv;
    const int64_t *lengths; /* (B,), or NULL */
    float *norms;           /* (2, B, N, M, P), NULL across slices: largest score, and Σ e^(score - largest) */
    int64_t batch, queries, keys, positions, heads, dim, dtype, causal, threads;
    int64_t group; /* heads, or within a slice queries, of an item */
    double scale;
} Attention; /* compiled.py packs it */

_Static_assert(sizeof(void *) == 8, "compiled.py packs pointers as 64 bits");

typedef struct { /* one position and some of its heads; within a slice, one head and the first of some queries */
    int64_t b, p, m, heads, first;
} Place;

typedef struct { /* rows of one head, by the distance between two */
    float *at;
    int64_t row;
} Rows;

typedef struct { /* where a thread's scratch memory holds what, and its size, in numbers */
    int64_t padded, lanes; /* D and the number of queries, rounded up to whole vectors */
    int64_t direct;        /* rows are read and written where they are */
    int64_t stream;        /* results are written by non-temporal stores */
    int64_t adds;          /* sums are added to what is there */
    int64_t q, dy, dq, k, v, qt, dyt, s, ds, size;
    int64_t dk, dv, y; /* within a slice alone */
} Layout;

typedef struct {
    const Attention *call;
    Layout layout;
    void (*run)(const Attention *, const Layout *, float *, Place);
} AttentionWork;

typedef struct { /* images (T, P, C), dense, C last; compiled.py packs it */
    char *x, *added, *y, *dy, *dx; /* dx: NULL in the forward; added: NULL, or in the backward its gradient */
    const float *weight, *bias;    /* (C,) */
    float *mean, *rstd;            /* (T, groups), results of the forward */
    float *dweight, *dbias;        /* (T, C) */
    int64_t images, pixels, channels, groups, dtype, relu, threads;
    double eps;
} GroupNorm;

typedef struct { /* of one image */
    char *x, *added, *y, *dy, *dx;
    int64_t relu;
} Image;

typedef struct { /* numbers of a tile, how many whole ones an image has, the numbers behind them; rows of a tile */
    int64_t tile, tiles, rest;
    double *first, *second; /* sums over all tiles */
    float *mean, *scale, *shift, *slope;
} Tiles;

typedef struct { /* items that threads share */
    void (*run)(const void *call, float *scratch, int64_t item);
    const void *call;
    float *scratch; /* of every thread */
    int64_t size, items, threads, chunk, next, workers;
} Job;

typedef struct { /* row i of a result is a sum over the rows first[i] .. end[i] - 1 */
    int64_t first[MAX_ROWS], end[MAX_ROWS];
} Range;

typedef struct { /* weights of a sum: at[i * row + j * step] is that of row j in row i of the result */
    const float *at;
    int64_t row, step;
} Weights;

/* torch's own GOMP_parallel: a second pool of threads would fight with it for the cores. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static int64_t whole(int64_t size, int64_t of) { return (size + of - 1) / of * of; }

static int64_t bytes(const Attention *c) { return c->dtype == FLOAT32 ? 4 : 2; }

/* Whether every row of D numbers is whole lines of the cache. */
static int64_t in_lines(const View *t, const Attention *c) {
    uintptr_t all = (uintptr_t)((t->batch | t->row | t->position | t->head | c->dim) * bytes(c));
    return !t->data || (all | (uintptr_t)t->data) % LINE == 0;
}

static Layout layout(const Attention *c, int64_t width) {
    Layout l = {whole(c->dim, width), whole(c->queries, width), .q = 0};
    int64_t more = c->dq.data != NULL, all = c->group * l.padded; /* a row of all heads */
    l.direct = c->dtype == FLOAT32 && c->dim == l.padded;
    int64_t slices = more && c->keys > c->queries ? c->keys : c->queries; /* of the largest result */
    l.stream = l.direct && c->batch * c->positions * c->heads * slices * c->dim * bytes(c) >= STREAMED &&
               in_lines(&c->y, c) && in_lines(&c->dq, c) && in_lines(&c->dk, c) && in_lines(&c->dv, c);
    l.dy = all * c->queries;
    l.dq = l.dy + more * all * c->queries;
    l.k = l.dq + more * all * c->queries;
    l.v = l.k + all * c->keys;
    l.qt = l.v + all * c->keys;
    l.dyt = l.qt + l.padded * l.lanes;
    l.s = l.dyt + more * l.padded * l.lanes;
    l.ds = l.s + c->keys * l.lanes;
    l.size = whole(l.ds + more * c->keys * l.lanes, WIDEST);
    return l;
}

/* Of attention within a slice: k, v and their gradients whole, all else of a tile. */
static Layout tiled(const Attention *c, int64_t width) {
    Layout l = {whole(c->dim, width), TILE, .adds = 1, .k = 0};
    int64_t more = c->dq.data != NULL, head = c->keys * l.padded, tile = TILE * l.padded;
    l.v = head;
    l.dk = l.v + head;
    l.dv = l.dk + more * head;
    l.q = l.dv + more * head;
    l.y = l.dq = l.q + tile;
    l.dy = l.dq + tile;
    l.qt = l.dy + more * tile;
    l.dyt = l.qt + tile;
    l.s = l.dyt + more * tile;
    l.ds = l.s + KEYS * TILE;
    l.size = whole(l.ds + more * KEYS * TILE, WIDEST);
    return l;
}

/* What queries see: the keys of each, and the queries of each key. Gives how many keys are seen at all. */
static int64_t seen(const Attention *c, int64_t b, Range *keys, Range *queries) {
    int64_t used = 0;
    for (int64_t i = 0; i < c->queries; i++) {
        int64_t end = c->causal ? i + 1 + c->keys - c->queries : c->keys;
        if (c->lengths && end > c->lengths[b]) end = c->lengths[b];
        keys->first[i] = 0;
        keys->end[i] = end > 0 ? end : 0;
        for (; used < end; used++) queries->first[used] = i;
    }
    for (int64_t j = used; j < c->keys; j++) queries->first[j] = 0;
    for (int64_t j = 0; j < c->keys; j++) queries->end[j] = j < used ? c->queries : 0;
    return used;
}

static char *address(const View *t, Place at, const Attention *c) {
    return t->data + (at.b * t->batch + at.p * t->position + at.m * t->head) * bytes(c);
}

/* Rows of head m of a place: of the tensor itself, or of its copy. */
static Rows rows_of(const View *t, float *copy, Place at, int64_t m, int64_t stored, const Attention *c,
                    const Layout *l) {
    if (!l->direct) return (Rows){copy + m * stored * l->padded, l->padded};
    at.m += m;
    return (Rows){(float *)address(t, at, c), t->row};
}

/* Prefetches the rows of head m at the next position: the processor does not by itself across such strides. */
static void ahead(const View *t, Place at, int64_t m, int64_t rows, const Attention *c) {
    if (++at.p == c->positions) return;
    at.m += m;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < c->dim * bytes(c); d += LINE)
            __builtin_prefetch(address(t, at, c) + i * t->row * bytes(c) + d);
}

static void axial_item(const void *call, float *scratch, int64_t item) {
    const AttentionWork *work = call;
    const Attention *c = work->call;
    int64_t groups = whole(c->heads, c->group) / c->group, m = item % groups * c->group, position = item / groups;
    int64_t heads = c->heads - m < c->group ? c->heads - m : c->group;
    work->run(c, &work->layout, scratch, (Place){position / c->positions, position % c->positions, m, heads, 0});
}

static void slice_item(const void *call, float *scratch, int64_t item) {
    const AttentionWork *work = call;
    const Attention *c = work->call;
    int64_t groups = whole(c->queries, c->group) / c->group, head = item / groups, slice = head / c->heads;
    Place at = {slice / c->positions, slice % c->positions, head % c->heads, 1, item % groups * c->group};
    work->run(c, &work->layout, scratch, at);
}

/* The tensor from a row on. */
static View from_row(const View *t, int64_t row, const Attention *c) {
    return (View){t->data + row * t->row * bytes(c), t->batch, t->row, t->position, t->head};
}

static int64_t norms(const Attention *c) { return c->batch * c->positions * c->heads * c->queries; }

static float *norms_of(const Attention *c, Place at) {
    return c->norms + ((at.b * c->positions + at.p) * c->heads + at.m) * c->queries;
}

static Image image_of(const GroupNorm *c, int64_t image) {
    int64_t offset = image * c->pixels * c->channels * (c->dtype == FLOAT32 ? 4 : 2);
#define PART(of) (c->of ? c->of + offset : NULL)
    return (Image){PART(x), PART(added), PART(y), PART(dy), PART(dx), c->relu};
#undef PART
}

static int64_t tile_of(const GroupNorm *c, int64_t vectors) {
    int64_t tile = c->channels;
    while (tile % vectors) tile += c->channels;
    return tile;
}

static Tiles tiles(const GroupNorm *c, float *scratch, int64_t vectors) {
    int64_t tile = tile_of(c, vectors), all = c->pixels * c->channels;
    double *sums = (double *)scratch;
    float *rows = (float *)(sums + 2 * tile);
    memset(sums, 0, sizeof *sums * (size_t)(2 * tile));
    return (Tiles){tile, all / tile, all % tile, sums, sums + tile,
                   rows, rows + tile, rows + 2 * tile, rows + 3 * tile};
}

/* Sums of each number of a tile -> those of each channel, in the first C. */
static void by_channel(const GroupNorm *c, const Tiles *l) {
    for (int64_t e = c->channels; e < l->tile; e++) {
        l->first[e % c->channels] += l->first[e];
        l->second[e % c->channels] += l->second[e];
    }
}

/* Sums about the first pixel -> mean and rstd of each group, and the factors of the forward. */
static void spread_moments(const GroupNorm *c, const Tiles *l, int64_t image) {
    int64_t wide = c->channels / c->groups;
    double pixels = (double)c->pixels;
    by_channel(c, l);
    for (int64_t g = 0; g < c->groups; g++) {
        double mean = 0, squares = 0;
        for (int64_t i = g * wide; i < (g + 1) * wide; i++) mean += (l->mean[i] + l->first[i] / pixels) / (double)wide;
        for (int64_t i = g * wide; i < (g + 1) * wide; i++) {
            double own = l->first[i] / pixels, off = l->mean[i] + own - mean;
            squares += l->second[i] / pixels - own * own + off * off;
        }
        if (squares < 0) squares = 0;
        c->mean[image * c->groups + g] = (float)mean;
        c->rstd[image * c->groups + g] = (float)(1 / sqrt(squares / (double)wide + c->eps));
    }
    for (int64_t e = 0; e < l->tile; e++) {
        int64_t i = e % c->channels, g = image * c->groups + i / wide;
        l->mean[e] = c->mean[g];
        l->scale[e] = c->weight[i] * c->rstd[g];
        l->shift[e] = c->bias[i];
    }
}

static void spread_means(const GroupNorm *c, const Tiles *l, int64_t image) {
    int64_t wide = c->channels / c->groups;
    for (int64_t e = 0; e < l->tile; e++) l->mean[e] = c->mean[image * c->groups + e % c->channels / wide];
}

/* Sums of dy and dy · (x - mean) -> gradients of weight and bias, and the factors of dx. */
static void spread_slopes(const GroupNorm *c, const Tiles *l, int64_t image) {
    int64_t wide = c->channels / c->groups;
    double count = (double)(c->pixels * wide);
    by_channel(c, l);
    for (int64_t g = 0; g < c->groups; g++) {
        double rstd = c->rstd[image * c->groups + g], first = 0, second = 0;
        for (int64_t i = g * wide; i < (g + 1) * wide; i++) {
            c->dbias[image * c->channels + i] = (float)l->first[i];
            c->dweight[image * c->channels + i] = (float)(l->second[i] * rstd);
            first += c->weight[i] * l->first[i];
            second += c->weight[i] * l->second[i];
        }
        for (int64_t i = g * wide; i < (g + 1) * wide; i++) {
            l->scale[i] = (float)(c->weight[i] * rstd);
            l->shift[i] = (float)(-first * rstd / count);
            l->slope[i] = (float)(-second * rstd * rstd * rstd / count);
        }
    }
    for (int64_t e = c->channels; e < l->tile; e++) {
        l->scale[e] = l->scale[e - c->channels];
        l->shift[e] = l->shift[e - c->channels];
        l->slope[e] = l->slope[e - c->channels];
    }
}

static void work(void *data) {
    Job *job = data;
    int64_t worker = __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED), start;
    if (worker >= job->threads) return;
    float *scratch = job->scratch + worker * job->size;
    while ((start = __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED)) < job->items)
        for (int64_t item = start; item < start + job->chunk && item < job->items; item++)
            job->run(job->call, scratch, item);
#ifdef __x86_64__
    _mm_sfence(); /* non-temporal stores become visible before the thread ends */
#endif
}

/* All items, by one thread where `parallel` is NULL. `size`: numbers of scratch memory that a thread needs. Gives 0, or
   1 where there is no memory. */
static int64_t share(Job job, Parallel parallel, int64_t size) {
    job.size = whole(size, WIDEST);
    job.chunk = job.items / (8 * job.threads) + 1;
    job.scratch = aligned_alloc(LINE, sizeof(float) * (size_t)(job.threads * job.size));
    if (!job.scratch) return 1;
    if (parallel && job.threads > 1)
        parallel(work, &job, (unsigned)job.threads, 0);
    else
        work(&job);
    free(job.scratch);
    return 0;
}

#define LEVEL(name) name##_plain
#define TARGET
#define WIDTH 4
#define VECTORS 2
#define EXCHANGES                                    \
    EXCHANGE(b, a, 2, (0, 1, 4, 5), (2, 3, 6, 7))    \
    EXCHANGE(a, b, 1, (0, 4, 2, 6), (1, 5, 3, 7))
#ifdef __x86_64__
#define STREAM(to, x) _mm_stream_ps(to, (__m128)(x))
#else
#define STREAM(to, x) *(Loose *)(to) = x
#endif
#include "level.h"

#ifdef __x86_64__
#define LEVEL(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define VECTORS 2
#define EXCHANGES                                                                    \
    EXCHANGE(b, a, 4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))      \
    EXCHANGE(a, b, 2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))      \
    EXCHANGE(b, a, 1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))      \
    memcpy(a, b, sizeof a);
#define STREAM(to, x) _mm256_stream_ps(to, (__m256)(x))
#include "level.h"

#define LEVEL(name) name##_avx512
#ifdef __clang__ /* which has no prefer-vector-width here, and uses 512 bits for these types anyway */
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#define WIDTH 16
#define VECTORS 4
#define EXCHANGES                                                                                     \
    EXCHANGE(b, a, 8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),                       \
             (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))                          \
    EXCHANGE(a, b, 4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),                     \
             (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))                            \
    EXCHANGE(b, a, 2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),                     \
             (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))                            \
    EXCHANGE(a, b, 1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),                    \
             (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#define STREAM(to, x) _mm512_stream_ps(to, (__m512)(x))
#include "level.h"
#endif

/* What compiled.py checks: raised whenever a structure or the arguments of a function change. */
int64_t kernels_version(void) { return 3; }

/* Which instruction set runs: 0 plain, 1 AVX2, 2 AVX-512. */
int64_t kernels_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static int64_t width_of(int64_t level) { return level == 2 ? 16 : level == 1 ? 8 : 4; }

/* The three functions: forward, or backward where dq or dx is given, on `call->threads` threads; on one where
   `parallel` is NULL. They give 0, or 1 where there is no memory. */
int64_t axial_attention(const Attention *call, Parallel parallel, int64_t level) {
    AttentionWork axial = {call, layout(call, width_of(level)), call->dq.data ? backward_plain : forward_plain};
#ifdef __x86_64__
    if (level == 1) axial.run = call->dq.data ? backward_avx2 : forward_avx2;
    if (level == 2) axial.run = call->dq.data ? backward_avx512 : forward_avx512;
#endif
    int64_t groups = whole(call->heads, call->group) / call->group;
    Job job = {axial_item, &axial, .items = call->batch * call->positions * groups, .threads = call->threads};
    return share(job, parallel, axial.layout.size);
}

int64_t slice_attention(const Attention *call, Parallel parallel, int64_t level) {
    AttentionWork slice = {call, tiled(call, width_of(level)), call->dq.data ? within_backward_plain : within_plain};
#ifdef __x86_64__
    if (level == 1) slice.run = call->dq.data ? within_backward_avx2 : within_avx2;
    if (level == 2) slice.run = call->dq.data ? within_backward_avx512 : within_avx512;
#endif
    int64_t groups = whole(call->queries, call->group) / call->group;
    Job job = {slice_item, &slice, .items = call->batch * call->positions * call->heads * groups, .threads = call->threads};
    return share(job, parallel, slice.layout.size);
}

int64_t group_norm(const GroupNorm *call, Parallel parallel, int64_t level) {
    Job job = {group_norm_plain, call, .items = call->images, .threads = call->threads};
#ifdef __x86_64__
    if (level == 1) job.run = group_norm_avx2;
    if (level == 2) job.run = group_norm_avx512;
#endif
    return share(job, parallel, 8 * tile_of(call, 4 * width_of(level))); /* four rows, two of doubles */
}

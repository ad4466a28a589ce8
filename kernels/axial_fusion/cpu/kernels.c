/* Attention across slices on a CPU: y = softmax(scale · q kᵀ) v of each position and head, and its gradients.

   The rows of one position and head are copied into a thread's scratch memory in fp32, where scores and softmax stay.
   A query sees keys 0 .. end - 1, and every sum stops there: what a query does not see may hold any inf or NaN.
   Scores lie in vectors of 16 keys, results in vectors of 16 channels.

   The file includes itself once for each instruction set; the widest that the processor has is picked when it runs. */

#ifndef LEVEL

#include <math.h>
#include <stdint.h>
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
    float *scratch; /* `threads` parts of axial_scratch() numbers, aligned to 64 bytes */
    double scale;
} Axial; /* compiled.py packs it */

_Static_assert(sizeof(void *) == 8, "compiled.py packs pointers as 64 bits");

typedef struct { /* one position and some of its heads */
    int64_t b, p, m, heads;
} Place;

typedef struct {
    const Axial *call;
    void (*run)(const Axial *, float *, Place);
    int64_t items, chunk, next, workers;
} Job;

/* torch's own GOMP_parallel: a second pool of threads would fight with it for the cores. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static int64_t whole(int64_t size, int64_t of) { return (size + of - 1) / of * of; }

int64_t axial_scratch(int64_t queries, int64_t keys, int64_t dim, int64_t group, int64_t gradients) {
    int64_t rows = whole(queries, BLOCK), padded = whole(dim, WIDTH), lanes = whole(keys, WIDTH);
    int64_t forward = group * (rows + 2 * keys) * padded + BLOCK * padded + (padded + rows) * lanes;
    return forward + (gradients ? group * rows * padded + (padded + rows) * lanes : 0);
}

static int64_t scratch_of(const Axial *c) {
    return axial_scratch(c->queries, c->keys, c->dim, c->group, c->dq.data != NULL);
}

/* Query i sees keys 0 .. end[i] - 1, and key j is seen by queries first[j] and later; how many keys are seen at all. */
static int64_t seen(const Axial *c, int64_t b, int64_t *first, int64_t *end) {
    int64_t used = 0;
    for (int64_t i = 0; i < c->queries; i++) {
        end[i] = c->causal ? i + 1 + c->keys - c->queries : c->keys;
        if (c->lengths && end[i] > c->lengths[b]) end[i] = c->lengths[b];
        if (end[i] < 0) end[i] = 0;
        for (; used < end[i]; used++) first[used] = i;
    }
    for (int64_t j = used; j < c->keys; j++) first[j] = c->queries;
    return used;
}

static char *address(const View *t, Place at, const Axial *c) {
    return t->data + (at.b * t->batch + at.p * t->position + at.m * t->head) * (c->dtype == FLOAT32 ? 4 : 2);
}

static void work(void *data) {
    Job *job = data;
    const Axial *c = job->call;
    int64_t worker = __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED), start;
    int64_t groups = whole(c->heads, c->group) / c->group;
    if (worker >= c->threads) return;
    float *scratch = c->scratch + worker * scratch_of(c);
    while ((start = __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED)) < job->items)
        for (int64_t item = start; item < start + job->chunk && item < job->items; item++) {
            int64_t m = item % groups * c->group, position = item / groups;
            int64_t heads = c->heads - m < c->group ? c->heads - m : c->group;
            job->run(c, scratch, (Place){position / c->positions, position % c->positions, m, heads});
        }
}

#define LEVEL(name) name##_plain
#define TARGET
#include "kernels.c"
#undef LEVEL
#undef TARGET
#ifdef __x86_64__
#define LEVEL(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "kernels.c"
#undef LEVEL
#undef TARGET
#define LEVEL(name) name##_avx512
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#include "kernels.c"
#undef LEVEL
#undef TARGET
#endif

/* What compiled.py checks: raised whenever `Axial` or a function here changes. */
int64_t kernels_version(void) { return 1; }

/* Which instruction set runs: 0 plain, 1 AVX2, 2 AVX-512. */
int64_t axial_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                   ? 2
                   : 1;
#endif
    return 0;
}

/* Forward, or backward where dq is given, on `call->threads` threads; on one where `parallel` is NULL. */
void axial_attention(const Axial *call, Parallel parallel, int64_t level) {
    Job job = {call, call->dq.data ? backward_plain : forward_plain, 0, 0, 0, 0};
#ifdef __x86_64__
    if (level == 1) job.run = call->dq.data ? backward_avx2 : forward_avx2;
    if (level == 2) job.run = call->dq.data ? backward_avx512 : forward_avx512;
#endif
    job.items = call->batch * call->positions * (whole(call->heads, call->group) / call->group);
    job.chunk = job.items / (8 * call->threads) + 1;
    memset(call->scratch, 0, sizeof(float) * (size_t)(call->threads * scratch_of(call)));
    if (parallel && call->threads > 1)
        parallel(work, &job, (unsigned)call->threads, 0);
    else
        work(&job);
}

#else

INLINE TARGET Lanes LEVEL(either)(Ints mask, Lanes a, Lanes b) {
    return (Lanes)(((Ints)a & mask) | ((Ints)b & ~mask));
}

INLINE TARGET Lanes LEVEL(load)(const char *from, int64_t dtype) {
    Lanes x;
    if (dtype == FLOAT32) {
        memcpy(&x, from, sizeof x);
        return x;
    }
    Halves h;
    memcpy(&h, from, sizeof h);
    Bits bits = __builtin_convertvector(h, Bits);
    if (dtype == BFLOAT16) return (Lanes)(bits << 16);
    Bits magnitude = (bits & 0x7fff) << 13;
    Lanes finite = (Lanes)magnitude * 0x1p112f; /* moves the exponent's bias, of denormals too */
    Lanes other = (Lanes)(magnitude | 0x7f800000);
    x = LEVEL(either)((bits & 0x7c00) == 0x7c00, other, finite);
    return (Lanes)((Bits)x | (bits & 0x8000) << 16);
}

/* Rounds to nearest, ties to even. */
INLINE TARGET void LEVEL(store)(char *to, Lanes x, int64_t dtype) {
    if (dtype == FLOAT32) {
        memcpy(to, &x, sizeof x);
        return;
    }
    Bits bits = (Bits)x, result;
    if (dtype == BFLOAT16) {
        result = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        result = (Bits)LEVEL(either)(x != x, (Lanes)((bits >> 16) | 0x40), (Lanes)result);
    } else {
        Bits magnitude = bits & 0x7fffffff;
        Bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        Bits small = (Bits)((Lanes)magnitude + 0.5f) - 0x3f000000; /* the sum rounds a denormal */
        Bits large = 0x7c00 | ((Bits)(x != x) & 0x200);
        result = (Bits)LEVEL(either)((Ints)(magnitude < 0x38800000), (Lanes)small, (Lanes)normal);
        result = (Bits)LEVEL(either)((Ints)(magnitude >= 0x477ff000), (Lanes)large, (Lanes)result);
        result |= (bits >> 16) & 0x8000;
    }
    Halves h = __builtin_convertvector(result, Halves);
    memcpy(to, &h, sizeof h);
}

/* e^x of x <= 0; 0 below -87, NaN of NaN. */
INLINE TARGET Lanes LEVEL(exponential)(Lanes x) {
    Lanes shifted = x * 1.44269504f + 12582912.0f; /* rounds to an integer, which the low bits hold */
    Lanes n = shifted - 12582912.0f;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Lanes none = {0};
    return LEVEL(either)(x < -87.0f, none, p * (Lanes)(((Bits)shifted + 127) << 23));
}

#define FOLD(combine)                                                                                            \
    x = combine(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));         \
    x = combine(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));         \
    x = combine(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));         \
    x = combine(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));         \
    return x

INLINE TARGET Lanes LEVEL(plus)(Lanes a, Lanes b) { return a + b; }
INLINE TARGET Lanes LEVEL(larger)(Lanes a, Lanes b) { return LEVEL(either)(a > b, a, b); }
INLINE TARGET Lanes LEVEL(sum)(Lanes x) { FOLD(LEVEL(plus)); }        /* in every lane */
INLINE TARGET Lanes LEVEL(maximum)(Lanes x) { FOLD(LEVEL(larger)); }
#undef FOLD

/* Which of the keys 16n .. 16n + 15 are before `end`. */
INLINE TARGET Ints LEVEL(before)(int64_t end, int n) {
    Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < (int32_t)end - WIDTH * n;
}

INLINE TARGET void LEVEL(copy_as)(float *to, const char *from, int64_t slice, int64_t head, int64_t rows, int64_t stored,
                                  int64_t heads, int64_t dim, int64_t dtype) {
    int64_t size = dtype == FLOAT32 ? 4 : 2, padded = whole(dim, WIDTH), full = dim / WIDTH * WIDTH;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t m = 0; m < heads; m++) {
            const char *row = from + (i * slice + m * head) * size;
            float *copied = to + (m * stored + i) * padded;
            Lanes x;
            for (int64_t d = 0; d < full; d += WIDTH) {
                x = LEVEL(load)(row + d * size, dtype);
                memcpy(copied + d, &x, sizeof x);
            }
            if (full < dim) {
                char tail[4 * WIDTH] = {0};
                memcpy(tail, row + full * size, (size_t)((dim - full) * size));
                x = LEVEL(load)(tail, dtype);
                memcpy(copied + full, &x, sizeof x);
            }
        }
}

/* Rows of a position and its heads m .. m + heads - 1 -> (heads, stored, padded), in fp32 and with zeros up to whole
   vectors. Heads lie side by side in memory, slices far apart. */
static TARGET void LEVEL(copy)(float *to, const View *t, Place at, int64_t rows, int64_t stored, const Axial *c) {
    const char *from = address(t, at, c);
    if (c->dtype == FLOAT32)
        LEVEL(copy_as)(to, from, t->slice, t->head, rows, stored, at.heads, c->dim, FLOAT32);
    else if (c->dtype == BFLOAT16)
        LEVEL(copy_as)(to, from, t->slice, t->head, rows, stored, at.heads, c->dim, BFLOAT16);
    else
        LEVEL(copy_as)(to, from, t->slice, t->head, rows, stored, at.heads, c->dim, FLOAT16);
}

/* x (rows, padded) -> (padded, lanes), blocks of 16 × 16 by four exchanges of ever longer pieces. */
static TARGET void LEVEL(transpose)(float *to, const float *x, int64_t rows, int64_t padded, int64_t lanes) {
    for (int64_t j = 0; j < rows; j += WIDTH)
        for (int64_t d = 0; d < padded; d += WIDTH) {
            Lanes a[WIDTH], b[WIDTH];
            for (int r = 0; r < WIDTH; r++)
                a[r] = j + r < rows ? *(const Lanes *)(x + (j + r) * padded + d) : (Lanes){0};
            EXCHANGE(b, a, 8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
            EXCHANGE(a, b, 4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
            EXCHANGE(b, a, 2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
            EXCHANGE(a, b, 1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
            for (int r = 0; r < WIDTH; r++) *(Lanes *)(to + (d + r) * lanes + j) = a[r];
        }
}

INLINE TARGET void LEVEL(scores_of)(Lanes *s, const float *x, const Lanes *y, int64_t rows, int64_t padded, int vectors) {
    for (int64_t i = 0; i < rows; i += BLOCK, x += BLOCK * padded, s += BLOCK * vectors) {
        Lanes even[BLOCK][MAX_ROWS / WIDTH] = {0}, odd[BLOCK][MAX_ROWS / WIDTH] = {0}; /* sums that need not wait */
        const Lanes *column = y;
        for (int64_t d = 0; d < padded; d += 2, column += 2 * vectors)
            for (int r = 0; r < BLOCK; r++)
                for (int n = 0; n < vectors; n++) {
                    even[r][n] += x[r * padded + d] * column[n];
                    odd[r][n] += x[r * padded + d + 1] * column[vectors + n];
                }
        for (int r = 0; r < BLOCK; r++)
            for (int n = 0; n < vectors; n++) s[r * vectors + n] = even[r][n] + odd[r][n];
    }
}

/* s (rows, lanes) = x y, of x (rows up to whole blocks, padded) and y (padded, lanes). */
static TARGET void LEVEL(scores)(Lanes *s, const float *x, const Lanes *y, int64_t rows, int64_t padded, int vectors) {
    switch (vectors) {
        case 1: LEVEL(scores_of)(s, x, y, rows, padded, 1); break;
        case 2: LEVEL(scores_of)(s, x, y, rows, padded, 2); break;
        case 3: LEVEL(scores_of)(s, x, y, rows, padded, 3); break;
        default: LEVEL(scores_of)(s, x, y, rows, padded, 4);
    }
}

/* Scores s (rows, lanes) become weights; a query's weight of keys from its end on is 0. */
static TARGET void LEVEL(softmax)(Lanes *s, const int64_t *ends, int64_t rows, int vectors, float scale) {
    Lanes none = {0}, most[MAX_ROWS];
    for (int64_t i = 0; i < rows; i++) { /* one step for all queries, then the next: none waits for the one before */
        most[i] = none - (float)INFINITY;
        for (int n = 0; n < vectors; n++) {
            Lanes x = s[i * vectors + n] * scale;
            most[i] = LEVEL(either)(LEVEL(before)(ends[i], n) & (x > most[i]), x, most[i]);
        }
        most[i] = LEVEL(maximum)(most[i]);
    }
    for (int64_t i = 0; i < rows; i++)
        for (int n = 0; n < vectors; n++) {
            Lanes x = LEVEL(exponential)(s[i * vectors + n] * scale - most[i]);
            s[i * vectors + n] = LEVEL(either)(LEVEL(before)(ends[i], n), x, none);
        }
    for (int64_t i = 0; i < rows; i++) {
        Lanes total = {0};
        for (int n = 0; n < vectors; n++) total += s[i * vectors + n];
        total = 1.0f / LEVEL(sum)(total);
        for (int n = 0; n < vectors && ends[i]; n++) s[i * vectors + n] *= total;
    }
}

/* Weights p and their gradients dp become the gradients of q·k: p · (dp - Σ p · dp) · scale. */
static TARGET void LEVEL(through_softmax)(Lanes *dp, const Lanes *p, const int64_t *ends, int64_t rows, int vectors, float scale) {
    for (int64_t i = 0; i < rows; i++, p += vectors, dp += vectors) {
        Lanes total = {0}, none = {0};
        for (int n = 0; n < vectors; n++) total += LEVEL(either)(LEVEL(before)(ends[i], n), p[n] * dp[n], none);
        total = LEVEL(sum)(total);
        for (int n = 0; n < vectors; n++)
            dp[n] = LEVEL(either)(LEVEL(before)(ends[i], n), p[n] * (dp[n] - total) * scale, none);
    }
}

/* Row r of y = Σ_j w[r · apart + j · step] x_j, for `rows` of them and channels d .. d + 16 · vectors - 1. */
INLINE TARGET void LEVEL(sums_of)(float *y, const float *w, int64_t apart, int64_t step, const float *x, int64_t count,
                                  int64_t padded, int rows, int vectors) {
    Lanes sums[BLOCK][4] = {0};
    for (int64_t j = 0; j < count; j++)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < vectors; n++)
                sums[r][n] += w[r * apart + j * step] * ((const Lanes *)(x + j * padded))[n];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++) ((Lanes *)(y + r * padded))[n] = sums[r][n];
}

INLINE TARGET void LEVEL(sums)(float *y, const float *w, int64_t apart, int64_t step, const float *x, int64_t count,
                               int64_t padded, int rows) {
    int64_t d = 0;
    for (; d + 4 * WIDTH <= padded; d += 4 * WIDTH) LEVEL(sums_of)(y + d, w, apart, step, x + d, count, padded, rows, 4);
    for (; d + 2 * WIDTH <= padded; d += 2 * WIDTH) LEVEL(sums_of)(y + d, w, apart, step, x + d, count, padded, rows, 2);
    for (; d < padded; d += WIDTH) LEVEL(sums_of)(y + d, w, apart, step, x + d, count, padded, rows, 1);
}

INLINE TARGET void LEVEL(write_as)(char *to, const float *y, int64_t dim, int64_t dtype) {
    int64_t size = dtype == FLOAT32 ? 4 : 2, d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) LEVEL(store)(to + size * d, *(const Lanes *)(y + d), dtype);
    if (d < dim) {
        char tail[4 * WIDTH];
        LEVEL(store)(tail, *(const Lanes *)(y + d), dtype);
        memcpy(to + size * d, tail, (size_t)(size * (dim - d)));
    }
}

/* Rows of a result, in the tensor's dtype: row r is Σ_j w[r · apart + j · step] x_j over j = first[r] .. end[r] - 1. */
static TARGET void LEVEL(combine)(const View *t, char *to, float *y, const float *w, int64_t apart, int64_t step,
                                  const float *x, const int64_t *first, const int64_t *end, int64_t rows, const Axial *c) {
    int64_t padded = whole(c->dim, WIDTH), size = c->dtype == FLOAT32 ? 4 : 2;
    for (int64_t i = 0, block; i < rows; i += block) {
        block = i + BLOCK <= rows && first[i] == first[i + BLOCK - 1] && end[i] == end[i + BLOCK - 1] ? BLOCK : 1;
        const float *weights = w + i * apart + first[i] * step, *from = x + first[i] * padded;
        if (block == BLOCK)
            LEVEL(sums)(y, weights, apart, step, from, end[i] - first[i], padded, BLOCK);
        else
            LEVEL(sums)(y, weights, apart, step, from, end[i] - first[i], padded, 1);
        for (int64_t r = 0; r < block; r++) {
            char *row = to + (i + r) * t->slice * size;
            if (c->dtype == FLOAT32)
                LEVEL(write_as)(row, y + r * padded, c->dim, FLOAT32);
            else if (c->dtype == BFLOAT16)
                LEVEL(write_as)(row, y + r * padded, c->dim, BFLOAT16);
            else
                LEVEL(write_as)(row, y + r * padded, c->dim, FLOAT16);
        }
    }
}

static TARGET void LEVEL(forward)(const Axial *c, float *scratch, Place at) {
    int64_t rows = whole(c->queries, BLOCK), padded = whole(c->dim, WIDTH), lanes = whole(c->keys, WIDTH);
    float *q = scratch, *k = q + c->group * rows * padded, *v = k + c->group * c->keys * padded;
    float *out = v + c->group * c->keys * padded, *kt = out + BLOCK * padded, *s = kt + padded * lanes;
    int64_t size = c->dtype == FLOAT32 ? 4 : 2, first[MAX_ROWS], end[MAX_ROWS], used = seen(c, at.b, first, end);
    LEVEL(copy)(q, &c->q, at, c->queries, rows, c);
    LEVEL(copy)(k, &c->k, at, used, c->keys, c);
    LEVEL(copy)(v, &c->v, at, used, c->keys, c);
    for (int64_t m = 0; m < at.heads; m++) {
        LEVEL(transpose)(kt, k, used, padded, lanes);
        LEVEL(scores)((Lanes *)s, q, (Lanes *)kt, c->queries, padded, (int)(lanes / WIDTH));
        LEVEL(softmax)((Lanes *)s, end, c->queries, (int)(lanes / WIDTH), (float)c->scale);
        char *y = address(&c->y, at, c) + m * c->y.head * size;
        LEVEL(combine)(&c->y, y, out, s, lanes, 1, v, (const int64_t[MAX_ROWS]){0}, end, c->queries, c);
        q += rows * padded, k += c->keys * padded, v += c->keys * padded;
    }
}

static TARGET void LEVEL(backward)(const Axial *c, float *scratch, Place at) {
    int64_t rows = whole(c->queries, BLOCK), padded = whole(c->dim, WIDTH), lanes = whole(c->keys, WIDTH);
    float *q = scratch, *dy = q + c->group * rows * padded, *k = dy + c->group * rows * padded;
    float *v = k + c->group * c->keys * padded, *out = v + c->group * c->keys * padded;
    float *kt = out + BLOCK * padded, *vt = kt + padded * lanes, *s = vt + padded * lanes, *ds = s + rows * lanes;
    int64_t size = c->dtype == FLOAT32 ? 4 : 2, first[MAX_ROWS], end[MAX_ROWS], last[MAX_ROWS];
    int64_t zero[MAX_ROWS] = {0}, used = seen(c, at.b, first, end);
    int vectors = (int)(lanes / WIDTH);
    for (int64_t j = 0; j < c->keys; j++) last[j] = c->queries;
    LEVEL(copy)(q, &c->q, at, c->queries, rows, c);
    LEVEL(copy)(dy, &c->dy, at, c->queries, rows, c);
    LEVEL(copy)(k, &c->k, at, used, c->keys, c);
    LEVEL(copy)(v, &c->v, at, used, c->keys, c);
    for (int64_t m = 0; m < at.heads; m++) {
        LEVEL(transpose)(kt, k, used, padded, lanes);
        LEVEL(transpose)(vt, v, used, padded, lanes);
        LEVEL(scores)((Lanes *)s, q, (Lanes *)kt, c->queries, padded, vectors);
        LEVEL(scores)((Lanes *)ds, dy, (Lanes *)vt, c->queries, padded, vectors);
        LEVEL(softmax)((Lanes *)s, end, c->queries, vectors, (float)c->scale);
        LEVEL(through_softmax)((Lanes *)ds, (Lanes *)s, end, c->queries, vectors, (float)c->scale);
        char *dq = address(&c->dq, at, c) + m * c->dq.head * size;
        char *dk = address(&c->dk, at, c) + m * c->dk.head * size;
        char *dv = address(&c->dv, at, c) + m * c->dv.head * size;
        LEVEL(combine)(&c->dq, dq, out, ds, lanes, 1, k, zero, end, c->queries, c);
        LEVEL(combine)(&c->dk, dk, out, ds, 1, lanes, q, first, last, c->keys, c);
        LEVEL(combine)(&c->dv, dv, out, s, 1, lanes, dy, first, last, c->keys, c);
        q += rows * padded, dy += rows * padded, k += c->keys * padded, v += c->keys * padded;
    }
}

#endif

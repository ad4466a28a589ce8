/* The kernels of kernels.c for one instruction set: LEVEL names its functions, TARGET says what they may use. */

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

INLINE TARGET void LEVEL(copy_as)(float *to, const View *t, Place at, int64_t rows, int64_t stored, const Axial *c, int64_t dtype) {
    int64_t size = dtype == FLOAT32 ? 4 : 2, padded = whole(c->dim, WIDTH), full = c->dim / WIDTH * WIDTH;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t m = 0; m < at.heads; m++) {
            const char *row = address(t, at, c) + (i * t->slice + m * t->head) * size;
            float *copied = to + (m * stored + i) * padded;
            Lanes x;
            for (int64_t d = 0; d < full; d += WIDTH) {
                x = LEVEL(load)(row + d * size, dtype);
                memcpy(copied + d, &x, sizeof x);
            }
            if (full < c->dim) {
                char tail[4 * WIDTH] = {0};
                memcpy(tail, row + full * size, (size_t)((c->dim - full) * size));
                x = LEVEL(load)(tail, dtype);
                memcpy(copied + full, &x, sizeof x);
            }
        }
}

/* Rows of a position's heads -> (heads, stored, padded), in fp32 and with zeros up to whole vectors. Heads lie side by
   side in memory, slices far apart. */
static TARGET void LEVEL(copy)(float *to, const View *t, Place at, int64_t rows, int64_t stored, const Axial *c) {
    if (c->dtype == FLOAT32)
        LEVEL(copy_as)(to, t, at, rows, stored, c, FLOAT32);
    else if (c->dtype == BFLOAT16)
        LEVEL(copy_as)(to, t, at, rows, stored, c, BFLOAT16);
    else
        LEVEL(copy_as)(to, t, at, rows, stored, c, FLOAT16);
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

/* `rows` rows of Σ_j weight · x_j, channels d .. d + 16 · vectors - 1 of them. */
INLINE TARGET void LEVEL(sums_of)(float *y, Weights w, const float *x, int64_t count, int64_t padded, int rows, int vectors) {
    Lanes sums[BLOCK][4] = {0};
    for (int64_t j = 0; j < count; j++)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < vectors; n++)
                sums[r][n] += w.at[r * w.row + j * w.step] * ((const Lanes *)(x + j * padded))[n];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++) ((Lanes *)(y + r * padded))[n] = sums[r][n];
}

INLINE TARGET void LEVEL(sums)(float *y, Weights w, const float *x, int64_t count, int64_t padded, int rows) {
    int64_t d = 0;
    for (; d + 4 * WIDTH <= padded; d += 4 * WIDTH) LEVEL(sums_of)(y + d, w, x + d, count, padded, rows, 4);
    for (; d + 2 * WIDTH <= padded; d += 2 * WIDTH) LEVEL(sums_of)(y + d, w, x + d, count, padded, rows, 2);
    for (; d < padded; d += WIDTH) LEVEL(sums_of)(y + d, w, x + d, count, padded, rows, 1);
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

/* Rows of a result, in the tensor's dtype: sums of rows of x over their ranges. */
static TARGET void LEVEL(combine)(const View *t, Place at, float *y, Weights w, const float *x, const Range *range, int64_t rows,
                                  const Axial *c) {
    int64_t padded = whole(c->dim, WIDTH);
    char *to = address(t, at, c);
    for (int64_t i = 0, block; i < rows; i += block) {
        int64_t first = range->first[i], end = range->end[i], last = i + BLOCK - 1;
        block = last < rows && first == range->first[last] && end == range->end[last] ? BLOCK : 1;
        Weights here = {w.at + i * w.row + first * w.step, w.row, w.step};
        if (block == BLOCK)
            LEVEL(sums)(y, here, x + first * padded, end - first, padded, BLOCK);
        else
            LEVEL(sums)(y, here, x + first * padded, end - first, padded, 1);
        for (int64_t r = 0; r < block; r++) {
            char *row = to + (i + r) * t->slice * bytes(c);
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
    Layout l = layout(c);
    Range keys, queries;
    float *q = scratch + l.q, *k = scratch + l.k, *v = scratch + l.v, *kt = scratch + l.kt, *s = scratch + l.s;
    int64_t used = seen(c, at.b, &keys, &queries);
    LEVEL(copy)(q, &c->q, at, c->queries, l.rows, c);
    LEVEL(copy)(k, &c->k, at, used, c->keys, c);
    LEVEL(copy)(v, &c->v, at, used, c->keys, c);
    for (int64_t m = 0; m < at.heads; m++, at.m++) {
        LEVEL(transpose)(kt, k, used, l.padded, l.lanes);
        LEVEL(scores)((Lanes *)s, q, (Lanes *)kt, c->queries, l.padded, (int)(l.lanes / WIDTH));
        LEVEL(softmax)((Lanes *)s, keys.end, c->queries, (int)(l.lanes / WIDTH), (float)c->scale);
        LEVEL(combine)(&c->y, at, scratch + l.out, (Weights){s, l.lanes, 1}, v, &keys, c->queries, c);
        q += l.rows * l.padded, k += c->keys * l.padded, v += c->keys * l.padded;
    }
}

static TARGET void LEVEL(backward)(const Axial *c, float *scratch, Place at) {
    Layout l = layout(c);
    Range keys, queries;
    float *q = scratch + l.q, *dy = scratch + l.dy, *k = scratch + l.k, *v = scratch + l.v, *out = scratch + l.out;
    float *kt = scratch + l.kt, *vt = scratch + l.vt, *s = scratch + l.s, *ds = scratch + l.ds;
    int64_t used = seen(c, at.b, &keys, &queries);
    int vectors = (int)(l.lanes / WIDTH);
    LEVEL(copy)(q, &c->q, at, c->queries, l.rows, c);
    LEVEL(copy)(dy, &c->dy, at, c->queries, l.rows, c);
    LEVEL(copy)(k, &c->k, at, used, c->keys, c);
    LEVEL(copy)(v, &c->v, at, used, c->keys, c);
    for (int64_t m = 0; m < at.heads; m++, at.m++) {
        LEVEL(transpose)(kt, k, used, l.padded, l.lanes);
        LEVEL(transpose)(vt, v, used, l.padded, l.lanes);
        LEVEL(scores)((Lanes *)s, q, (Lanes *)kt, c->queries, l.padded, vectors);
        LEVEL(scores)((Lanes *)ds, dy, (Lanes *)vt, c->queries, l.padded, vectors);
        LEVEL(softmax)((Lanes *)s, keys.end, c->queries, vectors, (float)c->scale);
        LEVEL(through_softmax)((Lanes *)ds, (Lanes *)s, keys.end, c->queries, vectors, (float)c->scale);
        LEVEL(combine)(&c->dq, at, out, (Weights){ds, l.lanes, 1}, k, &keys, c->queries, c);
        LEVEL(combine)(&c->dk, at, out, (Weights){ds, 1, l.lanes}, q, &queries, c->keys, c);
        LEVEL(combine)(&c->dv, at, out, (Weights){s, 1, l.lanes}, dy, &queries, c->keys, c);
        q += l.rows * l.padded, dy += l.rows * l.padded, k += c->keys * l.padded, v += c->keys * l.padded;
    }
}

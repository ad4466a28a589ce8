/* Attention across slices for one instruction set; level.h includes it. */

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

/* Mask of vector n of the queries: lane i is set if query WIDTH · n + i is `first` or later. */
INLINE TARGET Ints LEVEL(from)(int64_t first, int64_t n) {
    Ints lane;
    memcpy(&lane, NUMBERS, sizeof lane);
    return lane >= (int32_t)(first - WIDTH * n);
}

INLINE TARGET void LEVEL(copy_as)(float *to, const View *t, Place at, int64_t rows, int64_t stored, const Attention *c,
                                  int64_t dtype) {
    int64_t size = dtype == FLOAT32 ? 4 : 2, padded = whole(c->dim, WIDTH), full = c->dim / WIDTH * WIDTH;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t m = 0; m < at.heads; m++) {
            const char *row = address(t, at, c) + (i * t->row + m * t->head) * size;
            float *copied = to + (m * stored + i) * padded;
            for (int64_t d = 0; d < full; d += WIDTH) *(Lanes *)(copied + d) = LEVEL(load)(row + d * size, dtype);
            if (full < c->dim) {
                char tail[4 * WIDTH] = {0};
                memcpy(tail, row + full * size, (size_t)((c->dim - full) * size));
                *(Lanes *)(copied + full) = LEVEL(load)(tail, dtype);
            }
        }
}

/* Rows of a position's heads -> (heads, stored, padded), in fp32 and with zeros up to whole vectors. Heads lie side by
   side in memory, slices far apart. */
static TARGET void LEVEL(copy)(float *to, const View *t, Place at, int64_t rows, int64_t stored, const Attention *c) {
    if (c->dtype == FLOAT32)
        LEVEL(copy_as)(to, t, at, rows, stored, c, FLOAT32);
    else if (c->dtype == BFLOAT16)
        LEVEL(copy_as)(to, t, at, rows, stored, c, BFLOAT16);
    else
        LEVEL(copy_as)(to, t, at, rows, stored, c, FLOAT16);
}

/* Transposes x (rows, padded) to (padded, lanes) in blocks of WIDTH × WIDTH; columns beyond `rows` are 0. */
static TARGET void LEVEL(transpose)(float *to, Rows x, int64_t rows, const Layout *l) {
    for (int64_t j = 0; j < rows; j += WIDTH)
        for (int64_t d = 0; d < l->padded; d += WIDTH) {
            Lanes a[WIDTH] = {0}, b[WIDTH];
            for (int r = 0; r < WIDTH; r++)
                if (j + r < rows) a[r] = *(const Loose *)(x.at + (j + r) * x.row + d);
            EXCHANGES
            for (int r = 0; r < WIDTH; r++) *(Lanes *)(to + (d + r) * l->lanes + j) = a[r];
        }
}

INLINE TARGET void LEVEL(scores_of)(float *s, Rows x, const float *y, const Layout *l, int rows, int vectors) {
    Lanes even[BLOCK][2] = {0}, odd[BLOCK][2] = {0}; /* two shorten the chain of additions */
    for (int64_t d = 0; d < l->padded; d += 2, y += 2 * l->lanes)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < vectors; n++) {
                even[r][n] += x.at[r * x.row + d] * ((const Lanes *)y)[n];
                odd[r][n] += x.at[r * x.row + d + 1] * ((const Lanes *)(y + l->lanes))[n];
            }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++) ((Lanes *)(s + r * l->lanes))[n] = even[r][n] + odd[r][n];
}

INLINE TARGET void LEVEL(scores_by)(float *s, Rows x, const float *y, int64_t rows, const Layout *l, int vectors) {
    for (int64_t block; rows; rows -= block, s += block * l->lanes, x.at += block * x.row)
        switch (block = rows < BLOCK ? rows : BLOCK) {
            case 1: LEVEL(scores_of)(s, x, y, l, 1, vectors); break;
            case 2: LEVEL(scores_of)(s, x, y, l, 2, vectors); break;
            case 3: LEVEL(scores_of)(s, x, y, l, 3, vectors); break;
            case 4: LEVEL(scores_of)(s, x, y, l, 4, vectors); break;
            default: LEVEL(scores_of)(s, x, y, l, BLOCK, vectors);
        }
}

/* s (rows, lanes) = x y, of x (rows, padded) and y (padded, lanes). */
static TARGET void LEVEL(scores)(float *s, Rows x, const float *y, int64_t rows, const Layout *l) {
    int64_t n = 0;
    if (VECTORS == 4)
        for (; n + 2 * WIDTH <= l->lanes; n += 2 * WIDTH) LEVEL(scores_by)(s + n, x, y + n, rows, l, 2);
    for (; n < l->lanes; n += WIDTH) LEVEL(scores_by)(s + n, x, y + n, rows, l, 1);
}

/* Scores s (keys, lanes of queries) become weights; those of queries that do not see the key become 0. */
static TARGET void LEVEL(softmax)(float *scores, const int64_t *first, int64_t keys, const Layout *l, float scale) {
    int64_t vectors = l->lanes / WIDTH;
    for (int64_t n = 0; n < vectors; n++) {
        Lanes *s = (Lanes *)scores + n, none = {0}, most = none - (float)INFINITY, total = none;
        for (int64_t j = 0; j < keys; j++) {
            Lanes x = s[j * vectors] *= scale;
            most = LEVEL(either)(LEVEL(from)(first[j], n) & (x > most), x, most);
        }
        for (int64_t j = 0; j < keys; j++) {
            Lanes x = LEVEL(exponential)(s[j * vectors] - most);
            total += s[j * vectors] = LEVEL(either)(LEVEL(from)(first[j], n), x, none);
        }
        total = 1.0f / total;
        for (int64_t j = 0; j < keys; j++)
            s[j * vectors] = LEVEL(either)(LEVEL(from)(first[j], n), s[j * vectors] * total, none);
    }
}

/* Weights p and their gradients dp become the gradients of q·k: p · (dp - Σ p · dp) · scale. */
static TARGET void LEVEL(through_softmax)(float *gradients, const float *weights, const int64_t *first, int64_t keys,
                                          const Layout *l, float scale) {
    int64_t vectors = l->lanes / WIDTH;
    for (int64_t n = 0; n < vectors; n++) {
        Lanes *dp = (Lanes *)gradients + n, none = {0}, total = none;
        const Lanes *p = (const Lanes *)weights + n;
        for (int64_t j = 0; j < keys; j++)
            total += LEVEL(either)(LEVEL(from)(first[j], n), p[j * vectors] * dp[j * vectors], none);
        for (int64_t j = 0; j < keys; j++) {
            Lanes x = p[j * vectors] * (dp[j * vectors] - total) * scale;
            dp[j * vectors] = LEVEL(either)(LEVEL(from)(first[j], n), x, none);
        }
    }
}

/* `rows` rows of Σ_j weight · x_j, channels d .. d + vectors · WIDTH - 1 of them. */
INLINE TARGET void LEVEL(sums_of)(Rows y, Weights w, Rows x, int64_t count, int64_t d, const Layout *l, int rows,
                                  int vectors) {
    Lanes sums[BLOCK][VECTORS] = {0};
    if (l->adds)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < vectors; n++) sums[r][n] = *(const Loose *)(y.at + r * y.row + d + n * WIDTH);
    for (int64_t j = 0; j < count; j++)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < vectors; n++)
                sums[r][n] += w.at[r * w.row + j * w.step] * ((const Loose *)(x.at + j * x.row + d))[n];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vectors; n++) {
            float *to = y.at + r * y.row + d + n * WIDTH;
            if (l->stream)
                STREAM(to, sums[r][n]);
            else
                *(Loose *)to = sums[r][n];
        }
}

INLINE TARGET void LEVEL(sums)(Rows y, Weights w, Rows x, int64_t count, const Layout *l, int rows) {
    int64_t d = 0;
    for (; d + VECTORS * WIDTH <= l->padded; d += VECTORS * WIDTH)
        LEVEL(sums_of)(y, w, x, count, d, l, rows, VECTORS);
    for (; d + 2 * WIDTH <= l->padded; d += 2 * WIDTH) LEVEL(sums_of)(y, w, x, count, d, l, rows, 2);
    for (; d < l->padded; d += WIDTH) LEVEL(sums_of)(y, w, x, count, d, l, rows, 1);
}

/* Writes y, the rows of one head's result: row i is the weighted sum of the rows of x in range i. */
static TARGET void LEVEL(combine)(Rows y, Weights w, Rows x, const Range *range, int64_t rows, const Layout *l) {
    for (int64_t i = 0, block; i < rows; i += block, y.at += block * y.row) {
        int64_t first = range->first[i], end = range->end[i], left = rows - i < BLOCK ? rows - i : BLOCK;
        for (block = 1; block < left && first == range->first[i + block] && end == range->end[i + block];) block++;
        Weights here = {w.at + i * w.row + first * w.step, w.row, w.step};
        Rows part = {x.at + first * x.row, x.row};
        switch (block) {
            case 1: LEVEL(sums)(y, here, part, end - first, l, 1); break;
            case 2: LEVEL(sums)(y, here, part, end - first, l, 2); break;
            case 3: LEVEL(sums)(y, here, part, end - first, l, 3); break;
            case 4: LEVEL(sums)(y, here, part, end - first, l, 4); break;
            default: LEVEL(sums)(y, here, part, end - first, l, BLOCK);
        }
    }
}

INLINE TARGET void LEVEL(write_as)(const View *t, Place at, const float *from, int64_t rows, const Attention *c,
                                   int64_t dtype) {
    int64_t size = dtype == FLOAT32 ? 4 : 2, padded = whole(c->dim, WIDTH), full = c->dim / WIDTH * WIDTH;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t m = 0; m < at.heads; m++) {
            char *row = address(t, at, c) + (i * t->row + m * t->head) * size;
            const float *y = from + (m * rows + i) * padded;
            for (int64_t d = 0; d < full; d += WIDTH) LEVEL(store)(row + size * d, *(const Lanes *)(y + d), dtype);
            if (full < c->dim) {
                char tail[4 * WIDTH];
                LEVEL(store)(tail, *(const Lanes *)(y + full), dtype);
                memcpy(row + size * full, tail, (size_t)(size * (c->dim - full)));
            }
        }
}

/* The inverse of `copy`. */
static TARGET void LEVEL(write)(const View *t, Place at, const float *from, int64_t rows, const Attention *c) {
    if (c->dtype == FLOAT32)
        LEVEL(write_as)(t, at, from, rows, c, FLOAT32);
    else if (c->dtype == BFLOAT16)
        LEVEL(write_as)(t, at, from, rows, c, BFLOAT16);
    else
        LEVEL(write_as)(t, at, from, rows, c, FLOAT16);
}

static TARGET void LEVEL(forward)(const Attention *c, const Layout *l, float *scratch, Place at) {
    Range keys, queries;
    float *qt = scratch + l->qt, *s = scratch + l->s;
    int64_t used = seen(c, at.b, &keys, &queries);
    if (!l->direct) {
        LEVEL(copy)(scratch + l->q, &c->q, at, c->queries, c->queries, c);
        LEVEL(copy)(scratch + l->k, &c->k, at, used, c->keys, c);
        LEVEL(copy)(scratch + l->v, &c->v, at, used, c->keys, c);
    }
    for (int64_t m = 0; m < at.heads; m++) {
        Rows q = rows_of(&c->q, scratch + l->q, at, m, c->queries, c, l);
        Rows k = rows_of(&c->k, scratch + l->k, at, m, c->keys, c, l);
        Rows v = rows_of(&c->v, scratch + l->v, at, m, c->keys, c, l);
        Rows y = rows_of(&c->y, scratch + l->q, at, m, c->queries, c, l); /* q is read no more */
        if (l->stream) {
            ahead(&c->q, at, m, c->queries, c);
            ahead(&c->k, at, m, used, c);
            ahead(&c->v, at, m, used, c);
        }
        LEVEL(transpose)(qt, q, c->queries, l);
        LEVEL(scores)(s, k, qt, used, l);
        LEVEL(softmax)(s, queries.first, used, l, (float)c->scale);
        LEVEL(combine)(y, (Weights){s, 1, l->lanes}, v, &keys, c->queries, l);
    }
    if (!l->direct) LEVEL(write)(&c->y, at, scratch + l->q, c->queries, c);
}

static TARGET void LEVEL(backward)(const Attention *c, const Layout *l, float *scratch, Place at) {
    Range keys, queries;
    float *qt = scratch + l->qt, *dyt = scratch + l->dyt, *s = scratch + l->s, *ds = scratch + l->ds;
    int64_t used = seen(c, at.b, &keys, &queries);
    if (!l->direct) {
        LEVEL(copy)(scratch + l->q, &c->q, at, c->queries, c->queries, c);
        LEVEL(copy)(scratch + l->k, &c->k, at, used, c->keys, c);
        LEVEL(copy)(scratch + l->v, &c->v, at, used, c->keys, c);
        LEVEL(copy)(scratch + l->dy, &c->dy, at, c->queries, c->queries, c);
    }
    for (int64_t m = 0; m < at.heads; m++) {
        Rows q = rows_of(&c->q, scratch + l->q, at, m, c->queries, c, l);
        Rows k = rows_of(&c->k, scratch + l->k, at, m, c->keys, c, l);
        Rows v = rows_of(&c->v, scratch + l->v, at, m, c->keys, c, l);
        Rows dy = rows_of(&c->dy, scratch + l->dy, at, m, c->queries, c, l);
        Rows dq = rows_of(&c->dq, scratch + l->dq, at, m, c->queries, c, l);
        Rows dk = rows_of(&c->dk, scratch + l->k, at, m, c->keys, c, l); /* k and v are read no more */
        Rows dv = rows_of(&c->dv, scratch + l->v, at, m, c->keys, c, l);
        if (l->stream) {
            ahead(&c->q, at, m, c->queries, c);
            ahead(&c->k, at, m, used, c);
            ahead(&c->v, at, m, used, c);
            ahead(&c->dy, at, m, c->queries, c);
        }
        LEVEL(transpose)(qt, q, c->queries, l);
        LEVEL(transpose)(dyt, dy, c->queries, l);
        LEVEL(scores)(s, k, qt, used, l);
        LEVEL(scores)(ds, v, dyt, used, l);
        LEVEL(softmax)(s, queries.first, used, l, (float)c->scale);
        LEVEL(through_softmax)(ds, s, queries.first, used, l, (float)c->scale);
        LEVEL(combine)(dq, (Weights){ds, 1, l->lanes}, k, &keys, c->queries, l);
        LEVEL(combine)(dk, (Weights){ds, l->lanes, 1}, q, &queries, c->keys, l);
        LEVEL(combine)(dv, (Weights){s, l->lanes, 1}, dy, &queries, c->keys, l);
    }
    if (l->direct) return;
    LEVEL(write)(&c->dq, at, scratch + l->dq, c->queries, c);
    LEVEL(write)(&c->dk, at, scratch + l->k, c->keys, c);
    LEVEL(write)(&c->dv, at, scratch + l->v, c->keys, c);
}

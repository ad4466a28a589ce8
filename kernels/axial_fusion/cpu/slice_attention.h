/* Attention within slices for one instruction set; level.h includes it.

   A tile of queries meets KEYS keys at a time, and corrects its sums where a later key has a larger score. */

/* Adds rows Σ_j weight · x_j to the rows of y, both of l->padded numbers. */
static TARGET void LEVEL(add_sums)(Rows y, Weights w, Rows x, int64_t count, int64_t rows, const Layout *l) {
    for (int64_t block; rows; rows -= block, y.at += block * y.row, w.at += block * w.row)
        switch (block = rows < BLOCK ? rows : BLOCK) {
            case 1: LEVEL(sums)(y, w, x, count, l, 1); break;
            case 2: LEVEL(sums)(y, w, x, count, l, 2); break;
            case 3: LEVEL(sums)(y, w, x, count, l, 3); break;
            case 4: LEVEL(sums)(y, w, x, count, l, 4); break;
            default: LEVEL(sums)(y, w, x, count, l, BLOCK);
        }
}

/* Transposes a tile of rows, and multiplies it by `scale`. */
static TARGET void LEVEL(tile_of)(float *to, Rows x, int64_t rows, const Layout *l, float scale) {
    LEVEL(transpose)(to, x, rows, l);
    for (int64_t d = 0; d < l->padded * l->lanes; d += WIDTH) *(Lanes *)(to + d) *= scale;
}

/* Scores s (keys, lanes) become e^(s - most), `most` the largest of these and of all before; `total` sums them up.
   `kept` is the factor of sums over the keys before. */
static TARGET void LEVEL(add_keys)(float *scores, int64_t keys, int64_t lanes, float *most, float *total,
                                   float *kept) {
    for (int64_t n = 0; n < lanes; n += WIDTH) {
        Lanes before = *(Lanes *)(most + n), top = before, none = {0}, sum = none;
        for (int64_t j = 0; j < keys; j++) {
            Lanes x = *(Lanes *)(scores + j * lanes + n);
            top = LEVEL(either)(x > top, x, top);
        }
        Lanes base = LEVEL(either)(top < -FLT_MAX, none, top); /* -inf - -inf is NaN */
        for (int64_t j = 0; j < keys; j++) {
            Lanes *x = (Lanes *)(scores + j * lanes + n);
            sum += *x = LEVEL(exponential)(*x - base);
        }
        Lanes factor = LEVEL(exponential)(before - base);
        *(Lanes *)(kept + n) = factor;
        *(Lanes *)(total + n) = *(Lanes *)(total + n) * factor + sum;
        *(Lanes *)(most + n) = top;
    }
}

static TARGET void LEVEL(multiply)(Rows y, const float *factors, int64_t rows, const Layout *l) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < l->padded; d += WIDTH) *(Lanes *)(y.at + i * y.row + d) *= factors[i];
}

/* y of the queries first .. first + c->group - 1 of a head. */
static TARGET void LEVEL(within)(const Attention *c, const Layout *given, float *scratch, Place at) {
    Layout tile = *given, *l = &tile;
    float *qt = scratch + l->qt, *s = scratch + l->s, *sums = norms_of(c, at);
    float most[TILE] __attribute__((aligned(LINE))), total[TILE] __attribute__((aligned(LINE)));
    float kept[TILE] __attribute__((aligned(LINE)));
    Rows k = {scratch + l->k, l->padded}, v = {scratch + l->v, l->padded};
    Rows q = {scratch + l->q, l->padded}, y = {scratch + l->y, l->padded};
    int64_t first = at.first, end = first + c->group < c->queries ? first + c->group : c->queries;
    LEVEL(copy)(k.at, &c->k, at, c->keys, c->keys, c);
    LEVEL(copy)(v.at, &c->v, at, c->keys, c->keys, c);
    for (int64_t rows; first < end; first += rows) {
        View from = from_row(&c->q, first, c), to = from_row(&c->y, first, c);
        rows = end - first < TILE ? end - first : TILE;
        l->lanes = whole(rows, WIDTH);
        LEVEL(copy)(q.at, &from, at, rows, rows, c);
        LEVEL(tile_of)(qt, q, rows, l, (float)c->scale);
        memset(y.at, 0, sizeof(float) * (size_t)(rows * l->padded));
        for (int64_t i = 0; i < TILE; i++) most[i] = -INFINITY, total[i] = 0;
        for (int64_t j = 0; j < c->keys; j += KEYS) {
            int64_t keys = c->keys - j < KEYS ? c->keys - j : KEYS;
            LEVEL(scores)(s, (Rows){k.at + j * k.row, k.row}, qt, keys, l);
            LEVEL(add_keys)(s, keys, l->lanes, most, total, kept);
            if (j) LEVEL(multiply)(y, kept, rows, l);
            LEVEL(add_sums)(y, (Weights){s, 1, l->lanes}, (Rows){v.at + j * v.row, v.row}, keys, rows, l);
        }
        for (int64_t i = 0; i < rows; i++) {
            sums[first + i] = most[i];
            sums[first + i + norms(c)] = total[i];
            total[i] = 1 / total[i];
        }
        LEVEL(multiply)(y, total, rows, l);
        LEVEL(write)(&to, at, y.at, rows, c);
    }
}

/* Σ_d x · y of each row, 0 behind the rows; a and b are scratch memory for TILE vectors. */
static TARGET void LEVEL(dots)(float *to, Rows x, Rows y, int64_t rows, const Layout *l, float *a, float *b) {
    Layout narrow = {.padded = WIDTH, .lanes = l->lanes};
    for (int64_t i = 0; i < rows; i++) {
        Lanes sum = {0};
        for (int64_t d = 0; d < l->padded; d += WIDTH)
            sum += *(Lanes *)(x.at + i * x.row + d) * *(Lanes *)(y.at + i * y.row + d);
        *(Lanes *)(a + i * WIDTH) = sum;
    }
    LEVEL(transpose)(b, (Rows){a, WIDTH}, rows, &narrow);
    for (int64_t n = 0; n < l->lanes; n += WIDTH) {
        Lanes sum = {0};
        for (int64_t r = 0; r < WIDTH; r++) sum += *(Lanes *)(b + r * l->lanes + n);
        *(Lanes *)(to + n) = sum;
    }
}

/* Scores s and gradients dp (keys, lanes) become weights p and p · (dp - own) · scale. */
static TARGET void LEVEL(through_keys)(float *s, float *dp, int64_t keys, int64_t lanes, const float *most,
                                       const float *total, const float *own, float scale) {
    for (int64_t n = 0; n < lanes; n += WIDTH)
        for (int64_t j = n; j < keys * lanes; j += lanes) {
            Lanes p = LEVEL(exponential)(*(Lanes *)(s + j) - *(const Lanes *)(most + n));
            *(Lanes *)(s + j) = p *= *(const Lanes *)(total + n);
            *(Lanes *)(dp + j) = p * (*(Lanes *)(dp + j) - *(const Lanes *)(own + n)) * scale;
        }
}

/* Gradients of q, k and v of a head. */
static TARGET void LEVEL(within_backward)(const Attention *c, const Layout *given, float *scratch, Place at) {
    Layout tile = *given, *l = &tile;
    float *qt = scratch + l->qt, *dyt = scratch + l->dyt, *s = scratch + l->s, *ds = scratch + l->ds;
    float most[TILE] __attribute__((aligned(LINE))), total[TILE] __attribute__((aligned(LINE)));
    float own[TILE] __attribute__((aligned(LINE)));
    const float *sums = norms_of(c, at);
    Rows k = {scratch + l->k, l->padded}, v = {scratch + l->v, l->padded};
    Rows dk = {scratch + l->dk, l->padded}, dv = {scratch + l->dv, l->padded};
    Rows q = {scratch + l->q, l->padded}, dy = {scratch + l->dy, l->padded}, dq = {scratch + l->dq, l->padded};
    LEVEL(copy)(k.at, &c->k, at, c->keys, c->keys, c);
    LEVEL(copy)(v.at, &c->v, at, c->keys, c->keys, c);
    memset(dk.at, 0, sizeof(float) * (size_t)(c->keys * l->padded));
    memset(dv.at, 0, sizeof(float) * (size_t)(c->keys * l->padded));
    for (int64_t first = 0, rows; first < c->queries; first += rows) {
        View of_q = from_row(&c->q, first, c), of_y = from_row(&c->y, first, c), of_dy = from_row(&c->dy, first, c);
        View of_dq = from_row(&c->dq, first, c);
        rows = c->queries - first < TILE ? c->queries - first : TILE;
        l->lanes = whole(rows, WIDTH);
        LEVEL(copy)(q.at, &of_q, at, rows, rows, c);
        LEVEL(copy)(dy.at, &of_dy, at, rows, rows, c);
        LEVEL(copy)(dq.at, &of_y, at, rows, rows, c); /* until its sums are known */
        LEVEL(dots)(own, dy, dq, rows, l, s, ds);
        memset(most, 0, sizeof most);
        memset(total, 0, sizeof total);
        for (int64_t i = 0; i < rows; i++) {
            if (sums[first + i] > -INFINITY) most[i] = sums[first + i];
            total[i] = 1 / sums[first + i + norms(c)];
        }
        LEVEL(tile_of)(qt, q, rows, l, (float)c->scale);
        LEVEL(tile_of)(dyt, dy, rows, l, 1);
        memset(dq.at, 0, sizeof(float) * (size_t)(rows * l->padded));
        for (int64_t j = 0; j < c->keys; j += KEYS) {
            int64_t keys = c->keys - j < KEYS ? c->keys - j : KEYS;
            Rows some = {k.at + j * k.row, k.row};
            LEVEL(scores)(s, some, qt, keys, l);
            LEVEL(scores)(ds, (Rows){v.at + j * v.row, v.row}, dyt, keys, l);
            LEVEL(through_keys)(s, ds, keys, l->lanes, most, total, own, (float)c->scale);
            LEVEL(add_sums)(dq, (Weights){ds, 1, l->lanes}, some, keys, rows, l);
            LEVEL(add_sums)((Rows){dk.at + j * dk.row, dk.row}, (Weights){ds, l->lanes, 1}, q, rows, keys, l);
            LEVEL(add_sums)((Rows){dv.at + j * dv.row, dv.row}, (Weights){s, l->lanes, 1}, dy, rows, keys, l);
        }
        LEVEL(write)(&of_dq, at, dq.at, rows, c);
    }
    LEVEL(write)(&c->dk, at, dk.at, c->keys, c);
    LEVEL(write)(&c->dv, at, dv.at, c->keys, c);
}

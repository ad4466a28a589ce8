/* Group norm of images (P, C) with C last, for one instruction set; level.h includes it.

   A tile is the shortest run of whole pixels that is also whole vectors, four by four. What belongs to a channel is
   held for each number of a tile, so that any number of channels is read by whole vectors. */

#define FOUR (4 * WIDTH)

/* `count` numbers, and zeros up to a whole vector. */
INLINE TARGET Lanes LEVEL(take)(const char *from, int64_t count, int64_t dtype) {
    if (count >= WIDTH) return LEVEL(load)(from, dtype);
    char some[4 * WIDTH] = {0};
    memcpy(some, from, (size_t)(count * (dtype == FLOAT32 ? 4 : 2)));
    return LEVEL(load)(some, dtype);
}

INLINE TARGET void LEVEL(give)(char *to, Lanes x, int64_t count, int64_t dtype) {
    char some[4 * WIDTH];
    LEVEL(store)(count >= WIDTH ? to : some, x, dtype);
    if (count < WIDTH) memcpy(to, some, (size_t)(count * (dtype == FLOAT32 ? 4 : 2)));
}

/* dy where the ReLU let y through, or made it NaN. */
INLINE TARGET Lanes LEVEL(gradient)(Image at, int64_t from, int64_t count, int64_t dtype) {
    Lanes dy = LEVEL(take)(at.dy + from, count, dtype), none = {0};
    return at.relu ? LEVEL(either)(LEVEL(take)(at.y + from, count, dtype) <= none, none, dy) : dy;
}

/* Adds x - mean and its square to two sums; in the backward dy and dy · (x - mean). */
INLINE TARGET void LEVEL(add)(Lanes *first, Lanes *second, const float *mean, Image at, int64_t from, int64_t count,
                              int64_t dtype) {
    Lanes x = LEVEL(take)(at.x + from, count, dtype) - *(const Lanes *)mean, none = {0};
    Lanes dy = at.dx ? LEVEL(gradient)(at, from, count, dtype) : LEVEL(either)(~LEVEL(from)(count, 0), x, none);
    *first += dy;
    *second += dy * x;
}

/* The two sums of each number of a tile over all tiles. */
INLINE TARGET void LEVEL(tile_sums)(const Tiles *l, Image at, int64_t dtype) {
    int64_t size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t n = 0; n < l->tile; n += FOUR)
        for (int64_t t = 0; t < l->tiles;) {
            Lanes first[4] = {0}, second[4] = {0}; /* of at most 256 numbers, which doubles add up */
            for (int64_t end = t + 256 < l->tiles ? t + 256 : l->tiles; t < end; t++)
                for (int i = 0; i < 4; i++) {
                    int64_t e = n + i * WIDTH;
                    LEVEL(add)(first + i, second + i, l->mean + e, at, (t * l->tile + e) * size, WIDTH, dtype);
                }
            for (int i = 0; i < FOUR; i++) {
                l->first[n + i] += first[i / WIDTH][i % WIDTH];
                l->second[n + i] += second[i / WIDTH][i % WIDTH];
            }
        }
    for (int64_t e = 0; e < l->rest; e += WIDTH) {
        Lanes first = {0}, second = {0};
        LEVEL(add)(&first, &second, l->mean + e, at, (l->tiles * l->tile + e) * size, l->rest - e, dtype);
        for (int i = 0; i < WIDTH; i++) {
            l->first[e + i] += first[i];
            l->second[e + i] += second[i];
        }
    }
}

/* y = (x - mean) · scale + shift + added, through the ReLU; in the backward dx = dy · scale + (x - mean) · slope +
   shift, and dy is the gradient of what was added. */
INLINE TARGET void LEVEL(result)(const Tiles *l, Image at, int64_t e, int64_t from, int64_t count, int64_t dtype) {
    Lanes x = LEVEL(take)(at.x + from, count, dtype) - *(const Lanes *)(l->mean + e), none = {0};
    Lanes scale = *(const Lanes *)(l->scale + e), shift = *(const Lanes *)(l->shift + e);
    if (at.dx) {
        Lanes dy = LEVEL(gradient)(at, from, count, dtype);
        if (at.added) LEVEL(give)(at.added + from, dy, count, dtype);
        LEVEL(give)(at.dx + from, dy * scale + x * *(const Lanes *)(l->slope + e) + shift, count, dtype);
    } else {
        Lanes y = x * scale + shift;
        if (at.added) y += LEVEL(take)(at.added + from, count, dtype);
        LEVEL(give)(at.y + from, at.relu ? LEVEL(either)(y <= none, none, y) : y, count, dtype);
    }
}

INLINE TARGET void LEVEL(results)(const Tiles *l, Image at, int64_t dtype) {
    int64_t size = dtype == FLOAT32 ? 4 : 2, first = 0;
    for (int64_t t = 0; t < l->tiles; t++, first += l->tile * size)
        for (int64_t e = 0; e < l->tile; e += WIDTH) LEVEL(result)(l, at, e, first + e * size, WIDTH, dtype);
    for (int64_t e = 0; e < l->rest; e += WIDTH) LEVEL(result)(l, at, e, first + e * size, l->rest - e, dtype);
}

INLINE TARGET void LEVEL(group_norm_as)(const GroupNorm *c, float *scratch, int64_t image, int64_t dtype) {
    Tiles l = tiles(c, scratch, FOUR);
    Image at = image_of(c, image);
    if (c->dx) { /* a copy for each, without the other's branches */
        spread_means(c, &l, image);
        LEVEL(tile_sums)(&l, at, dtype);
        spread_slopes(c, &l, image);
        LEVEL(results)(&l, at, dtype);
        return;
    }
    at.dx = NULL;
    for (int64_t e = 0; e < l.tile; e++) /* sums are about the first pixel, so that few digits cancel */
        l.mean[e] = LEVEL(take)(at.x + e % c->channels * (dtype == FLOAT32 ? 4 : 2), 1, dtype)[0];
    LEVEL(tile_sums)(&l, at, dtype);
    spread_moments(c, &l, image);
    LEVEL(results)(&l, at, dtype);
}

static TARGET void LEVEL(group_norm)(const void *call, float *scratch, int64_t image) {
    const GroupNorm *c = call;
    if (c->dtype == FLOAT32)
        LEVEL(group_norm_as)(c, scratch, image, FLOAT32);
    else if (c->dtype == BFLOAT16)
        LEVEL(group_norm_as)(c, scratch, image, BFLOAT16);
    else
        LEVEL(group_norm_as)(c, scratch, image, FLOAT16);
}

#undef FOUR

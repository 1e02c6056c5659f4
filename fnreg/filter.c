/* Separable symmetric filters of images (Z, Y, X), with zeros outside: per axis k
 *   out(i) = scale_k(i) sum_t taps_k(|t|) data(i + t),  |t| <= radius_k
 * `before` applies the scale to the data instead, which is the transpose.  scale is (X + Y + Z) or NULL for ones.
 *
 * A task is one plane of one item.  A thread walks its planes in order and keeps those that the last axis needs,
 * filtered along the others, in a ring: so data is read once and out written once.  `lost` is set where there is no
 * memory for that. */
#define ACROSS JOIN(NAME, _across)
#define FILTER JOIN(NAME, _filter)
#define VECTOR JOIN(NAME, _vector)
#define LANES ((int64_t)(64 / sizeof(REAL)))
#define WIDE 4 /* vectors that are summed side by side, so that none waits for the last */

typedef REAL VECTOR __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));

/* out = scale sum_t taps(|t|) rows[t]: rows are where the neighbours begin, NULL outside. */
static void ACROSS(const REAL *const *rows, const REAL *taps, int64_t radius, REAL scale, int64_t count, REAL *restrict out) {
    int64_t low = -radius, high = radius, p = 0;
    while (low < 0 && !rows[low]) low++;
    while (high > 0 && !rows[high]) high--;
    for (; p + WIDE * LANES <= count; p += WIDE * LANES) {
        VECTOR sum[WIDE] = {{0}};
        for (int64_t t = low; t <= high; t++) {
            const REAL w = taps[t < 0 ? -t : t];
            const VECTOR *row = (const VECTOR *)(rows[t] + p);
            for (int k = 0; k < WIDE; k++) sum[k] += w * row[k];
        }
        for (int k = 0; k < WIDE; k++) ((VECTOR *)(out + p))[k] = scale * sum[k];
    }
    for (; p < count && count >= LANES; p += LANES) {
        if (p > count - LANES) p = count - LANES; /* the last vector may sum some places again */
        VECTOR sum = {0};
        for (int64_t t = low; t <= high; t++) sum += taps[t < 0 ? -t : t] * *(const VECTOR *)(rows[t] + p);
        *(VECTOR *)(out + p) = scale * sum;
    }
    for (; p < count; p++) {
        REAL sum = 0;
        for (int64_t t = low; t <= high; t++) sum += taps[t < 0 ? -t : t] * rows[t][p];
        out[p] = scale * sum;
    }
}

void FILTER(const REAL *data, REAL *out, const int64_t *n, const REAL *taps, const int64_t *radius, const REAL *scale, int before,
            int64_t *lost, int64_t begin, int64_t end) {
    const int64_t X = n[0], Y = n[1], Z = n[2], rx = radius[0], ry = radius[1], rz = radius[2], plane = X * Y;
    const int64_t deep = 2 * rz + 1, reach = rx > ry ? (rx > rz ? rx : rz) : (ry > rz ? ry : rz), width = X + 2 * rx;
    const REAL *tx = taps, *ty = tx + rx + 1, *tz = ty + ry + 1, *sx = scale, *sy = sx + X, *sz = sy + Y;
    REAL *memory = calloc((size_t)(deep * plane + plane + width), sizeof(REAL));
    const REAL **rows = malloc((size_t)(2 * reach + 1) * sizeof(REAL *));
    if (!memory || !rows) {
        free(memory), free(rows);
        *lost = 1;
        return;
    }
    REAL *ring = memory, *along_x = ring + deep * plane, *row = along_x + plane;
    const REAL **at = rows + reach;
    const unsigned mode = flush_denormals();
    for (int64_t s = begin; s < end;) {
        const int64_t item = s / Z, first = s - item * Z, last = first + (end - s < Z - first ? end - s : Z - first);
        const REAL *from = data + item * Z * plane;
        int64_t next = first - rz > 0 ? first - rz : 0; /* the next plane to come into the ring */
        for (int64_t z = first; z < last; z++) {
            for (; next <= z + rz && next < Z; next++) {
                REAL *slot = ring + next % deep * plane;
                for (int64_t y = 0; y < Y; y++) {
                    const REAL *line = from + next * plane + y * X, part = scale && before ? sy[y] * sz[next] : 1;
                    if (scale && before)
                        for (int64_t x = 0; x < X; x++) row[rx + x] = line[x] * sx[x] * part;
                    else
                        for (int64_t x = 0; x < X; x++) row[rx + x] = line[x];
                    for (int64_t t = -rx; t <= rx; t++) at[t] = row + rx + t;
                    ACROSS(at, tx, rx, 1, X, along_x + y * X);
                    if (scale && !before)
                        for (int64_t x = 0; x < X; x++) along_x[y * X + x] *= sx[x];
                }
                for (int64_t y = 0; y < Y; y++) {
                    for (int64_t t = -ry; t <= ry; t++) at[t] = y + t < 0 || y + t >= Y ? 0 : along_x + (y + t) * X;
                    ACROSS(at, ty, ry, scale && !before ? sy[y] : 1, X, slot + y * X);
                }
            }
            for (int64_t t = -rz; t <= rz; t++) at[t] = z + t < 0 || z + t >= Z ? 0 : ring + (z + t) % deep * plane;
            ACROSS(at, tz, rz, scale && !before ? sz[z] : 1, plane, out + (item * Z + z) * plane);
        }
        s += last - first;
    }
    RESTORE(mode);
    free(memory), free(rows);
}

#undef ACROSS
#undef VECTOR
#undef LANES
#undef WIDE
#undef FILTER

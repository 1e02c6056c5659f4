/* Joint histograms of two images (B, C, n), with cubic B-splines as windows for both, and their derivatives.
 *   out[a, b] = sum over voxels of w beta(x - a) beta(y - b)
 * x and y are intensities in bins, (value - low) scale + 1, so that the windows of the least and the greatest value lie
 * within the bins.  A row is one channel of one pair; it is cut into parts whatever the number of threads. */
#include <stdlib.h>
#include <string.h>

#define QUAD JOIN(NAME, _quad) /* four neighbouring bins */
#define WIDE JOIN(NAME, _wide)
#define PLACE JOIN(NAME, _place)
#define ROWS                                                                                  \
    const int64_t row = task / parts, part = task % parts;                                    \
    const int64_t first = n * part / parts, last = n * (part + 1) / parts;                    \
    const REAL *w = weights ? weights + (row / channels % weight_rows) * n : 0;
typedef REAL QUAD __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef double WIDE __attribute__((vector_size(4 * sizeof(double))));

/* First bins and fractions of the windows of `count` values, and the derivative of the place by the value.  Rounding may
 * lead a little beyond the bins, what is further out is held there; the fraction of NaN is NaN. */
static inline void PLACE(const REAL *values, int count, const REAL *map, int64_t bins, REAL slack, int *start,
                         REAL *fraction, REAL *slope) {
    const REAL low = map[0], scale = map[1], most = (REAL)(bins - 3) + slack, end = (REAL)(bins - 4);
#pragma omp simd
    for (int q = 0; q < count; q++) {
        const REAL t = (values[q] - low) * scale;
        REAL kept = t < -slack ? -slack : t;
        kept = kept > most ? most : kept;
        REAL whole = JOIN(FLOOR_, REAL)(kept);
        whole = whole > 0 ? whole : 0;
        whole = whole < end ? whole : end;
        start[q] = (int)whole;
        fraction[q] = kept - whole;
        slope[q] = t < -slack || t > most ? 0 : scale;
    }
}

static inline WIDE JOIN(NAME, _window)(double f) {
    const WIDE a = {1 / 6., 4 / 6., 1 / 6., 0}, b = {-.5, 0, .5, 0}, c = {.5, -1, .5, 0};
    const WIDE d = {-1 / 6., .5, -.5, 1 / 6.};
    return a + f * (b + f * (c + f * d));
}

/* Sums of w and w x over each part, (rows, parts, 2). */
void JOIN(NAME, _histogram_sums)(const REAL *values, const REAL *weights, double *out, int64_t n, int64_t channels,
                                 int64_t value_rows, int64_t weight_rows, int64_t parts, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
        ROWS
        const REAL *const x = values + row % value_rows * n;
        double total[8] = {0}, moment[8] = {0};
        for (int64_t s = first; s < last; s += 8)
            for (int q = 0; q < 8 && s + q < last; q++) {
                const double one = w[s + q];
                total[q] += one;
                moment[q] += one > 0 ? one * x[s + q] : 0;
            }
        out[2 * task] = out[2 * task + 1] = 0;
        for (int q = 0; q < 8; q++) out[2 * task] += total[q], out[2 * task + 1] += moment[q];
    }
}

/* The least and the greatest value of each part, (rows, parts, 2), drawn to the mean by lack of weight. */
void JOIN(NAME, _histogram_range)(const REAL *values, const REAL *weights, const REAL *mean, const REAL *enough, REAL *out,
                                  int64_t n, int64_t channels, int64_t value_rows, int64_t weight_rows, int64_t parts,
                                  int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
        ROWS
        const REAL *const x = values + row % value_rows * n;
        const REAL m = mean[row], unit = enough[row / channels % weight_rows];
        REAL low[BLOCK], high[BLOCK];
        for (int q = 0; q < BLOCK; q++) low[q] = (REAL)INFINITY, high[q] = -(REAL)INFINITY;
        for (int64_t s = first; s < last; s += BLOCK) {
            const int count = last - s < BLOCK ? (int)(last - s) : BLOCK;
#pragma omp simd
            for (int q = 0; q < count; q++) {
                const REAL share = w[s + q] / unit, drawn = m + share * (x[s + q] - m);
                const REAL value = share >= 1 ? x[s + q] : drawn;
                low[q] = share > 0 && value < low[q] ? value : low[q];
                high[q] = share > 0 && value > high[q] ? value : high[q];
            }
        }
        for (int q = 1; q < BLOCK; q++) {
            low[0] = low[q] < low[0] ? low[q] : low[0];
            high[0] = high[q] > high[0] ? high[q] : high[0];
        }
        out[2 * task] = low[0], out[2 * task + 1] = high[0];
    }
}

/* Histograms of the parts, (rows, parts, bins, bins).
 * Windows that overlap without being equal share no memory until the end: a load just after a store that covers it in
 * part waits for it.  So there are four sums beside each other for the first bin of every window, not one for each bin. */
void JOIN(NAME, _histogram)(const REAL *warped, const REAL *fixed, const REAL *weights, const REAL *map, double *out,
                            int64_t n, int64_t channels, int64_t fixed_rows, int64_t weight_rows, int64_t parts,
                            int64_t bins, double slack, int64_t begin, int64_t end) {
    const int64_t wide = bins - 3;
    WIDE *const sums = aligned_alloc(64, (size_t)(bins * wide + 1) / 2 * 64);
    int i[BLOCK], j[BLOCK];
    REAL f[BLOCK], g[BLOCK], slope[BLOCK];
    for (int64_t task = begin; task < end; task++) {
        ROWS
        double *const found = out + task * bins * bins;
        if (!sums) { /* no memory: the value is not a number, which the caller knows to handle */
            for (int64_t k = 0; k < bins * bins; k++) found[k] = NAN;
            continue;
        }
        memset(sums, 0, (size_t)(bins * wide) * sizeof(WIDE));
        for (int64_t s = first; s < last; s += BLOCK) {
            const int count = last - s < BLOCK ? (int)(last - s) : BLOCK;
            PLACE(warped + row * n + s, count, map + 4 * row, bins, (REAL)slack, i, f, slope);
            PLACE(fixed + row % fixed_rows * n + s, count, map + 4 * row + 2, bins, (REAL)slack, j, g, slope);
            for (int q = 0; q < count; q++) {
                const double weight = w ? w[s + q] : 1;
                if (weight == 0) continue; /* whatever is there, NaN too */
                const WIDE a = JOIN(NAME, _window)(f[q]) * weight, b = JOIN(NAME, _window)(g[q]);
                WIDE *const at = sums + i[q] * wide + j[q];
                at[0] += a[0] * b;
                at[wide] += a[1] * b;
                at[2 * wide] += a[2] * b;
                at[3 * wide] += a[3] * b;
            }
        }
        for (int64_t a = 0; a < bins; a++)
            for (int64_t b = 0; b < bins; b++) {
                double total = 0;
                for (int k = 0; k < 4; k++)
                    if (b >= k && b - k < wide) total += sums[a * wide + b - k][k];
                found[a * bins + b] = total;
            }
    }
    free(sums);
}

/* From the derivative by the histogram (rows, bins, bins) to those by the values and the weights, each (rows, n) or null. */
void JOIN(NAME, _histogram_back)(const REAL *warped, const REAL *fixed, const REAL *weights, const REAL *map,
                                 const REAL *by_out, REAL *by_warped, REAL *by_fixed, REAL *by_weights, int64_t n,
                                 int64_t channels, int64_t fixed_rows, int64_t weight_rows, int64_t parts, int64_t bins,
                                 double slack, int64_t begin, int64_t end) {
    const QUAD a0 = {1 / 6., 4 / 6., 1 / 6., 0}, a1 = {-.5, 0, .5, 0}, a2 = {.5, -1, .5, 0};
    const QUAD a3 = {-1 / 6., .5, -.5, 1 / 6.}, d1 = {1, -2, 1, 0}, d2 = {-.5, 1.5, -1.5, .5};
    int i[BLOCK], j[BLOCK];
    REAL f[BLOCK], g[BLOCK], by_f[BLOCK], by_g[BLOCK];
    for (int64_t task = begin; task < end; task++) {
        ROWS
        const REAL *const table = by_out + row * bins * bins;
        for (int64_t s = first; s < last; s += BLOCK) {
            const int count = last - s < BLOCK ? (int)(last - s) : BLOCK;
            PLACE(warped + row * n + s, count, map + 4 * row, bins, (REAL)slack, i, f, by_f);
            PLACE(fixed + row % fixed_rows * n + s, count, map + 4 * row + 2, bins, (REAL)slack, j, g, by_g);
            for (int q = 0; q < count; q++) {
                const REAL weight = w ? w[s + q] : 1;
                const REAL x = weight == 0 && f[q] != f[q] ? 0 : f[q], y = weight == 0 && g[q] != g[q] ? 0 : g[q];
                const REAL *const at = table + i[q] * bins + j[q];
                const QUAD r0 = *(const QUAD *)at, r1 = *(const QUAD *)(at + bins);
                const QUAD r2 = *(const QUAD *)(at + 2 * bins), r3 = *(const QUAD *)(at + 3 * bins);
                const QUAD b = a0 + y * (a1 + y * (a2 + y * a3));
                if (by_warped) {
                    const QUAD d = a1 + x * (d1 + x * d2);
                    const QUAD s4 = (d[0] * r0 + d[1] * r1 + d[2] * r2 + d[3] * r3) * b;
                    const REAL found = weight * by_f[q] * ((s4[0] + s4[2]) + (s4[1] + s4[3]));
                    by_warped[row * n + s + q] = found;
                }
                if (by_fixed || by_weights) {
                    const QUAD a = a0 + x * (a1 + x * (a2 + x * a3)), d = a1 + y * (d1 + y * d2);
                    const QUAD along = a[0] * r0 + a[1] * r1 + a[2] * r2 + a[3] * r3, s4 = along * d, s0 = along * b;
                    const REAL found = weight * by_g[q] * ((s4[0] + s4[2]) + (s4[1] + s4[3]));
                    const REAL plain = (s0[0] + s0[2]) + (s0[1] + s0[3]);
                    if (by_fixed) by_fixed[row * n + s + q] = found;
                    if (by_weights) by_weights[row * n + s + q] = plain;
                }
            }
        }
    }
}

#undef QUAD
#undef WIDE
#undef PLACE
#undef ROWS

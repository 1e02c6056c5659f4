/* The passes of local correlation between its window sums, over voxels p of items (images times channels).
 *
 * A window's sums are n = sum w, f = sum w a, ff = sum w a^2 of the fixed image, m, mm of the warped one and fm of both,
 * the images less their `centers`, which changes nothing but the rounding.  Item i has the fixed image i % fixed_items
 * and the weights (i / channels) % weight_items. */
#define MOMENTS JOIN(NAME, _moments)
#define PRODUCTS JOIN(NAME, _products)
#define CORRELATION JOIN(NAME, _correlation)
#define COMBINE JOIN(NAME, _combine)
#define BY_WEIGHTS JOIN(NAME, _by_weights)
#define FLAT 8 /* in place of a correlation, where the fixed image does not vary */

#define WEIGHT(p) (weights ? weights[i / channels % weight_items * n + (p)] : (REAL)1)

/* Per chunk of an item sum w, sum w b and sum w b^2. */
void MOMENTS(const REAL *b, const REAL *weights, double *sums, int64_t n, int64_t channels, int64_t weight_items, int64_t chunk,
             int64_t begin, int64_t end) {
    const int64_t chunks = (n + chunk - 1) / chunk;
    for (int64_t task = begin; task < end; task++) {
        const int64_t i = task / chunks, start = (task - i * chunks) * chunk, stop = start + chunk < n ? start + chunk : n;
        const REAL *from = b + i * n;
        double one = 0, two = 0, three = 0;
        _Pragma("omp simd reduction(+ : one, two, three)") for (int64_t p = start; p < stop; p++) {
            const double w = WEIGHT(p), value = from[p];
            one += w;
            two += w * value;
            three += w * value * value;
        }
        sums[3 * task] = one, sums[3 * task + 1] = two, sums[3 * task + 2] = three;
    }
}

/* w b, w b^2 and, where a is given, w a b, as planes of (items, 2 or 3, n). */
void PRODUCTS(const REAL *b, const REAL *a, const REAL *weights, const double *centers, const double *other, REAL *out, int64_t n,
              int64_t channels, int64_t fixed_items, int64_t weight_items, int64_t begin, int64_t end) {
    const int planes = a ? 3 : 2;
    for (int64_t s = begin; s < end;) {
        const int64_t i = s / n, first = s - i * n, last = first + (end - s < n - first ? end - s : n - first);
        const REAL center = (REAL)centers[i], low = a ? (REAL)other[i % fixed_items] : 0;
        const REAL *from = b + i * n, *with = a ? a + i % fixed_items * n : 0;
        REAL *restrict one = out + i * planes * n, *restrict two = one + n, *restrict three = two + n;
        for (int64_t p = first; p < last; p++) {
            const REAL value = from[p] - center, weighted = WEIGHT(p) * value;
            one[p] = weighted;
            two[p] = weighted * value;
        }
        for (int64_t p = first; a && p < last; p++) three[p] = one[p] * (with[p] - low);
        s += last - first;
    }
}

/* Per window the correlation, squared unless `with_sign`, added up; in place of (m, mm, fm) what the gradient needs.
 *   fixed (items, 2, n) sums f and ff; count (.., n) the sums of weights; a window varies
 * where its variance is above floor + rounding * (its mean square).
 * sums (chunks of items, 2): of the correlations with their weights, and of the weights.
 * more (items, 3, n) and local (items, n), or NULL: what the derivative by the weights needs beside, and the correlations. */
void CORRELATION(REAL *sums_moving, const REAL *fixed, const REAL *count, const REAL *weights, const double *floors_moving,
                 const double *floors_fixed, double *sums, REAL *more, REAL *local, int with_sign, int64_t n, int64_t channels, int64_t fixed_items,
                 int64_t weight_items, int64_t count_items, int64_t chunk, double rounding, int64_t begin, int64_t end) {
    const int64_t chunks = (n + chunk - 1) / chunk;
    const unsigned mode = flush_denormals();
    for (int64_t task = begin; task < end; task++) {
        const int64_t i = task / chunks, start = (task - i * chunks) * chunk, stop = start + chunk < n ? start + chunk : n;
        const REAL error = (REAL)rounding, floor_m = (REAL)floors_moving[i], floor_f = (REAL)floors_fixed[i % fixed_items];
        REAL *restrict m = sums_moving + i * 3 * n, *restrict mm = m + n, *restrict fm = mm + n;
        const REAL *restrict f = fixed + i % fixed_items * 2 * n, *restrict ff = f + n;
        const REAL *restrict total = count + i / channels % count_items * n;
        REAL *restrict one = more + (more ? i * 3 * n : 0), *restrict two = more ? one + n : 0, *restrict three = more ? two + n : 0;
        REAL *restrict at = local + (more ? i * n : 0);
        double both[2] = {0, 0};
        for (int64_t first = start; first < stop; first += BLOCK) {
            const int size = (int)(stop - first < BLOCK ? stop - first : BLOCK), count = size;
            REAL value[BLOCK], share[BLOCK];
            for (int q = 0; q < size; q++) {
                const int64_t p = first + q;
                const REAL w = WEIGHT(p), known = total[p] > 0 ? (REAL)1 : (REAL)0, unit = known / (total[p] > 0 ? total[p] : 1);
                const REAL mean_f = f[p] * unit, mean_m = m[p] * unit;
                const REAL var_f = ff[p] * unit - mean_f * mean_f, var_m = mm[p] * unit - mean_m * mean_m;
                const REAL cov = fm[p] * unit - mean_f * mean_m;
                const REAL least_f = floor_f + error * ff[p] * unit, least_m = floor_m + error * mm[p] * unit;
                const REAL counts = var_f > least_f ? w * known : (REAL)0; /* flat windows of the fixed image say nothing */
                const REAL safe_f = var_f > least_f ? var_f : (REAL)1, varies = var_m > least_m ? (REAL)1 : (REAL)0;
                const REAL safe_m = var_m > least_m ? var_m : least_m > 0 ? least_m : (REAL)1;
                /* Never a product of variances, which float might not hold. */
                const REAL by_f = cov / safe_f, by_m = cov / safe_m;
                const REAL root = JOIN(SQRT_, REAL)(safe_f) * JOIN(SQRT_, REAL)(safe_m), signed_value = cov / root;
                const REAL a = with_sign ? 1 / root : 2 * by_f / safe_m;
                const REAL b = varies * (with_sign ? signed_value : 2 * by_f * by_m) / safe_m;
                const REAL scale = counts * unit;
                const REAL found = with_sign ? signed_value : by_f * by_m;
                value[q] = counts * found;
                share[q] = counts;
                if (more) {
                    const REAL c = (with_sign ? 1 : 2) * found / safe_f;
                    one[p] = scale * c;
                    two[p] = scale * (c * mean_f - a * mean_m);
                    three[p] = scale * (a * (mean_f * mean_m - cov) + b / 2 * (var_m - mean_m * mean_m) + c / 2 * (var_f - mean_f * mean_f));
                    at[p] = var_f > least_f && known > 0 ? found : FLAT;
                }
                m[p] = scale * a;
                mm[p] = scale * b;
                fm[p] = scale * (b * mean_m - a * mean_f);
            }
            both[0] += SUM(value[q]);
            both[1] += SUM(share[q]);
        }
        sums[2 * task] = both[0];
        sums[2 * task + 1] = both[1];
    }
    RESTORE(mode);
}

/* The derivative by the warped image, factor w (a A - b B + C) of the filtered (A, B, C). */
void COMBINE(const REAL *filtered, const REAL *b, const REAL *a, const REAL *weights, const double *centers, const double *other,
             const double *factors, REAL *out, int64_t n, int64_t channels, int64_t fixed_items, int64_t weight_items,
             int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end;) {
        const int64_t i = s / n, first = s - i * n, last = first + (end - s < n - first ? end - s : n - first);
        const REAL center = (REAL)centers[i], low = (REAL)other[i % fixed_items], factor = (REAL)factors[i];
        const REAL *moving = b + i * n, *fixed = a + i % fixed_items * n;
        const REAL *A = filtered + i * 3 * n, *B = A + n, *C = B + n;
        REAL *restrict to = out + i * n;
        for (int64_t p = first; p < last; p++)
            to[p] = factor * WEIGHT(p) * ((fixed[p] - low) * A[p] - (moving[p] - center) * B[p] + C[p]);
        s += last - first;
    }
}

/* The derivative by the weights of an item, factor (r - mean + a b A - b^2 B / 2 + b C - a^2 D / 2 + a E + F) of the
 * filtered (A, B, C) and (D, E, F) and the correlations r, of which only those count whose window varies. */
void BY_WEIGHTS(const REAL *filtered, const REAL *more, const REAL *local, const REAL *b, const REAL *a, const double *centers,
                const double *other, const double *means, const double *factors, REAL *out, int64_t n, int64_t fixed_items,
                int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end;) {
        const int64_t i = s / n, first = s - i * n, last = first + (end - s < n - first ? end - s : n - first);
        const REAL center = (REAL)centers[i], low = (REAL)other[i % fixed_items], factor = (REAL)factors[i], mean = (REAL)means[i];
        const REAL *A = filtered + i * 3 * n, *B = A + n, *C = B + n, *D = more + i * 3 * n, *E = D + n, *F = E + n;
        for (int64_t p = first; p < last; p++) {
            const REAL y = b[i * n + p] - center, x = a[i % fixed_items * n + p] - low, r = local[i * n + p];
            const REAL here = r == FLAT ? 0 : r - mean;
            out[i * n + p] = factor * (here + y * (x * A[p] - y / 2 * B[p] + C[p]) - x * (x / 2 * D[p] - E[p]) + F[p]);
        }
        s += last - first;
    }
}

#undef MOMENTS
#undef PRODUCTS
#undef CORRELATION
#undef COMBINE
#undef BY_WEIGHTS
#undef FLAT
#undef WEIGHT

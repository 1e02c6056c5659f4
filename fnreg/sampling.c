/* Linear interpolation, value and spatial gradient in one pass.
 *
 * Compiled once per scalar type and dimension (REAL, DIM, NAME are defined by the build).  Coordinates are
 * voxel indices in planar layout: coords[b][k][p] with k = 0 for x.  The image of item b is data item
 * (b / div) % items.  Beside value and gradient it tells which points lie within the grid's borders.  The caller
 * splits the samples between threads: [begin, end) of batch * points.
 *
 * Samples go through in blocks: corner offsets and fractions first, then the corners, both in loops that the
 * compiler turns into vector instructions.  Only samples on a knot take a second look: the two one-sided
 * derivatives differ there and the gradient is their mean, so that a registration that starts at the
 * identity has no preferred direction.
 */
#include <math.h>
#include <stdint.h>

#ifndef COMMON
#define COMMON
#define FLOOR_float floorf
#define FLOOR_double floor
enum { BORDER = 0, CONSTANT = 1, REFLECTION = 2, BLOCK = 128 };
#endif

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define INDEX JOIN(NAME, _index)
#define CELLS JOIN(NAME, _cells)
#define PICK JOIN(NAME, _pick)
#define LERP(a, b, f) ((a) + ((b) - (a)) * (f))

/* Offsets of the lower and upper corner along one axis, whether each is known, and the fraction between. */
typedef struct {
    int32_t lower[DIM][BLOCK], upper[DIM][BLOCK];
    REAL low_known[DIM][BLOCK], up_known[DIM][BLOCK], fraction[DIM][BLOCK], inside[BLOCK];
} JOIN(NAME, _block);

/* Cells along axis k, moved by `shift`; returns whether a fraction is near a knot or not a number.  Short loops
 * of one kind each: so the compiler vectorises all of them. */
static int INDEX(JOIN(NAME, _block) *restrict s, int k, const REAL *restrict x, REAL shift, int count, int64_t size,
                 int64_t stride, int mode, REAL near) {
    const REAL n = (REAL)size, last = n - 1, limit = (REAL)(mode == REFLECTION ? 1e6 : 2);
    const int32_t step = (int32_t)stride;
    REAL *restrict f = s->fraction[k];
    REAL a[BLOCK], b[BLOCK];
    int special = 0;
    for (int p = 0; p < count; p++) {
        REAL c = x[p];
        c = c > -limit ? c : -limit; /* NaN becomes finite here and is mended at the end */
        c = c < n + limit ? c : n + limit;
        const REAL whole = JOIN(FLOOR_, REAL)(c);
        f[p] = c - whole;
        a[p] = whole + shift;
        b[p] = whole + shift + 1;
    }
    const REAL middle = last / 2, reach = n / 2 + near;
    for (int p = 0; p < count; p++) {
        const REAL away = x[p] - middle, within = away <= reach && -away <= reach ? (REAL)1 : (REAL)0;
        s->inside[p] = k == 0 ? within : s->inside[p] * within;
    }
    for (int p = 0; p < count; p++) special |= (f[p] < near) | (f[p] > 1 - near) | (x[p] != x[p]);
    if (mode == REFLECTION && last > 0) {
        const REAL period = 2 * last;
        for (int p = 0; p < count; p++) {
            const REAL low = a[p] - period * JOIN(FLOOR_, REAL)(a[p] / period);
            const REAL up = b[p] - period * JOIN(FLOOR_, REAL)(b[p] / period);
            a[p] = low < n ? low : period - low;
            b[p] = up < n ? up : period - up;
        }
    }
    if (mode == CONSTANT) {
        for (int p = 0; p < count; p++) {
            s->low_known[k][p] = a[p] >= 0 && a[p] <= last ? (REAL)1 : (REAL)0;
            s->up_known[k][p] = b[p] >= 0 && b[p] <= last ? (REAL)1 : (REAL)0;
        }
    }
    for (int p = 0; p < count; p++) {
        const REAL low = a[p] > 0 ? a[p] : 0, up = b[p] > 0 ? b[p] : 0;
        s->lower[k][p] = (int32_t)(low < last ? low : last) * step;
        s->upper[k][p] = (int32_t)(up < last ? up : last) * step;
    }
    return special;
}

/* Both values are at hand, so this is a blend, not a branch about a load. */
static inline __attribute__((always_inline)) REAL PICK(REAL known, REAL value, REAL fill) {
    return known > 0 ? value : fill;
}

#define SIDE(k, up) ((up) ? s->upper[k][p] : s->lower[k][p])
#define KNOWN(k, up) ((up) ? s->up_known[k][p] : s->low_known[k][p])
#if DIM == 1
#define AT(i, j, l) data[SIDE(0, i)]
#define HAVE(i, j, l) KNOWN(0, i)
#elif DIM == 2
#define AT(i, j, l) data[SIDE(0, i) + SIDE(1, j)]
#define HAVE(i, j, l) (KNOWN(0, i) * KNOWN(1, j))
#else
#define AT(i, j, l) data[SIDE(0, i) + SIDE(1, j) + SIDE(2, l)]
#define HAVE(i, j, l) (KNOWN(0, i) * KNOWN(1, j) * KNOWN(2, l))
#endif
#define VOXEL(i, j, l) (constant ? PICK(HAVE(i, j, l), AT(i, j, l), fill) : AT(i, j, l))

/* Value and gradient over the cells of a block. */
static inline __attribute__((always_inline)) void CELLS(const JOIN(NAME, _block) *restrict s, const REAL *restrict data,
                                                        int count, int constant, REAL fill, REAL *restrict value,
                                                        REAL *restrict gradient, int64_t points) {
    for (int p = 0; p < count; p++) {
        const REAL fx = s->fraction[0][p];
        const REAL a = VOXEL(0, 0, 0), b = VOXEL(1, 0, 0), ab = LERP(a, b, fx);
#if DIM == 1
        value[p] = ab;
        gradient[p] = b - a;
#else
        const REAL fy = s->fraction[1][p];
        const REAL c = VOXEL(0, 1, 0), d = VOXEL(1, 1, 0), cd = LERP(c, d, fx);
        const REAL abcd = LERP(ab, cd, fy), x0 = LERP(b - a, d - c, fy);
#if DIM == 2
        value[p] = abcd;
        gradient[p] = x0;
        gradient[points + p] = cd - ab;
#else
        const REAL fz = s->fraction[2][p];
        const REAL e = VOXEL(0, 0, 1), f = VOXEL(1, 0, 1), ef = LERP(e, f, fx);
        const REAL g = VOXEL(0, 1, 1), h = VOXEL(1, 1, 1), gh = LERP(g, h, fx);
        const REAL efgh = LERP(ef, gh, fy), x1 = LERP(f - e, h - g, fy);
        value[p] = LERP(abcd, efgh, fz);
        gradient[p] = LERP(x0, x1, fz);
        gradient[points + p] = LERP(cd - ab, gh - ef, fz);
        gradient[2 * points + p] = efgh - abcd;
#endif
#endif
    }
}

void NAME(const REAL *data, const REAL *coords, REAL *value, REAL *gradient, REAL *inside, const int64_t *n,
          int64_t items, int64_t channels, int64_t points, int64_t div, int mode, double fill_value, double tolerance,
          int64_t begin, int64_t end) {
    const REAL fill = (REAL)fill_value, near = (REAL)tolerance;
    JOIN(NAME, _block) block, one;
    int64_t stride[DIM], voxels = 1;
    for (int k = 0; k < DIM; k++) { stride[k] = voxels; voxels *= n[k]; }
    for (int64_t s = begin; s < end;) {
        const int64_t b = s / points, p = s - b * points;
        int64_t left = points - p < end - s ? points - p : end - s;
        const int count = (int)(left < BLOCK ? left : BLOCK);
        const REAL *x = coords + b * DIM * points + p;
        int special = 0;
        for (int k = 0; k < DIM; k++)
            special |= INDEX(&block, k, x + k * points, 0, count, n[k], stride[k], mode, near);
        for (int q = 0; q < count; q++) inside[s + q] = block.inside[q];
        for (int64_t channel = 0; channel < channels; channel++) {
            const REAL *image = data + (((b / div) % items) * channels + channel) * voxels;
            const int64_t out = b * channels + channel;
            REAL *v = value + out * points + p, *g = gradient + out * DIM * points + p;
            if (mode == CONSTANT)
                CELLS(&block, image, count, 1, fill, v, g, points);
            else
                CELLS(&block, image, count, 0, fill, v, g, points);
            if (!special) continue;
            for (int q = 0; q < count; q++) {
                int lost = 0;
                for (int k = 0; k < DIM; k++) lost |= x[k * points + q] != x[k * points + q];
                for (int k = 0; k < DIM && !lost; k++) {
                    const REAL f = block.fraction[k][q];
                    if (!(f < near || f > 1 - near)) continue;
                    REAL other_value, other[DIM]; /* the cell on the other side of the knot */
                    for (int j = 0; j < DIM; j++)
                        INDEX(&one, j, x + j * points + q, j != k ? 0 : f < near ? -1 : 1, 1, n[j], stride[j], mode,
                              near);
                    CELLS(&one, image, 1, mode == CONSTANT, fill, &other_value, other, 1);
                    g[k * points + q] = (g[k * points + q] + other[k]) / 2;
                }
                if (!lost) continue;
                v[q] = (REAL)NAN;
                for (int k = 0; k < DIM; k++) g[k * points + q] = (REAL)NAN;
            }
        }
        s += count;
    }
}

#undef INDEX
#undef CELLS
#undef PICK
#undef SIDE
#undef KNOWN
#undef AT
#undef HAVE
#undef VOXEL

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
#define INDEX JOIN(NAME, _index)
#define CELLS JOIN(NAME, _cells)
#define PICK JOIN(NAME, _pick)
#define CHANNEL JOIN(NAME, _channel)
#define MAP JOIN(NAME, _map)
#define MAPS JOIN(NAME, _maps)
#define MAP_OF JOIN(NAME, _map_of)
#define POINTS JOIN(NAME, _points)
#define PLACES JOIN(NAME, _places)
#define DERIVE JOIN(NAME, _derive)
#define SQUARES JOIN(NAME, _squares)
#define WARP JOIN(NAME, _warp)
#define PULL JOIN(NAME, _pull)
#define SPREAD JOIN(NAME, _spread)
#define STRIDES JOIN(NAME, _strides)
#define ENDS JOIN(NAME, _ends)
#define COMPOSE JOIN(NAME, _compose)
#define COMPOSE_BACK JOIN(NAME, _compose_back)
#define LERP(a, b, f) ((a) + ((b) - (a)) * (f))

/* Offsets of the lower and upper corner along one axis, whether each is known, and the fraction between. */
typedef struct {
    int32_t lower[DIM][BLOCK], upper[DIM][BLOCK];
    REAL low_known[DIM][BLOCK], up_known[DIM][BLOCK], fraction[DIM][BLOCK], inside[BLOCK];
} JOIN(NAME, _block);

/* Cells along axis k, moved by `side` where it is given; returns whether a fraction is near a knot or not a number.  Short loops
 * of one kind each: so the compiler vectorises all of them. */
static int INDEX(JOIN(NAME, _block) *restrict s, int k, const REAL *restrict x, const REAL *side, int count, int64_t size,
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
        a[p] = whole;
        b[p] = whole + 1;
    }
    for (int p = 0; side && p < count; p++) {
        a[p] += side[p];
        b[p] += side[p];
    }
    const REAL middle = last / 2, reach = n / 2 + near;
    for (int p = 0; !side && p < count; p++) {
        const REAL away = x[p] - middle, within = away <= reach && -away <= reach ? (REAL)1 : (REAL)0;
        s->inside[p] = k == 0 ? within : s->inside[p] * within;
    }
    for (int p = 0; !side && p < count; p++) special |= (f[p] < near) | (f[p] > 1 - near) | (x[p] != x[p]);
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

/* Offsets from voxel to voxel along each axis; returns the number of voxels. */
static int64_t STRIDES(const int64_t *n, int64_t *stride) {
    int64_t voxels = 1;
    for (int k = 0; k < DIM; k++) { stride[k] = voxels; voxels *= n[k]; }
    return voxels;
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

/* Value and gradient of one channel at the samples of a block whose coordinates begin at `x`, the rows `row` apart;
 * `special` says that some lie on a knot or are not numbers. */
static __attribute__((noinline)) void CHANNEL(JOIN(NAME, _block) *restrict s, const REAL *image,
                                                          const REAL *x, int64_t row, int count, int special,
                                                          const int64_t *n, const int64_t *stride, int mode, REAL fill,
                                                          REAL near, REAL *restrict v, REAL *restrict g,
                                                          int64_t points) {
    if (mode == CONSTANT)
        CELLS(s, image, count, 1, fill, v, g, points);
    else
        CELLS(s, image, count, 0, fill, v, g, points);
    if (!special) return;
    REAL side[BLOCK], other_value[BLOCK], other[DIM * BLOCK];
    int32_t lower[BLOCK], upper[BLOCK];
    REAL low_known[BLOCK], up_known[BLOCK];
    for (int k = 0; k < DIM; k++) {
        int near_knot = 0;
        for (int q = 0; q < count; q++) {
            const REAL f = s->fraction[k][q];
            side[q] = f < near ? (REAL)-1 : f > 1 - near ? (REAL)1 : (REAL)0;
            near_knot |= side[q] != 0;
        }
        if (!near_knot) continue;
        for (int q = 0; q < count; q++) { /* the cells on the other side of the knots, in place of their own */
            lower[q] = s->lower[k][q], upper[q] = s->upper[k][q];
            low_known[q] = s->low_known[k][q], up_known[q] = s->up_known[k][q];
        }
        INDEX(s, k, x + k * row, side, count, n[k], stride[k], mode, near);
        if (mode == CONSTANT)
            CELLS(s, image, count, 1, fill, other_value, other, BLOCK);
        else
            CELLS(s, image, count, 0, fill, other_value, other, BLOCK);
        for (int q = 0; q < count; q++) {
            s->lower[k][q] = lower[q], s->upper[k][q] = upper[q];
            s->low_known[k][q] = low_known[q], s->up_known[k][q] = up_known[q];
            const REAL own = g[k * points + q], mean = (own + other[k * BLOCK + q]) / 2;
            g[k * points + q] = side[q] != 0 ? mean : own;
        }
    }
    for (int q = 0; q < count; q++) {
        int lost = 0;
        for (int k = 0; k < DIM; k++) lost |= x[k * row + q] != x[k * row + q];
        if (!lost) continue;
        v[q] = (REAL)NAN;
        for (int k = 0; k < DIM; k++) g[k * points + q] = (REAL)NAN;
    }
}

void NAME(const REAL *data, const REAL *coords, REAL *value, REAL *gradient, REAL *inside, const int64_t *n,
          int64_t items, int64_t channels, int64_t points, int64_t div, int mode, double fill, double tolerance,
          int64_t begin, int64_t end) {
    const unsigned mode_before = flush_denormals();
    JOIN(NAME, _block) block;
    int64_t stride[DIM];
    const int64_t voxels = STRIDES(n, stride);
    for (int64_t s = begin; s < end;) {
        const int64_t b = s / points, p = s - b * points;
        int64_t left = points - p < end - s ? points - p : end - s;
        const int count = (int)(left < BLOCK ? left : BLOCK);
        const REAL *x = coords + b * DIM * points + p;
        int special = 0;
        for (int k = 0; k < DIM; k++)
            special |= INDEX(&block, k, x + k * points, 0, count, n[k], stride[k], mode, (REAL)tolerance);
        for (int q = 0; q < count; q++) inside[s + q] = block.inside[q];
        for (int64_t channel = 0; channel < channels; channel++) {
            const int64_t out = b * channels + channel;
            CHANNEL(&block, data + (((b / div) % items) * channels + channel) * voxels, x, points, count, special, n,
                    stride, mode, (REAL)fill, (REAL)tolerance, value + out * points + p,
                    gradient + out * DIM * points + p, points);
        }
        s += count;
    }
    RESTORE(mode_before);
}

/* The transpose of linear interpolation: every sample's value spread over the corners of its cell.  One task is one
 * channel of one data item, so that no two threads write to one place and the order of the sums is fixed. */
void SPREAD(const REAL *values, const REAL *coords, REAL *data, const int64_t *n, int64_t items, int64_t channels,
            int64_t batch, int64_t points, int64_t div, int mode, double tolerance, int64_t begin, int64_t end) {
    const unsigned mode_before = flush_denormals();
    JOIN(NAME, _block) block;
    int64_t stride[DIM];
    const int64_t voxels = STRIDES(n, stride);
    for (int64_t task = begin; task < end; task++) {
        const int64_t item = task / channels, channel = task - item * channels;
        REAL *out = data + task * voxels;
        for (int64_t first = item * div; first < batch; first += items * div)
            for (int64_t b = first; b < first + div && b < batch; b++) {
                const REAL *value = values + (b * channels + channel) * points, *x = coords + b * DIM * points;
                for (int64_t p = 0; p < points; p += BLOCK) {
                    const int count = (int)(points - p < BLOCK ? points - p : BLOCK);
                    for (int k = 0; k < DIM; k++)
                        INDEX(&block, k, x + k * points + p, 0, count, n[k], stride[k], mode, (REAL)tolerance);
                    for (int q = 0; q < count; q++) {
                        int lost = 0;
                        for (int k = 0; k < DIM; k++) lost |= x[k * points + p + q] != x[k * points + p + q];
                        if (lost) continue;
                        for (int corner = 0; corner < 1 << DIM; corner++) {
                            REAL share = value[p + q];
                            int32_t at = 0;
                            for (int k = 0; k < DIM; k++) {
                                const int up = corner >> k & 1;
                                const REAL f = block.fraction[k][q];
                                share *= up ? f : 1 - f;
                                if (mode == CONSTANT) share *= up ? block.up_known[k][q] : block.low_known[k][q];
                                at += up ? block.upper[k][q] : block.lower[k][q];
                            }
                            out[at] += share;
                        }
                    }
                }
            }
    }
    RESTORE(mode_before);
}

/* The cells at the ends x = i + scale u(i) of a block of vectors; returns whether some are special, as INDEX. */
static int ENDS(JOIN(NAME, _block) *restrict s, REAL (*restrict x)[BLOCK], const REAL *index, const REAL *u, REAL scale,
                int count, int64_t points, const int64_t *n, const int64_t *stride, REAL near) {
    int special = 0;
    for (int k = 0; k < DIM; k++) {
        for (int q = 0; q < count; q++) x[k][q] = index[k * points + q] + scale * u[k * points + q];
        special |= INDEX(s, k, x[k], 0, count, n[k], stride[k], BORDER, near);
    }
    return special;
}

/* A field read at the ends of another: out(i) = A u(i) + v(i + scale u(i)) for items (D, points) over one grid; item b has the
 * matrix A and the scale b % maps, and A is zero where none is given. */
void COMPOSE(const REAL *firsts, const REAL *seconds, const REAL *index, REAL *out, const REAL *matrices, const REAL *scales,
             const int64_t *n, int64_t points, int64_t maps, double tolerance, int64_t begin, int64_t end) {
    const unsigned mode_before = flush_denormals();
    JOIN(NAME, _block) block;
    REAL x[DIM][BLOCK], value[BLOCK], gradient[DIM * BLOCK];
    int64_t stride[DIM];
    STRIDES(n, stride);
    for (int64_t s = begin; s < end;) {
        const int64_t b = s / points, p = s - b * points;
        const int64_t left = points - p < end - s ? points - p : end - s;
        const int count = (int)(left < BLOCK ? left : BLOCK);
        const REAL *u = firsts + b * DIM * points, *v = seconds + b * DIM * points;
        const REAL *A = matrices ? matrices + b % maps * DIM * DIM : 0;
        ENDS(&block, x, index + p, u + p, scales[b % maps], count, points, n, stride, (REAL)tolerance);
        for (int c = 0; c < DIM; c++) {
            REAL *to = out + (b * DIM + c) * points + p;
            CELLS(&block, v + c * points, count, 0, 0, value, gradient, BLOCK);
            for (int k = 0; A && k < DIM; k++)
                for (int q = 0; q < count; q++) value[q] += A[c * DIM + k] * u[k * points + p + q];
            for (int q = 0; q < count; q++) to[q] = value[q];
            for (int k = 0; k < DIM; k++)
                for (int q = 0; q < count; q++)
                    if (x[k][q] != x[k][q]) to[q] = (REAL)NAN;
        }
        s += count;
    }
    RESTORE(mode_before);
}

/* The pull-back of COMPOSE with u for v: out = add g + the spread of g + scale sum_c g_c du_c(i + scale u).  One task takes some
 * channels c of one item, `parts` tasks per item, each with an output of its own: their sum is the answer. */
void COMPOSE_BACK(const REAL *fields, const REAL *index, const REAL *cotangents, REAL *out, const int64_t *n,
                  int64_t points, int64_t parts, double factor, int add, double tolerance, int64_t begin, int64_t end) {
    const unsigned mode_before = flush_denormals();
    JOIN(NAME, _block) block;
    REAL x[DIM][BLOCK], value[BLOCK], gradient[DIM * BLOCK];
    const REAL scale = (REAL)factor;
    int64_t stride[DIM];
    STRIDES(n, stride);
    for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / parts, part = task - b * parts;
        const REAL *u = fields + b * DIM * points, *g = cotangents + b * DIM * points;
        REAL *to = out + task * DIM * points;
        for (int64_t c = 0; c < DIM; c++)
            for (int64_t p = 0; p < points; p++) to[c * points + p] = add && c % parts == part ? g[c * points + p] : 0;
        for (int64_t p = 0; p < points; p += BLOCK) {
            const int count = (int)(points - p < BLOCK ? points - p : BLOCK);
            const int special = ENDS(&block, x, index + p, u + p, scale, count, points, n, stride, (REAL)tolerance);
            for (int c = (int)part; c < DIM; c += (int)parts) {
                const REAL *own = g + c * points + p;
                REAL *data = to + c * points;
                CHANNEL(&block, u + c * points, &x[0][0], BLOCK, count, special, n, stride, BORDER, 0, (REAL)tolerance, value,
                        gradient, BLOCK);
                for (int k = 0; k < DIM; k++)
                    for (int q = 0; q < count; q++) to[k * points + p + q] += scale * own[q] * gradient[k * BLOCK + q];
                for (int q = 0; q < count; q++) {
                    const REAL fx = block.fraction[0][q], one = own[q] * (1 - fx), two = own[q] * fx;
                    const int32_t x0 = block.lower[0][q], x1 = block.upper[0][q];
#if DIM == 1
                    data[x0] += one;
                    data[x1] += two;
#else
                    const REAL fy = block.fraction[1][q];
                    const int32_t y0 = block.lower[1][q], y1 = block.upper[1][q];
#if DIM == 2
                    data[x0 + y0] += one * (1 - fy);
                    data[x1 + y0] += two * (1 - fy);
                    data[x0 + y1] += one * fy;
                    data[x1 + y1] += two * fy;
#else
                    const REAL fz = block.fraction[2][q];
                    for (int z = 0; z < 2; z++) {
                        const REAL share = z ? fz : 1 - fz;
                        REAL *slice = data + (z ? block.upper[2][q] : block.lower[2][q]);
                        slice[x0 + y0] += one * (1 - fy) * share;
                        slice[x1 + y0] += two * (1 - fy) * share;
                        slice[x0 + y1] += one * fy * share;
                        slice[x1 + y1] += two * fy * share;
                    }
#endif
#endif
                }
            }
        }
    }
    RESTORE(mode_before);
}

/* The maps x = A (y, 1) of the points y = i (+ F shift) of all pairs; F is one where it is not given. */
typedef struct {
    const REAL *index, *shifts, *matrices, *frames;
    int64_t of_matrices, of_frames, points; /* how many there are of each: 1 for all pairs, or one for each */
} MAPS;

/* What the map of one pair needs to know. */
typedef struct {
    const REAL *index, *shift, *F;
    REAL A[DIM][DIM + 1];
    int64_t points;
} MAP;

static MAP MAP_OF(const MAPS *maps, int64_t b) {
    const int64_t points = maps->points;
    MAP map = {maps->index, maps->shifts ? maps->shifts + b * DIM * points : 0,
               maps->frames ? maps->frames + b % maps->of_frames * DIM * DIM : 0, {{0}}, points};
    for (int k = 0; k < DIM; k++)
        for (int j = 0; j <= DIM; j++) map.A[k][j] = maps->matrices[(b % maps->of_matrices * DIM + k) * (DIM + 1) + j];
    return map;
}

/* The points y of a block from p on. */
static void POINTS(const MAP *map, int64_t p, int count, REAL (*restrict y)[BLOCK]) {
    for (int j = 0; j < DIM; j++) {
        const REAL *i = map->index + j * map->points + p, *u = map->shift ? map->shift + p : 0;
        for (int q = 0; q < count; q++) y[j][q] = i[q];
        for (int q = 0; u && !map->F && q < count; q++) y[j][q] += u[j * map->points + q];
        for (int k = 0; u && map->F && k < DIM; k++)
            for (int q = 0; q < count; q++) y[j][q] += map->F[j * DIM + k] * u[k * map->points + q];
    }
}

/* The cells at their images x; returns whether some are special, as INDEX. */
static int PLACES(JOIN(NAME, _block) *restrict s, const MAP *map, REAL (*restrict y)[BLOCK], REAL (*restrict x)[BLOCK], int count,
                  const int64_t *n, const int64_t *stride, int mode, REAL near) {
    int special = 0;
    for (int k = 0; k < DIM; k++) {
        for (int q = 0; q < count; q++) x[k][q] = map->A[k][DIM];
        for (int j = 0; j < DIM; j++)
            for (int q = 0; q < count; q++) x[k][q] += map->A[k][j] * y[j][q];
        special |= INDEX(s, k, x[k], 0, count, n[k], stride[k], mode, near);
    }
    return special;
}

/* What a cotangent c per point, gradient = c dm/dx, adds to the derivatives by the map, per point and in sum:
 *   sum_k A_kj gradient_k  and  sum gradient_k (y, 1)_j, each where there is a place for it. */
static void DERIVE(const MAP *map, REAL (*restrict y)[BLOCK], REAL (*restrict gradient)[BLOCK], int count,
                   REAL (*restrict back)[BLOCK], double *by) {
    for (int k = 0; k < DIM; k++) {
        for (int j = 0; by && j < DIM; j++) by[k * (DIM + 1) + j] += SUM(gradient[k][q] * y[j][q]);
        if (by) by[k * (DIM + 1) + DIM] += SUM(gradient[k][q]);
        for (int j = 0; back && j < DIM; j++)
            for (int q = 0; q < count; q++) back[j][q] += map->A[k][j] * gradient[k][q];
    }
}

/* Squared difference under a map, with its derivative by the map:
 *   sum w, sum w r^2 and sum 2 w r dm/dx_k y_j,  r = m(x) - f,  and per point sum_k 2 w r dm/dx_k A_kj,
 * w the inside of the moving image (unless `everywhere`) times the mask.  Nothing else goes to memory.  One task is a
 * chunk of one pair's points, so that the order of the sums depends neither on the batch nor on the threads. */
void SQUARES(const REAL *moving, const REAL *fixed, const REAL *mask, const REAL *index, const REAL *shifts, const REAL *matrices,
             const REAL *frames, const int64_t *of, double *sums, double *by_matrix, REAL *by_shift, const int64_t *n,
             const int64_t *items, int64_t channels, int64_t chunk, int everywhere, int mode, double fill, double tolerance,
             int64_t begin, int64_t end) {
    const unsigned mode_before = flush_denormals();
    const MAPS maps = {index, shifts, matrices, frames, of[0], of[1], of[2]};
    const int64_t points = maps.points;
    JOIN(NAME, _block) block;
    REAL y[DIM][BLOCK], x[DIM][BLOCK], value[BLOCK], gradient[DIM][BLOCK], weight[BLOCK], back[DIM][BLOCK];
    int64_t stride[DIM];
    const int64_t voxels = STRIDES(n, stride);
    const int64_t chunks = (points + chunk - 1) / chunk;
    for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / chunks, first = (task - b * chunks) * chunk;
        const int64_t last = first + chunk < points ? first + chunk : points;
        const REAL *m = moving + b % items[0] * channels * voxels, *f = fixed + b % items[1] * channels * points;
        const REAL *w = mask ? mask + b % items[2] * points : 0;
        const MAP map = MAP_OF(&maps, b);
        double *out = sums + task * 2, *by = by_matrix ? by_matrix + task * DIM * (DIM + 1) : 0;
        out[0] = out[1] = 0;
        for (int k = 0; by && k < DIM * (DIM + 1); k++) by[k] = 0;
        for (int64_t p = first; p < last; p += BLOCK) {
            const int count = (int)(last - p < BLOCK ? last - p : BLOCK);
            POINTS(&map, p, count, y);
            const int special = PLACES(&block, &map, y, x, count, n, stride, mode, (REAL)tolerance);
            for (int q = 0; q < count; q++) weight[q] = everywhere ? (REAL)1 : block.inside[q];
            if (w)
                for (int q = 0; q < count; q++) weight[q] *= w[p + q];
            out[0] += SUM(weight[q]);
            for (int j = 0; by_shift && j < DIM; j++)
                for (int q = 0; q < count; q++) back[j][q] = 0;
            for (int64_t channel = 0; channel < channels; channel++) {
                CHANNEL(&block, m + channel * voxels, &x[0][0], BLOCK, count, special, n, stride, mode, (REAL)fill,
                        (REAL)tolerance, value, &gradient[0][0], BLOCK);
                const REAL *other = f + channel * points + p;
                for (int q = 0; q < count; q++) value[q] -= other[q];
                out[1] += SUM(weight[q] * value[q] * value[q]);
                for (int k = 0; k < DIM; k++)
                    for (int q = 0; q < count; q++) gradient[k][q] *= 2 * weight[q] * value[q];
                DERIVE(&map, y, gradient, count, by_shift ? back : 0, by);
            }
            for (int j = 0; by_shift && j < DIM; j++)
                for (int q = 0; q < count; q++) by_shift[(b * DIM + j) * points + p + q] = back[j][q];
        }
    }
    RESTORE(mode_before);
}

/* The moving image under a map, and which points lie inside of it. */
void WARP(const REAL *moving, const REAL *index, const REAL *shifts, const REAL *matrices, const REAL *frames, const int64_t *of,
          REAL *warped, REAL *inside, const int64_t *n, int64_t items, int64_t channels, int mode, double fill,
          double tolerance, int64_t begin, int64_t end) {
    const unsigned mode_before = flush_denormals();
    const MAPS maps = {index, shifts, matrices, frames, of[0], of[1], of[2]};
    const int64_t points = maps.points;
    JOIN(NAME, _block) block;
    REAL y[DIM][BLOCK], x[DIM][BLOCK], gradient[DIM][BLOCK];
    int64_t stride[DIM];
    const int64_t voxels = STRIDES(n, stride);
    for (int64_t s = begin; s < end;) {
        const int64_t b = s / points, p = s - b * points, left = points - p < end - s ? points - p : end - s;
        const int count = (int)(left < BLOCK ? left : BLOCK);
        const MAP map = MAP_OF(&maps, b);
        POINTS(&map, p, count, y);
        const int special = PLACES(&block, &map, y, x, count, n, stride, mode, (REAL)tolerance);
        for (int q = 0; q < count; q++) inside[s + q] = block.inside[q];
        for (int64_t channel = 0; channel < channels; channel++)
            CHANNEL(&block, moving + (b % items * channels + channel) * voxels, &x[0][0], BLOCK, count, special, n, stride,
                    mode, (REAL)fill, (REAL)tolerance, warped + (b * channels + channel) * points + p, &gradient[0][0], BLOCK);
        s += count;
    }
    RESTORE(mode_before);
}

/* The derivatives by the map of what has the derivative `cotangents` by the image that WARP makes; chunks and sums as SQUARES. */
void PULL(const REAL *moving, const REAL *cotangents, const REAL *index, const REAL *shifts, const REAL *matrices,
          const REAL *frames, const int64_t *of, double *by_matrix, REAL *by_shift, const int64_t *n, int64_t items,
          int64_t channels, int64_t chunk, int mode, double fill, double tolerance, int64_t begin, int64_t end) {
    const unsigned mode_before = flush_denormals();
    const MAPS maps = {index, shifts, matrices, frames, of[0], of[1], of[2]};
    const int64_t points = maps.points;
    JOIN(NAME, _block) block;
    REAL y[DIM][BLOCK], x[DIM][BLOCK], value[BLOCK], gradient[DIM][BLOCK], back[DIM][BLOCK];
    int64_t stride[DIM];
    const int64_t voxels = STRIDES(n, stride);
    const int64_t chunks = (points + chunk - 1) / chunk;
    for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / chunks, first = (task - b * chunks) * chunk;
        const int64_t last = first + chunk < points ? first + chunk : points;
        const MAP map = MAP_OF(&maps, b);
        double *by = by_matrix ? by_matrix + task * DIM * (DIM + 1) : 0;
        for (int k = 0; by && k < DIM * (DIM + 1); k++) by[k] = 0;
        for (int64_t p = first; p < last; p += BLOCK) {
            const int count = (int)(last - p < BLOCK ? last - p : BLOCK);
            POINTS(&map, p, count, y);
            const int special = PLACES(&block, &map, y, x, count, n, stride, mode, (REAL)tolerance);
            for (int j = 0; by_shift && j < DIM; j++)
                for (int q = 0; q < count; q++) back[j][q] = 0;
            for (int64_t channel = 0; channel < channels; channel++) {
                CHANNEL(&block, moving + (b % items * channels + channel) * voxels, &x[0][0], BLOCK, count, special, n, stride,
                        mode, (REAL)fill, (REAL)tolerance, value, &gradient[0][0], BLOCK);
                const REAL *c = cotangents + (b * channels + channel) * points + p;
                for (int k = 0; k < DIM; k++)
                    for (int q = 0; q < count; q++) gradient[k][q] *= c[q];
                DERIVE(&map, y, gradient, count, by_shift ? back : 0, by);
            }
            for (int j = 0; by_shift && j < DIM; j++)
                for (int q = 0; q < count; q++) by_shift[(b * DIM + j) * points + p + q] = back[j][q];
        }
    }
    RESTORE(mode_before);
}

#undef INDEX
#undef CHANNEL
#undef MAP
#undef MAPS
#undef MAP_OF
#undef POINTS
#undef PLACES
#undef DERIVE
#undef SQUARES
#undef WARP
#undef PULL
#undef SPREAD
#undef STRIDES
#undef ENDS
#undef COMPOSE
#undef COMPOSE_BACK
#undef CELLS
#undef PICK
#undef SIDE
#undef KNOWN
#undef AT
#undef HAVE
#undef VOXEL

/* How long the vectors of items (B, D, n) are: per chunk of an item the largest sum_d x_d^2, the sum of all x^2, and the
 * largest |x|.  Where an entry is not a number, none of these is.  The caller splits chunks between threads. */
#define LENGTHS JOIN(NAME, _lengths)
#define SCALE JOIN(NAME, _scale)

void LENGTHS(const REAL *data, double *out, int64_t dimension, int64_t n, int64_t chunk, int64_t begin, int64_t end) {
    const unsigned mode = flush_denormals(); /* squares of small entries are */
    const int64_t chunks = (n + chunk - 1) / chunk;
    REAL square[BLOCK];
    for (int64_t task = begin; task < end; task++) {
        const int64_t item = task / chunks, first = (task - item * chunks) * chunk;
        const int64_t last = first + chunk < n ? first + chunk : n;
        double total = 0;
        REAL longest = 0, largest = 0;
        for (int64_t p = first; p < last; p += BLOCK) {
            const int count = (int)(last - p < BLOCK ? last - p : BLOCK);
            for (int q = 0; q < count; q++) square[q] = 0;
            for (int64_t d = 0; d < dimension; d++) {
                const REAL *x = data + (item * dimension + d) * n + p;
                for (int q = 0; q < count; q++) square[q] += x[q] * x[q];
                _Pragma("omp simd reduction(max : largest)") for (int q = 0; q < count; q++) {
                    const REAL size = x[q] < 0 ? -x[q] : x[q];
                    largest = size > largest ? size : largest;
                }
            }
            total += SUM(square[q]);
            _Pragma("omp simd reduction(max : longest)") for (int q = 0; q < count; q++)
                longest = square[q] > longest ? square[q] : longest;
        }
        out[3 * task] = total == total ? longest : total;
        out[3 * task + 1] = total;
        out[3 * task + 2] = total == total ? largest : total;
    }
    RESTORE(mode);
}

/* Items (B, n) times a factor of each, in place. */
void SCALE(REAL *data, const double *factors, int64_t n, int64_t begin, int64_t end) {
    const unsigned mode = flush_denormals();
    for (int64_t s = begin; s < end;) {
        const int64_t item = s / n, last = (item + 1) * n < end ? (item + 1) * n : end;
        const REAL factor = (REAL)factors[item];
        for (int64_t p = s; p < last; p++) data[p] *= factor;
        s = last;
    }
    RESTORE(mode);
}

#undef LENGTHS
#undef SCALE

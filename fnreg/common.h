/* What every kernel shares.  REAL, NAME and, for those of one dimension, DIM are defined by the build. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* Denormal numbers, as smoothing leaves them, count as zero in here: processors are slow with them. */
#ifdef __SSE__
#include <xmmintrin.h>
static inline unsigned flush_denormals(void) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
#define RESTORE(mode) _mm_setcsr(mode)
#else
static inline unsigned flush_denormals(void) { return 0; }
#define RESTORE(mode) (void)(mode)
#endif
#define FLOOR_float floorf
#define FLOOR_double floor
#define SQRT_float sqrtf
#define SQRT_double sqrt
enum { BORDER = 0, CONSTANT = 1, REFLECTION = 2, BLOCK = 128 };

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
/* The sum of an expression over the samples q of a block, in vector lanes. */
#define SUM(term)                                                      \
    ({                                                                 \
        REAL total = 0;                                                \
        _Pragma("omp simd reduction(+ : total)") for (int q = 0; q < count; q++) total += (term); \
        total;                                                         \
    })

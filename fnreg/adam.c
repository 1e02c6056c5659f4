/* One update of Adam for items (B, n), out of place:
 *   m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  step = -first m / (sqrt(second v + 1e-30) + least)
 * with `first` = rate / (1 - b1^k), `second` = 1 / (1 - b2^k) and `least` of each item. */
#define ADAM JOIN(NAME, _adam)

void ADAM(const REAL *gradient, const REAL *m_before, const REAL *v_before, REAL *m_after, REAL *v_after, REAL *step,
          const double *first, const double *second, const double *least, double b1, double b2, int64_t n, int64_t begin,
          int64_t end) {
    const REAL one = (REAL)b1, two = (REAL)b2, rest_one = (REAL)(1 - b1), rest_two = (REAL)(1 - b2);
    for (int64_t s = begin; s < end;) {
        const int64_t item = s / n, last = (item + 1) * n < end ? (item + 1) * n : end;
        const REAL scale = (REAL)first[item], unbias = (REAL)second[item], e = (REAL)least[item];
        for (int64_t p = s; p < last; p++) {
            const REAL g = gradient[p];
            const REAL m = one * m_before[p] + rest_one * g, v = two * v_before[p] + rest_two * g * g;
            m_after[p] = m;
            v_after[p] = v;
            step[p] = -scale * m / (JOIN(SQRT_, REAL)(unbias * v + (REAL)1e-30) + e);
        }
        s = last;
    }
}

#undef ADAM

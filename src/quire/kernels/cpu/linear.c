/* x @ W^T for the dtypes that oneDNN does not serve invariantly (see quire/kernels/linear_cpu.py).
 *
 * Weights are packed in panels of PANEL output columns: [panels][K][PANEL]. An output is one chain of
 * fused multiply-adds over k in order, whatever the number of rows, so no row can depend on another.
 */
#include "kernels.h"

#define PANEL 32
#define COLUMNS (2 * VW) /* of a panel, kept in registers */
#define ROWS (VW == 16 ? 6 : 4)

/* out[r][0..columns) for `rows` rows of x (fp32, row stride k). */
INLINE void linear_block(const float *x, const void *panel, const void *bias, void *out,
                         int64_t out_stride, int64_t k, int64_t columns, const int rows,
                         const int dt) {
  for (int64_t c = 0; c < columns; c += COLUMNS) {
    vf acc[6][2];
    UNROLL for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = vset(0.0f);
    for (int64_t i = 0; i < k; i++) {
      const vf w0 = vload(at(panel, i * PANEL + c, dt), dt);
      const vf w1 = vload(at(panel, i * PANEL + c + VW, dt), dt);
      UNROLL for (int r = 0; r < rows; r++) {
        const vf xr = vset(x[r * k + i]);
        acc[r][0] = vfma(w0, xr, acc[r][0]);
        acc[r][1] = vfma(w1, xr, acc[r][1]);
      }
    }
    UNROLL for (int half = 0; half < 2; half++) {
      const int64_t first = c + half * VW, n = columns - first;
      if (n <= 0) continue;
      const vf b = bias ? vload_upto(at(bias, first, dt), n, dt) : vset(0.0f);
      UNROLL for (int r = 0; r < rows; r++)
        vstore_upto(at_mut(out, r * out_stride + first, dt), bias ? acc[r][half] + b : acc[r][half],
                    n, dt);
    }
  }
}

INLINE void linear_panel(const float *x, const void *panel, const void *bias, void *out, int64_t m,
                         int64_t n, int64_t k, int64_t columns, const int dt) {
  int64_t r = 0;
  for (; r + ROWS <= m; r += ROWS)
    linear_block(x + r * k, panel, bias, at_mut(out, r * n, dt), n, k, columns, ROWS, dt);
  for (; r + 4 <= m; r += 4)
    linear_block(x + r * k, panel, bias, at_mut(out, r * n, dt), n, k, columns, 4, dt);
  for (; r + 2 <= m; r += 2)
    linear_block(x + r * k, panel, bias, at_mut(out, r * n, dt), n, k, columns, 2, dt);
  if (r < m) linear_block(x + r * k, panel, bias, at_mut(out, r * n, dt), n, k, columns, 1, dt);
}

/* x: [m, k], row stride given. bias: [n] or NULL. out: [m, n]. Returns 5 if there is no memory. */
int quire_linear(const void *x, int64_t x_stride, const void *panels, const void *bias, void *out,
                 int64_t m, int64_t n, int64_t k, int dt, int threads) {
  float *wide = malloc((size_t)(m * k) * sizeof(float) + 64);
  if (!wide) return 5;
#pragma omp parallel num_threads(threads) if (m * n * k > 4 * SMALL_WORK)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++)
      for (int64_t i = 0; i < k; i += VW)
        vstore_upto(wide + r * k + i, vload_upto(at(x, r * x_stride + i, dt), k - i, dt), k - i,
                    F32);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < n; first += PANEL) {
      const void *panel = at(panels, first * k, dt);
      const void *b = bias ? at(bias, first, dt) : NULL;
      const int64_t columns = n - first < PANEL ? n - first : PANEL;
      if (dt == F32)
        linear_panel(wide, panel, b, at_mut(out, first, dt), m, n, k, columns, F32);
      else if (dt == BF16)
        linear_panel(wide, panel, b, at_mut(out, first, dt), m, n, k, columns, BF16);
      else
        linear_panel(wide, panel, b, at_mut(out, first, dt), m, n, k, columns, F16);
    }
  }
  free(wide);
  return 0;
}

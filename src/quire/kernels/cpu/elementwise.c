/* Norms and activation: one row at a time, each row in one fixed order. */
#include "kernels.h"

#define PARTIALS 64 /* a row's sum of squares: 64 running sums, then sum64's tree */

INLINE float sum_of_squares(const void *x, int64_t n, const int dt) {
  vf acc[PARTIALS / VW];
  UNROLL for (int i = 0; i < PARTIALS / VW; i++) acc[i] = vset(0.0f);
  int64_t j = 0;
  for (; j + PARTIALS <= n; j += PARTIALS) {
    UNROLL for (int i = 0; i < PARTIALS / VW; i++) {
      const vf v = vload(at(x, j + i * VW, dt), dt);
      acc[i] = vfma(v, v, acc[i]);
    }
  }
  UNROLL for (int i = 0; i < PARTIALS / VW; i++) {
    const int64_t first = j + i * VW;
    if (first < n) {
      const vf v = vload_upto(at(x, first, dt), n - first, dt);
      acc[i] = vfma(v, v, acc[i]);
    }
  }
  float sums[PARTIALS];
  memcpy(sums, acc, sizeof sums);
  return sum64(sums);
}

INLINE void norm_row(const void *x, const void *weight, void *out, int64_t n, float eps,
                     const int dt) {
  const float scale = 1.0f / sqrtf(sum_of_squares(x, n, dt) / (float)n + eps);
  for (int64_t j = 0; j < n; j += VW) {
    const vf normed = vround(vload_upto(at(x, j, dt), n - j, dt) * scale, dt);
    const vf w = vload_upto(at(weight, j, dt), n - j, dt);
    vstore_upto(at_mut(out, j, dt), w * normed, n - j, dt);
  }
}

INLINE void add_row(const void *x, void *residual, int64_t n, const int dt) {
  for (int64_t j = 0; j < n; j += VW) {
    const vf sum =
        vload_upto(at(residual, j, dt), n - j, dt) + vload_upto(at(x, j, dt), n - j, dt);
    vstore_upto(at_mut(residual, j, dt), sum, n - j, dt);
  }
}

INLINE void add_norm_row(const void *x, void *residual, const void *weight, void *out, int64_t n,
                         float eps, const int dt) {
  if (residual) {
    add_row(x, residual, n, dt);
    x = residual;
  }
  norm_row(x, weight, out, n, eps, dt);
}

/* Rows that make a unit of work. */
static int64_t rows_per_unit(int64_t n) { return max64(1, SMALL_WORK / 2 / n); }

typedef struct {
  const void *x, *weight;
  void *residual, *out;
  int64_t x_stride, inner, rows, n, per_unit;
  float eps;
  int dt;
} norm_job;

static void norm_unit(void *context, int64_t unit) {
  const norm_job *j = context;
  const int64_t begin = unit * j->per_unit, end = min64(begin + j->per_unit, j->rows);
  for (int64_t r = begin; r < end; r++) {
    const void *x = at(j->x, r / j->inner * j->x_stride + r % j->inner * j->n, j->dt);
    void *residual = j->residual ? at_mut(j->residual, r * j->n, j->dt) : NULL;
    void *out = at_mut(j->out, r * j->n, j->dt);
    if (j->dt == F32)
      add_norm_row(x, residual, j->weight, out, j->n, j->eps, F32);
    else if (j->dt == BF16)
      add_norm_row(x, residual, j->weight, out, j->n, j->eps, BF16);
    else
      add_norm_row(x, residual, j->weight, out, j->n, j->eps, F16);
  }
}

/* out = rms_norm(x), or with residual: residual += x, out = rms_norm(residual).
 * x: [rows / inner, inner, n] with x_stride elements between its first index's; the others dense. */
int quire_rms_norm(const void *x, int64_t x_stride, int64_t inner, void *residual,
                   const void *weight, void *out, int64_t rows, int64_t n, float eps, int dt,
                   int threads) {
  norm_job job = {x, weight, residual, out, x_stride, inner, rows, n, rows_per_unit(n), eps, dt};
  quire_run(norm_unit, &job, (rows + job.per_unit - 1) / job.per_unit, threads);
  return 0;
}

/* silu(x) = x / (1 + e^-x), through e^-|x| so that nothing overflows. */
INLINE vf vsilu(vf x) {
  const vf magnitude = (vf)((vu)x & 0x7fffffffu);
  const vf e = vexp(-magnitude);
  const vf numerator = vselect((vi)(x < 0.0f), e, vset(1.0f));
  return x * (numerator / (1.0f + e));
}

INLINE void silu_row(const void *gate, const void *up, void *out, int64_t n, const int dt) {
  for (int64_t j = 0; j < n; j += VW) {
    const vf g = vround(vsilu(vload_upto(at(gate, j, dt), n - j, dt)), dt);
    const vf u = vload_upto(at(up, j, dt), n - j, dt);
    vstore_upto(at_mut(out, j, dt), g * u, n - j, dt);
  }
}

typedef struct {
  const void *gate_up;
  void *out;
  int64_t rows, n, per_unit;
  int dt;
} silu_job;

static void silu_unit(void *context, int64_t unit) {
  const silu_job *j = context;
  const int64_t begin = unit * j->per_unit, end = min64(begin + j->per_unit, j->rows), n = j->n;
  for (int64_t r = begin; r < end; r++) {
    const void *gate = at(j->gate_up, r * 2 * n, j->dt), *up = at(j->gate_up, r * 2 * n + n, j->dt);
    void *out = at_mut(j->out, r * n, j->dt);
    if (j->dt == F32)
      silu_row(gate, up, out, n, F32);
    else if (j->dt == BF16)
      silu_row(gate, up, out, n, BF16);
    else
      silu_row(gate, up, out, n, F16);
  }
}

/* gate_up: [rows, 2n] -> out [rows, n]. */
int quire_silu_and_mul(const void *gate_up, void *out, int64_t rows, int64_t n, int dt,
                       int threads) {
  silu_job job = {gate_up, out, rows, n, rows_per_unit(n), dt};
  quire_run(silu_unit, &job, (rows + job.per_unit - 1) / job.per_unit, threads);
  return 0;
}

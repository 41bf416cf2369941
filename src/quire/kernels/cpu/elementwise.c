/* Norms, activations and scales: one row at a time, each row in one fixed order. */
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
  return sum64(acc);
}

INLINE void norm_row_of(const void *x, const void *weight, void *out, int64_t n, float eps,
                        const int dt, const int wt) {
  const float scale = 1.0f / sqrtf(sum_of_squares(x, n, dt) / (float)n + eps);
  for (int64_t j = 0; j < n; j += VW) {
    const vf normed = vround(vload_upto(at(x, j, dt), n - j, dt) * scale, wt);
    const vf w = vload_upto(at(weight, j, wt), n - j, wt);
    vstore_upto(at_mut(out, j, dt), w * normed, n - j, dt);
  }
}

/* weight: in dtype, and the row is rounded before it and after it; or in F32, and only after it. */
static __attribute__((noinline)) void norm_row(const void *x, const void *weight, void *out,
                                               int64_t n, float eps, int dtype, int weight_dtype) {
  FOR_DTYPE(dtype, if (dt == F32 || weight_dtype == F32) norm_row_of(x, weight, out, n, eps, dt, F32);
            else norm_row_of(x, weight, out, n, eps, dt, dt));
}

INLINE void add_row(const void *x, void *residual, int64_t n, float scale, const int dt) {
  for (int64_t j = 0; j < n; j += VW) {
    vf added = vload_upto(at(x, j, dt), n - j, dt);
    if (scale != 1.0f) added = vround(added * scale, dt);
    const vf sum = vload_upto(at(residual, j, dt), n - j, dt) + added;
    vstore_upto(at_mut(residual, j, dt), sum, n - j, dt);
  }
}

INLINE void scale_row(void *x, int64_t n, float factor, const int dt) {
  for (int64_t j = 0; j < n; j += VW)
    vstore_upto(at_mut(x, j, dt), vload_upto(at(x, j, dt), n - j, dt) * factor, n - j, dt);
}

/* 1 / (1 + e^-x), through e^-|x| so that nothing overflows. For a result that is rounded to 16 bits, with a
 * relative error below 1e-5. */
INLINE vf vlogistic(vf x, const int dt) {
  const vf magnitude = (vf)((vu)x & 0x7fffffffu);
  const vf e = dt == F32 ? vexp(-magnitude) : vexp2_rough(magnitude * -LOG2E);
  const vf numerator = vselect((vi)(x < 0.0f), e, vset(1.0f));
  return dt == F32 ? numerator / (1.0f + e) : numerator * vreciprocal(1.0f + e);
}

/* (1 + tanh(y)) / 2 is the logistic function of 2 y, which loses no digits where tanh(y) is near -1.
 * Here 2 y = sqrt(8 / pi) (x + 0.044715 x^3). */
INLINE vf vgelu_tanh(vf x, const int dt) {
  return x * vlogistic(x * vfma(x * x, vset(7.135481627e-02f), vset(1.595769122f)), dt);
}

INLINE void gated_row(const void *gate, const void *up, void *out, int64_t n, const int activation,
                      const int dt) {
  for (int64_t j = 0; j < n; j += VW) {
    const vf g = vload_upto(at(gate, j, dt), n - j, dt);
    const vf activated = activation == SILU ? g * vlogistic(g, dt) : vgelu_tanh(g, dt);
    const vf u = vload_upto(at(up, j, dt), n - j, dt);
    vstore_upto(at_mut(out, j, dt), vround(activated, dt) * u, n - j, dt);
  }
}

INLINE void finish_row(float *x, int64_t n, float divisor, float cap, const int dt) {
  for (int64_t j = 0; j < n; j += VW) {
    vf v = vround(vload_upto(x + j, n - j, F32) / divisor, dt);
    if (cap > 0.0f) v = vround(vround(vtanh(vround(v / cap, dt)), dt) * cap, dt);
    vstore_upto(x + j, v, n - j, F32);
  }
}

/* ---- rows shared among threads ---- */

typedef struct { /* of one operation, which uses what it needs */
  const void *x, *weight;
  void *residual, *out;
  const int64_t *positions;
  const float *table;
  int64_t x_stride, out_stride, inner, count, rows, n, per_unit;
  float eps, factor, divisor, cap;
  int dt, wt;
} row_job;

/* A task that makes `call` for the rows r, of n elements each, of one unit. */
#define ROW_TASK(name, call)                                                                      \
  static void name(void *context, int64_t unit) {                                                 \
    const row_job *j = context;                                                                   \
    const int64_t begin = unit * j->per_unit, end = min64(begin + j->per_unit, j->rows);          \
    for (int64_t r = begin; r < end; r++) call;                                                   \
  }

static int run_rows(quire_task task, row_job job, int threads) {
  job.per_unit = max64(1, SMALL_WORK / 2 / max64(1, job.n));
  quire_run(task, &job, (job.rows + job.per_unit - 1) / job.per_unit, threads);
  return 0;
}

/* A dense tensor cut to rows of PIECE elements, the last one shorter: for what sums over no row. */
enum { PIECE = SMALL_WORK / 2 };
static int64_t pieces(int64_t count) { return (count + PIECE - 1) / PIECE; }
INLINE int64_t piece_length(const row_job *j, int64_t r) {
  return min64(PIECE, j->count - r * PIECE);
}

INLINE void norm_at(const row_job *j, int64_t r, const int dt) {
  const int64_t n = j->n, i = r / j->inner, column = r % j->inner * n;
  const void *x = at(j->x, i * j->x_stride + column, dt);
  if (j->residual) {
    void *residual = at_mut(j->residual, r * n, dt);
    add_row(x, residual, n, 1.0f, dt);
    x = residual;
  }
  norm_row(x, j->weight, at_mut(j->out, i * j->out_stride + column, dt), n, j->eps, dt, j->wt);
}
ROW_TASK(norm_task, FOR_DTYPE(j->dt, norm_at(j, r, dt)))

/* out = rms_norm(x), or with residual: residual += x, out = rms_norm(residual).
 * x, out: [rows / inner, inner, n] with x_stride, out_stride elements between their first index's; the
 * others dense; out may be x. residual: [rows, n]. weight: [n] in wt, which is dt or F32. */
int quire_rms_norm(const void *x, int64_t x_stride, int64_t inner, void *residual,
                   const void *weight, void *out, int64_t out_stride, int64_t rows, int64_t n,
                   float eps, int dt, int wt, int threads) {
  const row_job job = {.x = x, .weight = weight, .residual = residual, .out = out,
                       .x_stride = x_stride, .out_stride = out_stride, .inner = inner,
                       .rows = rows, .n = n, .eps = eps, .dt = dt, .wt = wt};
  return run_rows(norm_task, job, threads);
}

INLINE void gated_at(const row_job *j, int64_t r, const int activation, const int dt) {
  const int64_t n = j->n;
  gated_row(at(j->x, r * 2 * n, dt), at(j->x, r * 2 * n + n, dt), at_mut(j->out, r * j->out_stride, dt), n,
            activation, dt);
}
ROW_TASK(silu_task, FOR_DTYPE(j->dt, gated_at(j, r, SILU, dt)))
ROW_TASK(gelu_tanh_task, FOR_DTYPE(j->dt, gated_at(j, r, GELU_TANH, dt)))

/* gate_up: [rows, 2n] -> out [rows, n], with out_stride elements between its rows. */
int quire_gated(const void *gate_up, void *out, int64_t out_stride, int64_t rows, int64_t n, int activation, int dt,
                int threads) {
  const row_job job = {.x = gate_up, .out = out, .out_stride = out_stride, .rows = rows, .n = n, .dt = dt};
  return run_rows(activation == SILU ? silu_task : gelu_tanh_task, job, threads);
}

INLINE void add_at(const row_job *j, int64_t r, const int dt) {
  add_row(at(j->x, r * PIECE, dt), at_mut(j->residual, r * PIECE, dt), piece_length(j, r), j->factor, dt);
}
ROW_TASK(add_task, FOR_DTYPE(j->dt, add_at(j, r, dt)))

/* residual += x * scale. Both: [count]. */
int quire_add(const void *x, void *residual, int64_t count, float scale, int dt, int threads) {
  const row_job job = {.x = x, .residual = residual, .count = count, .rows = pieces(count),
                       .n = PIECE, .factor = scale, .dt = dt};
  return run_rows(add_task, job, threads);
}

INLINE void scale_at(const row_job *j, int64_t r, const int dt) {
  const float factor = j->table ? j->table[j->positions[r]] : j->factor;
  scale_row(at_mut(j->out, r * j->x_stride, dt), j->n, factor, dt);
}
ROW_TASK(scale_task, FOR_DTYPE(j->dt, scale_at(j, r, dt)))

/* x: [rows, n] with x_stride elements between rows; times factor, or with a table times
 * table[positions[row]]. 0; 1, touching nothing, if a position is outside [0, max_position). */
int quire_scale(void *x, int64_t x_stride, const int64_t *positions, const float *table,
                int64_t max_position, float factor, int64_t rows, int64_t n, int dt, int threads) {
  for (int64_t r = 0; table && r < rows; r++)
    if (positions[r] < 0 || positions[r] >= max_position) return 1;
  const row_job job = {.out = x, .x_stride = x_stride, .positions = positions, .table = table,
                       .rows = rows, .n = n, .factor = factor, .dt = dt};
  return run_rows(scale_task, job, threads);
}

INLINE void finish_at(const row_job *j, int64_t r, const int dt) {
  finish_row((float *)j->out + r * PIECE, piece_length(j, r), j->divisor, j->cap, dt);
}
ROW_TASK(finish_task, FOR_DTYPE(j->dt, finish_at(j, r, dt)))

/* logits: [count], rounded to dt. */
int quire_finish_logits(float *logits, int64_t count, float divisor, float cap, int dt,
                        int threads) {
  const row_job job = {.out = logits, .count = count, .rows = pieces(count), .n = PIECE,
                       .divisor = divisor, .cap = cap, .dt = dt};
  return run_rows(finish_task, job, threads);
}

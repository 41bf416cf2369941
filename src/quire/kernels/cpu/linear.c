/* y = x @ W^T + bias over packed weights, the same bits for a row whatever the number of rows.
 *
 * Weights are packed in panels of PANEL output columns, [panels][K / pair][PANEL][pair], where a pair
 * is two bfloat16 along K (the operand of vdpbf16ps) and one element in the other dtypes. An output is one
 * chain of fused multiply-adds (or of vdpbf16ps) over k in order, from zero. So the blocking of rows in
 * registers, the division of columns among threads and the cuts of K change no bit. With few rows, the
 * weights are read once, in the order of addresses. With more, a panel stays in L2 while blocks of rows
 * are multiplied with it, and the next panel is prefetched.
 */
#include "kernels.h"

#define PANEL 64
#if VW == 16 || defined(__aarch64__) /* 32 vector registers */
#define LANES 4 /* vectors of a panel in registers, times ROWS accumulators */
#define ROWS 6
#else
#define LANES 2
#define ROWS 4
#endif
#define K_CUT 4096       /* elements of K between spills: a panel with this many rows fits in L2 */
#define ROW_CHUNK 192    /* rows that pass over a panel before the next one; bounds the spill */
#define AHEAD 4096       /* prefetch distance in bytes if a panel is read once: then memory is the limit */

#if defined(__AVX512BF16__)
#define HAVE_DOT 1
#else
#define HAVE_DOT 0
#endif

/* Whether x must be widened to fp32 first, so that its elements can be broadcast. */
INLINE int widens(const int dt) { return dt == F16 || (dt == BF16 && !HAVE_DOT); }

INLINE int64_t pair_of(const int dt) { return dt == BF16 ? 2 : 1; }

typedef struct {
  const linear_weight *w;
  const void *x; /* [m, k], fp32 where `widens` */
  void *out;
  int64_t x_stride, out_stride, m;
  int64_t panels, chunks; /* a unit of work is one chunk of rows times one panel */
  int epilogue, threads;
} linear_job;

/* The memory to prefetch during one pass over a panel: `stride` bytes for each step of k. */
typedef struct {
  const char *at;
  int64_t stride;
} stream;

/* acc[r][i] += x[r][k0..k1) * panel columns, for one group of LANES vectors. */
INLINE void multiply(vf acc[ROWS][LANES], const void *x, int64_t x_stride, const char *w,
                     stream next, int64_t k0, int64_t k1, const int rows, const int dt) {
  const int64_t step = pair_of(dt), row = PANEL * step * (int64_t)elem_size(dt);
  const int bytes = LANES * VW * (dt == F32 || dt == BF16 ? 4 : 2);
  w += k0 / step * row;
  next.at += k0 / step * next.stride;
  for (int64_t k = k0; k < k1; k += step, w += row, next.at += next.stride) {
    UNROLL for (int b = 0; b < bytes; b += 64) __builtin_prefetch(next.at + b, 0, 2);
#if HAVE_DOT
    if (dt == BF16) {
      __m512bh wv[LANES];
      UNROLL for (int i = 0; i < LANES; i++) wv[i] = (__m512bh)_mm512_loadu_si512(w + i * 64);
      UNROLL for (int r = 0; r < rows; r++) {
        int32_t pair;
        memcpy(&pair, (const char *)x + (r * x_stride + k) * 2, 4);
        const __m512bh xv = (__m512bh)_mm512_set1_epi32(pair);
        UNROLL for (int i = 0; i < LANES; i++)
          acc[r][i] = (vf)_mm512_dpbf16_ps((__m512)acc[r][i], xv, wv[i]);
      }
      continue;
    }
#endif
    vf wv[2][LANES];
    UNROLL for (int i = 0; i < LANES; i++) {
      if (dt == BF16) { /* lane: element k low, element k + 1 high */
        vu both;
        memcpy(&both, w + i * VW * 4, sizeof both);
        wv[0][i] = (vf)(both << 16);
        wv[1][i] = (vf)(both & 0xffff0000u);
      } else {
        wv[0][i] = vload(w + i * VW * (int)elem_size(dt), dt);
      }
    }
    UNROLL for (int half = 0; half < (dt == BF16 ? 2 : 1); half++)
      UNROLL for (int r = 0; r < rows; r++) {
        const vf xv = vset(((const float *)x)[r * x_stride + k + half]);
        UNROLL for (int i = 0; i < LANES; i++) acc[r][i] = vfma(wv[half][i], xv, acc[r][i]);
      }
  }
}

/* sums [rows][PANEL]: the partial sums of some rows times one panel. */
INLINE void block(const linear_job *job, const void *x, const char *panel, stream next, int64_t k0,
                  int64_t k1, float *sums, const int rows, const int dt) {
  for (int c = 0; c < PANEL; c += LANES * VW) {
    vf acc[ROWS][LANES];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++)
      acc[r][i] = k0 ? vload(sums + r * PANEL + c + i * VW, F32) : vset(0.0f);
    multiply(acc, x, job->x_stride, panel + c * pair_of(dt) * (int64_t)elem_size(dt), next, k0, k1,
             rows, dt);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++)
      vstore(sums + r * PANEL + c + i * VW, acc[r][i], F32);
  }
}

/* Bias and epilogue for rows x n columns of finished sums; `out` at the first of them. */
INLINE void finish(const linear_job *job, const float *sums, const void *bias, void *out,
                   int64_t rows, int64_t n, const int dt) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < n; c += VW) {
      const int64_t index = r * job->out_stride + c, rest = n - c;
      vf y = vload(sums + r * PANEL + c, F32);
      if (bias) y += vload_upto(at(bias, c, dt), rest, dt);
      if (job->epilogue == LINEAR_FLOAT) {
        vstore_upto((float *)out + index, vround(y, dt), rest, F32);
      } else {
        void *to = at_mut(out, index, dt);
        if (job->epilogue == LINEAR_ADD) y = vload_upto(to, rest, dt) + vround(y, dt);
        vstore_upto(to, y, rest, dt);
      }
    }
}

/* Rows [begin, end) over one panel, in blocks of nearly equal size. */
INLINE void panel_rows(const linear_job *job, int64_t begin, int64_t end, int64_t panel,
                       int64_t next_panel, const int dt) {
  const linear_weight *w = job->w;
  const int64_t rows = end - begin, blocks = (rows + ROWS - 1) / ROWS, step = pair_of(dt);
  const int64_t steps = (w->k + step - 1) / step, row = PANEL * step * (int64_t)elem_size(dt);
  const char *base = (const char *)w->panels + panel * steps * row;
  const char *after = (const char *)w->panels + next_panel * steps * row;
  const int xt = widens(dt) ? F32 : dt;
  float sums[ROW_CHUNK * PANEL];
  for (int64_t k0 = 0; k0 < w->k; k0 += K_CUT) {
    const int64_t k1 = w->k - k0 > K_CUT ? k0 + K_CUT : w->k;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t first = rows * b / blocks;
      const void *x = at(job->x, (begin + first) * job->x_stride, xt);
      float *s = sums + first * PANEL;
      /* A single pass prefetches its own panel; several passes each prefetch a part of the next one. */
      const stream next = blocks == 1 ? (stream){base + AHEAD, row}
                                      : (stream){after + b * (steps * row / blocks), row / blocks};
      switch (rows * (b + 1) / blocks - first) {
        case 1: block(job, x, base, next, k0, k1, s, 1, dt); break;
        case 2: block(job, x, base, next, k0, k1, s, 2, dt); break;
        case 3: block(job, x, base, next, k0, k1, s, 3, dt); break;
        case 4: block(job, x, base, next, k0, k1, s, 4, dt); break;
#if ROWS > 4
        case 5: block(job, x, base, next, k0, k1, s, 5, dt); break;
        case 6: block(job, x, base, next, k0, k1, s, 6, dt); break;
#endif
      }
    }
  }
  const int64_t column = panel * PANEL, n = w->n - column < PANEL ? w->n - column : PANEL;
  const int ot = job->epilogue == LINEAR_FLOAT ? F32 : dt;
  finish(job, sums, w->bias ? at(w->bias, column, dt) : NULL,
         at_mut(job->out, begin * job->out_stride + column, ot), rows, n, dt);
}

/* One instance for each dtype, so that the compiler specializes each once. */
#define PANEL_ROWS(name, dt)                                                                      \
  static __attribute__((noinline)) void name(const linear_job *job, int64_t begin, int64_t end,   \
                                             int64_t panel, int64_t next_panel) {                 \
    panel_rows(job, begin, end, panel, next_panel, dt);                                           \
  }
PANEL_ROWS(panel_rows_f32, F32)
PANEL_ROWS(panel_rows_bf16, BF16)
PANEL_ROWS(panel_rows_f16, F16)

/* x in the form that the kernel reads: widened if needed, and with a complete last pair. */
static const void *readable(const linear_weight *w, const void *x, int64_t *stride, int64_t m) {
  const int dt = w->dtype;
  const int64_t step = pair_of(dt), k = (w->k + step - 1) / step * step;
  if (!widens(dt) && k == w->k) return x;
  const int out = widens(dt) ? F32 : dt;
  char *copy = quire_scratch(SCRATCH_LINEAR, (size_t)(m * k) * elem_size(out) + 64);
  if (!copy) return NULL;
  for (int64_t r = 0; r < m; r++) {
    memset(at_mut(copy, r * k + w->k, out), 0, (size_t)(k - w->k) * elem_size(out));
    const void *row = at(x, r * *stride, dt);
    if (out == dt)
      memcpy(at_mut(copy, r * k, out), row, (size_t)w->k * elem_size(dt));
    else
      for (int64_t i = 0; i < w->k; i += VW)
        vstore_upto((float *)copy + r * k + i, vload_upto(at(row, i, dt), w->k - i, dt), w->k - i, F32);
  }
  *stride = k;
  return copy;
}

/* The panel of the unit with this index. Threads take units in turn, and so each gets a range of panels
 * in the order of addresses: two separate streams read 6 % more a second than two threads that alternate. */
static int64_t panel_at(int64_t index, int64_t panels, int64_t threads) {
  const int64_t whole = panels / threads; /* panels of every range; the first ranges may have one more */
  if (index < whole * threads) return panels * (index % threads) / threads + index / threads;
  int64_t range = 0;
  for (int64_t left = index - whole * threads;; range++) {
    const int64_t size = panels * (range + 1) / threads - panels * range / threads;
    if (size > whole && left-- == 0) break;
  }
  return panels * (range + 1) / threads - 1;
}

static void linear_unit(void *context, int64_t unit) {
  const linear_job *job = context;
  const int64_t panel = panel_at(unit % job->panels, job->panels, job->threads);
  const int64_t chunk = unit / job->panels, next = min64(panel + 1, job->panels - 1);
  const int64_t begin = job->m * chunk / job->chunks, end = job->m * (chunk + 1) / job->chunks;
  if (job->w->dtype == F32)
    panel_rows_f32(job, begin, end, panel, next);
  else if (job->w->dtype == BF16)
    panel_rows_bf16(job, begin, end, panel, next);
  else
    panel_rows_f16(job, begin, end, panel, next);
}

/* x: [m, k], row stride given. out: [m, n], row stride given; `epilogue` says how the result is stored.
 * Returns 5 if there is no memory. */
int quire_linear(const linear_weight *w, const void *x, int64_t x_stride, void *out,
                 int64_t out_stride, int64_t m, int epilogue, int threads) {
  if (m * w->n * w->k <= 4 * SMALL_WORK) threads = 1;
  linear_job job = {w, NULL, out, x_stride, out_stride, m, (w->n + PANEL - 1) / PANEL,
                    (m + ROW_CHUNK - 1) / ROW_CHUNK, epilogue, threads};
  job.x = readable(w, x, &job.x_stride, m);
  if (!job.x) return 5;
  quire_run(linear_unit, &job, job.panels * job.chunks, threads);
  return 0;
}

/* ---- packing ---- */

#define PACK_K 64 /* elements of K that are moved at once, so that the destination stays in L1 */

typedef struct {
  const char *weight;
  char *panels;
  int64_t first, rows, k, size, step;
} pack_job;

/* One of the log2(VW) exchanges that transpose [VW][VW]: of elements at distance `s` in rows and columns. */
INLINE void exchange(vu rows[VW], const int s) {
  UNROLL for (int i = 0; i < VW; i++) {
    if (i & s) continue;
    const vu a = rows[i], b = rows[i | s];
#if defined(__clang__)
    for (int c = 0; c < VW; c++) {
      rows[i][c] = c & s ? b[c ^ s] : a[c];
      rows[i | s][c] = c & s ? b[c] : a[c ^ s];
    }
#else
    vu low, high;
    for (int c = 0; c < VW; c++) {
      low[c] = (uint32_t)(c & s ? (c ^ s) + VW : c);
      high[c] = (uint32_t)(c & s ? c + VW : c ^ s);
    }
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i | s] = __builtin_shuffle(a, b, high);
#endif
  }
}

/* A complete panel of PANEL rows, in units of four bytes, one square of VW x VW in registers at a time.
 * It reads and writes whole cache lines. Returns the number of units that it has done, all but the last
 * few. */
static int64_t pack_squares(const char *weight, int64_t row_bytes, int64_t units, char *panel) {
  int64_t u = 0;
  for (; u + VW <= units; u += VW)
    for (int64_t c = 0; c < PANEL; c += VW) {
      vu rows[VW];
      UNROLL for (int i = 0; i < VW; i++) memcpy(&rows[i], weight + (c + i) * row_bytes + u * 4, sizeof(vu));
      UNROLL for (int s = 1; s < VW; s *= 2) exchange(rows, s);
      UNROLL for (int i = 0; i < VW; i++) memcpy(panel + ((u + i) * PANEL + c) * 4, &rows[i], sizeof(vu));
    }
  return u;
}

static void pack_panel(void *context, int64_t index) {
  const pack_job *j = context;
  const int64_t unit = j->size * j->step, padded = (j->k + j->step - 1) / j->step;
  const int64_t p = j->first / PANEL + index, row = p * PANEL - j->first;
  char *panel = j->panels + p * PANEL * padded * unit;
  int64_t done = 0;
  if (unit == 4 && row >= 0 && row + PANEL <= j->rows) {
    const int64_t row_bytes = j->k * j->size;
    done = j->step * pack_squares(j->weight + row * row_bytes, row_bytes, j->k / j->step, panel);
  }
  for (int64_t k0 = done; k0 < j->k; k0 += PACK_K)
    for (int64_t c = 0; c < PANEL; c++) {
      const int64_t r = p * PANEL + c - j->first;
      if (r < 0 || r >= j->rows) continue;
      const char *source = j->weight + (r * j->k + k0) * j->size;
      const int64_t count = min64(j->k - k0, PACK_K);
      char *to = panel + (k0 / j->step * PANEL + c) * unit;
      int64_t i = 0;
      for (; i + j->step <= count; i += j->step, to += PANEL * unit)
        memcpy(to, source + i * j->size, unit == 4 ? 4 : 2);
      if (i < count) memcpy(to, source + i * j->size, (size_t)j->size);
    }
}

/* Packs rows [first, first + rows) of a [n, k] matrix into the panels. The caller must have zeroed the
 * rest of a panel. size: 2 or 4 bytes an element; step: elements in a pair. */
int quire_pack_linear(const void *weight, int64_t first, int64_t rows, int64_t k, int64_t size,
                      int64_t step, void *panels, int threads) {
  pack_job job = {weight, panels, first, rows, k, size, step};
  const int64_t count = (first + rows + PANEL - 1) / PANEL - first / PANEL;
  quire_run(pack_panel, &job, count, rows * k > 4 * SMALL_WORK ? threads : 1);
  return 0;
}

typedef struct {
  const linear_weight *w;
  const int64_t *ids;
  int64_t tokens;
  char *out;
} gather_job;

#define GATHERED 16 /* rows of a unit */

static void gather_unit(void *context, int64_t index) {
  const gather_job *j = context;
  const linear_weight *w = j->w;
  const int64_t size = (int64_t)elem_size(w->dtype), step = pair_of(w->dtype), unit = size * step;
  const int64_t padded = (w->k + step - 1) / step, end = min64((index + 1) * GATHERED, j->tokens);
  for (int64_t t = index * GATHERED; t < end; t++) {
    const char *from = (const char *)w->panels +
                       (j->ids[t] / PANEL * PANEL * padded + j->ids[t] % PANEL) * unit;
    char *to = j->out + t * w->k * size;
    int64_t i = 0;
    for (; i + step <= w->k; i += step, from += PANEL * unit) memcpy(to + i * size, from, unit == 4 ? 4 : 2);
    if (i < w->k) memcpy(to + i * size, from, (size_t)size);
  }
}

/* Row `ids[t]` of the packed matrix, for each t: an embedding that shares the head's weights. 0; 1, with
 * nothing written, if an id is outside [0, n). */
int quire_gather_rows(const linear_weight *w, const int64_t *ids, int64_t tokens, void *out, int threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (ids[t] < 0 || ids[t] >= w->n) return 1;
  gather_job job = {w, ids, tokens, out};
  quire_run(gather_unit, &job, (tokens + GATHERED - 1) / GATHERED, threads);
  return 0;
}

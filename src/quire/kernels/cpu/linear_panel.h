/* Products with panels of PANEL output columns: what dense weights (linear.c) and codes (codes.c, float8.c) share. */
#ifndef QUIRE_LINEAR_PANEL_H
#define QUIRE_LINEAR_PANEL_H

#include "kernels.h"

#define PANEL 64
#if VW == 16 || defined(__aarch64__) /* 32 vector registers */
#define LANES 4 /* vectors of a panel in registers, times ROWS accumulators */
#define ROWS 6
#else
#define LANES 2
#define ROWS 4
#endif
#define ROW_CHUNK 192    /* rows that pass over a panel before the next one; bounds the spill */
/* Prefetch distance in bytes if a panel is read once, which memory limits: best on Zen 4, and on a Xeon. */
#define AHEAD (HAVE_DOT ? 2048 : 4096)

/* Whether x must be widened to fp32 first, so that its elements can be broadcast. */
INLINE int widens(const int dt) { return dt == F16 || (dt == BF16 && !HAVE_DOT); }

INLINE int64_t pair_of(const int dt) { return dt == BF16 ? 2 : 1; }

typedef struct linear_job linear_job;
typedef void (*panel_task)(const linear_job *, int64_t begin, int64_t end, int64_t panel, int64_t next_panel);

typedef struct { /* rows of x as integers (codes.c), piece by piece of the columns */
  const int32_t *planes[2]; /* [m][stride]: four columns in two words */
  const int32_t *sums;      /* [m][pieces] of the integers */
  const float *scales;      /* [m][pieces]: an element is an integer times its piece's scale */
  int64_t stride, pieces;
} coded_input;

struct linear_job { /* one matrix of a stack */
  const linear_weight *w;
  const void *x;     /* [m, k], fp32 where `widens`; NULL: only `coded` */
  coded_input coded;
  void *out;         /* at its first column */
  int64_t x_stride, out_stride;
  int64_t panels;
  int epilogue;
  panel_task task; /* rows [begin, end) times one panel */
};

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
                  int64_t k1, int goes_on, float *sums, const int rows, const int dt) {
  for (int c = 0; c < PANEL; c += LANES * VW) {
    vf acc[ROWS][LANES];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++)
      acc[r][i] = goes_on ? vload(sums + r * PANEL + c + i * VW, F32) : vset(0.0f);
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

/* One block of 1 to ROWS rows. */
INLINE void any_block(const linear_job *job, const void *x, const char *panel, stream next, int64_t k0,
                      int64_t k1, int goes_on, float *sums, int64_t rows, const int dt) {
  switch (rows) {
    case 1: block(job, x, panel, next, k0, k1, goes_on, sums, 1, dt); break;
    case 2: block(job, x, panel, next, k0, k1, goes_on, sums, 2, dt); break;
    case 3: block(job, x, panel, next, k0, k1, goes_on, sums, 3, dt); break;
    case 4: block(job, x, panel, next, k0, k1, goes_on, sums, 4, dt); break;
#if ROWS > 4
    case 5: block(job, x, panel, next, k0, k1, goes_on, sums, 5, dt); break;
    case 6: block(job, x, panel, next, k0, k1, goes_on, sums, 6, dt); break;
#endif
  }
}

/* codes.c: integer codes */
void quire_codes_panel(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel);
size_t quire_coded_bytes(const linear_weight *w, int64_t m);
void quire_code_input(const linear_weight *w, const void *x, int64_t x_stride, int64_t m, int threads,
                      void *memory, coded_input *coded);
void quire_codes_row(const linear_weight *w, int64_t row, void *out);

#endif

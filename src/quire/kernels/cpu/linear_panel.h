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

/* Each byte, below 16, replaced by its value. */
INLINE vu lookup(vu codes, const uint8_t *values) {
#if VW == 16 && defined(__AVX512BW__)
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values));
  return (vu)_mm512_shuffle_epi8(table, (__m512i)codes);
#elif VW == 8 && defined(__AVX2__)
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
  return (vu)_mm256_shuffle_epi8(table, (__m256i)codes);
#elif defined(__aarch64__)
  return (vu)vqtbl1q_u8(vld1q_u8(values), (uint8x16_t)codes);
#else
  uint8_t bytes[VW * 4];
  memcpy(bytes, &codes, sizeof bytes);
  for (int i = 0; i < VW * 4; i++) bytes[i] = values[bytes[i]];
  memcpy(&codes, bytes, sizeof bytes);
  return codes;
#endif
}

typedef struct linear_job linear_job;
typedef void (*panel_task)(const linear_job *, int64_t begin, int64_t end, int64_t panel, int64_t next_panel);

typedef struct { /* rows of x as integers (codes.c) */
  const int32_t *planes[2]; /* [m][stride]: four columns in two words */
  const int32_t *sums;      /* [m][segments], of the integers */
  const float *scales;      /* [m][pieces]: an element is an integer times its piece's scale */
  int64_t stride, pieces, segments;
} coded_input;

typedef struct { /* of one product, for the rows with an adapter */
  const lora_rows *rows;
  int64_t site;
  float *t; /* [rows->count][stride]: s * A x */
  int64_t stride;
} lora_use;

struct linear_job { /* one matrix of a stack */
  const linear_weight *w;
  const void *x;     /* [m, k], fp32 where `widens`; NULL: only `coded` */
  coded_input coded;
  void *out;         /* at its first column */
  int64_t x_stride, out_stride;
  int64_t panels;
  int epilogue;
  panel_task task; /* rows [begin, end) times one panel */
  const lora_use *lora; /* NULL: no row has an adapter */
  int64_t first_panel;  /* of the stack's */
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

/* lora.c */
int quire_shrink(lora_use *use, const void *x, int64_t x_stride, int dt, int threads);
void quire_add_delta(const linear_job *job, float *sums, int64_t begin, int64_t rows, int64_t panel);

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

/* Adapters, bias and epilogue for `rows` rows, from `begin` on, times one panel: sums [rows][PANEL]. */
INLINE void finish_panel(const linear_job *job, float *sums, int64_t begin, int64_t rows, int64_t panel) {
  if (job->lora) quire_add_delta(job, sums, begin, rows, panel);
  const linear_weight *w = job->w;
  const int64_t column = panel * PANEL, n = min64(w->n - column, PANEL);
  const void *bias = w->bias ? at(w->bias, column, w->dtype) : NULL;
  void *out = at_mut(job->out, begin * job->out_stride + column, job->epilogue == LINEAR_FLOAT ? F32 : w->dtype);
  FOR_DTYPE(w->dtype, finish(job, sums, bias, out, rows, n, dt));
}

/* Runs `call` with `rows` a constant of that value, from 1 to ROWS. */
#if ROWS > 4
#define FOR_MORE_ROWS(call)                \
  case 5: { const int rows = 5; call; break; } \
  case 6: { const int rows = 6; call; break; }
#else
#define FOR_MORE_ROWS(call)
#endif
#define FOR_ROWS(value, call)                  \
  switch (value) {                             \
    case 1: { const int rows = 1; call; break; } \
    case 2: { const int rows = 2; call; break; } \
    case 3: { const int rows = 3; call; break; } \
    case 4: { const int rows = 4; call; break; } \
    FOR_MORE_ROWS(call)                        \
  }

/* One block of 1 to ROWS rows. */
INLINE void any_block(const linear_job *job, const void *x, const char *panel, stream next, int64_t k0,
                      int64_t k1, int goes_on, float *sums, int64_t count, const int dt) {
  FOR_ROWS(count, block(job, x, panel, next, k0, k1, goes_on, sums, rows, dt));
}

/* codes.c: integer codes */
void quire_codes_panel(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel);
size_t quire_coded_bytes(const linear_weight *w, int64_t m);
int quire_code_input(const linear_weight *w, const void *x, int64_t x_stride, int64_t m, int threads,
                      void *memory, coded_input *coded);
void quire_codes_row(const linear_weight *w, int64_t row, void *out);

/* float8.c */
void quire_float8_panel(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel);
int64_t quire_float8_place(int64_t row, int64_t column);

#endif

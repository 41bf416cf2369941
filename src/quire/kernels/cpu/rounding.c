/* Rounding rows of floats to codes, symmetric: quire/quantization/rounding.py says how scales are chosen. A sum has 16
 * lanes whatever the processor's vectors, so a checkpoint is rounded alike everywhere. */
#include "kernels.h"

enum rounding { ROUND_INT8 = 0, ROUND_INT4 = 1, ROUND_FLOAT8 = 2 }; /* rounding.py has the same numbers */

#define SUM_VECTORS (16 / VW)

typedef struct { /* mirrored by RoundJob in library.py */
  const void *rows;     /* [count, k] of dtype */
  uint8_t *codes;       /* [count, k] */
  void *scales;         /* [count, groups] of scale_dtype */
  const float *places;  /* of int4: where the largest weight of a group may be among the codes */
  int64_t count, k, group, num_places;
  int32_t dtype, scale_dtype, rounding;
} round_job;

INLINE float sum16(const vf lanes[SUM_VECTORS]) {
  float a[16];
  for (int i = 0; i < SUM_VECTORS; i++) vstore(a + i * VW, lanes[i], F32);
  for (int w = 8; w > 0; w >>= 1)
    for (int i = 0; i < w; i++) a[i] += a[i + w];
  return a[0];
}

INLINE vf round_even(vf x) { return (x + ROUNDING) - ROUNDING; }

INLINE vf clamp(vf x, float low, float high) {
  x = vselect((vi)(x < low), vset(low), x);
  return vselect((vi)(x > high), vset(high), x);
}

/* The scale of int4 codes in [-8, 7]: of several places for the largest weight, that with the least error. x: `count`
 * floats, a multiple of 16; those behind the last weight are zero. */
static float search_scale(const round_job *j, const float *x, int64_t count, float end) {
  vf squares[SUM_VECTORS] = {{0}};
  for (int64_t i = 0; i < count; i += 16)
    for (int v = 0; v < SUM_VECTORS; v++) {
      const vf w = vload(x + i + v * VW, F32);
      squares[v] += w * w;
    }
  const float mean = sum16(squares) / (float)j->group;
  float best = 0.0f, scale = 0.0f;
  for (int64_t p = 0; p < j->num_places; p++) {
    const float inverse = j->places[p] / end;
    vf xq[SUM_VECTORS] = {{0}}, qq[SUM_VECTORS] = {{0}};
    for (int64_t i = 0; i < count; i += 16)
      for (int v = 0; v < SUM_VECTORS; v++) {
        const vf w = vload(x + i + v * VW, F32), q = clamp(round_even(w * inverse), -8.0f, 7.0f);
        const vf importance = w * w + mean;
        xq[v] += importance * w * q;
        qq[v] += importance * q * q;
      }
    const float above = sum16(xq), below = sum16(qq);
    const float gain = below > 0.0f ? above * above / below : 0.0f;
    if (gain > best) best = gain, scale = above / below;
  }
  return scale;
}

/* One group: its codes, and its scale as it is stored. */
INLINE float round_group(const round_job *j, const float *x, int64_t count, int64_t weights, uint8_t *codes) {
  const int rounding = j->rounding;
  vf most = vset(0.0f), least = most;
  int finite = 1;
  for (int64_t i = 0; i < count; i += VW) {
    const vf v = vload(x + i, F32);
    most = vmax(most, v), least = vmax(least, -v);
    finite &= !vany((vi)(((vu)v & 0x7f800000u) == 0x7f800000u));
  }
  const float high = vlargest(most), low = vlargest(least), largest = high > low ? high : low;
  float scale = rounding == ROUND_INT4 ? 0.0f : largest / (rounding == ROUND_INT8 ? 127.0f : 448.0f);
  if (rounding == ROUND_INT4 && largest > 0.0f && finite)
    scale = search_scale(j, x, count, high >= low ? high : -low);
  scale = finite ? vround(vset(scale), j->scale_dtype)[0] : NAN;
  const vf divisor = vset(scale != 0.0f ? scale : 1.0f);
  for (int64_t i = 0; i < weights; i += VW) {
    const vf q = vload(x + i, F32) / divisor;
    vi code;
    if (rounding == ROUND_FLOAT8)
      code = (vi)vwiden(vf8_from_float(q));
    else if (rounding == ROUND_INT8)
      code = __builtin_convertvector(clamp(round_even(q), -127.0f, 127.0f), vi) + 128;
    else
      code = __builtin_convertvector(clamp(round_even(q), -8.0f, 7.0f), vi) + 8;
    for (int64_t lane = 0; lane < min64(weights - i, VW); lane++) codes[i + lane] = (uint8_t)code[lane];
  }
  return scale;
}

/* 0; 5: no memory. */
int quire_round_rows(const round_job *j) {
  const int64_t groups = (j->k + j->group - 1) / j->group, held = (j->group + 15) / 16 * 16;
  float *x = quire_scratch(SCRATCH_CODES, (size_t)held * sizeof *x);
  if (!x) return 5;
  for (int64_t r = 0; r < j->count; r++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = r * j->k + g * j->group, weights = min64(j->group, j->k - g * j->group);
      for (int64_t i = 0; i < weights; i += VW)
        FOR_DTYPE(j->dtype,
                  vstore_upto(x + i, vload_upto(at(j->rows, first + i, dt), weights - i, dt), weights - i, F32));
      const int64_t padded = (weights + 15) / 16 * 16;
      memset(x + weights, 0, (size_t)(padded - weights) * sizeof *x);
      const float scale = round_group(j, x, padded, weights, j->codes + first);
      vstore_n(at_mut(j->scales, r * groups + g, j->scale_dtype), vset(scale), 1, j->scale_dtype);
    }
  return 0;
}

/* Rounding rows of floats to codes, symmetric: quire/quantization/rounding.py says how scales are chosen. A sum has 16
 * lanes whatever the processor's vectors, so a checkpoint is rounded alike everywhere. */
#include "kernels.h"

enum rounding { ROUND_INT8 = 0, ROUND_INT4 = 1, ROUND_FLOAT8 = 2 }; /* rounding.py has the same numbers */

#define SUM_VECTORS (16 / VW)

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
static float search_scale(const float *x, int64_t count, int64_t group, float end) {
  static const float places[] = {-7.0f, -7.5f, -8.0f, -8.5f, -9.0f, -9.5f, -10.0f, -11.0f};
  vf squares[SUM_VECTORS] = {{0}};
  for (int64_t i = 0; i < count; i += 16)
    for (int j = 0; j < SUM_VECTORS; j++) {
      const vf v = vload(x + i + j * VW, F32);
      squares[j] += v * v;
    }
  const float mean = sum16(squares) / (float)group;
  float best = 0.0f, scale = 0.0f;
  for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
    const float inverse = places[p] / end;
    vf xq[SUM_VECTORS] = {{0}}, qq[SUM_VECTORS] = {{0}};
    for (int64_t i = 0; i < count; i += 16)
      for (int j = 0; j < SUM_VECTORS; j++) {
        const vf v = vload(x + i + j * VW, F32), q = clamp(round_even(v * inverse), -8.0f, 7.0f);
        const vf importance = v * v + mean;
        xq[j] += importance * v * q;
        qq[j] += importance * q * q;
      }
    const float above = sum16(xq), below = sum16(qq);
    const float gain = below > 0.0f ? above * above / below : 0.0f;
    if (gain > best) best = gain, scale = above / below;
  }
  return scale;
}

/* One group: its codes, and its scale as it is stored. */
INLINE float round_group(const float *x, int64_t count, int64_t weights, int64_t group, int rounding, int dt,
                         uint8_t *codes) {
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
    scale = search_scale(x, count, group, high >= low ? high : -low);
  scale = finite ? vround(vset(scale), dt)[0] : NAN;
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
    for (int64_t j = 0; j < min64(weights - i, VW); j++) codes[i + j] = (uint8_t)code[j];
  }
  return scale;
}

/* rows: [rows, k] of dtype; codes: [rows, k]; scales: [rows, groups] of scale_dtype. 0; 5: no memory. */
int quire_round_rows(const void *rows, int64_t count, int64_t k, int64_t group, int dtype, int rounding, uint8_t *codes,
                     void *scales, int scale_dtype) {
  const int64_t groups = (k + group - 1) / group, held = (group + 15) / 16 * 16;
  float *x = quire_scratch(SCRATCH_CODES, (size_t)held * sizeof *x);
  if (!x) return 5;
  for (int64_t r = 0; r < count; r++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = r * k + g * group, weights = min64(group, k - g * group);
      for (int64_t i = 0; i < weights; i += VW)
        FOR_DTYPE(dtype, vstore_upto(x + i, vload_upto(at(rows, first + i, dt), weights - i, dt), weights - i, F32));
      const int64_t padded = (weights + 15) / 16 * 16;
      memset(x + weights, 0, (size_t)(padded - weights) * sizeof *x);
      const float scale = round_group(x, padded, weights, group, rounding, scale_dtype, codes + first);
      vstore_n(at_mut(scales, r * groups + g, scale_dtype), vset(scale), 1, scale_dtype);
    }
  return 0;
}

/* Vectors of the machine's width, and functions on them with a defined result.
 *
 * Kernels are written with "native" vectors of VW floats (16, 8 or 4). Everything here is lane-wise or
 * has an explicit order, so a result never depends on how the compiler vectorizes: no fast-math, no
 * contraction, and a fused multiply-add only where vfma() is called. That is why a row's result has the
 * same bits whatever other rows there are.
 */
#ifndef QUIRE_VEC_H
#define QUIRE_VEC_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX__)
#define VW 8
#else
#define VW 4
#endif

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));

/* Element types; library.py has the same numbers. */
enum dtype { F32 = 0, BF16 = 1, F16 = 2 };

#if defined(__AVX512BF16__) /* dot products of pairs of bfloat16 in one instruction */
#define HAVE_DOT 1
#else
#define HAVE_DOT 0
#endif

#define ROUNDING 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */

INLINE size_t elem_size(const int dt) { return dt == F32 ? 4 : 2; }
INLINE const void *at(const void *base, int64_t index, const int dt) {
  return (const char *)base + index * (int64_t)elem_size(dt);
}
INLINE void *at_mut(void *base, int64_t index, const int dt) {
  return (char *)base + index * (int64_t)elem_size(dt);
}

INLINE vf vset(float x) {
#if VW == 16
  return (vf)_mm512_set1_ps(x);
#elif VW == 8
  return (vf)_mm256_set1_ps(x);
#else
  return (vf){x, x, x, x};
#endif
}

INLINE vu vwiden(vh h) { /* gcc 12 splits a convertvector to 512 bits into two */
#if VW == 16
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}

INLINE vf vfma(vf a, vf b, vf c) {
#if VW == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VW == 8 && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

/* a in lanes where the mask is all ones, b where it is zero. */
INLINE vf vselect(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE int vany(vi mask) {
#if VW == 16
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif VW == 8
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int any = 0;
  for (int i = 0; i < VW; i++) any |= mask[i];
  return any != 0;
#endif
}

INLINE vf vmax(vf a, vf b) {
#if VW == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return vselect((vi)(a > b), a, b);
#endif
}

INLINE float vlargest(vf x) {
#if VW == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float lanes[VW];
  memcpy(lanes, &x, sizeof lanes);
  for (int i = 1; i < VW; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
#endif
}

/* x where test is not below the limit (or is NaN), else zero. */
INLINE vf vzero_below(vf test, float limit, vf x) {
#if VW == 16
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)test, (__m512)vset(limit), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_mov_ps(kept, (__m512)x);
#else
  return vselect((vi)(test < limit), vset(0.0f), x);
#endif
}

INLINE int vany_greater(vf a, vf b) {
#if VW == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
  return vany((vi)(a > b));
#endif
}

INLINE vi vlane_index(void) {
  vi r;
  for (int i = 0; i < VW; i++) r[i] = i;
  return r;
}

/* ---- half precision ---- */

INLINE uint16_t half_from_float(float x) { /* round to nearest even, IEEE binary16 */
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
  if (u < 0x38800000u) {                                   /* subnormal: let the FPU round */
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f; /* one ulp of 0.5 is 2^-24, the smallest half */
    memcpy(&u, &f, 4);
    return (uint16_t)(sign | (u - 0x3f000000u));
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return (uint16_t)(sign | (u >> 13));
}

INLINE vf vfloat_from_half(vh h) {
#if VW == 16
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif VW == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16((float16x4_t)h);
#else
  const vu u = vwiden(h);
  const vu magnitude = (u & 0x7fffu) << 13;
  const vf finite = (vf)magnitude * 0x1p112f; /* exact, and right for subnormals too */
  const vu special = (vu)((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (vf)((vu)finite | special | ((u & 0x8000u) << 16));
#endif
}

INLINE vh vhalf_from_float(vf x) {
#if VW == 16
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif VW == 8 && defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (vh)vcvt_f16_f32((float32x4_t)x);
#else
  vh r;
  for (int i = 0; i < VW; i++) r[i] = half_from_float(x[i]);
  return r;
#endif
}

INLINE vf vfloat_from_bf16(vh h) { return (vf)(vwiden(h) << 16); }

/* x rounded to bfloat16, to nearest even, in the upper half of each lane; NaN stays NaN. */
INLINE vu vbf16_bits(vf x) {
  const vu u = (vu)x, rounded = u + 0x7fffu + ((u >> 16) & 1u);
#if VW == 16
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  return (vu)_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc00000));
#else
  const vu nan = (vu)(x != x);
  return (rounded & ~nan) | (nan & 0x7fc00000u);
#endif
}

INLINE vh vbf16_from_float(vf x) {
#if VW == 16
  return (vh)_mm512_cvtepi32_epi16((__m512i)(vbf16_bits(x) >> 16));
#else
  return __builtin_convertvector(vbf16_bits(x) >> 16, vh);
#endif
}

/* ---- floats of 8 bits: E4M3 without infinities (Micikevicius et al. 2022, section 3) ---- */

/* 1/256 of the code in the high byte of each lane: as a half, its exponent is less by 8. A NaN becomes a number. */
INLINE vf vf8_over_256(vh codes) { return vfloat_from_half((codes & 0x8000) | ((codes >> 1) & 0x3f80)); }

/* The upper bits of the bytes that are NaN. */
INLINE vh vf8_nan(vh codes) { return ((codes & 0x7f7f) + 0x0101) & 0x8080; }

/* codes: in the low bytes; the others are zero. */
INLINE vf vfloat_from_f8(vh codes) {
  const vf x = vf8_over_256(codes << 8) * 256.0f;
  return vselect((vi)(vwiden(vf8_nan(codes)) != 0), vset(NAN), x);
}

/* Rounded to nearest even, and at most 448. */
INLINE vh vf8_from_float(vf x) {
  const vu u = (vu)x, sign = (u >> 24) & 0x80;
  const vf magnitude = (vf)(u & 0x7fffffffu);
  const vf clipped = vselect((vi)(magnitude > 448.0f), vset(448.0f), magnitude);
  const vu bits = (vu)clipped, normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  const vu small = (vu)(clipped * 512.0f + ROUNDING) - 0x4b400000u; /* in units of the smallest */
  vu code = (vu)vselect((vi)(clipped < 0.015625f), (vf)small, (vf)normal);
  code = (vu)vselect((vi)(magnitude != magnitude), (vf)((vu){0} + 0x7fu), (vf)code);
#if VW == 16
  return (vh)_mm512_cvtepi32_epi16((__m512i)(code | sign));
#else
  return __builtin_convertvector(code | sign, vh);
#endif
}

/* ---- loads and stores, any alignment ---- */

INLINE vf vload(const void *p, const int dt) {
  if (dt == F32) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  vh h;
  memcpy(&h, p, sizeof h);
  return dt == BF16 ? vfloat_from_bf16(h) : vfloat_from_half(h);
}

INLINE void vstore(void *p, vf x, const int dt) {
  if (dt == F32) {
    memcpy(p, &x, sizeof x);
    return;
  }
  const vh h = dt == BF16 ? vbf16_from_float(x) : vhalf_from_float(x);
  memcpy(p, &h, sizeof h);
}

/* The first n lanes only; the others read as zero and are not written. */
INLINE vf vload_n(const void *p, int64_t n, const int dt) {
  float buffer[VW] = {0};
  memcpy(buffer, p, (size_t)n * elem_size(dt));
  return vload(buffer, dt);
}

INLINE void vstore_n(void *p, vf x, int64_t n, const int dt) {
  float buffer[VW];
  vstore(buffer, x, dt);
  memcpy(p, buffer, (size_t)n * elem_size(dt));
}

INLINE vf vload_upto(const void *p, int64_t n, const int dt) {
  return n >= VW ? vload(p, dt) : vload_n(p, n, dt);
}
INLINE void vstore_upto(void *p, vf x, int64_t n, const int dt) {
  if (n >= VW)
    vstore(p, x, dt);
  else
    vstore_n(p, x, n, dt);
}

/* ---- pairs of bfloat16: lane i of a vu holds elements 2i (its low half) and 2i + 1 ---- */

INLINE vu vload_pairs(const void *p) {
  vu r;
  memcpy(&r, p, sizeof r);
  return r;
}

/* acc[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in fp32. Order and intermediate rounding depend on the
 * machine: they are the same in every call, but not on every machine. */
INLINE vf vdot_pairs(vf acc, vu a, vu b) {
#ifdef __AVX512BF16__
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc = vfma((vf)(a << 16), (vf)(b << 16), acc);
  return vfma((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), acc);
#endif
}

/* 2 * VW floats rounded to bf16, in order (AVX512BF16 flushes subnormals to zero). */
INLINE vu vpack_pairs(vf first, vf second) {
#ifdef __AVX512BF16__
  return (vu)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  const vh halves[2] = {vbf16_from_float(first), vbf16_from_float(second)};
  return vload_pairs(halves);
#endif
}

/* x rounded to dt and widened again. */
INLINE vf vround(vf x, const int dt) {
  if (dt == F32) return x;
  return dt == BF16 ? (vf)(vbf16_bits(x) & 0xffff0000u) : vfloat_from_half(vhalf_from_float(x));
}

/* ---- functions ---- */

#define LOG2E 1.44269504088896340736f
#define LOG2E_LOW 1.92596299e-8f /* log2(e) = LOG2E + LOG2E_LOW to 48 bits */

/* 2^(n + f), where shifted = n + ROUNDING and f in [-1/2, 1/2]: minimax of (2^f - 1) / f. */
INLINE vf vexp2_split(vf shifted, vf f) {
  vf p = vset(1.535359770e-04f);
  p = vfma(p, f, vset(1.339885290e-03f));
  p = vfma(p, f, vset(9.618435986e-03f));
  p = vfma(p, f, vset(5.550332367e-02f));
  p = vfma(p, f, vset(2.402264774e-01f));
  p = vfma(p, f, vset(6.931471825e-01f));
  p = vfma(p, f, vset(1.0f));
  const vu scale = ((vu)shifted + 127u) << 23; /* only the low 9 bits of the integer survive */
  return p * (vf)scale;
}

/* 2^x for x <= 0 (and up to 127): relative error below 2e-7, 2^0 exactly 1, results under 2^-126
 * and x = -inf exactly 0, NaN stays NaN. */
INLINE vf vexp2(vf x) {
  const vf shifted = x + ROUNDING;
  const vf r = vexp2_split(shifted, x - (shifted - ROUNDING));
  return vzero_below(x, -126.0f, r);
}

/* vexp2 with relative error below 3e-6, for results that are rounded to bf16. */
INLINE vf vexp2_rough(vf x) {
  const float rounding = ROUNDING + 127.0f; /* leaves n + 127 in the low bits */
  const vf shifted = x + rounding;
  const vf f = x - (shifted - rounding);
  vf p = vset(9.582853217e-03f);
  p = vfma(p, f, vset(5.590642544e-02f));
  p = vfma(p, f, vset(2.402409861e-01f));
  p = vfma(p, f, vset(6.931241933e-01f));
  p = vfma(p, f, vset(1.0f));
  return vzero_below(x, -126.0f, p * (vf)((vu)shifted << 23));
}

/* 1 / x for normal x: relative error below 2e-7. */
INLINE vf vreciprocal(vf x) {
#if VW == 16
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return vfma(r, 1.0f - x * r, r);
#else
  return 1.0f / x;
#endif
}

/* e^x for x <= 0, as vexp2. */
INLINE vf vexp(vf x) {
  const vf shifted = vfma(x, vset(LOG2E), vset(ROUNDING));
  vf f = vfma(x, vset(LOG2E), ROUNDING - shifted);
  f = vfma(x, vset(LOG2E_LOW), f);
  return vzero_below(x, -87.0f, vexp2_split(shifted, f));
}

/* Natural logarithm of positive normal x: relative error below 3e-7 (2 atanh series). */
INLINE vf vlog(vf x) {
  const vu u = (vu)x - 0x3f3504f3u; /* sqrt(1/2): mantissa in [sqrt(1/2), sqrt(2)) */
  const vi e = (vi)u >> 23;
  const vf m = (vf)((u & 0x007fffffu) + 0x3f3504f3u);
  const vf s = (m - 1.0f) / (m + 1.0f);
  const vf s2 = s * s;
  vf p = vset(2.0f / 9.0f);
  p = vfma(p, s2, vset(2.0f / 7.0f));
  p = vfma(p, s2, vset(2.0f / 5.0f));
  p = vfma(p, s2, vset(2.0f / 3.0f));
  p = vfma(p * s2, s, s + s);
  return vfma(__builtin_convertvector(e, vf), vset(0.693147180559945309f), p);
}

/* Relative error below 5e-7; a NaN stays one. */
INLINE vf vtanh(vf x) {
  const vf magnitude = (vf)((vu)x & 0x7fffffffu);
  const vf e = vexp(magnitude * -2.0f);
  const vf big = (vf)((vu)((1.0f - e) / (1.0f + e)) | ((vu)x & 0x80000000u));
  const vf x2 = x * x;
  vf p = vset(62.0f / 2835.0f);
  p = vfma(p, x2, vset(-17.0f / 315.0f));
  p = vfma(p, x2, vset(2.0f / 15.0f));
  p = vfma(p, x2, vset(-1.0f / 3.0f));
  const vf small = vfma(p * x2, x, x);
  return vselect((vi)(magnitude < 0.25f), small, big);
}

/* The sum of all lanes, by a fixed tree. */
INLINE float vsum(vf x) {
  float a[VW];
  vstore(a, x, F32);
  for (int w = VW / 2; w > 0; w >>= 1)
    for (int i = 0; i < w; i++) a[i] += a[i + w];
  return a[0];
}

/* The fixed tree at the end of every row sum: of 64 partial sums. */
INLINE float sum64(vf acc[64 / VW]) {
  for (int w = 64 / VW / 2; w > 0; w >>= 1)
    for (int i = 0; i < w; i++) acc[i] += acc[i + w];
  return vsum(acc[0]);
}

#endif

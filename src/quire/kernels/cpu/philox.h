/* Philox4x32-10 and Gumbel noise. quire/kernels/philox.py has the explanation and the reference. */
#ifndef QUIRE_PHILOX_H
#define QUIRE_PHILOX_H

#include "vec.h"

/* 64-bit products of each lane with m. */
INLINE void vmul_wide(vu a, uint32_t m, vu *high, vu *low) {
#if VW == 16
  const __m512i x = (__m512i)a, k = _mm512_set1_epi32((int32_t)m);
  const __m512i even = _mm512_mul_epu32(x, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), k);
  *high = (vu)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  *low = (vu)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif VW == 8 && defined(__AVX2__)
  const __m256i x = (__m256i)a, k = _mm256_set1_epi32((int32_t)m);
  const __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
  *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < VW; i++) {
    const uint64_t p = (uint64_t)a[i] * m;
    (*high)[i] = (uint32_t)(p >> 32);
    (*low)[i] = (uint32_t)p;
  }
#endif
}

/* The four words of each of VW counters (block, position, 0). */
INLINE void philox(uint64_t seed, uint64_t position, vu block, vu words[4]) {
  vu c0 = block, c1 = (vu){0} + (uint32_t)position, c2 = (vu){0} + (uint32_t)(position >> 32);
  vu c3 = (vu){0};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    vu high0, low0, high1, low1;
    vmul_wide(c0, 0xD2511F53u, &high0, &low0);
    vmul_wide(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

INLINE vu vload_words(const uint32_t *words) {
  vu w;
  memcpy(&w, words, sizeof w);
  return w;
}

/* (word + 1/2) / 2^32 rounded to float, kept below 1. */
INLINE vf vuniform(vu words) {
  const vf u = (__builtin_convertvector(words, vf) + 0.5f) * 0x1p-32f;
  const vf largest = vset(1.0f - 0x1p-24f);
  return vselect((vi)(u > largest), largest, u);
}

/* -log(-log1p(-u)). log1p through log (Kahan): exact to rounding also where u is tiny. */
INLINE vf vgumbel(vf u) {
  const vf y = 1.0f - u;
  const vf safe = vselect((vi)(y == 1.0f), vset(0.5f), y);
  const vf e = vselect((vi)(y == 1.0f), u, -vlog(safe) * (u / (1.0f - safe)));
  return -vlog(e);
}

#endif

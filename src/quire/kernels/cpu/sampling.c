/* Philox4x32-10 and the Gumbel-max draw; quire/kernels/philox.py explains and is the reference. */
#include "kernels.h"

#define WORDS 64           /* token ids whose numbers are made together: 16 Philox counters */
#define LARGEST_NOISE 24.0f /* above any Gumbel number: -log(-log1p(-2^-33)) = 22.88 */

/* words[0..64) for the token ids from first_block * 4 on. */
INLINE void philox_words(uint64_t seed, uint64_t position, uint32_t first_block, uint32_t *words) {
  uint32_t c[4][16];
  for (int i = 0; i < 16; i++) {
    c[0][i] = first_block + (uint32_t)i;
    c[1][i] = (uint32_t)position;
    c[2][i] = (uint32_t)(position >> 32);
    c[3][i] = 0;
  }
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < 16; i++) {
      const uint64_t p0 = (uint64_t)c[0][i] * 0xD2511F53u, p1 = (uint64_t)c[2][i] * 0xCD9E8D57u;
      c[0][i] = (uint32_t)(p1 >> 32) ^ c[1][i] ^ k0;
      c[1][i] = (uint32_t)p1;
      c[2][i] = (uint32_t)(p0 >> 32) ^ c[3][i] ^ k1;
      c[3][i] = (uint32_t)p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 16; i++)
    for (int w = 0; w < 4; w++) words[4 * i + w] = c[w][i];
}

/* (word + 1/2) / 2^32 rounded to float, kept below 1. */
INLINE vf vuniform(const uint32_t *words) {
  vu w;
  memcpy(&w, words, sizeof w);
  const vf u = (__builtin_convertvector(w, vf) + 0.5f) * 0x1p-32f;
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

int quire_philox_uniform(uint64_t seed, uint64_t position, float *out, int64_t n) {
  for (int64_t first = 0; first < n; first += WORDS) {
    uint32_t words[WORDS];
    float u[WORDS];
    philox_words(seed, position, (uint32_t)(first / 4), words);
    for (int i = 0; i < WORDS; i += VW) vstore(u + i, vuniform(words + i), F32);
    const int64_t count = n - first < WORDS ? n - first : WORDS;
    memcpy(out + first, u, (size_t)count * sizeof(float));
  }
  return 0;
}

/* Could any of these n scores still beat `best`? fl(s + g) <= fl(s + LARGEST_NOISE), as rounding is
 * monotone: skipping is exact. Excluded tokens are -inf and never pass. */
INLINE int may_win(const float *scores, int64_t n, float best) {
  int any = 0;
  for (int64_t i = 0; i < n; i += VW) {
    const vf s = n - i >= VW ? vload(scores + i, F32) : vload_n(scores + i, n - i, F32);
    const vi inside = vlane_index() < (int32_t)(n - i < VW ? n - i : VW);
    any |= vany(inside & (vi)(s + LARGEST_NOISE >= best) & (vi)(s > -INFINITY));
  }
  return any;
}

static int64_t draw(const float *scores, int64_t vocab, uint64_t seed, uint64_t position) {
  float best = -INFINITY;
  int64_t token = 0;
  for (int64_t first = 0; first < vocab; first += WORDS) {
    const int64_t n = vocab - first < WORDS ? vocab - first : WORDS;
    if (!may_win(scores + first, n, best)) continue;
    uint32_t words[WORDS];
    float noise[WORDS];
    philox_words(seed, position, (uint32_t)(first / 4), words);
    for (int i = 0; i < WORDS; i += VW) vstore(noise + i, vgumbel(vuniform(words + i)), F32);
    for (int64_t i = 0; i < n; i++) {
      const float x = scores[first + i] + noise[i];
      if (x > best) {
        best = x;
        token = first + i;
      }
    }
  }
  return token;
}

int quire_sample_gumbel(const float *scores, int64_t stride, const uint64_t *seeds,
                        const uint64_t *positions, int64_t *tokens, int64_t rows, int64_t vocab,
                        int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (rows > 1)
  for (int64_t r = 0; r < rows; r++)
    tokens[r] = draw(scores + r * stride, vocab, seeds[r], positions[r]);
  return 0;
}

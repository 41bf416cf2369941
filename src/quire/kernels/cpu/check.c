/* Small computations by which a start finds out that compiled kernels are wrong on this machine: a compiler's fault,
 * or a processor's (or its emulator's). They take about a millisecond. */
#include "tiles.h"

enum { CHECK_ROWS = 37, CHECK_K = 80, CHECK_N = 70, CHECK_HEADS = 3, CHECK_DIM = 96, CHECK_KEYS = 45 };

/* Values in [-1, 1), rounded to dt, the same everywhere; also as floats, if `floats` is not NULL. */
static void fill_values(void *to, float *floats, int64_t count, uint32_t seed, int dt) {
  for (int64_t i = 0; i < count; i++) {
    seed = seed * 1664525u + 1013904223u;
    const vf x = vround(vset((float)(int32_t)seed * 0x1p-31f), dt);
    vstore_n(at_mut(to, i, dt), x, 1, dt);
    if (floats) floats[i] = x[0];
  }
}

static int check_product(int dt, int tiles, float *out) {
  enum { WEIGHTS = CHECK_N * CHECK_K, INPUT = CHECK_ROWS * CHECK_K, PANELS = (CHECK_N + 63) / 64 * 64 * CHECK_K };
  float weight[WEIGHTS], x[INPUT], panels[PANELS], weights[WEIGHTS], inputs[INPUT];
  memset(panels, 0, sizeof panels);
  fill_values(weight, weights, WEIGHTS, 1, dt), fill_values(x, inputs, INPUT, 2, dt);
  for (int n = 1; n < CHECK_N; n += 2) /* sums that are nearly zero: what is left shows the order */
    for (int k = CHECK_K / 2; k < CHECK_K; k++) {
      const int64_t to = n * CHECK_K + k;
      weights[to] = -weights[to - CHECK_K / 2];
      vstore_n(at_mut(weight, to, dt), vset(weights[to]), 1, dt);
    }
  for (int64_t to = 0; to < INPUT; to++)
    if (to % CHECK_K >= CHECK_K / 2) {
      inputs[to] = inputs[to - CHECK_K / 2];
      vstore_n(at_mut(x, to, dt), vset(inputs[to]), 1, dt);
    }
  quire_pack_linear(weight, 0, CHECK_N, CHECK_K, (int64_t)elem_size(dt), dt == BF16 ? 2 : 1, panels, 1);
  const linear_weight w = {.panels = panels, .n = CHECK_N, .k = CHECK_K, .dtype = dt, .tiles = tiles};
  if (quire_linear(&w, x, CHECK_K, out, CHECK_N, CHECK_ROWS, LINEAR_FLOAT, 1)) return 1;
  for (int64_t i = 0; i < CHECK_ROWS * CHECK_N; i++) {
    const float *row = inputs + i / CHECK_N * CHECK_K, *column = weights + i % CHECK_N * CHECK_K;
    double sum = 0;
    for (int k = 0; k < CHECK_K; k++) sum += (double)row[k] * column[k];
    const double ulp = dt == F32 ? 0x1p-23 : dt == BF16 ? 0x1p-8 : 0x1p-11;
    if (!(fabs(out[i] - sum) <= ulp * fabs(sum) + CHECK_K * 0x1p-22)) return 1;
  }
  return 0;
}

/* Products with codes of these bits, minus 5: of 4 in groups of 32, of 8 in one group. */
static int check_codes(int bits, int tiles) {
  enum { GROUPS = (CHECK_K + 31) / 32, PANELS = (CHECK_N + 63) / 64 };
  float x[CHECK_ROWS * CHECK_K], scales[PANELS * GROUPS * 64], out[CHECK_ROWS * CHECK_N];
  uint8_t codes[CHECK_N * CHECK_K], panels[PANELS * 64 * CHECK_K];
  fill_values(x, NULL, CHECK_ROWS * CHECK_K, 6, F32);
  for (int i = 0; i < CHECK_N * CHECK_K; i++) codes[i] = (uint8_t)(i * 2654435761u >> 24 & ((1u << bits) - 1));
  for (int i = 0; i < PANELS * GROUPS * 64; i++) scales[i] = (float)(1 + i / 64 % GROUPS);
  const code_info info = {.scales = scales, .group = bits == 4 ? 32 : CHECK_K, .bits = bits, .zero = 5,
                          .activation_bits = 16};
  const linear_weight w = {.panels = panels, .n = CHECK_N, .k = CHECK_K, .dtype = F32, .tiles = tiles, .codes = &info};
  quire_pack_codes(&w, codes, CHECK_K, 1, 0, 0, CHECK_N, CHECK_K);
  if (quire_linear(&w, x, CHECK_K, out, CHECK_N, CHECK_ROWS, LINEAR_STORE, 1)) return 1;
  for (int i = 0; i < CHECK_ROWS * CHECK_N; i++) {
    double sum = 0, magnitude = 0;
    for (int k = 0; k < CHECK_K; k++) {
      const int panel = i % CHECK_N / 64, group = bits == 4 ? panel * GROUPS + k / 32 : panel;
      const double weight = scales[group * 64] * (codes[i % CHECK_N * CHECK_K + k] - 5.0);
      sum += weight * x[i / CHECK_N * CHECK_K + k], magnitude += fabs(weight);
    }
    if (!(fabs(out[i] - sum) <= magnitude * 0x1p-15)) return 1;
  }
  return 0;
}

static int check_attention(int tiles, uint16_t *out) {
  enum { BLOCKS = (CHECK_KEYS + 15) / 16, CACHE = BLOCKS * 16 * CHECK_DIM, QUERIES = CHECK_KEYS * CHECK_HEADS * CHECK_DIM };
  uint16_t k[CACHE], v[CACHE], q[QUERIES];
  fill_values(k, NULL, CACHE, 3, BF16), fill_values(v, NULL, CACHE, 4, BF16), fill_values(q, NULL, QUERIES, 5, BF16);
  const int32_t table[BLOCKS] = {1, 2, 0}, starts[2] = {0, CHECK_KEYS}, length = CHECK_KEYS;
  const attention_args a = {.q = q, .k_cache = k, .v_cache = v, .block_table = table, .query_start_loc = starts,
                            .seq_lens = &length, .out = out, .q_stride = CHECK_HEADS * CHECK_DIM,
                            .table_stride = BLOCKS, .requests = 1, .tokens = CHECK_KEYS, .q_heads = CHECK_HEADS,
                            .kv_heads = 1, .head_dim = CHECK_DIM, .block_size = 16, .num_blocks = BLOCKS,
                            .scale = 0.1f, .dtype = BF16, .threads = 1, .tiles = tiles};
  return quire_paged_attention(&a);
}

/* Nonzero if a product by vectors is not the sum that it should be, in one of the dtypes. */
int quire_check_vectors(void) {
  float out[CHECK_ROWS * CHECK_N];
  return check_product(F32, TILES_NONE, out) || check_product(BF16, TILES_NONE, out) ||
         check_product(F16, TILES_NONE, out) || check_codes(4, TILES_NONE) || check_codes(8, TILES_NONE);
}

/* 0: a product and an attention by this kind of tiles have the bits of those in plain C. 1: they are close to them.
 * 2: they are not. */
int quire_check_tiles(int tiles) {
  enum { SUMS = CHECK_ROWS * CHECK_N, OUT = CHECK_KEYS * CHECK_HEADS * CHECK_DIM };
  float sums[2][SUMS];
  uint16_t out[2][OUT];
  if (check_product(BF16, tiles, sums[0]) || check_product(BF16, TILES_PLAIN, sums[1])) return 2;
  if (check_codes(4, tiles) || check_codes(8, tiles)) return 2;
  if (check_attention(tiles, out[0]) || check_attention(TILES_PLAIN, out[1])) return 2;
  for (int64_t i = 0; i < OUT; i++) /* means of values in [-1, 1) */
    if (!(fabsf(vload_n(out[0] + i, 1, BF16)[0] - vload_n(out[1] + i, 1, BF16)[0]) <= 0x1p-6f)) return 2;
  return memcmp(sums[0], sums[1], sizeof sums[0]) || memcmp(out[0], out[1], sizeof out[0]);
}

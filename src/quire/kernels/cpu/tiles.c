/* Whether this process may use AMX, and whether its results are those of the plain member. */
#include <stdio.h>

#include "tiles.h"

#if HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

__thread const tile_shapes *quire_loaded_shapes;

void quire_release_tiles(void) {
  if (!quire_loaded_shapes) return;
  __asm__ volatile("tilerelease" ::);
  quire_loaded_shapes = NULL;
}

/* 0; 1: the processor has no AMX with bfloat16; 2: the system does not let this process use it. */
int quire_ask_for_amx(void) {
  enum { BF16_TILES = 1 << 22, TILES = 1 << 24, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (BF16_TILES | TILES)) return 1;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 2 : 0;
}
#else
void quire_release_tiles(void) {}
int quire_ask_for_amx(void) { return 1; }
#endif

/* ---- a small product and a small attention, by both members ---- */

enum { CHECK_ROWS = 37, CHECK_K = 80, CHECK_N = 70, CHECK_HEADS = 3, CHECK_DIM = 96, CHECK_KEYS = 45 };

/* bfloat16 values in [-1, 1), the same everywhere. */
static void fill_values(uint16_t *to, int64_t count, uint32_t seed) {
  for (int64_t i = 0; i < count; i++) {
    seed = seed * 1664525u + 1013904223u;
    float x = (float)(int32_t)seed * 0x1p-31f;
    memcpy(to + i, (char *)&x + 2, 2); /* its upper half: rounded toward zero */
  }
}

static int check_product(int tiles, float *out) {
  enum { PANELS = (CHECK_N + 63) / 64 * 64 * CHECK_K, INPUT = CHECK_ROWS * CHECK_K };
  uint16_t panels[PANELS], x[INPUT];
  fill_values(panels, PANELS, 1), fill_values(x, INPUT, 2);
  const linear_weight w = {panels, NULL, CHECK_N, CHECK_K, BF16, tiles};
  return quire_linear(&w, x, CHECK_K, out, CHECK_N, CHECK_ROWS, LINEAR_FLOAT, 1);
}

static int check_attention(int tiles, uint16_t *out) {
  enum { BLOCKS = (CHECK_KEYS + 15) / 16, CACHE = BLOCKS * 16 * CHECK_DIM, QUERIES = CHECK_KEYS * CHECK_HEADS * CHECK_DIM };
  uint16_t k[CACHE], v[CACHE], q[QUERIES];
  fill_values(k, CACHE, 3), fill_values(v, CACHE, 4), fill_values(q, QUERIES, 5);
  const int32_t table[BLOCKS] = {1, 2, 0}, starts[2] = {0, CHECK_KEYS}, length = CHECK_KEYS;
  const attention_args a = {.q = q, .k_cache = k, .v_cache = v, .block_table = table, .query_start_loc = starts,
                            .seq_lens = &length, .out = out, .q_stride = CHECK_HEADS * CHECK_DIM,
                            .table_stride = BLOCKS, .requests = 1, .tokens = CHECK_KEYS, .q_heads = CHECK_HEADS,
                            .kv_heads = 1, .head_dim = CHECK_DIM, .block_size = 16, .num_blocks = BLOCKS,
                            .scale = 0.1f, .dtype = BF16, .threads = 1, .tiles = tiles};
  return quire_paged_attention(&a);
}

/* 0: the results of this kind of tiles have the bits of the plain member's. 1: they are close to them. 2: they
 * are not. Both are computed in full; it takes less than a millisecond. */
int quire_check_tiles(int tiles) {
  enum { SUMS = CHECK_ROWS * CHECK_N, OUT = CHECK_KEYS * CHECK_HEADS * CHECK_DIM };
  float sums[2][SUMS];
  uint16_t out[2][OUT];
  if (check_product(tiles, sums[0]) || check_product(TILES_PLAIN, sums[1])) return 2;
  if (check_attention(tiles, out[0]) || check_attention(TILES_PLAIN, out[1])) return 2;
  for (int64_t i = 0; i < SUMS; i++) /* rounded to bfloat16, of sums of CHECK_K products below 1 */
    if (!(fabsf(sums[0][i] - sums[1][i]) <= 0x1p-7f * fabsf(sums[1][i]) + CHECK_K * 0x1p-20f)) return 2;
  for (int64_t i = 0; i < OUT; i++) { /* means of values in [-1, 1) */
    const float difference = vload_n(&out[0][i], 1, BF16)[0] - vload_n(&out[1][i], 1, BF16)[0];
    if (!(fabsf(difference) <= 0x1p-6f)) return 2;
  }
  return memcmp(sums[0], sums[1], sizeof sums[0]) || memcmp(out[0], out[1], sizeof out[0]);
}

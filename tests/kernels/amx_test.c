/* The AMX kernels against their plain members, bit for bit: on the processor's own AMX if it has one, else emulated.
 * Prints "ok" at the end; the status is the number of failures. */
#include "amx_emulator.h"
#include "quire_kernels.c"

static int failures;

static void expect(int holds, const char *what, int64_t a, int64_t b, int64_t c) {
  if (holds) return;
  if (failures++ < 20) printf("FAILED %s [%lld, %lld, %lld]\n", what, (long long)a, (long long)b, (long long)c);
}

static uint64_t random_bits = 1;

static uint32_t draw(void) {
  random_bits = random_bits * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_bits >> 32);
}

/* Values of different sizes, subnormals among them; one in `odd` is infinite or NaN, unless it is 0. */
static uint16_t *make(int64_t n, uint32_t odd) {
  uint16_t *x = malloc((size_t)n * 2 + 64);
  for (int64_t i = 0; i < n; i++) {
    const uint32_t sign = (draw() & 1) << 15, exponent = draw() % 50 ? 117 + draw() % 12 : draw() % 3;
    x[i] = (uint16_t)(sign | exponent << 7 | (draw() & 127));
    if (odd && draw() % odd == 0) x[i] = draw() & 1 ? 0x7f80 : 0xffc0;
  }
  return x;
}

static int same(const void *a, const void *b, size_t bytes) { return !memcmp(a, b, bytes); }

static void test_product(int64_t m, int64_t k, int64_t n, int64_t gap, uint32_t odd, int threads) {
  const int64_t padded = (k + 1) / 2 * 2, panels = (n + 63) / 64;
  uint16_t *x = make(m * (k + gap), odd), *weight = make(n * k, 0), *bias = make(n, 0);
  uint16_t *packed = calloc((size_t)(panels * 64 * padded), 2);
  quire_pack_linear(weight, 0, n, k, 2, 2, packed, 1);
  for (int epilogue = 0; epilogue < 3; epilogue++) {
    char *out[2];
    for (int i = 0; i < 2; i++) {
      const linear_weight w = {packed, epilogue ? bias : NULL, n, k, BF16, i ? TILES_PLAIN : TILES_AMX};
      out[i] = calloc((size_t)(m * (n + 3)), 4);
      expect(!quire_linear(&w, x, k + gap, out[i], n + 3, m, epilogue, threads), "product", m, k, n);
    }
    expect(same(out[0], out[1], (size_t)(m * (n + 3)) * 4), "product", m, k, n);
    if (epilogue == LINEAR_STORE)
      for (int64_t r = 0; r < m; r++) { /* a row alone */
        const linear_weight w = {packed, NULL, n, k, BF16, TILES_AMX};
        uint16_t *alone = calloc((size_t)n + 1, 2);
        quire_linear(&w, x + r * (k + gap), k + gap, alone, n, 1, LINEAR_STORE, 1);
        expect(same(alone, out[0] + r * (n + 3) * 2, (size_t)n * 2), "row alone", m, k, r);
        free(alone);
      }
    free(out[0]), free(out[1]);
  }
  free(x), free(weight), free(bias), free(packed);
}

static void test_float8(int64_t m, int64_t k, int64_t n, int64_t group, int threads) {
  const int64_t panels = (n + 63) / 64, groups = (k + group - 1) / group, padded = (k + 7) / 8 * 8;
  uint16_t *x = make(m * k, 0), *scales = make(panels * 64 * groups, 0);
  uint8_t *codes = malloc((size_t)(n * k)), *packed = calloc((size_t)(panels * 64 * padded), 1);
  for (int64_t i = 0; i < n * k; i++) codes[i] = (uint8_t)draw() & 247;
  const code_info info = {.scales = scales, .group = group, .bits = 8, .scale_type = SCALE_BF16, .float8 = 1};
  linear_weight w = {.panels = packed, .n = n, .k = k, .dtype = BF16, .codes = &info};
  quire_pack_codes(&w, codes, k, 1, 0, 0, n, k);
  uint16_t *out[2], *alone = calloc((size_t)n, 2);
  for (int i = 0; i < 2; i++) {
    w.tiles = i ? TILES_PLAIN : TILES_AMX;
    out[i] = calloc((size_t)(m * n), 2);
    expect(!quire_linear(&w, x, k, out[i], n, m, LINEAR_STORE, threads), "float8", m, k, n);
  }
  expect(same(out[0], out[1], (size_t)(m * n) * 2), "float8", m, k, n);
  w.tiles = TILES_AMX;
  quire_linear(&w, x + (m - 1) * k, k, alone, n, 1, LINEAR_STORE, 1);
  expect(same(alone, out[0] + (m - 1) * n, (size_t)n * 2), "float8, a row alone", m, k, n);
  free(x), free(scales), free(codes), free(packed), free(out[0]), free(out[1]), free(alone);
}

/* Integer codes: tiles have the bits of vectors, so a row has them alone and among others. */
static void test_codes(int64_t m, int64_t k, int64_t n, int64_t group, int bits, int activation_bits, int offset_type,
                       int threads) {
  const int64_t panels = (n + 63) / 64, groups = (k + group - 1) / group;
  uint16_t *x = make(m * k, 0);
  uint8_t *codes = malloc((size_t)(n * k)), *packed = calloc((size_t)(panels * ((k + 7) / 8) * 64 * bits), 1);
  uint8_t *zeros = malloc((size_t)(panels * groups * 64));
  float *scales = malloc((size_t)(panels * groups * 64) * 4), *out[3];
  for (int64_t i = 0; i < n * k; i++) codes[i] = (uint8_t)(draw() & ((1u << bits) - 1));
  for (int64_t i = 0; i < panels * groups * 64; i++) zeros[i] = (uint8_t)(draw() & 15), scales[i] = (float)(draw() % 100);
  const code_info info = {.scales = scales, .offsets = offset_type == OFFSET_MINIMUM ? (void *)scales : zeros,
                          .group = group, .bits = bits, .offset_type = offset_type, .zero = 7,
                          .activation_bits = activation_bits};
  for (int i = 0; i < 3; i++) {
    static const int kinds[3] = {TILES_AMX, TILES_PLAIN, TILES_NONE};
    const linear_weight w = {.panels = packed, .n = n, .k = k, .dtype = BF16, .tiles = kinds[i], .codes = &info};
    if (i == 0) quire_pack_codes(&w, codes, k, 1, 0, 0, n, k);
    out[i] = calloc((size_t)(m * n), 4);
    expect(!quire_linear(&w, x, k, out[i], n, m, LINEAR_FLOAT, threads), "codes", m, k, n);
  }
  expect(same(out[0], out[2], (size_t)(m * n) * 4), "codes by AMX", m, k, group);
  expect(same(out[1], out[2], (size_t)(m * n) * 4), "codes by plain tiles", m, k, group);
  free(x), free(codes), free(packed), free(zeros), free(scales), free(out[0]), free(out[1]), free(out[2]);
}

static void test_attention(int64_t tokens, int64_t keys, int64_t group, int64_t d, int64_t block_size, int64_t window,
                           uint32_t odd, int threads) {
  enum { KV_HEADS = 2 };
  const int64_t blocks = (keys + block_size - 1) / block_size, q_heads = KV_HEADS * group;
  const int64_t cache = (blocks + 1) * KV_HEADS * d * block_size, row = q_heads * d;
  uint16_t *k = make(cache, 0), *v = make(cache, odd), *q = make(tokens * row, 0);
  int32_t *table = malloc(4 * (size_t)blocks);
  for (int64_t b = 0; b < blocks; b++) table[b] = (int32_t)(blocks - b);
  for (int64_t slot = keys; slot < blocks * block_size; slot++) /* not written yet: NaN */
    for (int64_t h = 0; h < KV_HEADS; h++)
      for (int64_t i = 0; i < d; i++) {
        const int64_t base = (table[slot / block_size] * KV_HEADS + h) * d * block_size, at = slot % block_size;
        v[base + (at / 2 * d + i) * 2 + at % 2] = 0xffff;
        k[base + (i / 2 * block_size + at) * 2 + i % 2] = 0xffff;
      }
  const int32_t starts[2] = {0, (int32_t)tokens}, length = (int32_t)keys;
  uint16_t *out[2];
  attention_args a = {.q = q, .k_cache = k, .v_cache = v, .block_table = table, .query_start_loc = starts,
                      .seq_lens = &length, .q_stride = row, .table_stride = blocks, .requests = 1, .tokens = tokens,
                      .q_heads = q_heads, .kv_heads = KV_HEADS, .head_dim = d, .block_size = block_size,
                      .num_blocks = blocks + 1, .window = window, .scale = 0.1f, .dtype = BF16, .threads = threads};
  for (int i = 0; i < 2; i++) {
    a.tiles = i ? TILES_PLAIN : TILES_AMX;
    a.out = out[i] = calloc((size_t)(tokens * row), 2);
    expect(!quire_paged_attention(&a), "attention", tokens, keys, d);
  }
  expect(same(out[0], out[1], (size_t)(tokens * row) * 2), "attention", tokens, keys, d);
  uint16_t *alone = calloc((size_t)row, 2);
  for (int64_t t = 0; t < tokens; t += 5) { /* as it is decoded, before later keys exist */
    const int32_t one[2] = {0, 1}, seen = (int32_t)(keys - tokens + t + 1);
    a.q = q + t * row, a.query_start_loc = one, a.seq_lens = &seen, a.tokens = 1, a.out = alone, a.tiles = TILES_AMX;
    expect(!quire_paged_attention(&a), "attention, one token", tokens, keys, t);
    expect(same(alone, out[0] + t * row, (size_t)row * 2), "attention, one token", tokens, keys, t);
  }
  free(k), free(v), free(q), free(table), free(out[0]), free(out[1]), free(alone);
}

/* Whether this thread's tiles hold anything: bit 18 of XINUSE. */
static int in_use(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low >> 18 & 1;
}

int main(int count, char **arguments) {
  const int is_quick = count > 1 && !strcmp(arguments[1], "quick"); /* small shapes: for builds without optimizing */
  const int has_amx = quire_ask_for_amx() == 0;
  if (!has_amx) amx_emulate();
  expect(quire_check_tiles(TILES_AMX) == 0, "the check at the start", 0, 0, 0);
  test_product(17, 33, 70, 5, 0, 1);
  test_float8(35, 67, 70, 32, 1);
  test_attention(5, 37, 3, 32, 16, 0, 40, 1); /* values that are not finite */
  if (HAVE_BYTES) test_codes(21, 80, 70, 32, 4, 16, OFFSET_NONE, 1);
  if (is_quick) goto end;
  if (HAVE_BYTES) {
    test_codes(16, 64, 64, 64, 8, 16, OFFSET_NONE, 1), test_codes(40, 600, 130, 600, 8, 16, OFFSET_NONE, 2);
    test_codes(37, 250, 64, 16, 8, 16, OFFSET_ZERO, 1), test_codes(5, 200, 65, 24, 4, 16, OFFSET_MINIMUM, 1);
    test_codes(35, 330, 70, 128, 4, 8, OFFSET_ZERO, 2), test_codes(200, 136, 20, 136, 8, 8, OFFSET_NONE, 1);
  }
  static const int64_t rows[] = {1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 70};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) test_product(rows[i], 64, 70, 0, 0, 1);
  test_product(5, 1, 1, 0, 0, 1), test_product(20, 33, 64, 5, 0, 1), test_product(34, 95, 130, 32, 0, 2);
  test_product(19, 128, 64, 0, 700, 1);   /* what is not finite stays in its row */
  test_product(130, 6000, 3, 0, 0, 2);    /* several chunks of rows */
  test_float8(17, 300, 64, 128, 2), test_float8(600, 40, 3, 40, 1);
  for (int64_t group = 1; group < 9; group += group < 3 ? 1 : 5) {
    test_attention(1, 20, group, 64, 16, 0, 0, 1), test_attention(21, 70, group, 32, 16, 0, 0, 2);
    test_attention(40, 40, group, 96, 32, 0, 0, 1), test_attention(30, 90, group, 64, 48, 17, 0, 1);
  }
  test_attention(3, 530, 3, 64, 16, 0, 0, 2);     /* a second segment of keys */
  test_attention(37, 37, 3, 64, 16, 0, 90, 1), test_attention(40, 75, 2, 32, 16, 9, 30, 1);
end:
  if (!has_amx && amx_count < 1000) expect(0, "AMX was not used", amx_count, 0, 0);
  expect(!(has_amx ? in_use() : amx.is_configured), "tiles are released", 0, 0, 0);
  if (failures) return printf("%d failures\n", failures), failures > 90 ? 90 : failures;
  printf("%s\nok\n", has_amx ? "this processor's AMX" : "emulated AMX");
  return 0;
}

/* The C kernels against plain scalar loops in double, on data that every machine makes alike: what scripts/test-aarch64
 * runs under an emulator, where there is no PyTorch. Also that a row alone has the bits it has in a batch, and that
 * threads change none. Prints a line for each operation, "ok" at the end; the status is the number of failures. */
#define _GNU_SOURCE
#include <stdio.h>

#include "quire_kernels.c"

static int failures;
static const char *const names[] = {"float32", "bfloat16", "float16"};

static void expect(int holds, const char *what, int dt, int64_t a, int64_t b) {
  if (holds) return;
  failures++;
  printf("FAILED %s %s [%lld, %lld]\n", what, names[dt], (long long)a, (long long)b);
}

/* ---- data ---- */

static uint64_t random_bits;

static float uniform(void) { /* in [-1, 1) */
  random_bits = random_bits * 6364136223846793005u + 1442695040888963407u;
  return (float)(int32_t)(random_bits >> 32) * 0x1p-31f;
}

static float get(const void *x, int64_t i, int dt) {
  if (dt == F32) return ((const float *)x)[i];
  uint16_t h;
  memcpy(&h, (const char *)x + 2 * i, 2);
  if (dt == BF16) {
    const uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float f = exponent ? ldexpf((float)(mantissa + 1024), exponent - 25) : ldexpf((float)mantissa, -24);
  return h & 0x8000 ? -f : f;
}

static void put_value(void *x, int64_t i, float f, int dt) { /* f is small: no infinities here */
  if (dt == F32) {
    ((float *)x)[i] = f;
    return;
  }
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t h = dt == BF16 ? (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16) : half_from_float(f);
  memcpy((char *)x + 2 * i, &h, 2);
}

static void *make(int64_t n, int dt, float scale) { /* off any alignment but the element's */
  char *x = malloc((size_t)n * 4 + 256);
  x += dt == F32 ? 4 : 2;
  for (int64_t i = 0; i < n; i++) put_value(x, i, scale * uniform(), dt);
  return x;
}

static double ulp(int dt) { return dt == F32 ? 0x1p-23 : dt == BF16 ? 0x1p-8 : 0x1p-11; }

static int close_to(double actual, double expected, double size, int dt) {
  return fabs(actual - expected) <= 1.5 * ulp(dt) * fabs(expected) + 8 * 0x1p-23 * size;
}

static double rounded(double x, int dt) {
  float buffer;
  put_value(&buffer, 0, (float)x, dt);
  return get(&buffer, 0, dt);
}

/* ---- operations ---- */

static void test_conversions(void) {
  for (uint32_t h = 0; h < 0x10000; h += VW) { /* every half precision value, there and back */
    uint16_t in[VW], out[VW];
    float wide[VW];
    for (int i = 0; i < VW; i++) in[i] = (uint16_t)(h + (uint32_t)i);
    if ((h & 0x7c00) != 0x7c00) { /* finite */
      vstore(wide, vload(in, F16), F32);
      for (int i = 0; i < VW; i++) expect(wide[i] == get(in, i, F16), "widen", F16, h, i);
      vstore(out, vload(wide, F32), F16);
      expect(!memcmp(in, out, sizeof in), "narrow", F16, h, 0);
    }
    if ((h & 0x7f80) != 0x7f80) {
      vstore(wide, vload(in, BF16), F32);
      for (int i = 0; i < VW; i++) expect(wide[i] == get(in, i, BF16), "widen", BF16, h, i);
      vstore(out, vload(wide, F32), BF16);
      expect(!memcmp(in, out, sizeof in), "narrow", BF16, h, 0);
    }
  }
  for (int i = 0; i < 20000; i++) { /* ties and what is beside them */
    float x[VW];
    for (int j = 0; j < VW; j++) {
      const float f = ldexpf(uniform(), i % 60 - 40);
      uint32_t u;
      memcpy(&u, &f, 4);
      u = (u & ~0x1fffu) | (i % 3 == 0 ? 0x1000u : i % 3 == 1 ? 0x0fffu : 0x1001u);
      if (i & 1) u = (u & ~0xffffu) | 0x8000u;
      memcpy(x + j, &u, 4);
      if (fabsf(x[j]) > 60000) x[j] = 1;
    }
    for (int dt = BF16; dt <= F16; dt++) {
      uint16_t out[VW];
      vstore(out, vload(x, F32), dt);
      for (int j = 0; j < VW; j++)
        expect(get(out, j, dt) == (float)rounded(x[j], dt), "round to nearest even", dt, i, j);
    }
  }
}

static void test_linear(int dt, int64_t m, int64_t k, int64_t n) {
  const int64_t step = pair_of(dt), size = (int64_t)elem_size(dt), padded = (k + step - 1) / step * step;
  void *x = make(m * k, dt, 1), *w = make(n * k, dt, 0.1f), *bias = make(n, dt, 1);
  void *panels = aligned_alloc(64, (size_t)((n + PANEL - 1) / PANEL * PANEL * padded * 4));
  memset(panels, 0, (size_t)((n + PANEL - 1) / PANEL * PANEL * padded * 4));
  quire_pack_linear(w, 0, n, k, size, step, panels, 2);
  const linear_weight weight = {panels, bias, n, k, dt};
  char *out = malloc((size_t)(m * n * 4)), *alone = malloc((size_t)(n * 4));
  expect(quire_linear(&weight, x, k, out, n, m, LINEAR_STORE, 2) == 0, "linear", dt, m, n);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) {
      double sum = get(bias, j, dt), magnitude = fabs(sum);
      for (int64_t l = 0; l < k; l++) {
        const double product = (double)get(x, i * k + l, dt) * get(w, j * k + l, dt);
        sum += product;
        magnitude += fabs(product);
      }
      expect(close_to(get(out, i * n + j, dt), sum, magnitude, dt), "linear", dt, i, j);
    }
    quire_linear(&weight, at(x, i * k, dt), k, alone, n, 1, LINEAR_STORE, 1);
    expect(!memcmp(alone, out + i * n * size, (size_t)(n * size)), "linear, row alone", dt, i, n);
  }
  char *row = malloc((size_t)(k * 4));
  for (int64_t j = 0; j < n; j += 7) {
    expect(quire_gather_rows(&weight, &j, 1, row, 1) == 0, "gather", dt, j, n);
    expect(!memcmp(row, at(w, j * k, dt), (size_t)(k * size)), "gather", dt, j, n);
  }
}

/* Every third row with no adapter, the others with one of two. */
static void test_adapters(int dt, int64_t m, int64_t k, int64_t n, int64_t rank, int scaled) {
  const int64_t step = pair_of(dt), padded = (k + step - 1) / step * step, panels = (n + PANEL - 1) / PANEL;
  void *x = make(m * k, dt, 1), *w = make(n * k, dt, 0.1f), *bias = make(n, dt, 1);
  void *packed = aligned_alloc(64, (size_t)(panels * PANEL * padded * 4));
  memset(packed, 0, (size_t)(panels * PANEL * padded * 4));
  quire_pack_linear(w, 0, n, k, (int64_t)elem_size(dt), step, packed, 2);
  const linear_weight weight = {packed, bias, n, k, dt};
  lora_site sites[2];
  void *a[2], *b[2];
  float *gains[2];
  for (int s = 0; s < 2; s++) {
    const int64_t r = rank + s;
    lora_panel *of = malloc((size_t)panels * sizeof *of);
    float *scales = malloc((size_t)r * 4);
    a[s] = make(r * k, dt, 0.3f), b[s] = make(panels * r * PANEL, dt, 0.3f), gains[s] = make(panels * PANEL, F32, 2);
    for (int64_t p = 0; p < panels; p++) of[p] = (lora_panel){0, (int32_t)r, p * r};
    for (int64_t i = 0; i < r; i++) scales[i] = 0.5f + 0.01f * (float)i;
    sites[s] = (lora_site){.a = a[s], .b = b[s], .panels = of, .scales = scales, .gains = scaled ? gains[s] : NULL,
                           .rank = r, .k = k, .dtype = dt};
  }
  const lora_site *adapters[] = {&sites[0], &sites[1]};
  const lora_table table = {adapters, 2};
  int32_t *chosen = malloc((size_t)m * 4), *ends = malloc((size_t)m * 4);
  for (int64_t i = 0; i < m; i++) chosen[i] = (int32_t)(i % 3) - 1, ends[i] = (int32_t)i + 1;
  lora_rows rows, one;
  expect(!quire_group_rows(&table, chosen, ends, m, malloc((size_t)quire_group_bytes(m, m)), &rows), "group", dt, m, n);
  const size_t row = (size_t)n * elem_size(dt);
  char *out = malloc((size_t)m * row), *alone = malloc(row), *base = malloc(row), memory[64];
  expect(!quire_adapted_linear(&weight, x, k, out, n, m, LINEAR_STORE, 2, &rows, 0), "adapters", dt, m, n);
  for (int64_t i = 0; i < m; i++) {
    const int s = chosen[i];
    quire_linear(&weight, at(x, i * k, dt), k, base, n, 1, LINEAR_STORE, 1);
    if (s < 0) expect(!memcmp(base, out + (size_t)i * row, row), "no adapter", dt, i, n);
    const int32_t end = 1;
    quire_group_rows(&table, chosen + i, &end, 1, memory, &one);
    quire_adapted_linear(&weight, at(x, i * k, dt), k, alone, n, 1, LINEAR_STORE, 1, &one, 0);
    expect(!memcmp(alone, out + (size_t)i * row, row), "adapters, row alone", dt, i, n);
    for (int64_t j = 0; s >= 0 && j < n; j++) {
      double sum = 0, magnitude = 0;
      for (int64_t l = 0; l < k; l++) {
        const double product = (double)get(x, i * k + l, dt) * get(w, j * k + l, dt);
        sum += product, magnitude += fabs(product);
      }
      for (int64_t r = 0; r < sites[s].rank; r++) {
        double t = 0, size = 0;
        for (int64_t l = 0; l < k; l++) {
          const double product = (double)get(x, i * k + l, dt) * get(a[s], r * k + l, dt);
          t += product, size += fabs(product);
        }
        const double factor = sites[s].scales[r] * get(b[s], (j / PANEL * sites[s].rank + r) * PANEL + j % PANEL, dt);
        sum += t * factor, magnitude += size * fabs(factor);
      }
      const double gain = scaled ? gains[s][j] : 1, expected = sum * gain + get(bias, j, dt);
      expect(close_to(get(out, i * n + j, dt), expected, 2 * magnitude + 2, dt), "adapters", dt, i, j);
    }
  }
}

/* Sign, four bits of exponent, three of mantissa. */
static double float8_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double x = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
  return code & 128 ? -x : x;
}

static void test_float8(int dt, int64_t m, int64_t k, int64_t n, int64_t group) {
  const int64_t groups = (k + group - 1) / group, panels = (n + PANEL - 1) / PANEL;
  const size_t bytes = (size_t)(panels * PANEL * ((k + 7) / 8) * 8);
  void *x = make(m * k, dt, 1), *packed = aligned_alloc(64, bytes);
  float *scales = make(panels * groups * PANEL, F32, 0.1f);
  uint8_t *codes = malloc((size_t)(n * k));
  memset(packed, 0, bytes);
  for (int64_t i = 0; i < n * k; i++) codes[i] = (uint8_t)(i * 37 + i / 256) & 247; /* no NaN */
  const code_info info = {.scales = scales, .group = group, .bits = 8, .float8 = 1};
  const linear_weight weight = {.panels = packed, .n = n, .k = k, .dtype = dt, .codes = &info};
  quire_pack_codes(&weight, codes, k, 1, 0, 0, n, k);
  char *out = malloc((size_t)(m * n * 4)), *alone = malloc((size_t)(n * 4)), *row = malloc((size_t)(k * 4));
  expect(quire_linear(&weight, x, k, out, n, m, LINEAR_STORE, 2) == 0, "float8", dt, m, n);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) {
      double sum = 0, magnitude = 0;
      for (int64_t l = 0; l < k; l++) {
        const double scale = scales[(j / PANEL * groups + l / group) * PANEL + j % PANEL];
        const double product = get(x, i * k + l, dt) * float8_value(codes[j * k + l]) * scale;
        sum += product;
        magnitude += fabs(product);
      }
      expect(close_to(get(out, i * n + j, dt), sum, magnitude, dt), "float8", dt, i, j);
    }
    quire_linear(&weight, at(x, i * k, dt), k, alone, n, 1, LINEAR_STORE, 1);
    expect(!memcmp(alone, out + i * n * (int64_t)elem_size(dt), (size_t)n * elem_size(dt)), "float8, row alone", dt, i, n);
  }
  for (int64_t j = 0; j < n; j += 7) {
    expect(quire_gather_rows(&weight, &j, 1, row, 1) == 0, "float8, a row", dt, j, n);
    for (int64_t l = 0; l < k; l++) {
      const float scale = scales[(j / PANEL * groups + l / group) * PANEL + j % PANEL];
      const float value = (float)float8_value(codes[j * k + l]) * scale;
      expect(get(row, l, dt) == rounded(value, dt), "float8, a row", dt, j, l);
    }
  }
}

/* Integer codes in groups, with what a format may have: another zero for each group, a minimum, a table of values, super
 * scales, another order of inputs. */
static void test_codes(int dt, int64_t m, int64_t k, int64_t n, int64_t group, code_info info) {
  enum { SUPER = 3 };
  const int64_t groups = (k + group - 1) / group, panels = (n + PANEL - 1) / PANEL, supers = (groups + SUPER - 1) / SUPER;
  const size_t bytes = (size_t)(panels * PANEL * ((k + 7) / 8) * info.bits);
  void *x = make(m * k, dt, 1), *packed = aligned_alloc(64, bytes);
  float *scales = make(panels * groups * PANEL, F32, 0.1f), *minima = make(panels * groups * PANEL, F32, 0.1f);
  uint16_t *super_scales = make(panels * supers * PANEL, F16, 0.1f), *super_minima = make(panels * supers * PANEL, F16, 0.1f);
  uint8_t *codes = malloc((size_t)(n * k)), *small = malloc((size_t)(panels * groups * PANEL));
  int32_t *order = malloc((size_t)k * 4);
  for (int64_t i = 0; i < n * k; i++) codes[i] = (uint8_t)((i * 37 + i / 256) & ((1 << info.bits) - 1));
  for (int64_t i = 0; i < panels * groups * PANEL; i++) small[i] = (uint8_t)(i * 11 % 60);
  for (int64_t i = 0; i < k; i++) order[i] = (int32_t)((i * 7 + 3) % k); /* a permutation unless 7 divides k */
  const int minimum = info.offset_type == OFFSET_MINIMUM, is_super = info.super_groups > 0;
  info.group = group, info.scales = is_super ? (void *)small : scales;
  info.offsets = minimum && !is_super ? (void *)minima : small;
  if (is_super) info.super_groups = SUPER, info.scale_type = SCALE_INT8, info.super_scales = super_scales;
  if (is_super && minimum) info.super_minima = super_minima;
  if (info.order) info.order = order;
  const linear_weight weight = {.panels = packed, .n = n, .k = k, .dtype = dt, .codes = &info};
  memset(packed, 0, bytes);
  quire_pack_codes(&weight, codes, k, 1, 0, 0, n, k);
  char *out = malloc((size_t)(m * n * 4)), *alone = malloc((size_t)(n * 4)), *row = malloc((size_t)(k * 4));
  float *matrix = malloc((size_t)(n * k) * 4); /* what the codes mean, by input */
  for (int64_t j = 0; j < n; j++)
    for (int64_t l = 0; l < k; l++) {
      const int64_t at = (j / PANEL * groups + l / group) * PANEL + j % PANEL;
      const int64_t above = (j / PANEL * supers + l / group / SUPER) * PANEL + j % PANEL;
      const int code = codes[j * k + l], value = info.has_values ? info.values[code] : code;
      const int zero = info.offset_type == OFFSET_ZERO ? small[at] : info.zero;
      const float scale = is_super ? (float)small[at] * get(super_scales, above, F16) : scales[at];
      float w = scale * (float)(value - zero);
      if (minimum) w += is_super ? -get(super_minima, above, F16) * (float)small[at] : minima[at];
      matrix[j * k + (info.order ? order[l] : l)] = w;
    }
  expect(quire_linear(&weight, x, k, out, n, m, LINEAR_STORE, 2) == 0, "codes", dt, m, n);
  for (int64_t i = 0; i < m; i++) {
    double largest = 0;
    for (int64_t l = 0; l < k; l++) largest = fmax(largest, fabs(get(x, i * k + l, dt)));
    for (int64_t j = 0; j < n; j++) {
      double sum = 0, magnitude = 0;
      for (int64_t l = 0; l < k; l++) sum += (double)get(x, i * k + l, dt) * matrix[j * k + l], magnitude += fabs(matrix[j * k + l]);
      const double error = fabs(get(out, i * n + j, dt) - sum);
      const double unit = largest / (info.activation_bits == 8 ? 127 : 32512);
      expect(error <= 0.51 * unit * magnitude + ulp(dt) * fabs(sum) + 1e-4, "codes", dt, i, j);
    }
    quire_linear(&weight, at(x, i * k, dt), k, alone, n, 1, LINEAR_STORE, 1);
    expect(!memcmp(alone, out + i * n * (int64_t)elem_size(dt), (size_t)n * elem_size(dt)), "codes, row alone", dt, i, n);
  }
  for (int64_t j = 0; j < n; j += 7) {
    expect(quire_gather_rows(&weight, &j, 1, row, 1) == 0, "codes, a row", dt, j, n);
    for (int64_t l = 0; l < k; l++) expect(get(row, l, dt) == rounded(matrix[j * k + l], dt), "codes, a row", dt, j, l);
  }
}

static void test_float8_conversions(void) {
  for (int code = 0; code < 256; code++) {
    vh codes = {0};
    codes[0] = (uint16_t)code;
    const float x = vfloat_from_f8(codes)[0];
    if ((code & 127) == 127) {
      expect(x != x && (vf8_from_float(vset(NAN))[0] & 127) == 127, "float8, NaN", F32, code, 0);
      continue;
    }
    expect(x == (float)float8_value(code), "from float8", F32, code, 0);
    expect(vf8_from_float(vset(x))[0] == code, "to float8", F32, code, 0);
  }
  expect(vf8_from_float(vset(-1e9f))[0] == 0xfe, "to float8, clipped", F32, 0, 0);
}

/* With residual: added first. The norm in place, of the left half of each row; wt: of the weight. */
static void test_norm(int dt, int wt, int64_t rows, int64_t n) {
  void *x = make(rows * 2 * n, dt, 3), *residual = make(rows * n, dt, 3), *weight = make(n, wt, 1);
  const size_t bytes = (size_t)rows * (size_t)n * elem_size(dt);
  char *out = malloc(bytes), *sum = malloc(bytes), *before = malloc(2 * bytes);
  memcpy(sum, residual, bytes), memcpy(before, x, 2 * bytes);
  quire_rms_norm(x, 2 * n, 1, sum, weight, out, n, rows, n, 1e-5f, dt, wt, 3);
  quire_rms_norm(x, 2 * n, 1, NULL, weight, x, 2 * n, rows, n, 1e-5f, dt, wt, 3);
  for (int64_t i = 0; i < rows; i++) {
    double squares[2] = {0, 0};
    for (int64_t j = 0; j < n; j++) {
      const double f = get(before, i * 2 * n + j, dt), s = rounded((float)f + get(residual, i * n + j, dt), dt);
      expect(get(sum, i * n + j, dt) == s, "residual", dt, i, j);
      squares[0] += s * s, squares[1] += f * f;
    }
    for (int64_t j = 0; j < n; j++) {
      const double of[] = {get(sum, i * n + j, dt), get(before, i * 2 * n + j, dt)};
      const double found[] = {get(out, i * n + j, dt), get(x, i * 2 * n + j, dt)};
      for (int k = 0; k < 2; k++) { /* a weight in dt: rounded before it and after it */
        const double expected = of[k] / sqrt(squares[k] / (double)n + 1e-5) * get(weight, j, wt);
        const double ulps = wt == dt ? 3 : 1.1;
        expect(fabs(found[k] - expected) <= ulps * ulp(dt) * fabs(expected) + 1e-6, "norm", dt, i, j);
      }
    }
    expect(!memcmp(at(x, i * 2 * n + n, dt), at(before, i * 2 * n + n, dt), (size_t)n * elem_size(dt)),
           "norm, beside it", dt, i, n);
  }
}

static void test_gated(int dt, int64_t rows, int64_t n) {
  void *x = make(rows * 2 * n, dt, 3);
  char *silu = malloc((size_t)(rows * n * 4)), *gelu = malloc((size_t)(rows * n * 4));
  quire_gated(x, silu, n, rows, n, SILU, dt, 3);
  quire_gated(x, gelu, n, rows, n, GELU_TANH, dt, 3);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < n; j++) {
      const double gate = get(x, i * 2 * n + j, dt), up = get(x, i * 2 * n + n + j, dt);
      const double silu_up = gate / (1 + exp(-gate)) * up, y = sqrt(2 / acos(-1)) * (gate + 0.044715 * gate * gate * gate);
      const double gelu_up = 0.5 * gate * (1 + tanh(y)) * up;
      expect(fabs(get(silu, i * n + j, dt) - silu_up) <= 3 * ulp(dt) * fabs(silu_up) + 1e-6, "silu", dt, i, j);
      expect(fabs(get(gelu, i * n + j, dt) - gelu_up) <= 3 * ulp(dt) * fabs(gelu_up) + 1e-6, "gelu", dt, i, j);
    }
}

static void test_scaled(int dt, int64_t rows, int64_t n) {
  const int64_t count = rows * n, size = (int64_t)elem_size(dt);
  void *x = make(count, dt, 3), *residual = make(count, dt, 3);
  char *sum = malloc((size_t)(count * size)), *scaled = malloc((size_t)(count * size));
  float *table = make(7, F32, 2), *logits = make(count, F32, 9), *done = malloc((size_t)count * 4);
  int64_t *positions = malloc((size_t)rows * 8);
  for (int64_t i = 0; i < rows; i++) positions[i] = i * 3 % 7;
  for (int64_t i = 0; i < count; i++) done[i] = logits[i] = (float)rounded(logits[i], dt);
  memcpy(sum, residual, (size_t)(count * size)), memcpy(scaled, x, (size_t)(count * size));
  quire_add(x, sum, count, 0.22f, dt, 3);
  const int64_t width = n / 2; /* the rest of a row stays */
  expect(quire_scale(scaled, n, positions, table, 6, 1, rows, width, dt, 3) == (rows > 2), "position", dt, rows, n);
  expect(quire_scale(scaled, n, positions, table, 7, 1, rows, width, dt, 3) == 0, "scale", dt, rows, n);
  quire_finish_logits(done, count, 3.0f, 2.0f, dt, 3);
  for (int64_t i = 0; i < count; i++) {
    const float f = get(x, i, dt);
    const float with = get(residual, i, dt) + (float)rounded(f * 0.22f, dt);
    expect(get(sum, i, dt) == rounded(with, dt), "add", dt, i, count);
    const float times = i % n < width ? table[positions[i / n]] : 1;
    expect(get(scaled, i, dt) == rounded(f * times, dt), "scale", dt, i, n);
    const double bent = 2 * tanh(rounded(rounded(logits[i] / 3.0f, dt) / 2, dt));
    expect(fabs(done[i] - bent) <= 4 * ulp(dt) * fabs(bent), "logits", dt, i, count);
    expect(done[i] == rounded(done[i], dt), "logits, rounded", dt, i, count);
  }
}

enum { BLOCK = 16, Q_HEADS = 4, KV_HEADS = 2, HALF = 8 };

/* Two requests through rotation, cache and attention: one all at once, then token by token. */
static void test_attention(int dt, int64_t d, int64_t tokens, int64_t window, float softcap) {
  const int64_t width = (Q_HEADS + 2 * KV_HEADS) * d, blocks = (tokens + BLOCK - 1) / BLOCK, size = (int64_t)elem_size(dt);
  void *qkv = make(tokens * width, dt, 1), *norm = make(d, dt, 1);
  char *plain = malloc((size_t)(tokens * width * size));
  memcpy(plain, qkv, (size_t)(tokens * width * size));
  float *cos_sin = malloc(sizeof(float) * (size_t)tokens * 2 * HALF);
  int64_t *positions = malloc(8 * (size_t)tokens), *slots = malloc(8 * (size_t)tokens);
  int32_t *table = malloc(4 * (size_t)blocks);
  for (int64_t b = 0; b < blocks; b++) table[b] = (int32_t)(blocks - b); /* block 0 is nobody's */
  for (int64_t t = 0; t < tokens; t++) {
    positions[t] = t;
    slots[t] = table[t / BLOCK] * BLOCK + t % BLOCK;
    for (int i = 0; i < HALF; i++) {
      cos_sin[t * 2 * HALF + i] = (float)cos((double)t * pow(100, -i / (double)HALF));
      cos_sin[t * 2 * HALF + HALF + i] = (float)sin((double)t * pow(100, -i / (double)HALF));
    }
  }
  const size_t bytes = (size_t)((blocks + 1) * KV_HEADS * d * BLOCK * size);
  void *k_cache = aligned_alloc(64, bytes), *v_cache = aligned_alloc(64, bytes);
  memset(k_cache, 0xff, bytes), memset(v_cache, 0xff, bytes); /* NaN wherever nothing is written */
  qkv_args write = {.qkv = qkv, .positions = positions, .slots = slots, .cos_sin = cos_sin,
                          .q_norm = norm, .k_norm = norm, .k_cache = k_cache, .v_cache = v_cache,
                          .qkv_stride = width, .tokens = min64(2, tokens), .q_heads = Q_HEADS, .kv_heads = KV_HEADS,
                          .head_dim = d, .half = HALF, .max_position = tokens, .block_size = BLOCK,
                          .num_blocks = blocks + 1, .eps = 1e-6f, .dtype = dt, .norm_dtype = dt, .threads = 2};
  for (int64_t t = 0; t < tokens; t += write.tokens) { /* two tokens, one, and the rest from an odd slot on */
    write.qkv = at_mut(qkv, t * width, dt), write.positions = positions + t, write.slots = slots + t;
    write.tokens = t == 0 ? min64(2, tokens) : t == 2 ? 1 : tokens - t;
    expect(quire_rope_write_kv(&write) == 0, "rope", dt, tokens, d);
  }
  /* What queries and keys should be: [tokens, heads, d], in double. */
  const int heads = Q_HEADS + KV_HEADS;
  double *rotated = malloc(sizeof(double) * (size_t)(tokens * heads * d));
  for (int64_t t = 0; t < tokens; t++)
    for (int h = 0; h < heads; h++) {
      double *to = rotated + (t * heads + h) * d, squares = 0;
      for (int64_t i = 0; i < d; i++) {
        to[i] = get(plain, t * width + h * d + i, dt);
        squares += to[i] * to[i];
      }
      const double scale = 1 / sqrt(squares / (double)d + 1e-6);
      for (int64_t i = 0; i < d; i++) to[i] = rounded(rounded(to[i] * scale, dt) * get(norm, i, dt), dt);
      for (int i = 0; i < HALF; i++) {
        const double c = cos_sin[t * 2 * HALF + i], s = cos_sin[t * 2 * HALF + HALF + i], a = to[i], b = to[i + HALF];
        to[i] = a * c - b * s;
        to[i + HALF] = b * c + a * s;
      }
      for (int64_t i = 0; i < d && h < Q_HEADS; i++)
        expect(fabs(get(qkv, t * width + h * d + i, dt) - to[i]) <= 4 * ulp(dt), "rope", dt, t, i);
    }
  char *out = malloc((size_t)(tokens * Q_HEADS * d * size)), *one = malloc((size_t)(Q_HEADS * d * size));
  int32_t starts[] = {0, (int32_t)tokens}, length = (int32_t)tokens;
  attention_args a = {.q = qkv, .k_cache = k_cache, .v_cache = v_cache, .block_table = table,
                      .query_start_loc = starts, .seq_lens = &length, .out = out, .q_stride = width,
                      .table_stride = blocks, .requests = 1, .tokens = tokens, .q_heads = Q_HEADS,
                      .kv_heads = KV_HEADS, .head_dim = d, .block_size = BLOCK, .num_blocks = blocks + 1,
                      .window = window, .scale = 0.25f, .softcap = softcap, .dtype = dt, .threads = 2};
  expect(quire_paged_attention(&a) == 0, "attention", dt, tokens, d);
  double *scores = malloc(sizeof(double) * (size_t)tokens);
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t first = window && t >= window ? t - window + 1 : 0;
    for (int h = 0; h < Q_HEADS; h++) {
      const int g = h / (Q_HEADS / KV_HEADS);
      double total = 0;
      for (int64_t j = first; j <= t; j++) {
        double s = 0;
        for (int64_t i = 0; i < d; i++)
          s += get(qkv, t * width + h * d + i, dt) * rounded(rotated[(j * heads + Q_HEADS + g) * d + i], dt);
        s *= 0.25;
        total += scores[j] = exp(softcap > 0 ? softcap * tanh(s / softcap) : s);
      }
      for (int64_t i = 0; i < d; i++) {
        double expected = 0;
        for (int64_t j = first; j <= t; j++)
          expected += scores[j] / total * get(plain, j * width + (Q_HEADS + KV_HEADS + g) * d + i, dt);
        const double actual = get(out, (t * Q_HEADS + h) * d + i, dt);
        expect(fabs(actual - expected) <= (dt == F32 ? 2e-5 : 4 * ulp(dt)), "attention", dt, t, i);
      }
    }
    starts[1] = 1, length = (int32_t)t + 1; /* as it is decoded */
    a.q = at(qkv, t * width, dt), a.tokens = 1, a.out = one;
    expect(quire_paged_attention(&a) == 0, "attention, one token", dt, t, d);
    expect(!memcmp(one, out + t * Q_HEADS * d * size, (size_t)(Q_HEADS * d * size)), "attention, one token", dt, t, d);
  }
}

static void test_sampling(int64_t vocab, int values) {
  float *logits = malloc(sizeof(float) * (size_t)vocab);
  for (int64_t i = 0; i < vocab; i++) /* few values: ties everywhere */
    logits[i] = values ? floorf(uniform() * (float)values) / (float)values : 4 * uniform();
  float *noise = malloc(sizeof(float) * (size_t)vocab);
  char *taken = malloc((size_t)vocab);
  for (int c = 0; c < 40; c++) {
    const int ks[] = {0, 1, 3, 17, 64, 200};
    const float ps[] = {1, 0.6f, 0.93f};
    sample_row row = {.temperature = c == 39 ? 0.0f : 0.8f, .top_p = ps[c % 3], .min_p = c % 5 == 4 ? 0.2f : 0.0f,
                      .top_k = ks[c % 6], .seed = c * 0x123456789abcll, .position = 77 + ((int64_t)c << 32)};
    int64_t token = -1;
    uint8_t valid = 0;
    const sample_args args = {logits, &row, &token, &valid, vocab, 1, vocab, 2};
    expect(quire_sample(&args) == 0 && valid, "sample", F32, vocab, c);
    quire_philox_uniform((uint64_t)row.seed, (uint64_t)row.position, noise, vocab);
    float best = -INFINITY;
    for (int64_t i = 0; i < vocab; i++) best = fmaxf(best, logits[i]);
    int64_t winner = -1;
    double winning = -INFINITY, runner_up = -INFINITY, total = 0, before = 0;
    memset(taken, 0, (size_t)vocab);
    const int64_t k = row.temperature == 0 ? 1 : row.top_k ? min64(row.top_k, vocab) : vocab;
    for (int pass = 0; pass < 2; pass++, before = 0, memset(taken, 0, (size_t)vocab))
      for (int64_t n = 0; n < k; n++) { /* the next in the order of (logit, lowest id) */
        int64_t next = -1;
        for (int64_t i = 0; i < vocab; i++)
          if (!taken[i] && (next < 0 || logits[i] > logits[next])) next = i;
        taken[next] = 1;
        const double score = row.temperature > 0 ? ((double)logits[next] - best) / row.temperature : 0;
        if (n > 0 && row.min_p > 0 && score < log(row.min_p)) break;
        if (pass == 0) {
          total += exp(score);
          continue;
        }
        if (n > 0 && row.top_p < 1 && row.temperature > 0 && before >= row.top_p * total) break;
        before += exp(score);
        const double noisy = score - log(-log1p(-(double)noise[next]));
        if (noisy > winning) runner_up = winning, winning = noisy, winner = next;
        else if (noisy > runner_up) runner_up = noisy;
      }
    expect(token == winner || winning - runner_up < 1e-5, "sample", F32, vocab, c);
  }
}

int main(void) {
  printf("vectors of %d floats%s\n", VW, HAVE_DOT ? ", bfloat16 dot products" : "");
  random_bits = 1;
  test_conversions(), test_float8_conversions();
  puts("conversions");
  for (int dt = F32; dt <= F16; dt++) {
    const int64_t shapes[][3] = {{1, 1, 1}, {3, 7, 5}, {1, 300, 65}, {7, 64, 128}, {20, 129, 70}, {2, 4101, 9}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
      test_linear(dt, shapes[i][0], shapes[i][1], shapes[i][2]);
    test_adapters(dt, 1, 7, 5, 1, 0), test_adapters(dt, 20, 70, 130, 5, 1), test_adapters(dt, 4, 600, 65, 16, 0);
    test_float8(dt, 1, 9, 3, 16), test_float8(dt, 9, 300, 70, 128), test_float8(dt, 3, 72, 64, 24);
    const code_info forms[] = {
        {.bits = 4, .zero = 8, .activation_bits = 16},
        {.bits = 4, .offset_type = OFFSET_ZERO, .activation_bits = 16, .order = (int32_t[]){0}},
        {.bits = 4, .offset_type = OFFSET_MINIMUM, .super_groups = 1, .activation_bits = 16},
        {.bits = 8, .offset_type = OFFSET_MINIMUM, .zero = 9, .activation_bits = 16},
        {.bits = 8, .zero = 32, .super_groups = 1, .activation_bits = 16},
        {.bits = 4, .zero = 12, .has_values = 1, .activation_bits = 16,
         .values = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}},
        {.bits = 8, .zero = 128, .activation_bits = 8},
    };
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
      test_codes(dt, 1, 9, 3, 16, forms[i]), test_codes(dt, 8, 300, 70, 32, forms[i]);
      test_codes(dt, 3, 520, 20, 520, forms[i]);
    }
    const int64_t sizes[][2] = {{5, 1}, {9, 37}, {40, 512}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
      const int64_t rows = sizes[i][0], n = sizes[i][1];
      test_norm(dt, dt, rows, n), test_norm(dt, F32, rows, n), test_gated(dt, rows, n), test_scaled(dt, rows, n);
    }
    test_attention(dt, 16, 40, 0, 0), test_attention(dt, 64, 150, 33, 0), test_attention(dt, 72, 70, 0, 5);
    printf("linear, adapters, float8, codes, norm, gates, scales, rope, attention: %s\n", names[dt]);
  }
  test_attention(F32, 16, 1100, 0, 0); /* more than two segments of keys */
  for (int64_t vocab = 1; vocab < 2000; vocab = vocab * 3 + 2)
    for (int values = 0; values < 3; values++) test_sampling(vocab, values);
  puts("sampling");
  if (failures) return printf("%d failures\n", failures), failures > 100 ? 100 : failures;
  puts("ok");
  return 0;
}

/* What LoRA adapters add to a product: B (s * A x), for the rows whose requests have an adapter.
 *
 * Before the product, `shrink` computes t = s * A x of these rows. Where the product finishes a panel of columns, before
 * it rounds, `quire_add_delta` adds B t to the sums. All in fp32. An element of t is VW chains over k (of pairs, in
 * bfloat16) and a fixed tree; an element of B t is one chain over the ranks. So neither the other rows, nor their
 * adapters, nor the blocking change a bit, and a row without an adapter is not touched.
 */
#include "linear_panel.h"

typedef struct { /* 1 to ROWS rows of one adapter, times some ranks */
  const lora_site *site;
  const int32_t *rows; /* of x */
  int64_t at, count;   /* the first row's place in lora_rows; how many */
  int64_t first, end;  /* ranks */
} shrink_unit;

typedef struct {
  const shrink_unit *units;
  const void *x;
  int64_t x_stride, stride;
  float *t; /* [rows with an adapter][stride] */
  int dt;
} shrink_job;

/* One step of k for rows x columns: VW elements of each, or in bfloat16 VW pairs. */
INLINE void dot_step(vf acc[ROWS][LANES], const char *const *x, const char *a, int64_t a_stride, const int rows,
                     const int columns, const int dt) {
  vf av[LANES];
  vu pairs[LANES];
  UNROLL for (int c = 0; c < columns; c++) {
    if (dt == BF16)
      pairs[c] = vload_pairs(a + c * a_stride);
    else
      av[c] = vload(a + c * a_stride, dt);
  }
  UNROLL for (int r = 0; r < rows; r++) {
    if (dt == BF16) {
      const vu xv = vload_pairs(x[r]);
      UNROLL for (int c = 0; c < columns; c++) acc[r][c] = vdot_pairs(acc[r][c], xv, pairs[c]);
    } else {
      const vf xv = vload(x[r], dt);
      UNROLL for (int c = 0; c < columns; c++) acc[r][c] = vfma(xv, av[c], acc[r][c]);
    }
  }
}

/* t[r][c] = scales[c] * (row r of x) . (row c of A). */
INLINE void dots(const shrink_job *j, const shrink_unit *u, int64_t rank, const int rows,
                 const int columns, const int dt) {
  const int64_t k = u->site->k, size = (int64_t)elem_size(dt), step = dt == BF16 ? 2 * VW : VW;
  const char *a = (const char *)u->site->a + rank * k * size, *x[ROWS];
  UNROLL for (int r = 0; r < rows; r++) x[r] = at(j->x, u->rows[r] * j->x_stride, dt);
  vf acc[ROWS][LANES];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++) acc[r][c] = vset(0.0f);
  int64_t i = 0;
  for (; i + step <= k; i += step) {
    dot_step(acc, x, a + i * size, k * size, rows, columns, dt);
    UNROLL for (int r = 0; r < rows; r++) x[r] += step * size;
  }
  if (i < k) {
    char rest_x[ROWS][VW * 4] = {{0}}, rest_a[LANES][VW * 4] = {{0}};
    const char *ends[ROWS];
    for (int r = 0; r < rows; r++) ends[r] = memcpy(rest_x[r], x[r], (size_t)((k - i) * size));
    for (int c = 0; c < columns; c++) memcpy(rest_a[c], a + (c * k + i) * size, (size_t)((k - i) * size));
    dot_step(acc, ends, rest_a[0], VW * 4, rows, columns, dt);
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns; c++)
    j->t[(u->at + r) * j->stride + rank + c] = u->site->scales[rank + c] * vsum(acc[r][c]);
}

INLINE void shrink_block(const shrink_job *j, const shrink_unit *u, const int rows, const int dt) {
  int64_t rank = u->first;
  for (; rank + LANES <= u->end; rank += LANES) dots(j, u, rank, rows, LANES, dt);
  for (; rank < u->end; rank++) dots(j, u, rank, rows, 1, dt);
}

#define SHRINK(name, dt)                                                             \
  static __attribute__((noinline)) void name(void *context, int64_t index) {         \
    const shrink_job *j = context;                                                   \
    const shrink_unit *u = &j->units[index];                                     \
    FOR_ROWS(u->count, shrink_block(j, u, rows, dt));                                \
  }
SHRINK(shrink_f32, F32)
SHRINK(shrink_bf16, BF16)
SHRINK(shrink_f16, F16)

INLINE const lora_site *site_of(const lora_use *use, int64_t group) {
  return &use->rows->table[use->rows->adapters[group]][use->site];
}

#define UNIT_RANKS 8 /* of a unit where there are few rows: a multiple of LANES */

/* t for a product with input x. 1: no row's adapter changes it; 0; 5: no memory. */
int quire_shrink(lora_use *use, const void *x, int64_t x_stride, int dt, int threads) {
  const lora_rows *rows = use->rows;
  int64_t stride = 0, blocks = 0, work = 0, most = 0;
  int touched = 0;
  for (int64_t g = 0; g < rows->groups; g++) {
    const lora_site *site = site_of(use, g);
    const int64_t count = rows->starts[g + 1] - rows->starts[g];
    touched |= site->panels != NULL;
    if (!site->rank) continue;
    stride = max64(stride, site->rank);
    blocks += (count + ROWS - 1) / ROWS;
    work += count * site->rank * site->k;
    most = max64(most, (site->rank + UNIT_RANKS - 1) / UNIT_RANKS);
  }
  if (!touched) return 1;
  if (work <= 4 * SMALL_WORK) threads = 1;
  const int whole = blocks >= 4 * threads || threads == 1; /* a unit has all ranks */
  const size_t units_bytes = (size_t)(blocks * (whole ? 1 : most)) * sizeof(shrink_unit);
  char *memory = quire_scratch(SCRATCH_LORA, units_bytes + (size_t)(rows->count * stride) * sizeof(float) + 64);
  if (!memory) return 5;
  use->t = (float *)memory, use->stride = stride;
  shrink_unit *units = (shrink_unit *)(memory + (size_t)(rows->count * stride + 15) / 16 * 16 * sizeof(float));
  int64_t num_units = 0;
  for (int64_t g = 0; g < rows->groups; g++) {
    const lora_site *site = site_of(use, g);
    const int64_t start = rows->starts[g], count = rows->starts[g + 1] - start;
    const int64_t ranks = whole ? site->rank : UNIT_RANKS;
    for (int64_t row = 0; site->rank && row < count; row += ROWS)
      for (int64_t first = 0; first < site->rank; first += ranks)
        units[num_units++] = (shrink_unit){.site = site, .rows = rows->rows + start + row, .at = start + row,
                                               .count = min64(ROWS, count - row), .first = first,
                                               .end = min64(first + ranks, site->rank)};
  }
  shrink_job job = {units, x, x_stride, stride, (float *)memory, dt};
  quire_run(dt == F32 ? shrink_f32 : dt == BF16 ? shrink_bf16 : shrink_f16, &job, num_units, threads);
  return 0;
}

/* (sums + B t) * gains for some rows of one adapter, and one panel. t: of the first of these rows, at the panel's first
 * rank. */
INLINE void expand(const lora_site *site, int64_t panel, const float *t, int64_t stride, float *const *sums,
                   const int rows, const int dt) {
  const lora_panel *p = &site->panels[panel];
  const int64_t size = (int64_t)elem_size(dt), row = PANEL * size;
  const char *b = (const char *)site->b + p->start * row;
  const float *gains = site->gains ? site->gains + panel * PANEL : NULL;
  for (int c = 0; c < PANEL; c += LANES * VW) {
    vf acc[ROWS][LANES];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++) acc[r][i] = vset(0.0f);
    for (int64_t k = 0; k < p->count; k++) {
      vf w[LANES];
      UNROLL for (int i = 0; i < LANES; i++) w[i] = vload(b + k * row + (c + i * VW) * size, dt);
      __builtin_prefetch(b + (p->count + k) * row + c * size, 0, 2); /* the next panel's */
      if (LANES * VW * size > 64) __builtin_prefetch(b + (p->count + k) * row + c * size + 64, 0, 2);
      UNROLL for (int r = 0; r < rows; r++) {
        const vf x = vset(t[r * stride + k]);
        UNROLL for (int i = 0; i < LANES; i++) acc[r][i] = vfma(w[i], x, acc[r][i]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++) {
      float *to = sums[r] + c + i * VW;
      vf y = vload(to, F32) + acc[r][i];
      if (gains) y = y * vload(gains + c + i * VW, F32);
      vstore(to, y, F32);
    }
  }
}

static __attribute__((noinline)) void expand_rows(const lora_site *site, int64_t panel, const float *t, int64_t stride,
                                                  float *const *sums, int64_t count) {
  FOR_DTYPE(site->dtype, FOR_ROWS(count, expand(site, panel, t, stride, sums, rows, dt)));
}

/* The first index in [from, to) whose row is not before `row`. */
static int64_t first_row(const int32_t *rows, int64_t from, int64_t to, int64_t row) {
  while (from < to) {
    const int64_t middle = from + (to - from) / 2;
    if (rows[middle] < row)
      from = middle + 1;
    else
      to = middle;
  }
  return from;
}

/* sums: [rows][PANEL], of rows [begin, begin + rows) times one panel. */
void quire_add_delta(const linear_job *job, float *sums, int64_t begin, int64_t rows, int64_t panel) {
  const lora_use *use = job->lora;
  const lora_rows *all = use->rows;
  panel += job->first_panel;
  for (int64_t g = 0; g < all->groups; g++) {
    const lora_site *site = site_of(use, g);
    if (!site->panels || (!site->panels[panel].count && !site->gains)) continue;
    int64_t i = first_row(all->rows, all->starts[g], all->starts[g + 1], begin);
    const int64_t end = first_row(all->rows, i, all->starts[g + 1], begin + rows);
    while (i < end) {
      const int64_t count = min64(ROWS, end - i);
      float *to[ROWS];
      for (int64_t r = 0; r < count; r++) to[r] = sums + (all->rows[i + r] - begin) * PANEL;
      expand_rows(site, panel, use->t + i * use->stride + site->panels[panel].first, use->stride, to, count);
      i += count;
    }
  }
}

/* ---- of an embedding ---- */

typedef struct {
  const lora_use *use;
  const int64_t *ids;
  char *out; /* [tokens][width] */
  int64_t width;
  int dt;
} embed_job;

/* One row: a token's row of A is t, without a product. */
static void embed_row(const embed_job *j, const lora_site *site, int64_t row) {
  float t[LORA_RANKS];
  for (int64_t i = 0; i < site->rank; i += VW) {
    const int64_t rest = site->rank - i;
    const vf a = vload_upto(at(site->a, j->ids[row] * site->rank + i, j->dt), rest, j->dt);
    vstore_upto(t + i, a * vload_upto(site->scales + i, rest, F32), rest, F32);
  }
  char *out = at_mut(j->out, row * j->width, j->dt);
  for (int64_t c = 0; c < j->width; c += PANEL) {
    float sums[PANEL], *to = sums;
    const int64_t n = min64(PANEL, j->width - c);
    for (int64_t i = 0; i < n; i += VW)
      vstore(sums + i, vload_upto(at(out, c + i, j->dt), n - i, j->dt), F32);
    expand_rows(site, c / PANEL, t + site->panels[c / PANEL].first, 0, &to, 1);
    for (int64_t i = 0; i < n; i += VW) vstore_upto(at_mut(out, c + i, j->dt), vload(sums + i, F32), n - i, j->dt);
  }
}

static void embed_group(void *context, int64_t group) {
  const embed_job *j = context;
  const lora_rows *rows = j->use->rows;
  const lora_site *site = site_of(j->use, group);
  for (int64_t i = rows->starts[group]; site->panels && i < rows->starts[group + 1]; i++)
    embed_row(j, site, rows->rows[i]);
}

/* Adds to rows of an embedding, out: [tokens][width], and rounds. 0. */
int quire_adapt_embedding(const lora_rows *rows, int64_t site, const int64_t *ids, void *out, int64_t width, int dt,
                          int threads) {
  lora_use use = {.rows = rows, .site = site};
  embed_job job = {&use, ids, out, width, dt};
  quire_run(embed_group, &job, rows->groups, threads);
  return 0;
}

/* ---- the rows of a step ---- */

static int by_key(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* Bytes of memory that `quire_group_rows` wants. */
int32_t quire_group_bytes(int64_t spans, int64_t rows) {
  return (int32_t)((size_t)spans * (sizeof(int64_t) + 2 * sizeof(int32_t)) + (size_t)(rows + 1) * sizeof(int32_t));
}

/* Groups rows by adapter. Span i is rows [ends[i - 1], ends[i]), of adapter[i], -1 for none. 0; 1 if an adapter is not in
 * the table. */
int quire_group_rows(const lora_table *table, const int32_t *adapters, const int32_t *ends, int64_t spans, void *memory,
                     lora_rows *out) {
  int64_t *keys = memory, found = 0, count = 0, groups = 0;
  for (int64_t i = 0; i < spans; i++) {
    if (adapters[i] < 0 || ends[i] == (i ? ends[i - 1] : 0)) continue;
    if (adapters[i] >= table->size || !table->adapters[adapters[i]]) return 1;
    keys[found++] = (int64_t)adapters[i] << 32 | i;
  }
  qsort(keys, (size_t)found, sizeof *keys, by_key);
  int32_t *of = (int32_t *)(keys + spans), *starts = of + spans, *rows = starts + spans + 1;
  for (int64_t f = 0; f < found; f++) {
    const int64_t i = keys[f] & 0xffffffff;
    if (!f || keys[f] >> 32 != keys[f - 1] >> 32) {
      of[groups] = (int32_t)(keys[f] >> 32);
      starts[groups++] = (int32_t)count;
    }
    for (int32_t row = i ? ends[i - 1] : 0; row < ends[i]; row++) rows[count++] = row;
  }
  starts[groups] = (int32_t)count;
  *out = (lora_rows){.table = table->adapters, .rows = rows, .starts = starts, .adapters = of, .groups = groups,
                     .count = count};
  return 0;
}

/* Paged attention: online softmax over tiles of keys aligned to absolute positions.
 *
 * A unit of work is (request, kv head, run of query tokens). Its rows are those tokens times the query
 * heads that share the kv head, so a tile of K and V is read once for all of them. A request with one query
 * token is one unit, if there are enough requests: all its heads, block by block, in the order of memory
 * (measured: 1.2 to 1.6 times as fast at contexts of 60 to 330).
 *
 * What a row computes depends on its position alone. It reads the tiles of its visible keys in order;
 * attention_tile.h says what is computed in a tile. Every SEGMENT keys, its softmax state is merged into the
 * row's total and begun again. So where there are fewer units than threads, several threads can share the
 * segments of one unit (one task a segment) without changing a bit.
 *
 * Scores are in units of log2(e), so that the exponential is a power of two.
 */
#include "attention_by_tiles.h"

#define SEGMENT 512         /* keys; part of the arithmetic, a multiple of TILE */
#define ROWS_PER_UNIT (HAVE_DOT ? 48 : 96) /* target number of rows in one unit of work; a multiple of TILE_ROWS */
#define UNITS_PER_THREAD 4  /* with fewer, units are split into segments */
#define MOST_PARTS (32 << 20) /* bytes of segments' states above which units are not split */
#define WIDENED_ROWS 12     /* from which on tiles of bfloat16 are widened, without dot products */
#define SMALL_ATTENTION (1 << 18) /* multiply-adds below which one thread does it all */

typedef struct {
  int64_t request, kv_head, heads; /* of the kv heads, the first and how many */
  int64_t first_row, tokens;       /* first_row: of q and out, in tokens */
  int64_t group, rows;             /* rows: of one kv head, tokens * group */
  int64_t held;                    /* rows of one kv head that there is memory for */
  int is_widened;                  /* its tiles, to floats */
  float *spare, *unpacked;         /* memory for one tile, that of its thread */
  int64_t first_position;
  range keys; /* that any row sees */
} unit;

typedef struct { /* one call's constants */
  const attention_args *a;
  int64_t tokens_per_unit, heads_per_unit, rows_per_unit, units;
  const int64_t *starts;   /* [requests]: each request's first unit */
  int64_t segments;        /* tasks a unit is split into; 0: none */
  float *parts;            /* [units, segments, rows_per_unit, stride] if units are split */
  int64_t width, stride, words; /* words: floats held for a row of q */
  int tiles, can_widen; /* tiles: enum tiles */
  int in_bytes, as_floats; /* keys and values are floats of 8 bits; unpacked to floats, or to dtype */
  float factor;
  int failed; /* a thread could not allocate its scratch memory */
} plan;

/* ---- one tile ---- */

INLINE range visible_keys(const attention_args *a, int64_t position) {
  return (range){a->window > 0 ? max64(0, position - a->window + 1) : 0, position + 1};
}

/* Address of an element of a cache. */
INLINE const void *in_cache(const attention_args *a, const void *cache, int64_t index, const int dt) {
  return a->k_scales ? (const char *)cache + index : at(cache, index, dt);
}

INLINE tile locate(const attention_args *a, const unit *u, int64_t key, const int dt) {
  const int64_t pack = a->k_scales ? 2 : pack_of(dt);
  const int32_t *table = a->block_table + u->request * a->table_stride;
  const int64_t size = a->block_size, first = max64(key, u->keys.begin / SUB * SUB);
  int64_t index = first / size, offset = first - index * size;
  tile t = {.k_stride = size * pack};
  int known = -1;
  for (int s = 0; s < SUBS; s++) {
    const int64_t position = key + s * SUB;
    if (position < first || position >= u->keys.end) continue;
    const int64_t base = (table[index] * a->kv_heads + u->kv_head) * a->head_dim * size;
    t.k[s] = in_cache(a, a->k_cache, base + offset * pack, dt);
    t.v[s] = in_cache(a, a->v_cache, base + offset * a->head_dim, dt);
    known = s;
    if ((offset += SUB) == size) offset = 0, index++;
  }
  for (int s = 0; s < SUBS; s++)
    if (!t.k[s]) t.k[s] = t.k[known], t.v[s] = t.v[known];
  return t;
}

/* The same keys of the next kv head. */
INLINE tile next_head(const attention_args *a, const tile *t, const int dt) {
  tile next = {.k_stride = t->k_stride};
  for (int s = 0; s < SUBS; s++) {
    next.k[s] = in_cache(a, t->k[s], a->block_size * a->head_dim, dt);
    next.v[s] = in_cache(a, t->v[s], a->block_size * a->head_dim, dt);
  }
  return next;
}

/* head: of the unit. */
static void attend_tile(const plan *p, const unit *u, const tile *t, int64_t key, int64_t head, const float *q,
                        float *rows, const tile *next) {
  const attention_args *a = p->a;
  const range first = visible_keys(a, u->first_position);
  const range last = visible_keys(a, u->first_position + u->tokens - 1);
  const int whole = last.begin <= key && first.end >= key + TILE;
  const row_layout s = {p->width, p->stride};
  const tile_kernels *kernels = &kernels_of[a->dtype];
  const float factor = p->in_bytes ? p->factor * a->k_scales[u->kv_head + head] * 256.0f : p->factor;
  tile wide;
  if (p->in_bytes) {
    wide = (p->as_floats ? unpack_to_floats : unpack_to_pairs)(t, a->head_dim, u->unpacked, next);
    t = &wide, next = NULL;
    if (p->as_floats) kernels = a->dtype == BF16 ? &widened_kernels : &kernels_of[F32];
  } else if (u->is_widened) {
    wide = widen_tile(t, a->head_dim, u->unpacked, u->unpacked + TILE * a->head_dim);
    t = &wide, next = NULL, kernels = &widened_kernels;
  }
  for (int64_t r = 0, n; r < u->rows; r += n) {
    n = p->tiles ? min64(u->rows - r, TILE_ROWS) : rows_at_once(u->rows - r);
    range keys[TILE_ROWS];
    for (int64_t i = 0; i < n; i++) {
      keys[i] = (range){0, TILE};
      if (whole) continue;
      const range seen = visible_keys(a, u->first_position + (r + i) / u->group);
      keys[i] = (range){max64(seen.begin - key, 0), min64(seen.end - key, TILE)};
    }
    if (p->tiles)
      attend_tiles_of(p->tiles)(t, (const char *)(q + r * p->words), a->head_dim, s, rows + r * p->stride,
                                keys, factor, a->softcap, r ? NULL : next, n, u->spare);
    else
      attend_rows(kernels, t, q + r * p->words, a->head_dim, s, rows + r * p->stride,
                  keys, factor, a->softcap, r ? NULL : next, n);
  }
}

/* ---- one unit ---- */

/* A tile operation reads and writes whole tiles of rows. */
static int64_t held_rows(const plan *p, int64_t rows) {
  return p->tiles ? (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : rows;
}

static int64_t heads_per_unit(const plan *p, int64_t tokens) {
  return tokens == 1 ? p->heads_per_unit : 1;
}

static int64_t count_units(const plan *p, int64_t tokens) {
  const int64_t runs = (tokens + p->tokens_per_unit - 1) / p->tokens_per_unit;
  return runs * (p->a->kv_heads / heads_per_unit(p, tokens));
}

static unit find_unit(const plan *p, int64_t index) {
  const attention_args *a = p->a;
  int64_t low = 0, high = a->requests; /* the last request whose start is <= index */
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p->starts[middle] <= index)
      low = middle;
    else
      high = middle;
  }
  const int64_t start = a->query_start_loc[low], length = a->query_start_loc[low + 1] - start;
  const int64_t runs = (length + p->tokens_per_unit - 1) / p->tokens_per_unit;
  const int64_t heads = heads_per_unit(p, length), bundles = a->kv_heads / heads;
  const int64_t rest = index - p->starts[low];
  const int64_t run = runs - 1 - rest / bundles; /* the run that sees most keys first */
  const int64_t first = run * p->tokens_per_unit, group = a->q_heads / a->kv_heads;
  const int64_t tokens = min64(p->tokens_per_unit, length - first);
  const int64_t position = a->seq_lens[low] - length + first;
  return (unit){
      .request = low,
      .kv_head = rest % bundles * heads,
      .heads = heads,
      .first_row = start + first,
      .tokens = tokens,
      .group = group,
      .rows = tokens * group,
      .held = held_rows(p, tokens * group),
      .is_widened = p->can_widen && (p->in_bytes || tokens * group >= WIDENED_ROWS),
      .first_position = position,
      .keys = {visible_keys(a, position).begin, position + tokens},
  };
}

/* This thread's scratch memory: `states` states for each row of a unit, then the unit's queries, then what is spare.
 * On the stack the last would be large, and some compilers touch every page of a frame in each call. */
INLINE float *take_rows(plan *p, int64_t states) {
  const int64_t unpacked = p->can_widen || p->in_bytes ? 2 * TILE * p->a->head_dim : 0;
  const int64_t tile = p->tiles ? spare_floats(p->a->head_dim, p->stride) : 0;
  const int64_t floats = p->rows_per_unit * (states * p->stride + p->words) + unpacked + tile;
  float *rows = quire_scratch(SCRATCH_ATTENTION, (size_t)floats * sizeof(float));
  if (!rows) __atomic_store_n(&p->failed, 1, __ATOMIC_RELAXED);
  return rows;
}

/* q: the unit's queries, which the rest of the memory follows. */
INLINE void give_spare(const plan *p, unit *u, float *q) {
  u->unpacked = q + p->rows_per_unit * p->words;
  u->spare = u->unpacked + (p->can_widen || p->in_bytes ? 2 * TILE * p->a->head_dim : 0);
}

/* Converts queries to words: [words, n] for each n rows that are computed at once; with tiles [n, words]. */
INLINE void load_queries(const plan *p, const unit *u, float *q, const int dt) {
  const attention_args *a = p->a;
  for (int64_t h = 0; h < u->heads; h++, q += u->held * p->words)
    for (int64_t r = 0, n; r < u->rows; r += n) {
      n = p->tiles ? 1 : rows_at_once(u->rows - r);
      for (int64_t i = r; i < r + n; i++) {
        const int64_t token = u->first_row + i / u->group;
        const int64_t head = (u->kv_head + h) * u->group + i % u->group;
        const void *from = at(a->q, token * a->q_stride + head * a->head_dim, dt);
        float row_words[MAX_HEAD_DIM], *to = q + r * p->words + i - r;
        const int64_t words = u->is_widened ? a->head_dim : a->head_dim / pack_of(dt);
        if (dt == F16 || u->is_widened)
          for (int64_t d = 0; d < a->head_dim; d += VW)
            vstore_upto(row_words + d, vload_upto(at(from, d, dt), a->head_dim - d, dt),
                        a->head_dim - d, F32);
        else
          memcpy(row_words, from, (size_t)words * sizeof *row_words);
        for (int64_t d = 0; d < words; d++) to[d * n] = row_words[d];
      }
    }
}

/* Writes to `rows` the states of one segment, from `key` on. */
INLINE void attend_segment(const plan *p, const unit *u, int64_t key, const float *q, float *rows,
                           const int dt) {
  const int64_t end = min64(key / SEGMENT * SEGMENT + SEGMENT, u->keys.end);
  for (int64_t h = 0; h < u->heads; h++)
    for (int64_t r = 0; r < u->rows; r++) {
      float *row = rows + (h * u->held + r) * p->stride;
      memset(row, 0, (size_t)p->stride * sizeof *row);
      *max_of((row_layout){p->width, p->stride}, row) = -INFINITY;
    }
  tile t = locate(p->a, u, key, dt);
  for (; key < end; key += TILE)
    for (int64_t h = 0; h < u->heads; h++) {
      const int same_keys = h + 1 < u->heads, more = same_keys || key + TILE < u->keys.end;
      const tile next = same_keys ? next_head(p->a, &t, dt)
                        : more    ? locate(p->a, u, key + TILE, dt)
                                  : t;
      attend_tile(p, u, &t, key, h, q + h * u->held * p->words, rows + h * u->held * p->stride,
                  more ? &next : NULL);
      t = next;
    }
}

/* total += part, both relative to the larger of their maxima. */
static void merge_row(const plan *p, float *total, const float *part) {
  const int64_t lanes = p->width + SUM_LANES;
  const float higher = part[lanes] > total[lanes] ? part[lanes] : total[lanes];
  const vf old = vset(rescaling(total[lanes], higher)), new = vset(rescaling(part[lanes], higher));
  for (int64_t i = 0; i < lanes; i += VW)
    vstore(total + i, vfma(vload(total + i, F32), old, vload(part + i, F32) * new), F32);
  total[lanes] = higher;
}

/* A row's total is the state of its first segment, into which that of each further one is merged in order. */
static void merge_segment(const plan *p, const unit *u, int64_t segment, float *total,
                          const float *part) {
  for (int64_t r = 0; r < u->heads * u->held; r++) {
    if (r % u->held >= u->rows) continue;
    const range keys = visible_keys(p->a, u->first_position + r % u->held / u->group);
    float *row = total + r * p->stride;
    if (keys.begin >= segment + SEGMENT || keys.end <= segment) continue;
    if (keys.begin / SEGMENT * SEGMENT == segment)
      memcpy(row, part + r * p->stride, (size_t)p->stride * sizeof *row);
    else
      merge_row(p, row, part + r * p->stride);
  }
}

INLINE void write_rows(const plan *p, const unit *u, const float *row, const int dt) {
  const attention_args *a = p->a;
  for (int64_t h = 0; h < u->heads; h++, row += (u->held - u->rows) * p->stride) {
    const float v_scale = p->in_bytes ? a->v_scales[u->kv_head + h] * 256.0f : 1.0f;
    for (int64_t r = 0; r < u->rows; r++, row += p->stride) {
      float sum[SUM_LANES];
      memcpy(sum, row + p->width, sizeof sum);
      for (int w = SUM_LANES / 2; w > 0; w >>= 1)
        for (int i = 0; i < w; i++) sum[i] += sum[i + w];
      const int64_t token = u->first_row + r / u->group;
      const int64_t head = (u->kv_head + h) * u->group + r % u->group;
      const int64_t stride = a->out_stride ? a->out_stride : a->q_heads * a->head_dim;
      void *out = at_mut(a->out, token * stride + head * a->head_dim, dt);
      for (int64_t d = 0; d < a->head_dim; d += VW)
        vstore_upto(at_mut(out, d, dt), vload(row + d, F32) / sum[0] * v_scale, a->head_dim - d, dt);
    }
  }
}

/* A task of the thread pool: `index` is that of a unit. */
INLINE void attend_unit(plan *p, int64_t index, const int dt) {
  unit u = find_unit(p, index);
  float *part = take_rows(p, 2), *total = part + p->rows_per_unit * p->stride;
  if (!part) return;
  float *q = total + p->rows_per_unit * p->stride;
  give_spare(p, &u, q);
  load_queries(p, &u, q, dt);
  int64_t segment = u.keys.begin / SEGMENT * SEGMENT;
  attend_segment(p, &u, u.keys.begin / TILE * TILE, q, part, dt);
  if (segment + SEGMENT < u.keys.end) {
    merge_segment(p, &u, segment, total, part);
    while ((segment += SEGMENT) < u.keys.end) {
      attend_segment(p, &u, segment, q, part, dt);
      merge_segment(p, &u, segment, total, part);
    }
    part = total;
  }
  write_rows(p, &u, part, dt);
}

/* ---- units split into segments ---- */

INLINE void attend_part(plan *p, int64_t index, const int dt) {
  unit u = find_unit(p, index / p->segments);
  const int64_t segment = (u.keys.begin / SEGMENT + index % p->segments) * SEGMENT;
  if (segment >= u.keys.end) return;
  float *q = take_rows(p, 0);
  if (!q) return;
  give_spare(p, &u, q);
  load_queries(p, &u, q, dt);
  attend_segment(p, &u, max64(segment, u.keys.begin / TILE * TILE), q,
                 p->parts + index * p->rows_per_unit * p->stride, dt);
}

INLINE void merge_unit(plan *p, int64_t index, const int dt) {
  const unit u = find_unit(p, index);
  float *total = take_rows(p, 1);
  if (!total) return;
  const float *part = p->parts + index * p->segments * p->rows_per_unit * p->stride;
  for (int64_t s = u.keys.begin / SEGMENT * SEGMENT; s < u.keys.end; s += SEGMENT) {
    merge_segment(p, &u, s, total, part);
    part += p->rows_per_unit * p->stride;
  }
  write_rows(p, &u, total, dt);
}

#define TASKS(dt)                                                                   \
  static void attend_unit_##dt(void *p, int64_t index) { attend_unit(p, index, dt); } \
  static void attend_part_##dt(void *p, int64_t index) { attend_part(p, index, dt); } \
  static void merge_unit_##dt(void *p, int64_t index) { merge_unit(p, index, dt); }
TASKS(F32)
TASKS(BF16)
TASKS(F16)
static const quire_task unit_tasks[3] = {attend_unit_F32, attend_unit_BF16, attend_unit_F16};
static const quire_task part_tasks[3] = {attend_part_F32, attend_part_BF16, attend_part_F16};
static const quire_task merge_tasks[3] = {merge_unit_F32, merge_unit_BF16, merge_unit_F16};

/* ---- the call ---- */

/* Nonzero if a request's extent or a block it needs is out of bounds. */
static int check_request(const attention_args *a, int64_t b) {
  const int64_t start = a->query_start_loc[b], end = a->query_start_loc[b + 1];
  const int64_t length = a->seq_lens[b];
  if (start < 0 || end < start || end > a->tokens) return 2;
  if (end == start) return 0;
  if (length < end - start || length > a->table_stride * a->block_size) return 3;
  const int64_t first = visible_keys(a, length - (end - start)).begin / a->block_size;
  const int32_t *table = a->block_table + b * a->table_stride;
  for (int64_t i = first; i * a->block_size < length; i++)
    if (table[i] < 0 || table[i] >= a->num_blocks) return 4;
  return 0;
}

int quire_check_attention(const attention_args *a) {
  int code = 0;
  for (int64_t b = 0; b < a->requests && !code; b++) code = check_request(a, b);
  return code;
}

/* How many segments the longest key range of a unit may touch. */
static int64_t count_segments(const attention_args *a, const plan *p, int64_t most_keys) {
  const int64_t reach = p->rows_per_unit + a->window; /* rows >= tokens */
  if (a->window > 0 && reach < most_keys) most_keys = reach + SEGMENT;
  return (most_keys + SEGMENT - 1) / SEGMENT;
}

int quire_attention_unchecked(const attention_args *a) {
  const int64_t group = a->q_heads / a->kv_heads;
  plan p = {.a = a, .width = (a->head_dim + 15) / 16 * 16};
  p.stride = p.width + SUM_LANES + 16;
  if (a->dtype == BF16 && fits_tiles(a->head_dim)) p.tiles = a->tiles;
  p.in_bytes = a->k_scales != NULL;
  p.as_floats = a->dtype != BF16 || (!HAVE_DOT && !p.tiles);
  p.can_widen = a->dtype == BF16 && !HAVE_DOT && !p.tiles;
  p.words = p.can_widen ? a->head_dim : a->head_dim / pack_of(a->dtype);
  p.factor = a->softcap > 0.0f ? a->scale / a->softcap : a->scale * LOG2E;
  p.tokens_per_unit = max64(1, ROWS_PER_UNIT / group);
  p.heads_per_unit = a->requests >= a->threads * UNITS_PER_THREAD ? a->kv_heads : 1;
  int64_t longest = 1, most_keys = 0, work = 0;
  for (int64_t b = 0; b < a->requests; b++) {
    const int64_t length = a->query_start_loc[b + 1] - a->query_start_loc[b];
    p.units += count_units(&p, length);
    longest = max64(longest, length);
    most_keys = max64(most_keys, length ? a->seq_lens[b] : 0);
    work += length * a->seq_lens[b];
  }
  p.rows_per_unit = max64(held_rows(&p, min64(p.tokens_per_unit, longest) * group),
                          p.heads_per_unit * held_rows(&p, group));
  const int threads = work * a->q_heads * a->head_dim > SMALL_ATTENTION ? a->threads : 1;
  const int64_t segments = count_segments(a, &p, most_keys);
  const size_t starts = (size_t)(a->requests + 7) / 8 * 64;
  size_t parts = (size_t)(p.units * segments * p.rows_per_unit * p.stride) * sizeof(float);
  if (threads > 1 && p.units < threads * UNITS_PER_THREAD && segments > 1 && parts <= MOST_PARTS)
    p.segments = segments;
  else
    parts = 0;
  char *shared = quire_scratch(SCRATCH_ATTENTION_PLAN, starts + parts);
  if (!shared) return 5;
  p.starts = (int64_t *)shared;
  p.parts = (float *)(shared + starts);
  int64_t unit = 0;
  for (int64_t b = 0; b < a->requests; b++) {
    const int64_t length = a->query_start_loc[b + 1] - a->query_start_loc[b];
    ((int64_t *)shared)[b] = unit;
    unit += count_units(&p, length);
  }
  if (p.segments) {
    quire_run(part_tasks[a->dtype], &p, p.units * segments, threads);
    if (!p.failed) quire_run(merge_tasks[a->dtype], &p, p.units, 1);
  } else {
    quire_run(unit_tasks[a->dtype], &p, p.units, threads);
  }
  return p.failed ? 5 : 0;
}

int quire_paged_attention(const attention_args *a) {
  const int code = quire_check_attention(a);
  return code ? code : quire_attention_unchecked(a);
}

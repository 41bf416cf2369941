/* Paged attention: online softmax over 16-key tiles aligned to absolute positions.
 *
 * A unit of work is (request, kv head, run of query tokens); its rows are those tokens times the
 * query heads that share the kv head, so a tile of K and V is read once for all of them. What a row
 * computes depends on its own position only:
 *
 *   - the tiles it meets are those of its visible keys, in order, from multiples of TILE;
 *   - a score is four partial sums over d mod 4, combined as (0 + 1) + (2 + 3);
 *   - an output lane is one chain of fused multiply-adds over keys in order;
 *   - a masked key is skipped, never multiplied by zero: its bits may be NaN;
 *   - every SEGMENT keys the running state is closed and merged into the row's total, so that one
 *     long context can be shared among threads without changing a bit.
 *
 * How rows are blocked in registers, or whether a tile was first widened to fp32, moves no bit.
 * Scores are kept in units of log2(e), so that the exponential is a power of two.
 */
#include "kernels.h"

#define TILE 16 /* keys per step, aligned to absolute positions */
#define SEGMENT 2048      /* keys; part of the arithmetic, a multiple of TILE and block_size */
#define ROWS_PER_UNIT 32  /* rows aimed at in one unit of work */
#define ROW_BLOCK (VW == 16 ? 4 : 2)
#define PREFETCH 3 /* tiles ahead: block tables jump about, so the hardware cannot guess */
#define D_BLOCK 4 /* output vectors kept in registers per row */

typedef struct {
  int64_t request, kv_head, first_token, num_tokens;
} unit;

typedef struct { /* one thread's scratch; rows are padded to `width` floats */
  void *memory;
  float *q, *acc, *total, *keys, *values;
  float *sum, *total_sum, *scores; /* [rows, TILE] */
  float *max, *total_max;          /* [rows] */
  int64_t width;
} scratch;

typedef struct {
  const void *k, *v;
  int64_t k_stride, v_stride, v_width; /* v_width: lanes of a value row that may be read */
} tile;

typedef struct {
  int64_t begin, end;
} span;

/* ---- one tile ---- */

/* scores[r][0..16) = sum over d of q[r][d] * k[d][0..16). */
INLINE void score_rows(tile t, const float *q, int64_t width, int64_t head_dim, float *scores,
                       const int rows, const int dt) {
  for (int c = 0; c < TILE; c += VW) {
    vf acc[4][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < 4; i++) acc[r][i] = vset(0.0f);
    int64_t d = 0;
    for (; d + 4 <= head_dim; d += 4) {
      UNROLL for (int i = 0; i < 4; i++) {
        const vf k = vload(at(t.k, (d + i) * t.k_stride + c, dt), dt);
        UNROLL for (int r = 0; r < rows; r++)
          acc[r][i] = vfma(k, vset(q[r * width + d + i]), acc[r][i]);
      }
    }
    UNROLL for (int i = 0; i < 3; i++) {
      if (d + i < head_dim) {
        const vf k = vload(at(t.k, (d + i) * t.k_stride + c, dt), dt);
        UNROLL for (int r = 0; r < rows; r++)
          acc[r][i] = vfma(k, vset(q[r * width + d + i]), acc[r][i]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++)
      vstore(scores + r * TILE + c, (acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]), F32);
  }
}

/* acc[r][d..] += sum over keys in `keys` of p[r][key] * v[key][d..], `lanes` vectors at once. */
INLINE void weigh_block(tile t, const float *p, float *acc, int64_t width, int64_t d, span keys,
                        const int rows, const int lanes, const int dt) {
  vf sum[4][D_BLOCK];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < lanes; i++)
    sum[r][i] = vload(acc + r * width + d + i * VW, F32);
  for (int64_t j = keys.begin; j < keys.end; j++) {
    UNROLL for (int i = 0; i < lanes; i++) {
      const void *at_v = at(t.v, j * t.v_stride + d + i * VW, dt);
      const vf v = lanes > 1 ? vload(at_v, dt) : vload_upto(at_v, t.v_width - d, dt);
      UNROLL for (int r = 0; r < rows; r++) sum[r][i] = vfma(v, vset(p[r * TILE + j]), sum[r][i]);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < lanes; i++)
    vstore(acc + r * width + d + i * VW, sum[r][i], F32);
}

INLINE void weigh_rows(tile t, const float *p, float *acc, int64_t width, span keys, const int rows,
                       const int dt) {
  int64_t d = 0;
  for (; d + D_BLOCK * VW <= t.v_width; d += D_BLOCK * VW)
    weigh_block(t, p, acc, width, d, keys, rows, D_BLOCK, dt);
  for (; d < t.v_width; d += VW) weigh_block(t, p, acc, width, d, keys, rows, 1, dt);
}

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

static void scale_row(float *x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += VW) vstore(x + i, vload(x + i, F32) * factor, F32);
}

static float power_of_two(float x) { return vexp2(vset(x))[0]; }

static float max_of_tile(const float *s, float m) {
  float best[TILE];
  memcpy(best, s, sizeof best);
  for (int w = TILE / 2; w > 0; w >>= 1)
    for (int i = 0; i < w; i++) best[i] = best[i + w] > best[i] ? best[i + w] : best[i];
  return best[0] > m ? best[0] : m;
}

static __attribute__((noinline)) void raise_max(const scratch *s, int64_t row) {
  const float higher = max_of_tile(s->scores + row * TILE, s->max[row]);
  const float factor = power_of_two(s->max[row] - higher);
  scale_row(s->sum + row * TILE, TILE, factor);
  scale_row(s->acc + row * s->width, s->width, factor);
  s->max[row] = higher;
}

/* Turns a row's scores into weights relative to its running maximum, in place. When the maximum
 * rises, what was summed before is scaled down; otherwise the factor would be exactly 1. */
INLINE void softmax_row(const scratch *s, int64_t row, span keys, float softcap) {
  float *p = s->scores + row * TILE, *sum = s->sum + row * TILE;
  vf x[TILE / VW];
  int risen = 0;
  UNROLL for (int i = 0; i < TILE / VW; i++) x[i] = vload(p + i * VW, F32);
  if (softcap > 0.0f)
    UNROLL for (int i = 0; i < TILE / VW; i++) x[i] = vtanh(x[i]) * (softcap * LOG2E);
  if (keys.begin > 0 || keys.end < TILE)
    UNROLL for (int i = 0; i < TILE / VW; i++) {
      const vi lane = vlane_index() + i * VW;
      const vi visible = (lane >= (int32_t)keys.begin) & (lane < (int32_t)keys.end);
      x[i] = vselect(visible, x[i], vset(-INFINITY));
    }
  UNROLL for (int i = 0; i < TILE / VW; i++) risen |= vany_greater(x[i], vset(s->max[row]));
  if (risen) {
    UNROLL for (int i = 0; i < TILE / VW; i++) vstore(p + i * VW, x[i], F32);
    raise_max(s, row);
  }
  const vf max = vset(s->max[row]);
  UNROLL for (int i = 0; i < TILE / VW; i++) {
    /* A masked lane is zero even where the maximum is still -inf (and the difference is NaN). */
    const vf e = vselect((vi)(x[i] == -INFINITY), vset(0.0f), vexp2(x[i] - max));
    vstore(p + i * VW, e, F32);
    vstore(sum + i * VW, vload(sum + i * VW, F32) + e, F32);
  }
}

/* ---- one unit of work ---- */

INLINE span visible_keys(const attention_args *a, int64_t position) {
  return (span){a->window > 0 ? max64(0, position - a->window + 1) : 0, position + 1};
}

INLINE tile locate(const attention_args *a, const unit *u, int64_t first_key, const int dt) {
  const int32_t *table = a->block_table + u->request * a->table_stride;
  const int64_t block = table[first_key / a->block_size], offset = first_key % a->block_size;
  const int64_t head = block * a->kv_heads + u->kv_head;
  return (tile){at(a->k_cache, head * a->head_dim * a->block_size + offset, dt),
                at(a->v_cache, (head * a->block_size + offset) * a->head_dim, dt), a->block_size,
                a->head_dim, a->head_dim};
}

INLINE void prefetch(tile t, int64_t head_dim, const int dt) {
  const int64_t bytes = head_dim * TILE * (int64_t)elem_size(dt);
  const int64_t key_row = t.k_stride * (int64_t)elem_size(dt);
  if (t.k_stride == TILE)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)t.k + i, 0, 2);
  else
    for (int64_t d = 0; d < head_dim; d++) __builtin_prefetch((const char *)t.k + d * key_row, 0, 2);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)t.v + i, 0, 2);
}

/* The tile as fp32 in scratch, for units with so many rows that widening once pays. Exact. */
INLINE tile widen(tile t, const scratch *s, int64_t head_dim, const int dt) {
  for (int64_t d = 0; d < head_dim; d++)
    for (int c = 0; c < TILE; c += VW)
      vstore(s->keys + d * TILE + c, vload(at(t.k, d * t.k_stride + c, dt), dt), F32);
  for (int64_t j = 0; j < TILE; j++)
    for (int64_t d = 0; d < s->width; d += VW) {
      const vf v = d < head_dim ? vload_upto(at(t.v, j * t.v_stride + d, dt), head_dim - d, dt)
                                : vset(0.0f);
      vstore(s->values + j * s->width + d, v, F32);
    }
  return (tile){s->keys, s->values, TILE, s->width, s->width};
}

INLINE void attend_tile(const attention_args *a, const scratch *s, tile t, int64_t first_key,
                        int64_t first_position, int64_t rows, int64_t group, const int dt) {
  for (int64_t r = 0; r < rows;) {
    const float *q = s->q + r * s->width;
    float *scores = s->scores + r * TILE;
    if (rows - r >= ROW_BLOCK) {
      score_rows(t, q, s->width, a->head_dim, scores, ROW_BLOCK, dt);
      r += ROW_BLOCK;
    } else if (rows - r >= 2) {
      score_rows(t, q, s->width, a->head_dim, scores, 2, dt);
      r += 2;
    } else {
      score_rows(t, q, s->width, a->head_dim, scores, 1, dt);
      r += 1;
    }
  }
  const span whole = {0, TILE};
  int64_t full_rows = 0; /* rows of the open run that see the whole tile */
  for (int64_t r = 0; r <= rows; r++) {
    span keys = {0, 0};
    if (r < rows) {
      keys = visible_keys(a, first_position + r / group);
      keys.begin = max64(keys.begin - first_key, 0);
      keys.end = min64(keys.end - first_key, TILE);
      if (keys.begin < keys.end) softmax_row(s, r, keys, a->softcap);
    }
    const int full = keys.begin == 0 && keys.end == TILE;
    full_rows += full;
    const int64_t first = r + full - full_rows;
    if (full_rows == ROW_BLOCK) {
      weigh_rows(t, s->scores + first * TILE, s->acc + first * s->width, s->width, whole,
                 ROW_BLOCK, dt);
      full_rows = 0;
    } else if (!full) {
      for (int64_t i = first; i < r;) {
        float *p = s->scores + i * TILE, *acc = s->acc + i * s->width;
        if (r - i >= 2) {
          weigh_rows(t, p, acc, s->width, whole, 2, dt);
          i += 2;
        } else {
          weigh_rows(t, p, acc, s->width, whole, 1, dt);
          i += 1;
        }
      }
      full_rows = 0;
      if (keys.begin < keys.end)
        weigh_rows(t, s->scores + r * TILE, s->acc + r * s->width, s->width, keys, 1, dt);
    }
  }
}

/* One instance a dtype, so that the compiler specializes each once. */
#define ATTEND_TILE(name, dt)                                                                    \
  static __attribute__((noinline)) void name(const attention_args *a, const scratch *s, tile t,  \
                                             int64_t first_key, int64_t first_position,          \
                                             int64_t rows, int64_t group) {                      \
    attend_tile(a, s, t, first_key, first_position, rows, group, dt);                            \
  }
ATTEND_TILE(attend_tile_f32, F32)
ATTEND_TILE(attend_tile_bf16, BF16)
ATTEND_TILE(attend_tile_f16, F16)

static void open_segment(const scratch *s, int64_t rows) {
  memset(s->acc, 0, (size_t)(rows * s->width) * sizeof(float));
  memset(s->sum, 0, (size_t)(rows * TILE) * sizeof(float));
  for (int64_t r = 0; r < rows; r++) s->max[r] = -INFINITY;
}

/* total += segment, both relative to the larger of their maxima. */
static void close_segment(const scratch *s, int64_t row) {
  const float higher = s->max[row] > s->total_max[row] ? s->max[row] : s->total_max[row];
  const vf old = vset(power_of_two(s->total_max[row] - higher));
  const vf new = vset(power_of_two(s->max[row] - higher));
  float *sum = s->total_sum + row * TILE, *total = s->total + row * s->width;
  for (int64_t i = 0; i < TILE; i += VW) {
    const vf x = vload(s->sum + row * TILE + i, F32) * new;
    vstore(sum + i, vfma(vload(sum + i, F32), old, x), F32);
  }
  for (int64_t i = 0; i < s->width; i += VW) {
    const vf x = vload(s->acc + row * s->width + i, F32) * new;
    vstore(total + i, vfma(vload(total + i, F32), old, x), F32);
  }
  s->total_max[row] = higher;
}

INLINE void attend(const attention_args *a, const unit *u, const scratch *s, const int dt) {
  const int64_t group = a->q_heads / a->kv_heads, rows = u->num_tokens * group;
  const int64_t request_start = a->query_start_loc[u->request];
  const int64_t request_len = a->query_start_loc[u->request + 1] - request_start;
  const int64_t first_position = a->seq_lens[u->request] - request_len + u->first_token;
  const float factor = a->softcap > 0.0f ? a->scale / a->softcap : a->scale * LOG2E;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t token = request_start + u->first_token + r / group;
    const int64_t head = u->kv_head * group + r % group;
    const void *q = at(a->q, token * a->q_stride + head * a->head_dim, dt);
    for (int64_t d = 0; d < a->head_dim; d += VW)
      vstore(s->q + r * s->width + d, vload_upto(at(q, d, dt), a->head_dim - d, dt) * factor, F32);
    s->total_max[r] = -INFINITY;
  }
  memset(s->total, 0, (size_t)(rows * s->width) * sizeof(float));
  memset(s->total_sum, 0, (size_t)(rows * TILE) * sizeof(float));

  const int64_t begin = visible_keys(a, first_position).begin;
  const int64_t end = first_position + u->num_tokens;
  int64_t key = begin / TILE * TILE;
  while (key < end) {
    const int64_t segment = key / SEGMENT * SEGMENT;
    open_segment(s, rows);
    for (; key < min64(segment + SEGMENT, end); key += TILE) {
      const tile t = locate(a, u, key, dt);
      if (key + PREFETCH * TILE < end)
        prefetch(locate(a, u, key + PREFETCH * TILE, dt), a->head_dim, dt);
      if (dt == F32)
        attend_tile_f32(a, s, t, key, first_position, rows, group);
      else if (rows > ROW_BLOCK)
        attend_tile_f32(a, s, widen(t, s, a->head_dim, dt), key, first_position, rows, group);
      else if (dt == BF16)
        attend_tile_bf16(a, s, t, key, first_position, rows, group);
      else
        attend_tile_f16(a, s, t, key, first_position, rows, group);
    }
    for (int64_t r = 0; r < rows; r++) {
      const span keys = visible_keys(a, first_position + r / group);
      if (keys.begin < segment + SEGMENT && keys.end > segment) close_segment(s, r);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    float *sum = s->total_sum + r * TILE;
    for (int w = TILE / 2; w > 0; w >>= 1)
      for (int i = 0; i < w; i++) sum[i] += sum[i + w];
    const int64_t token = request_start + u->first_token + r / group;
    const int64_t head = u->kv_head * group + r % group;
    void *out = at_mut(a->out, (token * a->q_heads + head) * a->head_dim, dt);
    for (int64_t d = 0; d < a->head_dim; d += VW)
      vstore_upto(at_mut(out, d, dt), vload(s->total + r * s->width + d, F32) / sum[0],
                  a->head_dim - d, dt);
  }
}

/* ---- all units ---- */

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

static unit find_unit(const attention_args *a, const int64_t *starts, int64_t tokens_per_unit,
                      int64_t index) {
  int64_t low = 0, high = a->requests; /* the last request whose start is <= index */
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= index)
      low = middle;
    else
      high = middle;
  }
  const int64_t length = a->query_start_loc[low + 1] - a->query_start_loc[low];
  const int64_t runs = (length + tokens_per_unit - 1) / tokens_per_unit;
  const int64_t rest = index - starts[low];
  const int64_t run = runs - 1 - rest / a->kv_heads; /* the run that sees most keys first */
  const int64_t first = run * tokens_per_unit;
  return (unit){low, rest % a->kv_heads, first, min64(tokens_per_unit, length - first)};
}

static int open_scratch(scratch *s, int64_t rows, int64_t head_dim) {
  const int64_t width = (head_dim + 15) / 16 * 16;
  const int64_t floats = rows * (3 * width + 3 * TILE + 2) + 2 * TILE * width;
  s->memory = malloc((size_t)floats * sizeof(float) + 64);
  if (!s->memory) return 1;
  float *p = (float *)(((uintptr_t)s->memory + 63) / 64 * 64);
  s->width = width;
  s->q = p;
  s->acc = s->q + rows * width;
  s->total = s->acc + rows * width;
  s->keys = s->total + rows * width;
  s->values = s->keys + TILE * width;
  s->sum = s->values + TILE * width;
  s->total_sum = s->sum + rows * TILE;
  s->scores = s->total_sum + rows * TILE;
  s->max = s->scores + rows * TILE;
  s->total_max = s->max + rows;
  return 0;
}

int quire_check_attention(const attention_args *a) {
  int code = 0;
  for (int64_t b = 0; b < a->requests && !code; b++) code = check_request(a, b);
  return code;
}

int quire_attention_unchecked(const attention_args *a) {
  int64_t *starts = malloc((size_t)(a->requests + 1) * sizeof *starts);
  if (!starts) return 5;
  const int64_t group = a->q_heads / a->kv_heads;
  int64_t tokens_per_unit = max64(1, ROWS_PER_UNIT / group);
  if (tokens_per_unit > 4) tokens_per_unit -= tokens_per_unit % 4; /* whole row blocks */
  int64_t units = 0;
  int code = 0;
  for (int64_t b = 0; b < a->requests; b++) {
    const int64_t length = a->query_start_loc[b + 1] - a->query_start_loc[b];
    starts[b] = units;
    units += (length + tokens_per_unit - 1) / tokens_per_unit * a->kv_heads;
  }
  {
    const int threads = units < a->threads ? (int)max64(units, 1) : a->threads;
#pragma omp parallel num_threads(threads) reduction(| : code)
    {
      scratch s;
      code |= open_scratch(&s, tokens_per_unit * group, a->head_dim) ? 5 : 0;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < units; i++) {
        if (code) continue;
        const unit u = find_unit(a, starts, tokens_per_unit, i);
        if (a->dtype == F32)
          attend(a, &u, &s, F32);
        else if (a->dtype == BF16)
          attend(a, &u, &s, BF16);
        else
          attend(a, &u, &s, F16);
      }
      free(s.memory);
    }
  }
  free(starts);
  return code;
}

int quire_paged_attention(const attention_args *a) {
  const int code = quire_check_attention(a);
  return code ? code : quire_attention_unchecked(a);
}

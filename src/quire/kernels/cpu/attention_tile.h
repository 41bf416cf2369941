/* One tile of attention: TILE keys against a few rows, in registers.
 *
 * Keys and values are taken in steps. In bf16 a step is a pair of neighbours (two dimensions of a key,
 * or one dimension of two keys), which lie side by side in the cache for the instruction that
 * multiplies pairs; in fp32 and fp16 it is one element. What a step is multiplied with, a query's
 * elements or a key's weight, is one 32-bit word: a pair, or a float.
 *
 *   - a score is one chain of multiply-adds over the steps of d, in order;
 *   - an output lane is one chain over the steps of keys, in order;
 *   - a key that a row does not see is skipped, or masked out of its pair, never multiplied by zero:
 *     its bits may be NaN;
 *   - a row's maximum moves once a tile.
 *
 * How many rows and subtiles share a pass over K or V moves no bit.
 */
#ifndef QUIRE_ATTENTION_TILE_H
#define QUIRE_ATTENTION_TILE_H

#include "kernels.h"

#define TILE 64 /* keys, from multiples of TILE in absolute positions; part of the arithmetic */
#define SUB 16  /* keys that are contiguous whatever the block size */
#define SUBS (TILE / SUB)
#define SUM_LANES 16
#define MAX_ROWS (VW == 16 ? 6 : 4)
#define WIDE (VW == 16 ? SUBS : 1) /* subtiles scored in one pass */
#define D_BLOCK 4                  /* output vectors kept in registers per row */

typedef struct { /* subtiles that nobody sees point at one that somebody does */
  const void *k[SUBS], *v[SUBS];
  int64_t k_stride; /* elements from one step of d to the next */
} tile;

typedef struct {
  int64_t begin, end;
} span;

typedef struct { /* one row's running state is `stride` floats: acc[width], sum[SUM_LANES], max */
  float *rows;
  int64_t width, stride;
} state;

INLINE float *sum_of(state s, float *row) { return row + s.width; }
INLINE float *max_of(state s, float *row) { return row + s.width + SUM_LANES; }

INLINE int pack_of(const int dt) { return dt == BF16 ? 2 : 1; }
INLINE int is_empty(span s) { return s.begin >= s.end; }

INLINE vf load_step(const void *p, int64_t lanes, const int dt) {
  if (dt != BF16) return vload_upto(p, lanes, dt);
  return lanes >= VW ? (vf)vload_pairs(p) : vload_n(p, lanes, F32);
}

INLINE vf multiply_add(vf acc, vf step, vf word, const int dt) {
  return dt == BF16 ? vdot_pairs(acc, (vu)step, (vu)word) : vfma(step, word, acc);
}

/* ---- scores ---- */

/* scores[r][key] for `subs` subtiles from `first` on; q: [rows, steps]. */
INLINE void score_block(const tile *t, int first, const float *q, int64_t steps, float *scores,
                        const tile *next, const int rows, const int subs, const int dt) {
  for (int c = 0; c < SUB; c += VW) {
    vf acc[6][SUBS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < subs; s++)
      acc[r][s] = vset(0.0f);
    for (int64_t i = 0; i < steps; i++) {
      const int64_t offset = i * t->k_stride + c * pack_of(dt);
      vf k[SUBS];
      UNROLL for (int s = 0; s < subs; s++)
        k[s] = load_step(at(t->k[first + s], offset, dt), VW, dt);
      if (next)
        UNROLL for (int s = 0; s < subs; s++)
          __builtin_prefetch(at(next->k[first + s], offset, dt), 0, 2);
      UNROLL for (int r = 0; r < rows; r++) {
        const vf word = vset(q[r * steps + i]);
        UNROLL for (int s = 0; s < subs; s++) acc[r][s] = multiply_add(acc[r][s], k[s], word, dt);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < subs; s++)
      vstore(scores + r * TILE + (first + s) * SUB + c, acc[r][s], F32);
  }
}

INLINE void score_rows(const tile *t, span seen, const float *q, int64_t steps, float *scores,
                       const tile *next, const int rows, const int dt) {
  const int first = (int)(seen.begin / SUB), end = (int)((seen.end + SUB - 1) / SUB);
  if (WIDE == SUBS && end - first > (rows <= 3 ? 1 : SUBS - 1)) {
    score_block(t, 0, q, steps, scores, next, rows, SUBS, dt);
    return;
  }
  memset(scores, 0, (size_t)rows * TILE * sizeof *scores); /* of tiles that nobody sees */
  for (int s = first; s < end; s++) score_block(t, s, q, steps, scores, next, rows, 1, dt);
}

/* ---- weights ---- */

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

static float largest_lane(vf x) {
  float lanes[VW];
  memcpy(lanes, &x, sizeof lanes);
  for (int w = VW / 2; w > 0; w >>= 1)
    for (int i = 0; i < w; i++) lanes[i] = lanes[i + w] > lanes[i] ? lanes[i + w] : lanes[i];
  return lanes[0];
}

/* What sums relative to `from` are multiplied with to be relative to `to` >= from. */
static float rescaling(float from, float to) {
  return to == -INFINITY ? 1.0f : vexp2(vset(from - to))[0];
}

static __attribute__((noinline)) void raise_max(state s, float *row, float higher) {
  float *max = max_of(s, row);
  if (*max > -INFINITY) { /* else the sums are zero, or NaN for good */
    const vf factor = vset(rescaling(*max, higher));
    for (int64_t i = 0; i < s.width + SUM_LANES; i += VW)
      vstore(row + i, vload(row + i, F32) * factor, F32);
  }
  *max = higher;
}

/* Turns a row's scores, times `factor` in units of log2(e), into weights relative to its running
 * maximum, in place: TILE / pack words. A key outside `keys` weighs zero. */
INLINE void softmax_row(state s, float *row, float *scores, span keys, float factor, float softcap,
                        const int dt) {
  enum { N = TILE / VW, LANES = SUM_LANES / VW };
  vf x[N];
  UNROLL for (int i = 0; i < N; i++) x[i] = vload(scores + i * VW, F32) * factor;
  if (softcap > 0.0f)
    UNROLL for (int i = 0; i < N; i++) x[i] = vtanh(x[i]) * (softcap * LOG2E);
  if (keys.begin > 0 || keys.end < TILE)
    UNROLL for (int i = 0; i < N; i++) {
      const vi lane = vlane_index() + i * VW;
      const vi visible = (lane >= (int32_t)keys.begin) & (lane < (int32_t)keys.end);
      x[i] = vselect(visible, x[i], vset(-INFINITY));
    }
  vf best = x[0];
  UNROLL for (int i = 1; i < N; i++) best = vmax(best, x[i]);
  if (vany_greater(best, vset(*max_of(s, row)))) raise_max(s, row, largest_lane(best));
  const float max = *max_of(s, row);
  const vf base = vset(max == -INFINITY ? 0.0f : max);
  float *lanes = sum_of(s, row);
  vf sum[LANES];
  UNROLL for (int i = 0; i < LANES; i++) sum[i] = vload(lanes + i * VW, F32);
  if (dt == BF16) {
    const vu ones = (vu)vset(0.0f) + 0x3f803f80u;
    UNROLL for (int i = 0; i < N; i += 2) {
      const vu pairs = vpack_pairs(vexp2_rough(x[i] - base), vexp2_rough(x[i + 1] - base));
      memcpy(scores + i / 2 * VW, &pairs, sizeof pairs);
      sum[i / 2 % LANES] = vdot_pairs(sum[i / 2 % LANES], pairs, ones);
    }
  } else {
    UNROLL for (int i = 0; i < N; i++) {
      const vf e = vexp2(x[i] - base);
      vstore(scores + i * VW, e, F32);
      sum[i % LANES] = sum[i % LANES] + e;
    }
  }
  UNROLL for (int i = 0; i < LANES; i++) vstore(lanes + i * VW, sum[i], F32);
}

/* ---- values ---- */

/* acc[r][d..] += sum over `steps` of p[r][step] * v[step][d..], `vectors` vectors at once. */
INLINE void weigh_block(const tile *t, const float *p, state s, float *acc, int64_t d,
                        int64_t head_dim, span steps, const tile *next, const int rows,
                        const int vectors, const int dt) {
  const int64_t each = SUB / pack_of(dt);
  vf sum[6][D_BLOCK];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < vectors; i++)
    sum[r][i] = vload(acc + r * s.stride + d + i * VW, F32);
  for (int64_t j = steps.begin; j < steps.end;) {
    const int64_t sub = j / each, stop = min64(steps.end, (sub + 1) * each);
    for (; j < stop; j++) {
      const int64_t offset = ((j - sub * each) * head_dim + d) * pack_of(dt);
      vf v[D_BLOCK];
      UNROLL for (int i = 0; i < vectors; i++)
        v[i] = load_step(at(t->v[sub], offset + i * VW * pack_of(dt), dt),
                         vectors > 1 ? VW : head_dim - d, dt);
      if (next)
        UNROLL for (int i = 0; i < vectors; i++)
          __builtin_prefetch(at(next->v[sub], offset + i * VW * pack_of(dt), dt), 0, 2);
      UNROLL for (int r = 0; r < rows; r++) {
        const vf word = vset(p[r * TILE + j]);
        UNROLL for (int i = 0; i < vectors; i++) sum[r][i] = multiply_add(sum[r][i], v[i], word, dt);
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < vectors; i++)
    vstore(acc + r * s.stride + d + i * VW, sum[r][i], F32);
}

INLINE void weigh_rows(const tile *t, const float *p, state s, float *acc, int64_t head_dim,
                       span steps, const tile *next, const int rows, const int dt) {
  int64_t d = 0;
  for (; d + D_BLOCK * VW <= head_dim; d += D_BLOCK * VW)
    weigh_block(t, p, s, acc, d, head_dim, steps, next, rows, D_BLOCK, dt);
  for (; d + 2 * VW <= head_dim; d += 2 * VW)
    weigh_block(t, p, s, acc, d, head_dim, steps, next, rows, 2, dt);
  for (; d < head_dim; d += VW)
    weigh_block(t, p, s, acc, d, head_dim, steps, next, rows, 1, dt);
}

/* The pair of keys (2 * step, 2 * step + 1), of which only the half that `kept` masks is seen. */
static void weigh_half(const tile *t, const float *p, float *acc, int64_t head_dim, int64_t step,
                       uint32_t kept) {
  const int64_t sub = step / (SUB / 2), offset = (step - sub * (SUB / 2)) * head_dim * 2;
  for (int64_t d = 0; d < head_dim; d += VW) {
    const vf v = load_step(at(t->v[sub], offset + 2 * d, BF16), head_dim - d, BF16);
    const vf sum = vdot_pairs(vload(acc + d, F32), (vu)v & kept, (vu)vset(p[step]));
    vstore(acc + d, sum, F32);
  }
}

INLINE void weigh_span(const tile *t, const float *p, state s, float *acc, int64_t head_dim,
                       span keys, const int dt) {
  const int pack = pack_of(dt);
  if (keys.begin % pack) weigh_half(t, p, acc, head_dim, keys.begin++ / pack, 0xffff0000u);
  const span whole = {keys.begin / pack, keys.end / pack};
  if (!is_empty(whole)) weigh_rows(t, p, s, acc, head_dim, whole, NULL, 1, dt);
  if (keys.end > keys.begin && keys.end % pack)
    weigh_half(t, p, acc, head_dim, keys.end / pack, 0x0000ffffu);
}

/* One row's keys that its block does not share. */
#define WEIGH_REST(name, dt)                                                                  \
  static __attribute__((noinline)) void name(const tile *t, const float *p, state s, float *acc, \
                                             int64_t head_dim, span keys) {                   \
    weigh_span(t, p, s, acc, head_dim, keys, dt);                                             \
  }
WEIGH_REST(weigh_rest_f32, F32)
WEIGH_REST(weigh_rest_bf16, BF16)
WEIGH_REST(weigh_rest_f16, F16)

INLINE void weigh_rest(const tile *t, const float *p, state s, float *acc, int64_t head_dim,
                       span keys, const int dt) {
  if (is_empty(keys)) return;
  if (dt == F32)
    weigh_rest_f32(t, p, s, acc, head_dim, keys);
  else if (dt == BF16)
    weigh_rest_bf16(t, p, s, acc, head_dim, keys);
  else
    weigh_rest_f16(t, p, s, acc, head_dim, keys);
}

/* `rows` rows against one tile; keys: what each sees of it. */
INLINE void attend_rows(const tile *t, const float *q, int64_t head_dim, state s, float *acc,
                        const span *keys, float factor, float softcap, const tile *next,
                        const int rows, const int dt) {
  const int pack = pack_of(dt);
  float scores[6 * TILE];
  span seen = {TILE, 0}, shared = {0, TILE};
  for (int r = 0; r < rows; r++) {
    shared = (span){max64(shared.begin, keys[r].begin), min64(shared.end, keys[r].end)};
    if (!is_empty(keys[r]))
      seen = (span){min64(seen.begin, keys[r].begin), max64(seen.end, keys[r].end)};
  }
  if (is_empty(seen)) return;
  score_rows(t, seen, q, head_dim / pack, scores, next, rows, dt);
  for (int r = 0; r < rows; r++)
    if (!is_empty(keys[r]))
      softmax_row(s, acc + r * s.stride, scores + r * TILE, keys[r], factor, softcap, dt);

  span steps = {(shared.begin + pack - 1) / pack, shared.end / pack};
  if (is_empty(steps)) steps = (span){TILE / pack, TILE / pack};
  for (int r = 0; r < rows; r++)
    weigh_rest(t, scores + r * TILE, s, acc + r * s.stride, head_dim,
               (span){keys[r].begin, min64(keys[r].end, steps.begin * pack)}, dt);
  if (!is_empty(steps)) weigh_rows(t, scores, s, acc, head_dim, steps, next, rows, dt);
  for (int r = 0; r < rows; r++)
    weigh_rest(t, scores + r * TILE, s, acc + r * s.stride, head_dim,
               (span){max64(keys[r].begin, steps.end * pack), keys[r].end}, dt);
}

#endif

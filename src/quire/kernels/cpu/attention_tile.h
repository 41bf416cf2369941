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
#define D_BLOCK 8                  /* most output vectors kept in registers per row */

typedef struct { /* subtiles that nobody sees point at one that somebody does */
  const void *k[SUBS], *v[SUBS];
  int64_t k_stride; /* elements from one step of d to the next */
} tile;

typedef struct {
  int64_t begin, end;
} span;

typedef struct { /* a row's running state is `stride` floats: acc[width], sum[SUM_LANES], max */
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

/* Asks for the next tile's keys, four lines at each step of this tile, one subtile after the other,
 * into the second-level cache: in the first, lines of blocks that are a power of two apart evict each
 * other (measured: half the bandwidth). */
typedef struct {
  const tile *next;
  const char *line;
  int64_t hop, left; /* bytes from a step to the next; fours of steps left in the subtile */
  int sub;
} key_prefetch;

INLINE key_prefetch start_prefetch(const tile *next, int64_t steps, const int dt) {
  return (key_prefetch){next, next ? next->k[0] : NULL,
                        next ? next->k_stride * (int64_t)elem_size(dt) : 0, max64(steps / 4, 1), 0};
}

INLINE void prefetch_four_steps(key_prefetch *p, int64_t steps) {
  UNROLL for (int i = 0; i < 4; i++) __builtin_prefetch(p->line + i * p->hop, 0, 2);
  p->line += 4 * p->hop;
  if (--p->left == 0) {
    p->sub = (p->sub + 1) % SUBS;
    p->line = p->next->k[p->sub];
    p->left = max64(steps / 4, 1);
  }
}

/* scores[r][key] for `subs` subtiles from `first` on; q: [steps, rows]. */
INLINE void score(const tile *t, int first, const float *q, int64_t steps, float *scores,
                  const tile *next, const int rows, const int subs, const int dt) {
  for (int c = 0; c < SUB; c += VW) {
    vf acc[6][SUBS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < subs; s++)
      acc[r][s] = vset(0.0f);
    key_prefetch ahead = start_prefetch(next, steps, dt);
    for (int64_t i = 0; i < steps; i++) {
      const int64_t offset = i * t->k_stride + c * pack_of(dt);
      vf k[SUBS];
      UNROLL for (int s = 0; s < subs; s++)
        k[s] = load_step(at(t->k[first + s], offset, dt), VW, dt);
      if (subs == SUBS && next) prefetch_four_steps(&ahead, steps);
      UNROLL for (int r = 0; r < rows; r++) {
        const vf word = vset(q[i * rows + r]);
        UNROLL for (int s = 0; s < subs; s++) acc[r][s] = multiply_add(acc[r][s], k[s], word, dt);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < subs; s++)
      vstore(scores + r * TILE + (first + s) * SUB + c, acc[r][s], F32);
  }
}

/* ---- weights ---- */

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
INLINE void soften(state s, float *row, float *scores, span keys, float factor, float softcap,
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
  if (vany_greater(best, vset(*max_of(s, row)))) raise_max(s, row, vlargest(best));
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

INLINE void weigh(const tile *t, const float *p, state s, float *acc, int64_t head_dim,
                       span steps, const tile *next, const int rows, const int dt) {
  int64_t d = 0;
  if (VW == 16 && rows <= 3) /* a whole row of V at once: memory is read in order */
    for (; d + D_BLOCK * VW <= head_dim; d += D_BLOCK * VW)
      weigh_block(t, p, s, acc, d, head_dim, steps, next, rows, D_BLOCK, dt);
  for (; d + 4 * VW <= head_dim; d += 4 * VW)
    weigh_block(t, p, s, acc, d, head_dim, steps, next, rows, 4, dt);
  for (; d + 2 * VW <= head_dim; d += 2 * VW)
    weigh_block(t, p, s, acc, d, head_dim, steps, next, rows, 2, dt);
  for (; d < head_dim; d += VW)
    weigh_block(t, p, s, acc, d, head_dim, steps, next, rows, 1, dt);
}

/* ---- one instance each, so that registers are allotted to each alone ---- */

#define NOINLINE static __attribute__((noinline))
#define INSTANCES(rows, dt)                                                                       \
  NOINLINE void score_wide_##rows##_##dt(const tile *t, const float *q, int64_t steps,            \
                                         float *scores, const tile *next) {                       \
    score(t, 0, q, steps, scores, next, rows, WIDE, dt);                                          \
  }                                                                                               \
  NOINLINE void score_sub_##rows##_##dt(const tile *t, int sub, const float *q, int64_t steps,    \
                                        float *scores) {                                          \
    score(t, sub, q, steps, scores, NULL, rows, 1, dt);                                           \
  }                                                                                               \
  NOINLINE void weigh_##rows##_##dt(const tile *t, const float *p, state s, float *acc,           \
                                    int64_t head_dim, span steps, const tile *next) {             \
    weigh(t, p, s, acc, head_dim, steps, next, rows, dt);                                         \
  }
#define INSTANCES_OF(dt)                                                                          \
  INSTANCES(1, dt) INSTANCES(2, dt) INSTANCES(3, dt) INSTANCES(4, dt) INSTANCES(6, dt)            \
  NOINLINE void soften_##dt(state s, float *row, float *scores, span keys, float factor,          \
                            float softcap) {                                                      \
    soften(s, row, scores, keys, factor, softcap, dt);                                            \
  }
INSTANCES_OF(F32)
INSTANCES_OF(BF16)
INSTANCES_OF(F16)

typedef struct {
  void (*score_wide[7])(const tile *, const float *, int64_t, float *, const tile *);
  void (*score_sub[7])(const tile *, int, const float *, int64_t, float *);
  void (*weigh[7])(const tile *, const float *, state, float *, int64_t, span, const tile *);
  void (*soften)(state, float *, float *, span, float, float);
  int pack;
} tile_kernels; /* by number of rows */

#define BY_ROWS(name, dt) \
  {NULL, name##_1_##dt, name##_2_##dt, name##_3_##dt, name##_4_##dt, NULL, name##_6_##dt}
#define KERNELS_OF(dt)                                                                            \
  [dt] = {BY_ROWS(score_wide, dt), BY_ROWS(score_sub, dt), BY_ROWS(weigh, dt), soften_##dt,       \
          dt == BF16 ? 2 : 1}
static const tile_kernels kernels_of[3] = {KERNELS_OF(F32), KERNELS_OF(BF16), KERNELS_OF(F16)};

/* The largest number of rows, of at most `left`, that there are instances for. */
INLINE int64_t rows_at_once(int64_t left) { return left >= MAX_ROWS ? MAX_ROWS : left == 5 ? 4 : left; }

/* ---- some rows against one tile ---- */

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

/* One row's keys that its block does not share. */
static void weigh_rest(const tile_kernels *f, const tile *t, const float *p, state s, float *acc,
                       int64_t head_dim, span keys) {
  if (is_empty(keys)) return;
  if (keys.begin % f->pack) weigh_half(t, p, acc, head_dim, keys.begin++ / f->pack, 0xffff0000u);
  const span whole = {keys.begin / f->pack, keys.end / f->pack};
  if (!is_empty(whole)) f->weigh[1](t, p, s, acc, head_dim, whole, NULL);
  if (keys.end > keys.begin && keys.end % f->pack)
    weigh_half(t, p, acc, head_dim, keys.end / f->pack, 0x0000ffffu);
}

/* keys: what each of the rows sees of the tile. q: [steps, rows]. */
static void attend_rows(const tile_kernels *f, const tile *t, const float *q, int64_t head_dim,
                        state s, float *acc, const span *keys, float factor, float softcap,
                        const tile *next, int64_t rows) {
  const int pack = f->pack;
  const int64_t steps = head_dim / pack;
  float scores[6 * TILE];
  span seen = {TILE, 0}, shared = {0, TILE};
  for (int64_t r = 0; r < rows; r++) {
    shared = (span){max64(shared.begin, keys[r].begin), min64(shared.end, keys[r].end)};
    if (!is_empty(keys[r]))
      seen = (span){min64(seen.begin, keys[r].begin), max64(seen.end, keys[r].end)};
  }
  if (is_empty(seen)) return;

  const int first = (int)(seen.begin / SUB), end = (int)((seen.end + SUB - 1) / SUB);
  if (WIDE == SUBS && end - first > (rows <= 3 ? 1 : SUBS - 1)) {
    f->score_wide[rows](t, q, steps, scores, next);
  } else {
    memset(scores, 0, (size_t)rows * TILE * sizeof *scores);
    for (int sub = first; sub < end; sub++) f->score_sub[rows](t, sub, q, steps, scores);
  }
  for (int64_t r = 0; r < rows; r++)
    if (!is_empty(keys[r]))
      f->soften(s, acc + r * s.stride, scores + r * TILE, keys[r], factor, softcap);

  span whole = {(shared.begin + pack - 1) / pack, shared.end / pack}; /* steps all rows see */
  if (is_empty(whole)) whole = (span){TILE / pack, TILE / pack};
  for (int64_t r = 0; r < rows; r++)
    weigh_rest(f, t, scores + r * TILE, s, acc + r * s.stride, head_dim,
               (span){keys[r].begin, min64(keys[r].end, whole.begin * pack)});
  if (!is_empty(whole)) f->weigh[rows](t, scores, s, acc, head_dim, whole, next);
  for (int64_t r = 0; r < rows; r++)
    weigh_rest(f, t, scores + r * TILE, s, acc + r * s.stride, head_dim,
               (span){max64(keys[r].begin, whole.end * pack), keys[r].end});
}

#endif

/* One tile of attention: the scores, exponentials and P·V of TILE keys for a few query rows, in registers.
 *
 * The unit of a sum is a 32-bit word. In bf16 a word is a pair of neighbours (two dimensions of a query or
 * key, or one dimension of the values of two keys): they lie side by side in the cache, and one instruction
 * multiplies and adds the pairs. In fp32 and fp16 a word is one element, widened to float.
 *
 *   - a score is one chain of multiply-adds over the words of head_dim, in order;
 *   - an output lane is one chain of multiply-adds over the words of keys, in order;
 *   - a key that a row does not see is skipped, or masked out of its pair. It is never multiplied by zero,
 *     because its bits may be NaN;
 *   - a row's running maximum changes at most once a tile.
 *
 * So the number of rows and subtiles that share a pass over K or V changes no bit.
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

typedef struct { /* a subtile that no row sees points at one that some row sees, so that it can be read */
  const void *k[SUBS], *v[SUBS];
  int64_t k_stride; /* elements from one word of a key to the next */
} tile;

typedef struct { /* of keys or of words, [begin, end) */
  int64_t begin, end;
} range;

typedef struct { /* a row's softmax state is `stride` floats: acc[width], sum[SUM_LANES], max */
  int64_t width, stride;
} row_layout;

INLINE float *sum_of(row_layout s, float *row) { return row + s.width; }
INLINE float *max_of(row_layout s, float *row) { return row + s.width + SUM_LANES; }

INLINE int pack_of(const int dt) { return dt == BF16 ? 2 : 1; }
INLINE int is_empty(range s) { return s.begin >= s.end; }

INLINE vf load_words(const void *p, int64_t lanes, const int dt) {
  if (dt != BF16) return vload_upto(p, lanes, dt);
  return lanes >= VW ? (vf)vload_pairs(p) : vload_n(p, lanes, F32);
}

INLINE vf multiply_add(vf acc, vf lanes, vf word, const int dt) {
  return dt == BF16 ? vdot_pairs(acc, (vu)lanes, (vu)word) : vfma(lanes, word, acc);
}

/* ---- scores ---- */

/* Prefetches the next tile's keys while this tile is scored: four cache lines for every word, one subtile
 * after the other. Into the second-level cache: in the first, lines of blocks whose distance is a power
 * of two evict each other (measured: half the bandwidth). */
typedef struct {
  const tile *next;
  const char *line;
  int64_t hop, left; /* bytes from a word to the next; groups of four words left in the subtile */
  int sub;
} key_prefetch;

INLINE key_prefetch start_prefetch(const tile *next, int64_t words, const int dt) {
  return (key_prefetch){next, next ? next->k[0] : NULL,
                        next ? next->k_stride * (int64_t)elem_size(dt) : 0, max64(words / 4, 1), 0};
}

INLINE void prefetch_four_words(key_prefetch *p, int64_t words) {
  UNROLL for (int i = 0; i < 4; i++) __builtin_prefetch(p->line + i * p->hop, 0, 2);
  p->line += 4 * p->hop;
  if (--p->left == 0) {
    p->sub = (p->sub + 1) % SUBS;
    p->line = p->next->k[p->sub];
    p->left = max64(words / 4, 1);
  }
}

/* scores[r][key] for `subs` subtiles from `first` on; q: [words, rows]. */
INLINE void score(const tile *t, int first, const float *q, int64_t words, float *scores,
                  const tile *next, const int rows, const int subs, const int dt) {
  for (int c = 0; c < SUB; c += VW) {
    vf acc[6][SUBS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < subs; s++)
      acc[r][s] = vset(0.0f);
    key_prefetch ahead = start_prefetch(next, words, dt);
    for (int64_t i = 0; i < words; i++) {
      const int64_t offset = i * t->k_stride + c * pack_of(dt);
      vf k[SUBS];
      UNROLL for (int s = 0; s < subs; s++)
        k[s] = load_words(at(t->k[first + s], offset, dt), VW, dt);
      if (subs == SUBS && next) prefetch_four_words(&ahead, words);
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

/* The factor by which sums relative to maximum `from` become relative to `to` >= from. */
static float rescaling(float from, float to) {
  return to == -INFINITY ? 1.0f : vexp2(vset(from - to))[0];
}

static __attribute__((noinline)) void raise_max(row_layout s, float *row, float higher) {
  float *max = max_of(s, row);
  if (*max > -INFINITY) { /* else the sums are zero, or stay NaN */
    const vf factor = vset(rescaling(*max, higher));
    for (int64_t i = 0; i < s.width + SUM_LANES; i += VW)
      vstore(row + i, vload(row + i, F32) * factor, F32);
  }
  *max = higher;
}

/* Replaces a row's scores by exp(score * factor - its running maximum), packed into TILE / pack words, or rounded
 * as floats (is_widened). The product is in units of log2(e). Keys outside `keys` give 0. */
INLINE void exponentials(row_layout s, float *row, float *scores, range keys, float factor,
                         float softcap, const int dt, const int is_widened) {
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
      if (is_widened) {
        vh halves[2];
        memcpy(halves, &pairs, sizeof pairs);
        vstore(scores + i * VW, vfloat_from_bf16(halves[0]), F32);
        vstore(scores + (i + 1) * VW, vfloat_from_bf16(halves[1]), F32);
      } else {
        memcpy(scores + i / 2 * VW, &pairs, sizeof pairs);
      }
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

/* P·V: acc[r][d..] += sum over `words` of p[r][word] * v[word][d..], for `vectors` vectors of d. */
INLINE void add_pv_block(const tile *t, const float *p, row_layout s, float *acc, int64_t d,
                         int64_t head_dim, range words, const tile *next, const int rows,
                         const int vectors, const int dt) {
  const int64_t each = SUB / pack_of(dt);
  vf sum[6][D_BLOCK];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < vectors; i++)
    sum[r][i] = vload(acc + r * s.stride + d + i * VW, F32);
  for (int64_t j = words.begin; j < words.end;) {
    const int64_t sub = j / each, stop = min64(words.end, (sub + 1) * each);
    for (; j < stop; j++) {
      const int64_t offset = ((j - sub * each) * head_dim + d) * pack_of(dt);
      vf v[D_BLOCK];
      UNROLL for (int i = 0; i < vectors; i++)
        v[i] = load_words(at(t->v[sub], offset + i * VW * pack_of(dt), dt),
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

INLINE void add_pv(const tile *t, const float *p, row_layout s, float *acc, int64_t head_dim,
                   range words, const tile *next, const int rows, const int dt) {
  int64_t d = 0;
  if (VW == 16 && rows <= 3) /* a whole row of V at once: memory is read in order */
    for (; d + D_BLOCK * VW <= head_dim; d += D_BLOCK * VW)
      add_pv_block(t, p, s, acc, d, head_dim, words, next, rows, D_BLOCK, dt);
  for (; d + 4 * VW <= head_dim; d += 4 * VW)
    add_pv_block(t, p, s, acc, d, head_dim, words, next, rows, 4, dt);
  for (; d + 2 * VW <= head_dim; d += 2 * VW)
    add_pv_block(t, p, s, acc, d, head_dim, words, next, rows, 2, dt);
  for (; d < head_dim; d += VW)
    add_pv_block(t, p, s, acc, d, head_dim, words, next, rows, 1, dt);
}

/* ---- an instance for each number of rows and dtype: the compiler allots registers to each ---- */

#define NOINLINE static __attribute__((noinline))
#define INSTANCES(rows, dt)                                                                       \
  NOINLINE void score_wide_##rows##_##dt(const tile *t, const float *q, int64_t words,            \
                                         float *scores, const tile *next) {                       \
    score(t, 0, q, words, scores, next, rows, WIDE, dt);                                          \
  }                                                                                               \
  NOINLINE void score_sub_##rows##_##dt(const tile *t, int sub, const float *q, int64_t words,    \
                                        float *scores) {                                          \
    score(t, sub, q, words, scores, NULL, rows, 1, dt);                                           \
  }                                                                                               \
  NOINLINE void add_pv_##rows##_##dt(const tile *t, const float *p, row_layout s, float *acc,     \
                                     int64_t head_dim, range words, const tile *next) {           \
    add_pv(t, p, s, acc, head_dim, words, next, rows, dt);                                        \
  }
#define EXPONENTIALS(name, dt, is_widened)                                                        \
  NOINLINE void name(row_layout s, float *row, float *scores, range keys, float factor,           \
                     float softcap) {                                                             \
    exponentials(s, row, scores, keys, factor, softcap, dt, is_widened);                          \
  }
#define INSTANCES_OF(dt)                                                                          \
  INSTANCES(1, dt) INSTANCES(2, dt) INSTANCES(3, dt) INSTANCES(4, dt) INSTANCES(6, dt)            \
  EXPONENTIALS(exponentials_##dt, dt, 0)
INSTANCES_OF(F32)
INSTANCES_OF(BF16)
INSTANCES_OF(F16)

typedef struct {
  void (*score_wide[7])(const tile *, const float *, int64_t, float *, const tile *);
  void (*score_sub[7])(const tile *, int, const float *, int64_t, float *);
  void (*add_pv[7])(const tile *, const float *, row_layout, float *, int64_t, range, const tile *);
  void (*exponentials)(row_layout, float *, float *, range, float, float);
  int pack;
} tile_kernels; /* by number of rows */

#define BY_ROWS(name, dt) \
  {NULL, name##_1_##dt, name##_2_##dt, name##_3_##dt, name##_4_##dt, NULL, name##_6_##dt}
#define KERNELS_OF(dt)                                                                            \
  [dt] = {BY_ROWS(score_wide, dt), BY_ROWS(score_sub, dt), BY_ROWS(add_pv, dt),                   \
          exponentials_##dt, dt == BF16 ? 2 : 1}
static const tile_kernels kernels_of[3] = {KERNELS_OF(F32), KERNELS_OF(BF16), KERNELS_OF(F16)};

/* ---- bfloat16 without dot products: a tile is widened once for many rows ---- */

EXPONENTIALS(exponentials_widened, BF16, 1)

/* Products of floats, each chain in the order of vdot_pairs: the bits are those of KERNELS_OF(BF16). */
static const tile_kernels widened_kernels = {BY_ROWS(score_wide, F32), BY_ROWS(score_sub, F32),
                                             BY_ROWS(add_pv, F32), exponentials_widened, 1};

/* k: [head_dim][TILE], v: [TILE][head_dim]. Returns a tile that points to them. */
NOINLINE tile widen_tile(const tile *t, int64_t head_dim, float *k, float *v) {
  tile wide = {.k_stride = TILE};
  for (int s = 0; s < SUBS; s++) {
    wide.k[s] = k + s * SUB;
    wide.v[s] = v + s * SUB * head_dim;
    for (int64_t i = 0; i < head_dim / 2; i++)
      for (int c = 0; c < SUB; c += VW) {
        const vu pairs = vload_pairs(at(t->k[s], i * t->k_stride + 2 * c, BF16));
        float *to = k + 2 * i * TILE + s * SUB + c;
        vstore(to, (vf)(pairs << 16), F32);
        vstore(to + TILE, (vf)(pairs & 0xffff0000u), F32);
      }
    for (int64_t j = 0; j < SUB / 2; j++) {
      float *to = v + (s * SUB + 2 * j) * head_dim;
      for (int64_t d = 0; d < head_dim; d += VW) {
        const vu pairs = (vu)load_words(at(t->v[s], 2 * (j * head_dim + d), BF16), head_dim - d, BF16);
        vstore_upto(to + d, (vf)(pairs << 16), head_dim - d, F32);
        vstore_upto(to + head_dim + d, (vf)(pairs & 0xffff0000u), head_dim - d, F32);
      }
    }
  }
  return wide;
}

/* ---- keys and values in 8 bits: a tile is unpacked once for all rows ---- */

/* Lanes of pairs of bytes as two vectors, or as one of pairs of bfloat16, over 256. Returns which are NaN. */
INLINE vh unpack_bytes(const void *from, int64_t pairs, float *first, float *second, const int in_pairs,
                       const int has_nan) {
  vh both = {0};
  memcpy(&both, from, (size_t)(pairs < VW ? pairs : VW) * 2);
  vf x = vf8_over_256(both << 8), y = vf8_over_256(both);
  if (has_nan) x = vfloat_from_f8(both & 0xff) / 256.0f, y = vfloat_from_f8(both >> 8) / 256.0f;
  if (in_pairs) {
    vstore_upto(first, (vf)(((vu)y & 0xffff0000u) | ((vu)x >> 16)), pairs, F32);
  } else {
    vstore_upto(first, x, pairs, F32);
    vstore_upto(second, y, pairs, F32);
  }
  return vf8_nan(both);
}

/* k: [head_dim][TILE] or [head_dim / 2][TILE] pairs; v: [TILE][head_dim] or [TILE / 2][head_dim] pairs. Returns
 * whether a value is NaN. k_stride of `t` is in bytes. */
INLINE int unpack_tile(const tile *t, int64_t head_dim, float *k, float *v, const tile *next, const int in_pairs,
                       const int has_nan) {
  vh nan = {0};
  for (int s = 0; s < SUBS; s++) {
    for (int64_t i = 0; i < head_dim / 2; i++) {
      float *to = k + (in_pairs ? i : 2 * i) * TILE + s * SUB;
      if (next && i % 2 == 0) __builtin_prefetch((const char *)next->k[s] + i * t->k_stride, 0, 2);
      UNROLL for (int c = 0; c < SUB; c += VW)
        nan |= unpack_bytes((const char *)t->k[s] + i * t->k_stride + 2 * c, VW, to + c, to + TILE + c, in_pairs, has_nan);
    }
    for (int64_t j = s * SUB / 2; j < (s + 1) * SUB / 2; j++) {
      const int64_t line = 2 * (j - s * SUB / 2) * head_dim;
      float *to = v + (in_pairs ? j : 2 * j) * head_dim;
      for (int64_t d = 0; d < head_dim; d += VW) {
        if (next && d / VW % 2 == 0) __builtin_prefetch((const char *)next->v[s] + line + 2 * d, 0, 2);
        nan |= unpack_bytes((const char *)t->v[s] + line + 2 * d, head_dim - d, to + d, to + head_dim + d, in_pairs, has_nan);
      }
    }
  }
  return vany((vi)vwiden(nan));
}

/* One instance for each form, to pairs of bfloat16 or to floats. spare: 2 * TILE * head_dim floats. */
#define UNPACK(name, in_pairs)                                                                    \
  NOINLINE tile name(const tile *t, int64_t head_dim, float *spare, const tile *next) {           \
    float *k = spare, *v = spare + TILE * head_dim;                                               \
    if (unpack_tile(t, head_dim, k, v, next, in_pairs, 0))                                        \
      unpack_tile(t, head_dim, k, v, NULL, in_pairs, 1);                                          \
    tile out = {.k_stride = in_pairs ? 2 * TILE : TILE};                                          \
    for (int s = 0; s < SUBS; s++)                                                                \
      out.k[s] = k + s * SUB, out.v[s] = v + s * SUB * (in_pairs ? head_dim / 2 : head_dim);      \
    return out;                                                                                   \
  }
UNPACK(unpack_to_pairs, 1)
UNPACK(unpack_to_floats, 0)

/* The largest number of rows, of at most `left`, that there are instances for. */
INLINE int64_t rows_at_once(int64_t left) { return left >= MAX_ROWS ? MAX_ROWS : left == 5 ? 4 : left; }

/* ---- some rows against one tile ---- */

/* P·V of keys 2 * word and 2 * word + 1, of which the row sees the one whose bits `kept` keeps. */
static void add_pv_half(const tile *t, const float *p, float *acc, int64_t head_dim, int64_t word,
                        uint32_t kept) {
  const int64_t sub = word / (SUB / 2), offset = (word - sub * (SUB / 2)) * head_dim * 2;
  for (int64_t d = 0; d < head_dim; d += VW) {
    const vf v = load_words(at(t->v[sub], offset + 2 * d, BF16), head_dim - d, BF16);
    const vf sum = vdot_pairs(vload(acc + d, F32), (vu)v & kept, (vu)vset(p[word]));
    vstore(acc + d, sum, F32);
  }
}

/* P·V of the keys that one row sees and other rows of its block do not. */
static void add_pv_rest(const tile_kernels *f, const tile *t, const float *p, row_layout s,
                        float *acc, int64_t head_dim, range keys) {
  if (is_empty(keys)) return;
  if (keys.begin % f->pack) add_pv_half(t, p, acc, head_dim, keys.begin++ / f->pack, 0xffff0000u);
  const range whole = {keys.begin / f->pack, keys.end / f->pack};
  if (!is_empty(whole)) f->add_pv[1](t, p, s, acc, head_dim, whole, NULL);
  if (keys.end > keys.begin && keys.end % f->pack)
    add_pv_half(t, p, acc, head_dim, keys.end / f->pack, 0x0000ffffu);
}

/* keys: those of the tile that each row sees. q: [words, rows]. */
static void attend_rows(const tile_kernels *f, const tile *t, const float *q, int64_t head_dim,
                        row_layout s, float *acc, const range *keys, float factor, float softcap,
                        const tile *next, int64_t rows) {
  const int pack = f->pack;
  const int64_t words = head_dim / pack;
  float scores[6 * TILE];
  range seen = {TILE, 0}, shared = {0, TILE};
  for (int64_t r = 0; r < rows; r++) {
    shared = (range){max64(shared.begin, keys[r].begin), min64(shared.end, keys[r].end)};
    if (!is_empty(keys[r]))
      seen = (range){min64(seen.begin, keys[r].begin), max64(seen.end, keys[r].end)};
  }
  if (is_empty(seen)) return;

  const int first = (int)(seen.begin / SUB), end = (int)((seen.end + SUB - 1) / SUB);
  if (WIDE == SUBS && end - first > (rows <= 3 ? 1 : SUBS - 1)) {
    f->score_wide[rows](t, q, words, scores, next);
  } else {
    memset(scores, 0, (size_t)rows * TILE * sizeof *scores);
    for (int sub = first; sub < end; sub++) f->score_sub[rows](t, sub, q, words, scores);
  }
  for (int64_t r = 0; r < rows; r++)
    if (!is_empty(keys[r]))
      f->exponentials(s, acc + r * s.stride, scores + r * TILE, keys[r], factor, softcap);

  range whole = {(shared.begin + pack - 1) / pack, shared.end / pack}; /* words that all rows see */
  if (is_empty(whole)) whole = (range){TILE / pack, TILE / pack};
  for (int64_t r = 0; r < rows; r++)
    add_pv_rest(f, t, scores + r * TILE, s, acc + r * s.stride, head_dim,
               (range){keys[r].begin, min64(keys[r].end, whole.begin * pack)});
  if (!is_empty(whole)) f->add_pv[rows](t, scores, s, acc, head_dim, whole, next);
  for (int64_t r = 0; r < rows; r++)
    add_pv_rest(f, t, scores + r * TILE, s, acc + r * s.stride, head_dim,
               (range){max64(keys[r].begin, whole.end * pack), keys[r].end});
}

#endif

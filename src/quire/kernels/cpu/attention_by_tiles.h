/* One tile of keys (attention_tile.h) for up to 16 query rows, by tile operations (tiles.h), in bfloat16.
 *
 * The cache has the layout that the operations need: sixteen keys are a B operand for every 32 dimensions, and
 * the values of sixteen keys are one, of half the rows, for every 16 dimensions.
 *
 *   - a score is a chain of operations over 32 dimensions each, in order;
 *   - an output lane is a chain of operations over 16 keys each, in order;
 *   - a key that a row does not see has the weight zero. Its value may be NaN, so values of keys that no row sees
 *     are replaced by zero, and where one that some row sees is not finite, each row is computed alone.
 *
 * Zero times a finite value changes no sum. So the rows that share a tile, and the keys behind the last one,
 * change no bit.
 */
#ifndef QUIRE_ATTENTION_BY_TILES_H
#define QUIRE_ATTENTION_BY_TILES_H

#include "attention_tile.h"
#include "tiles.h"

#define SUB_PAIRS (SUB / 2)
#define SCORE_STRIDE (TILE * 4) /* bytes from a row of scores to the next */

/* Whether all products of this head_dim can be made by tile operations. */
INLINE int fits_tiles(int64_t head_dim) { return head_dim % TILE_K == 0; }

INLINE void prefetch_lines(const void *from, int64_t stride, int lines) {
  for (int i = 0; i < lines; i++) __builtin_prefetch((const char *)from + i * stride, 0, 2);
}

/* scores [16][TILE] of subtiles [first, end). q: [16][head_dim]. */
INLINE void score_by_tiles(tile_file *f, const tile *t, int first, int end, const char *q,
                           int64_t head_dim, float *scores, const tile *next, const int kind) {
  const int64_t row = t->k_stride * 2; /* bytes between two pairs of dimensions */
  for (int s = first; s < end; s++) {
    tile_zero(f, 0, kind);
    for (int64_t d = 0; d < head_dim; d += TILE_K) {
      tile_load(f, 4, q + d * 2, head_dim * 2, kind);
      tile_load(f, 5, (const char *)t->k[s] + d / 2 * row, row, kind);
      if (next) prefetch_lines((const char *)next->k[s] + d / 2 * row, row, TILE_ROWS);
      tile_dot(f, 0, 4, 5, kind);
    }
    tile_store(f, 0, scores + s * SUB, SCORE_STRIDE, kind);
  }
}

/* Four or two tiles of 16 dimensions: acc [16][s.stride] += weights [16][TILE] * v. `c` is a constant. */
INLINE void weigh_dimensions(tile_file *f, const void *const v[SUBS], int first, int end, const void *weights,
                             row_layout s, float *acc, int64_t d, int64_t head_dim, const tile *next,
                             const int tiles, const int kind) {
  const int64_t stride = s.stride * 4, row = head_dim * 4;
  tile_load(f, 0, acc + d, stride, kind);
  tile_load(f, 1, acc + d + 16, stride, kind);
  if (tiles == 4) {
    tile_load(f, 2, acc + d + 32, stride, kind);
    tile_load(f, 3, acc + d + 48, stride, kind);
  }
  for (int i = first; i < end; i++) {
    const char *from = (const char *)v[i] + d * 4;
    tile_load(f, 6, (const char *)weights + i * SUB * 2, SCORE_STRIDE, kind);
    tile_load(f, 7, from, row, kind);
    tile_dot(f, 0, 6, 7, kind);
    tile_load(f, 7, from + 64, row, kind);
    tile_dot(f, 1, 6, 7, kind);
    if (tiles == 4) {
      tile_load(f, 7, from + 128, row, kind);
      tile_dot(f, 2, 6, 7, kind);
      tile_load(f, 7, from + 192, row, kind);
      tile_dot(f, 3, 6, 7, kind);
    }
    if (next)
      for (int c = 0; c < tiles; c++)
        prefetch_lines((const char *)next->v[i] + d * 4 + c * 64, row, SUB_PAIRS);
  }
  tile_store(f, 0, acc + d, stride, kind);
  tile_store(f, 1, acc + d + 16, stride, kind);
  if (tiles == 4) {
    tile_store(f, 2, acc + d + 32, stride, kind);
    tile_store(f, 3, acc + d + 48, stride, kind);
  }
}

INLINE void weigh_by_tiles(tile_file *f, const void *const v[SUBS], int first, int end, const void *weights,
                           row_layout s, float *acc, int64_t head_dim, const tile *next, const int kind) {
  int64_t d = 0;
  for (; d + 64 <= head_dim; d += 64)
    weigh_dimensions(f, v, first, end, weights, s, acc, d, head_dim, next, 4, kind);
  if (d < head_dim) weigh_dimensions(f, v, first, end, weights, s, acc, d, head_dim, next, 2, kind);
}

/* Copies the values of one subtile, those of keys outside `keys` as zero. Returns whether all are finite. */
static int copy_visible(const void *from, uint32_t *to, int64_t head_dim, range keys) {
  vi infinite = {0};
  for (int64_t j = 0; j < SUB_PAIRS; j++) {
    const int low = 2 * j >= keys.begin && 2 * j < keys.end;
    const int high = 2 * j + 1 >= keys.begin && 2 * j + 1 < keys.end;
    const uint32_t kept = (low ? 0xffffu : 0) | (high ? 0xffff0000u : 0);
    for (int64_t d = j * head_dim; d < (j + 1) * head_dim; d += VW) {
      const vu pair = vload_pairs((const uint32_t *)from + d) & kept;
      infinite |= (vi)((pair & 0x7f80u) == 0x7f80u) | (vi)((pair & 0x7f800000u) == 0x7f800000u);
      memcpy(to + d, &pair, sizeof pair);
    }
  }
  return !vany(infinite);
}

/* Sets v to the values of subtiles [first, end) as rows with these keys may read them: copies where a key is
 * not seen by all. Returns whether the rows may be computed together. */
static int visible_values(const tile *t, int first, int end, int64_t head_dim, const range *keys,
                          int64_t rows, uint32_t *copies, const void *v[SUBS]) {
  int together = 1;
  for (int i = first; i < end; i++) {
    range shared = {0, SUB}, seen = {SUB, 0};
    for (int64_t r = 0; r < rows; r++) {
      const range k = {max64(keys[r].begin - i * SUB, 0), min64(keys[r].end - i * SUB, SUB)};
      shared = (range){max64(shared.begin, k.begin), min64(shared.end, k.end)};
      if (!is_empty(k)) seen = (range){min64(seen.begin, k.begin), max64(seen.end, k.end)};
    }
    v[i] = t->v[i];
    if (shared.begin == 0 && shared.end == SUB) continue;
    v[i] = copies + i * SUB_PAIRS * head_dim;
    const int finite = copy_visible(t->v[i], copies + i * SUB_PAIRS * head_dim, head_dim, seen);
    const int alike = shared.begin == seen.begin && shared.end == seen.end;
    together &= finite | alike;
  }
  return together;
}

/* What attend_by_tiles needs: copies of the values of a tile, and 16 rows of a state. */
INLINE int64_t spare_floats(int64_t head_dim, int64_t stride) {
  return SUBS * SUB_PAIRS * head_dim + TILE_ROWS * stride;
}

/* As attend_rows. acc has 16 rows, of which the first `rows` count; q: [16][head_dim]; spare: spare_floats. */
INLINE void attend_by_tiles(const tile *t, const char *q, int64_t head_dim, row_layout s, float *acc,
                            const range *keys, float factor, float softcap, const tile *next,
                            int64_t rows, float *spare, const int kind) {
  float scores[2 * TILE_ROWS * TILE]; /* a row computed alone reads the 15 after it too */
  uint32_t *copies = (uint32_t *)spare;
  tile_file f;
  range seen = {TILE, 0};
  for (int64_t r = 0; r < rows; r++)
    if (!is_empty(keys[r]))
      seen = (range){min64(seen.begin, keys[r].begin), max64(seen.end, keys[r].end)};
  if (is_empty(seen)) return;
  const int first = (int)(seen.begin / SUB), end = (int)((seen.end + SUB - 1) / SUB);
  tile_configure(&f, &attention_shapes, kind);
  if (end - first < SUBS) memset(scores, 0, (size_t)rows * SCORE_STRIDE);
  score_by_tiles(&f, t, first, end, q, head_dim, scores, next, kind);
  for (int64_t r = 0; r < rows; r++)
    if (is_empty(keys[r]))
      memset(scores + r * TILE, 0, TILE / 2 * 4);
    else
      exponentials_BF16(s, acc + r * s.stride, scores + r * TILE, keys[r], factor, softcap);

  const void *v[SUBS];
  if (visible_values(t, first, end, head_dim, keys, rows, copies, v)) {
    weigh_by_tiles(&f, v, first, end, scores, s, acc, head_dim, next, kind);
    return;
  }
  float *alone = spare + SUBS * SUB_PAIRS * head_dim;
  for (int64_t r = 0; r < rows; r++) {
    if (is_empty(keys[r])) continue;
    float *row = acc + r * s.stride;
    memcpy(alone, row, (size_t)s.width * sizeof *row);
    visible_values(t, first, end, head_dim, keys + r, 1, copies, v);
    weigh_by_tiles(&f, v, first, end, scores + r * TILE, s, alone, head_dim, NULL, kind);
    memcpy(row, alone, (size_t)s.width * sizeof *row);
  }
}

typedef void (*attend_task)(const tile *, const char *, int64_t, row_layout, float *, const range *,
                            float, float, const tile *, int64_t, float *);

/* One instance for each kind of tiles. */
#define BY_TILES(name, kind)                                                                       \
  NOINLINE void name(const tile *t, const char *q, int64_t head_dim, row_layout s, float *acc,    \
                     const range *keys, float factor, float softcap, const tile *next,            \
                     int64_t rows, float *spare) {                                                \
    attend_by_tiles(t, q, head_dim, s, acc, keys, factor, softcap, next, rows, spare, kind);      \
  }
BY_TILES(attend_plain, TILES_PLAIN)
#if HAVE_AMX
BY_TILES(attend_amx, TILES_AMX)
#endif

INLINE attend_task attend_tiles_of(int tiles) {
#if HAVE_AMX
  if (tiles == TILES_AMX) return attend_amx;
#endif
  (void)tiles;
  return attend_plain;
}

#endif

/* Rows of x times a panel of pairs of bfloat16, by tiles: of dense weights (linear.c), and of float8 (float8.c). */
#ifndef QUIRE_LINEAR_TILES_H
#define QUIRE_LINEAR_TILES_H

#include "linear_panel.h"
#include "tiles.h"

/* Whether a matrix of floats is multiplied by tiles: of float8, only if no group begins inside a tile. */
INLINE int uses_tiles(const linear_weight *w) {
  if (w->dtype != BF16 || w->tiles == TILES_NONE) return 0;
  return !w->codes || (w->codes->float8 && (w->codes->group % TILE_K == 0 || w->codes->group >= w->k));
}

#define PANEL_ROW (PANEL * 4) /* bytes of a row: one pair of each column */
#define K_STEP (TILE_K / 2 * PANEL_ROW)
#define TILES_AHEAD (2 * K_STEP) /* as AHEAD */

typedef struct {
  const char *panel, *rest; /* rest: the rows after the last whole step, then zeros */
  int64_t steps, whole;     /* of TILE_K elements; all of them, and those in `panel` */
} tile_panel;

INLINE void prefetch_step(stream next, int64_t step) {
  for (int64_t b = 0; b < next.stride; b += 64)
    __builtin_prefetch(next.at + step * next.stride + b, 0, 2);
}

/* Tiles 0-3 = 32 rows of x times 32 columns of the panel, from byte `c` of its rows on. */
INLINE void dot_square(tile_file *t, const char *x0, const char *x1, int64_t stride,
                       const tile_panel *w, int c, stream next, const int kind) {
  tile_zero(t, 0, kind), tile_zero(t, 1, kind), tile_zero(t, 2, kind), tile_zero(t, 3, kind);
  for (int64_t i = 0; i < w->steps; i++) {
    const char *b = (i < w->whole ? w->panel + i * K_STEP : w->rest) + c;
    tile_load(t, 4, x0 + i * TILE_K * 2, stride, kind);
    tile_load(t, 6, b, PANEL_ROW, kind);
    tile_load(t, 7, b + 64, PANEL_ROW, kind);
    tile_load(t, 5, x1 + i * TILE_K * 2, stride, kind);
    tile_dot(t, 0, 4, 6, kind);
    tile_dot(t, 1, 4, 7, kind);
    tile_dot(t, 2, 5, 6, kind);
    tile_dot(t, 3, 5, 7, kind);
    prefetch_step(next, i);
  }
}

/* Tiles 0-3 = 16 rows of x times the panel's 64 columns. */
INLINE void dot_line(tile_file *t, const char *x, int64_t stride, const tile_panel *w, stream next,
                     const int kind) {
  tile_zero(t, 0, kind), tile_zero(t, 1, kind), tile_zero(t, 2, kind), tile_zero(t, 3, kind);
  for (int64_t i = 0; i < w->steps; i++) {
    const char *b = i < w->whole ? w->panel + i * K_STEP : w->rest;
    tile_load(t, 4, x + i * TILE_K * 2, stride, kind);
    tile_load(t, 5, b, PANEL_ROW, kind);
    tile_dot(t, 0, 4, 5, kind);
    tile_load(t, 6, b + 64, PANEL_ROW, kind);
    tile_dot(t, 1, 4, 6, kind);
    tile_load(t, 7, b + 128, PANEL_ROW, kind);
    tile_dot(t, 2, 4, 7, kind);
    tile_load(t, 5, b + 192, PANEL_ROW, kind);
    tile_dot(t, 3, 4, 5, kind);
    prefetch_step(next, i);
  }
}

/* Rows [r, r + 32) of x, or fewer up to `end`, times a panel: into `sums`, [32][PANEL]. x: at the first column of row 0.
 * A last tile of rows that is not full begins earlier, and computes some rows again. Returns the sums of row r. */
INLINE float *tile_rows(tile_file *t, const char *x, int64_t stride, int64_t r, int64_t end, const tile_panel *view,
                        stream next, float *sums, const int kind) {
  const int64_t last = max64(end - TILE_ROWS, 0);
  if (end - r <= TILE_ROWS) {
    dot_line(t, x + last * stride, stride, view, next, kind);
    tile_store(t, 0, sums, PANEL_ROW, kind);
    tile_store(t, 1, sums + 16, PANEL_ROW, kind);
    tile_store(t, 2, sums + 32, PANEL_ROW, kind);
    tile_store(t, 3, sums + 48, PANEL_ROW, kind);
    return sums + (r - last) * PANEL;
  }
  const int64_t bottom = min64(r + TILE_ROWS, last);
  for (int c = 0; c < 2; c++, next.at += view->steps * next.stride) {
    float *to = sums + c * 32, *below = to + (bottom - r) * PANEL;
    dot_square(t, x + r * stride, x + bottom * stride, stride, view, c * 128, next, kind);
    tile_store(t, 0, to, PANEL_ROW, kind);
    tile_store(t, 1, to + 16, PANEL_ROW, kind);
    tile_store(t, 2, below, PANEL_ROW, kind);
    tile_store(t, 3, below + 16, PANEL_ROW, kind);
  }
  return sums;
}

#endif

/* y = x @ W^T + bias over packed weights, the same bits for a row whatever the number of rows.
 *
 * Weights are packed in panels of PANEL output columns, [panels][K / pair][PANEL][pair], where a pair
 * is two bfloat16 along K (the operand of vdpbf16ps) and one element in the other dtypes. An output is one
 * chain of fused multiply-adds (or of vdpbf16ps) over k in order, from zero. So the blocking of rows in
 * registers, the division of columns among threads and the cuts of K change no bit. With few rows, the
 * weights are read once, in the order of addresses. With more, a panel stays in L2 while blocks of rows
 * are multiplied with it, and the next panel is prefetched.
 *
 * With tiles (AMX), a bfloat16 output is a chain of tile operations instead, each over TILE_K elements of k
 * (tiles.h). The panels are the same: 16 rows of a panel, at 16 of its columns, are a tile.
 */
#include "linear_tiles.h"

#define K_CUT 4096       /* elements of K between spills: a panel with this many rows fits in L2 */
#define WIDE_BLOCKS 8    /* blocks of rows from which on a panel is widened to fp32 once for all */
#define WIDE_CUT 1024    /* then in place of K_CUT */

/* to: [k1 - k0][PANEL], elements [k0, k1) of the panel's columns. k0 and k1 are even in bfloat16. */
INLINE void widen_panel(const char *panel, int64_t k0, int64_t k1, float *to, const int dt) {
  const int64_t step = pair_of(dt), row = PANEL * step * (int64_t)elem_size(dt);
  panel += k0 / step * row;
  for (int64_t k = k0; k < k1; k += step, panel += row, to += step * PANEL)
    for (int c = 0; c < PANEL; c += VW) {
      if (dt == BF16) {
        const vu both = vload_pairs(panel + c * 4);
        vstore(to + c, (vf)(both << 16), F32);
        vstore(to + PANEL + c, (vf)(both & 0xffff0000u), F32);
      } else {
        vstore(to + c, vload(panel + c * (int)elem_size(dt), dt), F32);
      }
    }
}

/* Rows [begin, end) over one panel, in blocks of nearly equal size. Where the elements must be widened and there
 * are many blocks, the panel is widened once, in pieces that stay in L2. */
INLINE void panel_rows(const linear_job *job, int64_t begin, int64_t end, int64_t panel,
                       int64_t next_panel, const int dt) {
  const linear_weight *w = job->w;
  const int64_t rows = end - begin, blocks = (rows + ROWS - 1) / ROWS, step = pair_of(dt);
  const int64_t steps = (w->k + step - 1) / step, row = PANEL * step * (int64_t)elem_size(dt);
  const char *base = (const char *)w->panels + panel * steps * row;
  const char *after = (const char *)w->panels + next_panel * steps * row;
  const int xt = widens(dt) ? F32 : dt;
  float sums[ROW_CHUNK * PANEL];
  float *wide = widens(dt) && blocks >= WIDE_BLOCKS ? quire_scratch(SCRATCH_PANEL, WIDE_CUT * PANEL * 4) : NULL;
  const int64_t k_end = steps * step, cut = wide ? WIDE_CUT : K_CUT;
  for (int64_t k0 = 0; k0 < k_end; k0 += cut) {
    const int64_t k1 = min64(k0 + cut, k_end);
    if (wide) widen_panel(base, k0, k1, wide, dt);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t first = rows * b / blocks;
      const void *x = at(job->x, (begin + first) * job->x_stride, xt);
      float *s = sums + first * PANEL;
      /* A single pass prefetches its own panel; several passes each prefetch a part of the next one. */
      const stream next = blocks == 1 ? (stream){base + AHEAD, row}
                                      : (stream){after + b * (steps * row / blocks), row / blocks};
      const int64_t n = rows * (b + 1) / blocks - first;
      if (wide) { /* half the bytes of `next` for each of twice the steps */
        const stream half = {next.at + k0 / step * next.stride, next.stride / step};
        any_block(job, (const float *)x + k0, (const char *)wide, half, 0, k1 - k0, k0 > 0, s, n, F32);
      } else {
        any_block(job, x, base, next, k0, k1, k0 > 0, s, n, dt);
      }
    }
  }
  if (job->lora) quire_add_delta(job, sums, begin, rows, panel);
  const int64_t column = panel * PANEL, n = w->n - column < PANEL ? w->n - column : PANEL;
  const int ot = job->epilogue == LINEAR_FLOAT ? F32 : dt;
  finish(job, sums, w->bias ? at(w->bias, column, dt) : NULL,
         at_mut(job->out, begin * job->out_stride + column, ot), rows, n, dt);
}

/* ---- a panel, by tiles ---- */

#define TILES_CHUNK (1 << 20) /* bytes of x in a chunk of rows: they stay in L2 beside two panels */

/* As panel_rows. */
INLINE void panel_tiles(const linear_job *job, int64_t begin, int64_t end, int64_t panel,
                        int64_t next_panel, const int kind) {
  const linear_weight *w = job->w;
  const int64_t rows = (w->k + 1) / 2, steps = (w->k + TILE_K - 1) / TILE_K, whole = w->k / TILE_K;
  const int64_t stride = job->x_stride * 2, passes = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
  const char *base = (const char *)w->panels + panel * rows * PANEL_ROW;
  const char *after = (const char *)w->panels + next_panel * rows * PANEL_ROW;
  char rest[K_STEP];
  if (whole < steps) {
    const size_t kept = (size_t)(rows - whole * TILE_K / 2) * PANEL_ROW;
    memcpy(rest, base + whole * K_STEP, kept);
    memset(rest + kept, 0, K_STEP - kept);
  }
  const tile_panel view = {base, rest, steps, whole};
  const int64_t column = panel * PANEL, n = min64(w->n - column, PANEL);
  const void *bias = w->bias ? at(w->bias, column, BF16) : NULL;
  const int ot = job->epilogue == LINEAR_FLOAT ? F32 : BF16;
  tile_file t;
  tile_configure(&t, &product_shapes, kind);
  for (int64_t r = begin; r < end; r += 2 * TILE_ROWS) {
    float sums[2 * TILE_ROWS * PANEL];
    /* As in panel_rows. */
    const int64_t pass = (r - begin) / TILE_ROWS;
    const stream next = passes == 1 ? (stream){base + TILES_AHEAD, K_STEP}
                                    : (stream){after + pass * (steps * K_STEP / passes), K_STEP / passes};
    float *first = tile_rows(&t, job->x, stride, r, end, &view, next, sums, kind);
    if (job->lora) quire_add_delta(job, first, r, min64(end - r, 2 * TILE_ROWS), panel);
    finish(job, first, bias, at_mut(job->out, r * job->out_stride + column, ot),
           min64(end - r, 2 * TILE_ROWS), n, BF16);
  }
}

/* One instance for each dtype and kind of tiles, so that the compiler specializes each once. */
#define PANEL_ROWS(name, dt)                                                                      \
  static __attribute__((noinline)) void name(const linear_job *job, int64_t begin, int64_t end,   \
                                             int64_t panel, int64_t next_panel) {                 \
    panel_rows(job, begin, end, panel, next_panel, dt);                                           \
  }
PANEL_ROWS(panel_rows_f32, F32)
PANEL_ROWS(panel_rows_bf16, BF16)
PANEL_ROWS(panel_rows_f16, F16)
#define PANEL_TILES(name, kind)                                                                   \
  static __attribute__((noinline)) void name(const linear_job *job, int64_t begin, int64_t end,   \
                                             int64_t panel, int64_t next_panel) {                 \
    panel_tiles(job, begin, end, panel, next_panel, kind);                                        \
  }
PANEL_TILES(panel_tiles_plain, TILES_PLAIN)
#if HAVE_AMX
PANEL_TILES(panel_tiles_amx, TILES_AMX)
#endif

static panel_task panel_task_of(const linear_weight *w) {
  if (w->codes) return w->codes->float8 ? quire_float8_panel : quire_codes_panel;
#if HAVE_AMX
  if (w->dtype == BF16 && w->tiles == TILES_AMX) return panel_tiles_amx;
#endif
  if (uses_tiles(w)) return panel_tiles_plain;
  return w->dtype == F32 ? panel_rows_f32 : w->dtype == BF16 ? panel_rows_bf16 : panel_rows_f16;
}

/* The multiple of columns that the kernel reads of a row of x. */
static int64_t columns_read(const linear_weight *w) {
  return uses_tiles(w) ? TILE_K : w->codes ? 4 : pair_of(w->dtype);
}

/* Bytes of `readable`'s copy of x; 0: x is read as it is. */
static size_t readable_bytes(const linear_weight *w, int64_t m) {
  const int dt = w->dtype, tiles = uses_tiles(w);
  const int64_t step = columns_read(w), k = (w->k + step - 1) / step * step;
  const int out = widens(dt) && !tiles ? F32 : dt;
  const int64_t held = tiles ? max64(m, TILE_ROWS) : m; /* all rows of a tile are read */
  return out == dt && k == w->k && held == m ? 0 : (size_t)(held * k) * elem_size(out) + 64;
}

/* x in the form that the kernel reads: widened if needed, with a complete last pair or tile of k, and memory for
 * a tile of rows. */
static const void *readable(const linear_weight *w, const void *x, int64_t *stride, int64_t m, char *copy) {
  const int dt = w->dtype, tiles = uses_tiles(w);
  const int64_t step = columns_read(w), k = (w->k + step - 1) / step * step;
  const int out = widens(dt) && !tiles ? F32 : dt;
  for (int64_t r = 0; r < m; r++) {
    memset(at_mut(copy, r * k + w->k, out), 0, (size_t)(k - w->k) * elem_size(out));
    const void *row = at(x, r * *stride, dt);
    if (out == dt)
      memcpy(at_mut(copy, r * k, out), row, (size_t)w->k * elem_size(dt));
    else
      for (int64_t i = 0; i < w->k; i += VW)
        vstore_upto((float *)copy + r * k + i, vload_upto(at(row, i, dt), w->k - i, dt), w->k - i, F32);
  }
  *stride = k;
  return copy;
}

/* The panel of the unit with this index. Threads take units in turn, and so each gets a range of panels
 * in the order of addresses: two separate streams read 6 % more a second than two threads that alternate. */
static int64_t panel_at(int64_t index, int64_t panels, int64_t threads) {
  const int64_t whole = panels / threads; /* panels of every range; the first ranges may have one more */
  if (index < whole * threads) return panels * (index % threads) / threads + index / threads;
  int64_t range = 0;
  for (int64_t left = index - whole * threads;; range++) {
    const int64_t size = panels * (range + 1) / threads - panels * range / threads;
    if (size > whole && left-- == 0) break;
  }
  return panels * (range + 1) / threads - 1;
}

typedef struct {
  linear_job parts[LINEAR_PARTS];
  int num_parts, threads;
  int64_t m, panels, chunk; /* a unit of work is one chunk of rows times one panel */
} stack_job;

static void linear_unit(void *context, int64_t unit) {
  const stack_job *stack = context;
  int64_t panel = panel_at(unit % stack->panels, stack->panels, stack->threads);
  const int64_t begin = unit / stack->panels * stack->chunk, end = min64(stack->m, begin + stack->chunk);
  const linear_job *job = stack->parts;
  for (; panel >= job->panels; job++) panel -= job->panels;
  job->task(job, begin, end, panel, min64(panel + 1, job->panels - 1));
}

/* Rows of a chunk: nearly equal chunks of at most `most` rows, and whole tiles. */
static int64_t chunk_rows(int64_t m, int64_t most, int64_t multiple) {
  const int64_t chunks = (m + most - 1) / most, rows = (m + chunks - 1) / chunks;
  return (rows + multiple - 1) / multiple * multiple;
}

INLINE int is_coded(const linear_weight *w) { return w->codes && !w->codes->float8; }

/* Whether two matrices of a stack read the same form of x. */
static int same_input(const linear_weight *a, const linear_weight *b) {
  if (is_coded(a) != is_coded(b) || columns_read(a) != columns_read(b)) return 0;
  return !is_coded(a) || (a->codes->group == b->codes->group && a->codes->order == b->codes->order &&
                          a->codes->activation_bits == b->codes->activation_bits);
}

/* The inputs of all parts, in memory of the thread. 0, or 5. */
static int prepare(stack_job *stack, const void *x, int64_t x_stride) {
  size_t bytes[LINEAR_PARTS], total = 0;
  int like[LINEAR_PARTS]; /* the first part with the same input */
  for (int i = 0; i < stack->num_parts; i++) {
    const linear_weight *w = stack->parts[i].w;
    for (like[i] = 0; !same_input(w, stack->parts[like[i]].w);) like[i]++;
    bytes[i] = like[i] < i ? 0 : is_coded(w) ? quire_coded_bytes(w, stack->m) : readable_bytes(w, stack->m);
    bytes[i] = (bytes[i] + 63) / 64 * 64;
    total += bytes[i];
  }
  char *memory = total ? quire_scratch(SCRATCH_LINEAR, total) : NULL;
  if (total && !memory) return 5;
  for (int i = 0; i < stack->num_parts; memory += bytes[i++]) {
    linear_job *part = &stack->parts[i], *first = &stack->parts[like[i]];
    if (like[i] < i) {
      part->x = first->x, part->x_stride = first->x_stride, part->coded = first->coded;
    } else if (is_coded(part->w)) {
      if (quire_code_input(part->w, x, x_stride, stack->m, stack->threads, memory, &part->coded)) return 5;
    } else {
      part->x = x, part->x_stride = x_stride;
      if (bytes[i]) part->x = readable(part->w, x, &part->x_stride, stack->m, memory);
    }
  }
  return 0;
}

/* x: [m, k], row stride given. out: [m, n of all parts], row stride given; `epilogue` says how the result is stored.
 * Returns 5 if there is no memory. */
int quire_adapted_linear(const linear_weight *w, const void *x, int64_t x_stride, void *out, int64_t out_stride,
                         int64_t m, int epilogue, int threads, const lora_rows *lora, int64_t site) {
  if (m == 0) return 0;
  stack_job stack = {.m = m, .threads = threads};
  lora_use use = {.rows = lora, .site = site};
  const int shrunk = lora ? quire_shrink(&use, x, x_stride, w->dtype, threads) : 1;
  if (shrunk == 5) return 5;
  int64_t n = 0, most = ROW_CHUNK, multiple = 1;
  const int ot = epilogue == LINEAR_FLOAT ? F32 : w->dtype;
  for (const linear_weight *each = w; each; each = each->next) {
    const int64_t panels = (each->n + PANEL - 1) / PANEL;
    stack.parts[stack.num_parts++] = (linear_job){.w = each, .out = at_mut(out, n, ot), .out_stride = out_stride,
                                                  .panels = panels, .epilogue = epilogue,
                                                  .lora = shrunk ? NULL : &use, .first_panel = stack.panels,
                                                  .task = panel_task_of(each)};
    stack.panels += panels;
    n += each->n;
    if (is_coded(each) && each->tiles != TILES_NONE) multiple = TILE_ROWS;
  }
  if (uses_tiles(w)) {
    multiple = 2 * TILE_ROWS;
    most = max64(TILES_CHUNK / (2 * w->k) / multiple, 2) * multiple;
  }
  if (m * n * w->k <= 4 * SMALL_WORK) stack.threads = 1;
  stack.chunk = chunk_rows(m, most, multiple);
  if (prepare(&stack, x, x_stride)) return 5;
  quire_run(linear_unit, &stack, stack.panels * ((m + stack.chunk - 1) / stack.chunk), stack.threads);
  return 0;
}

int quire_linear(const linear_weight *w, const void *x, int64_t x_stride, void *out,
                 int64_t out_stride, int64_t m, int epilogue, int threads) {
  return quire_adapted_linear(w, x, x_stride, out, out_stride, m, epilogue, threads, NULL, 0);
}

/* The floats of a vector, plus 256 with dot products of bfloat16: for people. */
int quire_vectors(void) { return VW + 256 * HAVE_DOT; }

/* ---- packing ---- */

#define PACK_K 64 /* elements of K that are moved at once, so that the destination stays in L1 */

typedef struct {
  const char *weight;
  char *panels;
  int64_t first, rows, k, size, step;
} pack_job;

/* One of the log2(VW) exchanges that transpose [VW][VW]: of elements at distance `s` in rows and columns. */
INLINE void exchange(vu rows[VW], const int s) {
  UNROLL for (int i = 0; i < VW; i++) {
    if (i & s) continue;
    const vu a = rows[i], b = rows[i | s];
#if defined(__clang__)
    for (int c = 0; c < VW; c++) {
      rows[i][c] = c & s ? b[c ^ s] : a[c];
      rows[i | s][c] = c & s ? b[c] : a[c ^ s];
    }
#else
    vu low, high;
    for (int c = 0; c < VW; c++) {
      low[c] = (uint32_t)(c & s ? (c ^ s) + VW : c);
      high[c] = (uint32_t)(c & s ? c + VW : c ^ s);
    }
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i | s] = __builtin_shuffle(a, b, high);
#endif
  }
}

/* A complete panel of PANEL rows, in units of four bytes, one square of VW x VW in registers at a time.
 * It reads and writes whole cache lines. Returns the number of units that it has done, all but the last
 * few. */
static int64_t pack_squares(const char *weight, int64_t row_bytes, int64_t units, char *panel) {
  int64_t u = 0;
  for (; u + VW <= units; u += VW)
    for (int64_t c = 0; c < PANEL; c += VW) {
      vu rows[VW];
      UNROLL for (int i = 0; i < VW; i++) memcpy(&rows[i], weight + (c + i) * row_bytes + u * 4, sizeof(vu));
      UNROLL for (int s = 1; s < VW; s *= 2) exchange(rows, s);
      UNROLL for (int i = 0; i < VW; i++) memcpy(panel + ((u + i) * PANEL + c) * 4, &rows[i], sizeof(vu));
    }
  return u;
}

static void pack_panel(void *context, int64_t index) {
  const pack_job *j = context;
  const int64_t unit = j->size * j->step, padded = (j->k + j->step - 1) / j->step;
  const int64_t p = j->first / PANEL + index, row = p * PANEL - j->first;
  char *panel = j->panels + p * PANEL * padded * unit;
  int64_t done = 0;
  if (unit == 4 && row >= 0 && row + PANEL <= j->rows) {
    const int64_t row_bytes = j->k * j->size;
    done = j->step * pack_squares(j->weight + row * row_bytes, row_bytes, j->k / j->step, panel);
  }
  for (int64_t k0 = done; k0 < j->k; k0 += PACK_K)
    for (int64_t c = 0; c < PANEL; c++) {
      const int64_t r = p * PANEL + c - j->first;
      if (r < 0 || r >= j->rows) continue;
      const char *source = j->weight + (r * j->k + k0) * j->size;
      const int64_t count = min64(j->k - k0, PACK_K);
      char *to = panel + (k0 / j->step * PANEL + c) * unit;
      int64_t i = 0;
      for (; i + j->step <= count; i += j->step, to += PANEL * unit)
        memcpy(to, source + i * j->size, unit == 4 ? 4 : 2);
      if (i < count) memcpy(to, source + i * j->size, (size_t)j->size);
    }
}

/* Packs rows [first, first + rows) of a [n, k] matrix into the panels. The caller must have zeroed the
 * rest of a panel. size: 2 or 4 bytes an element; step: elements in a pair. */
int quire_pack_linear(const void *weight, int64_t first, int64_t rows, int64_t k, int64_t size,
                      int64_t step, void *panels, int threads) {
  pack_job job = {weight, panels, first, rows, k, size, step};
  const int64_t count = (first + rows + PANEL - 1) / PANEL - first / PANEL;
  quire_run(pack_panel, &job, count, rows * k > 4 * SMALL_WORK ? threads : 1);
  return 0;
}

typedef struct {
  const linear_weight *w;
  const int64_t *ids;
  int64_t tokens;
  char *out;
} gather_job;

#define GATHERED 16 /* rows of a unit */

static void gather_unit(void *context, int64_t index) {
  const gather_job *j = context;
  const linear_weight *w = j->w;
  const int64_t size = (int64_t)elem_size(w->dtype), step = pair_of(w->dtype), unit = size * step;
  const int64_t padded = (w->k + step - 1) / step, end = min64((index + 1) * GATHERED, j->tokens);
  for (int64_t t = index * GATHERED; t < end; t++) {
    if (w->codes) {
      quire_codes_row(w, j->ids[t], j->out + t * w->k * size);
      continue;
    }
    const char *from = (const char *)w->panels +
                       (j->ids[t] / PANEL * PANEL * padded + j->ids[t] % PANEL) * unit;
    char *to = j->out + t * w->k * size;
    int64_t i = 0;
    for (; i + step <= w->k; i += step, from += PANEL * unit) memcpy(to + i * size, from, unit == 4 ? 4 : 2);
    if (i < w->k) memcpy(to + i * size, from, (size_t)size);
  }
}

/* Row `ids[t]` of the packed matrix, for each t: an embedding that shares the head's weights. 0; 1, with
 * nothing written, if an id is outside [0, n). */
int quire_gather_rows(const linear_weight *w, const int64_t *ids, int64_t tokens, void *out, int threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (ids[t] < 0 || ids[t] >= w->n) return 1;
  gather_job job = {w, ids, tokens, out};
  quire_run(gather_unit, &job, (tokens + GATHERED - 1) / GATHERED, threads);
  return 0;
}

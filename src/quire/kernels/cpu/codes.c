/* Products with matrices of integer codes of 4 or 8 bits: kernels/codes.py says what they mean.
 *
 * The columns are taken in pieces of at most PIECE_COLUMNS: whole groups, or parts of one. In a piece, a row of x is
 * rounded to integers times one scale (of 16 bits: the rounding is smaller than that of x to bfloat16, relative to
 * the piece's largest element). A piece has segments, each of one group. A segment's sum of codes times integers is
 * below 2^31 and exact, so that its order is free: a kernel may depend on the number of rows, and on the processor.
 * Only the sums of segments and pieces are rounded, and their order is fixed:
 *
 *   of a segment   piece = fma(minimum, sum_x, fma(sum(code * x) - zero * sum_x, scale, piece))
 *   of a piece     y = fma(piece, x_scale, y)
 *
 * Panels are [panels][K / 4][PANEL][4] bytes, the operand of vpdpbusd. With 4 bits, a byte has column k + i of 8 in its
 * low half and k + 4 + i in its high half: [panels][K / 8][PANEL][4]. K is padded to a multiple of 8.
 */
#include "linear_panel.h"
#include "tiles.h"

#define PIECE_COLUMNS 256 /* 255 * X16 * PIECE_COLUMNS is below 2^31 */
#define X16 32512      /* of 16 bits: so that the upper byte of the nearest multiple of 256 fits */
#define X8 127
#define CODE_ROWS 3    /* the most in a block; with two accumulators each, one less */
#define SEGMENTS (PIECE_COLUMNS / 8)
#define UNPACK_ROWS 5  /* from which on a piece of 4-bit codes is unpacked once for all */

/* HAVE_BYTES: an instruction multiplies bytes without a sign by bytes with one and adds four products. A 16-bit x is
 * then two bytes, in two planes, and else two planes of pairs: even and odd columns. */
#if defined(__AVX512VNNI__) && VW == 16
#define HAVE_BYTES 1
#define DOT_BYTES(acc, codes, x) (vi) _mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(codes), _mm512_set1_epi32(x))
#elif defined(__AVXVNNI__) && VW == 8
#define HAVE_BYTES 1
#define DOT_BYTES(acc, codes, x) (vi) _mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(codes), _mm256_set1_epi32(x))
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define HAVE_BYTES 1
#define DOT_BYTES(acc, codes, x) \
  (vi) vusdotq_s32((int32x4_t)(acc), (uint8x16_t)(codes), vreinterpretq_s8_s32(vdupq_n_s32(x)))
#else
#define HAVE_BYTES 0
#endif

INLINE vi vset_int(int32_t x) { return (vi){0} + x; }

#if !HAVE_BYTES
/* acc + the sums of two products of 16 bits with a sign. */
INLINE vi dot_words(vi acc, vu codes, int32_t pair) {
#if VW == 16 && defined(__AVX512BW__)
  return acc + (vi)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(pair));
#elif VW == 8 && defined(__AVX2__)
  return acc + (vi)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(pair));
#elif VW == 4 && defined(__x86_64__)
  return acc + (vi)_mm_madd_epi16((__m128i)codes, _mm_set1_epi32(pair));
#else
  return acc + (vi)(codes & 0xffff) * (int32_t)(int16_t)pair + (vi)(codes >> 16) * (pair >> 16);
#endif
}
#endif

/* The products of a vector of four codes with four columns of a row of x. */
INLINE void dot_codes(vi acc[2], vu codes, const int32_t *const x[2], int64_t index, const int bits) {
#if HAVE_BYTES
  acc[0] = DOT_BYTES(acc[0], codes, x[0][index]);
  if (bits == 16) acc[1] = DOT_BYTES(acc[1], codes, x[1][index]); /* the upper bytes */
#else
  acc[0] = dot_words(acc[0], codes & 0x00ff00ffu, x[0][index]);
  acc[0] = dot_words(acc[0], (codes >> 8) & 0x00ff00ffu, x[1][index]);
#endif
}

/* ---- codes of a panel ---- */

INLINE vu vload_codes(const uint8_t *p) {
  vu r;
  memcpy(&r, p, sizeof r);
  return r;
}

enum code_kind { FOUR_BITS, FOUR_BITS_VALUES, EIGHT_BITS };

/* Eight columns of VW rows: the first four and the last four. */
INLINE void load_eight(const uint8_t *panel, int64_t eighth, int row, const uint8_t *values, vu out[2], const int kind) {
  if (kind == EIGHT_BITS) {
    out[0] = vload_codes(panel + (2 * eighth * PANEL + row) * 4);
    out[1] = vload_codes(panel + ((2 * eighth + 1) * PANEL + row) * 4);
    return;
  }
  const vu both = vload_codes(panel + (eighth * PANEL + row) * 4);
  out[0] = both & 0x0f0f0f0fu;
  out[1] = (both >> 4) & 0x0f0f0f0fu;
  if (kind == FOUR_BITS_VALUES) out[0] = lookup(out[0], values), out[1] = lookup(out[1], values);
}

static void unpack_piece(const uint8_t *panel, int64_t eighths, const code_info *info, uint8_t *to) {
  for (int64_t e = 0; e < eighths; e++)
    for (int row = 0; row < PANEL; row += VW) {
      vu pair[2];
      if (info->has_values)
        load_eight(panel, e, row, info->values, pair, FOUR_BITS_VALUES);
      else
        load_eight(panel, e, row, info->values, pair, FOUR_BITS);
      memcpy(to + (2 * e * PANEL + row) * 4, &pair[0], sizeof(vu));
      memcpy(to + ((2 * e + 1) * PANEL + row) * 4, &pair[1], sizeof(vu));
    }
}

/* ---- scales ---- */

typedef struct { /* of the segments of one piece of a panel */
  float scales[SEGMENTS][PANEL], minima[SEGMENTS][PANEL];
  int32_t zeros[SEGMENTS][PANEL];
} piece_scales;

INLINE vi vload_bytes(const void *p) { /* without a sign */
#if VW == 16
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(p));
#else
  uint8_t bytes[VW];
  memcpy(bytes, p, sizeof bytes);
  vi r = {0};
  for (int i = 0; i < VW; i++) r[i] = bytes[i];
  return r;
#endif
}

INLINE vf vload_scales(const void *from, int64_t index, const int type) {
  if (type == SCALE_INT8) return __builtin_convertvector((vload_bytes((const int8_t *)from + index) ^ 128) - 128, vf);
  const int dt = type == SCALE_F32 ? F32 : type == SCALE_BF16 ? BF16 : F16;
  return vload(at(from, index, dt), dt);
}

/* Of groups [group, group + segments), rows [row, row + count) of a panel; count is a multiple of VW. */
INLINE void load_scales_of(const linear_weight *w, int64_t panel, int64_t group, int segments, int64_t row,
                           const int count, piece_scales *out, const int type) {
  const code_info *info = w->codes;
  const int64_t groups = (w->k + info->group - 1) / info->group;
  const int64_t supers = type == SCALE_INT8 ? (groups + info->super_groups - 1) / info->super_groups : 0;
  const char *offsets = info->offsets;
  for (int i = 0; i < count; i += VW) {
    int64_t above = -1;
    vf super_scale = vset(1.0f), super_minimum = vset(-1.0f);
    for (int s = 0; s < segments; s++) {
      const int64_t index = (panel * groups + group + s) * PANEL + row + i;
      vf scale = vload_scales(info->scales, index, type), minimum = vset(0.0f);
      if (type == SCALE_INT8) {
        if (above != (group + s) / info->super_groups) {
          above = (group + s) / info->super_groups;
          const int64_t super = (panel * supers + above) * PANEL + row + i;
          super_scale = vload_scales(info->super_scales, super, SCALE_F16);
          if (info->super_minima) super_minimum = -vload_scales(info->super_minima, super, SCALE_F16);
        }
        scale *= super_scale;
      }
      vstore(&out->scales[s][i], scale, F32);
      if (info->offset_type == OFFSET_ZERO) {
        const vi zeros = vload_bytes(offsets + index);
        memcpy(&out->zeros[s][i], &zeros, sizeof zeros);
      } else if (info->offset_type == OFFSET_MINIMUM) {
        if (type == SCALE_INT8)
          minimum = __builtin_convertvector(vload_bytes(offsets + index), vf) * super_minimum;
        else
          minimum = vload_scales(offsets, index, type);
        vstore(&out->minima[s][i], minimum, F32);
      }
    }
  }
}

INLINE void load_scales(const linear_weight *w, int64_t panel, int64_t group, int segments, int64_t row,
                        const int count, piece_scales *out) {
  switch (w->codes->scale_type) {
    case SCALE_F32: load_scales_of(w, panel, group, segments, row, count, out, SCALE_F32); break;
    case SCALE_BF16: load_scales_of(w, panel, group, segments, row, count, out, SCALE_BF16); break;
    case SCALE_F16: load_scales_of(w, panel, group, segments, row, count, out, SCALE_F16); break;
    default: load_scales_of(w, panel, group, segments, row, count, out, SCALE_INT8);
  }
}

/* ---- products ---- */

typedef struct {
  int64_t column, columns;  /* of the matrix */
  int64_t index, segment;   /* its own and its first segment's, among those of a row of x */
  int segments, per_segment; /* per_segment: columns, except of the last one */
} piece_range;

/* The piece after `p`; the first one if p is zeros. False at the end. */
INLINE int next_piece(const linear_weight *w, piece_range *p) {
  const int64_t group = w->codes->group;
  if (p->columns) p->index++;
  p->column += p->columns;
  p->segment += p->segments;
  if (p->column >= w->k) return 0;
  const int64_t most = group < PIECE_COLUMNS ? PIECE_COLUMNS / group * group
                                             : min64(PIECE_COLUMNS, group - p->column % group);
  p->columns = min64(most, w->k - p->column);
  p->per_segment = (int)min64(group, PIECE_COLUMNS);
  p->segments = (int)((p->columns + p->per_segment - 1) / p->per_segment);
  return 1;
}

typedef struct { /* one piece of a panel */
  piece_range range;
  const uint8_t *codes;
  const piece_scales *scales;
  const code_info *info;
  stream next;
} code_piece;

/* Exact sums of one segment: acc[r][i][0], plus 256 times acc[r][i][1] with bytes of 16 bits. */
INLINE void segment_sums(vi acc[CODE_ROWS][LANES][2], const code_piece *p, const int32_t *const x[CODE_ROWS][2], int c,
                         int64_t begin, int64_t end, const int rows, const int kind, const int bits) {
  const char *next = p->next.at + begin * p->next.stride;
  for (int64_t e = begin; e < end; e++, next += p->next.stride) {
    if (c == 0)
      for (int64_t b = 0; b < p->next.stride; b += 64) __builtin_prefetch(next + b, 0, 2);
    UNROLL for (int i = 0; i < LANES; i++) {
      vu codes[2];
      load_eight(p->codes, e, c + i * VW, p->info->values, codes, kind);
      UNROLL for (int half = 0; half < 2; half++) UNROLL for (int r = 0; r < rows; r++)
        dot_codes(acc[r][i], codes[half], x[r], 2 * e + half, bits);
    }
  }
}

/* y + a segment's sums, columns from `at` on. total: of codes less the zero of all groups; sum: of x. */
INLINE vf fold_segment(const code_piece *p, int s, int at, vu total, int32_t sum, vf y) {
  if (p->info->offset_type == OFFSET_ZERO)
    total -= vload_codes((const uint8_t *)&p->scales->zeros[s][at]) * (uint32_t)sum;
  y = vfma(__builtin_convertvector((vi)total, vf), vload(&p->scales->scales[s][at], F32), y);
  if (p->info->offset_type != OFFSET_MINIMUM) return y;
  return vfma(vload(&p->scales->minima[s][at], F32), vset((float)sum), y);
}

/* sums [rows][PANEL] += the products of `rows` rows of x, from `first` on, with a piece. */
INLINE void piece_block(const code_piece *p, const coded_input *x, int64_t first, float *sums, const int rows,
                        const int kind, const int bits) {
  const piece_range *range = &p->range;
  const int32_t *at_x[CODE_ROWS][2];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int plane = 0; plane < 2; plane++)
    at_x[r][plane] = x->planes[plane] + (first + r) * x->stride + range->column / 4;
  for (int c = 0; c < PANEL; c += LANES * VW) {
    vf y[CODE_ROWS][LANES];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++) y[r][i] = vset(0.0f);
    for (int s = 0; s < range->segments; s++) {
      const int64_t begin = s * range->per_segment, end = min64(begin + range->per_segment, range->columns);
      vi acc[CODE_ROWS][LANES][2];
      int32_t sum[CODE_ROWS];
      UNROLL for (int r = 0; r < rows; r++) {
        sum[r] = x->sums[(first + r) * x->segments + range->segment + s];
        const vi start = vset_int((int32_t)-((uint32_t)p->info->zero * (uint32_t)sum[r]));
        UNROLL for (int i = 0; i < LANES; i++) acc[r][i][0] = start, acc[r][i][1] = vset_int(0);
      }
      segment_sums(acc, p, at_x, c, begin / 8, (end + 7) / 8, rows, kind, bits);
      UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++) {
        const int at = c + i * VW;
        vu total = (vu)acc[r][i][0];
        if (HAVE_BYTES && bits == 16) total += (vu)acc[r][i][1] << 8;
        y[r][i] = fold_segment(p, s, at, total, sum[r], y[r][i]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++) {
      float *to = sums + r * PANEL + c + i * VW;
      vstore(to, vfma(y[r][i], vset(x->scales[(first + r) * x->pieces + range->index]), vload(to, F32)), F32);
    }
  }
}

INLINE void piece_rows(const code_piece *p, const coded_input *x, int64_t begin, int64_t rows, float *sums,
                       const int kind, const int bits) {
  const int64_t most = HAVE_BYTES && bits == 16 ? CODE_ROWS - 1 : CODE_ROWS, blocks = (rows + most - 1) / most;
  code_piece piece = *p;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t first = rows * b / blocks, count = rows * (b + 1) / blocks - first;
    float *s = sums + first * PANEL;
    if (blocks > 1) { /* each block prefetches a part of the next panel */
      piece.next.at = p->next.at + b * (p->next.stride * (p->range.columns / 8) / blocks);
      piece.next.stride = p->next.stride / blocks;
    }
    if (count == 1)
      piece_block(&piece, x, begin + first, s, 1, kind, bits);
    else if (count == 2)
      piece_block(&piece, x, begin + first, s, 2, kind, bits);
    else
      piece_block(&piece, x, begin + first, s, 3, kind, bits);
  }
}

/* One instance for each kind and number of bits of x. */
#define PIECE_ROWS(name, kind, bits)                                                                   \
  static __attribute__((noinline)) void name(const code_piece *p, const coded_input *x, int64_t begin, \
                                             int64_t rows, float *sums) {                              \
    piece_rows(p, x, begin, rows, sums, kind, bits);                                                   \
  }
PIECE_ROWS(piece_rows_4_16, FOUR_BITS, 16)
PIECE_ROWS(piece_rows_4_8, FOUR_BITS, 8)
PIECE_ROWS(piece_rows_values_16, FOUR_BITS_VALUES, 16)
PIECE_ROWS(piece_rows_values_8, FOUR_BITS_VALUES, 8)
PIECE_ROWS(piece_rows_8_16, EIGHT_BITS, 16)
PIECE_ROWS(piece_rows_8_8, EIGHT_BITS, 8)

static void any_piece(const code_piece *p, const coded_input *x, int64_t begin, int64_t rows, float *sums, int kind) {
  const int wide = p->info->activation_bits == 16;
  if (kind == EIGHT_BITS) {
    (wide ? piece_rows_8_16 : piece_rows_8_8)(p, x, begin, rows, sums);
  } else if (kind == FOUR_BITS) {
    (wide ? piece_rows_4_16 : piece_rows_4_8)(p, x, begin, rows, sums);
  } else {
    (wide ? piece_rows_values_16 : piece_rows_values_8)(p, x, begin, rows, sums);
  }
}

/* ---- sixteen rows, by tiles ---- */

#if HAVE_BYTES
#define CODES_STEP 64 /* columns of one operation */
#define STEP_BYTES (CODES_STEP * PANEL)
#define TILED_FROM 5 /* rows from which on a block of sixteen is faster than vectors */

INLINE int steps_of(const piece_range *range) { return (range->per_segment + CODES_STEP - 1) / CODES_STEP; }

/* Codes as [segments][steps][16][PANEL][4]; those behind the end of a segment are zero. */
static void pad_segments(const code_piece *p, int kind, uint8_t *to) {
  const piece_range *range = &p->range;
  const int64_t size = (int64_t)steps_of(range) * STEP_BYTES;
  code_piece segment = *p;
  for (int s = 0; s < range->segments; s++, to += size) {
    const int64_t columns = min64(range->per_segment, range->columns - s * range->per_segment);
    const int64_t eighths = (columns + 7) / 8;
    segment.codes = p->codes + s * range->per_segment / 8 * PANEL * p->info->bits;
    if (kind == EIGHT_BITS)
      memcpy(to, segment.codes, (size_t)eighths * PANEL * 8);
    else
      unpack_piece(segment.codes, eighths, p->info, to);
    memset(to + eighths * PANEL * 8, 0, (size_t)(size - eighths * PANEL * 8));
  }
}

/* sums [16][PANEL] += the products of sixteen rows of x, from `first` on, with a piece whose codes pad_segments wrote.
 * Rows behind the last one may hold anything, and get anything. */
INLINE void piece_tiles(const code_piece *p, const coded_input *x, int64_t first, float *sums, const int bits,
                        const int kind) {
  enum { HALF = 2 * TILE_COLUMNS };
  const piece_range *range = &p->range;
  const int64_t stride = x->stride * 4, steps = steps_of(range);
  const char *planes[2];
  for (int i = 0; i < 2; i++) planes[i] = (const char *)x->planes[i] + first * stride + range->column;
  tile_file t;
  tile_configure(&t, &product_shapes, kind);
  for (int c = 0; c < PANEL; c += HALF) {
    float y[TILE_ROWS][HALF] = {{0}};
    for (int s = 0; s < range->segments; s++) {
      int32_t low[TILE_ROWS][HALF], high[TILE_ROWS][HALF];
      const uint8_t *codes = p->codes + s * steps * STEP_BYTES + c * 4;
      tile_zero(&t, 0, kind), tile_zero(&t, 1, kind), tile_zero(&t, 2, kind), tile_zero(&t, 3, kind);
      for (int64_t i = 0; i < steps; i++, codes += STEP_BYTES) {
        const int64_t column = s * range->per_segment + i * CODES_STEP;
        tile_load(&t, 4, planes[0] + column, stride, kind);
        tile_load(&t, 6, codes, PANEL * 4, kind);
        tile_load(&t, 7, codes + 64, PANEL * 4, kind);
        tile_dot_bytes(&t, 4, 6, kind);
        tile_dot_bytes(&t, 4, 7, kind);
        if (bits == 8) continue;
        tile_load(&t, 5, planes[1] + column, stride, kind);
        tile_dot_bytes(&t, 5, 6, kind);
        tile_dot_bytes(&t, 5, 7, kind);
      }
      tile_store(&t, 0, low[0], sizeof low[0], kind);
      tile_store(&t, 1, low[0] + TILE_COLUMNS, sizeof low[0], kind);
      if (bits == 16) {
        tile_store(&t, 2, high[0], sizeof high[0], kind);
        tile_store(&t, 3, high[0] + TILE_COLUMNS, sizeof high[0], kind);
      }
      for (int r = 0; r < TILE_ROWS; r++) {
        const int32_t sum = x->sums[(first + r) * x->segments + range->segment + s];
        for (int i = 0; i < HALF; i += VW) {
          vu total = vload_codes((const uint8_t *)&low[r][i]) - (uint32_t)p->info->zero * (uint32_t)sum;
          if (bits == 16) total += vload_codes((const uint8_t *)&high[r][i]) << 8;
          vstore(&y[r][i], fold_segment(p, s, c + i, total, sum, vload(&y[r][i], F32)), F32);
        }
      }
    }
    for (int r = 0; r < TILE_ROWS; r++) {
      const vf scale = vset(x->scales[(first + r) * x->pieces + range->index]);
      for (int i = 0; i < HALF; i += VW) {
        float *to = sums + r * PANEL + c + i;
        vstore(to, vfma(vload(&y[r][i], F32), scale, vload(to, F32)), F32);
      }
    }
  }
}

#define PIECE_TILES(name, bits, kind)                                                                       \
  static __attribute__((noinline)) void name(const code_piece *p, const coded_input *x, int64_t first, float *sums) { \
    piece_tiles(p, x, first, sums, bits, kind);                                                             \
  }
PIECE_TILES(piece_tiles_plain_16, 16, TILES_PLAIN)
PIECE_TILES(piece_tiles_plain_8, 8, TILES_PLAIN)
#if HAVE_AMX
PIECE_TILES(piece_tiles_amx_16, 16, TILES_AMX)
PIECE_TILES(piece_tiles_amx_8, 8, TILES_AMX)
#endif

/* As many of `rows` rows as tiles are for, from `begin` on; returns their number. */
static int64_t tiled_rows(const code_piece *p, const coded_input *x, int64_t begin, int64_t rows, float *sums,
                          int stored, int tiles) {
  uint8_t *padded = quire_scratch(SCRATCH_PANEL, (size_t)(p->range.segments * steps_of(&p->range)) * STEP_BYTES);
  if (!padded) return 0;
  const int wide = p->info->activation_bits == 16;
  void (*task)(const code_piece *, const coded_input *, int64_t, float *) =
      wide ? piece_tiles_plain_16 : piece_tiles_plain_8;
#if HAVE_AMX
  if (tiles == TILES_AMX) task = wide ? piece_tiles_amx_16 : piece_tiles_amx_8;
#endif
  (void)tiles;
  pad_segments(p, stored, padded);
  code_piece piece = *p;
  piece.codes = padded;
  int64_t done = 0;
  for (; rows - done >= TILED_FROM; done += TILE_ROWS) task(&piece, x, begin + done, sums + done * PANEL);
  return min64(done, rows);
}
#endif

static void panel_chunk(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel) {
  const linear_weight *w = job->w;
  const code_info *info = w->codes;
  const int64_t rows = end - begin, row = PANEL * info->bits, bytes = (w->k + 7) / 8 * row; /* row: of 8 columns */
  const uint8_t *base = (const uint8_t *)w->panels + panel * bytes, *after = (const uint8_t *)w->panels + next_panel * bytes;
  const int stored = info->bits == 8 ? EIGHT_BITS : info->has_values ? FOUR_BITS_VALUES : FOUR_BITS;
  uint8_t unpacked[PIECE_COLUMNS * PANEL];
  float sums[(ROW_CHUNK + TILE_ROWS) * PANEL];
  memset(sums, 0, (size_t)rows * PANEL * sizeof *sums);
  piece_scales scales;
  code_piece piece = {.scales = &scales, .info = info};
  while (next_piece(w, &piece.range)) {
    const piece_range *range = &piece.range;
    const int64_t offset = range->column / 8 * row;
    load_scales(w, panel, range->column / info->group, range->segments, 0, PANEL, &scales);
    piece.codes = base + offset;
    piece.next = (stream){(const char *)(rows == 1 ? piece.codes + AHEAD : after + offset), row};
    int64_t done = 0;
#if HAVE_BYTES
    if (w->tiles != TILES_NONE && rows >= TILED_FROM)
      done = tiled_rows(&piece, &job->coded, begin, rows, sums, stored, w->tiles);
    if (done == rows) continue;
#endif
    int kind = stored;
    if (kind != EIGHT_BITS && rows - done >= UNPACK_ROWS) {
      unpack_piece(piece.codes, (range->columns + 7) / 8, info, unpacked);
      piece.codes = unpacked;
      kind = EIGHT_BITS;
    }
    any_piece(&piece, &job->coded, begin + done, rows - done, sums + done * PANEL, kind);
  }
  finish_panel(job, sums, begin, rows, panel);
}

/* Rows [begin, end) of x times one panel. */
void quire_codes_panel(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel) {
  for (int64_t first = begin; first < end; first += ROW_CHUNK)
    panel_chunk(job, first, min64(first + ROW_CHUNK, end), panel, next_panel);
}

/* ---- inputs ---- */

/* How many pieces and segments a row of x has. */
static void count_pieces(const linear_weight *w, coded_input *out) {
  piece_range range = {0};
  while (next_piece(w, &range)) out->pieces = range.index + 1, out->segments = range.segment + range.segments;
}

typedef struct {
  const linear_weight *w;
  const void *x;
  int64_t x_stride, m;
  coded_input *out;
  int failed; /* a thread could not allocate its scratch memory */
} input_job;

#define CODED_ROWS 8 /* rows of a unit */

INLINE int64_t padded_columns(const linear_weight *w) { return (w->k + 7) / 8 * 8; }

/* Tiles read sixteen rows, and 64 columns. */
INLINE int64_t held_rows_of(int64_t m) { return (m + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

/* Bytes of `quire_code_input`'s memory. */
size_t quire_coded_bytes(const linear_weight *w, int64_t m) {
  coded_input counts = {0};
  count_pieces(w, &counts);
  return (size_t)held_rows_of(m) * (size_t)(2 * padded_columns(w) + 4 * (counts.pieces + counts.segments)) + 64;
}

/* The largest magnitude; infinite or NaN if one is. */
INLINE float largest(const float *x, int64_t count) {
  vi most = vset_int(0);
  for (int64_t i = 0; i < count; i += VW) { /* floats without a sign are ordered as their bits, NaN last */
    const vi magnitude = (vi)vload_upto(x + i, count - i, F32) & 0x7fffffff, more = magnitude > most;
    most = (magnitude & more) | (most & ~more);
  }
  int32_t bits = 0;
  for (int i = 0; i < VW; i++) bits = most[i] > bits ? most[i] : bits;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

typedef int8_t vbytes __attribute__((vector_size(VW)));
typedef int16_t vwords __attribute__((vector_size(VW * 2)));

/* Writes `count` columns (a multiple of 8) as integers; returns their sum. */
INLINE int32_t code_columns(const float *x, int64_t count, float inverse, char *first, char *second, const int bits) {
  vu sum = {0};
  for (int64_t i = 0; i < count; i += VW) {
    const int64_t rest = min64(count - i, VW);
    const vf shifted = vload_upto(x + i, rest, F32) * inverse + ROUNDING; /* rounds to nearest even */
    const vi q = (vi)shifted - 0x4b400000;
    sum += (vu)q;
#if HAVE_BYTES
    const vi low = bits == 16 ? (vi)((vu)q << 24) >> 24 : q, high = (q - low) >> 8;
    const vbytes planes[2] = {__builtin_convertvector(high, vbytes), __builtin_convertvector(low, vbytes)};
    memcpy(first + i, &planes[1], (size_t)rest);
    memcpy(second + i, &planes[0], (size_t)rest);
#else
    int16_t words[VW], planes[2][VW / 2];
    const vwords all = __builtin_convertvector(q, vwords);
    memcpy(words, &all, sizeof words);
    for (int j = 0; j < VW / 2; j++) planes[0][j] = words[2 * j], planes[1][j] = words[2 * j + 1];
    memcpy(first + i, planes[0], (size_t)rest);
    memcpy(second + i, planes[1], (size_t)rest);
#endif
  }
  uint32_t total = 0;
  for (int i = 0; i < VW; i++) total += sum[i];
  return (int32_t)total;
}

/* One row of x. wide: its floats in the order of columns, zeros at the end. */
static void code_row(const input_job *j, int64_t row, const float *wide) {
  const linear_weight *w = j->w;
  const coded_input *out = j->out;
  char *first = (char *)(out->planes[0] + row * out->stride), *second = (char *)(out->planes[1] + row * out->stride);
  float *scales = (float *)out->scales + row * out->pieces;
  int32_t *sums = (int32_t *)out->sums + row * out->segments;
  const int bits = w->codes->activation_bits;
  const float most = bits == 16 ? X16 : X8, all = bits == 16 ? 0.0f : largest(wide, padded_columns(w));
  for (piece_range p = {0}; next_piece(w, &p);) {
    const float magnitude = bits == 16 ? largest(wide + p.column, p.columns) : all;
    const int is_finite = magnitude <= 3.4028234e38f;
    const float inverse = is_finite && magnitude > 1e-30f ? most / magnitude : 0.0f;
    scales[p.index] = is_finite ? magnitude / most : NAN; /* and so is the result */
    for (int s = 0; s < p.segments; s++) {
      const int64_t begin = p.column + s * p.per_segment;
      const int64_t count = (min64(p.per_segment, p.column + p.columns - begin) + 7) / 8 * 8;
      if (bits == 16)
        sums[p.segment + s] = code_columns(wide + begin, count, inverse, first + begin, second + begin, 16);
      else
        sums[p.segment + s] = code_columns(wide + begin, count, inverse, first + begin, second + begin, 8);
    }
  }
}

static void code_rows(void *context, int64_t unit) {
  input_job *j = context;
  const linear_weight *w = j->w;
  const int64_t padded = padded_columns(w), end = min64((unit + 1) * CODED_ROWS, j->m);
  float *wide = quire_scratch(SCRATCH_CODES, (size_t)(2 * padded + VW) * sizeof *wide);
  if (!wide) {
    __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  float *ordered = w->codes->order ? wide + padded : wide;
  for (int64_t r = unit * CODED_ROWS; r < end; r++) {
    const int dt = w->dtype;
    const void *row = at(j->x, r * j->x_stride, dt);
    for (int64_t i = 0; i < w->k; i += VW)
      FOR_DTYPE(w->dtype, vstore_upto(wide + i, vload_upto(at(row, i, dt), w->k - i, dt), w->k - i, F32));
    if (w->codes->order)
      for (int64_t i = 0; i < w->k; i++) ordered[i] = wide[w->codes->order[i]];
    memset(ordered + w->k, 0, (size_t)(padded - w->k) * sizeof *ordered);
    code_row(j, r, ordered);
  }
}

/* x: [m, k], row stride given. memory: of quire_coded_bytes(w, m). 0, or 5: no memory for a row. */
int quire_code_input(const linear_weight *w, const void *x, int64_t x_stride, int64_t m, int threads,
                      void *memory, coded_input *coded) {
  *coded = (coded_input){.stride = padded_columns(w) / 4};
  count_pieces(w, coded);
  const int64_t held = held_rows_of(m);
  int32_t *planes = memory, *sums = planes + 2 * held * coded->stride;
  coded->planes[0] = planes, coded->planes[1] = planes + held * coded->stride;
  coded->sums = sums, coded->scales = (const float *)(sums + held * coded->segments);
  input_job job = {w, x, x_stride, m, coded, 0};
  quire_run(code_rows, &job, (m + CODED_ROWS - 1) / CODED_ROWS, m * w->k > SMALL_WORK ? threads : 1);
  return job.failed ? 5 : 0;
}

/* ---- rows and packing ---- */

/* The code of a column of a row of the matrix. */
INLINE int32_t code_at(const linear_weight *w, int64_t row, int64_t column) {
  const code_info *info = w->codes;
  const int64_t eighths = (w->k + 7) / 8, in = row % PANEL;
  const uint8_t *panel = (const uint8_t *)w->panels + row / PANEL * eighths * PANEL * info->bits;
  if (info->float8) return panel[quire_float8_place(in, column)];
  if (info->bits == 8) return panel[(column / 4 * PANEL + in) * 4 + column % 4];
  const int code = panel[(column / 8 * PANEL + in) * 4 + column % 4] >> (column % 8 / 4 * 4) & 15;
  return info->has_values ? info->values[code] : code;
}

/* One row of the matrix, dequantized to its dtype. */
void quire_codes_row(const linear_weight *w, int64_t row, void *out) {
  const code_info *info = w->codes;
  const int64_t begin = row % PANEL / VW * VW, lane = row % PANEL - begin;
  piece_scales scales;
  for (int64_t group = 0, start = 0; start < w->k; group++, start += info->group) {
    load_scales(w, row / PANEL, group, 1, begin, VW, &scales);
    const int32_t zero = info->offset_type == OFFSET_ZERO ? scales.zeros[0][lane] : info->zero;
    for (int64_t column = start; column < min64(start + info->group, w->k); column++) {
      const int32_t code = code_at(w, row, column);
      const float number = info->float8 ? vfloat_from_f8((vh){(uint16_t)code})[0] : (float)(code - zero);
      float value = scales.scales[0][lane] * number;
      if (info->offset_type == OFFSET_MINIMUM) value += scales.minima[0][lane];
      const int64_t input = info->order ? info->order[column] : column;
      FOR_DTYPE(w->dtype, vstore_n(at_mut(out, input, dt), vset(value), 1, dt));
    }
  }
}

/* Eight columns of a row of a panel of float8. */
INLINE void pack_eight_floats(const uint8_t eight[8], uint8_t *to, int64_t row) {
  for (int i = 0; i < 8; i += 2) memcpy(to + quire_float8_place(row, i), eight + i, 2);
}

/* Eight columns of a row, as they lie in a panel: two words, or with 4 bits one. */
INLINE void pack_eight(const uint8_t eight[8], uint8_t *to, const int bits) {
  uint32_t first, second;
  memcpy(&first, eight, 4), memcpy(&second, eight + 4, 4);
  if (bits == 4) {
    first |= second << 4;
  } else {
    memcpy(to + PANEL * 4, &second, 4);
  }
  memcpy(to, &first, 4);
}

/* Four columns of four rows, in the order of float8.c. */
INLINE vu pair_columns(vu x) {
  typedef uint16_t halves __attribute__((vector_size(VW * 4)));
  halves order, out;
  for (int i = 0; i < VW * 2; i++) order[i] = (uint16_t)(i / 8 * 8 + i % 4 * 2 + i / 4 % 2);
#if defined(__clang__)
  for (int i = 0; i < VW * 2; i++) out[i] = ((halves)x)[order[i]];
#else
  out = __builtin_shuffle((halves)x, order);
#endif
  return (vu)out;
}

/* Eight columns of VW rows. */
INLINE void pack_vectors(const uint8_t *from, int64_t row_stride, int64_t column_stride, uint8_t *to, const int bits,
                         const int float8) {
  vu words[2] = {{0}, {0}};
  if (row_stride == 1) {
    UNROLL for (int i = 0; i < 8; i++) words[i / 4] |= (vu)vload_bytes(from + i * column_stride) << (i % 4 * 8);
  } else {
    for (int r = 0; r < VW; r++) {
      uint32_t pair[2];
      memcpy(pair, from + r * row_stride, 8);
      words[0][r] = pair[0], words[1][r] = pair[1];
    }
  }
  if (bits == 4) words[0] |= words[1] << 4;
  if (float8) words[0] = pair_columns(words[0]), words[1] = pair_columns(words[1]);
  memcpy(to, &words[0], sizeof(vu));
  if (bits == 8) memcpy(to + PANEL * 4, &words[1], sizeof(vu));
}

/* Places codes of rows [row, row + rows) and columns from `column` on, a multiple of 8. Strides in bytes. 0. */
int quire_pack_codes(const linear_weight *w, const uint8_t *codes, int64_t row_stride, int64_t column_stride,
                     int64_t row, int64_t column, int64_t rows, int64_t columns) {
  const int64_t eighths = (w->k + 7) / 8, bits = w->codes->bits, step = PANEL * bits;
  const int float8 = w->codes->float8;
  for (int64_t r = 0, count; r < rows; r += count) {
    const int64_t in = (row + r) % PANEL;
    const int by_vectors = in % VW == 0 && rows - r >= VW && (row_stride == 1 || column_stride == 1);
    count = by_vectors ? VW : 1;
    uint8_t *to = (uint8_t *)w->panels + ((row + r) / PANEL * eighths + column / 8) * step + in * 4;
    const uint8_t *from = codes + r * row_stride;
    int64_t c = 0;
    if (by_vectors)
      for (; c + 8 <= columns; c += 8, to += step) {
        if (bits == 4)
          pack_vectors(from + c * column_stride, row_stride, column_stride, to, 4, 0);
        else if (float8)
          pack_vectors(from + c * column_stride, row_stride, column_stride, to, 8, 1);
        else
          pack_vectors(from + c * column_stride, row_stride, column_stride, to, 8, 0);
      }
    for (; c < columns; c += 8, to += step)
      for (int64_t i = 0; i < count; i++) {
        uint8_t eight[8] = {0};
        for (int64_t j = 0; j < min64(columns - c, 8); j++) eight[j] = from[i * row_stride + (c + j) * column_stride];
        if (float8)
          pack_eight_floats(eight, to - in * 4, in + i);
        else
          pack_eight(eight, to + i * 4, (int)bits);
      }
  }
  return 0;
}

/* Products with matrices of integer codes of 4 or 8 bits: kernels/codes.py says what they mean.
 *
 * The columns of a group are taken in pieces of at most PIECE_COLUMNS. In a piece, a row of x is rounded to integers times one
 * scale (of 16 bits: the rounding is smaller than that of x to bfloat16, relative to the piece's largest element).
 * A sum of integers times codes is below 2^31 and exact, so that its order is free: a kernel may depend on the
 * number of rows, and on the processor. Only the sums of pieces are rounded, and their order is fixed:
 *
 *   y = fma(minimum, x_scale * sum_x, fma(sum(code * x) - zero * sum_x, scale * x_scale, y))
 *
 * Panels are [panels][K / 4][PANEL][4] bytes, the operand of vpdpbusd. With 4 bits, a byte has column k + i of 8 in its
 * low half and k + 4 + i in its high half: [panels][K / 8][PANEL][4]. K is padded to a multiple of 8.
 */
#include "linear_panel.h"

#define PIECE_COLUMNS 256 /* 255 * X16 * PIECE_COLUMNS is below 2^31 */
#define X16 32512      /* of 16 bits: so that the upper byte of the nearest multiple of 256 fits */
#define X8 127
#define CODE_ROWS 3    /* times LANES times two accumulators */
#define UNPACK_BLOCKS 3 /* blocks of rows from which on a piece of 4-bit codes is unpacked once for all */

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

/* The products of a vector of four codes with four columns of a row of x. With bytes of 16 bits, acc[0] counts 256
 * times; `fold` adds the two. */
INLINE void dot_codes(vi acc[2], vu codes, const int32_t *const x[2], int64_t index, const int bits) {
#if HAVE_BYTES
  acc[0] = DOT_BYTES(acc[0], codes, x[0][index]);
  if (bits == 16) acc[1] = DOT_BYTES(acc[1], codes, x[1][index]);
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

typedef struct { /* of one group and panel */
  float scales[PANEL], minima[PANEL];
  int32_t zeros[PANEL];
} group_scales;

INLINE float widened(const void *from, int64_t index, int type) {
  if (type == SCALE_F32) return ((const float *)from)[index];
  if (type == SCALE_INT8) return ((const int8_t *)from)[index];
  return vload_n((const uint16_t *)from + index, 1, type == SCALE_BF16 ? BF16 : F16)[0];
}

/* count: of floats, from `index` on; a multiple of VW. */
INLINE void widen(const void *from, int64_t index, int type, int64_t count, float *to) {
  if (type == SCALE_INT8) {
    for (int64_t i = 0; i < count; i++) to[i] = (float)((const int8_t *)from)[index + i];
    return;
  }
  const int dt = type == SCALE_F32 ? F32 : type == SCALE_BF16 ? BF16 : F16;
  for (int64_t i = 0; i < count; i += VW) FOR_DTYPE(dt, vstore(to + i, vload(at(from, index + i, dt), dt), F32));
}

/* Rows [row, row + count) of a panel. */
static void load_scales(const linear_weight *w, int64_t panel, int64_t group, int64_t row, int64_t count,
                        group_scales *out) {
  const code_info *info = w->codes;
  const int64_t groups = (w->k + info->group - 1) / info->group;
  const int64_t index = (panel * groups + group) * PANEL + row;
  widen(info->scales, index, info->scale_type, count, out->scales);
  if (info->offset_type == OFFSET_ZERO)
    for (int64_t i = 0; i < count; i++) out->zeros[i] = ((const uint8_t *)info->offsets)[index + i];
  if (info->offset_type == OFFSET_MINIMUM && !info->super_groups)
    widen(info->offsets, index, info->scale_type, count, out->minima);
  if (!info->super_groups) return;
  const int64_t supers = (groups + info->super_groups - 1) / info->super_groups;
  const int64_t above = (panel * supers + group / info->super_groups) * PANEL + row;
  float super[PANEL];
  widen(info->super_scales, above, SCALE_F16, count, super);
  for (int64_t i = 0; i < count; i++) out->scales[i] *= super[i];
  if (info->offset_type != OFFSET_MINIMUM) return;
  widen(info->super_minima, above, SCALE_F16, count, super);
  for (int64_t i = 0; i < count; i++) out->minima[i] = -super[i] * (float)((const uint8_t *)info->offsets)[index + i];
}

/* ---- products ---- */

typedef struct { /* one piece of a panel */
  const uint8_t *codes;
  int64_t eighths;  /* of eight columns; the last one may be padded */
  int64_t column;   /* in x, its first */
  int64_t index;    /* among the pieces of a row of x */
  const group_scales *scales;
  const code_info *info;
  stream next;
} code_piece;

/* sums [rows][PANEL] += the products of `rows` rows of x, from `first` on, with a piece. */
INLINE void piece_block(const code_piece *p, const coded_input *x, int64_t first, float *sums, const int rows,
                        const int kind, const int bits) {
  for (int c = 0; c < PANEL; c += LANES * VW) {
    vi acc[CODE_ROWS][LANES][2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < LANES; i++)
      acc[r][i][0] = acc[r][i][1] = vset_int(0);
    const int32_t *at_x[CODE_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int plane = 0; plane < 2; plane++)
      at_x[r][plane] = x->planes[plane] + (first + r) * x->stride + p->column / 4;
    const char *next = p->next.at + c * 4;
    for (int64_t e = 0; e < p->eighths; e++, next += p->next.stride) {
      UNROLL for (int b = 0; b < LANES * VW * 4; b += 64) {
        __builtin_prefetch(next + b, 0, 2);
        if (kind == EIGHT_BITS) __builtin_prefetch(next + PANEL * 4 + b, 0, 2);
      }
      UNROLL for (int i = 0; i < LANES; i++) {
        vu codes[2];
        load_eight(p->codes, e, c + i * VW, p->info->values, codes, kind);
        UNROLL for (int half = 0; half < 2; half++) UNROLL for (int r = 0; r < rows; r++)
          dot_codes(acc[r][i], codes[half], at_x[r], 2 * e + half, bits);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) {
      const int64_t row = (first + r) * x->pieces + p->index;
      const float x_scale = x->scales[row];
      const int32_t sum = x->sums[row];
      UNROLL for (int i = 0; i < LANES; i++) {
        const int at = c + i * VW;
        vu total = (vu)acc[r][i][0];
        if (HAVE_BYTES && bits == 16) total = (total << 8) + (vu)acc[r][i][1];
        if (p->info->offset_type == OFFSET_ZERO)
          total -= vload_codes((const uint8_t *)(p->scales->zeros + at)) * (uint32_t)sum;
        else
          total -= (uint32_t)p->info->zero * (uint32_t)sum;
        const vf scale = vload(p->scales->scales + at, F32) * x_scale;
        vf y = vfma(__builtin_convertvector((vi)total, vf), scale, vload(sums + r * PANEL + at, F32));
        if (p->info->offset_type == OFFSET_MINIMUM)
          y = vfma(vload(p->scales->minima + at, F32), vset(x_scale * (float)sum), y);
        vstore(sums + r * PANEL + at, y, F32);
      }
    }
  }
}

INLINE void piece_rows(const code_piece *p, const coded_input *x, int64_t begin, int64_t rows, float *sums,
                       const int kind, const int bits) {
  const int64_t blocks = (rows + CODE_ROWS - 1) / CODE_ROWS;
  code_piece piece = *p;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t first = rows * b / blocks, count = rows * (b + 1) / blocks - first;
    float *s = sums + first * PANEL;
    if (blocks > 1) { /* each block prefetches a part of the next panel */
      piece.next.at = p->next.at + b * (p->next.stride * p->eighths / blocks);
      piece.next.stride = p->next.stride / blocks;
    }
    if (count == 1)
      piece_block(&piece, x, begin + first, s, 1, kind, bits);
    else if (count == 2)
      piece_block(&piece, x, begin + first, s, 2, kind, bits);
    else
      piece_block(&piece, x, begin + first, s, CODE_ROWS, kind, bits);
  }
}

/* One instance for each kind and number of bits of x. */
#define PIECE_ROWS(name, kind, bits)                                                             \
  static __attribute__((noinline)) void name(const code_piece *p, const coded_input *x, int64_t begin, \
                                             int64_t rows, float *sums) {                         \
    piece_rows(p, x, begin, rows, sums, kind, bits);                                              \
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

static void panel_chunk(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel) {
  const linear_weight *w = job->w;
  const code_info *info = w->codes;
  const int64_t eighths = (w->k + 7) / 8, row = PANEL * info->bits; /* row: bytes of eight columns */
  const uint8_t *base = (const uint8_t *)w->panels + panel * eighths * row;
  const uint8_t *after = (const uint8_t *)w->panels + next_panel * eighths * row;
  const int64_t rows = end - begin, blocks = (rows + CODE_ROWS - 1) / CODE_ROWS;
  const int stored = info->bits == 8 ? EIGHT_BITS : info->has_values ? FOUR_BITS_VALUES : FOUR_BITS;
  uint8_t unpacked[PIECE_COLUMNS * PANEL];
  float sums[ROW_CHUNK * PANEL];
  memset(sums, 0, (size_t)rows * PANEL * sizeof *sums);
  group_scales scales;
  int64_t index = 0;
  for (int64_t group = 0, start = 0; start < w->k; group++, start += info->group) {
    const int64_t stop = min64(start + info->group, w->k);
    load_scales(w, panel, group, 0, PANEL, &scales);
    for (int64_t column = start; column < stop; column += PIECE_COLUMNS, index++) {
      code_piece piece = {.codes = base + column / 8 * row, .column = column, .index = index, .scales = &scales,
                          .eighths = (min64(stop - column, PIECE_COLUMNS) + 7) / 8, .info = info};
      piece.next.at = (const char *)(blocks == 1 ? piece.codes + AHEAD : after + column / 8 * row);
      piece.next.stride = row;
      int kind = stored;
      if (kind != EIGHT_BITS && blocks >= UNPACK_BLOCKS) {
        unpack_piece(piece.codes, piece.eighths, info, unpacked);
        piece.codes = unpacked;
        kind = EIGHT_BITS;
      }
      any_piece(&piece, &job->coded, begin, rows, sums, kind);
    }
  }
  finish_panel(job, sums, begin, rows, panel);
}

/* Rows [begin, end) of x times one panel. */
void quire_codes_panel(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel) {
  for (int64_t first = begin; first < end; first += ROW_CHUNK)
    panel_chunk(job, first, min64(first + ROW_CHUNK, end), panel, next_panel);
}

/* ---- inputs ---- */

static int64_t num_pieces(const linear_weight *w) {
  const int64_t group = w->codes->group, last = w->k % group, each = (group + PIECE_COLUMNS - 1) / PIECE_COLUMNS;
  return w->k / group * each + (last + PIECE_COLUMNS - 1) / PIECE_COLUMNS;
}

typedef struct {
  const linear_weight *w;
  const void *x;
  int64_t x_stride, m;
  coded_input *out;
} input_job;

#define CODED_ROWS 8 /* rows of a unit */

INLINE int64_t padded_columns(const linear_weight *w) { return (w->k + 7) / 8 * 8; }

/* Bytes of `quire_code_input`'s memory. */
size_t quire_coded_bytes(const linear_weight *w, int64_t m) {
  return (size_t)m * ((size_t)padded_columns(w) * 2 + (size_t)num_pieces(w) * 8 + 128);
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
    const vi low = (vi)((vu)q << 24) >> 24, high = bits == 16 ? (q - low) >> 8 : q;
    const vbytes planes[2] = {__builtin_convertvector(high, vbytes), __builtin_convertvector(low, vbytes)};
    memcpy(first + i, &planes[0], (size_t)rest);
    memcpy(second + i, &planes[1], (size_t)rest);
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
  const int64_t group = w->codes->group, padded = padded_columns(w);
  const coded_input *out = j->out;
  char *first = (char *)(out->planes[0] + row * out->stride), *second = (char *)(out->planes[1] + row * out->stride);
  const int bits = w->codes->activation_bits;
  const float most = bits == 16 ? X16 : X8, all = bits == 16 ? 0.0f : largest(wide, padded);
  int64_t piece = row * out->pieces;
  for (int64_t start = 0; start < w->k; start += group)
    for (int64_t column = start; column < min64(start + group, w->k); column += PIECE_COLUMNS, piece++) {
      const int64_t end = (min64(min64(column + PIECE_COLUMNS, start + group), w->k) + 7) / 8 * 8;
      const float magnitude = bits == 16 ? largest(wide + column, end - column) : all;
      const int is_finite = magnitude <= 3.4028234e38f;
      const float inverse = is_finite && magnitude > 1e-30f ? most / magnitude : 0.0f;
      ((float *)out->scales)[piece] = is_finite ? magnitude / most : NAN; /* and so is the result */
      const int64_t count = end - column;
      char *to = first + column, *below = second + column;
      int32_t *sum = (int32_t *)out->sums + piece;
      if (bits == 16)
        *sum = code_columns(wide + column, count, inverse, to, below, 16);
      else
        *sum = code_columns(wide + column, count, inverse, to, below, 8);
    }
}

static void code_rows(void *context, int64_t unit) {
  const input_job *j = context;
  const linear_weight *w = j->w;
  const int64_t padded = padded_columns(w), end = min64((unit + 1) * CODED_ROWS, j->m);
  float *wide = quire_scratch(SCRATCH_CODES, (size_t)(2 * padded + VW) * sizeof *wide);
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

/* x: [m, k], row stride given. memory: of quire_coded_bytes(w, m). */
void quire_code_input(const linear_weight *w, const void *x, int64_t x_stride, int64_t m, int threads,
                      void *memory, coded_input *coded) {
  const int64_t words = padded_columns(w) / 4, pieces = num_pieces(w);
  int32_t *first = memory, *second = first + m * words, *sums = second + m * words;
  *coded = (coded_input){{first, second}, sums, (const float *)(sums + m * pieces), words, pieces};
  input_job job = {w, x, x_stride, m, coded};
  quire_run(code_rows, &job, (m + CODED_ROWS - 1) / CODED_ROWS, m * w->k > SMALL_WORK ? threads : 1);
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
  group_scales s;
  for (int64_t group = 0, start = 0; start < w->k; group++, start += info->group) {
    load_scales(w, row / PANEL, group, begin, VW, &s);
    const int32_t zero = info->offset_type == OFFSET_ZERO ? s.zeros[lane] : info->zero;
    for (int64_t column = start; column < min64(start + info->group, w->k); column++) {
      const int32_t code = code_at(w, row, column);
      float value = s.scales[lane] * (info->float8 ? quire_float8_value((uint8_t)code) : (float)(code - zero));
      if (info->offset_type == OFFSET_MINIMUM) value += s.minima[lane];
      const int64_t input = info->order ? info->order[column] : column;
      FOR_DTYPE(w->dtype, vstore_n(at_mut(out, input, dt), vset(value), 1, dt));
    }
  }
}

/* Places codes of rows [row, row + rows) and columns from `column` on, a multiple of 8. Strides in bytes. 0. */
int quire_pack_codes(const linear_weight *w, const uint8_t *codes, int64_t row_stride, int64_t column_stride,
                     int64_t row, int64_t column, int64_t rows, int64_t columns) {
  const int64_t eighths = (w->k + 7) / 8, bits = w->codes->bits;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t in = (row + r) % PANEL;
    uint8_t *panel = (uint8_t *)w->panels + ((row + r) / PANEL * eighths + column / 8) * PANEL * bits + in * 4;
    const uint8_t *from = codes + r * row_stride;
    for (int64_t c = 0; c < columns; c += 8, panel += PANEL * bits) {
      uint8_t eight[8] = {0};
      const int64_t count = min64(columns - c, 8);
      if (column_stride == 1 && count == 8)
        memcpy(eight, from + c, 8);
      else
        for (int64_t i = 0; i < count; i++) eight[i] = from[(c + i) * column_stride];
      if (w->codes->float8) {
        uint8_t *to = panel - in * 4;
        for (int i = 0; i < 8; i += 2) memcpy(to + quire_float8_place(in, i), eight + i, 2);
      } else if (bits == 8) {
        memcpy(panel, eight, 4);
        memcpy(panel + PANEL * 4, eight + 4, 4);
      } else {
        uint32_t low, high;
        memcpy(&low, eight, 4), memcpy(&high, eight + 4, 4);
        low |= high << 4;
        memcpy(panel, &low, 4);
      }
    }
  }
  return 0;
}

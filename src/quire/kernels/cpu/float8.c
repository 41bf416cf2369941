/* Products with matrices of float8 (E4M3 without infinities): kernels/codes.py says what they mean.
 *
 * The columns of a group are taken in pieces of at most FLOAT8_COLUMNS. A piece of a panel is unpacked to what the kernels of
 * dense weights multiply: pairs of bfloat16, or floats; both are exact. The sums of a piece begin at zero, and are
 * added in the order of columns: y = fma(sum, scale, y). So the same bits come out for every number of rows.
 *
 * Panels are [panels][K / 4][PANEL / 4][16] bytes. Sixteen bytes are four columns of four rows of the matrix: the first
 * two columns row by row, then the other two. Interleaved with their second halves, they are pairs in the order of rows.
 */
#include "linear_tiles.h"

#define FLOAT8_COLUMNS 128 /* columns; unpacked they stay in L1 */
#define FLOAT8_AHEAD (AHEAD * 3 / 2)
#define TILES_FLOAT8 512   /* rows for which a piece is unpacked once, by tiles */
#define QUAD (PANEL * 4)   /* bytes of four columns */

/* ---- from bytes to bfloat16 ---- */

/* Of each byte, the upper and the lower byte of the bfloat16 that it is. */
INLINE void split_float8(vu x, vu *low, vu *high) {
  static const uint8_t normal[16] = {0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43,
                                     0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc2, 0xc3};
  static const uint8_t small_high[16] = {0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c}; /* below 2^-6 */
  static const uint8_t small_low[16] = {0, 0, 0x80, 0xc0, 0, 0x20, 0x40, 0x60};
  typedef int8_t vb __attribute__((vector_size(VW * 4)));
  const vu below = x & 0x07070707u, is_small = (vu)((vb)(x & 0x78787878u) == 0);
  const vu is_nan = (vu)((vb)(x & 0x7f7f7f7fu) == 0x7f);
  *low = ((x << 4) & 0xf0f0f0f0u & ~is_small) | (lookup(below, small_low) & is_small);
  *high = (lookup((x >> 4) & 0x0f0f0f0fu, normal) & ~is_small) |
          ((lookup(below, small_high) | (x & 0x80808080u)) & is_small) | (is_nan & 0x7f7f7f7fu);
}

/* In each 16 bytes: the bytes of the first halves of a and b in turn, and those of the second. */
INLINE void interleave(vu a, vu b, vu out[2]) {
#if VW == 16 && defined(__AVX512BW__)
  out[0] = (vu)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b);
  out[1] = (vu)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
#elif VW == 8 && defined(__AVX2__)
  out[0] = (vu)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
  out[1] = (vu)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
#elif VW == 4 && defined(__x86_64__)
  out[0] = (vu)_mm_unpacklo_epi8((__m128i)a, (__m128i)b);
  out[1] = (vu)_mm_unpackhi_epi8((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  out[0] = (vu)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b);
  out[1] = (vu)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b);
#else
  uint8_t from[2][VW * 4], to[2][VW * 4];
  memcpy(from[0], &a, sizeof a), memcpy(from[1], &b, sizeof b);
  for (int i = 0; i < VW * 8; i++) to[i / 16 % 2][i / 32 * 16 + i % 16] = from[i % 2][i / 32 * 16 + i / 2 % 16];
  memcpy(out, to, sizeof to);
#endif
}

#if VW == 16 && defined(__AVX512VBMI__)
#define HAVE_BYTE_TABLE 1 /* an instruction looks up bytes in a table of 128 */
#else
#define HAVE_BYTE_TABLE 0
#endif

typedef struct {
  vu low[2], high[2];
} float8_table;

INLINE float8_table make_table(void) {
  float8_table t;
  for (int half = 0; half < 2 && HAVE_BYTE_TABLE; half++) {
    uint8_t codes[VW * 4];
    for (int i = 0; i < VW * 4; i++) codes[i] = (uint8_t)(half * VW * 4 + i);
    split_float8(vload_pairs(codes), &t.low[half], &t.high[half]);
  }
  return t;
}

/* x: four columns of VW rows. Pairs of bfloat16: the first two columns, and the others. */
INLINE void float8_pairs(vu x, const float8_table *t, vu out[2]) {
  vu low, high;
#if HAVE_BYTE_TABLE
  low = (vu)_mm512_permutex2var_epi8((__m512i)t->low[0], (__m512i)x, (__m512i)t->low[1]);
  high = (vu)_mm512_permutex2var_epi8((__m512i)t->high[0], (__m512i)x, (__m512i)t->high[1]) | (x & 0x80808080u);
#else
  (void)t;
  split_float8(x, &low, &high);
#endif
  interleave(low, high, out);
}

/* `quads` times four columns of a panel, as pairs [2 * quads][PANEL] or as floats [4 * quads][PANEL]. */
INLINE void unpack_quads(const char *codes, int64_t quads, char *to, const int dt) {
  const float8_table table = make_table();
  for (int64_t q = 0; q < quads; q++, to += (dt == BF16 ? 2 : 4) * PANEL * 4)
    for (int c = 0; c < PANEL; c += VW, codes += VW * 4) {
      vu pairs[2];
      __builtin_prefetch(codes + FLOAT8_AHEAD, 0, 2);
      float8_pairs(vload_pairs(codes), &table, pairs);
      if (dt == BF16) {
        memcpy(to + c * 4, &pairs[0], sizeof(vu));
        memcpy(to + (PANEL + c) * 4, &pairs[1], sizeof(vu));
      } else {
        for (int i = 0; i < 2; i++) {
          vstore(to + (2 * i * PANEL + c) * 4, (vf)(pairs[i] << 16), F32);
          vstore(to + ((2 * i + 1) * PANEL + c) * 4, (vf)(pairs[i] & 0xffff0000u), F32);
        }
      }
    }
}

static void load_float8_scales(const code_info *info, int64_t index, float *to) {
  const int type = info->scale_type == SCALE_F32 ? F32 : info->scale_type == SCALE_BF16 ? BF16 : F16;
  FOR_DTYPE(type, for (int c = 0; c < PANEL; c += VW) vstore(to + c, vload(at(info->scales, index + c, dt), dt), F32));
}

/* ---- products ---- */

/* acc[r][i] += x[r] * `lanes` vectors of a piece of `quads` times four columns. dt: of x. */
INLINE void multiply_quads(vf acc[ROWS][LANES], const void *x, int64_t x_stride, const char *codes, int64_t quads,
                           const int lanes, const int rows, const int dt) {
  const float8_table table = make_table();
  for (int64_t q = 0; q < quads; q++, codes += QUAD)
    UNROLL for (int i = 0; i < lanes; i++) {
      vu pairs[2];
      __builtin_prefetch(codes + i * VW * 4 + FLOAT8_AHEAD, 0, 2);
      float8_pairs(vload_pairs(codes + i * VW * 4), &table, pairs);
      UNROLL for (int half = 0; half < 2; half++) UNROLL for (int r = 0; r < rows; r++) {
        const void *at_x = at(x, r * x_stride + q * 4 + half * 2, dt);
        if (dt == BF16) {
          uint32_t pair;
          memcpy(&pair, at_x, 4);
          acc[r][i] = vdot_pairs(acc[r][i], pairs[half], (vu){0} + pair);
        } else {
          acc[r][i] = vfma((vf)(pairs[half] << 16), vset(((const float *)at_x)[0]), acc[r][i]);
          acc[r][i] = vfma((vf)(pairs[half] & 0xffff0000u), vset(((const float *)at_x)[1]), acc[r][i]);
        }
      }
    }
}

enum piece_kind { DIRECT, PAIRS, FLOATS };

/* totals [rows][PANEL] += scales * the products of `rows` rows of x with a piece, as it is or unpacked. */
INLINE void scaled_block(const linear_job *job, const void *x, const char *piece, stream next, int64_t quads,
                         const float *scales, float *totals, const int rows, const int kind, const int xt) {
  const int lanes = kind == DIRECT && rows > ROWS / 2 ? LANES / 2 : LANES; /* registers hold codes and tables too */
  for (int c = 0; c < PANEL; c += lanes * VW) {
    vf acc[ROWS][LANES];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < lanes; i++) acc[r][i] = vset(0.0f);
    if (kind == DIRECT)
      multiply_quads(acc, x, job->x_stride, piece + c * 4, quads, lanes, rows, xt);
    else
      multiply(acc, x, job->x_stride, piece + c * 4, next, 0, quads * 4, rows, kind == PAIRS ? BF16 : F32);
    UNROLL for (int i = 0; i < lanes; i++) {
      const vf scale = vload(scales + c + i * VW, F32);
      UNROLL for (int r = 0; r < rows; r++) {
        float *total = totals + r * PANEL + c + i * VW;
        vstore(total, vfma(acc[r][i], scale, vload(total, F32)), F32);
      }
    }
  }
}

/* At most ROW_CHUNK rows over one panel. xt: the type of x. */
INLINE void float8_rows(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel,
                        const int kind, const int xt) {
  const linear_weight *w = job->w;
  const int64_t count = end - begin, blocks = (count + ROWS - 1) / ROWS, quads = (w->k + 7) / 8 * 2;
  const int64_t groups = (w->k + w->codes->group - 1) / w->codes->group;
  const char *base = (const char *)w->panels + panel * quads * QUAD;
  const char *after = (const char *)w->panels + next_panel * quads * QUAD;
  const int64_t part = (kind == PAIRS ? QUAD / 2 : QUAD / 4) / blocks; /* to prefetch in a step */
  char unpacked[kind == DIRECT ? 1 : FLOAT8_COLUMNS * PANEL * 4] __attribute__((aligned(64)));
  float totals[(kind == DIRECT ? ROWS : ROW_CHUNK) * PANEL], scales[PANEL];
  memset(totals, 0, (size_t)count * PANEL * sizeof *totals);
  for (int64_t group = 0, start = 0; group < groups; group++, start += w->codes->group) {
    const int64_t stop = min64(start + w->codes->group, w->k);
    load_float8_scales(w->codes, (panel * groups + group) * PANEL, scales);
    for (int64_t column = start; column < stop; column += FLOAT8_COLUMNS) {
      const int64_t here = (min64(FLOAT8_COLUMNS, stop - column) + 3) / 4;
      const char *piece = base + column / 4 * QUAD;
      const void *x = at(job->x, begin * job->x_stride + column, xt);
      stream next = {piece, 0};
      if (kind == DIRECT) {
        FOR_ROWS(count, scaled_block(job, x, piece, next, here, scales, totals, rows, kind, xt));
        continue;
      }
      unpack_quads(piece, here, unpacked, kind == PAIRS ? BF16 : F32);
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = count * b / blocks, size = count * (b + 1) / blocks - first;
        const void *at_x = at(x, first * job->x_stride, xt);
        float *to = totals + first * PANEL;
        if (blocks > 1) next = (stream){after + (column + b * here * 4 / blocks) / 4 * QUAD, part};
        FOR_ROWS(size, scaled_block(job, at_x, unpacked, next, here, scales, to, rows, kind, xt));
      }
    }
  }
  finish_panel(job, totals, begin, count, panel);
}

/* As float8_rows, for any number of rows. */
INLINE void float8_tiles(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel,
                         float *totals, const int kind) {
  const linear_weight *w = job->w;
  const int64_t rows = end - begin, quads = (w->k + 7) / 8 * 2, stride = job->x_stride * 2;
  const int64_t groups = (w->k + w->codes->group - 1) / w->codes->group;
  const int64_t passes = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const char *base = (const char *)w->panels + panel * quads * QUAD;
  const char *after = (const char *)w->panels + next_panel * quads * QUAD;
  char piece[FLOAT8_COLUMNS * PANEL * 2] __attribute__((aligned(64)));
  float scales[PANEL], sums[2 * TILE_ROWS * PANEL];
  memset(totals, 0, (size_t)rows * PANEL * sizeof *totals);
  tile_file t;
  tile_configure(&t, &product_shapes, kind);
  for (int64_t group = 0, start = 0; group < groups; group++, start += w->codes->group) {
    const int64_t stop = min64(start + w->codes->group, w->k);
    load_float8_scales(w->codes, (panel * groups + group) * PANEL, scales);
    for (int64_t column = start; column < stop; column += FLOAT8_COLUMNS) {
      const int64_t columns = min64(FLOAT8_COLUMNS, stop - column), here = (columns + 3) / 4;
      const int64_t steps = (columns + TILE_K - 1) / TILE_K;
      unpack_quads(base + column / 4 * QUAD, here, piece, BF16);
      memset(piece + here * 2 * QUAD, 0, (size_t)(steps * K_STEP - here * 2 * QUAD));
      const tile_panel view = {piece, NULL, steps, steps};
      for (int64_t r = begin; r < end; r += 2 * TILE_ROWS) {
        const int64_t part = K_STEP / 2 / passes, pass = (r - begin) / TILE_ROWS;
        const stream next = {after + column / 4 * QUAD + pass * steps * part, part};
        const float *from = tile_rows(&t, (const char *)job->x + column * 2, stride, r, end, &view, next, sums, kind);
        float *to = totals + (r - begin) * PANEL;
        for (int64_t i = 0; i < min64(end - r, 2 * TILE_ROWS) * PANEL; i += VW)
          vstore(to + i, vfma(vload(from + i, F32), vload(scales + i % PANEL, F32), vload(to + i, F32)), F32);
      }
    }
  }
  finish_panel(job, totals, begin, rows, panel);
}

/* One instance for each kind. */
#define FLOAT8_ROWS(name, kind, xt)                                                                         \
  static __attribute__((noinline)) void name(const linear_job *job, int64_t begin, int64_t end, int64_t panel, \
                                             int64_t next_panel) {                                          \
    float8_rows(job, begin, end, panel, next_panel, kind, xt);                                              \
  }
FLOAT8_ROWS(float8_rows_direct, DIRECT, F32)
FLOAT8_ROWS(float8_rows_floats, FLOATS, F32)
#if HAVE_DOT
FLOAT8_ROWS(float8_rows_direct_bf16, DIRECT, BF16)
FLOAT8_ROWS(float8_rows_pairs, PAIRS, BF16)
#endif
#define FLOAT8_TILES(name, kind)                                                                            \
  static __attribute__((noinline)) void name(const linear_job *job, int64_t begin, int64_t end, int64_t panel, \
                                             int64_t next_panel, float *totals) {                           \
    float8_tiles(job, begin, end, panel, next_panel, totals, kind);                                         \
  }
FLOAT8_TILES(float8_tiles_plain, TILES_PLAIN)
#if HAVE_AMX
FLOAT8_TILES(float8_tiles_amx, TILES_AMX)
#endif

static void float8_by_tiles(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel) {
  float few[ROW_CHUNK * PANEL], *totals = few;
  int64_t most = ROW_CHUNK;
  if (end - begin > most) {
    totals = quire_scratch(SCRATCH_PANEL, TILES_FLOAT8 * PANEL * sizeof *totals);
    if (totals) most = TILES_FLOAT8;
    else totals = few;
  }
  for (int64_t first = begin; first < end; first += most) {
    const int64_t last = min64(first + most, end);
#if HAVE_AMX
    if (job->w->tiles == TILES_AMX) {
      float8_tiles_amx(job, first, last, panel, next_panel, totals);
      continue;
    }
#endif
    float8_tiles_plain(job, first, last, panel, next_panel, totals);
  }
}

/* Rows [begin, end) of x times one panel. */
void quire_float8_panel(const linear_job *job, int64_t begin, int64_t end, int64_t panel, int64_t next_panel) {
  if (uses_tiles(job->w)) {
    float8_by_tiles(job, begin, end, panel, next_panel);
    return;
  }
  panel_task few = float8_rows_direct, many = float8_rows_floats;
#if HAVE_DOT
  if (job->w->dtype == BF16) few = float8_rows_direct_bf16, many = float8_rows_pairs;
#endif
  for (int64_t first = begin; first < end; first += ROW_CHUNK) {
    const int64_t last = min64(first + ROW_CHUNK, end);
    (last - first <= ROWS ? few : many)(job, first, last, panel, next_panel);
  }
}

/* Where codes.c finds a row and a column in a panel, in bytes. */
int64_t quire_float8_place(int64_t row, int64_t column) {
  return column / 4 * QUAD + row / 4 * 16 + column % 4 / 2 * 8 + row % 4 * 2 + column % 2;
}

/* Tiles: registers of 16 rows of 64 bytes, and the product of two of them, of bfloat16 or of bytes.
 *
 * A kernel that is written over these operations exists twice: by Intel's AMX instructions, and in plain C with
 * the same result. The second is for tests on other machines, and for the check at the first use on a machine with
 * AMX. TDPBF16PS (Intel SDM, volume 2): C[m][n] += sum over even k, plus sum over odd k, of A[m][k] * B[k][n].
 * The two sums are chains of fused multiply-adds over the tile's k from zero. Subnormal inputs and results are
 * zero. TDPBSUD adds products of bytes, those of A with a sign and those of B without one, as 32-bit integers. So a
 * row of C depends on no other row of A, and rows that nobody reads may hold anything.
 *
 * The sums of the vector kernels have another order. So on one machine all rows of a product go one way.
 */
#ifndef QUIRE_TILES_H
#define QUIRE_TILES_H

#include "kernels.h"

#define TILE_ROWS 16
#define TILE_COLUMNS 16 /* of C, in floats */
#define TILE_K 32       /* bfloat16 elements of a row of A: what one operation sums */

#if defined(__x86_64__) && VW == 16 && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAVE_AMX 1 /* the assembler knows the instructions; whether the processor does is asked at run time */
#else
#define HAVE_AMX 0
#endif

/* How many rows and bytes a row the tiles have. Tiles 0-3 are for C. */
typedef struct {
  uint8_t palette, start_row, zeros[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} tile_shapes;

/* Products: A in tiles 4 and 5, B in 6 and 7. */
static const tile_shapes product_shapes = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
/* Attention: queries in 4, keys in 5; the weights of 16 keys in 6, the values of 16 keys in 7. */
static const tile_shapes attention_shapes = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 32, 64}, {16, 16, 16, 16, 16, 16, 16, 8}};

typedef struct { /* the plain member's registers */
  const tile_shapes *shapes;
  char tile[8][TILE_ROWS][64];
} tile_file;

/* ---- AMX ---- */

#if HAVE_AMX
extern __thread const tile_shapes *quire_loaded_shapes; /* of this thread's tiles; NULL: none */

/* The number of a tile is part of the instruction. */
#define EACH_TILE(n, text, ...)                         \
  switch (n) {                                          \
    case 0: __asm__ volatile(text(0) __VA_ARGS__); break; \
    case 1: __asm__ volatile(text(1) __VA_ARGS__); break; \
    case 2: __asm__ volatile(text(2) __VA_ARGS__); break; \
    case 3: __asm__ volatile(text(3) __VA_ARGS__); break; \
    case 4: __asm__ volatile(text(4) __VA_ARGS__); break; \
    case 5: __asm__ volatile(text(5) __VA_ARGS__); break; \
    case 6: __asm__ volatile(text(6) __VA_ARGS__); break; \
    default: __asm__ volatile(text(7) __VA_ARGS__);     \
  }
#define ZERO_TEXT(n) "tilezero %%tmm" #n
#define LOAD_TEXT(n) "tileloadd (%0,%1,1), %%tmm" #n
#define STORE_TEXT(n) "tilestored %%tmm" #n ", (%0,%1,1)"
#define DOT_TEXT(a, b, c) "tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c
#define DOT(a, b, c) __asm__ volatile(DOT_TEXT(a, b, c) ::)
#define BYTES_TEXT(a, b, c) "tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c
#define DOT_BYTES_OF(a, b, c) __asm__ volatile(BYTES_TEXT(a, b, c) ::)
#define EACH_C(a, b, c)          \
  switch (c) {                   \
    case 0: DOT(a, b, 0); break; \
    case 1: DOT(a, b, 1); break; \
    case 2: DOT(a, b, 2); break; \
    default: DOT(a, b, 3);       \
  }
#endif

/* Gives this thread's tiles their shapes. They are released by quire_run when the thread has no more units. */
INLINE void tile_configure(tile_file *t, const tile_shapes *shapes, const int kind) {
#if HAVE_AMX
  if (kind == TILES_AMX) {
    if (quire_loaded_shapes == shapes) return;
    __asm__ volatile("ldtilecfg %0" ::"m"(*shapes));
    quire_loaded_shapes = shapes;
    return;
  }
#endif
  t->shapes = shapes;
}

/* ---- operations; tile numbers and `kind` are constants ---- */

INLINE void tile_zero(tile_file *t, const int n, const int kind) {
#if HAVE_AMX
  if (kind == TILES_AMX) {
    EACH_TILE(n, ZERO_TEXT, ::)
    return;
  }
#endif
  memset(t->tile[n], 0, sizeof t->tile[n]);
}

/* stride: bytes from a row to the next. */
INLINE void tile_load(tile_file *t, const int n, const void *from, int64_t stride, const int kind) {
#if HAVE_AMX
  if (kind == TILES_AMX) {
    EACH_TILE(n, LOAD_TEXT, ::"r"(from), "r"(stride) : "memory")
    return;
  }
#endif
  for (int r = 0; r < t->shapes->rows[n]; r++)
    memcpy(t->tile[n][r], (const char *)from + r * stride, t->shapes->row_bytes[n]);
}

INLINE void tile_store(const tile_file *t, const int n, void *to, int64_t stride, const int kind) {
#if HAVE_AMX
  if (kind == TILES_AMX) {
    EACH_TILE(n, STORE_TEXT, ::"r"(to), "r"(stride) : "memory")
    return;
  }
#endif
  for (int r = 0; r < t->shapes->rows[n]; r++)
    memcpy((char *)to + r * stride, t->tile[n][r], t->shapes->row_bytes[n]);
}

INLINE vf flush_subnormals(vf x) {
  const vu u = (vu)x, small = (vu)((u & 0x7f800000u) == 0);
  return (vf)(u & (~small | 0x80000000u));
}

INLINE float even_of(uint32_t pair) { /* of a pair of bfloat16, subnormals as zero */
  pair <<= 16;
  float x;
  if (!(pair & 0x7f800000u)) pair &= 0x80000000u;
  memcpy(&x, &pair, sizeof x);
  return x;
}

/* C += A * B, in the order of TDPBF16PS. */
static __attribute__((noinline, unused)) void plain_dot(tile_file *t, int c, int a, int b) {
  const int pairs = t->shapes->row_bytes[a] / 4;
  for (int m = 0; m < t->shapes->rows[c]; m++)
    for (int n = 0; n < TILE_COLUMNS; n += VW) {
      vf even = vset(0.0f), odd = vset(0.0f);
      for (int k = 0; k < pairs; k++) {
        uint32_t x;
        memcpy(&x, t->tile[a][m] + k * 4, sizeof x);
        const vu w = vload_pairs(t->tile[b][k] + n * 4);
        const vf first = flush_subnormals((vf)(w << 16)), second = flush_subnormals((vf)(w & 0xffff0000u));
        even = flush_subnormals(vfma(first, vset(even_of(x)), even));
        odd = flush_subnormals(vfma(second, vset(even_of(x >> 16)), odd));
      }
      char *sum = t->tile[c][m] + n * 4;
      const vf before = flush_subnormals(vload(sum, F32)), dot = flush_subnormals(even + odd);
      vstore(sum, flush_subnormals(before + dot), F32);
    }
}

/* C += A * B. b: [pairs of k][columns of C][2]. */
INLINE void tile_dot(tile_file *t, const int c, const int a, const int b, const int kind) {
#if HAVE_AMX
  if (kind == TILES_AMX) {
    switch (a * 8 + b) {
      case 4 * 8 + 5: EACH_C(4, 5, c) return;
      case 4 * 8 + 6: EACH_C(4, 6, c) return;
      case 4 * 8 + 7: EACH_C(4, 7, c) return;
      case 5 * 8 + 6: EACH_C(5, 6, c) return;
      case 5 * 8 + 7: EACH_C(5, 7, c) return;
      default: EACH_C(6, 7, c) return;
    }
  }
#endif
  plain_dot(t, c, a, b);
}

/* C += A * B in 32-bit integers. */
static __attribute__((noinline, unused)) void plain_dot_bytes(tile_file *t, int c, int a, int b) {
  for (int m = 0; m < TILE_ROWS; m++)
    for (int n = 0; n < TILE_COLUMNS; n++) {
      int32_t sum;
      memcpy(&sum, t->tile[c][m] + n * 4, sizeof sum);
      for (int k = 0; k < TILE_ROWS; k++)
        for (int i = 0; i < 4; i++) sum += (int8_t)t->tile[a][m][4 * k + i] * (uint8_t)t->tile[b][k][4 * n + i];
      memcpy(t->tile[c][m] + n * 4, &sum, sizeof sum);
    }
}

/* C += A * B of bytes. a: 4 or 5, rows of 64 bytes with a sign; b: 6 or 7, [16][columns of C][4]. c: of 0 to 3, the one
 * that belongs to a and b: 2 * (a - 4) + b - 6. */
INLINE void tile_dot_bytes(tile_file *t, const int a, const int b, const int kind) {
#if HAVE_AMX
  if (kind == TILES_AMX) {
    if (a == 4 && b == 6) DOT_BYTES_OF(4, 6, 0);
    else if (a == 4) DOT_BYTES_OF(4, 7, 1);
    else if (b == 6) DOT_BYTES_OF(5, 6, 2);
    else DOT_BYTES_OF(5, 7, 3);
    return;
  }
#endif
  plain_dot_bytes(t, 2 * (a - 4) + b - 6, a, b);
}

#endif

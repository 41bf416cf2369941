/* Codes from fields of bits: kernels/fields.py says what they mean. */
#include <string.h>

#include "kernels.h"

/* kernels/fields.py has the same: BitField. */
typedef struct {
  int64_t offset, run, bits, up;
} bit_field;

#define EVERY_BYTE 0x0101010101010101u

/* One run: byte i has elements i, i + run, ... from its lowest bits on. Eight bytes at a time where it can be. */
INLINE void spread_run(const uint8_t *from, uint8_t *to, int64_t run, int bits, int up, int first) {
  const unsigned mask = (1u << bits) - 1;
  int64_t i = 0;
  for (; i + 8 <= run; i += 8) {
    uint64_t word, code, before = 0;
    memcpy(&word, from + i, 8);
    for (int f = 0; f < 8 / bits; f++) {
      if (!first) memcpy(&before, to + f * run + i, 8);
      code = (word >> f * bits & mask * EVERY_BYTE) << up | before;
      memcpy(to + f * run + i, &code, 8);
    }
  }
  for (; i < run; i++)
    for (int f = 0; f < 8 / bits; f++) {
      const unsigned code = (from[i] >> f * bits & mask) << up;
      to[f * run + i] = (uint8_t)(first ? code : to[f * run + i] | code);
    }
}

/* A bit for each of eight elements in one byte. */
INLINE void spread_byte(uint8_t from, uint8_t *to, int up) {
  uint64_t bits = from * EVERY_BYTE & 0x8040201008040201u, eight;
  memcpy(&eight, to, 8);
  eight |= ((bits + 0x00406070787c7e7fu) >> 7 & EVERY_BYTE) << up;
  memcpy(to, &eight, 8);
}

static void spread_field(const uint8_t *from, uint8_t *to, int64_t values, const bit_field *f, int first) {
  const int64_t step = 8 / f->bits * f->run;
  const int up = (int)f->up;
  if (f->run == 1 && f->bits == 1 && !first)
    for (int64_t v = 0; v < values; v += 8) spread_byte(*from++, to + v, up);
#define BITS(BITS)                                                    \
  else if (f->bits == BITS) for (int64_t v = 0; v < values; v += step, from += f->run) { \
    if (first)                                                        \
      spread_run(from, to + v, f->run, BITS, up, 1);                  \
    else                                                              \
      spread_run(from, to + v, f->run, BITS, up, 0);                  \
  }
  BITS(4) BITS(2) BITS(1) BITS(8)
#undef BITS
}

static void flip_codes(uint8_t *codes, int64_t count, uint64_t word) {
  int64_t i = 0;
  for (uint64_t eight; i + 8 <= count; i += 8) {
    memcpy(&eight, codes + i, 8);
    eight ^= word;
    memcpy(codes + i, &eight, 8);
  }
  for (; i < count; i++) codes[i] ^= (uint8_t)word;
}

/* Fills rows [row, row + rows) of a matrix whose rows are blocks of `values` codes in `bytes` bytes; `flip` is
 * xored to each code. 0, or 1 without memory. */
int quire_pack_fields(const linear_weight *w, const uint8_t *blocks, int64_t bytes, int64_t values,
                      const bit_field *fields, int64_t num_fields, uint64_t flip, int64_t row, int64_t rows) {
  const int64_t per_row = w->k / values;
  uint8_t *codes = quire_scratch(SCRATCH_PANEL, (size_t)(VW * w->k));
  if (!codes) return 1;
  for (int64_t r = 0; r < rows; r += VW) {
    const int64_t count = min64(VW, rows - r);
    for (int64_t b = 0; b < count * per_row; b++, blocks += bytes) {
      uint8_t *to = codes + b * values;
      for (int64_t f = 0; f < num_fields; f++) spread_field(blocks + fields[f].offset, to, values, &fields[f], f == 0);
      if (flip) flip_codes(to, values, flip * EVERY_BYTE);
    }
    quire_pack_codes(w, codes, w->k, 1, row + r, 0, count, w->k);
  }
  return 0;
}

/* Codes of quantized checkpoints, a stream of bits for each row, to one byte each. See quire/quantization/translate.py,
 * which has the same in PyTorch. Bytes are little-endian, as on all machines that Quire runs on. */
#include "kernels.h"

#define AT_ONCE 32 /* bytes */

typedef uint8_t packed_bytes __attribute__((vector_size(AT_ONCE)));
typedef uint16_t packed_pairs __attribute__((vector_size(2 * AT_ONCE)));
typedef uint32_t packed_words __attribute__((vector_size(AT_ONCE)));
typedef uint64_t packed_lanes __attribute__((vector_size(2 * AT_ONCE)));

/* The low half of a word has the columns 0, 2, 4, 6 from its lowest bits on, the high half 1, 3, 5, 7. */
INLINE packed_lanes spread_awq(packed_lanes word) {
  packed_lanes even = word & 0xffff, odd = word >> 16;
  even = (even | even << 24) & 0x000000ff000000ff;
  odd = (odd | odd << 24) & 0x000000ff000000ff;
  return ((even | even << 12) & 0x000f000f000f000f) | ((odd | odd << 12) & 0x000f000f000f000f) << 8;
}

INLINE void unpack_nibbles(const uint8_t *in, int64_t bytes, uint8_t *out, int64_t count, const int awq) {
  for (int64_t b = 0; 2 * b < count; b += AT_ONCE) {
    packed_bytes from = {0};
    packed_pairs to;
    if (b + AT_ONCE <= bytes)
      memcpy(&from, in + b, AT_ONCE);
    else
      memcpy(&from, in + b, (size_t)(bytes - b));
    if (awq) {
      to = (packed_pairs)spread_awq(__builtin_convertvector((packed_words)from, packed_lanes));
    } else {
      to = __builtin_convertvector(from, packed_pairs);
      to = (to | to << 4) & 0x0f0f;
    }
    if (2 * (b + AT_ONCE) <= count)
      memcpy(out + 2 * b, &to, 2 * AT_ONCE);
    else
      memcpy(out + 2 * b, &to, (size_t)(count - 2 * b));
  }
}

/* 8 codes are `bits` bytes: the upper half of them moves up, then that of each half. */
INLINE uint64_t spread(uint64_t x, const int bits) {
  const uint64_t four = (1ull << 4 * bits) - 1, two = ((1ull << 2 * bits) - 1) * 0x100000001,
                 one = ((1ull << bits) - 1) * 0x1000100010001;
  x = (x & four) | (x & four << 4 * bits) << (32 - 4 * bits);
  x = (x & two) | (x & two << 2 * bits) << (16 - 2 * bits);
  return (x & one) | (x & one << bits) << (8 - bits);
}

INLINE void unpack_eighths(const uint8_t *in, int64_t bytes, uint8_t *out, int64_t count, const int bits) {
  for (int64_t c = 0, b = 0; c < count; c += 8, b += bits) {
    uint64_t x = 0;
    if (b + 8 <= bytes)
      memcpy(&x, in + b, 8);
    else
      memcpy(&x, in + b, (size_t)(bytes - b));
    x = spread(x, bits);
    if (c + 8 <= count)
      memcpy(out + c, &x, 8);
    else
      memcpy(out + c, &x, (size_t)(count - c));
  }
}

/* in: [rows, bytes]; out: [rows, count], with count * bits <= 8 * bytes. bits: 1 to 7; 4 if awq. 0. */
int quire_unpack_codes(const uint8_t *in, int64_t rows, int64_t bytes, uint8_t *out, int64_t count, int bits, int awq) {
  for (int64_t r = 0; r < rows; r++, in += bytes, out += count) switch (bits) { /* constants, so that masks are */
      case 1: unpack_eighths(in, bytes, out, count, 1); break;
      case 2: unpack_eighths(in, bytes, out, count, 2); break;
      case 3: unpack_eighths(in, bytes, out, count, 3); break;
      case 4: awq ? unpack_nibbles(in, bytes, out, count, 1) : unpack_nibbles(in, bytes, out, count, 0); break;
      case 5: unpack_eighths(in, bytes, out, count, 5); break;
      case 6: unpack_eighths(in, bytes, out, count, 6); break;
      default: unpack_eighths(in, bytes, out, count, 7);
    }
  return 0;
}

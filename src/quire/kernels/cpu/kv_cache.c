/* Writing keys and values into the paged cache, and copying blocks.
 *
 * k_cache: [num_blocks, heads, head_dim, block_size]   sixteen keys of one d are contiguous
 * v_cache: [num_blocks, heads, block_size, head_dim]
 */
#include "kernels.h"

#define WRITE_KEYS(type)                                                                  \
  {                                                                                       \
    const type *src = (const type *)k + t * k_stride + h * head_dim;                      \
    type *dst = (type *)k_cache + (block * heads + h) * head_dim * block_size + offset;   \
    for (int64_t d = 0; d < head_dim; d++) dst[d * block_size] = src[d];                  \
  }

/* Slot s of a head is block s / block_size, offset s % block_size; a negative slot is padding.
 * Returns 1, touching nothing, if a slot is past the cache. One head is one unit of work, so that
 * tokens of one block are written by one thread. */
int quire_write_kv(const void *k, int64_t k_stride, const void *v, int64_t v_stride, void *k_cache,
                   void *v_cache, const int64_t *slots, int64_t tokens, int64_t heads,
                   int64_t head_dim, int64_t block_size, int64_t num_blocks, int dt, int threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] >= num_blocks * block_size) return 1;
  const size_t size = elem_size(dt);
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * head_dim > SMALL_WORK)
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t t = 0; t < tokens; t++) {
      if (slots[t] < 0) continue;
      const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
      if (size == 4)
        WRITE_KEYS(uint32_t)
      else
        WRITE_KEYS(uint16_t)
      memcpy(at_mut(v_cache, ((block * heads + h) * block_size + offset) * head_dim, dt),
             at(v, t * v_stride + h * head_dim, dt), (size_t)head_dim * size);
    }
  }
  return 0;
}

/* cache: num_blocks blocks of block_bytes; pairs: [count, 2] of (source, destination). No
 * destination is a source or named twice. Returns 1, touching nothing, if a block is out of range. */
int quire_copy_blocks(void *cache, const int64_t *pairs, int64_t count, int64_t block_bytes,
                      int64_t num_blocks) {
  for (int64_t i = 0; i < 2 * count; i++)
    if (pairs[i] < 0 || pairs[i] >= num_blocks) return 1;
  for (int64_t i = 0; i < count; i++)
    if (pairs[2 * i] != pairs[2 * i + 1])
      memcpy((char *)cache + pairs[2 * i + 1] * block_bytes,
             (const char *)cache + pairs[2 * i] * block_bytes, (size_t)block_bytes);
  return 0;
}

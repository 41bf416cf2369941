/* From a fused projection to the paged cache: norm and rotate queries and keys, store keys and
 * values; and copying blocks. `kv_cache_shapes` (layout.py) describes the cache's layout.
 */
#include "kernels.h"

#define CHUNK 16 /* tokens that one thread processes for a head: they share cache lines of a block */

/* ---- rotary embedding ---- */

/* Rotates x[i] with x[i + half]; each product is rounded before the sum (no fma), so the bits are
 * those of the plain formula. */
INLINE void rope_head(void *x, const float *cos_sin, int64_t half, const int dt) {
  for (int64_t i = 0; i < half; i += VW) {
    const int64_t n = half - i;
    void *first = at_mut(x, i, dt), *second = at_mut(x, half + i, dt);
    const vf c = vload_upto(cos_sin + i, n, F32), s = vload_upto(cos_sin + half + i, n, F32);
    const vf a = vload_upto(first, n, dt), b = vload_upto(second, n, dt);
    vstore_upto(first, a * c - b * s, n, dt);
    vstore_upto(second, b * c + a * s, n, dt);
  }
}

/* ---- storing ---- */

/* Distinct tokens never write the same bytes, so threads may share a block. */
INLINE void store_kv(const qkv_args *a, const void *k, const void *v, int64_t head, int64_t slot,
                     const int dt) {
  const int64_t block = slot / a->block_size, offset = slot % a->block_size, n = a->head_dim;
  const int64_t first = (block * a->kv_heads + head) * n * a->block_size;
  void *keys = at_mut(a->k_cache, first, dt), *values = at_mut(a->v_cache, first, dt);
  if (dt == BF16) { /* keys: [n / 2, block_size, 2]; values: [block_size / 2, n, 2] */
    const uint16_t *from = v;
    uint16_t *to = (uint16_t *)values + offset / 2 * 2 * n + offset % 2;
    for (int64_t d = 0; d < n / 2; d++)
      memcpy((uint32_t *)keys + d * a->block_size + offset, (const uint32_t *)k + d, 4);
    for (int64_t d = 0; d < n; d++) to[2 * d] = from[d];
  } else { /* keys: [n, block_size]; values: [block_size, n] */
    const size_t size = elem_size(dt);
    for (int64_t d = 0; d < n; d++)
      memcpy(at_mut(keys, d * a->block_size + offset, dt), at(k, d, dt), size);
    memcpy(at_mut(values, offset * n, dt), v, (size_t)n * size);
  }
}

/* One kv head with its query heads, for tokens [begin, end). */
INLINE void write_chunk(const qkv_args *a, int64_t head, int64_t begin, int64_t end, const int dt) {
  const int64_t group = a->q_heads / a->kv_heads, n = a->head_dim;
  float rotated[MAX_HEAD_DIM]; /* a key on its way to the cache, as dt */
  for (int64_t t = begin; t < end; t++) {
    const float *cos_sin = a->cos_sin + a->positions[t] * 2 * a->half;
    void *row = at_mut(a->qkv, t * a->qkv_stride, dt);
    for (int64_t h = head * group; h < (head + 1) * group; h++) {
      void *q = at_mut(row, h * n, dt);
      if (a->q_norm) norm_row(q, a->q_norm, q, n, a->eps, dt, a->norm_dtype);
      rope_head(q, cos_sin, a->half, dt);
    }
    if (a->slots[t] < 0) continue;
    const void *k = at(row, (a->q_heads + head) * n, dt);
    if (a->k_norm)
      norm_row(k, a->k_norm, rotated, n, a->eps, dt, a->norm_dtype);
    else
      memcpy(rotated, k, (size_t)n * elem_size(dt));
    rope_head(rotated, cos_sin, a->half, dt);
    store_kv(a, rotated, at(row, (a->q_heads + a->kv_heads + head) * n, dt), head, a->slots[t], dt);
  }
}

int quire_check_qkv(const qkv_args *a) {
  for (int64_t t = 0; t < a->tokens; t++) {
    if (a->positions[t] < 0 || a->positions[t] >= a->max_position) return 1;
    if (a->slots[t] >= a->num_blocks * a->block_size) return 2;
  }
  return 0;
}

static void write_unit(void *context, int64_t unit) {
  const qkv_args *a = context;
  const int64_t head = unit % a->kv_heads, begin = unit / a->kv_heads * CHUNK;
  const int64_t end = min64(begin + CHUNK, a->tokens);
  FOR_DTYPE(a->dtype, write_chunk(a, head, begin, end, dt));
}

int quire_rope_write_kv_unchecked(const qkv_args *a) {
  const int64_t units = (a->tokens + CHUNK - 1) / CHUNK * a->kv_heads;
  const int64_t work = a->tokens * (a->q_heads + 2 * a->kv_heads) * a->head_dim;
  qkv_args context = *a;
  quire_run(write_unit, &context, units, work > SMALL_WORK ? a->threads : 1);
  return 0;
}

int quire_rope_write_kv(const qkv_args *a) {
  const int code = quire_check_qkv(a);
  return code ? code : quire_rope_write_kv_unchecked(a);
}

/* ---- copying ---- */

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

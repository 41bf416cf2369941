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

/* store_kv as floats of 8 bits. keys: [n / 2, block_size, 2]; values: [block_size / 2, n, 2]. */
INLINE void store_f8(const qkv_args *a, const void *k, const void *v, int64_t head, int64_t slot, const int dt) {
  const int64_t block = slot / a->block_size, offset = slot % a->block_size, n = a->head_dim;
  const int64_t first = (block * a->kv_heads + head) * n * a->block_size;
  uint8_t *keys = (uint8_t *)a->k_cache + first + 2 * offset;
  uint8_t *values = (uint8_t *)a->v_cache + first + offset / 2 * 2 * n + offset % 2;
  const float k_inverse = 1.0f / a->k_scales[head], v_inverse = 1.0f / a->v_scales[head];
  for (int64_t d = 0; d < n; d += VW) {
    const vh k8 = vf8_from_float(vload_upto(at(k, d, dt), n - d, dt) * k_inverse);
    const vh v8 = vf8_from_float(vload_upto(at(v, d, dt), n - d, dt) * v_inverse);
    for (int64_t i = 0; i < min64(n - d, VW); i++) {
      keys[(d + i) / 2 * 2 * a->block_size + (d + i) % 2] = (uint8_t)k8[i];
      values[2 * (d + i)] = (uint8_t)v8[i];
    }
  }
}

/* store_kv in bfloat16 of two tokens, in this even slot and the next: whole pairs of their values. */
INLINE void store_two(const qkv_args *a, const void *const k[2], const void *const v[2], int64_t head,
                      int64_t slot) {
  const int64_t block = slot / a->block_size, offset = slot % a->block_size, n = a->head_dim;
  const int64_t first = (block * a->kv_heads + head) * n * a->block_size;
  uint32_t *keys = (uint32_t *)at_mut(a->k_cache, first, BF16) + offset;
  char *values = at_mut(a->v_cache, first + offset * n, BF16);
  for (int64_t d = 0; d < n / 2; d++) {
    uint32_t both[2];
    memcpy(&both[0], (const uint32_t *)k[0] + d, 4);
    memcpy(&both[1], (const uint32_t *)k[1] + d, 4);
    memcpy(keys + d * a->block_size, both, 8);
  }
  for (int64_t d = 0; d < n; d += VW) { /* the bits of bfloat16 are the upper ones of float32 */
    const vu low = (vu)vload_upto(at(v[0], d, BF16), n - d, BF16) >> 16;
    const vu high = (vu)vload_upto(at(v[1], d, BF16), n - d, BF16);
    const vu both = low | high;
    vstore_upto(values + d * 4, (vf)both, n - d, F32);
  }
}

/* Norms and rotates the queries of one kv head in place; its key into `key`, as dt. */
INLINE void rotate(const qkv_args *a, int64_t head, int64_t token, void *key, const int dt) {
  const int64_t group = a->q_heads / a->kv_heads, n = a->head_dim;
  const float *cos_sin = a->cos_sin + a->positions[token] * 2 * a->half;
  void *row = at_mut(a->qkv, token * a->qkv_stride, dt);
  for (int64_t h = head * group; h < (head + 1) * group; h++) {
    void *q = at_mut(row, h * n, dt);
    if (a->q_norm) norm_row(q, a->q_norm, q, n, a->eps, dt, a->norm_dtype);
    rope_head(q, cos_sin, a->half, dt);
  }
  const void *k = at(row, (a->q_heads + head) * n, dt);
  if (a->k_norm)
    norm_row(k, a->k_norm, key, n, a->eps, dt, a->norm_dtype);
  else
    memcpy(key, k, (size_t)n * elem_size(dt));
  rope_head(key, cos_sin, a->half, dt);
}

/* One kv head with its query heads, for tokens [begin, end). */
INLINE void write_chunk(const qkv_args *a, int64_t head, int64_t begin, int64_t end, const int dt) {
  float keys[2][MAX_HEAD_DIM]; /* as dt */
  const void *const k[2] = {keys[0], keys[1]};
  for (int64_t t = begin, count; t < end; t += count) {
    const int64_t slot = a->slots[t];
    const int two = dt == BF16 && !a->k_scales && slot >= 0 && slot % 2 == 0 && t + 1 < end && a->slots[t + 1] == slot + 1;
    count = 1 + two;
    const void *v[2] = {NULL, NULL};
    for (int64_t i = 0; i < count; i++) {
      rotate(a, head, t + i, keys[i], dt);
      v[i] = at(a->qkv, (t + i) * a->qkv_stride + (a->q_heads + a->kv_heads + head) * a->head_dim, dt);
    }
    if (two)
      store_two(a, k, v, head, slot);
    else if (slot >= 0 && a->k_scales)
      store_f8(a, k[0], v[0], head, slot, dt);
    else if (slot >= 0)
      store_kv(a, k[0], v[0], head, slot, dt);
  }
}

int quire_check_qkv(const qkv_args *a) {
  for (int64_t t = 0; t < a->tokens; t++) {
    if (a->positions[t] < 0 || a->positions[t] >= a->max_position) return 1;
    if (a->slots[t] >= a->num_blocks * a->block_size) return 2;
  }
  return 0;
}

static void write_head(void *context, int64_t unit) {
  const qkv_args *a = context;
  const int64_t head = unit % a->kv_heads, begin = unit / a->kv_heads * CHUNK;
  const int64_t end = min64(begin + CHUNK, a->tokens);
  FOR_DTYPE(a->dtype, write_chunk(a, head, begin, end, dt));
}

static void write_heads(void *context, int64_t chunk) { /* rows of qkv are contiguous */
  const qkv_args *a = context;
  for (int64_t head = 0; head < a->kv_heads; head++) write_head(context, chunk * a->kv_heads + head);
}

int quire_rope_write_kv_unchecked(const qkv_args *a) {
  const int64_t chunks = (a->tokens + CHUNK - 1) / CHUNK;
  const int64_t work = a->tokens * (a->q_heads + 2 * a->kv_heads) * a->head_dim;
  const int threads = work > SMALL_WORK ? a->threads : 1;
  qkv_args context = *a;
  if (chunks >= 2 * threads)
    quire_run(write_heads, &context, chunks, threads);
  else
    quire_run(write_head, &context, chunks * a->kv_heads, threads);
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

/* A whole forward pass in one call: token ids in, logits out.
 *
 * The same operations in the same order as quire/models/decoder.py, with the same roundings, hence the
 * same bits; what is gone is the way from one operation to the next, which at small sizes costs more than
 * the operations. In the last layer only the rows whose logits are wanted go on past attention, and a
 * step that wants none (a chunk of a long prompt) ends with its keys and values stored.
 */
#include <time.h>

#include "kernels.h"

typedef struct { /* mirrored by DecoderLayer in decoder.py */
  linear_weight qkv, o, gate_up, down;
  const void *input_norm, *post_norm;
  const void *q_norm, *k_norm; /* or NULL */
  void *k_cache, *v_cache;
  int64_t window;
} decoder_layer;

typedef struct { /* mirrored by DecoderModel in decoder.py */
  const decoder_layer *layers;
  const void *embedding; /* [vocab, hidden], or NULL: the head's rows */
  const void *final_norm;
  linear_weight head;
  const float *cos_sin;
  int64_t num_layers, hidden, inner, q_heads, kv_heads, head_dim, half, max_position;
  int64_t block_size, num_blocks, widest_window;
  float eps, scale;
  int32_t dtype;
} decoder_model;

typedef struct { /* mirrored by DecoderStep in decoder.py */
  const int64_t *input_ids, *positions, *slots;
  const int32_t *block_table, *query_start_loc, *seq_lens;
  const int64_t *logit_rows; /* tokens of the step; NULL for all of them, or none */
  float *logits;             /* [num_logits, vocab] */
  int64_t tokens, requests, table_stride, num_logits;
  double *seconds; /* [PHASES], added to where given */
  int32_t threads;
} decoder_step;

/* Where a step's time goes; named in decoder.py, in this order. */
enum phase { EMBED, NORM, QKV, ROPE_WRITE, ATTENTION, O, GATE_UP, SILU_MUL, DOWN, HEAD, PHASES };

typedef struct {
  double *seconds, last;
} stopwatch;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void lap(stopwatch *w, enum phase phase) {
  if (!w->seconds) return;
  const double t = now();
  w->seconds[phase] += t - w->last;
  w->last = t;
}

typedef struct { /* the step's activations, [tokens, ...] each */
  char *residual, *x, *qkv, *attention, *gate_up, *inner;
} buffers;

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int make_buffers(const decoder_model *m, int64_t tokens, buffers *b) {
  const int64_t size = (int64_t)elem_size(m->dtype), q = m->q_heads * m->head_dim;
  const int64_t row[] = {m->hidden, m->hidden, q + 2 * m->kv_heads * m->head_dim, q, 2 * m->inner, m->inner};
  char **part[] = {&b->residual, &b->x, &b->qkv, &b->attention, &b->gate_up, &b->inner};
  int64_t total = 0;
  for (int i = 0; i < 6; i++) total += aligned(tokens * row[i] * size);
  char *memory = quire_scratch(SCRATCH_DECODER, (size_t)total);
  for (int i = 0; memory && i < 6; i++) {
    *part[i] = memory;
    memory += aligned(tokens * row[i] * size);
  }
  return memory != NULL;
}

static attention_args attention_of(const decoder_model *m, const decoder_step *s, const buffers *b) {
  return (attention_args){.q = b->qkv, .block_table = s->block_table,
                          .query_start_loc = s->query_start_loc, .seq_lens = s->seq_lens,
                          .out = b->attention,
                          .q_stride = (m->q_heads + 2 * m->kv_heads) * m->head_dim,
                          .table_stride = s->table_stride, .requests = s->requests,
                          .tokens = s->tokens, .q_heads = m->q_heads, .kv_heads = m->kv_heads,
                          .head_dim = m->head_dim, .block_size = m->block_size,
                          .num_blocks = m->num_blocks, .window = m->widest_window,
                          .scale = m->scale, .dtype = m->dtype, .threads = s->threads};
}

static qkv_args qkv_of(const decoder_model *m, const decoder_step *s, const buffers *b) {
  return (qkv_args){.qkv = b->qkv, .positions = s->positions, .slots = s->slots,
                    .cos_sin = m->cos_sin, .qkv_stride = (m->q_heads + 2 * m->kv_heads) * m->head_dim,
                    .tokens = s->tokens, .q_heads = m->q_heads, .kv_heads = m->kv_heads,
                    .head_dim = m->head_dim, .half = m->half, .max_position = m->max_position,
                    .block_size = m->block_size, .num_blocks = m->num_blocks, .eps = m->eps,
                    .dtype = m->dtype, .threads = s->threads};
}

static int embed(const decoder_model *m, const decoder_step *s, char *out) {
  if (!m->embedding) return quire_gather_rows(&m->head, s->input_ids, s->tokens, out);
  const int64_t row = m->hidden * (int64_t)elem_size(m->dtype);
  for (int64_t t = 0; t < s->tokens; t++)
    if (s->input_ids[t] < 0 || s->input_ids[t] >= m->head.n) return 1;
  for (int64_t t = 0; t < s->tokens; t++)
    memcpy(out + t * row, (const char *)m->embedding + s->input_ids[t] * row, (size_t)row);
  return 0;
}

/* Moves the wanted rows to the front, in place; `rows` rise, so none is overwritten before it is read. */
static void keep_rows(char *x, const int64_t *rows, int64_t count, int64_t row_bytes) {
  for (int64_t i = 0; i < count; i++)
    if (rows[i] != i) memcpy(x + i * row_bytes, x + rows[i] * row_bytes, (size_t)row_bytes);
}

/* 0; 1 a token id, 2 a position, 3 a slot, 4 a block id, 5 lengths, 6 a logit row out of range: nothing was
 * written then; 7 no memory. */
static int check(const decoder_model *m, const decoder_step *s, const attention_args *a,
                 const qkv_args *q) {
  const int qkv = quire_check_qkv(q);
  if (qkv) return 1 + qkv;
  const int attention = quire_check_attention(a);
  if (attention) return attention == 4 ? 4 : 5;
  if (!s->logit_rows) return s->num_logits == s->tokens || !s->num_logits ? 0 : 6;
  for (int64_t i = 0; i < s->num_logits; i++)
    if (s->logit_rows[i] < (i ? s->logit_rows[i - 1] + 1 : 0) || s->logit_rows[i] >= s->tokens)
      return 6;
  return m->num_layers > 0 ? 0 : 6;
}

int quire_decoder_forward(const decoder_model *m, const decoder_step *s) {
  buffers b;
  if (!make_buffers(m, s->tokens, &b)) return 7;
  attention_args attention = attention_of(m, s, &b);
  qkv_args qkv = qkv_of(m, s, &b);
  const int wrong = check(m, s, &attention, &qkv);
  if (wrong) return wrong;
  stopwatch watch = {s->seconds, s->seconds ? now() : 0.0};
  if (embed(m, s, b.residual)) return 1;
  lap(&watch, EMBED);

  const int64_t h = m->hidden, q_size = m->q_heads * m->head_dim;
  const int dt = m->dtype, threads = s->threads;
  const int64_t size = (int64_t)elem_size(dt);
  int64_t rows = s->tokens;
  int failed = quire_rms_norm(b.residual, h, 1, NULL, m->layers[0].input_norm, b.x, rows, h,
                              m->eps, dt, threads);
  lap(&watch, NORM);
  for (int64_t i = 0; i < m->num_layers; i++) {
    const decoder_layer *l = &m->layers[i];
    const int last = i + 1 == m->num_layers;
    failed |= quire_linear(&l->qkv, b.x, h, b.qkv, qkv.qkv_stride, rows, LINEAR_STORE, threads);
    lap(&watch, QKV);
    qkv.q_norm = l->q_norm, qkv.k_norm = l->k_norm;
    qkv.k_cache = l->k_cache, qkv.v_cache = l->v_cache;
    quire_rope_write_kv_unchecked(&qkv);
    lap(&watch, ROPE_WRITE);
    if (last && !s->num_logits) break;
    attention.k_cache = l->k_cache, attention.v_cache = l->v_cache;
    attention.window = l->window;
    failed |= quire_attention_unchecked(&attention);
    lap(&watch, ATTENTION);
    if (last && s->logit_rows) {
      keep_rows(b.residual, s->logit_rows, s->num_logits, h * size);
      keep_rows(b.attention, s->logit_rows, s->num_logits, q_size * size);
      rows = s->num_logits;
    }
    failed |= quire_linear(&l->o, b.attention, q_size, b.residual, h, rows, LINEAR_ADD, threads);
    lap(&watch, O);
    quire_rms_norm(b.residual, h, 1, NULL, l->post_norm, b.x, rows, h, m->eps, dt, threads);
    lap(&watch, NORM);
    failed |= quire_linear(&l->gate_up, b.x, h, b.gate_up, 2 * m->inner, rows, LINEAR_STORE, threads);
    lap(&watch, GATE_UP);
    quire_silu_and_mul(b.gate_up, b.inner, rows, m->inner, dt, threads);
    lap(&watch, SILU_MUL);
    failed |= quire_linear(&l->down, b.inner, m->inner, b.residual, h, rows, LINEAR_ADD, threads);
    lap(&watch, DOWN);
    const void *next = last ? m->final_norm : m->layers[i + 1].input_norm;
    quire_rms_norm(b.residual, h, 1, NULL, next, b.x, rows, h, m->eps, dt, threads);
    lap(&watch, NORM);
  }
  if (s->num_logits)
    failed |= quire_linear(&m->head, b.x, h, s->logits, m->head.n, rows, LINEAR_FLOAT, threads);
  lap(&watch, HEAD);
  return failed ? 7 : 0;
}

/* A whole forward pass in one call: token ids in, logits (or hidden states) out.
 *
 * The same operations in the same order as quire/models/decoder.py, with the same roundings, hence the
 * same bits; what is gone is the way from one operation to the next, which at small sizes costs more than
 * the operations. In the last layer only the tokens whose logits are wanted go on past attention, and a
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

typedef struct { /* StepRows in kernels/decoder.py */
  int64_t seat, start, count, wanted;
} step_row;

typedef struct { /* mirrored by _Step in decoder.py */
  const int64_t *token_ids; /* [num_seats, max_tokens] */
  const int32_t *block_ids; /* [num_seats, max_blocks] */
  const step_row *rows;     /* [requests] */
  float *logits;            /* [num_wanted, vocab] */
  void *hidden;             /* [num_wanted, hidden], asked for instead of logits where given */
  double *seconds;          /* [PHASES], added to where given */
  int64_t num_seats, max_tokens, max_blocks, requests;
  int64_t num_wanted; /* of all rows */
  int32_t threads;
} decoder_step;

typedef struct { /* the rows, token by token */
  int64_t *input_ids, *positions, *slots; /* [tokens] */
  int64_t *wanted;                        /* [num_wanted]: tokens of the step, rising */
  int32_t *query_start_loc, *seq_lens, *block_table; /* [requests + 1], [requests], [requests, width] */
  int64_t tokens, width;
} decoder_inputs;

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

/* Nonzero, as the call says, if a row lies outside its seat. Else *tokens is the number of tokens. */
static int check_step(const decoder_model *m, const decoder_step *s, int64_t *tokens) {
  int64_t wanted = 0;
  *tokens = 0;
  for (int64_t i = 0; i < s->requests; i++) {
    const step_row r = s->rows[i];
    if (r.seat < 0 || r.seat >= s->num_seats) return 6;
    if (r.start < 0 || r.count < 1 || r.start > s->max_tokens || r.count > s->max_tokens - r.start)
      return 5;
    if ((r.start + r.count + m->block_size - 1) / m->block_size > s->max_blocks) return 5;
    if (r.wanted < 0 || r.wanted > r.count) return 5;
    *tokens += r.count, wanted += r.wanted;
  }
  return wanted == s->num_wanted ? 0 : 6;
}

static int gather_inputs(const decoder_model *m, const decoder_step *s, decoder_inputs *in) {
  const int wrong = check_step(m, s, &in->tokens);
  if (wrong) return wrong;
  in->width = 1;
  for (int64_t i = 0; i < s->requests; i++) {
    const int64_t end = s->rows[i].start + s->rows[i].count;
    const int64_t blocks = (end + m->block_size - 1) / m->block_size;
    if (blocks > in->width) in->width = blocks;
  }
  const int64_t longs = 3 * in->tokens + s->num_wanted, ints = s->requests * (2 + in->width) + 1;
  char *memory = quire_scratch(SCRATCH_STEP, (size_t)(longs * 8 + ints * 4));
  if (!memory) return 7;
  in->input_ids = (int64_t *)memory;
  in->positions = in->input_ids + in->tokens;
  in->slots = in->positions + in->tokens;
  in->wanted = in->slots + in->tokens;
  in->query_start_loc = (int32_t *)(in->wanted + s->num_wanted);
  in->seq_lens = in->query_start_loc + s->requests + 1;
  in->block_table = in->seq_lens + s->requests;
  int64_t token = 0, wanted = 0;
  for (int64_t i = 0; i < s->requests; i++) {
    const step_row r = s->rows[i];
    const int64_t *ids = s->token_ids + r.seat * s->max_tokens, end = r.start + r.count;
    const int32_t *blocks = s->block_ids + r.seat * s->max_blocks;
    in->query_start_loc[i] = (int32_t)token;
    for (int64_t p = r.start; p < end; p++, token++) {
      in->input_ids[token] = ids[p];
      in->positions[token] = p;
      in->slots[token] = blocks[p / m->block_size] * m->block_size + p % m->block_size;
    }
    in->seq_lens[i] = (int32_t)end;
    memcpy(in->block_table + i * in->width, blocks, (size_t)in->width * sizeof *blocks);
    for (int64_t t = token - r.wanted; t < token; t++) in->wanted[wanted++] = t;
  }
  in->query_start_loc[s->requests] = (int32_t)token;
  return 0;
}

static attention_args attention_of(const decoder_model *m, const decoder_step *s,
                                   const decoder_inputs *in, const buffers *b) {
  return (attention_args){.q = b->qkv, .block_table = in->block_table,
                          .query_start_loc = in->query_start_loc, .seq_lens = in->seq_lens,
                          .out = b->attention,
                          .q_stride = (m->q_heads + 2 * m->kv_heads) * m->head_dim,
                          .table_stride = in->width, .requests = s->requests,
                          .tokens = in->tokens, .q_heads = m->q_heads, .kv_heads = m->kv_heads,
                          .head_dim = m->head_dim, .block_size = m->block_size,
                          .num_blocks = m->num_blocks, .window = m->widest_window,
                          .scale = m->scale, .dtype = m->dtype, .threads = s->threads};
}

static qkv_args qkv_of(const decoder_model *m, const decoder_step *s, const decoder_inputs *in,
                       const buffers *b) {
  return (qkv_args){.qkv = b->qkv, .positions = in->positions, .slots = in->slots,
                    .cos_sin = m->cos_sin, .qkv_stride = (m->q_heads + 2 * m->kv_heads) * m->head_dim,
                    .tokens = in->tokens, .q_heads = m->q_heads, .kv_heads = m->kv_heads,
                    .head_dim = m->head_dim, .half = m->half, .max_position = m->max_position,
                    .block_size = m->block_size, .num_blocks = m->num_blocks, .eps = m->eps,
                    .dtype = m->dtype, .norm_dtype = m->dtype, .threads = s->threads};
}

static int embed(const decoder_model *m, const int64_t *ids, int64_t tokens, char *out) {
  if (!m->embedding) return quire_gather_rows(&m->head, ids, tokens, out);
  const int64_t row = m->hidden * (int64_t)elem_size(m->dtype);
  for (int64_t t = 0; t < tokens; t++)
    if (ids[t] < 0 || ids[t] >= m->head.n) return 1;
  for (int64_t t = 0; t < tokens; t++)
    memcpy(out + t * row, (const char *)m->embedding + ids[t] * row, (size_t)row);
  return 0;
}

/* Moves the wanted rows to the front, in place; `rows` rise, so none is overwritten before it is read. */
static void keep_rows(char *x, const int64_t *rows, int64_t count, int64_t row_bytes) {
  for (int64_t i = 0; i < count; i++)
    if (rows[i] != i) memcpy(x + i * row_bytes, x + rows[i] * row_bytes, (size_t)row_bytes);
}

static int check(const attention_args *a, const qkv_args *q) {
  const int qkv = quire_check_qkv(q);
  if (qkv) return 1 + qkv;
  const int attention = quire_check_attention(a);
  return !attention ? 0 : attention == 4 ? 4 : 5;
}

/* 0; 1 a token id, 2 a position, 3 a slot, 4 a block id, 5 a row, 6 a seat out of range: nothing was written
 * then; 7 no memory. */
int quire_decoder_forward(const decoder_model *m, const decoder_step *s) {
  buffers b;
  decoder_inputs in;
  int wrong = gather_inputs(m, s, &in);
  if (wrong) return wrong;
  if (!make_buffers(m, in.tokens, &b)) return 7;
  attention_args attention = attention_of(m, s, &in, &b);
  qkv_args qkv = qkv_of(m, s, &in, &b);
  if ((wrong = check(&attention, &qkv))) return wrong;
  stopwatch watch = {s->seconds, s->seconds ? now() : 0.0};
  if (embed(m, in.input_ids, in.tokens, b.residual)) return 1;
  lap(&watch, EMBED);

  const int64_t h = m->hidden, q_size = m->q_heads * m->head_dim;
  const int dt = m->dtype, threads = s->threads;
  const int64_t size = (int64_t)elem_size(dt);
  int64_t rows = in.tokens;
  int failed = quire_rms_norm(b.residual, h, 1, NULL, m->layers[0].input_norm, b.x, h, rows, h,
                              m->eps, dt, dt, threads);
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
    if (last && !s->num_wanted) break;
    attention.k_cache = l->k_cache, attention.v_cache = l->v_cache;
    attention.window = l->window;
    failed |= quire_attention_unchecked(&attention);
    lap(&watch, ATTENTION);
    if (last) {
      keep_rows(b.residual, in.wanted, s->num_wanted, h * size);
      keep_rows(b.attention, in.wanted, s->num_wanted, q_size * size);
      rows = s->num_wanted;
    }
    failed |= quire_linear(&l->o, b.attention, q_size, b.residual, h, rows, LINEAR_ADD, threads);
    lap(&watch, O);
    quire_rms_norm(b.residual, h, 1, NULL, l->post_norm, b.x, h, rows, h, m->eps, dt, dt, threads);
    lap(&watch, NORM);
    failed |= quire_linear(&l->gate_up, b.x, h, b.gate_up, 2 * m->inner, rows, LINEAR_STORE, threads);
    lap(&watch, GATE_UP);
    quire_gated(b.gate_up, b.inner, rows, m->inner, SILU, dt, threads);
    lap(&watch, SILU_MUL);
    failed |= quire_linear(&l->down, b.inner, m->inner, b.residual, h, rows, LINEAR_ADD, threads);
    lap(&watch, DOWN);
    const void *next = last ? m->final_norm : m->layers[i + 1].input_norm;
    quire_rms_norm(b.residual, h, 1, NULL, next, b.x, h, rows, h, m->eps, dt, dt, threads);
    lap(&watch, NORM);
  }
  if (s->hidden)
    memcpy(s->hidden, b.x, (size_t)(s->num_wanted * h * size));
  else if (s->num_wanted)
    failed |= quire_linear(&m->head, b.x, h, s->logits, m->head.n, rows, LINEAR_FLOAT, threads);
  lap(&watch, HEAD);
  return failed ? 7 : 0;
}

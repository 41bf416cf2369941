/* A forward pass in one call: token ids in, logits (or hidden states) out.
 *
 * The pass is a program that quire/kernels/program.py has recorded from the model: a flat array of operations
 * over numbered buffers. This file does not know the structure of any model. Compared with separate calls it
 * saves the Python code between two operations, which takes longer than the operations of a small model.
 *
 * A step without wanted results (a chunk of a long prompt) ends when all its keys and values are written.
 */
#include <time.h>

#include "kernels.h"

enum op_code { /* Code in program.py */
  OP_EMBED,
  OP_NORM,
  OP_LINEAR,
  OP_LINEAR_ADD,
  OP_ROPE_WRITE,
  OP_ATTEND,
  OP_GATED,
  OP_ADD,
  OP_SCALE,
  OP_SCALE_BY_POSITION,
  OP_KEEP,
  OP_NARROW,
  OP_LOGITS,
  OP_TAP,
  OP_GATHER,
  OP_COPY,
  OP_RECEIVE
};

typedef struct { /* mirrored by _Op in program.py */
  int32_t code, flag; /* flag: an activation; the dtype of a norm's weight; EMBED: whether a product's rows;
                         COPY: whether each row's owner has it */
  int32_t source, target; /* buffers; GATHER: none for the logits */
  int64_t first, width;   /* columns: of the target, if ranks share it */
  int64_t at;             /* COPY: the source's first column */
  const void *argument;   /* linear_weight, attention_layer, a norm's weight, a table */
  float factor, softcap;  /* factor: also a norm's eps */
  int64_t site;           /* of a product or an embedding: its number for adapters */
} program_op;

typedef struct { /* mirrored by _Layer in program.py */
  void *k_cache, *v_cache;
  const void *q_norm, *k_norm; /* [head_dim] each, or NULL */
  const float *k_scales, *v_scales; /* as in attention_args */
  const float *cos_sin;        /* [max_position, 2 * half] */
  int64_t q_heads, kv_heads, head_dim, half, window;
  int64_t group; /* whose block tables it uses */
  float scale, softcap, eps;
  int32_t norm_dtype;
} attention_layer;

typedef struct { /* mirrored by _Program in program.py */
  const program_op *ops;
  const int64_t *offsets; /* of each buffer: bytes per token of the step before its memory */
  const int64_t *widths;  /* of each buffer, in elements */
  int64_t num_ops, num_hidden_ops, num_cache_ops, bytes_per_token;
  int64_t hidden; /* the buffer of the hidden states */
  const int64_t *windows; /* of each group: the widest, 0 if one is unbounded */
  int64_t num_groups;
  int64_t vocab, max_position, block_size, num_blocks, q_heads, kv_heads, head_dim;
  int64_t tap_width; /* columns of the step's `tapped` */
  /* Of several ranks: */
  quire_group *group;     /* NULL: one */
  const int32_t *shared;  /* of each buffer: whether all ranks share its memory */
  const int64_t *starts;  /* [ranks]: the first token whose embedding a rank has */
  int64_t shared_bytes_per_token;
  int32_t dtype, tiles;
} program;

typedef struct { /* StepRows in program.py */
  int64_t seat, start, count, wanted;
} step_row;

typedef struct { /* mirrored by _Step in program.py */
  const int64_t *token_ids; /* [num_seats, max_tokens] */
  const int32_t *block_ids; /* [num_groups, num_seats, max_blocks] */
  const step_row *rows;     /* [requests] */
  float *logits;            /* [num_wanted, vocab] */
  void *hidden;             /* [num_wanted, hidden]; if not NULL, computed instead of logits */
  void *tapped;             /* [tokens, tap_width]: the copies of all OP_TAP, side by side */
  const void *received;     /* [tokens, hidden]: the residual, if the program does not begin with token ids */
  double *seconds;          /* [num_ops]; if not NULL, the time of each operation is added */
  int64_t num_seats, max_tokens, max_blocks, requests;
  int64_t num_wanted; /* of all rows */
  const int32_t *adapters;  /* [num_seats]: index in `table`, -1 for none; NULL: no row has one */
  const lora_table *table;
  int32_t threads;
} program_step;

typedef struct { /* the rows, token by token */
  int64_t *input_ids, *positions;          /* [tokens] */
  int64_t *slots;                          /* [num_groups, tokens] */
  int64_t *wanted;                         /* [num_wanted]: tokens of the step, rising */
  int32_t *query_start_loc, *seq_lens;     /* [requests + 1], [requests] */
  int32_t *block_tables;                   /* [num_groups, requests, width] */
  int64_t tokens, width;
} step_inputs;

typedef struct { /* one step while it runs */
  const program *p;
  const program_step *s;
  step_inputs in;
  char *memory, *shared; /* of buffers */
  float *logits;
  int64_t rows; /* of a buffer: the step's tokens, then the wanted ones */
  lora_rows lora[2];       /* the tokens with an adapter; of these, the wanted ones */
  const lora_rows *adapted; /* of the rows; NULL: none has an adapter */
} run;

/* A code of quire_run_program if a row is outside its seat, else 0; *tokens is the number of tokens. */
static int check_step(const program *p, const program_step *s, int64_t *tokens) {
  int64_t wanted = 0;
  *tokens = 0;
  for (int64_t i = 0; i < s->requests; i++) {
    const step_row r = s->rows[i];
    if (r.seat < 0 || r.seat >= s->num_seats) return 6;
    if (r.start < 0 || r.count < 1 || r.start > s->max_tokens || r.count > s->max_tokens - r.start)
      return 5;
    if ((r.start + r.count + p->block_size - 1) / p->block_size > s->max_blocks) return 5;
    if (r.wanted < 0 || r.wanted > r.count) return 5;
    *tokens += r.count, wanted += r.wanted;
  }
  return wanted == s->num_wanted ? 0 : 6;
}

/* One row's block table of one group, and the slots of its tokens, the last ones counted by now. */
static void gather_blocks(const program *p, const program_step *s, step_inputs *in, int64_t row,
                          int64_t group) {
  const step_row r = s->rows[row];
  const int32_t *blocks = s->block_ids + (group * s->num_seats + r.seat) * s->max_blocks;
  int64_t *slot = in->slots + group * in->tokens + in->query_start_loc[row];
  for (int64_t at = r.start; at < r.start + r.count; at++)
    *slot++ = blocks[at / p->block_size] * p->block_size + at % p->block_size;
  memcpy(in->block_tables + (group * s->requests + row) * in->width, blocks,
         (size_t)in->width * sizeof *blocks);
}

static int gather_inputs(const program *p, const program_step *s, step_inputs *in) {
  const int wrong = check_step(p, s, &in->tokens);
  if (wrong) return wrong;
  in->width = 1;
  for (int64_t i = 0; i < s->requests; i++) {
    const int64_t end = s->rows[i].start + s->rows[i].count;
    in->width = max64(in->width, (end + p->block_size - 1) / p->block_size);
  }
  const int64_t longs = (2 + p->num_groups) * in->tokens + s->num_wanted;
  const int64_t ints = s->requests * (2 + p->num_groups * in->width) + 1;
  char *memory = quire_scratch(SCRATCH_STEP, (size_t)(longs * 8 + ints * 4));
  if (!memory) return 7;
  in->input_ids = (int64_t *)memory;
  in->positions = in->input_ids + in->tokens;
  in->slots = in->positions + in->tokens;
  in->wanted = in->slots + p->num_groups * in->tokens;
  in->query_start_loc = (int32_t *)(in->wanted + s->num_wanted);
  in->seq_lens = in->query_start_loc + s->requests + 1;
  in->block_tables = in->seq_lens + s->requests;
  int64_t token = 0, wanted = 0;
  for (int64_t i = 0; i < s->requests; i++) {
    const step_row r = s->rows[i];
    const int64_t *ids = s->token_ids + r.seat * s->max_tokens, end = r.start + r.count;
    in->query_start_loc[i] = (int32_t)token;
    for (int64_t at = r.start; at < end; at++, token++) {
      if (ids[at] < 0 || ids[at] >= p->vocab) return 1;
      in->input_ids[token] = ids[at];
      in->positions[token] = at;
    }
    in->seq_lens[i] = (int32_t)end;
    for (int64_t g = 0; g < p->num_groups; g++) gather_blocks(p, s, in, i, g);
    for (int64_t t = token - r.wanted; t < token; t++) in->wanted[wanted++] = t;
  }
  in->query_start_loc[s->requests] = (int32_t)token;
  return 0;
}

/* The rows with an adapter. 0, 7 or 8. */
static int group_rows(run *r) {
  const program_step *s = r->s;
  const int64_t n = s->requests;
  size_t bytes[2] = {(size_t)quire_group_bytes(n, r->in.tokens), (size_t)quire_group_bytes(n, s->num_wanted)};
  for (int i = 0; i < 2; i++) bytes[i] = (bytes[i] + 63) / 64 * 64;
  char *memory = quire_scratch(SCRATCH_LORA_ROWS, bytes[0] + bytes[1] + (size_t)n * 3 * sizeof(int32_t));
  if (!memory) return 7;
  int32_t *adapters = (int32_t *)(memory + bytes[0] + bytes[1]), *ends = adapters + n, *wanted = ends + n;
  for (int64_t i = 0; i < n; i++) {
    adapters[i] = s->adapters[s->rows[i].seat];
    ends[i] = r->in.query_start_loc[i + 1];
    wanted[i] = (i ? wanted[i - 1] : 0) + (int32_t)s->rows[i].wanted;
  }
  if (quire_group_rows(s->table, adapters, ends, n, memory, &r->lora[0]) ||
      quire_group_rows(s->table, adapters, wanted, n, memory + bytes[0], &r->lora[1]))
    return 8;
  r->adapted = r->lora[0].count ? &r->lora[0] : NULL;
  return 0;
}

static char *buffer(const run *r, int32_t number) {
  const program *p = r->p;
  return (p->group && p->shared[number] ? r->shared : r->memory) + r->in.tokens * p->offsets[number];
}

/* Memory for the buffers. 0; 7; 9: the ranks' common memory is too small. With common memory the logits are behind
 * the buffers, at the same place at every rank. */
static int take_memory(run *r) {
  const program *p = r->p;
  const quire_group *g = p->group;
  const int64_t common = (r->in.tokens * p->shared_bytes_per_token + 63) / 64 * 64;
  const int64_t logits = r->s->num_wanted * p->vocab * (int64_t)sizeof(float);
  if (g && g->data && common + logits > g->bytes) return 9;
  const int64_t own = (r->in.tokens * p->bytes_per_token + 63) / 64 * 64;
  r->memory = quire_scratch(SCRATCH_PROGRAM, (size_t)(own + (g && !g->data ? common : 0)));
  if (!r->memory) return 7;
  r->shared = g && g->data ? g->data : r->memory + own;
  r->logits = g && g->data ? (float *)(g->data + common) : r->s->logits;
  return 0;
}

static attention_args attention_of(const run *r, int64_t group) {
  const program *p = r->p;
  const int32_t *block_table = r->in.block_tables + group * r->s->requests * r->in.width;
  return (attention_args){.block_table = block_table, .query_start_loc = r->in.query_start_loc,
                          .seq_lens = r->in.seq_lens, .table_stride = r->in.width,
                          .requests = r->s->requests, .tokens = r->in.tokens, .q_heads = p->q_heads,
                          .kv_heads = p->kv_heads, .head_dim = p->head_dim, .block_size = p->block_size,
                          .num_blocks = p->num_blocks, .window = p->windows[group], .dtype = p->dtype,
                          .threads = r->s->threads, .tiles = p->tiles};
}

static qkv_args qkv_of(const run *r, int64_t group) {
  const program *p = r->p;
  const int64_t *slots = r->in.slots + group * r->in.tokens;
  return (qkv_args){.positions = r->in.positions, .slots = slots, .tokens = r->in.tokens,
                    .max_position = p->max_position, .block_size = p->block_size,
                    .num_blocks = p->num_blocks, .dtype = p->dtype, .threads = r->s->threads};
}

/* All layers' indexes at once: nothing is written if one is out of range. */
static int check_inputs(const run *r) {
  for (int64_t g = 0; g < r->p->num_groups; g++) {
    const attention_args attention = attention_of(r, g);
    const qkv_args qkv = qkv_of(r, g);
    int wrong = quire_check_qkv(&qkv);
    if (wrong) return 1 + wrong;
    wrong = quire_check_attention(&attention);
    if (wrong) return wrong == 4 ? 4 : 5;
  }
  return 0;
}

static int adapt_embedding(const run *r, const program_op *op) {
  if (!r->adapted) return 0;
  return quire_adapt_embedding(r->adapted, op->site, r->in.input_ids, buffer(r, op->target), r->p->widths[op->target],
                               r->p->dtype, r->s->threads);
}

/* Rows of the tokens that this rank has, in its columns of a buffer. */
static int embed_own(const run *r, const program_op *op) {
  const program *p = r->p;
  const int32_t rank = p->group->rank;
  const int64_t start = p->starts[rank], end = rank + 1 < p->group->size ? p->starts[rank + 1] : p->vocab;
  const int64_t size = (int64_t)elem_size(p->dtype), row = op->width * size;
  char *out = buffer(r, op->target) + op->first * size;
  for (int64_t t = 0; t < r->rows; t++, out += p->widths[op->target] * size) {
    const int64_t id = r->in.input_ids[t] - start;
    if (id < 0 || id >= end - start) continue;
    if (!op->flag)
      memcpy(out, (const char *)op->argument + id * row, (size_t)row);
    else if (quire_gather_rows(op->argument, &id, 1, out, 1))
      return 1;
  }
  return 0;
}

static int copy(const run *r, const program_op *op) {
  const program *p = r->p;
  const int64_t size = (int64_t)elem_size(p->dtype), row = op->width * size;
  const char *from = buffer(r, op->source) + op->at * size;
  char *to = buffer(r, op->target) + op->first * size;
  for (int64_t t = 0; t < r->rows; t++) {
    int32_t owner = op->flag ? p->group->size - 1 : 0;
    while (owner && r->in.input_ids[t] < p->starts[owner]) owner--;
    memcpy(to + t * p->widths[op->target] * size, from + t * p->widths[op->source] * size + owner * row, (size_t)row);
  }
  return op->flag ? adapt_embedding(r, op) : 0;
}

static int gather(const run *r, const program_op *op) {
  const program *p = r->p;
  if (op->target < 0)
    return quire_group_gather(p->group, r->logits, r->rows, p->vocab, op->first, op->width, sizeof(float));
  return quire_group_gather(p->group, buffer(r, op->target), r->rows, p->widths[op->target], op->first, op->width,
                            (int64_t)elem_size(p->dtype));
}

static int embed(const run *r, const program_op *op) {
  if (r->p->group) return embed_own(r, op);
  const int64_t *ids = r->in.input_ids;
  char *out = buffer(r, op->target);
  const int64_t width = r->p->widths[op->target];
  const size_t row = (size_t)width * elem_size(r->p->dtype);
  if (op->flag) {
    if (quire_gather_rows(op->argument, ids, r->rows, out, r->s->threads)) return 1;
  } else {
    for (int64_t t = 0; t < r->rows; t++)
      memcpy(out + t * (int64_t)row, (const char *)op->argument + ids[t] * (int64_t)row, row);
  }
  return adapt_embedding(r, op);
}

static int norm(const run *r, const program_op *op) {
  const int dt = r->p->dtype;
  const void *x = at(buffer(r, op->source), op->first, dt);
  void *out = at_mut(buffer(r, op->target), op->first, dt);
  return quire_rms_norm(x, r->p->widths[op->source], 1, NULL, op->argument, out,
                        r->p->widths[op->target], r->rows, op->width, op->factor, dt, op->flag,
                        r->s->threads);
}

static int linear(const run *r, const program_op *op, void *out, int64_t width, int epilogue) {
  const linear_weight *w = op->argument;
  return quire_adapted_linear(w, buffer(r, op->source), w->k, out, width, r->rows, epilogue, r->s->threads, r->adapted,
                              op->site);
}

/* By one factor, or by a table at the tokens' positions. */
static int scale(const run *r, const program_op *op, int64_t width) {
  const program *p = r->p;
  return quire_scale(buffer(r, op->target), p->widths[op->target], r->in.positions, op->argument,
                     p->max_position, op->factor, r->rows, width, p->dtype, r->s->threads);
}

static int logits(const run *r, const program_op *op) {
  const program *p = r->p;
  float *own = r->logits + op->first;
  if (linear(r, op, own, p->vocab, LINEAR_FLOAT)) return 7;
  if (op->factor == 1.0f && op->softcap == 0.0f) return 0;
  if (!p->group)
    return quire_finish_logits(own, r->rows * p->vocab, op->factor, op->softcap, p->dtype, r->s->threads);
  for (int64_t i = 0; i < r->rows; i++)
    quire_finish_logits(own + i * p->vocab, op->width, op->factor, op->softcap, p->dtype, r->s->threads);
  return 0;
}

static int rope_write(const run *r, const program_op *op) {
  const attention_layer *l = op->argument;
  qkv_args a = qkv_of(r, l->group);
  a.qkv = buffer(r, op->target), a.qkv_stride = r->p->widths[op->target];
  a.cos_sin = l->cos_sin, a.half = l->half;
  a.q_norm = l->q_norm, a.k_norm = l->k_norm, a.eps = l->eps;
  a.norm_dtype = l->norm_dtype;
  a.k_cache = l->k_cache, a.v_cache = l->v_cache, a.k_scales = l->k_scales, a.v_scales = l->v_scales;
  a.q_heads = l->q_heads, a.kv_heads = l->kv_heads, a.head_dim = l->head_dim;
  return quire_rope_write_kv_unchecked(&a);
}

static void *own_columns(const run *r, const program_op *op) {
  return at_mut(buffer(r, op->target), op->first, r->p->dtype);
}

static int attend(const run *r, const program_op *op) {
  const attention_layer *l = op->argument;
  attention_args a = attention_of(r, l->group);
  a.q = buffer(r, op->source), a.q_stride = r->p->widths[op->source];
  a.out = own_columns(r, op), a.out_stride = r->p->widths[op->target];
  a.k_cache = l->k_cache, a.v_cache = l->v_cache, a.k_scales = l->k_scales, a.v_scales = l->v_scales;
  a.q_heads = l->q_heads, a.kv_heads = l->kv_heads, a.head_dim = l->head_dim;
  a.window = l->window, a.scale = l->scale, a.softcap = l->softcap;
  return quire_attention_unchecked(&a);
}

/* Wanted rows are in ascending order, so no row is overwritten before it is read. */
static int keep(const run *r, const program_op *op) {
  const int64_t size = (int64_t)elem_size(r->p->dtype), row = r->p->widths[op->target] * size;
  const size_t kept = (size_t)(op->width ? op->width * size : row);
  char *x = own_columns(r, op);
  for (int64_t i = 0; i < r->s->num_wanted; i++)
    if (r->in.wanted[i] != i) memcpy(x + i * row, x + r->in.wanted[i] * row, kept);
  return 0;
}

static int tap(const run *r, const program_op *op) {
  const int64_t size = (int64_t)elem_size(r->p->dtype), row = op->width * size;
  const char *x = buffer(r, op->source);
  char *out = (char *)r->s->tapped + op->first * size;
  for (int64_t t = 0; t < r->in.tokens; t++)
    memcpy(out + t * r->p->tap_width * size, x + t * row, (size_t)row);
  return 0;
}

static int receive(const run *r, const program_op *op) {
  const size_t row = (size_t)op->width * elem_size(r->p->dtype);
  memcpy(buffer(r, op->target), r->s->received, (size_t)r->in.tokens * row);
  return 0;
}

static int perform(run *r, const program_op *op) {
  switch (op->code) {
    case OP_EMBED: return embed(r, op);
    case OP_NORM: return norm(r, op);
    case OP_LINEAR: return linear(r, op, own_columns(r, op), r->p->widths[op->target], LINEAR_STORE);
    case OP_LINEAR_ADD: return linear(r, op, buffer(r, op->target), r->p->widths[op->target], LINEAR_ADD);
    case OP_ROPE_WRITE: return rope_write(r, op);
    case OP_ATTEND: return attend(r, op);
    case OP_GATED:
      return quire_gated(buffer(r, op->source), own_columns(r, op), r->p->widths[op->target], r->rows,
                         r->p->widths[op->source] / 2, op->flag, r->p->dtype, r->s->threads);
    case OP_ADD:
      return quire_add(buffer(r, op->source), buffer(r, op->target),
                       r->rows * r->p->widths[op->target], op->factor, r->p->dtype, r->s->threads);
    case OP_SCALE: return scale(r, op, r->p->widths[op->target]);
    case OP_SCALE_BY_POSITION: return scale(r, op, op->width);
    case OP_KEEP: return keep(r, op);
    case OP_NARROW:
      r->rows = r->s->num_wanted;
      if (r->adapted) r->adapted = &r->lora[1];
      return 0;
    case OP_LOGITS: return logits(r, op);
    case OP_TAP: return tap(r, op);
    case OP_GATHER: return gather(r, op);
    case OP_COPY: return copy(r, op);
    case OP_RECEIVE: return receive(r, op);
  }
  return 1;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 0; 1 a token id, 2 a position, 3 a slot, 4 a block id, 5 a row, 6 a seat out of range: nothing was written
 * then; 7 no memory; 8 an adapter that is not in the table, 9 the ranks' common memory is too small: nothing was
 * written; enum group_result. */
int quire_run_program(const program *p, const program_step *s) {
  run r = {.p = p, .s = s};
  int wrong = gather_inputs(p, s, &r.in);
  if (wrong) return wrong;
  r.rows = r.in.tokens;
  if ((wrong = take_memory(&r)) || (wrong = check_inputs(&r))) return wrong;
  if (s->adapters && (wrong = group_rows(&r))) return wrong;
  /* Until then a rank may read what another one left in common memory in its last step. */
  if (p->group && p->group->data && (wrong = quire_group_barrier(p->group))) return wrong;
  const int64_t end = !s->num_wanted ? p->num_cache_ops : s->hidden ? p->num_hidden_ops : p->num_ops;
  double last = s->seconds ? now() : 0.0;
  int failed = 0;
  for (int64_t i = 0; i < end; i++) {
    const int code = perform(&r, &p->ops[i]);
    if (code >= GROUP_FAILED) return code;
    failed |= code;
    if (!s->seconds) continue;
    const double t = now();
    s->seconds[i] += t - last;
    last = t;
  }
  if (s->hidden && s->num_wanted) {
    const size_t row = (size_t)p->widths[p->hidden] * elem_size(p->dtype);
    memcpy(s->hidden, buffer(&r, (int32_t)p->hidden), (size_t)s->num_wanted * row);
  }
  return failed ? 7 : 0;
}

/* What the kernel files share. An exported function returns 0 or a positive code, for which Python raises an
 * error (kernels/checks.py has the texts). None writes outside the tensors it was given. */
#ifndef QUIRE_KERNELS_H
#define QUIRE_KERNELS_H

#include <stdatomic.h>
#include <stdlib.h>

#include "vec.h"

/* Below this number of elements, waking other threads costs more than it saves. */
#define SMALL_WORK 16384

#define MAX_HEAD_DIM 512 /* checks.py refuses more */

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Runs `call` with `dt` a constant of that value. */
#define FOR_DTYPE(value, call) \
  do {                         \
    if ((value) == F32) {      \
      const int dt = F32;      \
      call;                    \
    } else if ((value) == BF16) { \
      const int dt = BF16;     \
      call;                    \
    } else {                   \
      const int dt = F16;      \
      call;                    \
    }                          \
  } while (0)

/* Memory of the calling thread, at least `bytes` long and 64-byte aligned, which lasts until the thread
 * asks for the same use again; NULL if there is none. */
enum scratch_use {
  SCRATCH_LINEAR,
  SCRATCH_CODES,
  SCRATCH_PANEL,
  SCRATCH_PROGRAM,
  SCRATCH_STEP,
  SCRATCH_ATTENTION,
  SCRATCH_ATTENTION_PLAN,
  SCRATCH_SAMPLING,
  SCRATCH_DRAFT,
  SCRATCH_LORA,
  SCRATCH_LORA_ROWS,
  SCRATCH_USES
};
void *quire_scratch(enum scratch_use use, size_t bytes);

/* ---- threads (pool.c) ---- */

/* Calls task(context, u) once for each u in [0, units), on up to `threads` threads, the caller included. */
typedef void (*quire_task)(void *context, int64_t unit);
void quire_run(quire_task task, void *context, int64_t units, int threads);

/* ---- tiles (tiles.h) ---- */

/* library.py has the same numbers. */
enum tiles { TILES_NONE = 0, TILES_AMX = 1, TILES_PLAIN = 2 };
int quire_ask_for_amx(void);
void quire_release_tiles(void); /* this thread's: they make a context switch slower */

/* ---- products (linear.c) ---- */

/* library.py has the same numbers. */
enum scale_type { SCALE_F32 = 0, SCALE_BF16 = 1, SCALE_F16 = 2, SCALE_INT8 = 3 };
enum offset_type { OFFSET_NONE = 0, OFFSET_ZERO = 1, OFFSET_MINIMUM = 2 };

typedef struct { /* mirrored by CodeInfo in library.py; CodeFormat in kernels/codes.py explains it */
  const void *scales, *offsets;              /* [panels][groups][PANEL] */
  const void *super_scales, *super_minima;   /* [panels][supers][PANEL] half precision, or NULL */
  const int32_t *order;                      /* [k]: column j multiplies input order[j]; or NULL */
  int64_t group;                             /* inputs */
  int32_t bits, scale_type, super_groups, offset_type, zero;
  int32_t float8, activation_bits, has_values;
  uint8_t values[16]; /* of the codes, plus `zero` */
} code_info;

typedef struct linear_weight { /* mirrored by LinearWeight in library.py */
  const void *panels;       /* as quire_pack_linear writes them; of codes: as quire_pack_codes does */
  const void *bias;         /* [n], or NULL */
  int64_t n, k;             /* outputs, inputs */
  int32_t dtype;            /* of x, panels, bias and out */
  int32_t tiles;            /* enum tiles; only for bfloat16 and codes */
  const code_info *codes;   /* NULL: panels of floats */
  const struct linear_weight *next; /* the rest of a stack over the same input, or NULL */
} linear_weight;

#define LINEAR_PARTS 8 /* the most matrices of a stack; Python makes no larger one */

/* How y, rounded to dtype, is stored: written; added to out (and rounded again); written as float. */
enum linear_epilogue { LINEAR_STORE = 0, LINEAR_ADD = 1, LINEAR_FLOAT = 2 };

int quire_linear(const linear_weight *w, const void *x, int64_t x_stride, void *out,
                 int64_t out_stride, int64_t m, int epilogue, int threads);
struct lora_rows;
/* The same where some rows have an adapter, which changes product number `site`; NULL if there are none. */
int quire_adapted_linear(const linear_weight *w, const void *x, int64_t x_stride, void *out, int64_t out_stride,
                         int64_t m, int epilogue, int threads, const struct lora_rows *lora, int64_t site);
int quire_pack_linear(const void *weight, int64_t first, int64_t rows, int64_t k, int64_t size, int64_t step,
                      void *panels, int threads);
int quire_pack_codes(const linear_weight *w, const uint8_t *codes, int64_t row_stride, int64_t column_stride,
                     int64_t row, int64_t column, int64_t rows, int64_t columns);
int quire_gather_rows(const linear_weight *w, const int64_t *ids, int64_t tokens, void *out, int threads);

/* ---- adapters (lora.c) ---- */

#define LORA_RANKS 2048 /* the most ranks of one product's matrices together; Python makes no more */

typedef struct { /* of B, for one panel of outputs */
  int32_t first, count; /* ranks */
  int64_t start;        /* its first row of PANEL elements in `b` */
} lora_panel;

typedef struct { /* what an adapter does to one product; mirrored by LoraSite in lora.py */
  const void *a;            /* [rank][k]; of an embedding [k][rank] */
  const void *b;            /* of each panel [count][PANEL] */
  const lora_panel *panels; /* of the whole stack; NULL: the product is not changed */
  const float *scales;      /* [rank] */
  const float *gains;       /* [panels][PANEL], or NULL: ones */
  int64_t rank, k;          /* rank: of all parts, whose A's are one below the other */
  int64_t dtype;
} lora_site;

typedef struct { /* mirrored by LoraTable in lora.py */
  const lora_site *const *adapters; /* [size]: by site, or NULL */
  int64_t size;
} lora_table;

typedef struct lora_rows { /* rows with an adapter, grouped by adapter */
  const lora_site *const *table;
  const int32_t *rows;     /* [count], rising in a group */
  const int32_t *starts;   /* [groups + 1]: of each group in `rows` */
  const int32_t *adapters; /* [groups] */
  int64_t groups, count;
} lora_rows;

int32_t quire_group_bytes(int64_t spans, int64_t rows);
int quire_group_rows(const lora_table *table, const int32_t *adapters, const int32_t *ends, int64_t spans, void *memory,
                     lora_rows *out);
int quire_adapt_embedding(const lora_rows *rows, int64_t site, const int64_t *ids, void *out, int64_t width, int dt,
                          int threads);

/* ---- rows (elementwise.c) ---- */

/* library.py has the same numbers. */
enum activation { SILU = 0, GELU_TANH = 1 };

int quire_rms_norm(const void *x, int64_t x_stride, int64_t inner, void *residual,
                   const void *weight, void *out, int64_t out_stride, int64_t rows, int64_t n,
                   float eps, int dt, int wt, int threads);
int quire_gated(const void *gate_up, void *out, int64_t out_stride, int64_t rows, int64_t n, int activation, int dt,
                int threads);
int quire_add(const void *x, void *residual, int64_t count, float scale, int dt, int threads);
int quire_scale(void *x, int64_t x_stride, const int64_t *positions, const float *table,
                int64_t max_position, float factor, int64_t rows, int64_t n, int dt, int threads);
int quire_finish_logits(float *logits, int64_t count, float divisor, float cap, int dt,
                        int threads);

/* ---- attention (attention.c) ---- */

typedef struct { /* mirrored by AttentionArgs in library.py; strides in elements */
  const void *q, *k_cache, *v_cache; /* q: [tokens, q_heads, head_dim], token stride q_stride */
  const int32_t *block_table, *query_start_loc, *seq_lens;
  void *out; /* [tokens, q_heads, head_dim], token stride out_stride, 0: dense */
  int64_t q_stride, out_stride, table_stride, requests, tokens, q_heads, kv_heads, head_dim;
  int64_t block_size, num_blocks, window; /* window 0: unbounded */
  const float *k_scales, *v_scales; /* [kv_heads]: the cache holds floats of 8 bits over these; NULL: dtype */
  float scale, softcap;
  int32_t dtype, threads, tiles; /* enum tiles; only for bfloat16 and whole tiles of head_dim */
} attention_args;

/* Checks the contents of block_table, query_start_loc and seq_lens: 0, or 2, 3 or 4 (kernels/checks.py:
 * fail_attention). It does not read q, the caches or out. The result is valid for every layer of a step
 * if `window` is the widest of all layers (0 if one is unbounded). */
int quire_check_attention(const attention_args *a);
/* Contents must have been checked. 0, or 5 (no memory for scratch; out may be partly written). */
int quire_attention_unchecked(const attention_args *a);
int quire_paged_attention(const attention_args *a); /* both */

/* ---- from a fused projection to the cache (kv_cache.c) ---- */

typedef struct { /* mirrored by QKVArgs in library.py; strides in elements */
  void *qkv; /* [tokens, (q_heads + 2 * kv_heads) * head_dim]; q is rotated in place */
  const int64_t *positions, *slots;
  const float *cos_sin;         /* [max_position, 2 * half] */
  const void *q_norm, *k_norm;  /* [head_dim] each, or NULL: no norm */
  const float *k_scales, *v_scales; /* as in attention_args */
  void *k_cache, *v_cache;
  int64_t qkv_stride, tokens, q_heads, kv_heads, head_dim, half, max_position;
  int64_t block_size, num_blocks;
  float eps;
  int32_t dtype, norm_dtype, threads; /* norm_dtype: of q_norm and k_norm */
} qkv_args;

/* 0; 1 if a position is outside [0, max_position); 2 if a slot is past the cache (a negative slot is
 * padding). The same for all layers of a step. */
int quire_check_qkv(const qkv_args *a);
int quire_rope_write_kv_unchecked(const qkv_args *a); /* 0 */
int quire_rope_write_kv(const qkv_args *a);           /* both; writes nothing if the check fails */

/* ---- ranks of one layer (group.c) ---- */

/* Also what a program returns. Python makes the error: `CGroup.fail` in group.py. */
enum group_result { GROUP_OK = 0, GROUP_FAILED = 32, GROUP_LATE = 33 };

/* Fills the other ranks' columns of `whole`, [rows, width] dense elements of `size` bytes; this rank's are
 * [first, first + count). 0, or another number on failure. Every rank calls it with its own columns. */
typedef int (*group_exchange)(void *whole, int64_t rows, int64_t width, int64_t first, int64_t count, int64_t size);

#define GROUP_RANKS 64     /* the most */
#define GROUP_MESSAGE 480  /* bytes of the reason of a failure, with the final zero */

typedef struct { /* of one rank, on a cache line of its own */
  _Alignas(64) _Atomic uint32_t sequence; /* barriers that it has reached */
  _Atomic uint32_t sleepers;              /* ranks that sleep until `sequence` changes */
  _Atomic int32_t pid;
} group_rank;

typedef struct { /* the start of the memory that all ranks map */
  _Alignas(64) _Atomic uint32_t failed; /* 0; 1: the message is being written; 2: every wait ends with it */
  char message[GROUP_MESSAGE];
  group_rank ranks[GROUP_RANKS];
} group_words;

typedef struct { /* one rank's view of its group; mirrored by Group in library.py */
  group_words *words;      /* NULL: the ranks share no memory, and `exchange` is called */
  char *data;              /* the shared data area, the same bytes at every rank, 64-byte aligned; or NULL */
  int64_t bytes;           /* of data */
  group_exchange exchange; /* NULL where the ranks share memory */
  double timeout;          /* seconds that a rank may be late */
  int32_t rank, size;
  int32_t late, dead;      /* after GROUP_LATE: which rank; whether its process has ended */
} quire_group;

/* Maps `total` bytes of `descriptor` from `offset` on, the start of a page, and enters this process as g->rank: 0, or an errno.
 * g->rank, g->size and g->timeout are set before. The words and `reserved` bytes come before g->data. */
int quire_group_open(quire_group *g, int descriptor, int64_t offset, int64_t total, int64_t reserved);
int quire_group_close(quire_group *g);
/* Waits until every rank has called it as often as this one. What a rank wrote before it, all read after it. */
int quire_group_barrier(quire_group *g);
/* A channel between two ranks: one counts what it has written, the other what it has read. Wait until a rank has
 * counted so many. */
int quire_group_post(quire_group *g);
int quire_group_wait(quire_group *g, int32_t rank, uint32_t count);
/* Ends every wait, of this rank and the others, now and later, with GROUP_FAILED and this message. The first call counts.
 * Any thread may call it. */
int quire_group_abort(quire_group *g, const char *message);
/* When this rank's columns of `whole` are written: returns when those of all ranks are. In memory that is shared,
 * `whole` lies at the same place of g->data at every rank, and this is a barrier. */
int quire_group_gather(quire_group *g, void *whole, int64_t rows, int64_t width, int64_t first, int64_t count,
                       int64_t size);

#endif

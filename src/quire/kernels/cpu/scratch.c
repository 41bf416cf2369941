/* Scratch memory that a thread keeps between calls, since every step needs the same sizes. */
#include <pthread.h>

#include "kernels.h"

typedef struct {
  void *memory[SCRATCH_USES];
  size_t size[SCRATCH_USES];
} kept_scratch;

static pthread_key_t scratch_key;

static void drop_scratch(void *kept) { /* the thread ends */
  for (int use = 0; use < SCRATCH_USES; use++) free(((kept_scratch *)kept)->memory[use]);
  free(kept);
}

static void make_scratch_key(void) { pthread_key_create(&scratch_key, drop_scratch); }

void *quire_scratch(enum scratch_use use, size_t bytes) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  static __thread kept_scratch *kept;
  if (!kept) {
    pthread_once(&once, make_scratch_key);
    kept = calloc(1, sizeof *kept);
    if (!kept || pthread_setspecific(scratch_key, kept)) return NULL;
  }
  if (bytes > kept->size[use]) {
    free(kept->memory[use]);
    const size_t size = (bytes + 63) / 64 * 64;
    kept->memory[use] = aligned_alloc(64, size);
    kept->size[use] = kept->memory[use] ? size : 0;
  }
  return kept->memory[use];
}

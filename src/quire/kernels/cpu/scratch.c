/* Scratch memory that is kept from call to call: a step asks for the same sizes again and again. */
#include "kernels.h"

void *quire_scratch(enum scratch_use use, size_t bytes) {
  static __thread struct {
    void *memory;
    size_t size;
  } kept[SCRATCH_USES];
  if (bytes > kept[use].size) {
    free(kept[use].memory);
    const size_t size = (bytes + 63) / 64 * 64;
    kept[use].memory = aligned_alloc(64, size);
    kept[use].size = kept[use].memory ? size : 0;
  }
  return kept[use].memory;
}

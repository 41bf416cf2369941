/* Whether this process may use AMX. */
#include "tiles.h"

#if HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

__thread const tile_shapes *quire_loaded_shapes;

void quire_release_tiles(void) {
  if (!quire_loaded_shapes) return;
  __asm__ volatile("tilerelease" ::);
  quire_loaded_shapes = NULL;
}

/* 0; 1: the processor has no AMX with bfloat16 and bytes; 2: the system does not let this process use it. */
int quire_ask_for_amx(void) {
  enum { BF16_TILES = 1 << 22, TILES = 1 << 24, BYTE_TILES = 1 << 25, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (BF16_TILES | TILES | BYTE_TILES)) return 1;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 2 : 0;
}
#else
void quire_release_tiles(void) {}
int quire_ask_for_amx(void) { return 1; }
#endif

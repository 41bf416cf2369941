/* The whole library as one unit; with QUIRE_UNITS, all but attention and float8, which are then compiled in parallel. */
#define _GNU_SOURCE /* CPU affinity, in pool.c; system calls, in group.c */

#ifndef QUIRE_UNITS
#include "attention.c"
#include "float8.c"
#endif
#include "check.c"
#include "codes.c"
#include "program.c"
#include "elementwise.c"
#include "fields.c"
#include "group.c"
#include "kv_cache.c"
#include "linear.c"
#include "lookup.c"
#include "lora.c"
#include "pool.c"
#include "rounding.c"
#include "sampling.c"
#include "draft.c"
#include "scratch.c"
#include "tiles.c"
#include "unpack.c"

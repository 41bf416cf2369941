/* The whole library as one unit; with QUIRE_UNITS, all but attention, which is then compiled in parallel. */
#define _GNU_SOURCE /* CPU affinity, in pool.c */

#ifndef QUIRE_UNITS
#include "attention.c"
#endif
#include "check.c"
#include "codes.c"
#include "program.c"
#include "elementwise.c"
#include "fields.c"
#include "float8.c"
#include "kv_cache.c"
#include "linear.c"
#include "pool.c"
#include "rounding.c"
#include "sampling.c"
#include "scratch.c"
#include "tiles.c"
#include "unpack.c"

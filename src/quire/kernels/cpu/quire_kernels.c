/* The whole library as one unit: one compiler run, about a second. */
#define _GNU_SOURCE /* CPU affinity, in pool.c */

#include "attention.c"
#include "decoder.c"
#include "elementwise.c"
#include "kv_cache.c"
#include "linear.c"
#include "pool.c"
#include "sampling.c"
#include "scratch.c"

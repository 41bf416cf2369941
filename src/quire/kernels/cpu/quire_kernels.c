/* The whole library as one unit: one compiler run, about a second. */
#include "attention.c"
#include "decoder.c"
#include "elementwise.c"
#include "kv_cache.c"
#include "linear.c"
#include "sampling.c"
#include "scratch.c"

/* For decode_floor.py: reads memory, and runs empty jobs, on the threads of Quire's own pool. */
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef void (*task)(void *context, int64_t unit);
typedef void (*run)(task, void *context, int64_t units, int threads); /* quire_run */
typedef uint64_t words __attribute__((vector_size(64)));

typedef struct {
  const char *const *starts;
  const int64_t *sizes;
  int64_t count, threads;
  uint64_t sum;
} ranges;

/* A thread reads its part of every range, in the order of addresses. */
static void read_part(void *context, int64_t part) {
  ranges *r = context;
  words sums[8] = {{0}};
  for (int64_t i = 0; i < r->count; i++) {
    const int64_t begin = r->sizes[i] / 512 * part / r->threads * 512;
    const int64_t end = r->sizes[i] / 512 * (part + 1) / r->threads * 512;
    for (const char *at = r->starts[i] + begin; at < r->starts[i] + end; at += 512)
      for (int v = 0; v < 8; v++) {
        words loaded;
        memcpy(&loaded, at + v * 64, sizeof loaded);
        __builtin_prefetch(at + v * 64 + 4096, 0, 2);
        sums[v] ^= loaded;
      }
  }
  uint64_t sum = 0;
  for (int v = 0; v < 8; v++)
    for (int lane = 0; lane < 8; lane++) sum ^= sums[v][lane];
  __atomic_fetch_xor(&r->sum, sum, __ATOMIC_RELAXED);
}

uint64_t plain_read(run on, const char *const *starts, const int64_t *sizes, int64_t count, int threads) {
  ranges r = {starts, sizes, count, threads, 0};
  on(read_part, &r, threads, threads);
  return r.sum;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void note_start(void *context, int64_t unit) { /* unit 0 waits, so that another thread takes unit 1 */
  double *started = context;
  started[unit] = now();
  for (int64_t spins = 0; unit == 0 && spins < 1000000 && !__atomic_load_n((int64_t *)started + 1, __ATOMIC_ACQUIRE);)
    spins++;
}

/* Seconds from the beginning of a job to the beginning of its first unit on a second thread, after
 * `pause` seconds without a job. */
double seconds_to_start(run on, double pause) {
  double started[2] = {0, 0};
  const double begin = now();
  while (now() < begin + pause) continue;
  const double opened = now();
  on(note_start, started, 2, 2);
  return (started[1] > started[0] ? started[1] : started[0]) - opened;
}

static void nothing(void *context, int64_t unit) { (void)context, (void)unit; }

/* Seconds of one job of two empty units, the mean of `times`. */
double seconds_of_empty_job(run on, int times) {
  const double begin = now();
  for (int i = 0; i < times; i++) on(nothing, NULL, 2, 2);
  return (now() - begin) / times;
}

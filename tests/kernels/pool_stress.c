/* The thread pool under ThreadSanitizer: every unit of every job exactly once, whatever else goes on.
 * argv: threads, jobs, and "two" for a second caller at the same time. Prints "ok". */
#define _GNU_SOURCE
#include <stdio.h>

#include "pool.c"
#include "tiles.c"

#define MOST_UNITS 100

static _Atomic int done_by_first[MOST_UNITS], done_by_second[MOST_UNITS];

static void task(void *context, int64_t unit) {
  atomic_fetch_add((_Atomic int *)context + unit, 1);
  for (volatile int i = 0; i < (int)(unit % 7) * 100; i++) {
  }
}

static int run_jobs(_Atomic int *done, int jobs, int threads) {
  for (int j = 0; j < jobs; j++) {
    const int units = j % MOST_UNITS;
    for (int u = 0; u < units; u++) done[u] = 0;
    quire_run(task, (void *)done, units, 1 + j % threads);
    for (int u = 0; u < units; u++)
      if (done[u] != 1) return printf("job %d: unit %d ran %d times\n", j, u, done[u]), 1;
    if (j % 1000 == 0) usleep(5000); /* long enough for the workers to fall asleep */
  }
  return 0;
}

static void *second_caller(void *jobs) {
  return (void *)(intptr_t)run_jobs(done_by_second, *(int *)jobs, 3);
}

int main(int argc, char **argv) {
  const int threads = atoi(argv[1]);
  int jobs = atoi(argv[2]);
  pthread_t second;
  void *failed = NULL;
  if (argc > 3) pthread_create(&second, NULL, second_caller, &jobs);
  if (run_jobs(done_by_first, jobs, threads)) return 1;
  if (argc > 3) pthread_join(second, &failed);
  if (failed) return 1;
  puts("ok");
  return 0;
}

/* Ranks that wait for each other over shared memory: processes, or threads with a view each.
 *
 * Each rank counts the barriers that it has reached in a word of its own, and then waits for every other word to
 * be as large. A rank's columns of a shared buffer are written before its word and read after it, so a barrier
 * is all that a gather costs. A rank writes no word of another, so a rank that is killed leaves nothing
 * locked.
 *
 * Ranks with cores of their own arrive within microseconds, so a wait spins first. Then it sleeps on the late
 * rank's word (a futex): a rank that has lost its core to another program comes back milliseconds later, and may
 * need this core to do so. A sleep is cut into slices. After each, the wait looks whether the group has failed, whether
 * the late rank's process still lives, and how long it has waited.
 */
#include <errno.h>
#include <time.h>

#include "kernels.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define GROUP_SPIN_SECONDS 50e-6
#define GROUP_SLICE_SECONDS 20e-3

static double group_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void group_pause(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

/* The futex is shared between processes: the private kind would be faster, and wrong. */
static void sleep_on(_Atomic uint32_t *word, uint32_t value) {
  const struct timespec slice = {.tv_nsec = (long)(GROUP_SLICE_SECONDS * 1e9)};
  syscall(SYS_futex, word, FUTEX_WAIT, value, &slice, NULL, 0);
}

static void wake_sleepers(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, 1 << 30, NULL, NULL, 0); }

/* 0 also where the system does not say. */
static int has_ended(int32_t pid) {
#if defined(SYS_pidfd_open)
  if (pid <= 0) return 0;
  const int descriptor = (int)syscall(SYS_pidfd_open, pid, 0);
  if (descriptor < 0) return errno == ESRCH;
  struct pollfd ended = {.fd = descriptor, .events = POLLIN};
  const int ready = poll(&ended, 1, 0);
  close(descriptor);
  return ready == 1;
#else
  (void)pid;
  return 0;
#endif
}

/* The counts wrap around. */
static int has_reached(const group_rank *r, uint32_t count) {
  return (int32_t)(atomic_load_explicit(&r->sequence, memory_order_acquire) - count) >= 0;
}

static int has_failed(const group_words *w) { return atomic_load_explicit(&w->failed, memory_order_acquire) == 2; }

static int wait_asleep(quire_group *g, int32_t rank, uint32_t count) {
  group_rank *other = &g->words->ranks[rank];
  double waited = 0, before = group_seconds();
  int result = GROUP_OK;
  /* In one order over all threads with the other rank's change of its word: it sees that we sleep, or we
   * see the change. */
  atomic_fetch_add(&other->sleepers, 1);
  while (!has_reached(other, count)) {
    const uint32_t seen = atomic_load(&other->sequence);
    if (has_failed(g->words)) {
      result = GROUP_FAILED;
      break;
    }
    if ((int32_t)(seen - count) >= 0) break;
    sleep_on(&other->sequence, seen);
    const double now = group_seconds();
    /* If all ranks were stopped for a while, that is nobody's delay. */
    waited += now - before < 4 * GROUP_SLICE_SECONDS ? now - before : GROUP_SLICE_SECONDS;
    before = now;
    if (has_reached(other, count)) break;
    g->dead = has_ended(atomic_load(&other->pid));
    if ((g->dead || waited > g->timeout) && !has_reached(other, count)) {
      g->late = rank;
      result = has_failed(g->words) ? GROUP_FAILED : GROUP_LATE;
      break;
    }
  }
  atomic_fetch_sub(&other->sleepers, 1);
  return result;
}

static int wait_for_rank(quire_group *g, int32_t rank, uint32_t count, double began) {
  const group_rank *other = &g->words->ranks[rank];
  for (int spins = 1; !has_reached(other, count); spins++) {
    group_pause();
    if (spins % 32 == 0 && group_seconds() - began > GROUP_SPIN_SECONDS) return wait_asleep(g, rank, count);
  }
  return GROUP_OK;
}

/* Returns the count. */
static uint32_t count_one(quire_group *g) {
  group_rank *own = &g->words->ranks[g->rank];
  const uint32_t count = atomic_load_explicit(&own->sequence, memory_order_relaxed) + 1;
  atomic_store(&own->sequence, count);
  if (atomic_load(&own->sleepers)) wake_sleepers(&own->sequence);
  return count;
}

int quire_group_barrier(quire_group *g) {
  if (!g->words) return g->exchange && !g->exchange(NULL, 0, 0, 0, 0, 0) ? GROUP_OK : GROUP_FAILED;
  if (has_failed(g->words)) return GROUP_FAILED;
  const uint32_t count = count_one(g);
  const double began = group_seconds();
  for (int32_t step = 1; step < g->size; step++) {
    const int result = wait_for_rank(g, (g->rank + step) % g->size, count, began);
    if (result) return result;
  }
  return GROUP_OK;
}

int quire_group_post(quire_group *g) {
  if (!g->words || has_failed(g->words)) return GROUP_FAILED;
  count_one(g);
  return GROUP_OK;
}

int quire_group_wait(quire_group *g, int32_t rank, uint32_t count) {
  if (!g->words || has_failed(g->words)) return GROUP_FAILED;
  return wait_for_rank(g, rank, count, group_seconds());
}

int quire_group_abort(quire_group *g, const char *message) {
  uint32_t none = 0;
  if (!g->words || !atomic_compare_exchange_strong(&g->words->failed, &none, 1)) return 0;
  strncpy(g->words->message, message, GROUP_MESSAGE - 1);
  atomic_store(&g->words->failed, 2);
  for (int32_t rank = 0; rank < g->size; rank++) wake_sleepers(&g->words->ranks[rank].sequence);
  return 0;
}

int quire_group_open(quire_group *g, int descriptor, int64_t offset, int64_t total, int64_t reserved) {
  void *memory = mmap(NULL, (size_t)total, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, (off_t)offset);
  if (memory == MAP_FAILED) return errno;
  g->words = memory;
  g->data = (char *)memory + sizeof(group_words) + reserved;
  g->bytes = total - (int64_t)sizeof(group_words) - reserved;
  atomic_store(&g->words->ranks[g->rank].pid, (int32_t)getpid());
  return 0;
}

int quire_group_close(quire_group *g) {
  if (g->words) munmap(g->words, (size_t)(g->data + g->bytes - (char *)g->words));
  g->words = NULL, g->data = NULL, g->bytes = 0;
  return 0;
}

#else /* Python does not call these: shared_memory.py refuses to make the memory */
int quire_group_open(quire_group *g, int descriptor, int64_t offset, int64_t total, int64_t reserved) {
  return (void)g, (void)descriptor, (void)offset, (void)total, (void)reserved, ENOSYS;
}
int quire_group_close(quire_group *g) { return (void)g, 0; }
int quire_group_abort(quire_group *g, const char *message) { return (void)g, (void)message, 0; }
int quire_group_barrier(quire_group *g) {
  return g->exchange && !g->exchange(NULL, 0, 0, 0, 0, 0) ? GROUP_OK : GROUP_FAILED;
}
int quire_group_post(quire_group *g) { return (void)g, GROUP_FAILED; }
int quire_group_wait(quire_group *g, int32_t rank, uint32_t count) {
  return (void)g, (void)rank, (void)count, GROUP_FAILED;
}
#endif

int quire_group_gather(quire_group *g, void *whole, int64_t rows, int64_t width, int64_t first, int64_t count,
                       int64_t size) {
  if (!g->exchange) return quire_group_barrier(g);
  return g->exchange(whole, rows, width, first, count, size) ? GROUP_FAILED : GROUP_OK;
}

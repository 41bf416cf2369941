/* A team of threads that never waits for a member who has not come.
 *
 * OpenMP ends a parallel region with a barrier: every thread of the team must arrive, even if all the
 * work is done. On a machine that does something else too, a thread that has lost its core arrives a
 * scheduler's slice (3 ms) late, at every region, and a step has hundreds: 30 times slower, measured. Here
 * threads take numbered units of one job until none is left, and the caller, who takes units like the rest,
 * waits only for units that somebody has begun.
 *
 * A job is opened by publishing `claim`: a generation in the upper half, the next unit in the lower. A unit
 * is taken by a compare-and-swap on both, so a thread that is late, and still holds an older job in its hand,
 * cannot take anything. Workers spin for a moment after a job, then sleep: between the operations of a step
 * they are there at once, and an idle engine costs nothing.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"

#define CLOSED 0xffffffffu /* a unit number: the job's description is being changed */
#define MOST_WORKERS 255
#define SPIN_SECONDS 200e-6  /* alone: hold the core */
#define YIELD_SECONDS 2e-3   /* then offer it to others, then sleep */

static struct {
  _Atomic uint64_t claim;
  _Atomic(quire_task) task;
  _Atomic(void *) context;
  _Atomic uint32_t units, done;
  _Atomic int threads, caller_cpu, sleeping;
  int workers; /* started; changed under `owner` */
  pthread_mutex_t owner, bed;
  pthread_cond_t wake;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .bed = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static double monotonic_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

/* Takes units of this generation's job until there are none. */
static void take_units(uint32_t generation) {
  uint64_t claim = atomic_load(&pool.claim);
  for (;;) {
    if ((uint32_t)(claim >> 32) != generation) return;
    const quire_task task = atomic_load_explicit(&pool.task, memory_order_acquire);
    void *context = atomic_load_explicit(&pool.context, memory_order_acquire);
    const uint32_t units = atomic_load_explicit(&pool.units, memory_order_acquire);
    if ((uint32_t)claim >= units) return;
    /* Success proves that what was just read belongs to this generation. */
    if (!atomic_compare_exchange_weak(&pool.claim, &claim, claim + 1)) continue;
    task(context, (uint32_t)claim);
    atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
    claim = atomic_load(&pool.claim);
  }
}

#if defined(__linux__)
/* A worker on the caller's own core would only take turns with it; the system's balancing is slow to
 * notice. So it moves away: with a thread for every core, to the one `index` after the caller's. */
static void keep_off(int caller_cpu, int index) {
  static __thread cpu_set_t allowed;
  static __thread int known;
  if (caller_cpu != sched_getcpu()) return;
  if (!known) known = sched_getaffinity(0, sizeof allowed, &allowed) == 0;
  const int count = known ? CPU_COUNT(&allowed) : 0;
  if (count < 2 || !CPU_ISSET(caller_cpu, &allowed)) return;
  cpu_set_t wanted = allowed;
  CPU_CLR(caller_cpu, &wanted);
  if (atomic_load(&pool.threads) >= count) {
    int cpu = caller_cpu;
    for (int step = 0; step < index % count; step++)
      do cpu = (cpu + 1) % CPU_SETSIZE;
      while (!CPU_ISSET(cpu, &allowed));
    if (cpu != caller_cpu) {
      CPU_ZERO(&wanted);
      CPU_SET(cpu, &wanted);
    }
  }
  sched_setaffinity(0, sizeof wanted, &wanted);
}
static int this_cpu(void) { return sched_getcpu(); }
#else
static void keep_off(int caller_cpu, int index) { (void)caller_cpu, (void)index; }
static int this_cpu(void) { return -1; }
#endif

/* The generation of the job that is open now, or `seen` if there is none but that. */
static uint32_t open_generation(uint32_t seen) {
  const uint64_t claim = atomic_load(&pool.claim);
  return (uint32_t)claim == CLOSED ? seen : (uint32_t)(claim >> 32);
}

static void sleep_until_next(uint32_t seen) {
  pthread_mutex_lock(&pool.bed);
  atomic_fetch_add(&pool.sleeping, 1);
  while (open_generation(seen) == seen) pthread_cond_wait(&pool.wake, &pool.bed);
  atomic_fetch_sub(&pool.sleeping, 1);
  pthread_mutex_unlock(&pool.bed);
}

static void *work(void *argument) {
  const int index = (int)(intptr_t)argument;
  uint32_t seen = 0;
  double idle_since = monotonic_seconds();
  for (;;) {
    uint32_t generation = open_generation(seen);
    for (int i = 0; i < 64 && generation == seen; i++) {
      relax();
      generation = open_generation(seen);
    }
    if (generation == seen) {
      const double idle = monotonic_seconds() - idle_since;
      if (idle > YIELD_SECONDS)
        sleep_until_next(seen);
      else if (idle > SPIN_SECONDS)
        sched_yield();
      continue;
    }
    seen = generation;
    if (index < atomic_load(&pool.threads)) {
      keep_off(atomic_load(&pool.caller_cpu), index);
      take_units(generation);
    }
    idle_since = monotonic_seconds();
  }
  return NULL;
}

/* In a forked child there are no workers, and a lock may be held by a thread that is not there. */
static void forget_workers(void) {
  pool.workers = 0;
  atomic_store(&pool.sleeping, 0);
  pthread_mutex_init(&pool.owner, NULL);
  pthread_mutex_init(&pool.bed, NULL);
  pthread_cond_init(&pool.wake, NULL);
}

static void start_workers(int count) {
  static int registered;
  if (!registered) registered = pthread_atfork(NULL, NULL, forget_workers) == 0;
  for (; pool.workers < count; pool.workers++) {
    pthread_t thread;
    const intptr_t index = pool.workers + 1;
    if (pthread_create(&thread, NULL, work, (void *)index)) return; /* fewer will do */
    pthread_detach(thread);
  }
}

static void wake_workers(void) {
  /* Not waiting for the lock: whoever holds it is on the way in or out, and will look again. */
  if (atomic_load(&pool.sleeping) == 0 || pthread_mutex_trylock(&pool.bed)) return;
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.bed);
}

void quire_run(quire_task task, void *context, int64_t units, int threads) {
  static __thread int inside;
  if (threads > MOST_WORKERS) threads = MOST_WORKERS;
  /* A second engine in this process, while the first has the team, works alone. */
  if (units < 2 || threads < 2 || inside || units >= CLOSED || pthread_mutex_trylock(&pool.owner)) {
    for (int64_t u = 0; u < units; u++) task(context, u);
    return;
  }
  inside = 1;
  start_workers(threads - 1);
  const uint32_t generation = (uint32_t)(atomic_load(&pool.claim) >> 32) + 1;
  atomic_store(&pool.claim, (uint64_t)generation << 32 | CLOSED);
  atomic_store_explicit(&pool.task, task, memory_order_release);
  atomic_store_explicit(&pool.context, context, memory_order_release);
  atomic_store_explicit(&pool.units, (uint32_t)units, memory_order_release);
  atomic_store(&pool.threads, threads);
  atomic_store(&pool.caller_cpu, this_cpu());
  atomic_store(&pool.done, 0);
  atomic_store(&pool.claim, (uint64_t)generation << 32);
  wake_workers();
  take_units(generation);
  for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < (uint32_t)units; spins++)
    if (spins < 2000)
      relax();
    else
      sched_yield(); /* whoever holds the last unit may need this very core */
  inside = 0;
  pthread_mutex_unlock(&pool.owner);
}

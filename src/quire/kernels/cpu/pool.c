/* A thread pool whose caller never waits for a thread that has not started.
 *
 * OpenMP ends a parallel region with a barrier: every thread of the team must arrive, even if all the work is
 * done. On a machine that also runs something else, a thread that has lost its core arrives a scheduler slice
 * (3 ms) late, at every region, and a step has hundreds of regions: 30 times slower, measured. Here threads
 * take numbered units of one job until none is left. The caller takes units too, and at the end waits
 * only for units that a thread has begun.
 *
 * A job is opened by publishing `claim`: a generation in the upper half, the next unit in the lower. A
 * unit is taken by a compare-and-swap on both halves, so a thread that is late and still has an older
 * generation takes nothing. Workers spin for a moment after a job, then sleep. So they start at once
 * between the operations of a step, and an idle engine uses no processor time.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"

#define CLOSED 0xffffffffu /* a unit number: the job's description is being changed */
#define MOST_WORKERS 255
#define SPIN_SECONDS 200e-6  /* first keep the core */
#define YIELD_SECONDS 2e-3   /* then yield it to others, then sleep */

static struct {
  _Atomic uint64_t claim;
  _Atomic(quire_task) task;
  _Atomic(void *) context;
  _Atomic uint32_t units, done;
  _Atomic int threads, caller_cpu, sleeping;
  int workers; /* started; changed under `owner` */
  pthread_mutex_t owner, sleep_lock;
  pthread_cond_t wake;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .sleep_lock = PTHREAD_MUTEX_INITIALIZER,
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

/* Takes units of this generation's job until none is left. */
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
/* A worker on the caller's core would only take turns with the caller, and the system is slow to move it.
 * So it moves itself: where there is a thread for every core, to the core `index` after the caller's. */
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

/* The generation of the open job, or `seen` if no job is open. */
static uint32_t open_generation(uint32_t seen) {
  const uint64_t claim = atomic_load(&pool.claim);
  return (uint32_t)claim == CLOSED ? seen : (uint32_t)(claim >> 32);
}

static void sleep_until_next(uint32_t seen) {
  pthread_mutex_lock(&pool.sleep_lock);
  atomic_fetch_add(&pool.sleeping, 1);
  while (open_generation(seen) == seen) pthread_cond_wait(&pool.wake, &pool.sleep_lock);
  atomic_fetch_sub(&pool.sleeping, 1);
  pthread_mutex_unlock(&pool.sleep_lock);
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
      quire_release_tiles();
    }
    idle_since = monotonic_seconds();
  }
  return NULL;
}

/* A forked child has no workers, and a lock may be held by a thread that it does not have. */
static void forget_workers(void) {
  pool.workers = 0;
  atomic_store(&pool.sleeping, 0);
  pthread_mutex_init(&pool.owner, NULL);
  pthread_mutex_init(&pool.sleep_lock, NULL);
  pthread_cond_init(&pool.wake, NULL);
}

static void start_workers(int count) {
  static int registered;
  if (!registered) registered = pthread_atfork(NULL, NULL, forget_workers) == 0;
  for (; pool.workers < count; pool.workers++) {
    pthread_t thread;
    const intptr_t index = pool.workers + 1;
    if (pthread_create(&thread, NULL, work, (void *)index)) return; /* fewer are enough */
    pthread_detach(thread);
  }
}

static void wake_workers(void) {
  /* No need to wait for the lock: a worker that holds it checks for a new job before it sleeps. */
  if (atomic_load(&pool.sleeping) == 0 || pthread_mutex_trylock(&pool.sleep_lock)) return;
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.sleep_lock);
}

void quire_run(quire_task task, void *context, int64_t units, int threads) {
  static __thread int inside;
  if (threads > MOST_WORKERS) threads = MOST_WORKERS;
  /* A second engine in this process computes alone while the first one uses the pool. */
  if (units < 2 || threads < 2 || inside || units >= CLOSED || pthread_mutex_trylock(&pool.owner)) {
    for (int64_t u = 0; u < units; u++) task(context, u);
    quire_release_tiles();
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
  quire_release_tiles();
  for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < (uint32_t)units; spins++)
    if (spins < 2000)
      relax();
    else
      sched_yield(); /* the thread with the last unit may need this core */
  inside = 0;
  pthread_mutex_unlock(&pool.owner);
}

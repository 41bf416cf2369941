/* Ranks as threads, under ThreadSanitizer: what each wrote before a barrier, all read after it, and nothing is written
 * while it is read. argv: ranks, turns. Prints "ok". */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "group.c"

#define WIDTH 64

static group_words words;
static int64_t shared[2][GROUP_RANKS][WIDTH]; /* plain memory: a missing barrier is a race */
static int ranks, turns;
static _Atomic int wrong;

static void *run(void *argument) {
  const int rank = (int)(intptr_t)argument;
  quire_group g = {.words = &words, .rank = rank, .size = ranks, .timeout = 60};
  for (int turn = 0; turn < turns; turn++) {
    for (int i = 0; i < WIDTH; i++) shared[turn % 2][rank][i] = (int64_t)turn * rank + i;
    if (turn % 1000 == rank) usleep(500); /* the others fall asleep */
    if (quire_group_barrier(&g)) wrong = 1;
    for (int other = 0; other < ranks; other++)
      for (int i = 0; i < WIDTH; i++)
        if (shared[turn % 2][other][i] != (int64_t)turn * other + i) wrong = 1;
  }
  return NULL;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  ranks = atoi(argv[1]), turns = atoi(argv[2]);
  pthread_t threads[GROUP_RANKS];
  for (int rank = 0; rank < ranks; rank++) pthread_create(&threads[rank], NULL, run, (void *)(intptr_t)rank);
  for (int rank = 0; rank < ranks; rank++) pthread_join(threads[rank], NULL);
  puts(wrong ? "FAILED" : "ok");
  return wrong;
}

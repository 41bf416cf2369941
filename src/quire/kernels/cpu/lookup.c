/* Drafts from texts: what followed the last tokens where they occurred before (quire/speculative/lookup.py explains
 * the method, and is the plain version with the same results).
 *
 * An index has, for each position, a link to the latest earlier position whose last ANCHOR tokens fall into the same
 * bucket. So a search reads a few positions however long the text is, and adding a token costs one store. */
#include "kernels.h"

#define MOST_FOUND 32   /* occurrences that are compared */
#define MOST_VISITED 64 /* positions of a bucket that are tried */

typedef struct { /* mirrored by _Index in lookup.py; positions count from the first token ever added */
  const int64_t *tokens; /* [capacity]: position p is at p & mask; -1 separates texts */
  const int64_t *owners; /* [capacity], or NULL: only texts of the asker's owner are found */
  int32_t *links;        /* [capacity]: how far back the linked position is; 0: none */
  int64_t *heads;        /* [buckets]: the latest position of each, plus 1; 0: none */
  int64_t mask, bucket_bits;
  int64_t count, floor;  /* tokens ever added; positions below the floor are gone */
} text_index;

typedef struct { /* mirrored by _LookupJob in lookup.py */
  text_index own;        /* of seat 0; the arrays of the others follow */
  const text_index *shared; /* or NULL */
  int64_t token_stride, bucket_stride;
  int64_t *indexed;      /* [seats]: tokens that are in its index */
  const int64_t *owners; /* [seats] */
  const int64_t *tasks;  /* [num_tasks, 3]: seat, known tokens, most drafts */
  int64_t *drafts, *counts; /* [num_tasks, most], [num_tasks] */
  int64_t num_tasks, most, anchor, depth;
  int32_t votes;         /* whether the continuations of all occurrences vote; else the longest one's is taken */
  double factor, least;  /* drafts per token that agrees; the smallest share of votes */
} lookup_job;

typedef struct {
  const text_index *index;
  int64_t at, length; /* the position of the last token that agrees; how many agree */
} occurrence;

INLINE int64_t token_at(const text_index *t, int64_t position) { return t->tokens[position & t->mask]; }

static int64_t bucket_of(const text_index *t, const int64_t *tokens, int64_t anchor) {
  uint64_t hash = 0;
  for (int64_t i = 0; i < anchor; i++) hash = (hash ^ (uint64_t)tokens[i]) * 0x9E3779B97F4A7C15u;
  return (int64_t)(hash >> (64 - t->bucket_bits));
}

/* tokens: the last `anchor` ones up to this position. */
static void add_position(text_index *t, int64_t position, const int64_t *tokens, int64_t anchor) {
  int64_t *head = t->heads + bucket_of(t, tokens, anchor);
  const int64_t back = *head ? position + 1 - *head : 0;
  t->links[position & t->mask] = back <= t->mask ? (int32_t)back : 0;
  *head = position + 1;
}

/* Occurrences of the end of query[0, n) before position `limit`, the latest first; at most as many as fit. */
static int64_t find_occurrences(const lookup_job *job, const text_index *t, const int64_t *query, int64_t n,
                                int64_t limit, int64_t owner, occurrence *found, int64_t room) {
  const int64_t low = max64(t->floor, t->count - t->mask - 1);
  int64_t position = t->heads[bucket_of(t, query + n - job->anchor, job->anchor)] - 1, count = 0;
  for (int visited = 0; visited < MOST_VISITED && position >= low && count < room; visited++) {
    if (position < limit && (!t->owners || t->owners[position & t->mask] == owner)) {
      int64_t length = 0;
      while (length < job->depth && length < n && position - length >= low &&
             token_at(t, position - length) == query[n - 1 - length])
        length++;
      if (length >= job->anchor) found[count++] = (occurrence){t, position, length};
    }
    const int64_t back = t->links[position & t->mask];
    if (!back) break;
    position -= back;
  }
  return count;
}

/* The token that follows an occurrence after i drafts, -1 at the end of its text. Where a request's own text ends,
 * its drafts follow: a loop goes on. */
static int64_t next_of(const occurrence *o, int64_t i, const int64_t *drafts) {
  const int64_t position = o->at + 1 + i, count = o->index->count;
  if (position < count) return token_at(o->index, position);
  return o->index->owners ? -1 : drafts[position - count];
}

/* Drafts that occurrences of at least this length agree on; *score is the expected number of accepted ones. */
static int64_t follow(const lookup_job *job, const occurrence *found, int64_t n, int64_t length, int64_t most,
                      int64_t *drafts, double *score) {
  int64_t alive[MOST_FOUND], count = 0, made = 0;
  double p = 1.0;
  *score = 0.0;
  for (int64_t i = 0; i < n; i++)
    if (found[i].length >= length) alive[count++] = i;
  while (made < most && count) {
    int64_t next[MOST_FOUND], best = -1, votes = 0;
    for (int64_t i = 0; i < count; i++) next[i] = next_of(found + alive[i], made, drafts);
    for (int64_t i = 0; i < count; i++) {
      int64_t same = 0;
      for (int64_t j = i; j < count; j++) same += next[j] == next[i];
      if (next[i] >= 0 && same > votes) votes = same, best = next[i];
      if (same == count - i) break; /* the others have been counted */
    }
    p *= (double)votes / (double)count;
    if (best < 0 || p < job->least) break;
    *score += p;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++)
      if (next[i] == best) alive[kept++] = alive[i];
    count = kept;
    drafts[made++] = best;
  }
  return made;
}

static int64_t choose(const lookup_job *job, const occurrence *found, int64_t n, int64_t most, int64_t *drafts) {
  int64_t longest = 0, made = 0, trial[MOST_FOUND * 2];
  double best = 0.0, score;
  for (int64_t i = 0; i < n; i++) longest = max64(longest, found[i].length);
  if (!longest) return 0;
  if (!job->votes) {
    int64_t i = 0;
    while (found[i].length < longest) i++;
    return follow(job, found + i, 1, longest, min64(most, (int64_t)(job->factor * (double)longest)), drafts, &score);
  }
  for (int64_t length = longest; length > 0;) {
    const int64_t allowed = min64(most, (int64_t)(job->factor * (double)length));
    const int64_t count = follow(job, found, n, length, allowed, trial, &score);
    if (score > best) {
      best = score, made = count;
      memcpy(drafts, trial, (size_t)count * sizeof *drafts);
    }
    int64_t shorter = 0;
    for (int64_t i = 0; i < n; i++)
      if (found[i].length < length) shorter = max64(shorter, found[i].length);
    length = shorter;
  }
  return made;
}

/* Adds the known tokens of each task's seat to its index, and writes its drafts. most <= 2 * MOST_FOUND. */
int quire_lookup(const lookup_job *job) {
  for (int64_t i = 0; i < job->num_tasks; i++) {
    const int64_t seat = job->tasks[3 * i], n = job->tasks[3 * i + 1];
    text_index own = job->own;
    own.tokens += seat * job->token_stride;
    own.links += seat * job->token_stride;
    own.heads += seat * job->bucket_stride;
    own.count = n;
    for (int64_t p = max64(job->indexed[seat], job->anchor - 1); p < n; p++)
      add_position(&own, p, own.tokens + p + 1 - job->anchor, job->anchor);
    job->indexed[seat] = max64(n, job->indexed[seat]);
    job->counts[i] = 0;
    if (n < job->anchor) continue;
    occurrence found[MOST_FOUND];
    const int64_t half = job->shared ? MOST_FOUND / 2 : MOST_FOUND, owner = job->owners[seat];
    int64_t count = find_occurrences(job, &own, own.tokens, n, n - 1, owner, found, half);
    if (job->shared)
      count += find_occurrences(job, job->shared, own.tokens, n, job->shared->count - 1, owner, found + count, half);
    const int64_t most = min64(job->most, job->tasks[3 * i + 2]);
    job->counts[i] = choose(job, found, count, most, job->drafts + i * job->most);
  }
  return 0;
}

/* Adds a text and a separator before it. tokens and owners: the index's own arrays, which are written. */
int quire_lookup_add(text_index *t, const int64_t *text, int64_t n, int64_t owner, int64_t anchor) {
  int64_t *tokens = (int64_t *)t->tokens, *owners = (int64_t *)t->owners;
  for (int64_t i = -1; i < n; i++) {
    const int64_t position = t->count++;
    tokens[position & t->mask] = i < 0 ? -1 : text[i];
    owners[position & t->mask] = owner;
    t->links[position & t->mask] = 0;
    if (i + 1 >= anchor) add_position(t, position, text + i + 1 - anchor, anchor);
  }
  return 0;
}

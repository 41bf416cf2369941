/* Tokens from logits: the maximum, the filters, and the Gumbel-max draw. quire/kernels/philox.py explains
 * the random numbers; quire/kernels/reference.py is the plain version.
 *
 * A row is ranked by distance, (best - logit) / temperature: the negated score, at least +0. Among floats
 * of one sign the order of the values is the order of the bits. So a cut (the k-th token, the end of the
 * nucleus) is found by counting, or adding weights, in bins of a key's leading bits, and then within the one
 * bin that has the cut. Only the last few tokens are sorted.
 *
 * A row is read once in full, in groups of 64 tokens, for the maximum of each group. At least k logits are at
 * or above the k-th largest of these maxima, so top-k needs to read only the groups that reach it again.
 * Then a short list in the order of ids is left. Sums have a fixed order, so a row's token depends on
 * that row alone.
 */
#include <float.h>
#include <stdatomic.h>

#include "kernels.h"
#include "philox.h"

#define GROUP 64            /* tokens that are processed together: 16 Philox counters */
#define LARGEST_NOISE 24.0f /* above every Gumbel number: -log(-log1p(-2^-33)) = 22.88 */
#define CHAINS 16           /* sums are over 16 interleaved chains, whatever VW is */
#define SLACK 16            /* extra elements at the end of a list's arrays */
#define FEW 32              /* sorted by insertion */
#define MOST_BINS 2048
#define TABLES 4            /* of bins: neighbours use different ones, so no addition waits for another */

typedef struct { /* mirrored by SAMPLE_ROW in kernels/sampling.py */
  int64_t seed, position;
  float temperature, top_p, min_p, farthest;
  int32_t top_k;
  float repetition_penalty, frequency_penalty, presence_penalty; /* from here: edits of logits */
  int32_t num_biased, num_banned, banned_until;
} sample_row;

typedef struct { /* mirrored by SampleArgs in library.py */
  const float *logits;    /* [num_rows, vocab], rows `stride` elements apart */
  const sample_row *rows; /* [num_rows], or NULL: all greedy */
  int64_t *token_ids;     /* [num_rows] */
  uint8_t *valid;         /* [num_rows]: 0 where the logits hold NaN */
  int64_t stride, num_rows, vocab;
  int32_t threads;
} sample_args;

int quire_philox_uniform(uint64_t seed, uint64_t position, float *out, int64_t n) {
  for (int64_t first = 0; first < n; first += 4 * VW) {
    vu words[4];
    float u[4][VW];
    philox(seed, position, (vu)vlane_index() + (uint32_t)(first / 4), words);
    for (int j = 0; j < 4; j++) vstore(u[j], vuniform(words[j]), F32);
    for (int64_t i = first; i < min64(first + 4 * VW, n); i++) out[i] = u[i % 4][(i - first) / 4];
  }
  return 0;
}

/* ---- a row, by groups ---- */

typedef struct {
  const float *logits;
  int64_t vocab, groups, best_group;
  float best, temperature;
  float *group; /* [groups, to whole vectors]: each one's largest logit; from rank() on its distance */
} row_view;

/* The 64 logits of group g; the last group is padded with -inf. */
INLINE const float *group_logits(const row_view *row, int64_t g, float *buffer) {
  const float *x = row->logits + g * GROUP;
  const int64_t n = row->vocab - g * GROUP;
  if (n >= GROUP) return x;
  for (int64_t i = 0; i < GROUP; i++) buffer[i] = i < n ? x[i] : -INFINITY;
  return buffer;
}

INLINE int vany_nan(vf a, vf b) {
#if VW == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#else
  return vany((vi)(a != a) | (vi)(b != b));
#endif
}

/* Finds each group's largest logit and the first group with the row's largest. Returns 0 if there is a
 * NaN. */
static int scan(row_view *row) {
  row->best = -INFINITY;
  row->best_group = 0;
  int nan = 0;
  for (int64_t g = 0; g < row->groups; g++) {
    float buffer[GROUP];
    const float *x = group_logits(row, g, buffer);
    vf largest = vload(x, F32);
    nan |= vany_nan(largest, largest);
    UNROLL for (int i = VW; i + VW < GROUP; i += 2 * VW) {
      const vf a = vload(x + i, F32), b = vload(x + i + VW, F32);
      nan |= vany_nan(a, b);
      largest = vmax(largest, vmax(a, b));
    }
    const vf last = vload(x + GROUP - VW, F32);
    nan |= vany_nan(last, last);
    row->group[g] = vlargest(vmax(largest, last));
    if (row->group[g] > row->best) {
      row->best = row->group[g];
      row->best_group = g;
    }
  }
  return !nan;
}

/* The lowest id with the row's largest logit. */
static int64_t best_token(const row_view *row) {
  int64_t token = row->best_group * GROUP;
  while (row->logits[token] != row->best) token++;
  return token;
}

/* The best token's distance is 0, even if its logit is infinite, and no other token's is: with a high
 * temperature a small difference would round to 0, and the lower id would win. */
INLINE vf vdistance(const row_view *row, vf logits) {
  const vf best = vset(row->best);
  const vf apart = vmax((best - logits) / vset(row->temperature), vset(FLT_MIN));
  return vselect((vi)(logits == best), vset(0.0f), apart);
}

/* From here on, a group's entry is the distance of its nearest token. */
static void rank(row_view *row) {
  for (int64_t g = row->groups; g % VW; g++) row->group[g] = -INFINITY;
  for (int64_t g = 0; g < row->groups; g += VW)
    vstore(row->group + g, vdistance(row, vload(row->group + g, F32)), F32);
}

/* ---- lists of tokens ---- */

typedef struct { /* in the order of ids; padded to whole vectors with infinite distances */
  float *distance, *weight;
  int32_t *id;
  int64_t n;
} shortlist;

/* Writes the kept lanes of d, and of the 32 bits of each, contiguously; may write up to VW - 1 more
 * lanes. Returns the number of kept lanes. */
INLINE int64_t put(float *distances, void *others, vf d, vi other, vi keep) {
#if VW == 16
  const __mmask16 m = _mm512_test_epi32_mask((__m512i)keep, (__m512i)keep);
  _mm512_storeu_ps(distances, _mm512_maskz_compress_ps(m, (__m512)d));
  _mm512_storeu_si512(others, _mm512_maskz_compress_epi32(m, (__m512i)other));
  return __builtin_popcount(m);
#else
  int64_t n = 0;
  for (int i = 0; i < VW; i++) {
    const int32_t bits = other[i];
    distances[n] = d[i];
    memcpy((char *)others + 4 * n, &bits, sizeof bits);
    n -= keep[i];
  }
  return n;
#endif
}

static void end_list(shortlist *list) {
  for (int i = 0; i < SLACK; i++) list->distance[list->n + i] = INFINITY;
}

/* The tokens at distance `limit` or less. It is finite, so a logit of -inf is in no list. */
static void collect(const row_view *row, float limit, shortlist *list) {
  int64_t n = 0;
  for (int64_t g = 0; g < row->groups; g++) {
    if (row->group[g] > limit) continue;
    float buffer[GROUP];
    const float *x = group_logits(row, g, buffer);
    for (int i = 0; i < GROUP; i += VW) {
      const vf d = vdistance(row, vload(x + i, F32));
      const vi id = vlane_index() + (int32_t)(g * GROUP + i);
      n += put(list->distance + n, list->id + n, d, id, (vi)(d <= limit));
    }
  }
  list->n = n;
  end_list(list);
}

static void shorten(shortlist *list, float limit) {
  int64_t n = 0;
  for (int64_t i = 0; i < list->n; i += VW) {
    vi id;
    memcpy(&id, list->id + i, sizeof id);
    const vf d = vload(list->distance + i, F32);
    n += put(list->distance + n, list->id + n, d, id, (vi)(d <= limit));
  }
  list->n = n;
  end_list(list);
}

/* ---- weights: e^-distance ---- */

INLINE double sum_chains(double *sums) {
  for (int w = CHAINS / 2; w > 0; w >>= 1)
    for (int j = 0; j < w; j++) sums[j] += sums[j + w];
  return sums[0];
}

/* The sum over the tokens at distance `limit` or less. */
static double weigh_row(const row_view *row, float limit) {
  double sums[CHAINS] = {0};
  for (int64_t g = 0; g < row->groups; g++) {
    if (row->group[g] > limit || row->group[g] > 88.0f) continue; /* all zero: see vexp */
    float buffer[GROUP], weights[GROUP];
    const float *x = group_logits(row, g, buffer);
    for (int i = 0; i < GROUP; i += VW) {
      const vf d = vdistance(row, vload(x + i, F32));
      vstore(weights + i, vselect((vi)(d <= limit), vexp(-d), vset(0.0f)), F32);
    }
    for (int i = 0; i < GROUP; i += CHAINS)
      for (int j = 0; j < CHAINS; j++) sums[j] += (double)weights[i + j];
  }
  return sum_chains(sums);
}

/* Writes the weights, and zeros beyond n. Returns their sum. */
static double weigh_list(shortlist *list) {
  double sums[CHAINS] = {0};
  for (int64_t i = 0; i < list->n; i += CHAINS) {
    for (int j = 0; j < CHAINS; j += VW)
      vstore(list->weight + i + j, vexp(-vload(list->distance + i + j, F32)), F32);
    for (int j = 0; j < CHAINS; j++) sums[j] += (double)list->weight[i + j];
  }
  return sum_chains(sums);
}

/* ---- where to cut ---- */

typedef struct { /* keep tokens nearer than `limit`, and the first `ties` of those at `limit` */
  float limit;
  int64_t ties, surplus; /* surplus: tokens at `limit` that are not kept */
} cut;

INLINE uint32_t key_of(float distance) {
  uint32_t key;
  memcpy(&key, &distance, sizeof key);
  return key;
}

INLINE float distance_of(uint32_t key) {
  float distance;
  memcpy(&distance, &key, sizeof distance);
  return distance;
}

INLINE double weight_of(const float *weight, int64_t i) { return weight ? (double)weight[i] : 1.0; }

/* n <= FEW elements: sorted by distance, and kept while the weight before them is below target. */
static cut cut_few(const float *distance, const float *weight, int64_t n, double before,
                   double target) {
  float d[FEW], w[FEW];
  for (int64_t i = 0; i < n; i++) {
    int64_t j = i;
    for (; j > 0 && d[j - 1] > distance[i]; j--) d[j] = d[j - 1], w[j] = w[j - 1];
    d[j] = distance[i];
    w[j] = (float)weight_of(weight, i);
  }
  cut c = {d[0], 0, 0};
  int64_t kept = 0;
  do before += w[kept++];
  while (kept < n && before < target);
  c.limit = d[kept - 1];
  for (int64_t i = 0; i < n; i++) {
    c.ties += i < kept && d[i] == c.limit;
    c.surplus += i >= kept && d[i] == c.limit;
  }
  return c;
}

/* n elements at the same distance, and so of the same weight. */
static cut cut_equal(float distance, double weight, int64_t n, double before, double target) {
  const double wanted = weight > 0 ? ceil((target - before) / weight) : (double)n;
  const int64_t kept = wanted >= (double)n ? n : max64((int64_t)wanted, 1);
  return (cut){distance, kept, n - kept};
}

/* Mask of the lanes below n in the vector at i. */
INLINE vi vinside(int64_t i, int64_t n) { return vlane_index() < (int32_t)min64(n - i, VW); }

static void key_range(const float *distance, int64_t n, uint32_t *low, uint32_t *high) {
  const vf first = vset(distance[0]);
  vf largest = first, smallest = -first; /* negated */
  for (int64_t i = 0; i < n; i += VW) {
    const vf d = vselect(vinside(i, n), vload(distance + i, F32), first);
    largest = vmax(largest, d);
    smallest = vmax(smallest, -d);
  }
  *low = key_of(-vlargest(smallest) + 0.0f); /* -0 becomes +0 */
  *high = key_of(vlargest(largest));
}

/* The elements at [low, high], in order. Returns their number. The lists may be the same. */
static int64_t extract(const float *distance, const float *weight, int64_t n, float low, float high,
                       float *to_distance, float *to_weight) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += VW) {
    const vf d = vload(distance + i, F32), w = weight ? vload(weight + i, F32) : d;
    const vi keep = vinside(i, n) & (vi)(d >= low) & (vi)(d <= high);
    kept += put(to_distance + kept, to_weight + kept, d, (vi)w, keep);
  }
  return kept;
}

/* The cut that keeps tokens, in the order of distance and then of place, while the weight before them is
 * below target. The first is always kept. weight NULL: all weights are 1. n >= 1; whole vectors can be
 * read and written. spare_*: space for the elements of a bin. */
static cut find_cut(const float *distance, const float *weight, int64_t n, double target,
                    float *spare_distance, float *spare_weight) {
  double before = 0;
  while (n > FEW) {
    uint32_t low, high;
    key_range(distance, n, &low, &high);
    if (low == high)
      return cut_equal(distance[0], weight_of(weight, 0), n, before, target);
    const uint32_t bins = n > 4096 ? MOST_BINS : MOST_BINS / 8;
    int shift = 0;
    while ((high - low) >> shift >= bins) shift++;
    double mass[TABLES][MOST_BINS];
    for (int t = 0; t < TABLES; t++) memset(mass[t], 0, bins * sizeof(double));
    for (int64_t i = 0; i < n; i++)
      mass[i % TABLES][(key_of(distance[i]) - low) >> shift] += weight_of(weight, i);
    uint32_t bin = 0;
    for (const uint32_t last = (high - low) >> shift; bin < last; bin++) {
      const double here = (mass[0][bin] + mass[1][bin]) + (mass[2][bin] + mass[3][bin]);
      if (before + here >= target) break;
      before += here;
    }
    const uint32_t nearest = low + (bin << shift);
    const uint32_t farthest = nearest + ((1u << shift) - 1);
    n = extract(distance, weight, n, distance_of(nearest), distance_of(farthest < high ? farthest : high),
                spare_distance, spare_weight);
    distance = spare_distance;
    if (weight) weight = spare_weight;
  }
  return cut_few(distance, weight, n, before, target);
}

static void apply(cut c, shortlist *list) {
  shorten(list, c.limit);
  if (c.surplus == 0) return;
  int64_t n = 0;
  for (int64_t i = 0; i < list->n; i++) {
    if (list->distance[i] == c.limit && c.ties-- <= 0) continue;
    list->distance[n] = list->distance[i];
    list->id[n++] = list->id[i];
  }
  list->n = n;
  end_list(list);
}

/* ---- the draw: largest (noise - distance), ties to the lowest id ---- */

static int64_t draw_listed(const shortlist *list, uint64_t seed, uint64_t position) {
  float best = -INFINITY;
  int64_t token = 0;
  for (int64_t i = 0; i < list->n; i += VW) {
    const vf d = vload(list->distance + i, F32);
    /* fl(noise - d) <= fl(LARGEST_NOISE - d), as rounding is monotone: skipping is exact. */
    if (!vany((vi)(LARGEST_NOISE - d >= best))) continue;
    vi id;
    memcpy(&id, list->id + i, sizeof id);
    vu words[4];
    philox(seed, position, (vu)id >> 2, words);
    vf w = (vf)words[0];
    for (int j = 1; j < 4; j++) w = vselect((id & 3) == j, (vf)words[j], w);
    float x[VW];
    vstore(x, vgumbel(vuniform((vu)w)) - d, F32);
    for (int j = 0; j < min64(list->n - i, VW); j++)
      if (x[j] > best) {
        best = x[j];
        token = list->id[i + j];
      }
  }
  return token;
}

/* Whether u is small enough for noise >= best + d, which needs -log1p(-u) <= e^-(best + d), and so u
 * below that. `near` is e^-d. The margin of a thousandth is far above the rounding errors of the
 * logarithms. */
INLINE vu largest_winner(float near, float lift) {
  const float u = near * lift;
  return (vu){0} + (u < 0.999f ? (uint32_t)(u * 0x1p32f) : UINT32_MAX);
}

/* Draws among all tokens of the row, with distances `far` (infinite: excluded), or if NULL those of the
 * logits. */
static int64_t draw_any(const row_view *row, const float *far, float *near, uint64_t seed,
                        uint64_t position) {
  for (int64_t g = 0; g < row->groups; g += VW)
    vstore(near + g, vexp(-vload(row->group + g, F32)), F32);
  float best = -INFINITY, lift = INFINITY; /* lift: a little above e^-best */
  int64_t token = 0;
  for (int64_t turn = -1; turn < row->groups; turn++) { /* the best token's group first */
    const int64_t g = turn < 0 ? row->best_group : turn;
    if (turn == row->best_group || !(LARGEST_NOISE - row->group[g] >= best)) continue;
    vu words[GROUP / 4 / VW][4], least = ~(vu){0};
    for (int b = 0; b < GROUP / 4 / VW; b++) {
      philox(seed, position, (vu)vlane_index() + (uint32_t)(g * (GROUP / 4) + b * VW), words[b]);
      for (int j = 0; j < 4; j++) {
        const vu mask = (vu)(words[b][j] < least);
        least = (words[b][j] & mask) | (least & ~mask);
      }
    }
    if (!vany((vi)(least <= largest_winner(near[g], lift)))) continue;
    uint32_t in_order[GROUP];
    for (int b = 0; b < GROUP / 4; b++)
      for (int j = 0; j < 4; j++) in_order[4 * b + j] = words[b / VW][j][b % VW];
    float x[GROUP], buffer[GROUP];
    const float *logits = far ? NULL : group_logits(row, g, buffer);
    for (int i = 0; i < GROUP; i += VW) {
      const vf d = far ? vload(far + g * GROUP + i, F32) : vdistance(row, vload(logits + i, F32));
      vstore(x + i, vgumbel(vuniform(vload_words(in_order + i))) - d, F32);
    }
    for (int i = 0; i < GROUP; i++) {
      const int64_t id = g * GROUP + i;
      if (x[i] > best || (x[i] == best && id < token)) {
        best = x[i];
        token = id;
      }
    }
    lift = 1.001f * expf(-best);
  }
  return token;
}

/* ---- rows ---- */

typedef struct {
  const sample_args *args;
  _Atomic int failed;
} sample_job;

/* Scratch memory of a row, in floats: two arrays of groups, five of tokens. */
static int64_t padded(int64_t n) { return (n + GROUP - 1) / GROUP * GROUP + SLACK; }

static int64_t sample_filtered(row_view *row, const sample_row *wants, float *memory, float *near) {
  const int64_t room = padded(row->vocab);
  shortlist list = {memory, memory + room, (int32_t *)(memory + 2 * room), 0};
  float *spare_distance = memory + 3 * room, *spare_weight = memory + 4 * room;
  const uint64_t seed = (uint64_t)wants->seed, position = (uint64_t)wants->position;
  float limit = FLT_MAX;
  if (wants->min_p > 0) limit = fminf(limit, -(float)log((double)wants->min_p));
  const int64_t k = wants->top_k > 0 && wants->top_k < row->vocab ? wants->top_k : row->vocab;
  double total = 0;
  if (k < row->vocab) {
    if (k <= row->groups) { /* k groups have a token within this distance, so there are at least k tokens */
      const cut c = find_cut(row->group, NULL, row->groups, (double)k, spare_distance, spare_weight);
      limit = fminf(limit, c.limit);
    }
  } else if (wants->top_p < 1) {
    total = weigh_row(row, limit);
    /* The weight of all tokens beyond this distance is less than half of what may be left out. */
    const double most = 2.0 * (double)row->vocab / ((1.0 - (double)wants->top_p) * total);
    limit = fminf(limit, (float)log(most));
  }
  collect(row, limit, &list);
  if (list.n > k)
    apply(find_cut(list.distance, NULL, list.n, (double)k, spare_distance, spare_weight), &list);
  if (wants->top_p < 1) {
    const double listed = weigh_list(&list);
    const double target = (double)wants->top_p * (k < row->vocab ? listed : total);
    apply(find_cut(list.distance, list.weight, list.n, target, spare_distance, spare_weight), &list);
  }
  if (list.n < row->vocab / 4) return draw_listed(&list, seed, position);
  float *far = spare_distance; /* with so many tokens, drawing from whole groups is cheaper */
  for (int64_t i = 0; i < row->groups * GROUP; i++) far[i] = INFINITY;
  for (int64_t i = 0; i < list.n; i++) far[list.id[i]] = list.distance[i];
  return draw_any(row, far, near, seed, position);
}

static void sample_one(void *context, int64_t r) {
  sample_job *job = context;
  const sample_args *a = job->args;
  row_view row = {.logits = a->logits + r * a->stride, .vocab = a->vocab,
                  .groups = (a->vocab + GROUP - 1) / GROUP};
  const sample_row *wants = a->rows ? a->rows + r : NULL;
  const int greedy = !wants || wants->temperature == 0;
  const int filtered = !greedy && (wants->min_p > 0 || wants->top_k > 0 || wants->top_p < 1);
  const int64_t groups = padded(row.groups);
  const int64_t floats = groups + (greedy ? 0 : groups) + (filtered ? 5 * padded(a->vocab) : 0);
  float *memory = quire_scratch(SCRATCH_SAMPLING, (size_t)floats * sizeof(float));
  if (!memory) {
    atomic_store(&job->failed, 1);
    return;
  }
  row.group = memory;
  a->valid[r] = (uint8_t)scan(&row);
  if (!a->valid[r]) {
    a->token_ids[r] = 0;
    return;
  }
  if (greedy || row.best == -INFINITY) {
    a->token_ids[r] = best_token(&row);
    return;
  }
  row.temperature = wants->temperature;
  rank(&row);
  float *near = memory + groups;
  a->token_ids[r] = filtered ? sample_filtered(&row, wants, near + groups, near)
                          : draw_any(&row, NULL, near, (uint64_t)wants->seed,
                                     (uint64_t)wants->position);
}

static int check_rows(const sample_args *a) {
  for (int64_t r = 0; a->rows && r < a->num_rows; r++) {
    const sample_row *row = a->rows + r;
    if (!(row->temperature >= 0 && row->temperature <= FLT_MAX)) return 1;
    if (!(row->top_p >= 0 && row->top_p <= 1)) return 2;
    if (!(row->min_p >= 0 && row->min_p <= 1)) return 3;
    if (row->top_k < 0) return 4;
  }
  return 0;
}

/* 0; 1 to 4 if a row's temperature, top_p, min_p or top_k is out of range, and nothing is written; 5 if
 * there is no memory. */
int quire_sample(const sample_args *a) {
  const int refused = check_rows(a);
  if (refused) return refused;
  sample_job job = {.args = a, .failed = 0};
  const int64_t work = a->num_rows * a->vocab * (a->rows ? 4 : 1);
  quire_run(sample_one, &job, a->num_rows, work < 4 * SMALL_WORK ? 1 : a->threads);
  return atomic_load(&job.failed) ? 5 : 0;
}

/* All passes of a draft model for a batch in one call: run its program, sample, append, and again. A pass of a small
 * model is shorter than the Python code between two passes would be. */
typedef struct { /* mirrored by _DraftJob in draft.py */
  const program *program;
  const program_step *step;  /* its rows are those of the first pass, and want one result each or none */
  const sample_row *samples; /* [requests]: of the first draft; or NULL: the likeliest tokens */
  const int64_t *wanted;     /* [requests]: drafts; 0 where the row wants no result */
  int64_t *drafts;           /* [requests, most] */
  int64_t *counts;           /* [requests]: how many were made, at most `wanted` */
  int64_t most;
} draft_job;

typedef struct { /* the rows that still draft */
  step_row *rows;
  sample_row *samples;
  int64_t *numbers, *token_ids; /* numbers: index in the job */
  uint8_t *valid;
  float *logits;
  int64_t count;
} drafting;

static int begin_drafts(const draft_job *job, drafting *d) {
  const int64_t n = job->step->requests, vocab = job->program->vocab;
  const size_t words = sizeof(step_row) + sizeof(sample_row) + 2 * sizeof(int64_t) + 8;
  char *memory = quire_scratch(SCRATCH_DRAFT, (size_t)n * (words + (size_t)vocab * sizeof(float)));
  if (!memory) return 7;
  d->rows = (step_row *)memory;
  d->samples = (sample_row *)(d->rows + n);
  d->numbers = (int64_t *)(d->samples + n);
  d->token_ids = d->numbers + n;
  d->logits = (float *)(d->token_ids + n);
  d->valid = (uint8_t *)(d->logits + n * vocab);
  d->count = 0;
  for (int64_t i = 0; i < n; i++) {
    job->counts[i] = 0;
    if (job->step->rows[i].wanted) d->numbers[d->count++] = i;
  }
  for (int64_t i = 0; job->samples && i < d->count; i++) d->samples[i] = job->samples[d->numbers[i]];
  memcpy(d->rows, job->step->rows, (size_t)n * sizeof *d->rows);
  return 0;
}

/* Appends the sampled tokens to their requests, and keeps the rows that draft on: `at` of each is then its next
 * token. Lane i of the step's results belongs to numbers[i]. */
static void append_drafts(const draft_job *job, drafting *d) {
  const program_step *s = job->step;
  int64_t kept = 0;
  for (int64_t i = 0; i < d->count; i++) {
    const int64_t number = d->numbers[i], made = job->counts[number];
    const step_row first = s->rows[number];
    const int64_t place = first.start + first.count + made;
    if (!d->valid[i] || made >= job->wanted[number] || place >= s->max_tokens) continue;
    const int64_t token = d->token_ids[i];
    ((int64_t *)s->token_ids)[first.seat * s->max_tokens + place] = token;
    job->drafts[number * job->most + made] = token;
    job->counts[number]++;
    if (made + 1 >= job->wanted[number]) continue;
    d->rows[kept] = (step_row){first.seat, place, 1, 1};
    d->samples[kept] = d->samples[i];
    d->samples[kept].position = place + 1;
    d->numbers[kept++] = number;
  }
  d->count = kept;
}

/* As quire_run_program. After an error, drafts that were made before it are there. */
int quire_draft(const draft_job *job) {
  drafting d;
  int wrong = begin_drafts(job, &d);
  if (wrong) return wrong;
  program_step step = *job->step;
  step.rows = d.rows, step.logits = d.logits, step.hidden = NULL;
  step.num_wanted = d.count;
  for (;;) {
    if ((wrong = quire_run_program(job->program, &step))) return wrong;
    if (!d.count) return 0;
    const sample_args sampling = {.logits = d.logits, .rows = job->samples ? d.samples : NULL,
                                  .token_ids = d.token_ids, .valid = d.valid, .stride = job->program->vocab,
                                  .num_rows = d.count, .vocab = job->program->vocab,
                                  .threads = step.threads};
    if (quire_sample(&sampling)) return 7;
    append_drafts(job, &d);
    if (!d.count) return 0;
    step.requests = step.num_wanted = d.count;
  }
}

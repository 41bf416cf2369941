"""The figures of docs/speculation.md: engines with and without speculation, by turns.

    python -m bench.speculation [CASE ...] [--rounds 5] [--json FILE]

Both engines of a case live in this process and take turns, so that what else runs on the machine disturbs
both alike. A ratio is the speed with speculation over that without: the median over the rounds of the ratio
in one round; of one request at a time, the speed after the first token. Before each round both engines
forget what they have seen. smollm2 needs `pip install quire[smollm2]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

from bench.copying import prompts as copying

from quire import LLM, SamplingParams
from quire.bench.drafts import DraftWatch
from quire.bench.record import run_record
from quire.speculative.base import DraftTask
from quire.speculative.create import DRAFTERS

CHAT = [
    "What does json.dumps do?",
    "What does itertools.chain do?",
    "What is a KV cache?",
    "What is a block table?",
    "What does os.path.join do?",
    "How does quire share prefixes?",
    "What does re.sub do?",
    "Count from 3 to 12.",
    "What does functools.lru_cache do?",
    "What is speculative decoding?",
    "What does shutil.copytree do?",
    "Who are you?",
]
PROSE = [
    "The function returns",
    "Parameters\n----------\nx : array_like",
    "A graph is connected if",
    "This class implements",
    "If the file does not exist,",
    "The following example shows how to",
]
QUESTIONS = [
    "Why is the sky blue?",
    "Write a short story about a dog and a lighthouse.",
    "How do I boil an egg?",
    "Explain what a binary search does.",
    "Name three uses of salt.",
    "What should I see in Rome in one day?",
]


@dataclass(frozen=True)
class Case:
    name: str
    model: str | None
    speculation: dict[str, object]
    prompts: Sequence[str]
    reach: float
    """The ratio that is wanted."""
    concurrency: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    repeats: int = 1
    """How often every prompt is asked in a round."""
    chat: bool = True
    ignore_eos: bool = False


def cases(smollm2: Sequence[str]) -> list[Case]:
    draft: dict[str, object] = {"method": "draft_model"}
    found = [
        Case("built-in pair, chat", None, draft, CHAT, 1.5),
        Case("built-in pair, chat, T 1", None, draft, CHAT, 1.5, temperature=1.0),
        Case("built-in pair, prose, T 0.7", None, draft, PROSE, 1.0, temperature=0.7, chat=False),
        Case("built-in pair, chat, 8 at once", None, draft, CHAT, 0.97, concurrency=8),
        Case("built-in pair, chat, 64 at once", None, draft, CHAT * 6, 0.97, 64, ignore_eos=True),
        Case("built-in, random drafts", None, {"method": "random"}, CHAT, 0.98, ignore_eos=True),
    ]
    for model in smollm2:
        short = "smollm2" if model == "smollm2" else "smollm2 bf16"
        ngram, suffix = {"method": "ngram"}, {"method": "suffix"}
        found += [
            Case(f"{short}, ngram, copying", model, ngram, copying(), 2.0),
            Case(f"{short}, suffix, copying", model, suffix, copying(), 2.0),
            Case(
                f"{short}, suffix, questions asked 3 times",
                model,
                suffix,
                QUESTIONS,
                1.5,
                repeats=3,
            ),
            Case(
                f"{short}, suffix, new questions", model, suffix, QUESTIONS, 0.97, temperature=0.7
            ),
            Case(f"{short}, suffix, 64 at once", model, suffix, QUESTIONS * 11, 0.97, 64, 64, 0.7),
            Case(
                f"{short}, random drafts",
                model,
                {"method": "random"},
                QUESTIONS,
                0.98,
                ignore_eos=True,
            ),
        ]
    return found


def watched(drafter: Any) -> list[float]:
    """The seconds of each call of `propose` from now on."""
    seconds: list[float] = []
    propose = drafter.propose

    def timed(tasks: Sequence[DraftTask]) -> Any:
        started = perf_counter()
        found = propose(tasks)
        seconds.append(perf_counter() - started)
        return found

    drafter.propose = timed
    return seconds


class RandomDrafter:
    """The worst drafter: it is always wrong, and always has drafts."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._turn = vocab_size, 0

    def open_cache(self, *_: object) -> None: ...
    def begin(self, *_: object) -> None: ...
    def release(self, *_: object) -> None: ...

    def propose(self, tasks: Sequence[DraftTask]) -> list[list[int]]:
        self._turn += 1
        return [[(self._turn * 7919 + i) % self._vocab_size for i in range(t.most)] for t in tasks]


def create(context: Any) -> RandomDrafter:
    return RandomDrafter(context.target.spec.vocab_size)


def engine(case: Case, speculation: dict[str, object]) -> LLM:
    options: dict[str, Any] = {"max_model_len": 1024}
    if speculation.get("method") == "random":
        speculation = {"method": "ngram", "num_speculative_tokens": 8}
    return LLM(case.model, speculative_config=speculation, **options)


@dataclass(frozen=True)
class Run:
    outputs: list[list[int]]
    seconds: float
    decode_seconds: float
    """Of one request at a time: without the time to the first token."""


def run(case: Case, llm: LLM, round_: int) -> Run:
    outputs, decode = [], 0.0
    started = perf_counter()
    asked = list(case.prompts) * case.repeats
    for first in range(0, len(asked), case.concurrency):
        batch = asked[first : first + case.concurrency]
        params = [
            SamplingParams(
                max_tokens=case.max_tokens,
                temperature=case.temperature,
                seed=1000 * round_ + first + i,
                ignore_eos=case.ignore_eos,
            )
            for i in range(len(batch))
        ]
        if case.chat:
            found = llm.chat(
                [[{"role": "user", "content": text}] for text in batch], params, use_tqdm=False
            )
        else:
            found = llm.generate(batch, params, use_tqdm=False)
        outputs += [list(each.outputs[0].token_ids) for each in found]
        decode += sum(each.metrics.last_token_ts - each.metrics.first_token_ts for each in found)
    seconds = perf_counter() - started
    return Run(outputs, seconds, decode if case.concurrency == 1 else seconds)


def measure(case: Case, rounds: int) -> dict[str, object]:
    plain, drafting = engine(case, {}), engine(case, case.speculation)
    core: Any = drafting._core._core  # type: ignore[union-attr]
    ratios, whole, speeds, shares, steps, rates = [], [], [], [], [], []
    for round_ in range(rounds + 1):
        for llm in (plain, drafting):  # cached prefixes and past outputs are dropped
            llm.sleep(1)
            llm.wake_up()
        seconds, drafts = watched(core.executor.runner.drafter), DraftWatch(drafting)
        before = core.scheduler._step_id
        turns = ((plain, drafting), (drafting, plain))[round_ % 2]
        found = {llm: run(case, llm, round_) for llm in turns}
        off, on = found[plain], found[drafting]
        assert on.outputs == off.outputs, "speculation changed a token"
        if round_:  # the first one warms up
            tokens = sum(map(len, on.outputs))
            ratios.append(off.decode_seconds / on.decode_seconds)
            whole.append(off.seconds / on.seconds)
            speeds.append((tokens / off.decode_seconds, tokens / on.decode_seconds))
            shares.append(sum(seconds) / on.seconds)
            counts = drafts.counts
            rates.append(counts.accepted_tokens / max(1, counts.draft_tokens))
            steps.append(tokens / (core.scheduler._step_id - before))
    plain.close()
    drafting.close()
    middle = statistics.median
    return {
        "case": case.name,
        "ratio": round(middle(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio_with_prompts": round(middle(whole), 3),
        "reach": case.reach,
        "tokens_per_second": [round(middle(each), 1) for each in zip(*speeds, strict=True)],
        "tokens_per_step": round(middle(steps), 2),
        "acceptance": round(middle(rates), 3),
        "share_of_proposing": round(middle(shares), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", help="parts of names; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smollm2", nargs="*", default=["smollm2"], help="models that are SmolLM2")
    args = parser.parse_args()
    results = []
    heads = ("ratio", "reach", "with prompts", "off", "on tok/s", "a step", "accepted", "proposing")
    print(f"{'case':<46}" + "".join(f"{head:>13}" for head in heads))
    for case in cases(args.smollm2):
        if args.cases and not any(part in case.name for part in args.cases):
            continue
        is_random = case.speculation["method"] == "random"
        with mock.patch.dict(DRAFTERS, {"ngram": __name__} if is_random else {}):
            result: dict[str, Any] = measure(case, args.rounds)
        results.append(result)
        off, on = result["tokens_per_second"]
        figures = [result["ratio"], case.reach, result["ratio_with_prompts"], off, on]
        figures += [
            result["tokens_per_step"],
            result["acceptance"],
            f"{result['share_of_proposing']:.2%}",
        ]
        print(f"{case.name:<46}" + "".join(f"{figure:>13}" for figure in figures), flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"results": results, "record": run_record()}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

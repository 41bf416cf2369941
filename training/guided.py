"""The gates of short JSON and of tools: greedy text under the grammars that Quire serves with.

The model still runs in `transformers`; only the sets of allowed tokens come from `quire.structured`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel
from transformers import PreTrainedTokenizerBase as HfTokenizer

from quire.builtin import MODEL_DIR
from quire.sampling_params import StructuredOutputsParams
from quire.structured.base import TokenMatcher
from quire.structured.guidance import GuidanceCompiler
from quire.structured.masks import num_mask_words, tokens_of
from quire.structured.spec import to_spec
from quire.text.parsing.forcing import forced_calls
from quire.text.parsing.formats import TOOL_FORMATS
from quire.text.tokenizer import Tokenizer
from training import chat, shapes, tools
from training import corpus as corpora
from training.shapes import Shape
from training.tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE
from training.words import Message, compact

SEED = 78
MAX_TOKENS = 64
LONGEST = 110  # characters of an object that 64 tokens hold, whatever its text
EOS = (IM_END, END_OF_TEXT)


class Masks(LogitsProcessor):
    """Follows one grammar per row of a batch."""

    def __init__(self, matchers: Sequence[TokenMatcher | None], prompt_tokens: int) -> None:
        self.matchers = list(matchers)
        self.prompt_tokens = prompt_tokens
        self.row = np.zeros(num_mask_words(VOCAB_SIZE), np.int32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # input_ids: [rows, tokens so far]; scores: [rows, vocabulary]
        for i, matcher in enumerate(self.matchers):
            if matcher is None or matcher.is_finished:
                continue
            if input_ids.shape[1] > self.prompt_tokens:
                matcher.accept(int(input_ids[i, -1]))
                if matcher.is_finished:
                    continue
            matcher.fill_mask(self.row)
            allowed = torch.from_numpy(tokens_of(self.row))
            masked = torch.full_like(scores[i], float("-inf"))
            masked[allowed] = scores[i, allowed]
            scores[i] = masked
        return scores


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, the grammar of its answer if there is one, and what is right."""

    kind: str
    prompt: str
    grammar: StructuredOutputsParams | None
    want: Any = None


@dataclass(slots=True)
class Tally:
    """How often an answer ended by itself, and was right."""

    asked: int = 0
    closed: int = 0
    right: int = 0
    missed: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the answers, how many are right."""
        return self.right / self.asked

    @property
    def shares(self) -> dict[str, float]:
        return {"closed": round(self.closed / self.asked, 3), "right": round(self.share, 3)}


UNDER_A_SCHEMA = ("stated", "invented", "unasked")


def closed(tallies: dict[str, Tally]) -> float:
    """Share of the answers under a schema that end by themselves."""
    under = [tallies[kind] for kind in UNDER_A_SCHEMA]
    return sum(t.closed for t in under) / sum(t.asked for t in under)


def complete(
    model: PreTrainedModel, tokenizer: HfTokenizer, cases: Sequence[Case], *, batch: int = 25
) -> Iterator[tuple[Case, str, bool]]:
    """Each case with its greedy answer of at most `MAX_TOKENS`, and whether that ended by itself."""
    compiler = GuidanceCompiler(
        Tokenizer.from_directory(MODEL_DIR), vocab_size=VOCAB_SIZE, eos_token_ids=EOS
    )
    for i in range(0, len(cases), batch):
        part = cases[i : i + batch]
        ids = tokenizer(
            [c.prompt for c in part], return_tensors="pt", padding=True, padding_side="left"
        )
        matchers = [
            compiler.compile(to_spec(c.grammar)).matcher() if c.grammar else None for c in part
        ]
        head = ids["input_ids"].shape[1]
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                do_sample=False,
                temperature=None,
                top_p=None,
                max_new_tokens=MAX_TOKENS,
                logits_processor=[Masks(matchers, head)],
            )
        for case, row in zip(part, made[:, head:], strict=True):
            ended = any(int(t) in EOS for t in row)
            yield case, tokenizer.decode(row, skip_special_tokens=True).strip(), ended


def _short(value: Any) -> bool:
    return len(json.dumps(value)) <= LONGEST and sum(c.isdigit() for c in json.dumps(value)) <= 16


def _short_shapes(draw: Callable[..., Shape], rng: Random, count: int) -> Iterator[Shape]:
    """`count` held-out shapes whose values fit into `MAX_TOKENS`."""
    made = iter(lambda: draw(rng, held_out=True), None)
    return islice((shape for shape in made if _short(shape.value)), count)


def shape_cases(corpus: corpora.Corpus, count: int) -> Iterator[Case]:
    """Under a schema: values that the prompt states, values to invent, prompts of another kind.

    Every fourth grammar allows no white space. Where the prompt names all keys and asks for JSON, the
    same question is asked without a grammar too.
    """
    rng = Random(SEED)
    drawn = [
        *_short_shapes(shapes.stated, rng, count),
        *_short_shapes(shapes.to_invent, rng, count),
        *(shapes.unasked(rng, _question(corpus, rng)) for _ in range(count)),
    ]
    for i, shape in enumerate(drawn):
        prompt = corpora.render(shape.question, generate=True)
        grammar = StructuredOutputsParams(json=shape.schema, disable_any_whitespace=i % 4 == 3)
        want = shape.value if shape.stated else None
        yield Case(UNDER_A_SCHEMA[i // count], prompt, grammar, want)
        if shape.stated and shape.asked and all(key in prompt for key in shape.value):
            yield Case("free", prompt, None, want)


def _question(corpus: corpora.Corpus, rng: Random) -> str:
    """A question about something else, in words that training never uses."""
    return rng.choice(chat.HELD_OUT_ASK).format(rng.choice(corpus.table).name)


def _with_tools(messages: Sequence[Message], specs: Sequence[dict[str, Any]]) -> str:
    system: Message = {"role": "system", "content": tools.tool_system(list(specs))}
    return corpora.render([system, *messages], generate=True)


def call_cases(corpus: corpora.Corpus, count: int) -> Iterator[Case]:
    """Tools that training never saw: called freely, forced, answered from, and not needed."""
    rng = Random(SEED)
    form = TOOL_FORMATS["hermes"]
    for _ in range(count):
        task = tools.make_task(rng, held_out=True)
        while not _short(task.arguments):
            task = tools.make_task(rng, held_out=True)
        prompt = _with_tools(task.question, task.specs)
        schemas = {s["function"]["name"]: s["function"]["parameters"] for s in task.specs}
        want = {"name": task.name, "arguments": task.arguments}
        yield Case("call", prompt, None, want)
        yield Case("forced_call", prompt, forced_calls(form, schemas, several=True), want)
        task, result, answer = tools.round_trip(rng, held_out=True)
        messages = [*task.messages[1:], {"role": "tool", "content": result}]
        yield Case("tool_answer", _with_tools(messages, task.specs), None, answer)
        item = rng.choice([i for i in corpus.faq if i.terms])
        asked = rng.choice(chat.HELD_OUT_ASK_TERM).format(item.terms[0])
        question: Message = {"role": "user", "content": asked}
        yield Case("no_call", _with_tools([question], task.specs), None, item.answer)


def is_right(case: Case, answer: str) -> bool:
    if case.kind in ("tool_answer", "no_call"):
        return answer == case.want
    text = answer.removeprefix("<tool_call>").removesuffix("</tool_call>")
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return case.want is None or value == case.want


def judge(
    model: PreTrainedModel, tokenizer: HfTokenizer, corpus: corpora.Corpus, count: int
) -> dict[str, Tally]:
    """Tallies by kind of case, `count` cases of each."""
    cases = [*shape_cases(corpus, count), *call_cases(corpus, count)]
    cases.sort(key=lambda c: len(c.prompt))
    out: dict[str, Tally] = {}
    for case, answer, ended in complete(model, tokenizer, cases):
        tally = out.setdefault(case.kind, Tally())
        tally.asked += 1
        tally.closed += ended
        right = ended and is_right(case, answer)
        tally.right += right
        if not right:
            asked = case.prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
            tally.missed.append(f"{asked} -> {answer} (want {compact(case.want)})")
    return out

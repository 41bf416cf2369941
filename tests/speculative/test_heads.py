"""Heads that read the target's hidden states, against plain PyTorch: which drafts they propose, also when
requests share blocks, are preempted, or want no drafts for a while."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM
from quire.decoding import Decoding
from quire.kernels.reference import ReferenceKernels
from quire.kernels.sampling import sample_row
from quire.kernels.select import create_kernels
from quire.messages import StepPlan
from quire.models.decoder import DecoderModel
from quire.models.draft_head import load_head
from quire.models.head_spec import resolve_head
from quire.sampling_params import SamplingParams
from quire.scheduler.draft_policy import DraftPolicy
from quire.speculative.base import DraftTask
from quire.speculative.heads import MOST_IDLE, HeadDrafter
from quire.weights.source import open_source
from tests.engine import test_exactness
from tests.engine.checkpoints import ServableCheckpoint, prompts, write_checkpoint
from tests.engine.test_exactness import tokens_of
from tests.speculative.reference_heads import Form, ReferenceHead, save_head, tensors_of
from tests.speculative.scripted import drafting

EAGLE3 = {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}
FORMS: Mapping[str, Form] = {
    "eagle": Form("eagle"),
    "eagle-embedding-bias": Form("eagle", {"bias": True}, has_embedding=True, join_bias=True),
    "eagle3": Form("eagle3", EAGLE3, layer="midlayer", taps=(0, 2, 3), draft_vocab=100),
    "eagle3-embedding": Form(
        "eagle3", EAGLE3, taps=(0, 2, 3), has_embedding=True, prefix="model.", draft_vocab=100
    ),
    "eagle3-shared-head": Form(
        "eagle3", {**EAGLE3, "norm_before_residual": True}, taps=(0, 2, 3), has_head=False
    ),
    "eagle3-norms": Form(
        "eagle3", {**EAGLE3, "fc_norm": True, "norm_output": True}, taps=(0, 2, 3),
        tap_norms=("fc_norm.0", "fc_norm.1", "fc_norm.2"),
    ),
    "eagle3-results-of-layers": Form(
        "eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "norm_before_fc": True}},
        taps=(2, 3, 4), tap_norms=("input_norm",), draft_vocab=64,
    ),
    "speculators": Form("eagle3", taps=(2, 3, 4), draft_vocab=100, speculators=True,
                        config={"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}),
    "speculators-qwen3": Form("eagle3", {**EAGLE3, "norm_before_residual": False}, taps=(0, 2, 3),
                              draft_vocab=100, speculators=True, qk_norm=True),
    "mimo": Form("mtp", {"kind": "mimo"}, layer="model.mtp_layers.0"),
    "deepseek": Form("mtp", {"kind": "deepseek"}, layer="model.layers.4"),
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=3, max_tokens=12, ignore_eos=True)


def make_llm(checkpoint: ServableCheckpoint, **options: Any) -> LLM:
    """With one thread: those of models so small wait for each other only."""
    return test_exactness.make_llm(checkpoint, cpu_threads=1, **options)


class Recording(HeadDrafter):
    """Keeps what was proposed for which tokens. It returns the right tokens instead, if a test knows them:
    drafts of random weights are never accepted."""

    made: list[tuple[list[int], list[int], Decoding, int]]
    """Known tokens, drafts, parameters, and the first token of the head's context."""
    answer: Callable[[list[int], int], Sequence[int]] | None = None
    silent = False

    def open_cache(self, *args: Any) -> None:
        super().open_cache(*args)
        self.made, self.decoding = [], {}

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        super().begin(plan, seat_of)
        for request in plan.admitted:
            self.decoding[seat_of[request.request_id]] = request.decoding

    def propose(self, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        if self.silent:
            return [()] * len(tasks)
        found = super().propose(tasks)
        known = [self._rows.token_ids[task.seat, : task.num_tokens].tolist() for task in tasks]
        for task, tokens, drafts in zip(tasks, known, found, strict=True):
            assert len(drafts) in (0, task.most)
            context = self._seats[task.seat].context
            self.made.append((tokens, list(drafts), self.decoding[task.seat], context))
        if self.answer is None:
            return found
        return [self.answer(tokens, task.most) for task, tokens in zip(tasks, known, strict=True)]


class Setup:
    """A target with a head."""

    def __init__(self, form: Form, checkpoint: ServableCheckpoint, directory: Path) -> None:
        self.form, self.checkpoint, self.directory = form, checkpoint, directory
        self.drafter: Recording | None = None
        tensors = load_file(directory / "model.safetensors")
        self.reference = ReferenceHead(form, checkpoint.reference, tensors)

    def create(
        self, kernels: str = "auto", *, most: int = 3, greedy: bool = False
    ) -> Callable[[DecoderModel], Recording]:
        def make(model: DecoderModel) -> Recording:
            source, used = open_source(self.directory), create_kernels(kernels)  # type: ignore[arg-type]
            own = open_source(self.checkpoint.directory)
            spec = resolve_head(self.form.method, source, model.spec, own)
            head = load_head(spec, source, model, kernels=used)
            self.drafter = Recording(head, used, most=most, greedy=greedy)
            return self.drafter

        return make

    @contextmanager
    def drafting(self, **options: Any) -> Iterator[None]:
        """All the drafts that there may be, in each step."""
        always = mock.patch("quire.scheduler.drafting.AdaptivePolicy", return_value=DraftPolicy())
        with always, drafting(self.create(**options), options.get("most", 3)):
            yield

    def expected(
        self, tokens: list[int], count: int, decoding: Decoding, *, context: int = 0
    ) -> list[int]:
        kernels, row = ReferenceKernels(), sample_row(decoding)

        def draw(logits: torch.Tensor, position: int) -> int:
            row["position"] = position
            return int(kernels.sample(logits[None].clone(), np.array([row])).token_ids[0])

        return self.reference.drafts(tokens, count, context=context, draw=draw)

    def check(self) -> None:
        """All drafts are those of the reference."""
        assert self.drafter is not None and self.drafter.made
        longest_first = sorted(self.drafter.made, key=lambda each: -len(each[0]))
        for tokens, drafts, decoding, context in longest_first:
            if drafts:
                assert drafts == self.expected(tokens, len(drafts), decoding, context=context)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of models so small wait for each other only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setup]:
    @cache
    def target_of(family: str, folder: Path) -> ServableCheckpoint:
        shape = {"num_hidden_layers": 4, "tie_word_embeddings": False}
        return write_checkpoint(family, folder / "target", **shape)

    shared = tmp_path_factory.mktemp("llama")

    @cache
    def make(name: str) -> Setup:
        form, folder = FORMS[name], tmp_path_factory.mktemp(name)
        is_mtp = form.method == "mtp"
        target = target_of("qwen2", folder) if is_mtp else target_of("llama", shared)
        if not is_mtp:
            return Setup(form, target, save_head(form, target.reference.config, folder / "head"))
        path = target.directory / "config.json"
        config = json.loads(path.read_text()) | {
            "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1,
            "attention_bias": True,
        }  # fmt: skip
        path.write_text(json.dumps(config))
        weights = target.directory / "model.safetensors"
        save_file({**load_file(weights), **tensors_of(form, target.reference.config)}, weights)
        return Setup(form, target, target.directory)

    return make


@pytest.mark.parametrize(
    ("name", "params"),
    [(name, GREEDY) for name in FORMS] + [(name, DRAWN) for name in ("eagle", "eagle3", "mimo")],
)
def test_drafts_are_those_of_plain_pytorch(
    name: str, params: SamplingParams, setup: Callable[[str], Setup]
) -> None:
    """Prompts in chunks and in company; tokens, and what drafts change of the steps."""
    used, batch = setup(name), prompts(4, longest=60)
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 3}
    with make_llm(used.checkpoint, **options) as llm:
        expected = tokens_of(llm.generate(batch, params, use_tqdm=False))
    with used.drafting(), make_llm(used.checkpoint, **options) as llm:
        assert tokens_of(llm.generate(batch, params, use_tqdm=False)) == expected
    used.check()
    assert used.drafter is not None
    assert not any(context for *_, context in used.drafter.made)
    drafts = [drafts for _, drafts, *_ in used.drafter.made]
    assert all(drafts) and len({tuple(each) for each in drafts}) > len(drafts) / 2


def right(
    outputs: Sequence[Sequence[int]], batch: Sequence[list[int]], *, wrong: int
) -> Callable[[list[int], int], list[int]]:
    """The tokens that follow; each `wrong`-th draft is another."""
    texts = [[*prompt, *output] for prompt, output in zip(batch, outputs, strict=True)]

    def answer(tokens: list[int], most: int) -> list[int]:
        [text] = {tuple(each) for each in texts if each[: len(tokens)] == tokens}
        drafts = text[len(tokens) : len(tokens) + most]
        return [
            (t + 1) % 300 if (len(tokens) + i) % wrong == 0 else t for i, t in enumerate(drafts)
        ]

    return answer


@pytest.mark.parametrize(("name", "wrong"), [("eagle", 2), ("eagle3", 1000), ("mimo", 3)])
def test_accepted_and_rejected_drafts_leave_right_states(
    name: str, wrong: int, setup: Callable[[str], Setup]
) -> None:
    used, batch = setup(name), prompts(4, longest=50)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with make_llm(used.checkpoint) as llm:
        expected = tokens_of(llm.generate(batch, params, use_tqdm=False))
    with used.drafting(), make_llm(used.checkpoint) as llm:
        assert used.drafter is not None
        used.drafter.answer = right(expected, batch, wrong=wrong)
        assert tokens_of(llm.generate(batch, params, use_tqdm=False)) == expected
    used.check()
    assert all(drafts for _, drafts, *_ in used.drafter.made)


def test_blocks_keep_the_heads_keys_and_values(setup: Callable[[str], Setup]) -> None:
    """Prefix hits, samples that share a prompt, and requests that are preempted."""
    used, prompt = setup("eagle3"), [(7 * i) % 300 for i in range(70)]
    several = SamplingParams(n=3, temperature=0.8, seed=4, max_tokens=20, ignore_eos=True)
    batch = [prompt, prompt[:48], [*prompt, 7, 8, 9], *prompts(4, longest=90)]
    options = {"num_gpu_blocks_override": 12, "max_model_len": 192, "max_num_batched_tokens": 64}

    def run() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        with make_llm(used.checkpoint, **options) as llm:
            first = tokens_of(llm.generate([prompt], GREEDY, use_tqdm=False))
            [samples] = llm.generate([prompt], several, use_tqdm=False)
            last = llm.generate(batch, DRAWN, use_tqdm=False)
        assert any(output.metrics.num_preemptions for output in last)
        assert any(output.num_cached_tokens for output in last)
        return first, [list(each.token_ids) for each in samples.outputs], tokens_of(last)

    plain = run()
    with used.drafting():
        assert run() == plain
    used.check()


def test_a_head_begins_again_at_a_block_after_a_gap(setup: Callable[[str], Setup]) -> None:
    used, prompt = setup("eagle3"), prompts(1, longest=40, seed=1)[0][:20]
    count = MOST_IDLE + 60
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    with make_llm(used.checkpoint) as llm:
        expected = tokens_of(llm.generate([prompt], params, use_tqdm=False))
    with used.drafting(), make_llm(used.checkpoint) as llm:
        drafter = used.drafter
        assert drafter is not None
        steps = 0

        def answer(tokens: list[int], most: int) -> list[int]:
            nonlocal steps
            steps += 1
            drafter.silent = steps == 3
            return []

        drafter.answer = answer
        awake = len(prompt) + 3 + MOST_IDLE + 5
        begin = type(drafter).begin

        def wake(plan: StepPlan, seat_of: Mapping[int, int]) -> None:
            begin(drafter, plan, seat_of)
            if any(row.start >= awake for row in plan.rows):
                drafter.silent = False

        drafter.begin = wake  # type: ignore[method-assign]
        assert tokens_of(llm.generate([prompt], params, use_tqdm=False)) == expected
    used.check()
    contexts = [context for tokens, drafts, _, context in drafter.made if drafts]
    lengths = [len(tokens) for tokens, drafts, *_ in drafter.made if not drafts]
    assert contexts[:3] == [0, 0, 0] and set(contexts[3:]) == {-(-awake // 16) * 16}
    assert lengths and min(lengths) > awake

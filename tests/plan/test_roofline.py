"""The terms of a step's time, by hand, and that a bound is one."""

from __future__ import annotations

import pytest

from quire.models.registry import resolve_spec
from quire.plan.devices import find_gpu
from quire.plan.model import Layout, Sized, find_model, place
from quire.plan.roofline import PUBLISHED, Experts
from quire.scheduler.cost_model import Work

H100 = find_gpu("h100")
LAYERS, HIDDEN, INNER, VOCAB, HEAD, HEADS, KV_HEADS = 32, 4096, 14336, 128256, 128, 32, 8
MATRICES = LAYERS * (HIDDEN * (2 * HIDDEN + 2 * KV_HEADS * HEAD) + 3 * HIDDEN * INNER)
KV = 2 * LAYERS * KV_HEADS * HEAD * 2


def sized(name: str = "llama-3.1-8b", *, ranks: int = 1, form: str | None = None) -> Sized:
    layout = Layout(H100, ranks, form)
    return place(find_model(name), layout, {"max_model_len": 8192})


def test_a_step_of_rows_by_hand() -> None:
    terms = sized().time().terms(Work(rows=32, contexts=32 * 4096))
    assert terms.weight_bytes == 2 * (MATRICES + HIDDEN * VOCAB + (2 * LAYERS + 1) * HIDDEN)
    assert terms.kv_bytes == 32 * 4096 * KV == 32 * 4096 * 131072
    attention = 4 * LAYERS * HEADS * HEAD * 32 * 4096
    assert terms.row_flop == 2 * (MATRICES + HIDDEN * VOCAB) * 32 + attention
    assert terms.seconds == (terms.weight_bytes + terms.kv_bytes) / 3.35e12
    assert terms.host == terms.link_bytes == 0.0


def test_a_prompt_by_hand() -> None:
    terms = sized().time().terms(Work(prompt_tokens=2048, prompt_contexts=2048 * 1024))
    flop = 2 * MATRICES * 2048 + 4 * LAYERS * HEADS * HEAD * 2048 * 1024
    assert terms.prompt_flop == flop
    assert terms.seconds == pytest.approx(flop / 989e12)


def test_two_ranks_halve_bytes_and_flop_and_gather_columns() -> None:
    work = Work(rows=8, contexts=8 * 1000, prompt_tokens=500, prompt_contexts=500 * 250)
    one, two = sized().time().terms(work), sized(ranks=2).time().terms(work)
    norms = (2 * LAYERS + 1) * HIDDEN * 2
    assert two.weight_bytes - norms == (one.weight_bytes - norms) / 2
    assert two.kv_bytes == one.kv_bytes / 2
    assert two.prompt_flop == one.prompt_flop / 2
    width = LAYERS * (HIDDEN + HIDDEN + INNER + HIDDEN)
    assert two.link_bytes == 508 * width + 8 * VOCAB * 2  # half of 2 and of 4 bytes
    assert two.seconds == one.seconds / 2
    waiting = sized(ranks=2).time(PUBLISHED).terms(work)
    assert waiting.seconds == pytest.approx(waiting.arithmetic + waiting.link + waiting.host)


def test_a_mixture_reads_the_experts_that_tokens_chose() -> None:
    experts = Experts(128, 8)
    assert experts.touched(1) == pytest.approx(8 / 128)
    assert experts.touched(1000) == pytest.approx(1.0)
    time = sized("qwen3-30b-a3b").time()
    few, many = time.terms(Work(rows=1)), time.terms(Work(rows=500))
    experts_bytes = 48 * 3 * 2048 * 768 * 128 * 2
    rest = few.weight_bytes - experts_bytes * 8 / 128
    assert many.weight_bytes == pytest.approx(rest + experts_bytes)
    active = 48 * (2048 * (2 * 4096 + 2 * 512) + 8 * 3 * 2048 * 768)
    assert few.row_flop == 2 * (active + 2048 * 151936)


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        ("fp8", 8),
        ("awq", 4 + 24 / 128),
        ("gptq", 4 + 16 / 128),
        ("int8", 8),
        ("int4", 4 + 16 / 128),
    ],
)
def test_a_format_has_its_bits(form: str, bits: float) -> None:
    """4 bits: a 16-bit scale for 128, and of AWQ a zero of 8 bits. Head and embedding: 16 bits, online 8."""
    ends = 2 * HIDDEN * VOCAB * (1 if form.startswith("int") else 2)
    others = ends + 2 * (2 * LAYERS + 1) * HIDDEN
    tables = 4 * 8192 * HEAD
    expected = MATRICES * bits / 8 + others + tables
    assert sized(form=form).rank.weight_bytes == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize(
    ("name", "parameters", "routers"),
    [
        ("mixtral-8x7b", 46_702_792_704, 32 * 8 * 4096),
        ("mixtral-8x22b", 140_630_071_296, 56 * 8 * 6144),
        ("qwen3-30b-a3b", 30_532_122_624, 48 * 128 * 2048),
        ("qwen3-235b-a22b", 235_093_634_560, 94 * 128 * 4096),
    ],
)
def test_mixtures_have_the_published_sizes(name: str, parameters: int, routers: int) -> None:
    spec = resolve_spec(find_model(name).fields)
    assert spec.num_parameters() + routers == parameters


def test_a_window_is_all_that_its_layers_read() -> None:
    time = sized("gemma-3-27b").time()
    short, long = time.terms(Work(1, 1024)), time.terms(Work(1, 8192))
    assert long.kv_bytes - short.kv_bytes == 10 * (8192 - 1024) * 2 * 16 * 128 * 2


def test_fp8_matrices_are_multiplied_twice_as_fast_where_the_device_can() -> None:
    prompt = Work(prompt_tokens=2048, prompt_contexts=2048 * 1024)
    plain, fp8 = sized().time().terms(prompt), sized(form="fp8").time().terms(prompt)
    assert plain.arithmetic / fp8.arithmetic == pytest.approx(1.9, abs=0.1)
    a100 = place(
        find_model("llama-3.1-8b"), Layout(find_gpu("a100"), 1, "fp8"), {"max_model_len": 8192}
    )
    assert a100.time().peak == 312e12


def test_an_estimate_is_never_less_than_the_bound() -> None:
    for ranks in (1, 2, 4):
        layout = sized(ranks=ranks)
        bound, estimate = layout.time(), layout.time(PUBLISHED)
        assert bound.is_bound
        assert not estimate.is_bound
        for rows in (0, 1, 16, 256):
            for prompt in (0, 1, 512, 8192):
                work = Work(rows, rows * 1000, 1, prompt, prompt * prompt / 2)
                assert estimate.seconds(work) > bound.seconds(work)


def test_more_work_never_takes_less_time() -> None:
    for time in (sized().time(), sized("qwen3-30b-a3b", ranks=2).time(PUBLISHED)):
        steps = [Work(n, n * 100, 1, n * 8, n * n) for n in (0, 1, 2, 8, 32, 128)]
        seconds = [time.seconds(work) for work in steps]
        assert seconds == sorted(seconds)

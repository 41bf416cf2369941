"""LoRA adapters of every kind and family against the model that they are meant to give, and bit-equality with
themselves."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quire.kernels.base import Kernels
from quire.kernels.lora import matrix_rows
from quire.kernels.select import create_kernels
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.quantization.online import read_online
from quire.runner.adapters import AdapterTable
from quire.weights.adapter import check_adapter, sites
from quire.weights.names import EMBEDDING
from quire.weights.source import open_source
from tests.models.conftest import Pair
from tests.models.harness import PagedHarness, Request
from tests.models.variants import VARIANTS, prompt_tokens, reference_logits
from tests.weights.adapter_writer import matrices, merged, write_adapter

ALL = ("_proj",)


def load(model: DecoderModel, *directories: Path) -> AdapterTable:
    """A table in which the adapters have the indices 0, 1, ..."""
    table = AdapterTable(model, max_rank=64, slots=len(directories))
    for index, directory in enumerate(directories):
        key = check_adapter(directory, model.spec.whole, max_rank=64).key(f"a{index}")
        table.load(key, directory)
        deadline = time.monotonic() + 60
        while not (ended := table.poll()):
            table.wait(1.0)
            assert time.monotonic() < deadline
        assert ended[0].error is None, ended
        assert table.acquire(key) == index
    return table


def harness(model: DecoderModel, table: AdapterTable) -> PagedHarness:
    made = PagedHarness(model)
    made.adapters = table.packed
    return made


def text_names(reference: torch.nn.Module) -> bool:
    return "model.embed_tokens.weight" in dict(reference.named_parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family(
    name: str, pair: Callable[..., Pair], kernels: Kernels, tmp_path: Path
) -> None:
    reference, model = pair(name, kernels)
    if not text_names(reference):
        pytest.skip("the writer has a text model's names")
    adapter = write_adapter(
        tmp_path, model.spec, [*ALL, "embed_tokens", "lm_head"], ranks={"up_proj": 5}
    )
    tokens = prompt_tokens(30)
    ours = harness(model, load(model, adapter)).prefill(Request(tokens, adapter=0), chunk=16)
    theirs = reference_logits(merged(reference, adapter), tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    base = reference_logits(reference, tokens)
    assert (theirs - base).abs().max() > 0.1  # the comparison means something


LAYER0 = "layers.0.self_attn.q_proj"
KINDS: dict[str, dict[str, object]] = {
    "rank 1": {"targets": ["q_proj"], "rank": 1},
    "rank 33 of v alone": {"targets": ["v_proj"], "rank": 33},
    "up alone": {"targets": ["up_proj"]},
    "q and v": {"targets": ["q_proj", "v_proj"], "ranks": {"v_proj": 7}},
    "k, o, gate": {"targets": ["k_proj", "o_proj", "gate_proj"], "rank": 9},
    "one layer": {"targets": ["layers.1.mlp.down_proj"]},
    "head": {"targets": ["lm_head"]},
    "embedding": {"targets": ["embed_tokens"], "rank": 6},
    "rslora": {"targets": ALL, "rank": 9, "use_rslora": True},
    "dora": {"targets": [*ALL, "lm_head"], "use_dora": True},
    "dora of q": {"targets": ["q_proj"], "use_dora": True, "use_rslora": True},
    "patterns": {
        "targets": ALL,
        "ranks": {LAYER0: 3, "v_proj": 11},
        "rank_pattern": {LAYER0: 3, "v_proj": 11},
        "alpha_pattern": {
            f"model.{LAYER0}": 1,
            "self_attn.q_proj": 3.5,
            "down_proj": 20,
            "proj": 99,
        },
    },
    "stored as bfloat16": {"targets": ALL, "dtype": torch.bfloat16},
    "stored as float16": {"targets": ALL, "dtype": torch.float16},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-mha-tied", "qwen3-windows-bias"])
def test_every_kind(
    name: str, kind: str, pair: Callable[..., Pair], kernels: Kernels, tmp_path: Path
) -> None:
    reference, model = pair(name, kernels)
    adapter = write_adapter(tmp_path, model.spec, **KINDS[kind])  # type: ignore[arg-type]
    tokens = prompt_tokens(20)
    ours = harness(model, load(model, adapter)).prefill(Request(tokens, adapter=0), chunk=16)
    theirs = reference_logits(merged(reference, adapter), tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert (theirs - reference_logits(reference, tokens)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kernels", "name", "dtype"),
    [
        *(("native", name, torch.float32) for name in ("llama-head-dim", "phi3", "gemma2")),
        *(("native", name, torch.bfloat16) for name in ("llama-mlp-bias", "granite", "olmo2")),
        ("native", "qwen2", torch.float16),
        ("reference", "llama", torch.bfloat16),
    ],
    indirect=["kernels"],
    ids=str,
)
def test_a_row_does_not_depend_on_the_adapters_of_the_others(
    name: str,
    dtype: torch.dtype,
    pair: Callable[..., Pair],
    kernels: Kernels,
    tmp_path: Path,
) -> None:
    """Random batches of requests, each with one of four adapters or none, bit for bit as each alone; those
    without an adapter as in a model that has never seen one."""
    _, model = pair(name, kernels, dtype)
    chooser = random.Random(name)
    names = sorted(matrices(model.spec))
    adapters = [
        write_adapter(
            tmp_path / str(seed),
            model.spec,
            [each for each in names if seed == 0 or chooser.random() < 0.6] or names,
            rank=(4, 1, 17, 40)[seed],
            seed=seed,
            use_dora=seed == 3 and "model.embed_tokens" not in names,
        )
        for seed in range(4)
    ]
    table = load(model, *adapters)
    batched = harness(model, table)
    requests = [
        Request(prompt_tokens(chooser.randrange(3, 60), seed=seed), adapter=seed % 6 - 2)
        for seed in range(14)
    ]
    for request in requests:
        request.adapter = max(request.adapter, -1)
    logits: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(requests))}
    while left := [index for index, request in enumerate(requests) if request.num_left]:
        chosen = chooser.sample(left, chooser.randint(1, len(left)))
        work = [(requests[i], chooser.randint(1, min(25, requests[i].num_left))) for i in chosen]
        for index, part in zip(chosen, batched.step(work), strict=True):
            logits[index].append(part)
    for index, request in enumerate(requests):
        alone = PagedHarness(model)
        alone.adapters = table.packed if request.adapter >= 0 else None
        expected = alone.prefill(Request(request.tokens, adapter=request.adapter), chunk=10**6)
        assert torch.equal(torch.cat(logits[index]), expected), (index, request.adapter)


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, pair: Callable[..., Pair], kernels: Kernels, tmp_path: Path
) -> None:
    _, model = pair("qwen3", kernels, dtype)
    table = load(
        model,
        *(
            write_adapter(
                tmp_path / str(seed), model.spec, ["_proj", "lm_head"], rank=19, seed=seed
            )
            for seed in range(3)
        ),
    )
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        requests = [Request(prompt_tokens(90, seed=i), adapter=i % 3) for i in range(9)]
        results.append(torch.cat(harness(model, table).step([(each, 90) for each in requests])))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8_per_channel"])
def test_quantized_bases(
    quantization: str,
    checkpoint: Callable[..., tuple[transformers.PreTrainedModel, Path]],
    tmp_path: Path,
) -> None:
    """Against the model with the dequantized matrices, and a row's bits in a batch."""
    _, directory = checkpoint("qwen2")
    config = json.loads((directory / "config.json").read_text())
    kernels = create_kernels("auto")

    def loaded(spec: ModelSpec, source: Path) -> DecoderModel:
        return load_model(
            spec, open_source(source), dtype=torch.float32, kernels=kernels, max_model_len=256
        )

    plain = resolve_spec(dict(config))
    model = loaded(dataclasses.replace(plain, quantization=read_online(quantization)), directory)
    tensors = load_file(directory / "model.safetensors")
    for product, shape in zip(model.record().products, sites(plain), strict=False):
        first = 0
        for part in shape.parts:
            name = f"{EMBEDDING if part.name == 'lm_head' else part.name}.weight"
            tensors[name] = matrix_rows(product, first, part.out_features).contiguous()
            first += part.out_features
    (tmp_path / "dense").mkdir()
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    dense = loaded(plain, tmp_path / "dense")
    adapters = [
        write_adapter(tmp_path / str(i), plain, [*ALL, "lm_head"], seed=i, use_dora=bool(i))
        for i in range(2)
    ]
    batched = harness(model, load(model, *adapters))
    tokens = prompt_tokens(30)
    requests = [Request(tokens, adapter=index) for index in (0, 1, -1, 0)]
    together = batched.step([(request, 30) for request in requests])
    assert torch.equal(together[0], together[3])
    expected = harness(dense, load(dense, *adapters))
    for index, logits in zip((0, 1, -1), together, strict=False):
        alone = harness(model, load(model, *adapters))
        assert torch.equal(alone.prefill(Request(tokens, adapter=index), chunk=7), logits)
        theirs = expected.prefill(Request(tokens, adapter=index), chunk=30)
        torch.testing.assert_close(logits, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()))

"""The ledger of several devices, from a config alone."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quire.cli import serve
from quire.config import EngineConfig, from_flat
from quire.dtypes import element_bytes
from quire.engine.assemble import estimate_ranks, parts_of, plan
from quire.engine.dry_run import ConfigOnly, Ledger, dry_run, weight_kinds
from quire.engine.setup import ResolvedModel, resolve
from quire.errors import ConfigError, MemoryFitError
from quire.layers.share import can_divide
from quire.models.known import known_config, known_names
from quire.models.registry import resolve_spec
from quire.runner.footprint import DeviceMemory
from tests.models import published

GIB = 2**30
GPU = DeviceMemory(total=80 * GIB, available=80 * GIB)
COUNTS = {
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552, "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952, "gemma-3-4b": 3_880_263_168, "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-3-mini-4k": 3_821_079_552, "phi-4": 14_659_507_200,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624, "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640, "olmo-2-7b": 7_298_617_344, "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b-v0.1": 7_241_732_096, "codestral-22b": 22_247_282_688,
    "mistral-large-123b": 122_610_069_504, "phi-3-medium-4k": 13_960_238_080,
    "yi-1.5-9b": 8_829_407_232, "yi-1.5-34b": 34_388_917_248,
}  # fmt: skip
"""Parameters, by the models' cards; of Gemma 3's, without the vision tower."""


def configured(name: str, **options: object) -> tuple[EngineConfig, ResolvedModel]:
    config = from_flat({"model": name, "load_format": "dummy", "device": "cpu", **options})
    return config, resolve(config, ConfigOnly(known_config(name)))


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert serve.run(["--dry-run", *words]) == 0
    return capsys.readouterr().out


def test_the_sizes_are_those_of_the_published_models() -> None:
    specs = {name: resolve_spec(known_config(name)) for name in known_names()}
    assert {name: spec.num_parameters() for name, spec in specs.items()} == COUNTS
    for name, config in {
        "llama-3.1-8b": published.LLAMA_3_1_8B, "llama-3.2-1b": published.LLAMA_3_2_1B,
        "mistral-nemo-12b": published.MISTRAL_NEMO, "qwen2.5-0.5b": published.QWEN2_5_05B,
        "qwen3-0.6b": published.QWEN3_06B, "gemma-3-1b": published.GEMMA_3_1B,
        "phi-3-mini-4k": published.PHI_3_MINI_4K, "phi-4": published.PHI_4,
        "smollm2-135m": published.SMOLLM2_135M, "olmo-2-7b": published.OLMO_2_7B,
    }.items():  # fmt: skip
        known = known_config(name)
        assert known == {**known, **{key: config[key] for key in known if key in config}} | {
            "torch_dtype": "bfloat16"
        }, name


def test_llama_70b_on_two_devices_by_hand() -> None:
    config, resolved = configured("llama-3.1-70b", tensor_parallel_size=2)
    hidden, inner, layers, vocab, head, kv_heads = 8192, 28672, 80, 128256, 128, 8
    attention = layers * hidden * (2 * hidden + 2 * kv_heads * head)
    norms = (2 * layers + 1) * hidden
    rotary = 131072 * head * 4
    footprint = estimate_ranks(config, resolved, GPU)
    for part, each in zip(parts_of(config, resolved), footprint.ranks, strict=True):
        kinds = weight_kinds(part, each, 2)
        assert kinds["attention"] == attention * 2 // 2
        assert kinds["MLP"] == layers * 3 * hidden * inner * 2 // 2
        assert kinds["embedding and head"] == 2 * vocab * hidden * 2 // 2
        assert kinds["norms"] == norms * 2
        assert kinds["rotary tables"] == rotary
        assert sum(kinds.values()) == each.weight_bytes
        assert part.model.kv_bytes_per_token(2) == layers * 2 * kv_heads // 2 * head * 2
    whole = 2 * COUNTS["llama-3.1-70b"]
    assert footprint.weight_bytes == whole + norms * 2 + 2 * rotary


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "qwen2.5-0.5b", "gemma-2-2b", "phi-4", "smollm2-135m", "qwen3-8b"]
)
def test_the_ranks_add_up_to_the_whole(name: str, ranks: int, quantization: str | None) -> None:
    config, resolved = configured(name, tensor_parallel_size=ranks, quantization=quantization)
    heads = resolved.spec.heads
    if not can_divide(heads.num_heads, heads.num_kv_heads, ranks):
        pytest.skip("so many ranks are refused")
    parts = parts_of(config, resolved)
    footprint = estimate_ranks(config, resolved, GPU)
    sums = dict.fromkeys(weight_kinds(parts[0], footprint, 2), 0)
    for part, each in zip(parts, footprint.ranks or [footprint], strict=True):
        kinds = weight_kinds(part, each, 2)
        assert sum(kinds.values()) == each.weight_bytes and min(kinds.values()) >= 0
        sums = {kind: sums[kind] + count for kind, count in kinds.items()}
    one, whole = configured(name, quantization=quantization)
    [all_in_one] = parts_of(one, whole)
    expected = weight_kinds(all_in_one, estimate_ranks(one, whole, GPU), 2)
    for kind in ("norms", "rotary tables"):  # on every rank
        expected[kind] *= ranks
    if ranks <= heads.num_kv_heads:
        assert sums == expected
    else:  # some heads of keys and values are on several ranks
        assert sums.pop("attention") > expected.pop("attention")
        assert sums == expected
    kv = sum(part.model.kv_bytes_per_token(2) for part in parts)
    copies = max(1, ranks // heads.num_kv_heads)
    assert kv == copies * whole.spec.kv_bytes_per_token(2)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-0.5b"])
def test_the_stages_add_up_to_the_whole(name: str, stages: int) -> None:
    config, resolved = configured(name, pipeline_parallel_size=stages)
    parts, spec = parts_of(config, resolved), resolved.spec
    total = sum(part.model.weight_bytes(2) for part in parts)
    copies = spec.vocab_size * spec.hidden_size * 2 if spec.tie_word_embeddings else 0
    assert total == spec.weight_bytes(2) + copies, (
        "a tied matrix is on the first and the last stage"
    )
    kv = sum(part.model.kv_bytes_per_token(2) for part in parts)
    assert kv == spec.kv_bytes_per_token(2)
    assert sum(len(part.model.own_layers) for part in parts) == spec.num_layers


def test_the_ledger_is_the_plan_of_a_start(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--hf-config", "meta-llama/Llama-3.1-70B", "-tp", "4", "--device-memory", "80G")
    out = asked(capsys, *words, "--max-model-len", "32k")
    config, resolved = configured("llama-3.1-70b", tensor_parallel_size=4, max_model_len=32000)
    config, on_gpus = config.on_gpu(80 << 30), dataclasses.replace(resolved, device="cuda")
    expected = plan(config, on_gpus, estimate_ranks(config, resolved, GPU), 32000)
    assert f"{expected.num_blocks - 1:,} blocks of 64 tokens" in out
    assert "70,553,706,496 parameters" in out and "ranks 0 to 3" in out
    assert "80.00 GiB of memory on each GPU" in out


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    words = ("--hf-config", "llama-3.1-70b", "-tp", "4", "--device-memory", "80G")
    assert f"```text\n{asked(capsys, *words)}```" in page.read_text(encoding="utf-8")


def test_ranks_that_differ_have_columns(capsys: pytest.CaptureFixture[str]) -> None:
    out = asked(capsys, "--hf-config", "smollm2-135m", "-tp", "2", "--device", "cpu")
    heads = next(line for line in out.splitlines() if line.startswith("query heads"))
    assert heads.split()[-4:] == ["6,", "2", "3,", "1"]
    assert "rank 0" in out and "rank 1" in out and "on each machine" in out


def test_what_does_not_fit_is_printed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = dry_run(EngineConfig(), hf_config="llama-3.1-70b", memory_bytes=80 * GIB)
    assert isinstance(ledger, Ledger) and "131.48 GiB" in "\n".join(ledger.lines)
    with pytest.raises(MemoryFitError, match=r"131\.48 GiB of weights .* do not fit .*--tensor"):
        serve.run(["--dry-run", "--hf-config", "llama-3.1-70b", "--device-memory", "80G"])
    assert "131.48 GiB" in capsys.readouterr().out


def test_configs_from_files_and_bad_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.QWEN3_06B))
    out = asked(capsys, "--hf-config", str(tmp_path), "--device-memory", "8G")
    assert f"{COUNTS['qwen3-0.6b']:,} parameters" in out
    assert "8 layers" in asked(capsys)  # the built-in model
    for words, error in (
        (("--hf-config", "llama-3.1-71b"), "try llama-3.1-70b"),
        (("owner/not-here",), "downloads nothing"),
        (("--hf-config", "phi-4", "-tp", "11"), "use one of these"),
    ):
        with pytest.raises(ConfigError, match=error):
            serve.run(["--dry-run", *words])
    with pytest.raises(ConfigError, match="--hf-config is for --dry-run"):
        serve.run(["--hf-config", "phi-4"])


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from quire.cli.main import main; "
        "main('serve --dry-run --hf-config llama-3.1-70b -tp 8 --device-memory 80G'.split()); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_element_sizes_are_those_of_the_cache() -> None:
    config, resolved = configured("llama-3.1-8b", kv_cache_dtype="fp8")
    assert element_bytes(resolved.kv_cache_dtype) == 1
    [part] = parts_of(config, resolved)
    assert part.model.kv_bytes_per_token(1) == 65536

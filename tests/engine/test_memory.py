"""The memory ledger: who gets what, and what the error says when it is too little."""

from __future__ import annotations

import pytest

from quire.config import from_flat
from quire.engine.memory import (
    GPU_RESERVE,
    MemoryPlan,
    check_tiers,
    format_bytes,
    plan_memory,
    tier_rows,
)
from quire.errors import MemoryFitError
from quire.models.registry import resolve_spec
from quire.runner.footprint import DeviceMemory, Footprint, estimate, host_memory

SPEC = resolve_spec(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
        "intermediate_size": 2048, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "dtype": "bfloat16", "tie_word_embeddings": True, "hidden_act": "silu",
    }
)  # fmt: skip
GIB = 2**30
MACHINE = DeviceMemory(total=16 * GIB, available=12 * GIB)
BLOCK = SPEC.kv_bytes_per_token(2) * 16


def plan(
    max_model_len: int | None = 4096,
    machine: DeviceMemory = MACHINE,
    *,
    gpu: bool = False,
    measured: tuple[int, int] | None = None,
    kv_dtype_bytes: int = 2,
    **options: object,
) -> MemoryPlan:
    """max_model_len: None for what fits."""
    config = from_flat(options)
    longest = max_model_len or SPEC.context_length
    footprint = estimate(config, SPEC, machine, dtype_bytes=2, max_model_len=longest)
    return plan_memory(
        config,
        SPEC,
        footprint if measured is None else Footprint(*measured, machine),
        block_bytes=SPEC.kv.page_bytes(config.cache.block_size, kv_dtype_bytes),
        max_model_len=longest,
        may_shrink=max_model_len is None,
        gpu=gpu,
    )


def test_bytes_given_are_bytes_used() -> None:
    memory = plan(kv_cache_memory_bytes=GIB)
    assert memory.num_blocks == GIB // BLOCK
    assert GIB - BLOCK < memory.kv_bytes <= GIB
    assert memory.kv_tokens == (memory.num_blocks - 1) * 16
    assert memory.full_length_sequences == pytest.approx(memory.kv_tokens / 4096)


def test_a_share_of_the_machine_includes_weights_and_activations() -> None:
    memory = plan(gpu_memory_utilization=0.25)
    used = memory.kv_bytes + memory.weight_bytes + memory.activation_bytes
    assert 4 * GIB - BLOCK < used <= 4 * GIB


def test_by_default_half_of_what_is_available_and_no_more_than_can_be_used() -> None:
    memory = plan()
    used = memory.kv_bytes + memory.weight_bytes + memory.activation_bytes
    assert 6 * GIB - BLOCK < used <= 6 * GIB
    assert plan(max_num_seqs=2).num_blocks == 2 * 4096 // 16 + 1


def test_too_little_names_the_options_and_values_that_would_do() -> None:
    with pytest.raises(MemoryFitError) as raised:
        plan(kv_cache_memory_bytes=BLOCK * 101)
    message = str(raised.value)
    assert "--max-model-len 1600" in message
    assert f"--kv-cache-memory-bytes {BLOCK * 257}" in message
    assert "--gpu-memory-utilization 0." in message
    # And they do.
    assert plan(1600, kv_cache_memory_bytes=BLOCK * 101).kv_tokens == 1600
    assert plan(kv_cache_memory_bytes=BLOCK * 257).kv_tokens == 4096
    share = float(message.split("--gpu-memory-utilization ")[1].split(".;")[0].rstrip("."))
    assert plan(gpu_memory_utilization=share).kv_tokens >= 4096


def test_a_remedy_that_the_memory_does_not_hold_is_not_named() -> None:
    small = DeviceMemory(total=GIB, available=GIB)
    with pytest.raises(MemoryFitError, match=r"do: --max-model-len \d+") as raised:
        plan(90000, machine=small)
    assert "--kv-cache-memory-bytes" not in str(raised.value)
    length = int(str(raised.value).split("--max-model-len ")[1].split()[0])
    assert plan(length, machine=small).kv_tokens >= length


@pytest.mark.parametrize("gpu", [True, False])
def test_bytes_that_the_memory_does_not_hold_are_refused(gpu: bool) -> None:
    with pytest.raises(MemoryFitError, match="does not fit in the") as raised:
        plan(kv_cache_memory_bytes=16 * GIB, max_num_seqs=2000, gpu=gpu)
    most = int(str(raised.value).split("--kv-cache-memory-bytes ")[1].split()[0])
    assert plan(kv_cache_memory_bytes=most, max_num_seqs=2000, gpu=gpu).kv_bytes > most - BLOCK
    with pytest.raises(MemoryFitError, match="does not fit in the"):
        plan(kv_cache_memory_bytes=most + BLOCK, max_num_seqs=2000, gpu=gpu)


def test_an_override_that_is_too_small_is_named() -> None:
    with pytest.raises(MemoryFitError, match="--num-gpu-blocks-override 257"):
        plan(num_gpu_blocks_override=10)
    assert plan(num_gpu_blocks_override=257).kv_tokens == 4096


def test_weights_alone_may_be_too_much() -> None:
    tiny = DeviceMemory(total=GIB // 4, available=GIB // 8)
    for length in (4096, None):
        with pytest.raises(
            MemoryFitError, match=r"of weights and .* do not fit in 256.0 MiB .*--tensor"
        ):
            plan(length, machine=tiny)


def test_no_room_for_a_block_is_no_room_for_a_token() -> None:
    """Even if the length may shrink. Memory that others have taken may come back: the options are named."""
    taken = DeviceMemory(total=16 * GIB, available=GIB // 8)
    with pytest.raises(MemoryFitError, match=r"only 0 tokens fit .*--gpu-memory-utilization"):
        plan(machine=taken)
    with pytest.raises(MemoryFitError, match="only 0 tokens fit"):
        plan(None, machine=taken)


def test_auto_length_is_what_fits() -> None:
    assert plan(None, kv_cache_memory_bytes=BLOCK * 11).max_model_len == 160
    assert plan(None).max_model_len == 4096


def test_this_machine_has_memory() -> None:
    machine = host_memory()
    assert 0 < machine.available <= machine.total


def test_bytes_for_people() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(3 * GIB // 2) == "1.50 GiB"


def test_on_a_gpu_nine_tenths_of_all_there_is_but_no_more_than_is_free_and_a_reserve() -> None:
    empty = DeviceMemory(total=8 * GIB, available=8 * GIB)
    others = (GIB, GIB // 2)
    options = {"max_num_seqs": 2000, "max_num_batched_tokens": 4096}
    memory = plan(machine=empty, gpu=True, measured=others, **options)
    assert (memory.weight_bytes, memory.activation_bytes) == others
    room = int(0.9 * 8 * GIB) - sum(others)
    assert room - BLOCK < memory.kv_bytes <= room
    shared = DeviceMemory(total=8 * GIB, available=3 * GIB)
    less = plan(machine=shared, gpu=True, measured=others, **options)
    room = 3 * GIB - GPU_RESERVE - sum(others)
    assert room - BLOCK < less.kv_bytes <= room
    nearly_all = plan(
        machine=empty, gpu=True, measured=others, gpu_memory_utilization=0.99, **options
    )
    assert nearly_all.kv_bytes <= 8 * GIB - GPU_RESERVE - sum(others)


def test_an_fp8_cache_has_twice_the_blocks() -> None:
    plain, half = (
        plan(kv_cache_memory_bytes=GIB, kv_dtype_bytes=size, max_num_seqs=2000,
             max_num_batched_tokens=4096)
        for size in (2, 1)
    )  # fmt: skip
    assert abs(half.num_blocks - 2 * plain.num_blocks) <= 1


def test_kv_in_host_memory_is_in_the_ledger_and_must_fit_beside_the_rest() -> None:
    options = {
        "kv_cache_memory_bytes": 4 * GIB,
        "max_num_seqs": 4000,
        "max_num_batched_tokens": 4000,
    }
    found = plan(**options)
    others = found.weight_bytes + found.activation_bytes + found.kv_bytes
    assert others > 4 * GIB
    assert tier_rows(from_flat(options)) == []
    fits = from_flat({**options, "swap_space": 6})
    check_tiers(fits, found, 12 * GIB, gpu=False)
    assert tier_rows(fits) == [
        ("KV in host memory, compressed", "6.00 GiB"),
        ("KV on its way, at most", "256.0 MiB"),
    ]
    with pytest.raises(MemoryFitError, match=r"Set --swap-space 6\.\d\d or less") as caught:
        check_tiers(from_flat({**options, "swap_space": 7}), found, 12 * GIB, gpu=False)
    most = float(str(caught.value).partition("--swap-space ")[2].split()[0])
    check_tiers(from_flat({**options, "swap_space": most}), found, 12 * GIB, gpu=False)
    # a GPU has its own memory
    check_tiers(from_flat({**options, "swap_space": 11.7}), found, 12 * GIB, gpu=True)


def test_ranks_and_copies_on_a_machine_share_its_memory() -> None:
    found = plan(kv_cache_memory_bytes=GIB)
    for options in ({"tensor_parallel_size": 2}, {"data_parallel_size": 2}):
        check_tiers(from_flat({**options, "swap_space": 3}), found, 12 * GIB, gpu=False)
        with pytest.raises(MemoryFitError, match="host memory for KV"):
            check_tiers(from_flat({**options, "swap_space": 6}), found, 12 * GIB, gpu=False)
    together = from_flat({"tensor_parallel_size": 2, "kv_offloading_size": 11.5})
    with pytest.raises(MemoryFitError, match="--kv-offloading-size"):
        check_tiers(together, found, 12 * GIB, gpu=False)


def test_the_disk_is_in_the_ledger() -> None:
    config = from_flat({"kv_disk_path": "/d", "kv_disk_size": 2})
    assert tier_rows(config)[-1] == ("KV on disk, /d", "2.00 GiB")


def test_what_is_held_for_other_instances_is_in_the_ledger() -> None:
    found = plan(kv_cache_memory_bytes=GIB)
    exchange = {"kv_connector": "TCPConnector", "kv_role": "kv_producer", "kv_buffer_size": "3G"}
    config = from_flat({"kv_transfer_config": exchange, "tensor_parallel_size": 2})
    assert tier_rows(config) == [("KV on its way, at most", "6.00 GiB")]
    check_tiers(config, found, 12 * GIB, gpu=False)
    with pytest.raises(MemoryFitError, match=r"kv_buffer_size .* to \d+ or less") as caught:
        check_tiers(config, found, 7 * GIB, gpu=False)
    most = int(str(caught.value).partition(" to ")[2].split()[0])
    fits = from_flat({"kv_transfer_config": exchange | {"kv_buffer_size": most}})
    check_tiers(fits, found, 7 * GIB, gpu=False)
    consumer = exchange | {"kv_role": "kv_consumer"}
    consumer["kv_connector_extra_config"] = {"peers": ["p:1"]}
    assert tier_rows(from_flat({"kv_transfer_config": consumer})) == []

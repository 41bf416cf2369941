"""Attention by other projects' packages, none of which is here: they are stood in for by functions with
the parameters that their sources have (flash-attn-4 4.0.0b36, FlashAttention's hopper/ interface,
flashinfer-python 0.7.2), which refuse what those refuse and compute attention from what they are given.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from importlib import metadata as packages
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from quire.attention.base import AttentionMetadata, AttentionTask, KVCache, LayerCache
from quire.attention.paged import PagedAttention
from quire.attention.select import BACKENDS, create_attention
from quire.config.engine import RuntimeConfig
from quire.errors import ConfigError
from quire.kernels.base import KVCacheShapes
from quire.kernels.ops import AttentionLayer
from quire.kernels.select import create_kernels
from tests.kernels.cases import assert_close, generator, make_sequences, randn, starts

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 64, 16
SCALE = 0.2
TASK = AttentionTask(
    head_dim=DIM,
    dtype=torch.bfloat16,
    kv_dtype=torch.bfloat16,
    block_size=BLOCK,
    capability=(9, 0),
)


def attend(
    q: Tensor,
    pages: tuple[Tensor, Tensor],
    table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    left: int | None,
) -> Tensor:
    """pages: [num_pages, page_size, kv_heads, head_dim] each; left: keys seen before a query's own."""
    assert table.dtype == query_starts.dtype == lengths.dtype == torch.int32
    assert q.dtype == pages[0].dtype == pages[1].dtype and q.stride(-1) == pages[0].stride(-1) == 1
    assert table.shape[0] == lengths.shape[0] == query_starts.shape[0] - 1
    assert lengths.min() >= 1  # others' kernels read a block of each row, that of padding too
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    for b, length in enumerate(lengths.tolist()):
        rows = slice(*query_starts[b : b + 2].tolist())
        count = rows.stop - rows.start
        if not count or not length:
            continue
        used = table[b, : -(-length // pages[0].shape[1])].long()
        k, v = (page[used].flatten(0, 1)[:length].float() for page in pages)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance <= (length if left is None else left))
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
    cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None,
    v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None,
    sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    assert causal and max_seqlen_q >= (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()
    assert window_size == (-1, -1) or window_size[1] == 0
    left = None if window_size[0] < 0 else window_size[0]
    pages = (k_cache, v_cache)
    return attend(q, pages, page_table, cu_seqlens_q, cache_seqlens, softmax_scale, left)


def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
    mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
    scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    assert causal and cu_seqlens_k is None
    assert max_seqlen_q >= (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()
    # Of all steps; without it the splits are those for a sequence as long as the whole cache.
    assert max_seqlen_k == page_table.shape[1] * BLOCK >= seqused_k.max()
    assert window_size == (None, None) or (window_size[0] >= 0 and window_size[1] == 0)
    splits.append(num_splits)
    out = attend(q, (k, v), page_table, cu_seqlens_q, seqused_k, softmax_scale, window_size[0])
    return out, None


splits: list[int] = []


def check_flashinfer(query, kv_cache, workspace_buffer, block_tables, seq_lens, longest, layout):
    assert layout == "HND" and workspace_buffer.dtype == torch.uint8
    assert not workspace_buffer[: 8 << 20].any()
    assert query.is_contiguous() and block_tables.is_contiguous() and seq_lens.is_contiguous()
    assert longest >= block_tables.shape[1] * BLOCK  # also of later steps
    return tuple(cache.transpose(1, 2) for cache in kv_cache)


def trtllm_batch_decode_with_kv_cache(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale=1.0,
    bmm2_scale=1.0, window_left=-1, out=None, out_dtype=None, o_sf_scale=None, o_sf_vec_size=None,
    sinks=None, kv_layout="HND", enable_pdl=None, backend="auto", q_len_per_req=1, o_scale=1.0,
    mask=None, max_q_len=None, cum_seq_lens_q=None, skip_softmax_threshold_scale_factor=None,
    kv_cache_sf=None, uses_shared_paged_kv_idx=True, lse=None, return_lse=False,
    bmm1_scale_log2=None, multi_ctas_kv_counter_buffer=None, enable_block_sparse_attention=False,
    cp_world=1, cp_rank=0, causal_seqlens_kv_global=None, bf16q_fp8kv_transform_mode=None,
    request_order=None, request_order_plan=None,
):  # fmt: skip
    assert bmm2_scale == 1.0 and out.is_contiguous() and query.shape[0] == seq_lens.shape[0]
    pages = check_flashinfer(
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, kv_layout
    )
    each = torch.arange(query.shape[0] + 1).int()
    left = None if window_left < 0 else window_left
    return out.copy_(attend(query, pages, block_tables, each, seq_lens, bmm1_scale, left))


def trtllm_batch_context_with_kv_cache(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_q_len, max_kv_len, bmm1_scale,
    bmm2_scale, batch_size, cum_seq_lens_q, cum_seq_lens_kv, window_left=-1, out=None, out_dtype=None,
    o_sf_scale=None, o_sf_vec_size=None, kv_layout="HND", enable_pdl=None, sinks=None,
    kv_cache_sf=None, skip_softmax_threshold_scale_factor=None, uses_shared_paged_kv_idx=True,
    causal=True, lse=None, return_lse=False, multi_ctas_kv_counter_buffer=None,
    use_fp16_softmax=None, uses_spcompress=None, backend="trtllm-gen",
):  # fmt: skip
    assert causal and bmm2_scale == 1.0 and batch_size == seq_lens.shape[0]
    assert cum_seq_lens_kv.dtype == torch.int32 and cum_seq_lens_kv[0] == 0
    assert cum_seq_lens_kv.diff().tolist() == seq_lens.tolist()
    assert max_q_len >= cum_seq_lens_q.diff().max()
    pages = check_flashinfer(
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_kv_len, kv_layout
    )
    left = None if window_left < 0 else window_left
    attended = attend(query, pages, block_tables, cum_seq_lens_q, seq_lens, bmm1_scale, left)
    return out.copy_(attended)


MODULES = {
    "flash_attn_interface": [flash_attn_with_kvcache],
    "flash_attn": [],
    "flash_attn.cute": [flash_attn_varlen_func],
    "flashinfer": [],
    "flashinfer.decode": [trtllm_batch_decode_with_kv_cache],
    "flashinfer.prefill": [trtllm_batch_context_with_kv_cache],
}


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Of the packages, these and no other."""
    for module, functions in MODULES.items():
        stand_in = ModuleType(module)
        for function in functions:
            setattr(stand_in, function.__name__, function)
        present = module.split(".")[0] in names or module in names
        monkeypatch.setitem(sys.modules, module, stand_in if present else None)


class OwnKernels:
    """Stands for our Triton kernels."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[int | None] = []

    def paged_attention(self, q: Tensor, *args: object, max_query_len: int, **options: object):
        self.calls.append(max_query_len)
        return options["out"]


@dataclass(frozen=True)
class Step:
    q: Tensor
    cache: LayerCache
    metadata: AttentionMetadata
    expected: Tensor
    """Of the tokens that belong to a request."""


def make_step(queries: list[int], lengths: list[int], *, window: int | None, padding: int) -> Step:
    """Of as many new tokens and keys in all; padding: rows without request behind them, as recorded steps
    have them. Slots that nothing was written to hold NaN."""
    rng, kernels = generator(3), create_kernels("reference")
    s = make_sequences(
        kernels,
        lengths,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        block_size=BLOCK,
        dtype=TASK.dtype,
        rng=rng,
    )
    pages = len(s.k_cache)
    cache = LayerCache(
        *(torch.full((pages, KV_HEADS, BLOCK, DIM), torch.nan, dtype=TASK.dtype) for _ in "kv")
    )
    for b, length in enumerate(lengths):
        at = torch.arange(length)
        block, offset = s.block_table[b][at // BLOCK].long(), at % BLOCK
        cache.k[block, :, offset], cache.v[block, :, offset] = s.keys[b], s.values[b]
    tokens = sum(queries)
    qkv = randn(tokens + padding, HEADS + 2 * KV_HEADS, DIM, rng=rng, dtype=TASK.dtype)
    q = qkv[:, :HEADS]
    expected = kernels.paged_attention(
        q[:tokens], s.k_cache, s.v_cache, s.block_table, starts(queries), s.seq_lens,
        scale=SCALE, window=window or 0,
    )  # fmt: skip
    empty = torch.zeros(padding, dtype=torch.int32)
    metadata = AttentionMetadata(
        positions=torch.zeros(tokens + padding, dtype=torch.int64),  # nothing here reads these
        slot_mapping=torch.zeros(tokens + padding, dtype=torch.int64),
        query_start_loc=torch.cat((starts(queries), empty + tokens)),
        seq_lens=torch.cat((s.seq_lens, empty + 1)),
        block_table=torch.cat((s.block_table, empty[:, None].expand(-1, s.block_table.shape[1]))),
        max_query_len=max(queries),
    )
    return Step(q, cache, metadata, expected)


def make_layer(window: int | None) -> AttentionLayer:
    return AttentionLayer(
        part=0,
        group=0,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        cos_sin=torch.empty(1, 0),
        q_norm=None,
        k_norm=None,
        window=window or 0,
        scale=SCALE,
        softcap=0.0,
    )


CASES = [
    ("flash_attn", (9, 0), "flash_attn_interface"),
    ("FLASH_ATTN", (8, 6), "flash_attn_interface"),
    ("flash_attn", (9, 0), "flash_attn"),
    ("flash_attn", (10, 0), "flash_attn"),
    ("flashinfer", (10, 3), "flashinfer"),
    ("FLASHINFER", (9, 0), "flashinfer"),
    ("flashinfer", (12, 0), "flashinfer"),
]


@pytest.mark.parametrize("window", [None, 1, 21])
@pytest.mark.parametrize(("name", "capability", "package"), CASES)
def test_it_attends(
    name: str,
    capability: tuple[int, int],
    package: str,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoding, padded as a recording pads it, and then prompts, a resumed one and decoding mixed."""
    install(monkeypatch, package)
    kernels = OwnKernels()
    backend = create_attention(name, kernels, replace(TASK, capability=capability))  # type: ignore[arg-type]
    for queries, lengths, padding in (
        ([1, 1, 1], [37, 1, 16], 2),
        ([20, 1, 5], [20, 40, 33], 3),
    ):
        step = make_step(queries, lengths, window=window, padding=padding)
        given = torch.zeros(step.q.shape, dtype=step.q.dtype)
        out = backend.forward(
            step.q, layer=make_layer(window), cache=step.cache, metadata=step.metadata, out=given
        )
        # FlashAttention's own tensor is the result: to copy it is one more launch for each layer.
        assert (out is given) == (package == "flashinfer")
        if kernels.calls:  # FlashInfer has no function for it
            assert kernels.calls == [20] and package == "flashinfer" and capability[0] != 10
        else:
            assert_close(out[: sum(queries)], step.expected, ulps=2)
    assert bool(kernels.calls) == (package == "flashinfer" and capability[0] != 10)


def test_hopper_takes_the_third_and_splits_nothing_in_the_fourth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "flash_attn_interface", "flash_attn")
    step = make_step([1], [5], window=None, padding=0)
    seen = {}
    for capability in ((9, 0), (10, 0)):
        splits.clear()
        task = replace(TASK, capability=capability)
        backend = create_attention("flash_attn", OwnKernels(), task)  # type: ignore[arg-type]
        out = torch.zeros(step.q.shape, dtype=step.q.dtype)
        backend.forward(
            step.q, layer=make_layer(None), cache=step.cache, metadata=step.metadata, out=out
        )
        seen[type(backend).__name__] = list(splits)
    assert seen == {"FlashAttention3": [], "FlashAttention4": [0]}
    install(monkeypatch, "flash_attn")
    backend = create_attention("flash_attn", OwnKernels(), TASK)  # type: ignore[arg-type]
    backend.forward(
        step.q, layer=make_layer(None), cache=step.cache, metadata=step.metadata, out=out
    )
    assert splits == [0, 1]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("flash_attn", {"batch_invariant": True}, "leave out --batch-invariant"),
        ("flashinfer", {"batch_invariant": True}, "leave out --batch-invariant"),
        ("flash_attn", {"kv_dtype": torch.float8_e4m3fn}, "--kv-cache-dtype auto"),
        ("flashinfer", {"kv_dtype": torch.float8_e4m3fn}, "--kv-cache-dtype auto"),
        ("flash_attn", {"dtype": torch.float32, "kv_dtype": torch.float32}, "--dtype bfloat16"),
        ("flash_attn", {"head_dim": 260}, "FlashAttention-3 does not take head_dim 260"),
        (
            "flash_attn",
            {"head_dim": 192, "capability": (10, 0)},
            "head_dim 192, only 8,.*128, 256:",
        ),
        ("flashinfer", {"head_dim": 80}, "head_dim 80, only 64, 128, 256"),
        ("flashinfer", {"block_size": 128}, "--block-size 64"),
        ("flash_attn", {"capability": (7, 5)}, "capability 7, only 9, 10, 11"),
        ("flash_attn", {"capability": (12, 0)}, "FlashAttention-4 .* capability 12"),
        ("flashinfer", {"capability": (8, 0)}, "capability 8, only 9, 10, 12"),
    ],
)
def test_what_is_refused(
    name: str, change: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flash_attn_interface", "flash_attn", "flashinfer")
    with pytest.raises(ConfigError, match=says) as caught:
        create_attention(name, OwnKernels(), replace(TASK, **change))  # type: ignore[arg-type]
    assert "--attention-backend triton" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flash_attn", "FlashAttention-3 .* or FlashAttention-4 .*flash-attn-4"),
        ("flashinfer", "pip"),
    ],
)
def test_what_is_not_installed(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(ConfigError, match=says):
        create_attention(name, OwnKernels(), TASK)  # type: ignore[arg-type]


def test_auto_is_ours_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch)  # importing any would fail

    def version(package: str) -> str:
        if package != "flash-attn-4":
            raise packages.PackageNotFoundError(package)
        return "4.0.0"

    monkeypatch.setattr(packages, "version", version)
    kernels = create_kernels("reference")
    with caplog.at_level(logging.INFO, logger="quire.attention.select"):
        for name in ("auto", "TRITON_ATTN"):
            backend = create_attention(name, kernels, replace(TASK, batch_invariant=True))
            assert isinstance(backend, PagedAttention)
    auto, asked = (record.getMessage() for record in caplog.records)
    assert "also installed: flash-attn-4 4.0.0: --attention-backend flash_attn" in auto
    assert "as asked for" in asked


def test_the_flag_takes_every_name() -> None:
    assert RuntimeConfig.__dataclass_fields__["attention_backend"].metadata["choices"] == BACKENDS


def test_a_devices_cache_begins_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    shape = (3, 1, 16, 8)
    holder = SimpleNamespace(
        device=torch.device("cpu"),
        kv_cache_shapes=lambda **sizes: KVCacheShapes(k=shape, v=shape, zeroed=True),
    )
    cache = KVCache(
        num_parts=2, num_blocks=3, num_kv_heads=1, head_dim=8, block_size=16,
        dtype=torch.bfloat16, kernels=holder,  # type: ignore[arg-type]
    )  # fmt: skip
    assert not cache.storage.any()

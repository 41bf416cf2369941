"""The compiled library, loaded once a process, with the C signatures written out for ctypes."""

from __future__ import annotations

import ctypes
import functools
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)

import torch

from quire import dtypes
from quire.kernels.cpu.build import BuildError, build

DTYPES = {getattr(torch, name): dtypes.DTYPES[name].c_code for name in dtypes.FLOATS}
"""The numbers of enum dtype in vec.h."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""Those of enum activation in kernels.h."""


class LinearWeight(ctypes.Structure):
    """Mirrors linear_weight in kernels.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("panels", "bias")),
        *((name, c_int64) for name in ("n", "k")),
        *((name, c_int32) for name in ("dtype", "tiles")),
        *((name, c_void_p) for name in ("codes", "next")),
    ]


class LoraRows(ctypes.Structure):
    """Mirrors lora_rows in kernels.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("table", "rows", "starts", "adapters")),
        *((name, c_int64) for name in ("groups", "count")),
    ]


class CodeInfo(ctypes.Structure):
    """Mirrors code_info in kernels.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("scales", "offsets", "super_scales", "super_minima")),
        ("order", c_void_p),
        ("group", c_int64),
        *((name, c_int32) for name in ("bits", "scale_type", "super_groups", "offset_type")),
        *((name, c_int32) for name in ("zero", "float8", "activation_bits", "has_values")),
        ("values", c_uint8 * 16),
    ]


class RoundJob(ctypes.Structure):
    """Mirrors round_job in rounding.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("rows", "codes", "scales", "places")),
        *((name, c_int64) for name in ("count", "k", "group", "num_places")),
        *((name, c_int32) for name in ("dtype", "scale_dtype", "rounding")),
    ]


SCALE_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
OFFSET_TYPES = {"none": 0, "zero": 1, "minimum": 2}


class AttentionArgs(ctypes.Structure):
    """Mirrors attention_args in kernels.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k_cache", "v_cache", "block_table")),
        *((name, c_void_p) for name in ("query_start_loc", "seq_lens", "out")),
        *((name, c_int64) for name in ("q_stride", "out_stride", "table_stride")),
        *((name, c_int64) for name in ("requests", "tokens")),
        *((name, c_int64) for name in ("q_heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("block_size", "num_blocks", "window")),
        *((name, c_void_p) for name in ("k_scales", "v_scales")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int32) for name in ("dtype", "threads", "tiles")),
    ]


class QKVArgs(ctypes.Structure):
    """Mirrors qkv_args in kernels.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "positions", "slots", "cos_sin")),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "k_scales", "v_scales")),
        *((name, c_void_p) for name in ("k_cache", "v_cache")),
        *((name, c_int64) for name in ("qkv_stride", "tokens", "q_heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "half", "max_position")),
        *((name, c_int64) for name in ("block_size", "num_blocks")),
        ("eps", c_float),
        *((name, c_int32) for name in ("dtype", "norm_dtype", "threads")),
    ]


class SampleArgs(ctypes.Structure):
    """Mirrors sample_args in sampling.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("logits", "rows", "token_ids", "valid")),
        *((name, c_int64) for name in ("stride", "num_rows", "vocab")),
        ("threads", c_int32),
    ]


GroupExchange = CFUNCTYPE(c_int32, c_void_p, *[c_int64] * 5)
"""group_exchange in kernels.h."""
GROUP_RANKS, GROUP_MESSAGE = 64, 480


class GroupRank(ctypes.Structure):
    """Mirrors group_rank in kernels.h: 64 bytes."""

    _fields_ = [
        ("sequence", c_uint32),
        ("sleepers", c_uint32),
        ("pid", c_int32),
        ("_", c_uint8 * 52),
    ]


class GroupWords(ctypes.Structure):
    """Mirrors group_words in kernels.h: what lies before the shared data."""

    _fields_ = [
        ("failed", c_uint32),
        ("message", c_char * GROUP_MESSAGE),
        ("_", c_uint8 * (-(4 + GROUP_MESSAGE) % 64)),
        ("ranks", GroupRank * GROUP_RANKS),
    ]


class Group(ctypes.Structure):
    """Mirrors quire_group in kernels.h."""

    _fields_ = [
        ("words", POINTER(GroupWords)),
        ("data", c_void_p),
        ("bytes", c_int64),
        ("exchange", GroupExchange),
        ("timeout", c_double),
        *((name, c_int32) for name in ("rank", "size", "late", "dead")),
    ]


_P, _N, _I = c_void_p, c_int64, c_int32
_SIGNATURES = {
    "quire_vectors": [],
    "quire_ask_for_amx": [],
    "quire_check_vectors": [],
    "quire_check_tiles": [_I],
    "quire_rms_norm": [_P, _N, _N, _P, _P, _P, _N, _N, _N, c_float, _I, _I, _I],
    "quire_gated": [_P, _P, _N, _N, _N, _I, _I, _I],
    "quire_add": [_P, _P, _N, c_float, _I, _I],
    "quire_scale": [_P, _N, _P, _P, _N, c_float, _N, _N, _I, _I],
    "quire_finish_logits": [_P, _N, c_float, c_float, _I, _I],
    "quire_rope_write_kv": [POINTER(QKVArgs)],
    "quire_copy_blocks": [_P, _P, _N, _N, _N],
    "quire_philox_uniform": [c_uint64, c_uint64, _P, _N],
    "quire_sample": [POINTER(SampleArgs)],
    "quire_linear": [POINTER(LinearWeight), _P, _N, _P, _N, _N, _I, _I],
    "quire_adapted_linear": [POINTER(LinearWeight), _P, _N, _P, _N, _N, _I, _I, _P, _N],
    "quire_group_bytes": [_N, _N],
    "quire_group_rows": [_P, _P, _P, _N, _P, _P],
    "quire_adapt_embedding": [_P, _N, _P, _P, _N, _I, _I],
    "quire_pack_linear": [_P, _N, _N, _N, _N, _N, _P, _I],
    "quire_pack_codes": [POINTER(LinearWeight), _P, _N, _N, _N, _N, _N, _N],
    "quire_pack_fields": [POINTER(LinearWeight), _P, _N, _N, _P, _N, _N, _N, _N],
    "quire_round_rows": [POINTER(RoundJob)],
    "quire_unpack_codes": [_P, _N, _N, _P, _N, _I, _I],
    "quire_gather_rows": [POINTER(LinearWeight), _P, _N, _P, _I],
    "quire_group_open": [POINTER(Group), _I, _N, _N, _N],
    "quire_group_close": [POINTER(Group)],
    "quire_group_barrier": [POINTER(Group)],
    "quire_group_post": [POINTER(Group)],
    "quire_group_wait": [POINTER(Group), _I, c_uint32],
    "quire_group_abort": [POINTER(Group), c_char_p],
    "quire_group_gather": [POINTER(Group), _P, *[_N] * 5],
    "quire_run_program": [_P, _P],
    "quire_draft": [_P],
    "quire_lookup": [_P],
    "quire_lookup_add": [_P, _P, _N, _N, _N],
    "quire_paged_attention": [POINTER(AttentionArgs)],
}


def load_library(march: str = "native") -> ctypes.CDLL:
    """Raises `BuildError`, every time, without compiling a second time."""
    loaded = _load_once(march)
    if isinstance(loaded, str):
        raise BuildError(loaded)
    return loaded


@functools.cache
def _load_once(march: str) -> ctypes.CDLL | str:
    """The library, or the error's text, cached: a model asks once a layer, and a failing compiler is slow."""
    try:
        path = build(march)
    except BuildError as error:
        return str(error)
    try:
        library = ctypes.CDLL(str(path))
        for name, argtypes in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = argtypes
            function.restype = c_int32
    except (OSError, AttributeError) as error:
        return f"{path} does not load: {error}"
    if library.quire_check_vectors():
        return f"{path} computes wrong products on this machine"
    return library

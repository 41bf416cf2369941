"""A whole forward pass in one C call, for decoders whose every matrix is packed for C.

Between two kernels of a layered forward pass lie a dozen Python calls and a checked tensor each: 190 us a
layer, more than a 4 M parameter model needs for all its arithmetic. Here Python fills in one
struct a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import Array, byref, c_double, c_float, c_int32, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from quire.kernels import checks
from quire.kernels.cpu.library import DTYPES, LinearWeight, load_library
from quire.kernels.decoder import DecoderWeights, LayerWeights, StepRows


class _Layer(ctypes.Structure):
    """Mirrors decoder_layer in decoder.c."""

    _fields_ = [
        *((name, LinearWeight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("k_cache", "v_cache")),
        ("window", c_int64),
    ]


class _Model(ctypes.Structure):
    """Mirrors decoder_model in decoder.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("layers", "embedding", "final_norm")),
        ("head", LinearWeight),
        ("cos_sin", c_void_p),
        *((name, c_int64) for name in ("num_layers", "hidden", "inner", "q_heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "half", "max_position", "block_size")),
        *((name, c_int64) for name in ("num_blocks", "widest_window")),
        *((name, c_float) for name in ("eps", "scale")),
        ("dtype", c_int32),
    ]


class _Step(ctypes.Structure):
    """Mirrors decoder_step in decoder.c."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("token_ids", "block_ids", "rows", "logits", "hidden", "seconds")
        ),
        *((name, c_int64) for name in ("num_seats", "max_tokens", "max_blocks", "requests")),
        ("num_wanted", c_int64),
        ("threads", c_int32),
    ]


PHASES = (
    *("embed", "norm", "qkv", "rope_write", "attention"),
    *("o", "gate_up", "silu_mul", "down", "head"),
)

_ERRORS = {
    1: "a token id is outside the vocabulary",
    2: "a position is outside the rotary table",
    3: "a slot is past the cache",
    4: "a block id is outside the cache",
    5: "a row has tokens that its seat has no room for, or wants more results than it has tokens",
    6: "a seat is outside the batch, or the results wanted are not as many as said",
}


class NativeDecoder:
    """The pass over one model and one cache. Holds their tensors, so that addresses stay good."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Raises `KernelArgumentError` if a tensor is not what the C code would read."""
        _check(weights)
        self._lib = load_library()
        self._weights = weights
        self._seconds: Array[c_double] | None = None
        layers = weights.layers
        geometry = checks.check_caches(layers[0].k_cache, layers[0].v_cache)
        self._layers = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        self._vocab_size = weights.head.out_features
        self._step = _Step()
        self._rows: StepRows | None = None
        self._num_wanted = 0
        self._buffer = self._logits = torch.empty(0, self._vocab_size)
        windows = [layer.window for layer in layers]
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            embedding=None if weights.embedding is None else weights.embedding.data_ptr(),
            final_norm=weights.final_norm.data_ptr(),
            head=weights.head.c_weight,
            cos_sin=weights.cos_sin.data_ptr(),
            num_layers=len(layers),
            hidden=weights.head.in_features,
            inner=layers[0].down.in_features,
            q_heads=layers[0].o.in_features // geometry.head_dim,
            kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            half=weights.cos_sin.shape[1] // 2,
            max_position=weights.cos_sin.shape[0],
            block_size=geometry.block_size,
            num_blocks=geometry.num_blocks,
            widest_window=0 if 0 in windows else max(windows),
            eps=weights.eps,
            scale=weights.scale,
            dtype=DTYPES[weights.head.dtype],
        )

    def profile(self) -> Mapping[str, float]:
        """Seconds spent in each phase since the first call of this method, which turns the clock on."""
        if self._seconds is None:
            self._seconds = (c_double * len(PHASES))()
            self._step.seconds = ctypes.addressof(self._seconds)
        return dict(zip(PHASES, self._seconds, strict=True))

    def forward(self, rows: StepRows) -> Tensor:
        if rows.num_wanted != self._num_wanted:
            self._make_logits(rows)
        self._run(rows)
        return self._logits

    def hidden(self, rows: StepRows) -> Tensor:
        head = self._weights.head
        out = torch.empty(rows.num_wanted, head.in_features, dtype=head.dtype)
        self._step.hidden = out.data_ptr() if rows.num_wanted else None
        try:
            self._run(rows)
        finally:
            self._step.hidden = None
        return out

    def _run(self, rows: StepRows) -> None:
        if rows is not self._rows:
            self._adopt(rows)
        if not 0 <= rows.num_rows <= len(rows.rows):
            raise checks.KernelArgumentError(f"{rows.num_rows} rows of {len(rows.rows)}")
        step = self._step
        step.requests, step.num_wanted = rows.num_rows, rows.num_wanted
        step.threads = torch.get_num_threads()
        if code := self._lib.quire_decoder_forward(byref(self._model), byref(step)):
            if code not in _ERRORS:
                raise MemoryError(f"no memory for the activations of {rows.num_rows} rows")
            raise checks.KernelArgumentError(_ERRORS[code])

    def _adopt(self, rows: StepRows) -> None:
        """Check the arrays, and keep their addresses for all steps that come with them."""
        self._rows = None
        for name, array, dtype in (
            ("token_ids", rows.token_ids, np.int64),
            ("block_ids", rows.block_ids, np.int32),
            ("rows", rows.rows, np.int64),
        ):
            if array.dtype != dtype or array.ndim != 2 or not array.flags.c_contiguous:
                raise checks.KernelArgumentError(
                    f"{name} is {array.dtype} {array.shape} with strides {array.strides}; "
                    f"need contiguous {np.dtype(dtype)} in two dimensions"
                )
            setattr(self._step, name, array.ctypes.data)
        checks.require(rows.rows.shape[1] == 4, f"rows is {rows.rows.shape}; need four columns")
        checks.require(len(rows.token_ids) == len(rows.block_ids), "seats differ in number")
        self._step.num_seats, self._step.max_tokens = rows.token_ids.shape
        self._step.max_blocks = rows.block_ids.shape[1]
        self._rows = rows

    def _make_logits(self, rows: StepRows) -> None:
        """The buffer is kept: fresh memory costs a page fault every 4 KiB."""
        count = rows.num_wanted
        checks.require(count >= 0, f"{count} logits are wanted")
        if count > len(self._buffer):
            self._buffer = torch.empty(count, self._vocab_size)
            self._step.logits = self._buffer.data_ptr()
        self._num_wanted, self._logits = count, self._buffer[:count]


def _layer(layer: LayerWeights) -> _Layer:
    return _Layer(
        qkv=layer.qkv.c_weight,
        o=layer.o.c_weight,
        gate_up=layer.gate_up.c_weight,
        down=layer.down.c_weight,
        input_norm=layer.input_norm.data_ptr(),
        post_norm=layer.post_norm.data_ptr(),
        q_norm=None if layer.q_norm is None else layer.q_norm.data_ptr(),
        k_norm=None if layer.k_norm is None else layer.k_norm.data_ptr(),
        k_cache=layer.k_cache.data_ptr(),
        v_cache=layer.v_cache.data_ptr(),
        window=layer.window,
    )


def _check(weights: DecoderWeights) -> None:
    """Every tensor has the shape that the others give it."""
    head, dtype = weights.head, weights.head.dtype
    hidden = (head.in_features,)
    first = weights.layers[0]
    geometry = checks.check_caches(first.k_cache, first.v_cache)
    head_dim, inner, q_size = (geometry.head_dim,), first.down.in_features, first.o.in_features
    qkv_size = q_size + 2 * geometry.num_kv_heads * geometry.head_dim
    checks.require(q_size % geometry.head_dim == 0, f"o takes {q_size}, no number of heads")
    checks.check_dense("final_norm", weights.final_norm, dtype, hidden)
    if weights.embedding is not None:
        shape = (head.out_features, head.in_features)
        checks.check_dense("embedding", weights.embedding, dtype, shape)
    cos_sin = weights.cos_sin
    checks.check_dense("cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], cos_sin.shape[1]))
    for layer in weights.layers:
        checks.require(
            checks.check_caches(layer.k_cache, layer.v_cache) == geometry
            and layer.k_cache.dtype is dtype,
            "the layers' caches differ",
        )
        checks.check_dense("input_norm", layer.input_norm, dtype, hidden)
        checks.check_dense("post_norm", layer.post_norm, dtype, hidden)
        for name, norm in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
            if norm is not None:
                checks.check_dense(name, norm, dtype, head_dim)
        for name, linear, shape in (
            ("qkv", layer.qkv, (qkv_size, head.in_features)),
            ("o", layer.o, (head.in_features, q_size)),
            ("gate_up", layer.gate_up, (2 * inner, head.in_features)),
            ("down", layer.down, (head.in_features, inner)),
        ):
            found = (linear.out_features, linear.in_features)
            checks.require(
                found == shape and linear.dtype is dtype,
                f"{name} is {linear.dtype} {found}; need {dtype} {shape}",
            )

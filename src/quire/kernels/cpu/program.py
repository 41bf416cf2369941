"""A recorded forward pass in one C call, for models whose every product is in a form that C multiplies with.

With kernels called from Python, there are a dozen Python calls and checks of tensors between two kernels:
190 us a layer, more than the whole arithmetic of a model with 4 M parameters. Here Python fills one
struct per step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Array, byref, c_double, c_float, c_int32, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from quire.kernels import checks
from quire.kernels.checks import require
from quire.kernels.cpu.group import FAILED, LATE, CGroup, c_group
from quire.kernels.cpu.library import ACTIVATIONS, DTYPES, load_library
from quire.kernels.cpu.linear import CProduct
from quire.kernels.cpu.lora import HostAdapters
from quire.kernels.cpu.tiles import choose_tiles
from quire.kernels.group import Group
from quire.kernels.ops import AttentionLayer, NormWeight
from quire.kernels.program import CachePart, Code, Op, Program, StepRows


class _Op(ctypes.Structure):
    """Mirrors program_op in program.c."""

    _fields_ = [
        *((name, c_int32) for name in ("code", "flag", "source", "target")),
        *((name, c_int64) for name in ("first", "width", "at")),
        ("argument", c_void_p),
        *((name, c_float) for name in ("factor", "softcap")),
        ("site", c_int64),
    ]


class _Layer(ctypes.Structure):
    """Mirrors attention_layer in program.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("k_cache", "v_cache", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("k_scales", "v_scales", "cos_sin")),
        *((name, c_int64) for name in ("q_heads", "kv_heads", "head_dim", "half", "window")),
        ("group", c_int64),
        *((name, c_float) for name in ("scale", "softcap", "eps")),
        ("norm_dtype", c_int32),
    ]


class _Program(ctypes.Structure):
    """Mirrors program in program.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("ops", "offsets", "widths")),
        *((name, c_int64) for name in ("num_ops", "num_hidden_ops", "num_cache_ops")),
        *((name, c_int64) for name in ("bytes_per_token", "hidden")),
        ("windows", c_void_p),
        *((name, c_int64) for name in ("num_groups", "vocab", "max_position")),
        *((name, c_int64) for name in ("block_size", "num_blocks")),
        *((name, c_int64) for name in ("q_heads", "kv_heads", "head_dim", "tap_width")),
        *((name, c_void_p) for name in ("group", "shared", "starts")),
        ("shared_bytes_per_token", c_int64),
        *((name, c_int32) for name in ("dtype", "tiles")),
    ]


class _Step(ctypes.Structure):
    """Mirrors program_step in program.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("token_ids", "block_ids", "rows")),
        *((name, c_void_p) for name in ("logits", "hidden", "tapped", "received", "seconds")),
        *((name, c_int64) for name in ("num_seats", "max_tokens", "max_blocks", "requests")),
        ("num_wanted", c_int64),
        *((name, c_void_p) for name in ("adapters", "table")),
        ("threads", c_int32),
    ]


_ERRORS = {
    1: "a token id is outside the vocabulary",
    2: "a position is outside the rotary table",
    3: "a slot is past the cache",
    4: "a block id is outside the cache",
    5: "a row has tokens that its seat has no room for, or wants more results than it has tokens",
    6: "a seat is outside the batch, or the results wanted are not as many as said",
    8: "an adapter is not in the table",
    9: "the memory that all ranks share is too small for the step",
}


class NativeProgram:
    """A program for one model's weights and one cache. Keeps their tensors, so that the addresses stay
    valid."""

    def __init__(
        self, program: Program, caches: Sequence[CachePart], group: Group | None = None
    ) -> None:
        """caches: each part of a block. group: of the ranks, if this is one's part. Raises
        `KernelArgumentError` if a tensor is not what the C code would read."""
        self._lib = load_library()
        self._program = program
        self._caches = tuple(caches)
        self._kept: list[object] = []
        """Structs whose addresses are in the operations."""
        self._seconds: Array[c_double] | None = None
        layers = [op.argument for op in program.ops if isinstance(op.argument, AttentionLayer)]
        geometry = self._check_layers(layers)
        widths = {b.number: b.width for op in program.ops for b in (op.source, op.target) if b}
        numbers = range(len(program.offsets))
        self._vocab_size, self._max_position = program.vocab_size, layers[0].cos_sin.shape[0]
        self._group = None if group is None else c_group(group)
        self._common: tuple[int, int] | None = None
        """Where the logits are in the memory that all ranks share, and how many rows."""
        self._ops = (_Op * len(program.ops))(*map(self._op, program.ops))
        self._step = _Step()
        self._rows: StepRows | None = None
        self._adapters: int | None = None
        """Address of the adapter of each seat."""
        self._num_wanted = 0
        self._buffer = self._logits = torch.empty(0, self._vocab_size)
        self._taps = self.tapped = torch.empty(0, program.tap_width, dtype=program.dtype)
        self.received = torch.empty(0, program.hidden.width, dtype=program.dtype)
        self._receives = any(op.code is Code.RECEIVE for op in program.ops)
        windows = [0] * (1 + max(layer.group for layer in layers))
        for index in range(len(windows)):
            found = [layer.window for layer in layers if layer.group == index]
            windows[index] = 0 if 0 in found else max(found, default=1)
        self._struct = _Program(
            ops=ctypes.addressof(self._ops),
            offsets=self._keep((c_int64 * len(numbers))(*program.offsets)),
            widths=self._keep((c_int64 * len(numbers))(*(widths.get(n, 0) for n in numbers))),
            num_ops=len(program.ops),
            num_hidden_ops=program.num_hidden_ops,
            num_cache_ops=program.num_cache_ops,
            bytes_per_token=program.bytes_per_token,
            hidden=program.hidden.number,
            windows=self._keep((c_int64 * len(windows))(*windows)),
            num_groups=len(windows),
            vocab=self._vocab_size,
            max_position=self._max_position,
            block_size=geometry.block_size,
            num_blocks=geometry.num_blocks,
            q_heads=layers[0].num_heads,
            kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            tap_width=program.tap_width,
            group=self._group and ctypes.addressof(self._group.native),
            shared=self._keep((c_int32 * len(numbers))(*map(program.shared.__contains__, numbers))),
            starts=self._keep((c_int64 * len(program.starts))(*program.starts)),
            shared_bytes_per_token=program.shared_bytes_per_token,
            dtype=DTYPES[program.dtype],
            tiles=choose_tiles().tiles,
        )

    def profile(self) -> Mapping[str, float]:
        """Seconds spent in operations of each label since the first call of this method, which turns the
        clock on."""
        ops = self._program.ops
        if self._seconds is None:
            self._seconds = (c_double * len(ops))()
            self._step.seconds = ctypes.addressof(self._seconds)
        seconds: dict[str, float] = {}
        for op, spent in zip(ops, self._seconds, strict=True):
            seconds[op.label] = seconds.get(op.label, 0.0) + spent
        return seconds

    def forward(self, rows: StepRows) -> Tensor:
        if self._group is not None and self._group.native.data:
            self._find_logits(self._group, rows)
        elif rows.num_wanted != self._num_wanted:
            self._make_logits(rows)
        self._run(rows)
        return self._logits

    def hidden(self, rows: StepRows) -> Tensor:
        out = torch.empty(rows.num_wanted, self._program.hidden.width, dtype=self._program.dtype)
        self._step.hidden = out.data_ptr() if rows.num_wanted else None
        try:
            self._run(rows)
        finally:
            self._step.hidden = None
        return out

    def _run(self, rows: StepRows) -> None:
        self.prepare(rows)
        self.check(self._lib.quire_run_program(byref(self._struct), byref(self._step)), rows)

    @property
    def addresses(self) -> tuple[int, int]:
        """Of program and program_step."""
        return ctypes.addressof(self._struct), ctypes.addressof(self._step)

    def prepare(self, rows: StepRows) -> None:
        """Make the step that of these rows."""
        if rows is not self._rows:
            self._adopt(rows)
        if not 0 <= rows.num_rows <= len(rows.rows):
            raise checks.KernelArgumentError(f"{rows.num_rows} rows of {len(rows.rows)}")
        step = self._step
        step.requests, step.num_wanted = rows.num_rows, rows.num_wanted
        step.threads = torch.get_num_threads()
        step.adapters = self._adapters if rows.has_adapters else None
        if self._program.tap_width or self._receives:
            count = int(rows.rows[: rows.num_rows, 2].sum())
            self._make_taps(count)
            if self._receives:
                shape = (count, self._program.hidden.width)
                checks.check_dense("received", self.received, self._program.dtype, shape)
                step.received = self.received.data_ptr()

    def check(self, code: int, rows: StepRows) -> None:
        """Raises the error of a C call's result."""
        if not code:
            return
        if self._group is not None and code in (FAILED, LATE):
            self._group.fail(code)
        if code not in _ERRORS:
            raise MemoryError(f"no memory for the activations of {rows.num_rows} rows")
        raise checks.KernelArgumentError(_ERRORS[code])

    def _adopt(self, rows: StepRows) -> None:
        """Check the arrays, and keep their addresses for all steps that use them."""
        self._rows = None
        for name, array, dtype, dims in (
            ("token_ids", rows.token_ids, np.int64, 2),
            ("block_ids", rows.block_ids, np.int32, 3),
            ("rows", rows.rows, np.int64, 2),
        ):
            if array.dtype != dtype or array.ndim != dims or not array.flags.c_contiguous:
                raise checks.KernelArgumentError(
                    f"{name} is {array.dtype} {array.shape} with strides {array.strides}; "
                    f"need contiguous {np.dtype(dtype)} in {dims} dimensions"
                )
            setattr(self._step, name, array.ctypes.data)
        require(rows.rows.shape[1] == 4, f"rows is {rows.rows.shape}; need four columns")
        groups, seats, self._step.max_blocks = rows.block_ids.shape
        require(len(rows.token_ids) == seats, "seats differ in number")
        # A stage of a pipeline may have no layer of the last groups.
        require(groups >= self._struct.num_groups, f"block tables of {groups} groups")
        self._step.num_seats, self._step.max_tokens = rows.token_ids.shape
        self._adapters = None
        if (adapters := rows.adapters) is not None:
            require(
                adapters.dtype == np.int32 and adapters.shape == (seats,),
                "an adapter for each seat",
            )
            require(
                isinstance(rows.adapter_set, HostAdapters)
                and rows.adapter_set.products == tuple(self._program.products),
                "the adapters are of another model",
            )
            assert isinstance(rows.adapter_set, HostAdapters)
            self._adapters, self._step.table = adapters.ctypes.data, rows.adapter_set.address
        self._rows = rows

    def _make_logits(self, rows: StepRows) -> None:
        """The buffer is reused, because new memory costs a page fault every 4 KiB."""
        count = rows.num_wanted
        require(count >= 0, f"{count} logits are wanted")
        if count > len(self._buffer):
            self._buffer = torch.empty(count, self._vocab_size)
            self._step.logits = self._buffer.data_ptr()
        self._num_wanted, self._logits = count, self._buffer[:count]

    def _find_logits(self, group: CGroup, rows: StepRows) -> None:
        """They are behind the buffers, in the memory that all ranks share: see take_memory in program.c."""
        tokens, count = int(rows.rows[: rows.num_rows, 2].sum()), rows.num_wanted
        first = -(-tokens * self._program.shared_bytes_per_token // 64) * 64
        if self._common == (first, count):
            return
        size = count * self._vocab_size
        if first + 4 * size > group.native.bytes:
            raise checks.KernelArgumentError(_ERRORS[9])
        self._common, self._logits = (first, count), self._buffer[:0]
        if count:
            area = (c_float * size).from_address(group.native.data + first)
            self._logits = torch.frombuffer(area, dtype=torch.float32).view(count, -1)

    def _make_taps(self, count: int) -> None:
        if count > len(self._taps):
            self._taps = torch.empty(count, self._program.tap_width, dtype=self._program.dtype)
            self._step.tapped = self._taps.data_ptr()
        self.tapped = self._taps[: max(count, 0)]

    # --- from operations to structs -------------------------------------------------------------------

    def _op(self, op: Op) -> _Op:
        struct = _Op(
            code=op.code,
            source=op.source.number if op.source else -1,
            target=op.target.number if op.target else -1,
            first=op.first,
            width=op.width,
            at=op.at,
            factor=op.factor,
            softcap=op.softcap,
            site=op.site,
        )
        argument = op.argument
        if isinstance(argument, CProduct):
            require(argument.dtype is self._program.dtype, f"{op.label} is {argument.dtype}")
            struct.argument = self._keep(argument.c_weight)
            struct.flag = int(op.code is Code.EMBED)  # of a product's rows
        elif isinstance(argument, NormWeight):
            struct.argument = argument.weight.data_ptr()
            struct.factor, struct.flag = argument.eps, DTYPES[argument.weight.dtype]
        elif isinstance(argument, AttentionLayer):
            struct.argument = self._keep(self._layer(argument))
        elif isinstance(argument, Tensor):
            if op.code is Code.EMBED:
                width = op.width or (op.target.width if op.target else 0)
                shape = (argument.shape[0] if op.width else self._vocab_size, width)
                checks.check_dense(op.label, argument, self._program.dtype, shape)
            else:
                checks.check_dense(op.label, argument, torch.float32, (self._max_position,))
            struct.argument = argument.data_ptr()
        if op.code is Code.COPY:
            struct.flag = int(op.site == len(self._program.products))  # the embedding's
        if op.code is Code.GATED:
            struct.flag = ACTIVATIONS[op.activation]
        return struct

    def _layer(self, layer: AttentionLayer) -> _Layer:
        cache = self._caches[layer.part]
        k_scales, v_scales = cache.scales or (None, None)
        return _Layer(
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
            k_scales=None if k_scales is None else k_scales.data_ptr(),
            v_scales=None if v_scales is None else v_scales.data_ptr(),
            q_norm=None if layer.q_norm is None else layer.q_norm.weight.data_ptr(),
            k_norm=None if layer.k_norm is None else layer.k_norm.weight.data_ptr(),
            cos_sin=layer.cos_sin.data_ptr(),
            q_heads=layer.num_heads,
            kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            half=layer.cos_sin.shape[1] // 2,
            window=layer.window,
            group=layer.group,
            scale=layer.scale,
            softcap=layer.softcap,
            eps=layer.norm_eps,
            norm_dtype=DTYPES[layer.q_norm.weight.dtype] if layer.q_norm is not None else 0,
        )

    def _keep(self, struct: ctypes.Structure | Array[c_int64] | Array[c_int32]) -> int:
        self._kept.append(struct)
        return ctypes.addressof(struct)

    def _check_layers(self, layers: Sequence[AttentionLayer]) -> checks.CacheGeometry:
        """All layers' caches have one geometry, and their other tensors the shapes that follow from it."""
        geometry = checks.check_caches(self._caches[0].k, self._caches[0].v)
        for layer in layers:
            cache = self._caches[layer.part]
            require(checks.check_caches(cache.k, cache.v) == geometry, "the layers' caches differ")
            checks.check_scales(cache.k, self._program.dtype, cache.scales)
            heads = (layer.num_kv_heads, layer.head_dim)
            require(heads == (geometry.num_kv_heads, geometry.head_dim), f"a cache for {heads}")
            rows, columns = layer.cos_sin.shape
            require(rows == layers[0].cos_sin.shape[0], "the rotary tables differ in length")
            require(columns % 2 == 0 and columns <= layer.head_dim, f"a rotary table of {columns}")
            checks.check_dense("cos_sin", layer.cos_sin, torch.float32, (rows, columns))
        return geometry


def can_run(program: Program) -> bool:
    """Whether C can compute every product."""
    products = (Code.LINEAR, Code.LINEAR_ADD, Code.LOGITS)
    return all(isinstance(op.argument, CProduct) for op in program.ops if op.code in products)

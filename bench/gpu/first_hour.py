"""The first run on a device: what two reviews by reading left open, in ten minutes. What has only been
compiled and interpreted is run here, in an order in which what is found first explains what fails after it.

Every step has a remedy: what to do when it fails. Nothing is timed whose result was not compared first.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench.gpu import check, engines, profile
from bench.gpu.lab import (
    BF16,
    DEVICE,
    FP8,
    SIZES,
    Batch,
    Cache,
    Sizes,
    copies,
    error,
    int32,
    matrices,
    randn,
    rate,
    seconds,
    spec_of,
)
from bench.gpu.roofline import Ceilings, measured
from bench.gpu.suite import Case, Entry, Options, Values
from tests.models.published import QWEN3_06B

from quire.decoding import Decoding
from quire.engine.core import EngineCore
from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import Scales, dequantize, empty_scales
from quire.kernels.reference import ReferenceKernels
from quire.kernels.sampling import sample_row
from quire.kernels.triton import attention, tuning
from quire.kernels.triton.backend import TritonKernels
from quire.kernels.triton.matmul import NARROW, half_tile, matmul
from quire.kernels.triton.sampling import SampleWorkspace, sample
from quire.kernels.triton.seats import as_words
from quire.kernels.triton.tuning import Key, Tile, architecture
from quire.messages import AddRequest
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec

KERNEL = """Run it alone (--only NAME) with CUDA_LAUNCH_BLOCKING=1, then under compute-sanitizer; \
tests/triton/interpreted has the same case with values to compare."""
GRAPHS = """Serve with --enforce-eager until it is mended; look at runner/device.py: record, forget, pools."""
WAITS = """"waits" names the line of each call that waits for the device, by the kind of request: move it \
behind `wait`, or send what it reads with the step."""
TWO = """If "alone" is false, the two differ from the start: look at seeds and captures. If only "after" is, \
closing one freed what the other's graphs contain: CudaDevice's streams and pools (runner/device.py)."""
ENGINE = """If the steps of kernels are right, look at the runner: --no-async-scheduling and \
--enforce-eager tell overlap from graphs."""
TUNING = "The figures stand, with the default tile; leave the candidate out of tuning.TABLE."


def cases(options: Options, entries: Sequence[Entry]) -> list[Case]:
    small, sizes, ceilings = options.sizes == "smoke", SIZES[options.sizes], measured(entries)
    big, little = options.models[-1], options.models[0]
    spec, tiny = spec_of(big, options.sizes), spec_of(little, options.sizes)
    kernels = [
        *(
            (f"attention {name} {'fp8' if of is FP8 else 'bf16'} blocks of {size}",
             partial(check.attention, each, of, size, small=small))
            for name, each, of, size in (
                (little, tiny, BF16, 16), (big, spec, BF16, 64), (big, spec, FP8, 64),
            )
        ),
        ("the last split merges", partial(merges, spec, small=small)),
        ("layers", partial(check.layer_kernels, spec)),
        ("sampling", partial(check.sampling, spec, rows=5 if small else 64)),
        ("codes", partial(codes, small=small)),
        ("adapters", partial(adapters, small=small)),
        ("products of --batch-invariant", partial(invariant_products, spec, small=small)),
    ]  # fmt: skip
    served = {
        "served": "served", "quantized": "quantized", "speculative": "speculative",
        "adapter": "adapter", "two ranks": "ranks",
    }  # fmt: skip
    timed: list[tuple[str, Callable[[], Values], float]] = [
        ("decode attention, tiles", partial(decode_tiles, spec, sizes, ceilings), 60),
        ("decode attention, long", partial(decode_long, spec, sizes, ceilings), 40),
        ("fp8 against bf16", partial(fp8, spec, sizes, ceilings), 30),
        ("prefill attention, tiles", partial(prefill_tiles, spec, sizes, ceilings), 40),
        ("top-p of a head and a tail", partial(top_p, spec, sizes, ceilings), 30),
        ("narrow products", partial(narrow, spec, sizes, ceilings), 30),
    ]
    return [
        *(Case(f"kernels: {name}", work, 30, KERNEL) for name, work in kernels),
        Case("engine: tokens in float32", partial(check.tokens, "float32", small=small), 60, ENGINE),
        Case("engine: graphs", partial(check.graphs, small=small), 60, GRAPHS),
        Case("engine: no waits", partial(no_waits, tiny, small=small), 40, WAITS),
        Case("engine: two in one process", partial(two_engines, small=small), 60, TWO),
        Case("engine: sleep and wake", partial(sleeps, small=small), 60, GRAPHS),
        *(Case(f"engine: {name}", partial(_served, of, small=small), 60, ENGINE)
          for name, of in served.items()),
        Case("engine: a full memory", partial(full_memory, tiny, small=small), 60,
             "Raise STEP_MARGIN in runner/gpu.py, or record fewer graphs."),
        Case("memcheck", partial(memcheck, small=small), 60,
             "The report names kernel and address; a mask in that kernel is wrong."),
        *(Case(f"time: {name}", work, limit, TUNING) for name, work, limit in timed),
        *(Case(f"profile: {little} {rows} requests", partial(
            profile.steps, tiny, sizes.long, rows, eager=False), 60,
            "Read the log; nsys profile python -m bench.gpu profile shows the same in a timeline.")
          for rows in (sizes.batches[0], sizes.batches[-1])),
    ]  # fmt: skip


# --- kernels ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def using(choice: Tile | None, regime: str = "decode") -> Iterator[None]:
    """Attention's tile in this regime. None: the default."""
    default = attention.tile
    if choice is not None:
        attention.tile = lambda key: choice if key.regime == regime else default(key)
    try:
        yield
    finally:
        attention.tile = default


def default_tile(spec: ModelSpec, regime: Any, dtype: torch.dtype = BF16, block: int = 16) -> Tile:
    heads = spec.heads
    group = heads.num_heads // heads.num_kv_heads
    return tuning.tile(Key(architecture(), heads.head_dim, group, block, dtype, regime))


@torch.inference_mode()
def merges(spec: ModelSpec, *, small: bool) -> Values:
    """Many steps whose splits are merged by whichever program ends last, against those of a kernel for it: a
    part that is read too early would differ."""
    same: dict[str, bool] = {}
    tile = default_tile(spec, "decode")
    if small:
        tile = replace(tile, split=64)
    shapes = (
        [(1, 70), (3, 300)] if small else [(1, 500), (1, 33_000), (8, 4000), (64, 1100), (250, 700)]
    )
    for requests, keys in shapes:
        cache = Cache.create(spec, requests * (keys + 16))
        batch = Batch.create(spec, cache, [(1, keys)] * requests)
        with using(replace(tile, fused=False)):
            apart = batch.attend()().clone()
        with using(replace(tile, fused=True)):
            call = batch.attend()
            found = [torch.equal(call(), apart) for _ in range(1 if small else 200)]
        same[f"{requests} x {keys}"] = all(found)
    return check.verdict({}, same)


FORMS = {
    "int4": CodeFormat(bits=4, group=128, scale="bfloat16", offset="zero"),
    "int8": CodeFormat(bits=8, zero=128),
    "fp8": CodeFormat(bits=8, group=128, float8=True),
}


@torch.inference_mode()
def codes(*, small: bool) -> Values:
    """Products over codes, dequantized in the kernel (few rows) and before it (many), against float64."""
    n, k = (70, 256) if small else (4096, 4096)
    kernels, errors, same = TritonKernels(DEVICE), {}, {}
    for name, form in FORMS.items():
        drawn = torch.Generator().manual_seed(1)
        matrix = torch.randint(1 << form.bits, (n, k), generator=drawn).to(torch.uint8)
        if form.float8:
            matrix[matrix & 127 == 127] = 3  # no NaN
        like = empty_scales(form, n, k)
        scale = torch.rand(like.scale.shape, generator=drawn) * 0.02 + 0.001
        zeros = (
            None if like.offset is None else torch.randint(16, like.offset.shape).to(torch.uint8)
        )
        scales = Scales(scale.to(like.scale.dtype), zeros)
        product = kernels.codes(form, in_features=k, out_features=n, dtype=BF16, bias=False)
        product.fill_codes(0, 0, matrix)
        product.fill_scales(0, scales)
        weight = dequantize(form, matrix, scales).to(DEVICE, BF16).double()
        for rows in (1, 7, 300):
            x = randn(rows, k)
            errors[f"{name} {rows}"] = error(product(x), x.double() @ weight.T)
        same[name] = torch.equal(product(x[:7])[3:4], product(x[3:4]))
    return check.verdict(errors, same)


@torch.inference_mode()
def adapters(*, small: bool) -> Values:
    """SGMV, for rows of several adapters and of none, against float64."""
    from quire.kernels.lora import MatrixDelta

    n, k, r, rows = (64, 64, 8, 9) if small else (4096, 4096, 16, 70)
    kernels = TritonKernels(DEVICE)
    product = kernels.linear(in_features=k, out_features=n, dtype=BF16, bias=False)
    product.fill(0, randn(n, k) / math.sqrt(k))
    held = kernels.adapters(
        [product, product], dtype=BF16, capacity=2, max_rank=r, parts=[(n,), (1,), (1,)]
    )
    given = [(randn(r, k).cpu() / math.sqrt(k), randn(n, r).cpu()) for _ in range(2)]
    for index, (a, b) in enumerate(given):
        held.put(index, held.pack({0: [MatrixDelta(0, a, b, 0.5, None)]}))
    x, chosen = randn(rows, k), int32([i % 3 - 1 for i in range(rows)])
    got, base = held.rows(chosen).linear(0, product, x), product(x)
    expected = base.double()
    for index, (a, b) in enumerate(given):
        mine = chosen == index
        a, b = a.to(DEVICE).double(), b.to(DEVICE).double()
        expected[mine] += 0.5 * (x[mine].double() @ a.T @ b.T)
    without = chosen == -1
    alone = held.rows(chosen[1:2]).linear(0, product, x[1:2])
    same = {
        "without": torch.equal(got[without], base[without]),
        "alone": torch.equal(alone, got[1:2]),
    }
    return check.verdict({"adapters": error(got, expected)}, same)


@torch.inference_mode()
def invariant_products(spec: ModelSpec, *, small: bool) -> Values:
    """Errors; whether a row's bits depend on the rows before it; whether a narrow tile has the same bits,
    which would let small steps use more multiprocessors."""
    shapes = {"o": matrices(spec)["o"]} if small else matrices(spec)
    errors, uneven, cublas = check._products(shapes, (2, 65) if small else check.ROWS)
    narrow_bits = {}
    for name, (n, k) in shapes.items():
        weight, x = randn(n, k), randn(70, k)
        narrow_bits[name] = torch.equal(matmul(x, weight), matmul(x, weight, tile=NARROW))
    found = check.verdict(errors, {"products": not any(uneven.values())})
    return found | {"uneven": uneven, "uneven_cublas": cublas, "narrow_has_the_bits": narrow_bits}


def memcheck(*, small: bool) -> Values:
    """Attention of every head size, eagerly, under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and DEVICE.type == "cuda":
        return {"skipped": "compute-sanitizer is not installed"}
    command = [sys.executable, "-m", "bench.gpu.first_hour"]
    if tool is not None and DEVICE.type == "cuda":
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=55 * (10 if small else 1), check=False
    )
    said = (done.stdout + done.stderr).strip().splitlines()
    return {"ok": done.returncode == 0, "exit": done.returncode, "said": said[-12:]}


@torch.inference_mode()
def _every_head_size() -> None:
    for head_dim in (64, 128, 256):
        config = {**QWEN3_06B, "head_dim": head_dim, "num_attention_heads": 4}
        spec = resolve_spec({**config, "num_key_value_heads": 2, "num_hidden_layers": 1})
        for dtype in (BF16, FP8):
            cache = Cache.create(spec, 4 * (300 + 16), dtype=dtype)
            batch = Batch.create(spec, cache, [(9, 9), (1, 1), (1, 300), (0, 0)])
            for invariant in (False, True):
                batch.attend(invariant=invariant)()
            print(head_dim, dtype, flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# --- the engine -------------------------------------------------------------------------------------


def _served(name: str, *, small: bool) -> Values:
    from bench.gpu import served  # needs what a bare machine may not have

    found: Values = getattr(served, name)(small=small)
    return found


def _limits(small: bool) -> engines.Limits:
    return engines.Limits(seqs=4, tokens=64 if small else 256, length=320, cached=4096)


def _record_all(core: EngineCore, small: bool) -> int:
    """How many steps were captured."""
    count = 0
    while core.prepare() and not (small and count > 2):
        count += 1
    return count


def _tokens(core: EngineCore, spec: ModelSpec, small: bool) -> dict[int, list[int]]:
    lengths = [(9, 4), (30, 4)] if small else [(9, 24), (100, 24), (300, 16)]
    return engines.drive(core, engines.requests(spec, lengths, seed=1)).tokens


def sleeps(*, small: bool) -> Values:
    """The same tokens before and after each level of sleep, with every graph recorded anew."""
    found: Values = {}
    with tempfile.TemporaryDirectory() as folder:
        spec = check._checkpoint(folder, small=small)
        core = engines.build(spec, _limits(small), folder=Path(folder), dtype=torch.float32)
        recorded = [_record_all(core, small)]
        before = _tokens(core, spec, small)
        for level in (1, 2):
            core.executor.sleep(level)
            core.scheduler.reset_prefix_cache()
            if DEVICE.type == "cuda":
                found[f"held_mib_asleep_{level}"] = torch.cuda.memory_reserved() / 2**20
            core.executor.wake_up()
            recorded.append(_record_all(core, small))
            found[f"same_{level}"] = _tokens(core, spec, small) == before
    same = found["same_1"] and found["same_2"]
    return {"ok": same and len(set(recorded)) == 1, "recorded": recorded, **found}


def two_engines(*, small: bool) -> Values:
    """Two with graphs; one is closed; the other's tokens stay the same."""
    with tempfile.TemporaryDirectory() as folder:
        spec = check._checkpoint(folder, small=small)
        first, second = (
            engines.build(spec, _limits(small), folder=Path(folder), dtype=torch.float32)
            for _ in range(2)
        )
        for core in (first, second):
            _record_all(core, small)
        before = [_tokens(core, spec, small) for core in (first, second)]
        first.executor.close()
        del first
        check_after = _tokens(second, spec, small)
    found = {"alone": before[0] == before[1], "after": check_after == before[1]}
    return {"ok": all(found.values()), **found}


def full_memory(spec: ModelSpec, *, small: bool) -> Values:
    """A cache that takes all but 3 % of the memory; every graph; then the largest step."""
    limits = engines.Limits(
        seqs=4 if small else 256, tokens=64 if small else 8192, length=128 if small else 9216,
        cached=512 if small else 10**9,
    )  # fmt: skip
    share, engines.CACHE_SHARE = engines.CACHE_SHARE, 0.97
    try:
        core = engines.build(spec, limits)
    finally:
        engines.CACHE_SHARE = share
    recorded = _record_all(core, small)
    free = torch.cuda.mem_get_info()[0] / 2**20 if DEVICE.type == "cuda" else math.nan
    driven = engines.drive(core, engines.requests(spec, [(limits.tokens, 2)], seed=3))
    done = [len(tokens) for tokens in driven.tokens.values()]
    return {"ok": done == [2], "recorded": recorded, "free_mib_before_the_largest_step": free}


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "filters": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    "biases": {"logit_bias": {5: 3.0}},
    "allowed": {"allowed_token_ids": [3, 4, 5]},
    "logprobs": {"logprobs": 5, "logprob_token_ids": [7]},
    "all logprobs": {"logprobs": -1},
}


def no_waits(spec: ModelSpec, *, small: bool) -> Values:
    """Launching a step never waits for the device, whatever its requests ask for. Each kind runs once
    before it is watched: what compiles or captures may wait."""
    spec = replace(spec, layers=spec.layers[:2])
    core = engines.build(spec, _limits(small))
    _record_all(core, small)
    backend = core.executor.runner.backend  # type: ignore[attr-defined]
    backend.graphs._may_record = False
    launch, watched = backend.launch, {}
    for number, (name, fields) in enumerate(KINDS.items()):
        backend.launch = launch
        engines.drive(core, [_of_kind(spec, 2 * number, fields)])
        backend.launch = watched[name] = Watched(launch)
        engines.drive(core, [_of_kind(spec, 2 * number + 1, fields)])
    waits = {name: each.waits for name, each in watched.items() if each.waits}
    steps = min(each.steps for each in watched.values())
    return {"ok": steps > 0 and not waits, "waits": waits, "steps_of_each": steps}


@dataclass(slots=True)
class Watched:
    """`launch`, with a list of the calls in it that PyTorch reports to wait for the device."""

    launch: Callable[..., Any]
    steps: int = 0
    waits: list[str] = field(default_factory=list)

    def __call__(self, *arguments: Any) -> Any:
        self.steps += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with _reporting_waits():
                result = self.launch(*arguments)
        said = [f"{Path(each.filename).name}:{each.lineno}: {each.message}" for each in caught]
        self.waits += [line[:300] for line in said if "synchroniz" in line]
        return result


@contextlib.contextmanager
def _reporting_waits() -> Iterator[None]:
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _of_kind(spec: ModelSpec, number: int, fields: dict[str, Any]) -> AddRequest:
    return AddRequest(
        request_id=100 + number,
        prompt_token_ids=random.Random(number).choices(range(spec.vocab_size), k=20),
        decoding=Decoding(max_tokens=4, seed=number // 2, **fields),
    )


# --- times ------------------------------------------------------------------------------------------


def _named(choice: Tile | None) -> str:
    if choice is None:
        return "default"
    own = f"{choice.block_m}x{choice.block_n} w{choice.warps} s{choice.stages}"
    own += f" split {choice.split}/{choice.per_level}"
    return own + (" fused" if choice.fused else " apart") + (" tma" if choice.tma else "")


def _timed(
    steps: Sequence[Batch],
    moved: float,
    flops: float,
    ceilings: Ceilings,
    choice: Tile | None,
    regime: str,
) -> Values:
    """Compared with attention written out first. A tile that cannot be launched has its error instead. The
    error is that of one request; what others have is compared by the steps before."""
    try:
        with using(choice, regime):
            batch, count = steps[0], steps[0].queries[0]
            last = min(count, 256)  # of a prompt the last ones: scores in float64 take memory
            out = batch.attend()()[:count][-last:]
            wrong = error(out, batch.part(0, count - last, count).expected(0))
            if wrong > check.LIMITS["fp8" if batch.cache.k.dtype is FP8 else "bf16"]:
                return {"error": wrong, "right": False}
            took = seconds([step.attend() for step in steps])
    except Exception as failure:
        return {"why": f"{type(failure).__name__}: {failure}"[:200], "right": False}
    return rate(took, ceilings, moved=moved, flops=flops) | {"error": wrong}


def _decode(
    spec: ModelSpec, ceilings: Ceilings, requests: int, keys: int, choice: Tile | None,
    dtype: torch.dtype = BF16,
) -> Values:  # fmt: skip
    moved = 2 * requests * keys * spec.heads.kv_size * dtype.itemsize
    sets = copies(moved)
    cache = Cache.create(spec, sets * requests * (keys + 64), block_size=64, dtype=dtype)
    steps = [Batch.create(spec, cache, [(1, keys)] * requests) for _ in range(sets)]
    return _timed(steps, moved, 0.0, ceilings, choice, "decode")


def _judged(found: Values) -> Values:
    """The default tile must be right; a candidate that is not is left out."""
    defaults = [values for label, values in found.items() if label.endswith("default")]
    return {"ok": all(values.get("right", True) for values in defaults), "of": found}


@torch.inference_mode()
def decode_tiles(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """The default and the candidates, at one request and at many."""
    found: Values = {}
    for requests, keys in ((1, sizes.long), (1, sizes.longer), (sizes.batches[-2], sizes.long)):
        for choice in (None, *tuning.CANDIDATES["decode"]):
            label = f"{requests} x {keys} {_named(choice)}"
            found[label] = _decode(spec, ceilings, requests, keys, choice)
    return _judged(found)


@torch.inference_mode()
def decode_long(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """One request at 4 to 32 times the usual context, by how its keys are cut: with many splits
    multiprocessors get like numbers of keys, and merging costs more."""
    found: Values = {}
    for keys in (4 * sizes.long, 32 * sizes.long) if sizes.long > 100 else (sizes.long,):
        for choice in (None, *tuning.CANDIDATES["decode"][:3]):
            found[f"1 x {keys} {_named(choice)}"] = _decode(spec, ceilings, 1, keys, choice)
    return _judged(found)


@torch.inference_mode()
def fp8(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """Half the bytes: how much less time."""
    found: Values = {}
    for requests in sizes.batches[-2:]:
        both = [_decode(spec, ceilings, requests, sizes.long, None, of) for of in (BF16, FP8)]
        for name, values in zip(("bf16", "fp8"), both, strict=True):
            found[f"{requests} {name} default"] = values
        if all("us" in values for values in both):
            found[f"{requests} faster"] = {"over_bf16": both[0]["us"] / both[1]["us"]}
    return _judged(found)


@torch.inference_mode()
def prefill_tiles(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    found: Values = {}
    tokens = sizes.longer
    cache = Cache.create(spec, 2 * tokens, block_size=64)
    steps = [Batch.create(spec, cache, [(tokens, tokens)])]
    flops = 2.0 * spec.heads.q_size * tokens**2
    for choice in (None, *tuning.CANDIDATES["prefill"]):
        found[f"{tokens} {_named(choice)}"] = _timed(steps, 0.0, flops, ceilings, choice, "prefill")
    return _judged(found)


@torch.inference_mode()
def top_p(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """Of logits with a head and a long tail, as models have them: the time, and how many groups it lists."""
    found: Values = {}
    vocab = spec.vocab_size
    for rows in sizes.batches[:3]:
        ranks_of = torch.stack([torch.randperm(vocab, device=DEVICE) + 1 for _ in range(rows)])
        logits = (-1.5 * ranks_of.float().log() + 0.1 * randn(rows, vocab).float()).to(BF16)
        for name, fields in (("top-p", {}), ("top-k and top-p", {"top_k": 50})):
            records = np.stack([
                sample_row(Decoding(temperature=1.0, top_p=0.95, seed=i, **fields))  # type: ignore[arg-type]
                for i in range(rows)
            ])  # fmt: skip
            space = SampleWorkspace.create(rows, vocab, DEVICE)
            space.listed.fill_(-1)
            table = torch.from_numpy(as_words(records)).to(DEVICE)
            seats, positions = (
                int32(range(rows)),
                torch.zeros(rows, dtype=torch.int64, device=DEVICE),
            )
            call = partial(sample, logits, table, seats, positions, space)
            drawn = call().token_ids.cpu().numpy()
            listed = int((space.listed >= 0).sum(1).max())
            records["position"] = 0
            expected = ReferenceKernels().sample(logits.float().cpu(), records).token_ids
            agree = int((drawn == expected).sum())
            values: Values = {
                "listed": listed,
                "agree": agree,
                "rows": rows,
                "right": agree >= rows - 1,
            }
            if values["right"]:
                values |= rate(seconds([call]), ceilings, moved=2 * rows * vocab)
            found[f"{name} {rows} default"] = values
    return _judged(found)


@torch.inference_mode()
def narrow(spec: ModelSpec, sizes: Sizes, ceilings: Ceilings) -> Values:
    """Products of --batch-invariant at few rows, with 128 and with 32 columns a program."""
    found: Values = {}
    for name, (n, k) in matrices(spec).items():
        if name == "head":
            continue
        for rows in sizes.batches[:2]:
            x, weights = randn(rows, k), [randn(n, k) for _ in range(copies(2 * n * k))]
            exact = x.double() @ weights[0].double().T
            for label, tile in (("default", half_tile(architecture())), ("narrow", NARROW)):
                wrong = error(matmul(x, weights[0], tile=tile), exact)
                values: Values = {"error": wrong, "right": wrong <= check.LIMITS["bf16"]}
                if values["right"]:
                    calls = [partial(matmul, x, weight, tile=tile) for weight in weights]
                    values |= rate(seconds(calls), ceilings, moved=2 * n * k)
                found[f"{name} {rows} {label}"] = values
            cublas = seconds([partial(F.linear, x, weight) for weight in weights])
            found[f"{name} {rows} cuBLAS"] = rate(cublas, ceilings, moved=2 * n * k)
    return _judged(found)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    _every_head_size()

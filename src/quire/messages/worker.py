"""Executor <-> the worker of a rank that does not sample. Encoded once for all ranks."""

from __future__ import annotations

import msgspec

from quire.messages.core import AddAdapter, DropAdapter, Failure, Shutdown, Sleep, WakeUp
from quire.messages.step import StepPlan
from quire.messages.transfer import TransferResult

# --- executor -> worker -----------------------------------------------------------------------------


class LoadModel(msgspec.Struct, tag="load", kw_only=True, frozen=True):
    """The first message. Answered by `Loaded`."""

    config: bytes
    """`EngineConfig` as JSON."""
    max_model_len: int
    """As `WorkerSpec.max_model_len`."""
    cores: list[int] = []
    """The worker's share of the machine's processors; empty for all."""
    group: str = "shared_memory"
    """How the ranks of its stage exchange results, as in `create_group`, and where they meet."""
    address: str = ""


class OpenCache(msgspec.Struct, tag="open_cache", frozen=True):
    num_blocks: int
    max_model_len: int


class SampledTokens(msgspec.Struct, frozen=True, array_like=True):
    """What the sampling rank has made of an earlier plan."""

    step_id: int
    token_ids: list[list[int]]
    """For each of its rows that sample, as `SampledRow.token_ids`."""


class RunStep(msgspec.Struct, tag="step", frozen=True):
    """Carry out a plan, without sampling. Not answered."""

    plan: StepPlan
    """Its requests have no `Decoding` but what their prompts need."""
    sampled: list[SampledTokens] = []
    """Of plans before it, each once."""


class Prepare(msgspec.Struct, tag="prepare", frozen=True):
    """`Executor.prepare`, on all ranks at once. Not answered."""


class ReportTables(msgspec.Struct, tag="report_tables", frozen=True):
    """Answered by `Tables`."""

    known: dict[int, int]
    """By request, how many of its tokens are compared."""


WorkerInput = (
    LoadModel
    | OpenCache
    | RunStep
    | Prepare
    | ReportTables
    | Sleep
    | WakeUp
    | AddAdapter
    | DropAdapter
    | Shutdown
)

# --- worker -> executor -----------------------------------------------------------------------------


class Loaded(msgspec.Struct, tag="loaded", frozen=True):
    """The rank's `Footprint`, in bytes."""

    weight_bytes: int
    step_bytes: int
    total_memory: int
    available_memory: int


class Carried(msgspec.Struct, tag="carried", frozen=True):
    """An `OpenCache`, `Sleep` or `WakeUp` was carried out, or failed without ending the worker."""

    failure: Failure | None = None


class AdapterEnded(msgspec.Struct, tag="adapter", frozen=True):
    """An `AddAdapter` has ended. Sent when it is so."""

    key: str
    error: str | None = None


class LoadsEnded(msgspec.Struct, tag="loads", frozen=True):
    """Loads of plans are over at this rank. Sent when it is so."""

    results: list[TransferResult]


class Tables(msgspec.Struct, tag="tables", frozen=True):
    """A hash of these requests' tokens and block tables."""

    digest: bytes


class WorkerFailed(msgspec.Struct, tag="failed", frozen=True):
    """The worker cannot start or continue; it exits after sending this."""

    failure: Failure


WorkerOutput = Loaded | Carried | AdapterEnded | LoadsEnded | Tables | WorkerFailed

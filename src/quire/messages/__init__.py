"""The structs that cross a boundary: front end <-> engine core, and scheduler <-> executor.

All of it is data: no tensors, no callbacks, no shared objects, so each boundary may become a process
boundary. Encoded with msgspec's msgpack (typed on decoding, never pickle).
"""

from quire.messages.core import (
    AbortRequests,
    AddRequest,
    CoreFailed,
    CoreInput,
    CoreOutput,
    EngineReady,
    FinishReason,
    Ping,
    Pong,
    PromptLogprobs,
    RequestTimes,
    RequestUpdate,
    ResetPrefixCache,
    SchedulerStats,
    Shutdown,
    Sleep,
    SleepState,
    StepOutputs,
    TokenLogprobs,
    WaitReason,
    WakeUp,
    describe_ledger,
)
from quire.messages.step import (
    AdmittedRequest,
    PlannedRow,
    SampledRow,
    StepPlan,
    StepResult,
)

__all__ = [
    "AbortRequests",
    "AddRequest",
    "AdmittedRequest",
    "CoreFailed",
    "CoreInput",
    "CoreOutput",
    "EngineReady",
    "FinishReason",
    "Ping",
    "PlannedRow",
    "Pong",
    "PromptLogprobs",
    "RequestTimes",
    "RequestUpdate",
    "ResetPrefixCache",
    "SampledRow",
    "SchedulerStats",
    "Shutdown",
    "Sleep",
    "SleepState",
    "StepOutputs",
    "StepPlan",
    "StepResult",
    "TokenLogprobs",
    "WaitReason",
    "WakeUp",
    "describe_ledger",
]

"""The scheduler, in pure Python (never imports torch). Start reading at `scheduler.py`."""

from quire.scheduler.decisions import (
    Decision,
    DecisionKind,
    DecisionLog,
    Observer,
    Wait,
    WaitReason,
)
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policy import POLICIES, Policy
from quire.scheduler.queue import RequestQueue
from quire.scheduler.request import Request, RequestStatus
from quire.scheduler.scheduler import Scheduler

__all__ = [
    "POLICIES",
    "Decision",
    "DecisionKind",
    "DecisionLog",
    "Observer",
    "Policy",
    "Request",
    "RequestQueue",
    "RequestStatus",
    "Scheduler",
    "SchedulerLimits",
    "Wait",
    "WaitReason",
]

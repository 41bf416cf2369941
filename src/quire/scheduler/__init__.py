"""The scheduler, in pure Python (never imports torch). Start reading at `scheduler.py`."""

from quire.scheduler.policy import POLICIES, RequestQueue
from quire.scheduler.request import Request, RequestStatus
from quire.scheduler.scheduler import Scheduler, SchedulerLimits

__all__ = [
    "POLICIES",
    "Request",
    "RequestQueue",
    "RequestStatus",
    "Scheduler",
    "SchedulerLimits",
]

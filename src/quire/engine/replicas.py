"""Several engine cores as one, without I/O.

The front end speaks to "the core". With several, `Replicas` decides which of them gets a message, and makes
one message of what they answer. A request is computed by one replica, from its first message to its
last. A replica that is lost ends its own requests, each with one error; the others go on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from quire.engine.router import Router
from quire.errors import EngineDeadError
from quire.messages import (
    AbortRequests,
    AddRequest,
    Answer,
    Control,
    CoreFailed,
    CoreInput,
    CoreOutput,
    EngineReady,
    Failure,
    FinishReason,
    LoadStats,
    RequestUpdate,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    StepOutputs,
    WakeUp,
)

MAX_GROUPS = 65_536
"""Groups whose replica is remembered, the latest ones. A beam search asks for its group in every round."""


@dataclass(slots=True)
class _Call:
    """A control call that was sent to all."""

    waits_for: set[int]
    is_slow: bool
    answers: dict[int, Answer] = field(default_factory=dict)


class Replicas:
    """Numbered from 0. `route` says where a message goes, `take` what a replica's message means."""

    def __init__(
        self, ready: Sequence[EngineReady], *, caches_prefixes: bool = True, max_adapters: int = 1
    ) -> None:
        """ready: of each replica. max_adapters: that each has in memory."""
        self.alive = set(range(len(ready)))
        self.owners: dict[int, int] = {}
        """The replica of each live request."""
        self._count = len(ready)
        self._router: Router[int] = Router()
        for index, each in enumerate(ready):
            tokens = (each.num_blocks - 1) * each.block_size if caches_prefixes else 0
            self._router.add(index, cache_tokens=tokens, max_adapters=max_adapters)
        self._calls: dict[int, _Call] = {}
        self._groups: OrderedDict[int, int] = OrderedDict()

    # --- to the replicas --------------------------------------------------------------------------

    def route(
        self, message: CoreInput, *, slow: Collection[int] = ()
    ) -> list[tuple[int, CoreInput]]:
        """Who gets what. slow: replicas that new requests avoid if they can."""
        if isinstance(message, AddRequest):
            return [(self._place(message, slow), message)] if self.alive else []
        if isinstance(message, AbortRequests):
            ids: dict[int, list[int]] = {}
            for request_id in message.request_ids:
                if request_id in self.owners:
                    ids.setdefault(self.owners[request_id], []).append(request_id)
            return [(replica, AbortRequests(each)) for replica, each in ids.items()]
        if isinstance(message, Control):
            action = message.action
            self._calls[message.id] = _Call(set(self.alive), isinstance(action, Sleep | WakeUp))
            if isinstance(action, ResetPrefixCache | Sleep):
                self._router.forget()
        return [(replica, message) for replica in sorted(self.alive)]

    def _place(self, message: AddRequest, slow: Collection[int]) -> int:
        replica = None
        if message.fork_of is not None:
            replica = self.owners.get(message.fork_of)
        elif message.group is not None:
            replica = self._groups.get(message.group)
        if replica is None or replica not in self.alive:
            place = message.placement
            replica = self._router.choose(
                message.request_id,
                message.prompt_token_ids,
                salt=place.cache_salt,
                adapter=place.adapter,
                among=self.alive.difference(slow) or self.alive,
                reads_cache=message.decoding.reads_prefix_cache,
            )
        else:
            self._router.follow(message.request_id, replica)
        if message.group is not None:
            self._groups[message.group] = replica
            self._groups.move_to_end(message.group)
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        self.owners[message.request_id] = replica
        return replica

    def is_changing(self, replica: int) -> bool:
        """Whether it goes to sleep or wakes up, which may take long."""
        return any(call.is_slow and replica in call.waits_for for call in self._calls.values())

    # --- from the replicas ------------------------------------------------------------------------

    def take(self, replica: int, message: CoreOutput) -> CoreOutput | None:
        """The message of one replica, as if there were one core. None: nothing to say, or it was lost."""
        if replica not in self.alive:
            return None
        if isinstance(message, CoreFailed):
            return self.lose(replica, message.failure.message)
        if isinstance(message, Answer):
            return self._answer(replica, message)
        if isinstance(message, StepOutputs):
            message.replica = replica
            for update in message.updates:
                if update.finish_reason is not None:
                    self._end(update.request_id)
                elif update.prefix is not None:
                    self._router.computed(update.request_id)
            answers = (self._answer(replica, answer) for answer in message.answers)
            message.answers = [answer for answer in answers if answer is not None]
        return message

    def _end(self, request_id: int) -> None:
        self.owners.pop(request_id, None)
        self._router.end(request_id)

    def _answer(self, replica: int, answer: Answer) -> Answer | None:
        call = self._calls.get(answer.id)
        if call is None or replica not in call.waits_for:
            return None
        call.answers[replica] = answer
        call.waits_for.discard(replica)
        return self._merged(answer.id)

    def _merged(self, call_id: int) -> Answer | None:
        """The answer to a call that all have answered. They sleep if one does: a call for all of them, sent
        again, also reaches those that failed."""
        call = self._calls[call_id]
        if call.waits_for or not call.answers:
            return None
        del self._calls[call_id]
        failures = [
            Failure(f"Replica {replica}: {each.failure.message}", each.failure.kind)
            for replica, each in sorted(call.answers.items())
            if each.failure is not None
        ]
        level = max(each.sleep_level for each in call.answers.values())
        return Answer(call_id, level, failures[0] if failures else None)

    def lose(self, replica: int, reason: str) -> CoreOutput | None:
        """A replica has stopped, or is given up: its requests end. What it still sends is ignored."""
        if replica not in self.alive:
            return None
        self.alive.discard(replica)
        self._router.remove(replica)
        if not self.alive:
            return CoreFailed(
                Failure(f"All {self._count} replicas have stopped. {reason}", "EngineDeadError")
            )
        error = f"{EngineDeadError.REPLICA_LOST} {replica} has stopped. Send the request again. ({reason})"
        lost = [request_id for request_id, owner in self.owners.items() if owner == replica]
        for request_id in lost:
            self._end(request_id)
        answers = []
        for call_id, call in list(self._calls.items()):
            call.waits_for.discard(replica)
            answers.append(self._merged(call_id))
        return StepOutputs(
            updates=[
                RequestUpdate(request_id=each, finish_reason=FinishReason.ERROR, error=error)
                for each in lost
            ],
            stats=SchedulerStats(),
            answers=[answer for answer in answers if answer is not None],
            replica=replica,
        )


def merged_ready(ready: Sequence[EngineReady]) -> EngineReady:
    """What the replicas have together. A request must fit each of them."""
    first = ready[0]
    rows = [row for row in first.ledger if row[0] == "machine memory"]
    for index, each in enumerate(ready):
        parts = (f"{what} {amount}" for what, amount in each.ledger if (what, amount) not in rows)
        rows.append((f"replica {index}:", "; ".join(parts)))
    return msgspec.structs.replace(
        first,
        num_blocks=1 + sum(each.num_blocks - 1 for each in ready),
        max_model_len=min(each.max_model_len for each in ready),
        ledger=rows,
        weight_bytes=sum(each.weight_bytes for each in ready),
        kv_bytes=sum(each.kv_bytes for each in ready),
        load_seconds=max(each.load_seconds for each in ready),
        replicas=list(ready),
    )


def merged_stats(latest: dict[int, SchedulerStats], message: StepOutputs) -> SchedulerStats:
    """The state of all replicas: sums, the mean of shares, the union of adapters. latest: by replica, which
    gets that of `message`."""
    if message.stats is not None:
        latest[message.replica] = message.stats
    each = list(latest.values())
    if len(each) < 2:
        return each[0] if each else SchedulerStats()
    total = SchedulerStats()
    for name in total.__struct_fields__:
        values = [getattr(one, name) for one in each]
        if isinstance(values[0], int):
            setattr(total, name, sum(values))
    total.load = merged_load([one.load for one in each])
    for one in each:
        total.kv_usage += one.kv_usage / len(each)
        for reason, count in one.waiting_by_reason.items():
            total.waiting_by_reason[reason] = total.waiting_by_reason.get(reason, 0) + count
    total.running_adapters = sorted({name for one in each for name in one.running_adapters})
    total.waiting_adapters = sorted({name for one in each for name in one.waiting_adapters})
    return total


def merged_load(each: Sequence[LoadStats]) -> LoadStats:
    """Queues and rates add up. A new request goes to the replica that has least to do."""
    return LoadStats(
        queue_tokens=sum(one.queue_tokens for one in each),
        first_tokens=sum(one.first_tokens for one in each),
        uncached=sum(one.uncached for one in each) / len(each),
        free_seats=sum(one.free_seats for one in each),
        prompt_rate=sum(one.prompt_rate for one in each),
        end_rate=sum(one.end_rate for one in each),
        wait_seconds=min(one.wait_seconds for one in each),
        step_predicted=max(one.step_predicted for one in each),
        step_target=max(one.step_target for one in each),
    )

"""Several engine cores as one, without I/O.

The front end speaks to "the core". With several, `Replicas` decides which of them gets a message, and makes
one message of what they answer. A request is computed by one replica, from its first message to its
last. With a `Recovery`, the requests of a replica that is lost go on in others, or in the same one when it is
back; else each ends with one error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from quire.engine.recovery import Death, Recovery, Verdict
from quire.engine.router import Router
from quire.errors import EngineDeadError
from quire.messages import (
    AbortRequests,
    AddAdapter,
    AddRequest,
    Answer,
    Control,
    CoreFailed,
    CoreInput,
    CoreOutput,
    DropAdapter,
    EngineReady,
    Failure,
    FinishReason,
    Inspect,
    LoadStats,
    ReadRecord,
    RequestUpdate,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    StepOutputs,
    WakeUp,
)

Messages = list[tuple[int, CoreInput]]
"""Each with the replica that gets it, in the order in which to send them."""

NOBODYS_CALL = 0
"""Id of a call whose answer nobody waits for; those of callers begin at 1."""
MAX_GROUPS = 65_536
"""Groups whose replica is remembered, the latest ones. A beam search asks for its group in every round."""


LOOKS = (Inspect, ReadRecord)
"""Calls that only read. They are answered by the replicas that serve, and do not wait for the others."""


@dataclass(slots=True)
class _Call:
    """A control call for all."""

    control: Control
    waits_for: set[int]
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def changes_level(self) -> bool:
        return isinstance(self.control.action, Sleep | WakeUp)


class Replicas:
    """Numbered from 0. `route` says where a message goes, `take` what a replica's message means."""

    def __init__(
        self,
        ready: Sequence[EngineReady],
        *,
        caches_prefixes: bool = True,
        max_adapters: int = 1,
        recovery: Recovery | None = None,
    ) -> None:
        """ready: of each replica. max_adapters: that each has in memory. recovery: if requests outlive their
        replica."""
        self.alive: set[int] = set()
        self.returning: set[int] = set()
        """Those that are being started again."""
        self.owners: dict[int, int] = {}
        """The replica of each live request."""
        self._count = len(ready)
        self._router: Router[int] = Router()
        self._caches_prefixes, self._max_adapters = caches_prefixes, max_adapters
        for index, each in enumerate(ready):
            self._enter(index, each)
        self._recovery = recovery
        self._unproved: set[int] = set()
        """Requests that go on in another replica, which has not said more of them."""
        self._level = 0
        """Of sleep, of all."""
        self._adapters: dict[str, AddAdapter] = {}
        self._dropped: dict[str, AddAdapter] = {}
        """Versions that only requests name which have come before."""
        self._calls: dict[int, _Call] = {}
        self._groups: OrderedDict[int, int] = OrderedDict()

    # --- to the replicas --------------------------------------------------------------------------

    def _enter(self, replica: int, ready: EngineReady) -> None:
        self.alive.add(replica)
        tokens = (ready.num_blocks - 1) * ready.block_size if self._caches_prefixes else 0
        self._router.add(replica, cache_tokens=tokens, max_adapters=self._max_adapters)

    def route(self, message: CoreInput, *, slow: Collection[int] = ()) -> Messages:
        """Who gets what now. slow: replicas that new requests avoid if they can."""
        if isinstance(message, AddRequest):
            if self._recovery is not None:
                self._recovery.add(message)
                return self.release(slow=slow)
            return [(self._place(message, slow), message)] if self.alive else []
        if isinstance(message, AbortRequests):
            if self._recovery is not None:
                self._recovery.abort(message.request_ids)
            ids: dict[int, list[int]] = {}
            for request_id in message.request_ids:
                if request_id in self.owners:
                    ids.setdefault(self.owners[request_id], []).append(request_id)
            return [(replica, AbortRequests(each)) for replica, each in ids.items()]
        if isinstance(message, Control):
            action = message.action
            waits_for = self.alive | self.returning
            if isinstance(action, LOOKS):  # of those that can say something now
                waits_for = set(self.alive) or waits_for
            self._calls[message.id] = _Call(message, waits_for)
            if isinstance(action, ResetPrefixCache | Sleep):
                self._router.forget()
        elif isinstance(message, AddAdapter):
            self._adapters[message.key] = message
            self._dropped.pop(message.key, None)
        elif isinstance(message, DropAdapter):
            self._drop(message.key)
        return [(replica, message) for replica in sorted(self.alive)]

    def _drop(self, key: str) -> None:
        dropped = self._adapters.pop(key, None)
        if self._recovery is None or dropped is None:
            return
        self._dropped[key] = dropped
        in_use = filter(self._recovery.uses_adapter, self._dropped)
        self._dropped = {key: self._dropped[key] for key in in_use}

    def release(self, *, slow: Collection[int] = ()) -> Messages:
        """The requests that wait for a replica and may go to one now."""
        messages: Messages = []
        if self._recovery is None or not self.alive:
            return messages
        for request in self._recovery.sendable():
            replica = self._place(request, slow)
            if request.output_token_ids:
                self._unproved.add(request.request_id)
            adapter = self._dropped.get(request.placement.adapter or "")
            if adapter is None:
                messages.append((replica, request))
            else:  # a replica that came later has not heard of it, or forgets it
                messages += [(replica, adapter), (replica, request)]
                messages.append((replica, DropAdapter(adapter.key)))
        return messages

    def back(self, replica: int, ready: EngineReady) -> Messages:
        """It has been started again. It gets what the others know, and what it has not answered."""
        self.returning.discard(replica)
        self._enter(replica, ready)
        messages: list[CoreInput] = [*self._adapters.values()]
        if self._level:
            messages.append(Control(NOBODYS_CALL, Sleep(self._level)))
        for _, call in sorted(self._calls.items()):
            if replica in call.waits_for:
                messages.append(call.control)
        return [(replica, message) for message in messages] + self.release()

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
        return any(
            call.changes_level and replica in call.waits_for for call in self._calls.values()
        )

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
                if self._recovery is not None:
                    self._recovery.take(update)
                if update.finish_reason is not None:
                    self._end(update.request_id)
                elif update.prefix is not None or update.request_id in self._unproved:
                    self._unproved.discard(update.request_id)
                    self._router.computed(update.request_id)
            answers = (self._answer(replica, answer) for answer in message.answers)
            message.answers = [answer for answer in answers if answer is not None]
        return message

    def _end(self, request_id: int) -> None:
        self.owners.pop(request_id, None)
        self._unproved.discard(request_id)
        self._router.end(request_id)

    def _answer(self, replica: int, answer: Answer) -> Answer | None:
        call = self._calls.get(answer.id)
        if call is None or replica not in call.waits_for:
            return None
        for state in answer.states:
            state.replica = replica
        call.answers[replica] = answer
        call.waits_for.discard(replica)
        if isinstance(call.control.action, LOOKS):
            call.waits_for &= self.alive
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
        if call.changes_level:
            self._level = level
        records = [each for _, answer in sorted(call.answers.items()) for each in answer.records]
        states = [state for _, each in sorted(call.answers.items()) for state in each.states]
        return Answer(call_id, level, failures[0] if failures else None, records, states)

    def died(self, replica: int, death: Death) -> Verdict:
        """With a `Recovery`: a replica is dead, and may be started again. `release` has its requests; the
        verdict has the ends of those that are blamed."""
        assert self._recovery is not None
        lost = self._leave(replica)
        self.returning.add(replica)
        return self._recovery.died(lost, death)

    def without(self, replica: int) -> list[Answer]:
        """The answers to looks that waited for this one alone, which is dead."""
        answers = []
        for call_id, call in list(self._calls.items()):
            if isinstance(call.control.action, LOOKS) and call.answers:
                call.waits_for.discard(replica)
                answers.append(self._merged(call_id))
        return [answer for answer in answers if answer is not None]

    def lose(self, replica: int, reason: str) -> CoreOutput | None:
        """A replica has stopped, or is given up: its requests end. What it still sends is ignored."""
        if replica in self.returning:
            self.returning.discard(replica)
            lost = []
        elif replica in self.alive:
            lost = self._leave(replica)
        else:
            return None
        if not self.alive and not self.returning:
            if self._count > 1:
                reason = f"All {self._count} replicas have stopped. {reason}"
            return CoreFailed(Failure(reason, "EngineDeadError"))
        error = f"{EngineDeadError.REPLICA_LOST} {replica} has stopped. Send the request again. ({reason})"
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

    def _leave(self, replica: int) -> list[int]:
        """Returns its requests."""
        self.alive.discard(replica)
        self._router.remove(replica)
        lost = [request_id for request_id, owner in self.owners.items() if owner == replica]
        for request_id in lost:
            self._end(request_id)
        return lost


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

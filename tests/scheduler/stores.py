"""A store outside the KV cache, for the checking executor: the connector, and what carries out its plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from quire.messages import BlockName, KVSource, StepPlan, TierStats, Transfer, TransferResult
from tests.scheduler.fake_executor import CheckingExecutor

Slots = list[object]


class Store:
    """A connector and what it connects to: slots by name, also of other instances by ticket. Every block is
    worth saving."""

    def __init__(self, *, saves: str = "all") -> None:
        """saves: "all", or only what is "evicted", or "used"."""
        self.blocks: dict[BlockName, Slots] = {}
        self.saves = saves
        self.least_hits = 0
        self.seconds_each = 0.0
        self.peers: dict[str, dict[BlockName, Slots]] = {}
        """What they have, by ticket."""
        self.expected: Counter[str] = Counter()
        """Requests whose KV is to be kept elsewhere, by ticket."""
        self.num_tickets = 0
        self.refuses_tickets = False

    def lookup(
        self, names: Sequence[BlockName], source: KVSource | None = None, start: int = 0
    ) -> int:
        size = 0 if source is None else source.num_tokens
        for index, name in enumerate(names):
            if name not in self.blocks and (start + index + 1) * self.block_size > size:
                return index
        return len(names)

    block_size = 4

    def seconds(self, num_blocks: int, source: KVSource | None = None) -> float:
        return num_blocks * self.seconds_each

    def wants_evicted(self, name: BlockName) -> bool:
        return self.saves != "used" and name not in self.blocks

    def wants_reused(self, name: BlockName, hits: int) -> bool:
        return self.saves != "evicted" and hits >= self.least_hits and name not in self.blocks

    def expect(self, source: KVSource) -> None:
        self.expected[source.ticket] += 1

    def release(self, source: KVSource) -> None:
        self.expected[source.ticket] -= 1

    def hold(self, names: Sequence[BlockName], num_tokens: int) -> KVSource | None:
        if self.refuses_tickets:
            return None
        self.num_tickets += 1
        return source_of(str(self.num_tickets), num_tokens)

    def stats(self) -> dict[str, TierStats]:
        return {"ram": TierStats(blocks=len(self.blocks))}


def source_of(ticket: str, num_tokens: int) -> KVSource:
    return KVSource(engine_id="p", host="h", ports=(1,), ticket=ticket, num_tokens=num_tokens)


class StoreExecutor(CheckingExecutor):
    """Carries loads out some plans after the one that has them. Until then, and after a failure, what is in
    their blocks is of no use."""

    def __init__(self, *sizes: int, store: Store, late: int = 0, failing: bool = False, **options):
        super().__init__(*sizes, **options)
        self.store, self.late, self.failing = store, late, failing
        store.block_size = self.block_size
        self.under_way: list[tuple[int, Transfer]] = []
        self.may_be_late = False
        """Whether some loads that fail say that their time was over."""
        self.drops = 0
        """Of saved blocks, every so many is not stored."""
        self.num_loaded = self.num_saved = 0

    def save(self, plan: StepPlan) -> None:
        if plan.clears_stores:
            self.store.blocks.clear()
        for save in plan.saves:
            assert len(set(save.names)) == len(save.names) == len(save.block_ids)
            to = self.store.blocks
            if save.ticket is not None:
                to = self.store.peers.setdefault(save.ticket, {})
            for name, block_id in zip(save.names, save.block_ids, strict=True):
                slots = self.slots[self._slots(block_id)]
                self.check_saved(name, slots)
                self.num_saved += 1
                if not self.drops or self.num_saved % self.drops:
                    to[name] = slots

    def _slots(self, block_id: int) -> slice:
        return slice(block_id * self.block_size, (block_id + 1) * self.block_size)

    def check_saved(self, name: BlockName, slots: Slots) -> None:
        """It is one block's KV, and for one name always the same."""
        group, adapter, tokens = slots[-1]
        first = len(tokens) - self.block_size
        assert group == name[1] and first % self.block_size == 0
        for offset, slot in enumerate(slots):
            assert slot == (group, adapter, tokens[: first + offset + 1])
        assert self.store.blocks.get(name, slots) == slots

    def load(self, plan: StepPlan) -> list[TransferResult]:
        for transfer in plan.loads:
            assert transfer.timeout > 0
            for block_id in transfer.block_ids:
                self.slots[self._slots(block_id)] = [None] * self.block_size
            self.under_way.append((self.due(plan, transfer), transfer))
        done = [one for one in self.under_way if one[0] <= plan.step_id]
        if not plan.rows and not done:
            done = self.under_way[-1:]
        self.under_way = [one for one in self.under_way if one not in done]
        return [self.move(transfer) for _, transfer in done]

    def due(self, plan: StepPlan, transfer: Transfer) -> int:
        return plan.step_id + transfer.transfer_id * 7 % (self.late + 1)

    def move(self, transfer: Transfer) -> TransferResult:
        most, good, sources = len(transfer.names), 0, {"ram": 0, "peer": 0}
        if self.failing and transfer.transfer_id % 3 == 0:
            most //= 2
        ticket = "" if transfer.source is None else transfer.source.ticket
        peer = self.store.peers.get(ticket, {})
        for name, block_id in zip(transfer.names[:most], transfer.block_ids, strict=False):
            slots = self.store.blocks.get(name) or peer.get(name)
            if slots is None:
                break
            self.slots[self._slots(block_id)] = slots
            good += 1
            sources["ram" if name in self.store.blocks else "peer"] += 1
        self.num_loaded += good
        late = self.may_be_late and good < len(transfer.names) and transfer.transfer_id % 2 == 1
        return TransferResult(
            transfer_id=transfer.transfer_id, num_good=good, sources=sources, late=late
        )

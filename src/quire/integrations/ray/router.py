"""Which replica gets a request: Serve asks this class, in the ingress's process."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class PrefixRouter(RequestRouter):
    """Serve's router for `quire.integrations.ray`: the replica that computed the longest prefix of the prompt,
    unless it has much more work than another one.

    `_select_from_candidate_replicas` of the base class then skips a replica that has no room.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._chosen: dict[str, ReplicaID] = {}
        """Request -> its replica, from the choice to the end of the request."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        loads = self._loads(candidate_replicas)
        ordered = sorted(candidate_replicas, key=lambda replica: loads[replica.replica_id])
        if pending_request is not None and ordered:
            # Else Serve would ask again in a busy loop while all replicas are full.
            pending_request.routing_context.should_backoff = True
            self._note(pending_request, ordered[0].replica_id)
        return [[replica] for replica in ordered]

    def _note(self, request: PendingRequest, replica_id: ReplicaID) -> None:
        """Count the request now: others are chosen for before Serve has sent it."""
        id_ = request.metadata.internal_request_id
        if id_ not in self._chosen:
            request.future.add_done_callback(
                lambda future: self._chosen.pop(id_, None) if future.cancelled() else None
            )
        self._chosen[id_] = replica_id

    def _loads(self, replicas: list[RunningReplica]) -> dict[ReplicaID, int]:
        """Requests that each replica has: those of this process, or what it last reported if that is more."""
        loads = {replica.replica_id: 0 for replica in replicas}
        for replica_id in self._chosen.values():
            if replica_id in loads:
                loads[replica_id] += 1
        reported = self.replica_queue_len_cache
        return {id_: max(own, reported.get(id_) or 0) for id_, own in loads.items()}

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        self._chosen[pending_request.metadata.internal_request_id] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._chosen.pop(internal_request_id, None)

"""Which replica gets a request: Serve asks this class, in the ingress's process."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from quire.engine.router import Router
from quire.integrations.ray.prompt import prompt_words


class PrefixRouter(RequestRouter):
    """Serve's connection to the router that `quire serve -dp` uses: the replica that has computed the longest
    prefix of the prompt, unless another one has much less to do.

    Each ingress process has its own, which knows only the requests that it has sent.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._router: Router[ReplicaID] = Router()
        self._added: set[ReplicaID] = set()
        self._chosen: dict[str, ReplicaID] = {}
        """Request -> its replica, from the choice to the end of the request."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        now = {replica.replica_id: replica.replica_metadata for replica in replicas}
        for replica_id in self._added - now.keys():
            self._router.remove(replica_id)
        for replica_id in now.keys() - self._added:  # see `Replica.record_replica_metadata`
            self._router.add(replica_id, cache_tokens=int(now[replica_id].get("cache_tokens", 0)))
        self._added = set(now)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas with room, each alone, the best first. Serve tries them in this order, and asks again
        after a while if none takes the request."""
        free = self.select_available_replicas(candidate_replicas) or candidate_replicas
        by_id = {replica.replica_id: replica for replica in free}
        if pending_request is None or not by_id:
            return [list(by_id.values())]
        pending_request.routing_context.should_backoff = True
        id_ = pending_request.metadata.internal_request_id
        if id_ not in self._chosen:
            pending_request.future.add_done_callback(
                lambda future: self._end(id_) if future.cancelled() else None
            )
        chosen = self._chosen.get(id_)
        if chosen not in by_id:  # the first time, or it had no room
            self._router.end(id_)
            words, salt = prompt_words(pending_request.args[0]["body"])
            chosen = self._router.choose(id_, words, salt=salt, among=by_id)
            self._chosen[id_] = chosen
        others = sorted(by_id.keys() - {chosen}, key=self._router.load)
        return [[by_id[replica_id]] for replica_id in (chosen, *others)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        id_ = pending_request.metadata.internal_request_id
        if self._chosen.get(id_) != replica_id:
            self._router.end(id_)
            self._router.follow(id_, replica_id)
            self._chosen[id_] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._end(internal_request_id)

    def _end(self, request: str) -> None:
        self._chosen.pop(request, None)
        self._router.end(request)

"""What a waiting request finds of its tokens' KV: in the cache, or with a request that computes it now.

A request does not compute what one before it is about to compute. It waits, and finds it.
"""

from __future__ import annotations

from collections.abc import Mapping

from quire.kvcache import KVCacheManager, PrefixMatch
from quire.scheduler.decisions import Wait, WaitReason
from quire.scheduler.request import Request, RequestStatus


class Sharing:
    def __init__(self, kv: KVCacheManager, requests: Mapping[int, Request]) -> None:
        self._kv, self._requests = kv, requests

    def match(self, request: Request, leaders: list[Request], step_id: int) -> PrefixMatch | Wait:
        """The KV that others have computed for this request, or the reason to wait: they are about to
        compute more, or, after a preemption, a token is still pending. leaders: running requests with prompts
        that are not computed."""
        if request.num_pending_tokens:
            return Wait(WaitReason.TOKEN)
        leader = self._requests.get(request.fork_of) if request.fork_of is not None else None
        if leader is not None and leader.status is RequestStatus.RUNNING:
            # The last prompt token is computed again, so that each sibling samples for itself.
            shared = request.num_prompt_tokens - 1
            if request.most_cached is not None:
                shared = min(shared, request.most_cached)
            if request.num_output_tokens == 0 and shared > 0:
                if leader.num_computed_tokens < shared:
                    return Wait(WaitReason.FORK, leader.request_id)
                fork = self._kv.match_fork(leader.request_id, shared, step_id)
                if fork is not None:
                    return fork
        most = request.most_cached
        if most == 0:
            return self._kv.no_match()
        tokens = request.token_ids if most is None else request.token_ids[: most + 1]
        if self._kv.enable_prefix_caching:
            for leader in leaders:
                if self._computes_prefix_of(request, len(tokens), leader):
                    return Wait(WaitReason.PREFIX, leader.request_id)
        return self._kv.match_prefix(request.request_id, tokens, request.cache_key, step_id)

    def _computes_prefix_of(self, request: Request, most: int, leader: Request) -> bool:
        """Whether a running request before this one still has to compute a block with which both begin.
        Computing it twice would cost more than waiting."""
        if leader.sort_key > request.sort_key or leader.cache_key != request.cache_key:
            return False
        common = min(request.common_prefix(leader, self._kv.block_size), most)
        there = self._kv.num_shareable_tokens(leader.request_id)
        return common - there >= self._kv.block_size

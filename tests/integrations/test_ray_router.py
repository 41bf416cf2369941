"""The router between Serve and `quire.engine.router`: prompts, loads, and requests that end in any way."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from quire.integrations.ray.prompt import prompt_words

pytest.importorskip("ray.serve", reason="Ray is not installed (the extra `ray`)")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import PendingRequest

from quire.integrations.ray.router import PrefixRouter

DEPLOYMENT = DeploymentID(name="Quire", app_name="quire")


class Replica(SimpleNamespace):
    """As much of `RunningReplica` as routers use."""

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def replica(name: str, **facts) -> Replica:
    return Replica(
        replica_id=ReplicaID(name, DEPLOYMENT),
        node_id="n",
        availability_zone=None,
        multiplexed_model_ids=set(),
        max_ongoing_requests=facts.pop("room", 100),
        replica_metadata={"cache_tokens": 100_000},
    )


class Requests:
    """A router with replicas a and b."""

    def __init__(self, *replicas: Replica) -> None:
        self.router = PrefixRouter(
            deployment_id=DEPLOYMENT,
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
        )
        self.replicas = list(replicas) or [replica("a"), replica("b")]
        self.router.update_replicas(self.replicas)
        self.count = 0

    async def choose(self, prompt: str, **fields) -> tuple[str, PendingRequest]:
        self.count += 1
        body = json.dumps({"prompt": prompt} | fields).encode()
        metadata = SimpleNamespace(internal_request_id=str(self.count), multiplexed_model_id="")
        request = PendingRequest(args=[{"body": body}], kwargs={}, metadata=metadata)
        return await self.ask(request), request

    async def ask(self, request: PendingRequest) -> str:
        ranks = await self.router.choose_replicas(self.replicas, request)
        assert request.routing_context.should_backoff
        return "".join(each.replica_id.unique_id for rank in ranks for each in rank)

    def end(self, request: PendingRequest, name: str) -> None:
        self.router.on_request_completed(
            ReplicaID(name, DEPLOYMENT), request.metadata.internal_request_id
        )


def texts(count: int) -> list[str]:
    return [f"{index} " * 400 for index in range(count)]


async def test_a_prompt_goes_where_its_beginning_was_computed():
    requests = Requests()
    first = {}
    for text in texts(6):
        first[text], request = await requests.choose(text)
        requests.end(request, first[text][0])
    assert set(first.values()) == {"ab", "ba"}
    for text in texts(6):
        again, request = await requests.choose(text + " and more")
        assert again == first[text]
        requests.end(request, again[0])


async def test_other_models_and_salts_share_nothing():
    requests = Requests()
    (text,) = texts(1)
    first, _ = await requests.choose(text, model="x")
    assert (await requests.choose(text, model="x"))[0] == first
    for _ in range(3):  # the second replica has less to do
        other, _ = await requests.choose(text, model="y")
        if other != first:
            break
    else:
        pytest.fail("another model's prompt follows the first one's")


async def test_requests_that_come_together_are_spread_before_serve_has_sent_one():
    requests = Requests()
    firsts = [(await requests.choose(text))[0][0] for text in texts(4)]
    assert sorted(firsts) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("how", ["completed", "cancelled"])
async def test_every_end_of_a_request_takes_its_load_away(how):
    requests = Requests()
    for text in texts(8):
        order, request = await requests.choose(text)
        if how == "completed":
            requests.end(request, order[0])
        else:
            request.future.cancel()
    await asyncio.sleep(0)
    loads = [requests.router._router.load(each.replica_id) for each in requests.replicas]
    assert loads == [0, 0] and requests.router._chosen == {}


async def test_serve_may_send_it_elsewhere():
    requests = Requests()
    order, request = await requests.choose(texts(1)[0])
    other = ReplicaID(order[1], DEPLOYMENT)
    requests.router.on_request_routed(request, other, None)
    assert requests.router._router.load(other) > 0
    assert requests.router._router.load(ReplicaID(order[0], DEPLOYMENT)) == 0


async def test_a_full_replica_is_not_chosen_and_a_request_that_waits_is_counted_once():
    requests = Requests(replica("a", room=1), replica("b"))
    full = ReplicaID("a", DEPLOYMENT)
    requests.router.on_new_queue_len_info(full, 1)
    order, request = await requests.choose(texts(1)[0])
    assert order == "b"
    load = requests.router._router.load(ReplicaID("b", DEPLOYMENT))
    await requests.ask(request)
    assert requests.router._router.load(ReplicaID("b", DEPLOYMENT)) == load


async def test_replicas_come_and_go():
    requests = Requests()
    requests.replicas = [requests.replicas[1], replica("c")]
    requests.router.update_replicas(requests.replicas)
    orders = {(await requests.choose(text))[0] for text in texts(4)}
    assert orders == {"bc", "cb"}


def test_a_conversation_begins_as_its_last_turn_did():
    def words(messages, **fields):
        return list(prompt_words(json.dumps({"messages": messages} | fields).encode())[0])

    turn = [{"role": "user", "content": "A question that is long enough for a few words."}]
    longer = [*turn, {"role": "assistant", "content": "An answer."}]
    shared = words(turn)[:-1]
    assert words(longer)[: len(shared)] == shared and len(shared) > 10
    assert words(turn, temperature=1) == words(turn)
    assert words(turn, tools=[{"type": "function"}]) != words(turn)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"model": 3}'])
def test_a_body_without_a_prompt_has_no_words(body):
    assert len(prompt_words(body)[0]) == 0

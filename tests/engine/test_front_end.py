"""The front end's decisions without an engine: what it sends, and what it makes of what comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quire.config import from_flat
from quire.engine.front_end import Effects, FrontEnd
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.engine.stream import RequestStream
from quire.errors import (
    EngineDeadError,
    EngineSleepingError,
    InvalidParameterError,
    QueueFullError,
)
from quire.messages import (
    AbortRequests,
    AddRequest,
    Answer,
    Control,
    ControlAction,
    FinishReason,
    LoadStats,
    RequestUpdate,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    StepOutputs,
    TokenLogprobs,
    WakeUp,
)
from quire.outputs import RequestOutput
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from tests.engine.checkpoints import ServableCheckpoint

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
BEAMS = BeamSearchParams(2, 3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(servable: Callable[[str], ServableCheckpoint]) -> ServedModel:
    config = locate(from_flat({"model": str(servable("llama").directory)}))
    return serve_model(config, resolve(config))


@pytest.fixture
def make(model: ServedModel):
    made = []

    def make(**options: object) -> FrontEnd:
        front = FrontEnd(model, from_flat(options).scheduler)
        made.append(front)
        return front

    yield make
    for front in made:
        front.close()


def submit(
    front: FrontEnd, params: SamplingParams | PoolingParams | BeamSearchParams, **options: object
) -> list[AddRequest]:
    effects = front.start(front.read([1, 2, 3], params, **options))  # type: ignore[arg-type]
    assert not effects.outputs and not effects.answers
    return [message for message in effects.send if isinstance(message, AddRequest)]


def finish(front: FrontEnd, *sequences: AddRequest, **fields: object) -> Effects:
    updates = [
        RequestUpdate(
            request_id=sequence.request_id,
            **{"new_token_ids": [7], "finish_reason": FinishReason.LENGTH, **fields},  # type: ignore[arg-type]
        )
        for sequence in sequences
    ]
    return front.take(StepOutputs(updates=updates, timestamp=1.0))


def start(front: FrontEnd, action: ControlAction) -> tuple[Control, Effects]:
    control = front.new_control(action)
    return control, front.start_control(control)


def test_a_sleep_is_sent_when_the_last_request_has_ended(make) -> None:
    front = make()
    [first], [second] = submit(front, PARAMS), submit(front, PARAMS)
    sleep, effects = start(front, Sleep(1))
    assert effects == Effects() and front.is_sleeping
    with pytest.raises(EngineSleepingError):
        front.read([1], PARAMS)
    reset, effects = start(front, ResetPrefixCache())
    assert effects.send == [reset], "only a sleep waits"
    assert front.take(Answer(reset.id, 0)).answers == [Answer(reset.id, 0)]
    assert finish(front, first).send == []
    assert finish(front, second).send == [sleep]
    assert front.is_sleeping, "not answered yet"
    assert front.take(Answer(sleep.id, 1)).answers == [Answer(sleep.id, 1)]
    assert front.is_sleeping


def test_a_sleep_follows_the_abort_that_ends_the_last_request(make) -> None:
    front = make()
    [request] = submit(front, PARAMS, request_id="mine")
    sleep, _ = start(front, Sleep(2))
    assert front.abort(["mine", "another"]).send == [AbortRequests([request.request_id]), sleep]


def test_a_sleep_that_nobody_waits_for_is_forgotten_unless_it_was_sent(make) -> None:
    front = make()
    [request] = submit(front, PARAMS)
    held, _ = start(front, Sleep(1))
    front.cancel_control(held)
    assert not front.is_sleeping and finish(front, request).send == []
    sent, effects = start(front, Sleep(1))
    assert effects.send == [sent]
    front.cancel_control(sent)
    front.take(Answer(sent.id, 1))
    assert front.is_sleeping


def test_a_wake_up_calls_off_the_sleeps_that_were_not_sent(make) -> None:
    front = make()
    submit(front, PARAMS)
    held, _ = start(front, Sleep(1))
    wake, effects = start(front, WakeUp())
    assert effects.send == [wake] and not front.is_sleeping
    [answer] = effects.answers
    assert answer.id == held.id and answer.failure is not None


def test_a_failed_wake_up_leaves_it_asleep(make) -> None:
    front = make()
    sleep, _ = start(front, Sleep(1))
    front.take(Answer(sleep.id, 1))
    wake, _ = start(front, WakeUp())
    front.take(Answer(wake.id, 1))
    assert front.is_sleeping
    again, _ = start(front, WakeUp())
    front.take(Answer(again.id, 0))
    assert not front.is_sleeping


def candidates(*logprobs: float) -> list[TokenLogprobs]:
    """Of one token: 10, 11, ... are the most likely."""
    ids = [10 + index for index in range(len(logprobs))]
    return [TokenLogprobs(10, logprobs[0], 1, ids, list(logprobs))]


def test_a_search_is_rounds_of_requests_and_one_output(make) -> None:
    front = make()
    [first] = submit(
        front, BEAMS, request_id="mine", placement=Placement(priority=3, cache_salt="salt")
    )
    with pytest.raises(InvalidParameterError, match="in use"):
        front.read([1], PARAMS, request_id="mine")
    sleep, _ = start(front, Sleep(1))
    effects = finish(front, first, logprobs=candidates(-0.1, -2.0, -5.0, -6.0))
    assert effects.outputs == [] and front.request_ids == ["mine"]
    beams = effects.send
    assert [beam.prompt_token_ids for beam in beams] == [[1, 2, 3, 10], [1, 2, 3, 11]]
    assert {beam.arrival_time for beam in beams} == {first.arrival_time}
    assert {beam.placement for beam in beams} == {Placement(priority=3, cache_salt="salt")}
    # The second beam's answer comes first; a round is over when both are there.
    assert finish(front, beams[1], logprobs=candidates(-0.1, -0.2, -5.0, -6.0)) == Effects()
    effects = finish(front, beams[0], logprobs=candidates(-0.3, -4.0, -5.0, -6.0))
    beams = effects.send
    assert [beam.prompt_token_ids for beam in beams] == [[1, 2, 3, 10, 10], [1, 2, 3, 11, 10]]
    effects = finish(front, *beams, logprobs=candidates(-0.5, -4.0, -5.0, -6.0))
    [output] = effects.outputs
    assert output.finished and output.request_id == "mine"
    assert [part.token_ids for part in output.outputs] == [[10, 10, 10], [11, 10, 10]]
    assert effects.send == [sleep], "sleep waits for searches too"


def test_a_search_that_is_aborted_ends_its_beams(make) -> None:
    front = make()
    [first] = submit(front, BEAMS, request_id="mine")
    beams = finish(front, first, logprobs=candidates(-0.1, -2.0, -5.0, -6.0)).send
    finish(front, beams[0], logprobs=candidates(-0.1, -0.2, -5.0, -6.0))
    beam_ids = [name for name in front._output.requests if name != "mine"]
    assert beam_ids and front.abort(beam_ids) == Effects(), "callers do not know of beams"
    effects = front.abort(["mine"])
    assert effects.send == [AbortRequests([beams[1].request_id])]
    [output] = effects.outputs
    assert [part.token_ids for part in output.outputs] == [[10], [11]]
    assert {part.finish_reason for part in output.outputs} == {"abort"}
    assert not front.is_busy
    assert finish(front, beams[1]) == Effects(), "what was under way is for nobody"


def test_a_beam_that_fails_ends_its_search_alone(make) -> None:
    front = make()
    [other] = submit(front, PARAMS, request_id="other")
    [broken] = submit(front, BEAMS, request_id="broken")
    [failed] = submit(front, BEAMS, request_id="failed")
    effects = finish(front, broken)  # without logprobs
    assert [(o.request_id, o.error is None) for o in effects.outputs] == [("broken", False)]
    error = {"new_token_ids": [], "finish_reason": FinishReason.ERROR, "error": "No memory."}
    [output] = finish(front, failed, **error).outputs
    assert (output.request_id, output.error) == ("failed", "No memory.")
    assert [output.request_id for output in finish(front, other).outputs] == ["other"]


def test_a_full_queue_says_when_to_come_again(make) -> None:
    front = make(max_num_seqs=1, max_num_queued_reqs=1)
    submit(front, PARAMS)
    submit(front, PARAMS)
    load = LoadStats(queue_tokens=40, prompt_rate=100.0, end_rate=0.5)
    front.take(StepOutputs(stats=SchedulerStats(num_running=1, num_waiting=1, load=load)))
    front.take(StepOutputs(stats=SchedulerStats(num_running=1, num_waiting=1, load=load)))
    with pytest.raises(QueueFullError, match="max-num-queued-reqs") as raised:
        front.check_queue(front.read([1], PARAMS))
    assert 0.8 * 4.0 <= raised.value.retry_after <= 1.2 * 4.0, (
        "two have to end, one per two seconds"
    )


def test_without_an_engine_nothing_is_sent(make) -> None:
    front = make()
    submit(front, PARAMS, request_id="a")
    submit(front, BEAMS, request_id="b")
    front.fail("It broke.")
    assert not front.is_busy and front.abort(["a", "b"]) == Effects()
    for call in (lambda: front.read([1], PARAMS), lambda: front.new_control(WakeUp())):
        with pytest.raises(EngineDeadError, match="It broke"):
            call()


def test_an_ended_stream_aborts_nobody_else() -> None:
    """Another request may have its id by now."""
    aborted: list[str] = []
    stream = RequestStream("mine", [1], aborted.append)
    stream.abort()
    assert aborted == ["mine"]
    stream.put(
        RequestOutput(
            request_id="mine", prompt=None, prompt_token_ids=[1], outputs=[], finished=True
        )
    )
    stream.abort()
    assert aborted == ["mine"]

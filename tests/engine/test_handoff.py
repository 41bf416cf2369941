"""`kv_transfer_params`: what a client may cause with it, and what P answers."""

from __future__ import annotations

import pytest

from quire import SamplingParams
from quire.config import KVTransfer, from_flat
from quire.engine.handoff import Handoff, read_handoff, to_params
from quire.engine.input_processor import InputProcessor
from quire.engine.output_processor import OutputProcessor
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.messages import FinishReason, KVSource, RequestUpdate, StepOutputs

BOTH = KVTransfer("TCPConnector", "kv_both", peers=("10.0.0.1:5600", "unix:/run/p"))
SOURCE = KVSource(engine_id="p", host="10.0.0.1", ports=(5600, 5601), ticket="t", num_tokens=48)


def read(params: object, transfer: KVTransfer | None = BOTH) -> Handoff:
    return read_handoff({"kv_transfer_params": params}, transfer)


def test_what_p_answers_is_what_d_reads() -> None:
    answer = to_params(SOURCE, "cmpl-1")
    assert answer["remote_block_ids"] == []
    assert read(answer) == Handoff(SOURCE)
    local = KVSource(engine_id="p", host="unix:/run/p", ports=(0,), ticket="t", num_tokens=1)
    assert read(to_params(local, "")) == Handoff(local)


def test_nothing_asked_for() -> None:
    for params in (None, {}, {"do_remote_decode": False}, {"do_remote_prefill": None}):
        assert read(params) == Handoff()
    assert read_handoff(None, None) == read_handoff({"other": 1}, BOTH) == Handoff()


def test_a_router_sends_null_for_what_it_does_not_know() -> None:
    toy = dict.fromkeys(["remote_engine_id", "remote_block_ids", "remote_host", "remote_port"])
    assert read({"do_remote_decode": True, "do_remote_prefill": False, **toy}) == Handoff(hold=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"remote_host": "10.0.0.2"}, "not among the peers"),
        ({"remote_port": 22, "remote_ports": None}, "not among the peers"),
        ({"remote_ports": [5600, 22]}, "not among the peers"),
        ({"remote_ports": [22, 5600]}, "not among the peers"),
        ({"remote_host": "unix:/etc/x"}, "not among the peers"),
        ({"remote_host": None}, "it needs remote_host"),
        ({"remote_host": ["10.0.0.1"]}, "$.remote_host"),
        ({"ticket": None}, "it needs"),
        ({"ticket": "x" * 2000}, "$.ticket"),
        ({"ticket": 7}, "$.ticket"),
        ({"num_tokens": 0}, "it needs"),
        ({"num_tokens": "48"}, "$.num_tokens"),
        ({"num_tokens": -(2**40)}, "$.num_tokens"),
        ({"num_tokens": 10**30}, "$.num_tokens"),
        ({"remote_ports": [*range(5600, 5700)]}, "$.remote_ports"),
        ({"remote_ports": [-1]}, "$.remote_ports"),
        ({"remote_ports": [65_536]}, "$.remote_ports"),
        ({"remote_ports": [10**30]}, "$.remote_ports"),
        ({"remote_ports": None, "remote_port": 2**16}, "$.remote_port"),
        ({"remote_ports": None, "tp_size": 0}, "$.tp_size"),
        ({"remote_ports": None, "tp_size": 10**12}, "$.tp_size"),
        ({"remote_ports": None, "tp_size": 10**30}, "$.tp_size"),
        ({"remote_ports": "ab"}, "$.remote_ports"),
    ],
)
def test_what_is_wrong_or_foreign_has_no_effect(changes: dict[str, object], says: str) -> None:
    found = read(to_params(SOURCE, "") | changes)
    assert found.source is None and says in found.ignored
    assert found.ignored.isascii() and found.ignored.isprintable()


def test_ports_follow_the_first_as_in_vllm() -> None:
    assert read(to_params(SOURCE, "") | {"remote_ports": None}).source == SOURCE


def test_roles() -> None:
    producer, consumer = (
        KVTransfer("TCPConnector", "kv_producer"),
        KVTransfer("TCPConnector", "kv_consumer"),
    )
    assert "kv_role is kv_consumer" in read({"do_remote_decode": True}, consumer).ignored
    assert "kv_role is kv_producer" in read(to_params(SOURCE, ""), producer).ignored
    assert "no --kv-transfer-config" in read({"do_remote_decode": True}, None).ignored
    assert "no effect" in read([1]).ignored and "no effect" in read("x").ignored


@pytest.fixture(scope="module")
def model() -> ServedModel:
    transfer = {"kv_connector": "TCPConnector", "kv_role": "kv_both"}
    transfer["kv_connector_extra_config"] = {"peers": ["10.0.0.1:5600"]}
    config = locate(from_flat({"kv_transfer_config": transfer}))
    return serve_model(config, resolve(config))


def test_the_first_of_n_sequences_moves_kv_and_the_others_share_it(model: ServedModel) -> None:
    process = InputProcessor(model).process

    def sequences(params: dict[str, object]) -> list[object]:
        asked = SamplingParams(n=3, extra_args={"kv_transfer_params": params})
        return process([5] * 48, asked).sequences

    loads = sequences(to_params(SOURCE, ""))
    assert [each.source for each in loads] == [SOURCE, None, None]
    assert [each.hold_kv for each in loads] == [False] * 3
    assert [each.hold_kv for each in sequences({"do_remote_decode": True})] == [True, False, False]


def test_the_answer_says_where_the_kv_is(model: ServedModel) -> None:
    asked = SamplingParams(extra_args={"kv_transfer_params": {"do_remote_decode": True}})
    request = InputProcessor(model).process([5] * 48, asked, request_id="r")
    processor = OutputProcessor(model.tokenizer)
    processor.add(request)
    update = RequestUpdate(
        request_id=request.sequences[0].request_id, new_token_ids=[7],
        finish_reason=FinishReason.LENGTH, kv_source=SOURCE,
    )  # fmt: skip
    [output] = processor.process(StepOutputs(updates=[update])).outputs
    assert output.kv_transfer_params == to_params(SOURCE, "r")


def test_ignored_parameters_are_logged(model: ServedModel, caplog) -> None:
    asked = SamplingParams(
        extra_args={"kv_transfer_params": to_params(SOURCE, "") | {"remote_host": "x"}}
    )
    assert InputProcessor(model).process([5] * 48, asked).sequences[0].source is None
    assert "not among the peers" in caplog.text

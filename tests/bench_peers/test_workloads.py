"""The comparison's workloads are what shared/reference/cpu.md defines."""

from __future__ import annotations

import pytest
from bench.peers.models import gguf_name, vocabulary
from bench.peers.workloads import (
    MODELS,
    NUM_SPECIAL_TOKENS,
    SMOKE,
    WARM_UP,
    WORKLOADS,
    Timing,
    build,
    measures,
    w1_lengths,
    w5_arrivals,
    w5_requests,
)

VOCAB = 32000


def test_w1_totals() -> None:
    lengths = w1_lengths()
    assert len(lengths) == 64
    assert sum(prompt for prompt, _ in lengths) == 9801
    assert sum(output for _, output in lengths) == 4540
    assert all(32 <= prompt <= 256 and 16 <= output <= 128 for prompt, output in lengths)
    requests = build("W1", VOCAB, 0)
    assert [(len(r.prompt), r.max_tokens) for r in requests] == lengths


@pytest.mark.parametrize(
    ("name", "count", "prompt", "output"),
    [("W2", 1, 128, 128), ("W3", 32, 528, 16), ("W4", 1, 2048, 1)],
)
def test_sizes(name: str, count: int, prompt: int, output: int) -> None:
    requests = build(name, VOCAB, 0)
    assert len(requests) == count
    assert {(len(r.prompt), r.max_tokens) for r in requests} == {(prompt, output)}


def test_w3_shares_exactly_its_prefix() -> None:
    requests = build("W3", VOCAB, 0)
    assert len({tuple(r.prompt[:512]) for r in requests}) == 1
    assert len({tuple(r.prompt[512:]) for r in requests}) == 32


@pytest.mark.parametrize("name", WORKLOADS)
def test_contents_are_new_at_each_repeat_and_the_same_for_every_engine(name: str) -> None:
    prompts = [build(name, VOCAB, repeat)[0].prompt for repeat in (WARM_UP, 0, 1)]
    assert prompts[0][:16] != prompts[1][:16] != prompts[2][:16]
    assert build(name, VOCAB, 1) == build(name, VOCAB, 1)
    assert len(build(name, VOCAB, 0, SMOKE)) <= 4


def test_w5() -> None:
    requests = w5_requests(VOCAB, 0)
    assert {(len(r.prompt), r.max_tokens) for r in requests} == {(128, 64)}
    arrivals = w5_arrivals(2.0, len(requests))
    assert len(arrivals) == 60 and arrivals == sorted(arrivals) and arrivals[0] == 0
    assert 20 < arrivals[-1] < 45, "60 requests at 2 a second take about 30 s"
    assert w5_arrivals(1.0, 60)[-1] == pytest.approx(2 * arrivals[-1])


def test_prompts_hold_plain_tokens_only_and_the_kv_cache_holds_w3() -> None:
    for shape in MODELS.values():
        tokens = [t for r in build("W1", shape.vocab_size, 0) for t in r.prompt]
        assert min(tokens) >= NUM_SPECIAL_TOKENS and max(tokens) < shape.vocab_size
        assert shape.kv_cache_tokens >= 32 * 544
        assert shape.max_model_len > 2048


def test_measures() -> None:
    requests = build("W2", VOCAB, 0, SMOKE)
    count = requests[0].max_tokens
    found = measures("W2", requests, Timing(1.5, 0.5, [count]))
    assert found == {"ttft_ms": 500.0, "decode_tok_s": count - 1}
    assert measures("W1", requests, Timing(2.0, None, [count])) == {"output_tok_s": count / 2}


def test_an_engine_that_stops_early_fails() -> None:
    requests = build("W1", VOCAB, 0, SMOKE)
    short = [r.max_tokens for r in requests]
    short[1] -= 1
    with pytest.raises(ValueError, match=f"1: {short[1]} for {short[1] + 1}"):
        measures("W1", requests, Timing(1.0, None, short))


def test_vocabulary() -> None:
    words = vocabulary(VOCAB)
    assert len(words) == len(set(words)) == VOCAB
    assert words[:3] == ["<unk>", "<s>", "</s>"]
    assert all(word.isalpha() for word in words[NUM_SPECIAL_TOKENS:])
    assert len(set(vocabulary(151936))) == 151936


def test_gguf_names() -> None:
    assert gguf_name("model.layers.11.self_attn.q_proj.weight") == "blk.11.attn_q.weight"
    assert gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"

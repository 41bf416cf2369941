"""Acceptance from a server's counters."""

from __future__ import annotations

import pytest

from quire.bench.drafts import draft_figures, parse_counts

BEFORE = """\
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 40.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 10.0
vllm:num_requests_running{engine="0",model_name="m"} 3.0
"""
AFTER = """\
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 14.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 60.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 36.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 13.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="10"} 1.0
"""


def test_figures_are_of_what_came_between() -> None:
    assert draft_figures(parse_counts(BEFORE), parse_counts(AFTER)) == {
        "spec_decode_acceptance_rate": pytest.approx(30.0),
        "spec_decode_acceptance_length": pytest.approx(2.5),
        "spec_decode_num_drafts": 4,
        "spec_decode_draft_tokens": 20,
        "spec_decode_accepted_tokens": 6,
        "spec_decode_per_position_acceptance_rates": [0.75, 0.5, 0.25],
    }


def test_engines_are_added_up() -> None:
    counts = parse_counts(BEFORE + BEFORE.replace('engine="0"', 'engine="1"'))
    assert counts is not None
    assert (counts.num_drafts, counts.draft_tokens, counts.accepted_at) == (20, 80, {0: 20})


def test_a_server_without_drafts_has_no_figures() -> None:
    assert parse_counts("vllm:num_requests_running 3.0\n") is None
    assert draft_figures(None, parse_counts(AFTER)) == {}
    assert draft_figures(parse_counts(AFTER), parse_counts(AFTER)) == {}

"""`LLM.explain` and `LLM.timeline`, on the built-in model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from quire import LLM, SamplingParams
from quire.errors import InvalidParameterError
from tests.scheduler.trace_rules import check_trace

OPTIONS = {
    "max_model_len": 256,
    "num_gpu_blocks_override": 40,
    "max_num_seqs": 2,
    "kernels": "auto",
}


def test_why_a_request_took_so_long(tmp_path):
    with LLM(**OPTIONS) as llm:
        params = SamplingParams(max_tokens=5, n=2, ignore_eos=True)
        outputs = llm.generate(["Once upon a time", "There was"], params, use_tqdm=False)
        first = llm.explain(outputs[0])
        assert first.num_prompt_tokens == len(outputs[0].prompt_token_ids)
        assert first.num_tokens == 5 and first.finish_reason == "length"
        assert first.first_token == pytest.approx(outputs[0].metrics.first_token_latency, abs=0.05)
        assert "sequence slot" in str(llm.explain(outputs[1], index=1))
        ids = [llm.explain(output, index).request_id for output in outputs for index in (0, 1)]
        assert len(set(ids)) == 4
        assert llm.explain(f"r{ids[2]}") == llm.explain(outputs[1].request_id)
        for unknown in ("r999", "7"):
            with pytest.raises(InvalidParameterError, match="has nothing of"):
                llm.explain(unknown)
        with pytest.raises(InvalidParameterError):
            llm.explain(outputs[0], 2)
        trace = llm.timeline(tmp_path / "trace.json")
        check_trace(trace)
        assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_without_a_record():
    with LLM(**OPTIONS, decision_record_bytes=0) as llm:
        output = llm.generate("x", SamplingParams(max_tokens=1), use_tqdm=False)[0]
        with pytest.raises(InvalidParameterError):
            llm.explain(output)
        assert llm.timeline()["traceEvents"] == []

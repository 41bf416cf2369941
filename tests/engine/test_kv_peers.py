"""Engines that compute prompts for others: the bits of one engine, however each of both is divided."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import count

import pytest

from quire import LLM, SamplingParams

OPTIONS = {"max_model_len": 256, "kv_cache_memory_bytes": 8 << 20, "max_logprobs": -1}
OPTIONS |= {"logprobs_mode": "raw_logits", "max_num_seqs": 4, "worker_timeout": 300}
DIVIDED: dict[str, dict[str, int]] = {
    "one rank": {},
    "two ranks": {"tensor_parallel_size": 2},
    "two stages": {"pipeline_parallel_size": 2},
}
PROMPTS = [list(range(first, first + length)) for first, length in ((10, 200), (900, 97))]
PORTS = count(28_000 + os.getpid() * 31 % 4000, 4)
Logits = list[dict[int, float]]


def run(
    llm: LLM, prompt: list[int], tokens: int, params: object = None
) -> tuple[list[int], Logits, int, object]:
    """The tokens, all logits, the prompt's cached tokens, and what is said of its KV."""
    extra = {"kv_transfer_params": params} if params else None
    asked = SamplingParams(
        max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=-1, extra_args=extra
    )
    [output] = llm.generate({"prompt_token_ids": prompt}, asked, use_tqdm=False)
    [part] = output.outputs
    assert part.logprobs is not None
    logits = [{token: each.logprob for token, each in row.items()} for row in part.logprobs]
    return list(part.token_ids), logits, output.num_cached_tokens or 0, output.kv_transfer_params


@pytest.fixture(scope="module")
def start(loads_pay: None, tmp_path_factory) -> Iterator[Callable[..., LLM]]:
    """An engine with a role, the same one when asked again; role "": with none."""
    place = f"unix:{tmp_path_factory.mktemp('kv')}/kv"
    with ExitStack() as stack:

        @cache
        def make(role: str, division: str = "one rank", connector: str = "TCPConnector") -> LLM:
            host = "127.0.0.1" if connector == "TCPConnector" else place
            transfer = {
                "kv_connector": connector, "kv_role": role, "kv_ip": host, "kv_port": next(PORTS),
                "kv_connector_extra_config": {"peers": [host]},
            }  # fmt: skip
            role_options = {"kv_transfer_config": transfer} if role else {}
            return stack.enter_context(LLM(**OPTIONS, **DIVIDED[division], **role_options))

        yield make


@pytest.fixture(scope="module")
def expected(start: Callable[..., LLM]) -> Callable[[int], tuple[list[int], Logits]]:
    """Of one engine that computes everything."""
    return cache(lambda index: run(start(""), PROMPTS[index], 4)[:2])


def check(p: LLM, d: LLM, expected: Callable[[int], tuple[list[int], Logits]]) -> None:
    assert d.reset_prefix_cache()
    for index, prompt in enumerate(PROMPTS):
        *_, params = run(p, prompt, 1, {"do_remote_decode": True})
        assert isinstance(params, dict)
        tokens, logits, cached, _ = run(d, prompt, 4, params)
        assert cached == (len(prompt) - 1) // 16 * 16
        assert (tokens, logits) == expected(index)  # the same bits


@pytest.mark.parametrize("of_d", DIVIDED)
@pytest.mark.parametrize("of_p", DIVIDED)
def test_each_division_reads_from_each(of_p: str, of_d: str, start, expected) -> None:
    check(start("kv_producer", of_p), start("kv_consumer", of_d), expected)


def test_through_shared_memory(start, expected) -> None:
    both = [start(role, connector="SharedMemoryConnector") for role in ("kv_producer", "kv_both")]
    check(*both, expected)

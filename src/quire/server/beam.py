"""`use_beam_search` over HTTP: n continuations that are found by a search instead of sampled.

It is applied where all generation requests are submitted, so every endpoint has it. Parameters that only
make sense for sampling (top_p, seed, ...) have no effect, as in vLLM. Parameters that would have to
change the search are refused; vLLM ignores them.
"""

from __future__ import annotations

from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.server.errors import bad_request
from quire.server.requests import SamplingFields

MAX_BEAMS = 128
"""Limit in one request. For every token, each beam proposes twice as many candidates as there are beams."""

_SHAPING = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids", "min_tokens",
    "prompt_logprobs", "logprob_token_ids", "logit_bias", "allowed_token_ids", "bad_words",
    "structured_outputs", "thinking_token_budget", "repetition_detection", "kv_transfer_params",
)  # fmt: skip
_NEUTRAL = SamplingParams()


def as_asked(
    request: object, params: SamplingParams | PoolingParams, num_prompts: int
) -> SamplingParams | PoolingParams | BeamSearchParams:
    """`params`, or the parameters of a beam search if `request` asks for one.

    Raises a 400 `ApiError` or `InvalidParameterError`.
    """
    if not (isinstance(request, SamplingFields) and request.use_beam_search):
        return params
    assert isinstance(params, SamplingParams)
    n = request.n or 1
    width = n if request.best_of is None else request.best_of
    if width * num_prompts > MAX_BEAMS:
        raise bad_request(
            f"a beam search may follow {MAX_BEAMS} beams in one request (n or best_of, times the prompts); "
            f"this one asks for {width * num_prompts}.",
            param="n",
        )
    for name in _SHAPING:
        asked = getattr(request, name)
        if asked not in (None, [], {}, getattr(_NEUTRAL, name, None)):
            raise _clash(name)
    if params.structured_outputs is not None:
        raise _clash("response_format or a tool choice")
    if params.prompt_logprobs is not None:
        raise _clash("echo together with logprobs")
    if params.logprobs is not None and not 0 <= params.logprobs <= 2 * width:
        raise bad_request(
            f"a beam search of width {width} knows {2 * width} logprobs per token; ask for at most that.",
            param="logprobs",
        )
    return BeamSearchParams(
        width,
        params.max_tokens,
        n=n,
        ignore_eos=params.ignore_eos,
        temperature=params.temperature,
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )


def _clash(name: str) -> Exception:
    return bad_request(
        f"{name} does not go with use_beam_search; leave one out.", param=name.split()[0]
    )

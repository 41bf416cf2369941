"""`use_beam_search` over HTTP: n continuations, found by a search instead of drawn.

It applies where every generation request is submitted, so that every endpoint has it. What only makes sense
where tokens are drawn (top_p, seed, ...) has no effect, as in vLLM; what would have to change the search is
refused, where vLLM ignores it.
"""

from __future__ import annotations

from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.server.errors import bad_request
from quire.server.requests import SamplingFields

MAX_BEAMS = 128
"""In one request. Each proposes twice as many candidates as there are beams, at every token."""

_SHAPING = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids", "min_tokens",
    "prompt_logprobs", "logprob_token_ids", "logit_bias", "allowed_token_ids", "bad_words",
    "structured_outputs", "thinking_token_budget", "repetition_detection",
)  # fmt: skip
_NEUTRAL = SamplingParams()


def as_asked(
    request: object, params: SamplingParams | PoolingParams, num_prompts: int
) -> SamplingParams | PoolingParams | BeamSearchParams:
    """`params`, or the search that `request` wants instead of drawing by them.

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
        if asked not in (None, [], {}, getattr(_NEUTRAL, name)):
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

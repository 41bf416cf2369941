"""Speculative decoding: `--speculative-config` with vLLM's keys, and its shorthands.

No value changes a token, so keys that only tune another engine's drafting are accepted and have no effect.
Keys that ask for other tokens than the model's own, or for what is not there, are errors that say so.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from quire.config.options import option, parse_json_object
from quire.errors import ConfigError

DEFAULT_TOKENS: Mapping[str, int] = {
    "ngram": 16,
    "suffix": 16,
    "draft_model": 8,
    "eagle": 4,
    "eagle3": 4,
    "mtp": 1,
}
"""The methods, and the most drafts of a step. Fewer are proposed where fewer pay."""
MOST_TOKENS = 64
NOT_HERE: Mapping[str, str] = {
    "medusa": "heads of Medusa are not implemented; use eagle3, or suffix without a model",
    "mlp_speculator": "it is not implemented; use eagle3, or suffix without a model",
    "dflash": "it is not implemented; use eagle3, or suffix without a model",
    "dspark": "it is not implemented; use eagle3, or suffix without a model",
    "ngram_gpu": "use ngram, which costs the host a few microseconds a step",
    "custom_class": "the server runs no code of others",
    "extract_hidden_states": "hidden states are not served",
}
_BY_NAME = {"eagle3": "eagle3", "eagle-": "eagle", "dflash": "dflash", "dspark": "dspark"}
"""As in vLLM: a part of a draft model's name, and the method that it means."""

_ADAPTIVE = "the number of drafts follows measured acceptance and step times"
_ONE_DEVICE = "a draft model is on one device, that of the rank that samples"
_LOSSY = "drafts never change a token: one is accepted if it equals the sampled token"
_SAME_TOKENS = "a draft model has the target's vocabulary"
IDLE_KEYS = frozenset(
    "enforce_eager code_revision moe_backend attention_backend kv_cache_dtype index_share_for_mtp_iteration "
    "disable_padded_drafter_batch disable_eagle_block_drop use_local_argmax_reduction draft_load_config "
    "num_speculative_tokens_per_batch_size enable_adaptive_verification dspark_draft_topk "
    "disable_by_batch_size disable_logprobs disable_mqa_scorer".split()
)
"""Keys that tune how another engine drafts; they are accepted and have no effect."""
REFUSED_KEYS: Mapping[str, tuple[tuple[object, ...], str]] = {
    "draft_tensor_parallel_size": ((1,), _ONE_DEVICE),
    "tensor_parallel_size": ((), "it is called draft_tensor_parallel_size, and is 1"),
    "parallel_drafting": ((False,), "drafts are computed one after the other"),
    "use_heterogeneous_vocab": ((False,), _SAME_TOKENS),
    "speculative_token_tree": ((), "drafts are a chain, not a tree"),
    "rejection_sample_method": (("standard",), _LOSSY),
    "acceptance_method": (("rejection_sampler",), _LOSSY),
    "synthetic_acceptance_rates": ((), _LOSSY),
    "synthetic_acceptance_length": ((), _LOSSY),
    "synthetic_acceptance_rate": ((), _LOSSY),
    "posterior_threshold": ((), _LOSSY),
    "posterior_alpha": ((), _LOSSY),
}
"""Keys with the values that are accepted, and the reason why no other is. None is always accepted."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """How drafts are made. The fields are the keys of `--speculative-config` that have an effect."""

    method: str
    num_speculative_tokens: int
    """The most drafts of a step."""
    model: str | None = None
    """Directory, GGUF file or hub id of a draft model or head."""
    revision: str | None = None
    quantization: str | None = None
    max_model_len: int | None = None
    """Positions that a draft model may reach; requests go on without drafts beyond. None: as its config
    says."""
    draft_sample_method: str = "probabilistic"
    """"greedy": a draft model's likeliest tokens. "probabilistic": its tokens drawn with the request's own
    parameters and random stream."""
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 16
    """Lengths of the suffix that is looked up."""
    suffix_decoding_max_tree_depth: int = 64
    """The longest suffix that is compared."""
    suffix_decoding_max_cached_requests: int = 10000
    """Most past requests of which outputs are kept; 0 keeps none."""
    suffix_decoding_max_spec_factor: float = 1.5
    """Most drafts, as a multiple of the length of the suffix that was found."""
    suffix_decoding_min_token_prob: float = 0.3
    """Drafts end where the share of continuations that agree falls below it."""


_KEYS = {item.name: item for item in fields(Speculation)}
_AT_LEAST = dict.fromkeys(("num_speculative_tokens", "max_model_len", "prompt_lookup_min"), 1) | {
    "prompt_lookup_max": 1,
    "suffix_decoding_max_tree_depth": 1,
    "suffix_decoding_max_cached_requests": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Speculative decoding: several tokens in a step, where they can be guessed. Off by default."""

    speculative_config: dict[str, object] = option(
        {},
        "JSON object with vLLM's keys: method (ngram, suffix, draft_model, eagle, eagle3, mtp), model, "
        "num_speculative_tokens, ... See speculation.md.",
        parse=parse_json_object, metavar="JSON",
    )  # fmt: skip
    spec_method: str | None = option(None, "Its method.")
    spec_model: str | None = option(
        None, "Its model. Without a method: a draft model.", aliases=("--speculative-model",)
    )
    spec_tokens: int | None = option(
        None,
        "Its num_speculative_tokens: the most drafts of a step. Default: depends on the method.",
        aliases=("--num-speculative-tokens",),
    )
    ngram_prompt_lookup_max: int | None = option(None, "Its prompt_lookup_max.")
    ngram_prompt_lookup_min: int | None = option(None, "Its prompt_lookup_min.")

    def __post_init__(self) -> None:
        _ = self.speculation

    @property
    def speculation(self) -> Speculation | None:
        """What the options say together; None: no speculation. Raises `ConfigError`."""
        values = {key: value for key, value in self.speculative_config.items() if value is not None}
        for flag, key in _SHORTHANDS.items():
            value = getattr(self, flag)
            if value is None:
                continue
            if key in values:
                raise ConfigError(
                    f"{flag} and the key {key} of speculative_config say the same; leave one out."
                )
            values[key] = value
        return _speculation(values) if values else None


_SHORTHANDS = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
    "ngram_prompt_lookup_max": "prompt_lookup_max",
    "ngram_prompt_lookup_min": "prompt_lookup_min",
}


def _speculation(values: dict[str, object]) -> Speculation:
    known = {}
    for key, value in values.items():
        if key in REFUSED_KEYS:
            accepted, why = REFUSED_KEYS[key]
            if not any(type(value) is type(each) and value == each for each in accepted):
                raise ConfigError(f"speculative_config {key} {value!r} is not supported: {why}.")
        elif key in _KEYS:
            known[key] = _checked(key, value)
        elif key not in IDLE_KEYS:
            raise ConfigError(f"speculative_config has no key {key!r}. {_hint(key)}")
    method = _method(known)
    known["method"] = method
    known.setdefault("num_speculative_tokens", DEFAULT_TOKENS[method])
    if method not in ("draft_model", "eagle", "eagle3", "mtp"):
        known.pop("model", None)
    # As in vLLM: one of the two means both.
    pair = ("prompt_lookup_min", "prompt_lookup_max")
    given = [known[name] for name in pair if name in known]
    if len(given) == 1:
        known |= dict.fromkeys(pair, given[0])
    made = Speculation(**known)  # type: ignore[arg-type]
    if made.prompt_lookup_min > made.prompt_lookup_max:
        raise ConfigError(
            f"speculative_config prompt_lookup_min {made.prompt_lookup_min} is above prompt_lookup_max "
            f"{made.prompt_lookup_max}."
        )
    if made.num_speculative_tokens > MOST_TOKENS:
        raise ConfigError(
            f"speculative_config num_speculative_tokens must be at most {MOST_TOKENS}, got "
            f"{made.num_speculative_tokens}."
        )
    return made


def _method(values: Mapping[str, object]) -> str:
    """As given, else as in vLLM: from the model's name."""
    method, model = values.get("method"), values.get("model")
    if method is None:
        if model is None:
            raise ConfigError(
                f"speculative_config needs a method ({', '.join(DEFAULT_TOKENS)}) or a model."
            )
        name = str(model).strip("[]")
        found = (meant for part, meant in _BY_NAME.items() if part in name.lower())
        method = name if name in ("ngram", "suffix") else next(found, "draft_model")
    method = str(method).strip("[]")
    if method not in NOT_HERE and (method == "mtp" or method.endswith("_mtp")):
        return "mtp"  # vLLM had one name per family
    if method not in DEFAULT_TOKENS:
        why = NOT_HERE.get(method, f"methods are {', '.join(DEFAULT_TOKENS)}")
        raise ConfigError(f"speculative_config method {method!r} is not supported: {why}.")
    return method


def _checked(key: str, value: object) -> object:
    """Raises `ConfigError` if the value is not of the key's type, or out of range."""
    kinds: dict[str, tuple[Callable[[object], bool], str]] = {
        "int": (lambda v: isinstance(v, int) and not isinstance(v, bool), "an integer"),
        "float": (lambda v: isinstance(v, int | float) and not isinstance(v, bool), "a number"),
        "str": (lambda v: isinstance(v, str) and v != "", "a string"),
    }
    is_right, name = kinds[str(_KEYS[key].type).removesuffix(" | None")]
    wrong = f"speculative_config {key} must be {name}"
    if not is_right(value):
        raise ConfigError(f"{wrong}, got {value!r}.")
    if key in _AT_LEAST and isinstance(value, int) and value < _AT_LEAST[key]:
        raise ConfigError(f"{wrong} of at least {_AT_LEAST[key]}, got {value}.")
    if key == "suffix_decoding_min_token_prob" and not 0.0 <= float(value) <= 1.0:  # type: ignore[arg-type]
        raise ConfigError(f"{wrong} in [0, 1], got {value}.")
    if key == "suffix_decoding_max_spec_factor" and not 0.0 < float(value) < 1e9:  # type: ignore[arg-type]
        raise ConfigError(f"{wrong} above 0, got {value}.")
    if key == "draft_sample_method" and value not in ("greedy", "probabilistic"):
        raise ConfigError(f"{wrong}: greedy or probabilistic, got {value!r}.")
    return float(value) if name == "a number" else value  # type: ignore[arg-type]


def _hint(key: str) -> str:
    known = sorted({*_KEYS, *IDLE_KEYS, *REFUSED_KEYS})
    close = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Keys are {', '.join(sorted(_KEYS))}."

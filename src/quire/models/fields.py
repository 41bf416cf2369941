"""Reading a `config.json` strictly: every field is understood, known to be harmless, or an error.

If a field is silently ignored (a scaled attention, a clipped activation, a second rotary base), the model
silently gives wrong answers. So a `ConfigReader` remembers which fields a family has read, and `finish()`
rejects the others unless they are on one of the two lists here: fields that never change a forward pass,
and fields that change nothing at one particular value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping

from quire.errors import UnsupportedModelError

MAX_SIZE = 2**31 - 1

COSMETIC_FIELDS = frozenset(
    # About the file, the library or training.
    "architectures model_type auto_map transformers_version torchscript use_cache initializer_range "
    "attention_dropout hidden_dropout dropout embd_pdrop resid_pdrop attn_pdrop hidden_dropout_prob "
    "attention_probs_dropout_prob classifier_dropout pretraining_tp gradient_checkpointing "
    "cache_implementation use_flash_attn use_flash_attention use_fused_rms_norm use_fused_cross_entropy "
    "use_sdpa attn_implementation tokenizer_class processor_class is_llama_config "
    "model_name name_or_path license tags finetuned base_model "
    "transformers.js_config output_attentions output_hidden_states return_dict use_return_dict "
    "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix "
    "pruned_heads keys_to_ignore_at_inference use_bfloat16 tf_legacy_loss "
    # Token ids that generation, not the model, uses (`quire.engine.end_tokens` reads eos_token_id).
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id mask_token_id "
    "decoder_start_token_id bos_token eos_token pad_token "
    # Generation settings that old configs carried; generation_config.json is where they are read.
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "chunk_size_feed_forward cross_attention_hidden_size tie_encoder_decoder".split()
)
COSMETIC_PREFIXES = ("_", "unsloth")

NEUTRAL_VALUES: Mapping[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_mrope": False,
    "use_bidirectional_attention": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_sliding_window": False,
    "use_qk_norm": False,
    "num_experts": 0,
    "num_local_experts": 0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
"""Fields of related families: accepted if they are off; a model that has them on is another one."""

MOE_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "num_experts_per_tok",
)
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")


def unsupported(field: str, value: object, *, rule: str, remedy: str) -> UnsupportedModelError:
    """The format of every message: field, value, what is expected, remedy."""
    return UnsupportedModelError(f"config.json: {field} is {_show(value)}, but {rule}; {remedy}")


def override_hint(field: str, value: str) -> str:
    return f"""set it with --hf-overrides '{{"{field}": {value}}}'"""


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ConfigReader:
    """Typed access to one config mapping. A null field counts as absent, which is how an override
    removes one.

    `prefix` names the mapping inside the file (`rope_scaling.`), so that messages point at the right place.
    """

    def __init__(self, config: Mapping[str, object], *, prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix
        self._read: set[str] = set()

    def has(self, field: str) -> bool:
        return self.raw(field) is not None

    def nulled(self, field: str) -> bool:
        """Whether the field is present and null, which for a few fields differs from absent."""
        return field in self._config and self._config[field] is None

    def was_read(self, field: str) -> bool:
        return field in self._read

    def raw(self, field: str) -> object:
        """The value as in the JSON, or None. Marks the field as read."""
        self._read.add(field)
        return self._config.get(field)

    def integer(
        self, field: str, *, default: int | None = None, at_least: int = 1, at_most: int = MAX_SIZE
    ) -> int:
        value = self.raw(field)
        if value is None:
            if default is None:
                raise self._missing(field)
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not at_least <= value <= at_most
        ):
            raise self.bad(field, f"it must be an integer from {at_least} to {at_most}")
        return value

    def number(
        self, field: str, *, default: float | None = None, above: float | None = 0.0
    ) -> float:
        """A finite number greater than `above` (or any, where that is None)."""
        value = self.raw(field)
        if value is None:
            if default is None:
                raise self._missing(field)
            return default
        rule = "a finite number" if above is None else f"a number greater than {above:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(field, f"it must be {rule}")
        try:
            result = float(value)
        except OverflowError:
            raise self.bad(field, f"it must be {rule}") from None
        if not math.isfinite(result) or (above is not None and result <= above):
            raise self.bad(field, f"it must be {rule}")
        return result

    def boolean(self, field: str, *, default: bool) -> bool:
        value = self.raw(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(field, "it must be true or false")
        return value

    def text(self, field: str, *, default: str) -> str:
        value = self.raw(field)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.bad(field, "it must be a string")
        return value

    def mapping(self, field: str) -> Mapping[str, object] | None:
        value = self.raw(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(field, "it must be an object")
        return value

    def names(self, field: str) -> tuple[str, ...] | None:
        value = self.raw(field)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.bad(field, "it must be a list of strings")
        return tuple(value)

    def numbers(self, field: str, *, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self.raw(field)
        if value is None:
            raise self._missing(field)
        if not isinstance(value, list) or len(value) != count:
            raise self.bad(field, f"it must be a list of {count} numbers")
        items = ConfigReader(
            {f"{field}[{i}]": item for i, item in enumerate(value)}, prefix=self._prefix
        )
        return tuple(items.number(f"{field}[{i}]") for i in range(count))

    def bad(self, field: str, rule: str) -> UnsupportedModelError:
        """The error for a field's value; `rule` says what would be accepted."""
        remedy = "correct the file or override the field with --hf-overrides"
        return unsupported(self._prefix + field, self._config.get(field), rule=rule, remedy=remedy)

    def _missing(self, field: str) -> UnsupportedModelError:
        name = self._prefix + field
        return UnsupportedModelError(
            f"config.json: {name} is missing; {override_hint(field, '...')}"
        )

    def finish(self, *, ignored: Collection[str] = ()) -> None:
        """Reject every field that was not read and could change what the model computes.

        Raises:
            UnsupportedModelError: naming the first such field in the file, its value and how to drop it.
        """
        for field, value in self._config.items():
            if value is None or field in self._read or field in ignored or field in COSMETIC_FIELDS:
                continue
            if field.startswith(COSMETIC_PREFIXES):
                continue
            if field in NEUTRAL_VALUES and _equals(value, NEUTRAL_VALUES[field]):
                continue
            if field in NEUTRAL_VALUES:
                neutral = json.dumps(NEUTRAL_VALUES[field])
                raise self.bad(field, f"this architecture is implemented only with {neutral}")
            raise unsupported(
                self._prefix + field,
                value,
                rule="Quire does not know this field and will not guess whether it matters",
                remedy="if it does not, drop it with " + _drop_hint(self._prefix, field),
            )


def _equals(value: object, neutral: object) -> bool:
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return value == neutral


def _drop_hint(prefix: str, field: str) -> str:
    for outer in reversed(prefix.rstrip(".").split(".") if prefix else []):
        return f"""--hf-overrides '{{"{outer}": {{...}}}}' without it"""
    return f"""--hf-overrides '{{"{field}": null}}'"""

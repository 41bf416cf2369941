"""The small files beside tokenizer.json: which tokens are special, and the chat template.

Precedence follows transformers 5: `added_tokens_decoder` in tokenizer_config.json makes
special_tokens_map.json irrelevant; without it the map overrides the config. `add_bos_token` and
`add_eos_token` are ignored, as transformers ignores them when tokenizer.json exists: the
post-processor in tokenizer.json decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quire.errors import CheckpointError

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
MAX_CONFIG_BYTES = 64 << 20
MAX_TEMPLATE_CHARS = 1 << 20

JsonObject = dict[str, object]


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """One added token: its text and how it matches (see `tokenizers.AddedToken`)."""

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What tokenizer_config.json and its neighbours say, resolved once.

    named_tokens: bos_token, eos_token, ... -> spec, for those that are set.
    extra_tokens: further special tokens, without a name.
    added_tokens: id -> spec, the tokens that must exist beyond tokenizer.json, in id order.
    chat_templates: name -> Jinja source; "default" is used unless there is another for tools.
    split_special_tokens: encode the text of special tokens as plain text.
    """

    named_tokens: Mapping[str, TokenSpec] = field(default_factory=dict)
    extra_tokens: tuple[TokenSpec, ...] = ()
    added_tokens: Mapping[int, TokenSpec] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    split_special_tokens: bool = False


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read the files that exist; all are optional. Malformed ones raise `CheckpointError`."""
    config = read_json_object(directory / "tokenizer_config.json")
    has_added_tokens = "added_tokens_decoder" in config
    if not has_added_tokens:
        config |= read_json_object(directory / "special_tokens_map.json")
    where = directory / "tokenizer_config.json"
    added = _added_tokens(config.get("added_tokens_decoder"), where)
    by_content = {spec.content: spec for spec in added.values()}
    named: dict[str, TokenSpec] = {}
    for name in NAMED_TOKENS:
        spec = _token_spec(config.get(name), where)
        if spec is not None:
            named[name] = by_content.get(spec.content, spec)
    extra_value = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    extra = _extra_tokens(extra_value, where)
    return TokenizerConfig(
        named_tokens=named,
        extra_tokens=extra,
        added_tokens=added,
        chat_templates=_read_chat_templates(directory, config.get("chat_template")),
        split_special_tokens=config.get("split_special_tokens") is True,
    )


def read_json_object(path: Path) -> JsonObject:
    """The JSON object in `path`, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_CONFIG_BYTES} bytes; is it the right file?"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON; download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _token_spec(value: object, where: Path) -> TokenSpec | None:
    """A token is written as its text, or as an object with `content` and flags."""
    if value is None:
        return None
    if isinstance(value, str):
        return TokenSpec(value)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return TokenSpec(
            content=value["content"],
            special=value.get("special", True) is True,
            lstrip=value.get("lstrip") is True,
            rstrip=value.get("rstrip") is True,
            single_word=value.get("single_word") is True,
            normalized=value.get("normalized") is True,
        )
    raise CheckpointError(f"{where}: a token must be a string or an object with `content`.")


def _added_tokens(value: object, where: Path) -> dict[int, TokenSpec]:
    if not isinstance(value, dict):
        return {}
    specs: dict[int, TokenSpec] = {}
    for key, token in value.items():
        spec = _token_spec(token, where)
        if spec is None or not key.isdecimal():
            raise CheckpointError(
                f"{where}: added_tokens_decoder[{key!r}] is not an id and a token."
            )
        # Absent means False here: this table also lists tokens that are not special.
        special = isinstance(token, dict) and token.get("special") is True
        specs[int(key)] = spec if spec.special == special else _with_special(spec, special)
    return dict(sorted(specs.items()))


def _with_special(spec: TokenSpec, special: bool) -> TokenSpec:
    return TokenSpec(
        content=spec.content,
        special=special,
        lstrip=spec.lstrip,
        rstrip=spec.rstrip,
        single_word=spec.single_word,
        normalized=spec.normalized,
    )


def _extra_tokens(value: object, where: Path) -> tuple[TokenSpec, ...]:
    if isinstance(value, dict):  # named extras, e.g. {"image_token": "<image>"}
        value = list(value.values())
    if not isinstance(value, list):
        return ()
    specs = (_token_spec(token, where) for token in value)
    return tuple(spec for spec in specs if spec is not None)


def _read_chat_templates(directory: Path, configured: object) -> dict[str, str]:
    """Files take precedence over the config: chat_template.jinja, then additional_chat_templates/*.jinja."""
    templates: dict[str, str] = {}
    main = directory / "chat_template.jinja"
    if main.is_file():
        templates["default"] = _read_template(main)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_template(path)
    if templates:
        return templates
    if configured is None:  # some multimodal checkpoints keep it in a file of its own
        configured = read_json_object(directory / "chat_template.json").get("chat_template")
    if isinstance(configured, str):
        return {"default": configured}
    if isinstance(configured, dict):
        return {str(name): text for name, text in configured.items() if isinstance(text, str)}
    if isinstance(configured, list):
        return {
            str(item["name"]): str(item["template"])
            for item in configured
            if isinstance(item, dict) and "name" in item and "template" in item
        }
    return {}


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text; download it again.") from error
    if len(text) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(f"{path} is longer than {MAX_TEMPLATE_CHARS} characters.")
    return text

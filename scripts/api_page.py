"""docs/api.md: every endpoint and every field of every request, from the OpenAPI document, the request
models and `SamplingParams`; and beside each, where vLLM 0.32 does something else.

A field's text is the docstring under it, in the class that declares it or else in `SamplingParams` or in one
of the classes that share fields: a name means the same everywhere.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quire.config import EngineConfig, LoRAConfig, ServerConfig
from quire.sampling_params import (
    PoolingParams,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from quire.server import unsupported
from quire.server.app import build_app
from quire.server.dialect_schemas import MessagesRequest, ResponsesRequest
from quire.server.openapi import MODELS
from quire.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
    StreamOptions,
    Strict,
)
from quire.server.sampling import FROM_MODEL
from quire.server.state import ServerState

OPTIONAL_ROUTES = ("enable_admin_endpoints", "enable_tokenizer_info_endpoint")
"""Options without which some endpoints do not exist."""

# What vLLM 0.32 does where it is not the same. Endpoints and fields absent here agree.
VLLM_ENDPOINTS = {
    "/ready": "no such endpoint",
    "/health": "no heartbeat: 200 as long as the engine's process lives",
    "/abort_requests": "only for a prefill instance",
    "/v1/responses": "stored only with `VLLM_ENABLE_RESPONSES_API_STORE`, without bound",
    "/v1/responses/input_tokens": "no such endpoint",
    "/v1/responses/{response_id}/input_items": "no such endpoint",
    "/load": "with `--enable-server-load-tracking`",
    "/debug/state": "no such endpoint",
    "/server_info": "with `VLLM_SERVER_DEV_MODE`",
    "/reset_prefix_cache": "with `VLLM_SERVER_DEV_MODE`",
    "/sleep": "with `VLLM_SERVER_DEV_MODE` and `--enable-sleep-mode`",
    "/wake_up": "with `VLLM_SERVER_DEV_MODE` and `--enable-sleep-mode`",
    "/v1/load_lora_adapter": "with `VLLM_ALLOW_RUNTIME_LORA_UPDATING`, from any path; a bad file is a 500",
    "/v1/unload_lora_adapter": "with `VLLM_ALLOW_RUNTIME_LORA_UPDATING`",
    "/debug/requests": "no such endpoint",
    "/debug/requests/{id}": "no such endpoint",
    "/debug/timeline": "no such endpoint",
    "/is_sleeping": "with `VLLM_SERVER_DEV_MODE` and `--enable-sleep-mode`",
}
VLLM_FIELDS = {
    "temperature": "values in (0, 0.01) likewise raised to 0.01",
    "max_tokens": "prompt + max_tokens beyond the context: shortened in silence; ours 400",
    "n": "at most `VLLM_MAX_N_SEQUENCES`; prompts are not counted",
    "best_of": "removed",
    "pooling": "fixed by the model",
    "return_effective_params": "no such field",
    "return_prefix_details": "no such field",
    "prompt_logprobs": "does not read the prefix cache",
    "request_id": "becomes part of the answer's id",
    "vllm_xargs": "read by plugins",
    "logit_bias": "refused with speculative decoding",
    "min_p": "refused with speculative decoding",
}
DEFAULTS = {"max_tokens": "16; chat: the rest of the context"}
"""Where HTTP's default is not that of `SamplingParams`."""

HEADER = """\
# Endpoints and parameters

Written by `scripts/gen_docs.py` from the routes, `src/quire/server/requests.py` and
`src/quire/sampling_params.py`; do not edit.

A field whose value asks for nothing is taken as absent: null, an empty string, list or object where the field
takes one, and values such as `top_logprobs` 0. A field that nothing knows, or that has no effect, is reported
in `warnings` in the answer and in the header `x-quire-warnings`; with `--strict-requests` it is a 400 that
names it. Errors have OpenAI's body, with the field at fault in `param`. `X-Request-Id` is echoed, or made.
The limits are [options](options.md). The last column says what vLLM 0.32 does where it is not the same.

With an admin listener (`--admin-port`, `--admin-uds`), endpoints that need `--enable-admin-endpoints` are
there, and not at the API's.

Besides what is below, `/` is the playground, `/dashboard` the [dashboard](dashboard.md), and `/docs` and
`/openapi.json` describe the endpoints to programs.
"""

SAMPLING = tuple(
    cls for cls in reversed(SamplingFields.__mro__) if issubclass(cls, Strict) and cls is not Strict
)
"""The classes whose fields `SamplingParams` explains, the most general first."""
HOW = {
    SAMPLING[0]: "Each is a field of `SamplingParams` too, unless it is about the answer's form. "
    f"Defaults of {', '.join(f'`{name}`' for name in FROM_MODEL)} are the model's own "
    "(generation_config.json) where it has them.",
}


def render() -> str:
    """The whole page."""
    document = _openapi()
    used = _endpoints_of_models(document)
    sections = [HEADER, _endpoints(document)]
    for cls in _declaring(list(MODELS)):
        where = sorted({path for model in MODELS if issubclass(model, cls) for path in used[model]})
        sections.append(_fields(cls, f"For {', '.join(f'`{path}`' for path in where)}."))
    sections += [_struct(StructuredOutputsParams), _struct(RepetitionDetectionParams)]
    sections += [_fields(StreamOptions, "In `stream_options`."), _refused()]
    return "\n".join(sections)


def problems() -> list[str]:
    """Leftovers in this file's tables, and fields that nothing explains."""
    fields = {name for model in MODELS for name in model.model_fields}
    unknown = (set(VLLM_FIELDS) - fields) | (set(VLLM_ENDPOINTS) - set(_openapi()["paths"]))
    return [
        f"scripts/api_page.py names {name}, which does not exist" for name in sorted(unknown)
    ] + [
        f"{cls.__name__}.{name} has no docstring"
        for cls in (*_declaring(list(MODELS)), StreamOptions)
        for name in _own(cls)
        if not _text(cls, name)
    ]


def _openapi(**options: bool) -> dict[str, Any]:
    config = replace(ServerConfig(), **(options or dict.fromkeys(OPTIONAL_ROUTES, True)))
    engine = EngineConfig(lora=LoRAConfig(enable_lora=True))
    return build_app(ServerState(config, engine)).openapi()


def _endpoints(document: Mapping[str, Any]) -> str:
    always = _openapi(**dict.fromkeys(OPTIONAL_ROUTES, False))["paths"]
    needs = {
        path: option
        for option in OPTIONAL_ROUTES
        for path in _openapi(**{option: True})["paths"]
        if path not in always
    }
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = " ".join(operation.get("description", "").split())
            if path in needs:
                text += f" With `--{needs[path].replace('_', '-')}`."
            rows.append((f"`{method.upper()} {path}`", text, VLLM_ENDPOINTS.get(path, "same")))
    return _table("Endpoints", "", ("Endpoint", "What", "vLLM 0.32"), rows)


def _endpoints_of_models(document: Mapping[str, Any]) -> dict[type[BaseModel], list[str]]:
    by_name = {model.__name__: model for model in MODELS}
    used: dict[type[BaseModel], list[str]] = {model: [] for model in MODELS}
    for path, methods in document["paths"].items():
        schema = str(methods.get("post", {}).get("requestBody", {}))
        for name, model in by_name.items():
            if f"/{name}'" in schema:
                used[model].append(path)
    return used


def _declaring(models: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """The classes that declare fields of `models`, those with the most endpoints first."""
    found: dict[type[BaseModel], None] = {}
    for model in models:
        for cls in reversed(model.__mro__):
            if issubclass(cls, Strict) and _own(cls):
                found.setdefault(cls)
    return list(found)


def _own(cls: type[BaseModel]) -> dict[str, FieldInfo]:
    return {name: f for name, f in cls.model_fields.items() if name in cls.__annotations__}


def _fields(cls: type[BaseModel], where: str) -> str:
    properties = cls.model_json_schema(ref_template="{model}").get("properties", {})
    rows = []
    for name, info in _own(cls).items():
        text, default = _text(cls, name), "–"
        if info.is_required():
            default = "required"
        elif cls in SAMPLING and name in SamplingParams.__struct_fields__:
            default = DEFAULTS.get(name) or _default(getattr(SamplingParams(), name))
        vllm = "no such field" if text.endswith("Not in vLLM.") else VLLM_FIELDS.get(name, "same")
        rows.append((f"`{name}`", _type(properties[name]), default, text, vllm))
    head = ("Field", "Type", "Default", "Meaning", "vLLM 0.32")
    return _table(_title(cls), " ".join([where, HOW.get(cls, "")]).strip(), head, rows)


def _struct(cls: type[StructuredOutputsParams] | type[RepetitionDetectionParams]) -> str:
    texts = _docstrings(cls)
    annotations = {node.target.id: ast.unparse(node.annotation) for node in _assignments(cls)}
    rows = [
        (f"`{name}`", annotations[name].removesuffix(" | None"), texts.get(name, ""))
        for name in cls.__struct_fields__
    ]
    return _table(_title(cls), (cls.__doc__ or "").strip(), ("Field", "Type", "Meaning"), rows)


def _refused() -> str:
    refused: dict[str, list[str]] = {}
    for kind, table, model in (
        ("completions", unsupported.COMPLETION, CompletionRequest),
        ("chat", unsupported.CHAT, ChatCompletionRequest),
        ("responses", unsupported.RESPONSES, ResponsesRequest),
        ("messages", unsupported.MESSAGES, MessagesRequest),
    ):
        for name in table.keys() - model.model_fields.keys():
            refused.setdefault(name, []).append(kind)
    usual = "ignoring it would change the answer."
    rows = [
        (f"`{name}`", ", ".join(kinds), unsupported.WHY.get(name, usual))
        for name, kinds in sorted(refused.items())
    ]
    silent = ", ".join(f"`{name}`" for name in sorted(unsupported.NO_EFFECT))
    warned = ", ".join(f"`{name}`" for name in sorted(unsupported.UNREAD))
    text = (
        "A 400 that names the field, unless its value is the neutral one. "
        "vLLM ignores what it does not know.\n\n"
        f"Taken without effect and without a word: {silent}. With a warning: {warned}."
    )
    return _table("Refused", text, ("Field", "In", "Why"), rows)


def _table(title: str, text: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"## {title}", ""] + ([text, ""] if text else [])
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([*lines, ""])


def _title(cls: type) -> str:
    """ "StreamOptions" -> "Stream options"."""
    words = "".join(f" {c.lower()}" if c.isupper() else c for c in cls.__name__).split()
    return " ".join(word for word in words if word != "params").capitalize()


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        kinds = [_type(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    most = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
    return str(schema.get("type", "object")) + most


def _default(value: object) -> str:
    if value is None:
        return "–"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _text(cls: type, name: str) -> str:
    """The field's own docstring, or that of a shared field of the same name."""
    for source in (cls, *SAMPLING, SamplingParams, PoolingParams):
        text = _docstrings(source).get(name)
        if text:
            return text
    return ""


def _docstrings(cls: type) -> dict[str, str]:
    """Field -> the string under it, on one line."""
    body = _class_body(cls)
    return {
        node.target.id: " ".join(ast.literal_eval(after.value).split())
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def _assignments(cls: type) -> Iterator[Any]:
    return (node for node in _class_body(cls) if isinstance(node, ast.AnnAssign))


def _class_body(cls: type) -> list[ast.stmt]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    assert isinstance(tree.body[0], ast.ClassDef)
    return tree.body[0].body

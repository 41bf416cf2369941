"""Rules about the package's source. The list of forbidden calls is in `scripts/check_source.py`."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import quire

PACKAGE = Path(quire.__file__).parent
OUTSIDE = ("server", "text", "structured", "weights", "config", "messages", "kvtransfer", "distributed",
           "cli",
           "sampling_params.py", "placement.py", "decoding.py", "limits.py", "engine/input_processor.py",
           "engine/adapters.py", "engine/async_adapters.py", "models/fields.py", "quantization")  # fmt: skip
"""Where what others wrote is read: requests, files of models, peers, options."""


def modules(*under: str) -> Iterator[tuple[str, ast.Module]]:
    for name in under or (".",):
        root = PACKAGE / name
        for path in sorted(root.rglob("*.py") if root.is_dir() else [root]):
            yield str(path.relative_to(PACKAGE)), parsed(path)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(*wanted: str) -> set[str]:
    return {
        name for name, tree in modules()
        if any(i == w or i.startswith(w + ".") for i in imports(tree) for w in wanted)
    }  # fmt: skip


# --- assert is no check -------------------------------------------------------------------------------


INVARIANTS = {
    "cli/quantize/write.py": 2,  # what it has just computed itself
    "distributed/links.py": 1,
    "quantization/unquantized.py": 1,
    "quantization/rounding.py": 1,
}
"""Asserts of other forms in these folders: about what the package itself has computed, not about input."""


def narrows(test: ast.expr) -> bool:
    """Whether it only tells the type checker what is known: `x is not None`, `isinstance(x, T)`."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(map(narrows, test.values))
    if isinstance(test, ast.Compare):
        last = test.comparators[-1]
        return isinstance(test.ops[-1], ast.Is | ast.IsNot) and (
            (isinstance(last, ast.Constant) and last.value is None)
            or isinstance(last, ast.Attribute)
        )
    return isinstance(test, ast.Call) and getattr(test.func, "id", "") == "isinstance"


def test_no_assert_guards_input():
    """`python -O` removes them (CVE-2026-41523). Where input is read, an assert may only narrow a type, and
    what it says has been checked before by code that raises; CI runs tests/security under -O too."""
    found = Counter(
        name for name, tree in modules(*OUTSIDE) for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and not narrows(node.test)
    )  # fmt: skip
    assert found == INVARIANTS


def test_narrowing_is_told_from_checking():
    def test_of(text: str) -> ast.expr:
        return ast.parse(f"assert {text}").body[0].test

    for text in ("x is not None", "isinstance(x, str)", "a is not None and b is not None"):
        assert narrows(test_of(text)), text
    for text in (
        "x",
        "not x",
        "x > 0",
        "len(x) == 2",
        "x is not None and x > 0",
        "x in (1, 2)",
        "f(x)",
    ):
        assert not narrows(test_of(text)), text


# --- what may reach the network, and listen ------------------------------------------------------------


def test_only_these_modules_connect():
    """A new one is a way out of the machine: say here what decides where it connects."""
    assert importers("huggingface_hub") <= {"weights/resolve.py", "cli/collect_env.py"}
    assert importers("urllib.request", "http.client", "requests", "httpx", "aiohttp", "ftplib") == {
        "bench/startup.py",  # the server that it has started
        "server/otlp.py",  # --otlp-traces-endpoint
    }
    connecting = {
        name for name, tree in modules() for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("open_connection", "create_connection", "connect_ex", "sock_connect")
    }  # fmt: skip
    assert connecting <= {
        "server/upstream.py",  # the proxy's configured instances
        "kvtransfer/peer_client.py",  # configured peers
        "distributed/link_channel.py", "distributed/hello.py",  # --master-addr, and what it names
        "bench/client.py", "bench/startup.py",  # the load client's --base-url
        "bench/chaos/wire.py",  # the server that it has started
        "cli/http.py", "server/process.py",  # our own server; a socket file that may be stale
    }, connecting  # fmt: skip


def test_only_the_api_listens_beyond_this_machine_by_default():
    """XPUB sockets on all interfaces were CVE-2025-30202."""
    found = {
        name for name, tree in modules() for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 40
        and (node.value in ("0.0.0.0", "::", "*") or "://*" in node.value or "://0.0.0.0" in node.value)
    }  # fmt: skip
    assert found <= {
        "server/process.py",  # the API, with a warning: test_exposure.py
        "config/kv_transfer.py", "config/kv_events.py", "engine/kv_events.py",  # compared, never bound to
    } | COMPARED, found  # fmt: skip


COMPARED = {
    "config/server.py", "text/gguf_tokenizer.py", "text/jinja_fallback.py", "cli/explain.py",
}  # fmt: skip
"""Where such a text has another meaning: CORS, a kind of token, an operator of Jinja, a number of words."""


# --- expressions on what others wrote --------------------------------------------------------------------


MATCHED = {
    "server/auth.py": "a Host header, at most 64 KiB: digits at its end",
    "server/billing_header.py": "a system text: every character has one way to be read",
    "server/pd_upstreams.py": "/metrics of a configured instance",
    "server/tracing.py": "a traceparent: fixed lengths, then one repeat of any character",
    "server/retention.py": "anchored, at most 8 characters",
    "server/playground/__init__.py": "our own page",
    "text/chat_template.py": "a template of at most 1 MiB; bounded repeats",
    "text/template_engine.py": "a template; bounded repeats",
    "text/template_rewrites.py": "fixed length",
    "text/template_facts.py": "what a template made of our own probes",
    "structured/schema.py": "a name, one class of characters",
    "structured/schema_logic.py": "escapes texts",
}


def test_no_new_regular_expression_on_requests_or_what_models_say():
    """Python's `re` backtracks. What clients and models write is read by scanners of linear time; expressions
    of clients are compiled by llguidance, which does not backtrack, in a process that can be killed."""
    using = {
        name for name, tree in modules("server", "text", "structured") if "re" in imports(tree)
    }
    assert using == MATCHED.keys()


@pytest.mark.parametrize(
    "unit", [";", " ", "\t ;", "a;", "\n", "x-anthropic-billing-header:", "a; \n"]
)
def test_the_expression_for_billing_headers_does_not_backtrack(unit):
    """It would take hours with 20,000 repeats, so the test's time limit is the assertion."""
    from quire.server.billing_header import NAME, without_header

    for end in ("", "\x00", " b c"):
        without_header(NAME + " a" + unit * 20_000 + end)


# --- files of models ----------------------------------------------------------------------------------------


def test_code_is_imported_from_tables_of_our_own_only():
    """`import_module` with a name from a model's directory or a request would run code of theirs."""
    calling = {
        name for name, tree in modules() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2]
        in ("import_module", "__import__", "spec_from_file_location", "run_path", "run_module")
    }  # fmt: skip
    assert calling <= {
        "__init__.py", "metrics/__init__.py", "cli/main.py", "cli/bench.py", "bench/datasets/base.py",
        "quantization/__init__.py", "weights/source.py", "models/registry.py", "distributed/create.py",
        "speculative/create.py", "executor/create.py",
        "executor/ray.py",  # the module is named by our own caller, in a message of Ray's
    }, calling  # fmt: skip

"""Try our grammars on the JSON Schema Test Suite: `python scripts/json_schema_suite.py DIR`, where DIR is a
clone of https://github.com/json-schema-org/JSON-Schema-Test-Suite.

A schema may be refused. One that is not must accept every valid instance in some order of its properties,
and no invalid one. Prints the disagreements, and counts per file and draft.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quire.errors import InvalidParameterError
from quire.sampling_params import StructuredOutputsParams
from quire.structured.guidance import GuidanceCompiler
from quire.structured.spec import to_spec

MAX_SPELLINGS = 2000
OPTIONAL = ("bignum", "format", "ecmascript-regex", "float-overflow", "unicode")


class Bytes:
    """A vocabulary of single bytes."""

    special_ids = frozenset({256})
    max_token_id = 256

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<end>"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def spellings(value: Any) -> Iterator[str]:
    """The value in compact JSON, in every order of its properties."""
    if isinstance(value, dict):
        parts = [
            [f"{json.dumps(n, ensure_ascii=False)}:{t}" for t in spellings(v)]
            for n, v in value.items()
        ]
        for chosen in itertools.product(*parts):
            for order in itertools.permutations(chosen):
                yield "{" + ",".join(order) + "}"
    elif isinstance(value, list):
        for chosen in itertools.product(*map(list, map(spellings, value))):
            yield "[" + ",".join(chosen) + "]"
    elif isinstance(value, float) and value == int(value):
        yield str(int(value))
    else:
        yield json.dumps(value, ensure_ascii=False)


def accepts(compiler: GuidanceCompiler, grammar: Any, value: Any) -> bool:
    for text in itertools.islice(spellings(value), MAX_SPELLINGS):
        matcher = grammar.matcher()
        if all(matcher.accept(byte) for byte in text.encode()) and matcher.accept(256):
            return True
    return False


def files(root: Path, draft: str) -> list[Path]:
    folder = root / "tests" / draft
    optional = [path for path in (folder / "optional").rglob("*.json")
                if any(name in str(path.relative_to(folder)) for name in OPTIONAL)]  # fmt: skip
    return sorted(folder.glob("*.json")) + sorted(optional)


def run(root: Path, draft: str, verbose: bool) -> Counter[str]:
    compiler = GuidanceCompiler(Bytes(), vocab_size=257, eos_token_ids=[256])
    total: Counter[str] = Counter()
    for path in files(root, draft):
        name = str(path.relative_to(root / "tests" / draft)).removesuffix(".json")
        counts: Counter[str] = Counter()
        for group in json.loads(path.read_text()):
            schema = (
                group["schema"]
                if isinstance(group["schema"], dict)
                else {"allOf": [group["schema"]]}
            )
            counts["schemas"] += 1
            try:
                grammar = compiler.compile(
                    to_spec(StructuredOutputsParams(json=schema or {"allOf": []}))
                )
            except InvalidParameterError as error:
                counts["refused"] += 1
                if verbose:
                    print(f"  {name}: {group['description']}: {str(error)[:160]}")
                continue
            for test in group["tests"]:
                counts["instances"] += 1
                fits = accepts(compiler, grammar, test["data"])
                if fits != test["valid"]:
                    kind = "invalid accepted" if fits else "valid rejected"
                    counts[kind] += 1
                    shown = json.dumps([group["schema"], test["data"]], ensure_ascii=False)
                    case = f"{group['description']} / {test['description']}"
                    print(f"{draft} {kind}: {name}: {case}: {shown[:400]}")
        print(f"{draft:14} {name:32} {dict(counts)}")
        total += counts
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--drafts", nargs="+", default=["draft2020-12", "draft7", "draft4"])
    parser.add_argument("--verbose", action="store_true", help="say why schemas are refused")
    args = parser.parse_args()
    totals = {draft: run(args.suite, draft, args.verbose) for draft in args.drafts}
    for draft, total in totals.items():
        print(f"{draft:14} {dict(total)}")
    return any(total["invalid accepted"] for total in totals.values())


if __name__ == "__main__":
    sys.exit(main())

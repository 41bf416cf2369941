"""The training text: which files it comes from, under which licence, and how it is mixed.

Only what is on the machine with Python and Quire's own dependencies, and what `chat.py` makes up.
Every file read is listed with its SHA-256 in `out/sources.json`.
"""

import ast
import hashlib
import importlib.util
import inspect
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from training import chat, stdlib
from training.words import Message

PIECE_CHARS = 1400
MAX_CHARS_PER_SOURCE = 1_500_000
PACKAGES: dict[str, str] = {
    "numpy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "click": "BSD-3-Clause",
    "starlette": "BSD-3-Clause",
    "httpx": "BSD-3-Clause",
    "fastapi": "MIT",
    "pydantic": "MIT",
    "rich": "MIT",
    "huggingface_hub": "Apache-2.0",
}
STDLIB_LICENCE = "PSF-2.0"
# Parts of the standard library's folder that are tests, or under another notice.
SKIP = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "site-packages",
    "turtledemo",
    "ensurepip",
    "_vendor",
    "_pyrepl",
    "vendored",
    "third_party",
}


@dataclass(slots=True)
class Source:
    """Prose of one origin, in pieces of about `PIECE_CHARS`."""

    name: str
    licence: str
    pieces: list[str]
    files: dict[str, str] = field(default_factory=dict)  # path below its root -> SHA-256


@dataclass(slots=True)
class Corpus:
    """Everything that the tokenizer and the models are trained on, before tokenizing."""

    table: list[stdlib.Entry]
    faq: list[chat.FaqItem]
    generators: chat.Generators
    sources: list[Source]

    def split_prose(self) -> tuple[list[str], dict[str, list[str]]]:
        """Training pieces, and about 2 % held out by hash, per source."""
        train: list[str] = []
        held: dict[str, list[str]] = {}
        for source in self.sources:
            for piece in source.pieces:
                if hashlib.sha256(piece.encode()).digest()[0] < 5:
                    held.setdefault(source.name, []).append(piece)
                else:
                    train.append(piece)
        return train, held


def clean(doc: str) -> str:
    """Prose paragraphs of a docstring, without doctests, tables, markup and directives."""
    out = []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        text = re.sub(r":[a-z]+:`~?([^`<]*)`", r"\1", paragraph).replace("``", "").replace("`", "")
        text = " ".join(text.split())
        letters = sum(c.isalpha() or c == " " for c in text)
        wordy = len(text) >= 40 and letters >= 0.82 * len(text) and text[-1] in ".:!?"
        if wordy and ">>>" not in text and ".. " not in text and "GPL" not in text:
            out.append(text)
    return "\n\n".join(out)


def _pieces(texts: Iterator[str]) -> list[str]:
    """Join paragraphs into pieces, each paragraph once over the whole source."""
    seen: set[str] = set()
    pieces: list[str] = []
    for text in texts:
        piece = ""
        for paragraph in text.split("\n\n"):
            if not paragraph or paragraph in seen:
                continue
            seen.add(paragraph)
            if piece and len(piece) + len(paragraph) > PIECE_CHARS:
                pieces.append(piece)
                piece = ""
            piece += ("\n\n" if piece else "") + paragraph
        if len(piece) >= 80:
            pieces.append(piece)
    return pieces


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = clean(ast.get_docstring(node) or "")
            if text:
                yield text


def read_folder(name: str, root: Path, licence: str) -> Source:
    """The docstrings below a folder, parsed and never imported."""
    files: dict[str, str] = {}
    seen_chars = 0

    def texts() -> Iterator[str]:
        nonlocal seen_chars
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIP & set(relative.parts) or seen_chars > MAX_CHARS_PER_SOURCE:
                continue
            before = seen_chars
            for text in _docstrings(path):
                seen_chars += len(text)
                yield text
            if seen_chars > before:
                files[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest()

    pieces = _pieces(texts())
    return Source(name, licence, pieces, files)


def read_topics() -> Source:
    """The language reference as `help()` knows it."""
    texts = (clean(text) for _, text in sorted(pydoc_data.topics.topics.items()))
    path = Path(pydoc_data.topics.__file__)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source("python-topics", STDLIB_LICENCE, _pieces(texts), {"pydoc_data/topics.py": digest})


def read_sources() -> list[Source]:
    sources = [
        read_topics(),
        read_folder("python-stdlib", Path(sysconfig.get_path("stdlib")), STDLIB_LICENCE),
    ]
    for package, licence in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            root = Path(next(iter(spec.submodule_search_locations)))
            sources.append(read_folder(package, root, licence))
    return sources


def build_corpus() -> Corpus:
    table = stdlib.build_table()
    faq = chat.read_faq()
    unlisted = stdlib.unlisted_names({e.name for e in table})
    return Corpus(table, faq, chat.Generators(table, faq, unlisted), read_sources())


def render(messages: list[Message], *, generate: bool = False) -> str:
    """Messages as ChatML; a test holds this equal to the chat template."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" if generate else text


def conversations(generators: chat.Generators, *, count: int, seed: int) -> Iterator[list[Message]]:
    rng = Random(seed)
    for _ in range(count):
        yield generators.conversation(rng)

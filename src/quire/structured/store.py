"""Placeholder until helper S's lands."""

from __future__ import annotations

from quire.messages import GrammarSpec
from quire.structured.base import Grammar, GrammarError


class GrammarStore:
    def prepare(self, spec: GrammarSpec) -> None: ...

    def ready(self, spec: GrammarSpec) -> Grammar | GrammarError | None: ...

    def wait(self, seconds: float) -> None: ...

    def grammar(self, spec: GrammarSpec) -> Grammar: ...

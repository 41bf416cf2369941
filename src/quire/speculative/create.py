"""Drafters by the name of their method. A new one is a file with `create(context)` and a line here."""

from __future__ import annotations

import importlib

from quire.speculative.base import DraftContext, Drafter

DRAFTERS: dict[str, str] = {
    "draft_model": "quire.speculative.draft_model",
    "eagle": "quire.speculative.heads",
    "eagle3": "quire.speculative.heads",
    "mtp": "quire.speculative.heads",
    "ngram": "quire.speculative.ngram",
    "suffix": "quire.speculative.suffix",
}
"""Method -> module."""


def create_drafter(context: DraftContext) -> Drafter:
    """Loads the drafter's model if it has one. Raises `ConfigError`, or `CheckpointError` as models do."""
    module = importlib.import_module(DRAFTERS[context.options.method])
    drafter: Drafter = module.create(context)
    return drafter

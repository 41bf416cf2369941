"""The engine's tiny checkpoints."""

from tests.engine.conftest import servable

__all__ = ["servable"]

"""The engine's tiny checkpoints, and loads that always pay."""

from tests.engine.conftest import loads_pay, servable

__all__ = ["loads_pay", "servable"]

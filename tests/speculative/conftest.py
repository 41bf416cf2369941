from tests.engine.conftest import servable

__all__ = ["servable"]

"""The fixtures of tests/server: the app in this process, over a scripted engine."""

from tests.server.conftest import client, engine, make_client

__all__ = ["client", "engine", "make_client"]

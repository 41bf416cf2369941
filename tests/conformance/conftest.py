from tests.server.conftest import client, engine, make_client

__all__ = ["client", "engine", "make_client"]

"""Keys are compared by digest, and no object that outlives the start holds one."""

from __future__ import annotations

import ast
import inspect

from quire.server import auth, keys
from quire.server.keys import Keys, key_digest


def test_keys_are_looked_up_by_digest():
    made = Keys(["sekret-one", "sekret-two"])
    assert made.find(b"sekret-two") is not None and made.find(b"sekret-tw") is None
    assert key_digest(b"sekret-one") in made._keys
    assert "sekret" not in repr(_contents(made))


def _contents(value: object, depth: int = 6) -> object:
    if depth and hasattr(value, "__dict__"):
        return {name: _contents(part, depth - 1) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return [(repr(key), _contents(part, depth - 1)) for key, part in value.items()]
    return repr(value)


def test_no_key_is_compared_with_equals():
    """A comparison of texts ends at the first difference, and its time says where that is."""
    for module in (auth, keys):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                text = ast.unparse(node)
                assert "token" not in text or "len(" in text, text
                assert ".find(" not in text, text

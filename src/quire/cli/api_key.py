"""`quire api-key`: a new key, and the lines that --api-keys-file needs for it."""

from __future__ import annotations

import secrets
import sys

from quire.cli.parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire api-key",
        usage="quire api-key [flags] >> KEYS_FILE",
        description="Print a new API key (to stderr, once), and its entry for --api-keys-file, which has "
        "only a digest of it.",
    )
    parser.add_argument("--tenant", default="default", help="whose key it is (default: default)")
    parser.add_argument("--name", default="", help="a note for people")
    parser.add_argument("--expires", default="", help="like 2027-01-31")
    asked = parser.parse_strictly(argv)
    from quire.server.keys import entry_for

    key = "sk-" + secrets.token_urlsafe(32)
    entry = entry_for(key, tenant=asked.tenant, name=asked.name, expires=asked.expires)
    print(key, file=sys.stderr)
    print(entry, end="")
    return 0

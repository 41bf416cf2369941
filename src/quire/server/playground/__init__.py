"""GET /: a page to chat with the model, for whoever opens the server's address in a browser.

One static file that talks to the public API like any other client; the server keeps nothing for it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

PAGE = Path(__file__).with_name("index.html")


def playground_router() -> APIRouter:
    router = APIRouter()
    page = PAGE.read_bytes()
    headers = page_headers(page)

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def playground() -> Response:
        return Response(page, headers=headers)

    return router


def page_headers(page: bytes) -> dict[str, str]:
    return {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": content_security_policy(page.decode("utf-8")),
        "cache-control": "no-cache",
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def content_security_policy(page: str) -> str:
    """Only the page's own script and style run, and only this server is talked to.

    What a model says is hostile: it may quote a page that somebody else wrote. The page sets it as
    text, and `require-trusted-types-for` has the browser refuse a line of ours that would not.
    """
    scripts, styles = (
        " ".join(_source(block) for block in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S))
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _source(block: str) -> str:
    digest = hashlib.sha256(block.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

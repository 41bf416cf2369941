"""GET /dashboard: a page that shows what the engine does now, and GET /debug/state, where it looks.

They are served where the administrative routes are, since they show every tenant's requests (numbers and
names, never a text). A server without keys and without administrative routes serves them to this machine.
The page itself has no data, so it needs no key: it asks for the key and sends it with its own requests.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from quire.server.auth import DASHBOARD
from quire.server.dashboard.view import StateView
from quire.server.playground import page_headers
from quire.server.state import ServerState

FOLDER = Path(__file__).parent


def add_dashboard_routes(router: APIRouter, state: ServerState) -> None:
    view = StateView(state)
    page = assembled_page()
    headers = page_headers(page)

    @router.api_route(DASHBOARD, methods=["GET", "HEAD"], include_in_schema=False)
    async def dashboard() -> Response:
        return Response(page, headers=headers)

    @router.get("/debug/state")
    async def debug_state() -> Response:
        """Requests, why they wait, KV blocks, and the last minute, of each engine core: what /dashboard
        shows. The same for all who ask within a second. Where administrative routes are; without these and
        without keys, for programs on this machine."""
        return Response(
            await view.body(),
            media_type="application/json",
            headers={"cache-control": "no-store", "x-content-type-options": "nosniff"},
        )


def assembled_page() -> bytes:
    """The page in one piece, so that its policy can name its script and style by their hashes."""
    page = (FOLDER / "index.html").read_text("utf-8")
    for tag, name in (("style", "dashboard.css"), ("script", "dashboard.js")):
        text = (FOLDER / name).read_text("utf-8")
        page = page.replace(f"<{tag}></{tag}>", f"<{tag}>\n{text}</{tag}>")
    return page.encode("utf-8")

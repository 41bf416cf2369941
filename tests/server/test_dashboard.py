"""The page at /dashboard in a real Chromium, and what it asks for."""

from __future__ import annotations

import asyncio
import json
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
from browser import BrowserPage
from scripted_engine import FakeHealth, ScriptedEngine
from scripted_server import serving

from quire.config import ServerConfig
from quire.messages import EngineReady, RequestUpdate, SchedulerStats, StepOutputs
from quire.messages.state import (
    CELL_CACHED,
    CELL_SHARED,
    BlockMap,
    CoreState,
    RequestState,
    WaitState,
)
from quire.server.app import build_admin_app, build_app
from quire.server.dashboard.view import INTERVAL, MOST_SHARE, PATIENCE, StateView
from quire.server.state import ServerState

STATE = "/debug/state"
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"


class Inspected(ScriptedEngine):
    """Shows the states that a test gives it."""

    def __init__(self, *states: CoreState) -> None:
        super().__init__()
        self.states = list(states) or [core_state()]
        self.looks = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def inspect(self) -> list[CoreState]:
        self.looks += 1
        await self.may_answer.wait()
        return self.states


def running(request_id: int, **fields: Any) -> RequestState:
    fields = {
        "prompt_tokens": 40, "computed_tokens": 52, "output_tokens": 12, "max_tokens": 48,
        "blocks": 4, "shared_blocks": 2, "seconds": 3.5, "queued_seconds": 0.25, **fields,
    }  # fmt: skip
    base = {"request_id": request_id, "status": "running", "tenant": "default"}
    return RequestState(**{**base, **fields})


def waiting(request_id: int, reason: str, because_of: int | None = None, **more: Any):
    wait = WaitState(reason=reason, label="capacity", because_of=because_of, **more)
    return RequestState(
        request_id=request_id, status="waiting", tenant="research", prompt_tokens=500,
        max_tokens=16, seconds=1.5, queued_seconds=1.5, wait=wait,
    )  # fmt: skip


def core_state(
    *requests: RequestState, cells: list[int] | None = None, num_blocks: int = 0, **fields: Any
) -> CoreState:
    if cells is None:
        cells = [CELL_SHARED | 1, CELL_SHARED | 1, 1, 1, 2, 2, CELL_CACHED, CELL_CACHED, 0, 0]
    blocks = BlockMap(
        num_blocks=num_blocks or len(cells), block_size=16, num_free=4, num_cached=6,
        num_shared=2, cells=array("H", cells).tobytes(),
    )  # fmt: skip
    each = [r.status == "running" for r in requests]
    return CoreState(
        **{
            "cost_seconds": 1e-4,
            "num_running": sum(each),
            "num_waiting": len(each) - sum(each),
            "requests": list(requests),
            "blocks": blocks,
            **fields,
        }
    )


BUSY = core_state(
    running(17),
    running(18, prompt_tokens=900, computed_tokens=300, output_tokens=0, adapter="tuned@ab12"),
    waiting(19, "no sequence slot"),
    waiting(20, "behind one that does not fit", 19),
    waiting(21, "no free blocks", 17, needed=32, free=4),
    adapters=["tuned@ab12"],
)


# --- who may look -----------------------------------------------------------------------------------


def client_of(app: Any, *, address: str | None = "127.0.0.1", host: str = "localhost:8000"):
    async def with_address(scope, receive, send):
        await app({**scope, "client": None if address is None else (address, 5)}, receive, send)

    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=with_address), base_url="http://x", headers={"host": host}
    )


def state_of(engine: ScriptedEngine | None = None, **config: Any) -> ServerState:
    state = ServerState(replace(ServerConfig(), **config))
    if engine is not None:
        state.engine_loaded(engine)
    return state


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "localhost"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
async def test_without_keys_this_machine_may_look(host, address):
    client = client_of(build_app(state_of(Inspected())), address=address, host=host)
    for path in ("/dashboard", STATE):
        assert (await client.get(path)).status_code == 200, path


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("10.0.0.5", {}), (None, {}), ("", {}), ("::ffff:10.0.0.5", {}),
        ("127.0.0.1", {"host": "evil.example"}), ("127.0.0.1", {"origin": "http://localhost:8000"}),
        ("127.0.0.1", {"host": "[127.0.0.1"}), ("127.0.0.1", {"host": "[::1x"}),
        ("127.0.0.1", {"x-forwarded-for": "10.0.0.5"}), ("127.0.0.1", {"forwarded": "for=10.0.0.5"}),
        ("127.0.0.1", {"via": "1.1 proxy"}), ("127.0.0.1", {"x-real-ip": "10.0.0.5"}),
    ],
)  # fmt: skip
async def test_nobody_else_may(address, headers):
    client = client_of(build_app(state_of(Inspected())), address=address)
    for path in ("/dashboard", STATE):
        assert (await client.get(path, headers=headers)).status_code == 403, path
    assert (await client.get("/version", headers=headers)).status_code == 200


async def test_with_keys_or_a_listener_it_is_where_administrative_routes_are():
    keyed = client_of(build_app(state_of(Inspected()), api_keys=("k",)))
    bearer = {"authorization": "Bearer k"}
    assert (await keyed.get(STATE)).status_code == 401
    for path in ("/dashboard", STATE):
        assert (await keyed.get(path, headers=bearer)).status_code == 404, path
    state = state_of(Inspected(), admin_port=0)
    assert (await client_of(build_app(state)).get(STATE)).status_code == 404
    admin = client_of(build_admin_app(state, admin_keys=("adm",)))
    assert (await admin.get("/dashboard")).status_code == 200, "the page has no data"
    assert (await admin.get(STATE)).status_code == 401
    headers = {"authorization": "Bearer adm"}
    assert (await admin.get(STATE, headers=headers)).status_code == 200
    everyone = state_of(Inspected(), enable_admin_endpoints=True)
    far = client_of(build_app(everyone), address="10.0.0.5", host="server")
    assert (await far.get(STATE)).status_code == 200
    guarded = client_of(build_app(everyone, admin_keys=("adm",)))
    assert (await guarded.get(STATE)).status_code == 401
    assert (await guarded.get("/dashboard")).status_code == 200


async def test_the_pages_policy():
    got = await client_of(build_app(state_of(Inspected()))).get("/dashboard")
    policy = got.headers["content-security-policy"]
    for part in ("default-src 'none'", "connect-src 'self'", "require-trusted-types-for 'script'"):
        assert part in policy
    assert "unsafe" not in policy and policy.count("'sha256-") == 2
    assert got.text.count("<style>") == got.text.count("<script>") == 1
    assert "http://" not in got.text.replace("http://www.w3.org/2000/svg", "")


# --- what is shown ----------------------------------------------------------------------------------


async def test_those_who_watch_share_one_look():
    engine, now = Inspected(BUSY), [100.0]
    view = StateView(state_of(engine), clock=lambda: now[0])
    bodies = await asyncio.gather(*(view.body() for _ in range(5)))
    assert engine.looks == 1 and all(json.loads(body)["replicas"] for body in bodies)
    now[0] += INTERVAL / 2
    await view.body()
    assert engine.looks == 1
    now[0] += INTERVAL
    shown = json.loads(await view.body())
    assert engine.looks == 2 and shown["age_seconds"] == 0.0
    [replica] = shown["replicas"]
    assert [request["request_id"] for request in replica["core"]["requests"]] == [
        17,
        18,
        19,
        20,
        21,
    ]
    assert replica["state"] == "ok" and len(replica["seconds"]["steps"]) == 60
    assert replica["core"]["requests"][2]["wait"]["reason"] == "no sequence slot"


async def test_a_look_that_costs_much_is_rare():
    engine, now = Inspected(core_state(cost_seconds=0.02)), [100.0]
    view = StateView(state_of(engine), clock=lambda: now[0])
    await view.body()
    now[0] += 0.9 * 0.02 / MOST_SHARE
    await view.body()
    assert engine.looks == 1
    now[0] += 0.2 * 0.02 / MOST_SHARE
    await view.body()
    assert engine.looks == 2


async def test_a_core_that_is_silent_is_asked_once_and_its_last_state_shown(monkeypatch):
    monkeypatch.setattr("quire.server.dashboard.view.PATIENCE", 0.01)
    assert PATIENCE > 0.01
    engine, now = Inspected(BUSY), [100.0]
    view = StateView(state_of(engine), clock=lambda: now[0])
    await view.body()
    engine.may_answer.clear()
    for seconds in (10.0, 20.0):
        now[0] = 100.0 + seconds
        shown = json.loads(await view.body())
        assert shown["age_seconds"] == seconds and shown["replicas"][0]["core"] is not None
    assert engine.looks == 2
    engine.may_answer.set()
    now[0] += 5.0
    assert json.loads(await view.body())["age_seconds"] == 0.0


async def test_a_server_that_loads_and_one_whose_engine_has_died_say_so():
    shown = json.loads(await StateView(state_of()).body())
    assert (shown["phase"], shown["replicas"], shown["age_seconds"]) == ("loading", [], None)
    engine = Inspected()
    engine.die("core exited")
    shown = json.loads(await StateView(state_of(engine)).body())
    assert engine.looks == 0 and shown["engine"] == "core exited"
    plain = json.loads(await StateView(state_of(ScriptedEngine())).body())
    assert plain["replicas"][0]["core"] is None


async def test_steps_and_latencies_are_recorded():
    engine = Inspected()
    state = state_of(engine)
    engine.metrics.on_token_gap(0.5)
    engine.stats_listener(
        StepOutputs(
            updates=[RequestUpdate(request_id=1, new_token_ids=[3])],
            stats=SchedulerStats(step_tokens=1, num_running=1),
        )
    )
    shown = json.loads(await StateView(state).body())
    assert shown["latency_ms"]["itl"]["p50"] == 500.0
    assert sum(shown["replicas"][0]["seconds"]["output_tokens"]) == 1


# --- the page ---------------------------------------------------------------------------------------


class Page(BrowserPage):
    def open(self, server, **admin: str) -> None:
        self.url = server.url.rstrip("/") + "/"
        self.driver.get(self.url + "dashboard")

    def status(self) -> str:
        return self("#status").text

    def rows(self, where: str) -> list[str]:
        read = "node => node.innerText.replace(/\\s+/g, ' ').trim()"
        return self.js(f"return [...document.querySelectorAll('#{where} button')].map({read})")

    def table(self, table: str) -> list[list[str]]:
        read = "row => [...row.cells].map(cell => cell.textContent)"
        return self.js(f"return [...document.querySelectorAll('#{table} tbody tr')].map({read})")

    def figure(self, name: str) -> str:
        return self.js(
            "return [...document.querySelectorAll('#figures li')]"
            ".find(li => li.firstChild.textContent === arguments[0])?.children[1].textContent",
            name,
        )


@contextmanager
def showing(page: Page, engine: ScriptedEngine, **config: Any) -> Iterator[None]:
    """The page is left before the server ends, which it would complain of."""
    with serving(engine, **config) as server:
        page.open(server)
        yield
        page.driver.get("about:blank")


@pytest.fixture
def page(driver) -> Iterator[Page]:
    page = Page(driver)
    page.begin()
    yield page
    page.check()


def test_requests_blocks_and_reasons_are_shown(page):
    page.may_complain_of = "willReadFrequently"  # the test reads pixels
    engine = Inspected(BUSY)
    with showing(page, engine):
        page.until(lambda: len(page.rows("running")) == 2)
        assert page.status() == "tiny"
        first, second = page.rows("running")
        assert first == "r17 3.5 s 12 of at most 48 tokens, after 40 of prompt"
        assert second == "r18tuned 3.5 s prompt: 300 of 900 tokens computed"
        assert page.rows("queue") == [
            "r19research 1.5 s no sequence slot, prompt of 500 tokens",
            "r20research 1.5 s behind one that does not fit (r19), prompt of 500 tokens",
            "r21research 1.5 s no free blocks: needs 32 blocks, 4 free (r17), prompt of 500 tokens",
        ]
        assert (page.figure("Running"), page.figure("Waiting")) == ("2", "3")
        assert page.figure("KV in use") == "60"
        label = page("#blocks").get_attribute("aria-label")
        assert label == (
            "Map of 10 blocks: 4 of one request, 2 shared, 2 free, cached, 2 free, empty"
        )
        assert page.table("tenants") == [["default", "2", "0", "–"], ["research", "0", "3", "–"]]
        assert page.table("adapters") == [["tuned", "1", "0", "yes"]]
        assert not page("#tiers-section").is_displayed()
        colours = page.js(
            "const c = document.getElementById('blocks'), x = c.getContext('2d'), s = devicePixelRatio;"
            "return [2, 4, 6, 8].map(i => [...x.getImageData("
            "((i % grid.perRow) + .5) * grid.size * s, .5 * grid.size * s, 1, 1).data].join())"
        )
        assert len(set(colours)) == 4, "two requests, cached, empty"
        engine.states = [core_state(running(17, output_tokens=30))]
        page.until(lambda: page.rows("queue") == [] and "30 of" in page.rows("running")[0])
        assert page("#queue-none").is_displayed()


def test_a_request_is_explained_when_it_is_clicked(page):
    page.may_complain_of = "404"
    engine = Inspected(BUSY)
    with showing(page, engine):
        page.until(lambda: page.rows("queue"))
        page.all("#queue button")[2].click()
        assert page("#detail").is_displayed() and page("#detail-title").text == "Request r21"
        assert page("#detail-state").text.startswith("Waiting: no free blocks: needs 32 blocks")
        facts = page("#facts").text
        assert "research" in facts and "500 tokens" in facts
        assert not page("#why").is_displayed(), "this engine has no record"
        page("#close").click()
        assert not page("#detail").is_displayed()
        page.js(
            "const real = window.fetch; window.fetch = (url, options) =>"
            " String(url).includes('debug/requests/r17') ? Promise.resolve(new Response("
            "JSON.stringify({requests: [{id: 'r3', explanation: ['Of another.']},"
            " {id: 'r17', explanation: ['It waited.', '<b>Then</b> it ran.']}]})))"
            " : real(url, options)"
        )
        page.all("#running button")[0].click()
        page.until(lambda: page("#why").is_displayed())
        assert page("#why").text.splitlines() == ["It waited.", "<b>Then</b> it ran."]
        engine.states = [core_state()]
        page.until(lambda: page("#detail-state").text == "It has ended.")
        assert "12 of at most 48" in page("#facts").text


def test_it_is_used_by_keyboard(page):
    from selenium.webdriver import ActionChains

    page.may_complain_of = "404"

    def press(*keys: str) -> str:
        ActionChains(page.driver).send_keys(*keys).perform()
        return page.js("return document.activeElement.innerText.split(/\\s/)[0]")

    with showing(page, Inspected(BUSY)):
        page.until(lambda: page.rows("queue"))
        reached = [press(TAB) for _ in range(8)]
        for wanted in ("Pause", "r17", "r18", "r19", "r20", "r21"):
            assert any(each.startswith(wanted) for each in reached), reached
        page.js("document.querySelector('#queue button').focus()")
        press(ENTER)
        assert page("#detail").is_displayed()
        assert page("#detail-title").text == "Request r19"
        assert press(ESCAPE).startswith("r19"), "the focus is where it was"
        assert not page("#detail").is_displayed()


NAMED = {"button", "textbox", "combobox", "image", "img", "table", "list", "region", "dialog"}
UNNAMED_LISTS = 5
"""Of requests (their section has the name), and the legends of charts."""


def test_everything_has_an_accessible_name(page):
    page.may_complain_of = "404"
    with showing(page, Inspected(BUSY)):
        page.until(lambda: page.rows("queue"))
        for dialog in (False, True):
            if dialog:
                page("#queue button").click()
            nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
            found = [
                (node["role"]["value"], node.get("name", {}).get("value", ""))
                for node in nodes
                if not node["ignored"] and node["role"]["value"] in NAMED - {"list", "table"}
            ]
            assert {"button"} < {role for role, _ in found}
            assert [role for role, name in found if not name.strip()] == []


def lightness(page: Page, selector: str, what: str) -> float:
    return page.js(
        "const of = getComputedStyle(document.querySelector(arguments[0]))[arguments[1]];"
        "const [r, g, b] = of.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .03928 ?"
        " v / 12.92 : ((v + .055) / 1.055) ** 2.4);"
        "return .2126 * r + .7152 * g + .0722 * b",
        selector,
        what,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(page, scheme):
    media = {"prefers_color_scheme": scheme, "prefers_reduced_motion": "reduce"}
    with page.emulating(**media), showing(page, Inspected(BUSY)):
        page.until(lambda: page.rows("queue"))
        back = lightness(page, "section", "backgroundColor")
        assert (back > 0.5) == (scheme == "light")
        for selector in ("h2", "h2 small", ".note", "#queue b", "#queue .text", "#running .time"):
            text = lightness(page, selector, "color")
            assert (max(back, text) + 0.05) / (min(back, text) + 0.05) >= 4.5, selector
        assert page.js("return getComputedStyle(document.querySelector('.bar i')).transition") in (
            "none", "none 0s ease 0s", "none 0s",
        )  # fmt: skip


@pytest.mark.parametrize("width", [390, 320])
def test_on_a_phone_nothing_is_wider_than_the_screen(page, width):
    page.may_complain_of = "404"
    long = waiting(31, "no free blocks", 17, needed=32, free=4)
    long = msgspec.structs.replace(long, tenant="a-tenant-with-a-name-of-many-words-" * 4)
    state = core_state(*BUSY.requests, long, cells=[1, CELL_CACHED] * 4000)
    with page.emulating(width=width), showing(page, Inspected(state)):
        page.until(lambda: len(page.rows("queue")) == 4)
        fits = "return document.documentElement.scrollWidth <= innerWidth"
        assert page.js(fits)
        assert page.js("const c = document.getElementById('blocks'); return c.clientWidth > 250")
        sections = (
            "return [...document.querySelectorAll('main > section')].filter(s => s.clientWidth)"
        )
        assert page.js(f"{sections}.every(s => s.clientWidth > innerWidth - 40)"), (
            "one below another"
        )
        page.all("#queue button")[3].click()
        assert page.js(fits)
        assert page.js("return document.getElementById('detail').scrollWidth <= innerWidth")


def test_it_asks_only_while_it_is_seen(page):
    engine = Inspected(BUSY)
    with showing(page, engine):
        page.until(lambda: engine.looks >= 2)
        hide = (
            "Object.defineProperty(document, 'hidden', {get: () => arguments[0], configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange')); return [timer, asking]"
        )
        page.js(hide.replace("arguments[0]", "true"))
        page.until(lambda: not page.js("return asking"))
        asked = page.js("window.asked = 0; const real = fetch; window.fetch = (...all) => {"
                        " window.asked++; return real(...all); }; return window.asked")  # fmt: skip
        page.js("return new Promise(done => setTimeout(done, 1500))")
        assert page.js("return window.asked") == asked == 0
        page.js(hide.replace("arguments[0]", "false"))
        page.until(lambda: page.js("return window.asked") >= 2)
        page("#pause").click()
        assert page("#pause").text == "Continue"
        assert page("#pause").get_attribute("aria-pressed") == "true"
        page.until(lambda: not page.js("return asking"))
        before = page.js("return window.asked")
        page.js("return new Promise(done => setTimeout(done, 1500))")
        assert page.js("return window.asked") == before
        page("#pause").click()
        page.until(lambda: page.js("return window.asked") > before)


def test_an_admin_key_is_asked_for_and_kept_in_the_tab(page):
    page.may_complain_of = "401"
    with showing(page, Inspected(BUSY), enable_admin_endpoints=True, admin_api_key=("sekret",)):
        page.until(lambda: page("#key").is_displayed())
        for key in ("wrong", "sekret"):
            page.until(lambda: page("#key").is_displayed())
            page("#secret").send_keys(key, ENTER)
        page.until(lambda: len(page.rows("running")) == 2)
        assert not page("#key").is_displayed()
        assert page.js("return [localStorage.length, document.cookie]") == [0, ""]
        page.js("sessionStorage.clear()")


def test_replicas_are_chosen_and_one_that_restarts_is_named(page):
    one, two = core_state(running(1)), core_state(running(2))
    two.replica = 1
    engine = Inspected(one, two)
    each = [
        EngineReady(num_blocks=11, block_size=16, max_model_len=64, vocab_size=9, ledger=[])
        for _ in range(2)
    ]
    engine.ready = msgspec.structs.replace(engine.ready, replicas=each)
    engine.health_now = FakeHealth(replicas=("ok", "ok"))
    with showing(page, engine):
        page.until(lambda: page.rows("running") and page.rows("running")[0].startswith("r1"))
        options = page.all("#replica option")
        assert [option.text for option in options] == ["0", "1"]
        options[1].click()
        page.until(lambda: page.rows("running")[0].startswith("r2"))
        engine.health_now = FakeHealth(reason="ok", replicas=("ok", "restarting"))
        engine.states = [one]
        page.until(lambda: page.status() == "Replica 1: restarting")
        page.until(lambda: page.rows("running") == [])
        assert page("#blocks").get_attribute("aria-label") == "The engine shows no blocks"
        assert (page.figure("Running"), page.figure("Waiting")) == ("–", "–"), "it has not said"
        assert not page("#running-none").is_displayed() and not page("#queue-none").is_displayed()


def test_a_large_pool_is_drawn_in_the_order_of_holders(page):
    state = core_state(
        running(1, blocks=30_000, shared_blocks=10_000), running(2, blocks=20_000, shared_blocks=0),
        cells=[], num_blocks=100_000,
    )  # fmt: skip
    free = {"num_free": 60_000, "num_shared": 10_000, "num_cached": 0}
    state.blocks = msgspec.structs.replace(state.blocks, **free)
    with showing(page, Inspected(state)):
        page.until(lambda: page.rows("running"))
        assert "each square is 7 blocks" in page("#blocks-size").text
        shares = page.js(
            "const of = {}; for (const cell of cells) of[cell] = (of[cell] ?? 0) + perCell; return of"
        )
        wanted = {"1": 20_000, "2": 20_000, str(CELL_SHARED | 1): 10_000, "0": 50_000}
        assert {k: v for k, v in shares.items() if abs(v - wanted[k]) > 7} == {}
        assert page.js("return document.getElementById('blocks').clientHeight") < 400


def test_names_from_outside_are_no_markup(page):
    hostile = "<img src=x onerror='window.hacked=1'>"
    state = core_state(running(1, tenant=hostile, adapter=hostile + "@1"))
    with showing(page, Inspected(state)):
        page.until(lambda: page.rows("running"))
        assert hostile in page("#running .name").text
        assert page.js("return window.hacked") is None and page.all("main img") == []


def test_a_server_that_has_gone_is_said_to_be(page):
    page.may_complain_of = "Failed to load resource"
    engine = Inspected(BUSY)
    with serving(engine) as server:
        page.open(server)
        page.until(lambda: page.rows("running"))
    page.until(lambda: page("#problem").is_displayed())
    assert page("#problem").text.startswith("The server does not answer")
    assert page.status() == "No answer" and page.rows("running"), "the last state stays"


def test_a_real_engine_with_one_seat(page, tmp_path):
    """One request with many sequences keeps the seat; another one waits, and the page says for what."""
    from quire.cli.demo.server import ServerProcess

    server = ServerProcess.start({"max_num_seqs": 1, "max_model_len": 2048}, tmp_path)
    done = threading.Event()

    def ask(n: int) -> None:
        body = {"prompt": "a b c", "n": n, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            for _ in answer.iter_raw():
                if done.is_set():
                    return

    try:
        asyncio.run(server.wait_ready())
        threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in (64, 1)]
        for thread in threads:
            thread.start()
        page.open(server)
        page.until(
            lambda: page.js(
                "const text = (id) => document.getElementById(id).innerText;"
                "return text('running').includes('of at most 2,000 tokens')"
                " && text('queue').includes('no sequence slot') && text('figures').includes('Running\\n1')"
                " && !blocks.getAttribute('aria-label').includes(': 0 of one request')"
            )
        )
        page.until(lambda: int(page.figure("Generated").replace(",", "")) > 0)
        page.until(lambda: page.table("latency")[1][1] != "–")
        page.js("document.querySelector('#queue button').click()")
        page.until(lambda: page("#why").is_displayed())
        assert len(page("#why").text) > 20
        page("#close").click()
        done.set()
        page.until(lambda: page("#running-none").is_displayed())
        page.driver.get("about:blank")
    finally:
        done.set()
        server.stop()

"""The page at /, in a real Chromium. Where a moment has to last, the scripted engine's valve holds it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from browser import BrowserPage
from scripted_engine import ScriptedEngine
from scripted_server import Server, serving

QUESTION = "What does os.path.join do?"


class Page(BrowserPage):
    def open(self, server, *, ready: bool = True) -> None:
        self.url = server.url.rstrip("/") + "/"
        self.driver.get(self.url)
        if ready:
            self.until(lambda: self("#status").get_attribute("data-state") == "ready")

    def type(self, *keys: str, into: str = "#prompt") -> None:
        self(into).send_keys(*keys)

    def fill(self, selector: str, text: str) -> None:
        self(selector).clear()
        self(selector).send_keys(text)

    def ask(self, text: str) -> None:
        """Returns when the answer is there."""
        self.type(text, "\ue007")
        self.until(lambda: not self.is_running)

    def press(self, label: str) -> None:
        """The last button of that name."""
        found = [b for b in self.all("button") if b.text == label and b.is_displayed()]
        found[-1].click()

    @property
    def is_running(self) -> bool:
        return not self("#send").is_displayed()

    # Each of these is one look: an element found may be gone when the next answer's chunk is painted.

    @property
    def answers(self) -> list[str]:
        return self._texts(".assistant > .body")

    @property
    def notes(self) -> list[str]:
        return self._texts(".assistant .note")

    @property
    def metrics(self) -> dict[str, str]:
        items = ".assistant:last-child [data-metric]"
        read = "item => [item.dataset.metric, item.firstChild.textContent]"
        return dict(self.js(f"return [...document.querySelectorAll('{items}')].map({read})"))

    def _texts(self, selector: str) -> list[str]:
        found = f"[...document.querySelectorAll('{selector}')]"
        return self.js(f"return {found}.map((node) => node.textContent)")


@pytest.fixture
def page(driver) -> Iterator[Page]:
    page = Page(driver)
    page.begin()
    yield page
    page.check()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


# --- the file -------------------------------------------------------------------------------------


async def test_headers(make_client):
    client = make_client(api_keys=("k",))
    got = await client.get("/")
    assert got.status_code == 200 and got.headers["content-type"] == "text/html; charset=utf-8"
    assert (await client.head("/")).status_code == 200
    policy = dict(part.split(" ", 1) for part in got.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for directive in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[directive])
    assert "set-cookie" not in got.headers


async def test_switched_off(make_client):
    assert (await make_client(disable_playground=True).get("/")).status_code == 404


# --- the built-in model ---------------------------------------------------------------------------


def test_a_conversation_with_the_built_in_model(page, demo_server):
    page.open(demo_server)
    assert page("#model").get_property("value") == "quire-builtin"
    page.fill("[data-field=temperature]", "0")
    page.ask(QUESTION)
    assert len(page.answers[0]) > 20
    spans = page.all(".assistant .t")
    assert len(spans) > 5
    metrics = page.metrics
    assert metrics["ttft"].endswith(" ms") and float(metrics["rate"]) > 0
    assert int(metrics["completion"]) >= len(spans) and metrics["finish"] == "stop"
    page.press("Regenerate")
    page.until(lambda: not page.is_running and page.metrics.get("finish"))
    assert len(page.answers) == 1
    assert page.metrics["prompt"] == metrics["prompt"] and int(page.metrics["cached"]) > 0

    from selenium.webdriver import ActionChains

    span = page.all(".assistant .t")[1]
    ActionChains(page.driver).move_to_element(span).perform()
    rows = page.all("#tip .row")
    assert len(rows) >= 5 and page("#tip").is_displayed()
    [own] = page.all("#tip .row.own")
    assert own.find_element("css selector", ".name").text == span.text
    shares = [float(r.text.split()[-2]) for r in rows]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) < 100.5
    assert page.driver.get_cookies() == [] and page.js("return localStorage.length") == 0


# --- streaming ------------------------------------------------------------------------------------


def test_text_grows_as_it_comes(page, server):
    server.hold_at(2)
    page.open(server)
    page.type("hi", "\ue007")
    page.until(lambda: page.answers == ["Hello there"])
    assert page.is_running and "finish" not in page.metrics
    server.release()
    page.until(lambda: not page.is_running)
    assert page.answers == ["Hello there, world!"]
    assert page.metrics | {"ttft": "", "rate": ""} == {
        "ttft": "", "rate": "", "completion": "5", "prompt": "2", "cached": "2", "finish": "stop",
    }  # fmt: skip
    assert [s.get_attribute("class") for s in page.all(".assistant .t")] == ["t p2"] * 5


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_aborts_in_the_engine(page, server, how):
    server.hold_at(2)
    page.open(server)
    page.type("hi", "\ue007")
    page.until(lambda: page.answers == ["Hello there"])
    page("#stop").click() if how == "button" else page.type("\ue00c")
    page.until(lambda: not page.is_running)
    assert (page.answers, page.metrics["finish"]) == (["Hello there"], "stopped")
    page.until(lambda: [s.aborts for s in server.engine.streams] == [1])
    server.release()
    page.ask("again")
    assert "user: hi\nassistant: Hello there\nuser: again\n" in server.prompt()


def test_the_view_follows_until_the_reader_scrolls(page, server):
    server.engine.answer = [f"line {i}\n\n" for i in range(120)]
    server.hold_at(60)
    page.open(server)
    page.type("hi", "\ue007")
    page.until(lambda: "line 59" in page.answers[0])
    end = "const l = document.getElementById('log'); return l.scrollHeight - l.scrollTop - l.clientHeight"
    page.until(lambda: page.js(end) < 2)
    page.js("document.getElementById('log').scrollTop = 5")
    page.until(lambda: page("#latest").is_displayed())
    server.release()
    page.until(lambda: not page.is_running)
    assert "line 119" in page.answers[0]
    assert page.js("return document.getElementById('log').scrollTop") == 5


# --- hostile text ---------------------------------------------------------------------------------

HOSTILE = [
    "<img src=x onerror='window.hacked=1'>", "<script>window.hacked=1</script>", "\n\n```html\n",
    "<svg onload='window.hacked=1'>", "\n```\n", "`<b>", "code</b>` ", "**<i>bold</i>**",
    " [a](javascript:1)",
]  # fmt: skip


def test_model_and_server_text_is_never_markup(page):
    engine = ScriptedEngine(names=("<img src=x onerror='window.hacked=1'>",), max_model_len=100_000)
    engine.answer = HOSTILE
    with serving(engine) as server:
        page.open(server)
        page.ask("<img src=x onerror='window.hacked=1'>")
    assert page.js("return window.hacked") is None
    assert page.all("#chat :is(img, svg, script, b, i, a)") == page.all(".metrics b")
    shown = page.answers[0]
    for piece in ("<img src=x onerror", "<script>window.hacked=1</script>", "[a](javascript:1)"):
        assert piece in shown
    assert page(".assistant pre").text == "<svg onload='window.hacked=1'>"
    assert page(".assistant p code").text == "<b>code</b>"
    assert page(".assistant strong").text == "<i>bold</i>"


def test_the_browser_refuses_markup_even_from_our_own_script(page, server):
    from selenium.common.exceptions import JavascriptException

    page.may_complain_of = "TrustedHTML|Content Security Policy"
    page.open(server)
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        page.js("document.body.innerHTML = '<b>x</b>'")
    page.js(
        "const style = document.createElement('style'); style.textContent = 'body { opacity: 0 }';"
        "document.head.append(style)"
    )
    assert page.js("return getComputedStyle(document.body).opacity") == "1"


# --- keys, errors, waiting ------------------------------------------------------------------------


def test_an_api_key_is_asked_for_and_kept_in_the_tab(page):
    page.may_complain_of = "401"
    with serving(api_key=("sekret",)) as server:
        page.open(server, ready=False)
        page.until(lambda: page("#key").is_displayed())
        page.type("wrong", "\ue007", into="#secret")
        page.until(lambda: page("#key").is_displayed())
        page.type("sekret", "\ue007", into="#secret")
        page.until(lambda: page("#status").get_attribute("data-state") == "ready")
        assert not page("#key").is_displayed()
        text = 'it\'s "quoted" $HOME `x`\n'
        page.js("document.getElementById('prompt').value = arguments[0]", text)
        page.ask("")
        assert page.answers == ["Hello there, world!"]
        assert page.js("return [localStorage.length, document.cookie]") == [0, ""]
        command = page.js("return curl(turns.at(-1))")
        assert "sekret" not in command
        if shutil.which("curl"):
            environment = {"QUIRE_API_KEY": "sekret", "PATH": "/usr/bin:/bin"}
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, env=environment, check=True
            )
            assert done.stdout.endswith("data: [DONE]\n\n")
            assert server.prompt(0) == server.prompt(1) and text in server.prompt(1)


def test_a_loading_server_is_waited_for(page):
    page.may_complain_of = "503"
    with serving(loaded=False) as server:
        page.open(server, ready=False)
        page.until(lambda: "still loading" in page("#status").text)
        page.type("hi", "\ue007")
        page.until(lambda: any("Trying again in" in note for note in page.notes))
        server.load()
        page.until(lambda: not page.is_running)
        assert page.answers == ["Hello there, world!"] and page.notes == []
        page.until(lambda: page("#status").get_attribute("data-state") == "ready")


def test_what_goes_wrong_is_said(page, server):
    page.may_complain_of = "400"
    page.open(server)
    page.fill("[data-field=temperature]", "-1")
    page.ask("hi")
    assert "temperature" in page.notes[-1] and server.engine.submitted == []
    page("[data-field=temperature]").clear()
    page.fill("#extra", '{"wombat": 1}')
    page.press("Regenerate")
    page.until(lambda: not page.is_running and page.metrics.get("finish"))
    assert "wombat" in page.notes[-1]
    page("#extra").clear()
    server.engine.fail_at = 2
    server.engine.failure = ValueError("secret")
    page.ask("more")
    assert page.answers[-1] == "Hello there" and page.notes[-1].startswith("Internal server error")
    page.fill("#extra", "{")
    page.type("unsent", "\ue007")
    assert page("#problem").text.startswith("Other fields: not JSON.") and len(page.answers) == 2
    assert page("#prompt").get_property("value") == "unsent"


# --- settings and the conversation ----------------------------------------------------------------


def test_settings_reach_the_engine(page, server):
    page.open(server)
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "max_tokens": 3, "seed": 11,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5,
    }  # fmt: skip
    for name, value in values.items():
        page.fill(f"[data-field={name}]", str(value))
    page.fill("#stops", "END\n\\n\\n")
    page.fill("#system", "Be brief.")
    page.ask("hi")
    params = server.engine.submitted[-1].params
    assert {name: getattr(params, name) for name in values} == values
    assert list(params.stop) == ["END", "\n\n"] and params.logprobs == 5
    assert "system: Be brief.\nuser: hi\n" in server.prompt()
    page("#probabilities").click()
    page.ask("hi")
    assert server.engine.submitted[-1].params.logprobs is None
    assert page.answers == ["Hello there,"] * 2
    assert page.all(".assistant:last-child .t") == []


def test_formats(page, server):
    page.open(server)
    for label, text, field, expected in [
        ("json_schema", '{"type": "object"}', "response_format",
         {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}),
        ("regex", "a|b", "structured_outputs", {"regex": "a|b"}),
        ("json_object", None, "response_format", {"type": "json_object"}),
    ]:  # fmt: skip
        page(f"#format option[value={label}]").click()
        assert page("#grammar").is_displayed() == (text is not None)
        if text is not None:
            page.fill("#grammar", text)
        assert page.js("return requestBody()")[field] == expected


def test_edit_regenerate_and_start_again(page, server):
    page.open(server)
    page.ask("first")
    page.type("two", "\ue008\ue007\ue000", "lines")  # Shift+Enter
    assert page("#prompt").get_property("value") == "two\nlines"
    page.ask("")
    assert "assistant: Hello there, world!\nuser: two\nlines\nassistant:" in server.prompt()
    page.press("Regenerate")
    page.until(lambda: len(server.engine.submitted) == 3 and not page.is_running)
    assert server.prompt(1) == server.prompt(2) and len(page.answers) == 2
    page.all(".user .actions button")[0].click()
    page.fill("#prompt", "")
    page.ask("changed")
    assert server.prompt().endswith("user: changed\nassistant:") and "first" not in server.prompt()
    assert len(page.answers) == 1
    page.press("New chat")
    assert page.answers == [] and page("#welcome").is_displayed()
    page.ask("fresh")
    assert "changed" not in server.prompt()


def test_tokens_by_keyboard(page, server):
    page.open(server)
    page.ask("hi")
    from selenium.webdriver import ActionChains

    page.js("document.querySelector('.assistant > .body').focus()")
    ActionChains(page.driver).send_keys("\ue014", "\ue014").perform()
    assert page(".t.at").get_property("textContent") == " there"
    assert page("#tip .row.own .name").text == "·there"
    assert float(page("#tip .row.own .number").text.split()[0]) == pytest.approx(
        100 * math.exp(-0.7), abs=0.1
    )


def test_a_phone(page, server):
    metrics = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open(server)
        assert not page("#settings").is_displayed()
        server.engine.answer = ["x" * 500, "\n```\n", "y" * 500, "\n```\n"]
        page.ask("z" * 300)
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")
        assert page.js(
            "const l = document.getElementById('log'); return l.scrollWidth <= l.clientWidth"
        )
        page("#toggle").click()
        assert page("#settings").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# --- what the chunks say --------------------------------------------------------------------------

SHOW = """
    const answer = new Answer({});
    turns.push(answer);
    document.getElementById("log").append(answer.view.article);
    for (const chunk of arguments[0]) { answer.take(chunk); paint(answer); }
    return answer.message();
"""


def chunk(*tokens: bytes, **delta: object) -> dict[str, object]:
    entries = [
        {"token": t.decode(errors="replace"), "bytes": list(t), "logprob": -0.1, "top_logprobs": []}
        for t in tokens
    ]
    return {"choices": [{"delta": delta, "logprobs": {"content": entries}, "finish_reason": None}]}


def test_tokens_are_found_in_the_text(page, server):
    """Characters of several tokens, text held back, markers that are not shown."""
    page.open(server)
    page.js(SHOW, [
        chunk(b"<think>", content=""), chunk(b"hm", reasoning_content="hm"), chunk(b"</think>"),
        chunk(b"na\xc3", content="na"), chunk(b"\xaf", content="ï"), chunk(b"ve "),
        chunk(b"**so**", content="ve **so**"), chunk(b"<eos>"),
    ])  # fmt: skip
    spans = page.js(
        "return [...document.querySelectorAll('.t')].map((t) => [t.textContent, t.dataset.token])"
    )
    assert spans == [["hm", "1"], ["na", "3"], ["ï", "4"], ["ve ", "5"], ["so", "6"]]
    assert not page("details.aside > .body").is_displayed()
    page("details.aside summary").click()
    assert page("details.aside > .body").text == "hm"


def test_tool_calls(page, server):
    page.open(server)
    parts = [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1'}}]
    rest = [{"index": 0, "function": {"arguments": ', "b": 2}'}}]
    message = page.js(SHOW, [chunk(tool_calls=parts), chunk(tool_calls=rest)])
    assert page("figcaption").text == "Tool call: add"
    assert json.loads(page("figure pre").text) == {"a": 1, "b": 2}
    assert message["tool_calls"] == [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'},
        }
    ]

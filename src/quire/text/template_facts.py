"""Which forms of messages a chat template takes, found out by rendering small conversations.

Published templates differ in what "no content" must look like, whether call arguments are an object or
text, in which roles content may be parts, which roles exist and in which order turns may come. Where a
template and a client disagree, the template fails, or silently leaves out an instruction or a call.

So each template is tried once, when it is loaded. A conversation of marked words is rendered as a client
would send it. If a word is missing in the prompt, the conversation is rendered with the rewrites of
`template_rewrites.py`, one after the other, until all words are shown. If none helps, messages stay as
sent, and the template's own error explains why. That takes some fifty renders, 2 to 6 ms.

Why not read the template's source: that guesses wrong where a macro does the work. Why not a list of
models: it is never complete. See docs/adr/0023.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from quire.text import template_rewrites as rewrites
from quire.text.call_arguments import ArgumentsForm, function_of
from quire.text.chat_messages import REASONING_FIELDS, Form, Json, Turn
from quire.text.template_rewrites import Rewrite, as_sent
from quire.text.tool_forms import REWRITES, ToolRewrite, probe_tool

ContentFormat = Literal["auto", "string", "openai"]
Render = Callable[[list[Json], Json], str | None]
"""Messages and tools -> the prompt, or None if the template fails on them."""
Conversation = tuple[list[Turn], Sequence[str]]
"""Turns, and the words that the prompt must show."""

SILENT: tuple[Form, ...] = ("string", "null", "absent")
"""The forms of a message without content: "", null, no key."""
LEAK = re.compile(r"\b(?:None|null|undefined)\b|\[\]")


@dataclass(frozen=True, slots=True)
class ContentSupport:
    """Which forms of message content a template renders correctly."""

    strings: bool
    parts: bool


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """How one template wants conversations to be written.

    content: role -> the forms of content that it shows; an absent role is like the user's.
    silent: for a message with calls and no content, its form as sent -> as written. silent_alone: the
        same for a message without calls.
    no_tools: the value of `tools` for a request without tools. tools: the rewrites that each tool needs.
    complete: whether the template shows the user's text and calls.
    rewrites: subject -> the rewrite that the template needs, in the order in which they are applied.
    """

    content: Mapping[str, ContentSupport]
    silent: Mapping[Form, Form] = field(default_factory=lambda: {form: form for form in SILENT})
    silent_alone: Form = "string"
    arguments: ArgumentsForm = field(default_factory=ArgumentsForm)
    no_tools: Json = None
    tools: tuple[ToolRewrite, ...] = ()
    complete: bool = False
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)

    def write(self, turns: list[Turn]) -> list[dict[str, Json]]:
        """The messages for the template. Changes the turns."""
        turns = rewrites.join_answers(turns)
        for rewrite in self.rewrites.values():
            turns = rewrite(turns)
        return [self._message(turn) for turn in turns]

    def write_tools(self, tools: Json) -> Json:
        """A request's tools, plain JSON, for the template."""
        if not isinstance(tools, list) or not tools:
            return self.no_tools
        for rewrite in self.tools:
            tools = [rewrite(tool) for tool in tools]
        return tools

    def describe(self) -> dict[str, str]:
        """Which rewrites this template needs, for the log."""
        named = {about: r.__name__ for about, r in self.rewrites.items() if r is not as_sent}
        if self.tools:
            named["tools"] = ", ".join(rewrite.__name__ for rewrite in self.tools)
        return named | ({"arguments": "text"} if self.arguments.form == "text" else {})

    def support(self, role: str) -> ContentSupport:
        return self.content.get(role, self.content["user"])

    def _message(self, turn: Turn) -> dict[str, Json]:
        message: dict[str, Json] = {"role": turn.role, **turn.fields}
        if turn.reasoning is not None:
            message |= dict.fromkeys(REASONING_FIELDS, turn.reasoning)
        if turn.calls:
            message["tool_calls"] = [self._call(call) for call in turn.calls]
        form, text = self._content(turn)
        if form != "absent":
            message["content"] = text
        return message

    def _call(self, call: Json) -> Json:
        function = function_of(call)
        if function is None or not isinstance(call, dict):
            return call
        arguments = self.arguments.write(function.get("arguments"))
        return {"type": "function", **call, "function": {**function, "arguments": arguments}}

    def _content(self, turn: Turn) -> tuple[Form, Json]:
        form = turn.form
        if not turn.has_text and (turn.role == "assistant" or not turn.texts):
            if turn.calls:
                form = self.silent["string" if form == "parts" else form]
            else:
                form = self.silent_alone if turn.role == "assistant" else "string"
            if form in ("null", "absent"):
                return form, None
        support = self.support(turn.role)
        if support.parts and (form == "parts" or not support.strings):
            return form, [{"type": "text", "text": text} for text in turn.texts or [""]]
        return form, "\n".join(turn.texts)


# --- finding out ---

USER, AGAIN, SYSTEM, LATER = "quireuser", "quireagain", "quiresystem", "quirelater"
ANSWER, MORE, RESULT, OTHER = "quireanswer", "quiremore", "quireresult", "quireother"
SECOND_PART = "quirepart"
FUNCTION, KEY, VALUE = "quirefunction", "quirekey", "quirevalue"
SHORT_ID, OTHER_ID, LONG_ID = "callquire", "callother", "call_quire0123456789abcdef"
IDS = (None, LONG_ID, "c1")
"""Ids that a template may refuse: none, one longer than Mistral's nine characters, one shorter."""
CALL_WORDS = (USER, FUNCTION, KEY, VALUE, RESULT)
NO_JSON = f"{{'{KEY}': '{VALUE}'"

ORDER = (
    "lone instructions", "developer", "later instructions", "first instructions", "silence",
    "reasoning", "text beside calls", "several calls", "calls", "results", "user twice",
    "assistant twice", "turns", "ids", "names",
)  # fmt: skip
"""The subjects of rewrites, in the order in which these are applied."""


def find_facts(render: Render, content_format: ContentFormat = "auto") -> TemplateFacts:
    """Try a template. content_format: "string" or "openai" (parts) fixes the form of content."""
    return _Asking(render, content_format).facts


def _call(name: str = FUNCTION, value: str = VALUE, own: str | None = SHORT_ID) -> Json:
    call: dict[str, Json] = {"function": {"name": name, "arguments": {KEY: value}}}
    return call if own is None else {"id": own, **call}


def _user(text: str = USER) -> Turn:
    return Turn("user", [text])


def _says(text: str) -> Turn:
    return Turn("assistant", [text])


def _calls(*calls: Json, text: str | None = None, form: Form = "null") -> Turn:
    if text is not None:
        return Turn("assistant", [text], calls=list(calls))
    return Turn("assistant", form=form, calls=list(calls))


def _result(text: str = RESULT, own: str | None = SHORT_ID) -> Turn:
    return Turn("tool", [text], fields={} if own is None else {"tool_call_id": own})


class _Asking:
    """One template's facts, as far as they are known; each question uses the answers before it."""

    def __init__(self, render: Render, content_format: ContentFormat) -> None:
        self._render = render
        forced = ContentSupport(content_format == "string", content_format == "openai")
        self._forced = None if content_format == "auto" else forced
        self.facts = TemplateFacts(
            content={"user": self._forced or ContentSupport(strings=True, parts=False)},
            rewrites=dict.fromkeys(ORDER, as_sent),
        )
        shows_user = self._ask_user()
        self._ask_tools()
        self._ask_order()
        self._ask_assistant()
        self._ask_instructions()
        shows_calls = self._ask_calls()
        if shows_calls:
            self._ask_beside_calls()
        self.facts = dataclasses.replace(self.facts, complete=shows_user and shows_calls)

    # Trying one answer to a question.

    def _with(self, **chosen: Rewrite) -> TemplateFacts:
        return dataclasses.replace(self.facts, rewrites={**self.facts.rewrites, **chosen})

    def _shown(self, facts: TemplateFacts, turns: list[Turn], words: Iterable[str]) -> str | None:
        """The prompt, if all of `words` are in it."""
        text = self._render(list(facts.write(turns)), facts.no_tools)
        return text if text is not None and all(word in text for word in words) else None

    def _ask(
        self,
        about: str,
        alternatives: Sequence[Rewrite],
        *conversations: Callable[[], Conversation],
    ) -> bool:
        """The first rewrite with which the words of every conversation are shown; without a rewrite comes
        first."""
        for rewrite in (as_sent, *alternatives):
            facts = self._with(**{about: rewrite})
            if all(self._shown(facts, *make()) for make in conversations):
                self.facts = facts
                return True
        return False

    def _ask_content(self, role: str, make: Callable[[Turn], list[Turn]], text: str) -> bool:
        """The forms in which the content of `role` is shown, without brackets or quotes of the form
        itself."""
        if self._forced is not None:
            return self._shown(self.facts, make(Turn(role, [text])), [text]) is not None
        found = []
        for texts in ([text], [text, SECOND_PART]):  # some templates take only the first part
            support = ContentSupport(strings=len(texts) == 1, parts=len(texts) == 2)
            facts = dataclasses.replace(self.facts, content={**self.facts.content, role: support})
            form: Form = "parts" if support.parts else "string"
            shown = self._shown(facts, make(Turn(role, texts, form)), texts)
            found.append(shown is not None and not (support.parts and _shows_form(shown, text)))
        if any(found):
            content = {**self.facts.content, role: ContentSupport(*found)}
            self.facts = dataclasses.replace(self.facts, content=content)
        return any(found)

    # The questions.

    def _ask_user(self) -> bool:
        """The user's content, and whether `tools` is null or an empty list for a request without tools."""
        before = self.facts
        choices: tuple[Json, ...] = (None, [])
        for no_tools in choices:
            self.facts = dataclasses.replace(before, no_tools=no_tools)
            if self._ask_content("user", lambda turn: [turn], USER):
                return True
        self.facts = before
        return False

    def _ask_tools(self) -> None:
        """Which fields a tool must have, even if the template shows few of them."""
        for rewrite, parameters in REWRITES:
            tools: Json = [probe_tool(parameters)]
            rewritten = dataclasses.replace(self.facts, tools=(*self.facts.tools, rewrite))
            if not self._takes_tools(self.facts, tools) and self._takes_tools(rewritten, tools):
                self.facts = rewritten

    def _takes_tools(self, facts: TemplateFacts, tools: Json) -> bool:
        text = self._render(list(facts.write([_user()])), facts.write_tools(tools))
        return text is not None and USER in text

    def _ask_order(self) -> None:
        self._ask(
            "user twice",
            [rewrites.join_users],
            lambda: ([_user(), _user(AGAIN), _says(ANSWER), _user(MORE)], (USER, AGAIN)),
        )
        self._ask(
            "assistant twice",
            [rewrites.join_assistants],
            lambda: (
                [_user(), _says(ANSWER), _says(MORE), _user(AGAIN)],
                (USER, ANSWER, MORE, AGAIN),
            ),
        )

    def _ask_assistant(self) -> None:
        self._ask_content("assistant", lambda turn: [_user(), turn, _user(AGAIN)], ANSWER)
        baseline = self._leaks([_user(), _says(ANSWER), _user(AGAIN)])
        for form in SILENT:
            facts = dataclasses.replace(self.facts, silent_alone=form)
            turns = [_user(), Turn("assistant", form=form), _user(AGAIN)]
            if self._is_silent(facts, turns, (USER, AGAIN), baseline):
                self.facts = facts
                return
        self._ask(
            "silence",
            [rewrites.drop_silent],
            lambda: ([_user(), Turn("assistant"), _user(AGAIN)], (USER, AGAIN)),
        )

    def _ask_instructions(self) -> None:
        if not self._knows_developer():
            self.facts = self._with(developer=rewrites.developer_as_system)
        known = self._ask_content("system", lambda turn: [turn, _user()], SYSTEM)

        def two(role: str) -> Conversation:
            turns = [Turn("system", [SYSTEM]), Turn(role, [LATER]), _user()]
            return turns, (SYSTEM, LATER, USER)

        def later() -> Conversation:
            turns = [Turn("system", [SYSTEM]), _user(), _says(ANSWER), Turn("system", [LATER])]
            return [*turns, _user(AGAIN)], (SYSTEM, USER, ANSWER, LATER, AGAIN)

        first = rewrites.join_first_instructions if known else rewrites.instructions_into_user
        self._ask("first instructions", [first], lambda: two("system"), lambda: two("developer"))
        alone = [rewrites.lone_instructions_as_user]
        self._ask("lone instructions", alone, lambda: ([Turn("system", [SYSTEM])], (SYSTEM,)))
        if known:
            self._ask("later instructions", [rewrites.join_later_instructions], later)

    def _knows_developer(self) -> bool:
        """Whether the template treats the role `developer` differently from an unknown role."""
        unknown = "quirerole"

        def shown(role: str) -> str | None:
            text = self._shown(self.facts, [Turn(role, [SYSTEM]), _user()], (SYSTEM, USER))
            return text and re.sub(role, unknown, text, flags=re.IGNORECASE)

        known = shown("developer")
        return known is not None and known != shown(unknown)

    def _ask_calls(self) -> bool:
        """How calls and results are written; whether the template shows calls at all."""
        for results, names in (
            (as_sent, as_sent), (as_sent, rewrites.fill_names), (rewrites.results_as_user, as_sent),
        ):  # fmt: skip
            for facts in self._call_forms(self._with(results=results, names=names)):
                shown = self._shown(facts, [_user(), _calls(_call()), _result()], CALL_WORDS)
                if shown is not None and f"'{KEY}'" not in shown:
                    self.facts = facts
                    self._ask_silence(CALL_WORDS)
                    self._ask_content(
                        "tool", lambda turn: [_user(), _calls(_call()), _with_id(turn)], RESULT
                    )
                    self._ask_raw_arguments()
                    return True
        self._ask_calls_unknown()
        return False

    def _ask_calls_unknown(self) -> None:
        """For a template that cannot write calls: it may leave them out. If it fails on them, they become
        text."""
        for facts in self._call_forms(self.facts):
            if self._shown(facts, [_user(), _calls(_call()), _result()], ()) is not None:
                self.facts = facts
                self._ask_silence(())
                return
        for results in (as_sent, rewrites.results_as_user):
            facts = self._with(calls=rewrites.calls_as_text, results=results)
            if self._shown(facts, [_user(), _calls(_call()), _result()], CALL_WORDS):
                self.facts = facts
                return

    def _call_forms(self, facts: TemplateFacts) -> Iterable[TemplateFacts]:
        """Conversations with results as strings or parts, arguments as objects or text, and content in
        each form."""
        parts = [ContentSupport(strings=False, parts=True)]
        for support in [self.facts.support("user"), *(parts if self._forced is None else [])]:
            for form in ("object", "text"):
                for silent in SILENT:
                    yield dataclasses.replace(
                        facts,
                        content={**facts.content, "tool": support},
                        arguments=ArgumentsForm(form),  # type: ignore[arg-type]
                        silent=dict.fromkeys(SILENT, silent),
                    )

    def _ask_silence(self, words: Sequence[str]) -> None:
        """A message without content keeps its form if the template takes that form."""
        baseline = self._leaks([_user(), _calls(_call(), text=ANSWER), _result()])
        silent = dict(self.facts.silent)
        for sent in SILENT:
            for written in sorted(SILENT, key=lambda form: form != sent):
                facts = dataclasses.replace(self.facts, silent={**silent, sent: written})
                turns = [_user(), _calls(_call(), form=sent), _result()]
                if self._is_silent(facts, turns, words, baseline):
                    silent[sent] = written
                    break
        self.facts = dataclasses.replace(self.facts, silent=silent)

    def _ask_raw_arguments(self) -> None:
        call: Json = {"id": SHORT_ID, "function": {"name": FUNCTION, "arguments": NO_JSON}}
        arguments = dataclasses.replace(self.facts.arguments, raw=True)
        facts = dataclasses.replace(self.facts, arguments=arguments)
        if self._shown(facts, [_user(), _calls(call), _result()], (NO_JSON, RESULT)):
            self.facts = facts

    def _ask_beside_calls(self) -> None:
        words = CALL_WORDS

        def after() -> list[Turn]:
            return [_says(MORE), _user(AGAIN)]

        def said() -> Conversation:
            turns = [_user(), _calls(_call(), text=ANSWER), _result()]
            return [*turns, *after()], (*words, MORE, AGAIN)

        def thought() -> Conversation:
            turn = _calls(_call(), text=ANSWER)
            turn.reasoning = "quirethought"
            return [_user(), turn, _result()], words

        def several() -> Conversation:
            calls = _calls(_call(), _call("quiresecond", "quireelse", OTHER_ID))
            turns = [_user(), calls, _result(), _result(OTHER, OTHER_ID), *after()]
            return turns, (*words, "quiresecond", "quireelse", OTHER, MORE, AGAIN)

        def interrupted(*said: str) -> Conversation:
            turns = [_user(), *map(_says, said), _calls(_call()), _result(), _user(AGAIN)]
            return turns, (*words, AGAIN)

        def said_first() -> Conversation:
            turns = [_user(), _says(ANSWER), _calls(_call()), _result()]
            return [*turns, *after()], (*words, MORE, AGAIN)

        def with_id(own: str | None) -> Conversation:
            return [_user(), _calls(_call(own=own)), _result(own=own)], words

        texts = [rewrites.text_before_calls, rewrites.no_text_beside_calls]
        self._ask("text beside calls", texts, said)
        thoughts = [rewrites.reasoning_with_text, rewrites.no_reasoning_beside_calls]
        self._ask("reasoning", thoughts, thought)
        self._ask("several calls", [rewrites.one_call_each], several)
        turns = [
            rewrites.one_answer_each,
            rewrites.answers_alternate,
            rewrites.one_answer_each_or_join,
            rewrites.answers_alternate_or_join,
        ]
        self._ask("turns", turns, interrupted, lambda: interrupted(ANSWER), said_first)
        ids = [rewrites.fill_ids, rewrites.short_ids]
        self._ask("ids", ids, *(lambda own=own: with_id(own) for own in IDS))

    # Whether a message without content prints something.

    def _leaks(self, turns: list[Turn]) -> int:
        text = self._shown(self.facts, turns, ())
        return 0 if text is None else len(LEAK.findall(text))

    def _is_silent(
        self, facts: TemplateFacts, turns: list[Turn], words: Iterable[str], baseline: int
    ) -> bool:
        text = self._shown(facts, turns, words)
        return text is not None and len(LEAK.findall(text)) <= baseline


def _with_id(turn: Turn) -> Turn:
    turn.fields = {"tool_call_id": SHORT_ID}
    return turn


def _shows_form(rendered: str, text: str) -> bool:
    """Whether a list of parts was printed as such, rather than its text."""
    quoted = any(f"{quote}text{quote}" in rendered for quote in ("'", '"'))
    return quoted or rendered.count(text) > 1

"""Other forms of the same conversation, for templates that do not take it as sent.

Each function takes turns and returns turns. It may change the turns in place: each render has its own
copy. `template_facts.py` decides, once for a template, which of them it needs. No function adds a text,
call or result, and none loses one unless its name says so. The order changes only where a template has
one fixed place for something.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable

from quire.text.call_arguments import arguments_text, function_of
from quire.text.chat_messages import Json, Turn

Rewrite = Callable[[list[Turn]], list[Turn]]

INSTRUCTIONS = ("system", "developer")
SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
ID_LETTERS = string.digits + string.ascii_letters


def as_sent(turns: list[Turn]) -> list[Turn]:
    return turns


def join_answers(turns: list[Turn]) -> list[Turn]:
    """Join a call with the assistant's next messages into one message, if a result follows.

    Done for every template, since a result must follow its call. The items of the Responses API and the
    blocks of Anthropic's have other orders: call, text, result; call, call, result, result.
    """
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == "tool":
            begin = len(joined)
            while begin > 0 and joined[begin - 1].role == "assistant":
                begin -= 1
            while begin < len(joined) and not joined[begin].calls:
                begin += 1
            for other in joined[begin + 1 :]:
                joined[begin].add(other)
            del joined[begin + 1 :]
        joined.append(turn)
    return joined


# --- roles ---


def developer_as_system(turns: list[Turn]) -> list[Turn]:
    for turn in turns:
        if turn.role == "developer":
            turn.role = "system"
    return turns


def join_first_instructions(turns: list[Turn]) -> list[Turn]:
    """Join the system messages at the beginning; later ones stay where they are."""
    return _with_one_instruction(turns, _leading_instructions(turns))


def join_later_instructions(turns: list[Turn]) -> list[Turn]:
    """If a system message comes after other messages, join all of them into one at the beginning."""
    instructions = [turn for turn in turns if turn.role in INSTRUCTIONS]
    if len(instructions) == _leading_instructions(turns):
        return turns
    others = [turn for turn in turns if turn.role not in INSTRUCTIONS]
    return _with_one_instruction([*instructions, *others], len(instructions))


def _leading_instructions(turns: list[Turn]) -> int:
    return next((i for i, t in enumerate(turns) if t.role not in INSTRUCTIONS), len(turns))


def _with_one_instruction(turns: list[Turn], count: int) -> list[Turn]:
    """Join the first `count` turns."""
    for turn in turns[1:count]:
        turns[0].add(turn)
    return [*turns[:1], *turns[max(count, 1) :]]


def instructions_into_user(turns: list[Turn]) -> list[Turn]:
    """Put the system messages at the beginning of the user's first message."""
    turns = join_first_instructions(join_later_instructions(turns))
    if turns[0].role not in INSTRUCTIONS:
        return turns
    first = turns[0]
    first.role = "user"
    user = next((turn for turn in turns[1:] if turn.role == "user"), None)
    if user is None:
        return turns
    first.add_text(user.texts, user.form)
    user.texts, user.form = first.texts, first.form
    return turns[1:]


def lone_instructions_as_user(turns: list[Turn]) -> list[Turn]:
    """If there are only system messages, the last becomes the user's message."""
    if turns and all(turn.role in ("system", "developer") for turn in turns):
        turns[-1].role = "user"
    return turns


def results_as_user(turns: list[Turn]) -> list[Turn]:
    """Results become messages of the user, marked as in the training data of Hermes and Qwen."""
    for turn in turns:
        if turn.role == "tool":
            text = "\n".join(turn.texts)
            turn.role, turn.fields = "user", {}
            turn.texts, turn.form = [f"<tool_response>\n{text}\n</tool_response>"], "string"
    return turns


# --- calls ---


def calls_as_text(turns: list[Turn]) -> list[Turn]:
    """Write calls into the content, in the format of Hermes and Qwen."""
    for turn in turns:
        if turn.calls:
            texts = [f"<tool_call>\n{_call_text(call)}\n</tool_call>" for call in turn.calls]
            turn.calls = []
            turn.add_text(["\n".join(texts)], "string")
    return turns


def _call_text(call: Json) -> str:
    function = function_of(call)
    if function is None:
        return json.dumps(call, ensure_ascii=False)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {arguments_text(function.get("arguments"))}}}'


def one_call_each(turns: list[Turn]) -> list[Turn]:
    """Split a message with several calls: each call gets a message, followed by its result."""
    split: list[Turn] = []
    at = 0
    while at < len(turns):
        turn = turns[at]
        at += 1
        split.append(turn)
        if len(turn.calls) < 2:
            continue
        results = []
        while at < len(turns) and turns[at].role == "tool":
            results.append(turns[at])
            at += 1
        calls, turn.calls = turn.calls, turn.calls[:1]
        for index, call in enumerate(calls):
            if index > 0:
                split.append(Turn("assistant", form="null", calls=[call]))
            own = next((r for r in results if _answers(r, call)), None)
            if own is None and len(results) == len(calls) - index:
                own = results[0]  # results without ids are in the order of calls
            if own is not None:
                results.remove(own)
                split.append(own)
        split += results
    return split


def _answers(result: Turn, call: Json) -> bool:
    answered = result.fields.get("tool_call_id")
    return answered is not None and isinstance(call, dict) and call.get("id") == answered


def text_before_calls(turns: list[Turn]) -> list[Turn]:
    """Put text beside calls into a message of its own before them."""
    split = []
    for turn in turns:
        if turn.calls and turn.has_text:
            calls, turn.calls = turn.calls, []
            split += [turn, Turn("assistant", form="null", calls=calls)]
        else:
            split.append(turn)
    return split


def no_text_beside_calls(turns: list[Turn]) -> list[Turn]:
    for turn in turns:
        if turn.calls:
            turn.texts, turn.form = [], "null"
    return turns


def reasoning_with_text(turns: list[Turn]) -> list[Turn]:
    """Add text beside calls to the reasoning."""
    for turn in turns:
        if turn.calls and turn.has_text and turn.reasoning is not None:
            turn.reasoning = "\n\n".join([turn.reasoning, *turn.texts])
            turn.texts, turn.form = [], "null"
    return turns


def no_reasoning_beside_calls(turns: list[Turn]) -> list[Turn]:
    for turn in turns:
        if turn.calls:
            turn.reasoning = None
    return turns


# --- ids and names ---


def fill_ids(turns: list[Turn]) -> list[Turn]:
    """Give calls and results without an id one, in order."""
    waiting: list[str] = []
    count = 0
    for turn in turns:
        for call in turn.calls:
            if isinstance(call, dict):
                if not isinstance(call.get("id"), str):
                    call["id"] = f"call{count:05d}"
                count += 1
                waiting.append(str(call["id"]))
        if turn.role == "tool":
            own = turn.fields.setdefault("tool_call_id", waiting[0] if waiting else "call00000")
            if own in waiting:
                waiting.remove(str(own))
    return turns


def short_ids(turns: list[Turn]) -> list[Turn]:
    """Replace ids by nine letters or digits. An id always becomes the same, in every request."""
    for turn in fill_ids(turns):
        for call in turn.calls:
            if isinstance(call, dict):
                call["id"] = _short_id(str(call["id"]))
        if turn.role == "tool":
            turn.fields["tool_call_id"] = _short_id(str(turn.fields["tool_call_id"]))
    return turns


def _short_id(own: str) -> str:
    if SHORT_ID.fullmatch(own):
        return own
    number = int.from_bytes(hashlib.sha256(own.encode()).digest()[:8], "big")
    letters = []
    for _ in range(9):
        number, letter = divmod(number, len(ID_LETTERS))
        letters.append(ID_LETTERS[letter])
    return "".join(letters)


def fill_names(turns: list[Turn]) -> list[Turn]:
    """Add the function's name to each result."""
    names: dict[Json, Json] = {}
    last: Json = None
    for turn in turns:
        for call in turn.calls:
            function = function_of(call)
            if function is not None and isinstance(call, dict):
                last = function.get("name")
                if isinstance(call.get("id"), str):
                    names[call["id"]] = last  # type: ignore[index]
        if turn.role == "tool" and "name" not in turn.fields:
            name = names.get(turn.fields.get("tool_call_id"), last)
            if name is not None:
                turn.fields["name"] = name
    return turns


# --- order ---


def one_answer_each(turns: list[Turn]) -> list[Turn]:
    """Exactly one text message of the assistant between two of the user's; calls and results do not count
    (Mistral).

    If there are several, all but the last are joined with the calls that follow. If there is none, an
    empty one is inserted before the user's next message.
    """
    return _alternating(turns, calls_count=False, bridge=_empty_answer)


def one_answer_each_or_join(turns: list[Turn]) -> list[Turn]:
    """The same, but if there is none, the user's next message is joined with the result."""
    return _alternating(turns, calls_count=False, bridge=_into_result)


def answers_alternate(turns: list[Turn]) -> list[Turn]:
    """Messages of the assistant and of others alternate; a result counts as the user's (Gemma)."""
    return _alternating(turns, calls_count=True, bridge=_empty_answer)


def answers_alternate_or_join(turns: list[Turn]) -> list[Turn]:
    """The same, but the user's message after a result is joined with it."""
    return _alternating(turns, calls_count=True, bridge=_into_result)


def _alternating(
    turns: list[Turn], *, calls_count: bool, bridge: Callable[[list[Turn], Turn], None]
) -> list[Turn]:
    result: list[Turn] = []
    begin = 0
    for end in range(len(turns) + 1):
        if end < len(turns) and turns[end].role != "user":
            continue
        answer = _one_answer(turns[begin:end], calls_count=calls_count)
        result += answer
        if end < len(turns):
            has_answer = any(_is_text(turn) for turn in answer)
            if result and result[-1].role == "tool" and (calls_count or not has_answer):
                bridge(result, turns[end])
            elif result and result[-1].calls and not calls_count and not has_answer:
                _empty_answer(result, turns[end])  # calls that were never answered
            else:
                result.append(turns[end])
        begin = end + 1
    return result


def _one_answer(turns: list[Turn], *, calls_count: bool) -> list[Turn]:
    """The messages between two of the user's, with all text beside calls moved into one message."""
    last = max(
        (i for i, turn in enumerate(turns) if _is_text(turn) and turn.has_text), default=None
    )
    if last is None:
        last = max((i for i, turn in enumerate(turns) if _is_text(turn)), default=-1)
    result: list[Turn] = []
    for index, turn in enumerate(turns):
        if _is_text(turn) and not turn.has_text and index != last:
            continue
        before = result[-1] if result else None
        joins = before is not None and _is_text(before) and turn.calls
        if before is not None and joins and (calls_count or index <= last):
            before.add(turn)
        else:
            result.append(turn)
    return result


def _empty_answer(before: list[Turn], turn: Turn) -> None:
    before += [Turn("assistant", texts=[""]), turn]


def _into_result(before: list[Turn], turn: Turn) -> None:
    before[-1].add(turn)


def _is_text(turn: Turn) -> bool:
    return turn.role == "assistant" and not turn.calls


def join_users(turns: list[Turn]) -> list[Turn]:
    return _joined(turns, lambda last, turn: last.role == turn.role == "user")


def join_assistants(turns: list[Turn]) -> list[Turn]:
    """Join neighbouring messages without calls: templates that need alternating turns often count only
    those."""
    return _joined(turns, lambda last, turn: _is_text(last) and _is_text(turn))


def drop_silent(turns: list[Turn]) -> list[Turn]:
    """Remove the assistant's messages that have neither text nor calls."""
    return [turn for turn in turns if turn.role != "assistant" or turn.has_text or turn.calls]


def _joined(turns: list[Turn], belong: Callable[[Turn, Turn], bool]) -> list[Turn]:
    result: list[Turn] = []
    for turn in turns:
        if result and belong(result[-1], turn):
            result[-1].add(turn)
        else:
            result.append(turn)
    return result

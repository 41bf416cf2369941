"""Parser of tool calls in a model's text.

A call begins, for the client, as soon as its name is complete and its arguments begin. From then on the
arguments are streamed, and nothing is taken back. If text that may be a call turns out not to be one
before that point, all of it is text. If the arguments break off (at the end of the output, or because
they are not JSON), the call stays without an end, and the text after it is text again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quire.text.parsing.base import TextDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from quire.text.parsing.json_scanner import SPACE, JsonScanner, escaped, is_word
from quire.text.parsing.reader import ReadingParser, Steps, Trimmed, unquoted

MAX_NAME = 256
MAX_LITERAL_DEPTH = 32

Tools = Mapping[str, Mapping[str, object]]
"""Name -> JSON schema of the arguments, of the functions that a request offers."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes its calls. Markers show where a call is; how the text between them
    begins shows which notation it is: a JSON object, a list, XML-like tags, or a name."""

    start: tuple[str, ...] = ()
    """Each begins a call, or a list of them."""
    end: tuple[str, ...] = ()
    """What may follow a call."""
    around: tuple[str, ...] = ()
    """Markers around a section of calls; they are dropped."""
    bare: bool = False
    """An output may begin with a call, without a marker. Such a call must have the name of one of the
    request's tools, because an answer may be JSON too."""
    pythonic: bool = False
    """A list may hold Python calls."""
    named: tuple[str, ...] = ()
    """After `start` there may be a name, ended by one of these, and the arguments."""
    forced: tuple[str, str, str] | None = None
    """The text before the name, between name and arguments, and after them, when a grammar makes the
    model call.
    None: plain JSON is used."""
    listed: tuple[str, str, str] = ("", "", "")
    """The text before, between and after such calls."""
    short_ids: bool = False
    """The template accepts only call ids of nine letters and digits."""

    @property
    def markers(self) -> tuple[str, ...]:
        return self.start + self.end + self.around


class CallParser(ReadingParser):
    """Splits an output into answer and calls, according to `form`."""

    def __init__(self, form: ToolFormat, tools: Tools) -> None:
        super().__init__()
        self._form = form
        self._tools = tools
        self._strict = False
        """Whether a call must have a known name."""
        self._text = Trimmed(lambda text: self._events.append(TextDelta(text)), start=False)
        self._next_index = 0
        self._open: int | None = None
        """The call whose arguments are being read."""

    def _read(self) -> Steps[None]:
        r, form = self._reader, self._form
        if form.bare:
            r.keep()
            yield from r.space()
            self._strict = True
            yield from self._calls()
            self._strict = False
        markers = form.start + form.around
        while markers:
            marker = yield from r.until(markers, self._text.push)
            if marker in form.start:
                r.keep(marker)
                yield from self._calls()
            elif not marker:
                break
        while (yield from r.peek()):
            self._text.push(r.take(r.unread))
        self._text.flush()

    def _calls(self) -> Steps[None]:
        """Calls, one after the other, until other text follows. Kept text that is not part of a call
        becomes text."""
        r = self._reader
        while True:
            before = self._next_index
            char = yield from r.space()
            done = yield from (self._list() if char == "[" else self._call(char))
            if not done or self._next_index == before:
                break
            r.keep()
            yield from r.space(";," if self._form.bare else "")
            if self._form.end and (yield from r.literal(*self._form.end)):
                r.forget()
                return
            if not self._form.bare or (yield from r.peek()) != "{":
                break
        self._text.push(r.forget())

    def _list(self) -> Steps[bool]:
        """`[{...}, {...}]`, or `[f(a=1), g()]`."""
        r = self._reader
        r.take(1)
        while True:
            char = yield from r.space()
            if char == "{":
                done = yield from self._object()
            elif self._form.pythonic:
                done = yield from self._python_call()
            else:
                return False
            if not done:
                return False
            r.keep()
            char = yield from r.space()
            if char not in (",", "]"):
                return False
            r.take(1)
            if char == "]":
                return True

    def _call(self, char: str) -> Steps[bool]:
        if char == "{":
            return (yield from self._object())
        if char == "<" and (yield from self._reader.literal("<function=")):
            return (yield from self._tagged())
        if self._form.named and not self._strict:
            return (yield from self._named())
        return False

    # --- events -----------------------------------------------------------------------------------

    def _begin(self, name: str | None) -> bool:
        """Commit to a call of this name, unless it cannot be one."""
        if not name or len(name) > MAX_NAME or (self._strict and name not in self._tools):
            return False
        self._reader.forget()
        self._text.restart()
        self._open = self._next_index
        self._next_index += 1
        self._events.append(ToolCallStart(self._open, name))
        return True

    def _argue(self, text: str) -> None:
        assert self._open is not None
        self._events.append(ToolCallArguments(self._open, text))

    def _end(self) -> None:
        assert self._open is not None
        self._events.append(ToolCallEnd(self._open))
        self._open = None

    def _stream_arguments(self, name: str | None) -> Steps[bool]:
        if (yield from self._reader.space()) != "{" or not self._begin(name):
            return False
        if not (yield from self._reader.value(self._argue)):
            return False
        self._end()
        return True

    def _whole_arguments(self, name: str | None, text: str) -> bool:
        if not is_object(text) or not self._begin(name):
            return False
        self._argue(text)
        self._end()
        return True

    # --- {"name": ..., "arguments": {...}} --------------------------------------------------------

    def _object(self) -> Steps[bool]:
        """The keys may have any order; other keys are ignored. Returns True once a call has ended, even
        if the outer closing brace is missing."""
        r = self._reader
        r.take(1)
        name: str | None = None
        arguments: str | None = None
        ended = False
        while True:
            key = yield from self._key()
            if key is None:
                break
            if key == "name" and name is None:
                name = yield from r.string(MAX_NAME)
                if name is None or (self._strict and name not in self._tools):
                    break
            elif key in ("arguments", "parameters") and arguments is None and not ended:
                if name is not None and (yield from r.peek()) == "{":
                    if not (yield from self._stream_arguments(name)):
                        return False
                    ended = True
                else:
                    arguments = yield from self._buffered()
                    if arguments is None:
                        break
            elif self._strict and key not in _CALL_KEYS:
                break  # an answer that is JSON; it should not be held until its end
            elif not (yield from r.value(_ignore)):
                break
            if (yield from r.space()) == ",":
                r.take(1)
            elif (yield from r.peek()) != "}":
                break
        closed = (yield from r.literal("}")) != ""
        if ended:
            return True
        return closed and self._whole_arguments(name, "{}" if arguments is None else arguments)

    def _key(self) -> Steps[str | None]:
        """Read the next key and its colon; None if there is no key."""
        r = self._reader
        yield from r.space()
        key = yield from r.string(MAX_NAME)
        if key is None or (yield from r.space()) != ":":
            return None
        r.take(1)
        yield from r.space()
        return key

    def _buffered(self) -> Steps[str | None]:
        """Arguments that come before the name, or as JSON text in a string, or null."""
        pieces: list[str] = []
        if not (yield from self._reader.value(pieces.append)):
            return None
        text = "".join(pieces).strip(SPACE)
        if text == "null":
            return "{}"
        return (unquoted(text) or "") if text.startswith('"') else text

    # --- name, marker, arguments ------------------------------------------------------------------

    def _named(self) -> Steps[bool]:
        """`NAME[ARGS]{...}`, `NAME{...}`, `NAME<sep>{...}`, and DeepSeek's `function<sep>NAME` with the
        arguments in a Markdown fence."""
        r, ends = self._reader, self._form.named
        pieces: list[str] = []
        found = yield from r.until((*ends, "{"), pieces.append, limit=MAX_NAME)
        if not found:
            return False
        if found == "{":
            r.back(1)
        elif (yield from r.space()) not in ("{", "[") and "".join(pieces).strip(
            SPACE
        ) == "function":
            pieces.clear()
            if not (yield from r.until(("\n",), pieces.append, limit=MAX_NAME)):
                return False
            yield from r.space()
            yield from r.literal("```json")
        elif found == "[CALL_ID]":
            yield from r.until(("[ARGS]",), _ignore, limit=MAX_NAME)
        if not (yield from self._stream_arguments("".join(pieces).strip(SPACE))):
            return False
        r.keep()
        yield from r.space()
        yield from r.literal("```")
        return True

    # --- <function=f><parameter=a>...</parameter></function> --------------------------------------

    def _tagged(self) -> Steps[bool]:
        r = self._reader
        pieces: list[str] = []
        if not (yield from r.until((">",), pieces.append, limit=MAX_NAME)):
            return False
        name = "".join(pieces).strip(SPACE)
        if (yield from r.space()) == "{":  # Llama 3.1's form
            done = yield from self._stream_arguments(name)
        else:
            done = self._begin(name) and (yield from self._parameters(self._tools.get(name, {})))
        if done:
            r.keep()
            yield from r.space()
            yield from r.literal("</function>")
        return done

    def _parameters(self, schema: Mapping[str, object]) -> Steps[bool]:
        r = self._reader
        before = "{"
        while True:
            yield from r.space()
            tag = yield from r.literal("<parameter=", "</function>")
            if tag != "<parameter=":
                break
            pieces: list[str] = []
            if not (yield from r.until((">",), pieces.append, limit=MAX_NAME)):
                return False
            key = "".join(pieces).strip(SPACE)
            yield from r.literal("\n")
            self._argue(f'{before}"{escaped(key)}": ')
            before = ", "
            if not (yield from self._parameter(_type_of(schema, key))):
                return False
        if not tag:
            return False
        self._argue("{}" if before == "{" else "}")
        self._end()
        return True

    def _parameter(self, kind: object) -> Steps[bool]:
        """Values are strings without quotes, or anything else as JSON or Python."""
        r = self._reader
        ends = ("\n</parameter>", "</parameter>")
        if kind == "string":
            self._argue('"')
            found = yield from r.until(ends, lambda text: self._argue(escaped(text)))
            if found:
                self._argue('"')
            return found != ""
        pieces: list[str] = []
        found = yield from r.until(ends, pieces.append)
        text = "".join(pieces)
        self._argue(_as_json(text) or f'"{escaped(text)}"')
        return found != ""

    # --- f(a=1, b="x") ----------------------------------------------------------------------------

    def _python_call(self) -> Steps[bool]:
        r = self._reader
        name = yield from self._identifier()
        if (yield from r.space()) != "(":
            return False
        r.take(1)
        key = ""
        if (yield from r.space()) != ")":
            key = yield from self._identifier()
            if not key or (yield from r.space()) != "=":
                return False
        if not self._begin(name):
            return False
        before = "{"
        while key:
            r.take(1)
            self._argue(f'{before}"{escaped(key)}": ')
            before = ", "
            if not (yield from self._python_value(0)):
                return False
            if (yield from r.space()) != ",":
                break
            r.take(1)
            yield from r.space()
            key = yield from self._identifier()
            if key and (yield from r.space()) != "=":
                return False
        if (yield from r.space()) != ")":
            return False
        r.take(1)
        self._argue("{}" if before == "{" else "}")
        self._end()
        return True

    def _identifier(self) -> Steps[str]:
        """A name, with dots; "" if there is none."""
        return (yield from self._run_of(lambda char: char.isalnum() or char in "_.-"))

    def _run_of(self, belongs: Callable[[str], bool], most: int = MAX_NAME) -> Steps[str]:
        r = self._reader
        chars: list[str] = []
        while len(chars) < most:
            char = yield from r.peek()
            if not char or not belongs(char):
                break
            chars.append(r.take(1))
        return "".join(chars)

    def _python_value(self, depth: int) -> Steps[bool]:
        """Read a Python literal; returns it as JSON text."""
        r = self._reader
        char = yield from r.space()
        if char in ("'", '"'):
            return (yield from self._python_string())
        if char in ("[", "(", "{") and depth < MAX_LITERAL_DEPTH:
            return (yield from self._python_items(depth))
        word = yield from self._run_of(
            lambda char: char.isascii() and (char.isalnum() or char in "+-.")
        )
        said = _PYTHON_WORDS.get(word, word)
        if not word or not is_word(said):
            return False
        self._argue(said)
        return True

    def _python_items(self, depth: int) -> Steps[bool]:
        r = self._reader
        opening = r.take(1)
        closing = {"[": "]", "(": ")", "{": "}"}[opening]
        is_dict = opening == "{"
        self._argue("{" if is_dict else "[")
        first = True
        while (yield from r.space()) != closing:
            if not first:
                self._argue(", ")
            first = False
            if is_dict:
                if (yield from r.peek()) not in ("'", '"'):
                    return False
                if not (yield from self._python_string()) or (yield from r.space()) != ":":
                    return False
                r.take(1)
                self._argue(": ")
            if not (yield from self._python_value(depth + 1)):
                return False
            if (yield from r.space()) == ",":
                r.take(1)
            elif (yield from r.peek()) != closing:
                return False
        r.take(1)
        self._argue("}" if is_dict else "]")
        return True

    def _python_string(self) -> Steps[bool]:
        r = self._reader
        quote = r.take(1)
        self._argue('"')
        while True:
            found = yield from r.until((quote, "\\"), lambda text: self._argue(escaped(text)))
            if found != "\\":
                break
            yield from r.peek()
            char = r.take(1)
            if char in _HEX_ESCAPES:
                digits = yield from self._run_of(_HEX.__contains__, _HEX_ESCAPES[char])
                whole = len(digits) == _HEX_ESCAPES[char]
                self._argue("\\u" + digits.zfill(4) if whole else escaped("\\" + char + digits))
            else:
                self._argue(escaped(_PYTHON_ESCAPES.get(char, "\\" + char)))
        if found:
            self._argue('"')
        return found != ""


_CALL_KEYS = ("name", "arguments", "parameters", "type", "id")
_HEX = frozenset("0123456789abcdefABCDEF")
_HEX_ESCAPES = {"x": 2, "u": 4}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_PYTHON_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "\n": ""}


def _ignore(text: str) -> None:
    pass


def is_object(text: str) -> bool:
    """Whether `text` is a JSON object."""
    scanner = JsonScanner()
    _, end = scanner.scan(text, 0, len(text))
    return scanner.finish() and not text[end:].strip(SPACE) and text.lstrip(SPACE).startswith("{")


def _type_of(schema: Mapping[str, object], key: str) -> object:
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return found.get("type") if isinstance(found, Mapping) else None


def _as_json(text: str) -> str | None:
    """`text` if it is a JSON value or one of True, False and None; else None."""
    text = text.strip(SPACE)
    text = _PYTHON_WORDS.get(text, text)
    scanner = JsonScanner()
    said, end = scanner.scan(text, 0, len(text))
    return said if scanner.finish() and end == len(text) else None

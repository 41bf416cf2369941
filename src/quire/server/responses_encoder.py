"""Writes outputs as OpenAI's responses: items, and for a stream the events of each item.

response.created, in_progress; for each item output_item.added, then for text and reasoning
content_part.added, deltas, done, content_part.done, for a call the deltas of its arguments and done; then
output_item.done; at the end response.completed, incomplete or failed, with the whole response.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from msgspec import UNSET

from quire.outputs import CompletionOutput, RequestOutput
from quire.server.chat import StartedChat
from quire.server.dialect_schemas import ResponsesRequest
from quire.server.dialects import Change, Extended, Opened, Piece, Pieces
from quire.server.engine_protocol import ServedModel
from quire.server.errors import ApiError
from quire.server.live import ClientGoneError
from quire.server.logprobs import LogprobFormatter
from quire.server.responses_tools import Offer, custom_input
from quire.server.sse import named_event
from quire.server.usage import UsageMeter
from quire.server.wire import TokenLogprob, encode

Object = dict[str, object]

STATUS = {"length": "incomplete", "timeout": "incomplete", "abort": "cancelled"}
"""finish_reason -> status; otherwise "completed"."""
ID_PREFIXES = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}


class ResponsesEncoder:
    def __init__(
        self,
        asked: ResponsesRequest,
        chat: StartedChat,
        model: ServedModel,
        *,
        offers: Mapping[str, Offer],
        logprobs: bool,
        on_change: Callable[[str, Object], None],
    ) -> None:
        """offers: the tools by the names that the model sees. on_change: called with the id and the
        response when the status changes."""
        self.frame = chat.frame
        self._offers = offers
        self._on_change = on_change
        self._pieces = Pieces(chat.reader)
        self._reader = chat.reader
        self._meter = UsageMeter(prefixes=asked.return_prefix_details)
        self._logprobs = (
            LogprobFormatter(model.tokenizer, top=asked.top_logprobs or 0, as_ids=False)
            if logprobs
            else None
        )
        self._unreported: list[TokenLogprob] = []
        """Logprobs of tokens that are in no event yet."""
        self._reported: list[TokenLogprob] = []
        """Logprobs of the open piece."""
        self._input = ""
        """The input so far of the open piece, if it is a call of a custom tool."""
        self._items: list[Object] = []
        self._num_events = 0
        self._finish_reason: str | None = None
        self._fixed = _fixed_part(asked, chat)
        self._status = "in_progress"

    # --- the whole response ---

    def response(self, error: Object | None = None) -> Object:
        """The response in its current state."""
        incomplete = self._status == "incomplete"
        ended = self._status not in ("in_progress", "queued")
        changing: Object = {
            "status": self._status,
            "output": list(self._items),
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "error": error,
            "usage": self._usage() if ended else None,
        }
        return self._fixed | changing | self._meter.handed_on()

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        for output in outputs:
            self.chunk(0, output)
        return encode(self._end(STATUS.get(self._finish_reason or "", "completed")))

    def _usage(self) -> Object:
        usage = self._meter.usage()
        details = usage.prompt_tokens_details
        prefix: Object = {} if details.prefix is UNSET else {"prefix": details.prefix}
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": details.cached_tokens,
                "cache_write_tokens": 0,
                **prefix,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reader.reasoning_tokens or 0},
            "total_tokens": usage.total_tokens,
        }

    def _end(self, status: str, error: Object | None = None) -> Object:
        self._status = status
        response = self.response(error)
        self._on_change(self.frame.id, response)
        return response

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Makes sure that the response does not stay in progress, whatever is raised inside."""
        try:
            yield
        except ClientGoneError:
            raise
        except Exception:
            self._settle("failed")
            raise
        finally:
            self._settle("cancelled")

    def _settle(self, status: str) -> None:
        if self._status == "in_progress":
            message = "The engine failed on this request."
            failed = status == "failed"
            self._end(status, {"code": "server_error", "message": message} if failed else None)

    # --- a stream ---

    def opening(self) -> bytes:
        return b"".join(
            self._event(name, response=self.response())
            for name in ("response.created", "response.in_progress")
        )

    def chunk(self, prompt_index: int, output: RequestOutput) -> bytes:
        self._meter.add(prompt_index, output)
        return b"".join(self._part(part) for part in output.outputs)

    def last(self) -> bytes:
        response = self._end(STATUS.get(self._finish_reason or "", "completed"))
        completed = self._status == "completed"
        name = "response.completed" if completed else "response.incomplete"
        return self._event(name, response=response)

    def failed(self, error: ApiError) -> bytes:
        """Called instead of `last`."""
        self._finish_reason = "error"
        closing = [self._change(change) for change in self._pieces.close(by_end=True)]
        response = self._end("failed", {"code": "server_error", "message": error.message})
        return b"".join([*closing, self._event("response.failed", response=response)])

    def _part(self, part: CompletionOutput) -> bytes:
        self._finish_reason = part.finish_reason
        if self._logprobs is not None and part.logprobs is not None:
            self._unreported += self._logprobs.chat(part.token_ids, part.logprobs).content
        return b"".join(self._change(change) for change in self._pieces.read(part))

    def _change(self, change: Change) -> bytes:
        piece = change.piece
        if isinstance(change, Opened):
            return self._opened(piece)
        if isinstance(change, Extended):
            return self._extended(piece, change.text)
        return self._closed(piece, by_end=change.by_end)

    def _opened(self, piece: Piece) -> bytes:
        self._reported, self._input = [], ""
        item = self._item(piece, "in_progress")
        if piece.kind != "call":
            item["content"] = []
        added = self._event("response.output_item.added", output_index=piece.index, item=item)
        if piece.kind == "call":
            return added
        return added + self._piece_event(
            "response.content_part.added", piece, part=self._content(piece)
        )

    def _extended(self, piece: Piece, text: str) -> bytes:
        if self._offer(piece).custom:
            return self._more_input(piece, custom_input(piece.text))
        if piece.kind == "call":
            return self._piece_event("response.function_call_arguments.delta", piece, delta=text)
        if piece.kind == "reasoning":
            return self._piece_event("response.reasoning_text.delta", piece, delta=text)
        new, self._unreported = self._unreported, []
        self._reported += new
        return self._piece_event(
            "response.output_text.delta", piece, delta=text, logprobs=_without_bytes(new)
        )

    def _more_input(self, piece: Piece, text: str | None) -> bytes:
        """The delta from the input so far to `text`; none if `text` does not begin with it."""
        if text is None or text == self._input or not text.startswith(self._input):
            return b""
        delta, self._input = text[len(self._input) :], text
        return self._piece_event("response.custom_tool_call_input.delta", piece, delta=delta)

    def _closed(self, piece: Piece, *, by_end: bool) -> bytes:
        cut = by_end and self._finish_reason not in ("stop", "repetition")
        done = self._done(piece, by_end=by_end)
        item = self._item(piece, "incomplete" if cut else "completed")
        self._items.append(item)
        return done + self._event("response.output_item.done", output_index=piece.index, item=item)

    def _done(self, piece: Piece, *, by_end: bool) -> bytes:
        """The events before output_item.done."""
        if self._offer(piece).custom:
            text = custom_input(piece.text)
            rest = self._more_input(piece, piece.text if text is None else text)
            return rest + self._piece_event(
                "response.custom_tool_call_input.done", piece, input=self._input
            )
        if piece.kind == "call":
            return self._piece_event(
                "response.function_call_arguments.done", piece, arguments=piece.text
            )
        if piece.kind == "reasoning":
            done = self._piece_event("response.reasoning_text.done", piece, text=piece.text)
        else:
            self._reported += self._unreported if by_end else []
            done = self._piece_event(
                "response.output_text.done",
                piece,
                text=piece.text,
                logprobs=_without_bytes(self._reported),
            )
        return done + self._piece_event(
            "response.content_part.done", piece, part=self._content(piece)
        )

    def _offer(self, piece: Piece) -> Offer:
        """The tool of a call."""
        return self._offers.get(piece.name) or Offer(piece.name)

    def _item_id(self, piece: Piece) -> str:
        return ("ctc_" if self._offer(piece).custom else ID_PREFIXES[piece.kind]) + piece.id

    def _item(self, piece: Piece, status: str) -> Object:
        if piece.kind == "call":
            return self._call(piece, status)
        common: Object = {"id": self._item_id(piece), "status": status}
        content = [self._content(piece)]
        if piece.kind == "reasoning":
            return common | {"type": "reasoning", "summary": [], "content": content}
        return common | {"type": "message", "role": "assistant", "content": content}

    def _call(self, piece: Piece, status: str) -> Object:
        """The item of a call. Calls of custom tools have no status."""
        offer = self._offer(piece)
        call: Object = {"call_id": piece.call_id, "name": offer.name}
        if offer.namespace is not None:
            call["namespace"] = offer.namespace
        if offer.custom:
            return call | {
                "id": self._item_id(piece),
                "type": "custom_tool_call",
                "input": self._input,
            }
        return call | {
            "id": self._item_id(piece),
            "status": status,
            "type": "function_call",
            "arguments": piece.text,
        }

    def _content(self, piece: Piece) -> Object:
        if piece.kind == "reasoning":
            return {"type": "reasoning_text", "text": piece.text}
        return {
            "type": "output_text",
            "text": piece.text,
            "annotations": [],
            "logprobs": list(self._reported),
        }

    def _piece_event(self, name: str, piece: Piece, **fields: object) -> bytes:
        if piece.kind != "call":
            fields["content_index"] = 0
        item = self._item_id(piece)
        return self._event(name, item_id=item, output_index=piece.index, **fields)

    def _event(self, name: str, **fields: object) -> bytes:
        number = self._num_events
        self._num_events += 1
        return named_event(name, encode({"type": name, "sequence_number": number} | fields))


def _without_bytes(logprobs: Sequence[TokenLogprob]) -> list[Object]:
    """In the form that events use."""
    return [
        {
            "token": entry.token,
            "logprob": entry.logprob,
            "top_logprobs": [
                {"token": top.token, "logprob": top.logprob} for top in entry.top_logprobs
            ],
        }
        for entry in logprobs
    ]


def _fixed_part(asked: ResponsesRequest, chat: StartedChat) -> Object:
    """The fields that are known from the start: mostly the request's, with the values in effect."""
    params, frame = chat.reader.params, chat.frame
    fixed: Object = {
        "id": frame.id,
        "object": "response",
        "created_at": frame.created,
        "model": frame.model,
        "instructions": asked.instructions,
        "previous_response_id": asked.previous_response_id,
        "max_output_tokens": asked.max_output_tokens,
        "tools": asked.tools or [],
        "tool_choice": asked.tool_choice or "auto",
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "text": {"format": {"type": "text"}} | (asked.text or {}),
        "reasoning": {"effort": None, "summary": None} | (asked.reasoning or {}),
        "truncation": asked.truncation or "disabled",
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": asked.top_logprobs or 0,
        "background": asked.background is True,
        "metadata": asked.metadata or {},
    }
    return fixed | ({"warnings": frame.warnings} if frame.warnings else {})

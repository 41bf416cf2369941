"""Turns exceptions into answers, for every endpoint, streamed or not.

A client sees either the message of one of our own errors, or a fixed sentence with the request's id. The
texts of other libraries' exceptions are only logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from quire.errors import (
    EngineDeadError,
    EngineError,
    EngineSleepingError,
    ModelNotFoundError,
    PromptTooLongError,
    QueueFullError,
    QuireError,
    RequestError,
)

logger = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFoundError",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Payload Too Large",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "Service Unavailable",
}
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}
"""Other statuses are "invalid_request_error"."""
MAX_MESSAGE_CHARS = 2000
RETRY_AFTER_LOADING = 2
RETRY_AFTER_DRAINING = 10


class ApiError(QuireError):
    """A complete error answer: status, body in OpenAI's format, headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:MAX_MESSAGE_CHARS]
        self.param = param
        self.kind = kind or TYPES.get(status, "Error")
        self.headers = headers or {}

    def body(self, scope: Mapping[str, Any]) -> bytes:
        """The body in the dialect of the request's path."""
        if speaks_anthropic(scope):
            return msgspec.json.encode(self.anthropic(scope))
        return msgspec.json.encode({"error": self.payload()})

    def anthropic(self, scope: Mapping[str, Any]) -> dict[str, object]:
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        error = {"type": kind, "message": self.message}
        request_id = scope.get("state", {}).get("request_id")
        return {"type": "error", "error": error, "request_id": request_id}

    def payload(self) -> dict[str, str | int | None]:
        return {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.status,
        }


def routed_path(scope: Mapping[str, Any]) -> str:
    """The path that the router sees, without the prefix that a proxy should have removed."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path


def speaks_anthropic(scope: Mapping[str, Any]) -> bool:
    path = routed_path(scope)
    return path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/")


def bad_request(message: str, *, param: str | None) -> ApiError:
    """The error for a field of the right type whose value cannot be served."""
    return ApiError(400, message, param=param)


def malformed(message: str, *, param: str | None = None) -> ApiError:
    """The error for a body or field of the wrong form. Its type is the status phrase, as in vLLM."""
    return ApiError(400, message, param=param, kind="Bad Request")


def unavailable(message: str, *, retry_after: int) -> ApiError:
    return ApiError(503, message, headers={"retry-after": str(retry_after)})


def replica_lost() -> ApiError:
    """For a request whose engine core has stopped. Others serve it when it is sent again, as clients do."""
    return unavailable("The engine core of this request has stopped.", retry_after=1)


def to_api_error(error: BaseException, request_id: str) -> ApiError:
    """The answer for any exception. Logs those that are not the client's fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelNotFoundError):
        return ApiError(404, str(error), param=error.param or "model")
    if isinstance(error, PromptTooLongError):
        param = "max_tokens" if error.param == "max_tokens" else "input_tokens"
        return bad_request(str(error), param=param)
    if isinstance(error, RequestError):
        return bad_request(str(error), param=error.param)
    if isinstance(error, QueueFullError):
        seconds = max(1, math.ceil(error.retry_after))
        return ApiError(429, str(error), headers={"retry-after": str(seconds)})
    if isinstance(error, EngineSleepingError):
        return unavailable(str(error), retry_after=RETRY_AFTER_DRAINING)
    if isinstance(error, EngineDeadError):
        logger.error("request %s: the engine is gone: %s", request_id, error)
        return ApiError(
            500, f"The engine has stopped; the server is about to exit. Request {request_id}."
        )
    if isinstance(error, EngineError):
        logger.error("request %s: %s", request_id, error)
        return ApiError(500, f"The engine failed on this request. Request {request_id}.")
    logger.error("request %s: unexpected error", request_id, exc_info=error)
    return internal_error(request_id)


def internal_error(request_id: str) -> ApiError:
    return ApiError(500, f"Internal server error. Request {request_id}.")

"""One error shape for every route: OpenAI's {"error": {message, type, param, code}}, the message one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

INTERNAL = "the engine failed on this request; its log says why"
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "service_unavailable_error"}


class ApiError(Exception):
    """Refused: what the client sees."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status == 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def install(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    sentences = {
        404: f"there is no {request.url.path} here; /v1/models, /v1/chat/completions and /v1/completions are",
        405: f"{request.url.path} does not take {request.method}",
    }
    return ApiError(sentences.get(error.status_code, str(error.detail)), status=error.status_code).response()


async def _internal_error(_: Request, __: Exception) -> JSONResponse:
    """Starlette logs the traceback; the client gets no part of it."""
    return ApiError(INTERNAL, status=500).response()


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The most telling of pydantic's findings as one sentence with the field's path and what was seen."""
    first = _most_telling(errors)
    if first["type"] in ("json_invalid", "json_type"):
        return ApiError(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    path = _path(first["loc"])
    if not path:
        return ApiError("the body must be a JSON object, sent as application/json")
    if first["type"] == "missing":
        return ApiError(f"{path} is missing", param=path)
    return ApiError(f"{path} is {_shown(first['input'])}; {_remedy(first['msg'])}", param=path)


def _most_telling(errors: Sequence[Any]) -> Any:
    """A value that may be one of several types has findings for each; the type that it nearly was has the fewest,
    and the deepest."""
    same_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]

    def badness(error: Any) -> tuple[int, int]:
        return sum(other["loc"][:3] == error["loc"][:3] for other in same_field), -len(error["loc"])

    return min(same_field, key=badness)


def _path(location: Sequence[int | str]) -> str:
    """('body', 'messages', 0, 'role') -> messages[0].role; names of union members are left out."""
    text = ""
    for part in location[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            text += f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _remedy(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return message if message.startswith(("must", "this", "it")) else f"must be {message}"

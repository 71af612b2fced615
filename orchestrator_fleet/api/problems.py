"""Every error as RFC 9457 problem+json: the one place where exceptions become HTTP."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, InternalServerException, ValidationException

from orchestrator_fleet import errors, log
from orchestrator_fleet.history.database import HistoryUnusable
from orchestrator_fleet.history.sql import QueryInvalid, QueryTooLong
from orchestrator_fleet.wire.http import NO_NUL, FieldError, ProblemDetails

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:orchestrator-fleet:problem:"
RETRY_AFTER_S = 1

# These pass by themselves, or by somebody's hand: the caller does well to come again.
_COME_BACK = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INSUFFICIENT_STORAGE, HTTPStatus.TOO_MANY_REQUESTS)

# What msgspec says of a value, where it takes a programmer to know what was wanted.
_CLEARER = (
    (
        re.compile(r"Invalid RFC3339 encoded datetime|Expected datetime with a timezone component"),
        "wanted a time with its zone (RFC 3339), such as 2026-11-20T09:00:00Z",
    ),
    (re.compile(re.escape(f"Expected str matching regex {NO_NUL!r}")), "got a NUL character; leave it out"),
)

_log = log.get(__name__)


class MissingScope(errors.TaskError):
    """The key is good, but lacks the scope."""

    code = "missing_scope"


class Unauthorized(errors.TaskError):
    """The key was good when the request came, and is good no more."""

    code = "unauthorized"
    headers: ClassVar = {"WWW-Authenticate": "Bearer"}


class TooMany(errors.TaskError):
    """Too many requests; wait a moment, `retry_after_s` if that is known."""

    code = "too_many_requests"

    def __init__(self, message: str, *, retry_after_s: float = RETRY_AFTER_S) -> None:
        self.headers = {"Retry-After": retry_after(retry_after_s)}
        super().__init__(message)


class Malformed(errors.TaskError):
    """The body is not JSON."""

    code = "malformed_json"


STATUS_OF: Mapping[type[Exception], int] = {
    errors.NotFound: 404,
    errors.InvalidTransition: 409,
    errors.LeaseLost: 409,
    errors.Conflict: 409,
    errors.Invalid: 422,
    Unauthorized: 401,
    MissingScope: 403,
    errors.Forbidden: 403,
    Malformed: 400,
    TooMany: 429,
    errors.TaskError: 409,
    errors.Refused: 409,
    errors.SpecInvalid: 422,
    QueryInvalid: 422,
    QueryTooLong: 422,
    HistoryUnusable: 503,
    errors.StoreFull: 507,
    errors.StoreError: 503,
    errors.FleetError: 500,
}

# A Conflict whose code HTTP has a status of its own for.
_STATUS_OF_CODE = {"stale": 412, "precondition_required": 428}

_CODE_OF: Mapping[type[Exception], str] = {QueryInvalid: "query_invalid", QueryTooLong: "query_too_long"}

_CODE_OF_STATUS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "invalid",
    503: "unavailable",
}


def retry_after(wait_s: float) -> str:
    """`Retry-After` in whole seconds, which is what it is written in."""
    return str(max(RETRY_AFTER_S, math.ceil(wait_s)))


def details(
    *, status: int, code: str, detail: str, field_errors: tuple[FieldError, ...] = (), request_id: str = ""
) -> ProblemDetails:
    """A problem's body; its title is the status's own name."""
    return ProblemDetails(
        type=TYPE_PREFIX + code,
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        errors=field_errors,
        request_id=request_id,
    )


def of_error(error: Exception) -> ProblemDetails:
    """The problem that an exception is. Anything not foreseen is a 500 that tells nothing of the inside."""
    if isinstance(error, ValidationException):
        return _of_validation(error)
    if isinstance(error, InternalServerException) and "disconnected" in error.detail:
        return details(status=400, code="bad_request", detail="the request ended before its body did")
    if isinstance(error, HTTPException):
        status = error.status_code
        return details(status=status, code=_CODE_OF_STATUS.get(status, "error"), detail=_http_detail(error))
    status = next((STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF), 500)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return details(status=500, code="internal", detail="the control plane failed; its log says why")
    field_errors = (
        tuple(FieldError(field=field, message=message) for field, message in error.errors)
        if isinstance(error, errors.Invalid)
        else ()
    )
    code = getattr(error, "code", "") or _CODE_OF.get(type(error)) or _CODE_OF_STATUS.get(status, "error")
    return details(status=_STATUS_OF_CODE.get(code, status), code=code, detail=str(error), field_errors=field_errors)


def _http_detail(error: HTTPException) -> str:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return "there is no such route; /schema/openapi.json lists them"
    return error.detail


def _of_validation(error: ValidationException) -> ProblemDetails:
    extra: Any = error.extra or []
    found = tuple(
        _field_error(item.get("key", ""), item.get("message", "")) for item in extra if isinstance(item, dict)
    ) or (FieldError(field="", message=error.detail),)
    detail = "; ".join(f"{item.field}: {item.message}" for item in found)
    return details(status=422, code="invalid", detail=detail, field_errors=found)


def _field_error(key: str, message: str) -> FieldError:
    if key == "data":
        return FieldError(field="body", message="is missing; send a JSON object")
    return FieldError(field=key, message=clearer(message))


def clearer(message: str) -> str:
    """What msgspec says of a wrong value, so that it says what was wanted."""
    plain = message.replace("`", "")
    return next((text for said, text in _CLEARER if said.match(plain)), plain)


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    problem = msgspec.structs.replace(of_error(error), request_id=request.scope.get("state", {}).get("request_id", ""))
    if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.exception("request failed", request_id=problem.request_id, path=request.scope["path"])
    headers = dict(getattr(error, "headers", None) or {})
    if problem.status in _COME_BACK:
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return Response(
        content=msgspec.json.encode(problem), status_code=problem.status, media_type=MEDIA_TYPE, headers=headers
    )

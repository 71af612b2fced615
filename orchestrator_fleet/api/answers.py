"""The answers that the OpenAPI document lists beside the good one: which problems each route may answer with.

They follow from what a route is (open or not, with a body, with an id in its path, a write), as the refusals themselves
do: the door's, the guards', the bodies' and the store's.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus

from litestar.openapi.spec import (
    Components,
    OpenAPI,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    Schema,
)

from orchestrator_fleet.api import sse
from orchestrator_fleet.api.door import OPEN_ROUTES
from orchestrator_fleet.api.problems import MEDIA_TYPE

METHODS = ("get", "put", "post", "delete")
EVENTS, POLL, PLAN = "/api/events", "/api/tasks/poll", "/api/fleet/plan"
_NAME = "ProblemDetails"
_TEXT = Schema(type=OpenAPIType.STRING)
_PROBLEM = Schema(
    type=OpenAPIType.OBJECT,
    title=_NAME,
    description="RFC 9457. `code` is the word that programs go by; `errors` tells every wrong field.",
    required=["type", "title", "status", "detail", "code"],
    properties={
        "type": _TEXT,
        "title": _TEXT,
        "status": Schema(type=OpenAPIType.INTEGER),
        "detail": _TEXT,
        "code": _TEXT,
        "errors": Schema(
            type=OpenAPIType.ARRAY,
            items=Schema(
                type=OpenAPIType.OBJECT, properties={"field": _TEXT, "message": _TEXT}, required=["field", "message"]
            ),
        ),
        "request_id": _TEXT,
    },
)


def list_problems(document: OpenAPI) -> None:
    """Write into `document` which problems each of its routes may answer with."""
    document.components = document.components or Components()
    document.components.schemas[_NAME] = _PROBLEM
    for path, item in (document.paths or {}).items():
        for method in METHODS:
            operation: Operation | None = getattr(item, method)
            if operation is None or not path.startswith("/api/"):
                continue
            answers = {
                status: answer
                for status, answer in (operation.responses or {}).items()
                if int(status) < HTTPStatus.BAD_REQUEST
            }
            empty = answers.get(str(int(HTTPStatus.NO_CONTENT)))
            if isinstance(empty, OpenAPIResponse):
                empty.content = None
            for status in _problems_of(method, path, operation):
                answers[str(int(status))] = _problem(status)
            operation.responses = answers
            if "Last-Event-ID" in _headers(operation):
                _list_stream(operation, alone=path == EVENTS)


def _problems_of(method: str, path: str, operation: Operation) -> Iterator[HTTPStatus]:
    names = _headers(operation)
    if operation.request_body is not None:
        yield HTTPStatus.BAD_REQUEST
    is_open = (method.upper(), path) in OPEN_ROUTES
    if not is_open:
        yield HTTPStatus.UNAUTHORIZED
        yield HTTPStatus.FORBIDDEN
    if "{" in path:
        yield HTTPStatus.NOT_FOUND
    changes = method != "get" and ("Idempotency-Key" in names or path.startswith("/api/tasks/"))
    if changes or path == PLAN:
        yield HTTPStatus.CONFLICT
    if "If-Match" in names:
        yield HTTPStatus.PRECONDITION_FAILED
        if not path.startswith("/api/tasks/"):
            yield HTTPStatus.PRECONDITION_REQUIRED
    if operation.request_body is not None:
        yield HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    yield HTTPStatus.UNPROCESSABLE_ENTITY
    yield HTTPStatus.TOO_MANY_REQUESTS
    yield HTTPStatus.SERVICE_UNAVAILABLE
    if changes or path == POLL:
        yield HTTPStatus.INSUFFICIENT_STORAGE


def _headers(operation: Operation) -> list[str]:
    return [one.name for one in operation.parameters or [] if isinstance(one, Parameter)]


def _list_stream(operation: Operation, *, alone: bool) -> None:
    """The good answer may be, or is, a stream of server-sent events."""
    stream = {sse.MEDIA_TYPE: OpenAPIMediaType(schema=_TEXT)}
    for status, answer in (operation.responses or {}).items():
        if int(status) < HTTPStatus.BAD_REQUEST and isinstance(answer, OpenAPIResponse):
            answer.content = stream if alone else {**(answer.content or {}), **stream}


def _problem(status: HTTPStatus) -> OpenAPIResponse:
    schema = Reference(ref=f"#/components/schemas/{_NAME}")
    return OpenAPIResponse(description=status.phrase, content={MEDIA_TYPE: OpenAPIMediaType(schema=schema)})

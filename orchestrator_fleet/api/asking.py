"""What every handler needs of a request: the key's scopes, pages, lists in a query string, versions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, ParamSpec, TypeVar, get_args

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.params import Dependency, Parameter

from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import MissingScope
from orchestrator_fleet.clock import from_datetime
from orchestrator_fleet.errors import Forbidden, Invalid
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.wire.http import DEFAULT_PAGE, MAX_PAGE, MAX_QUERY_CHARS, MAX_WORDS, NO_NUL

Asked = Request[KnownKey, KnownKey, Any]
OfPlane = Annotated[Plane, Dependency(skip_validation=True)]
Limit = Annotated[int, Parameter(ge=1, le=MAX_PAGE, default=DEFAULT_PAGE, description="Items a page.")]
Cursor = Annotated[str | None, Parameter(max_length=1_000, description="`next_cursor` of the page before.")]
Words = Annotated[list[str] | None, Parameter(max_items=MAX_WORDS, description="Repeatable, or separated by commas.")]
Text = Annotated[str | None, Parameter(max_length=MAX_QUERY_CHARS, pattern=NO_NUL)]
Time = Annotated[datetime | None, Parameter(description="RFC 3339.")]

P = ParamSpec("P")
T = TypeVar("T")
Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], Awaitable[None]]


def needs(scope: str) -> Guard:
    """A guard that lets through only keys with `scope`. Async, as Litestar runs others in a thread of their own."""

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        if not connection.scope["auth"].allows(scope):
            raise MissingScope(f"this needs a key with the scope {scope}")

    return guard


def acts(scope: str, *, own: str | None = None) -> Guard:
    """A guard of routes with `{vp}`: needs `scope`, or `own` of that orchestrator's own key.

    An orchestrator's key acts for that orchestrator alone; one of a person or a service for any.
    """

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        key: KnownKey = connection.scope["auth"]
        is_own = key.owner == connection.path_params["vp"]
        if not key.allows(scope) and not (own is not None and is_own and key.allows(own)):
            raise MissingScope(f"this needs a key with the scope {scope}")
        if key.acts_for is not None and not is_own:
            raise for_it_alone(key.owner)

    return guard


def for_it_alone(owner: str) -> Forbidden:
    """What is said to an orchestrator's own key that is used for another one, or for all."""
    return Forbidden(f"the key of {owner} acts for it alone; take a person's or a service's key")


def check_for_all(key: KnownKey) -> None:
    """Raise Forbidden unless `key` acts for any orchestrator, and so for all of them."""
    if key.acts_for is not None:
        raise for_it_alone(key.owner)


async def refuse_unknown_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard: a filter with a typing error in its name must not list everything."""
    parameters = handler.parsed_fn_signature.parameters
    # A name that is a word of Python's, such as `with`, is another one in the signature.
    known = {getattr(one.kwarg_definition, "name", None) or name for name, one in parameters.items()}
    unknown = sorted(name for name in connection.query_params if name not in known)
    if unknown:
        raise Invalid([(name[:100], "is not a known query parameter") for name in unknown])


def claims_for(key: KnownKey, orchestrator: str) -> None:
    """Raise MissingScope unless `key` may claim tasks of `orchestrator`."""
    if not key.claims_for(orchestrator):
        raise MissingScope(f"claiming for another than the key's owner, {key.owner}, needs a key with the scope admin")


def words(field: str, given: list[str] | None, *, among: Iterable[str] | None = None) -> tuple[str, ...]:
    """`["a,b", "c"]` -> `("a", "b", "c")`; raises Invalid on a word that is not `among` those."""
    found = tuple(word for text in given or () for word in text.split(",") if word)
    if len(found) > MAX_WORDS:
        raise Invalid([(field, f"got {len(found)} words, wanted at most {MAX_WORDS}")])
    if any("\0" in word for word in found):
        raise Invalid([(field, "got a NUL character; leave it out")])
    if among is not None:
        known = tuple(among)
        wrong = [word for word in found if word not in known]
        if wrong:
            raise Invalid([(field, f"got {word[:100]!r}, wanted one of {', '.join(known)}") for word in wrong])
    return found


def one_of(field: str, given: str | None, *, among: Any, default: str) -> str:
    """A word of a Literal type; raises Invalid on another."""
    known = get_args(among)
    if given is None:
        return default
    if given not in known:
        raise Invalid([(field, f"got {given[:100]!r}, wanted one of {', '.join(known)}")])
    return given


class Query:
    """Reads a query string's values one by one; `check` then tells every wrong one at once."""

    def __init__(self) -> None:
        self._wrong: list[tuple[str, str]] = []

    def words(self, field: str, given: list[str] | None, *, among: Iterable[str] | None = None) -> tuple[str, ...]:
        """See `words`."""
        return self._read((), words, field, given, among=among)

    def one_of(self, field: str, given: str | None, *, among: Any, default: str) -> str:
        """See `one_of`."""
        return self._read(default, one_of, field, given, among=among, default=default)

    def instant(self, field: str, given: datetime | None) -> int | None:
        """See `instant`."""
        return self._read(None, instant, field, given)

    def check(self) -> None:
        """Raise Invalid with all that was wrong."""
        if self._wrong:
            raise Invalid(self._wrong)

    def _read(self, otherwise: T, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except Invalid as error:
            self._wrong += error.errors
            return otherwise


def instant(field: str, given: datetime | None) -> int | None:
    """Microseconds since 1970; a time without a zone is UTC. Raises Invalid on one that has no year 1 to 9999 there."""
    if given is None:
        return None
    try:
        return from_datetime(given.astimezone(UTC) if given.tzinfo else given)
    except OverflowError:
        raise Invalid([(field, "is not in the years 1 to 9999 of UTC")]) from None


def page(data: list[Any], *, limit: int, total: int, next_cursor: str | None) -> dict[str, Any]:
    """A list as every route answers it."""
    return {"data": data, "pagination": {"limit": limit, "total": total, "next_cursor": next_cursor}}


def version_of(if_match: str | None) -> int | None:
    """The version that `If-Match: "7"` names; None for no header and for `*`. One that is none of ours is -1."""
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else -1  # noqa: PLR2004 - fits 64 bits


def check_known(plane: Plane, orchestrator: str) -> None:
    """Raise Invalid unless the orchestrator is declared."""
    if orchestrator not in plane.control.orchestrators:
        raise Invalid([("orchestrator", f"there is no orchestrator {orchestrator}")])

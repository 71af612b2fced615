"""A client of the control plane's HTTP API, as the commands need it.

Where it is: `--url`, else FLEET_URL, else what a running `fleet serve` wrote down, else `control_plane.url`. Who
asks: FLEET_KEY, else the key file that `fleet key create --save` wrote. Every failure is a ControlPlaneError whose
text says what to do.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from orchestrator_fleet import __version__
from orchestrator_fleet.errors import ControlPlaneError
from orchestrator_fleet.reconcile.state import State

TIMEOUT_S = 30.0
# A stream that breaks is taken up where it was, so often in a row without a word from the control plane.
MAX_RECONNECTS, RECONNECT_S = 30, 1.0
QUIET_S = 60.0  # the control plane says something each 15 s
END = "end"
PAGE = 100  # the API's own limit
MAX_ERROR_CHARS = 2_000
_UNAUTHORIZED = 401


class Running(msgspec.Struct, frozen=True):
    """serve.json: what a running `fleet serve` tells about itself."""

    pid: int
    url: str


def running(state: State) -> Running | None:
    """The control plane that runs on this machine for this fleet, if one does.

    Its file stays behind when it is killed, and its pid may be another process's by then; only its lock tells.
    """
    try:
        told = msgspec.json.decode(state.serve_file.read_bytes(), type=Running)
        with state.serve_lock.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back a moment later
    except BlockingIOError:
        return told
    except (OSError, msgspec.DecodeError):
        return None
    return None


def url_of(fleet_file: Path, *, given: str | None) -> str:
    """Where the control plane is; see the module's text for the order."""
    if given:
        return given.rstrip("/")
    served = running(State(fleet_file))
    if served is not None:
        return served.url.rstrip("/")
    from orchestrator_fleet.spec.load import load_fleet  # noqa: PLC0415 - only when nothing else names it

    return load_fleet(fleet_file).file.control_plane.url.rstrip("/")


def key_of(fleet_file: Path) -> str | None:
    """The key to use, or None when there is none."""
    key = os.environ.get("FLEET_KEY", "").strip()
    if key:
        return key
    try:
        return State(fleet_file).key_file.read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None


class ControlPlane:
    """A connection to the control plane; use it as a context manager."""

    def __init__(self, *, url: str, key: str | None) -> None:
        self.url, self.key = url, key
        headers = {"User-Agent": f"fleet/{__version__}"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise ControlPlaneError(f"{url}: {error}; give a URL such as http://127.0.0.1:8700") from None

    @classmethod
    def of(cls, fleet_file: Path, *, url: str | None) -> Self:
        """The control plane of a fleet; `url` is what the command line or FLEET_URL says."""
        return cls(url=url_of(fleet_file, given=url), key=key_of(fleet_file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """GET; the decoded answer."""
        return self._ask("GET", path, params=_given(params or {}))

    def post(
        self, path: str, body: Any = None, *, idempotency_key: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> Any:
        """POST; the decoded answer, None when it is empty."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._ask("POST", path, json=body if body is not None else {}, headers=headers, timeout=timeout_s)

    def list(self, path: str, params: Mapping[str, Any] | None = None, *, limit: int) -> tuple[list[Any], int]:
        """Up to `limit` items of a list, page by page, and how many there are in all."""
        items: list[Any] = []
        total, cursor = 0, None
        while len(items) < limit:
            asked = {**(params or {}), "limit": min(PAGE, limit - len(items)), "cursor": cursor}
            page = self.get(path, asked)
            items += page["data"]
            cursor, total = page["pagination"]["next_cursor"], page["pagination"]["total"]
            if not cursor:
                break
        return items, total

    def events(self, path: str, params: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str]]:
        """A server-sent event stream as (event, data) pairs, until its `end`.

        Taken up where it was when it breaks: no event is missed, and none comes twice.
        """
        last_id, failures = "", 0
        while True:
            try:
                for newest_id, event, data in self._stream(path, params or {}, last_id):
                    last_id, failures = newest_id, 0
                    if data:
                        yield event, data
                    if event == END:
                        return
            except httpx.TransportError as error:
                if failures >= MAX_RECONNECTS:
                    raise self._unreachable(error) from None
            failures += 1
            time.sleep(RECONNECT_S)

    def _stream(self, path: str, params: Mapping[str, Any], last_id: str) -> Iterator[tuple[str, str, str]]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        timeout = httpx.Timeout(TIMEOUT_S, read=QUIET_S)
        with self._http.stream("GET", path, params=_given(params), headers=headers, timeout=timeout) as answer:
            if answer.is_error:
                answer.read()
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or not last_id:
                    raise self._problem(answer)
                return
            yield from _events(answer.iter_lines(), last_id)

    def _ask(self, method: str, path: str, **kwargs: Any) -> Any:
        try:
            answer = self._http.request(method, path, **kwargs)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        if answer.is_error:
            raise self._problem(answer)
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            raise ControlPlaneError(
                f"{self.url} answered {method} {path} with something that is not JSON; is another program on that port?"
            ) from None

    def _unreachable(self, error: httpx.TransportError) -> ControlPlaneError:
        reason = str(error) or type(error).__name__
        return ControlPlaneError(
            f"cannot reach the control plane at {self.url}: {reason}; is `fleet serve` running?", code="unreachable"
        )

    def _problem(self, answer: httpx.Response) -> ControlPlaneError:
        try:
            problem = answer.json()
            code = str(problem.get("code") or "")
            lines = [f"  {e.get('field')}: {e.get('message')}" for e in problem.get("errors") or []]
            text = str(problem.get("title" if lines else "detail") or "")  # the detail repeats the fields
        except (ValueError, AttributeError):
            text, code, lines = answer.text[:MAX_ERROR_CHARS], "", []
        text = "\n".join([f"{answer.status_code} {text or answer.reason_phrase}", *lines])
        if answer.status_code == _UNAUTHORIZED:
            text += self._advice()
        return ControlPlaneError(text, status=answer.status_code, code=code)

    def _advice(self) -> str:
        if self.key is None:
            return "; no key: set FLEET_KEY, or run `fleet key create --owner person:<you> --scopes admin --save`"
        return "; the key in use is not valid here: check FLEET_KEY, or make one with `fleet key create --save`"


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    """Query parameters that have a value; lists stay lists (repeated in the query)."""
    return {name: value for name, value in params.items() if value not in (None, "", [], ())}


def _events(lines: Iterator[str], last_id: str) -> Iterator[tuple[str, str, str]]:
    """Lines of `text/event-stream` as (id, event, data), the id being the last that came; one without data has ""."""
    event, data = "message", list[str]()
    for line in lines:
        if not line:
            yield last_id, event, "\n".join(data)
            event, data = "message", []
        elif line.startswith("event:"):
            event = line[6:].removeprefix(" ")
        elif line.startswith("id:"):
            last_id = line[3:].removeprefix(" ")
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))

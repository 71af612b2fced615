"""A stream that breaks is taken up where it was."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from orchestrator_fleet.cli import client
from orchestrator_fleet.cli.client import ControlPlane
from orchestrator_fleet.errors import ControlPlaneError

Answer = tuple[int, bytes, bool]  # status, body, and whether the connection breaks in the middle of it


@contextmanager
def served(answers: list[Answer]) -> Iterator[tuple[str, list[str | None]]]:
    """A server that gives these answers in turn; its URL, and the Last-Event-ID of each request."""
    asked: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.headers.get("Last-Event-ID"))
            status, body, breaks = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(len(body) + (100 if breaks else 0)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RECONNECT_S", 0.01)
    monkeypatch.setattr(client, "MAX_RECONNECTS", 3)


def test_a_broken_stream_goes_on_behind_its_last_event() -> None:
    """Broken in the middle, ended without an end, answered 503: nothing is missed, and nothing comes twice."""
    answers = [
        (200, b"retry: 1000\nid: 4\n\nid: 5\nevent: log\ndata: one\n\nid: 6\nevent: lo", True),
        (200, b": still here\nid: 7\n\n", False),
        (503, b"{}", False),
        (200, b"id: 8\nevent: log\ndata: two\ndata: lines\n\nid: 8\nevent: end\ndata: {}\n\n", False),
    ]
    with served(answers) as (url, asked), ControlPlane(url=url, key=None) as plane:
        assert list(plane.events("/x")) == [("log", "one"), ("log", "two\nlines"), ("end", "{}")]
    assert asked == [None, "5", "7", "7"]


def test_a_stream_that_is_refused_is_not_asked_again() -> None:
    """The API's own words."""
    with (
        served([(404, b'{"detail": "there is no task", "code": "not_found"}', False)]) as (url, asked),
        ControlPlane(url=url, key=None) as plane,
        pytest.raises(ControlPlaneError, match="there is no task"),
    ):
        list(plane.events("/x"))
    assert asked == [None]


def test_a_control_plane_that_stays_away_is_told() -> None:
    """After so many tries in a row."""
    with served([(200, b"id: 1\nevent: log\ndata: one\n\n", True)]) as (url, asked):
        plane = ControlPlane(url=url, key=None)
        stream = plane.events("/x")
        assert next(stream) == ("log", "one")
    with pytest.raises(ControlPlaneError, match="is `fleet serve` running"):
        next(stream)
    assert len(asked) == 1

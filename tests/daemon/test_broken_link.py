"""The moment between the end of a connection and its reader's notice of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from scripted_plane import ScriptedPlane

from orchestrator_fleet import keys
from orchestrator_fleet.daemon.link import Link, LinkDown
from orchestrator_fleet.wire import link as wire

HELLO = wire.Hello(
    orchestrator="vp-a",
    machine="m01",
    boot="b",
    epoch="e",
    pid=1,
    generation="g",
    charter_version="c",
    sessions_max=1,
)
BEAT = wire.Beat(held=(), generation="g", charter_version="c", sessions_max=1)


class Deaf:
    """A listener that has nothing to do."""

    def hello(self) -> wire.Hello:
        return HELLO

    def welcomed(self, hello: wire.Hello, welcome: wire.Welcome) -> None:
        """Nothing."""

    def cancelled(self, cancel: wire.Cancel) -> None:
        """Nothing."""

    def noticed(self, notice: wire.Notice) -> None:
        """Nothing."""

    def link_changed(self, state: str, detail: str) -> None:
        """Nothing."""


async def _tell_for_ever(link: Link) -> None:
    while True:
        await link.tell(BEAT)
        await asyncio.sleep(0)


def test_a_question_that_finds_the_connection_gone_takes_the_link_down(plane: ScriptedPlane, tmp_path: Path) -> None:
    """Whoever asks again at once waits for the next link: asking in a circle would keep its reader from running."""
    key_file = tmp_path / "key"
    key_file.write_text(keys.mint().text)

    async def ask_until_it_breaks() -> bool:
        link = Link(address=lambda: plane.url, key_file=key_file, listener=Deaf())
        running = asyncio.create_task(link.run())
        async with asyncio.timeout(20):
            await link.up()
            assert link._socket is not None
            link._socket.transport.abort()
            with pytest.raises(LinkDown):
                await _tell_for_ever(link)
            was_up = link.is_up
            await link.up()  # and it comes back by itself
        running.cancel()
        return was_up

    assert asyncio.run(ask_until_it_breaks()) is False

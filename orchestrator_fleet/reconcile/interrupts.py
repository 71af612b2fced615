"""Ctrl-C while machines are changed: once finishes the machines in hand, twice aborts."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator_fleet.reconcile.report import Event, OnEvent


@contextmanager
def first_finishes(on_event: OnEvent) -> Iterator[asyncio.Event]:
    """An event that the first SIGINT sets; the second raises KeyboardInterrupt out of the loop.

    Off the main thread no signal arrives: whoever runs a pass there stops it by other means.
    """
    halt = asyncio.Event()
    if threading.current_thread() is not threading.main_thread():
        yield halt
        return

    def interrupted() -> None:
        if halt.is_set():
            raise KeyboardInterrupt
        halt.set()
        on_event(Event(kind="interrupted", target="", text="finishing the machines in hand; once more aborts"))

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield halt
    finally:
        loop.remove_signal_handler(signal.SIGINT)

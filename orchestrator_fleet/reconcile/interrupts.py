"""Being stopped while machines are changed: what is in hand is finished, nothing more is begun.

On the main thread by Ctrl-C, where the second one aborts. On another by its Brake.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from orchestrator_fleet.reconcile.report import Event, OnEvent


class Brake:
    """Stops passes that run on other threads; one that is pulled stops those to come as well."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pulled = False
        self._running: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def pull(self) -> None:
        """From any thread: finish the machines in hand, and begin no more."""
        with self._lock:
            self._pulled = True
            for loop, halt in self._running:
                loop.call_soon_threadsafe(halt.set)

    @contextmanager
    def on(self, halt: asyncio.Event) -> Iterator[None]:
        """While a pass runs on this thread's loop: pulling sets `halt`."""
        one = (asyncio.get_running_loop(), halt)
        with self._lock:
            self._running.append(one)
            if self._pulled:
                halt.set()
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(one)


@contextmanager
def first_finishes(on_event: OnEvent, brake: Brake | None = None) -> Iterator[asyncio.Event]:
    """An event that the first SIGINT sets, and `brake`; the second SIGINT raises KeyboardInterrupt out of the loop."""
    halt = asyncio.Event()
    with brake.on(halt) if brake is not None else nullcontext(), _signals(halt, on_event):
        yield halt


@contextmanager
def _signals(halt: asyncio.Event, on_event: OnEvent) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal arrives here
        return

    def interrupted() -> None:
        if halt.is_set():
            raise KeyboardInterrupt
        halt.set()
        on_event(Event(kind="interrupted", target="", text="finishing the machines in hand; once more aborts"))

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)

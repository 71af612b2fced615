"""A session's live log: what it writes to stdout and stderr, sent on piece by piece.

Only new bytes are read. Per stream the first `HEAD_BYTES` are sent while the session runs, at most
`PIECES_A_TURN` pieces a turn, and at its end the last `TAIL_BYTES`; the gap between shows in the offsets. The
whole output stays in the session's folder.

What is no text becomes `?`, byte by byte, so that a piece is as long as the bytes it stands for and offsets add up.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from orchestrator_fleet.daemon.folder import SessionFolder
from orchestrator_fleet.wire.link import MAX_LOG_CHUNK_BYTES

PIECE_BYTES = MAX_LOG_CHUNK_BYTES
PIECES_A_TURN = 4
HEAD_BYTES = 1 << 20
TAIL_BYTES = 64 << 10
MAX_OUTPUT_BYTES = 64 << 20
_CONTINUATION, _LONGEST_REST = bytes(range(0x80, 0xC0)), 3  # UTF-8: what can follow a character's first byte
_MARK, _MARKED = "?", "orchestrator_fleet.marked"

Tell = Callable[[str, int, str], Awaitable[None]]
"""Sends (stream, offset of the first byte, text); raises when the link is down."""


class Output:
    """Follows the two streams of one session."""

    def __init__(self, folder: SessionFolder) -> None:
        self._folder = folder
        self._files = {"stdout": folder.stdout, "stderr": folder.stderr}
        self._sent = {"stdout": 0, "stderr": 0, **folder.sent()}

    def size(self) -> int:
        """Bytes written so far, both streams."""
        return sum(_size(path) for path in self._files.values())

    async def send_new(self, tell: Tell) -> None:
        """Send what came since the last turn, within the limits."""
        for stream in self._files:
            await self._send(stream, tell, until=HEAD_BYTES, pieces=PIECES_A_TURN, over=False)

    async def send_rest(self, tell: Tell) -> None:
        """After the end: send what is left of the head, then the tail."""
        for stream, path in self._files.items():
            size = _size(path)
            await self._send(stream, tell, until=min(size, HEAD_BYTES), pieces=HEAD_BYTES, over=True)
            self._sent[stream] = max(self._sent[stream], size - TAIL_BYTES)
            await self._send(stream, tell, until=size, pieces=TAIL_BYTES, over=True)

    async def _send(self, stream: str, tell: Tell, *, until: int, pieces: int, over: bool) -> None:
        """Send up to `pieces` pieces of the bytes before `until`; `over` when no more will be written."""
        before = self._sent[stream]
        try:
            for _ in range(pieces):
                offset = self._sent[stream]
                data = _read(self._files[stream], offset, min(PIECE_BYTES, until - offset))
                text, used = _text(data, whole=over and offset + len(data) >= until)
                if not used:
                    break
                await tell(stream, offset, text)
                self._sent[stream] = offset + used
        finally:
            if self._sent[stream] != before:
                self._folder.keep_sent(self._sent)


def last_text(path: Path, *, size: int) -> str:
    """The last `size` bytes of a file as text; a character cut in two at the front is left out."""
    start = max(0, _size(path) - size)
    data = _read(path, start, size)
    if start:
        data = data[:_LONGEST_REST].lstrip(_CONTINUATION) + data[_LONGEST_REST:]
    return _text(data, whole=True)[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, offset: int, size: int) -> bytes:
    if size <= 0 or _size(path) <= offset:
        return b""
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), size, offset)
    except OSError:
        return b""


def _text(data: bytes, *, whole: bool) -> tuple[str, int]:
    """(text, bytes used). Unless it is the `whole` rest, a character cut in two at the end is left for later."""
    decoder = codecs.getincrementaldecoder("utf-8")(_MARKED)
    text = decoder.decode(data, final=whole)
    # A NUL is text to UTF-8 and to nobody else, databases least of all.
    return text.replace("\0", _MARK), len(data) - len(decoder.getstate()[0])


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _MARK * (error.end - error.start), error.end


codecs.register_error(_MARKED, _mark)

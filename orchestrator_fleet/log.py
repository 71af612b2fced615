"""What a process tells: one JSON object a line.

Built on the standard library's logging, so that lines of uvicorn, websockets and Litestar come out in the
same form, and the daemon (which has `logging` in memory anyway) pays nothing for it.

    log.setup(stream=sys.stdout, process="serve")
    log.get(__name__).info("listening", url=url)
    {"at": "2026-01-01T00:00:00.000000Z", "level": "info", "event": "listening", "process": "serve", "url": "..."}
"""

from __future__ import annotations

import logging
import re
from typing import Any, TextIO

import msgspec

from orchestrator_fleet.clock import to_rfc3339

MAX_TRACEBACK_CHARS = 8_000
MAX_LINE_CHARS = 32_000

_SECRET = re.compile(r"fleet_(k-[0-9a-f]{8})_[0-9a-f]+(_[0-9a-f]*)?")
_encoder = msgspec.json.Encoder(enc_hook=repr)


class JsonLines(logging.Formatter):
    """Formats a record as one JSON line. Keys of this product never get through, whoever logs them."""

    def __init__(self, **bound: Any) -> None:
        super().__init__()
        self._bound = bound

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its newline."""
        line = {
            "at": to_rfc3339(int(record.created * 1e6)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._bound,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-MAX_TRACEBACK_CHARS:]
        text = _encoder.encode(line).decode()
        if len(text) > MAX_LINE_CHARS:
            cut = {"at": line["at"], "level": line["level"], "event": line["event"][:1_000], "cut_chars": len(text)}
            text = _encoder.encode(cut).decode()
        return _SECRET.sub(r"fleet_\1_***", text) if "fleet_k-" in text else text


class Log:
    """A logger whose calls take an event and its fields."""

    def __init__(self, logger: logging.Logger, **bound: Any) -> None:
        self._logger, self._bound = logger, bound

    def bind(self, **fields: Any) -> Log:
        """Another logger that adds `fields` to every line."""
        return Log(self._logger, **{**self._bound, **fields})

    def info(self, event: str, **fields: Any) -> None:
        """Tell what happened."""
        self._tell(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Tell what somebody may want to look at."""
        self._tell(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Tell what failed."""
        self._tell(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Tell what failed, with the traceback of the exception being handled."""
        self._tell(logging.ERROR, event, fields, exc_info=True)

    def _tell(self, level: int, event: str, fields: dict[str, Any], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"fields": {**self._bound, **fields}}
            self._logger.log(level, "%s", event, exc_info=exc_info, extra=extra, stacklevel=3)


def setup(*, stream: TextIO, level: str = "INFO", **bound: Any) -> None:
    """Send every logger's lines to `stream`; `bound` fields stand in each of them."""
    # What no line of ours tells need not be found out for each of them (the logging HOWTO's own switches).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(**bound))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def get(name: str) -> Log:
    """The logger of a module: `log.get(__name__)`."""
    return Log(logging.getLogger(name))

"""The bare handlers of `scripts/bench http`: one framework each, answering what it was given, on the same server.

Run as a program by the Python that has the framework: `python bench_http_apps.py FRAMEWORK PORT FILE`. The file holds
the JSON of both answers. It imports nothing else of ours, so another environment can run it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

READ, WRITE = "/read", "/write"


def litestar_app(read: Any, written: Any) -> Any:
    """Litestar: a handler that returns the value, and one that reads a body and returns the other."""
    from litestar import Litestar, get, post  # noqa: PLC0415 (not every environment has it)

    @get(READ)
    async def get_it() -> dict[str, Any]:
        return read  # type: ignore[no-any-return]

    @post(WRITE)
    async def make_it(data: dict[str, Any]) -> dict[str, Any]:
        del data
        return written  # type: ignore[no-any-return]

    return Litestar([get_it, make_it], openapi_config=None, logging_config=None)


def fastapi_app(read: Any, written: Any) -> Any:
    """FastAPI: the same."""
    from fastapi import FastAPI  # type: ignore[import-not-found] # noqa: PLC0415 (as above)

    app = FastAPI(openapi_url=None)

    @app.get(READ)  # type: ignore[untyped-decorator] # it is not here
    async def get_it() -> Any:
        return read

    @app.post(WRITE, status_code=201)  # type: ignore[untyped-decorator] # as above
    async def make_it(data: dict[str, Any]) -> Any:
        del data
        return written

    return app


def main() -> None:
    """Serve until a signal."""
    import uvicorn  # noqa: PLC0415 (as above)

    framework, port, file = sys.argv[1:]
    answers = json.loads(Path(file).read_bytes())
    app = {"litestar": litestar_app, "fastapi": fastapi_app}[framework](answers["read"], answers["written"])
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
    )


if __name__ == "__main__":
    main()

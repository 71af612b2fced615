"""Secrets by reference, resolved on the machine that needs them: `env:NAME`, `file:PATH`, `exec:COMMAND`.

A value never appears in an error, a log or an argv.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from orchestrator_fleet.errors import FleetError

EXEC_TIMEOUT_S = 15.0
MAX_SECRET_BYTES = 64 << 10


class SecretUnavailable(FleetError):
    """A declared secret can't be had on this machine; the text names the reference, never the value."""


async def resolve_all(references: Mapping[str, str], *, home: Path) -> dict[str, str]:
    """Environment variable -> value. Raises SecretUnavailable for the first that can't be had."""
    return {name: await _resolve(name, reference, home=home) for name, reference in references.items()}


async def _resolve(name: str, reference: str, *, home: Path) -> str:
    kind, _, rest = reference.partition(":")
    where = f"secret {name} ({reference})"
    match kind:
        case "env":
            value = os.environ.get(rest)
            if value is None:
                raise SecretUnavailable(
                    f"{where}: the environment that supervisord was started with has no {rest}; set it where "
                    "`fleet apply` first starts the machine, or use file: or exec:"
                )
            return value
        case "file":
            value = _read(where, rest, home=home)
        case "exec":
            value = await _run(where, rest, home=home)
        case _:
            raise SecretUnavailable(f"{where}: unknown kind of reference; wanted env:, file: or exec:")
    if "\0" in value:
        raise SecretUnavailable(f"{where}: has a NUL byte, which no environment can hold")
    return value.rstrip("\r\n")


def _read(where: str, name: str, *, home: Path) -> str:
    try:
        with (home / Path(name).expanduser()).open("rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: a ~ without a home
        raise SecretUnavailable(f"{where}: {error}; put the secret there, readable by this user") from error
    return _text(where, data)


async def _run(where: str, command: str, *, home: Path) -> str:
    """The first `MAX_SECRET_BYTES` of a command's stdout; it is killed when it takes too long."""
    try:
        argv = shlex.split(command)
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except (OSError, ValueError, TypeError) as error:
        raise SecretUnavailable(f"{where}: can't be run: {error}") from error
    if process.stdout is None:  # pragma: no cover - asked for above; for the type checker
        raise SecretUnavailable(f"{where}: has no output")
    try:
        async with asyncio.timeout(EXEC_TIMEOUT_S):
            data = await process.stdout.read(MAX_SECRET_BYTES + 1)
            while len(data) <= MAX_SECRET_BYTES and (more := await process.stdout.read(MAX_SECRET_BYTES)):
                data += more
            code = 0 if len(data) > MAX_SECRET_BYTES else await process.wait()
    except TimeoutError as error:
        raise SecretUnavailable(f"{where}: took longer than {EXEC_TIMEOUT_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
    if code:
        raise SecretUnavailable(f"{where}: exit code {code}; run it by hand on this machine to see why")
    return _text(where, data)


def _text(where: str, data: bytes) -> str:
    if len(data) > MAX_SECRET_BYTES:
        raise SecretUnavailable(f"{where}: more than {MAX_SECRET_BYTES} bytes; an environment variable can't hold it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SecretUnavailable(f"{where}: is no UTF-8 text") from error

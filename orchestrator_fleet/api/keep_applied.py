"""`control_plane.reconcile: auto`: the machines follow the fleet's files by themselves.

    files or HEAD changed, and stand still ─┐
    `interval` is over (something drifted) ─┴─▶ a pass ─▶ applied | refused, and told once | waits for another apply

A generation that a machine has refused is not tried again: the files have to say something else first.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator_fleet.api import applying, reconciler
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.reconcile.fleet import Planned
from orchestrator_fleet.spec.folder import MAX_YAML_BYTES, Folder, TooMany
from orchestrator_fleet.spec.model import Fleet
from orchestrator_fleet.spec.units import parse_duration

LOOK_S = 0.5
# Somebody else's apply ends by itself; a file that is missing may be on its way.
AGAIN_S = {reconciler.BUSY: 2.0, reconciler.UNSOUND: 5.0}
GIT_TIMEOUT_S = 5.0
SYSTEM = "system"
TEMPLATES = "templates"

Mark = tuple[tuple[str, int, int, int], ...]


async def keep_applied(plane: Plane) -> None:
    """Apply each change of the fleet's files soon after it was made, as long as `reconcile: auto` is in force."""
    watch, clock = Watch(plane.fleet_file), asyncio.get_running_loop()
    done_for: Mark | None = None
    standing: Mark | None = None
    again_at, told = 0.0, ""
    while True:
        await asyncio.sleep(LOOK_S)
        settings = plane.control.doc.spec["control_plane"]
        if settings["reconcile"] != "auto":
            done_for, told = None, ""
            continue
        before, standing = standing, await asyncio.to_thread(watch.mark)
        if standing == done_for and clock.time() < again_at:
            continue
        if standing not in (done_for, before):
            continue  # somebody is writing, or checking out, right now
        if plane.reconciler.declaring.locked():
            continue  # a request is; its own pass follows, in its name
        done_for = standing
        done = await applying.start(
            plane,
            actor=SYSTEM,
            unless=lambda planned: _refused_before(plane, watch, planned),
            is_news=lambda done, told=told: done.good or done.problem != told,  # type: ignore[misc] # bound now
        )
        again_at = clock.time() + AGAIN_S.get(done.result, parse_duration(settings["interval"]))
        told = done.problem


def _refused_before(plane: Plane, watch: Watch, planned: Planned) -> str | None:
    """Why not to apply it: a machine had this generation before, and did not become healthy."""
    watch.learn(planned.seen.fleet)
    busy = {action.target for action in planned.plan.actions if action.kind != "no-op"}
    wanted = {target.name: target.desired for target in planned.plan.targets if target.name in busy}
    again = sorted(name for name, digest in plane.reconciler.rejected.items() if wanted.get(name) == digest)
    if not again:
        return None
    return f"{', '.join(again)} refused this generation before; correct it, or run `fleet apply` to try again"


class Watch:
    """Tells whether the files of a fleet, or its git HEAD, are others than before, by names, sizes and times alone."""

    def __init__(self, fleet_file: Path) -> None:
        self._file, self._folder = fleet_file, fleet_file.parent
        self._patterns: tuple[str, ...] = ()
        self._files: tuple[str, ...] = ()
        self._git = _git_folders(self._folder)

    def learn(self, fleet: Fleet) -> None:
        """These are the files that it is made of now."""
        self._patterns = (*fleet.file.include, f"{TEMPLATES}/*")
        self._files = (*sorted(fleet.charters), *sorted(fleet.assets))

    def mark(self) -> Mark:
        """Equal as long as nothing changed."""
        names = [self._file.name, *self._matching(), *self._files]
        return tuple(_seen(name, self._folder / name) for name in names) + tuple(_heads(self._git))

    def _matching(self) -> Iterable[str]:
        folder = Folder(self._folder)
        for pattern in self._patterns:
            try:
                yield from folder.expand(pattern)
            except (TooMany, SpecInvalid):
                continue


def _seen(name: str, path: Path) -> tuple[str, int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (name, -1, -1, -1)
    return (name, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _git_folders(folder: Path) -> Mapping[str, Path]:
    """Where HEAD is, and where the branches are (another place in a linked work tree); empty without git."""
    command = ["git", "-C", str(folder), "rev-parse", "--path-format=absolute", "--git-dir", "--git-common-dir"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return {}
    own, _, shared = done.stdout.strip().partition("\n")
    return {"own": Path(own), "shared": Path(shared)} if shared else {}


def _heads(git: Mapping[str, Path]) -> Iterable[tuple[str, int, int, int]]:
    """What moves when HEAD does: itself, the branch it names, or all branches where they are packed into one file."""
    if not git:
        return
    head = git["own"] / "HEAD"
    yield _seen("HEAD", head)
    try:
        text = head.read_bytes()[:MAX_YAML_BYTES].decode(errors="replace").strip()
    except OSError:
        return
    branch = git["shared"] / os.path.normpath(text.removeprefix("ref: ")) if text.startswith("ref: refs/") else head
    yield _seen("branch", branch)
    yield _seen("packed-refs", git["shared"] / "packed-refs")

"""Generations on disk: immutable folders named by the SHA-256 of their manifest.

A generation is staged whole beside the current one and becomes current by one rename of a link. Its manifest
is our inventory: what differs from it is drift, what it doesn't name is foreign.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec

from orchestrator_fleet.ids import is_name
from orchestrator_fleet.machines import durable
from orchestrator_fleet.machines.declined import FAILED, NOT_STAGED, Declined
from orchestrator_fleet.machines.layout import EXECUTABLE_MODE, FILE_MODE, FOLDER_MODE, Layout
from orchestrator_fleet.wire.documents import MANIFEST, Manifest, RunnerDoc, sha256

MAX_FILES = 20_000
MAX_PATH = 1_000
MAX_MANIFEST_BYTES = 16 << 20
MAX_NAMED = 5
_DIGEST_LENGTH = 64
_STAGING = ".staging-"

_manifest_decoder = msgspec.json.Decoder(Manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """One generation compared with its own manifest. `manifest` is None when that is not what the digest names."""

    digest: str
    manifest_bytes: bytes = b""
    manifest: Manifest | None = None
    drifted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    documents: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether every file is what the manifest says, and nothing else is there."""
        return self.manifest is not None and not (self.drifted or self.missing or self.foreign)


def is_digest(text: str) -> bool:
    """Whether `text` can name a generation."""
    return len(text) == _DIGEST_LENGTH and all(c in "0123456789abcdef" for c in text)


def present(layout: Layout) -> list[str]:
    """Digests of the generations on disk, sorted; their content is not looked at."""
    try:
        with os.scandir(layout.generations) as entries:
            return sorted(e.name for e in entries if is_digest(e.name) and e.is_dir(follow_symlinks=False))
    except OSError:
        return []


def is_untouched(layout: Layout) -> bool:
    """Whether nothing was ever staged or run here, as in a root that was made for a lease."""
    made = (layout.journal, layout.run, layout.log, layout.keys, layout.work)
    return not (os.path.lexists(layout.current) or present(layout) or any(map(os.path.lexists, made)))


def current(layout: Layout) -> str | None:
    """The digest that the link names; None when there is no link, or it names none of our generations."""
    try:
        target = layout.current.readlink()
    except OSError:
        return None
    named = target.parent == Path("generations") or target.parent == layout.generations
    return target.name if named and is_digest(target.name) and layout.generation(target.name).is_dir() else None


def parse_manifest(data: bytes) -> Manifest:
    """A manifest whose names and paths are safe to use; raises Declined."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise Declined(FAILED, f"manifest: {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are taken")
    try:
        manifest = _manifest_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Declined(FAILED, f"manifest: {error}; stage what `render` made") from error
    if len(manifest.files) > MAX_FILES:
        raise Declined(FAILED, f"manifest: {len(manifest.files)} files, at most {MAX_FILES} are taken")
    for path in manifest.files:
        if not _is_inside(path):
            raise Declined(FAILED, f"manifest: got path {path[:MAX_PATH]!r}, wanted a plain path inside the generation")
    for name in (manifest.target, *manifest.programs):
        if not is_name(name):
            raise Declined(FAILED, f"manifest: got name {name[:MAX_PATH]!r}, wanted one of lower case letters and -")
    return manifest


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return (
        0 < len(path) <= MAX_PATH
        and path == "/".join(parts)
        and not path.startswith("/")
        and ".." not in parts
        and "\0" not in path
        and path != MANIFEST
    )


def inspect(layout: Layout, digest: str, *, documents: bool = False) -> Inspection:
    """Hash every file of a generation. `documents` also keeps the content of those that are as they should be."""
    folder = layout.generation(digest)
    found = dict(_walk(folder))
    manifest_bytes = _read(folder / MANIFEST) if found.pop(MANIFEST, False) else None
    if manifest_bytes is None:
        return Inspection(digest=digest, missing=(MANIFEST,))
    if sha256(manifest_bytes) != digest:
        return Inspection(digest=digest, drifted=(MANIFEST,))
    manifest = parse_manifest(manifest_bytes)
    drifted, missing, contents = [], [], {}
    for path, wanted in manifest.files.items():
        if path not in found:
            missing.append(path)
        elif not found[path] or _hash(folder / path) != wanted:
            drifted.append(path)
        elif documents:
            contents[path] = (folder / path).read_bytes()
    return Inspection(
        digest=digest,
        manifest_bytes=manifest_bytes,
        manifest=manifest,
        drifted=tuple(sorted(drifted)),
        missing=tuple(sorted(missing)),
        foreign=tuple(sorted(found.keys() - manifest.files.keys())),
        documents=contents,
    )


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(path, is a regular file) of all that is in a folder, links not followed; folders only when empty or links."""
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{path}/")
        else:
            yield path, entry.is_file(follow_symlinks=False)


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except OSError:
        return None


def _hash(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def stage(layout: Layout, *, digest: str, manifest_bytes: bytes, blobs: Mapping[str, bytes]) -> str:
    """Put a generation on disk, whole and durable; what was done, in words.

    Content comes from `blobs` and from the generations already here, by hash; raises Declined when it is not what
    its hash says, or is nowhere. A generation that is here already is mended file by file.
    """
    if sha256(manifest_bytes) != digest:
        raise Declined(FAILED, f"manifest: its SHA-256 is not {digest}; stage what `render` made")
    manifest = parse_manifest(manifest_bytes)
    for wanted, data in blobs.items():
        if sha256(data) != wanted:
            raise Declined(FAILED, f"blob {wanted}: its content has another SHA-256")
    target = layout.generation(digest)
    if target.is_dir():
        seen = inspect(layout, digest)
        if seen.whole:
            return f"{digest[:12]} is here already"
        _mend(layout, seen, manifest=manifest, manifest_bytes=manifest_bytes, blobs=blobs)
        return f"{digest[:12]} was not whole; mended"
    staging = layout.generations / f"{_STAGING}{digest}"
    _clear(staging)
    try:
        contents = {path: _content(layout, wanted, blobs) for path, wanted in manifest.files.items()}
        _write_all(staging, contents, manifest_bytes)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    durable.sync_folder(layout.generations)
    return f"{digest[:12]} staged, {len(manifest.files)} files"


def _content(layout: Layout, wanted: str, blobs: Mapping[str, bytes]) -> bytes:
    if wanted in blobs:
        return blobs[wanted]
    for digest in present(layout):
        data = _read(layout.generation(digest) / MANIFEST)
        if data is None or sha256(data) != digest:
            continue
        for path, kept in parse_manifest(data).files.items():
            file = layout.generation(digest) / path
            if kept == wanted and file.is_file() and sha256(content := file.read_bytes()) == wanted:
                return content
    raise Declined(FAILED, f"content {wanted} came neither with the request nor stands in a generation here")


def _write_all(folder: Path, contents: Mapping[str, bytes], manifest_bytes: bytes) -> None:
    folder.mkdir(mode=FOLDER_MODE)
    for path, data in contents.items():
        file = folder / path
        file.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        durable.write(file, data, mode=_mode(data))
    durable.write(folder / MANIFEST, manifest_bytes)
    for inner in sorted({(folder / path).parent for path in contents} | {folder}, reverse=True):
        durable.sync_folder(inner)


def _mode(data: bytes) -> int:
    """A script with a first line of its own may be a runner's command."""
    return EXECUTABLE_MODE if data.startswith(b"#!") else FILE_MODE


def _mend(
    layout: Layout, seen: Inspection, *, manifest: Manifest, manifest_bytes: bytes, blobs: Mapping[str, bytes]
) -> None:
    """Make a generation what its manifest says again, one whole file after the other."""
    folder = layout.generation(seen.digest)
    wrong = set(seen.drifted) | set(seen.missing) if seen.manifest is not None else set(manifest.files)
    foreign = seen.foreign if seen.manifest is not None else _unnamed(folder, manifest)
    for path in foreign:
        _clear(folder / path)
    for path in sorted(wrong - {MANIFEST}):
        data = _content(layout, manifest.files[path], blobs)
        file = folder / path
        if not _is_plain(file):
            _clear(file)
        file.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        durable.replace(file, data, mode=_mode(data))
    if seen.manifest is None:
        if not _is_plain(folder / MANIFEST):
            _clear(folder / MANIFEST)
        durable.replace(folder / MANIFEST, manifest_bytes)


def _unnamed(folder: Path, manifest: Manifest) -> list[str]:
    return [path for path, _ in _walk(folder) if path not in manifest.files and path != MANIFEST]


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _clear(path: Path) -> None:
    """Remove whatever stands at `path`, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_whole(layout: Layout, digest: str) -> Manifest:
    """The manifest of a generation that can be made current; raises Declined."""
    if not is_digest(digest) or not layout.generation(digest).is_dir():
        raise Declined(NOT_STAGED, f"generation {digest[:12]} is not here; stage it first")
    seen = inspect(layout, digest)
    if seen.manifest is None or not seen.whole:
        wrong = ", ".join((*seen.drifted, *seen.missing, *seen.foreign)[:MAX_NAMED])
        raise Declined(NOT_STAGED, f"generation {digest[:12]} is not whole ({wrong}); stage it again")
    return seen.manifest


class _Declared(msgspec.Struct):
    """The part of orchestrator.json that says which secrets its runner wants."""

    runner: RunnerDoc


def variables_wanted(layout: Layout, digest: str) -> set[str]:
    """Environment variables that runners of a generation name as secrets, as `env:NAME`."""
    wanted = set()
    for path in layout.generation(digest).glob("orchestrators/*/orchestrator.json"):
        try:
            references = msgspec.json.decode(path.read_bytes(), type=_Declared).runner.secrets.values()
        except msgspec.MsgspecError:
            continue  # the daemon that can't read its own document says so
        wanted |= {reference.removeprefix("env:") for reference in references if reference.startswith("env:")}
    return wanted


def make_current(layout: Layout, digest: str) -> bool:
    """Point the link at a generation; False when it does already."""
    if current(layout) == digest:
        return False
    if layout.current.is_dir() and not layout.current.is_symlink():
        raise Declined(FAILED, f"{layout.current} is a folder, wanted our link; move it away")
    durable.replace_link(layout.current, f"generations/{digest}")
    return True


def remove(layout: Layout, digests: list[str]) -> None:
    """Remove generations, and what a broken-off staging left."""
    for digest in digests:
        shutil.rmtree(layout.generation(digest))
    for aside in layout.generations.glob(f"{_STAGING}*"):
        shutil.rmtree(aside, ignore_errors=True)
    durable.sync_folder(layout.generations)

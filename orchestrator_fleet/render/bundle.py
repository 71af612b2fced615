"""A bundle: all files of one generation, with the digest that names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator_fleet.wire.documents import MANIFEST, Manifest, encode, sha256

SUPERVISORD_CONF = "supervisord.conf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One generation of one target. `files`: path -> bytes, manifest.json not among them."""

    digest: str
    manifest: Manifest
    manifest_bytes: bytes
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The whole fleet as it ought to be. `control` is the control plane's bundle; it has no programs."""

    fleet: str
    control: Bundle
    machines: Mapping[str, Bundle]


def bundle(
    *,
    target: str,
    fleet: str,
    files: Mapping[str, bytes],
    programs: Mapping[str, str],
    protected: tuple[str, ...] = (),
) -> Bundle:
    """Make a bundle: hash every file, then the manifest that names them."""
    manifest = Manifest(
        target=target,
        fleet=fleet,
        files={path: sha256(data) for path, data in files.items() if path != MANIFEST},
        programs=dict(programs),
        protected=protected,
    )
    manifest_bytes = encode(manifest)
    return Bundle(digest=sha256(manifest_bytes), manifest=manifest, manifest_bytes=manifest_bytes, files=dict(files))

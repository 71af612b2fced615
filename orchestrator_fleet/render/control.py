"""The control plane's bundle: one document that holds the whole spec."""

from __future__ import annotations

from orchestrator_fleet.render.bundle import Bundle, bundle
from orchestrator_fleet.wire.documents import CONTROL, ControlDoc, encode

TARGET = "control-plane"


def control_bundle(doc: ControlDoc) -> Bundle:
    """The generation that `fleet serve` works by."""
    return bundle(target=TARGET, fleet=doc.fleet, files={CONTROL: encode(doc)}, programs={})

"""Declared state changed over the API: an edit of the fleet's files, committed with the caller as author.

    make (under the lock: what stands there now ─▶ the edits, or a refusal) ─▶ declare ─▶ commit or branch

`control_plane.writes` in force says which: commit, propose (a branch, to be merged by a person) or refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator_fleet.api import authorship
from orchestrator_fleet.api.asking import Asked
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.reconciler import on_thread
from orchestrator_fleet.errors import Conflict, Diagnostic, Invalid, SpecInvalid
from orchestrator_fleet.reconcile.declare import Change, Declaration, Declared, Edit, NewFile, declare
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.load import Entries, load_fleet
from orchestrator_fleet.spec.model import Fleet, FleetFile
from orchestrator_fleet.tasks.routing import Router

Make = Callable[[Declaration], Sequence[Edit | NewFile]]


def refuse_writes(plane: Plane) -> None:
    """Raise Conflict `writes_refused` where declared state is changed by people alone."""
    if plane.control.doc.spec["control_plane"]["writes"] == "refuse":
        raise Conflict(
            "writes_refused", "control_plane.writes is refuse: declared state is changed in fleet.yaml, and applied"
        )


async def commit(
    plane: Plane,
    request: Asked,
    *,
    make: Make,
    subject: str | Callable[[Sequence[Change]], str],
    reason: str = "",
) -> Declared:
    """Edit and commit (or propose) as `make` says; raises what it and `declare` raise.

    The caller holds `plane.reconciler.declaring` for as long as something else belongs to the change.
    """
    refuse_writes(plane)
    propose = plane.control.doc.spec["control_plane"]["writes"] == "propose"
    body = authorship.body(request, reason=reason)

    def work() -> Declared:
        author = authorship.author_of(plane, request.auth)
        return declare(plane.fleet_file, make=make, author=author, subject=subject, body=body, propose=propose)

    plane.pending.look()
    try:
        done = await on_thread("declare", work)
    except SpecInvalid as wrong:
        raise Invalid([("body", str(one)) for one in wrong.diagnostics]) from None
    if done.branch is None:
        plane.pending.committed(done.files)
    return done


def tried(plane: Plane, *, now: FleetFile, entries: Entries, files: Mapping[str, str]) -> Fleet:
    """The fleet as it would be with these entries and new files; raises SpecInvalid with all that would be wrong.

    That is all that `fleet validate` finds: placement, and routing tests that pass `now`, too.
    """
    new = {path: text.encode() for path, text in files.items()}
    fleet = load_fleet(plane.fleet_file, entries=entries, instead=new)
    render(fleet)
    failing = _failing_tests(fleet.file)
    if found := failing.keys() - (_failing_tests(now).keys() if failing else set()):
        raise SpecInvalid([Diagnostic(file="", path=path, problem=failing[path]) for path in sorted(found)])
    return fleet


def _failing_tests(file: FleetFile) -> dict[str, str]:
    """The routing tests that fail, by their place."""
    spec: dict[str, Any] = file.model_dump(mode="json", by_alias=True, include={"routing", "orchestrators"})
    return {f"routing[{one.rule}].tests[{one.number}].expect": one.problem for one in Router.of_spec(spec).run_tests()}

"""The whole fleet as it ought to be: spec -> `Desired`.

The same spec and the same places give the same bytes, whatever the machine, the Python or the order in which
people wrote things down. The spec is turned into JSON once; all documents are cut from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jinja2 import Template

from orchestrator_fleet.render import assets, charter, program
from orchestrator_fleet.render.bundle import SUPERVISORD_CONF, Bundle, Desired, bundle
from orchestrator_fleet.render.control import control_bundle
from orchestrator_fleet.render.placement import place
from orchestrator_fleet.spec.model import Charter, CommandRunner, Fleet, Runner, Workspace
from orchestrator_fleet.wire.documents import (
    ControlDoc,
    InForce,
    OrchestratorDoc,
    RunnerDoc,
    WorkspaceDoc,
    encode,
    sha256,
)

NOBODY_MOVED: Mapping[str, str] = MappingProxyType({})


def render(fleet: Fleet, *, kept: Mapping[str, str] = NOBODY_MOVED) -> Desired:
    """One bundle for each machine, and the control plane's.

    `kept`: orchestrator -> the machine it is on now; it stays there where that is allowed. Raises `SpecInvalid`
    when somebody fits on no machine, or the fleet's own prompt template fails.
    """
    places = place(fleet.file, kept)
    shop = _Shop(fleet)
    residents: dict[str, list[str]] = {machine: [] for machine in sorted(fleet.file.machines)}
    for name in sorted(places):
        residents[places[name]].append(name)
    machines = {machine: shop.machine(machine, names) for machine, names in residents.items()}
    doc = ControlDoc(
        fleet=fleet.file.fleet, spec=shop.spec, placements=places, charters=shop.versions, limits=shop.in_force()
    )
    return Desired(fleet=fleet.file.fleet, control=control_bundle(doc), machines=machines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CharterParts:
    """What all orchestrators under one charter share."""

    front: dict[str, Any]
    prose: str
    version: str
    settings: bytes


class _Shop:
    """What the machines' bundles are cut from; each piece is made once."""

    def __init__(self, fleet: Fleet) -> None:
        self.spec: dict[str, Any] = fleet.file.model_dump(mode="json", by_alias=True)
        self._fleet = fleet
        self._template: Template = charter.template(fleet.templates)
        self._charters = {path: _parts(read) for path, read in fleet.charters.items()}
        self.versions = {name: self._charter_of(name).version for name in fleet.file.orchestrators}
        self._asset_hashes = {path: sha256(data) for path, data in fleet.assets.items()}

    def machine(self, machine: str, names: list[str]) -> Bundle:
        """The generation of one machine that runs these orchestrators."""
        files: dict[str, bytes] = {SUPERVISORD_CONF: program.SUPERVISORD.encode()}
        programs: dict[str, str] = {}
        for name in names:
            within = self._limits(name)
            doc = self._orchestrator(name, machine, within)
            programs[name] = program.digest(name=name, runner=doc.runner)
            files[f"programs/{name}.conf"] = program.conf(name=name, program=programs[name]).encode()
            files[f"orchestrators/{name}/orchestrator.json"] = encode(doc)
            files[f"orchestrators/{name}/charter.md"] = self._prompt(doc, within).encode()
            files[f"orchestrators/{name}/settings.json"] = self._charter_of(name).settings
            files.update((f"{assets.ASSETS}/{path}", self._fleet.assets[path]) for path in doc.assets)
        orchestrators = self._fleet.file.orchestrators
        return bundle(
            target=machine,
            fleet=self._fleet.file.fleet,
            files=files,
            programs=programs,
            protected=tuple(name for name in names if orchestrators[name].protect),
        )

    def in_force(self) -> dict[str, InForce]:
        """What the control plane holds each orchestrator to."""
        every = {name: self._limits(name) for name in self._fleet.file.orchestrators}
        return {
            name: InForce(
                sessions=within.sessions if self._declares_sessions(name) else None,
                tokens_per_hour=within.tokens_per_hour,
            )
            for name, within in every.items()
        }

    def _declares_sessions(self, name: str) -> bool:
        spec = self._fleet.file.orchestrators[name]
        written = "sessions" in spec.model_fields_set and "max" in spec.sessions.model_fields_set
        return written or self._fleet.charters[spec.charter].front.limits.sessions is not None

    def _charter_of(self, name: str) -> _CharterParts:
        return self._charters[self._fleet.file.orchestrators[name].charter]

    def _limits(self, name: str) -> charter.Limits:
        spec = self._fleet.file.orchestrators[name]
        return charter.limits(spec, self._fleet.charters[spec.charter].front)

    def _orchestrator(self, name: str, machine: str, within: charter.Limits) -> OrchestratorDoc:
        file = self._fleet.file
        spec, parts = file.orchestrators[name], self._charter_of(name)
        return OrchestratorDoc(
            name=name,
            fleet=file.fleet,
            machine=machine,
            discipline=spec.discipline,
            role=spec.role or parts.front["role"] or name,
            labels=spec.labels,
            control_url=file.control_plane.url,
            charter_version=parts.version,
            runner=self._runner(spec.runner),
            sessions_max=within.sessions,
            session_timeout_s=within.session_timeout_s,
            session_memory_bytes=within.session_memory_bytes,
            workspace=_workspace(spec.workspace),
            spec=self.spec["orchestrators"][name],
            tokens_per_hour=within.tokens_per_hour,
            usd_per_day=within.usd_per_day,
            charter=parts.front,
            assets=self._assets(spec.runner),
        )

    def _runner(self, runner: Runner) -> RunnerDoc:
        if isinstance(runner, CommandRunner):
            command = assets.relocate(runner.command, self._fleet.assets)
            return RunnerDoc(type=runner.type, command=command, secrets=runner.secrets)
        return RunnerDoc(type=runner.type, model=runner.model, secrets=runner.secrets)

    def _assets(self, runner: Runner) -> dict[str, str]:
        if not isinstance(runner, CommandRunner):
            return {}
        paths = assets.travelling(argv=runner.command, globs=runner.files, assets=self._asset_hashes)
        return {path: self._asset_hashes[path] for path in paths}

    def _prompt(self, doc: OrchestratorDoc, within: charter.Limits) -> str:
        return charter.prompt(
            self._template,
            fleet=doc.fleet,
            name=doc.name,
            role=doc.role,
            spec=doc.spec,
            front=doc.charter,
            prose=self._charter_of(doc.name).prose,
            within=within,
        )


def _workspace(spec: Workspace | None) -> WorkspaceDoc | None:
    return None if spec is None else WorkspaceDoc(repo=spec.repo, ref=spec.ref, isolate=spec.isolate)


def _parts(read: Charter) -> _CharterParts:
    front = read.front.model_dump(mode="json", by_alias=True)
    version = charter.version(front, read.prose)
    return _CharterParts(front=front, prose=read.prose, version=version, settings=charter.settings(read.front.safety))

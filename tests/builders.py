"""Fleets to test with: small ones by hand, one that sets every field, and a hypothesis strategy of valid ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from orchestrator_fleet.clock import FrozenClock
from orchestrator_fleet.machines.fake import FakeTransport
from orchestrator_fleet.plan.between import make_plan, residents
from orchestrator_fleet.plan.model import CONTROL_PLANE, Plan
from orchestrator_fleet.render.bundle import Bundle, Desired
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.model import Charter, CharterFront, Fleet, FleetFile
from orchestrator_fleet.wire.machine import (
    Acquire,
    Answer,
    Confirm,
    Destroy,
    Leased,
    Observe,
    Observed,
    Prune,
    Refusal,
    Release,
    Request,
    Stage,
    Switch,
)

NOW_US = 1_767_225_600_000_000
DISCIPLINES = ("engineering", "security", "data")


def charter(path: str = "charters/vp.md", *, prose: str = "You do what the task says.", **front: Any) -> Charter:
    """A charter with this front matter."""
    return Charter(path=path, front=CharterFront.model_validate(front), prose=prose)


def command(*argv: str, **more: Any) -> dict[str, Any]:
    """A command runner."""
    return {"type": "command", "command": list(argv or ("python3", "work.py")), **more}


def fleet(
    *,
    machines: int | Mapping[str, Any] = 2,
    orchestrators: Mapping[str, Mapping[str, Any]] | None = None,
    charters: Mapping[str, Charter] | None = None,
    assets: Mapping[str, bytes] | None = None,
    templates: Mapping[str, str] | None = None,
    **sections: Any,
) -> Fleet:
    """A fleet; by default of machines m1, m2 and orchestrators vp-1 (on m1) and vp-2 (on m2)."""
    if isinstance(machines, int):
        machines = {f"m{n}": {} for n in range(1, machines + 1)}
    if orchestrators is None:
        orchestrators = {f"vp-{n}": {"machine": name} for n, name in enumerate(machines, 1)}
    common = {"charter": "charters/vp.md", "runner": command()}
    file = FleetFile.model_validate(
        {
            "version": 1,
            "fleet": "acme",
            "machines": dict(machines),
            "orchestrators": {name: {**common, **spec} for name, spec in orchestrators.items()},
            **sections,
        }
    )
    return Fleet(
        file=file,
        charters=dict(charters or {"charters/vp.md": charter()}),
        assets=dict(assets or {}),
        templates=dict(templates or {}),
    )


def full_fleet() -> Fleet:
    """A fleet that sets every field there is; what is added to the spec is to be added here."""
    return fleet(
        include=["fleet.d/*.yaml"],
        control_plane={"store": "env:STORE", "writes": "propose", "reconcile": "auto", "interval": "90s"},
        machines={
            "m1": {"labels": {"zone": "a"}, "slots": 4, "sessions": 8, "root": "/opt/fleet", "cordoned": True},
            "m2": {
                "address": "ssh://fleet@10.0.0.2:22",
                "labels": {"zone": "a"},
                "identity": "file:~/.ssh/fleet",
                "host_key": "ssh-ed25519 AAAA",
            },
            "m3": {"labels": {"zone": "b"}, "drained": True},
            "m4": {"labels": {"zone": "a"}},
        },
        defaults=_every_default(),
        orchestrators={
            "vp-1": {
                **_every_default(),
                "charter": "charters/full.md",
                "discipline": "engineering",
                "role": "VP of Engineering",
                "machine": "m1",
                "placement": None,
                "slack": {"user": "vp-1", "channel": "#eng"},
                "protect": True,
            },
            "vp-2": {"runner": {"type": "claude-code", "model": "claude-x", "secrets": {"KEY": "env:KEY"}}},
            "vp-3": {"placement": {"labels": {"zone": "a"}, "avoid": ["vp-2"], "spread": "zone"}},
        },
        charters={
            "charters/vp.md": charter(),
            "charters/full.md": charter(
                "charters/full.md",
                role="VP",
                tier=2,
                identity={"name": "Ada", "email": "ada@acme.test", "slack": "@ada"},
                responsibilities=["triage"],
                objectives={"response_time": "30s", "completion_rate": "95%", "quality_score": 85},
                limits={"sessions": 4, "tokens_per_hour": 100000, "session_timeout": "45m", "memory": "2GiB"},
                constraints=["Never exhaust API quota"],
                safety={"auto_approve": ["Read"], "always_reject": ["Bash(rm:*)"], "escalate": ["WebFetch"]},
            ),
        },
        assets={"work.py": b"print()\n", "lib/a.py": b"A = 1\n"},
        keys={
            "k-00000001": {
                "owner": "person:me",
                "sha256": "1" * 64,
                "scopes": ["tasks:read", "tasks:write"],
                "created": "2026-11-20T09:00:00Z",
                "expires": "2027-02-20T00:00:00Z",
                "revoked": "2026-12-01T00:00:00Z",
                "name": "laptop",
            }
        },
        routing=[
            {
                "name": "first",
                "when": "task.priority == 'HIGH'",
                "to": {"orchestrator": "vp-1"},
                "strategy": "sticky",
                "key": "task.title",
                "weights": {"vp-1": 2},
                "tests": [{"task": {"priority": "HIGH"}, "expect": "vp-1"}],
            },
            {"name": "second", "to": {"discipline": "engineering", "labels": {"team": "platform"}}},
        ],
        limits=[{"name": "repo", "key": "task.metadata.repo", "max_running": 2, "max_per_minute": 10}],
        schedules={
            "nightly": {
                "cron": "0 2 * * *",
                "timezone": "Europe/Berlin",
                "overlap": "queue",
                "catch_up": "all",
                "task": {
                    "title": "Triage",
                    "description": "All of it",
                    "priority": "LOW",
                    "orchestrator": "vp-1",
                    "discipline": "engineering",
                    "tags": ["night"],
                    "metadata": {"repo": "app"},
                },
            }
        },
        rollout={
            "canary": 2,
            "max_parallel": 3,
            "min_healthy": "3s",
            "healthy_deadline": "50s",
            "progress_deadline": "9m",
            "auto_revert": False,
            "max_unreachable": 1,
            "max_deletes": "30%",
            "keep_generations": 4,
            "drift": "warn",
        },
        alerts=[{"name": "stalled", "when": "backlog.oldest_s > 900", "for": "5m", "notify": ["slack"]}],
        notify={"webhook": {"ops": "env:OPS"}, "slack": {"token": "env:SLACK", "app_token": "env:SLACK_APP"}},
    )


def _every_default() -> dict[str, Any]:
    return {
        "runner": command("python3", "work.py", files=["lib/*.py"], secrets={"TOKEN": "env:TOKEN"}),
        "sessions": {"max": 3, "timeout": "20m"},
        "retry": {"max_attempts": 4, "backoff": "3s", "backoff_max": "6m", "jitter": 0.3},
        "workspace": {"repo": "../app", "ref": "main", "isolate": "none"},
        "schedule": {"timezone": "Europe/Berlin", "hours": "Mon-Fri 08:00-18:00"},
        "budget": {"usd_per_day": 50, "tokens_per_hour": 90000, "on_breach": "escalate"},
        "placement": {"labels": {"zone": "a"}, "avoid": ["vp-9"], "spread": "zone"},
        "labels": {"team": "platform"},
        "escalate_to": ["human:oncall"],
        "memory": {"rooms": ["eng"]},
    }


class Living:
    """Machines in memory that a fleet is applied to, by the steps of a plan."""

    def __init__(self, clock: FrozenClock | None = None) -> None:
        self.clock = clock or FrozenClock(NOW_US)
        self.machines: dict[str, FakeTransport] = {}

    def __getitem__(self, name: str) -> FakeTransport:
        return self.machines[name]

    def ask(self, name: str, request: Request) -> Answer:
        """One request to one machine."""
        call = self.machines[name].call(request, timeout_s=5)
        try:
            call.send(None)  # a fake that is not slow never waits: no event loop is needed, which is 20 times faster
        except StopIteration as done:
            answer: Answer = done.value
            return answer
        raise AssertionError(f"{name} waits; ask a slow fake in an event loop")

    def observe(self) -> dict[str, Observed | str]:
        """All machines, with their documents."""
        seen: dict[str, Observed | str] = {}
        for name in self.machines:
            answer = self.ask(name, Observe(documents=True))
            assert isinstance(answer, Observed)
            seen[name] = answer
        return seen

    def desired(self, spec: Fleet) -> Desired:
        """Render, everybody staying where they are."""
        for name in (CONTROL_PLANE, *spec.file.machines):
            self.machines.setdefault(name, FakeTransport(name, clock=self.clock))
        return render(spec, kept=residents(self.observe()))

    def plan(self, spec: Fleet, *, max_deletes: float = 1.0, drift: str = "correct") -> Plan:
        """What an apply would do."""
        desired = self.desired(spec)
        return plan(desired, self.observe(), max_deletes=max_deletes, drift=drift)

    def apply(self, spec: Fleet) -> Plan:
        """Plan, and do what the plan says; the plan."""
        desired = self.desired(spec)
        made = plan(desired, self.observe())
        for target in made.targets:
            kinds = {
                kind: tuple(a.subject for a in made.actions if a.target == target.name and a.kind == kind)
                for kind in ("start", "stop", "restart", "reload", "write", "prune")
            }
            if any(kinds.values()):
                bundle = desired.control if target.name == CONTROL_PLANE else desired.machines.get(target.name)
                self._turn(target.name, bundle, kinds)
        return made

    def _turn(self, name: str, bundle: Bundle | None, kinds: Mapping[str, tuple[str, ...]]) -> None:
        leased = self.ask(name, Acquire(holder="test", ttl_s=60))
        assert isinstance(leased, Leased)
        token = leased.token
        if bundle is None:
            self._done(name, Destroy(token=token))
            return
        blobs = {digest: bundle.files[path] for path, digest in bundle.manifest.files.items()}
        for request in (
            Stage(token=token, digest=bundle.digest, manifest=bundle.manifest_bytes, blobs=blobs),
            Switch(
                token=token,
                digest=bundle.digest,
                start=kinds["start"],
                stop=kinds["stop"],
                restart=kinds["restart"],
            ),
            Confirm(token=token, digest=bundle.digest),
            Prune(token=token, keep=2),
            Release(token=token),
        ):
            self._done(name, request)

    def _done(self, name: str, request: Request) -> None:
        answer = self.ask(name, request)
        assert not isinstance(answer, Refusal), answer


def plan(
    desired: Desired, observed: Mapping[str, Observed | str], *, max_deletes: float = 1.0, drift: str = "correct"
) -> Plan:
    """`make_plan` at a fixed time, deletes allowed."""
    return make_plan(
        desired=desired,
        observed=observed,
        fleet=desired.fleet,
        revision="",
        now_us=NOW_US,
        max_deletes=max_deletes,
        drift=drift,
    )


_words = st.text("abcxyz -%{}\"'\\é\n;#", min_size=1, max_size=20)
_names = st.from_regex(r"[a-z][a-z0-9-]{0,6}", fullmatch=True)
_durations = st.sampled_from(["1s", "1500ms", "90s", "15m", "2h", "7d"])
_labels = st.dictionaries(st.sampled_from(["zone", "tier", "team"]), st.sampled_from(["a", "b", ""]), max_size=2)


_rules = st.lists(st.sampled_from(["Read", "WebFetch", "Bash(git push:*)", "Bash(rm -rf /*)"]), unique=True)
_counts = st.none() | st.integers(1, 100)
_some_words = st.lists(_words, max_size=2)


@st.composite
def charters(draw: st.DrawFn, path: str) -> Charter:
    """Any valid charter."""
    front = {
        "role": draw(st.none() | _words),
        "tier": draw(st.integers(0, 10)),
        "identity": {"name": draw(st.none() | _words)},
        "responsibilities": draw(_some_words),
        "objectives": {"response_time": draw(st.none() | _durations), "quality_score": draw(_counts)},
        "limits": {
            "sessions": draw(_counts),
            "tokens_per_hour": draw(_counts),
            "session_timeout": draw(st.none() | _durations),
            "memory": draw(st.sampled_from([None, "64KiB", "2GiB"])),
        },
        "constraints": draw(_some_words),
        "safety": {name: draw(_rules) for name in ("auto_approve", "always_reject", "escalate")},
    }
    return charter(path, prose=draw(_words), **front)


@st.composite
def runners(draw: st.DrawFn) -> dict[str, Any]:
    """Any runner: commands with and without files, Claude Code."""
    if draw(st.booleans()):
        return {"type": "claude-code", "model": draw(st.sampled_from(["claude-x", "claude-y"]))}
    argv = ["python3", draw(st.sampled_from(["work.py", "./lib/a.py", "elsewhere.py"])), draw(_words)]
    return command(*argv, files=draw(st.lists(st.sampled_from(["lib/*.py", "lib", "**/*.md"]), max_size=2)))


@st.composite
def fleets(draw: st.DrawFn, *, protect: bool = False) -> Fleet:
    """Any valid fleet of up to 4 machines and 6 orchestrators that all fit somewhere."""
    names = draw(st.lists(_names, min_size=1, max_size=6, unique=True))
    machines: dict[str, dict[str, Any]] = {
        f"m{n}": {
            "labels": draw(_labels),
            "slots": draw(st.integers(6, 8)),
            "sessions": draw(st.none() | st.integers(1, 20)),
            "cordoned": n > 1 and draw(st.booleans()),
            "drained": n > 1 and draw(st.booleans()),
        }
        for n in range(1, draw(st.integers(1, 4)) + 1)
    }
    paths = ["charters/a.md", "charters/b.md"]
    return fleet(
        machines=machines,
        orchestrators={name: draw(_orchestrators(machines, paths, protect=protect)) for name in names},
        charters={path: draw(charters(path)) for path in paths},
        assets={"work.py": draw(st.binary(max_size=4)), "lib/a.py": draw(st.binary(max_size=4)), "x/y.md": b"y"},
        keys=draw(_keys()),
        routing=[
            {"name": rule, "when": draw(st.none() | st.just("task.title == 'x'")), "to": {"orchestrator": names[0]}}
            for rule in draw(st.lists(_names, max_size=3, unique=True))
        ],
        limits=[
            {"name": name, "key": "task.title", "max_running": draw(st.integers(1, 3))}
            for name in draw(st.lists(_names, max_size=2, unique=True))
        ],
        rollout={"canary": draw(st.integers(0, 3)), "max_deletes": draw(st.sampled_from(["0%", "25%", "33.333%"]))},
        templates=draw(st.sampled_from([{}, {"charter.md.j2": "{{ name }}: {{ prose }}"}])),
    )


@st.composite
def _orchestrators(
    draw: st.DrawFn, machines: Mapping[str, Mapping[str, Any]], paths: list[str], *, protect: bool
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "charter": draw(st.sampled_from(paths)),
        "discipline": draw(st.sampled_from(DISCIPLINES)),
        "role": draw(st.none() | _words),
        "runner": draw(runners()),
        "labels": draw(_labels),
        "sessions": {"max": draw(st.integers(1, 100)), "timeout": draw(_durations)},
        "escalate_to": draw(st.lists(st.sampled_from(["human:me", "human:you"]), unique=True)),
        "protect": protect and draw(st.booleans()),
    }
    if draw(st.booleans()):
        spec["budget"] = {"usd_per_day": draw(st.none() | st.floats(0.01, 100)), "tokens_per_hour": 1000}
    where = draw(st.sampled_from(["anywhere", "pinned", "labels", "spread"]))
    if where == "pinned":
        spec["machine"] = draw(st.sampled_from([name for name, m in machines.items() if not m["drained"]]))
    elif where == "labels":
        spec["placement"] = {"labels": machines["m1"]["labels"]}
    elif where == "spread":
        spec["placement"] = {"spread": "zone"}
    return spec


@st.composite
def _keys(draw: st.DrawFn) -> dict[str, Any]:
    ids = draw(st.lists(st.sampled_from(["k-00000001", "k-00000002", "k-00000003"]), unique=True))
    return {
        key_id: {
            "owner": draw(st.sampled_from(["person:me", "service:ci"])),
            "sha256": draw(st.sampled_from(["1" * 64, "2" * 64])),
            "scopes": draw(st.sampled_from([["admin"], ["tasks:read"], ["tasks:read", "tasks:write"]])),
            "expires": draw(st.sampled_from([None, "2027-02-20T00:00:00Z"])),
            "revoked": draw(st.sampled_from([None, "2027-01-01T00:00:00Z"])),
        }
        for key_id in ids
    }

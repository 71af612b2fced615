"""The words of fleet.yaml, version 1, as pydantic models.

Shape only: what one value may be. What values mean to each other (a charter that exists, a machine that
is declared, a CEL expression that compiles) is checked by `references`. Field descriptions are what
`fleet schema` prints and an editor shows.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from orchestrator_fleet.ids import NAME_PATTERN
from orchestrator_fleet.keys import Scope
from orchestrator_fleet.spec.units import Duration, Instant, Share, Size

MAX_TEXT = 4_000
MAX_LABELS = 64
MAX_SECRETS = 100
MAX_MACHINES = 2_000
MAX_ORCHESTRATORS = 20_000
MAX_KEYS = 10_000
Name = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^k-[0-9a-f]{8}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]
Cel = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]
Reference = Annotated[str, StringConstraints(pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|exec:.+)$")]
Priority = Literal["CRITICAL", "HIGH", "MEDIUM", "LOW"]
Labels = Annotated[dict[Name, Annotated[str, StringConstraints(max_length=200)]], Field(max_length=MAX_LABELS)]
Secrets = Annotated[dict[str, Reference], Field(max_length=MAX_SECRETS)]


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value:
        raise ValueError(f"got {value!r}, wanted a path inside the fleet folder, without ..")
    if any(part.startswith(".") for part in path.parts):
        # What a bundle carries is read on machines and by agents: never .git, nor .fleet with its keys.
        raise ValueError(f"got {value!r}, wanted no hidden file or folder; keep it under a name without a leading dot")
    return value


InsidePath = Annotated[str, StringConstraints(min_length=1, max_length=500), AfterValidator(_inside)]
LinuxPath = Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$", max_length=500)]


class Part(BaseModel):
    """Every part of the spec: unknown keys are errors, `"8"` is no number, values don't change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ControlPlane(Part):
    """Where tasks are kept and handed out."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+(:\d+)?/?$")] = Field(
        "http://127.0.0.1:8700", description="Where daemons and clients reach `fleet serve`."
    )
    store: str = Field("sqlite", description="`sqlite`, or a reference such as env:FLEET_STORE to a postgresql:// URL.")
    writes: Literal["commit", "propose", "refuse"] = Field("commit", description="What the API does to declared state.")
    reconcile: Literal["manual", "auto"] = Field(
        "manual", description="auto: `fleet serve` applies each change itself."
    )
    interval: Duration = Field(60.0, description="With reconcile: auto, the longest time between two passes.")

    @model_validator(mode="after")
    def _store_is_sqlite_or_a_reference(self) -> ControlPlane:
        if self.store != "sqlite" and not self.store.startswith(("env:", "file:", "exec:")):
            raise ValueError(f"store: got {self.store!r}, wanted sqlite or a reference (env:, file:, exec:)")
        return self


class Machine(Part):
    """One machine that runs a supervisord."""

    address: Annotated[str, StringConstraints(pattern=r"^(local|ssh://[^\s@/]+@[^\s/]+)$")] = Field(
        "local", description="`local`, or ssh://user@host:port."
    )
    labels: Labels = Field(default_factory=dict, description="Free words that placement and rollout select by.")
    slots: int = Field(8, ge=1, le=1000, description="How many orchestrators may be placed here.")
    sessions: int | None = Field(
        None, ge=1, le=1000, description="Sessions at once on this machine, all orchestrators together."
    )
    root: LinuxPath | None = Field(None, description="Where the machine keeps its generations (absolute).")
    identity: Reference | None = Field(None, description="The SSH key to use, as file:PATH.")
    host_key: Text | None = Field(None, description="The machine's pinned SSH host key, as in known_hosts.")
    cordoned: bool = Field(default=False, description="Place nothing new here.")
    drained: bool = Field(default=False, description="Also move away what is here.")


class CommandRunner(Part):
    """A session is any command: the task as JSON on stdin, the result in $FLEET_RESULT."""

    type: Literal["command"] = "command"
    command: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=4000)]],
        Field(min_length=1, max_length=200),
    ] = Field(description="argv; an element that names a file of the fleet folder travels with the bundle.")
    files: list[InsidePath] = Field(
        default_factory=list, max_length=100, description="More files (globs) that travel along."
    )
    secrets: Secrets = Field(default_factory=dict, description="Environment variables, by reference.")


class ClaudeCodeRunner(Part):
    """A session is a Claude Code run under the charter's limits."""

    type: Literal["claude-code"]
    model: Text = Field("claude-sonnet-4-5", description="The model's name.")
    secrets: Secrets = Field(default_factory=dict, description="Environment variables, by reference.")


Runner = Annotated[CommandRunner | ClaudeCodeRunner, Field(discriminator="type")]


class Sessions(Part):
    """How many sessions at once, and how long each may take."""

    max: int = Field(2, ge=1, le=100, description="Sessions at once.")
    timeout: Duration = Field(1800.0, gt=0, description="The longest a session may run.")


class Retry(Part):
    """What happens after a failed attempt."""

    max_attempts: int = Field(3, ge=1, le=100, description="Attempts before the task is BLOCKED/attempts_exhausted.")
    backoff: Duration = Field(2.0, description="The wait before the second attempt; doubles each time.")
    backoff_max: Duration = Field(300.0, description="The longest wait.")
    jitter: float = Field(0.2, ge=0, le=1, description="The share of the wait that is random.")


class Placement(Part):
    """Which machine to choose, where `machine` names none."""

    labels: Labels = Field(default_factory=dict, description="Labels that the machine must have.")
    avoid: list[Name] = Field(
        default_factory=list, max_length=100, description="Orchestrators not to share a machine with."
    )
    spread: Name | None = Field(
        None, description="A label over whose values to spread orchestrators of one discipline."
    )


class Workspace(Part):
    """The git repository that sessions work on."""

    repo: Text = Field(description="A git URL, or a path relative to the fleet folder on local machines.")
    ref: Text = Field("HEAD", description="The branch, tag or commit to start from.")
    isolate: Literal["worktree", "none"] = Field(
        "worktree", description="worktree: each attempt gets a tree of its own."
    )


class Schedule(Part):
    """Working hours."""

    timezone: str = Field("UTC", description="An IANA zone, such as Europe/Berlin.")
    hours: Text = Field(description='Such as "Mon-Fri 08:00-18:00"; several, separated by commas.')


class Budget(Part):
    """What may be spent."""

    usd_per_day: float | None = Field(None, gt=0, description="US dollars a day.")
    tokens_per_hour: int | None = Field(None, gt=0, description="Tokens an hour.")
    on_breach: Literal["pause", "escalate"] = Field("pause", description="What happens when it is spent.")


class SlackPresence(Part):
    """How the orchestrator shows in Slack."""

    user: Text | None = Field(None, description="Its name there.")
    channel: Text | None = Field(None, description="Where it posts.")


class MemorySettings(Part):
    """What the orchestrator remembers with whom."""

    rooms: list[Name] = Field(default_factory=list, max_length=50, description="Shared rooms it reads and writes.")


class OrchestratorDefaults(Part):
    """Merged under every orchestrator."""

    runner: Runner | None = Field(None, description="What a session is.")
    sessions: Sessions = Field(default_factory=Sessions, description="Session limits.")
    retry: Retry = Field(default_factory=Retry, description="Retry policy.")
    workspace: Workspace | None = Field(None, description="The repository sessions work on.")
    schedule: Schedule | None = Field(None, description="Outside it: AWAY, claims only CRITICAL.")
    budget: Budget | None = Field(None, description="What may be spent.")
    placement: Placement | None = Field(None, description="How to choose a machine.")
    labels: Labels = Field(default_factory=dict, description="Free words that routing selects by.")
    escalate_to: list[str] = Field(
        default_factory=list,
        max_length=10,
        description="Who gets what it can't do: orchestrators or human:<name>.",
    )
    escalation_timeout: Duration = Field(
        900.0, gt=0, description="How long an orchestrator of escalate_to may take before the next is asked."
    )
    memory: MemorySettings | None = Field(None, description="Shared memory.")


class Orchestrator(OrchestratorDefaults):
    """One declared agent (VP) and its mandate."""

    charter: InsidePath = Field(description="Its charter, a Markdown file in the fleet folder.")
    discipline: Name = Field("general", description="Its trade; routing sends tasks by it.")
    role: Text | None = Field(None, description="Its title; default: the charter's.")
    runner: Runner = Field(
        default_factory=lambda: ClaudeCodeRunner(type="claude-code"), description="What a session is."
    )
    machine: Name | None = Field(None, description="The machine it runs on; default: by placement.")
    slack: SlackPresence | None = Field(None, description="Its presence in Slack.")
    protect: bool = Field(default=False, description="Refuse to delete it until this is lifted in an earlier apply.")

    @model_validator(mode="after")
    def _one_way_to_a_machine(self) -> Orchestrator:
        if self.machine is not None and "placement" in self.model_fields_set and self.placement is not None:
            raise ValueError("has both machine and placement; keep one")
        return self


class Key(Part):
    """A person's or service's API key, as a hash."""

    owner: Text = Field(description="An orchestrator, person:<name> or service:<name>.")
    name: Text | None = Field(None, description="What people call it.")
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="Of the key's secret part."
    )
    scopes: list[Scope] = Field(min_length=1, max_length=20, description="What it may do.")
    created: Instant | None = Field(None, description="When it was made.")
    expires: Instant | None = Field(None, description="When it stops working by itself.")
    revoked: Instant | None = Field(None, description="When it stops, or stopped, working by decision.")


class RouteTarget(Part):
    """Who may get the task: a name, or everybody of a discipline and labels."""

    orchestrator: Text | None = Field(None, description="An orchestrator's name; may be a template of the task.")
    discipline: Text | None = Field(None, description='A discipline; may be a template: "{{ task.discipline }}".')
    labels: Labels = Field(default_factory=dict, description="Labels that the orchestrator must have.")

    @model_validator(mode="after")
    def _names_somebody(self) -> RouteTarget:
        if self.orchestrator is not None and (self.discipline is not None or self.labels):
            raise ValueError("names an orchestrator and also a discipline or labels; keep one")
        if self.orchestrator is None and self.discipline is None and not self.labels:
            raise ValueError("names nobody; give orchestrator, discipline or labels")
        return self


class RouteTest(Part):
    """A task and the orchestrator it must reach; run by `fleet validate`."""

    task: dict[str, Any] = Field(description="Fields of the task.")
    expect: Name = Field(description="The orchestrator it must reach, when all are idle.")


class Route(Part):
    """A routing rule: the first that matches wins."""

    name: Name = Field(description="What `fleet route explain` and the task's history call it.")
    when: Cel | None = Field(None, description="CEL over `task`; no `when` matches always.")
    to: RouteTarget = Field(description="Who gets it.")
    strategy: Literal["least-loaded", "round-robin", "weighted", "sticky"] = Field(
        "least-loaded", description="How to choose among several."
    )
    key: Cel | None = Field(None, description="For sticky: CEL over `task`; equal values go to the same orchestrator.")
    weights: dict[Name, Annotated[int, Field(ge=0, le=1000)]] = Field(
        default_factory=dict, max_length=1_000, description="For weighted: by orchestrator."
    )
    tests: list[RouteTest] = Field(default_factory=list, max_length=200, description="Checked by `fleet validate`.")

    @model_validator(mode="after")
    def _sticky_has_a_key(self) -> Route:
        if self.strategy == "sticky" and self.key is None:
            raise ValueError("strategy sticky needs `key`, a CEL expression over the task")
        return self


class Limit(Part):
    """How many tasks may run at once, or start in a while, for each value of a key."""

    name: Name = Field(description="What `fleet task why` calls it.")
    key: Cel = Field(description="CEL over `task`; each value has a count of its own.")
    max_running: int | None = Field(None, ge=1, description="Running at once.")
    max_per_minute: int | None = Field(None, ge=1, description="Started in any minute.")

    @model_validator(mode="after")
    def _limits_something(self) -> Limit:
        if self.max_running is None and self.max_per_minute is None:
            raise ValueError("limits nothing; give max_running or max_per_minute")
        return self


class TaskTemplate(Part):
    """A task that a schedule makes."""

    title: Annotated[str, StringConstraints(min_length=1, max_length=500)] = Field(description="Its title.")
    description: str = Field("", max_length=100_000, description="What to do.")
    priority: Priority = Field("MEDIUM", description="Its class.")
    orchestrator: Name | None = Field(None, description="Who gets it; default: by routing.")
    discipline: Name | None = Field(None, description="Its trade.")
    tags: list[Text] = Field(default_factory=list, max_length=50, description="Free words.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Anything more.")


class RecurringTask(Part):
    """A task that comes again by the clock."""

    cron: Text = Field(description="Five fields: minute hour day month weekday.")
    timezone: str = Field("UTC", description="An IANA zone.")
    task: TaskTemplate = Field(description="The task to make.")
    overlap: Literal["skip", "queue", "replace"] = Field("skip", description="While the last one is still open.")
    catch_up: Literal["none", "last", "all"] = Field("last", description="After the control plane was down.")


class Rollout(Part):
    """How a change reaches the machines."""

    canary: int = Field(1, ge=0, description="Machines that go first, alone.")
    max_parallel: int = Field(4, ge=1, le=1000, description="Machines changed at once after the canary.")
    min_healthy: Duration = Field(2.0, description="How long a machine must stay healthy to count.")
    healthy_deadline: Duration = Field(60.0, gt=0, description="How long a machine may take to become healthy.")
    progress_deadline: Duration = Field(600.0, gt=0, description="The longest without a machine getting done.")
    auto_revert: bool = Field(default=True, description="Go back to the last good generation on failure.")
    max_unreachable: int = Field(2, ge=0, description="Machines that may be out of reach.")
    max_deletes: Share = Field(0.25, description="The share of orchestrators one apply may delete.")
    keep_generations: int = Field(5, ge=1, le=100, description="Generations kept on a machine.")
    drift: Literal["correct", "warn", "ignore"] = Field("correct", description="What to do about changes made by hand.")


class Alert(Part):
    """When to tell somebody."""

    name: Name = Field(description="Its name.")
    when: Cel = Field(description="CEL over an orchestrator's live values.")
    for_: Duration = Field(0.0, alias="for", description="How long it must hold.")
    notify: list[Text] = Field(default_factory=list, max_length=20, description="slack, or webhook:<name>.")


class SlackNotify(Part):
    """Slack's tokens, by reference."""

    token: Reference = Field(description="The bot's token.")
    app_token: Reference | None = Field(None, description="The app-level token, for socket mode.")


class Notify(Part):
    """Where alerts go."""

    webhook: dict[Name, Reference] = Field(
        default_factory=dict, max_length=100, description="URLs by name, by reference."
    )
    slack: SlackNotify | None = Field(None, description="Slack.")


class FleetFile(Part):
    """One fleet.yaml, its includes merged in: what `fleet schema` describes."""

    model_config = ConfigDict(title="fleet.yaml, version 1")

    version: Literal[1] = Field(description="The version of this format.")
    fleet: Name = Field(description="The fleet's name.")
    include: list[InsidePath] = Field(
        default_factory=list, max_length=100, description="More files (globs); the same keys merge."
    )
    control_plane: ControlPlane = Field(default_factory=ControlPlane, description="Where tasks are kept.")
    machines: dict[Name, Machine] = Field(min_length=1, max_length=MAX_MACHINES, description="The machines, by name.")
    defaults: OrchestratorDefaults = Field(
        default_factory=OrchestratorDefaults, description="Merged under every orchestrator."
    )
    orchestrators: dict[Name, Orchestrator] = Field(
        min_length=1, max_length=MAX_ORCHESTRATORS, description="The orchestrators, by name."
    )
    keys: dict[KeyId, Key] = Field(
        default_factory=dict, max_length=MAX_KEYS, description="API keys of people and services, as hashes."
    )
    routing: list[Route] = Field(default_factory=list, max_length=500, description="First match wins.")
    limits: list[Limit] = Field(default_factory=list, max_length=100, description="Concurrency and rate by key.")
    schedules: dict[Name, RecurringTask] = Field(default_factory=dict, max_length=1_000, description="Recurring tasks.")
    rollout: Rollout = Field(default_factory=Rollout, description="How a change reaches the machines.")
    alerts: list[Alert] = Field(default_factory=list, max_length=200, description="When to tell somebody.")
    notify: Notify = Field(default_factory=Notify, description="Where alerts go.")


class Identity(Part):
    """Who the orchestrator is to people."""

    name: Text | None = Field(None, description="Its name.")
    email: Text | None = Field(None, description="Its address.")
    slack: Text | None = Field(None, description="Its handle.")


class Objectives(Part):
    """What it is measured by."""

    response_time: Duration | None = Field(None, description="From routing to the first attempt.")
    completion_rate: Share | None = Field(None, description="Tasks done of tasks ended.")
    quality_score: int | None = Field(None, ge=0, le=100, description="Out of 100.")


class CharterLimits(Part):
    """What it may use; the smaller of this and fleet.yaml counts."""

    sessions: int | None = Field(None, ge=1, le=100, description="Sessions at once.")
    tokens_per_hour: int | None = Field(None, ge=1, description="Tokens an hour.")
    session_timeout: Duration | None = Field(None, gt=0, description="The longest a session may run.")
    memory: Size | None = Field(None, description="Memory of a session.")


class Safety(Part):
    """Tool permissions in Claude Code's rule syntax."""

    auto_approve: list[Text] = Field(default_factory=list, max_length=500, description="Runs without asking.")
    always_reject: list[Text] = Field(default_factory=list, max_length=500, description="Never runs.")
    escalate: list[Text] = Field(default_factory=list, max_length=500, description="Waits for an approval.")


class CharterFront(Part):
    """A charter's front matter: what is enforced."""

    role: Text | None = Field(None, description="Its title.")
    tier: int = Field(1, ge=0, le=10, description="Its level: 0 is the top.")
    identity: Identity = Field(default_factory=Identity, description="Who it is to people.")
    responsibilities: list[Text] = Field(default_factory=list, max_length=100, description="What it does.")
    objectives: Objectives = Field(default_factory=Objectives, description="What it is measured by.")
    limits: CharterLimits = Field(default_factory=CharterLimits, description="What it may use.")
    constraints: list[Text] = Field(default_factory=list, max_length=100, description="What it must keep to.")
    safety: Safety = Field(default_factory=Safety, description="Tool permissions.")


class Charter(Part):
    """A charter as read: front matter and prose."""

    path: str
    front: CharterFront
    prose: str


class Fleet(Part):
    """A checked fleet: the file with defaults merged, its charters and the files its runners name.

    `assets` maps a path inside the fleet folder to that file's bytes: what travels with a bundle.
    `templates` maps a template's file name to its text, where the fleet has its own.
    """

    file: FleetFile
    charters: dict[str, Charter]
    assets: dict[str, bytes]
    templates: dict[str, str]

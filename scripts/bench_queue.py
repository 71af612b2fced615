"""The task queue beside others, in turn, with durable settings: every commit is synced by all that are compared.

    a  SQLite through the store: huey, persist-queue, celery on Redis (appendfsync always), and what SQLite itself does
    b  PostgreSQL through the store: procrastinate, PgQueuer, and SKIP LOCKED on asyncpg
    c  a real `fleet serve` with sixteen daemons on the wire: from POST to delivery, and tasks a second
    d  a claim after a long past: a million finished tasks and a hundred thousand that wait

A peer's figure is of its own worker running a task that only leaves a mark; ours is of claims and reports that are
committed when they are counted. `ours` is how many times ours (the first row of its kind) is better than that row.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bench_queue_flat as flat
import bench_queue_floors as floors
import bench_queue_link as link
import bench_queue_ours as ours
from bench_idle import cpu_s, memory_mb
from bench_queue_peers import Peer, environment, percentile
from bench_queue_servers import Missing, Postgres, postgres, redis
from bench_sample import SampleFleet, report

from orchestrator_fleet.errors import StoreError

CALLERS, WORKERS, BATCH = 64, 8, 10
CREATE, DRAIN, ALONE, LATENCY = "create", "drain", "drain, alone", "POST to delivery"
DRAIN_MANY = f"drain, {BATCH} a claim"
RATE = 20.0
REST_S, REST_SHARE, REST_TIMEOUT_S = 2.0, 0.05, 900.0  # serve rests when it uses less than this share of a core
SMALL = flat.Past(finished=1_000, waiting=1_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    tasks: int
    rounds: int
    seconds: float
    cap_s: float
    claims: int
    large: flat.Past


FULL = Size(
    tasks=10_000,
    rounds=3,
    seconds=30.0,
    cap_s=60.0,
    claims=600,
    large=flat.Past(finished=1_000_000, waiting=100_000),
)
QUICK = Size(
    tasks=1_000,
    rounds=1,
    seconds=5.0,
    cap_s=10.0,
    claims=300,
    large=flat.Past(finished=50_000, waiting=5_000),
)


@dataclass(slots=True)
class Row:
    """One figure of one contestant, a value for each round. `unit` /s is better when high, ms and MB when low."""

    part: str
    what: str
    who: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.values)


class Figures:
    """All that was measured, in the order of its first coming."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str, str], Row] = {}

    def put(self, part: str, what: str, who: str, value: float, unit: str = "/s") -> None:
        """Add a round's value."""
        key = (part, what, who, unit)
        self._rows.setdefault(key, Row(*key)).values.append(value)
        print(f"bench: {part} {what}: {who}: {value:,.2f} {unit}", file=sys.stderr)

    def table(self) -> list[dict[str, Any]]:
        """Each beside the first of its kind, which is ours."""
        rows: list[dict[str, Any]] = []
        kinds = sorted(self._rows.values(), key=lambda row: row.part)
        for _, of_part in itertools.groupby(kinds, key=lambda row: row.part):
            groups: dict[tuple[str, str], list[Row]] = {}
            for row in of_part:
                groups.setdefault((row.what, row.unit), []).append(row)
            rows += [_shown(row, group[0]) for group in groups.values() for row in group]
        return rows


def _shown(row: Row, first: Row) -> dict[str, Any]:
    better = first.median / row.median if row.unit == "/s" else row.median / first.median
    return {
        "part": row.part,
        "what": row.what,
        "who": row.who,
        "median": row.median,
        "unit": row.unit,
        "min": min(row.values),
        "max": max(row.values),
        "runs": len(row.values),
        "ours": None if row is first else better,
    }


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    def rounded(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"  # noqa: PLR2004 (no fraction of three figures)

    figures = {name: rounded(row[name]) for name in ("median", "min", "max")}
    return {**row, **figures, "ours": "" if row["ours"] is None else f"{row['ours']:.2f}x"}


@dataclass(frozen=True, slots=True)
class Contestant:
    """Somebody who is measured once a round."""

    who: str
    measure: Callable[[Callable[[str, float], None]], None]


def in_turn(figures: Figures, part: str, contestants: Sequence[Contestant], rounds: int) -> None:
    """Each once, then each once again: what the machine does meanwhile hits all alike."""
    for _ in range(rounds):
        for one in contestants:
            one.measure(lambda what, value, who=one.who: figures.put(part, what, who, value))  # type: ignore[misc] # bound now


class Place:
    """A folder for everything, and the peers' environment once somebody needs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._python: Path | None = None

    def new(self, name: str) -> Path:
        """A path in a new folder."""
        folder = self.folder / f"{next(self._numbers):03d}"
        folder.mkdir()
        return folder / name

    def peer(self, key: str, fresh_url: Callable[[], str]) -> Peer:
        """One of the peers' queues; Missing when their environment can't be made."""
        if self._python is None:
            self._python = environment()
        return Peer(key, python=self._python, folder=self.folder, fresh_url=fresh_url)

    def file_url(self) -> str:
        """For a queue that is a file."""
        return str(self.new("queue"))


@contextlib.contextmanager
def skipping(what: str) -> Iterator[None]:
    """Go on without what is Missing, and say so."""
    try:
        yield
    except Missing as reason:
        print(f"bench: without {what}: {reason}", file=sys.stderr)


def _ours(
    url: Callable[[], str], size: Size, callers: int, lines: Sequence[str], put: Callable[[str, float], None]
) -> None:
    """Create and drain with many callers, then drain with one."""
    with ours.Ours(url()) as queue:
        put(CREATE, ours.run(ours.create(queue, size.tasks, callers=callers, lines=lines)))
        put(DRAIN, ours.run(ours.drain(queue, size.tasks, callers=callers, lines=lines)))
    if len(lines) > 1:
        return
    with ours.Ours(url()) as queue:
        ours.run(ours.create(queue, size.tasks, callers=CALLERS, lines=lines))
        put(ALONE, ours.run(ours.drain(queue, size.tasks, callers=1, lines=lines)))


def _peer(peer: Peer, size: Size, callers: int, put: Callable[[str, float], None], *, alone: bool = True) -> None:
    """The same; the better of one caller and many counts as its rate of creation."""
    peer.fresh()
    one = peer.enqueue(size.tasks // 2, 1)
    many = peer.enqueue(size.tasks // 2, callers)
    put(CREATE, max(one, many))
    put(DRAIN, peer.drain(size.tasks, workers=WORKERS, cap_s=size.cap_s))
    if alone:
        peer.fresh()
        peer.enqueue(size.tasks, 1 if one > many else callers)
        put(ALONE, peer.drain(size.tasks, workers=1, cap_s=size.cap_s))


def part_a(figures: Figures, place: Place, size: Size, rest: contextlib.ExitStack) -> None:
    """SQLite."""

    def url() -> str:
        return f"sqlite:///{place.new('store.sqlite')}"

    def floor(put: Callable[[str, float], None]) -> None:
        put(CREATE, floors.put_together(place.new("floor"), size.tasks))
        put(ALONE, floors.claim_and_finish(place.new("floor"), size.tasks))

    contestants = [
        Contestant("ours, 64 callers", partial(_ours, url, size, CALLERS, ours.LINES[:1])),
        Contestant("ours, 64 callers of 16 lines", partial(_ours, url, size, CALLERS, ours.LINES)),
        Contestant("floor: SQLite, one table", floor),
    ]
    with skipping("huey and persist-queue"):
        contestants += [
            Contestant("huey SqliteHuey", partial(_peer, place.peer("huey", place.file_url), size, CALLERS)),
            Contestant("persist-queue", partial(_peer, place.peer("persist-queue", place.file_url), size, CALLERS)),
        ]
    with skipping("celery"):
        server = rest.enter_context(redis(place.folder))
        celery = place.peer("celery", server.fresh)
        contestants.append(Contestant("celery + redis", partial(_peer, celery, size, CALLERS)))
    in_turn(figures, "a", contestants, size.rounds)


def part_b(figures: Figures, place: Place, size: Size, rest: contextlib.ExitStack) -> None:
    """PostgreSQL."""
    with skipping("PostgreSQL"):
        server = rest.enter_context(postgres(place.folder))
        contestants = [
            Contestant("ours, 8 callers", partial(_ours_in_postgres, server, size, 1)),
            Contestant("ours, 8 callers, 10 a claim", partial(_ours_in_postgres, server, size, BATCH)),
        ]
        with skipping("procrastinate, PgQueuer and the floor"):
            names = (
                ("procrastinate", "procrastinate", DRAIN),
                ("pgqueuer-1", "PgQueuer, 1 a claim", DRAIN),
                ("pgqueuer", "PgQueuer, 10 a claim", DRAIN_MANY),
                ("skip-locked", "floor: SKIP LOCKED, asyncpg", DRAIN),
            )
            for key, who, drain in names:
                peer = place.peer(key, partial(server.fresh, key.replace("-", "_")))
                contestants.append(Contestant(who, partial(_peer_in_postgres, server, peer, drain, size)))
        in_turn(figures, "b", contestants, size.rounds)


def _ours_in_postgres(server: Postgres, size: Size, batch: int, put: Callable[[str, float], None]) -> None:
    lines = ours.LINES[:1]
    try:
        queue = ours.Ours(server.fresh("ours"))
    except StoreError as problem:
        raise Missing(str(problem)) from problem
    with queue:
        created = ours.run(ours.create(queue, size.tasks, callers=WORKERS, lines=lines))
        if batch == 1:
            put(CREATE, created)
        server.settled()
        drained = ours.run(ours.drain(queue, size.tasks, callers=WORKERS, lines=lines, batch=batch))
        put(DRAIN if batch == 1 else DRAIN_MANY, drained)
    server.settled()


def _peer_in_postgres(server: Postgres, peer: Peer, drain: str, size: Size, put: Callable[[str, float], None]) -> None:
    peer.fresh()
    put(CREATE, peer.enqueue(size.tasks, WORKERS))
    server.settled()
    put(drain, peer.drain(size.tasks, workers=WORKERS, cap_s=size.cap_s))
    server.settled()


def part_c(figures: Figures, place: Place, size: Size, rest: contextlib.ExitStack) -> None:
    """Over HTTP and the link; latencies of peers at the same pace."""
    with serving() as (sample, key):
        daemons = link.daemon_keys(ours.LINES, _store_url(sample))
        sample.serve()
        ours.run(_on_the_wire(figures, size, link.wired(sample.url, key=key, daemons=daemons, spec=ours.SAMPLE)))
    with contextlib.ExitStack() as asides:
        peers = [("huey", "huey SqliteHuey", place.file_url), ("persist-queue", "persist-queue", place.file_url)]
        with skipping("celery"):
            peers.append(("celery", "celery + redis", rest.enter_context(redis(place.folder)).fresh))
        with skipping("procrastinate and PgQueuer"):
            server = asides.enter_context(postgres(place.folder))
            peers += [(key, key, partial(server.fresh, key)) for key in ("procrastinate", "pgqueuer")]
        with skipping("peers"):
            for name, who, fresh_url in peers:
                peer = place.peer(name, fresh_url)
                peer.fresh()
                _put_latencies(figures, who, peer.latencies_ms(RATE, size.seconds, workers=1))


async def _on_the_wire(figures: Figures, size: Size, wired: contextlib.AbstractAsyncContextManager[link.Wire]) -> None:
    async with wired as wire:
        _put_latencies(figures, "ours, HTTP to link, 16 daemons", await wire.paced(RATE, size.seconds))
        for _ in range(size.rounds):
            figures.put("c", "HTTP POST", "ours, 16 connections", await wire.created(size.tasks))
            figures.put("c", "claim and finish", "ours, 16 daemons", await wire.drained(size.tasks))
            figures.put("c", "both at once", "ours, 16 connections and daemons", await wire.both(size.tasks))


def _put_latencies(figures: Figures, who: str, taken_ms: list[float]) -> None:
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        figures.put("c", f"{LATENCY} at {RATE:g}/s, {name}", who, percentile(taken_ms, share), "ms")


def part_d(figures: Figures, place: Place, size: Size, _rest: contextlib.ExitStack) -> None:
    """A long past."""
    files = {past: place.new("store.sqlite") for past in (SMALL, size.large)}
    for past, file in files.items():
        begun = time.perf_counter()
        flat.fill(file, past)
        print(f"bench: made {past} in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    for _ in range(size.rounds):
        for past, file in files.items():
            with ours.Ours(f"sqlite:///{file}") as queue:
                count = size.claims // size.rounds
                ours.run(ours.alone(queue, count // 3, ours.LINES))  # what is read at every claim is in memory then
                used_s = time.process_time()
                claims, ends = ours.run(ours.alone(queue, count, ours.LINES))
                used_ms = (time.process_time() - used_s) * 1000 / count
            figures.put("d", "claim and finish, CPU", str(past), used_ms, "ms")
            for what, taken in (("claim", claims), ("finish", ends)):
                for share, name in ((0.5, "p50"), (0.99, "p99")):
                    figures.put("d", f"{what}, {name}", str(past), percentile(taken, share) * 1000, "ms")
    for past, file in files.items():
        with serving() as (sample, _):
            store = Path(_store_url(sample).removeprefix("sqlite:///"))
            store.unlink(missing_ok=True)
            file.rename(store)
            pid = sample.serve()
            _wait_for_history(sample, pid, events=3 * past.finished + past.waiting)
            figures.put("d", "memory of serve that has read it all", str(past), memory_mb(pid)[0], "MB")
            sample.stop_serving()
            pid = sample.serve()
            _wait_for_history(sample, pid, events=3 * past.finished + past.waiting)
            figures.put("d", "memory of serve, begun anew", str(past), memory_mb(pid)[0], "MB")


def _wait_for_history(sample: SampleFleet, pid: int, *, events: int) -> None:
    """Until serve has read all that was made, and rests."""
    end = time.monotonic() + REST_TIMEOUT_S
    used_s = cpu_s(pid)
    while True:
        time.sleep(REST_S)
        if cpu_s(pid) - used_s < REST_SHARE * REST_S:
            break
        if time.monotonic() > end:
            raise SystemExit(f"bench: serve is still busy with {events} events after {REST_TIMEOUT_S:g} s")
        used_s = cpu_s(pid)
    known = json.loads(sample.fleet("sql", "--json", "select count(*) from events"))["rows"][0][0]
    if known < events:
        raise SystemExit(f"bench: serve rests, and its history has {known} of {events} events")


def _store_url(sample: SampleFleet) -> str:
    return f"sqlite:///{sample.home}/.fleet/store.sqlite"


@contextlib.contextmanager
def serving() -> Iterator[tuple[SampleFleet, str]]:
    """The sample fleet with a key for all, not served yet."""
    with SampleFleet() as sample:
        whose = ("--owner", "person:bench", "--scopes", "admin")
        made = sample.fleet("key", "create", *whose, "--save", "--json", "--into", "fleet.d/bench.yaml")
        yield sample, json.loads(made)["key"]


PARTS: dict[str, Callable[[Figures, Place, Size, contextlib.ExitStack], None]] = {
    "a": part_a,
    "b": part_b,
    "c": part_c,
    "d": part_d,
}


def _filesystem(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    under = [(len(at), kind) for at, kind in mounts if folder.is_relative_to(at)]
    return max(under)[1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tasks, once")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, as in a,c")
    options = parser.parse_args()
    options.parts = [part for part in options.only.split(",") if part]
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--only: got {', '.join(unknown)}; wanted some of {','.join(PARTS)}")
    return options


def main() -> None:
    """Measure part by part and print."""
    options = _options()
    size, figures = QUICK if options.quick else FULL, Figures()
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        kind = _filesystem(Path(folder))
        if kind in ("tmpfs", "ramfs"):
            print(f"bench: {folder} is a {kind}: nothing is ever synced; set TMPDIR to a disk", file=sys.stderr)
        place = Place(Path(folder))
        for part in options.parts:
            with contextlib.ExitStack() as rest:
                PARTS[part](figures, place, size, rest)
    rows = figures.table()
    report(rows if options.json else [_for_people(row) for row in rows], as_json=options.json)
    print(f"bench: {os.cpu_count()} cores, {kind}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The peers' side of `scripts/bench queue`: one durable queue of each library, run with the peers' own Python.

    python -c 'import bench_queue_apps as apps; apps.main()' QUEUE COMMAND [ARGUMENTS]

    fresh                 make or empty the queue
    enqueue COUNT CALLERS put tasks from that many threads; prints what one second took, as JSON
    pace RATE SECONDS     put tasks at a steady rate
    work WORKERS          run no-op tasks until ended

Every task that runs leaves a mark (number, start, enqueued) in BENCH_MARKS. Imported as a module and never run as a
file, as some libraries name a task after its module. Nothing of orchestrator_fleet is imported here.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Protocol

MARK = struct.Struct("<qdd")
EMPTY_SLEEP_S = 0.01  # for the library that ships no worker
BUSY_TIMEOUT_S = 60
SETTLE_S = 1.0  # a worker that has just run its first task may still be starting others
URL = os.environ.get("BENCH_URL", "")

Put = Callable[[int, float], None]
_files: dict[int, int] = {}


def mark(number: int, enqueued_at: float) -> None:
    """The task runs now: one small append to a file of this process's own."""
    started_at, pid = time.monotonic(), os.getpid()
    file = _files.get(pid)
    if file is None:
        path = os.path.join(os.environ["BENCH_MARKS"], str(pid))  # noqa: PTH118 (measured: as lean as can be)
        file = _files[pid] = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.write(file, MARK.pack(number, started_at, enqueued_at))


def library(name: str) -> Any:
    """A module of the peers' environment, of which ours knows nothing."""
    return importlib.import_module(name)


class Queue(Protocol):
    """One library's queue."""

    def fresh(self) -> None:
        """Make it, empty."""

    def caller(self) -> Put:
        """What one caller puts a task with; it is durable when that returns."""

    def work(self, workers: int) -> None:
        """Run tasks until ended."""


class Huey:
    """SqliteHuey as it ships: WAL, synchronous FULL. A task's row is deleted when it is taken."""

    def __init__(self) -> None:
        self.app = library("huey").SqliteHuey("bench", filename=URL)
        self._noop = self.app.task()(mark)

    def fresh(self) -> None:
        """The file is made by opening it."""

    def caller(self) -> Put:
        """All callers of a process share its one connection: the library has a lock around it."""
        put: Put = self._noop
        return put

    def work(self, workers: int) -> None:
        """The shipped consumer, with processes."""
        consumer = ["-m", "huey.bin.huey_consumer", f"{__name__}.app", "-w", str(workers), "-k", "process", "-q"]
        os.execv(sys.executable, [sys.executable, *consumer])  # noqa: S606 (becomes the consumer, so that it is the one to end)


class Persist:
    """persist-queue's SQLiteAckQueue: WAL, FULL. It has no worker: get, run, ack in threads of one process."""

    def __init__(self) -> None:
        self._queue = library("persistqueue").SQLiteAckQueue(URL, multithreading=True, timeout=BUSY_TIMEOUT_S)
        self._empty = library("persistqueue").Empty

    def fresh(self) -> None:
        """The file is made by opening it."""

    def caller(self) -> Put:
        """The queue has its own locks."""
        return lambda number, at: self._queue.put((number, at))

    def work(self, workers: int) -> None:
        """One loop in each thread."""
        threads = [threading.Thread(target=self._loop) for _ in range(workers)]
        for thread in threads:
            thread.start()

    def _loop(self) -> None:
        while True:
            try:
                item = self._queue.get(block=False, raw=True)
            except self._empty:
                item = None
            if item is None:
                time.sleep(EMPTY_SLEEP_S)
                continue
            mark(*item["data"])
            self._queue.ack(id=item["pqid"])


class Celery:
    """Celery on Redis with its defaults: a task is acknowledged before it runs."""

    def __init__(self) -> None:
        self.app = library("celery").Celery("bench", broker=URL)
        self.app.conf.task_ignore_result = True
        self.app.conf.broker_connection_retry_on_startup = True
        self._noop = self.app.task(name="noop")(mark)

    def fresh(self) -> None:
        """The server was emptied."""

    def caller(self) -> Put:
        """The library keeps a pool of connections."""
        put: Put = self._noop.delay
        return put

    def work(self, workers: int) -> None:
        """The shipped worker, with processes."""
        os.environ["C_FORCE_ROOT"] = "1"
        worker = ["-m", "celery", "-A", __name__, "worker", "-P", "prefork", "-c", str(workers), "-l", "ERROR"]
        os.execv(sys.executable, [sys.executable, *worker])  # noqa: S606 (becomes the worker, so that it is the one to end)


class Procrastinate:
    """procrastinate with psycopg; finished jobs are kept, which is its default."""

    def fresh(self) -> None:
        """Its schema."""
        with self._open() as app:
            app.schema_manager.apply_schema()

    def _open(self) -> Any:
        module = library("procrastinate")
        return module.App(connector=module.SyncPsycopgConnector(conninfo=URL, min_size=1, max_size=64)).open()

    def caller(self) -> Put:
        """Callers share a pool."""
        if not hasattr(self, "_task"):
            self._app = self._open()
            self._task = self._app.task(name="noop")(mark)
        return lambda number, at: self._task.defer(number=number, enqueued_at=at)

    def work(self, workers: int) -> None:
        """Its asyncio worker with that concurrency."""
        module = library("procrastinate")
        app = module.App(connector=module.PsycopgConnector(conninfo=URL, min_size=1, max_size=workers + 4))

        async def noop(number: int, enqueued_at: float) -> None:
            mark(number, enqueued_at)

        app.task(name="noop")(noop)

        async def run() -> None:
            async with app.open_async():
                await app.run_worker_async(concurrency=workers, install_signal_handlers=True)

        asyncio.run(run())


class PgQueuer:
    """PgQueuer with asyncpg. It buffers completions; `batch` is how many one claim takes."""

    batch: ClassVar[int] = 10

    def fresh(self) -> None:
        """Its schema."""

        async def install() -> None:
            connection = await library("asyncpg").connect(URL)
            await library("pgqueuer.queries").Queries(self._driver(connection)).install()
            await connection.close()

        asyncio.run(install())

    def caller(self) -> Put:
        """Each caller has a connection and an event loop of its own."""
        loop = asyncio.new_event_loop()
        connection = loop.run_until_complete(library("asyncpg").connect(URL))
        queries = library("pgqueuer.queries").Queries(self._driver(connection))
        return lambda number, at: loop.run_until_complete(queries.enqueue("noop", json.dumps([number, at]).encode()))

    def work(self, workers: int) -> None:
        """A process for each worker."""
        forked(workers)
        asyncio.run(self._run())

    async def _run(self) -> None:
        connection = await library("asyncpg").connect(URL)
        queue = library("pgqueuer").PgQueuer(self._driver(connection))

        async def noop(job: Any) -> None:
            mark(*json.loads(job.payload))

        queue.entrypoint("noop")(noop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queue.shutdown.set)
        await queue.run(batch_size=self.batch)

    def _driver(self, connection: Any) -> Any:
        return library("pgqueuer.db").AsyncpgDriver(connection)


class PgQueuerOne(PgQueuer):
    """The same, one task a claim."""

    batch = 1


class SkipLocked:
    """A floor and no library: one table, SKIP LOCKED, asyncpg. Two commits a task."""

    _TABLE = (
        "create table task(id bigserial primary key, status smallint not null default 0, number bigint, at float8,"
        " done timestamptz); create index on task(id) where status = 0"
    )
    _PUT = "insert into task(number, at) values ($1, $2)"
    _CLAIM = (
        "update task set status = 1 where id = (select id from task where status = 0 order by id"
        " for update skip locked limit 1) returning id, number, at"
    )
    _DONE = "update task set status = 2, done = now() where id = $1"

    def fresh(self) -> None:
        """Its table."""
        self._once(lambda connection: connection.execute(self._TABLE))

    def _once(self, do: Callable[[Any], Awaitable[Any]]) -> None:
        async def run() -> None:
            connection = await library("asyncpg").connect(URL)
            await do(connection)
            await connection.close()

        asyncio.run(run())

    def caller(self) -> Put:
        """Each caller has a connection and an event loop of its own."""
        loop = asyncio.new_event_loop()
        connection = loop.run_until_complete(library("asyncpg").connect(URL))
        return lambda number, at: loop.run_until_complete(connection.execute(self._PUT, number, at))

    def work(self, workers: int) -> None:
        """A connection for each worker, all in one process."""

        async def worker() -> None:
            connection = await library("asyncpg").connect(URL)
            while True:
                row = await connection.fetchrow(self._CLAIM)
                if row is None:
                    await asyncio.sleep(EMPTY_SLEEP_S)
                    continue
                mark(row["number"], row["at"])
                await connection.execute(self._DONE, row["id"])

        async def run() -> None:
            await asyncio.gather(*(worker() for _ in range(workers)))

        asyncio.run(run())


QUEUES: dict[str, Callable[[], Queue]] = {
    "huey": Huey,
    "persist-queue": Persist,
    "celery": Celery,
    "procrastinate": Procrastinate,
    "pgqueuer": PgQueuer,
    "pgqueuer-1": PgQueuerOne,
    "skip-locked": SkipLocked,
}


def forked(workers: int) -> None:
    """Be `workers` processes from here on."""
    for _ in range(workers - 1):
        if os.fork() == 0:
            return


def enqueue(queue: Queue, count: int, callers: int) -> dict[str, float]:
    """Put `count` tasks from `callers` threads; how many a second."""
    puts = [queue.caller() for _ in range(callers)]
    puts[0](-1, time.monotonic())  # connections and the like are made before the clock starts

    def run(first: int, put: Put) -> None:
        for number in range(first, count, callers):
            put(number, time.monotonic())

    threads = [threading.Thread(target=run, args=(first, put)) for first, put in enumerate(puts)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"per_s": count / (time.perf_counter() - begun)}


def pace(queue: Queue, rate: float, seconds: float) -> dict[str, int]:
    """Put tasks at a steady rate; how many."""
    put, count = queue.caller(), round(rate * seconds)
    put(-1, time.monotonic())
    while not os.listdir(os.environ["BENCH_MARKS"]):  # noqa: PTH208 (whether the worker has started)
        time.sleep(EMPTY_SLEEP_S)
    time.sleep(SETTLE_S)
    due = time.monotonic()
    for number in range(count):
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
        put(number, time.monotonic())
    return {"count": count}


def main() -> None:
    """Do what the command line says."""
    _, name, command, *rest = sys.argv
    queue: Queue = _made.get(name) or QUEUES[name]()
    match command:
        case "fresh":
            queue.fresh()
        case "enqueue":
            print(json.dumps(enqueue(queue, int(rest[0]), int(rest[1]))))
        case "pace":
            print(json.dumps(pace(queue, float(rest[0]), float(rest[1]))))
        case "work":
            queue.work(int(rest[0]))
        case _:
            raise SystemExit(f"bench_queue_apps: got {command!r}; wanted fresh, enqueue, pace or work")


# Workers that are other programs find the queue as `bench_queue_apps.app`.
_made: dict[str, Any] = {}
if (_name := os.environ.get("BENCH_QUEUE", "")) in ("huey", "celery"):
    _made[_name] = QUEUES[_name]()
    app = _made[_name].app

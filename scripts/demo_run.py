"""The steps of scripts/demo, each done as a user would do it: with the `fleet` command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator_fleet import keys
from orchestrator_fleet.cli.client import ControlPlane, key_of, running
from orchestrator_fleet.cli.output import cell, plain_table, span
from orchestrator_fleet.errors import ControlPlaneError, FleetError
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec.load import load_fleet

HOME = Path(__file__).resolve().parent.parent
FLEET_FILE = HOME / "fleet.yaml"
FLEET = str(Path(sys.executable).with_name("fleet"))
TASKS = "scripts/demo-tasks.json"
LOCAL_KEYS = "fleet.d/local-keys.yaml"  # included by fleet.yaml, ignored by git
SCOPES = "tasks:read,tasks:write,fleet:read,history:sql"
TASKS_TIMEOUT = "150s"
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
HEADLINE_CHARS = 78

RUNS = "select id, machine, run_time_s from tasks order by created_at desc limit 1000"
ANALYSIS = """
    select coalesce(discipline, '(none)') as discipline, count(*) as tasks,
           count(distinct orchestrator) as orchestrators,
           count(distinct machine) as machines, round(quantile_cont(wait_time_s, 0.9), 2) as p90_wait_s,
           round(median(run_time_s), 2) as median_run_s, round(sum(run_time_s), 1) as total_run_s
    from tasks where status = 'DONE' group by all order by total_run_s desc
"""

LOOK_AROUND = """\
Look around (with .venv/bin on your PATH, or as .venv/bin/fleet):
  fleet status                   machines, programs, generations
  fleet vp list                  orchestrators as the control plane sees them
  fleet task list --status done  what was done; then fleet task show ID, fleet task logs ID
  fleet task add --title "Which files change most?" --discipline insight --wait
  fleet sql "select kind, count(*) from events group by 1 order by 2 desc"
  fleet plan --exit-code         nothing to do; now edit a charter and ask again"""
STOP = """\
Stop:
  scripts/demo --stop"""


def step(text: str) -> None:
    """Say what comes next, with the time since the start."""
    print(f"\n[{time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


def fleet(*arguments: str, capture: bool = False) -> str:
    """Run the CLI here; its stdout when captured. Raises FleetError when it fails."""
    done = subprocess.run(
        [FLEET, *arguments], cwd=HOME, stdout=subprocess.PIPE if capture else None, text=True, check=False
    )
    if done.returncode:
        raise FleetError(f"fleet {' '.join(arguments)} exited with {done.returncode}")
    return done.stdout or ""


def asked(query: str) -> list[list[Any]]:
    """The rows of an SQL query."""
    rows: list[list[Any]] = json.loads(fleet("sql", query, "--json", capture=True))["rows"]
    return rows


def ensure_key() -> None:
    """Make a key for person:demo, unless the saved one is good: in git stays nothing of it."""
    parsed = keys.parse(key_of(FLEET_FILE) or "")
    if parsed is not None:
        key_id, secret = parsed
        declared = load_fleet(FLEET_FILE).file.keys.get(key_id)
        now = datetime.now(UTC)
        if (
            declared is not None
            and keys.matches(secret, declared.sha256)
            and not any(end is not None and end <= now for end in (declared.expires, declared.revoked))
        ):
            return
    who = ("--owner", "person:demo", "--scopes", SCOPES)
    fleet("key", "create", *who, "--into", LOCAL_KEYS, "--save", "--json", capture=True)


def ensure_serving(state: State) -> str:
    """Start the control plane in the background, unless it runs; its URL."""
    if running(state) is None:
        log = state.dir / "log" / "serve.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            server = subprocess.Popen(
                [FLEET, "serve"],
                cwd=HOME,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # it stays when this terminal closes
            )
    else:
        server = None
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        told = running(state)
        if told is not None and _is_ready(told.url):
            return told.url
        if server is not None and server.poll() is not None:
            raise FleetError(f"fleet serve ended with {server.returncode}")
        if time.monotonic() > deadline:
            raise FleetError(f"fleet serve is not ready after {READY_TIMEOUT_S:g} s")
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        with ControlPlane(url=url, key=None) as plane:
            plane.get("/readyz")
    except ControlPlaneError:
        return False
    return True


def headline(result: Any) -> str:
    """What a result says in one line."""
    text = result.get("headline", result) if isinstance(result, dict) else result
    line = cell(text)
    return line if len(line) <= HEADLINE_CHARS else f"{line[: HEADLINE_CHARS - 1]}…"


def print_results(tasks: list[dict[str, Any]]) -> None:
    """One row for each task: who did it, where, how long it ran and what came of it."""
    runs = {task: (machine, run_s) for task, machine, run_s in asked(RUNS)}
    rows = []
    for task in tasks:
        machine, run_s = runs.get(task["id"], (None, None))
        rows.append(
            [
                cell(task["title"])[:44],
                task["status"],
                cell(task["orchestrator"]),
                cell(machine),
                span(run_s) if run_s is not None else "-",
                headline(task.get("result") if task["status"] == "DONE" else task.get("error")),
            ]
        )
    print(plain_table(("task", "status", "orchestrator", "machine", "ran", "result"), rows))


def run(state: State) -> int:
    """The demo; its exit code."""
    step("a key for person:demo (its hash goes to fleet.d/, which git ignores)")
    ensure_key()
    step("fleet apply --yes")
    told = fleet("apply", "--yes", capture=True).splitlines()
    print("\n".join([*(line for line in told if line.startswith(("Plan: ", "No changes"))), told[-1]]), flush=True)
    step("fleet serve")
    url = ensure_serving(state)
    print(f"the control plane answers at {url}")
    step(f"fleet task add --from {TASKS} --wait")
    added = subprocess.run(
        [FLEET, "task", "add", "--from", TASKS, "--wait", "--timeout", TASKS_TIMEOUT, "--json"],
        cwd=HOME,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if not added.stdout:
        raise FleetError(f"fleet task add exited with {added.returncode}")
    tasks = json.loads(added.stdout)["data"]
    step("results")
    print_results(tasks)
    step(f"fleet sql, over DuckDB:{ANALYSIS.rstrip()}\n")
    fleet("sql", ANALYSIS)
    left = [task for task in tasks if task["status"] != "DONE"]
    if left:
        raise FleetError(f"{len(left)} of {len(tasks)} tasks are not DONE")
    step(f"all {len(tasks)} tasks are DONE\n")
    print(LOOK_AROUND, f"  {url}/schema/openapi.json  the HTTP API", STOP, sep="\n")
    return 0


def stop(state: State) -> int:
    """End the control plane, then take the fleet down."""
    told = running(state)
    if told is not None and is_serve(told.pid):
        os.kill(told.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while is_serve(told.pid):
            if time.monotonic() > deadline:
                os.kill(told.pid, signal.SIGKILL)
                break
            time.sleep(0.05)
        print("the control plane has stopped")
    fleet("destroy", "--yes")
    print(f"What was done stays in {state.dir}; `fleet sql` still answers, `fleet destroy --yes --data` removes it")
    return 0


def is_serve(pid: int) -> bool:
    """Whether this process is a `fleet serve`, and not another that got its number."""
    try:
        return b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def main() -> int:
    """Run or stop; on failure say where the logs are."""
    state = State(FLEET_FILE)
    try:
        return stop(state) if sys.argv[1:] == ["--stop"] else run(state)
    except FleetError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        print(f"demo: logs: {state.dir}/log/serve.log, {state.dir}/machines/*/log/*.log", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; scripts/demo --stop takes everything down", file=sys.stderr)
        return 130


STARTED = time.monotonic()
if __name__ == "__main__":
    sys.exit(main())

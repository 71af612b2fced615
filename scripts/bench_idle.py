"""What an idle fleet costs: memory and CPU of each daemon, each supervisord and the control plane."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_sample import SampleFleet, arguments, report, wait_for

WINDOW_S = 20.0
SETTLE_S = 3.0  # connections are up and start-up work is over
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> tuple[float, float]:
    """(RSS, PSS) in MB, as the kernel counts them."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:] if ":" in line
    )
    return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("Rss", "Pss"))  # type: ignore[return-value] # two


def cpu_s(pid: int) -> float:
    """CPU seconds that the process has used, user and system."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICKS_PER_S


def row(what: str, pids: Iterable[int], used: dict[int, float]) -> dict[str, Any]:
    """The figures of one kind of process."""
    pids = list(pids)
    memory = [memory_mb(pid) for pid in pids]
    cpu = [100 * used[pid] / WINDOW_S for pid in pids]
    return {
        "what": what,
        "processes": len(pids),
        "rss_mb_median": statistics.median(rss for rss, _ in memory),
        "rss_mb_max": max(rss for rss, _ in memory),
        "pss_mb_sum": sum(pss for _, pss in memory),
        "cpu_percent_each": statistics.mean(cpu),
        "cpu_percent_sum": sum(cpu),
    }


def all_connected(sample: SampleFleet) -> bool:
    """Whether every program tells that its link is up."""
    programs = [p for machine in sample.status()["machines"] for p in machine["programs"].values()]
    return all(program["link"] == "connected" for program in programs)


def main() -> None:
    """Measure over WINDOW_S and print."""
    options = arguments(__doc__ or "")
    with SampleFleet() as sample:
        sample.fleet("apply", "--yes")
        server = sample.serve()
        wait_for(lambda: all_connected(sample), "every daemon is connected")
        machines = sample.status()["machines"]
        supervisords = [machine["supervisord_pid"] for machine in machines]
        daemons = [program["pid"] for machine in machines for program in machine["programs"].values()]
        time.sleep(SETTLE_S)
        everybody = [*daemons, *supervisords, server]
        before = {pid: cpu_s(pid) for pid in everybody}
        time.sleep(WINDOW_S)
        used = {pid: cpu_s(pid) - before[pid] for pid in everybody}
        rows = [row("daemon", daemons, used), row("supervisord", supervisords, used), row("serve", [server], used)]
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()

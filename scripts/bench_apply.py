"""Apply and plan on the sample fleet's 16 real supervisords; then plans of big fleets, in memory."""

from __future__ import annotations

import gc
from typing import Any

import bench_plan
from bench_sample import SampleFleet, arguments, figures, report, timed

from orchestrator_fleet.cli.main import GC_THRESHOLDS

COLD_RUNS, WARM_RUNS = 3, 5


def real_machines() -> list[dict[str, Any]]:
    """Wall times of the commands, each a process of its own."""
    with SampleFleet() as sample:
        cold = []
        for _ in range(COLD_RUNS):
            cold += timed(lambda: sample.fleet("apply", "--yes"), times=1)
            machines = len(sample.status()["machines"])
            if len(cold) < COLD_RUNS:
                sample.fleet("destroy", "--yes", "--data")
        nothing = timed(lambda: sample.fleet("apply", "--yes"), times=WARM_RUNS)
        plan = timed(lambda: sample.fleet("plan", "--exit-code"), times=WARM_RUNS)
        charter = next((sample.home / "charters").glob("*.md"))
        edits = []
        for number in range(WARM_RUNS):
            charter.write_text(f"{charter.read_text(encoding='utf-8')}\nEdit {number}.\n", encoding="utf-8")
            edits += timed(lambda: sample.fleet("apply", "--yes"), times=1)
    return [
        figures(f"cold apply of {machines} machines", cold),
        figures("apply, nothing to do", nothing),
        figures("plan, nothing to do", plan),
        figures("apply of one charter edit", edits),
    ]


def in_memory() -> list[dict[str, Any]]:
    """What deciding alone costs: rendering a fleet and planning one charter edit; and what ten times the fleet does."""
    gc.set_threshold(*GC_THRESHOLDS)  # as the command line does
    medians = {machines: bench_plan.measure(machines)["render_and_plan_s"] for machines in bench_plan.SIZES}
    small, large = bench_plan.SIZES
    blank = {"min_s": "-", "max_s": "-", "runs": bench_plan.RUNS}
    return [
        *(
            {
                "what": f"render and plan {machines} machines x {bench_plan.PER_MACHINE}, in memory",
                "median_s": took,
                **blank,
            }
            for machines, took in medians.items()
        ),
        {
            "what": f"ratio of {large} machines to {small}",
            "median_s": round(medians[large] / medians[small], 1),
            **blank,
        },
    ]


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "")
    report([*real_machines(), *in_memory()], as_json=options.json)


if __name__ == "__main__":
    main()

"""How long it takes to render a fleet in memory and to diff it with machines in memory; prints JSON.

For 100 and 1,000 machines of 10 orchestrators, medians in seconds: `render_s`; `plan_first_s`, where
nothing is applied yet; `plan_empty_s`, where nothing changed; `plan_charter_s`, where one charter of six did; and
`ratio`, what ten times the fleet costs.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator_fleet.cli.main import GC_THRESHOLDS
from orchestrator_fleet.plan.between import make_plan, residents
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.render.bundle import Bundle, Desired
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.model import Charter, CharterFront, Fleet, FleetFile
from orchestrator_fleet.wire.machine import Observed, ProgramSeen

DISCIPLINES = ("engineering", "security", "data", "quality", "operations", "research")
PER_MACHINE = 10
SIZES = (100, 1000)
RUNS = 7


def made_up_fleet(machines: int) -> Fleet:
    """A fleet of `machines` x 10 orchestrators that uses placement, labels, budgets and charters."""
    charters = {f"charters/{trade}.md": _charter(trade) for trade in DISCIPLINES}
    file = FleetFile.model_validate(
        {
            "version": 1,
            "fleet": "scale",
            "machines": {
                f"m{n:04d}": {"labels": {"zone": f"z{n % 5}"}, "slots": PER_MACHINE + 2} for n in range(machines)
            },
            "orchestrators": {f"vp-{n:05d}": _orchestrator(n) for n in range(machines * PER_MACHINE)},
        }
    )
    return Fleet(file=file, charters=charters, assets={"scripts/agent.py": b"print()\n"}, templates={})


def _charter(trade: str) -> Charter:
    front = {
        "role": f"VP of {trade}",
        "responsibilities": [f"{trade}_{n}" for n in range(6)],
        "objectives": {"response_time": "30s", "completion_rate": "95%", "quality_score": 85},
        "limits": {"sessions": 4, "tokens_per_hour": 100000, "session_timeout": "45m", "memory": "2GiB"},
        "constraints": ["Never exhaust API quota", "Escalate blocked requests within 5 minutes"],
        "safety": {"auto_approve": ["Read", "Bash(pytest:*)"], "always_reject": ["Bash(rm -rf /*)"]},
    }
    prose = f"You run {trade}.\n\n" + "Be exact, and say why. " * 40
    return Charter(path=f"charters/{trade}.md", front=CharterFront.model_validate(front), prose=prose)


def _orchestrator(n: int) -> dict[str, Any]:
    trade = DISCIPLINES[n % len(DISCIPLINES)]
    placement: dict[str, Any] = {"spread": "zone"} if n % 3 else {"labels": {"zone": f"z{n % 5}"}}
    return {
        "charter": f"charters/{trade}.md",
        "discipline": trade,
        "labels": {"team": f"t{n % 40}"},
        "placement": placement,
        "runner": {"type": "command", "command": ["python3", "scripts/agent.py", str(n)]},
        "budget": {"usd_per_day": 50, "tokens_per_hour": 200000},
    }


def measure(machines: int) -> dict[str, float]:
    """Medians for a fleet of that many machines."""
    fleet = made_up_fleet(machines)
    desired = render(fleet)
    nothing: dict[str, Observed | str] = {name: Observed() for name in (CONTROL_PLANE, *desired.machines)}
    applied: dict[str, Observed | str] = {name: seen(bundle) for name, bundle in desired.machines.items()}
    applied[CONTROL_PLANE] = seen(desired.control)
    edited = fleet.charters["charters/data.md"].model_copy(update={"prose": "You run data, and say how."})
    other = render(fleet.model_copy(update={"charters": {**fleet.charters, "charters/data.md": edited}}))
    gc.collect()
    gc.freeze()  # what this script holds and a plan does not: three fleets, and all files of all machines
    figures = {
        "machines": machines,
        "orchestrators": machines * PER_MACHINE,
        "render_s": median_s(lambda: render(fleet, kept=residents(applied))),
        "plan_first_s": median_s(lambda: plan(desired, nothing)),
        "plan_empty_s": median_s(lambda: plan(desired, applied)),
        "plan_charter_s": median_s(lambda: plan(other, applied)),
    }
    gc.unfreeze()
    return {**figures, "render_and_plan_s": round(figures["render_s"] + figures["plan_charter_s"], 4)}


def seen(bundle: Bundle) -> Observed:
    """A machine on which a bundle was applied and all is well."""
    programs = {
        name: ProgramSeen(state="RUNNING", program=program, generation=bundle.digest)
        for name, program in bundle.manifest.programs.items()
    }
    return Observed(
        current=bundle.digest,
        manifest=bundle.manifest_bytes,
        supervisord="RUNNING",
        programs=programs,
        generations=(bundle.digest,),
        last_good=bundle.digest,
        documents=dict(bundle.files),
    )


def plan(desired: Desired, observed: Mapping[str, Observed | str]) -> None:
    """Make one plan."""
    make_plan(desired=desired, observed=observed, fleet="scale", revision="", now_us=0, max_deletes=0.25)


def median_s(work: Callable[[], object]) -> float:
    """The median of some runs, in seconds."""
    took = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return round(statistics.median(took), 4)


def main() -> int:
    """Print the figures."""
    gc.set_threshold(*GC_THRESHOLDS)  # as the command line does
    figures = [measure(machines) for machines in SIZES]
    small, large = figures
    ratio = {name: round(large[name] / small[name], 2) for name in small if name.endswith("_s")}
    print(json.dumps({"sizes": figures, "ratio": ratio}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

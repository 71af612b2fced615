"""When a machine counts as healthy: values in, a verdict out."""

from __future__ import annotations

import msgspec
import pytest

from orchestrator_fleet.reconcile import health
from orchestrator_fleet.render.bundle import bundle
from orchestrator_fleet.wire.machine import Observed, ProgramSeen

WHAT = bundle(target="m1", fleet="t", files={"supervisord.conf": b""}, programs={"vp-a": "1"})
GOOD = ProgramSeen(state="RUNNING", pid=7, program="1", generation=WHAT.digest)


def observed(program: ProgramSeen | None = GOOD, **fields: object) -> Observed:
    seen = Observed(
        current=WHAT.digest,
        manifest=WHAT.manifest_bytes,
        supervisord="RUNNING",
        programs={"vp-a": program} if program else {},
    )
    return msgspec.structs.replace(seen, **fields)


def judged(*looks: Observed, min_healthy_s: float = 0.0, each_s: float = 1.0) -> health.Verdict:
    watch, now_s = health.Watch(), 0.0
    for seen in looks:
        now_s += each_s
        watch = watch.looked(seen, now_s=now_s)
    return health.judge(looks[-1], watch, digest=WHAT.digest, min_healthy_s=min_healthy_s, now_s=now_s)


def test_all_as_it_should_be_is_healthy_even_while_the_link_is_down() -> None:
    """Machines come up while the control plane is down."""
    assert judged(observed(msgspec.structs.replace(GOOD, link="connecting"))).healthy


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (observed(current="0" * 64), "current generation"),
        (observed(manifest=b""), "changed by hand"),
        (observed(supervisord="DOWN"), "supervisord is down"),
        (observed(None), "does not know it"),
        (observed(msgspec.structs.replace(GOOD, state="BACKOFF", detail="no such file")), "BACKOFF: no such file"),
        (observed(msgspec.structs.replace(GOOD, program="2")), "runs as program 2"),
        (observed(msgspec.structs.replace(GOOD, generation=None)), "nothing yet"),
    ],
)
def test_each_thing_that_is_wrong_is_named_and_waited_for(seen: Observed, why: str) -> None:
    """The reason is what a person reads when the deadline is over."""
    verdict = judged(seen)
    assert not verdict.healthy
    assert not verdict.hopeless
    assert why in verdict.reason


def test_a_process_must_be_old_enough() -> None:
    """The same pid for `min_healthy`."""
    assert "less than 2 s" in judged(observed(), observed(), min_healthy_s=2).reason
    assert judged(observed(), observed(), observed(), min_healthy_s=2).healthy


def test_a_new_pid_starts_the_wait_anew() -> None:
    """A restart is no health."""
    other = observed(msgspec.structs.replace(GOOD, pid=8))
    assert not judged(observed(), observed(), other, min_healthy_s=2).healthy


def test_a_process_that_ran_before_the_switch_need_not_wait() -> None:
    """A charter edit costs no `min_healthy`."""
    watch = health.known_before(observed()).looked(observed(), now_s=1)
    assert health.judge(observed(), watch, digest=WHAT.digest, min_healthy_s=60, now_s=1).healthy


def test_fatal_and_restarting_again_and_again_are_hopeless() -> None:
    """Nobody waits a minute for what can't come."""
    assert judged(observed(msgspec.structs.replace(GOOD, state="FATAL"))).hopeless
    looks = [observed(msgspec.structs.replace(GOOD, pid=pid)) for pid in range(1, health.MAX_RESTARTS + 3)]
    verdict = judged(*looks)
    assert verdict.hopeless
    assert "ended 6 times" in verdict.reason

"""What every way to a machine must do: one suite, on the machine in memory and on real supervisords."""

from __future__ import annotations

from tiny_fleet import Machine, control_only, is_up, staging, tiny_bundle

from orchestrator_fleet.wire.machine import (
    Acquire,
    Confirm,
    Destroy,
    Leased,
    Observed,
    Prune,
    Reject,
    Release,
    Restart,
    Switch,
)


def test_an_untouched_machine_has_nothing(either: Machine) -> None:
    """Looking changes nothing and makes nothing."""
    assert either.look() == Observed()


def test_a_bundle_is_staged_switched_to_and_confirmed(either: Machine) -> None:
    """Programs run as the generation says, and it is the last good one."""
    what = tiny_bundle({"vp-a": "", "vp-b": ""})
    either.bring(what)
    seen = either.look()
    assert is_up(seen, what)
    assert seen.manifest == what.manifest_bytes
    assert seen.supervisord == "RUNNING"
    assert seen.last_good == what.digest
    assert seen.generations == (what.digest,)
    assert [entry.step for entry in seen.journal] == ["staged", "switched", "confirmed"]
    assert (seen.drifted, seen.missing, seen.foreign) == ((), (), ())


def test_staging_alone_changes_nothing_that_runs(either: Machine) -> None:
    """The generation stands beside the current one."""
    first, second = tiny_bundle({"vp-a": ""}), tiny_bundle({"vp-a": "", "vp-b": ""})
    either.bring(first)
    pids = either.pids()
    either.stage(second)
    seen = either.look()
    assert seen.current == first.digest
    assert set(seen.generations) == {first.digest, second.digest}
    assert either.pids() == pids


def test_a_charter_change_keeps_every_process(either: Machine) -> None:
    """The daemons re-read; no pid changes."""
    first, second = tiny_bundle({"vp-a": "", "vp-b": ""}), tiny_bundle({"vp-a": "", "vp-b": ""}, charter="two")
    either.bring(first)
    pids = either.pids()
    either.bring(second)
    assert either.pids() == pids


def test_a_changed_program_is_restarted_alone(either: Machine) -> None:
    """One pid changes."""
    either.bring(tiny_bundle({"vp-a": "", "vp-b": ""}))
    pids = either.pids()
    either.bring(tiny_bundle({"vp-a": "", "vp-b": "other"}), restart=("vp-b",))
    now = either.pids()
    assert now["vp-a"] == pids["vp-a"]
    assert now["vp-b"] != pids["vp-b"]


def test_what_the_generation_needs_is_done_though_the_request_does_not_name_it(either: Machine) -> None:
    """A request made before a crash, or a revert, may name less."""
    either.bring(tiny_bundle({"vp-a": "", "vp-b": "", "vp-c": ""}))
    pids = either.pids()
    either.bring(tiny_bundle({"vp-a": "", "vp-b": "other", "vp-d": ""}))
    now = either.pids()
    assert now.keys() == {"vp-a", "vp-b", "vp-d"}
    assert now["vp-a"] == pids["vp-a"]
    assert now["vp-b"] != pids["vp-b"]


def test_keys_are_minted_once_and_leave_with_their_program(either: Machine) -> None:
    """A key outlives generations, and not its orchestrator's stay."""
    either.bring(tiny_bundle({"vp-a": "", "vp-b": ""}))
    keys = {name: program.key for name, program in either.look().programs.items()}
    assert all(keys.values())
    either.bring(tiny_bundle({"vp-a": "other"}), restart=("vp-a",), stop=("vp-b",))
    assert either.look().programs["vp-a"].key == keys["vp-a"]
    either.bring(tiny_bundle({"vp-a": "", "vp-b": ""}), restart=("vp-a",), start=("vp-b",))
    again = either.look().programs["vp-b"].key
    assert again is not None
    assert again != keys["vp-b"]


def test_a_control_plane_needs_no_supervisord(either: Machine) -> None:
    """A generation without supervisord.conf is only files."""
    what = control_only()
    either.lease()
    either.stage(what)
    either.switch(what)
    either.confirm(what)
    seen = either.look(documents=True)
    assert (seen.current, seen.last_good, seen.supervisord) == (what.digest, what.digest, "DOWN")
    assert seen.documents == {"control.json": b"one"}


def test_content_that_stands_here_need_not_travel(either: Machine) -> None:
    """Only what is new is sent."""
    either.bring(tiny_bundle({"vp-a": "", "vp-b": ""}))
    second = tiny_bundle({"vp-a": "", "vp-b": ""}, charter="two")
    new = {digest: second.files[path] for path, digest in second.manifest.files.items() if "charter" in path}
    either.lease()
    either.stage(second, blobs=new)
    assert second.digest in either.look().generations


def test_content_that_is_nowhere_is_refused(either: Machine) -> None:
    """And nothing is left of the attempt."""
    either.lease()
    what = tiny_bundle({"vp-a": ""})
    refusal = either.refused(staging(what, either.token, blobs={}))
    assert refusal.code == "failed"
    assert either.look().generations == ()


def test_a_blob_that_is_not_its_hash_is_refused(either: Machine) -> None:
    """Content is checked on the machine."""
    either.lease()
    what = control_only()
    assert either.refused(staging(what, either.token, blobs={"0" * 64: b"one"})).code == "failed"


def test_a_generation_that_was_not_staged_is_not_switched_to(either: Machine) -> None:
    """The link stays."""
    what = tiny_bundle({"vp-a": ""})
    either.lease()
    refusal = either.refused(Switch(token=either.token, digest=what.digest))
    assert refusal.code == "not_staged"
    assert either.look().current is None


def test_only_the_current_generation_can_be_confirmed(either: Machine) -> None:
    """What is not in use has not proved itself."""
    first, second = control_only("one"), control_only("two")
    either.bring(first)
    either.stage(second)
    assert either.refused(Confirm(token=either.token, digest=second.digest)).code == "failed"
    assert either.look().last_good == first.digest


def test_a_rejected_generation_is_remembered_until_it_is_confirmed(either: Machine) -> None:
    """With the reason."""
    what = control_only()
    either.bring(what)
    either.done(Reject(token=either.token, digest=what.digest, reason="vp-a: FATAL"))
    assert either.look().rejected == {what.digest: "vp-a: FATAL"}
    either.confirm(what)
    assert either.look().rejected == {}


def test_prune_keeps_the_youngest_the_current_and_the_last_good(either: Machine) -> None:
    """Of five generations, the last good is oldest but one."""
    made = [control_only(str(n)) for n in range(5)]
    either.lease()
    for n, what in enumerate(made):
        either.stage(what)
        either.switch(what)
        if n == 1:
            either.confirm(what)
    either.done(Prune(token=either.token, keep=2))
    assert set(either.look().generations) == {made[n].digest for n in (1, 3, 4)}


def test_another_holder_is_told_who_holds_the_lease_and_until_when(either: Machine) -> None:
    """Two applies at once: one goes on."""
    either.lease("ada")
    refusal = either.refused(Acquire(holder="bob", ttl_s=60))
    assert refusal.code == "lease_held"
    assert "ada" in refusal.problem
    assert "T" in refusal.problem
    seen = either.look().lease
    assert seen is not None
    assert seen.holder == "ada"


def test_the_same_holder_lengthens_its_lease_and_keeps_its_token(either: Machine) -> None:
    """A renewal is no new lease."""
    assert either.lease("ada") == either.lease("ada", ttl_s=120)


def test_a_lease_given_back_is_free_and_its_token_is_worth_nothing(either: Machine) -> None:
    """The token only rises."""
    first = either.lease("ada")
    either.done(Release(token=first))
    assert either.look().lease is None
    assert either.refused(staging(control_only(), first)).code == "fenced"
    answer = either.ask(Acquire(holder="bob", ttl_s=60))
    assert isinstance(answer, Leased)
    assert answer.token > first


def test_every_change_needs_the_lease(either: Machine) -> None:
    """A late writer is shut out."""
    either.lease()
    what = control_only()
    either.stage(what)
    old = either.token - 1
    for request in (
        staging(what, old),
        Switch(token=old, digest=what.digest),
        Restart(token=old, programs=("vp-a",)),
        Confirm(token=old, digest=what.digest),
        Reject(token=old, digest=what.digest, reason="x"),
        Prune(token=old, keep=1),
        Release(token=old),
        Destroy(token=old),
    ):
        assert either.refused(request).code == "fenced", request
    assert either.look().current is None


def test_destroy_leaves_nothing(either: Machine) -> None:
    """Programs, supervisord, generations: all gone, and again is fine."""
    either.bring(tiny_bundle({"vp-a": "", "vp-b": ""}))
    either.done(Destroy(token=either.token))
    assert either.look() == Observed()
    if either.root is not None:
        assert not either.root.exists()
        assert either.processes() == []
    either.lease()
    either.done(Destroy(token=either.token))


def test_a_destroy_without_notes_found_nothing(either: Machine) -> None:
    """Only the lease stood there, for the destroy itself; what was staged counts as something."""
    either.lease()
    assert either.done(Destroy(token=either.token)).notes == ()
    either.lease()
    either.stage(tiny_bundle({}))
    assert either.done(Destroy(token=either.token)).notes != ()
    assert either.look() == Observed()

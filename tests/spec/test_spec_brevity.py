"""What is written down of what a client sends: no more than a person would."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_fleet.spec import brevity
from orchestrator_fleet.spec.model import OrchestratorDefaults

DEFAULTS = OrchestratorDefaults.model_validate(
    {
        "sessions": {"timeout": "10m"},
        "labels": {"a": "1"},
        "escalate_to": ["vp-a", "human:x"],
        "workspace": {"repo": "."},
        "placement": {"labels": {"zone": "a"}},
        "runner": {"type": "command", "command": ["ls"], "secrets": {"K": "env:K"}},
    }
)
PARTS: dict[str, Any] = {
    "discipline": st.sampled_from(["eng", "general"]),
    "role": st.sampled_from([None, "VP"]),
    "labels": st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["1", "2"])),
    "sessions": st.fixed_dictionaries(
        {}, optional={"max": st.integers(1, 4), "timeout": st.sampled_from(["600s", "10m", "1h"])}
    ),
    "workspace": st.sampled_from([None, {"repo": ".", "ref": "HEAD"}, {"repo": "x"}]),
    "machine": st.sampled_from([None, "m1"]),
    "runner": st.sampled_from(
        [{"command": ["ls", "-l"]}, {"type": "claude-code"}, {"type": "command", "command": ["ls"], "secrets": {}}]
    ),
    "escalate_to": st.sampled_from([[], ["human:x"], ["vp-a", "human:x"]]),
    "protect": st.booleans(),
}
RAW = st.fixed_dictionaries({"charter": st.just("c.md")}, optional=PARTS)


def read(raw: dict[str, Any]) -> dict[str, Any]:
    merged = brevity.merged(raw, name="vp-a", defaults=DEFAULTS)
    assert merged is not None
    return merged


def written(wanted: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    return brevity.entry(wanted, name="vp-a", before=before, defaults=DEFAULTS)


@given(before=RAW)
@settings(deadline=None)
def test_what_was_read_is_written_as_it_stood(before: dict[str, Any]) -> None:
    """Defaults and all, in another spelling, it changes nothing."""
    assert written(read(before), before) == before
    assert written(before, before) == before


@given(wanted=RAW, before=st.none() | RAW)
@settings(deadline=None)
def test_what_is_written_reads_as_wanted(wanted: dict[str, Any], before: dict[str, Any] | None) -> None:
    """From a short body or from all of it."""
    for sent in (wanted, read(wanted)):
        assert read(written(sent, before)) == read(wanted)


def test_defaults_are_not_written_down() -> None:
    """So that the next change of a default reaches it; but for the sessions that somebody asked for."""
    assert written(read({"charter": "c.md"}), {"charter": "c.md"}) == {"charter": "c.md"}
    sent = {"charter": "c.md", "retry": {"max_attempts": 3, "jitter": 0.5}, "sessions": {"max": 2, "timeout": "10m"}}
    assert written(sent, None) == {"charter": "c.md", "sessions": {"max": 2}, "retry": {"jitter": 0.5}}


def test_one_change_is_one_word() -> None:
    """Beside it all stands as it stood, in its own spelling."""
    before = {"charter": "c.md", "sessions": {"timeout": "3600s"}, "labels": {"b": "2"}}
    sent = read(before)
    sent["labels"]["b"] = "3"
    assert written(sent, before) == {**before, "labels": {"b": "3"}}
    assert written({**read(before), "workspace": None}, before) == {**before, "workspace": None}


def test_what_is_not_sound_is_left_as_it_is() -> None:
    """Whoever checks it says what is wrong."""
    assert written({"charter": 5}, None) == {"charter": 5}

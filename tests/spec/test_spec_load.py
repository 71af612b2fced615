"""Loading a fleet that is sound: what stands where, what merges, what travels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.spec import folder as folder_module
from orchestrator_fleet.spec import load
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.model import ClaudeCodeRunner, CommandRunner


def problems(path: Path) -> list[str]:
    """What a fleet is refused with, a line each."""
    with pytest.raises(SpecInvalid) as refused:
        load_fleet(path)
    return str(refused.value).splitlines()


def test_the_smallest_fleet_is_a_machine_an_orchestrator_and_its_charter(write_fleet):
    """Everything else has a default."""
    fleet = load_fleet(
        write_fleet(
            machines="machines:\n  m01:\n", orchestrators="orchestrators:\n  vp-a: {charter: charters/cto.md}\n"
        )
    )
    assert fleet.file.machines["m01"].address == "local"
    assert fleet.file.orchestrators["vp-a"].sessions.max == 2
    assert fleet.charters["charters/cto.md"].front.role == "CTO"
    assert fleet.charters["charters/cto.md"].prose == "You run technology at Acme.\n"
    assert fleet.assets == {}
    assert fleet.templates == {}


def test_nothing_behind_a_key_is_an_empty_mapping_or_list(write_fleet):
    """A section that waits for its first entry is no mistake."""
    more = "keys:\nrouting:\nlimits:\nschedules:\ndefaults:\nrollout:\nnotify:\nalerts:\ninclude:\ncontrol_plane:\n"
    fleet = load_fleet(write_fleet(more))
    assert fleet.file.keys == {}
    assert fleet.file.routing == []
    assert fleet.file.rollout.canary == 1


DEFAULTS = """\
defaults:
  runner: {type: command, command: [echo, hello], secrets: {TOKEN: env:TOKEN}}
  sessions: {max: 5, timeout: 10m}
  labels: {team: platform, tier: one}
  budget: {usd_per_day: 5}
  schedule: {timezone: Europe/Berlin}
  placement: {labels: {zone: a}}
  escalate_to: [vp-top, human:oncall]
orchestrators:
  vp-plain:
    charter: charters/cto.md
    schedule: {hours: "Mon 08:00-12:00"}
  vp-own:
    charter: charters/cto.md
    sessions: {max: 1}
    labels: {tier: two}
    runner: {type: command, command: [date]}
    budget:
    schedule:
    machine: m02
    escalate_to: []
  vp-claude:
    charter: charters/cto.md
    runner: {type: claude-code}
    schedule:
  vp-top:
    charter: charters/cto.md
    schedule:
"""


def test_defaults_merge_under_every_orchestrator(write_fleet):
    """Deep for mappings; what the orchestrator says itself wins."""
    every = load_fleet(write_fleet(orchestrators=DEFAULTS)).file.orchestrators
    assert every["vp-plain"].sessions.max == 5
    assert every["vp-plain"].sessions.timeout == 600
    assert every["vp-own"].sessions.max == 1
    assert every["vp-own"].sessions.timeout == 600
    assert every["vp-own"].labels == {"team": "platform", "tier": "two"}


def test_half_a_default_is_completed_by_the_orchestrator(write_fleet):
    """The zone from one, the hours from the other."""
    schedule = load_fleet(write_fleet(orchestrators=DEFAULTS)).file.orchestrators["vp-plain"].schedule
    assert schedule is not None
    assert (schedule.timezone, schedule.hours) == ("Europe/Berlin", "Mon 08:00-12:00")


def test_half_a_default_that_nobody_completes_is_missing_there(write_fleet):
    """The error stands where it can be put right, once for each who lacks it."""
    found = problems(write_fleet(orchestrators=DEFAULTS.replace('    schedule: {hours: "Mon 08:00-12:00"}\n', "")))
    advice = 'add it (such as "Mon-Fri 08:00-18:00"; several, separated by commas)'
    assert found == [f"fleet.yaml:11:3: defaults.schedule.hours: is missing; {advice}"]


def test_a_runner_of_another_type_replaces_the_default_as_a_whole(write_fleet):
    """A command has no place under claude-code; of the same type they merge."""
    every = load_fleet(write_fleet(orchestrators=DEFAULTS)).file.orchestrators
    assert every["vp-claude"].runner == ClaudeCodeRunner(type="claude-code")
    assert every["vp-own"].runner == CommandRunner(command=["date"], secrets={"TOKEN": "env:TOKEN"})


def test_nothing_behind_a_key_switches_an_optional_default_off(write_fleet):
    """No budget is no budget."""
    every = load_fleet(write_fleet(orchestrators=DEFAULTS)).file.orchestrators
    assert every["vp-own"].budget is None
    assert every["vp-plain"].budget is not None


def test_a_machine_takes_the_place_of_a_default_placement(write_fleet):
    """Both at once would be a contradiction that nobody wrote."""
    own = load_fleet(write_fleet(orchestrators=DEFAULTS)).file.orchestrators["vp-own"]
    assert own.machine == "m02"
    assert own.placement is None


def test_nobody_escalates_to_themselves_by_default(write_fleet):
    """The top of the default chain keeps the rest of it."""
    every = load_fleet(write_fleet(orchestrators=DEFAULTS)).file.orchestrators
    assert every["vp-top"].escalate_to == ["human:oncall"]
    assert every["vp-plain"].escalate_to == ["vp-top", "human:oncall"]
    assert every["vp-own"].escalate_to == []


def test_includes_join_sections_and_keep_lists_in_order(write_fleet):
    """Mappings join by key at the top level, lists follow in the order of `include`, each glob sorted."""
    route = "routing:\n  - {{name: {0}, when: has(task.{0}), to: {{orchestrator: vp-cto}}}}\n"
    path = write_fleet(
        "include: [fleet.d/z.yaml, fleet.d/*.yaml, nothing/*.yaml]\nrollout: {canary: 2}\n" + route.format("title"),
        files={
            "fleet.d/a.yaml": "machines:\n  m03: {slots: 3}\n" + route.format("tags"),
            "fleet.d/b.yaml": "rollout: {max_parallel: 9}\nkeys:\n" + route.format("parent"),
            "fleet.d/z.yaml": route.format("status"),
            "fleet.d/.hidden.yaml": "version: 7\n",
        },
    )
    file = load_fleet(path).file
    assert list(file.machines) == ["m01", "m02", "m03"]
    assert [rule.name for rule in file.routing] == ["title", "status", "tags", "parent"]
    assert (file.rollout.canary, file.rollout.max_parallel) == (2, 9)


def test_an_included_file_outside_the_folder_is_refused_even_through_a_link(write_fleet, tmp_path):
    """What is applied is what stands in the folder."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside.yaml"
    outside.write_text("machines:\n  m03: {}\n")
    path = write_fleet("include: [fleet.d/*.yaml]\n", files={"fleet.d/a.yaml": "{}\n"})
    (tmp_path / "fleet.d/b.yaml").symlink_to(outside)
    assert problems(path) == ["fleet.d/b.yaml: is a link that leaves the fleet folder; copy the file into the folder"]


def test_more_included_files_than_allowed_are_refused(write_fleet, monkeypatch):
    """The number of files has a limit with a name."""
    monkeypatch.setattr(load, "MAX_INCLUDED_FILES", 2)
    path = write_fleet("include: ['f/*.yaml']\n", files={f"f/{n}.yaml": "{}\n" for n in range(4)})
    assert problems(path) == ["fleet.yaml:9:11: include[0]: includes more than 2 files and 16 MiB; join some files"]


RUNNER = """\
orchestrators:
  vp-a:
    charter: charters/cto.md
    runner:
      type: command
      command: [python3, scripts/a.py, --rules=x/y, origin/main, text/plain, data, /bin/true, top.txt]
      files: ["rules/**/*.toml", "scripts/*.py"]
"""


def test_files_that_a_runner_names_travel(write_fleet):
    """Elements of argv that are files, and what `files` matches; folders, options and other words don't."""
    path = write_fleet(
        orchestrators=RUNNER,
        files={
            "scripts/a.py": "print(1)\n",
            "scripts/b.py": b"\xff\x00",
            "rules/one.toml": "",
            "rules/deep/er/two.toml": "x",
            "rules/.hidden/three.toml": "x",
            "data/x": "",
            "top.txt": "top",
        },
    )
    assert load_fleet(path).assets == {
        "scripts/a.py": b"print(1)\n",
        "scripts/b.py": b"\xff\x00",
        "rules/one.toml": b"",
        "rules/deep/er/two.toml": b"x",
        "top.txt": b"top",
    }


def test_an_asset_that_links_out_of_the_folder_is_refused(write_fleet, tmp_path):
    """A link inside the folder is fine."""
    outside = tmp_path.parent / f"{tmp_path.name}-secret"
    outside.write_text("secret")
    path = write_fleet(orchestrators=RUNNER, files={"scripts/a.py": "", "rules/a.toml": "", "top.txt": ""})
    (tmp_path / "rules/inside.toml").symlink_to(tmp_path / "top.txt")
    assert "rules/inside.toml" in load_fleet(path).assets
    (tmp_path / "rules/out.toml").symlink_to(outside)
    said = "rules/out.toml is a link that leaves the fleet folder; copy the file into the folder"
    assert problems(path) == [f"fleet.yaml:12:15: orchestrators.vp-a.runner.files[0]: {said}"]


def test_assets_have_limits_of_number_and_size(write_fleet, monkeypatch):
    """Each limit is said once, with what to do."""
    files = {"scripts/a.py": "", "top.txt": "", **{f"rules/{n}.toml": "x" * 100 for n in range(9)}}
    path = write_fleet(orchestrators=RUNNER, files=files)
    monkeypatch.setattr(load.assets, "MAX_ASSETS", 5)
    assert [line.split(": ", 2)[2] for line in problems(path)] == [
        "more than 5 files would travel; narrow the patterns"
    ]
    monkeypatch.setattr(load.assets, "MAX_ASSETS", 50)
    monkeypatch.setattr(load.assets, "MAX_ASSET_BYTES", 99)
    assert len(problems(path)) == 9


def test_a_glob_that_would_look_at_too_much_is_refused(write_fleet, monkeypatch):
    """A pattern over a huge tree stops at its limit."""
    monkeypatch.setattr(folder_module, "MAX_LOOKED_AT", 20)
    files = {"scripts/a.py": "", "top.txt": "", **{f"rules/{n}/x.toml": "" for n in range(30)}}
    assert "rules/**/*.toml looks at more than" in problems(write_fleet(orchestrators=RUNNER, files=files))[0]


def test_templates_are_read_by_name(write_fleet):
    """Those of the fleet take the place of ours."""
    fleet = load_fleet(write_fleet(files={"templates/prompt.md.j2": "Hello {{ name }}", "templates/readme.txt": "{%"}))
    assert fleet.templates == {"prompt.md.j2": "Hello {{ name }}"}


def test_a_charter_without_front_matter_is_all_prose(write_fleet):
    """Everything in it has a default."""
    charter = load_fleet(write_fleet(files={"charters/cto.md": "Do it.\n---\nReally.\n"})).charters["charters/cto.md"]
    assert charter.front.tier == 1
    assert charter.prose == "Do it.\n---\nReally.\n"


def test_a_charter_written_on_windows_reads_the_same(write_fleet):
    """Its lines end in CR LF, its front matter is found."""
    charter = load_fleet(write_fleet(files={"charters/cto.md": b"\xef\xbb\xbf---\r\nrole: X\r\n---\r\n\r\nDo it.\r\n"}))
    assert charter.charters["charters/cto.md"].front.role == "X"
    assert charter.charters["charters/cto.md"].prose == "Do it.\r\n"


def test_a_charter_over_its_limit_is_refused(write_fleet):
    """A prompt has a size."""
    assert problems(write_fleet(files={"charters/cto.md": "x" * (300 << 10)})) == [
        "charters/cto.md: is 300 KiB, the limit is 256 KiB; split it, or make it shorter"
    ]


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    """The size is looked at, the bytes never are."""
    path = tmp_path / "fleet.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    assert problems(path) == ["fleet.yaml: is 100.0 MiB, the limit is 4.0 MiB; split it, or make it shorter"]


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    """Opening a named pipe would wait for ever."""
    os.mkfifo(tmp_path / "fleet.yaml")
    assert problems(tmp_path / "fleet.yaml") == ["fleet.yaml: is no regular file"]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_does_not_exist(tmp_path, name):
    """What the system refuses to look for is not there."""
    assert "does not exist" in problems(tmp_path / name)[0]


def test_the_named_maximum_of_diagnostics_ends_with_how_many_more(write_fleet, monkeypatch):
    """The first ones in file order, then a count."""
    monkeypatch.setattr(load, "MAX_DIAGNOSTICS", 3)
    found = problems(write_fleet("".join(f"x{n}: 1\n" for n in range(10))))
    assert [line.split(":")[1] for line in found[:3]] == ["9", "10", "11"]
    assert found[3:] == ["…: and 7 more; correct these first"]


def test_what_would_be_is_loaded_without_writing_it(write_fleet):
    """`instead` takes the place of a file's bytes."""
    path = write_fleet()
    text = path.read_bytes().replace(b"acme", b"other")
    assert load_fleet(path, instead={"fleet.yaml": text}).file.fleet == "other"
    assert load_fleet(path).file.fleet == "acme"


def test_a_plain_fleet_needs_no_expensive_library(write_fleet):
    """CEL, Jinja, cron and difflib come in with what needs them."""
    path = write_fleet()
    code = (
        "import sys; from pathlib import Path; from orchestrator_fleet.spec.load import load_fleet; "
        f"load_fleet(Path({str(path)!r})); "
        "print(*[m for m in ('cel', 'jinja2', 'cronsim', 'difflib', 'ruamel.yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_a_thousand_orchestrators_are_checked_in_one_validation(write_fleet, monkeypatch):
    """The work grows with the file, not with its square: one parse, one validation, each charter read once."""
    count = 1_000
    orchestrators = "orchestrators:\n" + "".join(f"  vp-{n}: {{charter: charters/cto.md}}\n" for n in range(count))
    machines = "machines:\n  m01: {slots: 1000}\n"
    path = write_fleet("defaults: {sessions: {max: 3}}\n", machines=machines, orchestrators=orchestrators)
    validated, read = [], []
    real_validate, real_read = load.FleetFile.model_validate, load.charters.read_charter
    monkeypatch.setattr(load.FleetFile, "model_validate", lambda value: (validated.append(1), real_validate(value))[1])
    monkeypatch.setattr(load.charters, "read_charter", lambda *a: (read.append(1), real_read(*a))[1])
    fleet = load_fleet(path)
    assert len(fleet.file.orchestrators) == count
    assert (len(validated), len(read)) == (1, 1)
    assert fleet.file.orchestrators["vp-999"].sessions.max == 3

"""The agents of the sample fleet find what was planted, and nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sample_repository
from sample_repository import AGENTS, HOME, KEY, RANDOM, Ran

Work = Callable[..., Ran]
NAMES = sorted(path.stem for path in AGENTS.glob("*.py") if path.stem != "report")


def test_lint_names_rule_and_place(work: Work) -> None:
    """Each rule once, and none of them in the clean file."""
    found = work("lint", scope="app").result
    assert sorted(line.split(": ")[:2] for line in found["findings"] if "messy" in line) == [
        ["app/messy.py:1", "unused-import"],
        ["app/messy.py:10", "none-comparison"],
        ["app/messy.py:3", "unused-import"],
        ["app/messy.py:5", "mutable-default"],
        ["app/messy.py:8", "bare-except"],
    ]
    assert work("lint", scope="app/clean.py").result["findings"] == []


def test_secrets_are_found_and_never_shown(work: Work) -> None:
    """Tracked ones alone; prose is no secret."""
    done = work("secrets_scan")
    assert done.result["by_kind"] == {"fleet-key": 1, "assigned": 1}
    assert done.result["findings"] == [
        "config/settings.py:1: fleet-key: flee***",
        "config/settings.py:2: api_token assigned: q8Zr***",
    ]
    assert KEY not in done.out + str(done.result)
    assert RANDOM not in done.out + str(done.result)


def test_churn_puts_the_hottest_first(work: Work) -> None:
    """By commits; the scope narrows it."""
    found = work("churn").result
    assert found["commits"] == 4
    assert found["findings"][0] == {"file": "app/clean.py", "commits": 4, "added": 15, "removed": 0}
    assert work("churn", scope="tests").result["commits"] == 1


def test_complexity_finds_the_deep_function(work: Work) -> None:
    """With its line; a file that is not Python stops nothing."""
    found = work("complexity").result
    assert found["findings"] == ["app/deep.py:1: deep: 8 lines, 6 branches, 6 deep"]


def test_dependencies_hold_declared_against_imported_and_installed(work: Work, repository: Path) -> None:
    """Without a bound; never imported; the version that is installed beside the repository."""
    sample_repository.install(repository, "odd.licence", version="1.4", licence="Custom")
    found = work("dependencies").result
    assert (found["dependencies"], found["optional"], found["installed"]) == (3, 1, {"odd-licence": "1.4"})
    assert [line.split(": ")[0] for line in found["findings"]] == ["requests", "Odd_Licence>=1", "never.installed>=2"]


def test_licences_are_sorted_into_accepted_odd_and_unknown(work: Work, repository: Path, tmp_path: Path) -> None:
    """Also from a clone, as a session has it: what is installed stands beside the original."""
    sample_repository.install(repository, "odd_licence", version="1", licence="Strange Public Licence")
    sample_repository.install(repository, "Requests", version="2", licence="Apache 2.0")
    clone = tmp_path / "clone"
    sample_repository.git(tmp_path, "clone", "-q", "--shared", f"{repository}/.", str(clone))
    for place in (repository, clone):
        found = work("licences", repository=place).result
        assert found["findings"] == ["odd-licence: Strange Public Licence", "never-installed: not installed here"]
        assert found["licences"]["requests"] == "Apache 2.0"
        assert "the project itself says MIT" in found["headline"]


def test_links_that_lead_nowhere_are_named(work: Work) -> None:
    """Files and scripts; what is out on the net is not asked."""
    assert work("links").result["findings"] == [
        "README.md:1: docs/missing.md is not there",
        "README.md:3: scripts/nowhere is not there",
    ]


def test_leftovers_say_who_and_when(work: Work) -> None:
    """By git blame."""
    today = datetime.now(UTC).date().isoformat()[:7]
    (found,) = work("leftovers", scope="app").result["findings"]
    assert found.startswith("app/later.py:1: TO" + f"DO do it properly (Ada, {today}")


def test_risky_calls_are_listed(work: Work) -> None:
    """Each with why."""
    found = work("risky_calls").result
    assert found["by_call"] == {"eval": 1, "os.system": 1, "subprocess.run(shell=True)": 1}
    assert all(line.startswith("app/risky.py:") for line in found["findings"])


def test_the_inventory_finds_tests_that_assert_nothing(work: Work) -> None:
    """And modules that no test imports."""
    found = work("test_inventory").result
    assert (found["tests"], found["by_folder"]) == (2, {"tests": 2})
    assert found["findings"][0] == "tests/test_clean.py:8: test_nothing asserts nothing"
    assert "app.messy: no test imports it" in found["findings"]
    assert "app.clean: no test imports it" not in found["findings"]


def test_authors_name_the_folders_that_hang_on_one(work: Work) -> None:
    """Of those with enough changes to say so."""
    found = work("authors").result
    assert found["by_author"] == {"Grace": 3, "Ada": 1}
    assert found["findings"] == []
    assert work("authors", scope="app/clean.py").result["commits"] == 4


def test_the_overview_counts(work: Work) -> None:
    """Text files; the binary one is none."""
    found = work("overview").result
    assert found["files"] == len(sample_repository.FILES)
    assert found["by_kind"][".md"] == 3
    assert found["commits"] == 4


def test_release_notes_group_by_place(work: Work) -> None:
    """Newest commits, by the folder that they touch most."""
    found = work("release_notes").result
    assert found["commits"] == 4
    assert sum(line.startswith("app/clean.py: ") and "Turn" in line for line in found["findings"]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_agent_takes_this_repository(name: str, tmp_path: Path) -> None:
    """The real input: this clone itself."""
    done = sample_repository.run(name, sample_repository.task(HOME, scope="."), folder=tmp_path)
    assert done.code == 0, done.err
    assert done.result["headline"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stdin", [b"", b"no JSON", b"[1]", b"\xff\xfe\0", b'{"title": "no workspace"}'])
def test_garbage_on_stdin_fails_for_good(name: str, stdin: bytes, tmp_path: Path) -> None:
    """One line that says what was wanted, and no traceback: trying again can't help."""
    done = sample_repository.run(name, stdin, folder=tmp_path)
    assert (done.code, done.result) == (78, None)
    assert done.err.startswith("stdin: wanted a task as JSON")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("scope", ["..", "/etc", "nowhere", "a\0b", "x" * 5_000, ":(exclude)app", 7, ["app"]])
def test_a_scope_outside_of_the_repository_fails_for_good(repository: Path, tmp_path: Path, scope: object) -> None:
    """Whatever it is made of."""
    done = sample_repository.run("lint", sample_repository.task(repository, scope=scope), folder=tmp_path)
    assert (done.code, done.result) == (78, None)
    assert done.err.startswith("metadata.scope: got ")
    assert len(done.err) < 400


def test_json_that_is_nested_too_deep_fails_for_good(tmp_path: Path) -> None:
    """No traceback."""
    done = sample_repository.run("lint", b"[" * 200_000, folder=tmp_path)
    assert done.code == 78
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["dependencies", "licences"])
def test_without_a_pyproject_there_is_nothing_to_read(name: str, repository: Path, tmp_path: Path) -> None:
    """And it says which file is meant."""
    (repository / "pyproject.toml").write_text("[project\n")
    done = sample_repository.run(name, sample_repository.task(repository), folder=tmp_path)
    assert done.code == 78
    assert done.err.startswith("pyproject.toml: ")

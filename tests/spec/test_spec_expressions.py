"""CEL expressions and templates: what compiles, what they may name, and what is said when they may not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_fleet.spec.expressions import (
    ALERT_ROOTS,
    MAX_BRACKETS,
    MAX_EXPRESSION_CHARS,
    TASK_FIELDS,
    TASK_ROOTS,
    check,
    check_template,
    compile_cel,
)

GOOD = [
    'task.priority == "CRITICAL" && "security" in task.tags',
    "has(task.discipline)",
    "task.metadata.anything.at.all == 1",
    "task.metadata['any thing']",
    "task['title'].startsWith('x')",
    "task.tags.exists(t, t.startsWith('sec'))",
    "task.tags.map(t, size(t)).filter(n, n > 3).size() > 0",
    "task.title == 'task.nothing' || task.title == \"tsk.foo(\"",
    "task.title == r'a\\' // task.nothing",
    "timestamp(task.created_at) < timestamp(task.due_at)",
    "{'task': 1}.task == 1",
    "true",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_names_known_things_is_fine(text: str):
    """Strings, comments, bound names and map keys are no names of ours."""
    assert check(text, roots=TASK_ROOTS) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("task.", "is not CEL at character 6: no viable alternative at input '.'"),
        ("1 +", "is not CEL at character 4: it ends too early"),
        ("task.id ==\n  &&", "is not CEL at line 2, character 3: mismatched input '&&'"),
        ("''", None),
        ("tsk.id", "unknown name tsk at character 1; did you mean task?"),
        ("x.y == 1", "unknown name x at character 1; it may name task"),
        ("task.prio == 1", "task has no field prio at character 6; did you mean priority?"),
        ("has(task.titel)", "task has no field titel at character 10; did you mean title?"),
        ("task['titel']", "task has no field titel at character 6; did you mean title?"),
        ("lower(task.title)", None),
        ("task.title.lower()", None),
        ("task.tags.exist(t, t == 'x')", None),
        ("matches(task.title, 'a')", None),
        ("[1].all(t, u)", "unknown name u at character 12; it may name task"),
    ],
)
def test_what_is_unknown_is_named_with_its_place(text: str, problem: str | None):
    """One line each, with the character it stands at."""
    found = check(text, roots=TASK_ROOTS)
    if problem is not None:
        assert problem in found
    elif text != "''":
        assert any(line.startswith(("unknown function", "unknown method")) for line in found)
    else:
        assert found == []


def test_a_plain_value_has_no_fields():
    """`presence` is a word, nothing stands behind it."""
    assert check("presence == 'ONLINE'", roots=ALERT_ROOTS) == []
    assert check("presence.since > 1", roots=ALERT_ROOTS) == [
        "presence has no field since at character 10; presence is a plain value"
    ]


def test_the_example_alert_of_the_format_is_fine():
    """As fleet.yaml's own description writes it."""
    assert check("backlog.oldest_s > 900 && presence == 'ONLINE'", roots=ALERT_ROOTS) == []


def test_every_function_that_is_let_through_exists():
    """What check knows, the library can run: over a real task."""
    task = {"title": "abc", "tags": ["a"], "at": "2026-01-02T03:04:05Z"}
    for text in (
        "bytes('a')",
        "double('1')",
        "duration('1h')",
        "dyn(1)",
        "has(task.title)",
        "int('1')",
        "size(task.tags)",
        "string(1)",
        "timestamp(task.at)",
        "type(1)",
        "uint(1)",
        "task.title.contains('b')",
        "task.title.endsWith('c')",
        "task.title.startsWith('a')",
        "task.title.matches('a.*')",
        "task.tags.size()",
        "task.tags.all(t, true)",
        "task.tags.exists(t, true)",
        "task.tags.exists_one(t, true)",
        "task.tags.filter(t, true)",
        "task.tags.map(t, t)",
        *(
            f"timestamp(task.at).get{part}()"
            for part in (
                *("Date", "DayOfMonth", "DayOfWeek", "DayOfYear", "FullYear"),
                *("Hours", "Milliseconds", "Minutes", "Month", "Seconds"),
            )
        ),
    ):
        assert check(text, roots={"task": None}) == []
        compile_cel(text).execute({"task": task})


def test_a_compiled_expression_runs():
    """The program is the library's own."""
    assert compile_cel(GOOD[0]).execute({"task": {"priority": "CRITICAL", "tags": ["security"]}}) is True


def test_length_and_nesting_have_limits():
    """No text makes the parser recurse far."""
    with pytest.raises(ValueError, match="the limit is 4000"):
        compile_cel("1" + "+1" * MAX_EXPRESSION_CHARS)
    for opening, closing in ("()", "[]", "{}"):
        deep = opening * (MAX_BRACKETS + 1) + "1" + closing * (MAX_BRACKETS + 1)
        with pytest.raises(ValueError, match="nested deeper than 40 brackets"):
            compile_cel(deep)
    assert compile_cel("(" * MAX_BRACKETS + "1" + ")" * MAX_BRACKETS).execute({}) == 1


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("task.title()[]{}'\"\\ ?:&|!=<>+-*/%,0123456789eEuUrRbBxé\n\t#@"), max_size=60))
def test_no_text_at_all_makes_check_raise(text: str):
    """Whatever people type, the answer is a list of problems."""
    problems = check(text, roots=TASK_ROOTS)
    assert all(isinstance(problem, str) and "\n" not in problem for problem in problems)


@pytest.mark.parametrize(
    "text", ["plain", "{{ task.discipline }}", "vp-{{task.discipline}}-x", "{{ task.metadata.a.b }}"]
)
def test_templates_name_task_fields(text: str):
    """One shape only, so that everybody can say what it gives."""
    assert check_template(text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ task.disciplin }}", "task has no field disciplin; did you mean discipline?"),
        ("{{ discipline }}", "got {{ discipline }}, wanted {{ task.<field> }}"),
        ("{{ task.title | upper }}", "got {{ task.title | upper }}, wanted {{ task.<field> }}"),
        ("{{ task.title", "got '{{ task.title', wanted {{ task.<field> }} in closed braces"),
        ("{% if x %}", "got '{% if x %}', wanted {{ task.<field> }} in closed braces"),
    ],
)
def test_other_templates_say_what_is_wanted(text: str, problem: str):
    """Filters and statements are not known."""
    assert check_template(text) == [problem]


def test_the_task_fields_are_those_of_the_api():
    """As the HTTP API's Task lists them."""
    names = (
        "id title description priority status blocked_reason orchestrator discipline tags due_at available_at "
        "estimate_s depends_on parent metadata route attempt max_attempts created_by created_at updated_at "
        "started_at completed_at result error version generation charter_version"
    )
    assert frozenset(names.split()) == TASK_FIELDS

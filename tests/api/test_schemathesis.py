"""What schemathesis makes of the OpenAPI document: requests of every route, good and bad, and their answers.

No 5xx, no status and no content type that the document does not name.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import openapi_spec_validator
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance
from serving import ControlPlane

EXAMPLES = int(os.environ.get("FLEET_SCHEMATHESIS_EXAMPLES", "6"))
# The same handlers serve the other name; a stream never ends; and an apply that nobody wants starts real daemons.
LEFT_OUT = r"^/api/(orchestrators|events$|fleet/apply)"
FEWEST = 60
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def some_tasks(shared: ControlPlane) -> list[str]:
    """Tasks of several kinds, so that not every answer is a 404."""
    first = shared.add("running", orchestrator="vp-b")["id"]
    shared.poll("vp-b", lease_s=3600)
    waiting = shared.add("waiting", orchestrator="vp-b", depends_on=[first])["id"]
    return [first, waiting, *(shared.add(f"t{n}", orchestrator="vp-b")["id"] for n in range(4))]


@pytest.fixture(scope="module")
def api(shared: ControlPlane) -> Any:
    """The document, as it is served."""
    return schemathesis.openapi.from_url(f"{shared.url}/schema/openapi.json")


@pytest.fixture(autouse=True)
def no_traceback(shared: ControlPlane) -> Iterator[None]:
    """Nothing fails inside, whatever is answered."""
    before = len(shared.log)
    yield
    failed = [line for line in shared.log[before:].splitlines() if "Traceback" in line]
    assert not failed, failed[0][-3000:].replace("\\n", "\n")


def test_every_answer_is_one_that_the_document_names(shared: ControlPlane, some_tasks: list[str], api: Any) -> None:
    """Every route; half of the requests for a task or an orchestrator are for one that exists."""
    bearer = {"Authorization": f"Bearer {shared.keys['admin']}"}
    wrong: list[str] = []
    tried = 0

    for found in api.exclude(path_regex=LEFT_OUT).get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        )
        @given(case=operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE))
        def ask(case: Any) -> None:
            _keep_it_short(case)
            _aim(case, some_tasks)
            case.call_and_validate(headers=bearer, checks=CHECKS, timeout=30)

        tried += 1
        try:
            ask()
        except (Exception, FailureGroup) as problem:  # noqa: BLE001 - all routes are tried, all that is wrong is told
            said = "; ".join(map(str, getattr(problem, "exceptions", [problem])))
            wrong.append(f"{operation.method.upper()} {operation.path}: {said}\n{problem}")
    assert tried >= FEWEST
    assert not wrong, "\n\n".join(wrong)


def _aim(case: Any, some_tasks: list[str]) -> None:
    """Every second request is for something that exists."""
    dice = zlib.crc32(repr((case.path_parameters, case.query, case.body)).encode())
    if dice % 2 and isinstance(case.path_parameters, dict):
        there = {"task_id": some_tasks[dice // 2 % len(some_tasks)], "vp": "vp-a"}
        case.path_parameters |= {name: value for name, value in there.items() if name in case.path_parameters}


def _keep_it_short(case: Any) -> None:
    """No long poll and no stream: those never end by themselves."""
    if isinstance(case.query, dict):
        case.query.pop("follow", None)
        if "wait" in case.query:
            case.query["wait"] = 0
    if isinstance(case.body, dict) and "wait" in case.body:
        case.body["wait"] = 0
    if isinstance(case.headers, dict):
        case.headers.pop("Accept", None)


def test_the_document_is_openapi(shared: ControlPlane) -> None:
    """As the specification's own schema says, with an operation id for each route: what generators of clients need."""
    document = shared.json("GET", "/schema/openapi.json", key=None)
    assert document["openapi"].startswith("3.1")
    openapi_spec_validator.validate(document)
    operations = [one for path in document["paths"].values() for one in path.values() if isinstance(one, dict)]
    named = [one["operationId"] for one in operations if "responses" in one]
    assert len(named) == len(set(named)) >= FEWEST


def test_the_document_names_every_task_route_of_the_contract(shared: ControlPlane) -> None:
    """Clients that are generated from it lack nothing."""
    paths = shared.json("GET", "/schema/openapi.json", key=None)["paths"]
    of_a_task = "heartbeat complete fail release progress cancel retry unblock approve reject events log why"
    wanted = {f"/api/tasks/{{task_id}}/{word}" for word in of_a_task.split()}
    wanted |= {"/api/tasks", "/api/tasks/{task_id}", "/api/tasks/poll", "/api/tasks/assign", "/api/tasks/bulk"}
    assert wanted <= set(paths)

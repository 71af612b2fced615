"""`/api/tasks/poll` and what belongs to an attempt: for workers that speak HTTP instead of the daemons' link."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from litestar import Response, get, post
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once, work
from orchestrator_fleet.api.asking import Asked, OfPlane, needs
from orchestrator_fleet.api.bodies import JsonBody, from_dict
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import Unauthorized
from orchestrator_fleet.api.task_routes import shown
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.orchestrators import carried
from orchestrator_fleet.store.outbox import CALLER
from orchestrator_fleet.tasks import life, view
from orchestrator_fleet.tasks.task import Ask, Claimed, Grant
from orchestrator_fleet.wire.http import CompleteTask, FailTask, Heartbeat, Poll, Progress, ReleaseTask, Spent
from orchestrator_fleet.wire.link import Usage

KEEP_ALIVE_S = 15.0
CLOSED_REQUEST = 499
NO_STORE = {"Cache-Control": "no-store"}

_WORK, _READ = [needs("tasks:work")], [needs("tasks:read")]


@get("/tasks/poll", guards=_WORK)
async def poll_by_query(
    *,
    request: Asked,
    plane: OfPlane,
    wait: str | None = None,
    limit: str | None = None,
    orchestrator: str | None = None,
    lease_s: str | None = None,
) -> Response[dict[str, Any]]:
    """Claim tasks; see the POST of the same path."""
    given = {"wait": wait, "limit": limit, "orchestrator": orchestrator, "lease_s": lease_s}
    asked = from_dict({name: value for name, value in given.items() if value is not None}, Poll, strict=False)
    return await _poll(request, plane, asked)


@post("/tasks/poll", guards=_WORK, dto=JsonBody[Poll], return_dto=None, status_code=200)
async def poll(
    request: Asked,
    plane: OfPlane,
    data: Poll = Poll(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Claim tasks, waiting up to `wait` seconds for the first. A task is given to one poller alone.

    With an `Idempotency-Key`, whoever did not get the answer asks again and gets the same tasks under the same leases;
    an answer without tasks is not kept.
    """
    return await _poll(request, plane, data, await once.keyed(request, plane, idempotency_key))


async def _poll(
    request: Asked, plane: Plane, asked: Poll, repeatable: once.Once | None = None
) -> Response[dict[str, Any]]:
    orchestrator = asked.orchestrator or request.auth.owner
    asking.claims_for(request.auth, orchestrator)
    if orchestrator not in plane.control.orchestrators:
        if asked.orchestrator is None:
            raise Invalid([("orchestrator", f"is required: the key's owner, {orchestrator}, is none")])
        raise Invalid([("orchestrator", f"there is no orchestrator {orchestrator}")])
    claimant = work.Claimant(orchestrator=orchestrator, actor=request.auth.actor, lease_s=asked.lease_s)
    claims = _claim(plane, claimant, asked) if repeatable is None else _claim_once(plane, claimant, asked, repeatable)
    claiming = asyncio.create_task(claims)
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({claiming, gone}, return_when=asyncio.FIRST_COMPLETED)
        if claiming.done():
            return await claiming
        if (why := plane.why_no_longer(request.auth)) is not None:
            raise Unauthorized(f"the key is {why}")
        return Response({"data": [], "reason": "the client hung up"}, status_code=CLOSED_REQUEST, headers=NO_STORE)
    finally:
        gone.cancel()
        if not claiming.done():
            claiming.cancel()
            # What it has claimed by now is given back before this request ends.
            with suppress(asyncio.CancelledError):
                await claiming


async def _claim(plane: Plane, claimant: work.Claimant, asked: Poll) -> Response[dict[str, Any]]:
    async with work.claimed(plane, claimant, limit=asked.limit, wait_s=asked.wait) as (grants, reason):
        along = await work.carried(plane, grants)
        return Response(_told(grants, reason, along), headers=NO_STORE)


class _Repeated(Exception):
    """The same was asked before, and answered."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply


async def _claim_once(
    plane: Plane, claimant: work.Claimant, asked: Poll, repeatable: once.Once
) -> Response[dict[str, Any]]:
    """The same, kept in the claim's own transaction. Nothing is given back: whoever lost the answer asks again."""

    def claim(conn: Connection, ask: Ask) -> Claimed:
        if (before := repeatable.before(conn)) is not None:
            raise _Repeated(before)
        (got,) = life.claim_all(conn, [ask])
        if isinstance(got, Exception):
            raise got
        if got.grants:
            along = carried.along(conn, [grant.task for grant in got.grants])
            repeatable.keep(conn, Reply(content=_told(got.grants, "", along), headers=NO_STORE))
        return got

    async def claim_alone(ask: Ask) -> Claimed:
        got = await plane.store.write(lambda conn: claim(conn, ask))
        plane.pulse.nudge()
        return got

    try:
        got = await work.wait_for_some(plane, claimant, limit=asked.limit, wait_s=asked.wait, claim=claim_alone)
    except _Repeated as repeated:
        return once.respond(plane, repeated.reply)
    reason = work.CLOSING if plane.closing.is_set() else got.reason
    along = await work.carried(plane, got.grants)
    return Response(_told(got.grants, "" if got.grants else reason, along), headers=NO_STORE)


def _told(grants: Sequence[Grant], reason: str, along: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    data = [
        {
            "task": {**view.to_json(grant.task), **along.get(grant.task.id, {})},
            "lease": {"token": grant.token, "expires_at": to_rfc3339(grant.lease_until_us), "attempt": grant.attempt},
        }
        for grant in grants
    ]
    return {"data": data, "reason": reason} if reason else {"data": data}


async def _hung_up(request: Asked) -> None:
    while True:
        event = await request.receive()
        if event["type"] == "http.disconnect":
            return


@post("/tasks/{task_id:str}/heartbeat", guards=_WORK, dto=JsonBody[Heartbeat], return_dto=None, status_code=200)
async def heartbeat(
    request: Asked, plane: OfPlane, task_id: str, data: Heartbeat, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Hold the task longer."""
    acts_for, now_us = request.auth.acts_for, plane.clock.now_us()

    def beat(conn: Connection) -> Reply:
        task = life.heartbeat(
            conn, task_id=task_id, token=data.token, lease_s=data.lease_s, now_us=now_us, acts_for=acts_for
        )
        expires = None if task.lease_until_us is None else to_rfc3339(task.lease_until_us)
        lease = {"token": data.token, "expires_at": expires, "attempt": task.attempt}
        return Reply(content={"task": view.to_json(task), "lease": lease})

    return await once.write(request, plane, idempotency_key, beat)


@post("/tasks/{task_id:str}/complete", guards=_WORK, dto=JsonBody[CompleteTask], return_dto=None, status_code=200)
async def complete(
    request: Asked, plane: OfPlane, task_id: str, data: CompleteTask, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """The attempt is done. Twice with the same token answers the same."""
    return await _finish(
        request,
        plane,
        task_id,
        key=idempotency_key,
        token=data.token,
        outcome="done",
        result=data.result,
        usage=_usage(data.usage),
    )


@post("/tasks/{task_id:str}/fail", guards=_WORK, dto=JsonBody[FailTask], return_dto=None, status_code=200)
async def fail(
    request: Asked, plane: OfPlane, task_id: str, data: FailTask, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """The attempt failed: tried again after a wait, unless it is for good or the attempts are spent.

    With `error.quota_until` no attempt is spent: the provider's quota is, and all of the orchestrator waits for it.
    """
    until_us = asking.instant("error.quota_until", data.error.quota_until)
    failed = "failed" if data.error.retryable else "failed_for_good"
    return await _finish(
        request,
        plane,
        task_id,
        key=idempotency_key,
        token=data.token,
        outcome=failed if until_us is None else "quota",
        error=data.error.message,
        usage=_usage(data.usage),
        until_us=until_us,
    )


@post("/tasks/{task_id:str}/release", guards=_WORK, dto=JsonBody[ReleaseTask], return_dto=None, status_code=200)
async def release(
    request: Asked, plane: OfPlane, task_id: str, data: ReleaseTask, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Give the task back untouched."""
    return await _finish(
        request, plane, task_id, key=idempotency_key, token=data.token, outcome="released", error=data.reason
    )


@post("/tasks/{task_id:str}/progress", guards=_WORK, dto=JsonBody[Progress], return_dto=None, status_code=200)
async def progress(
    request: Asked, plane: OfPlane, task_id: str, data: Progress, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Say how it goes."""
    actor, now_us = request.auth.actor, plane.clock.now_us()
    return await once.write(
        request,
        plane,
        idempotency_key,
        lambda conn: shown(
            life.progress(
                conn,
                task_id=task_id,
                token=data.token,
                message=data.message,
                actor=actor,
                now_us=now_us,
                acts_for=request.auth.acts_for,
            )
        ),
    )


async def _finish(
    request: Asked, plane: Plane, task_id: str, *, key: str | None, token: str, outcome: str, **more: Any
) -> Response[dict[str, Any]]:
    """End the attempt; `more` is what the Report says beside that."""
    report = life.Report(
        task_id=task_id,
        token=token,
        outcome=outcome,
        retry_of=plane.control.dispatch.retry,
        roll=random.random(),  # noqa: S311 - spreads retries, guards nothing
        actor=request.auth.actor,
        now_us=plane.clock.now_us(),
        acts_for=request.auth.acts_for,
        by=CALLER.get(),
        **more,
    )
    return await once.write_batched(request, plane, key, fn=life.finish_all, item=report, reply=shown)


def _usage(spent: Spent | None) -> Usage | None:
    return None if spent is None else spent.usage()


ROUTES = [poll_by_query, poll, heartbeat, complete, fail, release, progress]

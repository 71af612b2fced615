"""`/api/vps/{id}/analytics`: how an orchestrator did, from history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar import get

from orchestrator_fleet.api import asking
from orchestrator_fleet.api.asking import OfPlane, Text, needs
from orchestrator_fleet.api.vp_routes import PATHS, check_there
from orchestrator_fleet.history import analytics
from orchestrator_fleet.history.sql import Result
from orchestrator_fleet.wire.vps import Bucket, Range

_READ = [needs("fleet:read")]


@get([f"{path}/{{vp:str}}/analytics" for path in PATHS], guards=_READ)
async def vp_analytics(
    *,
    plane: OfPlane,
    vp: str,
    range: Text = None,  # noqa: A002 - the query's own word
    bucket: Text = None,
) -> dict[str, Any]:
    """How an orchestrator did in the time up to now: `range` is 24h, 7d (default), 30d, 90d or all.

    `summary` is of the whole range, `series` of each `bucket` of it (hour, day, week, month; default day), `previous`
    of as long a time before it. Windows have their beginning and not their end; days are UTC's, weeks begin on Monday.
    What is counted is counted when it ended. Counts of nothing are 0; rates, percentiles and sums of nothing are null.
    """
    check_there(plane, vp)
    query = asking.Query()
    span: Range = query.one_of("range", range, among=Range, default="7d")  # type: ignore[assignment] # one of its words
    by: Bucket = query.one_of("bucket", bucket, among=Bucket, default="day")  # type: ignore[assignment] # as above
    query.check()

    async def ask(text: str, params: Sequence[Any], limit: int) -> Result:
        return await plane.history.ask(text, params, limit=limit)

    return await analytics.look(ask, vp, span=span, bucket=by, now_us=plane.clock.now_us())


ROUTES = [vp_analytics]

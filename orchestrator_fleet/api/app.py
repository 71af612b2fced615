"""The ASGI application: routes, their one error handler, the OpenAPI document, and the door around it all."""

from __future__ import annotations

from typing import Any

from litestar import Litestar, Router, WebSocket, websocket
from litestar.config.app import AppConfig
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from orchestrator_fleet import __version__
from orchestrator_fleet.api import (
    action_routes,
    analytics_routes,
    answers,
    attempt_routes,
    audit_routes,
    backlog,
    bulk_routes,
    conflict_routes,
    conversation_routes,
    coordination_routes,
    declare_routes,
    event_routes,
    fleet_routes,
    help_routes,
    key_routes,
    link,
    problems,
    task_routes,
    vp_routes,
    why_routes,
)
from orchestrator_fleet.api.asking import OfPlane, refuse_unknown_query
from orchestrator_fleet.api.door import Door
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.wire.http import MAX_BODY_BYTES
from orchestrator_fleet.wire.link import PATH as LINK_PATH


@websocket(LINK_PATH)
async def daemon_link(socket: WebSocket[Any, Any, Any], plane: OfPlane) -> None:
    """A daemon's connection."""
    await link.serve(socket, plane)


def create_app(plane: Plane) -> Door:
    """The application that serves `plane`."""
    of_tasks = (task_routes, bulk_routes, attempt_routes, event_routes, why_routes)
    of_orchestrators = (
        vp_routes,
        backlog,
        declare_routes,
        key_routes,
        action_routes,
        conversation_routes,
        coordination_routes,
        help_routes,
        conflict_routes,
        analytics_routes,
        audit_routes,
    )
    parts = (*of_tasks, *of_orchestrators)
    api = Router(path="/api", route_handlers=[route for part in parts for route in part.ROUTES])
    app = Litestar.from_config(
        AppConfig(
            route_handlers=[api, *fleet_routes.ROUTES, daemon_link],
            dependencies={"plane": Provide(lambda: plane, sync_to_thread=False)},
            exception_handlers={Exception: problems.handle, 500: problems.handle},
            guards=[refuse_unknown_query],
            request_max_body_size=MAX_BODY_BYTES,
            openapi_config=_openapi(),
            logging_config=None,
        )
    )
    answers.list_problems(app.openapi_schema)
    return Door(app, plane=plane)


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="orchestrator-fleet",
        version=__version__,
        description="Tasks and orchestrators of a fleet. Errors are RFC 9457 application/problem+json.",
        path="/schema",
        render_plugins=[JsonRenderPlugin(path="/openapi.json")],
        security=[{"key": []}],
        components=Components(
            security_schemes={
                "key": SecurityScheme(type="http", scheme="bearer", description="`fleet key create` makes keys.")
            }
        ),
    )

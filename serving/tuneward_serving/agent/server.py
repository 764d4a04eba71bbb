"""The agent's process: the loop, and HTTP for the operator, the kubelet and Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tuneward_api.names import ExitCode
from tuneward_serving.agent.adapter_check import Limits
from tuneward_serving.agent.engine_client import EngineClient
from tuneward_serving.agent.loop import Agent

STALE_SECONDS = 600
"""A pass loads and proves many adapters at most; a loop that is silent for longer hangs."""


@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """What the command line says."""

    engine: str
    adapters: Path
    wanted: Path
    model: Path
    limits: Limits
    host: str
    port: int
    interval: float
    tolerance: float
    api_key: str | None


def serve_agent(options: AgentOptions) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    config = uvicorn.Config(create_app(options), host=options.host, port=options.port, log_config=None, access_log=False)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()
    return ExitCode.OK


def create_app(options: AgentOptions) -> FastAPI:
    agent = Agent(
        engine=EngineClient(options.engine, api_key=options.api_key),
        adapters=options.adapters,
        wanted_file=options.wanted,
        model=options.model,
        limits=options.limits,
        least_tolerance=options.tolerance,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(agent.run(options.interval))
        yield
        task.cancel()
        await agent.engine.close()

    app = FastAPI(title="Tuneward agent", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_routes(app, agent)
    return app


def _add_routes(app: FastAPI, agent: Agent) -> None:
    @app.get("/adapters")
    async def adapters() -> dict[str, Any]:
        return agent.report().to_json()

    @app.get("/healthz")
    async def healthz() -> Response:
        alive = monotonic() - agent.looked_at < STALE_SECONDS
        return Response(status_code=200 if alive else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response(status_code=200 if agent.base_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(agent.metrics.registry), media_type=CONTENT_TYPE_LATEST)

"""/livez, /healthz and /metrics.

Kopf's own /healthz proves only that its loop runs. A watch whose connection died silently, a pass that never ends or a
blocked loop leave the process alive and deaf, so /livez answers 500 for each of them, and the kubelet restarts us.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SILENT_WATCH_SECONDS = 180.0
STUCK_QUEUE_SECONDS = 60.0
LONG_PASS_SECONDS = 300.0
LOOP_LAG_SECONDS = 5.0
LAG_MEMORY_SECONDS = 30.0


class Metrics:
    """All figures of /metrics, in one registry of our own so that a test can have two operators."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.passes = Counter("tuneward_passes", "Passes over one object.", ["kind", "outcome"], registry=self.registry)
        self.pass_seconds = Histogram(
            "tuneward_pass_seconds", "Time of one pass over an object.", ["kind"], registry=self.registry
        )
        self.status_writes = Counter("tuneward_status_writes", "Status writes.", ["kind"], registry=self.registry)
        self.created = Counter("tuneward_objects_created", "Objects created.", ["kind"], registry=self.registry)
        self.phases = Counter("tuneward_phase_changes", "Jobs that entered a phase.", ["phase"], registry=self.registry)
        self.polls = Counter("tuneward_progress_polls", "Looks at a leader's progress.", ["outcome"], registry=self.registry)
        self.queue_depth = Gauge("tuneward_queue_depth", "Objects that wait for a pass.", registry=self.registry)
        self.loop_lag = Gauge("tuneward_loop_lag_seconds", "Worst delay of the event loop lately.", registry=self.registry)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class LoopLag:
    """How late the loop wakes a sleeper, worst of the last half minute."""

    def __init__(self) -> None:
        self._worst = 0.0
        self._worst_at = 0.0

    def worst(self) -> float:
        return self._worst if time.monotonic() - self._worst_at < LAG_MEMORY_SECONDS else 0.0

    async def run(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(1.0)
            now = time.monotonic()
            lag = now - before - 1.0
            if lag > self.worst():
                self._worst, self._worst_at = lag, now


def ailments(
    *,
    silences: Iterable[tuple[str, float]],
    deaf: Iterable[str],
    stuck_for: float,
    longest_pass: float,
    lag: float,
) -> list[str]:
    """One sentence for each thing that only a restart heals; empty: healthy."""
    found = [f"the watch of {name} is silent for {age:.0f} s" for name, age in silences if age > SILENT_WATCH_SECONDS]
    found += [f"the watch of {name} missed changes" for name in deaf]
    if stuck_for > STUCK_QUEUE_SECONDS:
        found.append(f"no pass has ended for {stuck_for:.0f} s while objects wait")
    if longest_pass > LONG_PASS_SECONDS:
        found.append(f"a pass has taken {longest_pass:.0f} s")
    if lag > LOOP_LAG_SECONDS:
        found.append(f"the event loop was late by {lag:.1f} s")
    return found


def web_application(metrics: Metrics, check: Callable[[], list[str]], refresh: Callable[[], None]) -> web.Application:
    """`check` gives the ailments; `refresh` brings gauges up to date before they are read."""

    async def livez(_: web.Request) -> web.Response:
        found = check()
        return web.Response(status=500 if found else 200, text="\n".join(found) or "ok")

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def exposition(_: web.Request) -> web.Response:
        refresh()
        return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application()
    application.router.add_get("/livez", livez)
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/metrics", exposition)
    return application


async def serve(application: web.Application, host: str, port: int) -> web.AppRunner:
    """Starts listening; the caller cleans the runner up. Raises OSError where the port is taken."""
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner

"""What Prometheus reads from the engine."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Its own registry: two engines in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("tuneward_engine_requests", "HTTP requests.", ["route", "code"], registry=self.registry)
        self.prompt_tokens = Counter("tuneward_engine_prompt_tokens", "Tokens read.", registry=self.registry)
        self.generated_tokens = Counter("tuneward_engine_generated_tokens", "Tokens written.", registry=self.registry)
        self.first_token = Histogram(
            "tuneward_engine_first_token_seconds",
            "Seconds from the request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.running = Gauge("tuneward_engine_running_texts", "Texts in the batch.", registry=self.registry)
        self.waiting = Gauge("tuneward_engine_waiting_texts", "Texts that wait for a place.", registry=self.registry)
        self.adapters = Gauge("tuneward_engine_adapters", "Adapters loaded.", registry=self.registry)


class CountRequests:
    """Counts answers by route. The template of the path, never the path: a scanner must not make labels."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._requests = metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._requests.labels(route=route, code=message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)

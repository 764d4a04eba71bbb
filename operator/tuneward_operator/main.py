"""Wires the operator: caches first, then Kopf, so that no pass ever runs on half a picture."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import kopf

from tuneward_api.names import LABEL_MANAGED_BY, LABEL_ROLE
from tuneward_operator import handlers, health, jobs, logs, models, servers, sweep
from tuneward_operator.app import App
from tuneward_operator.build_server import SERVER
from tuneward_operator.informer import Informer
from tuneward_operator.kube import (
    CLAIMS,
    CONFIGMAPS,
    DEPLOYMENTS,
    FINETUNEDMODELS,
    FINETUNEJOBS,
    JOBS,
    MODELSERVERS,
    NODES,
    PODS,
    SERVICES,
    WORKLOADS,
    ApiError,
    Kube,
    Resource,
    load_configuration,
)
from tuneward_operator.poll import ANSWER_SECONDS, Leader, Poller, pull_directly
from tuneward_operator.queue import Key
from tuneward_operator.settings import Settings

logger = logging.getLogger(__name__)

OURS = f"{LABEL_MANAGED_BY}=tuneward"

RECONCILERS: dict[str, Callable[[App, Key], Awaitable[float | None]]] = {
    FINETUNEJOBS.kind: jobs.reconcile,
    FINETUNEDMODELS.kind: models.reconcile,
    MODELSERVERS.kind: servers.reconcile,
}


def run(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises whatever made going on impossible."""
    logs.configure(form=settings.log_format, level=settings.log_level)
    asyncio.run(operate(settings))


async def operate(settings: Settings, stop: asyncio.Event | None = None) -> None:
    """The whole operator in the running loop, until a signal or `stop`."""
    configuration = await load_configuration(settings)
    async with contextlib.AsyncExitStack() as stack:
        kube = Kube(configuration, settings)
        stack.push_async_callback(kube.close)
        limits = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=limits, trust_env=False))
        app = App(settings=settings, kube=kube, pull=pull_directly(session))
        informers = children(app)
        lag = health.LoopLag()
        if settings.health_port:
            web = health.web_application(app.metrics, lambda: ailments(app, informers, lag), lambda: refresh(app, lag))
            runner = await health.serve(web, settings.health_host, settings.health_port)
            stack.push_async_callback(runner.cleanup)
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(informer.run()) for informer in informers]
            background.append(group.create_task(lag.run()))
            for informer in informers:
                await informer.synced.wait()
            background += [group.create_task(work(app)) for _ in range(settings.reconcilers)]
            background.append(group.create_task(sweep.run(app)))
            background.append(group.create_task(poller(app).run()))
            logger.info("watching %s", ", ".join(settings.namespaces) or "all namespaces")
            try:
                await watch_own_kinds(app, stop)
            finally:
                for task in background:
                    task.cancel()


def children(app: App) -> list[Informer[Any]]:
    """One informer a kind and namespace. Nodes belong to the cluster: with Roles only, nobody may list them."""
    of_servers = f"{OURS},{LABEL_ROLE}={SERVER}"
    kinds = [
        (JOBS, OURS),
        (PODS, f"{OURS},{LABEL_ROLE}"),
        (DEPLOYMENTS, OURS),
        (SERVICES, of_servers),
        (CONFIGMAPS, of_servers),
        (CLAIMS, ""),
        (WORKLOADS, ""),
    ]
    found = [
        _informer(app, resource, selector, namespace)
        for namespace in app.settings.namespaces or (None,)
        for resource, selector in kinds
    ]
    return found if app.settings.namespaces else [*found, _informer(app, NODES, "", None)]


def _informer(app: App, resource: Resource, selector: str, namespace: str | None) -> Informer[Any]:
    cached = app.caches.of(resource.kind)
    assert cached is not None
    cache, project = cached
    return Informer(
        app.kube,
        resource,
        cache,
        project,
        lambda value: app.changed(resource, value),
        namespace=namespace,
        selector=selector,
        find=(lambda: app.kube.served(resource)) if resource == WORKLOADS else None,
    )


async def watch_own_kinds(app: App, stop: asyncio.Event | None) -> None:
    registry = kopf.OperatorRegistry()

    async def login(**_: Any) -> kopf.ConnectionInfo:
        return connection(await load_configuration(app.settings))

    handlers.register(registry, app, login)
    namespaces = app.settings.namespaces
    await kopf.operator(
        registry=registry,
        settings=handlers.kopf_settings(scanning=not namespaces),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
    )


def connection(configuration: Any) -> kopf.ConnectionInfo:
    """Kopf asks again after a 401, so a token that was rotated is read anew."""
    token = configuration.api_key.get("BearerToken", "")
    scheme, _, secret = token.rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        ca_data=configuration.ca_cert_data,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        scheme=(scheme or "Bearer") if secret else None,
        token=secret or None,
    )


async def work(app: App) -> None:
    """One of several workers: passes, one key at a time."""
    while True:
        key = await app.queue.get()
        try:
            await one_pass(app, key)
        finally:
            app.queue.done(key)


async def one_pass(app: App, key: Key) -> None:
    """A pass that fails is tried again later, by key, whatever went wrong: no object may stop the others."""
    began = time.monotonic()
    outcome = "done"
    about = {"kind": key.kind, "namespace": key.namespace, "name_": key.name}
    try:
        wake = await RECONCILERS[key.kind](app, key)
    except ApiError as error:
        outcome = "failed"
        delay = app.queue.failed(key, at_least=error.retry_after)
        logger.warning("%s: %s; again in %.1f s", key, error, delay, extra=about)
    except Exception:
        outcome = "crashed"
        logger.exception("%s: again in %.1f s", key, app.queue.failed(key), extra=about)
    else:
        app.queue.succeeded(key)
        resync = app.settings.resync_seconds * random.uniform(0.9, 1.1)
        if wake is not None:
            app.queue.add_after(key, min(wake, resync))
    app.metrics.passes.labels(key.kind, outcome).inc()
    app.metrics.pass_seconds.labels(key.kind).observe(time.monotonic() - began)


def poller(app: App) -> Poller:
    settings = app.settings

    def news(leader: Leader) -> None:
        app.queue.add(Key(FINETUNEJOBS.kind, leader.namespace, leader.job))

    def told(answered: bool) -> None:
        app.metrics.polls.labels("answered" if answered else "silent").inc()

    return Poller(
        app.board,
        app.pull,
        lambda: jobs.leaders(app),
        news,
        told,
        app.now,
        every=settings.poll_seconds,
        rate=settings.poll_rate,
    )


def ailments(app: App, informers: list[Informer[Any]], lag: health.LoopLag) -> list[str]:
    now = time.monotonic()
    return health.ailments(
        silences=[(informer.resource.plural, now - informer.last_activity) for informer in informers],
        deaf=sorted(app.deaf),
        stuck_for=app.queue.stuck_for(),
        longest_pass=app.queue.longest_pass(),
        lag=lag.worst(),
    )


def refresh(app: App, lag: health.LoopLag) -> None:
    app.metrics.queue_depth.set(len(app.queue))
    app.metrics.loop_lag.set(lag.worst())

"""What the watches miss, and the process as a cluster runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.operator.world import World, running
from tests.support.process import bounded
from tests.support.wait import wait_for

from tuneward_operator import sweep
from tuneward_operator.app import App
from tuneward_operator.jobs import reconcile
from tuneward_operator.kube import (
    FINETUNEDMODELS,
    FINETUNEJOBS,
    JOBS,
    MODELSERVERS,
    PODS,
    Kube,
    Resource,
    load_configuration,
)
from tuneward_operator.queue import Key
from tuneward_operator.settings import Settings

pytestmark = pytest.mark.cluster


async def deaf_app(world: World) -> App:
    """An operator's inside without any watch: it knows what the test tells it."""
    settings = Settings(kubeconfig=str(world.operators.cluster.kubeconfig), namespaces=(world.namespace,))
    kube = Kube(await load_configuration(settings), settings)

    async def nobody(ip: str, port: int, path: str) -> bytes:
        raise ConnectionRefusedError(f"{ip}:{port}{path}")

    return App(settings=settings, kube=kube, pull=nobody)


async def test_a_job_deleted_while_the_watch_was_down_stays_deleted(world: World) -> None:
    world.operators.end_shared()
    app = await deaf_app(world)
    ghost = world.submit()
    app.seen(FINETUNEJOBS, "ADDED", ghost)
    world.delete("FineTuneJob", "bot")
    key = Key("FineTuneJob", world.namespace, "bot")
    assert await reconcile(app, key) == 0
    assert await reconcile(app, key) is None
    assert not world.list("Job")
    assert len(app.caches.finetunejobs) == 0
    await app.kube.close()


async def test_a_job_suspended_a_moment_ago_is_not_launched_on_the_old_word(world: World) -> None:
    world.operators.end_shared()
    app = await deaf_app(world)
    app.seen(FINETUNEJOBS, "ADDED", world.submit())
    world.patch("FineTuneJob", "bot", {"spec": {"suspend": True}})
    key = Key("FineTuneJob", world.namespace, "bot")
    assert await reconcile(app, key) == 0
    assert not world.list("Job")
    await reconcile(app, key)
    assert world.status()["phase"] == "Suspended"
    await app.kube.close()


async def test_the_sweep_finds_ghosts_and_a_deaf_watch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CONFIRM_SECONDS", 0)
    world.operators.end_shared()
    app = await deaf_app(world)
    app.seen(FINETUNEJOBS, "ADDED", world.submit("ghost"))
    world.delete("FineTuneJob", "ghost")
    world.submit("unheard")
    await sweep.sweep(app, FINETUNEJOBS)
    assert [view.name for view in app.caches.finetunejobs] == ["unheard"]
    assert app.deaf == {"finetunejobs"}
    await app.kube.close()


def test_the_next_gang_waits_for_a_pod_that_is_still_ending(world: World) -> None:
    """A pod that was bound to a node keeps its object until a kubelet says that its processes are gone."""
    world.share_operator()
    world.submit()
    world.prepare_done()
    (pod,) = world.pods_of("bot-a1")
    name = pod["metadata"]["name"]
    node = f"node-{world.namespace}"
    made = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}
    assert world.api.post("/api/v1/nodes", json=made).is_success
    binding = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": name},
        "target": {"kind": "Node", "name": node},
    }
    assert world.api.post(world.path("Pod", name, "binding"), json=binding).is_success
    world.leader(pod, attempt=1, step=10)
    world.wait_phase("Running")
    world.delete("Pod", name)
    world.wait_phase("Recovering")
    world.wait_gone("Job", "bot-a1")
    assert world.find("Pod", name) is not None
    waiting = "WaitingForOldPods"
    wait_for(lambda: world.condition("Reconciling")["reason"] == waiting, what=waiting)
    assert world.find("Job", "bot-a2") is None
    world.delete("Pod", name, now=True)
    world.pods_of("bot-a2")
    world.api.delete(f"/api/v1/nodes/{node}")


def test_the_process_starts_by_its_module_answers_and_ends_by_sigterm(world: World, tmp_path: Path) -> None:
    world.operators.end_shared()
    log = tmp_path / "log"
    port = 20000 + os.getpid() % 10000
    command = [
        *(sys.executable, "-m", "tuneward_operator", "run", "--namespaces", world.namespace),
        *("--health-host", "127.0.0.1", "--health-port", str(port)),
    ]
    environment = {**os.environ, "KUBECONFIG": str(world.operators.cluster.kubeconfig)}
    with log.open("w") as file, bounded(subprocess.Popen(command, stderr=file, env=environment)) as process:
        world.submit()
        world.wait("Job", "bot-prepare")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert client.get("/livez").text == "ok"
            metrics = client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert 'tuneward_objects_created_total{kind="Job"} 1.0' in metrics
    assert '"phase":"Validating"' in log.read_text()
    assert "Traceback" not in log.read_text()


def test_deleting_a_running_job_leaves_no_orphan(world: World) -> None:
    world.share_operator()
    world.submit()
    running(world)
    world.delete("FineTuneJob", "bot")
    kinds = ("Job", "Pod", "Service", "ConfigMap")
    wait_for(lambda: not any(world.list(kind, "tuneward.dev/job=bot") for kind in kinds), what="its objects to go")
    assert world.find("PersistentVolumeClaim", "tuneward-store") is not None


@pytest.mark.parametrize("resource", [FINETUNEJOBS, FINETUNEDMODELS, MODELSERVERS, JOBS, PODS], ids=lambda item: item.plural)
async def test_a_sweep_over_nothing_finds_nothing(world: World, resource: Resource) -> None:
    """The API server writes `items: null` for a list of metadata that holds nothing."""
    world.operators.end_shared()
    app = await deaf_app(world)
    try:
        assert await sweep.drop_ghosts(app, resource, world.namespace) == {}
    finally:
        await app.kube.close()

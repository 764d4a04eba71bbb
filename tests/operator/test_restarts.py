"""Operators killed and replaced, against the real API server."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.operator.assassin import Assassin
from tests.operator.world import World, result, running
from tests.support.api import Object, client
from tests.support.wait import wait_for

pytestmark = pytest.mark.cluster


def test_another_version_with_other_images_changes_nothing_of_a_running_job(world: World) -> None:
    old = world.operate()
    world.submit()
    pod = running(world)
    kinds = [("Job", "bot-a1"), ("Job", "bot-prepare"), ("ConfigMap", "bot-request"), ("ConfigMap", "bot-plan")]
    before = [_ours(world.get(*kind)) for kind in kinds]
    world.kill(old)
    world.operate("--image-trainer", "trainer:2", "--run-as-user", "1000")
    world.patch("FineTuneJob", "bot", {"metadata": {"labels": {"seen": "yes"}}})
    leader = world.leaders[-1]
    leader.progress |= {"step": 50}
    wait_for(lambda: world.status()["progress"]["step"] == 50, what="the new operator to report progress")
    assert [_ours(world.get(*kind)) for kind in kinds] == before

    world.ends(pod, 137)
    (again,) = world.pods_of("bot-a2")
    assert again["spec"]["containers"][0]["image"] == "trainer:1"


def test_a_job_deleted_while_the_operator_was_down_stays_deleted(world: World) -> None:
    operator = world.operate()
    world.submit()
    running(world)
    world.kill(operator)
    world.delete("FineTuneJob", "bot")
    world.wait_gone("Job", "bot-a1")
    world.operate()
    world.submit("other")
    world.wait("Job", "other-prepare")
    assert world.find("FineTuneJob", "bot") is None
    assert not world.list("Job", "tuneward.dev/job=bot")


def test_a_finished_job_whose_children_were_deleted_never_trains_again(world: World) -> None:
    operator = world.operate()
    world.submit()
    pod = running(world)
    world.ends(pod, 0, result(pod, 1))
    world.finish_done()
    world.wait_phase("Succeeded")
    for kind, name in [
        *(("Job", f"bot-{part}") for part in ("prepare", "a1", "finish")),
        *(("ConfigMap", f"bot-{part}") for part in ("request", "plan")),
        ("Service", "bot-gang"),
    ]:
        world.delete(kind, name)
    world.kill(operator)
    world.operate()
    world.submit("other")
    world.wait("Job", "other-prepare")
    assert not world.list("Job", "tuneward.dev/job=bot")
    assert world.status()["phase"] == "Succeeded"


def _ours(found: Object) -> Object:
    """All that is not the Job controller's."""
    metadata = {key: found["metadata"].get(key) for key in ("uid", "generation", "labels", "annotations", "ownerReferences")}
    return {"metadata": metadata, "spec": found.get("spec"), "data": found.get("data")}


@pytest.mark.parametrize("after", [True, False], ids=["answer-lost", "write-lost"])
def test_an_operator_killed_at_every_write_doubles_and_loses_nothing(world: World, tmp_path: Path, after: bool) -> None:
    """Each write of a job's whole life kills the operator once; a fresh one goes on from what is there."""
    victims: list[int] = []
    stop = threading.Event()

    api = client(world.operators.cluster.kubeconfig)
    assassin = Assassin(api, tmp_path, lambda: world.kill(victims[-1]), after=after)

    def resurrect() -> None:
        while not stop.wait(0.02):
            if not victims or not world.operators.alive(victims[-1]):
                flags = ("--namespaces", world.namespace, "--retry-seconds", "0")
                victims.append(world.operators.start(*flags, kubeconfig=assassin.kubeconfig))

    world.operators.end_shared()
    thread = threading.Thread(target=resurrect, daemon=True)
    thread.start()
    try:
        world.submit()
        pod = running(world)
        world.ends(pod, 0, result(pod, 1))
        world.finish_done()
        status = world.wait_phase("Succeeded", timeout=120)
    finally:
        stop.set()
        thread.join(60)
        assassin.close()
        api.close()
    assert sorted(assassin.created) == [
        "ConfigMap/bot-plan",
        "ConfigMap/bot-request",
        "FineTunedModel/bot-abababab",
        "Job/bot-a1",
        "Job/bot-finish",
        "Job/bot-prepare",
        "PersistentVolumeClaim/tuneward-store",
        "Service/bot-gang",
    ]
    assert (status["launches"], status["attemptCount"]) == (1, 1)
    assert "retries" not in status
    assert len(victims) > len(assassin.created)

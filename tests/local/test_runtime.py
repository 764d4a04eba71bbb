"""The runtime's three ways of making containers, each with what a training asks of it.

The other modules run on whatever way the machine allows, and break the two with namespaces (test_faults); here each
is chosen, so that a machine with all privileges also proves the way of an ordinary Docker container, where no
namespace is allowed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.local.machine import Machine, Namespace, User, claim, container_of, machine, pod, sh
from tests.support.cluster import SANDBOX
from tests.support.wait import wait_for

pytestmark = pytest.mark.pods


@dataclass(frozen=True)
class By(User):
    """Us, by the way of that name; the third is the one that an ordinary container leaves."""

    def environment(self, home: Path) -> dict[str, str]:
        known = super().environment(home)
        return known if self.caged else {**known, "TUNEWARD_LOCAL_WAY": self.name}


WAYS = [By("root")] * (os.geteuid() == 0) + [By("userns"), By("notify", caged=True)]


@pytest.fixture(scope="module", params=WAYS, ids=lambda by: by.name)
def made(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine(request.param) as started:
        started.up()
        yield started


ASKS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
CLONE, SETNS, MOUNT, UNSHARE, PIVOT_ROOT, NEWUSER, SIGCHLD = 56, 308, 165, 272, 155, 0x10000000, 17
def refused(number, *arguments):
    found = libc.syscall(number, *arguments, 0, 0, 0)
    if found == 0 and number == CLONE:
        os._exit(0)
    return found < 0 and ctypes.get_errno() == 1
plain = refused(CLONE, SIGCHLD, 0)
own = os.open("/proc/self/ns/uts", os.O_RDONLY)
asked = [(CLONE, NEWUSER | SIGCHLD, 0), (UNSHARE, NEWUSER), (SETNS, own, 0), (MOUNT, 0, 0), (PIVOT_ROOT, 0, 0)]
print(plain, [refused(*one) for one in asked], os.path.exists("/dev/kmsg"))
"""


def test_the_sandbox_is_as_strict_as_an_ordinary_container() -> None:
    done = subprocess.run(
        [sys.executable, str(SANDBOX), sys.executable, "-c", ASKS],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == f"False {[True] * 5} {os.geteuid() != 0 and Path('/dev/kmsg').exists()}\n"


def test_the_way_is_said(made: Machine) -> None:
    assert json.loads((made.data / "ready").read_text())["way"] == made.user.name


@pytest.fixture
def ns(made: Machine) -> Namespace:
    return Namespace.fresh(made)


TRAIN = """
import os, socket, torch, torch.distributed as dist
rank = int(os.environ["JOB_COMPLETION_INDEX"])
dist.init_process_group("gloo", init_method="tcp://gang-0.gang:29517", rank=rank, world_size=2)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
os.makedirs(f"/mnt/run/checkpoints/{rank}", exist_ok=True)
torch.save(total, f"/mnt/run/checkpoints/{rank}/new")
os.chdir("/mnt/run/checkpoints")
os.rename(f"{rank}/new", f"/mnt/run/{rank}.pt")
print(socket.gethostname(), torch.load(f"../{rank}.pt").item(), os.getcwd(), open("/etc/tuneward/plan.json").read())
"""


def test_a_gang_trains_over_gloo_in_restricted_pods_on_a_shared_store(ns: Namespace) -> None:
    ns.create(claim("store"))
    ns.kubectl("create", "configmap", "plan", "--from-literal=plan.json={}")
    ns.kubectl("create", "service", "clusterip", "gang", "--clusterip=None", "--tcp=29517")
    ns.kubectl("patch", "service", "gang", "-p", '{"spec": {"publishNotReadyAddresses": true, "selector": {"app": "gang"}}}')
    worker = pod(
        "gang",
        ["python", "-c", TRAIN],
        subdomain="gang",
        securityContext={
            "runAsNonRoot": True, "runAsUser": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"},
        },
        volumes=[
            {"name": "store", "persistentVolumeClaim": {"claimName": "store"}},
            {"name": "plan", "configMap": {"name": "plan"}},
        ],
        container={
            "securityContext": {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            },
            # Python's import of torch may want one (dill does, where it is installed), and the root is read-only.
            "env": [{"name": "TMPDIR", "value": "/mnt/run"}],
            "volumeMounts": [
                {"name": "store", "mountPath": "/mnt/run", "subPath": "jobs/one"},
                {"name": "plan", "mountPath": "/etc/tuneward"},
            ],
        },
    )  # fmt: skip
    template = {"metadata": {"labels": {"app": "gang"}}, "spec": worker["spec"]}
    spec = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0, "template": template}
    ns.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "gang"}, "spec": spec})
    ns.await_job("gang", "Complete", timeout=120)
    said = sorted(ns.kubectl("logs", "-l", "app=gang").splitlines())
    assert said == [f"gang-{rank} 3.0 /mnt/run/checkpoints {{}}" for rank in range(2)]


@pytest.mark.parametrize("made", WAYS[-1:], indirect=True, ids=["notify"])
def test_a_killed_shim_takes_the_whole_container_along(ns: Namespace) -> None:
    ns.create(pod("main", sh("sleep 7531 & exec sleep 7532")))
    ns.await_pod("main", "Running")
    for pid, command in ns.machine.processes().items():
        if command.startswith("tuneward-shim run"):
            os.kill(pid, signal.SIGKILL)
    assert container_of(ns.await_pod("main", "Failed"))["state"]["terminated"]["exitCode"] == 137

    def sleepers() -> list[str]:
        return [command for command in ns.machine.processes().values() if command.startswith("sleep 753")]

    wait_for(lambda: not sleepers(), what="both processes to end")


def test_many_pods_run_at_once_and_each_ends_with_its_children(ns: Namespace) -> None:
    count = 40
    worker = pod("unused", sh("sleep 7541 & echo on"))
    template = {"metadata": {"labels": {"app": "many"}}, "spec": worker["spec"]}
    spec = {"completions": count, "parallelism": count, "template": template}
    started = time.monotonic()
    ns.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "many"}, "spec": spec})
    ns.await_job("many", "Complete", timeout=240)
    print(f"{count} pods in {time.monotonic() - started:.1f} s")
    assert not [command for command in ns.machine.processes().values() if command.startswith("sleep 7541")]


def test_exec_gives_a_terminal(ns: Namespace) -> None:
    ns.create(pod("main", sh("exec sleep 600")))
    ns.await_pod("main", "Running")
    # kubectl asks for a terminal only where it has one itself; script(1) gives it one.
    inner = f"{ns.machine.binaries}/tuneward-local kubectl --kubeconfig {ns.machine.data}/kubeconfig -n {ns.name}"
    done = ns.machine.cluster.kubectl("-n", ns.name, "exec", "main", "--", "sh", "-c", "tty || true")
    assert "not a tty" in done
    asked = ["script", "-qec", f"{inner} exec -it main -- sh -c 'tty > /dev/null && echo yes, $(hostname)'", "/dev/null"]
    assert "yes, main" in subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.mark.parametrize("made", WAYS[-1:], indirect=True, ids=["notify"])
def test_containers_run_on_and_are_adopted_after_a_kill(ns: Namespace) -> None:
    ns.create(
        pod(
            "counts",
            sh("cd /data; i=0; while :; do i=$((i+1)); echo $i | tee last; sleep 0.1; done"),
            volumes=[{"name": "data", "emptyDir": {}}],
            container={"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        )
    )
    before = container_of(ns.await_pod("counts", "Running"))
    wait_for(lambda: "3" in ns.logs("counts").split(), what="some numbers")
    ns.machine.signal_server(signal.SIGKILL)
    ns.machine.up()
    after = container_of(ns.await_pod("counts", "Running"))
    assert (after["containerID"], after["restartCount"]) == (before["containerID"], 0)
    seen = int(ns.kubectl("exec", "counts", "--", "cat", "/data/last"))
    wait_for(lambda: int(ns.logs("counts", tailLines=1)) > seen, what="numbers of after the restart")
    numbers = [int(line) for line in ns.logs("counts").split()]
    assert numbers == list(range(1, len(numbers) + 1))

"""The command line: what it prints and its exit codes, which other programs lean on."""

from __future__ import annotations

import json
import signal

import pytest
from tests.local.machine import Machine

pytestmark = pytest.mark.cluster


def test_up_detached_returns_when_the_cluster_is_usable(own: Machine) -> None:
    done = own.run("up", "--control-plane-only", "--detach", "--no-fsync", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ready {own.data / 'kubeconfig'}\n"
    assert own.cluster.kubectl("get", "serviceaccount", "default", "-o", "name") == "serviceaccount/default\n"
    assert own.cluster.kubectl("get", "nodes", "-o", "name") == ""
    assert own.cluster.kubectl("config", "current-context") == "tuneward\n"


def test_up_detached_outlives_what_started_it_and_down_ends_it(own: Machine) -> None:
    assert own.run("up", "--control-plane-only", "--detach", timeout=120).returncode == 0
    assert own.server_pid() in own.processes()
    own.down()
    assert own.processes() == {}


def test_ready_names_process_and_address(own: Machine) -> None:
    pid = own.up("--control-plane-only")
    ready = json.loads((own.data / "ready").read_text())
    assert ready["pid"] == pid
    assert ready["apiURL"].startswith("https://127.0.0.1:")
    assert ready["version"] == "v1.36.3"
    assert {"startedAt", "way"} <= set(ready)


def test_status_follows_the_life_of_a_cluster(own: Machine) -> None:
    assert own.run("status").returncode == 3
    pid = own.up("--control-plane-only")
    shown = own.run("status", "--output", "json")
    assert shown.returncode == 0, shown.stderr
    status = json.loads(shown.stdout)
    assert (status["running"], status["pid"], status["nodes"]) == (True, pid, 0)
    assert status["kubeconfig"] == str(own.data / "kubeconfig")
    own.signal_server(signal.SIGKILL)
    ended = own.run("status", "--output", "json")
    assert (ended.returncode, json.loads(ended.stdout)["running"]) == (3, False)


def test_a_restart_keeps_address_and_objects(own: Machine) -> None:
    own.up("--control-plane-only")
    address = json.loads((own.data / "ready").read_text())["apiURL"]
    own.cluster.kubectl("create", "namespace", "kept")
    own.signal_server(signal.SIGKILL)
    own.up("--control-plane-only")
    assert json.loads((own.data / "ready").read_text())["apiURL"] == address
    assert own.cluster.kubectl("get", "namespace", "kept", "-o", "name") == "namespace/kept\n"


def test_the_log_goes_where_it_is_told(mine: Machine) -> None:
    log = mine.data.parent / "elsewhere.log"
    mine.up("--control-plane-only", "--log", str(log))
    assert log.stat().st_size > 0
    assert not (mine.data / "local.log").exists()


def test_down_of_what_does_not_run_is_no_error(own: Machine) -> None:
    own.down()
    own.down("--purge")
    own.down("--purge")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["up", "--fake-gpus", "-2"], "--fake-gpus"),
        (["up", "--image", "noroot"], "--image"),
        (["up", "--no-such-flag"], "--no-such-flag"),
        (["status", "--output", "xml"], "--output"),
        (["dwon"], "dwon"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else value,
)
def test_a_wrong_command_line_is_named_in_one_line(mine: Machine, arguments: list[str], named: str) -> None:
    refused = mine.run(*arguments)
    assert refused.returncode == 2
    assert named in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not mine.processes()

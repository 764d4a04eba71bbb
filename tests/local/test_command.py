"""The command line: what it prints and its exit codes, which other programs lean on."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from tests.local.conftest import BY_USER
from tests.local.machine import Machine, machine

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", params=BY_USER)
def alive(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A running control plane, by each user in turn."""
    with machine(request.param) as made:
        assert made.run("status").returncode == 3
        made.up("--control-plane-only", "--log", str(made.data.parent / "elsewhere.log"))
        yield made


def test_up_detached_returns_when_the_cluster_is_usable_and_down_ends_it(own: Machine) -> None:
    done = own.run("up", "--control-plane-only", "--detach", "--no-fsync", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ready {own.data / 'kubeconfig'}\n"
    assert own.cluster.kubectl("get", "serviceaccount", "default", "-o", "name") == "serviceaccount/default\n"
    assert own.cluster.kubectl("get", "nodes", "-o", "name") == ""
    assert own.cluster.kubectl("config", "current-context") == "tuneward\n"
    assert own.server_pid() in own.processes()
    own.down()
    assert own.processes() == {}


def test_ready_names_process_and_address(alive: Machine) -> None:
    ready = json.loads((alive.data / "ready").read_text())
    assert ready["pid"] == alive.server_pid()
    assert ready["apiURL"].startswith("https://127.0.0.1:")
    assert ready["version"] == "v1.36.3"
    assert {"startedAt", "way"} <= set(ready)


def test_status_tells_what_runs(alive: Machine) -> None:
    shown = alive.run("status", "--output", "json")
    assert shown.returncode == 0, shown.stderr
    status = json.loads(shown.stdout)
    assert (status["running"], status["pid"], status["nodes"]) == (True, alive.server_pid(), 0)
    assert status["kubeconfig"] == str(alive.data / "kubeconfig")


def test_a_second_start_in_the_same_directory_is_refused(alive: Machine) -> None:
    refused = alive.run("up")
    assert refused.returncode == 1
    assert str(alive.data) in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_the_log_goes_where_it_is_told(alive: Machine) -> None:
    assert (alive.data.parent / "elsewhere.log").stat().st_size > 0
    assert not (alive.data / "local.log").exists()


def test_a_restart_keeps_address_and_objects(alive: Machine) -> None:
    address = json.loads((alive.data / "ready").read_text())["apiURL"]
    alive.cluster.kubectl("create", "namespace", "kept")
    alive.signal_server(signal.SIGKILL)
    ended = alive.run("status", "--output", "json")
    assert (ended.returncode, json.loads(ended.stdout)["running"]) == (3, False)
    alive.up("--control-plane-only", "--log", str(alive.data.parent / "elsewhere.log"))
    assert json.loads((alive.data / "ready").read_text())["apiURL"] == address
    assert alive.cluster.kubectl("get", "namespace", "kept", "-o", "name") == "namespace/kept\n"


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

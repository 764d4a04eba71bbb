from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serving.processes import AgentProcess, Engine, running
from tests.serving.tiny import make_adapter, make_model
from tests.support.wait import wait_for

from tuneward_api.files import WantedAdapter

MAX_RANK, MAX_ADAPTERS = 8, 4
KEY = "s3cret"


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny-1.0")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store's adapters folder; tests add to it."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def good(adapters: Path, base_model: Path) -> WantedAdapter:
    return make_adapter(adapters, base_model, name="ft:tiny-1.0:good:20261125:00000001", seed=1)


@pytest.fixture(scope="session")
def other(adapters: Path, base_model: Path) -> WantedAdapter:
    return make_adapter(adapters, base_model, name="ft:tiny-1.0:other:20261125:00000002", seed=2, rank=2)


@pytest.fixture(scope="session")
def dora(adapters: Path, base_model: Path) -> WantedAdapter:
    return make_adapter(adapters, base_model, name="ft:tiny-1.0:dora:20261125:00000003", seed=3, dora=True)


@pytest.fixture(scope="session")
def engine(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One for the session: it takes 10 s to import torch. Tests leave no adapter behind."""
    limits = ["--max-adapters", str(MAX_ADAPTERS), "--max-rank", str(MAX_RANK)]
    served = Engine(
        ["engine", "--model", str(base_model), *limits],
        "/health",
        tmp_path_factory.mktemp("engine") / "log",
        {"TUNEWARD_API_KEY": KEY},
    )
    with running(served):
        yield served


@pytest.fixture(scope="module")
def agent_process(
    engine: Engine, base_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    """Of the module: it unloads whatever tests of another one load."""
    folder = tmp_path_factory.mktemp("agent")
    places = ["--adapters", str(adapters), "--model", str(base_model), "--wanted", str(folder / "adapters.json")]
    limits = ["--max-adapters", str(MAX_ADAPTERS), "--max-rank", str(MAX_RANK), "--interval", "0.1"]
    served = AgentProcess(
        ["agent", "--engine", engine.url, *places, *limits], "/readyz", folder / "log", {"TUNEWARD_API_KEY": KEY}
    )
    with running(served):
        yield served


@pytest.fixture
def agent(agent_process: AgentProcess, engine: Engine) -> Iterator[AgentProcess]:
    yield agent_process
    agent_process.want([])
    agent_process.settled([])
    wait_for(lambda: len(engine.names()) == 1, what="an engine without adapters")

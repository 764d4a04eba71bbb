"""The agent as a process beside a real engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.serving.conftest import MAX_ADAPTERS, MAX_RANK
from tests.serving.processes import AgentProcess, Engine
from tests.serving.tiny import edit_config, edit_tensors, make_adapter, make_model, spoil_with_nan, zero_every_b
from tests.support.wait import wait_for

from tuneward_api.conditions import Reason
from tuneward_api.files import WantedAdapter


def test_a_good_adapter_is_loaded_proved_and_unloaded_when_no_longer_wanted(
    engine: Engine, agent: AgentProcess, good: WantedAdapter, other: WantedAdapter
) -> None:
    agent.want([good, other])
    found = agent.settled([good, other])
    assert {name: (proof.ready, proof.reason) for name, proof in found.items()} == {
        good.name: (True, Reason.VERIFIED),
        other.name: (True, Reason.VERIFIED),
    }
    assert engine.names() == {"tiny-1.0", good.name, other.name}
    agent.want([other])
    wait_for(lambda: engine.names() == {"tiny-1.0", other.name}, what="the engine without it")
    assert agent.settled([other])[other.name].ready
    metrics = agent.get("/metrics").text
    assert "tuneward_agent_ready_adapters 1.0" in metrics
    assert 'tuneward_agent_proofs_total{reason="Verified"}' in metrics


def _fresh(adapters: Path, model: Path) -> Callable[..., WantedAdapter]:
    def make(name: str, **how: object) -> WantedAdapter:
        return make_adapter(adapters, model, name=name, seed=sum(name.encode()), **how)  # type: ignore[arg-type]

    return make


@pytest.fixture
def refused(adapters: Path, base_model: Path, good: WantedAdapter, tmp_path: Path) -> dict[str, WantedAdapter]:
    """By the reason that each must get."""
    make = _fresh(adapters, base_model)
    changed = make("changed-later")
    shutil.copy(adapters / good.path / "adapter" / "adapter_model.safetensors", adapters / changed.path / "adapter")
    return {
        "changed": changed,
        "digest": good.model_copy(update={"name": "wrong-digest", "digest": f"sha256:{'0' * 64}"}),
        "missing": good.model_copy(update={"name": "missing", "path": f"sha256-{'0' * 64}"}),
        "nan": make("nan", edit=edit_tensors(spoil_with_nan)),
        "shapes": _fresh(adapters, make_model(tmp_path / "wider", hidden=48))("wider"),
        "rank": make("rank", rank=MAX_RANK + 1),
        "zero": make("zero", edit=edit_tensors(zero_every_b)),
        "scaled": make("scaled", edit=edit_config(lora_alpha=16)),
        "unloadable": make("unloadable", edit=edit_config(target_modules=["no_such_layer"])),
    }


EXPECTED = {
    "changed": (Reason.DIGEST_MISMATCH, "adapter_model.safetensors was changed after it was finished"),
    "digest": (Reason.DIGEST_MISMATCH, "expected sha256:0000"),
    "missing": (Reason.ARTIFACT_MISSING, "is not (or not completely) in the store's adapters folder"),
    "nan": (Reason.NOT_FINITE, "holds NaN or infinity"),
    "shapes": (Reason.STRUCTURE_MISMATCH, "do not fit the base's [32, 64]"),
    "rank": (Reason.RANK_TOO_LARGE, f"rank 9 exceeds the server's maxRank {MAX_RANK}; raise spec.maxRank"),
    "zero": (Reason.NO_EFFECT, "every lora_B is zero"),
    "scaled": (Reason.PROOF_FAILED, "the adapter's log-probabilities differ from the trainer's by"),
    "unloadable": (Reason.LOAD_FAILED, "the engine refused to load it: the adapter does not fit the base model"),
}


def test_each_bad_adapter_is_never_ready_and_the_report_says_why(
    engine: Engine, agent: AgentProcess, refused: dict[str, WantedAdapter]
) -> None:
    """In groups, because a server holds no more than maxAdapters."""
    cases = list(refused.items())
    for start in range(0, len(cases), MAX_ADAPTERS):
        group = dict(cases[start : start + MAX_ADAPTERS])
        agent.want(list(group.values()))
        found = agent.settled(list(group.values()))
        for case, wanted in group.items():
            reason, sentence = EXPECTED[case]
            proof = found[wanted.name]
            assert (proof.ready, proof.reason) == (False, reason), proof
            assert sentence in proof.message
        wait_for(lambda: engine.names() == {"tiny-1.0"}, what="an engine that answers with none of them")


def test_adapters_beyond_the_limit_wait_and_a_late_artifact_is_found(
    agent: AgentProcess, adapters: Path, base_model: Path, good: WantedAdapter
) -> None:
    late = make_adapter(adapters, base_model, name="late", seed=99)
    shutil.move(adapters / late.path, adapters / ".hidden")
    missing = [good.model_copy(update={"name": f"absent-{n}", "path": f"sha256-{n}"}) for n in range(MAX_ADAPTERS - 1)]
    agent.want([late, *missing, good])
    found = agent.settled([late, *missing, good])
    assert found[good.name].reason == Reason.TOO_MANY_ADAPTERS
    assert found["late"].reason == Reason.ARTIFACT_MISSING
    shutil.move(adapters / ".hidden", adapters / late.path)
    wait_for(lambda: agent.settled([late, *missing, good])["late"].ready, what="the late artifact")


def test_a_killed_engine_gets_its_adapters_back_with_nobody_else_around(
    engine: Engine, agent: AgentProcess, good: WantedAdapter, other: WantedAdapter
) -> None:
    agent.want([good, other])
    assert all(proof.ready for proof in agent.settled([good, other]).values())
    engine.kill()
    wait_for(lambda: not agent.report().base_ready, what="an agent that noticed")
    assert [proof.ready for proof in agent.report().adapters] == [False, False]
    assert agent.get("/readyz").status_code == 503
    assert agent.get("/healthz").status_code == 200
    engine.start()
    engine.wait_ready()
    assert engine.names() <= {"tiny-1.0", good.name, other.name}
    wait_for(agent._ready, what="a ready agent")
    assert all(proof.ready for proof in agent.settled([good, other]).values())
    assert engine.names() == {"tiny-1.0", good.name, other.name}


def test_a_killed_agent_finds_the_adapters_loaded_and_proves_them_again(
    engine: Engine, agent: AgentProcess, good: WantedAdapter
) -> None:
    agent.want([good])
    assert agent.settled([good])[good.name].ready
    agent.kill()
    agent.start()
    agent.wait_ready()
    assert agent.settled([good])[good.name].ready
    assert 'proofs_total{reason="Verified"} 1.0' in agent.get("/metrics").text
    assert engine.names() == {"tiny-1.0", good.name}

"""What is looked at on the device itself: whether a packed row gives there what its documents give one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.jobs import make_job

from tuneward_trainer import attention, patches, probe
from tuneward_trainer.session import Session, conclude
from tuneward_trainer.train import train

ALONE = [name for name in patches.ALL if name != patches.PACKED_ATTENTION]


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes all documents of a row for one."""
    right = attention.packed_attention

    def attend(*given: Any, **named: Any) -> Any:
        bounds = named["cu_seq_lens_q"]
        return right(*given, **named | {"cu_seq_lens_q": bounds[[0, -1]]})

    monkeypatch.setattr(patches, "packed_attention", attend)


def test_a_kernel_that_is_right_is_used(tmp_path: Path, begun: Callable[..., Session]) -> None:
    session = begun(make_job(tmp_path), ahead=False)
    assert probe.kernels_seen_right(session, list(patches.ALL)) == list(patches.ALL)
    assert not session.apart


@pytest.mark.usefixtures("blind")
def test_a_kernel_that_is_wrong_costs_the_packing_and_nothing_else(
    tmp_path: Path, begun: Callable[..., Session], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "asked", lambda session: True)
    job = make_job(tmp_path, hyper={"steps": 3})
    session = begun(job, ahead=False)
    with caplog.at_level(logging.WARNING):
        assert probe.usable(session) == ALONE
    assert "the patch packed-attention is not used: on this device log-probabilities differ by" in caplog.text
    assert session.apart
    train(session)
    conclude(session, seconds=0)
    packing = job.plan.prepared.packing.model_copy(update={"patches": ALONE})
    prepared = job.plan.prepared.model_copy(update={"packing": packing})
    planned = replace(job, plan=job.plan.model_copy(update={"prepared": prepared})).again("planned")
    session = begun(planned, ahead=False)
    monkeypatch.setattr(probe, "asked", lambda session: False)
    train(session)
    conclude(session, seconds=0)
    assert planned.adapter() == job.adapter()


def test_a_kernel_that_fails_is_one_that_is_wrong(
    tmp_path: Path, begun: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(patches, "packed_attention", broken)
    session = begun(make_job(tmp_path), ahead=False)
    assert probe.kernels_seen_right(session, [*patches.ALL, patches.COMPILED]) == ALONE
    assert torch.is_grad_enabled()

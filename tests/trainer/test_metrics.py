"""Figures by step over all attempts: no step twice, none missing, and TensorBoard's records byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tests.trainer.runs import RETRAINED, attempt

from tuneward_trainer import metrics
from tuneward_trainer.events import crc32c, record
from tuneward_trainer.metrics import MetricsLog, history, tags


def test_a_line_is_told_in_the_words_of_trackers() -> None:
    line = {"step": 3, "train_loss": 1.5, "grad_norm": 2, "validation_reward_margin": 0.25, "eta_seconds": 7}
    assert tags(line) == {"train/loss": 1.5, "train/grad_norm": 2.0, "validation/reward_margin": 0.25}


def test_numbers_that_are_not_finite_are_no_figures(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, [])
    log = MetricsLog(tmp_path, 1)
    log.write(step=1, train_loss=float("nan"), grad_norm=1.0, tokens=None)
    log.close()
    assert json.loads((tmp_path / "attempts/1/metrics.jsonl").read_text()) == {"step": 1, "grad_norm": 1.0}


@pytest.mark.parametrize(
    ("before", "losses"),
    [
        (1, {}),
        (2, {0: 9.0, 1: 1.1, 2: 1.2}),
        (3, {0: 9.0, 1: 1.1, 2: 1.2, 3: 2.3}),
        # From the beginning: nothing of what was done before counts.
        (4, {}),
    ],
)
def test_an_attempt_goes_on_with_what_led_to_its_checkpoint(tmp_path: Path, before: int, losses: dict[int, float]) -> None:
    for number, (first, lines) in RETRAINED.items():
        attempt(tmp_path, number, first, lines)
    attempt(tmp_path, 4, 0, [])
    found = history(tmp_path, before)
    assert {line["step"]: line.get("train_loss", line.get("validation_loss")) for line in found} == losses
    assert len(found) == len(losses)


def test_a_line_that_a_kill_has_cut_is_none(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, [{"step": 1, "train_loss": 1.0}])
    with (tmp_path / "attempts/1" / metrics.FILE).open("a") as file:
        file.write('{"step": 2, "train_l')
    attempt(tmp_path, 2, 2, [])
    assert history(tmp_path, 2) == [{"step": 1, "train_loss": 1.0}]


def test_a_checksum_is_castagnolis() -> None:
    # RFC 3720 B.4 and the polynomial's usual check value.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_an_event_is_a_record_that_tensorboard_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    attempt(tmp_path, 12, 300, [])
    log = MetricsLog(tmp_path, 12, 300)
    log.write(step=301, train_loss=1.5)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    time = b"\x09" + bytes(8)
    value = b"\x0a\x11" + b"\x0a\x0atrain/loss" + b"\x15" + struct.pack("<f", 1.5)
    assert file.name == "events.out.tfevents.0000000012.tuneward"
    assert file.read_bytes() == b"".join(
        [
            record(time + b"\x1a\x0dbrain.Event:2"),
            record(time + b"\x10\xad\x02" + b"\x3a\x02\x08\x01"),
            record(time + b"\x10\xad\x02" + b"\x2a" + bytes([len(value)]) + value),
        ]
    )

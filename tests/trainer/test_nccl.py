"""Ranks that NCCL's watchdog ends: their deadlines, and the sentence that is made of what torch wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.trainer.jobs import make_job

from tuneward_api.conditions import Reason
from tuneward_trainer import conclusion, launch, nccl
from tuneward_trainer.progress import Reporter

TIMEOUT = """\
[rank4]:[E1206 18:44:12.252 ProcessGroupNCCL.cpp:607] [Rank 4] Watchdog caught collective operation timeout: \
WorkNCCL(SeqNum=7753, OpType=_REDUCE_SCATTER_BASE, NumelIn=544997376, NumelOut=68124672, Timeout(ms)=900000) ran for \
900102 milliseconds before timing out.
[rank4]:[E1206 18:44:12.260 ProcessGroupNCCL.cpp:1664] [PG 1 Rank 4] Exception (either an error or timeout) detected by \
watchdog at work: 7753, last enqueued NCCL work: 7755, last completed NCCL work: 7752.
terminate called after throwing an instance of 'c10::DistBackendError'
"""
STUCK = """\
[rank1]:[F1206 18:59:12.0 ProcessGroupNCCL.cpp:1500] [PG ID 0 PG GUID 0(default_pg) Rank 1] ProcessGroupNCCL's watchdog got \
stuck for 900 seconds without making progress in monitoring enqueued collectives.
"""
GPU = """\
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank 2] Process group watchdog thread terminated with exception: CUDA error: \
uncorrectable ECC error encountered
CUDA kernel errors might be asynchronously reported at some other API call.
"""
ASSERTION = GPU.replace("uncorrectable ECC error encountered", "device-side assert triggered")
NETWORK = """\
[rank0]: [Rank 0] Process group watchdog thread terminated with exception: NCCL error: remote process exited or there was a \
network error, NCCL version 2.27.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
"""


@pytest.mark.parametrize(
    ("said", "reason", "code", "sentence"),
    [
        ({3: TIMEOUT}, Reason.HANG, 75, "rank 3 waited 900 s for the others in reduce_scatter_base: one of them hangs"),
        ({1: STUCK}, Reason.HANG, 75, "rank 1 got no answer from its GPU's driver for 900 s"),
        ({2: GPU}, Reason.INFRASTRUCTURE, 75, "rank 2 lost its GPU (uncorrectable ECC error encountered); look at"),
        ({2: ASSERTION}, Reason.USER_CODE, 1, "rank 2 was ended by an assertion in a GPU's kernel"),
        ({0: NETWORK}, Reason.INFRASTRUCTURE, 75, "rank 0 lost the others: NCCL says ncclRemoteError: A call failed"),
        # Where one lost its GPU the others only waited for it; of those that waited, the first is named.
        ({0: TIMEOUT, 1: TIMEOUT, 2: TIMEOUT + GPU}, Reason.INFRASTRUCTURE, 75, "rank 2 lost its GPU"),
        ({0: "", 5: TIMEOUT, 1: TIMEOUT}, Reason.HANG, 75, "rank 1 waited"),
        ({0: "corrupted size vs. prev_size"}, Reason.INFRASTRUCTURE, 75, "rank 0 was killed by SIGABRT"),
    ],
)
def test_an_abort_is_explained(tmp_path: Path, said: dict[int, str], reason: Reason, code: int, sentence: str) -> None:
    job = make_job(tmp_path)
    Reporter(tmp_path, 0).update(attempt=1, step=4, steps=12)
    outcome = conclusion.Outcome(dict.fromkeys(said, -6), said=said)
    result = conclusion.conclude(job.plan, job.run, tmp_path, outcome, out_of_memory=False)
    assert (result.reason, result.exit_code, result.step, result.outcome) == (reason, code, 4, "Failed")
    assert result.message.startswith(sentence)


def test_another_signal_is_no_matter_of_nccl(tmp_path: Path) -> None:
    """The agent ends the others, whose logs may hold the same lines."""
    outcome = conclusion.Outcome({0: -9}, said={0: TIMEOUT})
    result = conclusion.conclude(make_job(tmp_path).plan, tmp_path, tmp_path, outcome, out_of_memory=False)
    assert result.message == "rank 0 was killed by SIGKILL"


@pytest.mark.parametrize(("hang", "seconds"), [(None, 900), (3600, 1800), (10, 60)])
def test_a_collective_gives_up_before_the_operator_does(tmp_path: Path, hang: int | None, seconds: int) -> None:
    assert nccl.step_timeout(hang).total_seconds() == seconds
    assert nccl.environment(hang, tmp_path) == {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(seconds),
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(tmp_path / "nccl-trace-"),
    }


def test_what_a_profile_says_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", environment := {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    launch.prepare_environment(launch.Shape(2, 0, 8, gpus=True), {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "X": "1"})
    assert (environment["TORCH_NCCL_DUMP_ON_TIMEOUT"], environment["X"]) == ("0", "1")


def test_last_words_and_traces_are_kept(tmp_path: Path) -> None:
    """As torchrun's agent lays them out."""
    place = tmp_path / "logs/tuneward_x/attempt_0/1"
    place.mkdir(parents=True)
    (place / "stderr.log").write_text("early\n" + "x" * 100_000 + TIMEOUT)
    (tmp_path / "nccl-trace-1").write_bytes(b"\x80\x04N.")
    said = conclusion.last_words(tmp_path, 1)
    assert said.endswith(TIMEOUT)
    assert "early" not in said
    assert conclusion.last_words(tmp_path, 0) == ""
    conclusion.keep_logs(tmp_path / "run", tmp_path, 1)
    kept = tmp_path / "run/attempts/1/logs"
    assert sorted(file.name for file in kept.iterdir()) == ["nccl-trace-1", "worker-0-rank-1.log"]

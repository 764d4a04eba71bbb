"""Workers as pods have them: the command, its exit code, its termination message, its port."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from tests.trainer.jobs import (
    DEADLINE,
    ENV_ROOM,
    Gang,
    Job,
    await_,
    free_port,
    make_job,
    step_lines,
    tiny_config,
    train,
    written,
)
from tests.trainer.test_checkpoint import full_disk

from tuneward_api import manifest
from tuneward_api.conditions import Reason
from tuneward_api.files import Result, Start
from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import conclusion, endings, launch, rundir
from tuneward_trainer.data.documents import TRAINING, DocumentWriter
from tuneward_trainer.progress import Reporter


class Worker:
    """`python -m tuneward_trainer train` with its output in a file."""

    def __init__(self, job: Job, name: str = "worker", **variables: str) -> None:
        self.log = job.run / f"{name}.log"
        environment = {**os.environ, **job.variables(), "TUNEWARD_HTTP_PORT": "0", **variables}
        command = [sys.executable, "-m", "tuneward_trainer", "train", "--plan", str(job.plan_file)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.process.wait(DEADLINE)

    def get(self, path: str) -> str:
        found = re.search(r"progress at (http://[0-9.:]+)/progress", self.said())
        assert found, self.said()
        with urlopen(found[1] + path, timeout=30) as answer:
            text: str = answer.read().decode()
        return text


def sockets(pid: int) -> set[str]:
    """`socket:[INODE]` of each that the process holds."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        # Another may be closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found.add(str(file.readlink()))
    return {link for link in found if link.startswith("socket:")}


def terminated(job: Job) -> Result:
    return Result.model_validate_json((job.run / "termination").read_bytes())


def test_sigterm_on_one_worker_saves_and_ends_both(tmp_path: Path) -> None:
    """Two workers of one rank each, as two pods; SIGTERM reaches one of them."""
    job = make_job(tmp_path, spec={"workers": {"replicas": 2, "gpusPerWorker": 0}}, hyper={"steps": 400})
    gang = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    other = {"JOB_COMPLETION_INDEX": "1", "TUNEWARD_TERMINATION_LOG": str(job.run / "termination-1")}
    workers = [Worker(job, "w0", **gang, JOB_COMPLETION_INDEX="0"), Worker(job, "w1", **gang, **other)]
    await_(lambda: len(step_lines(job)) > 2 or workers[0].process.poll() is not None, workers[0].said)
    assert json.loads(workers[0].get("/progress"))["phase"] == "Training"
    assert "tuneward_steps 400.0" in workers[0].get("/metrics")
    assert "one_step" in workers[1].get("/stacks")
    workers[1].process.send_signal(signal.SIGTERM)
    assert [worker.wait() for worker in workers] == [143, 143], workers[0].said() + workers[1].said()
    result = terminated(job)
    assert (result.outcome, result.exit_code, result.attempt) == ("Stopped", 143, 1)
    assert result.checkpoint is not None
    assert result.checkpoint.step == result.step > 2
    assert Result.model_validate_json((job.run / "termination-1").read_bytes()) == result
    logs = rundir.attempt_directory(job.run, 1) / "logs"
    assert sorted(file.name for file in logs.iterdir()) == ["worker-0-rank-0.log", "worker-1-rank-0.log"]


def test_a_killed_rank_ends_its_worker_at_once_and_is_named(tmp_path: Path) -> None:
    asked = {"workers": {"replicas": 2, "gpusPerWorker": 0}, "trackers": {"wandb": {}}}
    job = make_job(tmp_path, spec=asked, hyper={"steps": 4000})
    status = tmp_path / "status"
    worker = Worker(job, TUNEWARD_STATUS_DIR=str(status))
    await_(lambda: len(step_lines(job)) > 1 or worker.process.poll() is not None, worker.said)
    ranks = [json.loads((status / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)] if worker.said() else []
    assert all(sockets(worker.process.pid).isdisjoint(sockets(rank)) for rank in ranks)
    os.kill(ranks[1], signal.SIGKILL)
    assert worker.wait() == 75
    result = terminated(job)
    assert (result.outcome, result.reason, result.message) == (
        "Failed",
        Reason.INFRASTRUCTURE,
        "rank 1 was killed by SIGKILL",
    )
    assert result.step > 0
    # Which is not installed here: the training did not mind.
    assert [(state.name, "tuneward[wandb]" in state.message) for state in result.trackers] == [("wandb", True)]


@pytest.mark.slow
def test_a_killed_launcher_takes_its_ranks_along_and_costs_no_checkpoint(tmp_path: Path) -> None:
    asked = {"workers": {"replicas": 2, "gpusPerWorker": 0}, "checkpoint": {"everySteps": 3}}
    job = make_job(tmp_path, spec=asked, hyper={"steps": 100})
    whole = train(job.again("whole"))
    status = tmp_path / "status"
    worker = Worker(job, TUNEWARD_STATUS_DIR=str(status))
    saved = (job.run / "checkpoints").glob
    await_(lambda: any(saved("*/MANIFEST.json")) or worker.process.poll() is not None, worker.said)
    ranks = [json.loads((status / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
    worker.process.kill()
    assert worker.wait() == -signal.SIGKILL, worker.said()
    await_(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), worker.said)
    assert train(job, 3).adapter() == whole.adapter()
    assert job.results()[0].from_step > 0


def test_a_taken_port_asks_for_another_try(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        worker = Worker(job, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        assert worker.wait() == 75, worker.said()
    assert terminated(job).reason == Reason.INFRASTRUCTURE
    assert terminated(job).attempt == 0
    assert rundir.attempt_numbers(job.run) == []


def result_of(job: Job, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "attempt": 1, "pod_uid": "", "plan_digest": job.plan.digest(), "outcome": "Failed", "exit_code": 65,
        "reason": Reason.DATA_INVALID, "message": "bad data", "step": 0, "steps": 12, "finished_at": rundir.now(),
    }  # fmt: skip
    return Result(**values | changes)


@pytest.mark.parametrize("code", [0, 65, 78])
def test_a_terminal_result_is_reported_again_and_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    job = make_job(tmp_path)
    result = rundir.write_result(job.run, result_of(job, exit_code=code))
    for name, value in job.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "launch", None)
    assert launch.main(job.plan_file) == code
    assert terminated(job) == result


def test_another_plans_result_is_not_reported(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    rundir.write_result(job.run, result_of(job, plan_digest="sha256:another"))
    rundir.write_result(job.run, result_of(job, attempt=2, exit_code=75))
    assert rundir.terminal_result(job.run, job.plan.digest()) is None


# -- how a rank's end becomes the worker's -----------------------------------------------------------------------------


def conclude(job: Job, status: Path, outcome: conclusion.Outcome, *, out_of_memory: bool = False) -> Result:
    return conclusion.conclude(job.plan, job.run, status, outcome, out_of_memory=out_of_memory)


def leave(status: Path, rank: int, ending: endings.Ending) -> None:
    from tuneward_trainer import train as rank_module

    Reporter(status, rank).update(attempt=1, step=4, steps=12)
    rank_module.leave(status, rank, ending)


def test_the_rank_that_failed_first_by_itself_is_believed(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    lost = endings.Ending(Reason.INFRASTRUCTURE, "another rank went away", 75, secondary=True)
    leave(tmp_path, 0, lost)
    leave(tmp_path, 1, endings.Ending(Reason.OUT_OF_MEMORY, "not enough memory", 1))
    result = conclude(job, tmp_path, conclusion.Outcome({0: 75, 1: 1}))
    assert (result.reason, result.exit_code, result.step, result.attempt) == (Reason.OUT_OF_MEMORY, 1, 4, 1)
    assert rundir.read_result(job.run, 1) == result


def test_a_rank_that_fails_on_its_way_out_takes_no_success_away(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    made = rundir.write_result(job.run, result_of(job, outcome="Succeeded", exit_code=0, reason=Reason.SUCCEEDED))
    leave(tmp_path, 1, endings.Ending(Reason.INFRASTRUCTURE, "the store could not be read or written", 75))
    assert conclude(job, tmp_path, conclusion.Outcome({1: 75})) == made
    assert rundir.read_result(job.run, 1) == made


def test_a_worker_that_only_lost_a_peer_takes_the_others_word(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    leave(tmp_path, 0, endings.Ending(Reason.INFRASTRUCTURE, "another rank went away", 75, secondary=True))
    other = rundir.write_result(job.run, result_of(job, exit_code=78, reason=Reason.CONFIG_INVALID))
    assert conclude(job, tmp_path, conclusion.Outcome({0: 75})) == other


def test_ranks_that_could_not_leave_word_are_known_by_their_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    # Nobody else writes a result here.
    monkeypatch.setattr(rundir, "await_result", lambda *_, **__: None)
    Reporter(tmp_path, 0).update(attempt=1)
    with full_disk():
        leave(tmp_path, 0, endings.Ending(Reason.INFRASTRUCTURE, "the store is full", 75))
    result = conclude(job, tmp_path, conclusion.Outcome({0: 75}))
    assert (result.reason, result.exit_code) == (Reason.INFRASTRUCTURE, 75)
    assert "could not leave word why (rank 0: 75)" in result.message


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (
            "4Gi",
            "lower spec.hyperparameters.sequenceLength from 48 to 16, or raise spec.workers.resources.limits.memory to 5Gi",
        ),
        (
            "512Mi",
            "even rows of 16 tokens need more than a rank's 0.5 GiB: raise spec.workers.resources.limits.memory to 2Gi",
        ),
    ],
    ids=["shorter rows", "no row fits"],
)
def test_a_kill_for_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, said: str) -> None:
    job = make_job(tmp_path, spec={"workers": {"gpusPerWorker": 0, "resources": {"limits": {"memory": limit}}}})
    monkeypatch.setenv("TUNEWARD_MODEL_DIR", job.variables()["TUNEWARD_MODEL_DIR"])
    result = conclude(job, tmp_path, conclusion.Outcome({0: -9}), out_of_memory=True)
    assert (result.reason, result.exit_code) == (Reason.OUT_OF_MEMORY, 1)
    assert result.message == f"a rank was killed for memory; {said}"


def test_a_stop_before_the_first_step_is_a_stop(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    result = conclude(job, tmp_path, conclusion.Outcome({}, stopped=True))
    assert (result.outcome, result.exit_code, result.attempt) == ("Stopped", 143, 0)


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Reason.OUT_OF_MEMORY, 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Reason.OUT_OF_MEMORY, 1),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), Reason.INFRASTRUCTURE, 75),
        (OSError(28, "No space left on device"), Reason.INFRASTRUCTURE, 75),
        (RuntimeError("[c10d] TCPStore.cpp: stop waiting"), Reason.INFRASTRUCTURE, 75),
        (RuntimeError("could not restore the weights"), Reason.USER_CODE, 1),
        (ValueError("x"), Reason.USER_CODE, 1),
        (RuntimeError("put_ does not have a deterministic implementation, but you set"), Reason.CONFIG_INVALID, 78),
        (endings.InputMissingError("no data"), Reason.INPUT_MISSING, 66),
        (endings.ConfigBadError("no"), Reason.CONFIG_INVALID, 78),
    ],
)
def test_every_error_has_its_reason_and_exit_code(error: Exception, reason: Reason, code: int) -> None:
    ending = endings.classify(error, lambda: "lower it")
    assert (ending.reason, ending.exit_code) == (reason, code)


# -- the run directory ---------------------------------------------------------------------------------------------------


def start(job: Job) -> Start:
    return Start(
        attempt=0, pod_uid="", pod_name="", node="", plan_digest=job.plan.digest(), started_at=rundir.now(),
        workers=1, ranks=1, from_step=0, resume="exact",
    )  # fmt: skip


def test_two_gangs_at_once_get_two_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    assert rundir.take_attempt(job.run, start(job)) == 1
    # The second one listed the folder before the first one made its own.
    monkeypatch.setattr(rundir, "attempt_numbers", lambda run: [])
    assert rundir.take_attempt(job.run, start(job)) == 2


def test_a_later_attempt_fences_this_one(tmp_path: Path) -> None:
    job = make_job(tmp_path, hyper={"steps": 4000})
    gang = Gang(job)
    gang.until(lambda: gang.steps() >= 1)
    assert rundir.take_attempt(job.run, start(job)) == 2
    assert gang.wait() == [75]
    assert "attempt 2 has begun; attempt 1 gives way to it" in gang.said()
    assert job.results() == []


# -- refusals of a rank --------------------------------------------------------------------------------------------------


def ending_of(job: Job, world: int = 1) -> tuple[list[int | None], dict[str, Any]]:
    codes = Gang(job, world).wait()
    return codes, json.loads((job.run / "status/ending-0.json").read_text())


def test_a_loss_that_is_not_finite_names_step_and_sample(tmp_path: Path) -> None:
    job = make_job(tmp_path, hyper={"learning_rate": 1.0, "max_grad_norm": 1000.0, "scheduler": "Constant"})
    weights = job.store / "data/tiny" / TRAINING / "weights.f16"
    content = bytearray(weights.read_bytes())
    # Infinity in float16, as the weight of the first document's second token.
    content[2:4] = b"\x00\x7c"
    weights.write_bytes(bytes(content))
    codes, ending = ending_of(job, 2)
    assert codes == [1, 1]
    assert ending["reason"] == Reason.NUMERICAL_DIVERGENCE
    assert re.match(r"the loss is not finite at step \d+ \(sample pvc://claim/chats\.jsonl:1\)", str(ending["message"])), (
        ending["message"]
    )


def test_out_of_memory_names_what_to_lower_and_to_which_value(tmp_path: Path) -> None:
    """The allocator refuses the logits of a thousand rows and sixty thousand words, which no patch cuts into pieces."""
    folder = tmp_path / "data/tiny"
    with DocumentWriter(folder / TRAINING, ["pvc://claim/long.jsonl"]) as writer:
        for line in range(4):
            writer.add([3 + line] * 1024, [0.0] + [1.0] * 1023, file=0, line=line + 1)
    manifest.write_manifest(folder)
    job = make_job(
        tmp_path,
        config=tiny_config(vocab_size=60_000, max_position_embeddings=1024),
        hyper={"sequence_length": 1024, "batch_tokens": 4096},
        packing=ResolvedPacking(mode="Packed", reason="", patches=["packed-attention"]),
        bins=4,
    )
    job.environment[ENV_ROOM] = str(400 << 20)
    codes, ending = ending_of(job)
    assert (codes, ending["reason"]) == ([1], Reason.OUT_OF_MEMORY)
    assert ending["message"].startswith(
        "not enough memory; lower spec.hyperparameters.batchTokens from 4096 to 2048, "
        "or raise spec.workers.resources.limits.memory to 5Gi: RuntimeError: "
    )


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (job.store / "data/tiny" / TRAINING / "ids.i32").unlink()
    codes, ending = ending_of(job)
    assert (codes, ending["reason"]) == ([66], Reason.INPUT_MISSING)


def test_a_model_of_no_known_class_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    file = job.store / "models/tiny/config.json"
    file.write_text(file.read_text().replace("LlamaForCausalLM", "NovelForCausalL2"))
    codes, ending = ending_of(job)
    assert (codes, ending["reason"]) == ([78], Reason.MODEL_UNSUPPORTED)


def test_a_run_directory_of_another_data_set_is_refused(tmp_path: Path) -> None:
    job = train(make_job(tmp_path, hyper={"steps": 3}))
    summary = job.plan.prepared.data.summary.model_copy(update={"digest": "sha256:other"})
    data = job.plan.prepared.data.model_copy(update={"summary": summary})
    prepared = job.plan.prepared.model_copy(update={"data": data})
    codes, ending = ending_of(written(Job(job.store, job.plan.model_copy(update={"prepared": prepared}))))
    assert (codes, ending["reason"]) == ([78], Reason.CONFIG_INVALID)
    assert "another data" in ending["message"]

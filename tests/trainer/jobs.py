"""Jobs small enough to train in a second, and gangs of real processes to train them.

Ranks are forked from a server that has torch and transformers loaded already: a process of its own, which can be killed
at any instruction, in a fraction of the time that the imports take.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from tuneward_api import manifest
from tuneward_api.files import Base, Data, FinishedAdapter, FinishReport, Images, JobRef, Plan, Prepared, Request, Result
from tuneward_api.finetunejob import FineTuneJobSpec
from tuneward_api.objective import SUPERVISED, ResolvedDPO, ResolvedObjective
from tuneward_api.resolved import ResolvedData, ResolvedHyperparameters, ResolvedMethod, ResolvedPacking
from tuneward_trainer import finish, patches, rundir
from tuneward_trainer.data.documents import TRAINING, VALIDATION, DocumentWriter, Encoded
from tuneward_trainer.model import model_class

VOCABULARY = 96
PREFERENCE = ResolvedObjective(type="DPO", dpo=ResolvedDPO(beta=0.1))
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ENV_ROOM = "TEST_ROOM"
"""Bytes that a rank may take beyond what it has when it starts."""
DEADLINE = 120.0
"""Should not be reached; a test that waits for it has failed."""


def tiny_config(**changes: Any) -> LlamaConfig:
    numbers: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 2,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**numbers | changes)


def make_model(folder: Path, config: PreTrainedConfig | None = None) -> Path:
    """A random model in `folder`, with its manifest."""
    config = config or tiny_config()
    config.architectures = config.architectures or [LlamaForCausalLM.__name__]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = model_class(config.to_dict())(config)
        # Random logits are nearly uniform at the default scale; larger ones make mistakes visible.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    manifest.write_manifest(folder)
    return folder


def make_data(folder: Path, *, training: int = 18, validation: int = 5) -> Path:
    """Random documents with weights 0, 0.5 and 1, with its manifest."""
    random = np.random.default_rng(5)
    for part, count in ((TRAINING, training), (VALIDATION, validation)):
        with DocumentWriter(folder / part, ["pvc://claim/chats.jsonl"]) as writer:
            for line in range(count):
                length = int(random.integers(8, 40))
                weights = [0.0, *random.choice([0.0, 0.5, 1.0], length - 1).tolist()]
                writer.add(random.integers(3, VOCABULARY, length).tolist(), weights, file=0, line=line + 1)
    manifest.write_manifest(folder)
    return folder


def make_pairs(folder: Path, *, training: int = 9, validation: int = 3, copies: int = 2) -> Path:
    """Random pairs whose answers end in the stop token; the first one `copies` times. With its manifest."""
    random = np.random.default_rng(6)
    for part, count in ((TRAINING, training), (VALIDATION, validation)):
        with DocumentWriter(folder / part, ["pvc://claim/pairs.jsonl"]) as writer:
            for line in range(count):
                prompt = random.integers(3, VOCABULARY, int(random.integers(3, 12))).tolist()
                answers = [[*random.integers(3, VOCABULARY, int(random.integers(2, 20))).tolist(), 2] for _ in range(2)]
                pair = [Encoded.of(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)) for answer in answers]
                writer.add_sample(pair, file=0, line=line + 1, copies=1 if line else copies)
    manifest.write_manifest(folder)
    return folder


@dataclass
class Job:
    """A store with a model, data and a plan."""

    store: Path
    plan: Plan
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.store / self.plan.request.run_directory

    @property
    def plan_file(self) -> Path:
        return self.run / "plan.json"

    def variables(self) -> dict[str, str]:
        return {
            "TUNEWARD_STORE_DIR": str(self.store),
            "TUNEWARD_MODEL_DIR": str(self.store / "models/tiny"),
            "TUNEWARD_DATA_DIR": str(self.store / "data/tiny"),
            "TUNEWARD_RUN_DIR": str(self.run),
            "TUNEWARD_TERMINATION_LOG": str(self.run / "termination"),
            "OMP_NUM_THREADS": "1",
        } | self.environment

    def results(self) -> list[Result]:
        return rundir.results(self.run, self.plan.digest())

    def adapter(self) -> bytes:
        """The trained bytes of the newest success."""
        result = next(result for result in self.results() if result.outcome == "Succeeded")
        return (self.run / str(result.adapter_directory) / "adapter/adapter_model.safetensors").read_bytes()

    def again(self, name: str) -> Job:
        """The same job with a run directory of its own."""
        request = self.plan.request.model_copy(update={"run_directory": f"jobs/{name}"})
        return written(Job(self.store, self.plan.model_copy(update={"request": request}), self.environment))


def written(job: Job) -> Job:
    job.run.mkdir(parents=True, exist_ok=True)
    job.plan_file.write_text(job.plan.model_dump_json(by_alias=True, exclude_none=True))
    return job


def make_job(
    store: Path,
    *,
    spec: dict[str, Any] | None = None,
    hyper: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    packing: ResolvedPacking | None = None,
    bins: int = 1,
    config: PreTrainedConfig | None = None,
    objective: ResolvedObjective = SUPERVISED,
) -> Job:
    """12 steps over 18 documents (of DPO: over 10 pairs), a checkpoint every 3, all patches."""
    if not (store / "models/tiny").exists():
        make_model(store / "models/tiny", config)
    if not (store / "data/tiny").exists():
        (make_pairs if objective.type == "DPO" else make_data)(store / "data/tiny")
    whole: dict[str, Any] = {
        "model": {"uri": "pvc://claim/tiny"},
        "datasets": {"training": [{"uri": "pvc://claim/chats.jsonl"}]},
        "checkpoint": {"everySteps": 3},
    }
    numbers: dict[str, Any] = {
        "epochs": 4.0, "steps": 12, "learning_rate": 5e-3, "scheduler": "Cosine", "warmup_fraction": 0.1,
        "weight_decay": 0.01, "max_grad_norm": 1.0, "sequence_length": 48, "batch_tokens": 160, "seed": 3,
    }  # fmt: skip
    lora: dict[str, Any] = {
        "type": "LoRA", "rank": 4, "alpha": 8.0, "dropout": 0.0, "rs_lora": False, "target_modules": TARGETS,
        "trainable_parameters": 0,
    }  # fmt: skip
    prepared = Prepared(
        base=Base(
            uri="pvc://claim/tiny", key="tiny", digest="sha256:base", architecture="LlamaForCausalLM", parameters=1,
            claim="claim", sub_path="models/tiny",
        ),
        data=Data(
            sub_path="data/tiny", summary=ResolvedData(digest="sha256:data", samples=18, tokens=1, target_tokens=1)
        ),
        objective=objective,
        method=ResolvedMethod(**lora | (method or {})),
        hyperparameters=ResolvedHyperparameters(**numbers | (hyper or {})),
        packing=packing or ResolvedPacking(mode="Packed", reason="", patches=list(patches.ALL)),
        bins_per_micro_batch=bins,
    )  # fmt: skip
    request = Request(
        job=JobRef(namespace="default", name="tiny", uid=""),
        spec=FineTuneJobSpec.model_validate(whole | (spec or {})),
        images=Images(trainer="local"),
        store_claim="claim",
        run_directory="jobs/tiny",
    )
    return written(Job(store, Plan(request=request, prepared=prepared)))


# -- gangs -----------------------------------------------------------------------------------------------------------


context = mp.get_context("forkserver")
context.set_forkserver_preload(["tests.trainer.preload"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _rank(variables: dict[str, str], plan: Path, log: Path) -> None:
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    from tuneward_trainer import train

    if room := variables.get(ENV_ROOM):
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + int(room),) * 2)

    code = train.main(plan)
    sys.stderr.flush()
    os._exit(code)


def address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Gang:
    """`world` ranks of one attempt, each a process."""

    def __init__(self, job: Job, world: int = 1) -> None:
        self.job = job
        self.log = job.run / "ranks.log"
        shared = job.variables() | {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "TUNEWARD_STATUS_DIR": str(job.run / "status"),
        }
        (job.run / "status").mkdir(exist_ok=True)
        self.processes = [
            context.Process(target=_rank, args=(shared | {"RANK": str(rank)}, job.plan_file, self.log), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        for process in self.processes:
            process.join(DEADLINE)
        codes = [process.exitcode for process in self.processes]
        # A rank answers SIGTERM with a checkpoint, so pytest would wait for ever at its own end.
        self.kill()
        assert None not in codes, self.said()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def succeed(self) -> None:
        codes = self.wait()
        assert not any(codes), f"{codes}\n{self.said()}"

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that the gang does, which must not end before."""
        try:
            await_(lambda: condition() or not all(process.is_alive() for process in self.processes), self.said)
            assert condition(), self.said()
        except BaseException:
            self.kill()
            raise

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else "nothing was logged"

    def steps(self) -> int:
        """Steps that the newest attempt has written down."""
        return len(step_lines(self.job))


def step_lines(job: Job) -> list[str]:
    numbers = rundir.attempt_numbers(job.run)
    file = rundir.attempt_directory(job.run, numbers[-1]) / "metrics.jsonl" if numbers else None
    return [line for line in file.read_text().splitlines() if "train_loss" in line] if file and file.exists() else []


def await_(condition: Callable[[], bool], said: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.005)


def train(job: Job, world: int = 1) -> Job:
    Gang(job, world).succeed()
    return job


# -- and their ends --------------------------------------------------------------------------------------------------


def reported(job: Job) -> tuple[int, FinishReport]:
    """finish's exit code, and what it says."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in job.variables().items():
            patched.setenv(name, value)
        code = finish.main(job.plan_file)
    return code, FinishReport.model_validate_json((job.run / "termination").read_bytes())


def filed(job: Job) -> FinishedAdapter:
    """What finish files of a job that succeeded."""
    code, report = reported(job)
    assert code == 0 and report.adapter is not None, report.message
    return report.adapter

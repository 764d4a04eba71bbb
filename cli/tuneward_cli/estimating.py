"""`tuneward estimate`: what a job will cost, before it does.

prepare runs as for a training, so every number is the one that a training would take; what it has tokenized and fetched
stays in the store, and the training begins with it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneward_api.files import Plan, Request, canonical_json
from tuneward_api.manifest import write_synced
from tuneward_api.names import ExitCode
from tuneward_api.quantities import duration, operations
from tuneward_cli import workstation
from tuneward_cli.documents import load_valid, the_job
from tuneward_cli.errors import CommandError
from tuneward_cli.process import environment
from tuneward_cli.voice import Voice
from tuneward_cli.words import gibibytes
from tuneward_cli.workstation import Place


@dataclass(frozen=True)
class Options:
    """What `tuneward estimate` was asked for."""

    file: Path
    store: Path
    name: str | None = None
    claims: tuple[tuple[str, Path], ...] = ()
    gpu_memory: float | None = None


def estimate(options: Options, voice: Voice) -> int:
    """Exit code. Raises CommandError."""
    plan, found = look(options, voice)
    for line in lines(plan, found):
        voice.line(line)
    name = f" --name {options.name}" if options.name else ""
    claims = workstation.claim_flags(dict(options.claims))
    voice.line(f"next: tuneward train {options.file}{name} --store {options.store}{claims}")
    voice.result(report(plan, found))
    return ExitCode.OK


def look(options: Options, voice: Voice) -> tuple[Plan, dict[str, Any]]:
    """The plan of the job in the file, and what the trainer says that it costs. Raises CommandError."""
    loaded = load_valid(options.file)
    job = the_job(loaded, options.name)
    store = options.store.absolute()
    claims = {**loaded.claims, **dict(options.claims)}
    place = Place(store, store / "estimates" / str(job.metadata["name"]), claims, command="estimate")
    shutil.rmtree(place.run, ignore_errors=True)
    request = _moved(workstation.lay_out(place, loaded, job, restart=False), place)
    plan = workstation.prepare(place, request, voice)
    found = _ask(place, plan, options)
    # What failed stays: its sentence says where all the errors and the log are.
    shutil.rmtree(place.run, ignore_errors=True)
    return plan, found


def _moved(request: Request, place: Place) -> Request:
    """Not into the run directory of the job itself, which a training will make."""
    moved = request.model_copy(update={"run_directory": str(place.run.relative_to(place.store))})
    write_synced(place.request, canonical_json(moved.to_json()).encode())
    return moved


def _ask(place: Place, plan: Plan, options: Options) -> dict[str, Any]:
    """The trainer counts: this process must not load torch."""
    command = [sys.executable, "-m", "tuneward_trainer", "estimate", "--plan", str(place.plan)]
    if options.gpu_memory is not None:
        command += ["--gpu-memory", str(options.gpu_memory)]
    done = subprocess.run(
        command, env=environment(workstation.mounts(place, plan)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise CommandError(
            f"the estimate failed: {said[0]}", paste=f"tuneward validate {options.file}", code=done.returncode
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def report(plan: Plan, found: Mapping[str, Any]) -> dict[str, Any]:
    """For --output json. Bytes, operations, seconds."""
    prepared = plan.prepared
    return {
        "job": plan.request.job.name,
        "parameters": prepared.base.parameters,
        "trainableParameters": prepared.method.trainable_parameters,
        "data": prepared.data.summary.to_json(),
        "hyperparameters": prepared.hyperparameters.to_json(),
        **found,
    }


def lines(plan: Plan, found: Mapping[str, Any]) -> Iterator[str]:
    """What a person reads."""
    prepared = plan.prepared
    method, hyper, data, memory = prepared.method, prepared.hyperparameters, prepared.data.summary, found["memory"]
    share = method.trainable_parameters / max(1, prepared.base.parameters)
    yield f"  model   {prepared.base.architecture}, {prepared.base.parameters:,} parameters"
    if not found["family"]["known"]:
        name = found["family"]["name"] or "this model"
        yield f"          (the layers of {name} are taken for a Llama's: memory may be off)"
    kind = f"{method.type} of rank {method.rank}" if method.type != "Full" else "full fine-tuning"
    yield f"  method  {kind} trains {method.trainable_parameters:,} ({share:.2%} of that)"
    yield f"  data    {data.samples:,} samples, {data.tokens:,} tokens of which {data.target_tokens:,} are learnt"
    yield (
        f"  steps   {hyper.steps:,} of about {hyper.batch_tokens:,} tokens: {hyper.epochs:g} epochs, "
        f"{operations(found['flops'])}"
    )
    yield from _memory_lines(found, memory, whole=method.type == "Full")
    yield _time_line(found)


def _who(found: Mapping[str, Any]) -> str:
    return "the GPU" if found["device"] == "cuda" else "a worker"


def _memory_lines(found: Mapping[str, Any], memory: Mapping[str, int], *, whole: bool) -> Iterator[str]:
    shared = ", a rank's share" if found["sharded"] else ""
    twice = ", each layer computed twice to save memory" if found["recompute"] else ""
    yield (
        f"  memory  {gibibytes(memory['resident'])}, where {_who(found)} has {gibibytes(memory['available'])}; "
        f"{found['rows']} {'row' if found['rows'] == 1 else 'rows'} at once{twice}"
    )
    for part, text in (
        ("weights", f"{'the weights' if whole else 'the frozen base model'}{shared}"),
        ("state", "gradients, optimizer, gathered layers" if whole else "trained parameters, gradients, optimizer"),
        ("activations", "kept for the backward pass"),
        ("buffers", "buffers"),
    ):
        yield f"          {gibibytes(memory[part]):>9}  {text}"
    yield f"          {gibibytes(memory['resident'] - memory['live']):>9}  kept by allocator, libraries and drivers"
    if not found["fits"]:
        yield f"          that is more than there is: {found['remedy']}"


def _time_line(found: Mapping[str, Any]) -> str:
    if found["seconds"] is None:
        return f"  time    {found['rateSource']}: {operations(found['flops'])} at the rate that it reaches"
    rate = operations(found["flopsPerSecond"])
    return f"  time    about {duration(found['seconds'])} at {rate}/s ({found['rateSource']})"

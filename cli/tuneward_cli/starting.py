"""`tuneward init`: a first job.yaml, made of a look at the model and the data.

What the trainer would choose is written too, commented out, so that a person sees which settings there are and begins with
values that make sense. The folders of model and data become claims: nothing is copied, and on a cluster the claims stay.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuneward_api.files import Plan
from tuneward_api.names import ExitCode
from tuneward_cli import estimating
from tuneward_cli.errors import USAGE, CommandError
from tuneward_cli.voice import Voice
from tuneward_cli.words import gibibytes
from tuneward_cli.workstation import claim_flags

_SCHEMES: Final = ("hf://", "pvc://")


@dataclass(frozen=True)
class Options:
    """What `tuneward init` was asked for."""

    model: str
    data: tuple[str, ...]
    out: Path
    store: Path
    name: str | None = None


@dataclass(frozen=True)
class Sources:
    """Addresses for the job, and the folders that its claims stand for."""

    model: str
    data: tuple[str, ...]
    claims: tuple[tuple[str, Path], ...]


def start(options: Options, voice: Voice) -> int:
    """Exit code. Raises CommandError; overwrites nothing."""
    if options.out.exists():
        raise CommandError(
            f"{options.out} is there already, and is not overwritten", paste=f"tuneward train {options.out}", code=USAGE
        )
    sources = resolve(options)
    name = options.name or _name(options.data[0])
    with tempfile.TemporaryDirectory(prefix="tuneward-init-") as folder:
        draft = Path(folder) / "job.yaml"
        draft.write_text("\n".join(skeleton(name, sources)) + "\n")
        asked = estimating.Options(draft, options.store, claims=sources.claims)
        plan, found = estimating.look(asked, voice)
    train = f"tuneward train {options.out} --store {options.store}{claim_flags(dict(sources.claims))}"
    with options.out.open("x") as file:
        file.write("\n".join(document(name, sources, plan, found, train)) + "\n")
    voice.done(f"{options.out} is written: what is commented out is what the trainer chooses by itself")
    for line in estimating.lines(plan, found):
        voice.line(line)
    voice.line(f"next: {train}")
    told = estimating.report(plan, found)
    voice.result({"file": str(options.out), "claims": {claim: str(path) for claim, path in sources.claims}, **told})
    return ExitCode.OK


def resolve(options: Options) -> Sources:
    """Local paths become claims, one for each folder. Raises CommandError for what is not there."""
    claims: dict[Path, str] = {}
    model = _address(options.model, "models", claims)
    data = tuple(_address(item, "data", claims) for item in options.data)
    return Sources(model, data, tuple((claim, path) for path, claim in claims.items()))


def _address(text: str, kind: str, claims: dict[Path, str]) -> str:
    if text.startswith(_SCHEMES):
        return text
    path = Path(text).absolute()
    if not path.exists():
        raise CommandError(f"{text} is not there", paste=f"ls {path.parent}", code=ExitCode.INPUT_MISSING)
    if path.parent not in claims:
        taken = sum(claim.startswith(kind) for claim in claims.values())
        claims[path.parent] = f"{kind}-{taken + 1}" if taken else kind
    plain = re.sub(r"\s+", "_", path.name)
    if plain != path.name:
        raise CommandError(
            f"{path} cannot stand in an address: its name has spaces; rename it",
            paste=f"mv '{path}' '{path.with_name(plain)}'",
            code=USAGE,
        )
    return f"pvc://{claims[path.parent]}/{path.name}"


def _name(data: str) -> str:
    """A job's name of a file's."""
    stem = Path(data.split("#")[0]).name.split(".")[0].lower()
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40].strip("-") or "finetune"


def skeleton(name: str, sources: Sources) -> Iterator[str]:
    """The least that is a job."""
    yield "apiVersion: tuneward.dev/v1alpha1"
    yield "kind: FineTuneJob"
    yield "metadata:"
    yield f"  name: {json.dumps(name)}"
    yield "spec:"
    yield "  model:"
    yield f"    uri: {json.dumps(sources.model, ensure_ascii=False)}"
    yield "  datasets:"
    yield "    training:"
    for uri in sources.data:
        yield f"    - uri: {json.dumps(uri, ensure_ascii=False)}"
    if shutil.which("nvidia-smi") is None:
        yield "  workers:"
        yield "    gpusPerWorker: 0"


def document(name: str, sources: Sources, plan: Plan, found: dict[str, Any], train: str) -> Iterator[str]:
    """The same with comments. Every line that is commented out is a setting, and valid as it stands. `train`: the command
    that trains it here."""
    prepared = plan.prepared
    data, needs = prepared.data.summary, found["memory"]
    notes = {
        "    uri:": f"{prepared.base.architecture}, {prepared.base.parameters:,} parameters",
        "    training:": f"{data.samples:,} samples, {data.tokens:,} tokens of which {data.target_tokens:,} are learnt",
        "    gpusPerWorker:": f"processors; about {gibibytes(needs['resident'])} of memory",
    }
    yield "# Written by `tuneward init`. What is commented out is what the trainer chooses by itself; every field is in"
    yield "# `kubectl explain ftj.spec` and docs/reference.md. On this machine:"
    yield f"#   {train}"
    for line in skeleton(name, sources):
        note = next((text for start, text in notes.items() if line.startswith(start)), None)
        yield f"{line}  # {note}" if note else line
        if line.startswith("    - uri:") and line.endswith(json.dumps(sources.data[-1], ensure_ascii=False)):
            yield "    # validationFraction: 0.1  # held out, for a validation loss before and after"
    yield from _choices(plan)


def _choices(plan: Plan) -> Iterator[str]:
    method, hyper = plan.prepared.method, plan.prepared.hyperparameters
    yield "  # method:"
    yield f"  #   type: {method.type}"
    yield f"  #   rank: {method.rank}  # {method.trainable_parameters:,} parameters are trained"
    yield f"  #   alpha: {method.alpha or 0:g}"
    yield "  # hyperparameters:"
    yield f"  #   epochs: {hyper.epochs:g}  # {hyper.steps:,} steps; or steps: …"
    yield f"  #   learningRate: {hyper.learning_rate:g}"
    yield f"  #   scheduler: {hyper.scheduler}"
    yield f"  #   warmupFraction: {hyper.warmup_fraction:g}"
    yield f"  #   sequenceLength: {hyper.sequence_length}  # the longest sample that is allowed, in tokens"
    yield f"  #   batchTokens: {hyper.batch_tokens}  # of an optimizer step, whatever the number of workers"
    yield f"  #   seed: {hyper.seed}"
    yield "  # checkpoint:"
    yield "  #   everySeconds: 300"

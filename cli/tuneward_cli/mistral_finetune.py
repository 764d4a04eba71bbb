"""mistral-finetune's own YAML as a FineTuneJob: its keys, its defaults, and a line for whatever is done otherwise here.

The keys are those of its `finetune/args.py`, `finetune/data/args.py` and `model/args.py`. Paths become claims, which a
workstation has as folders; what the translated job may hold is checked by the job's own rules, at the key's line.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneward_api.finetunejob import FineTuneJob
from tuneward_api.loader import Document, show_path
from tuneward_api.loader import Path as KeyPath
from tuneward_api.names import API_VERSION, MAX_JOB_NAME
from tuneward_api.validate import Problem, problems_of, validate_document

_HUB: Final = re.compile(r"^[\w.-]+/[\w.-]+$")
_MOST_COPIES: Final = 10
"""Copies of the source that is repeated least, for shares that come closer to the weights."""
_CLOSE: Final = 0.1
"""Relative error of a share that is near enough."""
_KEEP_ALL: Final = 100


class _Keys(BaseModel):
    """Strict as our own kinds: an unknown key is refused by its name, with those that are known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Instruct(_Keys):
    shuffle: bool = True
    dynamic_chunk_fn_call: bool = True


class Data(_Keys):
    data: str = ""
    shuffle: bool = False
    instruct_data: str = ""
    eval_instruct_data: str = ""
    instruct: Instruct = Instruct()


class Optim(_Keys):
    lr: float = 3e-4
    weight_decay: float = 0.1
    pct_start: float = 0.3


class Lora(_Keys):
    enable: bool = True
    rank: int = Field(16, gt=0)
    dropout: float = 0.0
    scaling: float = Field(2.0, gt=0)


class Wandb(_Keys):
    project: str | None = None
    offline: bool = False
    key: str | None = None
    run_name: str | None = None


class MLFlow(_Keys):
    tracking_uri: str | None = None
    experiment_name: str | None = None


class TrainArgs(_Keys):
    data: Data
    model_id_or_path: str = Field(min_length=1)
    run_dir: str = Field(min_length=1)
    optim: Optim = Optim()
    seed: int = 0
    num_microbatches: int = Field(1, ge=1)
    seq_len: int = Field(2048, gt=0)
    batch_size: int = Field(1, ge=1)
    max_norm: float = 1.0
    max_steps: int = 100
    log_freq: int = 1
    ckpt_freq: int = 0
    save_adapters: bool = True
    no_ckpt: bool = False
    num_ckpt_keep: int | None = Field(3, ge=1)
    eval_freq: int = 0
    no_eval: bool = True
    checkpoint: bool = True
    wandb: Wandb = Wandb()
    mlflow: MLFlow = MLFlow()
    lora: Lora = Lora()


_STAND_IN: Final = "stand-in"
"""For a path that is refused or missing: nothing that is checked later objects to it."""
_STAND_INS: Final[dict[KeyPath, Any]] = {
    ("data",): {"instruct_data": _STAND_IN, "eval_instruct_data": _STAND_IN},
    **{("data", key): _STAND_IN for key in ("data", "instruct_data", "eval_instruct_data")},
    ("model_id_or_path",): _STAND_IN,
    ("run_dir",): _STAND_IN,
}
_KNOWN: Final = frozenset(TrainArgs.model_fields)


@dataclass(frozen=True)
class Source:
    """One entry of `path[:weight],…`; its samples are plain texts, or conversations."""

    path: Path
    weight: float
    text: bool = False


@dataclass(frozen=True)
class Translation:
    """`job` is the document to go on with, `claims` the folders of its claims, `notes` what is done otherwise here."""

    job: Document
    claims: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_one(document: Document) -> bool:
    """Whether this is mistral-finetune's YAML: no object of Kubernetes, and one of its keys."""
    value = document.value
    return isinstance(value, dict) and not value.keys() & {"apiVersion", "kind"} and bool(value.keys() & _KNOWN)


def translate(document: Document) -> tuple[Translation | None, list[Problem]]:
    """The job, or every problem at its own key."""
    keys, refused = _read(document)
    translator = _Translator(document, keys)
    translation = translator.translation()
    _, of_job = validate_document(translation.job)
    problems = [*refused, *translator.problems, *translator.at_keys(of_job)]
    return (None, sorted(problems, key=lambda one: one.line)) if problems else (translation, [])


def _read(document: Document) -> tuple[TrainArgs, list[Problem]]:
    """The keys. One that is refused has its default or a stand-in, so that what the others say is checked too."""
    try:
        return TrainArgs.model_validate(document.value), []
    except ValidationError as error:
        refused = error
    value = deepcopy(document.value)
    for detail in refused.errors(include_url=False):
        *parents, last = detail["loc"]
        holder = value
        for parent in parents:
            holder = holder[parent]
        holder.pop(last, None)
        if detail["loc"] in _STAND_INS:
            holder[last] = _STAND_INS[detail["loc"]]
    return TrainArgs.model_validate(value), problems_of(document, TrainArgs, refused)


class _Translator:
    """Builds the spec field by field, and remembers which key each field comes from."""

    def __init__(self, document: Document, keys: TrainArgs) -> None:
        self._document = document
        self._keys = keys
        self._spec: dict[str, Any] = {}
        self._origins: dict[KeyPath, KeyPath] = {}
        self._claims: dict[Path, str] = {}
        self.notes: list[str] = []
        self.problems: list[Problem] = []

    def translation(self) -> Translation:
        self._model()
        self._data()
        self._numbers()
        self._saving()
        self._trackers()
        self._note_rest()
        name = job_name(self._keys.run_dir)
        self.notes.append(f"run_dir: the run directory is jobs/{name} of the store")
        value = {"apiVersion": API_VERSION, "kind": FineTuneJob.__name__, "metadata": {"name": name}, "spec": self._spec}
        lines = {path: self._document.line_of(key) for path, key in self._origins.items()}
        job = Document(value=value, file=self._document.file, line=self._document.line, lines=lines)
        return Translation(job, {claim: folder for folder, claim in self._claims.items()}, self.notes)

    def at_keys(self, problems: list[Problem]) -> list[Problem]:
        """What a job may not hold, told of the key it comes from."""
        known = [(show_path(path), show_path(key)) for path, key in self._origins.items()]
        return [
            Problem(
                one.file,
                one.line,
                next((key for path, key in known if one.field.startswith(path)), ""),
                f"becomes {one.field}: {one.message}",
            )
            for one in problems
        ]

    def _set(self, key: str, path: str, value: Any) -> None:
        """Both are dotted; `path` is below spec."""
        target = self._spec
        *parents, last = path.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
        self._origins["spec", *path.split(".")] = tuple(key.split("."))

    def _refuse(self, key: str, message: str) -> None:
        path = tuple(key.split("."))
        self.problems.append(Problem(self._document.file, self._document.line_of(path), key, message))

    def _model(self) -> None:
        name = self._keys.model_id_or_path
        if Path(name).is_dir() or not _HUB.match(name):
            self._set("model_id_or_path", "model.uri", self._uri(Path(name), "model"))
        else:
            self._set("model_id_or_path", "model.uri", f"hf://{name}")
            self.notes.append(f"model_id_or_path: {name} is no folder here, so the model of that name on the hub is taken")
        self.notes.append(
            "model_id_or_path: the folder must have Hugging Face's layout (config.json); "
            "prompts are rendered by its own chat template"
        )

    def _uri(self, path: Path, claim: str) -> str:
        """A claim for each folder that holds something."""
        path = path.absolute()
        if path.parent not in self._claims:
            taken = sum(name.rstrip("-0123456789") == claim for name in self._claims.values())
            self._claims[path.parent] = f"{claim}-{taken + 1}" if taken else claim
        return f"pvc://{self._claims[path.parent]}/{path.name}"

    def _data(self) -> None:
        sources = [*self._sources("data.data", text=True), *self._sources("data.instruct_data")]
        if not sources:
            self._refuse("data", "holds no training data; set instruct_data, or data for plain text")
            sources = [Source(Path(_STAND_IN), 1)]
        copies = copies_of(sources)
        training = [
            {"uri": self._uri(source.path, "data")}
            | ({"format": "Text"} if source.text else {})
            | ({"weight": count} if count > 1 else {})
            for source, count in zip(sources, copies, strict=True)
        ]
        only_text = all(source.text for source in sources)
        self._set("data.data" if only_text else "data.instruct_data", "datasets.training", training)
        if len(sources) > 1:
            said = ", ".join(f"{source.path} {count}" for source, count in zip(sources, copies, strict=True))
            self.notes.append(f"data: weights become copies in an epoch, by the sizes of the files: {said}")
        if only_text:
            self._set("data.data", "objective.type", "Pretraining")
        else:
            self._set("seq_len", "datasets.onTooLong", "Truncate")
            self.notes.append("seq_len: what is longer is cut at its end; mistral-finetune goes on with it in the next row")
        self._evaluation()

    def _evaluation(self) -> None:
        keys, asked = self._keys, self._sources("data.eval_instruct_data")
        if keys.no_eval:
            if asked:
                self.notes.append("data.eval_instruct_data: not read, as no_eval is true")
            return
        if not asked:
            self._refuse("no_eval", "is false, so data.eval_instruct_data must name data; or set no_eval: true")
            asked = [Source(Path(_STAND_IN), 1)]
        validation = [{"uri": self._uri(source.path, "data")} for source in asked]
        self._set("data.eval_instruct_data", "datasets.validation", validation)
        if keys.eval_freq > 0:
            self._set("eval_freq", "evaluation.everySteps", keys.eval_freq)

    def _sources(self, key: str, *, text: bool = False) -> list[Source]:
        value: str = getattr(self._keys.data, key.partition(".")[2])
        found: list[Source] = []
        for item in filter(None, (part.strip() for part in value.split(","))):
            path, _, weight = item.partition(":")
            try:
                number = float(weight or 1)
            except ValueError:
                number = 0.0
            if not path or not 0 < number < float("inf"):
                self._refuse(key, f"{item!r} must be PATH or PATH:WEIGHT with a weight above 0")
                found.append(Source(Path(_STAND_IN), 1, text))
            elif Path(path) in (source.path for source in found):
                self._refuse(key, f"{path} is there twice; name it once")
            else:
                found.append(Source(Path(path), number, text))
        return found

    def _numbers(self) -> None:
        keys = self._keys
        if keys.lora.enable:
            self._set("lora.rank", "method.rank", keys.lora.rank)
            self._set("lora.scaling", "method.alpha", keys.lora.rank * keys.lora.scaling)
            self._set("lora.dropout", "method.dropout", keys.lora.dropout)
        else:
            self._set("lora.enable", "method.type", "Full")
        self._set("max_steps", "hyperparameters.steps", keys.max_steps)
        self._set("optim.lr", "hyperparameters.learningRate", keys.optim.lr)
        self._set("optim.weight_decay", "hyperparameters.weightDecay", keys.optim.weight_decay)
        self._set("optim.pct_start", "hyperparameters.warmupFraction", keys.optim.pct_start)
        self._set("max_norm", "hyperparameters.maxGradNorm", keys.max_norm)
        self._set("seq_len", "hyperparameters.sequenceLength", keys.seq_len)
        tokens = keys.seq_len * keys.batch_size * keys.num_microbatches
        self._set("batch_size", "hyperparameters.batchTokens", tokens)
        self._set("seed", "hyperparameters.seed", keys.seed)
        self.notes.append(
            f"batch_size: a step has {tokens} tokens (seq_len x batch_size x num_microbatches) on any number of workers; "
            "mistral-finetune multiplies them by its GPUs"
        )
        self.notes.append(
            "optim.pct_start: warm-up is linear from 0, then a cosine to a tenth; OneCycleLR begins at a 25th, ends near 0"
        )

    def _saving(self) -> None:
        keys = self._keys
        if keys.ckpt_freq > 0 and not keys.no_ckpt:
            self._set("ckpt_freq", "checkpoint.everySteps", keys.ckpt_freq)
        else:
            self.notes.append("ckpt_freq: a checkpoint is saved every 300 seconds, so that a killed job goes on")
        self._set("num_ckpt_keep", "checkpoint.keep", _KEEP_ALL if keys.num_ckpt_keep is None else keys.num_ckpt_keep)
        if keys.num_ckpt_keep is None:
            self.notes.append(f"num_ckpt_keep: the newest {_KEEP_ALL} are kept")
        if not keys.save_adapters:
            self.notes.append("save_adapters: the adapter is saved by itself; it is not merged into the model")

    def _trackers(self) -> None:
        wandb, mlflow = self._keys.wandb, self._keys.mlflow
        if wandb.project:
            self._set("wandb.project", "trackers.wandb.project", wandb.project)
            where = "WANDB_MODE=offline" if wandb.offline else "WANDB_API_KEY"
            self.notes.append(f"wandb: the run is named after the job; set {where}; no key is read from here")
        if mlflow.tracking_uri:
            uri = mlflow.tracking_uri if "://" in mlflow.tracking_uri else Path(mlflow.tracking_uri).absolute().as_uri()
            self._set("mlflow.tracking_uri", "trackers.mlflow.trackingUri", uri)
            if mlflow.experiment_name:
                self._set("mlflow.experiment_name", "trackers.mlflow.experiment", mlflow.experiment_name)

    def _note_rest(self) -> None:
        """Keys that stand in the file and have no counterpart."""
        given = {*self._keys.model_fields_set, *(f"data.{name}" for name in self._keys.data.model_fields_set)}
        told = {
            "log_freq": "every step is written to attempts/<n>/metrics.jsonl of the run directory",
            "checkpoint": "whether activations are computed again is not chosen by hand",
            "data.shuffle": "samples are always shuffled, by the seed",
            "data.instruct": "samples are always shuffled, by the seed; every call of a conversation is learnt in its place",
        }
        self.notes += [f"{key}: {text}" for key, text in told.items() if key in given]


def job_name(run_dir: str) -> str:
    """What `run_dir` ends in, as a job may be called."""
    plain = re.sub(r"[^a-z0-9]+", "-", Path(run_dir).name.lower())[:MAX_JOB_NAME].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}"[:MAX_JOB_NAME].strip("-")


def copies_of(sources: list[Source]) -> list[int]:
    """mistral-finetune draws a source with a probability that is its weight, however long it is. So copies in an epoch
    are by weight and size: as few as come within a tenth of all shares, the least repeated source once to ten times."""
    if len(sources) < 2:
        return [1] * len(sources)
    wanted = [source.weight / max(1, _size(source.path)) for source in sources]
    ratios = [share / min(wanted) for share in wanted]
    best: list[int] = []
    least = float("inf")
    for times in range(1, _MOST_COPIES + 1):
        copies = [round(ratio * times) for ratio in ratios]
        error = max(abs(count / (ratio * times) - 1) for count, ratio in zip(copies, ratios, strict=True))
        if error < least:
            best, least = copies, error
        if error <= _CLOSE:
            break
    return best


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.iterdir() if path.is_dir() else []
    return sum(file.stat().st_size for file in files if file.is_file())

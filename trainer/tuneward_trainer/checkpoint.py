"""Checkpoints: `checkpoints/step-00000100.a<attempt>/`, complete once MANIFEST.json is there.

One holds the trained tensors, the optimizer's state, the step, and what tells a divergence (the last losses);
order, learning rate and dropout follow from the step. An adapter's tensors are one file, which the leader writes; where
ranks hold one model together each writes its shards below `shards/`, by torch.distributed.checkpoint, and any number of
ranks can read them. Beside it the manifest of circumstances: another base, data or shape refuses a resume, another torch,
device or thread count makes it `equivalent` instead of `exact` and loses nothing.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from tuneward_api import manifest
from tuneward_api.files import Plan, SavedCheckpoint
from tuneward_trainer import nf4
from tuneward_trainer.distributed import Crew, Gang
from tuneward_trainer.endings import ConfigBadError
from tuneward_trainer.engine import State
from tuneward_trainer.memory import Choice
from tuneward_trainer.rundir import now

FOLDER: Final = "checkpoints"
SHARDS: Final = "shards"
"""In a checkpoint whose ranks hold one model together."""
_NAME: Final = re.compile(r"^step-(\d{8,})\.a(\d+)$")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What is written: a copy, and all that belongs to it as it is at its step; it may be written later."""

    step: int
    state: State
    facts: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A complete one, read back."""

    step: int
    state: State | Path
    """Of shards their folder."""
    watch: dict[str, list[float]]
    """What `divergence.LossWatch` remembered."""
    resume: str
    """exact, or equivalent and why."""
    saved: SavedCheckpoint
    notes: dict[str, float]
    """Values that could be computed again, such as the base model's validation loss."""


def identity(plan: Plan, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """What must be equal for a resume at all."""
    found = {"base": plan.prepared.base.digest, "data": plan.prepared.data.summary.digest, "shapes": shapes}
    return found if plan.request.parent is None else {**found, "parent": plan.request.parent.artifact_digest}


def circumstances(gang: Gang, choice: Choice, *, packed: bool = False) -> dict[str, Any]:
    """What must be equal for a resume to give the same bytes."""
    device = gang.device
    cuda = device.type == "cuda"
    # On a CPU the plan says how many.
    of_gpus = {"rows at once": choice.bins, "deterministic": torch.are_deterministic_algorithms_enabled()} if cuda else {}
    return {
        **of_gpus,
        # Gradients of shards are added up rank by rank.
        **({"ranks": gang.world} if gang.optimizer_sharded else {}),
        **({"bitsandbytes": nf4.release()} if packed else {}),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {torch.backends.cpu.get_cpu_capability()}",
        # On a CPU sums inside a matrix product may be split by thread.
        "threads": 0 if cuda else torch.get_num_threads(),
    }


def _listed(run: Path) -> list[tuple[int, int, Path]]:
    """(step, attempt, folder), newest first; complete or not."""
    try:
        entries = list((run / FOLDER).iterdir())
    except FileNotFoundError:
        return []
    named = [(match, entry) for entry in entries if (match := _NAME.match(entry.name))]
    return sorted(((int(match[1]), int(match[2]), entry) for match, entry in named), reverse=True)


def newest(run: Path, wanted: dict[str, Any], here: dict[str, Any]) -> Checkpoint | None:
    """The newest one whose every byte is as it was written. Raises ConfigBadError if it belongs to another job."""
    for step, _, folder in _listed(run):
        try:
            digest = manifest.verify(folder)
        except manifest.ManifestError as error:
            logger.info("passed over %s: %s", folder.name, error)
            continue
        return _read(folder, digest, step, wanted, here)
    return None


def at(run: Path, step: int, wanted: dict[str, Any], here: dict[str, Any]) -> Checkpoint | None:
    """That of a step, of whichever attempt left it whole: all have the same."""
    for found, _, folder in _listed(run):
        if found != step:
            continue
        with suppress(manifest.ManifestError):
            return _read(folder, manifest.verify(folder), step, wanted, here)
    return None


def _read(folder: Path, digest: str, step: int, wanted: dict[str, Any], here: dict[str, Any]) -> Checkpoint:
    facts = json.loads((folder / "state.json").read_bytes())
    for key, value in wanted.items():
        if facts["identity"].get(key) != value:
            raise ConfigBadError(
                f"the checkpoint {folder.name} was made with another {key}; "
                "give this job another name, or remove its run directory to begin anew"
            )
    changes = [
        f"{key} {facts['circumstances'].get(key)} -> {value}"
        for key, value in here.items()
        if facts["circumstances"].get(key) != value
    ]
    if here.get("deterministic") is False:
        changes.append("this GPU's attention kernels are not deterministic")
    return Checkpoint(
        step=step,
        state=folder / SHARDS if (folder / SHARDS).is_dir() else load_file(folder / "state.safetensors"),
        watch=facts.get("watch", {}),
        resume=f"equivalent ({', '.join(changes)})" if changes else "exact",
        saved=_saved(folder, digest, step),
        notes=facts.get("notes", {}),
    )


def _saved(folder: Path, digest: str, step: int) -> SavedCheckpoint:
    at = json.loads((folder / "state.json").read_bytes())["savedAt"]
    return SavedCheckpoint(step=step, digest=digest, saved_at=at, directory=f"{FOLDER}/{folder.name}")


def write(run: Path, snapshot: Snapshot, *, attempt: int) -> SavedCheckpoint:
    """Writes and syncs all files, the manifest last: killed or out of space on the way, it is no checkpoint."""
    folder = _folder(run, snapshot.step, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(snapshot.state, folder / "state.safetensors")
    return _complete(folder, snapshot, [manifest.entry(folder, "state.safetensors")])


def _folder(run: Path, step: int, attempt: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.a{attempt}"


def _complete(folder: Path, snapshot: Snapshot, entries: list[manifest.Entry]) -> SavedCheckpoint:
    """`entries`: of all that holds the state."""
    saved_at = now()
    body = {**snapshot.facts, "savedAt": saved_at}
    (folder / "state.json").write_text(json.dumps(body, sort_keys=True))
    digest = manifest.write_manifest(folder, [*entries, manifest.entry(folder, "state.json")])
    return SavedCheckpoint(step=snapshot.step, digest=digest, saved_at=saved_at, directory=f"{FOLDER}/{folder.name}")


def prune(run: Path, *, keep: int, attempt: int, pinned: int | None = None) -> None:
    """Leaves the newest `keep` complete ones, and that of the step `pinned`. Touches none of a later attempt, and nothing
    newer than the newest complete one: another gang may be writing it."""
    listed = _listed(run)
    complete = [entry for entry in listed if manifest.complete(entry[2])]
    if not complete:
        return
    kept = {folder for _, _, folder in complete[:keep]}
    kept |= {folder for step, _, folder in complete if step == pinned}
    for step, owner, folder in listed:
        if folder not in kept and owner <= attempt and step <= complete[0][0]:
            remove(folder)


def discard(run: Path, *, step: int, attempt: int) -> SavedCheckpoint | None:
    """Removes those of `step` and later steps: a state that gave a bad loss is nothing to go on from. Returns the newest
    complete one that is left."""
    for found, owner, folder in _listed(run):
        if found >= step and owner <= attempt:
            logger.info("%s is removed: the loss that it gave is a divergence", folder.name)
            remove(folder)
    for found, _, folder in _listed(run):
        if manifest.complete(folder):
            return _saved(folder, manifest.read_manifest(folder)[0], found)
    return None


def remove(folder: Path) -> None:
    """The manifest first, so that no half-removed folder looks complete."""
    (folder / manifest.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_together(run: Path, snapshot: Snapshot, crew: Crew, *, attempt: int) -> SavedCheckpoint:
    """The same by all ranks: each writes and syncs its shards and reads back what it wrote; the leader then completes it.
    Raises on every rank what went wrong on any."""
    folder = _folder(run, snapshot.step, attempt)
    try:
        # Its own collectives carry an error of any rank to all.
        save_shards(
            snapshot.state,
            storage_writer=FileSystemWriter(folder / SHARDS, sync_files=True),
            process_group=crew.group,
            no_dist=crew.group is None,
        )
    except CheckpointException as error:
        # No Exception, for whatever reason.
        rank, (failure, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {failure}") from error
    own = [f"{SHARDS}/{file.name}" for file in (folder / SHARDS).glob(f"__{crew.rank}_*")]
    own += [f"{SHARDS}/.metadata"] if crew.leads else []
    entries = crew.gather(lambda: [manifest.entry(folder, path) for path in own])
    (saved,) = crew.gather(lambda: [_complete(folder, snapshot, entries)] if crew.leads else [])
    return saved


class Saver:
    """Writes in a thread of its own, one checkpoint at a time, while the training goes on. Of a model that ranks hold
    together each has one, and `crew`; else the leader alone."""

    def __init__(self, run: Path, *, attempt: int, keep: int, facts: dict[str, Any], crew: Crew | None = None) -> None:
        self._run = run
        self._attempt = attempt
        self._keep = keep
        self._crew = crew
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self.facts = facts
        self.pinned: int | None = None
        """Step of a checkpoint that stays however many come after it."""
        self.last: SavedCheckpoint | None = None
        """The newest complete one; set by the thread."""

    @property
    def _leads(self) -> bool:
        return self._crew is None or self._crew.leads

    def marks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What makes a checkpoint this job's, and what makes a resume exact."""
        return self.facts["identity"], self.facts["circumstances"]

    def save(self, snapshot: Snapshot) -> None:
        """Begins to write."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def discard(self, step: int) -> None:
        """Those of `step` and later steps."""
        self.wait()
        self.last = discard(self._run, step=step, attempt=self._attempt) if self._leads else None

    def wait(self) -> OSError | None:
        """Until nothing is being written. Returns why the last one failed: the training itself goes on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._error

    def _write(self, snapshot: Snapshot) -> None:
        self._error = None
        try:
            if self._crew is None:
                self.last = write(self._run, snapshot, attempt=self._attempt)
            else:
                self.last = write_together(self._run, snapshot, self._crew, attempt=self._attempt)
            if self._leads:
                prune(self._run, keep=self._keep, attempt=self._attempt, pinned=self.pinned)
        except Exception as error:  # noqa: BLE001 - safetensors raises its own kind for a full disk
            self._error = error if isinstance(error, OSError) else OSError(str(error))
            folder = _folder(self._run, snapshot.step, self._attempt)
            # One that is whole stays: a rank that went away only was not told any more.
            if self._leads and not manifest.complete(folder):
                logger.error("checkpoint of step %d was not saved, the older one stays: %s", snapshot.step, error)
                remove(folder)


def write_notes(saver: Saver, **notes: float) -> None:
    """Adds values to what later checkpoints carry."""
    saver.facts = {**saver.facts, "notes": {**saver.facts.get("notes", {}), **notes}}

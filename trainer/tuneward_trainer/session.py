"""What a rank trains with, made of the plan, and the result that is left of it.

`begin` loads model and data, takes the attempt's number and finds the newest checkpoint; `conclude` writes the
adapter with its proof and result.json. Between them lies `train.py`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tuneward_api import manifest, names
from tuneward_api.conditions import Reason
from tuneward_api.estimate import GIB
from tuneward_api.files import Metrics, Plan, Proof, ProofText, Result, SavedCheckpoint, Start
from tuneward_api.objective import ObjectiveType
from tuneward_trainer import checkpoint, endings, evaluate, memory, mfu, parent, proof, rundir, served, whole
from tuneward_trainer.best import Best
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents
from tuneward_trainer.distributed import Crew, Gang, be_deterministic, share
from tuneward_trainer.divergence import LossWatch
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import Loss, cross_entropy
from tuneward_trainer.metrics import MetricsLog
from tuneward_trainer.model import add_adapters, load_base, load_whole, plain
from tuneward_trainer.patches import PACKED_ATTENTION
from tuneward_trainer.profile import Profile
from tuneward_trainer.progress import Reporter
from tuneward_trainer.schedule import Schedule, documents_a_unit
from tuneward_trainer.sharded import ShardedEngine, adapted, shard

DEFAULT_KEEP: Final = 2

logger = logging.getLogger("tuneward_trainer")


class Stop:
    """Whether this process was asked to stop. All ranks agree on the step after which they do."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.ask())

    def ask(self) -> None:
        self.asked = True


@dataclass(kw_only=True)
class Session:
    """All that a rank trains with."""

    plan: Plan
    run: Path
    gang: Gang
    stop: Stop
    engine: Engine | ShardedEngine
    training: Documents
    validation: Documents | None
    schedule: Schedule
    choice: memory.Choice
    reporter: Reporter
    attempt: int
    found: checkpoint.Checkpoint | None
    """To go on from, once the model that the job starts from is measured."""
    saver: checkpoint.Saver | None
    """The leader's alone, but where each rank holds a part of the state."""
    log: MetricsLog | None
    """The leader's alone."""
    utilization: mfu.Utilization | None
    """None where no peak is known, as on a CPU."""
    profile: Profile | None
    """The leader's alone, where a trace was asked for."""
    watch: LossWatch
    loss: Loss = cross_entropy
    held_out_loss: Loss = cross_entropy
    """The same for the validation documents."""
    best: Best
    before: dict[str, float] | None = None
    """Of the model that the job starts from on held-out documents, by name; None: not yet measured."""
    after: dict[str, float] = field(default_factory=dict)
    """The last ones."""
    score_before: float | None = None
    score_after: float | None = None
    """Shares of the answers that count, of the model that the job starts from and of the result."""
    best_lost: bool = False
    """Whether the state with the lowest validation loss could not be kept."""
    last_step: int = 0
    """To which it was trained; the result may be of an earlier one."""
    train_loss: float | None = None
    stopped: bool = False
    patches: list[str]
    """The plan's, without those that are not right on some rank's device."""
    row_length: int = 0
    """Tokens that each micro-batch is padded to; 0: none is."""
    ahead: bool = False
    """The host queues the next step's first micro-batch before it reads the numbers of the last one."""
    unproved: checkpoint.Snapshot | None = None
    """Taken, and not written before the next step's loss."""
    base_answers: list[ProofText] = field(default_factory=list)
    """Of a model that is trained whole: what it said at first."""
    saved_step: int = 0
    saved_at: float = 0.0
    fenced_at: float = 0.0

    @property
    def from_step(self) -> int:
        return self.found.step if self.found is not None else 0

    @property
    def resume(self) -> str:
        return self.found.resume if self.found is not None else "exact"

    @property
    def row_limit(self) -> int:
        """Longest document of any row; constant, so that kernels compiled for it are compiled once."""
        return self.plan.prepared.hyperparameters.sequence_length

    @property
    def apart(self) -> bool:
        """Whether documents take a pass through the model each. Then a micro-batch is one document (of pairs, one pair), so
        that all take as many passes: through a sharded model a pass is one of all ranks."""
        return PACKED_ATTENTION not in self.patches

    def micro_batches(self, step: int) -> list[list[int]]:
        """The documents of each micro-batch of step `step` (from 0)."""
        groups, unit = self.schedule.micro_batches(step), self.schedule.unit
        if not self.apart:
            return groups
        return [group[first : first + unit] for group in groups for first in range(0, len(group), unit)]

    def idles(self, micro_batches: int) -> bool:
        """Of a step with so many micro-batches: whether this rank has one less than others, and goes through a sharded model
        once for their sake alone."""
        gang = self.gang
        most = -(-micro_batches // gang.world)
        return gang.model_sharded and len(share(micro_batches, gang.rank, gang.world)) < most


def begin(plan: Plan, gang: Gang, stop: Stop, reporter: Reporter) -> Session:
    """Loads everything, takes the attempt's number, finds the newest checkpoint. The engine has the state of step 0."""
    prepared = plan.prepared
    run = rundir.directory(names.ENV_RUN_DIR)
    model_dir, data_dir = inputs()
    reporter.update(phase="Loading", steps=prepared.hyperparameters.steps)
    training = Documents.open(data_dir / TRAINING)
    validation = Documents.open(data_dir / VALIDATION) if (data_dir / VALIDATION).is_dir() else None
    if (hyper := plan.request.spec.hyperparameters) is not None and hyper.deterministic:
        be_deterministic()
    room = gang.smallest(device_memory(gang.device))
    whole_model = prepared.method.type == "Full"
    shared = whole_model or memory.shares_base(prepared, model_dir, room, gang.world)
    gang = replace(gang, model_sharded=shared, optimizer_sharded=whole_model)
    if whole_model:
        engine: Engine | ShardedEngine = whole_engine(plan, model_dir, run, gang, training)
    else:
        engine = adapted_engine(plan, model_dir, run, gang, training)
    choice = rows_of(plan, model_dir, gang, room)
    wanted = checkpoint.identity(plan, engine.shapes)
    here = checkpoint.circumstances(gang, choice, packed=prepared.method.type == "QLoRA")
    found = gang.broadcast(checkpoint.newest(run, wanted, here) if gang.leads else None)
    attempt, saved = enter(plan, run, gang, found)
    evaluation = plan.request.spec.evaluation
    notes = found.notes if found is not None else {}
    saver = saver_of(plan, run, gang, attempt, {"identity": wanted, "circumstances": here, "notes": notes}, saved)
    step = found.step if found is not None else 0
    resume = found.resume if found is not None else "exact"
    reporter.update(attempt=attempt, from_step=step, resume=resume, step=step, checkpoint=saved)
    return Session(
        plan=plan,
        run=run,
        gang=gang,
        stop=stop,
        engine=engine,
        training=training,
        validation=validation,
        schedule=Schedule(
            training.lengths, prepared.hyperparameters, choice.bins, documents_a_unit(prepared.objective.type)
        ),
        choice=choice,
        reporter=reporter,
        attempt=attempt,
        found=found,
        saver=saver,
        log=MetricsLog(run, attempt, step) if gang.leads else None,
        utilization=utilization_of(plan, model_dir, training, gang),
        profile=Profile.asked(run, attempt) if gang.leads else None,
        watch=LossWatch(
            uniform_loss(plain(engine.model), prepared.objective.type), **(found.watch if found is not None else {})
        ),
        saved_step=step,
        patches=list(prepared.packing.patches),
        ahead=gang.device.type == "cuda",
        best=Best.resumed(evaluation.patience if evaluation is not None else None, notes),
        before=measured_before(notes),
        score_before=notes.get("task_score_before"),
        base_answers=whole.answers(engine.model, samples(training)) if whole_model else [],
    )


def saver_of(
    plan: Plan, run: Path, gang: Gang, attempt: int, facts: dict[str, Any], saved: SavedCheckpoint | None
) -> checkpoint.Saver | None:
    """The leader's alone, but where each rank holds a part of the state. `saved`: what there is already."""
    if not (gang.leads or gang.optimizer_sharded):
        return None
    asked, notes = plan.request.spec.checkpoint, facts["notes"]
    keep = (asked.keep if asked is not None else None) or DEFAULT_KEEP
    crew = Crew.of(gang) if gang.optimizer_sharded else None
    saver = checkpoint.Saver(run, attempt=attempt, keep=keep, facts=facts, crew=crew)
    saver.last = saved
    saver.pinned = int(notes["best_step"]) if "best_step" in notes else None
    return saver


def adapted_engine(plan: Plan, model_dir: Path, run: Path, gang: Gang, training: Documents) -> Engine:
    """The base model, frozen, with adapters: those of the job's start."""
    prepared, hyper, idle = plan.prepared, plan.prepared.hyperparameters, None
    add = functools.partial(add_adapters, method=prepared.method, seed=hyper.seed, base_uri=prepared.base.uri)
    if gang.model_sharded:
        model = adapted(model_dir, add, gang, prepared.method.type)
        idle = evaluate.filler(training, documents_a_unit(prepared.objective.type)).to(gang.device)
        if gang.leads:
            logger.info("the base model is sharded over %d ranks", gang.world)
    else:
        model = add(load_base(model_dir, gang.device, packed=prepared.method.type == "QLoRA"))
    if plan.request.parent is not None and not plan.request.parent.whole:
        parent.load(model, plan.request.parent, run)
    return Engine(model, weight_decay=hyper.weight_decay, max_grad_norm=hyper.max_grad_norm, idle=idle)


def whole_engine(plan: Plan, model_dir: Path, run: Path, gang: Gang, training: Documents) -> ShardedEngine:
    """The model that the job starts from, all of its text part to be trained, split over the gang."""
    hyper, model = plan.prepared.hyperparameters, load_whole(model_dir, gang.device)
    if plan.request.parent is not None and not plan.request.parent.whole:
        parent.put_on(model, plan.request.parent, run)
    return ShardedEngine(
        shard(model, gang, first=parent.merge),
        gang,
        weight_decay=hyper.weight_decay,
        max_grad_norm=hyper.max_grad_norm,
        idle=evaluate.filler(training, documents_a_unit(plan.prepared.objective.type)),
    )


def rows_of(plan: Plan, model_dir: Path, gang: Gang, room: int | None) -> memory.Choice:
    """What goes through the model at once, the same on every rank. `room`: bytes of the smallest GPU."""
    choice = memory.rows(plan.prepared, model_dir, room, gang.world)
    if gang.leads and room is not None:
        twice = ", each layer computed twice," if choice.recompute else ""
        logger.info("%d row(s) at once%s in %.0f GiB", choice.bins, twice, room / GIB)
    return choice


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, whatever else runs there: a resumed job shall find the same. None on a CPU, where prepare chose."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def utilization_of(plan: Plan, model_dir: Path, training: Documents, gang: Gang) -> mfu.Utilization | None:
    if gang.device.type != "cuda":
        return None
    costs, targets = memory.costs_of(plan.prepared, model_dir, "cuda", gang.world), plan.prepared.data.summary.target_tokens
    if costs is not None:
        # Attention is paid by the lengths of the documents, which are at hand here.
        costs = replace(costs, data=memory.statistics(training.lengths, targets))
    return mfu.Utilization.of(costs, torch.cuda.get_device_name(gang.device), gang.world)


def measured_before(notes: dict[str, float]) -> dict[str, float] | None:
    """Of a checkpoint's notes."""
    found = {name: notes[key] for name in ("loss", "accuracy") if (key := f"validation_{name}_before") in notes}
    return found or None


def uniform_loss(base: PreTrainedModel, objective: ObjectiveType) -> float:
    """Of a guess that knows nothing, in nats: of the next token, or of which of two answers is the better one."""
    return math.log(2 if objective == "DPO" else base.config.get_text_config().vocab_size)


def inputs() -> tuple[Path, Path]:
    """The folders of model and data. Raises InputMissingError."""
    model_dir, data_dir = rundir.directory(names.ENV_MODEL_DIR), rundir.directory(names.ENV_DATA_DIR)
    for folder, file in ((model_dir, "config.json"), (data_dir, f"{TRAINING}/lengths.i32")):
        if not (folder / file).is_file():
            raise endings.InputMissingError(f"{folder} holds no {file}: the volume is not what prepare left")
        if (folder / manifest.MANIFEST).exists() and not manifest.complete(folder):
            raise endings.InputMissingError(f"{folder} is not complete: a file of its {manifest.MANIFEST} is missing or cut")
    return model_dir, data_dir


def enter(plan: Plan, run: Path, gang: Gang, found: checkpoint.Checkpoint | None) -> tuple[int, SavedCheckpoint | None]:
    """The attempt's number, taken by the leader, and the checkpoint it goes on from."""
    number = 0
    if gang.leads:
        run.mkdir(parents=True, exist_ok=True)
        number = rundir.take_attempt(
            run,
            Start(
                attempt=0,
                pod_uid=os.environ.get(names.ENV_POD_UID, ""),
                pod_name=os.environ.get(names.ENV_POD_NAME, ""),
                node=os.environ.get(names.ENV_NODE_NAME, ""),
                plan_digest=plan.digest(),
                started_at=rundir.now(),
                workers=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
                ranks=gang.world,
                from_step=found.step if found is not None else 0,
                resume=found.resume if found is not None else "exact",
            ),
        )
        logger.info(
            "attempt %d on %d rank(s), %s",
            number,
            gang.world,
            f"from step {found.step}: {found.resume}" if found is not None else "from the beginning",
        )
    return gang.broadcast(number), found.saved if found is not None else None


def conclude(session: Session, *, seconds: float) -> Result | None:
    """The leader's result of a training that did not fail: Succeeded with what was made, or Stopped with a checkpoint."""
    session.reporter.update(phase="Saving")
    made = export(session) if not session.stopped else {}
    error = session.saver.wait() if session.saver is not None else None
    if session.saver is None or not session.gang.leads:
        return None
    if session.stopped and error is not None:
        raise endings.TryAgainError(f"stopped on request, but the checkpoint could not be saved: {error}")
    step, steps = session.engine.step, session.plan.prepared.hyperparameters.steps
    said = f"stopped on request after step {step} of {steps}" if session.stopped else f"trained {session.last_step} steps"
    if not session.stopped and step != session.last_step:
        said += f"; step {step} had the lowest validation loss and is the result"
    if session.best_lost:
        said += f"; step {session.best.step} had a lower validation loss, but its checkpoint is not there "
        said += "(was the store full?): the last state is the result"
    if session.stopped and session.watch.suspected:
        loss, before = session.watch.suspects[-1], session.watch.highest
        said += f"; this state is not saved, since its loss was {loss:.4g}, far above the {before:.4g} before"
    return rundir.write_result(
        session.run,
        Result(
            attempt=session.attempt,
            pod_uid=os.environ.get(names.ENV_POD_UID, ""),
            plan_digest=session.plan.digest(),
            outcome="Stopped" if session.stopped else "Succeeded",
            exit_code=names.ExitCode.STOPPED if session.stopped else names.ExitCode.OK,
            reason=Reason.PREEMPTED if session.stopped else Reason.SUCCEEDED,
            message=said,
            step=step,
            steps=steps,
            finished_at=rundir.now(),
            checkpoint=session.saver.last,
            metrics=metrics(session, seconds),
            from_step=session.from_step,
            resume=session.resume,
            node=os.environ.get(names.ENV_NODE_NAME, ""),
            **made,
        ),
    )


def export(session: Session) -> dict[str, Any]:
    """Writes the adapter or the model; the result's words about it, which the leader has. A collective."""
    engine = session.engine
    if isinstance(engine, Engine):
        folder = f"adapter/a{session.attempt}"
        proved = _proof(session, engine.model)
        if proved is None:
            return {}
        return {"adapter_directory": folder, "adapter_digest": proof.export(engine.model, session.run / folder, proved)}
    after = whole.answers(engine.model, samples(session.training))
    state = engine.whole(whole.dtype_of(engine.model))
    if not session.gang.leads:
        return {}
    folder = f"model/a{session.attempt}"
    source = rundir.directory(names.ENV_MODEL_DIR)
    digest = whole.export(engine.model, state, session.run / folder, source, before=session.base_answers, after=after)
    return {"adapter_directory": folder, "adapter_digest": digest}


def _proof(session: Session, model: PeftModel) -> Proof | None:
    """The adapter's, on the base that will be served. None on ranks but the leader."""
    method, texts, gang = session.plan.prepared.method, samples(session.training), session.gang
    if method.type != "QLoRA":
        found = proof.prove(model, texts) if gang.leads or gang.model_sharded else None
        return found if gang.leads else None
    if not gang.leads:
        return None
    with served.with_adapter(rundir.directory(names.ENV_MODEL_DIR), model, method, scratch=session.run) as plain:
        return proof.prove(plain, texts)


def samples(training: Documents) -> list[Any]:
    """Candidates for the proof."""
    return [training[index] for index in range(min(256, len(training)))]


def metrics(session: Session, seconds: float) -> Metrics:
    step, before = session.engine.step, session.before or {}
    return Metrics(
        train_loss=_finite(session.train_loss),
        validation_loss_before=before.get("loss"),
        validation_loss_after=session.after.get("loss"),
        validation_accuracy_before=before.get("accuracy"),
        validation_accuracy_after=session.after.get("accuracy"),
        task_score_before=session.score_before,
        task_score_after=session.score_after,
        steps=step,
        tokens=round(session.schedule.epoch(step) * session.training.tokens()),
        seconds=round(seconds, 3),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None

"""One rank of a training: `python -m tuneward_trainer.train PLAN`, started by the launcher (or torchrun).

`train` below is the whole of it: steps of forward_backward over this rank's micro-batches, one reduction that gives all
ranks the same bytes, one optimizer step, and what is due after it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from tuneward_api import manifest, names
from tuneward_api.conditions import Reason
from tuneward_api.files import Metrics, Plan, Result, SavedCheckpoint, Start, canonical_json
from tuneward_trainer import checkpoint, endings, evaluate, patches, proof, rundir
from tuneward_trainer.batch import collate, total_weight
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents
from tuneward_trainer.distributed import Gang, TreeSum, join, share
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, load_base
from tuneward_trainer.patches import Forward
from tuneward_trainer.progress import ENV_STATUS_DIR, Clock, Reporter, dump_stacks_on_signal
from tuneward_trainer.schedule import Schedule

DEFAULT_SECONDS: Final = 300
DEFAULT_KEEP: Final = 2
_LOG_SECONDS: Final = 2.0
_FENCE_SECONDS: Final = 2.0
_WIDE: Final = 1 << 20
"""A document's index rides on the reduced vector as two floats below this."""

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
    engine: Engine
    training: Documents
    validation: Documents | None
    schedule: Schedule
    reporter: Reporter
    attempt: int
    from_step: int
    resume: str
    saver: checkpoint.Saver | None
    """The leader's alone."""
    log: rundir.MetricsLog | None
    """The leader's alone."""
    before: float | None = None
    after: float | None = None
    train_loss: float | None = None
    stopped: bool = False
    saved_at: float = 0.0
    fenced_at: float = 0.0


# -- the loop --------------------------------------------------------------------------------------------------------


def train(session: Session) -> None:
    """From the session's step to the last one, or to the step after which all agree to stop."""
    hyper = session.plan.prepared.hyperparameters
    clock = Clock(hyper.steps)
    with patches.applied(session.engine.model, session.plan.prepared.packing.patches) as forward:
        measure_base(session, forward)
        session.reporter.update(phase="Training", step=session.engine.step)
        clock.reset()
        session.saved_at = time.monotonic()
        while session.engine.step < hyper.steps and not session.stopped:
            facts = one_step(session, forward)
            tell(session, facts, clock.tick(session.engine.step, facts["tokens"]))
            if evaluation_due(session):
                measure(session, forward)
                clock.reset()
            if checkpoint_due(session):
                save(session)
        if not session.stopped:
            measure(session, forward)


def one_step(session: Session, forward: Forward) -> dict[str, Any]:
    """One optimizer step. Raises DivergedError or FencedError on all ranks at once."""
    engine, gang, step = session.engine, session.gang, session.engine.step
    groups = session.schedule.micro_batches(step)
    weight = total_weight(session.training[index] for group in groups for index in group) or 1.0
    tree = TreeSum(len(groups))
    outputs = []
    for place in share(len(groups), gang.rank, gang.world):
        batch = collate(((index, session.training[index]) for index in groups[place]), longest=row_limit(session))
        seed = session.schedule.seed(step, place) if session.plan.prepared.method.dropout else None
        output = engine.forward_backward(forward, batch.to(gang.device).scaled(1 / weight), cross_entropy, seed=seed)
        tree.add((place, place + 1), torch.cat([engine.gradient, output.loss[None].float()]))
        engine.gradient.zero_()
        outputs.append((output, batch))
    size = len(engine.gradient) + 1
    total, flags = gang.sum_tree(tree, len(groups), flags_of(session, outputs), size=size)
    heed(session, flags, step)
    learning_rate = session.schedule.learning_rate(step)
    norm = float(engine.optim_step(learning_rate, total[:-1]))
    if norm - norm != 0:
        raise endings.DivergedError(diverged(session, step, f"the gradient is {norm}", groups[0][0]))
    tokens = sum(int(session.training.lengths[index]) for group in groups for index in group)
    return {"train_loss": float(total[-1]), "learning_rate": learning_rate, "grad_norm": norm, "tokens": tokens}


def row_limit(session: Session) -> int:
    """Longest document of any row; constant, so that kernels compiled for it are compiled once."""
    return session.plan.prepared.hyperparameters.sequence_length


# -- what rides on the reduced vector ----------------------------------------------------------------------------------


def flags_of(session: Session, outputs: list[Any]) -> torch.Tensor:
    """float32 [4]: asked to stop, a later attempt's number, and the first document whose loss is not finite, plus 1,
    in two parts."""
    fence = 0.0
    if session.gang.leads and time.monotonic() - session.fenced_at >= _FENCE_SECONDS:
        session.fenced_at = time.monotonic()
        fence = float(rundir.superseded(session.run, session.attempt) or 0)
    bad = next((found for output, batch in outputs if (found := _not_finite(output, batch))), 0)
    return torch.tensor([float(session.stop.asked), fence, float(bad // _WIDE), float(bad % _WIDE)])


def _not_finite(output: Any, batch: Any) -> int:
    wrong = torch.nonzero(~torch.isfinite(output.logprobs))
    return 1 + batch.source_of_row(int(wrong[0, 0])) if len(wrong) else 0


def heed(session: Session, flags: torch.Tensor, step: int) -> None:
    """Does what any rank's flags ask for. All ranks see the same flags of the same step."""
    stop, fence, high, low = flags.cpu().max(0).values.tolist()
    if fence:
        raise endings.FencedError(f"attempt {int(fence)} has begun; attempt {session.attempt} gives way to it")
    if high or low:
        row = next(row for row in flags.cpu().tolist() if row[2] or row[3])
        document = int(row[2]) * _WIDE + int(row[3]) - 1
        raise endings.DivergedError(diverged(session, step, "the loss is not finite", document))
    session.stopped = bool(stop)


def diverged(session: Session, step: int, what: str, document: int) -> str:
    sample = session.training[document]
    return (
        f"{what} at step {step + 1} (sample {sample.file}:{sample.line}); "
        "lower spec.hyperparameters.learningRate, or look at that sample"
    )


# -- what is due after a step ------------------------------------------------------------------------------------------


def tell(session: Session, facts: dict[str, Any], timing: dict[str, Any]) -> None:
    """Progress, metrics.jsonl and a line for people."""
    step, steps = session.engine.step, session.plan.prepared.hyperparameters.steps
    session.train_loss = facts["train_loss"]
    shown = {name: facts[name] for name in ("train_loss", "learning_rate")}
    shown |= {name: timing[name] for name in ("tokens_per_second", "eta_seconds")}
    saved = session.saver.last if session.saver is not None else None
    session.reporter.update(phase="Training", step=step, epoch=session.schedule.epoch(step), checkpoint=saved, **shown)
    if session.log is not None:
        session.log.write(step=step, **facts, **timing)
        _say(step, steps, facts, timing)


_last_line = 0.0


def _say(step: int, steps: int, facts: dict[str, Any], timing: dict[str, Any]) -> None:
    global _last_line
    if time.monotonic() - _last_line < _LOG_SECONDS and step < steps:
        return
    _last_line = time.monotonic()
    logger.info(
        "step %d/%d  loss %.4f  %.0f tokens/s  %d s left",
        step,
        steps,
        facts["train_loss"],
        timing["tokens_per_second"],
        timing["eta_seconds"],
    )


def evaluation_due(session: Session) -> bool:
    """After the last step `train` measures in any case."""
    evaluation = session.plan.request.spec.evaluation
    every = evaluation.every_steps if evaluation is not None else None
    step = session.engine.step
    last = session.plan.prepared.hyperparameters.steps
    return bool(every) and step % (every or 1) == 0 and step < last and not session.stopped


def measure_base(session: Session, forward: Forward) -> None:
    """The validation loss of the base model; a resumed attempt finds it in the checkpoint."""
    if session.before is not None:
        return
    with session.engine.model.disable_adapter():
        session.before = _loss(session, forward)
    if session.before is not None and session.saver is not None:
        checkpoint.write_notes(session.saver, validation_loss_before=session.before)
    session.reporter.update(validation_loss=session.before)
    if session.log is not None and session.before is not None:
        session.log.write(step=0, validation_loss=session.before)
        logger.info("validation loss of the base model: %.4f", session.before)


def measure(session: Session, forward: Forward) -> None:
    found = _loss(session, forward)
    session.after = found if found is not None else session.after
    session.reporter.update(validation_loss=session.after)
    if session.log is not None and found is not None:
        session.log.write(step=session.engine.step, validation_loss=found)
        logger.info("validation loss at step %d: %.4f", session.engine.step, found)


def _loss(session: Session, forward: Forward) -> float | None:
    if session.validation is None or not len(session.validation):
        return None
    session.reporter.update(phase="Evaluating")
    tokens = max(row_limit(session), 1024)
    return evaluate.loss(forward, session.validation, session.gang, tokens=tokens, stopping=lambda: session.stop.asked)


def checkpoint_due(session: Session) -> bool:
    """The leader alone decides and writes. The last step's and the one before a stop are always saved."""
    if session.saver is None:
        return False
    asked = session.plan.request.spec.checkpoint
    every_steps = asked.every_steps if asked is not None else None
    every_seconds = (asked.every_seconds if asked is not None else None) or DEFAULT_SECONDS
    step = session.engine.step
    if session.stopped or step == session.plan.prepared.hyperparameters.steps:
        return True
    if every_steps is not None:
        return step % every_steps == 0
    return time.monotonic() - session.saved_at >= every_seconds


def save(session: Session) -> None:
    session.saved_at = time.monotonic()
    if session.saver is not None:
        session.saver.save(session.engine.step, session.engine.save())


# -- from the plan to a result -----------------------------------------------------------------------------------------


def run_rank(plan: Plan, gang: Gang, stop: Stop, reporter: Reporter) -> int:
    """Trains and, on the leader, leaves the result. Returns the exit code of a rank that did not fail."""
    began = time.monotonic()
    session = begin(plan, gang, stop, reporter)
    train(session)
    result = conclude(session, seconds=time.monotonic() - began)
    # Nobody leaves before the result is there: every worker reports it.
    gang.barrier()
    code: int = gang.broadcast(result.exit_code if result is not None else 0)
    reporter.update(phase="Done")
    gang.close()
    return code


def begin(plan: Plan, gang: Gang, stop: Stop, reporter: Reporter) -> Session:
    """Loads everything, takes the attempt's number, goes on from the newest checkpoint."""
    prepared = plan.prepared
    run = rundir.directory(names.ENV_RUN_DIR)
    model_dir, data_dir = inputs()
    reporter.update(phase="Loading", steps=prepared.hyperparameters.steps)
    training = Documents.open(data_dir / TRAINING)
    validation = Documents.open(data_dir / VALIDATION) if (data_dir / VALIDATION).is_dir() else None
    base = load_base(model_dir, gang.device)
    seed = prepared.hyperparameters.seed
    model = add_adapters(base, prepared.method, seed=seed, base_uri=prepared.base.uri)
    engine = Engine(
        model, weight_decay=prepared.hyperparameters.weight_decay, max_grad_norm=prepared.hyperparameters.max_grad_norm
    )
    wanted, here = checkpoint.identity(plan, engine.shapes), checkpoint.circumstances(gang.device)
    found = gang.broadcast(checkpoint.newest(run, wanted, here) if gang.leads else None)
    attempt, saved = enter(plan, run, gang, found)
    if found is not None:
        engine.load(found.state, found.step)
    asked = plan.request.spec.checkpoint
    saver = None
    if gang.leads:
        notes = found.notes if found is not None else {}
        saver = checkpoint.Saver(
            run,
            attempt=attempt,
            keep=(asked.keep if asked is not None else None) or DEFAULT_KEEP,
            facts={"identity": wanted, "circumstances": here, "notes": notes},
        )
        saver.last = saved
    resume = found.resume if found is not None else "exact"
    reporter.update(attempt=attempt, from_step=engine.step, resume=resume, step=engine.step, checkpoint=saved)
    return Session(
        plan=plan,
        run=run,
        gang=gang,
        stop=stop,
        engine=engine,
        training=training,
        validation=validation,
        schedule=Schedule(training.lengths, prepared.hyperparameters, prepared.bins_per_micro_batch),
        reporter=reporter,
        attempt=attempt,
        from_step=engine.step,
        resume=resume,
        saver=saver,
        log=rundir.MetricsLog(run, attempt) if gang.leads else None,
        before=found.notes.get("validation_loss_before") if found is not None else None,
    )


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
    """The leader's result of a training that did not fail: Succeeded with an adapter, or Stopped with a checkpoint."""
    if session.saver is None:
        return None
    session.reporter.update(phase="Saving")
    adapter: dict[str, Any] = {}
    if not session.stopped:
        folder = f"adapter/a{session.attempt}"
        digest = proof.export(session.engine.model, session.run / folder, samples(session.training))
        adapter = {"adapter_directory": folder, "adapter_digest": digest}
    error = session.saver.wait()
    if session.stopped and error is not None:
        raise endings.TryAgainError(f"stopped on request, but the checkpoint could not be saved: {error}")
    step, steps = session.engine.step, session.plan.prepared.hyperparameters.steps
    said = f"stopped on request after step {step} of {steps}" if session.stopped else f"trained {steps} steps"
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
            **adapter,
        ),
    )


def samples(training: Documents) -> list[Any]:
    """Candidates for the proof."""
    return [training[index] for index in range(min(256, len(training)))]


def metrics(session: Session, seconds: float) -> Metrics:
    step = session.engine.step
    return Metrics(
        train_loss=_finite(session.train_loss),
        validation_loss_before=_finite(session.before),
        validation_loss_after=_finite(session.after),
        steps=step,
        tokens=round(session.schedule.epoch(step) * session.training.tokens()),
        seconds=round(seconds, 3),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None


# -- the process -------------------------------------------------------------------------------------------------------


def main(plan_path: Path) -> int:
    """Returns the exit code. A failure is left in the status folder for the launcher, with its reason."""
    rank = int(os.environ.get("RANK", "0"))
    folder = Path(os.environ[ENV_STATUS_DIR]) if os.environ.get(ENV_STATUS_DIR) else None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    stop = Stop()
    stop.listen()
    reporter = Reporter(folder, rank)
    reporter.update(phase="Starting")
    dump_stacks_on_signal(folder, rank)
    try:
        return run_rank(rundir.load_plan(plan_path), join(), stop, reporter)
    except Exception as error:  # noqa: BLE001 - every end is reported with its reason
        ending = endings.classify(error)
        logger.error("%s\n%s", ending.message, "".join(traceback.format_exception(error)).rstrip())
        leave(folder, rank, ending)
        return ending.exit_code


def leave(folder: Path | None, rank: int, ending: endings.Ending) -> None:
    """For the launcher: which rank failed first, and why."""
    if folder is not None:
        body = {**vars(ending), "exit_code": int(ending.exit_code), "rank": rank, "at": time.time()}
        temporary = folder / f"ending-{rank}.tmp"
        temporary.write_text(canonical_json(body))
        temporary.replace(folder / f"ending-{rank}.json")


def die_with_parent() -> None:
    """A launcher that is killed takes its ranks along: left behind, they would train beside the next gang."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    code = main(Path(sys.argv[1]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure the process group's threads may wait for peers that are gone.
    os._exit(code)

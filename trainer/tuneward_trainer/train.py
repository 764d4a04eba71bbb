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
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers.utils.logging import disable_progress_bar

from tuneward_api import names
from tuneward_api.files import Plan, canonical_json
from tuneward_trainer import (
    checkpoint,
    defaults,
    divergence,
    endings,
    evaluate,
    memory,
    patches,
    reference,
    rundir,
    trial,
)
from tuneward_trainer.batch import collate
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents
from tuneward_trainer.distributed import Gang, TreeSum, join, pick_device, share
from tuneward_trainer.losses import Preference
from tuneward_trainer.machine import processors
from tuneward_trainer.patches import Forward, Patched
from tuneward_trainer.progress import ENV_STATUS_DIR, Clock, Reporter, dump_stacks_on_signal
from tuneward_trainer.session import Session, Stop, begin, conclude, device_memory

DEFAULT_SECONDS: Final = 300
_LOG_SECONDS: Final = 2.0
_FENCE_SECONDS: Final = 2.0
_YIELD_SECONDS: Final = 0.5
_WIDE: Final = 1 << 20
"""A document's index rides on the reduced vector as two floats below this."""

logger = logging.getLogger("tuneward_trainer")


# -- the loop --------------------------------------------------------------------------------------------------------


def train(session: Session) -> None:
    """From the session's step to the last one, or to the step after which all agree to stop."""
    hyper = session.plan.prepared.hyperparameters
    clock = Clock(hyper.steps)
    chosen, recompute = session.plan.prepared.packing.patches, session.choice.recompute
    with patches.applied(session.engine.model, chosen, recompute=recompute) as forward:
        start(session, forward)
        session.reporter.update(phase="Training", step=session.engine.step)
        clock.reset()
        session.saved_at = time.monotonic()
        while session.engine.step < hyper.steps and not (session.stopped or session.best.spent):
            facts = one_step(session, forward)
            write_proved(session)
            tell(session, facts, clock.tick(session.engine.step, facts["tokens"]))
            if evaluation_due(session):
                compare(session, forward)
                clock.reset()
            if checkpoint_due(session):
                save(session)
        if not (session.stopped or session.best.spent):
            compare(session, forward)
        choose(session, forward)


def one_step(session: Session, forward: Forward) -> dict[str, Any]:
    """One optimizer step. Raises DivergedError or FencedError on all ranks at once."""
    engine, gang, loss, step = session.engine, session.gang, session.loss, session.engine.step
    groups = session.schedule.micro_batches(step)
    total = loss.total(session.training[index] for group in groups for index in group) or 1.0
    tree = TreeSum(len(groups))
    outputs = []
    for place in share(len(groups), gang.rank, gang.world):
        batch = collate(((index, session.training[index]) for index in groups[place]), longest=session.row_limit)
        seed = session.schedule.seed(step, place) if session.plan.prepared.method.dropout else None
        output = engine.forward_backward(forward, batch.to(gang.device).scaled(1 / total), loss, seed=seed)
        tree.add((place, place + 1), torch.cat([engine.gradient, output.figures.float()]))
        engine.gradient.zero_()
        outputs.append((output, batch))
    size = len(engine.gradient) + len(loss.figures)
    summed, flags = gang.sum_tree(tree, len(groups), flags_of(session, outputs), size=size)
    heed(session, flags, step)
    learning_rate = session.schedule.learning_rate(step)
    norm = float(engine.optim_step(learning_rate, summed[: len(engine.gradient)]))
    figures = dict(zip(("train_loss", *loss.figures[1:]), summed[len(engine.gradient) :].tolist(), strict=True))
    judge(session, step, loss=figures["train_loss"], norm=norm)
    tokens = sum(int(session.training.lengths[index]) for group in groups for index in group)
    return {**figures, "learning_rate": learning_rate, "grad_norm": norm, "tokens": tokens}


# -- what rides on the reduced vector ----------------------------------------------------------------------------------


def flags_of(session: Session, outputs: list[Any]) -> torch.Tensor:
    """float32 [6]: asked to stop, a later attempt's number, the first document whose loss is not finite, plus 1, in two
    parts, how many of these there are, and how many documents in all."""
    fence = 0.0
    if session.gang.leads and time.monotonic() - session.fenced_at >= _FENCE_SECONDS:
        session.fenced_at = time.monotonic()
        fence = float(rundir.superseded(session.run, session.attempt) or 0)
    bad = [document for output, batch in outputs for document in _not_finite(output, batch)]
    first = 1 + bad[0] if bad else 0
    documents = sum(batch.documents for _, batch in outputs)
    return torch.tensor([float(session.stop.asked), fence, first // _WIDE, first % _WIDE, len(bad), documents])


def _not_finite(output: Any, batch: Any) -> list[int]:
    """Documents with a row whose part of the loss is not finite."""
    wrong = torch.nonzero(~torch.isfinite(output.logprobs.cpu() * batch.weights))[:, 0].tolist()
    return list(dict.fromkeys(batch.source_of_row(row) for row in wrong))


def heed(session: Session, flags: torch.Tensor, step: int) -> None:
    """Does what any rank's flags ask for. All ranks see the same flags of the same step."""
    rows = flags.cpu()
    stop, fence = rows[:, :2].max(0).values.tolist()
    if fence:
        raise endings.FencedError(f"attempt {int(fence)} has begun; attempt {session.attempt} gives way to it")
    bad, documents = (int(count) for count in rows[:, 4:].sum(0).tolist())
    if bad:
        high, low = next(row[2:4] for row in rows.tolist() if row[4])
        first = session.training[int(high) * _WIDE + int(low) - 1]
        which = f"sample {first.file}:{first.line}"
        which = which if bad == 1 else f"{bad} of {documents} samples, the first {which.removeprefix('sample ')}"
        look = "look at that sample, or " if bad < documents else ""
        raise give_up(session, f"the loss is not finite at step {step + 1} ({which})", look, state=step, learnt=step)
    session.stopped = bool(stop)


# -- divergence: no rank sees another number than the others do --------------------------------------------------------


def judge(session: Session, step: int, *, loss: float, norm: float) -> None:
    """Whether the step just done (`step` from 0) was the last one that makes sense. Raises DivergedError."""
    watch = session.watch
    if norm - norm != 0 or loss - loss != 0:
        what = "gradient" if loss - loss == 0 else "loss"
        raise give_up(session, f"the {what} is not finite at step {step + 1}", state=step, learnt=step)
    last = step + 1 == session.plan.prepared.hyperparameters.steps
    if watch.see(loss, last=last):
        found = step + 1 - len(watch.suspects)
        # The loss of a step is that of the update before it.
        raise give_up(session, divergence.exploded(watch, step=step + 1), state=found, learnt=found - 1)
    if watch.suspected and session.gang.leads:
        logger.warning(
            "step %d: loss %.4g is far above %.4g: nothing is saved until it falls", step + 1, loss, watch.highest
        )


def give_up(session: Session, what: str, look: str = "", *, state: int, learnt: int | None = None) -> endings.DivergedError:
    """`state`: the number of updates that gave the bad loss; the next try shall not begin with it. `learnt`: the step,
    from 0, whose samples are to be named."""
    groups = session.schedule.micro_batches(learnt) if learnt is not None else []
    samples = [session.training[index] for group in groups for index in group]
    if session.saver is not None:
        session.saver.discard(state)
        session.reporter.update(checkpoint=session.saver.last)
        rundir.leave(session.run, session.attempt, "diverged.json", divergence.record(what, session.watch, samples))
    prepared = session.plan.prepared
    remedy = divergence.damaged_weights(session.engine.model)
    if remedy is None and not state:
        remedy = f"{look}name another spec.model.uri: the base model itself gives it, nothing was learnt yet"
    if remedy is None:
        usual = defaults.learning_rate(prepared.base.parameters, prepared.objective.type)
        remedy = look + divergence.advice(prepared.hyperparameters.learning_rate, usual)
    named = f"; samples of step {learnt + 1}: {divergence.listing(samples)}" if learnt is not None else ""
    return endings.DivergedError(f"{what}; {remedy}{named}")


# -- before the first step ---------------------------------------------------------------------------------------------


def start(session: Session, forward: Patched) -> None:
    """Measures the model that the job starts from, whose state the engine has, and then goes on to the checkpoint's."""
    try:
        prepare_losses(session, forward)
        if session.before is None and not session.stopped:
            measure(session, forward)
            session.before, session.after = session.after, {}
    except evaluate.StoppedError:
        session.stopped = True
    if session.before is not None and session.saver is not None:
        checkpoint.write_notes(
            session.saver, **{f"validation_{name}_before": value for name, value in session.before.items()}
        )
    if session.found is not None:
        session.engine.load(session.found.state, session.found.step)
        session.found = replace(session.found, state={})


def prepare_losses(session: Session, forward: Forward) -> None:
    """A preference is one against the model that the job starts from."""
    asked = session.plan.prepared.objective.dpo
    if asked is None:
        return
    session.reporter.update(phase="Evaluating")
    session.loss = Preference(asked.beta, _reference(session, forward, session.training, TRAINING))
    if session.validation is not None:
        session.held_out_loss = Preference(asked.beta, _reference(session, forward, session.validation, VALIDATION))


def _reference(session: Session, forward: Forward, documents: Documents, part: str) -> torch.Tensor:
    return reference.measure(
        forward,
        documents,
        part,
        reference.Place(
            run=session.run,
            attempt=session.attempt,
            identity=checkpoint.identity(session.plan, session.engine.shapes),
        ),
        session.gang,
        row_tokens=_row_tokens(session),
        stopping=lambda: session.stop.asked,
    )


# -- what is due after a step ------------------------------------------------------------------------------------------


def tell(session: Session, facts: dict[str, Any], timing: dict[str, Any]) -> None:
    """Progress, metrics.jsonl and a line for people."""
    step, steps = session.engine.step, session.plan.prepared.hyperparameters.steps
    session.train_loss = facts["train_loss"]
    shown = {name: value for name, value in facts.items() if name not in ("grad_norm", "tokens")}
    shown |= {name: timing[name] for name in ("tokens_per_second", "eta_seconds")}
    saved = session.saver.last if session.saver is not None else None
    shown |= {"memory_bytes": memory.taken(session.gang.device.type), "epoch": session.schedule.epoch(step)}
    session.reporter.update(phase="Training", step=step, checkpoint=saved, **shown)
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
        "step %d/%d  loss %.4f  %s%.0f tokens/s  %d s left",
        step,
        steps,
        facts["train_loss"],
        f"{facts['reward_accuracy']:.0%} of the pairs right  " if "reward_accuracy" in facts else "",
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


def compare(session: Session, forward: Patched) -> None:
    """Measures, and with `patience` keeps the state if it is the best so far. A rank that is asked to stop meanwhile stops
    all: the next attempt measures again."""
    try:
        measure(session, forward)
    except evaluate.StoppedError:
        session.stopped = True
        return
    if session.best.patience is None or not session.after:
        return
    better = session.best.see(session.engine.step, session.after["loss"])
    if session.saver is not None:
        checkpoint.write_notes(session.saver, **session.best.notes())
        if better:
            session.saver.pinned = session.engine.step
            # No validation loss was lower, so the state is a good one.
            save(session, proved=True)


def measure(session: Session, forward: Patched) -> None:
    """The validation loss, and what belongs to it, after the step that the engine is at. Raises StoppedError."""
    found = session.after = _figures(session, forward) or {}
    session.reporter.update(validation_loss=found.get("loss"))
    if session.log is not None and found:
        session.log.write(step=session.engine.step, **{f"validation_{name}": value for name, value in found.items()})
        said = "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in found.items() if name != "loss")
        logger.info("validation loss at step %d: %.4f%s", session.engine.step, found["loss"], said)


def _figures(session: Session, forward: Patched) -> dict[str, float] | None:
    validation, unit = session.validation, session.schedule.unit
    if validation is None or not len(validation):
        return None
    session.reporter.update(phase="Evaluating")
    found = evaluate.figures(
        forward,
        validation,
        session.held_out_loss,
        session.gang,
        rows=evaluate.rows_of(validation.lengths.tolist(), _row_tokens(session), unit),
        stopping=lambda: session.stop.asked,
    )
    step = session.engine.step
    if found is not None and found["loss"] - found["loss"] != 0:
        raise give_up(session, f"the validation loss is not finite after step {step}", state=step)
    return found


def _row_tokens(session: Session) -> int:
    """Tokens of a row that is only looked at: nothing of it is kept for a backward pass."""
    return max(session.schedule.row_tokens, 1024)


def checkpoint_due(session: Session) -> bool:
    """The leader alone decides and writes. The last step's and the one before a stop are always saved, but for a state
    that is suspected to have diverged: it would be what the next attempt goes on from."""
    if session.saver is None or session.watch.suspected:
        return False
    asked = session.plan.request.spec.checkpoint
    every_steps = asked.every_steps if asked is not None else None
    every_seconds = (asked.every_seconds if asked is not None else None) or DEFAULT_SECONDS
    step = session.engine.step
    if session.stopped or step == session.plan.prepared.hyperparameters.steps:
        return True
    if every_steps is not None:
        return step // every_steps > session.saved_step // every_steps
    return time.monotonic() - session.saved_at >= every_seconds


def save(session: Session, *, proved: bool = False) -> None:
    """The leader alone. Copies the state; it is written at once only where it is `proved` to be good, or where no further
    step will tell."""
    saver, engine, hyper = session.saver, session.engine, session.plan.prepared.hyperparameters
    if saver is None:
        return
    session.saved_at, session.saved_step = time.monotonic(), engine.step
    facts = {**saver.facts, "watch": session.watch.memory()}
    snapshot = checkpoint.Snapshot(engine.step, engine.save(), facts)
    at_once = proved or session.stopped or engine.step == hyper.steps
    session.unproved = None if at_once else snapshot
    if at_once:
        saver.save(snapshot)


def write_proved(session: Session) -> None:
    """Writes the last copy: the step after it has found a sound loss with it."""
    if session.saver is not None and session.unproved is not None and not session.watch.suspected:
        session.saver.save(session.unproved)
        session.unproved = None


def choose(session: Session, forward: Patched) -> None:
    """With `patience`, the state with the lowest validation loss is the result; the engine gets it, on every rank."""
    best, engine = session.best, session.engine
    session.last_step = engine.step
    if session.stopped or best.step is None or best.step == engine.step:
        return
    found = None
    if session.saver is not None:
        session.saver.wait()
        found = checkpoint.at(session.run, best.step, *session.saver.marks())
    found = session.gang.broadcast(found)
    if found is None:
        raise endings.TryAgainError(
            f"the checkpoint of step {best.step}, which had the lowest validation loss, is not there"
        )
    engine.load(found.state, found.step)
    compare(session, forward)


# -- from the plan to a result -----------------------------------------------------------------------------------------


def run_rank(plan: Plan, gang: Gang, stop: Stop, reporter: Reporter) -> int:
    """Trains and, on the leader, leaves the result. Returns the exit code of a rank that did not fail."""
    began = time.monotonic()
    session = begin(plan, gang, stop, reporter)
    trial.before(session)
    train(session)
    trial.after(session)
    result = conclude(session, seconds=time.monotonic() - began)
    # Nobody leaves before the result is there: every worker reports it.
    gang.barrier()
    code: int = gang.broadcast(result.exit_code if result is not None else 0)
    reporter.update(phase="Done")
    gang.close()
    return code


# -- the process -------------------------------------------------------------------------------------------------------


def main(plan_path: Path) -> int:
    """Returns the exit code. A failure is left in the status folder for the launcher, with its reason."""
    rank = int(os.environ.get("RANK", "0"))
    folder = Path(os.environ[ENV_STATUS_DIR]) if os.environ.get(ENV_STATUS_DIR) else None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    # About calls between libraries, and bars for a person at a terminal: no news in a log.
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    stop = Stop()
    stop.listen()
    reporter = Reporter(folder, rank)
    reporter.update(phase="Starting")
    dump_stacks_on_signal(folder, rank)
    try:
        return run_rank(rundir.load_plan(plan_path), join(), stop, reporter)
    except Exception as error:  # noqa: BLE001 - every end is reported with its reason
        ending = endings.classify(error, lambda: memory_remedy(plan_path))
        logger.error("%s\n%s", ending.message, "".join(traceback.format_exception(error)).rstrip())
        leave(folder, rank, ending)
        if ending.secondary:
            # The launcher knows ranks by the first that it sees gone, which must not be one that only lost another.
            time.sleep(_YIELD_SECONDS)
        return ending.exit_code


def memory_remedy(plan_path: Path) -> str:
    """What to lower where memory ran out."""
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    return memory.remedy(rundir.load_plan(plan_path), rundir.directory(names.ENV_MODEL_DIR), device_memory(device))


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


def run(plan_path: Path) -> int:
    """`main` as a process of its own. The caller ends by os._exit: after a failure the process group's threads may wait
    for peers that are gone."""
    die_with_parent()
    # Where the launcher was forked, torch was loaded before it was known how many ranks share the processors.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or processors()))
    code = main(plan_path)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    os._exit(run(Path(sys.argv[1])))

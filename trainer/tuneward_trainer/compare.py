"""The model that the job starts from against what becomes of it: losses on held-out documents, and the state that wins.

What is measured here is the same on every rank (`evaluate.py`), so all of them decide alike.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from tuneward_trainer import checkpoint, evaluate, reference
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents
from tuneward_trainer.losses import Preference
from tuneward_trainer.patches import Forward, Patched
from tuneward_trainer.saving import save
from tuneward_trainer.session import Session
from tuneward_trainer.verdict import give_up

logger = logging.getLogger("tuneward_trainer")


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


# -- along the training -------------------------------------------------------------------------------------------------


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
    """Tokens of a row that is only looked at: nothing of it is kept for a backward pass. 0: a document has a row alone."""
    return 0 if session.apart else max(session.schedule.row_tokens, 1024)


def choose(session: Session, forward: Patched) -> None:
    """With `patience`, the state with the lowest validation loss is the result; the engine gets it, on every rank."""
    best, engine = session.best, session.engine
    session.last_step = engine.step
    if session.stopped or best.step is None or best.step == engine.step:
        return
    found = None
    if session.saver is not None:
        session.saver.wait()
    if session.saver is not None and session.gang.leads:
        found = checkpoint.at(session.run, best.step, *session.saver.marks())
    found = session.gang.broadcast(found)
    if found is None:
        # Written in vain, as on a full disk: no further attempt would find it, and what has been learnt since is something.
        session.best_lost = True
        return
    engine.load(found.state, found.step)
    compare(session, forward)

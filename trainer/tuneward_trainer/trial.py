"""`evaluation.task`: what the model writes before and after the training, kept and graded.

It asks the plain model, so it stands outside the training, whose patches take packed rows only.
"""

from __future__ import annotations

import logging
import time

from tuneward_api import names
from tuneward_trainer import checkpoint, rundir, task
from tuneward_trainer.evaluate import StoppedError
from tuneward_trainer.session import Session
from tuneward_trainer.tokenizer import load_tokenizer

logger = logging.getLogger("tuneward_trainer")


def before(session: Session) -> None:
    """The model that the job starts from, whose state the engine has until the training begins. A resumed attempt finds
    the score in its checkpoint."""
    if session.score_before is None and session.found is None:
        session.score_before = _ask(session, "base")
        if session.score_before is not None and session.saver is not None:
            checkpoint.write_notes(session.saver, task_score_before=session.score_before)


def after(session: Session) -> None:
    """The result."""
    session.score_after = _ask(session, "tuned")


def _ask(session: Session, which: str) -> float | None:
    evaluation, validation = session.plan.request.spec.evaluation, session.validation
    asked = evaluation.task if evaluation is not None else None
    if asked is None or validation is None or session.stopped:
        return None
    session.reporter.update(phase="Evaluating")
    began = time.monotonic()
    tokenizer = load_tokenizer(rundir.directory(names.ENV_MODEL_DIR))
    try:
        found = task.answers(
            session.engine.model,
            tokenizer,
            validation,
            asked,
            session.gang,
            unit=session.schedule.unit,
            stopping=lambda: session.stop.asked,
        )
    except StoppedError:
        session.stopped = True
        return None
    score = task.score(found)
    if session.gang.leads:
        task.keep(rundir.attempt_directory(session.run, session.attempt), found, of=which)
        graded = f", {score:.0%} of them right ({asked.grader})" if score is not None else ""
        logger.info("%s model: %d answers in %.0f s%s", which, len(found), time.monotonic() - began, graded)
    return score

"""When the leader saves, and what: a state is written once the step after it has found a sound loss with it."""

from __future__ import annotations

import time
from typing import Final

from tuneward_trainer import checkpoint
from tuneward_trainer.session import Session

DEFAULT_SECONDS: Final = 300


def checkpoint_due(session: Session) -> bool:
    """The leader alone decides, and writes alone unless each rank holds a part of the state."""
    due = _due(session)
    return session.gang.broadcast(due) if session.gang.optimizer_sharded else due


def _due(session: Session) -> bool:
    """The last step's and the one before a stop are always saved, but for a state
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
    """Copies the state; it is written at once only where it is `proved` to be good, or where no further
    step will tell."""
    saver, engine, hyper = session.saver, session.engine, session.plan.prepared.hyperparameters
    if saver is None:
        return
    if proved and session.unproved is None and session.saved_step == engine.step:
        # It is there, or on its way: written over, it would be no checkpoint for a while, and it may be the only one.
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

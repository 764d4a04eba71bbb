"""Kernels on the device itself, before the first step: prepare has checked on a CPU, which has others.

A packed row is held against its documents one by one, and compiled layers against themselves uncompiled. It is also when
they are compiled: ranks may take their time now, and none waits for another one in a collective of a step.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import torch
from torch import Tensor

from tuneward_trainer import compiled, patches
from tuneward_trainer.batch import Batch, collate, padded
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import computed_in
from tuneward_trainer.session import Session

LIMITS: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""By what is computed in: largest relative difference of log-probabilities and of the whole gradient. Rounding gives a
tenth of it, a wrong kernel more than all."""

logger = logging.getLogger("tuneward_trainer")


def usable(session: Session) -> list[str]:
    """The plan's patches, without packed attention or compiled layers where they are not wanted or not right on any rank's
    device. Where compiled layers stay, the session's rows get one length."""
    if asked(session):
        session.patches = kernels_seen_right(session, session.patches)
    chosen = session.patches
    without = [name for name in chosen if name != patches.COMPILED]
    # Kernels that another attempt makes, or cannot make, may round otherwise: not where the same bytes are promised.
    exact = session.gang.device.type == "cuda" and torch.are_deterministic_algorithms_enabled()
    if patches.COMPILED not in chosen or exact or not compiled.asked(session.gang.device.type):
        return without
    if session.gang.model_sharded:
        # A rank that cannot compile would leave the others in a collective of the layer that it broke off.
        logger.info("the patch %s is not used: weights that ranks hold together are not compiled", patches.COMPILED)
        return without
    began, length = time.monotonic(), session.choice.bins * session.schedule.row_tokens
    # On the control group, which is patient: one rank may compile while another has it all in its cache.
    complaints = session.gang.gather([complaint] if (complaint := _complaint(session, length, without)) else [])
    if complaints:
        logger.warning("the patch %s is not used: %s", patches.COMPILED, complaints[0])
        compiled.forget()
        return without
    if session.gang.leads:
        logger.info("layers are compiled for rows of %d tokens (%.0f s)", length, time.monotonic() - began)
    session.row_length = length
    return chosen


def asked(session: Session) -> bool:
    """A CPU runs what prepare has checked."""
    return session.gang.device.type == "cuda"


def kernels_seen_right(session: Session, chosen: list[str]) -> list[str]:
    """`chosen`, or what is left of it where on any rank the first micro-batch's documents have other log-probabilities in
    a row than each alone."""
    if patches.PACKED_ATTENTION not in chosen:
        return chosen
    packed = [name for name in chosen if name != patches.COMPILED]
    alone = [name for name in packed if name != patches.PACKED_ATTENTION]
    complaints = session.gang.gather([complaint] if (complaint := _unlike(session, packed, alone)) else [])
    if not complaints:
        return chosen
    logger.warning("the patch %s is not used: %s", patches.PACKED_ATTENTION, complaints[0])
    return alone


def _unlike(session: Session, packed: list[str], alone: list[str]) -> str | None:
    # The same one on every rank: through a model that they hold together a pass is one of all.
    documents = session.micro_batches(session.engine.step)[0]
    batch = collate(((index, session.training[index]) for index in documents), longest=session.row_limit)
    batch, found = batch.to(session.gang.device), []
    try:
        for names in (alone, packed):
            with patches.applied(session.engine.model, names) as forward, torch.no_grad():
                found.append(forward(batch))
    except Exception as error:  # noqa: BLE001 - a kernel that fails is not used, whatever it says
        return compiled.said(error)
    worst, limit = _difference(found[1], found[0]), _limit(session)
    # NaN must not pass.
    return None if worst <= limit else f"on this device log-probabilities differ by {worst:.1e}, more than {limit:g}"


def _limit(session: Session) -> float:
    return LIMITS[computed_in(session.gang.device)]


def _complaint(session: Session, length: int, without: list[str]) -> str | None:
    engine = session.engine
    if not isinstance(engine, Engine):
        raise TypeError("a model that is trained whole is not compiled")
    groups = session.micro_batches(engine.step)
    documents = groups[session.gang.rank % len(groups)]
    batch = collate(((index, session.training[index]) for index in documents), longest=session.row_limit)
    batch = padded(batch, length).to(session.gang.device)
    try:
        wanted, found = (_learnt(session, engine, batch, names) for names in (without, [*without, patches.COMPILED]))
    except Exception as error:  # noqa: BLE001 - no compiler, a graph that breaks, a kernel that fails: all have one remedy
        engine.gradient.zero_()
        return compiled.said(error)
    errors = [_difference(one, other) for one, other in zip(found, wanted, strict=True)]
    limit = _limit(session)
    # NaN must not pass.
    if all(error <= limit for error in errors):
        return None
    return f"log-probabilities differ by {errors[0]:.1e} and the gradient by {errors[1]:.1e}, more than {limit:g}"


def _learnt(session: Session, engine: Engine, batch: Batch, names: list[str]) -> tuple[Tensor, Tensor]:
    with patches.applied(engine.model, names, recompute=session.choice.recompute) as forward:
        output = engine.forward_backward(forward, batch, cross_entropy)
    gradient = engine.gradient.clone()
    engine.gradient.zero_()
    return output.logprobs, gradient


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))

"""Compiled layers on the device itself, before the first step: prepare has checked their graphs, not their kernels.

It is also when they are compiled: ranks may take their time now, and none waits for another one in a collective of a step.
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
from tuneward_trainer.model import plain
from tuneward_trainer.session import Session

LIMITS: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""By the base's dtype: largest relative difference of log-probabilities and of the whole gradient. Rounding gives a tenth of
it, a wrong kernel more than all."""

logger = logging.getLogger("tuneward_trainer")


def usable(session: Session) -> list[str]:
    """The plan's patches, without compiled layers where they are not wanted or not right on any rank's device. Where they
    stay, the session's rows get one length."""
    chosen = session.plan.prepared.packing.patches
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
    limit = LIMITS.get(plain(engine.model).dtype, min(LIMITS.values()))
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

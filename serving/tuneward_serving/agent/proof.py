"""The proof: does the engine compute with this adapter what the trainer computed?

A served adapter can be wrong without an error: not applied at all, applied to another base, scaled otherwise. So the
log-probabilities of fixed texts, written by the trainer, are compared with the engine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuneward_api.conditions import Reason
from tuneward_api.files import Proof, proof_tolerance
from tuneward_serving.agent.adapter_check import Refused
from tuneward_serving.agent.engine_client import EngineClient, EngineRefused

SAME = 1e-6
"""Two forwards that differ by no more are the same forward."""


@dataclass(frozen=True)
class Measured:
    """The engine's log-probabilities of one text of the proof."""

    base: Sequence[float]
    tuned: Sequence[float]


async def measure(engine: EngineClient, proof: Proof, *, base: str, name: str) -> list[Measured]:
    try:
        return [
            Measured(await engine.logprobs(base, text.ids), await engine.logprobs(name, text.ids)) for text in proof.texts
        ]
    except EngineRefused as error:
        raise Refused(Reason.PROOF_FAILED, f"the engine refused the proof's text: {error}") from error


def judge(proof: Proof, measured: Sequence[Measured], *, dtype: str = "", least_tolerance: float = 0.0) -> None:
    """Raises Refused unless tuned differs from base and both are what the trainer had. `dtype`: what the engine computes in,
    where it says so: in bfloat16 it cannot agree as closely as a trainer in float32 asks for."""
    engines = 0.0 if dtype in ("", proof.dtype) else proof_tolerance(dtype)
    tolerance = max(proof.tolerance, engines, least_tolerance)
    if not proof.texts:
        raise Refused(Reason.PROOF_FAILED, "proof.json holds no text")
    pairs = list(zip(proof.texts, measured, strict=True))
    effect = max(_distance(own.tuned, own.base) for _, own in pairs)
    expected = max(_distance(text.tuned, text.base) for text, _ in pairs)
    if effect <= SAME or effect <= tolerance < expected / 2:
        raise Refused(
            Reason.NO_EFFECT,
            f"the engine answers as the base model does (they differ by {effect:.2g}, the trainer's by {expected:.2g})",
        )
    for text, own in pairs:
        _compare("base model", own.base, text.base, tolerance)
        _compare("adapter", own.tuned, text.tuned, tolerance)


def _compare(what: str, found: Sequence[float], expected: Sequence[float], tolerance: float) -> None:
    distance = _distance(found, expected)
    if not distance <= tolerance:  # NaN is no agreement
        raise Refused(
            Reason.PROOF_FAILED,
            f"the {what}'s log-probabilities differ from the trainer's by {distance:.3g}, allowed are {tolerance:.3g}",
        )


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest absolute difference; infinite when the lengths differ or a number is not finite."""
    if len(one) != len(other):
        return float("inf")
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max((d if d == d else float("inf") for d in differences), default=0.0)

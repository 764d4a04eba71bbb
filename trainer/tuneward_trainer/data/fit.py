"""What happens to a sample that is too long, or of a format that the objective does not learn: never silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from tuneward_api.objective import PAIRS, ObjectiveType
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.formats import Format
from tuneward_trainer.data.problems import SampleError

OnTooLong: TypeAlias = Literal["Error", "Split", "Truncate", "Skip"]
Fate: TypeAlias = Literal["split", "truncated", "skipped"]
_RAISE = "spec.hyperparameters.sequenceLength; raise it as far as the model allows"


@dataclass(frozen=True)
class Fitted:
    """What is left of a sample, and what was done where it was too long."""

    documents: list[Encoded]
    fate: Fate | None = None


def check_format(form: Format, objective: ObjectiveType) -> None:
    """Raises SampleError for a sample that the objective does not learn from."""
    if objective == "Pretraining" and form != "Text":
        raise SampleError("", f"is a sample of format {form}", "samples with text, as spec.objective.type is Pretraining")
    if objective == "DPO" and form not in PAIRS:
        raise SampleError(
            "",
            f"is a sample of format {form}",
            "pairs (chosen and rejected; or input, preferred_output, non_preferred_output), as spec.objective.type is DPO",
        )
    if objective == "SFT" and form in PAIRS:
        raise SampleError(
            "", f"is a pair of two answers (format {form})", "samples with one answer; or set spec.objective.type to DPO"
        )


def fit(documents: list[Encoded], longest: int, on_too_long: OnTooLong, form: Format) -> Fitted:
    """The documents of one sample, each at most `longest` tokens. Raises SampleError where that is refused."""
    kept: list[Encoded] = []
    fate: Fate | None = None
    for document in documents:
        if len(document) <= longest:
            kept.append(document)
        elif on_too_long == "Skip":
            fate = "skipped"
        elif on_too_long == "Truncate":
            kept.append(truncate(document, longest))
            fate = "truncated"
        elif on_too_long == "Split" and form == "Text":
            kept += split(document, longest)
            fate = "split"
        else:
            raise _too_long(document, longest, form)
    return Fitted(kept, fate)


def fit_pair(pair: list[Encoded], longest: int, on_too_long: OnTooLong, form: Format) -> Fitted:
    """Both answers of a pair, or neither. Raises SampleError where that is refused, or where a cut leaves no difference."""
    worst = max(pair, key=len)
    if len(worst) <= longest:
        return Fitted(pair)
    if on_too_long == "Skip":
        return Fitted([], "skipped")
    if on_too_long != "Truncate":
        raise _too_long(worst, longest, form)
    cut = [truncate(document, longest) for document in pair]
    if np.array_equal(cut[0].ids, cut[1].ids):
        raise SampleError(
            "the pair",
            f"has the same first {longest} tokens in both answers",
            f"answers that differ before they are cut ({_RAISE}, or set spec.datasets.onTooLong to Skip)",
        )
    return Fitted(cut, "truncated")


def _too_long(document: Encoded, longest: int, form: Format) -> SampleError:
    ways = "Split, Truncate or Skip" if form == "Text" else "Truncate or Skip"
    return SampleError(
        "an answer with its prompt" if form in PAIRS else "the sample",
        f"has {len(document)} tokens",
        f"at most {longest} ({_RAISE}, or set spec.datasets.onTooLong to {ways})",
    )


def truncate(document: Encoded, longest: int) -> Encoded:
    """The beginning. Raises SampleError if nothing of it is learnt."""
    weights = document.weights[:longest]
    if not weights.any():
        first = int(np.flatnonzero(document.weights)[0])
        raise SampleError(
            "the sample",
            f"has nothing to learn in its first {longest} tokens: the first one that is learnt is number {first + 1}",
            f"at least {first + 1} tokens a sample ({_RAISE}, or set spec.datasets.onTooLong to Skip)",
        )
    return Encoded(document.ids[:longest], weights)


def split(document: Encoded, longest: int) -> list[Encoded]:
    """Pieces of at most `longest` tokens. Each begins with the last token of the one before, as what stands before its
    first learnt token: so every token of the text but the first is learnt once."""
    pieces = []
    for start in range(0, len(document) - 1, longest - 1):
        weights = document.weights[start : start + longest].copy()
        weights[0] = 0
        pieces.append(Encoded(document.ids[start : start + longest], weights))
    return pieces

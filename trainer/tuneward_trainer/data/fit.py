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


@dataclass(frozen=True)
class Length:
    """Tokens that a sample may have: `longest` in this job; `most` of what the model was made for, if it says so."""

    longest: int
    most: int | None = None

    def remedy(self, needed: int, ways: str) -> str:
        """What helps a sample that is allowed from `needed` tokens on; `ways`: values of onTooLong that do."""
        other = f"set spec.datasets.onTooLong to {ways}"
        if self.most is None or needed <= self.most:
            return f"spec.hyperparameters.sequenceLength; raise it as far as the model allows, or {other}"
        shorter = f"the model was made for no more than {self.most}: make the sample shorter"
        return f"{shorter}, {other}, or take a model that was made for longer ones"


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


def fit(documents: list[Encoded], length: Length, on_too_long: OnTooLong, form: Format) -> Fitted:
    """The documents of one sample, none of them longer than is allowed. Raises SampleError where that is refused."""
    kept: list[Encoded] = []
    fate: Fate | None = None
    longest = length.longest
    for document in documents:
        if len(document) <= longest:
            kept.append(document)
        elif on_too_long == "Skip":
            fate = "skipped"
        elif on_too_long == "Truncate":
            kept.append(truncate(document, length))
            fate = "truncated"
        elif on_too_long == "Split" and form == "Text":
            kept += split(document, longest)
            fate = "split"
        else:
            raise _too_long(document, length, form)
    return Fitted(kept, fate)


def fit_pair(pair: list[Encoded], length: Length, on_too_long: OnTooLong, form: Format) -> Fitted:
    """Both answers of a pair, or neither. Raises SampleError where that is refused, or where a cut leaves no difference."""
    worst, longest = max(pair, key=len), length.longest
    if len(worst) <= longest:
        return Fitted(pair)
    if on_too_long == "Skip":
        return Fitted([], "skipped")
    if on_too_long != "Truncate":
        raise _too_long(worst, length, form)
    cut = [truncate(document, length) for document in pair]
    if np.array_equal(cut[0].ids, cut[1].ids):
        raise SampleError(
            "the pair",
            f"has the same first {longest} tokens in both answers",
            f"answers that differ before they are cut ({length.remedy(longest + 1, 'Skip')})",
        )
    return Fitted(cut, "truncated")


def _too_long(document: Encoded, length: Length, form: Format) -> SampleError:
    ways = "Split, Truncate or Skip" if form == "Text" else "Truncate or Skip"
    return SampleError(
        "an answer with its prompt" if form in PAIRS else "the sample",
        f"has {len(document)} tokens",
        f"at most {length.longest} ({length.remedy(len(document), ways)})",
    )


def truncate(document: Encoded, length: Length) -> Encoded:
    """The beginning. Raises SampleError if nothing of it is learnt."""
    longest = length.longest
    weights = document.weights[:longest]
    if not weights.any():
        first = int(np.flatnonzero(document.weights)[0])
        raise SampleError(
            "the sample",
            f"has nothing to learn in its first {longest} tokens: the first one that is learnt is number {first + 1}",
            f"at least {first + 1} tokens a sample ({length.remedy(first + 1, 'Skip')})",
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

"""When a training has gone wrong: a rule over the losses of its steps, and the sentences that say what to change.

One step's loss is noise, so a spike stops nothing. A step is *suspect* when its loss is far above what was seen before;
`PATIENCE` suspects in a row are a divergence. Two things that the rule must hold apart: samples of which one is hard
and the next easy (so it compares with the highest earlier loss, not with a mean), and a loss that rises over twenty
steps (so the last `LAG` losses are no part of that). For losses in random order, five in a row above the highest of
64 others come once in eleven million steps, even before the distance that is asked for as well.

The rule sees nothing but reduced losses, which are the same bytes on every rank, and what it remembers lies in each
checkpoint: any number of ranks, killed or not, stop at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, Protocol

from torch import nn
from torch.distributed.tensor import DTensor

PATIENCE: Final = 5
"""Suspect steps in a row that are a divergence."""
PATIENCE_AT_THE_END: Final = 2
"""The same for the last step, which no further one can judge."""
WINDOW: Final = 64
"""Earlier losses that a new one is compared with."""
LAG: Final = 16
"""The newest losses, which may be rising already, are none of them."""
FEW: Final = 8
"""Losses that a training must have seen before it is judged by them alone."""
FACTOR: Final = 2.0
DISTANCE: Final = 2.0
"""Nats. A loss counts as far above another if it is so much and so many times higher."""

_NAMED: Final = 8
"""Samples of a step that a sentence names; all of them are in the attempt's diverged.json."""


@dataclass
class LossWatch:
    """`uniform`: the loss of a guess that knows nothing, ln of the vocabulary's size; a training that has shown few
    losses is not suspected below it."""

    uniform: float
    sound: list[float] = field(default_factory=list)
    """Newest last."""
    suspects: list[float] = field(default_factory=list)
    """The losses of the suspect steps up to now, in a row."""

    @property
    def suspected(self) -> bool:
        return bool(self.suspects)

    @property
    def highest(self) -> float:
        """Of the losses that a new one is compared with; infinite before the first."""
        count = max(len(self.sound) - LAG, min(len(self.sound), FEW))
        return max(self.sound[max(0, count - WINDOW) : count], default=math.inf)

    @property
    def bar(self) -> float:
        """A step whose loss is above it is suspect."""
        far = max(FACTOR * self.highest, self.highest + DISTANCE)
        return far if len(self.sound) >= FEW else max(far, self.uniform)

    def memory(self) -> dict[str, list[float]]:
        """For `LossWatch(uniform, **memory)` after a restart."""
        return {"sound": list(self.sound), "suspects": list(self.suspects)}

    def see(self, loss: float, *, last: bool = False) -> bool:
        """Takes in the next step's loss; whether the training has diverged. `last`: no step comes after it."""
        bar = self.bar
        if loss > bar:
            self.suspects.append(loss)
            return len(self.suspects) >= (PATIENCE_AT_THE_END if last else PATIENCE)
        # What turned out to be noise counts, but no more than what would not have been suspect: one spike of a thousand
        # must not hide the next hundred steps.
        noise = [min(suspect, bar) for suspect in self.suspects]
        self.sound = [*self.sound, *noise, loss][-(WINDOW + LAG) :]
        self.suspects = []
        return False


# -- sentences ---------------------------------------------------------------------------------------------------------


class Named(Protocol):
    """Where a sample came from."""

    @property
    def file(self) -> str: ...

    @property
    def line(self) -> int: ...


def exploded(watch: LossWatch, *, step: int) -> str:
    """`step`: the one just done, from 1."""
    first = step - len(watch.suspects) + 1
    losses = ", ".join(f"{loss:.4g}" for loss in watch.suspects)
    return f"the loss exploded: {losses} at steps {first} to {step}, after at most {watch.highest:.4g} before"


def advice(rate: float, usual: float) -> str:
    """`usual`: the learning rate that the job would have had by default."""
    lower = usual if rate > usual else float(f"{rate / 4:.1g}")
    return f"lower spec.hyperparameters.learningRate from {rate:g} to {lower:g}"


def listing(samples: Sequence[Named]) -> str:
    """`chats.jsonl:3, 7, 12 and 9 more`."""
    shown = samples[:_NAMED]
    parts = [
        f"{file}:{', '.join(str(sample.line) for sample in group)}"
        for file, group in groupby(shown, key=lambda sample: sample.file)
    ]
    more = f" and {len(samples) - len(shown)} more" if len(samples) > len(shown) else ""
    return "; ".join(parts) + more


def record(what: str, watch: LossWatch, samples: Sequence[Named]) -> dict[str, Any]:
    """For the attempt's diverged.json: all that the sentence has no room for. No number in it is not finite."""
    return {
        "what": what,
        "losses": [*watch.sound, *watch.suspects],
        "samples": [{"file": sample.file, "line": sample.line} for sample in samples],
    }


def damaged_weights(model: nn.Module) -> str | None:
    """Names a frozen weight that holds numbers which are not finite, of a sharded one in this rank's share: no learning rate
    mends that."""
    for name, count in _not_finite(model.named_parameters()):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        return (
            f"the base model is damaged: {plain} holds {count} numbers that are not finite; "
            "bring it in again, or name another spec.model.uri"
        )
    return None


def _not_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterable[tuple[str, int]]:
    for name, parameter in parameters:
        if not parameter.requires_grad:
            held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            count = int((~held.isfinite()).sum())
            if count:
                yield name, count

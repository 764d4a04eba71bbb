"""Every number that the job left out, as the field descriptions promise it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuneward_api.finetunejob import FineTuneJobSpec, Hyperparameters, Method
from tuneward_api.objective import DPO, ObjectiveType, ResolvedDPO, ResolvedObjective, kind_of
from tuneward_api.resolved import ResolvedHyperparameters, ResolvedMethod
from tuneward_trainer import packing
from tuneward_trainer.data.fit import OnTooLong
from tuneward_trainer.data.gathered import Summary
from tuneward_trainer.data.samples import Limits
from tuneward_trainer.facts import Facts
from tuneward_trainer.report import config_bad
from tuneward_trainer.schedule import documents_a_unit, units

SEQUENCE_LENGTH: Final = 4096
SHORTEST_SEQUENCE: Final = 16
_STEPS_WANTED: Final = 200
_LEAST_STEPS: Final = 5
_LEAST_BATCH: Final = 4096
_BILLION: Final = 10**9


@dataclass(frozen=True, kw_only=True)
class _Usual:
    """What an objective changes of the defaults."""

    epochs: int | None = None
    """None: by the number of samples."""
    weight_decay: float = 0.0
    largest_batch: int = 131_072
    batch_units: int | None = None
    """Samples (of DPO: pairs) that a step shall hold; None: so many that there are _STEPS_WANTED steps."""
    on_too_long: OnTooLong = "Error"
    learning_rate: float | None = None
    """None: by the number of parameters."""
    whole_learning_rate: float = 2e-5
    """Of all weights: TRL's; a tenth of LoRA's above 4 billion parameters, as tinker-cookbook's sweep found."""
    whole_weight_decay: float = 0.1
    warmup_fraction: float = 0.05


_USUAL: Final[dict[ObjectiveType, _Usual]] = {
    "SFT": _Usual(),
    "Pretraining": _Usual(epochs=1, weight_decay=0.1, largest_batch=1 << 20, on_too_long="Split"),
    # zephyr-7b-dpo-qlora's learning rate, epochs and warm-up.
    # Of all weights zephyr-7b-dpo-full's; what decays towards 0 would leave the reference.
    "DPO": _Usual(
        epochs=1,
        batch_units=32,
        learning_rate=5e-6,
        warmup_fraction=0.1,
        whole_learning_rate=5e-7,
        whole_weight_decay=0.0,
    ),
}
_BETA: Final = 0.1


def objective(spec: FineTuneJobSpec) -> ResolvedObjective:
    kind = kind_of(spec)
    if kind != "DPO":
        return ResolvedObjective(type=kind)
    asked = (spec.objective.dpo if spec.objective is not None else None) or DPO()
    return ResolvedObjective(type=kind, dpo=ResolvedDPO(beta=asked.beta or _BETA))


def limits(spec: FineTuneJobSpec, facts: Facts) -> Limits:
    """What is done with samples that are too long or invalid, and with how many of them. Raises EndError."""
    kind, datasets = kind_of(spec), spec.datasets
    return Limits(
        longest_sample(spec.hyperparameters or Hyperparameters(), facts),
        on_too_long=datasets.on_too_long or _USUAL[kind].on_too_long,
        fraction=datasets.validation_fraction or 0.0,
        invalid=datasets.invalid_sample_skip_percentage or 0.0,
        objective=kind,
        most=facts.max_length,
    )


def longest_sample(hyper: Hyperparameters, facts: Facts) -> int:
    """Tokens that a sample may have: sequenceLength, or 4,096 and what the model allows. Raises EndError."""
    asked = hyper.sequence_length
    if asked is None:
        return min(SEQUENCE_LENGTH, facts.max_length or SEQUENCE_LENGTH)
    if facts.max_length and asked > facts.max_length:
        raise config_bad(
            f"spec.hyperparameters.sequenceLength is {asked}; allowed: at most {facts.max_length}, "
            "for which the model was made"
        )
    return asked


def method(asked: Method, facts: Facts) -> ResolvedMethod:
    """Raises EndError where targetModules names a layer that the model does not have."""
    from tuneward_trainer.model import (
        ModelUnsupportedError,
        adapted_linears,
        adapter_parameters,
        named_by_weight,
        target_linears,
        text_parameters,
    )

    if asked.type == "Full":
        count = sum(parameter.numel() for parameter in text_parameters(facts.empty).values())
        return ResolvedMethod(type="Full", trainable_parameters=count)
    try:
        available = target_linears(facts.empty)
    except ModelUnsupportedError as error:
        if asked.target_modules is None:
            raise config_bad(str(error)) from error
        available = []
    kind, rank = asked.type or "LoRA", asked.rank or 16
    named = [*available, *(asked.target_modules or ())]
    # PEFT knows no DoRA on what an adapter's file names by its weight.
    barred = named_by_weight(facts.empty, named) if kind == "DoRA" else set()
    allowed = [target for target in available if target not in barred]
    targets = sorted(set(asked.target_modules or allowed))
    for target in targets:
        where = "with DoRA, allowed for this model" if target in barred else "allowed for this model"
        if target in barred or not adapted_linears(facts.empty, [target]):
            raise config_bad(f"spec.method.targetModules holds {target!r}; {where}: {', '.join(allowed)}")
    if kind == "QLoRA":
        _check_packing(facts)
    return ResolvedMethod(
        type=kind,
        rank=rank,
        alpha=32.0 if asked.alpha is None else asked.alpha,
        dropout=asked.dropout or 0.0,
        rs_lora=bool(asked.rs_lora),
        target_modules=targets,
        trainable_parameters=adapter_parameters(facts.empty, targets, rank, dora=kind == "DoRA"),
    )


def _check_packing(facts: Facts) -> None:
    """Raises EndError where the weights cannot be packed, or where that would save next to nothing."""
    from tuneward_trainer import nf4
    from tuneward_trainer.model import packable

    if not nf4.installed():
        raise config_bad(
            "spec.method.type is QLoRA, for which bitsandbytes must be installed, and it is not: pip install bitsandbytes, "
            "or use LoRA"
        )
    packed = sum(layer.weight.numel() for layer in packable(facts.empty).values())
    embedded = facts.empty.get_input_embeddings().weight.numel()
    if 2 * packed < facts.parameters - embedded:
        raise config_bad(
            f"spec.method.type is QLoRA, which can pack only {packed} of the model's {facts.parameters} parameters: experts "
            "that are one tensor stay as they are; use LoRA"
        )


def hyperparameters(
    asked: Hyperparameters,
    *,
    lengths: NDArray[np.int32],
    summary: Summary,
    facts: Facts,
    longest: int,
    objective: ResolvedObjective,
    method: str = "LoRA",
) -> ResolvedHyperparameters:
    """`lengths`: int32 [training documents]; `longest`: what a sample may have at most."""
    usual = _USUAL[objective.type]
    epochs = asked.epochs or usual.epochs or _epochs(summary.samples)
    length = asked.sequence_length or max(SHORTEST_SEQUENCE, min(longest, summary.longest))
    unit = documents_a_unit(objective.type)
    sizes = units(lengths, unit)
    batch = asked.batch_tokens or _usual_batch(usual, epochs, sizes)
    per_epoch = packing.steps_per_epoch(sizes, sequence_length=unit * length, batch_tokens=batch)
    decay = usual.whole_weight_decay if method == "Full" else usual.weight_decay
    steps = asked.steps or epochs * per_epoch
    return ResolvedHyperparameters(
        epochs=round(steps / per_epoch, 4),
        steps=steps,
        learning_rate=asked.learning_rate or learning_rate(facts.parameters, objective.type, method),
        scheduler=asked.scheduler or "Cosine",
        warmup_fraction=usual.warmup_fraction if asked.warmup_fraction is None else asked.warmup_fraction,
        weight_decay=decay if asked.weight_decay is None else asked.weight_decay,
        max_grad_norm=asked.max_grad_norm or 1.0,
        sequence_length=length,
        batch_tokens=batch,
        seed=asked.seed or 0,
    )


def _epochs(samples: int) -> int:
    if samples < 20_000:
        return 3
    return 2 if samples <= 100_000 else 1


def _usual_batch(usual: _Usual, epochs: int, sizes: NDArray[np.int32]) -> int:
    """`sizes`: tokens of each unit of an epoch."""
    tokens = int(sizes.sum(dtype=np.int64))
    if usual.batch_units is None:
        return batch_tokens(epochs * tokens, usual.largest_batch)
    return _at_least_five_steps(_power_of_two(usual.batch_units * tokens / len(sizes)), epochs * tokens)


def batch_tokens(tokens: int, largest: int = 131_072) -> int:
    """The power of two nearest tokens/200 in 4,096 … `largest`, but so small that there are five steps."""
    nearest = _power_of_two(tokens / _STEPS_WANTED)
    return _at_least_five_steps(min(max(nearest, _LEAST_BATCH), largest), tokens)


def _at_least_five_steps(batch: int, tokens: int) -> int:
    """At most a fifth of all `tokens`, so that even a handful of samples is more than one step."""
    fifth = max(16, tokens // _LEAST_STEPS)
    return min(batch, 1 << (fifth.bit_length() - 1))


def _power_of_two(value: float) -> int:
    """The nearest one; the larger of two that are as near."""
    below = 1 << max(0, int(value).bit_length() - 1)
    return below if value - below < 2 * below - value else 2 * below


def learning_rate(parameters: int, objective: ObjectiveType, method: str = "LoRA") -> float:
    """The default one."""
    usual = _USUAL[objective]
    if method == "Full":
        return usual.whole_learning_rate
    if usual.learning_rate is not None:
        return usual.learning_rate
    if parameters <= 4 * _BILLION:
        return 4e-4
    return 2e-4 if parameters < 65 * _BILLION else 1e-4

"""What adapter_config.json says of the layers that an adapter is on.

Of mixtures of experts, PEFT takes some names of layers for the experts themselves (docs/decisions/0007): there the file
names the layer's weight in `target_parameters`, which selects the same layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

_WEIGHT: Final = ".weight"


def weights_of(targets: Iterable[str]) -> list[str]:
    """Names of layers -> those of their weights."""
    return sorted(f"{target}{_WEIGHT}" for target in targets)


def targets_of(config: Mapping[str, Any]) -> list[str]:
    """The names of layers that a job has in spec.method.targetModules, sorted; what is no layer's weight is left out."""
    weights = [name for name in config.get("target_parameters") or () if name.endswith(_WEIGHT)]
    return sorted({*config["target_modules"], *(name.removesuffix(_WEIGHT) for name in weights)})

"""Model FLOPs utilization: the operations that a step needs, over what its GPUs could do in that time at most.

Needed is what the formula of the estimate counts (`tuneward_api.estimate.flops_per_token`): nothing that is computed twice,
no padding, and of DPO not the reference, which is computed before the first step. The definition is that of PaLM,
https://arxiv.org/abs/2204.02311, appendix B. Without a peak there is no figure: a CPU has none in its data sheet, and the
matrix product that `tuneward estimate` measures moves with whatever else runs on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tuneward_trainer.memory import Choice, Costs

_TERA: Final = 1e12
PEAKS: Final[tuple[tuple[str, float, str], ...]] = (
    ("H100 NVL", 835, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("H100 PCIe", 756, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("H100", 989, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("H200", 989, "https://www.nvidia.com/en-us/data-center/h200/"),
    ("B200", 2250, "https://www.nvidia.com/en-us/data-center/hgx/"),
    ("A100", 312, "https://www.nvidia.com/en-us/data-center/a100/"),
    ("L40S", 362, "https://www.nvidia.com/en-us/data-center/l40s/"),
)
"""What torch.cuda.get_device_name contains -> dense bf16 TFLOP/s on tensor cores, and whose data sheet says so (half of what
it gives with sparsity). The first that fits counts: the variants differ."""


def peak_of(device_name: str) -> float | None:
    """Dense bf16 operations a second; None for a GPU that the table does not know."""
    # A slice (MIG) is named after its card and is less than it, and so is the H200 that is a PCIe card.
    if any(f" {less} " in f"{device_name} " for less in ("MIG", "H200 NVL")):
        return None
    # A whole word: GH200 is no H200.
    return next((peak * _TERA for name, peak, _ in PEAKS if f" {name}" in device_name), None)


@dataclass(frozen=True)
class Utilization:
    """Of one gang: `flops` a token, over the `peak` of all its GPUs together."""

    flops: float
    peak: float

    @classmethod
    def of(cls, costs: Costs | None, device_name: str, ranks: int) -> Utilization | None:
        """None where the figure would be a guess: no peak, or layers that the formula takes for another family's."""
        peak = peak_of(device_name)
        if peak is None or costs is None or not costs.shape.known:
            return None
        return cls(costs.flops(Choice(1)), peak * ranks)

    def share(self, tokens_per_second: float) -> float:
        return self.flops * tokens_per_second / self.peak

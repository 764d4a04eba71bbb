"""What the benchmarks against TRL have in common: the engine that `tuneward train` runs, on a LoRA of every Linear."""

from __future__ import annotations

from typing import Final

from peft import PeftModel
from transformers import PreTrainedModel

from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer.engine import Engine
from tuneward_trainer.model import add_adapters, target_linears

RANK: Final = 16
LEARNT: Final = 0.45
"""Share of a document's tokens that the loss counts, as in a chat: the answer."""


def adapted(base: PreTrainedModel) -> PeftModel:
    method = ResolvedMethod(
        type="LoRA", rank=RANK, alpha=32.0, dropout=0.0, rs_lora=False, target_modules=target_linears(base),
        trainable_parameters=0,
    )  # fmt: skip
    return add_adapters(base, method, seed=0, base_uri="")


def engine_on(model: PeftModel) -> Engine:
    return Engine(model, weight_decay=0.0, max_grad_norm=1.0)

"""Mixtures of experts, where PEFT and the model call different things by one name (docs/decisions/0007).

The experts of some thirty families were Linears called gate_proj, up_proj and down_proj before transformers fused them,
and PEFT still takes a target of such a name for the fused experts. What bears the name today, a shared expert or a dense
layer, gets no adapter then. By its weight (`target_parameters`) PEFT finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import LoraConfig
from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers import PreTrainedModel

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
"""Names in configs for how many experts a token passes through."""


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def taken_for_experts(model: nn.Module, names: set[str]) -> set[str]:
    """Those of `names` under which PEFT looks for the fused experts of `model`, in training and whenever an adapter is
    loaded."""
    config = LoraConfig(target_modules=sorted(names))
    if names:
        conversion.convert_peft_config_for_transformers(config, model, None)
    return names - set(config.target_modules or ())


def beyond_reach(model: nn.Module, linears: Mapping[str, nn.Linear], names: set[str]) -> set[str]:
    """Those of `names` whose weights something beside `linears` bears too, such as what sees: PEFT, which excludes no
    parameters, would put an adapter on that as well."""
    weights = {f"{name}.weight" for name in linears}
    others = {name for name, _ in model.named_parameters() if name.endswith(".weight")} - weights
    return names & {last(name.removesuffix(".weight")) for name in others}


@contextmanager
def as_named() -> Iterator[None]:
    """PEFT puts adapters on the layers that bear a target's name. The conversion that this turns off serves adapters that
    were trained before experts were fused; no option does."""
    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_args, **_named: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def adapted_share(model: PreTrainedModel, layers: list[nn.Module], adapted: Mapping[str, nn.Linear]) -> float | None:
    """Of the weights of `layers` that a token passes through, those of `adapted`: of experts it passes through a few. None
    for a model without experts, and where its config does not say how many of them a token is sent to."""
    text = model.config.get_text_config()
    chosen = next((int(found) for name in _CHOSEN if isinstance(found := getattr(text, name, None), int)), None)
    matrices = [(name, p) for layer in layers for name, p in layer.named_parameters() if p.ndim > 1]
    experts = [p for name, p in matrices if "experts" in name.split(".")]
    experts = [p for p in experts if p.ndim == 3]
    if not experts or chosen is None:
        return None
    resting = sum(p.numel() * max(0.0, 1 - chosen / p.shape[0]) for p in experts)
    return sum(linear.weight.numel() for linear in adapted.values()) / (sum(p.numel() for _, p in matrices) - resting)

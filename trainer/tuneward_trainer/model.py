"""The model that is trained: the class that will be served, and adapters that PEFT owns.

Loading through `architectures[0]` and not through an auto class is what keeps the adapter's names those of the served
model: an auto class may pick a text-only sibling whose layers have other names, and an engine then drops the adapter
without a word.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tuneward_api.resolved import ResolvedMethod

ADAPTER: Final = "default"
NEVER_ADAPTED: Final = re.compile(r"(^|\.)(router|gate|shared_expert_gate|vision\w*|visual|multi_modal_projector)(\.|$)")
"""Modules whose update harms (a router's choice is discrete) or that no engine adapts (vision)."""


class ModelUnsupportedError(Exception):
    """The base model is none that can be trained here; the text says why and what would be right."""


def model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The class that `architectures[0]` of config.json names. Raises ModelUnsupportedError."""
    names = config.get("architectures") or [""]
    found = getattr(transformers, str(names[0]), None)
    if found is None:
        raise ModelUnsupportedError(
            f"config.json names the architecture {names[0]!r}, which transformers {transformers.__version__} does not have; "
            "use a model whose class is part of transformers"
        )
    if names[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelUnsupportedError(
            f"{names[0]} is no causal language model; use a model whose config.json names a …ForCausalLM class"
        )
    kind: type[PreTrainedModel] = found
    return kind


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is."""
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelUnsupportedError(f"the model's folder has no readable config.json: {error}") from error
    return content


def attention_of(kind: type[PreTrainedModel]) -> str:
    """SDPA where the class has it: it needs no package and is the fastest plain path on every device."""
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def load_base(folder: Path, device: torch.device) -> PreTrainedModel:
    """The base model, frozen: fp32 on a CPU, where bf16 is slower and no smaller in the end, and bf16 on a GPU."""
    kind = model_class(read_config(folder))
    model = kind.from_pretrained(
        folder,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        attn_implementation=attention_of(kind),
        local_files_only=True,
    )
    model.requires_grad_(False)
    # Dropout of the base model would make the loss of a document depend on its row.
    model.eval()
    return model.to(device)


def build_empty(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The model without memory, on the meta device: enough to count and to name layers."""
    with torch.device("meta"):
        return kind(config)


def target_linears(model: nn.Module) -> list[str]:
    """Names (last parts, sorted) of every Linear of the decoder: what LoRA is put on when the job names nothing.

    Never the head, a router or vision; not PEFT's `all-linear`, which takes the latter two.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not NEVER_ADAPTED.search(name)
    }
    if not found:
        raise ModelUnsupportedError("the model has no Linear layer to adapt; name some in spec.method.targetModules")
    return sorted(found)


def adapted_linears(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    """Full names -> the Linears that `targets` (full names or last parts) select, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not NEVER_ADAPTED.search(name)
        and any(name == target or name.endswith("." + target) for target in targets)
    }


def adapter_parameters(model: nn.Module, targets: list[str], rank: int, *, dora: bool = False) -> int:
    """Number of parameters that are trained: rank x (in + out) for each adapted Linear, and with DoRA `out` more."""
    return sum(
        rank * (layer.in_features + layer.out_features) + dora * layer.out_features
        for layer in adapted_linears(model, targets).values()
    )


def add_adapters(model: PreTrainedModel, method: ResolvedMethod, *, seed: int, base_uri: str) -> PeftModel:
    """Puts LoRA or DoRA on `model`, in fp32, with an init that depends on `seed` and the base alone: every rank gets the
    same bytes. DoRA (Liu et al. 2024, arXiv 2402.09353) is PEFT's own: W' = m (W + sBA) / |W + sBA|, rows apart."""
    names = list(adapted_linears(model, method.target_modules))
    if not names:
        raise ModelUnsupportedError(
            f"spec.method.targetModules {method.target_modules} name no Linear layer of the model; "
            f"it has {target_linears(model)}"
        )
    config = LoraConfig(
        r=method.rank,
        lora_alpha=int(method.alpha) if float(method.alpha).is_integer() else method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rs_lora,
        use_dora=method.type == "DoRA",
        target_modules=sorted(method.target_modules),
        exclude_modules=NEVER_ADAPTED.pattern if _needs_exclusion(model, method.target_modules) else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=True)
    # PEFT puts the folder's name there, which differs from machine to machine.
    adapted.peft_config[ADAPTER].base_model_name_or_path = base_uri
    adapted.eval()
    return adapted


def _needs_exclusion(model: nn.Module, targets: list[str]) -> bool:
    return any(
        isinstance(module, nn.Linear) and NEVER_ADAPTED.search(name) and name.rsplit(".", 1)[-1] in targets
        for name, module in model.named_modules()
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained, in the model's order (the same on every rank)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_dropout(model: nn.Module, *, on: bool) -> None:
    """LoRA's own dropout only; the base model's stays off, as at inference."""
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train(on)

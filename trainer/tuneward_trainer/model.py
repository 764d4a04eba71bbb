"""The model that is trained: the class that will be served, and adapters that PEFT owns.

Loading through `architectures[0]` and not through an auto class is what keeps the adapter's names those of the served
model: an auto class may pick a text-only sibling whose layers have other names, and an engine then drops the adapter
without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import init_empty_weights
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from tuneward_api.adapters import weights_of
from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer import mixtures, nf4

ADAPTER: Final = "default"
_ROUTERS: Final = r"(.*\.)?(router|gate|shared_expert_gate)(\..*)?"
"""Modules whose update harms: a router's choice is discrete."""
_MAMBAS: Final = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""By model_type: PEFT refuses their `out_proj`, whose weight fused kernels read past its adapter."""
DEQUANTISED: Final = ("fp8", "mxfp4")
"""Formats of weights that loading turns back into numbers that can be trained on: Ministral 3, Devstral 2, gpt-oss."""


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
    if names[0] not in (
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    ):
        raise ModelUnsupportedError(
            f"{names[0]} is no language model that writes text; use a model whose config.json names a …ForCausalLM or an "
            "image-text-to-text class"
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


def quantised(config: dict[str, Any]) -> str | None:
    """How the weights of a config.json are packed: fp8, mxfp4, …; None where they are plain numbers."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def computed_in(device: torch.device) -> torch.dtype:
    """What a frozen base model computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_to_share(folder: Path, dtype: torch.dtype, *, weights: torch.dtype | None = None) -> PreTrainedModel:
    """The base model, frozen, in the host's memory, for ranks that will keep a share of it each (sharded.share). Its weights
    have the dtype `weights`, or that of their files: then they are views of these, and take no memory before they are used.
    What no file holds is made for `dtype`."""
    if quantised(read_config(folder)) is not None:
        # What they are turned back into depends on the dtype that is asked for.
        weights = dtype
    model = _load(folder, weights or "auto")
    if weights != dtype:
        _renew_buffers(model, dtype)
    return model


def _renew_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As the model's class makes them for `dtype`: in bf16, Gemma's factor of embeddings is another number."""
    with local_torch_dtype(dtype), init_empty_weights():
        fresh = type(model)(model.config)
    kept = model.state_dict().keys()
    for name, buffer in fresh.named_buffers():
        if name not in kept:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner).register_buffer(last, buffer, persistent=False)


def load_base(
    folder: Path,
    device: torch.device,
    *,
    packed: bool = False,
    places: Mapping[str, str] | None = None,
    scratch: Path | None = None,
) -> PreTrainedModel:
    """The base model, frozen: fp32 on a CPU, where bf16 is slower and no smaller in the end, and bf16 on a GPU. Weights
    in a format of DEQUANTISED become plain ones. With `packed` the decoder's Linears are NF4. `places`: module -> device,
    or disk: then its weights are read from there, or from `scratch`, when it is run."""
    dtype = computed_in(device)
    options: dict[str, Any] = {}
    again = packed and quantised(read_config(folder)) is not None
    if packed and not again:
        # Each weight goes to the device as it is read, and is packed there: the host never holds the whole model.
        options = {"quantization_config": _packing(folder, dtype), "device_map": {"": device}}
    if places is not None:
        options = {"device_map": dict(places), "offload_folder": scratch}
    model = _load(folder, dtype, **options)
    if again:
        nf4.pack(model, packable(model), device)
    if packed:
        nf4.keep_layout(model)
    return model if options else model.to(device)


def _packing(folder: Path, dtype: torch.dtype) -> BitsAndBytesConfig:
    kind = model_class(read_config(folder))
    empty = build_empty(AutoConfig.from_pretrained(folder, local_files_only=True), kind)
    packed = packable(empty)
    others = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    return nf4.quantization(others, dtype)


def load_whole(folder: Path, device: torch.device) -> PreTrainedModel:
    """The base model with all of its text part to be trained, in the host's memory: as it was saved where a GPU will have
    it, whose ranks take their shards in fp32, and fp32 on a CPU."""
    model = _load(folder, "auto" if device.type == "cuda" else torch.float32)
    for parameter in text_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def _load(folder: Path, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    raw = read_config(folder)
    kind = model_class(raw)
    if quantised(raw) is not None:
        options["quantization_config"] = AutoQuantizationConfig.from_dict(raw["quantization_config"] | {"dequantize": True})
    model = kind.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention_of(kind),
        local_files_only=True,
        **options,
    )
    model.requires_grad_(False)
    # Dropout of the base model would make the loss of a document depend on its row.
    model.eval()
    return model


def build_empty(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The model without memory, on the meta device: enough to count and to name layers."""
    with torch.device("meta"):
        return kind(config)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Full names -> every Linear that may be adapted, in the model's order: the decoder's, but for its routers. Never the
    head, and nothing of what sees or hears."""
    inside = _decoder(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name.startswith(inside)
        and not re.fullmatch(_ROUTERS, name)
    }
    taken = mixtures.taken_for_experts(model, {mixtures.last(name) for name in found})
    lost = mixtures.beyond_reach(model, found, taken)
    if isinstance(model, PreTrainedModel) and model.config.model_type in _MAMBAS:
        lost = {*lost, "out_proj"}
    return {name: module for name, module in found.items() if mixtures.last(name) not in lost}


def packable(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of them that NF4 can hold."""
    return {name: layer for name, layer in linears(model).items() if nf4.fits(layer)}


def _decoder(model: nn.Module) -> str:
    """Prefix of the names of what reads and writes text."""
    if not isinstance(model, PreTrainedModel):
        return ""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def text_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Name -> parameter, each once, of all that reads and writes text: what full fine-tuning trains. Its routers stay as
    they are, and so does what sees or hears."""
    inside = _decoder(model)
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    outside = {id(parameter) for end in ends for parameter in end.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in outside or (name.startswith(inside) and not re.fullmatch(_ROUTERS, name))
    }


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that the decoder is a stack of."""
    return [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def instance_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Shadows the class's forward, or what shadows it already, on this one module."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Without the wrapper that adapters put around it."""
    found: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return found


def target_linears(model: nn.Module) -> list[str]:
    """Names (last parts, sorted) of all of them: what LoRA is put on when the job names nothing. Not PEFT's `all-linear`,
    which takes routers and vision too."""
    found = {mixtures.last(name) for name in linears(model)}
    if not found:
        raise ModelUnsupportedError(
            "its decoder has no torch.nn.Linear that can be adapted; use a model whose layers are Linear"
        )
    return sorted(found)


def adapted_linears(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    """Those that `targets` (full names or last parts) select."""
    return {name: module for name, module in linears(model).items() if _selected(name, targets)}


def _selected(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def adapter_parameters(model: nn.Module, targets: list[str], rank: int, *, dora: bool = False) -> int:
    """Number of parameters that are trained: rank x (in + out) for each adapted Linear, and with DoRA `out` more."""
    return sum(
        rank * (layer.in_features + layer.out_features) + dora * layer.out_features
        for layer in adapted_linears(model, targets).values()
    )


def add_adapters(model: PreTrainedModel, method: ResolvedMethod, *, seed: int, base_uri: str) -> PeftModel:
    """Puts LoRA or DoRA on `model`, in fp32, with an init that depends on `seed` and the base alone: every rank gets the
    same bytes. DoRA (Liu et al. 2024, arXiv 2402.09353) is PEFT's own: W' = m (W + sBA) / |W + sBA|, rows apart."""
    if method.rank is None or method.alpha is None or method.target_modules is None:
        raise TypeError(f"{method.type} has no adapters")
    names = list(adapted_linears(model, method.target_modules))
    if not names:
        raise ModelUnsupportedError(
            f"spec.method.targetModules {method.target_modules} name no Linear layer of the model; "
            f"it has {target_linears(model)}"
        )
    by_weight = named_by_weight(model, method.target_modules)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=int(method.alpha) if float(method.alpha).is_integer() else method.alpha,
        lora_dropout=method.dropout or 0.0,
        use_rslora=bool(method.rs_lora),
        use_dora=method.type == "DoRA",
        target_modules=sorted(method.target_modules),
        exclude_modules=_excluded(model, method.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), mixtures.as_named():
        torch.manual_seed(seed)
        try:
            adapted: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            # Such as of a layer that is none but bears the name of a Linear.
            raise ModelUnsupportedError(
                f"PEFT puts no adapter on all of {sorted(method.target_modules)}: {' '.join(str(error).split())[:200]}; "
                "use another model"
            ) from error
    saved = adapted.peft_config[ADAPTER]
    # PEFT puts the folder's name there, which differs from machine to machine.
    saved.base_model_name_or_path = base_uri
    if by_weight:
        # So that whoever loads the adapter with PEFT has it on the same layers; PEFT knows no dropout on parameters.
        saved.target_modules = set(method.target_modules) - by_weight
        saved.target_parameters = weights_of(by_weight)
        saved.lora_dropout = 0.0
    adapted.eval()
    return adapted


def named_by_weight(model: nn.Module, targets: list[str]) -> set[str]:
    """Those of `targets` that an adapter's file names by their weights: PEFT takes the names for fused experts."""
    names = {mixtures.last(name) for name in linears(model)}
    taken = mixtures.taken_for_experts(model, names)
    return {target for target in targets if mixtures.last(target) in taken}


def adapted_share(model: PreTrainedModel, targets: list[str]) -> float | None:
    """Of the weights of a mixture's layers that a token passes through, those under an adapter; None for other models."""
    return mixtures.adapted_share(model, decoder_layers(model), adapted_linears(model, targets))


def _excluded(model: nn.Module, targets: list[str]) -> str | None:
    """Regex for PEFT, which matches whole names, of what bears a target's name and is never adapted; None if nothing does:
    PEFT warns of an exclusion that excludes nothing."""
    allowed, inside = linears(model), _decoder(model)
    alike = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in allowed and _selected(name, targets)
    ]
    patterns = {_ROUTERS if name.startswith(inside) else _beside(name, inside) for name in alike}
    return "|".join(sorted(patterns)) or None


def _beside(name: str, inside: str) -> str:
    """Regex of the largest part of the model that holds `name` and nothing of the decoder."""
    parts, own = name.split("."), inside.split(".")
    common = next(index for index, part in enumerate(parts) if part != own[index])
    return re.escape(".".join(parts[: common + 1])) + r"(\..*)?"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained, in the model's order (the same on every rank)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_dropout(model: nn.Module, *, on: bool) -> None:
    """LoRA's own dropout only; the base model's stays off, as at inference."""
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train(on)

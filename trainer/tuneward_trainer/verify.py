"""Proves on a shrunken twin of the model which patches are right, before anything is trained with them.

The twin has the model's own class and config with small numbers: one layer of each kind, hidden 64, a window of 24
tokens, 4 experts. In float32 a wrong patch is off by 1e-3 and more, and a right one by 1e-6; in bf16, or with the
window of a real model, the same mistake would be invisible. The reference is the plain model on each document alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tuneward_api.manifest import write_synced
from tuneward_api.resolved import ResolvedMethod, ResolvedPacking
from tuneward_trainer import attention, batch, compiled, loss_head, mixtures, nf4, norms, patches, rotary
from tuneward_trainer import model as base_model
from tuneward_trainer.batch import collate, padded
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import (
    ModelUnsupportedError,
    add_adapters,
    attention_of,
    model_class,
    packable,
    read_config,
    target_linears,
    text_parameters,
)
from tuneward_trainer.model import trainable as trainable_of

LIMIT: Final = 1e-4
"""Largest relative error of a gradient; the plain model itself is within 2e-6 of float64."""
VOCABULARY: Final = 128
_LENGTHS: Final = (37, 29, 41)
"""Tokens of the twin's documents: longer than its window, none a multiple of another."""
_FIRST_LENGTH: Final = "original_max_position_embeddings"
_SHORTER, _LONGER = 32, 64
"""Than some of the twin's documents, and than all of them."""
_ROW: Final = 128
"""Tokens of the row that holds them where all rows are of one length."""

_SHRUNK: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    # Latent attention (DeepSeek): keys and values of different widths.
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    # Per-layer embeddings and their second kind of attention head (Gemma 4).
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 32,
    "sliding_window": 24,
    "attention_chunk_size": 24,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    # Experts in groups, of which some are chosen first, and layers without experts before them (DeepSeek).
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    # State spaces beside attention (Granite 4, Bamba): heads times their width is twice hidden_size.
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    # GPT-J's, of a head of 16.
    "rotary_dim": 8,
    # GPT-2's names.
    "n_embd": 64,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 96,
    # Falcon's.
    "ffn_hidden_size": 96,
    "num_kv_heads": 4,
}
"""Field of a config -> its value in the twin, where the model has that field and not None."""
_SHALLOW: Final = {"num_hidden_layers": 1, "depth": 1, "num_layers": 1, "deepstack_visual_indexes": [0]}
"""The same of what sees or hears: it is part of the class, and no text reaches it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sample:
    ids: NDArray[np.int32]
    weights: NDArray[np.float16]


def verify(
    model_dir: Path,
    cache_dir: Path | None = None,
    *,
    whole: bool = False,
    packed: bool = False,
    compiling: bool = False,
    longest: int = 0,
) -> ResolvedPacking:
    """The patches that this model's class and config bear, and so whether documents may share a row. Takes seconds.
    `whole`: all weights are trained, not adapters; `packed`: adapters on weights in NF4 (QLoRA); `compiling`: layers are to
    be compiled, of which this checks the graphs; `longest`: tokens that a document may have.

    The verdict is kept in `cache_dir` (default `<model_dir>/verify`, if that can be written), under a digest of all that
    it depends on. Raises ModelUnsupportedError for a model that cannot be trained at all.
    """
    config = read_config(model_dir)
    folder = cache_dir if cache_dir is not None else model_dir / "verify"
    how = {"whole": whole, "packed": packed, "compiling": compiling, "stretched": _stretched(config, longest)}
    file = folder / f"{_digest(config, how)}.json"
    try:
        verdict = ResolvedPacking.model_validate_json(file.read_bytes())
    except (OSError, ValueError):
        full = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        verdict = _examine(model_class(config), full, **how)
        _keep(file, verdict)
    # Of one that was kept too: a log is of one job.
    if left_out := [name for name in _candidates(whole, compiling) if name not in verdict.patches]:
        logger.warning("not used on this model: %s; %s", ", ".join(left_out), verdict.reason)
    return verdict


def _keep(file: Path, verdict: ResolvedPacking) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_synced(file, json.dumps(verdict.to_json()).encode())
    except OSError as error:
        logger.info("the verdict on packing is not kept: %s", error)


def _candidates(whole: bool, compiling: bool) -> tuple[str, ...]:
    """The patches that a model may bear."""
    names = patches.OF_WHOLE_MODELS if whole else patches.ALL
    return (*names, patches.COMPILED) if compiling else names


def _stretched(config: Any, longest: int) -> bool:
    """Whether documents may be longer than those that the model was made for first. Some rotary embeddings (longrope) take
    other frequencies for them, and for all that shares their row."""
    if not isinstance(config, dict):
        return False
    return 0 < (config.get(_FIRST_LENGTH) or longest) < longest or any(_stretched(part, longest) for part in config.values())


def _digest(config: dict[str, Any], how: dict[str, bool]) -> str:
    """Of all that a verdict depends on."""
    parts = [json.dumps([config, how], sort_keys=True), torch.__version__, transformers.__version__, peft.__version__]
    modules = (attention, batch, patches, loss_head, norms, rotary, nf4, compiled, mixtures, base_model)
    parts += [Path(str(module.__file__)).read_text() for module in modules]
    parts += [Path(__file__).read_text(), nf4.release() if how["packed"] else ""]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _examine(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    whole: bool = False,
    packed: bool = False,
    compiling: bool = False,
    stretched: bool = False,
) -> ResolvedPacking:
    """Patch by patch, each on top of those that agreed before. Raises ModelUnsupportedError where even without any a
    document's gradients are not those of the plain model."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if whole:
                model: PreTrainedModel | PeftModel = whole_twin(kind, config, stretched=stretched)
            else:
                model = twin(kind, config, packed=packed, stretched=stretched)
            reference = gradients(model, None)
    except ModelUnsupportedError:
        raise
    except Exception as error:  # noqa: BLE001 - any failure has the same remedy
        return ResolvedPacking(
            mode="OneDocument", reason=f"no small twin of the model could be made: {compiled.said(error)}"
        )
    agreed: list[str] = []
    why: dict[str, str] = {}
    for name in _candidates(whole, compiling):
        complaint = disagreement(model, (*agreed, name), reference)
        if complaint is None:
            agreed.append(name)
        else:
            why[name] = complaint
    if compiling:
        compiled.forget()
    if not agreed and (complaint := disagreement(model, (), reference)) is not None:
        raise ModelUnsupportedError(
            f"{kind.__name__} does not give the same for a document that ends with its last target ({complaint}): what "
            "comes after a token must not change it; use a model that reads from left to right"
        )
    packed = patches.PACKED_ATTENTION in agreed
    reason = "packed rows and single documents give the same gradients" if packed else why[patches.PACKED_ATTENTION]
    left_out = [f"; {name} left out: {text}" for name, text in why.items() if name != patches.PACKED_ATTENTION]
    return ResolvedPacking(
        mode="Packed" if packed else "OneDocument", reason=(reason + "".join(left_out))[:512], patches=agreed
    )


def disagreement(model: PreTrainedModel | PeftModel, names: Collection[str], reference: dict[str, Tensor]) -> str | None:
    """None, or in what way the gradients under these patches differ from the plain model's."""
    try:
        worst, where = worst_error(gradients(model, names), reference)
    except Exception as error:  # noqa: BLE001 - a patch that raises here is not used
        return compiled.said(error)
    return f"gradients differ by {worst:.1e} (at {where})" if not worst < LIMIT else None


def worst_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """max over tensors of |found - reference| / |reference|; norms below a thousandth of the largest count as that."""
    floor = 1e-3 * max(float(tensor.norm()) for tensor in reference.values())
    errors = {
        name: float((found[name] - tensor).norm()) / max(float(tensor.norm()), floor) for name, tensor in reference.items()
    }
    # NaN must win.
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[where], where


def gradients(model: PreTrainedModel | PeftModel, names: Collection[str] | None) -> dict[str, Tensor]:
    """Of the loss of three documents, by parameter, as ranks compute them under these patches; None: each plainly and
    whole."""
    parameters = trainable_of(model)
    model.zero_grad(set_to_none=True)
    samples = _documents()
    if names is not None:
        shared = collate(enumerate(samples))
        if patches.COMPILED in names:
            shared = padded(shared, _ROW)
        with patches.applied(model, names, backend=compiled.CHECKED_BACKEND) as forward:
            torch.autograd.backward(cross_entropy(forward(shared), shared))
    else:
        for sample in samples:
            torch.autograd.backward(_plain_loss(model, sample))
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in parameters.items()
    }


def _plain_loss(model: PreTrainedModel | PeftModel, sample: _Sample) -> Tensor:
    """Uncut, unpatched, without our own batch: as independent of what is checked as it can be."""
    ids = torch.from_numpy(sample.ids.astype(np.int64))
    logprobs: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    weights = torch.from_numpy(sample.weights[1:].astype(np.float32))
    return -(logprobs.gather(-1, ids[1:, None])[:, 0] * weights).sum()


def _documents() -> list[_Sample]:
    random = np.random.default_rng(0)
    return [
        _Sample(
            ids=random.integers(3, VOCABULARY, length, dtype=np.int32),
            weights=np.concatenate([np.zeros(length // 3), random.choice([0.0, 0.5, 1.0], length - length // 3)]).astype(
                np.float16
            ),
        )
        for length in _LENGTHS
    ]


def twin(
    kind: type[PreTrainedModel], config: PreTrainedConfig, *, packed: bool = False, stretched: bool = False
) -> PeftModel:
    """A small random model of the same class, in float32, with adapters that are not zero."""
    base = _small_model(kind, config, stretched)
    targets = target_linears(base)
    if packed:
        nf4.pack(base, packable(base), torch.device("cpu"))
    method = ResolvedMethod(
        type="LoRA", rank=4, alpha=8.0, dropout=0.0, rs_lora=False, target_modules=targets, trainable_parameters=0
    )
    model = add_adapters(base, method, seed=0, base_uri="")
    with torch.no_grad():
        for parameter in trainable_of(model).values():
            parameter.normal_(std=0.05)
    return model


def whole_twin(kind: type[PreTrainedModel], config: PreTrainedConfig, *, stretched: bool = False) -> PreTrainedModel:
    """The same without adapters: its text part is trained."""
    base = _small_model(kind, config, stretched)
    for parameter in text_parameters(base).values():
        parameter.requires_grad_(True)
    return base


def _small_model(kind: type[PreTrainedModel], config: PreTrainedConfig, stretched: bool) -> PreTrainedModel:
    # As loading does it: the attribute belongs to no class.
    small = shrink(config, stretched=stretched)
    build = partial(kind._from_config, small, attn_implementation=attention_of(kind), dtype=torch.float32)
    base: PreTrainedModel = build()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                # At the scale that training begins with, what a layer adds can be too little to tell right from wrong: a
                # state that crossed from one document into the next was 5e-7 of the gradients.
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    base.requires_grad_(False)
    base.eval()
    return base


def shrink(config: PreTrainedConfig, *, stretched: bool = False) -> PreTrainedConfig:
    """The same config with small numbers: one layer of each kind, at least two layers, one of what sees. `stretched`: of
    the twin's documents some are longer than those it was made for first."""
    whole = config.to_dict()
    whole.pop("quantization_config", None)
    parts = {name: part for name, part in whole.items() if name.endswith("_config") and isinstance(part, dict)}
    first = _SHORTER if stretched else _LONGER
    if config.get_text_config() is config:
        whole = _small_text(whole, first)
    else:
        key = next(name for name in ("text_config", "llm_config", "language_config", "thinker_config") if name in parts)
        whole[key] = _small_text(parts.pop(key), first)
    for name, part in parts.items():
        if name != "per_layer_config":
            whole[name] = {**part, **{field: value for field, value in _SHALLOW.items() if field in part}}
    small: PreTrainedConfig = type(config).from_dict(whole)
    return small


def _small_text(values: dict[str, Any], made_for: int) -> dict[str, Any]:
    """Of the decoder's fields. `made_for`: the length that it was made for first."""
    small = {**values, **{name: value for name, value in _SHRUNK.items() if values.get(name) is not None}}
    if values.get("num_key_value_heads") is not None:
        # Grouped queries stay grouped.
        small["num_key_value_heads"] = 4 if values["num_key_value_heads"] == values.get("num_attention_heads") else 2
    if values.get("head_dim") is not None and values.get("qk_rope_head_dim") == values["head_dim"]:
        # Some latent attentions call so the width that is rotated.
        small["head_dim"] = small["qk_rope_head_dim"]
    if isinstance(values.get("rope_parameters"), dict):
        small["rope_parameters"] = _small_rope(values["rope_parameters"], made_for)
    if values.get(_FIRST_LENGTH) is not None:
        small[_FIRST_LENGTH] = made_for
    layers = "num_hidden_layers" if "num_hidden_layers" in values else "n_layer"
    kinds = values.get("layer_types") or []
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    chosen = first if len(first) > 1 else [0, 1]
    if values.get("num_kv_shared_layers"):
        # The last layers have keys and values of earlier ones of their kind (Gemma 3n and 4): one of each kind too.
        chosen = [*chosen, *(len(kinds) - 1 - kinds[::-1].index(kind) for kind in dict.fromkeys(kinds))]
        small["num_kv_shared_layers"] = len(chosen) - len(first)
    # Whatever a config says layer by layer.
    of_layers = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == values[layers]}
    small |= {name: [value[index % len(value)] for index in chosen] for name, value in of_layers.items()}
    small[layers] = len(chosen)
    if values.get("per_layer_config"):
        own = {int(index): part for index, part in values["per_layer_config"].items()}
        small["per_layer_config"] = {str(at): _small_layer(own[index]) for at, index in enumerate(chosen) if index in own}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if small.get(name) is not None:
            small[name] = 0
    return small


def _small_rope(values: dict[str, Any], first: int) -> dict[str, Any]:
    """Of rotary embeddings that are stretched or split; as many numbers as half of a small head has."""
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            # One a kind of layer.
            small[name] = _small_rope(value, first)
        elif name in ("short_factor", "long_factor"):
            small[name] = value[:8]
        else:
            small[name] = {"mrope_section": [2, 3, 3], _FIRST_LENGTH: first}.get(name, value)
    return small


def _small_layer(values: dict[str, Any]) -> dict[str, Any]:
    """What one layer has otherwise than the others (Gemma 4's wider heads): other numbers in the twin too."""
    return {name: 2 * _SHRUNK[name] if name in _SHRUNK else value for name, value in values.items()}

"""QLoRA's frozen weights: NF4, 4 bits a number, with scales that are quantised too (Dettmers et al. 2023, arXiv 2305.14314).

bitsandbytes packs and unpacks; its kernels run on CPUs as well. What is packed is what LoRA may be put on: the Linears of
the decoder. A weight is unpacked where it is multiplied, forward and backward, and never kept (patches.py).
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

BLOCK: Final = 64
"""Weights that share a scale."""


def installed() -> bool:
    """Whether bitsandbytes is."""
    try:
        release()
    except PackageNotFoundError:
        return False
    return True


def release() -> str:
    """The version of bitsandbytes."""
    return version("bitsandbytes")


def library() -> Any:
    """bitsandbytes, imported at the first call: the package's own __init__ says why not before."""
    if sys.modules.get("bitsandbytes") is None:
        sys.modules.pop("bitsandbytes", None)
        # About a faster product for inference, which would be fetched from a hub.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        # Its fallbacks for other devices are compiled, which loads the compiler; as they are they do as well.
        with mock.patch.object(torch, "compile", lambda function, **_: function):
            return importlib.import_module("bitsandbytes")
    return sys.modules["bitsandbytes"]


def fits(layer: nn.Linear) -> bool:
    """Whether it can be packed. Blocks that go over the end of a row are read wrongly on CPUs (seen with 0.50.2)."""
    return layer.in_features % BLOCK == 0


def quantization(skipped: Iterable[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    """For from_pretrained, which then packs each weight as it is read; `skipped`: full names of the Linears that stay."""
    library()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(skipped),
    )


def pack(model: PreTrainedModel, linears: Mapping[str, nn.Linear], device: torch.device) -> None:
    """Replaces the Linears of these full names, one after the other, by packed ones on `device`."""
    layers = library().nn
    for name, plain in linears.items():
        sizes, dtype = (plain.in_features, plain.out_features), plain.weight.dtype
        packed = layers.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        weight = layers.Params4bit(plain.weight.data, quant_type="nf4", compress_statistics=True, module=packed)
        packed.weight = weight.to(device)
        packed.bias = plain.bias
        model.set_submodule(name, packed)
    # PEFT asks for it.
    model.is_loaded_in_4bit = True
    keep_layout(model)


def keep_layout(model: nn.Module) -> None:
    """bitsandbytes packs a weight anew for a faster product in bf16 when a CPU with AVX512-BF16 first runs it without
    gradients: other numbers, and a layout that training cannot read."""
    for module in filter(is_packed, model.modules()):
        vars(module)["support_avx512bf16_for_cpu"] = False


def is_packed(layer: Any) -> bool:
    """Whether it is a Linear of 4-bit weights. None is before bitsandbytes is imported."""
    return isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear4bit"


def unpacked(layer: Any) -> Tensor:
    """[O, I], in the dtype that was packed. The layer and not its weight knows the scales: FSDP2 makes a plain tensor of the
    weight."""
    weight: Tensor = library().functional.dequantize_4bit(layer.weight.data, layer.quant_state)
    return weight

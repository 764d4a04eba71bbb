"""Models whose weights are packed as hubs have them, and what each weight is worth then."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def to_fp8(folder: Path, *, block: int | None) -> dict[str, torch.Tensor]:
    """Packs the Linears of a model into fp8, as Ministral 3 (one scale a tensor) and DeepSeek (one a block) ship them.
    Returns what each weight is worth then."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static" if block is None else "dynamic",
        "weight_block_size": block and [block, block],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    packed: dict[str, torch.Tensor] = {}
    worth: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            packed[name] = worth[name] = weight
            continue
        rows, columns = weight.shape
        side = block or max(rows, columns)
        tiles = weight.reshape(-(-rows // side), min(side, rows), -(-columns // side), min(side, columns))
        scale = tiles.abs().amax((1, 3)) / 448
        tiles = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        packed[name] = tiles.reshape(rows, columns)
        packed[f"{name}_scale_inv"] = scale if block else scale[0, 0]
        if block is None:
            packed[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
        worth[name] = (tiles.float() * scale[:, None, :, None]).reshape(rows, columns)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    return worth


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What 4 bits mean in MXFP4; 32 of them share a power of two (OCP Microscaling Formats 1.0)."""


def to_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Packs the experts of a gpt-oss as it ships them: [experts, outputs, inputs / 32, 16], two numbers a byte, the first in
    the lower half. Returns what each weight is worth then."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    packed: dict[str, torch.Tensor] = {}
    worth: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = worth[name] = weight
            continue
        # Plain experts are [experts, inputs, outputs].
        blocks = weight.transpose(1, 2).unflatten(-1, (-1, 32))
        exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
        nearest = (blocks / exponents.exp2()[..., None])[..., None].sub(FP4).abs().argmin(-1).to(torch.uint8)
        packed[f"{name}_blocks"] = nearest[..., 0::2] | nearest[..., 1::2] << 4
        packed[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        worth[name] = (FP4[nearest.long()] * exponents.exp2()[..., None]).flatten(-2).transpose(1, 2).contiguous()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    return worth

"""The base model as it will be served, for the proof of an adapter that was trained on packed weights.

Whoever serves the adapter has the plain weights, and those may not fit the device: that is why they were packed. So the
layers stay in their files, and each is read when it is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer.model import add_adapters, build_empty, load_base, model_class, read_config, trainable


@contextmanager
def with_adapter(folder: Path, trained: PeftModel, method: ResolvedMethod, *, scratch: Path) -> Iterator[PeftModel]:
    """The model of `folder`, its weights as they are, with the adapter of `trained` and on its device. Weights that have
    another form in their files (fp8, experts one by one) are written below `scratch` meanwhile."""
    device = next(iter(trainable(trained).values())).device
    with TemporaryDirectory(dir=scratch) as offloaded:
        base = load_base(folder, device, places=_places(folder, device), scratch=Path(offloaded))
        model = add_adapters(base, method, seed=0, base_uri="")
        values = trainable(trained)
        for name, parameter in list(trainable(model).items()):
            module, last = name.rsplit(".", 1)
            setattr(model.get_submodule(module), last, nn.Parameter(values[name].detach().clone(), requires_grad=False))
            del parameter
        yield model


def _places(folder: Path, device: torch.device) -> dict[str, str]:
    """Where each part of the model is: the layers on disk, everything else on the device."""
    kind = model_class(read_config(folder))
    model = build_empty(AutoConfig.from_pretrained(folder, local_files_only=True), kind)
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    others = {name.rsplit(".", 1)[0] for name, _ in tensors if not name.startswith(tuple(f"{layer}." for layer in layers))}
    return {**dict.fromkeys(sorted(others), str(device)), **dict.fromkeys(layers, "disk")}

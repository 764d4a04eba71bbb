"""torch.compile, a decoder layer at a time: norms, rotations, products and adapters of a layer become a few kernels.

All layers share two graphs: the first layer's, whose input needs no gradient, and that of all others. So that they are made
once, every row has the same number of tokens (`batch.padded`); only the number of documents differs. Passes without a
gradient, whose rows are of any length, run as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuneward_api.names import ENV_COMPILE
from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer.model import decoder_layers, instance_forward

BACKEND: Final = "inductor"
CHECKED_BACKEND: Final = "aot_eager"
"""The same graphs, forward and backward, without the kernels, which take a compiler and a minute."""
_CONTEXT: Final = "Developer debug context: "
"""Dynamo's own first line is the same for many reasons."""


def asked(device: str) -> bool:
    """On GPUs, unless TUNEWARD_COMPILE says otherwise: 0 nowhere, 1 on a CPU too."""
    said = os.environ.get(ENV_COMPILE)
    return said == "1" or (device == "cuda" and said != "0")


def fits(method: ResolvedMethod) -> bool:
    """Dropout would fall otherwise than uncompiled, DoRA has PEFT's own forward pass, and whole models are sharded."""
    return method.type in ("LoRA", "QLoRA") and not method.dropout


@contextmanager
def compiled_layers(base: PreTrainedModel, backend: str | Callable[..., Any]) -> Iterator[None]:
    """A layer that is not one graph raises where it is first run."""
    with ExitStack() as stack:
        for layer in decoder_layers(base):
            quick = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=False)
            stack.enter_context(instance_forward(layer, _with_gradient(quick, layer.forward)))
        yield


def _with_gradient(quick: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*arguments: Any, **named: Any) -> Any:
        return (quick if torch.is_grad_enabled() else plain)(*arguments, **named)

    return forward


def mark(cu: Tensor) -> None:
    """The documents' bounds, [D + 1]: D is no part of a graph."""
    torch._dynamo.maybe_mark_dynamic(cu, 0)


def said(error: Exception) -> str:
    """What an error says in one line; of a layer that is no single graph, what in it is the reason."""
    lines = str(error).strip().splitlines() or [""]
    context = next((line.partition(_CONTEXT)[2] for line in lines if _CONTEXT in line), lines[0])
    return f"{type(error).__name__}: {context}"[:240]


def forget() -> None:
    """What was compiled in this process so far."""
    torch._dynamo.reset()

"""What a GPU would run, on tensors that have a device, a type and a shape and no numbers.

A fake tensor cannot give a number to the host, so whatever would make the host wait for the GPU raises here; so do types and
shapes that do not fit, and a device that was forgotten. Kernels do not run: `make test-gpu` is for those.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.trainer.families import PACKED
from tests.trainer.jobs import TARGETS, tiny_config
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer import attention, patches
from tuneward_trainer.batch import Batch
from tuneward_trainer.distributed import Gang
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import CrossEntropy, Loss, Preference
from tuneward_trainer.model import add_adapters
from tuneward_trainer.session import Stop
from tuneward_trainer.verdict import FLAGS, flags_of
from tuneward_trainer.verify import shrink

METHOD = ResolvedMethod(
    type="LoRA", rank=4, alpha=8.0, dropout=0.0, rs_lora=False, target_modules=TARGETS, trainable_parameters=0
)
# The reference is on the host, as it is in a training.
LOSSES = [CrossEntropy(), Preference(0.1, torch.zeros(2, dtype=torch.float64))]


@pytest.fixture
def model() -> PeftModel:
    """A bf16 base with fp32 adapters, as on a GPU."""
    base = LlamaForCausalLM._from_config(tiny_config(), dtype=torch.bfloat16, attn_implementation="sdpa")
    base.requires_grad_(False).eval()
    return add_adapters(base, METHOD, seed=1, base_uri="tiny")


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The attention kernel asks the driver which card it is on; this one takes the flash kernel."""
    asked = (varlen._cudnn_version_and_major_capability, varlen._should_use_cudnn)
    for answer in asked:
        answer.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    # No fake tensor can be pinned.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    yield
    for answer in asked:
        answer.cache_clear()


def emptied(model: PeftModel, device: str) -> PeftModel:
    """Within a FakeTensorMode: the same with fake tensors on `device`."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, one in list(module._parameters.items()):
            if one is not None:
                empty = torch.empty(one.shape, dtype=one.dtype, device=device)
                module._parameters[name] = moved.setdefault(one, nn.Parameter(empty, requires_grad=one.requires_grad))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


def batch_on(device: str) -> Batch:
    """A pair of documents of 20 and 12 tokens, 6 and 4 of which are learnt."""

    def whole(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device=device)

    return Batch(
        ids=whole(32),
        positions=whole(32),
        bounds=(0, 20, 32),
        cu=torch.zeros(3, dtype=torch.int32, device=device),
        longest=48,
        rows=whole(10),
        row_bounds=(0, 6, 10),
        targets=whole(10),
        weights=torch.ones(10, device=device),
        sources=(0, 1),
    )


def kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What torch's documentation says of varlen_attn: [T, heads, d] -> [T, heads, d]; `window_size` to the left and right."""
    assert cu is cu_k
    assert max_q == max_k >= int(cu.diff().max())
    assert v.shape[-1] == q.shape[-1]
    parts = []
    for start, stop in pairwise(cu.tolist()):
        asked, keys, values = (tensor[start:stop].transpose(0, 1) for tensor in (q, k, v))
        gap = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        left, right = (size if size >= 0 else stop for size in window_size)
        seen = (gap <= left) & (gap >= -right)
        out = nn.functional.scaled_dot_product_attention(
            asked, keys, values, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("known", [{"scale", "window_size"}, {"scale", "window_size", "enable_gqa"}], ids=["2.11", "2.12"])
@pytest.mark.parametrize("window", [None, 5, 40])
def test_the_kernel_of_gpus_is_asked_for_what_a_cpu_computes(
    known: set[str], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped queries, and values narrower than keys, by the keywords of the first torch that has them and of later ones."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 12)
    named: dict[str, Any] = {
        "cu_seq_lens_q": torch.tensor([0, 20, 32], dtype=torch.int32),
        "max_length_q": 48,
        "scaling": 0.3,
    }
    attend = partial(attention.packed_attention, nn.Module(), q, k, v, None, sliding_window=window, **named)
    expected, _ = attend()
    monkeypatch.setattr(attention, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(attention, "_KERNEL", kernel)
    monkeypatch.setattr(attention, "_KEYWORDS", known)
    found, _ = attend()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_forward_pass_on_a_gpu_waits_for_nothing(model: PeftModel, a100: None, loss: Loss) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = batch_on("cuda")
        with patches.applied(emptied(model, "cuda")) as forward, torch.no_grad():
            logprobs = forward(batch)
            figures = loss(logprobs, batch)
    assert (logprobs.shape, logprobs.dtype, logprobs.device.type) == ((10,), torch.float32, "cuda")
    assert (figures.shape, figures.dtype, figures.device.type) == ((len(loss.figures),), torch.float32, "cuda")


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_attention_that_no_kernel_does_asks_no_gpu_for_lengths(name: str, a100: None) -> None:
    """Soft-caps and sinks are computed document by document."""
    config = shrink(PACKED[name])
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    base.requires_grad_(False).eval()
    method = METHOD.model_copy(update={"target_modules": ["q_proj", "o_proj"]})
    model = add_adapters(base, method, seed=1, base_uri="tiny")
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = batch_on("cuda")
        with patches.applied(emptied(model, "cuda"), [patches.PACKED_ATTENTION]) as forward, torch.no_grad():
            logprobs = forward(batch)
    assert (logprobs.shape, logprobs.device.type) == ((10,), "cuda")


def test_an_optimizer_step_on_a_gpu_waits_for_nothing_and_is_fused(model: PeftModel) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Engine(emptied(model, "cuda"), weight_decay=0.1, max_grad_norm=1.0)
        norm = engine.optim_step(1e-3, engine.gradient.clone())
    assert engine._optimizer.defaults["fused"] is True
    assert (norm.shape, norm.device.type) == ((), "cuda")
    assert engine._flat.dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_backward_pass_in_bf16_waits_for_nothing(model: PeftModel, loss: Loss) -> None:
    """Autograd needs a driver for a GPU's tensors, so these are a CPU's, where attention alone asks for lengths."""
    names = [name for name in patches.ALL if name != patches.PACKED_ATTENTION]
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Engine(emptied(model, "cpu"), weight_decay=0.1, max_grad_norm=1.0)
        with patches.applied(engine.model, names) as forward:
            output = engine.forward_backward(forward, batch_on("cpu"), loss)
    assert (output.figures.dtype, engine.gradient.dtype) == (torch.float32, torch.float32)


def test_the_flags_of_a_step_stay_on_the_gpu(model: PeftModel, a100: None) -> None:
    gang = Gang(1, 2, torch.device("cuda", 0))
    session: Any = SimpleNamespace(gang=gang, stop=Stop())
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = batch_on("cuda")
        flags = flags_of(session, [(torch.zeros(10, device="cuda"), batch)] * 3)
    assert (flags.shape, flags.dtype, flags.device.type) == ((FLAGS,), torch.float32, "cuda")


def test_a_wait_would_be_seen(model: PeftModel) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        batch_on("cuda").cu.diff().tolist()

"""What scores the vocabulary: at rows that have a target only, in chunks, its gradient made on the way.

The logits of a row of 4,096 tokens and 128,000 words would take 2 GB; here a chunk of them is all that is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuneward_api.estimate import LOGITS, TRAINED_LOGITS, rows_scored
from tuneward_trainer.model import instance_forward

Head = Callable[[Tensor, Tensor], Tensor]
"""What the model gives of R rows, int64 [R] targets -> float32 [R], or of a judge [2, R]."""


def plain_head(logits: Tensor, targets: Tensor) -> Tensor:
    """float [R, V], int64 [R] -> float32 [R]."""
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def plain_judge(logits: Tensor, targets: Tensor) -> Tensor:
    found = logits.float().log_softmax(-1)
    chosen = found.gather(-1, targets[:, None])[:, 0]
    return torch.stack([chosen, (chosen >= found.amax(-1)).float()])


@contextmanager
def patched(base: PreTrainedModel) -> Iterator[tuple[Head, Head]]:
    """The model's own forward pass, but its head hands the hidden states through, and we score them.

    What a model does to its logits is applied to the hidden states instead: right for a scale (Granite, Cohere), since
    the head is linear. Gemma 2's soft-cap is not linear: it is switched off in the config and done here.
    """
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the head is a {type(head).__name__}, not a Linear")
    score = _TrainedHead if head.weight.requires_grad else _TargetLogprobs
    config = base.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    with ExitStack() as stack:
        stack.enter_context(instance_forward(head, lambda hidden: hidden))
        if cap is not None:
            config.final_logit_softcapping = None
            stack.callback(setattr, config, "final_logit_softcapping", cap)
        yield (
            lambda hidden, targets: score.apply(hidden, head.weight, head.bias, targets, cap),
            lambda hidden, targets: judged(hidden, head.weight, head.bias, targets, cap),
        )


class _TargetLogprobs(torch.autograd.Function):
    """log p(target) of each row, and d log p / d hidden made at once: rows are independent, so the backward pass only
    scales each row's gradient by what the loss says about it. With p = softmax(z): d log p_t / d z = onehot_t - p."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None) -> Tensor:
        """[R, H], [V, H], [V], int64 [R] -> float32 [R]."""
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(hidden, weight):
            # A function of its own: its logits are gone before those of the next chunk are made.
            _score_chunk(
                hidden[part],
                weight,
                bias,
                targets[part, None],
                cap,
                logprobs[part],
                slopes[part] if slopes is not None else None,
            )
        ctx.save_for_backward(slopes)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0][:, None].to(slopes.dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """The same of a head that is trained too. Its gradient needs each row's share of the loss, which only the backward pass
    has, so the scores are computed again there: a chunk's logits are all that is ever held."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None) -> Tensor:
        """[R, H], [V, H], [V], int64 [R] -> float32 [R]."""
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for part in _chunks(hidden, weight, TRAINED_LOGITS):
            _score_chunk(hidden[part], weight, bias, targets[part, None], cap, logprobs[part], None)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.cap = cap
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        hidden, weight, bias, targets = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        # float32: a sum over chunks of what may be bf16.
        to_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        to_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for part in _chunks(hidden, weight, TRAINED_LOGITS):
            rows = gradients[0][part, None]
            scores, bend = _scores(hidden[part], weight, bias, ctx.cap)
            slopes = scores.softmax(-1).mul_(-rows)
            slopes.scatter_add_(-1, targets[part, None], rows)
            slopes = (slopes if bend is None else slopes.mul_(bend)).to(weight.dtype)
            torch.mm(slopes, weight, out=to_hidden[part])
            if slopes.dtype == torch.float32:
                to_weight.addmm_(slopes.T, hidden[part])
            else:
                to_weight += slopes.T @ hidden[part]
            if to_bias is not None:
                to_bias += slopes.sum(0)
        return to_hidden, to_weight.to(weight.dtype), None if to_bias is None else to_bias.to(bias.dtype), None, None


def _chunks(hidden: Tensor, weight: Tensor, logits: int | None = None) -> Iterator[slice]:
    """Rows that are scored at once."""
    chunk = rows_scored(logits or LOGITS["cuda" if hidden.device.type == "cuda" else "cpu"], len(weight))
    return (slice(start, start + chunk) for start in range(0, len(hidden), chunk))


@torch.no_grad()
def judged(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None) -> Tensor:
    """[R, H], [V, H], [V], int64 [R] -> float32 [2, R]."""
    found = torch.empty(2, len(hidden), dtype=torch.float32, device=hidden.device)
    for part in _chunks(hidden, weight):
        _score_chunk(hidden[part], weight, bias, targets[part, None], cap, found[0, part], None, found[1, part])
    return found


def _score_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cap: float | None,
    logprobs: Tensor,
    slopes: Tensor | None,
    right: Tensor | None = None,
) -> None:
    """[r, H], [V, H], [V], int64 [r, 1] -> fills float32 [r] and, unless None, [r, H] and [r]."""
    scores, bend = _scores(hidden, weight, bias, cap)
    scores -= scores.amax(-1, keepdim=True)
    chosen = scores.gather(-1, targets)
    sums = scores.exp_().sum(-1, keepdim=True)
    logprobs.copy_((chosen - sums.log())[:, 0])
    if right is not None:
        # Of the highest score nothing was left.
        right.copy_((chosen >= 0)[:, 0])
    if slopes is not None:
        gradient = scores.div_(sums.neg_())
        gradient.scatter_add_(-1, targets, torch.ones_like(sums))
        gradient = gradient if bend is None else gradient.mul_(bend)
        torch.mm(gradient.to(weight.dtype), weight, out=slopes)


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """float32 [r, V], and with a soft-cap its derivative."""
    scores = nn.functional.linear(hidden, weight, bias).float()
    if cap is None:
        return scores, None
    squashed = (scores / cap).tanh_()
    return squashed * cap, 1 - squashed * squashed

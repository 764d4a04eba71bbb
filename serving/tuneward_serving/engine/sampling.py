"""From logits to the next token and its log-probability."""

from __future__ import annotations

import torch

from tuneward_serving.engine.generation import Sampling, Scored


def generator_for(sampling: Sampling) -> torch.Generator:
    """Its own for each text, so that a seed gives the same text whatever else is in the batch."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed % 2**63)
    return generator


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """logits [vocabulary]. Temperature 0 is the most likely token."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.cpu() / max(sampling.temperature, 1e-4)
    ordered, order = scaled.sort(descending=True)
    if sampling.top_k > 0:
        ordered = ordered[: sampling.top_k]
    probabilities = ordered.softmax(-1)
    # A token stays when those before it have not reached top_p: at least one always does.
    kept = probabilities * (probabilities.cumsum(-1) - probabilities < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def score(logits: torch.Tensor, token: int, top: int) -> Scored:
    """logits [vocabulary], unscaled: log-probabilities are the model's, not the sampler's, as in vLLM."""
    logprobs = logits.log_softmax(-1)
    own = logprobs[token]
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, indices = logprobs.topk(top)
        best = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return Scored(token=token, logprob=float(own), rank=int((logprobs > own).sum()) + 1, top=best)

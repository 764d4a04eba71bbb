"""Greedy answers of the plain model, several prompts together where that changes none of them.

Prompts of different lengths are padded on the left. Whether a model's cache and state are right behind padding is seen from
the model itself: of the shortest and the longest prompt the first logits must be those that each has alone. Models of which
they are not (some with recurrent state, some that count positions by themselves) write one answer at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from transformers import StoppingCriteriaList

logger = logging.getLogger("tuneward_trainer")

Prompt: TypeAlias = list[int]
TOGETHER: Final = 8
"""Prompts of a batch. A function of nothing, so that any number of ranks writes in the same batches."""
_PADDED: Final = 32_768
"""Tokens of a batch with its padding and its answers: caches are held for all of them."""
_LOOKED_AT: Final = 3
"""Tokens of an answer whose logits are compared."""
_ERROR: Final = 1e-4
"""Of logits in float32, as a share of their range."""
_ROUGH_ERROR: Final = 0.05
"""The same in half precision; a state that is wrong behind padding is off by far more."""


@dataclass(frozen=True)
class Writer:
    """`ends`: ids at which an answer ends."""

    model: Any
    device: torch.device
    ends: set[int]
    max_tokens: int
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    def write(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Ids that follow each prompt, what ends them included, all in one batch."""
        made = self._generate(prompts, self.max_tokens)
        width = max(map(len, prompts))
        return [self._cut(row[width:].tolist()) for row in made.sequences]

    def is_right_together(self, prompts: Sequence[Prompt]) -> bool:
        """Whether padding leaves the model's logits as they are."""
        pair = [min(prompts, key=len), max(prompts, key=len)]
        try:
            both = self._generate(pair, _LOOKED_AT, logits=True)
            alone = [self._generate([prompt], _LOOKED_AT, logits=True) for prompt in pair]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
            logger.info("prompts are asked one at a time: the model takes none together (%s)", str(error)[:200])
            return False
        right = all(self._agree(both, row, one) for row, one in enumerate(alone))
        if not right:
            logger.info("prompts are asked one at a time: behind padding this model has other logits")
        return right

    def batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Indices of prompts, those of about the same length together."""
        found: list[list[int]] = []
        for index in sorted(range(len(prompts)), key=lambda one: (len(prompts[one]), one)):
            padded = (len(found[-1]) + 1) * (len(prompts[index]) + self.max_tokens) if found else 0
            if not found or len(found[-1]) == TOGETHER or padded > _PADDED:
                found.append([])
            found[-1].append(index)
        return found

    def _agree(self, both: Any, row: int, alone: Any) -> bool:
        """Step by step, as long as both went the same way."""
        error = _ERROR if self._dtype() == torch.float32 else _ROUGH_ERROR
        for ours, theirs in zip(both.logits, alone.logits, strict=False):
            padded, own = ours[row].float(), theirs[0].float()
            if not bool((padded - own).abs().max() <= error * (own.max() - own.min())):
                return False
            if int(padded.argmax()) != int(own.argmax()) or int(own.argmax()) in self.ends:
                return True
        return True

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return dtype

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Prompt], tokens: int, *, logits: bool = False) -> Any:
        """transformers' own output."""
        width, pad = max(map(len, prompts)), min(self.ends, default=0)
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=pad,
            stopping_criteria=self.criteria,
            return_dict_in_generate=True,
            output_logits=logits,
        )

    def _cut(self, ids: Prompt) -> Prompt:
        """Up to what ends it: a batch goes on until its longest answer is written."""
        end = next((index + 1 for index, number in enumerate(ids) if number in self.ends), len(ids))
        return ids[:end]

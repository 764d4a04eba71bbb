"""Answers to held-out prompts, by the plain model as an engine runs it: greedily, one prompt at a time.

Prompt and expected answer come from the cached documents: what is learnt last is the answer, what stands before it the
prompt, token for token as it will be asked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tuneward_api import evaluation
from tuneward_api.evaluation import Task
from tuneward_trainer import grade
from tuneward_trainer.data.documents import Document, Documents
from tuneward_trainer.distributed import Gang
from tuneward_trainer.evaluate import heed
from tuneward_trainer.tokenizer import Tokenizer

logger = logging.getLogger("tuneward_trainer")

FILE = "generations.jsonl"


@dataclass(frozen=True)
class Answer:
    """One held-out prompt, what was expected, and what was written."""

    file: str
    line: int
    prompt: str
    expected: str
    answer: str
    right: bool | None
    """None without a grader."""


def chosen(documents: Documents, task: Task, unit: int = 1) -> list[int]:
    """Indices of the samples that are asked, spread over all that have a prompt and an answer. `unit`: documents of one
    sample; of a pair the better answer, which is the first, is what is expected."""
    usable = [index for index in range(0, len(documents), unit) if answer_start(documents[index])]
    wanted = min(task.samples or evaluation.TASK_SAMPLES, len(usable))
    return [usable[place * len(usable) // wanted] for place in range(wanted)]


def answer_start(document: Document) -> int:
    """Index of the first token of what is learnt last; 0 where nothing stands before it."""
    learnt = np.flatnonzero(document.weights)
    if not len(learnt):
        return 0
    gaps = np.flatnonzero(np.diff(learnt) > 1)
    return int(learnt[gaps[-1] + 1] if len(gaps) else learnt[0])


def answers(
    model: Any,
    tokenizer: Tokenizer,
    documents: Documents,
    task: Task,
    gang: Gang,
    *,
    unit: int,
    stopping: Callable[[], bool],
) -> list[Answer]:
    """On every rank the answers of all. Raises StoppedError where `stopping()` became true on any rank."""
    asked, ask = chosen(documents, task, unit), _Asked(model, tokenizer, task, gang, stopping)
    found: list[Answer] = []
    if gang.model_sharded:
        # A token is a pass of all ranks, so all write the same answer.
        for index in asked:
            found.append(ask(documents[index]))
            heed(gang, stopping)
        return found
    for start in range(0, len(asked), gang.world):
        mine = asked[start + gang.rank : start + gang.rank + 1]
        made = [ask(documents[index]) for index in mine]
        heed(gang, stopping)
        found += gang.gather(made)
    return found


class _Asked:
    """The model with its tokenizer, and how its answers are graded."""

    def __init__(self, model: Any, tokenizer: Tokenizer, task: Task, gang: Gang, stopping: Callable[[], bool]) -> None:
        self._model, self._tokenizer, self._task, self._device = model, tokenizer, task, gang.device
        self._schema = json.loads(task.json_schema) if task.json_schema is not None else None
        self._ends = stop_tokens(model, tokenizer)
        # Ranks that write one answer together end it together, and learn of a stop between two.
        self._criteria = StoppingCriteriaList([_Stop(stopping)] if not gang.model_sharded else [])

    def __call__(self, document: Document) -> Answer:
        start = answer_start(document)
        prompt = document.ids[:start].tolist()
        expected = self._text(document.ids[start:].tolist())
        answer = self._text(self._write(prompt))
        grader = self._task.grader
        return Answer(
            file=document.file,
            line=document.line,
            prompt=self._tokenizer.decode(prompt),
            expected=expected,
            answer=answer,
            right=grade.accepts(grader, answer, expected, self._schema) if grader is not None else None,
        )

    @torch.no_grad()
    def _write(self, prompt: list[int]) -> list[int]:
        """Ids that follow the prompt, greedily, what ends them included."""
        ids = torch.tensor([prompt], device=self._device)
        made = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._task.max_tokens or evaluation.TASK_TOKENS,
            do_sample=False,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=min(self._ends, default=0),
            stopping_criteria=self._criteria,
        )
        new: list[int] = made[0, len(prompt) :].tolist()
        return new

    def _text(self, ids: list[int]) -> str:
        """Without what ends it. Other special tokens stay: some templates write tool calls with them."""
        while ids and ids[-1] in self._ends:
            ids = ids[:-1]
        return self._tokenizer.decode(ids).strip()


def stop_tokens(model: Any, tokenizer: Tokenizer) -> set[int]:
    """Ids at which generation ends, as an engine has them."""
    found = getattr(model.generation_config, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return {int(number) for number in (*listed, tokenizer.eos_token_id) if number is not None}


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopping(), device=input_ids.device, dtype=torch.bool)


def score(found: list[Answer]) -> float | None:
    """Share of the graded answers that count."""
    graded = [answer.right for answer in found if answer.right is not None]
    return sum(graded) / len(graded) if graded else None


def keep(folder: Path, found: list[Answer], *, of: str) -> None:
    """Appends the answers to generations.jsonl of an attempt. `of`: base, or tuned."""
    with (folder / FILE).open("a") as file:
        for answer in found:
            file.write(json.dumps({"model": of, **asdict(answer)}, ensure_ascii=False) + "\n")

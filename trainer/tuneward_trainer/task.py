"""Answers to held-out prompts, by the plain model as an engine runs it: greedily, several prompts at a time (`writing.py`).

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
from tuneward_trainer.writing import Writer

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
    asked = [documents[index] for index in chosen(documents, task, unit)]
    prompts = [document.ids[: answer_start(document)].tolist() for document in asked]
    # Ranks that write one answer together end it together, and learn of a stop between two.
    criteria = StoppingCriteriaList([_Stop(stopping)] if not gang.model_sharded else [])
    ends = stop_tokens(model, tokenizer)
    writer = Writer(model, gang.device, ends, task.max_tokens or evaluation.TASK_TOKENS, criteria)
    written: dict[int, list[int]] = {}
    for batches in _turns(writer, prompts, gang):
        # Of a sharded model a token is a pass of all ranks, so all write the same answers.
        mine = batches if gang.model_sharded else batches[gang.rank : gang.rank + 1]
        made = [found for batch in mine for found in zip(batch, writer.write([prompts[i] for i in batch]), strict=True)]
        heed(gang, stopping)
        written |= dict(made if gang.model_sharded else gang.gather(made))
    graded = _Graded(tokenizer, task, ends)
    return [graded(document, written[index]) for index, document in enumerate(asked)]


def _turns(writer: Writer, prompts: list[list[int]], gang: Gang) -> list[list[list[int]]]:
    """Batches of prompts that are written at once: one on each rank, or one on all of them."""
    together = len(prompts) > 1 and bool(gang.add(torch.tensor([float(writer.is_right_together(prompts))]))[0] == gang.world)
    batches = writer.batches(prompts) if together else [[index] for index in range(len(prompts))]
    step = 1 if gang.model_sharded else gang.world
    return [batches[start : start + step] for start in range(0, len(batches), step)]


class _Graded:
    """How answers become text, and whether they count."""

    def __init__(self, tokenizer: Tokenizer, task: Task, ends: set[int]) -> None:
        self._tokenizer, self._grader, self._ends = tokenizer, task.grader, ends
        self._schema = json.loads(task.json_schema) if task.json_schema is not None else None

    def __call__(self, document: Document, written: list[int]) -> Answer:
        start = answer_start(document)
        expected, answer = self._text(document.ids[start:].tolist()), self._text(written)
        right = grade.accepts(self._grader, answer, expected, self._schema) if self._grader is not None else None
        prompt = self._tokenizer.decode(document.ids[:start].tolist())
        return Answer(document.file, document.line, prompt, expected, answer, right)

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

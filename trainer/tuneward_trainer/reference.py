"""Log-probabilities of every answer under the model that a preference job starts from: computed once, then read.

    reference/<key>/<part>-<first document>.a<attempt>/{logprobs.f64, MANIFEST.json}

That model is the state at step 0, so each attempt has it at hand before it loads its checkpoint, and nothing needs a second
model. A kill loses what was computed since the last folder was complete, and no more; what is computed again has the same
bytes. The key is that of all that the numbers depend on, and folders bear the attempt's number: two gangs at once harm
nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneward_api import manifest
from tuneward_trainer import evaluate
from tuneward_trainer.data.documents import Documents
from tuneward_trainer.distributed import Gang
from tuneward_trainer.patches import Forward

FOLDER: Final = "reference"
FILE: Final = "logprobs.f64"
TOKENS: Final = 1 << 17
"""Of the documents of one folder, about: some seconds on a GPU, a minute or two on a CPU."""

logger = logging.getLogger("tuneward_trainer")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an attempt keeps and finds the numbers of a job."""

    run: Path
    attempt: int
    identity: dict[str, Any]
    """What they depend on: base, data, and what the adapter starts from."""

    @property
    def folder(self) -> Path:
        return self.run / FOLDER / hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]


def measure(
    forward: Forward,
    documents: Documents,
    part: str,
    place: Place,
    gang: Gang,
    *,
    row_tokens: int,
    stopping: Callable[[], bool],
    tokens: int = TOKENS,
) -> Tensor:
    """float64 [documents]: log-probability of each document's targets. `forward` must be that of the state at step 0.

    Raises StoppedError where `stopping()` became true on any rank; what was complete by then stays.
    """
    originals, which = documents.originals()
    values: list[Tensor] = []
    for indices in _pieces(documents.lengths, originals, tokens):
        name = f"{part}-{indices[0]:08d}"
        found: Tensor | None = gang.broadcast(_read(place.folder, name, len(indices)) if gang.leads else None)
        if found is None:
            found = evaluate.logprobs(forward, documents, indices, gang, tokens=row_tokens, stopping=stopping)
            if gang.leads:
                _write(place.folder / f"{name}.a{place.attempt}", found)
        values.append(found)
        logger.info("%s answers scored by the model that training starts from: %d of %d", part, indices[-1] + 1, len(which))
    return torch.cat(values)[torch.from_numpy(which)] if values else torch.zeros(0, dtype=torch.float64)


def _pieces(lengths: NDArray[np.int32], originals: NDArray[np.intp], tokens: int) -> Iterator[list[int]]:
    """Runs of `originals` of about `tokens` tokens: a function of the data alone."""
    ends = np.cumsum(lengths[originals], dtype=np.int64)
    for piece in np.split(originals, np.flatnonzero(np.diff(ends // tokens)) + 1):
        if len(piece):
            yield piece.tolist()


def _read(folder: Path, name: str, count: int) -> Tensor | None:
    """Of the first attempt that left it whole."""
    found = [entry for entry in folder.glob(f"{name}.a*") if entry.suffix[2:].isdecimal()]
    for entry in sorted(found, key=lambda path: int(path.suffix[2:])):
        try:
            manifest.verify(entry)
            values = np.fromfile(entry / FILE, "<f8")
        except (manifest.ManifestError, OSError) as error:
            logger.info("passed over %s: %s", entry.name, error)
            continue
        if len(values) == count:
            return torch.from_numpy(values.astype(np.float64))
    return None


def _write(folder: Path, values: Tensor) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        values.numpy().astype("<f8").tofile(folder / FILE)
        manifest.write_manifest(folder)
    except OSError as error:
        # The training has the numbers; only a later attempt would have to compute them again.
        logger.error("%s was not kept: %s", folder.name, error)

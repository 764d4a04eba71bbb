"""A file of any size is tokenized in the memory of some of its lines: only numbers a sample are kept."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tuneward_trainer.data import files, samples
from tuneward_trainer.data.build import gather
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.samples import Limits, Source

LINE = "The quick brown fox jumps over the lazy dog. " * 60
"""2.7 kB, about 540 tokens."""


@pytest.mark.parametrize("keep_tokens", [True, False], ids=["prepare", "validate"])
def test_memory_does_not_grow_with_the_number_of_tokens(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, keep_tokens: bool
) -> None:
    monkeypatch.setattr(samples, "_BYTES", 1 << 13)  # a batch of four lines
    monkeypatch.setattr(files, "_CHUNK", 1 << 13)
    encoder = Encoder(AutoTokenizer.from_pretrained(smollm2), "Assistant")
    peaks, tokens = [], []
    for count in (200, 600):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{index} {LINE}"}) + "\n" for index in range(count)))
        tracemalloc.start()
        found = gather(
            tmp_path / f"out-{count}",
            training=[Source("pvc://data/a.jsonl", file)],
            validation=[],
            encoder=encoder,
            limits=Limits(8192, fraction=0.1),
            keep_tokens=keep_tokens,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        tokens.append(found.summary.tokens)
    more = tokens[1] - tokens[0]
    assert more > 200_000
    # Their ids alone would be four bytes each.
    assert peaks[1] - peaks[0] < more

"""How fast files become tokens and masks, against what `tokenizers` alone gives on the same processors.

    python benchmarks/tokenizing.py [--of talks|files] [--megabytes 100] [--rounds 3]

The data are the conversations of examples/chitchat, over and over, with a number in each so that none is a copy; or, since
both contestants remember words and talks that come again hold no new ones, the Python files of this environment, each once.
The model is SmolLM2's tokenizer and chat template. Two contestants, in turns, so that a busy machine slows both:

    tokenizers  the texts, already rendered, in batches of 512: `encode_batch_fast`, which knows no offsets, on all
                processors
    ours        what prepare does: lines of JSON are read, checked, rendered, tokenized, masked and written to the cache,
                in a process for each processor

What is compared is tokens a second of wall time. The budget is a share of 80%: the median of the rounds. Beside it stands
the share by CPU seconds of all processes, their start included, which a busy machine changes less; and of both the share of
each contestant's best round, as neighbours only ever slow one of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from tuneward_trainer.data import build
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.samples import Limits, Source
from tuneward_trainer.machine import processors

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / ".cache/models/smollm2-135m-instruct"
BUDGET: Final = 0.8
BATCH: Final = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--of", choices=("talks", "files"), default="talks", help="what the data are")
    parser.add_argument("--megabytes", type=int, default=100, metavar="N", help="size of the data")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tuneward-benchmark-") as name:
        compare(Path(name), options.of, options.megabytes, options.rounds)


def compare(folder: Path, of: str, megabytes: int, rounds: int) -> None:
    from transformers import AutoTokenizer  # prepare's processes have a main module that imports nothing

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    file, texts = talks(folder, megabytes << 20, tokenizer) if of == "talks" else files(folder, megabytes << 20)
    print(f"{file.stat().st_size >> 20} MB of {of}, {processors()} processors")
    measurements = []
    for number in range(1, rounds + 1):
        alone = measured(lambda: tokenizers(tokenizer, texts))
        ours = measured(partial(prepared, folder / str(number), file, tokenizer))
        measurements.append((alone, ours))
        print(f"round {number}: tokenizers {alone}; ours {ours}", flush=True)
    for name, speed in (("share", Measured.by_wall), ("by CPU", Measured.by_cpu)):
        theirs, our_own = zip(*((speed(alone), speed(ours)) for alone, ours in measurements), strict=True)
        found = [one / other for one, other in zip(our_own, theirs, strict=True)]
        spread = f"{min(found):.0%} to {max(found):.0%}; best rounds {max(our_own) / max(theirs):.0%}"
        print(f"{name} {statistics.median(found):.0%} ({spread}); budget {BUDGET:.0%}")


class Measured(NamedTuple):
    """Seconds of wall time, and of CPU time of all processes that ended."""

    tokens: int
    wall: float
    cpu: float

    def by_wall(self) -> float:
        """Tokens a second."""
        return self.tokens / self.wall

    def by_cpu(self) -> float:
        """Tokens a CPU second."""
        return self.tokens / self.cpu

    def __str__(self) -> str:
        return f"{self.by_wall():,.0f} tokens/s, {self.cpu:.1f} CPU s"


def measured(work: Callable[[], int]) -> Measured:
    """`work` gives the number of its tokens."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    tokens = work()
    return Measured(tokens, time.perf_counter() - wall, sum(os.times()[:4]) - cpu)


def files(folder: Path, size: int) -> tuple[Path, list[str]]:
    """The file, and each of its texts."""
    file, texts, written = folder / "many.jsonl", [], 0
    with file.open("w") as output:
        for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
            text = path.read_text(errors="replace").strip()
            if text and written <= size:
                written += output.write(json.dumps({"text": text}) + "\n")
                texts.append(text)
    return file, texts


def talks(folder: Path, size: int, tokenizer: Any) -> tuple[Path, list[str]]:
    """The file, and each of its conversations as the model's template renders it."""
    subprocess.run([sys.executable, str(ROOT / "examples/chitchat/make.py"), str(folder), "--held-out", "1"], check=True)
    lines = (folder / "training.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    bare = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats]
    file, texts, written = folder / "many.jsonl", [], 0
    with file.open("w") as output:
        for index, messages, text in numbered(chats, bare):
            first = messages[0]["content"]
            line = json.dumps({"messages": [{"role": "user", "content": f"{index} {first}"}, *messages[1:]]}) + "\n"
            output.write(line)
            texts.append(text.replace(first, f"{index} {first}", 1))
            written += len(line)
            if written > size:
                return file, texts
    raise AssertionError("talks never end")


def numbered(chats: list[Any], texts: list[str]) -> Iterator[tuple[int, Any, str]]:
    index = 0
    while True:
        for messages, text in zip(chats, texts, strict=True):
            yield index, messages, text
            index += 1


def tokenizers(tokenizer: Any, texts: list[str]) -> int:
    """Number of tokens."""
    tokens = 0
    for start in range(0, len(texts), BATCH):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    return tokens


def prepared(folder: Path, file: Path, tokenizer: Any) -> int:
    """Number of tokens."""
    summary = build.build(
        folder,
        training=[Source("chats.jsonl", file)],
        validation=[],
        encoder=Encoder(tokenizer, "Assistant"),
        limits=Limits(1 << 20, "Truncate"),
    )
    return summary.tokens


if __name__ == "__main__":
    main()

"""The trainer's speed and memory against TRL's SFTTrainer, on one CPU, in one run, on the same documents.

    python benchmarks/trainer_vs_trl.py            a quarter of an hour on an idle machine
    python benchmarks/trainer_vs_trl.py --quick    less than two minutes: says that it works, no figure to quote

Three contestants train LoRA of rank 16 on every Linear, in float32, on rows of at most 1,024 tokens:

    trl       SFTTrainer as a user gets it on a CPU: packing, and no gradient checkpointing, which would only slow it
    trl-rows  the same with the path forced that it has for CUDA alone: the vocabulary scored at target rows only
    ours      what `tuneward train` runs: patches.applied, Engine.forward_backward, Engine.optim_step

Each lives in a process of its own, with the environment that it would have: `tuneward train` sets some of torch's
variables for its ranks. Each round gives each of them the same new documents, one after the other, in an order that rotates,
so that a busy machine slows all alike. What is compared is CPU seconds of the whole process a token, of all its threads. In
TRL's favour are bf16=False (its default is bf16, which a CPU without such units emulates) and rows of one batch entry (its
default of 8 would make one dense mask over 8,192 tokens). Before anything is timed, all three must give the same loss.

Memory is the highest that was resident while a contestant trained a few steps, in a fresh process: whole, and without what
was resident before the first step (libraries and weights, which are the same for all). The budget is for the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from contestant import LEARNT, RANK, adapted, engine_on
from numpy.typing import NDArray
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tuneward_api.estimate import Data, flops_per_token
from tuneward_api.shape import Shape
from tuneward_trainer import packing, patches
from tuneward_trainer.batch import collate, total_weight
from tuneward_trainer.launch import BEFORE_TORCH
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import load_base

ROW: Final = 1024
SMOLLM2: Final = Path(__file__).parents[1] / ".cache/models/smollm2-135m-instruct"
NAMES: Final = ("trl", "trl-rows", "ours")

Step = Callable[[list["Text"]], float]
"""One optimizer step over the documents -> mean loss a target, in nats."""


@dataclass(frozen=True)
class Case:
    model: str
    length: int
    """Mean tokens of a document."""
    against_trl: float | None
    """Budget: least ratio of tokens a CPU second; None where there is none."""
    against_rows: float | None

    @property
    def name(self) -> str:
        return f"{self.model}, documents of ~{self.length} tokens"


CASES: Final = (
    Case("59M Mistral shape", 100, 2.0, 1.5),
    Case("SmolLM2-135M", 100, 2.0, None),
    Case("SmolLM2-135M", 1000, 1.5, None),
)


@dataclass(frozen=True)
class Text:
    ids: NDArray[np.int32]
    weights: NDArray[np.float16]


def documents(case: Case, tokens: int, vocabulary: int, seed: int) -> list[Text]:
    """About `tokens` tokens: a question, then an answer that is learnt."""
    random = np.random.default_rng(seed)
    made: list[Text] = []
    while sum(len(text.ids) for text in made) < tokens - case.length // 2:
        length = min(ROW, max(16, round(case.length * random.lognormal(-0.02, 0.2))))
        answer = round(length * LEARNT)
        weights = np.concatenate([np.zeros(length - answer), np.ones(answer)]).astype(np.float16)
        made.append(Text(random.integers(3, vocabulary, length, dtype=np.int32), weights))
    return made


def model_folder(case: Case, scratch: Path) -> Path:
    """The base model as a Hugging Face folder; the 59M one is random."""
    if case.model.startswith("SmolLM2"):
        if not SMOLLM2.is_dir():
            raise SystemExit("the base model is not there; run `make model` first")
        return SMOLLM2
    folder = scratch / "mistral-59m"
    if not folder.is_dir():
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        config = MistralConfig(
            vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, sliding_window=None, pad_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.MistralForCausalLM(config).save_pretrained(folder)
        # Never used, but SFTTrainer wants one.
        words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    return folder


# -- the contestants ---------------------------------------------------------------------------------------------------


@contextmanager
def ours(folder: Path) -> Iterator[Step]:
    engine = engine_on(adapted(touched(load_base(folder, torch.device("cpu")))))
    with patches.applied(engine.model) as forward:

        def step(texts: list[Text]) -> float:
            lengths = np.asarray([len(text.ids) for text in texts], np.int32)
            weight = total_weight(texts)
            loss = 0.0
            for row in packing.bins(lengths, seed=0, epoch=0, sequence_length=ROW):
                batch = collate(((index, texts[index]) for index in row), longest=ROW).scaled(1 / weight)
                loss += float(engine.forward_backward(forward, batch, cross_entropy).loss)
            engine.optim_step(1e-5, engine.gradient.clone())
            return loss

        yield step


@contextmanager
def trl(folder: Path, *, rows_only: bool) -> Iterator[Step]:
    import datasets
    import trl.trainer.utils
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer, pack_dataset

    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    base = touched(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=base,
            args=SFTConfig(
                output_dir=output, packing=True, max_length=ROW, per_device_train_batch_size=1, learning_rate=1e-5,
                gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]}),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.create_optimizer()
        trainer.model.train()
        in_use = trl.trainer.utils._use_triton

        def step(texts: list[Text]) -> float:
            columns = {
                "input_ids": [text.ids.tolist() for text in texts],
                "labels": [np.where(text.weights > 0, text.ids, -100).tolist() for text in texts],
            }
            packed = pack_dataset(Dataset.from_dict(columns), ROW, "bfd")
            targets = torch.tensor(sum(int((text.weights > 0).sum()) for text in texts))
            trl.trainer.utils._use_triton = (lambda _: True) if rows_only else in_use
            try:
                trainer.current_gradient_accumulation_steps = len(packed)
                losses = [
                    trainer.training_step(trainer.model, trainer.data_collator([row]), num_items_in_batch=targets)
                    for row in packed
                ]
            finally:
                trl.trainer.utils._use_triton = in_use
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return float(sum(losses))

        yield step


def touched(base: Any) -> Any:
    """Weights are mapped from their file: without this they would enter memory, and our figures, in the first step."""
    for parameter in base.parameters():
        parameter.sum()
    return base


def contestant(name: str, folder: Path) -> Any:
    return ours(folder) if name == "ours" else trl(folder, rows_only=name == "trl-rows")


def itself(option: str, name: str, case: Case, folder: Path, tokens: int) -> list[str]:
    """This script as one contestant."""
    of = [option, name, "--folder", str(folder), "--length", str(case.length), "--tokens", str(tokens)]
    return [sys.executable, __file__, *of]


def vocabulary(folder: Path) -> int:
    return Shape.of(json.loads((folder / "config.json").read_text())).vocabulary


# -- speed -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Of one case; a list holds one entry a round."""

    seconds: dict[str, list[float]]
    """Name -> CPU seconds a token."""
    peak: list[float]
    """Floating-point operations a CPU second of one large matrix product."""
    needed: float
    """Floating-point operations a token."""

    def ratios(self, other: str) -> list[float]:
        """How many times the tokens a CPU second of `other`."""
        return [theirs / own for theirs, own in zip(self.seconds[other], self.seconds["ours"], strict=True)]

    def share_of_peak(self) -> float:
        return statistics.median(self.needed / own / peak for own, peak in zip(self.seconds["ours"], self.peak, strict=True))


Ask = Callable[[int], tuple[float, float]]
"""Seed of the documents -> mean loss a target, CPU seconds of the step over them."""


@contextmanager
def in_a_process(name: str, case: Case, folder: Path, *, tokens: int, threads: int) -> Iterator[Ask]:
    environment = BEFORE_TORCH | os.environ if name == "ours" else os.environ
    command = [*itself("--steps-of", name, case, folder, tokens), "--threads", str(threads)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, told = process.stdin, process.stdout

        def ask(seed: int) -> tuple[float, float]:
            asked.write(f"{seed}\n")
            asked.flush()
            loss, seconds = json.loads(told.readline())
            return loss, seconds

        yield ask


def steps_here(name: str, folder: Path, length: int, tokens: int) -> None:
    """A line of JSON for each seed on standard input."""
    case = Case("", length, None, None)
    size = vocabulary(folder)
    told = os.fdopen(os.dup(1), "w")
    # Libraries print what they like.
    os.dup2(2, 1)
    with contestant(name, folder) as step:
        for line in sys.stdin:
            texts = documents(case, tokens, size, seed=int(line))
            began = time.process_time()
            loss = step(texts)
            told.write(json.dumps([loss, time.process_time() - began]) + "\n")
            told.flush()


def measure_speed(case: Case, folder: Path, *, rounds: int, tokens: int, threads: int) -> Speed:
    shape = Shape.of(json.loads((folder / "config.json").read_text()))
    with ExitStack() as stack:
        ask: dict[str, Ask] = {
            name: stack.enter_context(in_a_process(name, case, folder, tokens=tokens, threads=threads)) for name in NAMES
        }
        losses = {name: one(0)[0] for name, one in ask.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4 * losses["ours"]:
            raise SystemExit(f"{case.name}: the losses differ, so different things were trained: {losses}")
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        peak, texts = [], list[Text]()
        for seed in range(1, rounds + 1):
            texts = documents(case, tokens, shape.vocabulary, seed)
            count = sum(len(text.ids) for text in texts)
            first = seed % len(NAMES)
            for name in NAMES[first:] + NAMES[:first]:
                seconds[name].append(ask[name](seed)[1] / count)
            peak.append(matmul_peak())
    lengths = np.asarray([len(text.ids) for text in texts], float)
    data = Data(learnt=LEARNT, length=float((lengths**2).sum() / lengths.sum()))
    return Speed(seconds, peak, flops_per_token(shape, data, RANK))


def matmul_peak() -> float:
    """Of float32 [1024, 1536] x [1536, 1536]: the kind of product that a layer is made of."""
    a, b = torch.randn(ROW, 1536), torch.randn(1536, 1536)
    times = 20
    began = time.process_time()
    for _ in range(times):
        a @ b
    return times * 2 * ROW * 1536 * 1536 / (time.process_time() - began)


# -- memory ------------------------------------------------------------------------------------------------------------


def measure_memory(case: Case, name: str, folder: Path, *, tokens: int) -> dict[str, float]:
    """{"peak", "training"} in MB, by a process of its own."""
    environment = BEFORE_TORCH | os.environ if name == "ours" else os.environ
    command = itself("--memory-of", name, case, folder, tokens)
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_here(name: str, folder: Path, length: int, tokens: int) -> dict[str, float]:
    case = Case("", length, None, None)
    size = vocabulary(folder)
    with contestant(name, folder) as step:
        # 5 resets the peak (Linux, proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        for seed in range(3):
            step(documents(case, tokens, size, seed))
        peak = resident("VmHWM")
    return {"peak": peak, "training": peak - before}


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


# -- the run -----------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def report(case: Case, speed: Speed, memory: dict[str, dict[str, float]]) -> list[str]:
    """Prints the case's figures; returns the budgets that were missed."""
    print(f"\n{case.name}")
    missed = []
    for other, least in (("trl", case.against_trl), ("trl-rows", case.against_rows)):
        ratios = speed.ratios(other)
        wanted = "" if least is None else f"  budget {least}"
        print(f"  tokens a CPU second, ours over {other:9s} min / median / max  {spread(ratios)}{wanted}")
        if least is not None and statistics.median(ratios) < least:
            missed.append(f"{case.name}: {statistics.median(ratios):.2f} times {other}, budget {least}")
    for name in NAMES:
        rate = 1 / statistics.median(speed.seconds[name])
        print(f"  {name:9s} {rate:7.0f} tokens a CPU second", end="")
        print(f"   memory {memory[name]['peak']:6.0f} MB, for training {memory[name]['training']:6.0f} MB")
    for other in ("trl", "trl-rows"):
        share = memory["ours"]["training"] / memory[other]["training"]
        whole = memory["ours"]["peak"] / memory[other]["peak"]
        print(f"  memory of ours over {other:9s} {share:.2f} for training, {whole:.2f} whole  budget 0.5 for training")
        if share > 0.5:
            missed.append(f"{case.name}: {share:.2f} of the memory of {other}, budget 0.5")
    peak = statistics.median(speed.peak) / 1e9
    print(f"  share of the peak of a matrix product: {speed.share_of_peak():.0%} of {peak:.0f} GFLOP a CPU second")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of the first case")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--threads", type=int, default=1, help="of each contestant; waiting threads burn CPU seconds")
    parser.add_argument("--case", type=int, action="append", help=f"only these of 0 to {len(CASES) - 1}")
    parser.add_argument("--steps-of", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.steps_of:
        steps_here(options.steps_of, options.folder, options.length, options.tokens)
        return 0
    if options.memory_of:
        print(json.dumps(memory_here(options.memory_of, options.folder, options.length, options.tokens)))
        return 0
    rounds, tokens = (1, 512) if options.quick else (options.rounds, options.tokens)
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        for index in [0] if options.quick else options.case or range(len(CASES)):
            case = CASES[index]
            folder = model_folder(case, Path(scratch))
            speed = measure_speed(case, folder, rounds=rounds, tokens=tokens, threads=options.threads)
            memory = {name: measure_memory(case, name, folder, tokens=tokens) for name in NAMES}
            missed += report(case, speed, memory)
    print("\n" + ("every budget is met" if not missed else "missed:\n  " + "\n  ".join(missed)))
    return 0 if options.quick else int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())

"""The trainer on one GPU, against TRL's SFTTrainer at its best settings, in one run, on the same documents.

    python benchmarks/trainer_gpu.py --model DIR      LoRA of rank 16 in bf16 on the model in DIR (Hugging Face's layout)
    python benchmarks/trainer_gpu.py --model DIR --no-trl

Prints the card, versions, and for each contestant tokens a second (wall clock, the device waited for), MFU by the data
sheet's peak of bf16, whatever a contestant multiplies, and the memory of the measured steps: the most that torch had in use
and had reserved. Each contestant is a process of its own; of one that fails the line says so, and the others go on.

Ours has its layers compiled, as in a training. Twice more its frozen weights are fp8 (tuneward_trainer.fp8): ours-fp8
unpacks them for the gradient, ours-fp8-quick has that product in fp8 too. TRL gets packing (bfd), bf16, no gradient
checkpointing, and Flash Attention where it is installed; the line says which attention it was. TRL with Liger's kernels is a
contestant where the package `liger_kernel` is installed. Below stand figures that others published, with their source. Not
run on a GPU yet: none was at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from contestant import LEARNT, RANK, adapted, engine_on
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from tuneward_api.estimate import Data, flops_per_token
from tuneward_api.shape import Shape
from tuneward_trainer import compiled, fp8, patches
from tuneward_trainer.batch import Batch, collate, padded, total_weight
from tuneward_trainer.data.documents import Document
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.memory import statistics
from tuneward_trainer.mfu import peak_of
from tuneward_trainer.model import computed_in, load_base, load_to_share
from tuneward_trainer.packing import bins

PUBLISHED: Final[tuple[dict[str, Any], ...]] = (
    {
        "contestant": "mistral-finetune",
        "of": "Mistral 7B v0.3, LoRA, rows of 32,768 tokens, 8 H100",
        "tokensPerSecond": round(300 * 131_072_000 / 500 / (30 * 60) / 8),
        "source": "https://github.com/mistralai/mistral-finetune, README: 300 steps take around 30 min on 8 H100; 500 steps "
        "are 131,072,000 tokens",
    },
    {
        "contestant": "NeMo",
        "of": "Llama 2 7B, LoRA, FP8, rows of 4,096 tokens, 8 H100",
        "tokensPerSecond": 25_206,
        "source": "NVIDIA NeMo, Performance Benchmarks, container 24.07, table Finetuning",
    },
)
"""Tokens a second of one GPU, of other models, rows and versions: no run of this benchmark."""

FILLED: Final = 0.92
"""Of the rows' tokens, by documents of an eighth of a row; with a little more, packing would begin another row."""
Texts = list[Document]
Step = Callable[[Texts], Callable[[], None]]
"""Packs and pads documents on the host, as both do ahead of a step; what it returns is the step, which is timed."""


def documents(options: argparse.Namespace, vocabulary: int, seed: int) -> Texts:
    """As many as fill the rows of `tokens` tokens, as all steps of a training do but an epoch's last: a question, then an
    answer that is learnt."""
    random = np.random.default_rng(seed)
    made: Texts = []
    while sum(len(text.ids) for text in made) < FILLED * options.tokens:
        length = min(options.row, max(16, round(options.length * random.lognormal(-0.02, 0.2))))
        weights = np.zeros(length, np.float16)
        weights[-round(length * LEARNT) :] = 1
        ids = random.integers(3, vocabulary, length, dtype=np.int32)
        made.append(Document(ids=ids, weights=weights, file="", line=len(made)))
    return made


def ours(options: argparse.Namespace, device: torch.device) -> AbstractContextManager[Step]:
    return _ours(engine_on(adapted(load_base(options.model, device))), options, device)


def ours_fp8(options: argparse.Namespace, device: torch.device, *, quick: bool = False) -> AbstractContextManager[Step]:
    if not fp8.supported(device):
        raise SystemExit(f"{torch.cuda.get_device_name(device)} multiplies no fp8: that takes Ada, Hopper or later")
    # From the host's memory: the device never holds the plain weights.
    dtype = computed_in(device)
    model = adapted(load_to_share(options.model, dtype, weights=dtype))
    fp8.pack(model, device, quick=quick)
    return _ours(engine_on(model.to(device)), options, device)


@contextmanager
def _ours(engine: Engine, options: argparse.Namespace, device: torch.device) -> Iterator[Step]:
    quick = compiled.asked(device.type)
    with patches.applied(engine.model, (*patches.ALL, patches.COMPILED) if quick else patches.ALL) as forward:

        def learn(batches: list[Batch], weight: float) -> None:
            for batch in batches:
                engine.forward_backward(forward, batch.to(device).scaled(1 / weight), cross_entropy)
            engine.optim_step(1e-5, engine.gradient.clone())

        def step(texts: Texts) -> Callable[[], None]:
            lengths = np.asarray([len(text.ids) for text in texts], np.int32)
            rows = bins(lengths, seed=0, epoch=0, sequence_length=options.row)
            batches = [collate(((index, texts[index]) for index in row), longest=options.row) for row in rows]
            batches = [padded(batch, options.row) for batch in batches] if quick else batches
            return partial(learn, batches, total_weight(texts))

        yield step


@contextmanager
def trl(options: argparse.Namespace, device: torch.device, *, liger: bool = False) -> Iterator[Step]:
    import datasets
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.integrations.liger import apply_liger_kernel
    from trl import SFTConfig, SFTTrainer, pack_dataset

    datasets.disable_progress_bars()
    attention = attention_of("trl", device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=attention)
    arguments = SFTConfig(
        output_dir=tempfile.gettempdir(), packing=True, max_length=options.row, per_device_train_batch_size=1,
        gradient_checkpointing=False, bf16=device.type == "cuda", use_cpu=device.type == "cpu", report_to="none",
        learning_rate=1e-5, disable_tqdm=True, use_liger_kernel=liger,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]}),
        processing_class=transformers.AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if liger:  # as Trainer.train would
        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    trainer.create_optimizer()
    # As Trainer.train does: it is what makes bf16 of the adapters' products, which are float32 otherwise.
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)

    def learn(batches: list[Any], targets: torch.Tensor) -> None:
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(model, batch, num_items_in_batch=targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def step(texts: Texts) -> Callable[[], None]:
        labels = [np.where(text.weights > 0, text.ids, -100).tolist() for text in texts]
        columns = {"input_ids": [text.ids.tolist() for text in texts], "labels": labels}
        packed = pack_dataset(Dataset.from_dict(columns), options.row, "bfd")
        targets = torch.tensor(sum(int((text.weights > 0).sum()) for text in texts), device=device)
        return partial(learn, [trainer.data_collator([row]) for row in packed], targets)

    yield step


def attention_of(name: str, device: torch.device) -> str:
    """Of TRL the fastest that transformers finds installed. SDPA keeps the documents of a row apart by a mask."""
    if device.type != "cuda":
        return "sdpa"
    if not name.startswith("trl"):
        return "varlen_attn"
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


CONTESTANTS: Final[dict[str, Callable[[argparse.Namespace, torch.device], AbstractContextManager[Step]]]] = {
    "ours": ours,
    "ours-fp8": ours_fp8,
    "ours-fp8-quick": partial(ours_fp8, quick=True),
    "trl": trl,
    "trl-liger": partial(trl, liger=True),
}


def contestants(options: argparse.Namespace) -> list[str]:
    """Those that can run here: liger's kernels are for GPUs."""
    without = {"trl", "trl-liger"} if options.no_trl else set()
    if options.device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        without.add("trl-liger")
    return [name for name in CONTESTANTS if name not in without]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """In this process. Bytes, tokens a second."""
    device = torch.device(options.device)
    config = json.loads((options.model / "config.json").read_text())
    spent, tokens, lengths = 0.0, 0, []
    with CONTESTANTS[name](options, device) as step:
        for index in range(options.warmup + options.steps):
            texts = documents(options, int(config.get("text_config", config)["vocab_size"]), index)
            work = step(texts)
            _wait(device)
            if index == options.warmup and device.type == "cuda":
                # Neither what loading took nor what compilers tried.
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            work()
            _wait(device)
            if index >= options.warmup:
                spent += time.perf_counter() - began
                tokens += sum(len(text.ids) for text in texts)
                lengths += [len(text.ids) for text in texts]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    data: Data = statistics(np.asarray(lengths, np.int32), round(LEARNT * tokens))
    needed, peak = flops_per_token(Shape.of(config), data, RANK) * tokens / spent, peak_of(card)
    return {
        "contestant": name,
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokensPerSecond": tokens / spent,
        "mfu": needed / peak if peak else None,
        "usedBytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "reservedBytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "attention": attention_of(name, device),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", help="cpu says that the benchmark works, and nothing else")
    parser.add_argument("--row", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--length", type=int, default=1000, help="mean tokens of a document")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--only", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; run it on a machine with one")
        return 1
    failed = False
    for name in contestants(options):
        done = subprocess.run([sys.executable, *sys.argv, "--only", name], stdout=subprocess.PIPE, text=True, check=False)
        failed = failed or done.returncode != 0
        line = json.dumps({"contestant": name, "failed": f"exit code {done.returncode}; what it says stands above"})
        print(line if done.returncode else done.stdout.splitlines()[-1], flush=True)
    for figure in PUBLISHED:
        print(json.dumps({"published": True, **figure}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

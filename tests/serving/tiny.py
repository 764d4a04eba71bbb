"""A base model of 40,000 numbers and adapters for it, with proofs that plain transformers and PEFT computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tuneward_api.files import Proof, ProofText, WantedAdapter
from tuneward_api.manifest import write_manifest

# Two threads that wait for each other on a busy machine are ten times slower than one.
torch.set_num_threads(1)

END, START = "<|end|>", "<|start|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + ':' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant:' }}{% endif %}"
)
TEXTS = ([5, 9, 2, 40, 77, 123, 8], list(range(60, 92)))
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], None]


def make_model(folder: Path, *, hidden: int = 32, context: int = 512) -> Path:
    """Bytes are tokens: any text has a prompt, any answer a text."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, START, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.4,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Reference:
    """Plain transformers and PEFT, one text at a time, without a cache of keys and values."""

    model: Path

    def logprobs(self, ids: list[int], adapter: Path | None = None) -> list[float]:
        return _logprobs(self._load(adapter), ids)

    def continue_greedily(self, ids: list[int], count: int, adapter: Path | None = None) -> list[int]:
        model, made = self._load(adapter), list(ids)
        for _ in range(count):
            with torch.inference_mode():
                made.append(int(model(input_ids=torch.tensor([made])).logits[0, -1].argmax()))
        return made[len(ids) :]

    def _load(self, adapter: Path | None) -> torch.nn.Module:
        return _reference(self.model, adapter)


@cache
def _reference(model: Path, adapter: Path | None) -> torch.nn.Module:
    base: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()


def _logprobs(model: torch.nn.Module, ids: list[int]) -> list[float]:
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(logprobs[index, token]) for index, token in enumerate(ids[1:])]


def make_adapter(
    adapters: Path, model: Path, *, name: str, seed: int = 1, rank: int = 4, dora: bool = False, edit: Edit | None = None
) -> WantedAdapter:
    """A finished adapter as the trainer leaves it. `edit` changes its folder before it is sealed."""
    torch.manual_seed(seed)
    work = adapters / f".{name}.work"
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(
            r=rank,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            use_dora=dora,
        ),
    ).eval()
    for key, parameter in tuned.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1 + torch.rand_like(parameter)
    tuned.save_pretrained(work / "adapter")
    (work / "adapter" / "README.md").unlink(missing_ok=True)
    with tuned.disable_adapter():
        base = [_logprobs(tuned, ids) for ids in TEXTS]
    texts = [ProofText(ids=ids, base=plain, tuned=_logprobs(tuned, ids)) for ids, plain in zip(TEXTS, base, strict=True)]
    write_proof(work, Proof(texts=texts, dtype="float32", tolerance=1e-3))
    if edit is not None:
        edit(work)
    digest = write_manifest(work)
    path = f"sha256-{digest.removeprefix('sha256:')}"
    shutil.move(work, adapters / path)
    return WantedAdapter(name=name, model=name, path=path, digest=digest, rank=rank)


def write_proof(folder: Path, proof: Proof) -> None:
    (folder / "proof.json").write_text(json.dumps(proof.to_json()))


def edit_tensors(change: Callable[[Tensors], None]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def edit_config(**fields: object) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


def spoil_with_nan(tensors: Tensors) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def zero_every_b(tensors: Tensors) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])

"""A tokenizer as Gemma's: BPE on characters, with ▁ for a space, and bytes for what it does not know."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MARKS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")
TAUGHT = ["the turn of a talk there is what they say and then the answer to it \n and so on"] * 20


def spaced(template: str | None = None, *, taught: Iterable[str] = TAUGHT, across: bool = False) -> PreTrainedTokenizerFast:
    """`across`: some tokens reach from one word into the next."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    if not across:
        learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(taught, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    tokens = [*learnt["vocab"], *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=template)

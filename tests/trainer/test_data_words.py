"""Texts encoded word by word: the tokens that `tokenizers` gives for them whole, whatever they hold."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.spaced import spaced
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from tuneward_trainer.data import words
from tuneward_trainer.data.words import Words

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(*expressions: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(one), behavior) for one in expressions), BYTES])


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "GPT-2": GPT_2,
    "SmolLM2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]),
    "StarCoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT_2]),
    "Llama 3": split(LLAMA_3),
    "Qwen 3.5": split(QWEN_3_5),
    "gpt-oss": split(O200K),
    "DeepSeek V3": split(*DEEPSEEK_V3),
}
PLAIN = (
    *("Don't", " WE'LL", "they'Ve", " go", "1234567", " 3.14", "\n\n", "\r\n", "   ", "\t", "``` ", "\x1c", "\x00"),
    *("def f(x):\n    return x**2\n", "https://a.b/c?d=e", "<|im_start|>", "<|im_end|>", "<|im_", "|>", "<tool>", "<tool"),
)
FOREIGN = (
    *(" naïve", " Größe", "日本語", "ひらがな", "नमस्ते", "русский", "مرحبا", "😀", "👩\u200d💻", "½", "²", "…", " — "),
    *("\xa0", "\u2028", "\x85", "\u017f", "'\u017f", "ǅ"),
)
NEW = "\u088f"
"""A letter since Unicode 17: to `tokenizers` it is none yet."""


@pytest.fixture(scope="module")
def own(smollm2: Path) -> Any:
    """A tokenizer that a test may change. One of its added tokens is looked for in front of others, so it is found first."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<tool><|im_end|>", normalized=True)])
    return tokenizer


@pytest.fixture(autouse=True)
def _unchanged(own: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(words, "WORTH", 4096)
    backend = own.backend_tokenizer
    before = backend.pre_tokenizer
    yield
    backend.pre_tokenizer, backend.normalizer, backend.encode_special_tokens = before, None, False
    backend.model.dropout = None


def written(seed: str, count: int = 100) -> list[str]:
    """Texts that are ASCII, that are not, that are not composed, and with a character on which engines disagree."""
    dice = random.Random(seed)
    pools = PLAIN, (*PLAIN, *FOREIGN), (*PLAIN, *FOREIGN, "e\u0301"), (*FOREIGN, NEW)
    return ["".join(dice.choices(pools[number % 4], k=dice.randrange(50, 200))) for number in range(count)]


def whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def by_words(made: Words | None, texts: list[str]) -> list[list[int]]:
    assert made is not None and sum(map(len, texts)) >= words.WORTH
    found = [ids.tolist() for ids in made.ids(texts)]
    assert made._proved
    return found


@pytest.mark.parametrize("composes", [False, True])
@pytest.mark.parametrize("name", CUTS)
def test_words_are_the_tokens_of_the_whole(own: Any, name: str, composes: bool) -> None:
    own.backend_tokenizer.pre_tokenizer = CUTS[name]
    if composes:
        own.backend_tokenizer.normalizer = normalizers.NFC()
    made, texts = Words.of(own), written(name)
    assert by_words(made, texts) == whole(own, texts)
    assert made is not None and made._odd == {NEW}
    told = [made._words(text) is not None for text in texts]
    assert told == [NEW not in text and not (composes and "e\u0301" in text) for text in texts]
    again = pickle.loads(pickle.dumps(made))
    assert by_words(again, texts[::-1]) == whole(own, texts[::-1])


def test_words_where_a_space_is_a_character(own: Any) -> None:
    tokenizer = spaced()
    made, texts = Words.of(tokenizer), written("spaced")
    texts += [text.replace(" ", "▁", 3) for text in texts[:40]]
    assert by_words(made, texts) == whole(tokenizer, texts)
    assert made is not None and [made._words(text) is None for text in texts] == ["▁" in text for text in texts]


def test_tokens_that_reach_into_the_next_word(own: Any) -> None:
    tokenizer, texts = spaced(across=True), written("across")
    made = Words.of(tokenizer)
    assert made is not None
    assert [ids.tolist() for ids in made.ids(texts)] == whole(tokenizer, texts)
    assert made._proved is False


def test_what_is_remembered_is_bounded(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts = Words.of(own), written("bounded")
    assert made is not None
    monkeypatch.setattr(words, "_HELD", 0)
    for _ in range(2):
        assert by_words(made, texts) == whole(own, texts)
        assert made._known == made._added


def test_texts_of_new_words_go_to_the_tokenizer_whole(own: Any) -> None:
    made, dice = Words.of(own), random.Random(0)
    assert made is not None
    for number in range(words._REST + 3):
        texts = ["".join(dice.choices("abcdefgh ", k=400)) for _ in range(40)]
        assert by_words(made, texts) == whole(own, texts)
        assert made._resting == (words._REST - number) % (words._REST + 1)


def test_a_small_batch_costs_no_proof(own: Any) -> None:
    made = Words.of(own)
    assert made is not None
    assert [ids.tolist() for ids in made.ids(["Hi there"])] == whole(own, ["Hi there"])
    assert made._proved is None


def test_an_expression_that_means_something_else_is_found_out(own: Any) -> None:
    r"""To `tokenizers` \h is a hexadecimal digit, to `regex` a space."""
    own.backend_tokenizer.pre_tokenizer = split(r"\h+|[^\h]+")
    made, texts = Words.of(own), written("other")
    if made is not None:  # what cannot be compiled is told before
        assert [ids.tolist() for ids in made.ids(texts)] == whole(own, texts)
        assert made._proved is False


@pytest.mark.parametrize(
    "change", ["nothing", "unknown", "merged", "no words", "broken", "nested", "grouped", "dropout", "special", "composed"]
)
def test_which_tokenizers_are_read_so(own: Any, change: str) -> None:
    backend, tokenizer = own.backend_tokenizer, own
    if change == "unknown":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])
    if change == "merged":
        backend.pre_tokenizer = split(LLAMA_3, behavior="merged_with_previous")
    if change == "no words":
        backend.pre_tokenizer = BYTES
    if change == "broken":
        backend.pre_tokenizer = split(r"(?~x)|x+")  # all that holds no x
    if change == "nested":
        backend.pre_tokenizer = split(r"[a-z&&[^x]]+|[^a-z]+|x")
    if change == "dropout":
        backend.model.dropout = 0.5
    if change == "special":
        backend.encode_special_tokens = True
    if change == "composed":
        tokenizer = _Wrapped(AddedToken("e\u0301", normalized=True))
    if change == "grouped":
        backend.pre_tokenizer = split(r"(a|b)+|[^ab]+")
    made = Words.of(tokenizer)
    told = made is not None and made.ids(written("told")) is not None and made._proved
    assert told == (change == "nothing")


class _Wrapped:
    """What is asked of transformers' tokenizers."""

    def __init__(self, token: AddedToken) -> None:
        self.backend_tokenizer = Tokenizer(models.BPE())
        self.backend_tokenizer.pre_tokenizer = GPT_2
        self.backend_tokenizer.add_tokens([token])
        self.added_tokens_decoder = self.backend_tokenizer.get_added_tokens_decoder()

"""A base model with Mistral's own tokenizer: asked as mistral-common encodes a chat, its answer decoded back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tests.serving.processes import Engine, running
from tests.serving.tiny import Reference
from tests.support.mistral import SHIPPED, VOCABULARY, make_tekken
from transformers import MistralConfig, MistralForCausalLM

from tuneward_serving.engine.errors import ApiError
from tuneward_serving.engine.text import TextStream
from tuneward_serving.engine.tokenizer import OwnTokenizer, TemplateTokenizer, load_tokenizer

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How heavy is a lámp? 👩‍🔬"}]
WORDS = "2 kg, héavy 👩‍🔬.\n\n Two  spaces"


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-tekken"
    make_tekken(folder / "tekken.json", "v13")
    torch.manual_seed(0)
    numbers: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.4,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    MistralForCausalLM(MistralConfig(**numbers)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tekken: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("engine") / "log"
    served = Engine(["engine", "--model", str(tekken)], "/health", log, {"TUNEWARD_API_KEY": "s3cret"})
    with running(served):
        yield served


def asked(file: Path) -> list[int]:
    """mistral-common's own encoding."""
    talk: list[SystemMessage | UserMessage] = [SystemMessage(content="Be brief."), UserMessage(content=TALK[1]["content"])]
    request: ChatCompletionRequest[SystemMessage | UserMessage] = ChatCompletionRequest(messages=talk)
    found: list[int] = MistralTokenizer.from_file(str(file)).encode_chat_completion(request).tokens
    return found


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_chat_is_encoded_by_mistral_common(name: str) -> None:
    tokenizer = OwnTokenizer(SHIPPED[name])
    assert tokenizer.chat(TALK) == asked(SHIPPED[name])
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_text_streams_back_token_by_token(name: str) -> None:
    tokenizer = OwnTokenizer(SHIPPED[name])
    made = tokenizer.prompt(WORDS)[1:]
    stream = TextStream(tokenizer, tokenizer.chat(TALK))
    text = "".join(stream.add(one) for one in made) + stream.flush()
    # SentencePiece writes a space before the first word, which an answer has and its text has not.
    assert text.strip() == tokenizer.decode(made, skip_special_tokens=True).strip() == WORDS
    assert tokenizer.decode([1, *made, 2]).startswith("<s>")
    assert tokenizer.decode([1, *made, 2]).endswith("spaces</s>")


def test_what_mistral_common_refuses_is_the_clients_mistake(tekken: Path) -> None:
    with pytest.raises(ApiError, match="mistral-common refuses these messages: Expected last role User or Tool"):
        load_tokenizer(tekken).chat([*TALK, {"role": "assistant", "content": "2"}])


def test_a_template_of_its_own_stays(base_model: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    assert isinstance(tokenizer, TemplateTokenizer)
    assert tokenizer.decode(tokenizer.chat(TALK[:1])) == "<|start|>system:Be brief.<|end|><|start|>assistant:"


def test_a_later_file_without_its_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(SHIPPED["v3"].read_bytes())
    with pytest.raises(ValueError, match=r"add \.v2, \.v3 or \.v7"):
        OwnTokenizer(tmp_path / "tokenizer.model")


def test_the_engine_answers_behind_that_prompt(engine: Engine, tekken: Path) -> None:
    body = {"model": tekken.name, "messages": TALK, "temperature": 0, "max_tokens": 12}
    answer: httpx.Response = engine.post("/v1/chat/completions", body)
    said = answer.raise_for_status().json()
    prompt = asked(tekken / "tekken.json")
    assert said["usage"]["prompt_tokens"] == len(prompt)
    made = Reference(tekken).continue_greedily(prompt, said["usage"]["completion_tokens"])
    assert said["choices"][0]["message"]["content"] == OwnTokenizer(tekken / "tekken.json").decode(
        made, skip_special_tokens=True
    )

"""Models with Mistral's own tokenizer, from the choice of the tokenizer to a finished adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tests.support.mistral import SHIPPED, VOCABULARY, make_tekken
from tests.trainer.jobs import make_model
from tests.trainer.rooms import chats, write
from transformers import MistralConfig, MistralForCausalLM

from tuneward_api import manifest
from tuneward_api.datasets import Datasets
from tuneward_api.files import Proof
from tuneward_api.tokenizers import mistral_tokenizer
from tuneward_cli.main import main
from tuneward_trainer.data import formats
from tuneward_trainer.data.documents import TRAINING, Documents, Encoded
from tuneward_trainer.data.mistral import OwnTokenizer
from tuneward_trainer.data.samples import Limits
from tuneward_trainer.prepare import Inputs, cache_key
from tuneward_trainer.report import EndError
from tuneward_trainer.tokenizer import TemplateTokenizer, load_tokenizer

NUMBERS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Mistral Small 3.2 comes: tekken.json, and nothing for transformers' tokenizers."""
    folder = tmp_path_factory.mktemp("models") / "tiny-tekken"
    make_tekken(folder / "tekken.json", "v11")
    return make_model(folder, MistralConfig(**NUMBERS, architectures=[MistralForCausalLM.__name__]))


@pytest.mark.parametrize(
    ("files", "model_type", "expected"),
    [
        (["tekken.json"], "mistral3", "tekken.json"),
        (["tekken.json", "tokenizer.json", "chat_template.jinja"], "ministral3", "tekken.json"),
        (["tekken.json", "tokenizer.model.v3"], "mistral", "tekken.json"),
        (["tokenizer.json", "tokenizer.model.v3", "tokenizer.model"], "mistral", None),
        (["tokenizer.model", "tokenizer.model.v3"], "mistral", "tokenizer.model.v3"),
        (["tokenizer.model.v7m1", "tokenizer.model.v11"], "mistral", "tokenizer.model.v11"),
        (["tokenizer.model"], "mixtral", "tokenizer.model"),
        (["tokenizer.model"], "llama", None),
        (["tokenizer.json"], "mistral", None),
        ([], "mistral", None),
    ],
)
def test_which_file_is_the_tokenizer(files: list[str], model_type: str, expected: str | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert mistral_tokenizer(tmp_path) == (None if expected is None else tmp_path / expected)


def test_a_mistral_with_a_template_of_its_own_keeps_it(smollm2: Path, tmp_path: Path) -> None:
    """With mistral-common installed too."""
    for file in (*smollm2.glob("*token*"), *smollm2.glob("*.jinja"), *smollm2.glob("generation_config.json")):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    found, same = load_tokenizer(tmp_path), load_tokenizer(smollm2)
    assert isinstance(found, TemplateTokenizer)
    assert found.chat_digest == same.chat_digest
    sample = formats.read(chats(1)[0], "Messages")
    (encoded,) = found.encoder("Assistant").encode([sample])
    assert [encoded] == same.encoder("Assistant").encode([sample])
    assert isinstance(encoded, list)
    assert found.decode(encoded[0].ids.tolist()).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    (tmp_path / "tokenizer.model.v3").write_bytes(SHIPPED["v3"].read_bytes())
    assert isinstance(load_tokenizer(tmp_path), TemplateTokenizer)


def test_a_broken_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(EndError, match=r"the base model's tokenizer cannot be read: mistral-common refuses tekken\.json"):
        load_tokenizer(tmp_path)


def cached(store: Path) -> list[list[int]]:
    (folder,) = (store / "data").iterdir()
    documents = Documents.open(folder / TRAINING)
    return [documents[index].ids.tolist() for index in range(len(documents))]


def test_a_job_from_data_to_a_proved_adapter(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data/chats.jsonl", chats(20))
    job = tmp_path / "job.yaml"
    job.write_text(
        json.dumps(
            {
                "apiVersion": "tuneward.dev/v1alpha1",
                "kind": "FineTuneJob",
                "metadata": {"name": "bot"},
                "spec": {
                    "model": {"uri": "pvc://tuneward-store/imports/tiny-tekken"},
                    "datasets": {"training": [{"uri": "pvc://data/chats.jsonl"}]},
                    "hyperparameters": {"steps": 3},
                    "workers": {"gpusPerWorker": 0},
                },
            }
        )
    )
    store = tmp_path / "store"
    where = [str(job), "--store", str(store), "--claim", f"data={data.parent}", "--output", "json"]
    assert main(["import", str(model), "tiny-tekken", "--store", str(store)]) == 0
    capfd.readouterr()
    assert main(["validate", *where]) == 0
    (checked,) = json.loads(capfd.readouterr().out)["data"]
    assert checked["samples"] == 20
    assert main(["train", *where]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["metrics"]["steps"] == 3

    common = MistralTokenizer.from_file(str(model / "tekken.json"), mode=ValidationMode.finetuning)
    talks = [[message["content"] for message in line["messages"]] for line in chats(20)]
    expected = [
        common.encode_chat_completion(
            ChatCompletionRequest(messages=[UserMessage(content=asked), AssistantMessage(content=answer)])
        ).tokens
        for asked, answer in talks
    ]
    assert sorted(cached(store)) == sorted(expected)
    plan = json.loads((store / "jobs/bot/plan.json").read_text())
    assert plan["prepared"]["base"]["chatTemplateDigest"] == OwnTokenizer(model / "tekken.json").chat_digest
    folder = Path(found["adapter"]).parent
    manifest.verify(folder)
    proof = Proof.model_validate_json((folder / "proof.json").read_bytes())
    assert all(text.ids in expected for text in proof.texts)


@pytest.mark.parametrize("change", ["content", "name"])
def test_another_tokenizer_is_another_cache(change: str, tmp_path: Path) -> None:
    """A SentencePiece file says in its name how a chat is encoded."""
    file = tmp_path / "tokenizer.model.v3"
    file.write_bytes(SHIPPED["v3"].read_bytes())

    def key() -> str:
        inputs = Inputs(tmp_path, load_tokenizer(tmp_path), Limits(512))
        return cache_key([], [], Datasets.model_validate({"training": [{"uri": "pvc://a/b"}]}), inputs)

    before = key()
    assert key() == before
    if change == "name":
        file.rename(tmp_path / "tokenizer.model.v7")
    else:
        file.write_bytes(SHIPPED["v7"].read_bytes())
    assert key() != before


def test_a_token_is_shown_as_it_stands(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    (found,) = tokenizer.encoder("Assistant").encode([formats.read(chats(1)[0], "Messages")])
    assert isinstance(found, list)
    (document,) = found
    assert isinstance(document, Encoded)
    assert tokenizer.decode(document.ids.tolist()) == "<s>[INST]How heavy is 0?[/INST]It is 0 grams.</s>"

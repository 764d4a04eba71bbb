"""prepare as a process sees it: request in, report and exit code out; every refusal in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.trainer.rooms import UNVERIFIED, Room, chats, write

from tuneward_api import manifest, names
from tuneward_api.quantities import to_bytes
from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import defaults, prepare, store, verify
from tuneward_trainer.model import ModelUnsupportedError
from tuneward_trainer.report import EndError


def test_the_report_holds_every_default(room: Room, unverified: None) -> None:
    code, report = room.run()
    assert code == 0
    prepared = report.pop("prepared")
    assert report == {
        "outcome": "Done",
        "reason": "Validated",
        "message": "20 samples, 880 tokens (150 learnt); 6 steps of about 512 tokens; "
        "LoRA of rank 16 trains 4884480 of 134515008 parameters",
    }
    base, data, packing = prepared.pop("base"), prepared.pop("data"), prepared.pop("packing")
    estimate = prepared.pop("estimate")
    # fp32 weights; parameters, gradients, two moments, a sum and a copy of three for a checkpoint.
    assert (estimate["weightBytes"], estimate["stateBytes"]) == (4 * 134515008, 4 * 4884480 * 8)
    assert estimate["memoryBytes"] < 4 << 30
    # Three epochs: frozen Linears twice, adapters three times, the head's words where a token is learnt.
    each, head = 4 * (134515008 - 49152 * 576) + 6 * 4884480, 4 * 49152 * 576
    assert estimate["flops"] == pytest.approx(3 * (880 * each + 150 * head), rel=0.02)
    assert prepared == {
        "objective": {"type": "SFT"},
        "method": {
            "type": "LoRA",
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "rsLoRA": False,
            "targetModules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
            "trainableParameters": 4884480,
        },
        "hyperparameters": {
            "epochs": 3.0,
            "steps": 6,
            "learningRate": 4e-4,
            "scheduler": "Cosine",
            "warmupFraction": 0.05,
            "weightDecay": 0.0,
            "maxGradNorm": 1.0,
            "sequenceLength": 45,
            "batchTokens": 512,
            "seed": 0,
        },
        "binsPerMicroBatch": 11,
        "baseWeights": "Replicated",
        "modelType": "llama",
    }
    key, digest = base.pop("key"), data["summary"].pop("digest")
    assert len(key) == 32
    assert base.pop("digest").startswith("sha256:")
    assert base.pop("chatTemplateDigest").startswith("sha256:")
    assert base == {
        "uri": room.request["spec"]["model"]["uri"],
        "architecture": "LlamaForCausalLM",
        "parameters": 134515008,
        "claim": "models",
        "subPath": "smollm2-135m-instruct",
    }
    assert data == {
        "subPath": f"data/sha256-{digest.removeprefix('sha256:')}",
        "summary": {"samples": 20, "tokens": 880, "targetTokens": 150, "validationSamples": 0},
    }
    assert packing == UNVERIFIED.to_json()
    made = room.run_directory
    assert json.loads((made / "prepare/report.json").read_text()) == json.loads((room.root / "termination-log").read_text())
    assert [f"{(made / name).stat().st_mode & 0o7777:o}" for name in ("attempts", "checkpoints")] == ["2775", "2775"]


def test_pretraining_splits_texts_and_has_its_own_defaults(room: Room, unverified: None) -> None:
    values = [{"text": " ".join(f"Line {line} of page {page}." for line in range(40))} for page in range(8)]
    write(room.root / "configmaps/chats/train.jsonl", values)
    room.request["spec"] |= {"objective": {"type": "Pretraining"}, "hyperparameters": {"sequenceLength": 256}}
    code, report = room.run()
    assert code == 0, report
    assert "8 too long and split; 6 steps of about 512 tokens" in report["message"]
    prepared = report["prepared"]
    assert prepared["objective"] == {"type": "Pretraining"}
    assert prepared["data"]["summary"]["split"] == 8
    numbers = prepared["hyperparameters"]
    assert (numbers["epochs"], numbers["weightDecay"], numbers["learningRate"]) == (1.0, 0.1, 4e-4)


def test_preferences_have_their_own_defaults_and_steps_of_whole_pairs(room: Room, unverified: None) -> None:
    """Twenty pairs: no step holds 32 of them, since there shall be five steps."""
    write(
        room.data,
        [{"prompt": f"How heavy is {i}?", "chosen": f"It is {i} grams.", "rejected": "I will not say."} for i in range(20)],
    )
    room.request["spec"] |= {"objective": {"type": "DPO"}}
    code, report = room.run()
    assert code == 0, report
    assert report["message"].startswith("20 pairs, ")
    prepared = report["prepared"]
    summary, numbers = prepared["data"]["summary"], prepared["hyperparameters"]
    assert prepared["objective"] == {"type": "DPO", "dpo": {"beta": 0.1}}
    assert summary["samples"] == 20
    fifth = summary["tokens"] // 5
    batch = 1 << (fifth.bit_length() - 1)
    assert (numbers["batchTokens"], numbers["steps"]) == (batch, round(summary["tokens"] / batch))
    assert (numbers["epochs"], numbers["learningRate"], numbers["warmupFraction"]) == (1.0, 5e-6, 0.1)
    assert numbers["sequenceLength"] < 64
    assert prepared["binsPerMicroBatch"] == batch // (2 * numbers["sequenceLength"])


def test_a_step_of_many_pairs_holds_about_32() -> None:
    sizes = np.full(10_000, 700, np.int32)
    assert defaults._usual_batch(defaults._USUAL["DPO"], 1, sizes) == 16_384
    assert defaults._usual_batch(defaults._USUAL["SFT"], 3, sizes) == 131_072


def test_a_second_run_finds_everything_done(room: Room, unverified: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = room.run()
    monkeypatch.setattr(prepare, "build", lambda *_, **__: pytest.fail("tokenized again"))
    assert room.run() == first


def test_spec_decides_where_it_speaks(room: Room, unverified: None) -> None:
    room.request["spec"] |= {
        "method": {"rank": 4, "alpha": 8.5, "dropout": 0.1, "rsLoRA": True, "targetModules": ["q_proj", "v_proj"]},
        "hyperparameters": {"steps": 7, "batchTokens": 256, "sequenceLength": 128, "seed": 3, "scheduler": "Linear"},
        "datasets": {"training": [{"uri": "configmap://chats/train.jsonl", "weight": 2}], "validationFraction": 0.25},
    }
    code, report = room.run()
    assert code == 0, report
    prepared = report["prepared"]
    assert prepared["method"] == {
        "type": "LoRA",
        "rank": 4,
        "alpha": 8.5,
        "dropout": 0.1,
        "rsLoRA": True,
        "targetModules": ["q_proj", "v_proj"],
        "trainableParameters": 30 * 4 * ((576 + 576) + (576 + 192)),
    }
    summary, numbers = prepared["data"]["summary"], prepared["hyperparameters"]
    assert (summary["samples"], summary["validationSamples"]) == (15, 5)
    per_epoch = round(summary["tokens"] / 256)
    assert (numbers["steps"], numbers["epochs"], numbers["sequenceLength"]) == (7, round(7 / per_epoch, 4), 128)
    assert (numbers["seed"], numbers["scheduler"], prepared["binsPerMicroBatch"]) == (3, "Linear", 2)


def test_a_model_that_no_patch_check_can_load_is_refused(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, cache: Path, *, whole: bool, **_: object) -> ResolvedPacking:
        assert (folder.name, cache.parent.parent) == ("smollm2-135m-instruct", room.root / "store/models")
        assert not whole
        raise ModelUnsupportedError("no")

    monkeypatch.setattr(verify, "verify", refuse)
    assert room.run() == (
        78,
        {"outcome": "Failed", "reason": "ModelUnsupported", "message": "the base model cannot be trained: no"},
    )


Change = Callable[[dict[str, Any], Path], object]


def spec(path: str, value: Any) -> Change:
    """Sets a field of the spec, by dots."""

    def change(request: dict[str, Any], _: Path) -> None:
        target = request["spec"]
        *parents, last = path.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value

    return change


def data(values: list[Any]) -> Change:
    return lambda _, root: write(root / "configmaps/chats/train.jsonl", values)


@pytest.mark.parametrize(
    ("change", "code", "reason", "message"),
    [
        (spec("model.uri", "pvc://models/nix"), 66, "InputMissing", "the folder of spec.model.uri pvc://models/nix does not ex"),
        (spec("model.uri", "pvc://nix/a"), 66, "InputMissing", "the claim nix is not mounted"),
        (
            spec("datasets.training", [{"uri": "configmap://chats/nix.jsonl"}]),
            66,
            "InputMissing",
            "spec.datasets.training[0].uri configmap://chats/nix.jsonl does not exist; the ConfigMap has the keys train.jsonl",
        ),
        (
            spec("datasets.validation", [{"uri": "configmap://nix/a.jsonl"}]),
            66,
            "InputMissing",
            "spec.datasets.validation[0].uri configmap://nix/a.jsonl does not exist; there is no such ConfigMap, or it is empty",
        ),
        (
            spec("hyperparameters.sequenceLength", 16384),
            78,
            "ConfigInvalid",
            "spec.hyperparameters.sequenceLength is 16384; allowed: at most 8192, for which the model was made",
        ),
        (
            spec("method.targetModules", ["q_proj", "qkv"]),
            78,
            "ConfigInvalid",
            "spec.method.targetModules holds 'qkv'; allowed for this model: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj",
        ),
        (
            spec("hyperparameters.sequenceLength", 32),
            65,
            "DataInvalid",
            "20 problems in the data: configmap://chats/train.jsonl:1: the sample has 43 tokens; allowed: at most 32 (spec.hy",
        ),
        (
            data([{"text": 3}]),
            65,
            "DataInvalid",
            "1 problem in the data: configmap://chats/train.jsonl:1: text is 3; allowed: a text",
        ),
        (data([]), 65, "DataInvalid", "1 problem in the data: configmap://chats/train.jsonl: the source holds no sample"),
        (
            lambda request, _: request.pop("images") and None,
            78,
            "ConfigInvalid",
            "the request is not valid: images: Field required",
        ),
        (
            lambda _, root: shutil.rmtree(root / "store"),
            66,
            "InputMissing",
            "the store is not mounted at",
        ),
    ],
)  # fmt: skip
def test_refusals(room: Room, unverified: None, change: Change, code: int, reason: str, message: str) -> None:
    change(room.request, room.root)
    found, report = room.run()
    assert (found, report["outcome"], report["reason"]) == (code, "Failed", reason)
    assert report["message"].startswith(message)
    assert len(report["message"]) <= names.MAX_MESSAGE


def test_all_errors_lie_in_the_run_directory_until_they_are_mended(room: Room, unverified: None) -> None:
    write(room.root / "configmaps/chats/train.jsonl", [{"text": ""}] * 300)
    code, report = room.run()
    assert code == 65
    assert "; all of them: jobs/bot-01234567/prepare/errors.txt in the store" in report["message"]
    errors = room.run_directory / "prepare/errors.txt"
    assert len(errors.read_text().splitlines()) == 300
    write(room.root / "configmaps/chats/train.jsonl", chats(3))
    assert room.run()[0] == 0
    assert not errors.exists()


def test_a_share_of_invalid_samples_is_left_out_and_named(room: Room, unverified: None) -> None:
    write(room.root / "configmaps/chats/train.jsonl", [{"messages": []}, *chats(8), {"text": ""}])
    room.request["spec"]["datasets"]["invalidSampleSkipPercentage"] = 19.9
    assert room.run()[1]["message"].startswith("2 problems in the data: configmap://chats/train.jsonl:1: messages is []")
    room.request["spec"]["datasets"]["invalidSampleSkipPercentage"] = 20
    for _ in range(2):  # the second run finds the cache
        code, report = room.run()
        assert (code, report["prepared"]["data"]["summary"]["invalid"]) == (0, 2)
        assert "2 invalid and left out; " in report["message"]
        assert (room.run_directory / "prepare/errors.txt").read_text() == (
            "configmap://chats/train.jsonl:1: messages is []; allowed: a list of at least one message\n"
            "configmap://chats/train.jsonl:10: messages is missing; "
            "allowed: every sample of a source has the format of its first (Messages)\n"
        )


def test_columns_of_another_name(room: Room, unverified: None) -> None:
    rows = [{"frage": f"What is {index}?", "antwort": "A number.", "prompt": "unrelated"} for index in range(3)]
    write(room.root / "configmaps/chats/train.jsonl", rows)
    source = {"uri": "configmap://chats/train.jsonl", "fields": {"frage": "prompt", "antwort": "completion"}}
    room.request["spec"]["datasets"]["training"] = [source]
    code, report = room.run()
    assert (code, report["prepared"]["data"]["summary"]["samples"]) == (0, 3)
    write(room.root / "configmaps/chats/train.jsonl", [*rows, {"frage": "x", "antwort": ""}])
    assert "train.jsonl:4: antwort is empty; allowed: a text" in room.run()[1]["message"]


@pytest.mark.parametrize("model", ["bin", "quantised", "unknown", "slow"])
def test_models_that_cannot_be_trained(room: Room, unverified: None, smollm2: Path, model: str) -> None:
    folder = room.root / "store/imports/other"
    folder.mkdir(parents=True)
    config = json.loads((smollm2 / "config.json").read_text())
    changed = {"quantised": {"quantization_config": {"quant_method": "gptq"}}, "unknown": {"architectures": ["NoSuchModel"]}}
    (folder / "config.json").write_text(json.dumps(config | changed.get(model, {})))
    (folder / ("a.bin" if model == "bin" else "a.safetensors")).write_bytes(b"")
    room.request["spec"]["model"]["uri"] = "pvc://tuneward-store/imports/other"
    code, report = room.run()
    assert (code, report["reason"]) == (78, "ModelUnsupported")
    assert {
        "bin": "holds no .safetensors file",
        "quantised": "the base model is quantised (gptq)",
        "unknown": "names the architecture 'NoSuchModel'",
        "slow": "the base model's tokenizer cannot be read",
    }[model] in report["message"]


def test_a_model_in_place_is_hashed_once_for_each_state(room: Room, unverified: None, smollm2: Path) -> None:
    folder = room.root / "store/imports/own"
    folder.mkdir(parents=True)
    for file in smollm2.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "MANIFEST.json":
            shutil.copy(file, folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    room.request["spec"]["model"]["uri"] = "pvc://tuneward-store/imports/own"
    first = room.run()[1]["prepared"]["base"]
    assert (first["claim"], first["subPath"]) == ("tuneward-store", "imports/own")
    assert room.run()[1]["prepared"]["base"] == first
    (folder / "model.safetensors").write_bytes(b"other weights")
    second = room.run()[1]["prepared"]["base"]
    assert (second["digest"] == first["digest"], second["key"] == first["key"]) == (False, False)
    manifest.write_manifest(folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    code, report = room.run()
    assert (code, report["message"]) == (
        66,
        "pvc://tuneward-store/imports/own is not complete: files of its MANIFEST.json are missing or cut; import it again",
    )


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that this process may read and not write, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(was)
            folder.chmod(0o755)


def test_a_store_that_cannot_be_written(foreign: Path) -> None:
    with pytest.raises(EndError) as caught:
        prepare.make_run_directory(foreign / "jobs/bot")
    error, status = caught.value, foreign.stat()
    assert (error.code, error.reason) == (78, "StoreNotWritable")
    assert f"{foreign} has owner {status.st_uid}:{status.st_gid}, mode 0555" in error.message
    assert error.message.endswith(f"chown -R {os.geteuid()}:{os.getegid()} {foreign}")


def test_one_process_at_a_time_in_a_folder(tmp_path: Path) -> None:
    order = []

    def work(name: str) -> None:
        with store.alone(tmp_path / "models/key"):
            order.append(name)
            time.sleep(0.05)
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order[0::2] == order[1::2]
    assert list((tmp_path / "models").iterdir()) == []


def test_a_dead_process_s_lock_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STALE_SECONDS", 0.3)
    (tmp_path / ".key.lock").write_text("dead 7")
    with store.alone(tmp_path / "key"):
        assert not (tmp_path / ".key.lock").read_text().startswith("dead")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (100, 16),
        (3_000, 512),
        (20_000, 2048),
        (1_000_000, 4096),
        (1_228_800, 8192),
        (2_000_000, 8192),
        (10**8, 131_072),
    ],
)
def test_batch_tokens(tokens: int, expected: int) -> None:
    assert defaults.batch_tokens(tokens) == expected


def test_pretraining_may_take_larger_batches() -> None:
    assert defaults.batch_tokens(10**9, 1 << 20) == 1 << 20


@pytest.mark.parametrize(
    ("quantity", "expected"), [("4Gi", 4 << 30), (1024, 1024), ("1.5G", 1_500_000_000), ("1e9", 10**9), ("512Mi", 512 << 20)]
)
def test_quantities(quantity: int | str, expected: int) -> None:
    assert to_bytes(quantity) == expected

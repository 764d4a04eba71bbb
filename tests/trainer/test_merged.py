"""An adapter in its base model's weights: a model that transformers alone loads, and that says what the adapter said."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.trainer.jobs import Job, filed, make_job, train
from transformers import LlamaForCausalLM

from tuneward_api import manifest
from tuneward_api.files import Proof
from tuneward_api.names import ExitCode
from tuneward_trainer import merged
from tuneward_trainer.proof import logprobs


@pytest.fixture(scope="module", params=["LoRA", "DoRA"])
def adapter_on_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter as finish files it, and its base model."""
    job: Job = train(make_job(tmp_path_factory.mktemp("store"), method={"type": request.param}))
    return job.store / filed(job).sub_path, job.store / "models/tiny"


def test_the_model_says_what_the_adapter_said(
    adapter_on_base: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = adapter_on_base
    assert merged.main(adapter, base, tmp_path / "model") == 0
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 'model'} holds the model; the proof's log-probabilities differ by"
    )
    manifest.verify(tmp_path / "model")
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {(base / "config.json").stat().st_mode}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter / "adapter")).merge_and_unload()
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    for text in Proof.model_validate_json((adapter / "proof.json").read_bytes()).texts:
        assert logprobs(model, text.ids) == pytest.approx(text.tuned, abs=1e-4)


@pytest.mark.parametrize("what", ["another base", "no base", "no adapter", "changed", "there"])
def test_what_is_refused_leaves_nothing(
    adapter_on_base: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    adapter, base, folder = *adapter_on_base, tmp_path / "model"
    expected = "gives log-probabilities that are"
    if what == "another base":
        base = shutil.copytree(base, tmp_path / "base")
        other = LlamaForCausalLM.from_pretrained(base)
        with torch.no_grad():
            other.lm_head.weight.mul_(-1)
        other.save_pretrained(base)
    elif what == "no base":
        base, expected = tmp_path, "is no model folder: it must hold config.json"
    elif what == "no adapter":
        adapter, expected = tmp_path, "is no adapter as tuneward files it, with adapter/, proof.json and MANIFEST.json"
    elif what == "changed":
        adapter, expected = shutil.copytree(adapter, tmp_path / "adapter"), "is no adapter as tuneward files it"
        (adapter / "proof.json").write_text("{}")
    else:
        folder, expected = tmp_path, "is there already; name another folder, or remove it"
    capsys.readouterr()
    assert merged.main(adapter, base, folder) == ExitCode.INPUT_MISSING
    error = capsys.readouterr().err
    assert expected in error.splitlines()[-1]
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    adapter_on_base: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may be larger than 4 KiB, which the weights are."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        code = merged.main(*adapter_on_base, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == ExitCode.INPUT_MISSING
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{tmp_path / 'model'} could not be written: ") and "File too large" in said
    assert not list(tmp_path.iterdir())

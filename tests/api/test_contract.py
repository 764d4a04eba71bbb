"""CRDs, manifests, failures and reports: what every other part leans on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneward_api import manifest
from tuneward_api.conditions import ConditionType, FailureClass, Phase, Reason
from tuneward_api.crd import NAMES, crd, structural
from tuneward_api.failures import Failure, classify
from tuneward_api.files import Progress, Report, termination_message
from tuneward_api.generate import generated
from tuneward_api.names import hashed, run_directory, served_name


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


@pytest.mark.parametrize("kind", NAMES)
def test_schemas_are_structural_bounded_and_described(kind: str) -> None:
    schema = structural(NAMES[kind][0])
    text = json.dumps(schema)
    assert "$ref" not in text
    assert '"null"' not in text
    assert '"default"' not in text
    assert len(generated()[f"crds/{NAMES[kind][1]}.yaml"]) < 100_000
    for path, node in nodes(schema):
        named = path.rsplit(".", 1)[-1]
        if path.startswith((".spec.", ".status.")) and not named.endswith("[]"):
            assert node.get("description"), f"{kind}{path} has no description"
        if path.startswith(".spec") and node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node or node.get("format"), f"{kind}{path} has no maxLength: CEL budgets explode"
        if path.startswith(".spec") and node.get("type") == "array":
            assert "maxItems" in node, f"{kind}{path} has no maxItems"


def test_generated_files_are_up_to_date() -> None:
    root = Path(__file__).resolve().parents[2]
    assert {name: (root / name).read_text() for name in generated()} == generated()


def test_the_reference_names_every_word() -> None:
    text = generated()["docs/reference.md"]
    words = [*Phase, *ConditionType, *Reason, *FailureClass]
    assert [word for word in words if f"`{word}`" not in text] == []


def test_crd_names() -> None:
    spec = crd("FineTuneJob")["spec"]
    assert spec["names"]["shortNames"] == ["ftj"]
    assert [column["name"] for column in spec["versions"][0]["additionalPrinterColumns"]][:6] == [
        "Phase", "Progress", "Loss", "ETA", "Model", "Age",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "module", ["tuneward_api.finetunejob", "tuneward_api.files", "tuneward_api.validate", "tuneward_api.crd"]
)
def test_the_contract_loads_pydantic_and_yaml_only(module: str) -> None:
    heavy = ["torch", "transformers", "peft", "kopf", "kubernetes", "aiohttp", "httpx", "rich", "numpy"]
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


class TestManifest:
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "b").mkdir()
        (tmp_path / "a.bin").write_bytes(b"one")
        (tmp_path / "b" / "c.bin").write_bytes(b"two")
        return tmp_path

    def test_a_folder_is_complete_only_with_its_manifest(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        assert not manifest.complete(folder)
        digest = manifest.write_manifest(folder)
        assert manifest.complete(folder)
        assert manifest.verify(folder, digest=digest) == digest
        assert manifest.digest_of(list(reversed(manifest.scan(folder)))) == digest

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / "a.bin").write_bytes(b"two"), "a.bin was changed"),
            (lambda f: (f / "b" / "c.bin").unlink(), "c.bin is missing"),
            (lambda f: (f / "MANIFEST.json").write_text("{"), "is not a manifest"),
            (lambda f: (f / "MANIFEST.json").unlink(), "holds no MANIFEST.json"),
        ],
    )
    def test_damage_is_named(self, tmp_path: Path, damage: Any, message: str) -> None:
        folder = self.folder(tmp_path)
        manifest.write_manifest(folder)
        damage(folder)
        with pytest.raises(manifest.ManifestError, match=message):
            manifest.verify(folder)

    def test_everything_is_on_the_disk_before_the_manifest_and_the_folders_own_name_after_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = self.folder(tmp_path)
        synced: list[Path] = []
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()))
        manifest.write_manifest(folder)
        files = {path for path in folder.rglob("*") if path.is_file() and path.name != manifest.MANIFEST}
        written = next(at for at, path in enumerate(synced) if manifest.MANIFEST in path.name)
        assert files <= set(synced[:written])
        assert synced[-2:] == [folder, folder.parent]

    def test_another_digest_is_refused(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        manifest.write_manifest(folder)
        with pytest.raises(manifest.ManifestError, match="expected sha256:0"):
            manifest.verify(folder, digest="sha256:0")

    def test_a_manifest_that_was_edited_disagrees_with_itself(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        manifest.write_manifest(folder)
        text = (folder / "MANIFEST.json").read_text().replace('"size": 3', '"size": 4')
        (folder / "MANIFEST.json").write_text(text)
        with pytest.raises(manifest.ManifestError, match="disagrees"):
            manifest.read_manifest(folder)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ({"exit_code": 137}, (FailureClass.INFRASTRUCTURE, Reason.INFRASTRUCTURE)),
        ({"exit_code": -9}, (FailureClass.INFRASTRUCTURE, Reason.INFRASTRUCTURE)),
        ({"exit_code": 137, "reason": "OOMKilled"}, (FailureClass.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY)),
        ({"exit_code": 65}, (FailureClass.INVALID_INPUT, Reason.DATA_INVALID)),
        ({"exit_code": 66}, (FailureClass.INVALID_INPUT, Reason.INPUT_MISSING)),
        ({"exit_code": 75}, (FailureClass.INFRASTRUCTURE, Reason.INFRASTRUCTURE)),
        ({"exit_code": 78}, (FailureClass.INVALID_CONFIG, Reason.CONFIG_INVALID)),
        ({"exit_code": 143}, (FailureClass.PREEMPTED, Reason.PREEMPTED)),
        ({"exit_code": 1}, (FailureClass.UNKNOWN, Reason.UNKNOWN)),
        ({"exit_code": None}, (FailureClass.INFRASTRUCTURE, Reason.INFRASTRUCTURE)),
        (
            {"exit_code": 1, "reason": "NumericalDivergence"},
            (FailureClass.NUMERICAL_DIVERGENCE, Reason.NUMERICAL_DIVERGENCE),
        ),
        ({"exit_code": 78, "reason": "StoreNotWritable"}, (FailureClass.INVALID_CONFIG, Reason.STORE_NOT_WRITABLE)),
        ({"exit_code": 1, "reason": "Error"}, (FailureClass.UNKNOWN, Reason.UNKNOWN)),
    ],
)
def test_endings_are_classified(ending: dict[str, Any], expected: tuple[FailureClass, Reason]) -> None:
    found: Failure = classify(**ending)
    assert (found.failure_class, found.reason) == expected
    assert found.sentence


def test_a_termination_message_stays_whole_json() -> None:
    report = Report(outcome="Failed", reason=Reason.DATA_INVALID, message="é" * 1024)
    text = termination_message(report)
    assert len(text.encode()) <= 4000
    assert json.loads(text)["reason"] == "DataInvalid"


def test_a_report_of_another_version_is_read() -> None:
    assert Progress.model_validate({"step": 3, "podUID": "u", "new": {"field": 1}}).step == 3


def test_names() -> None:
    assert hashed("short") == "short"
    assert len(hashed("x" * 100)) == 63
    assert hashed("x" * 100) != hashed("x" * 101)
    assert run_directory("job", "0123456789") == "jobs/job-01234567"
    name = served_name("hf://mistralai/Mistral-7B@main", "bot", "20261125", "sha256:0123456789abcdef")
    assert name == "ft:Mistral-7B:bot:20261125:01234567"

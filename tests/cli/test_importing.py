"""A model folder arrives whole, or not at all."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tuneward_api import manifest
from tuneward_cli import importing, receive
from tuneward_cli.errors import CommandError
from tuneward_cli.voice import Voice


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "extra" / "note.txt").write_text("hello")
    (folder / "model.safetensors").chmod(0o600)
    return folder


def packed(source: importing.Source) -> io.BytesIO:
    stream = io.BytesIO()
    importing.pack(source, stream)
    stream.seek(0)
    return stream


def test_what_is_sent_is_what_arrives(model: Path, tmp_path: Path) -> None:
    source = importing.read_source(model, Voice())
    target = tmp_path / "store" / "imports" / "m"
    receive.unpack(packed(source), target, source.digest)
    assert receive.held(target) == source.digest
    assert manifest.verify(target, digest=source.digest)
    # Pods of another user read it.
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_another_digest_leaves_no_finished_folder(model: Path, tmp_path: Path) -> None:
    source = importing.read_source(model, Voice())
    target = tmp_path / "m"
    with pytest.raises(manifest.ManifestError, match="expected sha256:0"):
        receive.unpack(packed(source), target, "sha256:0")
    assert receive.held(target) == ""


def test_a_stream_that_ends_early_leaves_no_finished_folder(model: Path, tmp_path: Path) -> None:
    source = importing.read_source(model, Voice())
    cut = io.BytesIO(packed(source).getvalue()[:4000])
    with pytest.raises((tarfile.TarError, manifest.ManifestError)):
        receive.unpack(cut, tmp_path / "m", source.digest)
    assert receive.held(tmp_path / "m") == ""


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_nothing_is_written_outside_the_folder(name: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    stream.seek(0)
    with pytest.raises(manifest.ManifestError, match="outside"):
        receive.unpack(stream, tmp_path / "a" / "m", "")
    assert not list(tmp_path.rglob("evil"))


def test_the_pod_answers_with_one_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert receive.main(["held", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == {"digest": "", "error": ""}


def test_a_workstation_copies_once_and_refuses_another_model(model: Path, tmp_path: Path) -> None:
    store, voice = tmp_path / "store", Voice()
    source = importing.read_source(model, voice)
    uri = importing.import_here(source, "m", store, voice)
    assert uri == "pvc://tuneward-store/imports/m"
    written = (store / "imports" / "m" / "config.json").stat().st_mtime_ns
    importing.import_here(source, "m", store, voice)
    assert (store / "imports" / "m" / "config.json").stat().st_mtime_ns == written
    (model / "config.json").write_text("{ }")
    other = importing.read_source(model, voice)
    with pytest.raises(CommandError, match="holds another model"):
        importing.import_here(other, "m", store, voice)
    importing.import_here(other, "m", store, voice, replace=True)
    assert receive.held(store / "imports" / "m") == other.digest


def test_nothing_of_another_model_stays_beside_a_new_one(model: Path, tmp_path: Path) -> None:
    """An import that was broken off, or replaced: a tekken.json would be read, though no manifest names it."""
    target = tmp_path / "store" / "imports" / "m"
    (target / "extra").mkdir(parents=True)
    for name in ("tekken.json", "extra/other.txt"):
        (target / name).write_text("of another model")
    source = importing.read_source(model, Voice())
    importing.import_here(source, "m", tmp_path / "store", Voice())
    assert manifest.list_files(target) == [entry.path for entry in source.entries]
    (target / "tekken.json").write_text("of another model")
    receive.unpack(packed(source), target, source.digest)
    assert manifest.list_files(target) == [entry.path for entry in source.entries]


def test_a_model_that_changes_while_it_is_copied_is_refused(model: Path, tmp_path: Path) -> None:
    source = importing.read_source(model, Voice())
    (model / "config.json").write_text("{ }")
    with pytest.raises(CommandError, match="changed while it was copied"):
        importing.import_here(source, "m", tmp_path, Voice())
    assert receive.held(tmp_path / "imports" / "m") == ""


def test_a_folder_that_its_own_manifest_disowns_is_refused(model: Path) -> None:
    manifest.write_manifest(model)
    (model / "config.json").write_text("[]")
    with pytest.raises(CommandError, match="changed after it was finished"):
        importing.read_source(model, Voice())


def test_the_receiver_runs_as_the_operators_pods_do() -> None:
    spec = importing.pod(
        "A.b_C", {"TUNEWARD_RUN_AS_USER": "1234", "TUNEWARD_FS_GROUP": "-1", "TUNEWARD_IMAGE_TRAINER": "t:1"}
    )
    assert spec["metadata"]["name"] == "tuneward-import-a-b-c"
    security = spec["spec"]["securityContext"]
    assert security["runAsUser"] == 1234
    assert "fsGroup" not in security
    assert spec["spec"]["containers"][0]["image"] == "t:1"
    # A store that is on one node at a time has all its pods there.
    (term,) = spec["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["labelSelector"]["matchLabels"] == {"claim.tuneward.dev/tuneward-store": ""}
    assert spec["metadata"]["labels"].items() >= term["labelSelector"]["matchLabels"].items()


def test_the_store_is_made_as_the_operator_would() -> None:
    claim = importing.store_claim({"TUNEWARD_STORAGE_CLASS": "fast", "TUNEWARD_STORAGE_SIZE": "5Gi"})
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "fast",
    }

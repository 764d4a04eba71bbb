"""The FineTunedModel that a job goes on from: its adapter, taken into the run directory, is the state at step 0.

Taken, not mounted: an adapter is small, and the job then depends neither on the model's record nor on its files, whatever
becomes of them while it waits or trains.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from peft import PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file

from tuneward_api import manifest
from tuneward_api.adapters import targets_of
from tuneward_api.files import Parent
from tuneward_api.finetunejob import Method
from tuneward_api.resolved import ResolvedMethod
from tuneward_api.uris import parse_uri
from tuneward_trainer import endings
from tuneward_trainer.facts import Facts
from tuneward_trainer.model import ADAPTER, adapter_parameters
from tuneward_trainer.models import Found
from tuneward_trainer.report import config_bad, input_missing
from tuneward_trainer.store import Places, make_directory

FOLDER: Final = "parent"
"""Below the run directory: adapter/, proof.json and MANIFEST.json, as they were filed."""


def take(parent: Parent, base: Found, *, places: Places, store_claim: str, run: Path) -> Path:
    """The folder with the parent's files; copies them if they are not there yet. Raises EndError."""
    if base.digest != parent.base_digest:
        raise config_bad(
            f"the base model at {parent.base_uri} has digest {base.digest}, and FineTunedModel {parent.name} was trained on "
            f"{parent.base_digest}; bring the files back that it was trained on"
        )
    target = run / FOLDER
    if _is_whole(target, parent):
        return target
    source = filed(parent, places=places, store_claim=store_claim)
    shutil.rmtree(target, ignore_errors=True)
    for path in manifest.list_files(source):
        make_directory((target / path).parent)
        shutil.copyfile(source / path, target / path)
    manifest.write_manifest(target)
    return target


def filed(parent: Parent, *, places: Places, store_claim: str) -> Path:
    """The folder that its record names, every byte as it was filed. Raises EndError."""
    uri = parse_uri(parent.artifact_uri)
    folder = places.claim(uri.authority, store_claim) / uri.path
    try:
        manifest.verify(folder, digest=parent.artifact_digest)
    except manifest.ManifestError as error:
        raise input_missing(
            f"the files of FineTunedModel {parent.name} are not at {parent.artifact_uri} as they were filed: {error}"
        ) from error
    return folder


def _is_whole(folder: Path, parent: Parent) -> bool:
    try:
        manifest.verify(folder, digest=parent.artifact_digest)
    except manifest.ManifestError:
        return False
    return True


def method(asked: Method, folder: Path, facts: Facts, name: str) -> ResolvedMethod:
    """The adapter's own; dropout alone is free. Raises EndError where the job asks for another."""
    config: dict[str, Any] = json.loads((folder / "adapter/adapter_config.json").read_text())
    own: dict[str, Any] = {
        # Which weights lie under a LoRA is no matter of its shape.
        "type": "DoRA" if config.get("use_dora") else "QLoRA" if asked.type == "QLoRA" else "LoRA",
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "rsLoRA": bool(config.get("use_rslora")),
        "targetModules": targets_of(config),
    }
    wanted = asked.to_json()
    if "targetModules" in wanted:
        wanted["targetModules"] = sorted(set(wanted["targetModules"]))
    for field, value in own.items():
        if field in wanted and wanted[field] != value:
            raise config_bad(
                f"spec.method.{field} is {json.dumps(wanted[field])}, and the adapter of FineTunedModel {name} has "
                f"{json.dumps(value)}; leave spec.method.{field} out, or start from the base model"
            )
    return ResolvedMethod(
        type=own["type"],
        rank=own["rank"],
        alpha=own["alpha"],
        dropout=asked.dropout or 0.0,
        rs_lora=own["rsLoRA"],
        target_modules=own["targetModules"],
        trainable_parameters=adapter_parameters(facts.empty, own["targetModules"], own["rank"], dora=own["type"] == "DoRA"),
    )


def load(model: PeftModel, parent: Parent, run: Path) -> None:
    """Sets the model's adapter to the parent's. Raises InputMissingError."""
    folder = run / FOLDER
    try:
        manifest.verify(folder, digest=parent.artifact_digest)
    except manifest.ManifestError as error:
        raise endings.InputMissingError(f"the adapter to go on from is not what prepare left: {error}") from error
    state = load_file(folder / "adapter/adapter_model.safetensors")
    found = set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    strange = [*found.unexpected_keys, *(key for key in found.missing_keys if ".lora_" in key)]
    if strange:
        raise endings.ConfigBadError(f"the adapter of {parent.name} does not fit its base model at {strange[0]}")

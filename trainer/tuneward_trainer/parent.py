"""The FineTunedModel that a job goes on from: its adapter, taken into the run directory, is the state at step 0; where all
weights are to be trained, the base model's with the adapter added to them.

Taken, not mounted: an adapter is small, and the job then depends neither on the model's record nor on its files, whatever
becomes of them while it waits or trains. A model that was trained whole is the job's base model, and is read in place as any
other is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from tuneward_api import manifest
from tuneward_api.adapters import targets_of
from tuneward_api.files import Parent
from tuneward_api.finetunejob import Method
from tuneward_api.resolved import ResolvedMethod
from tuneward_api.uris import parse_uri
from tuneward_trainer import endings
from tuneward_trainer.facts import Facts
from tuneward_trainer.model import ADAPTER, adapter_parameters, add_adapters
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
    own = shape(folder)
    # Which weights lie under a LoRA is no matter of its shape.
    own["type"] = "QLoRA" if (asked.type, own["type"]) == ("QLoRA", "LoRA") else own["type"]
    wanted = asked.to_json()
    if "targetModules" in wanted:
        wanted["targetModules"] = sorted(set(wanted["targetModules"]))
    for field, value in own.items():
        if field in wanted and wanted[field] != value:
            raise config_bad(
                f"spec.method.{field} is {json.dumps(wanted[field])}, and the adapter of FineTunedModel {name} has "
                f"{json.dumps(value)}; leave spec.method.{field} out, or start from the base model"
            )
    count = adapter_parameters(facts.empty, own["targetModules"], own["rank"], dora=own["type"] == "DoRA")
    return ResolvedMethod.model_validate(own | {"dropout": asked.dropout or 0.0, "trainableParameters": count})


def shape(folder: Path) -> dict[str, Any]:
    """Of the adapter, by the fields of spec.method."""
    config: dict[str, Any] = json.loads((folder / "adapter/adapter_config.json").read_text())
    return {
        "type": "DoRA" if config.get("use_dora") else "LoRA",
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "rsLoRA": bool(config.get("use_rslora")),
        "targetModules": targets_of(config),
    }


def put_on(model: PreTrainedModel, parent: Parent, run: Path) -> None:
    """Puts the parent's adapter on a model of which all else is trained; `merge` adds it to the weights. Raises
    InputMissingError."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    method = ResolvedMethod.model_validate(shape(run / FOLDER) | {"dropout": 0.0, "trainableParameters": 0})
    load(add_adapters(model, method, seed=0, base_uri=parent.base_uri), parent, run)
    for parameter in trained:
        parameter.requires_grad_(True)


def merge(part: nn.Module) -> None:
    """Adds the adapters on Linears of this part of a model to their weights, and takes them off. In fp32: in bf16 most of an
    update is lost in rounding."""
    part.float()
    for name, module in list(part.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            above, _, last = name.rpartition(".")
            setattr(part.get_submodule(above), last, module.get_base_layer())


def load(model: PeftModel, parent: Parent, run: Path) -> None:
    """Sets the model's adapter to the parent's. Raises InputMissingError."""
    folder = run / FOLDER
    try:
        manifest.verify(folder, digest=parent.artifact_digest)
    except manifest.ManifestError as error:
        raise endings.InputMissingError(f"the adapter to go on from is not what prepare left: {error}") from error
    set_state(model, folder, f"the adapter of {parent.name}")


def set_state(model: PeftModel, folder: Path, what: str) -> None:
    """Sets the model's adapter to that in `folder`, which errors call `what`. Raises ConfigBadError."""
    state = load_file(folder / "adapter/adapter_model.safetensors")
    found = set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    strange = [*found.unexpected_keys, *(key for key in found.missing_keys if ".lora_" in key)]
    if strange:
        raise endings.ConfigBadError(f"{what} does not fit its base model at {strange[0]}")

"""The adapter as PEFT saves it, with the same bytes for the same numbers, and proof.json beside it.

    adapter/a<attempt>/adapter/adapter_config.json, adapter_model.safetensors
    adapter/a<attempt>/proof.json
    adapter/a<attempt>/MANIFEST.json

The proof lets whoever serves the adapter see that it computes what the trainer computed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel

from tuneward_api import manifest
from tuneward_api.files import Proof, ProofText, canonical_json, proof_tolerance
from tuneward_trainer.batch import Sample
from tuneward_trainer.model import ADAPTER

TEXTS: Final = 2
LONGEST: Final = 64
"""Token ids of a text at most: an engine computes the proof at each start."""
POSITIONS: Final = 32
KEPT: Final = frozenset({"adapter_config.json", "adapter_model.safetensors"})


def export(model: PeftModel, folder: Path, proved: Proof) -> str:
    """Writes the adapter, its proof and the manifest into `folder`. Returns the manifest's digest."""
    save_adapter(model, folder / "adapter")
    (folder / "proof.json").write_text(canonical_json(proved.to_json()) + "\n")
    return manifest.write_manifest(folder)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """PEFT's own two files. PEFT writes sets as lists in any order, so lists of names are sorted."""
    # Copies: the live parameters are views into one buffer, and PEFT would take them for shared weights.
    state = {name: value.detach().clone() for name, value in model.state_dict().items() if ".lora_" in name}
    model.save_pretrained(str(folder), state_dict=state, selected_adapters=[ADAPTER], save_embedding_layers=False)
    for file in folder.iterdir():
        if file.name not in KEPT:
            file.unlink()
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    ordered = {
        key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for key, value in config.items()
    }
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n")


def prove(model: PeftModel, samples: Sequence[Sample]) -> Proof:
    """Log-probabilities of a few training texts under the base and the tuned model, by the plain forward pass. A collective,
    where ranks share the base."""
    base = model.get_base_model()
    dtype = str(base.dtype).removeprefix("torch.")
    found = []
    for ids in texts(samples):
        with model.disable_adapter():
            before = logprobs(model, ids)
        found.append(ProofText(ids=ids, base=before, tuned=logprobs(model, ids)))
    return Proof(texts=found, dtype=dtype, tolerance=proof_tolerance(dtype))


def texts(samples: Sequence[Sample]) -> list[list[int]]:
    """The shortest samples with enough positions: there the learnt part is near and the context short."""
    candidates = sorted((sample for sample in samples if len(sample.ids) > 1), key=lambda sample: len(sample.ids))
    enough = [sample for sample in candidates if len(sample.ids) > POSITIONS] or candidates[-TEXTS:]
    return [sample.ids[:LONGEST].tolist() for sample in enough[:TEXTS]]


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """log p(ids[i + 1] | ids[: i + 1]) for each i."""
    device = next(model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    scores = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return [round(value, 6) for value in scores.gather(-1, tokens[0, 1:, None])[:, 0].tolist()]

"""The weights: one base model and adapters in slots; one forward over rows of different adapters.

PEFT applies the adapters. Slots are our own short names, because PEFT keeps adapters in a torch ModuleDict, whose
keys may hold no dot, and served names do. Only the model's thread may call in here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils import transformers_weight_conversion as conversion
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.logging import disable_progress_bar

from tuneward_api.adapters import targets_of
from tuneward_serving.engine.errors import ApiError
from tuneward_serving.engine.generation import BASE
from tuneward_serving.engine.tokenizer import Tokenizer, load_tokenizer


class Runner:
    """`model` as transformers makes it."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.max_length = _max_length(model.config)
        self.end_tokens = _end_tokens(model.generation_config, tokenizer)
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._base = model
        self._peft: Any = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self._base.device
        return device

    @property
    def dtype(self) -> str:
        """float32, bfloat16, ..."""
        return str(self._base.dtype).removeprefix("torch.")

    def load(self, slot: str, folder: Path) -> None:
        """Raises ApiError with what does not fit; then nothing is left behind."""
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        try:
            with _on_layers(config):
                if self._peft is None:
                    self._peft = PeftModel(self._base, config, adapter_name=slot)
                else:
                    self._peft.add_adapter(slot, config)
            report = self._peft.load_adapter(str(folder), adapter_name=slot, torch_device=str(self.device))
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            self._forget(slot)
            raise ApiError(f"the adapter does not fit the base model: {str(error).splitlines()[0]}") from error
        strange = [*report.unexpected_keys, *report.missing_keys]
        if strange:
            self._forget(slot)
            raise ApiError(f"the adapter does not fit the base model: {strange[0]} has no counterpart")
        _allow_mixed_batches(self._peft, slot)
        self._peft.eval()

    def unload(self, slot: str) -> None:
        self._forget(slot)

    def _forget(self, slot: str) -> None:
        if self._peft is None or slot not in self._peft.peft_config:
            # PeftModel() itself failed: it may have wrapped some layers already.
            if self._peft is None:
                self._base = _unwrapped(self._base)
            return
        others = [name for name in self._peft.peft_config if name != slot]
        if others:
            # PEFT warns for each layer when the active adapter goes; which one is active means nothing here.
            self._peft.set_adapter(others[0])
            self._peft.delete_adapter(slot)
        else:
            self._base = self._peft.unload()
            self._peft = None

    def forward(
        self,
        ids: torch.Tensor,
        *,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache,
        slots: Sequence[str],
        keep: int,
    ) -> torch.Tensor:
        """ids, positions [rows, new]; mask [rows, cached + new]; float32 logits [rows, keep, vocabulary] of the last
        `keep` positions (0: all). Fills `cache`. A slot is a row's adapter, or PEFT's `__base__` for none."""
        mixed = {} if self._peft is None else {"adapter_names": list(slots)}
        model = self._base if self._peft is None else self._peft
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                cache=cache,
                use_cache=True,
                logits_to_keep=keep,
                **mixed,
            )
        logits: torch.Tensor = out.logits
        return logits.float()


def load_runner(folder: Path, device: str | None = None) -> Runner:
    """Raises OSError or ValueError when the folder holds no causal language model."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cpus())
    disable_progress_bar()
    tokenizer = load_tokenizer(folder)
    model = _load_model(folder, torch.bfloat16 if where.startswith("cuda") else torch.float32)
    model.requires_grad_(False)
    runner = Runner(model.to(where).eval(), tokenizer)
    _warm_up(runner)
    return runner


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    """As the class that config.json names, which is the one that was trained: an auto class may pick a text-only sibling,
    whose layers have other names. Packed weights (fp8) are unpacked: adapters are exact on plain ones."""
    config = json.loads((folder / "config.json").read_text())
    named = next(iter(config.get("architectures") or []), "")
    kind = getattr(transformers, named, AutoModelForCausalLM)
    options: dict[str, Any] = {}
    if config.get("quantization_config"):
        options["quantization_config"] = AutoQuantizationConfig.from_dict(
            config["quantization_config"] | {"dequantize": True}
        )
    return kind.from_pretrained(str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, **options)


def _warm_up(runner: Runner) -> None:
    """The first forward imports and allocates for seconds; better before /health says yes."""
    one = torch.zeros((1, 1), dtype=torch.long, device=runner.device)
    runner.forward(one, mask=one + 1, positions=one, cache=DynamicCache(), slots=[BASE], keep=1)


def usable_cpus() -> int:
    """torch starts a thread for every core of the node; beyond the container's limit they only wait for each other."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _max_length(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2048)


def _end_tokens(generation: GenerationConfig, tokenizer: Tokenizer) -> frozenset[int]:
    found = generation.eos_token_id if generation is not None else None
    ends = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None)


@contextmanager
def _on_layers(config: LoraConfig) -> Iterator[None]:
    """What `config` names by its weight, since PEFT takes a layer's own name for experts there (docs/decisions/0007), gets
    an adapter like all other layers: rows of different adapters cannot share one that is on a weight."""
    if not config.target_parameters or isinstance(config.target_modules, str):
        yield
        return
    config.target_modules = set(targets_of(vars(config)))
    config.target_parameters = None
    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_args, **_named: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def _allow_mixed_batches(model: Any, slot: str) -> None:
    """PEFT refuses DoRA among rows of different adapters, by a flag that nothing else reads; its forward over such rows
    (`_mixed_batch_forward`) calls each adapter's own variant, DoRA's too. Tested against each adapter alone."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and slot in module.use_dora:
            module.use_dora[slot] = False


def _unwrapped(model: Any) -> Any:
    """The model without LoRA layers that a failed PeftModel() left in it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    return model

"""A decoder's numbers that cost anything, from config.json: widths, layers, Linears, parameters.

config.json does not say all of a layer: which norms it has, which Linears are fused. That is said here of each family that
was looked at; another one is taken for a Llama. What all of it costs is the estimate's (`estimate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Final

NF4_BLOCK: Final = 64
"""Weights that share a scale where they are packed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a decoder that cost anything. Widths are elements a token."""

    family: str
    """config.json's model_type."""
    layers: int
    hidden: int
    query: int
    """Heads times head size."""
    key: int
    """Key and value heads times head size: once for the keys, once for the values."""
    heads: int
    pairs: int
    """Key and value heads."""
    inner: int
    """Of a layer's MLP; of one expert, where there are some."""
    vocabulary: int
    tied: bool
    norms: int = 2
    """Of a layer, over the hidden width."""
    norms_first: bool = True
    """Norms come before what they are for, not after."""
    norms_invert: bool = True
    """They are Llama's: their input can be had from their result again (trainer's norms.py)."""
    head_norms: bool = False
    """Queries and keys are normed."""
    fused: bool = False
    """Queries, keys and values are one Linear (Phi-3)."""
    fused_mlp: bool = False
    """Gate and up are one Linear (Phi-3, GLM)."""
    gated: bool = True
    squashed: bool = False
    """Attention scores are soft-capped, which no kernel does: they are written out."""
    ropes: int = 1
    biases: int = 0
    """Weights of a layer's biases."""
    experts: int = 0
    """Of a layer; 0: a plain MLP."""
    chosen: int = 0
    """Experts that a token passes through."""
    shared: int = 0
    """Inner width of what every token passes through beside them."""
    plain_layers: int = 0
    """Layers with a plain MLP, of a model with experts."""
    plain_inner: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From config.json, whose text part counts. Raises ValueError with the field that is missing."""
        text: Mapping[str, Any] = config.get("text_config") or config
        family = str(text.get("model_type") or config.get("model_type") or "")
        hidden, heads = _number(text, "hidden_size", "n_embd"), _number(text, "num_attention_heads", "n_head")
        head = text.get("head_dim") or hidden // heads
        pairs = int(text.get("num_key_value_heads") or heads)
        inner = int(text.get("intermediate_size") or text.get("n_inner") or 4 * hidden)
        biased = bool(text.get("attention_bias")) or family in ("qwen2", "starcoder2")
        shape = cls(
            family=family,
            layers=_number(text, "num_hidden_layers", "n_layer"),
            hidden=hidden,
            query=heads * head,
            key=pairs * head,
            heads=heads,
            pairs=pairs,
            inner=inner,
            vocabulary=_number(text, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", family.startswith("gemma")))),
            squashed=bool(text.get("attn_logit_softcapping")),
            # Starcoder 2 has one beside every weight, its norms included.
            biases=((heads + 2 * pairs) * head if biased else 0) + (4 * hidden + inner if family == "starcoder2" else 0),
        )
        return replace(shape, **_FAMILIES.get(family, {}), **_experts(text, inner))

    @property
    def known(self) -> bool:
        """Whether the layers of this family were looked at; another one is taken for a Llama."""
        return self.family in _FAMILIES

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the Linears of a layer that LoRA can be put on; experts are none."""
        return self._linears(self.shared if self.experts else self.inner)

    @property
    def _kinds(self) -> tuple[tuple[int, dict[str, tuple[int, int]]], ...]:
        """(number of layers, the same of each of them): those with experts, if the model has any, and those without."""
        return (self.layers - self.plain_layers, self.linears), (self.plain_layers, self._linears(self.plain_inner))

    def _linears(self, inner: int) -> dict[str, tuple[int, int]]:
        hidden, query, key = self.hidden, self.query, self.key
        if self.fused:
            found = {"qkv_proj": (hidden, query + 2 * key)}
        else:
            found = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key)}
        found["o_proj"] = (query, hidden)
        if not inner:
            return found
        if self.fused_mlp:
            return found | {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
        if not self.gated:
            return found | {"c_fc": (hidden, inner), "c_proj": (inner, hidden)}
        return found | {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}

    @property
    def attention(self) -> int:
        """Weights of the Linears of a layer's attention."""
        return self.hidden * (2 * self.query + 2 * self.key)

    @property
    def mlp(self) -> int:
        """Weights of a layer's MLP that a token passes through."""
        parts = 3 if self.gated else 2
        if not self.experts:
            return parts * self.hidden * self.inner
        return parts * self.hidden * (self.chosen * self.inner + self.shared) + self.hidden * self.experts

    @property
    def parameters(self) -> int:
        """All of them."""
        resting = (self.experts - self.chosen) * 3 * self.hidden * self.inner if self.experts else 0
        plain = self.plain_layers * (3 * self.hidden * self.plain_inner - self.mlp - resting) if self.experts else 0
        head_norm = 2 * self.query // self.heads if self.head_norms else 0
        layer = self.attention + self.mlp + resting + self.norms * self.hidden + head_norm + self.biases
        return self.layers * layer + plain + (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    def adapted(self, targets: Set[str] | None = None) -> dict[str, tuple[int, int]]:
        """The Linears of a layer that `targets` (last parts of names; None: all) select."""
        return _selected(self.linears, targets)

    @property
    def packable(self) -> int:
        """Weights that NF4 can pack: of the Linears that LoRA can be put on, if blocks fill their rows."""
        return sum(
            layers * sum(inputs * outputs for inputs, outputs in linears.values() if inputs % NF4_BLOCK == 0)
            for layers, linears in self._kinds
        )

    def lora(self, rank: int, targets: Set[str] | None = None, *, dora: bool = False) -> int:
        """Parameters of LoRA on the Linears of every layer."""
        return sum(
            layers * sum(rank * (inputs + outputs) + dora * outputs for inputs, outputs in linears.values())
            for layers, linears in ((layers, _selected(linears, targets)) for layers, linears in self._kinds)
        )


def _selected(linears: dict[str, tuple[int, int]], targets: Set[str] | None) -> dict[str, tuple[int, int]]:
    wanted = None if targets is None else {target.rsplit(".", 1)[-1] for target in targets}
    return {name: sizes for name, sizes in linears.items() if wanted is None or name in wanted}


_FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "mistral": {},
    "ministral3": {},
    "qwen2": {},
    "smollm3": {},
    "granite": {},
    "gemma": {"norms_invert": False},
    "gemma2": {"norms": 4, "norms_invert": False},
    "gemma3_text": {"norms": 4, "norms_invert": False, "head_norms": True, "ropes": 2},
    "qwen3": {"head_norms": True},
    "olmo2": {"norms_first": False, "head_norms": True},
    "olmo3": {"norms_first": False, "head_norms": True},
    "phi3": {"fused": True, "fused_mlp": True},
    "glm": {"fused_mlp": True},
    "glm4": {"fused_mlp": True, "norms": 4},
    "starcoder2": {"gated": False, "norms_invert": False},
    "mixtral": {},
    "qwen3_moe": {"head_norms": True},
    "olmoe": {"head_norms": True},
}
"""What config.json does not say of a layer, by model_type."""


def _experts(text: Mapping[str, Any], inner: int) -> dict[str, Any]:
    """What a mixture of experts changes; nothing for any other model."""
    experts = next(
        (int(text[name]) for name in ("num_local_experts", "num_experts", "n_routed_experts") if text.get(name)), 0
    )
    if not experts:
        return {}
    expert = int(text.get("moe_intermediate_size") or inner)
    shared = int(text.get("shared_expert_intermediate_size") or int(text.get("n_shared_experts") or 0) * expert)
    plain = int(text.get("first_k_dense_replace") or 0) + len(text.get("mlp_only_layers") or ())
    return {
        "experts": experts,
        "chosen": int(text.get("num_experts_per_tok") or 1),
        "inner": expert,
        "shared": shared,
        "plain_layers": plain,
        "plain_inner": inner,
    }


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    if found is None:
        raise ValueError(f"config.json has no {names[0]}")
    return int(found)

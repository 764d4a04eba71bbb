"""What a training costs before it runs: floating-point operations and bytes, from config.json and statistics of the data.

No torch and no weights are needed, so a command can say it before anything is fetched, and `prepare` can choose how many
rows go through the model at once. Counts are of the model's decoder as the trainer runs it: LoRA on every Linear, the
vocabulary scored at target rows only, documents that do not see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a decoder that cost anything. Widths are elements a token."""

    layers: int
    hidden: int
    query: int
    """Heads times head size."""
    key: int
    """Key and value heads times head size: once for the keys, once for the values."""
    heads: int
    inner: int
    """Of the MLP; with experts, of all that one token passes through."""
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From config.json, whose text part counts. Raises ValueError with the field that is missing."""
        text: Mapping[str, Any] = config.get("text_config") or config
        hidden, heads = _number(text, "hidden_size", "n_embd"), _number(text, "num_attention_heads", "n_head")
        head = text.get("head_dim") or hidden // heads
        inner = text.get("intermediate_size") or text.get("n_inner") or 4 * hidden
        return cls(
            layers=_number(text, "num_hidden_layers", "n_layer"),
            hidden=hidden,
            query=heads * head,
            key=int(text.get("num_key_value_heads") or heads) * head,
            heads=heads,
            inner=int(inner),
            vocabulary=_number(text, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    @property
    def attention(self) -> int:
        """Weights of the four Linears of a layer's attention."""
        return self.hidden * (2 * self.query + 2 * self.key)

    @property
    def mlp(self) -> int:
        """Weights of a layer's gated MLP."""
        return 3 * self.hidden * self.inner

    def lora(self, rank: int) -> int:
        """Parameters of LoRA on the seven Linears of every layer."""
        attention = 4 * self.hidden + 2 * self.query + 2 * self.key
        return self.layers * rank * (attention + 3 * (self.hidden + self.inner))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Statistics of the documents."""

    learnt: float
    """Share of the tokens that are targets."""
    length: float
    """Mean length of the document that a token lies in: sum of squared lengths over sum of lengths."""


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    if found is None:
        raise ValueError(f"config.json has no {names[0]}")
    return int(found)


def flops_per_token(shape: Shape, data: Data, rank: int) -> float:
    """Needed floating-point operations of a training token, forward and backward, with nothing computed twice.

    2 a weight and pass: a frozen Linear has two passes (forward, and the gradient of its input, which the first layer's
    queries, keys and values do not need), a LoRA matrix three. Causal attention of a document of L tokens has two
    products of L/2 keys forward and five backward.
    """
    linears = 4 * shape.layers * (shape.attention + shape.mlp) - 2 * shape.hidden * (shape.query + 2 * shape.key)
    head = 4 * shape.vocabulary * shape.hidden * data.learnt
    attention = 7 * shape.query * shape.layers * data.length
    return linears + 6 * shape.lora(rank) + head + attention

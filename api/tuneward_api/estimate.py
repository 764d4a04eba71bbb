"""What a training costs before it runs: bytes and floating-point operations, from config.json and statistics of the data.

No torch and no weights are needed, so a command can say it before anything runs, and the trainer chooses by it how many
rows go through the model at once. Counts are of the model's decoder (`shape.py`) as the trainer runs it (`patches.py`): LoRA
on its Linears or all weights trained, the vocabulary scored at target rows only, documents that do not see each other.

What a backward pass keeps is counted tensor by tensor, each once: what LoRA's matrices multiply, what norms, attention and
the MLP's gate need, and nothing for a frozen weight. The tests hold it against the trainer itself, shape by shape.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from tuneward_api.shape import Shape

GIB: Final = 1 << 30
Device = Literal["cpu", "cuda"]

RESIDENT_FACTOR: Final = 1.75
"""Resident bytes of a CPU process for each byte that torch has in use for activations and buffers: glibc keeps freed blocks.
Between 1.5 and 1.6 were seen over thirty steps of a model of 135 million parameters, and 1.9 in longer runs."""
PROCESS: Final = GIB * 7 // 8
"""Resident bytes of a process that has imported torch, transformers and PEFT, and nothing else."""
CONTEXT: Final = GIB * 5 // 4
"""What CUDA, NCCL and cuBLAS take of a GPU before anything is trained."""
CUDA_FACTOR: Final = 1.08
"""For what PyTorch's CUDA allocator cannot use between its blocks."""
NF4: Final = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a weight that is packed: 4 bits, and for each 64 of them a scale of 8 bits, of which 256 have a float32 one."""
LOGITS: Final[dict[Device, int]] = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Logits that the loss head holds at once: on a CPU so few that they stay in its cache, on a GPU so many that its cores are
busy."""
TRAINED_LOGITS: Final = 1 << 25
"""The same of a head that is trained, whose whole gradient each chunk is added to: fewer and larger ones."""
LEAST_ROWS: Final = 64
"""A product of fewer rows takes twice the time, whatever stays in a cache then: of 262,144 words 16 would be left."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Statistics of the documents."""

    learnt: float
    """Share of the tokens that are targets."""
    length: float
    """Mean length of the document that a token lies in: sum of squared lengths over sum of lengths."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained."""

    tokens: int
    """Of a micro-batch."""
    full: bool = False
    """All weights are trained, and there are no adapters."""
    shards: int = 1
    """Ranks that hold the base model together."""
    rank: int = 16
    targets: Set[str] | None = None
    """Last parts of the names of the adapted Linears; None: all of the decoder."""
    dora: bool = False
    dropout: bool = False
    nf4: bool = False
    """The decoder's Linears are packed, and each is unpacked where it is multiplied."""
    device: Device = "cpu"
    micro_batches: int = 1
    """Of an optimizer step: their gradients are leaves of a tree, whose partial sums are held."""
    recompute: bool = False
    """Only the layers' inputs are kept, and each layer is computed again in the backward pass."""
    parameters: int | None = None
    """Of the base model, where they were counted; else by the shape."""
    trained: int | None = None
    """Parameters that are trained, where they were counted; else by the shape."""

    @property
    def size(self) -> int:
        """Bytes of a number that the base model computes with: fp32 on a CPU, bf16 on a GPU."""
        return 4 if self.device == "cpu" else 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its peak, by what they are for."""

    weights: int
    """Of the frozen base model, or the rank's share of it."""
    state: int
    """Trained parameters, their gradients and partial sums, AdamW's moments, the copy that is being saved, and of a model
    that ranks share what is gathered for a pass."""
    activations: int
    """Kept for the backward pass."""
    work: int
    """Buffers of the largest step of a backward pass."""
    head: int
    """The logits that the loss head holds at once; never at the same time as `work`."""
    device: Device = field(default="cpu")

    @property
    def live(self) -> int:
        """What torch has allocated at the peak."""
        return self.weights + self.state + self.activations + max(self.work, self.head)

    @property
    def resident(self) -> int:
        """What the worker needs: of a CPU process with what its allocator keeps, of a GPU with what drivers take."""
        if self.device == "cuda":
            return round(CUDA_FACTOR * self.live) + CONTEXT
        return round(PROCESS + self.weights + self.state + RESIDENT_FACTOR * (self.activations + max(self.work, self.head)))


# -- bytes -------------------------------------------------------------------------------------------------------------


def memory(shape: Shape, data: Data, setup: Setup) -> Memory:
    return _whole(shape, data, setup) if setup.full else _adapted(shape, data, setup)


def _whole(shape: Shape, data: Data, setup: Setup) -> Memory:
    """A rank's share in fp32, gradients and moments; the layers that are gathered for a pass, and their gradients."""
    trained = setup.trained or shape.parameters
    around = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    layer = max(0, shape.parameters - around) // shape.layers
    # Of two layers and what lies around them the weights, of one the gradient and what of it is sent, which is fp32.
    gathered = setup.size * (2 * layer + around) + (setup.size + 4) * (layer + around)
    # What is being saved is copied to the host's memory.
    copies = 3 if setup.device == "cpu" else 0
    scored = min(rows_scored(TRAINED_LOGITS, shape.vocabulary), math.ceil(data.learnt * setup.tokens))
    # fp32 scores and their shares, in bf16 too on a GPU; the head's own gradient.
    logit = 8 if setup.device == "cpu" else 12
    return Memory(
        weights=4 * (setup.parameters or shape.parameters) // setup.shards,
        state=4 * trained * (1 + 2 + copies) // setup.shards + gathered,
        activations=round(setup.tokens * saved_per_token(shape, data, setup)),
        work=_work(shape, data, setup),
        head=scored * shape.vocabulary * logit * (3 if shape.squashed else 1) + 4 * shape.vocabulary * shape.hidden,
        device=setup.device,
    )


def rows_scored(logits: int, vocabulary: int) -> int:
    """Rows that the loss head scores at once."""
    return max(LEAST_ROWS, logits // vocabulary)


def _adapted(shape: Shape, data: Data, setup: Setup) -> Memory:
    trained = setup.trained or shape.lora(setup.rank, setup.targets, dora=setup.dora)
    partial_sums = 1 + max(0, setup.micro_batches - 1).bit_length()
    scored = min(rows_scored(LOGITS[setup.device], shape.vocabulary), math.ceil(data.learnt * setup.tokens))
    # bf16 logits, the same in fp32, and their gradient in bf16.
    logit = 4 if setup.device == "cpu" else 8
    return Memory(
        weights=_weights(shape, setup),
        state=4 * trained * (1 + 1 + partial_sums + 2 + 3) + _gathered(shape, setup),
        activations=round(setup.tokens * saved_per_token(shape, data, setup)),
        work=_work(shape, data, setup),
        head=scored * shape.vocabulary * logit * (3 if shape.squashed else 1),
        device=setup.device,
    )


def _weights(shape: Shape, setup: Setup) -> int:
    parameters = setup.parameters or shape.parameters
    packed = min(shape.packable, parameters) if setup.nf4 else 0
    # Scales stay whole on each rank.
    return round(((parameters - packed) * setup.size + packed * 0.5) / setup.shards + packed * (NF4 - 0.5))


def _gathered(shape: Shape, setup: Setup) -> int:
    """Bytes of a frozen base model that ranks share: what lies around its layers, for all of a pass; of two layers the
    weights, and of one the buffer that they came in."""
    if setup.shards == 1:
        return 0
    packed = shape.packable if setup.nf4 else 0
    layers = max(0, shape.parameters - (1 if shape.tied else 2) * shape.vocabulary * shape.hidden)
    around = max(0, (setup.parameters or shape.parameters) - layers)
    return round(around * setup.size + 3 / shape.layers * ((layers - packed) * setup.size + packed * 0.5))


def saved_per_token(shape: Shape, data: Data, setup: Setup) -> float:
    """Bytes that a backward pass keeps for each token."""
    size, hidden = setup.size, shape.hidden
    # What a norm gives before its weight, for the weight's gradient.
    normed = size * hidden if setup.full else 0
    layer = _saved_by_attention(shape, data, setup) + _saved_by_mlps(shape, setup) / shape.layers
    layer += shape.norms * (4 * hidden + 4 + normed) - _kept_by_linears(shape, setup)
    # Each target row's gradient, its number and log-probability; the last norm; the angles of the rotary embedding.
    around = (
        data.learnt * (size * hidden + 12) + 4 * hidden + 4 + normed + shape.ropes * 2 * size * shape.query / shape.heads
    )
    if setup.recompute:
        return around + layer + shape.layers * size * hidden
    return around + shape.layers * layer - _not_in_the_first_layer(shape, data, setup)


def _kept_by_linears(shape: Shape, setup: Setup) -> int:
    """Bytes a token of what a layer's norms keep, where that is their result and the Linears after them keep it too."""
    if not (shape.norms_invert and shape.norms_first) or setup.full or setup.size != 4:
        return 0
    adapted = shape.adapted(setup.targets)
    after = [_incoming(shape), () if shape.experts and not shape.shared else _opening(shape)]
    return 4 * shape.hidden * sum(any(name in adapted for name in names) for names in after)


def _not_in_the_first_layer(shape: Shape, data: Data, setup: Setup) -> float:
    """Bytes a token: what comes before the first adapted Linear of all has nothing to go back to."""
    if setup.full:
        return 0
    norm = 4 * shape.hidden + 4
    adapted = shape.adapted(setup.targets)
    first: float = norm if shape.norms_first else 0
    if any(name in adapted for name in _incoming(shape)):
        # Those Linears keep what the norm gives, whoever else does.
        return 4 if first and _kept_by_linears(shape, setup) else first
    first += _saved_by_attention(shape, data, setup)
    if "o_proj" in adapted:
        return first - _adapter_rows(shape, setup, "o_proj") - setup.size * shape.query
    return first + norm


def _incoming(shape: Shape) -> tuple[str, ...]:
    """The Linears that give queries, keys and values."""
    return ("qkv_proj",) if shape.fused else ("q_proj", "k_proj", "v_proj")


def _opening(shape: Shape) -> tuple[str, ...]:
    """The Linears that an MLP begins with."""
    return ("gate_up_proj",) if shape.fused_mlp else ("gate_proj", "up_proj") if shape.gated else ("c_fc",)


def _adapter_rows(shape: Shape, setup: Setup, *names: str) -> float:
    """Bytes of the adapters of `names`: rank-sized rows, and with dropout or DoRA what PEFT's own forward keeps."""
    adapted = shape.adapted(setup.targets)
    total = 0.0
    for name in names:
        if name in adapted:
            inputs, outputs = adapted[name]
            total += setup.size * setup.rank
            # Dropped inputs and their mask.
            total += inputs * (setup.size + 1) if setup.dropout else 0
            total += 2 * outputs * setup.size if setup.dora else 0
    return total


def _saved_by_attention(shape: Shape, data: Data, setup: Setup) -> float:
    size, query, key = setup.size, shape.query, shape.key
    adapted = shape.adapted(setup.targets)
    incoming = _incoming(shape)
    saved = _adapter_rows(shape, setup, *incoming, "o_proj")
    saved += size * shape.hidden if any(name in adapted for name in incoming) else 0
    if shape.head_norms:
        saved += (4 + (size if setup.full else 0)) * (query + key) + 4 * (shape.heads + shape.pairs)
    # A view of the values keeps all that the fused Linear gave.
    values = query + 2 * key if shape.fused else key
    outgoing = query if "o_proj" in adapted else 0
    if shape.squashed:
        # Keys and values for every head, the squashed scores, their shares in fp32.
        return saved + size * (3 * query + outgoing) + shape.heads * data.length * (size + 4)
    # On a CPU each document's result is kept by the kernel, and all of them joined by the Linear that follows.
    result = query + outgoing if setup.device == "cpu" else query
    return saved + size * (query + key + values + result) + 4 * shape.heads


def _saved_by_mlps(shape: Shape, setup: Setup) -> float:
    """By those of all layers."""
    plain = shape.plain_layers * _saved_by_dense(shape, setup, shape.plain_inner)
    return plain + (shape.layers - shape.plain_layers) * _saved_by_mlp(shape, setup)


def _saved_by_mlp(shape: Shape, setup: Setup) -> float:
    if not shape.experts:
        return _saved_by_dense(shape, setup, shape.inner)
    size, chosen = setup.size, shape.chosen
    # Gate and up together, what the gate lets through, and each expert's answer; three permutations; the router's shares.
    routed = chosen * (size * (shape.hidden + 3 * shape.inner) + 3 * 8) + 4 * shape.experts + 4 * chosen * size
    if setup.full:
        # What the experts' weights are multiplied by.
        routed += chosen * size * (shape.hidden + shape.inner)
    return routed + (_saved_by_dense(shape, setup, shape.shared) if shape.shared else 0)


def _saved_by_dense(shape: Shape, setup: Setup, inner: int) -> float:
    size, adapted = setup.size, shape.adapted(setup.targets)
    names = _opening(shape)
    out = "down_proj" if shape.gated else "c_proj"
    saved = _adapter_rows(shape, setup, *names, out)
    saved += size * shape.hidden if any(name in adapted for name in names) else 0
    product = inner if out in adapted else 0
    if not shape.gated:
        return saved + size * (inner + product)
    return saved + size * (2 * inner if _gate_again(shape, setup) else 3 * inner + product)


def _gate_again(shape: Shape, setup: Setup) -> bool:
    """Whether the patch computes act(gate) and its product with up again: it needs both as Linears, and LoRA on the last."""
    adapted = "down_proj" in shape.adapted(setup.targets) and not setup.full
    return adapted and not shape.fused_mlp and not setup.dropout and not setup.dora


def _work(shape: Shape, data: Data, setup: Setup) -> int:
    """Bytes of the largest step of a backward pass, over what is kept at its beginning. The steps run backwards, so each
    finds free what those before it needed: of the last layer the MLP comes first, then the attention."""
    size, hidden, tokens = setup.size, shape.hidden, setup.tokens
    free = data.learnt * hidden + hidden
    mlp = size * (_mlp_rows(shape, setup) - free)
    # The MLP's norm is through by then: one that has to have its input still holds what its own backward pass made.
    around = hidden if _kept_by_linears(shape, setup) else 2 * hidden
    attention = size * (3 * shape.query + 4 * shape.key + around - free) - _saved_by_mlp(shape, setup)
    # Scores of one document at a time.
    scores = 2 * size * shape.heads * data.length * min(data.length, tokens) if shape.squashed else 0
    unpacked = size * max(inputs * outputs for inputs, outputs in shape.linears.values()) if setup.nf4 else 0
    return unpacked + max(0, round(tokens * mlp), round(tokens * attention + scores))


def _mlp_rows(shape: Shape, setup: Setup) -> float:
    """Numbers a token that the backward pass of the last MLP has at once."""
    hidden = shape.hidden
    if shape.experts:
        return shape.chosen * (2 * hidden + 3 * shape.inner) + (4 * shape.shared if shape.shared else 0)
    if not shape.gated:
        return shape.inner + 2 * hidden
    return (4 if _gate_again(shape, setup) else 2) * shape.inner + hidden


def tokens_that_fit(shape: Shape, data: Data, setup: Setup, room: int) -> int:
    """The most tokens of a micro-batch for which `resident` is at most `room` bytes; 0 if nothing fits."""
    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        if memory(shape, data, replace(setup, tokens=middle)).resident <= room:
            low = middle
        else:
            high = middle - 1
    return low


# -- operations --------------------------------------------------------------------------------------------------------


def flops_per_token(
    shape: Shape, data: Data, rank: int, targets: Set[str] | None = None, *, recompute: bool = False, full: bool = False
) -> float:
    """Needed floating-point operations of a training token, forward and backward, with nothing computed twice but what
    `recompute` asks for.

    2 a weight and pass: a frozen Linear has two passes (forward, and the gradient of its input, which the first layer's
    queries, keys and values do not need), a LoRA matrix three. Causal attention of a document of L tokens has two
    products of L/2 keys forward and five backward. `full`: each weight has three passes.
    """
    if full:
        weights = shape.layers * (shape.attention + shape.mlp)
        head = 6 * shape.vocabulary * shape.hidden * data.learnt
        attention = (9 if recompute else 7) * shape.query * shape.layers * data.length
        return 2 * (4 if recompute else 3) * weights + head + attention
    passes = 3 if recompute else 2
    linears = 2 * passes * shape.layers * (shape.attention + shape.mlp) - 2 * shape.hidden * (shape.query + 2 * shape.key)
    head = 4 * shape.vocabulary * shape.hidden * data.learnt
    attention = (9 if recompute else 7) * shape.query * shape.layers * data.length
    return linears + (8 if recompute else 6) * shape.lora(rank, targets) + head + attention

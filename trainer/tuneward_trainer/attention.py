"""Attention over documents that share a row: document by document on a CPU, one variable-length kernel on a GPU.

It is called by transformers' models in place of their own attention. A model passes down whatever its attention needs
(window, soft-cap, sinks) as keywords, so an unknown one is refused: swallowed, it would train a different model without
a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary

_KERNEL: Final[Callable[..., Any]] = varlen_attn
_KEYWORDS: Final = frozenset(inspect.signature(varlen_attn).parameters)
"""They differ between torch 2.11 and 2.15."""
_LENGTHS: Final[MutableMapping[Tensor, list[int]]] = WeakTensorKeyDictionary()
"""Of a row's documents, by the tensor of their bounds."""
_HARMLESS: Final = frozenset(
    {
        # Already in the rotated queries and keys.
        "position_ids",
        "position_embeddings",
        # The bounds say the same.
        "cu_seq_lens_k",
        "max_length_k",
        "seq_idx",
        # About caches and outputs that training does not ask for.
        "use_cache",
        "cache_position",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)


def tell_lengths(cu: Tensor, bounds: Sequence[int]) -> None:
    """What the host knows of `cu`: where a layer takes documents one by one, it need not wait for a GPU to ask it."""
    if len(cu) == len(bounds):  # padding has documents of its own
        _LENGTHS[cu] = [stop - start for start, stop in pairwise(bounds)]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, d], key and value [1, kv heads, T, d or dv] -> [1, T, heads, dv]."""
    asked = {name for name, said in others.items() if isinstance(said, Tensor) or said not in (None, False)}
    unknown = sorted(asked - _HARMLESS)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if unknown or attention_mask is not None or dropout or not causal or query.shape[0] != 1 or cu_seq_lens_q is None:
        raise NotImplementedError(
            f"packed attention takes one causal row with cu_seq_lens_q and no mask or dropout; {type(module).__name__} gave "
            f"{unknown or 'other arguments'}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if on_gpu(query) and softcap is None and s_aux is None:
        return _varlen(query, key, value, cu_seq_lens_q, int(max_length_q or 0), scale, sliding_window), None
    if torch.compiler.is_compiling():
        if softcap is not None or s_aux is not None:
            raise NotImplementedError("a graph can hold no kernel for a soft-cap or sinks")
        return _as_one_graph(query, key, value, cu_seq_lens_q, scale, sliding_window), None
    attend = functools.partial(_document, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
    # split and cat, not slices: the backward pass of a slice fills a whole tensor with zeros, for each document.
    lengths = _LENGTHS.get(cu_seq_lens_q) or cu_seq_lens_q.diff().tolist()
    parts = zip(torch.split(query, lengths, 2), torch.split(key, lengths, 2), torch.split(value, lengths, 2), strict=True)
    # torch's kernel writes [1, L, heads, dv] and shows it transposed: back again, the result of one document is no copy.
    found = [attend(q, k, v).transpose(1, 2) for q, k, v in parts]
    return found[0] if len(found) == 1 else torch.cat(found, 1), None


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _as_one_graph(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, window: int | None) -> Tensor:
    """In a compiled layer on a CPU, to check its graph: a mask keeps documents apart, and nobody asks for their lengths."""
    places = torch.arange(q.shape[2], device=q.device)
    document = torch.bucketize(places, cu[1:].long(), right=True)
    gap = places[:, None] - places
    seen = (document[:, None] == document) & (gap >= 0)
    if window is not None:
        seen = seen & (gap < window)
    grouped = q.shape[1] != k.shape[1]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _document(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One document: [1, heads, L, d] -> [1, heads, L, dv]."""
    length = q.shape[2]
    narrow = window is not None and window < length
    if softcap is not None or sinks is not None:
        return _written_out(q, k, v, scale, _band(length, window, q.device), softcap, sinks)
    grouped = q.shape[1] != k.shape[1]
    if narrow:
        mask = _band(length, window, q.device)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


@functools.lru_cache(maxsize=64)
def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [L, L]: query i sees keys i - window + 1 … i."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """What no kernel does: scores squashed by a soft-cap (Gemma 2), or a learnt score that takes weight and gives
    nothing (gpt-oss's sinks, one a head)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, column], -1)
    shares = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return shares[..., : k.shape[2]] @ v


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int | None) -> Tensor:
    """torch's variable-length kernel (torch >= 2.11, bf16 or fp16). Values narrower than keys (MLA) are padded."""
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = nn.functional.pad(v, (0, q.shape[-1] - width))
    tokens = [tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v)]
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _KEYWORDS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        tokens[1:] = [tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in tokens[1:]]
    # The very same `cu` twice: one of the kernels only knows by identity that queries and keys have the same bounds.
    out: Tensor = _KERNEL(*tokens, cu, cu, longest, longest, **options)
    return out[None, ..., :width]

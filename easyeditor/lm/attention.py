"""Attention for replay on a CPU: two batched products over grouped heads, with no copy of keys or values.

torch's fused kernel is made for long sequences. Replay asks for a handful of query tokens against a short prefix, and
with grouped heads the model first repeats keys and values for every query head. Folding the query heads of a group
into the query axis needs neither (10 to 12 % of a step on SmolLM2; `docs/performance.md`).

Axes: B rows, H query heads, G key/value heads, S query tokens, T prefix + query tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "easyeditor_grouped"
REPLACES = "sdpa"  # a model that was told to attend in another way keeps it
TAKES = {"position_ids", "is_causal", "sliding_window", "use_cache", "output_attentions", "output_hidden_states"}


def short_attention(model: PreTrainedModel) -> Any:
    """A context in which `model` attends by grouped products, if it runs on a CPU with the default attention."""
    usual = getattr(model.config, "_attn_implementation", None) == REPLACES
    return _switched(model) if usual and model.device.type == "cpu" else nullcontext()


@contextmanager
def _switched(model: PreTrainedModel) -> Iterator[None]:
    AttentionInterface.register(NAME, grouped)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = REPLACES


def grouped(
    module: torch.nn.Module,
    query_BHSd: Tensor,
    key_BGTd: Tensor,
    value_BGTd: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **other: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v, returned as (B, S, H, d); the mask is additive, (B or 1, 1, S, T)."""
    unknown = [name for name, value in other.items() if name not in TAKES and value is not None]
    assert not unknown, f"grouped attention does not know {unknown}"
    assert not (dropout and module.training), "replay runs in evaluation mode"
    b, heads, s, width = query_BHSd.shape
    g, t = key_BGTd.shape[1], key_BGTd.shape[2]
    fold = heads // g
    query = query_BHSd.reshape(b * g, fold * s, width)
    scores = torch.bmm(query, key_BGTd.reshape(b * g, t, width).transpose(1, 2))
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = (scores.view(b, g, fold, s, t) + attention_mask.unsqueeze(2)).view(b * g, fold * s, t)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value_BGTd.dtype)
    mixed = torch.bmm(weights, value_BGTd.reshape(b * g, t, width))
    return mixed.view(b, heads, s, width).transpose(1, 2).contiguous(), None

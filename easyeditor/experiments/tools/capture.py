"""Keys at every token and every layer of a text, in a decoder or an encoder. Axes: L layers, T tokens, K width."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from easyeditor.lm.architectures import Anatomy, encoder_projections
from easyeditor.lm.hooks import captured
from easyeditor.lm.loading import input_device
from easyeditor.lm.tokens import model_inputs, pad
from easyeditor.lm.weights import frozen

Array = np.ndarray[Any, np.dtype[np.float32]]


def decoder_keys(parts: Anatomy, ids: Sequence[int]) -> Array:
    """Inputs (L, T, K) of every block's edited projection for one text."""
    modules = [parts.rewrite(layer) for layer in range(len(parts.blocks))]
    inputs = model_inputs([ids], input_device(parts.model))
    return _captured(parts.model, modules, {**inputs, "use_cache": False}, parts.model)


def encoder_keys(model: PreTrainedModel, ids: Sequence[int]) -> Array:
    """Inputs (L, T, K) of the encoder's MLP output projections for one text."""
    ids_1T, mask_1T = pad([ids], input_device(model))
    inputs = {"input_ids": ids_1T, "attention_mask": mask_1T}
    return _captured(model, encoder_projections(model), inputs, model.get_encoder())


@torch.no_grad()
def _captured(
    model: PreTrainedModel, modules: Sequence[nn.Module], inputs: dict[str, Any], forward: nn.Module
) -> Array:
    with frozen(model), ExitStack() as stack:
        seen = [stack.enter_context(captured(module)) for module in modules]
        forward(**inputs)
    return np.stack([own.given[0].float().cpu().numpy() for own in seen])

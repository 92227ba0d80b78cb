"""Every model-specific fact, keyed by `config.model_type` and by layer class; no other file has any."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from easyeditor.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a decoder keeps its parts; `{}` stands for the layer number.

    `replay` says that the blocks pass one hidden state on and attend through a key-value cache, so that a run
    can start at any block and any token (lm/replay.py). `mlp_adds` says that the MLP's output is added to the block's
    as it is, with no norm or scale between.
    """

    block: str
    mlp: str
    rewrite: str
    replay: bool = True
    mlp_adds: bool = True


_LLAMA = Architecture(block="model.layers.{}", mlp="model.layers.{}.mlp", rewrite="model.layers.{}.mlp.down_proj")
_GEMMA2 = dataclasses.replace(_LLAMA, mlp_adds=False)  # a norm after the MLP
_GPT2 = Architecture(block="transformer.h.{}", mlp="transformer.h.{}.mlp", rewrite="transformer.h.{}.mlp.c_proj")
_GPTJ = Architecture(block="transformer.h.{}", mlp="transformer.h.{}.mlp", rewrite="transformer.h.{}.mlp.fc_out")
_NEOX = Architecture(
    block="gpt_neox.layers.{}", mlp="gpt_neox.layers.{}.mlp", rewrite="gpt_neox.layers.{}.mlp.dense_4h_to_h"
)

ARCHITECTURES: dict[str, Architecture] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "gptj": _GPTJ,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


_OLD_BUFFER = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|(^|\.)rotary_emb\.inv_freq$")


def is_old_buffer(name: str) -> bool:
    """Is this a causal mask or rotary table, which checkpoints of GPT-2, GPT-J, GPT-NeoX and Llama once kept?"""
    return bool(_OLD_BUFFER.search(name))


def is_encoder(model: PreTrainedModel) -> bool:
    """Is this a model of masked words (BERT and its kin), loaded without being made a decoder?"""
    masked = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(model.config, "is_decoder", False)


_T5 = "encoder.block.{}.layer.1.DenseReluDense.wo"
ENCODERS: dict[str, str] = {"mt5": _T5, "t5": _T5, "umt5": _T5}
"""Output projection of the MLP in the encoder of an encoder-decoder, `{}` for the layer: its input is a key too."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of one model that editing touches, resolved and checked."""

    model: PreTrainedModel
    architecture: Architecture

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, first to last."""
        parent, _, _ = self.architecture.block.rpartition(".")
        return list(self.model.get_submodule(parent).children())

    def block(self, layer: int) -> nn.Module:
        """Decoder block `layer`."""
        return self.model.get_submodule(self.architecture.block.format(layer))

    def mlp(self, layer: int) -> nn.Module:
        """MLP of block `layer`: its output is the value ROME searches."""
        return self.model.get_submodule(self.architecture.mlp.format(layer))

    def rewrite(self, layer: int) -> nn.Module:
        """The projection whose weight is edited; its input is the key."""
        return self.model.get_submodule(self.architecture.rewrite.format(layer))

    def rewrite_name(self, layer: int) -> str:
        """Module path of `rewrite(layer)`."""
        return self.architecture.rewrite.format(layer)

    def weight_name(self, layer: int) -> str:
        """Parameter name of the edited weight."""
        return self.rewrite_name(layer) + ".weight"

    def key_width(self, layer: int) -> int:
        """Width K of the keys at `layer`: the inputs of the edited projection."""
        weight = self.model.get_parameter(self.weight_name(layer))
        return int(weight.shape[0 if weight_is_transposed(self.rewrite(layer)) else 1])

    def check_layers(self, layers: list[int], key: str = "layers") -> None:
        """Raise ConfigError unless every layer exists."""
        count = len(self.blocks)
        for layer in layers:
            if not 0 <= layer < count:
                raise ConfigError(
                    f"{key}: layer {layer} is out of range; {type(self.model).__name__} has layers 0 to {count - 1}"
                )

    def layer_of(self, parameter: str) -> int | None:
        """The block a parameter name belongs to, or None when it lies outside the blocks."""
        before, _, after = self.architecture.block.partition("{}")
        match = re.match(re.escape(before) + r"(\d+)" + re.escape(after) + r"\.", parameter)
        return int(match.group(1)) if match else None


def anatomy(
    model: PreTrainedModel, *, block: str | None = None, mlp: str | None = None, rewrite: str | None = None
) -> Anatomy:
    """Find a model's parts: by its type, or by the templates a YAML gives (which win and must exist in the model).

    Raises:
        ConfigError: unknown model type without templates, or a template that names no module of this model.
        ModelError: the rewrite module is not a Linear or Conv1D layer.
    """
    kind = model.config.model_type
    known = ARCHITECTURES.get(kind)
    if known is None and not (block and mlp and rewrite):
        raise ConfigError(
            f"model type {kind!r} is not known ({', '.join(sorted(ARCHITECTURES))} are); set layer_module_tmp, "
            "mlp_module_tmp and rewrite_module_tmp in the YAML"
        )
    found = Architecture(
        block=block or _of(known).block,
        mlp=mlp or _of(known).mlp,
        rewrite=rewrite or _of(known).rewrite,
        replay=known is not None and block in (None, known.block),
        mlp_adds=known is not None and known.mlp_adds and mlp in (None, known.mlp),
    )
    parts = Anatomy(model=model, architecture=found)
    for key, template in (
        ("layer_module_tmp", found.block),
        ("mlp_module_tmp", found.mlp),
        ("rewrite_module_tmp", found.rewrite),
    ):
        _check_template(model, key, template)
    weight_is_transposed(parts.rewrite(0))
    return parts


def attention_of(parts: Anatomy, layer: int) -> nn.Module | None:
    """The attention of block `layer`: of the block's children beside the MLP that hold projections, the largest; None
    where there is no such child."""
    block, mlp = parts.block(layer), parts.mlp(layer)
    sizes = {
        child: sum(p.numel() for p in child.parameters())
        for child in block.children()
        if mlp not in child.modules() and any(isinstance(m, (nn.Linear, Conv1D)) for m in child.modules())
    }
    return max(sizes, key=lambda child: sizes[child]) if sizes else None


def weight_is_transposed(module: nn.Module) -> bool:
    """True for Conv1D, whose weight is (inputs, outputs); False for Linear, (outputs, inputs)."""
    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise ModelError(
        f"cannot edit a {type(module).__name__}; the rewrite module must be an unquantised torch Linear or GPT-2 Conv1D"
    )


def encoder_projections(model: PreTrainedModel) -> list[nn.Module]:
    """The MLP output projections of an encoder-decoder's encoder, first to last. Raises ConfigError: unknown type."""
    kind = model.config.model_type
    if kind not in ENCODERS:
        raise ConfigError(f"encoder of model type {kind!r} is not known; {', '.join(sorted(ENCODERS))} are")
    blocks = model.get_submodule(ENCODERS[kind].partition(".{}")[0])
    return [model.get_submodule(ENCODERS[kind].format(layer)) for layer, _ in enumerate(blocks.children())]


def type_of(model: PreTrainedModel) -> tuple[str, bool]:
    """The model's type, and whether the table has it."""
    return model.config.model_type, model.config.model_type in ARCHITECTURES


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence the model has positions for, or None when its config does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def attention_reach(parts: Anatomy, layer: int) -> float:
    """How many tokens further on the attention above block `layer` can carry what that block writes.

    Infinite where any later layer attends to everything; each layer of sliding attention with window W carries it
    W - 1 tokens. After the last layer 0.
    """
    config, count = parts.model.config.get_text_config(), len(parts.blocks)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count  # without the list, all slide
    later = kinds[layer + 1 : count]
    if window is None:
        return math.inf if later else 0.0
    return sum((window - 1.0 if kind == "sliding_attention" else math.inf for kind in later), 0.0)


def _of(known: Architecture | None) -> Architecture:
    assert known is not None
    return known


def _check_template(model: PreTrainedModel, key: str, template: str) -> None:
    modules = {name for name, _ in model.named_modules()}
    if template.format(0) in modules:
        return
    near = difflib.get_close_matches(template.format(0), sorted(modules), n=1)
    hint = f"; near: {near[0].replace('.0', '.{}', 1)!r}" if near else ""
    raise ConfigError(
        f"{key}: {template!r} names no module of {type(model).__name__} ({model.config.model_type}){hint}"
    )

"""Every model-specific fact, keyed by `config.model_type` and by layer class; no other file has any."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from easyeditor.base.errors import ConfigError, ModelError


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
    """Is this a model of masked words (BERT and its variants), loaded without being made a decoder?"""
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
        """The projection whose weight is edited; its input is the key. Raises ModelError: a mixture of experts."""
        self.check_dense([layer])
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

    @cached_property
    def experts(self) -> dict[int, str]:
        """The layers that are mixtures of experts, with the path of the experts in the block."""
        width = getattr(self.model.config.get_text_config(), "hidden_size", None)
        width = width or self.model.get_input_embeddings().weight.shape[1]
        found = {layer: experts_in(block, width) for layer, block in enumerate(self.blocks)}
        return {layer: path for layer, path in found.items() if path is not None}

    @property
    def dense(self) -> list[int]:
        """The layers that are no mixtures of experts: those that can be edited."""
        return [layer for layer in range(len(self.blocks)) if layer not in self.experts]

    def check_dense(self, layers: Iterable[int]) -> None:
        """Raise ModelError for a layer that is a mixture of experts."""
        for layer in layers:
            if layer in self.experts:
                dense = ", ".join(map(str, self.dense))
                raise ModelError(
                    f"layer {layer} is a mixture of experts ({self.experts[layer]}): its facts are in no single "
                    "projection, so it cannot be edited; "
                    + (f"layers that can be: {dense}" if dense else "so are all layers here: take a dense model")
                )

    def check_layers(self, layers: list[int], key: str = "layers") -> None:
        """Raise ConfigError unless every layer exists, ModelError for a mixture of experts."""
        self.check_range(layers, key)
        self.check_dense(layers)

    def check_range(self, layers: list[int], key: str) -> None:
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


def tabled(model: PreTrainedModel) -> Architecture | None:
    """The table's row for a model's type; None for a type that is not known."""
    return ARCHITECTURES.get(model.config.model_type)


def experts_in(block: nn.Module, width: int) -> str | None:
    """The path of a mixture's experts in a block; None where it has none. `width` is the hidden one.

    Experts are modules named so, a parameter with a matrix from or to the hidden width for each of them, or a list of
    equal modules with a router of as many outputs.
    """
    for path, module in block.named_modules():
        if "expert" in path.rpartition(".")[2] and any(True for _ in module.parameters()):
            return path
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1 and len(module) > 1:
            routed = {len(module), width}
            if any(p.ndim == 2 and set(p.shape) == routed for p in block.parameters()):
                return path
        for name, own in [] if isinstance(module, _ConvNd) else module.named_parameters(recurse=False):
            if own.ndim == 3 and own.shape[0] > 1 and width in own.shape[1:]:
                return f"{path}.{name}".strip(".")
    return None


def attention_of(parts: Anatomy, layer: int) -> nn.Module | None:
    """The attention of block `layer`: of the block's children besides the MLP that hold projections, the largest; None
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


def left_out(model: PreTrainedModel) -> list[str]:
    """Parts of a multimodal checkpoint (`vision` …) that the model loaded from it does not have, by their configs."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(model.name_or_path or "none", local_files_only=True)
    except OSError:  # a model that Python made, or that lay elsewhere
        return []
    parts = {key for key, value in raw.items() if key.endswith("_config") and isinstance(value, Mapping)}
    named = {key for key in parts - model.config.to_dict().keys() - {"text_config"} if "model_type" in raw[key]}
    return sorted(key.removesuffix("_config") for key in named)


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence the model has positions for, or None when its config does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def longest(model: PreTrainedModel, wanted: int) -> int:
    """The most tokens of a text: `wanted`, or the model's positions where they are fewer."""
    return min(wanted, max_positions(model) or wanted)


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


def check_template(model: PreTrainedModel, key: str, template: str, layer: int) -> None:
    """Raise ConfigError, with a near name, unless `template` names a module of this model at `layer`."""
    modules = {name for name, _ in model.named_modules()}
    if template.format(layer) in modules:
        return
    near = difflib.get_close_matches(template.format(layer), sorted(modules), n=1)
    hint = f"; near: {near[0].replace(f'.{layer}', '.{}', 1)!r}" if near else ""
    raise ConfigError(
        f"{key}: {template!r} names no module of {type(model).__name__} ({model.config.model_type}){hint}"
    )

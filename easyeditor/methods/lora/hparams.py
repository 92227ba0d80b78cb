"""LoRA's hyper-parameters: the keys of EasyEdit's files, and ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from easyeditor.base.hparams import require
from easyeditor.methods.hparams import ModuleHyperParams

LOG = logging.getLogger(__name__)

L = TypeVar("L", bound="LoRAHyperParams")


@dataclass(kw_only=True)
class LoRAHyperParams(ModuleHyperParams):
    """Fine-tuning through low-rank adapters (Hu et al. 2021), which then become the edit."""

    alg_name: str = "LoRA"
    target_modules: list[str]
    """How the paths of the adapted modules end: `q_proj`, `mlp.down_proj`, or whole paths."""
    layers: list[int] = field(default_factory=list)
    """Blocks whose modules are adapted; empty: all of them."""
    num_steps: int
    """Most passes over the requests."""
    lr: float
    """Adam step size."""
    rank: int = 8
    """Rank of each adapter."""
    lora_alpha: float = 32.0
    """What an adapter gives is multiplied by this over the rank."""
    lora_dropout: float = 0.1
    """Share of an adapter's inputs left out in a step, drawn from `seed`."""
    lora_type: Literal["lora", "adalora"] = "lora"
    """`adalora` is in EasyEdit's files, whose code never allocates ranks; it is read as `lora`, with a warning."""
    batch_size: int = 1
    """Requests in one optimiser step."""
    weight_decay: float = 0.0
    """Adam's weight decay."""
    target_eos: bool = True
    """Score the tokenizer's EOS after the target too, as EasyEdit does."""
    max_length: int = 40
    """EasyEdit's key, which cuts training texts there; here nothing is cut: the limit is the model's positions."""

    @classmethod
    def from_dict(cls: type[L], values: Mapping[str, Any], where: str = "hparams") -> L:
        if values.get("lora_type") == "adalora":
            LOG.warning("%s: lora_type 'adalora' is read as 'lora': no rank is allocated, as in EasyEdit", where)
            values = {**values, "lora_type": "lora"}
        return super().from_dict(values, where)

    @property
    def longest_text(self) -> int | None:
        return None

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_positive(where, "num_steps", "rank", "batch_size", allowed="1 or more")
        self.need_positive(where, "lr", "lora_alpha")
        require(0 <= self.lora_dropout < 1, where, "lora_dropout", self.lora_dropout, "0 or more, and below 1")
        self.need_nonnegative(where, "weight_decay")
        ends = self.target_modules
        require(len(set(ends)) == len(ends) > 0 and all(ends), where, "target_modules", ends, "each module once")
        require(len(set(self.layers)) == len(self.layers), where, "layers", self.layers, "each layer once")

"""Low-rank adapters of `peft` in a model, for the length of a block.

Axes: r rank, K width of a module's input, D width of its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from easyeditor.lm.architectures import weight_is_transposed
from easyeditor.values.edit import WeightDelta

NAME = "edit"  # of the adapter in peft's layers


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Rank r, α (what the adapter gives is multiplied by α / r), dropout of what it is given."""

    rank: int
    alpha: float
    dropout: float


class Adapters:
    """The adapters in a model: what is trained, and what they amount to."""

    def __init__(self, model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
        self._model, self._layers = model, layers

    def trained(self) -> dict[str, Tensor]:
        """The parameters of all adapters, by name."""
        return {
            f"{path}.{factor}": getattr(layer, factor)[NAME].weight
            for path, layer in self._layers.items()
            for factor in ("lora_A", "lora_B")
        }

    def deltas(self) -> tuple[WeightDelta, ...]:
        """The change of each weight, exactly: its factors, in the weight's own orientation, float32 or wider."""
        return tuple(self._delta(path, layer) for path, layer in self._layers.items())

    def _delta(self, path: str, layer: nn.Module) -> WeightDelta:
        name = f"{path}.weight"
        base: nn.Module = layer.get_base_layer()  # type: ignore[operator]
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # type: ignore[arg-type]
        down_rK, up_Dr = (getattr(layer, factor)[NAME].weight.detach().to(dtype) for factor in ("lora_A", "lora_B"))
        left, right = up_Dr * layer.scaling[NAME], down_rK.clone()  # type: ignore[index]
        return WeightDelta.of(name, left, right, transposed=weight_is_transposed(base), contiguous=True)


@contextmanager
def adapted(model: PreTrainedModel, paths: Sequence[str], settings: AdapterSettings, seed: int) -> Iterator[Adapters]:
    """Adapters on the modules at `paths` inside the block; every module of the model in its place again after it, also
    on error. All that is drawn inside (first values, dropout) comes from `seed`; the global generators are put back.
    """
    from peft import LoraConfig, inject_adapter_in_model

    before = dict(model.named_modules())
    attributes = set(vars(model))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(paths),
        fan_in_fan_out=weight_is_transposed(before[paths[0]]),
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
            layers = {path: model.get_submodule(path) for path in paths}
            for path, layer in layers.items():
                layer.lora_dropout[NAME].train()
                wide = torch.promote_types(before[path].weight.dtype, torch.float32)
                for factor in ("lora_A", "lora_B"):
                    getattr(layer, factor)[NAME].to(wide)  # Adam's epsilon is 0 in float16
            yield Adapters(model, layers)
    finally:
        for path, module in before.items():
            parent, _, name = path.rpartition(".")
            if path and model.get_submodule(path) is not module:
                setattr(model.get_submodule(parent), name, module)
        for name in set(vars(model)) - attributes:
            delattr(model, name)

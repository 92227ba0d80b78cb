"""What methods share that go by gradients: FT, LoRA, MEND and UltraEdit. They have no keys and no values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from easyeditor.base.errors import ConfigError
from easyeditor.lm.architectures import Anatomy, weight_is_transposed
from easyeditor.lm.discover import anatomy
from easyeditor.methods.base import EditMethod
from easyeditor.methods.hparams import ModuleHyperParams
from easyeditor.values.edit import LayerTrace

G = TypeVar("G", bound=ModuleHyperParams)


@dataclass(frozen=True)
class EditedWeight:
    """One weight that is changed: its parameter name, the block it lies in, its widths and its layout."""

    name: str
    layer: int
    inputs: int
    outputs: int
    transposed: bool

    @property
    def module(self) -> str:
        """Path of the layer that holds the weight."""
        return self.name.removesuffix(".weight")


def edited_weights(parts: Anatomy, names: Sequence[str]) -> tuple[EditedWeight, ...]:
    """Look the named weights up in a model.

    Raises:
        ConfigError: no such parameter, not the weight of a Linear or Conv1D layer, or outside the decoder blocks.
    """
    return tuple(_edited_weight(parts, name) for name in names)


def _edited_weight(parts: Anatomy, name: str) -> EditedWeight:
    where = f"inner_params: {name!r}"
    kind = type(parts.model).__name__
    layer = parts.layer_of(name)
    parts.check_dense([] if layer is None else [layer])
    try:
        weight = parts.model.get_parameter(name)
    except AttributeError as error:
        near = parts.weight_name(len(parts.blocks) - 1)
        raise ConfigError(f"{where} is no parameter of {kind}; it has for example {near!r}") from error
    if layer is None or not name.endswith(".weight") or weight.ndim != 2:
        raise ConfigError(f"{where} is not the weight of a layer inside one of {kind}'s decoder blocks")
    transposed = weight_is_transposed(parts.model.get_submodule(name.removesuffix(".weight")))
    rows, columns = weight.shape
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    return EditedWeight(name, layer, inputs, outputs, transposed)


class GradientMethod(EditMethod[G], Generic[G]):
    """A method that changes weights along gradients, or by training them."""

    def find_parts(self) -> Anatomy:
        return anatomy(self.model, **self.hparams.templates)

    def trace(
        self,
        norms: Mapping[str, float],
        *,
        before: float,
        after: float,
        steps: int,
        losses: Sequence[float] = (),
    ) -> dict[int, LayerTrace]:
        """One request's loss (nats), and how far each layer's weights moved: `norms` by weight, those of all requests
        together where they are written together."""
        size = {
            layer: math.hypot(*(norm for name, norm in norms.items() if self.parts.layer_of(name) == layer))
            for layer in self.layers
        }
        return {
            layer: LayerTrace.without_keys(before=before, after=after, steps=steps, delta_norm=moved, losses=losses)
            for layer, moved in size.items()
        }

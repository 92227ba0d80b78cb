"""Edits as a LoRA adapter of PEFT: exact factors where the change is low rank, a stated error where it is cut.

Axes: r rank, K width of a module's input, D width of its output. PEFT adds scale · B A to a Linear's weight (D, K),
with A (r, K) and B (D, r); to a Conv1D's weight (K, D) it adds the transpose. Here scale = lora_alpha / r = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from easyeditor.base.errors import ConfigError, DataError, ModelError
from easyeditor.lm.architectures import weight_is_transposed
from easyeditor.values.edit import WeightDelta

MAX_RANK = 512  # the largest that vLLM serves (its --max-lora-rank)
WEIGHT = ".weight"
MODEL_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One module's change, B A, and the part of it that was cut: ||change - B A|| / ||change||, 0 where exact."""

    module: str
    transposed: bool
    a_rK: Tensor
    b_Dr: Tensor
    lost: float = 0.0

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b_Dr.shape[1]

    def delta(self) -> WeightDelta:
        """B A as a change of the weight, in the weight's own orientation."""
        return WeightDelta.of(self.module + WEIGHT, self.b_Dr, self.a_rK, transposed=self.transposed)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The factors of every changed module, in the order first changed."""

    factors: tuple[Factors, ...]

    @property
    def rank(self) -> int:
        """The one rank of all modules: the largest; vLLM reads no other."""
        return max(factors.rank for factors in self.factors)

    def tensors(self) -> dict[str, Tensor]:
        """What `adapter_model.safetensors` holds: every module padded with zeros to the one rank."""
        named = {}
        for made in self.factors:
            lacking = self.rank - made.rank
            stem = f"base_model.model.{made.module}"
            named[f"{stem}.lora_A.weight"] = torch.nn.functional.pad(made.a_rK, (0, 0, 0, lacking))
            named[f"{stem}.lora_B.weight"] = torch.nn.functional.pad(made.b_Dr, (0, lacking))
        return named

    def config(self, base: str) -> dict[str, Any]:
        """What `adapter_config.json` holds; without rank_pattern, which vLLM does not read."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(made.transposed for made in self.factors),
            "inference_mode": True,
            "modules_to_save": None,
            "target_modules": [made.module for made in self.factors],
        }


def adapter_of(model: PreTrainedModel, deltas: Sequence[WeightDelta], rank: int | None = None) -> Adapter:
    """The adapter that changes `model` as `deltas` do, added up.

    Low-rank deltas of one weight are set side by side: exact, no SVD. What is dense, or beyond `rank`, is cut to `rank`
    by SVD; without a `rank` it is refused.

    Raises:
        ConfigError: no such rank, or one is needed. DataError: a change of something that PEFT has no adapter for.
    """
    check_rank(rank)
    by_weight: dict[str, list[WeightDelta]] = {}
    for delta in deltas:
        by_weight.setdefault(delta.name, []).append(delta)
    return Adapter(factors=tuple(_factors(model, name, changes, rank) for name, changes in by_weight.items()))


def check_rank(rank: int | None, flag: str = "--rank") -> None:
    """Raise ConfigError unless an adapter can be cut to `rank`."""
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"{flag} is {rank}; allowed: 1 to {MAX_RANK}")


def _factors(model: PreTrainedModel, name: str, changes: Sequence[WeightDelta], rank: int | None) -> Factors:
    module, transposed = _place(model, name)
    dense = any(change.full is not None for change in changes)
    width = 0 if dense else sum(_low_rank(change)[0].shape[1] for change in changes)
    if not dense and width <= (rank or MAX_RANK):
        lefts, rights = zip(*map(_low_rank, changes), strict=True)
        left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=0)
        a_rK, b_Dr = (left.T, right.T) if transposed else (right, left)
        return Factors(module=module, transposed=transposed, a_rK=a_rK, b_Dr=b_Dr)
    if rank is None:
        what = "the whole weight, not few directions of it" if dense else f"{width} directions, above {MAX_RANK}"
        raise ConfigError(
            f"the change of {name} is of {what}: no exact adapter; cut it to a rank (python -m easyeditor.export … "
            "--rank N; the error is stated), or make a whole model (--to checkpoint)"
        )
    return _cut(module, transposed, changes, rank)


def _cut(module: str, transposed: bool, changes: Sequence[WeightDelta], rank: int) -> Factors:
    """The nearest change of that rank (Eckart-Young), solved in float64."""
    whole = sum((change.dense().double() for change in changes[1:]), changes[0].dense().double())
    u_Dr, sizes, v_rK = torch.linalg.svd(whole.T if transposed else whole, full_matrices=False)
    size, dtype = float(sizes.norm()), changes[0].dense().dtype
    return Factors(
        module=module,
        transposed=transposed,
        a_rK=v_rK[:rank].to(dtype),
        b_Dr=(u_Dr[:, :rank] * sizes[:rank]).to(dtype),
        lost=float(sizes[rank:].norm()) / size if size else 0.0,
    )


def _place(model: PreTrainedModel, name: str) -> tuple[str, bool]:
    """A weight's module and its orientation. Raises DataError: PEFT's LoRA cannot change it alone."""
    module = name.removesuffix(WEIGHT)
    whole = "make a whole model of this edit: --to checkpoint"
    if module == name:
        raise DataError(f"{name} is no weight of a layer, and an adapter changes nothing else; {whole}")
    layer = model.get_submodule(module)
    if layer.weight is model.get_input_embeddings().weight:
        raise DataError(f"{name} is the embedding too, which an adapter would leave as it is; {whole}")
    try:
        return module, weight_is_transposed(layer)
    except ModelError as error:
        raise DataError(f"{name} belongs to a {type(layer).__name__}, which has no adapter; {whole}") from error


def _low_rank(change: WeightDelta) -> tuple[Tensor, Tensor]:
    assert change.left is not None
    assert change.right is not None
    return change.left.detach().cpu(), change.right.detach().cpu()


def lost_by_module(adapter: Adapter) -> Mapping[str, float]:
    """The relative error of every module that was cut."""
    return {made.module: made.lost for made in adapter.factors if made.lost}

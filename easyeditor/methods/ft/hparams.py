"""FT's hyper-parameters: every key of the upstream YAML files, and ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from easyeditor.base.hparams import require
from easyeditor.methods.hparams import LayerHyperParams

LOG = logging.getLogger(__name__)

F = TypeVar("F", bound="FTHyperParams")

_MISSPELT = {"promptz_last": "prompt_last"}  # upstream's chatglm4-9b.yaml


@dataclass(kw_only=True)
class FTHyperParams(LayerHyperParams):
    """Fine-tuning of a few weights, with an L-infinity constraint (FT-L, Zhu et al. 2020) or without.

    FT-M is `objective_optimization: target_new`; LocFT-BF is that with `target_eos` and `shuffle`. Trained are all
    parameters whose name contains `rewrite_module_tmp`, of every one of `layers`.
    """

    alg_name: str = "FT"
    num_steps: int
    """Most passes over the requests."""
    lr: float
    """Adam step size."""
    norm_constraint: float | bool | None = False
    """Farthest any value may move from where it was (L-infinity, FT-L); false or null sets no bound."""
    objective_optimization: Literal["prompt_last", "target_new"] = "prompt_last"
    """What is scored: `target_new` each target token at its own position; `prompt_last` all of them at the prompt's
    last token (upstream's; teaches a target of several tokens as alternatives, not in order)."""
    batch_size: int = 1
    """Requests in one optimiser step."""
    shuffle: bool = False
    """Take the requests in a new order in every epoch, drawn from `seed`."""
    weight_decay: float = 0.0
    """Adam's weight decay."""
    kl_factor: float = 0.0
    """Upstream's key; its FT has no KL term, so only 0 is allowed."""
    max_length: int = 40
    """Upstream's key; its FT cuts nothing there, and neither does this one: the limit is the model's positions."""

    @classmethod
    def from_dict(cls: type[F], values: Mapping[str, Any], where: str = "hparams") -> F:
        objective = values.get("objective_optimization")
        if isinstance(objective, str) and objective in _MISSPELT:
            meant = _MISSPELT[objective]
            LOG.warning("%s: objective_optimization %r is read as %r", where, objective, meant)
            values = {**values, "objective_optimization": meant}
        if "layer" in values and "layers" not in values:  # LocFT's files name one
            values = {**{key: value for key, value in values.items() if key != "layer"}, "layers": [values["layer"]]}
        if values.get("weight_decay") is False:  # MEMIT's files with wd_power_law
            values = {**values, "weight_decay": 0.0}
        return super().from_dict(values, where)

    @property
    def longest_text(self) -> int | None:
        return None

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_positive(where, "num_steps", "batch_size", allowed="1 or more")
        self.need_positive(where, "lr")
        self.need_nonnegative(where, "weight_decay")
        require(self.kl_factor == 0, where, "kl_factor", self.kl_factor, "0: fine-tuning has no KL term")
        objective = self.objective_optimization
        require(
            objective == "target_new" or not self.target_eos,
            where,
            "target_eos",
            True,
            f"false with objective_optimization: {objective}; an EOS follows a target, so say target_new",
        )
        bound = self.norm_constraint
        right = bound is None or bound is False or (bound is not True and bound > 0)
        require(right, where, "norm_constraint", bound, "a number above 0, or false")

    @property
    def bound(self) -> float | None:
        """The L-infinity bound, None when it is off."""
        return float(self.norm_constraint) if self.norm_constraint else None

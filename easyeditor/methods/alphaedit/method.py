"""AlphaEdit: updates in the null space of what a model knows. Axes: N requests, K key width, D model width."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import StatsError
from easyeditor.lm.architectures import Anatomy
from easyeditor.methods.alphaedit.hparams import AlphaEditHyperParams
from easyeditor.methods.base import MemoryNeeds
from easyeditor.methods.locate.holding import HoldingMethod
from easyeditor.methods.locate.norm_anchor import NormAnchor
from easyeditor.methods.locate.spread import Adjuster, Spread
from easyeditor.stats.null_space import NullSpace, null_space

LOG = logging.getLogger(__name__)

NEARLY_ALL = 0.99  # of the directions: a projection that keeps more protects nothing


class AlphaEdit(HoldingMethod[AlphaEditHyperParams]):
    """AlphaEdit: Null-Space Constrained Knowledge Editing (Fang et al. 2024, arXiv 2410.02355).

    dW^T = (P (K K^T + K_p K_p^T) + L2 I)^-1 P K R^T: MEMIT-Seq's equation with P / L2 for (lambda C)^-1. P is the null
    space of C, or with `protect_first_tokens` or held texts of the sum (`Statistics.preserved`).
    """

    @classmethod
    def memory(cls, hparams: AlphaEditHyperParams, parts: Anatomy, *, training: bool = False) -> MemoryNeeds:
        """P, of which the second moment is let go, and the inverse with earlier keys."""
        return MemoryNeeds(matrices=2)

    adjusters: ClassVar[tuple[type[Adjuster], ...]] = (NormAnchor,)

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: AlphaEditHyperParams) -> None:
        super().__init__(model, tok, hparams)
        self._spaces: dict[int, NullSpace] = {}

    def ready(self, layer: int) -> None:
        self.space(layer)

    def space(self, layer: int) -> NullSpace:
        """P of a layer; read where it is kept, else computed and kept.

        Raises:
            StatsError: the null space has no direction, or all of them: the threshold does not fit this model.
        """
        if layer not in self._spaces:
            h = self.hparams
            left_KK = self.raised(layer).matrix_KK
            made = null_space(left_KK, h.nullspace_threshold, h.nullspace_scale, self.statistics.key(layer))
            share = made.rank / len(made.projection_KK)
            if share in (0.0, 1.0):
                raise StatsError(
                    f"layer {layer}: the null space of C below {h.nullspace_scale} threshold {h.nullspace_threshold:g} "
                    f"has {made.rank} of {len(made.projection_KK)} directions (singular values {made.lowest:.3g} to "
                    f"{made.highest:.3g}); choose nullspace_threshold between them"
                )
            if share > NEARLY_ALL:
                LOG.warning("layer %d: P keeps %.1f %% of all directions, so it protects nothing", layer, 100 * share)
            device = self.model.get_parameter(self.parts.weight_name(layer)).device
            self._spaces[layer] = replace(made, projection_KK=made.projection_KK.to(device))
            self.statistics.forget(layer)  # P is all that edits ask for
        return self._spaces[layer]

    def unedited(self, layer: int, keys_KN: Tensor) -> Tensor:
        """P K / L2."""
        return self.space(layer).projection_KK @ keys_KN / self.hparams.L2

    def unedited_inverse(self, layer: int) -> Tensor:
        return self.space(layer).projection_KK / self.hparams.L2

    def to_remember(self, spread: Spread) -> Mapping[str, Tensor]:
        return self.keys_after(spread)

    def notes(self, layer: int) -> Mapping[str, float]:
        """`kept_rank` of P, and its share of all directions."""
        space = self.space(layer)
        return {"kept_rank": float(space.rank), "kept_share": space.rank / len(space.projection_KK)}

"""AlphaEdit: updates in the null space of what a model knows. Axes: N requests, K key width, D model width."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from easyeditor.errors import StatsError
from easyeditor.methods.alphaedit.hparams import AlphaEditHyperParams
from easyeditor.methods.locate.norm_anchor import AnchoredMethod
from easyeditor.methods.locate.spread import Spread
from easyeditor.methods.locate.updates import projected_update
from easyeditor.stats.null_space import NullSpace, null_space

LOG = logging.getLogger(__name__)

NEARLY_ALL = 0.99  # of the directions: a projection that keeps more protects nothing


class AlphaEdit(AnchoredMethod[AlphaEditHyperParams]):
    """AlphaEdit: Null-Space Constrained Knowledge Editing (Fang et al. 2024, arXiv 2410.02355)."""

    def prepare(self) -> None:
        super().prepare()
        self._spaces: dict[int, NullSpace] = getattr(self, "_spaces", {})
        for layer in self.layers:
            self.space(layer)

    def space(self, layer: int) -> NullSpace:
        """P of a layer; read where it is kept, else computed and kept.

        Raises:
            StatsError: the null space has no direction, or all of them: the threshold does not fit this model.
        """
        if layer not in self._spaces:
            h = self.hparams
            made = null_space(self.moment(layer), h.nullspace_threshold, h.nullspace_scale, self.statistics.key(layer))
            share = made.rank / len(made.projection_KK)
            if share in (0.0, 1.0):
                raise StatsError(
                    f"layer {layer}: the null space of C below {h.nullspace_scale} threshold {h.nullspace_threshold:g} "
                    f"has {made.rank} of {len(made.projection_KK)} directions (singular values {made.lowest:.3g} to "
                    f"{made.highest:.3g}); choose nullspace_threshold between them"
                )
            if share > NEARLY_ALL:
                LOG.warning("layer %d: P keeps %.1f %% of all directions, so it protects nothing", layer, 100 * share)
            self._spaces[layer] = made
        return self._spaces[layer]

    def solve(self, layer: int, keys_KN: Tensor, residual_DN: Tensor) -> tuple[Tensor, Tensor]:
        """dW^T = (P (K K^T + K_p K_p^T) + L2 I)^-1 P K R^T."""
        projection_KK = self.space(layer).projection_KK.to(keys_KN.device)
        return residual_DN, projected_update(keys_KN, projection_KK, self.earlier(layer), self.hparams.L2).T

    def to_remember(self, spread: Spread) -> Mapping[str, Tensor]:
        return self.keys_after(spread)

    def notes(self, layer: int, place: int) -> Mapping[str, float]:
        """`kept_rank` of P, and its share of all directions."""
        space = self.space(layer)
        kept = {"kept_rank": float(space.rank), "kept_share": space.rank / len(space.projection_KK)}
        return {**super().notes(layer, place), **kept}

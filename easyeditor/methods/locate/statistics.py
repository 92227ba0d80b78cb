"""What an update must leave in place: the second moments of keys at the edited layers. Axes: K key width."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import StatsError
from easyeditor.base.locks import locked
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.weights import sample
from easyeditor.methods.locate.hparams import LocateHyperParams
from easyeditor.stats.factored import Factored, plus_identity
from easyeditor.stats.first_token import Texts, first_tokens, later_tokens, moments
from easyeditor.stats.gather import gather
from easyeditor.stats.store import StatsKey, not_collected, read_factored

LOG = logging.getLogger(__name__)

COLLECTING = ".collecting.lock"  # held by the process that collects what several lack
RIDGE = 0.02  # added to later tokens' second moment, as a share of its mean diagonal: few tokens, many dimensions


class Statistics:
    """Second moments as the hyper-parameters choose them, read (or collected) and factored once each, until they are
    forgotten."""

    def __init__(self, parts: Anatomy, tok: PreTrainedTokenizerBase, hparams: LocateHyperParams) -> None:
        self._parts, self._tok, self._hparams = parts, tok, hparams
        self._moments: dict[int, Factored] = {}
        self._preserved: dict[int, Factored | None] = {}
        self._raised: dict[tuple[int, float], Factored] = {}
        self.texts: list[tuple[float, Texts]] = []
        """Texts whose later tokens' keys are held as well, each with the weight of their second moment."""
        self.weights = sample(parts.model)  # before any edit: statistics are compared with these

    def sharing(self, other: Statistics) -> Statistics:
        """These, with what `other` has read of the same model."""
        self._moments, self.weights = other._moments, other.weights
        if self._hparams.protect_first_tokens and other._hparams.protect_first_tokens:
            self._preserved = other._preserved
        return self

    def preserved(self, layer: int, *, with_moment: bool) -> Factored | None:
        """What an update at `layer` holds in place, (K, K) float64: C, or with `protect_first_tokens`

            A = C + w M,        M the second moment of first tokens' keys, w `first_token_weight`;
            A = w' C' + w M + r I  without collected statistics, C' that of later tokens (`later_token_weight` w').

        `texts` add theirs, w (C' + r I) each. Without `with_moment` C is the identity; None is the identity. Sources:
        docs/findings/first-token-protection.md, docs/methods.md.
        """
        h = self._hparams
        if not h.protect_first_tokens and not self.texts:
            return self.moment(layer) if with_moment else None
        if layer not in self._preserved:
            held_KK = self._summed(layer, with_moment)
            self._preserved[layer] = None if held_KK is None else Factored(held_KK)
        return self._preserved[layer]

    def raised(self, layer: int, ridge: float, *, with_moment: bool = True) -> Factored:
        """What `preserved` gives where something is held, plus `ridge` times the identity."""
        held = self.preserved(layer, with_moment=with_moment)
        assert held is not None
        if not ridge:
            return held
        if (layer, ridge) not in self._raised:
            self._raised[layer, ridge] = Factored(plus_identity(held.matrix_KK, ridge))
        return self._raised[layer, ridge]

    def forget(self, layer: int) -> None:
        """Drop a layer from memory; the next access reads it from disk."""
        self._moments.pop(layer, None)
        self._preserved.pop(layer, None)
        for key in [key for key in self._raised if key[0] == layer]:
            del self._raised[key]

    def _summed(self, layer: int, with_moment: bool) -> Tensor | None:
        h = self._hparams
        held: Tensor | None = self.moment(layer).matrix_KK if with_moment else None
        if held is None and h.protect_first_tokens and h.later_token_weight:
            held = h.later_token_weight * self._later(later_tokens(self._tok), layer)
        if h.protect_first_tokens and h.first_token_weight:
            moment_KK = h.first_token_weight * self._of(first_tokens(self._tok), layer)
            if held is None:
                held = torch.eye(len(moment_KK), dtype=torch.float64, device=moment_KK.device)
            held = held + moment_KK
        for weight, texts in self.texts:
            moment_KK = weight * self._later(texts, layer)
            held = moment_KK if held is None else held + moment_KK
        return held

    def _later(self, texts: Texts, layer: int) -> Tensor:
        moment_KK = self._of(texts, layer)
        ridge = RIDGE * moment_KK.diagonal().mean()
        return moment_KK + ridge * torch.eye(len(moment_KK), dtype=torch.float64, device=moment_KK.device)

    def _of(self, texts: Texts, layer: int) -> Tensor:
        parts, place = self._parts, {"stats_dir": self._hparams.stats_dir}
        name = str(parts.model.config.name_or_path)
        (moment_KK,) = moments(parts, texts, [layer], model_name=name, **place).values()
        return moment_KK.to(parts.model.get_parameter(parts.weight_name(layer)).device)

    def moment(self, layer: int) -> Factored:
        """The second moment (K, K) of the keys at `layer`, float64, read once; collected first if `collect_stats`
        says so.

        Raises:
            StatsError: no statistics (says how to collect them), damaged ones, or another model's.
        """
        if layer not in self._moments:
            path = self.key(layer).find()
            if path is None:
                path = self._collect(layer)
            device = self._parts.model.get_parameter(self._parts.weight_name(layer)).device
            self._moments[layer] = read_factored(path, self._parts.key_width(layer), self.weights, device)
        return self._moments[layer]

    def key(self, layer: int) -> StatsKey:
        """What identifies the statistics of a layer."""
        h = self._hparams
        return StatsKey(
            stats_dir=h.stats_dir,
            model_name=str(self._parts.model.config.name_or_path),
            module=self._parts.rewrite_name(layer),
            dataset=h.mom2_dataset,
            dtype=h.mom2_dtype,
            samples=h.mom2_n_samples,
        )

    def _collect(self, layer: int) -> Path:
        """Collect the statistics of all the method's layers that lack them, in one pass; of several processes one does,
        and the others wait for it. A collection that was killed goes on."""
        h = self._hparams
        lacking = [other for other in h.layers if self.key(other).find() is None]
        if h.collect_stats != "auto":
            layers = " ".join(map(str, lacking))
            model = self._parts.model.config.name_or_path
            command = (
                f"python -m easyeditor.stats --model {model} --layers {layers} --corpus {h.mom2_dataset} "
                f"--samples {h.mom2_n_samples} --output {h.stats_dir}"
            )
            raise not_collected(self.key(layer), command)
        folder = self.key(layer).paths[0].parent
        with locked(folder / COLLECTING, f"the second moments in {folder}", wait=True):
            lacking = [other for other in lacking if self.key(other).find() is None]  # another process may have them
            if lacking:
                LOG.info("collecting second moments of layers %s on %s (kept in %s)", lacking, h.mom2_dataset, folder)
                keys = {other: self.key(other) for other in lacking}
                try:
                    gather(self._parts, self._tok, keys, resume=True, show=True)
                except StatsError as error:  # what a kill left is of another collection, or damaged
                    LOG.warning("%s; collecting anew", error)
                    gather(self._parts, self._tok, keys, show=True)
        found = self.key(layer).find()
        assert found is not None
        return found

"""NAS: every target gets the norm of an ordinary edit's (Norm Anchors Make Model Edits Last, arXiv 2602.02543).

v* = v0 + offset, v0 the MLP's output at the lookup token of the bare prompt; m the mean of ||v*|| over pilot edits of
the unedited model, the largest twentieth left out. Then v* m / ||v*|| takes v*'s place; an edit with ||v*|| > 2 m is
dropped (v* = v0), as the published code does and its abstract does not say.

Axes: D model width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from easyeditor.base.errors import ConfigError, DataError, StatsError
from easyeditor.base.files import read_json, write_json
from easyeditor.base.paths import SHIPPED
from easyeditor.dataset.reader import read_dataset
from easyeditor.lm.tokens import SLOT
from easyeditor.lm.weights import frozen, sample
from easyeditor.methods.locate.keys import read_at_lookup
from easyeditor.methods.locate.rows import prompt_row
from easyeditor.methods.locate.search_cache import SearchCache
from easyeditor.methods.locate.spread import SpreadMethod
from easyeditor.methods.locate.spread_hparams import SpreadHyperParams
from easyeditor.methods.locate.value_search import Found
from easyeditor.values.edit import EditRequest

LOG = logging.getLogger(__name__)

FACTS = SHIPPED / "data" / "facts.json"
TOO_LONG = 2.0  # times the anchor: an edit beyond is dropped
TINY = 1e-10  # added to a norm that is divided by


@dataclass(frozen=True)
class Anchored:
    """A target after the rule; `norm` is ||v*|| before it."""

    found: Found
    norm: float
    dropped: bool


def anchored(found: Found, v0_D: Tensor, anchor: float) -> Anchored:
    """One target with the anchor's norm, or dropped."""
    v0_D = v0_D.to(found.offset_D)
    value_D = v0_D + found.offset_D
    norm = float(value_D.norm())
    dropped = norm > TOO_LONG * anchor
    scaled_D = v0_D if dropped else value_D * (anchor / (norm + TINY))
    return Anchored(Found(found.initial_D, scaled_D - v0_D, found.losses), norm, dropped)


def anchor_of(norms: Sequence[float], quantile: float) -> float:
    """The mean of the smallest `quantile` of the norms (the largest floor((1 - q) n) left out)."""
    kept = sorted(norms)[: len(norms) - math.floor(round((1 - quantile) * len(norms), 9))]
    return math.fsum(kept) / len(kept)


class NormAnchor:
    """With `norm_anchor`, NAS on whatever equation a method solves."""

    def __init__(self, method: SpreadMethod[Any]) -> None:
        self._method = method
        self._hparams: SpreadHyperParams = method.hparams
        self._anchor: float | None = None

    def prepare(self) -> None:
        """The anchor, given, kept or measured."""
        if self._hparams.norm_anchor and self._anchor is None:
            self._anchor = self._hparams.norm_anchor_value or self._measured()

    def take_over(self, other: NormAnchor) -> None:
        """The same anchor."""
        self._anchor = other._anchor

    def __call__(
        self, requests: Sequence[EditRequest], found: list[Found]
    ) -> tuple[list[Found], list[dict[str, float]]]:
        """Targets of the anchor's norm; of each request `norm_anchor` m, `value_norm` before the rule, and `dropped`
        (1: the edit was)."""
        if self._anchor is None:
            return found, [{} for _ in found]
        v0_ND = self._initial(requests)
        targets = [anchored(f, v0_D, self._anchor) for f, v0_D in zip(found, v0_ND, strict=True)]
        for request, made in zip(requests, targets, strict=True):
            if made.dropped:
                LOG.warning(
                    "request %r: its value has norm %.3g, more than twice the anchor's %.3g, so its edit is dropped",
                    request.case_id,
                    made.norm,
                    self._anchor,
                )
        notes = [
            {"norm_anchor": self._anchor, "value_norm": made.norm, "dropped": float(made.dropped)} for made in targets
        ]
        return [made.found for made in targets], notes

    def _initial(self, requests: Sequence[EditRequest]) -> Tensor:
        """v0 (N, D): the MLP's output at the lookup token of the bare prompts, at the last edited layer."""
        m = self._method
        rows = [prompt_row(m.tok, request, SLOT, self._hparams.fact_token, m.prompting) for request in requests]
        return read_at_lookup(m.parts, m.parts.mlp(m.layers[-1]), rows, m.budget)[1]

    def pilot_norms(self, requests: Sequence[EditRequest]) -> list[float]:
        """||v*|| of the searches of `requests` on their bare prompts alone."""
        method = self._method
        with frozen(method.model):
            found = method.values(requests, method.site, method.layers[-1], bare=True)
            v0_ND = self._initial(requests)
        return [float((v0_D + f.offset_D).norm()) for f, v0_D in zip(found, v0_ND, strict=True)]

    def _measured(self) -> float:
        """The anchor of this model, read where it is kept, else measured and kept next to the statistics.

        Raises:
            StatsError: what is kept is damaged. ConfigError: it was never measured, and the model holds edits already.
        """
        h, method = self._hparams, self._method
        layer, statistics = method.layers[-1], method.statistics
        said = {key: getattr(h, key) for key in (*SearchCache.SETTINGS, "nas_restart", "nas_quantile", "seed")}
        if h.chat_template or h.target_eos:  # anchors measured before there was a choice keep their names
            said |= {"chat_template": h.chat_template, "target_eos": h.target_eos}
        for key, usual in (("matmul", "exact"), ("v_optimizer", "adam")):
            if getattr(h, key) != usual:
                said[key] = getattr(h, key)
        identity = {**said, "layer": layer, "weights": statistics.weights}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        path = statistics.key(layer).paths[0].with_name(f"norm-anchor-{digest}.json")
        if path.exists():
            try:
                return float(read_json(path)["anchor"])
            except (DataError, KeyError, TypeError, ValueError) as error:
                raise StatsError(
                    f"{path}: not a kept norm anchor ({type(error).__name__}: {error}); delete it"
                ) from error
        if sample(method.model) != statistics.weights:
            raise ConfigError(f"{path}: no anchor is kept, and it is measured before the first edit; begin a new run")
        facts = read_dataset(str(FACTS)).requests
        chosen = random.Random(h.seed).sample(facts, min(h.nas_restart, len(facts)))
        LOG.info("measuring the norm of ordinary edits' values on %d facts (kept in %s)", len(chosen), path)
        anchor = anchor_of(self.pilot_norms(chosen), h.nas_quantile)
        write_json(path, {"anchor": anchor, "facts": len(chosen), "layer": layer, **said})
        return anchor

"""Hyper-parameters shared by the locate-then-edit methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import require
from easyeditor.methods.hparams import LayerHyperParams

Filter = Literal["rect", "rect-official", "prune", "sphere", "revive"]
FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


@dataclass(kw_only=True)
class LocateHyperParams(LayerHyperParams):
    """Shared by the locate-then-edit family: which module, which token, how the value is searched, which statistics."""

    v_num_grad_steps: int
    """Most forward passes of the value search; the number of updates is at most one less."""
    v_lr: float
    """Adam step size of the value search."""
    v_optimizer: Literal["adam", "lbfgs"] = "adam"
    """Steps of the value search: Adam, as in the papers, or L-BFGS, which needs about half the passes."""
    v_loss_layer: int
    """Layer whose output gives the loss; the last one in every shipped file."""
    v_weight_decay: float
    """Weight of ||offset|| / ||initial value||^2."""
    clamp_norm_factor: float
    """Largest ||offset|| as a multiple of ||initial value||."""
    kl_factor: float
    """Weight of the KL term that holds "{subject} is a" in place."""
    early_stop: Literal["loss", "mpes"] = "loss"
    """When the value search ends before its last pass: `loss` below 0.05; `mpes` also when the whole target was the
    model's first choice in |prob_cutoff| passes."""
    prob_cutoff: int = -4
    """ENCORE's key, negative there, and its value for GPT-2 XL: passes that `early_stop: mpes` waits for; 0 turns that
    rule off."""
    early_stop_rows: Literal["all", "prefixed"] = "all"
    """Prompts whose target must be the first choice: all, or those behind a context (ENCORE's published code)."""
    mom2_adjustment: bool
    """Use the inverse second moment of keys (C^-1 k); false is the identity."""
    fact_token: FactToken = "subject_last"
    """Token whose key is rewritten."""
    context_template_length_params: list[tuple[int, int]] = field(default_factory=lambda: [(5, 10), (10, 10)])
    """Generated contexts as (tokens, how many) pairs."""
    context_templates: list[str] | list[list[str]] | str | None = None
    """Contexts that replace generated ones: a list of texts with one {}, or a JSON file holding it."""
    stats_dir: str = "./data/stats"
    """Folder of second-moment statistics."""
    collect_stats: Literal["off", "auto"] = "off"
    """What to do when statistics are missing: `off` says how to collect them, `auto` collects them first."""
    targets_dir: str | None = None
    """Folder that keeps every value search's result, for runs cut short and for variants to share; null: none."""
    protect_first_tokens: bool = False
    """Hold the keys of first tokens in place besides ordinary ones (docs/findings/first-token-protection.md). Their
    second moment takes one pass over the vocabulary, made on first use and kept in `stats_dir`."""
    first_token_weight: float = 1.0
    """Weight of first tokens' second moment in what is held in place; 0 leaves it out."""
    later_token_weight: float = 1.0
    """Weight of later tokens' second moment, used in place of C where no statistics are used; 0 takes the identity."""
    filters: list[Filter] = field(default_factory=list)
    """What of an update is written, in this order: RECT (the largest relative changes: `rect` as AlphaEdit's lineage
    has it, `rect-official` as its authors), PRUNE, SPHERE, REVIVE."""
    rect_share: float = 0.4
    """Share of an update's entries that `rect` keeps."""
    rect_dropped: float = 0.8
    """Share of an update's entries that `rect-official` drops."""
    prune_base: float = math.e
    """Base of the logarithm that tames large singular values: e, 2, 1.5 or 1.2 in the paper."""
    sphere_ratio: float = 0.5
    """Cumulative share of the leading directions that `sphere` takes from an update."""
    sphere_strength: float = 0.5
    """How much of these directions it takes: 0.5 with AlphaEdit, 0.8 with MEMIT."""
    revive_energy: float = 0.3
    """Share of the sum of singular values whose directions `revive` leaves untouched."""
    mom2_dataset: str = "wikipedia"
    """Corpus the statistics come from."""
    mom2_n_samples: int = 100000
    """Documents in the statistics."""
    mom2_dtype: Literal["float32", "float64"] = "float32"
    """Dtype of the stored statistics."""

    def reads(self) -> dict[str, Any]:
        texts, model, stats = self.context_templates, str(self.model_name), Path(self.stats_dir)
        moments = [stats / name for name in (Path(model).name, model.replace("/", "_"))] if stats.is_dir() else stats
        own = {"context_templates": texts if isinstance(texts, str) else None, "mom2_dataset": self.mom2_dataset}
        return {**super().reads(), **own, "stats_dir": moments, "targets_dir": self.targets_dir}

    def validate(self, where: str) -> None:
        super().validate(where)
        self.need_positive(where, "v_num_grad_steps", "mom2_n_samples", allowed="1 or more")
        self.need_positive(where, "v_lr", "clamp_norm_factor")
        self.need_nonnegative(where, "v_weight_decay", "first_token_weight", "later_token_weight", "kl_factor")
        shares = "rect_share", "rect_dropped", "sphere_ratio", "sphere_strength", "revive_energy"
        self.need(where, shares, lambda value: 0 < value <= 1, "above 0, at most 1")
        require(self.prune_base > 1, where, "prune_base", self.prune_base, "a number above 1")
        self._check_filters(where)
        key, allowed = "context_template_length_params", "pairs (tokens, how many), both above 0"
        self.need(where, [key], lambda pairs: all(min(pair) > 0 for pair in pairs), allowed)

    def _check_filters(self, where: str) -> None:
        if len(set(self.filters)) < len(self.filters):
            raise ConfigError(f"{where}: filters is {self.filters}; name each once")
        excluding = [name for name in self.filters if name in ("rect", "rect-official", "prune")]
        if len(excluding) > 1:
            raise ConfigError(
                f"{where}: filters {' and '.join(excluding)} exclude each other: each says what of an update stays"
            )

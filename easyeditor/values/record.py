"""The record of one edit as typed, frozen values: what was asked, what was measured around it, what the update was.

A perplexity is None when it was not measured and infinity when it was not finite. docs/metrics.md says what each number
means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from easyeditor.values.collapse import Collapse
from easyeditor.values.plain import Flat, Value, integer, known, mean, number, numbers, perplexity, text
from easyeditor.values.request import EditRequest

Row = Mapping[str, Value]
"""Metrics of one request on one state of the model, by name."""


@dataclass(frozen=True, kw_only=True)
class LayerNumbers(Flat):
    """What one edit did at one layer; norms are L2, losses in nats.

    `denominator` is k·u with its sign, `numerator_norm` the norm of u (v* - Wk)^T (ROME eq. 2): their ratio is the
    size of the update. `key_norm` belongs to the unprefixed prompt's key, `prefixed_key_norm` to the mean over
    contexts. MEMIT has no denominator; a method without keys and values leaves all of these and the value norms None.
    `losses` has a row for each pass; `loss_names` says what its columns are, the first is what is minimised. `notes`
    are further numbers of the method's own.
    """

    numerator_norm: float | None
    denominator: float | None
    key_norm: float | None
    prefixed_key_norm: float | None
    value_norm_before: float | None
    value_norm_after: float | None
    loss_first: float
    loss_last: float
    steps: int
    delta_norm: float
    losses: tuple[tuple[float, ...], ...] = ()
    loss_names: tuple[str, ...] = ("nll",)
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def value_growth(self) -> float | None:
        """How many times longer the value became; None for a method without values."""
        before, after = self.value_norm_before, self.value_norm_after
        return after / before if before and after is not None else None

    @classmethod
    def own(cls) -> tuple[Field[Any], ...]:
        """The numbers, without those that a subclass adds."""
        return fields(LayerNumbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One request on one state of the model, under EasyEdit's names: accuracies over its prompts, by key for locality
    and portability; `outputs` are the model's first choices on the locality prompts; `locality` is agreement with what
    the original model said, so `pre` has none; `locality_just_before` with what the model said just before the edit,
    where others were in it already."""

    rewrite: tuple[float, ...]
    rephrase: tuple[float, ...] = ()
    outputs: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    locality: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    portability: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ppl: float | None = None
    locality_just_before: Mapping[str, tuple[float, ...]] | None = None
    probabilities: Mapping[str, float | None] | None = None

    def agreement(self, before: Side) -> dict[str, tuple[float, ...]]:
        """Locality: by key, each prompt's agreement with the first choices `before`."""
        return {
            key: tuple(agreement(old, new) for old, new in zip(before.outputs[key], ids, strict=True))
            for key, ids in self.outputs.items()
        }

    def means(self) -> dict[str, float]:
        """Mean of each accuracy the request has prompts for."""
        every = {
            "rewrite_acc": self.rewrite,
            "rephrase_acc": self.rephrase,
            "locality_acc": [value for values in self.locality.values() for value in values],
            "portability_acc": [value for values in self.portability.values() for value in values],
        }
        return {name: found for name, values in every.items() if (found := mean(values)) is not None}

    def to_json(self) -> dict[str, Any]:
        """EasyEdit's `pre` or `post`."""
        near = self.locality_just_before
        return {
            "rewrite_acc": list(self.rewrite),
            **({"rephrase_acc": list(self.rephrase)} if self.rephrase else {}),
            "locality": {
                **{f"{key}_output": [list(ids) for ids in listed] for key, listed in self.outputs.items()},
                **_accuracies(self.locality),
            },
            "portability": _accuracies(self.portability),
            **({} if near is None else {"locality_just_before": _accuracies(near)}),
            "ppl": self.ppl,
            **({} if self.probabilities is None else {"probabilities": dict(self.probabilities)}),
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any], *, measured: bool) -> Side:
        """Inverse of `to_json`; `measured`: was perplexity?"""
        near = raw["locality"]
        return Side(
            rewrite=numbers(raw["rewrite_acc"]),
            rephrase=numbers(raw.get("rephrase_acc", ())),
            outputs={key: tuple(tuple(map(integer, ids)) for ids in listed) for key, listed in _under(near, "_output")},
            locality=_by_key(near),
            portability=_by_key(raw["portability"]),
            ppl=perplexity(raw["ppl"], measured=measured),
            locality_just_before=_by_key(raw["locality_just_before"]) if "locality_just_before" in raw else None,
            probabilities=raw.get("probabilities"),
        )


def agreement(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of positions where two outputs of equal length have the same token."""
    return sum(a == b for a, b in zip(before, after, strict=True)) / len(before)


def _accuracies(by_key: Mapping[str, tuple[float, ...]]) -> dict[str, list[float]]:
    return {f"{key}_acc": list(values) for key, values in by_key.items()}


def _by_key(raw: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    return {key: numbers(values) for key, values in _under(raw, "_acc")}


def _under(raw: Mapping[str, Any], ending: str) -> Iterable[tuple[str, Any]]:
    return ((key.removesuffix(ending), value) for key, value in raw.items() if key.endswith(ending))


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRecord:
    """One edit of one request: `pre` on the original model, `post` with the edit, `just_before` on the model it was
    made on, where others were in it already (else None); and all that is known of the update.

    `probabilities` has P(target_new) and P(ground_truth) before and after. `perplexity` holds the sentences' identity
    and both reports. `rounding` says by weight what of the update (norm `intended`) is left in the weight's dtype (norm
    `written`) and which part is `lost`. `metrics` are the registry's, before and after, where some were asked for.
    """

    request: EditRequest
    time: float
    pre: Side
    just_before: Side | None = None
    post: Side
    probabilities: Mapping[str, Mapping[str, float | None]]
    collapse: Collapse | None
    perplexity: Mapping[str, Mapping[str, Any] | None]
    method: str
    trace: Mapping[int, LayerNumbers]
    test_prefix: str | None
    remedy: str | None
    rounding: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, Row] = field(default_factory=dict)
    target_space: str = " "
    """White space between the prompt and its target; written where it is not the usual one."""

    @property
    def collapsed(self) -> bool | None:
        """The verdict; None when perplexity was not measured."""
        return None if self.collapse is None else self.collapse.collapsed

    @property
    def bos(self) -> bool:
        """Did every perplexity sentence begin with BOS?"""
        return bool((self.perplexity.get("before") or {}).get("bos"))

    @property
    def decisive_layer(self) -> tuple[int, LayerNumbers] | None:
        """The layer with the smallest |denominator|; where there is none, the one with the largest numerator."""

        def order(item: tuple[int, LayerNumbers]) -> tuple[float, float]:
            denominator, numerator = item[1].denominator, item[1].numerator_norm
            return math.inf if denominator is None else abs(denominator), -(numerator or 0.0)

        return min(self.trace.items(), key=order, default=None)

    @property
    def denominator(self) -> float | None:
        """The denominator smallest in size over the layers; None for a method that has none."""
        return None if self.decisive_layer is None else self.decisive_layer[1].denominator

    @property
    def numerator(self) -> float | None:
        """The numerator that belongs to `denominator`."""
        return None if self.decisive_layer is None else self.decisive_layer[1].numerator_norm

    def after(self, name: str) -> float | None:
        """A metric's value after the edit; None where the request has none."""
        return self.values().get(name, (None, None))[1]

    def values(self) -> dict[str, tuple[float | None, float | None]]:
        """Name -> (before, after) of every metric this request has a value of; locality is agreement with before."""
        before, after = self.pre.means(), self.post.means()
        found: dict[str, tuple[float | None, float | None]] = {k: (before.get(k), v) for k, v in after.items()}
        old = self.metrics.get("before", {})
        for name, value in self.metrics.get("after", {}).items():
            if value.value is not None:
                found[name] = (old[name].value, value.value)
        return found

    def without_details(self, *, outputs: bool = False) -> EditRecord:
        """Without what is long and only looked at one record at a time: losses, reports, metrics' details, outputs
        (`outputs`: those before the edit stay)."""
        before = self.just_before
        return replace(
            self,
            pre=self.pre if outputs else replace(self.pre, outputs={}),
            just_before=before if before is None or outputs else replace(before, outputs={}),
            post=replace(self.post, outputs={}),
            perplexity={},
            trace={layer: replace(numbers, losses=()) for layer, numbers in self.trace.items()},
            metrics={
                when: {name: Value(value=found.value) for name, found in row.items()}
                for when, row in self.metrics.items()
            },
        )

    def to_json(self, *, whole: bool = True) -> dict[str, Any]:
        """The record as files hold it; without the request unless `whole`."""
        asked = {"case_id": self.request.case_id, "requested_rewrite": self.request.to_json()} if whole else {}
        every = {when: {name: value.to_json() for name, value in row.items()} for when, row in self.metrics.items()}
        return {
            **asked,
            "time": self.time,
            "pre": self.pre.to_json(),
            "just_before": None if self.just_before is None else self.just_before.to_json(),
            "post": self.post.to_json(),
            "probabilities": {name: dict(pair) for name, pair in self.probabilities.items()},
            "collapse": None if self.collapse is None else self.collapse.to_json(),
            "perplexity": dict(self.perplexity),
            "method": self.method,
            "trace": {str(layer): numbers.to_json() for layer, numbers in self.trace.items()},
            "test_prefix": self.test_prefix,
            "remedy": self.remedy,
            "rounding": {name: dict(part) for name, part in self.rounding.items()},
            **({"metrics": every} if every else {}),
            **({} if self.target_space == " " else {"target_space": self.target_space}),
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any], request: EditRequest | None = None) -> EditRecord:
        """Inverse of `to_json`; `request` where the record was written without. Raises KeyError, TypeError,
        ValueError, AttributeError for what is no such record."""
        collapse = None if raw["collapse"] is None else Collapse.from_json(raw["collapse"])
        measured, before = collapse is not None, raw["just_before"]
        return EditRecord(
            request=_request(raw["requested_rewrite"]) if request is None else request,
            time=known(raw["time"]),
            pre=Side.from_json(raw["pre"], measured=measured),
            just_before=None if before is None else Side.from_json(before, measured=measured),
            post=Side.from_json(raw["post"], measured=measured),
            probabilities={
                name: {when: number(pair[when]) for when in ("before", "after")}
                for name, pair in raw["probabilities"].items()
            },
            collapse=collapse,
            perplexity=raw["perplexity"],
            method=text(raw["method"]),
            trace={int(layer): LayerNumbers.from_json(numbers) for layer, numbers in raw["trace"].items()},
            test_prefix=None if raw["test_prefix"] is None else text(raw["test_prefix"]),
            remedy=None if raw["remedy"] is None else text(raw["remedy"]),
            rounding={
                name: {key: known(value) for key, value in part.items()} for name, part in raw["rounding"].items()
            },
            metrics={
                when: {name: Value.from_json(value) for name, value in row.items()}
                for when, row in raw.get("metrics", {}).items()
            },
            target_space=text(raw.get("target_space", " ")),
        )


def _request(raw: Mapping[str, Any]) -> EditRequest:
    for name in ("prompt", "subject", "target_new"):
        text(raw[name])
    return EditRequest.from_json({**raw, "subject_start": integer(raw["subject_start"])})

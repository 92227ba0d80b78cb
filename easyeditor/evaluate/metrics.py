"""Metrics of one request under EasyEdit's names and shapes: rewrite, rephrase, locality, portability, probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.evaluate.metric import Pair, Settings
from easyeditor.evaluate.scoring import Scored, score
from easyeditor.lm.weights import frozen
from easyeditor.values.edit import EditRequest, Probe
from easyeditor.values.record import Side


@dataclass(frozen=True, kw_only=True)
class RequestScores:
    """Everything scored for one request on one state of the model."""

    rewrite: Scored
    rephrase: tuple[Scored, ...]
    locality: Mapping[str, tuple[Scored, ...]]
    portability: Mapping[str, tuple[Scored, ...]]
    ground_truth: Scored | None

    def side(self, before: RequestScores | None = None, ppl: float | None = None) -> Side:
        """Under EasyEdit's names; locality is agreement with `before`."""
        return Side(
            rewrite=(self.rewrite.accuracy,),
            rephrase=tuple(s.accuracy for s in self.rephrase),
            said={key: tuple(s.said for s in scores) for key, scores in self.locality.items()},
            locality={} if before is None else self.agreement(before),
            portability={key: tuple(s.accuracy for s in scores) for key, scores in self.portability.items()},
            ppl=ppl,
        )

    def agreement(self, before: RequestScores) -> dict[str, tuple[float, ...]]:
        """Locality: by key, each prompt's agreement with what was said `before`."""
        pairs = {key: zip(before.locality[key], scores, strict=True) for key, scores in self.locality.items()}
        return {key: tuple(agreement(old, new) for old, new in both) for key, both in pairs.items()}

    def to_json(self, before: RequestScores | None = None) -> dict[str, Any]:
        """`side` as EasyEdit's record has it, without perplexity."""
        return {key: value for key, value in self.side(before).to_json().items() if key != "ppl"}

    def probabilities(self) -> dict[str, float | None]:
        """P(target_new | prompt) and P(ground_truth | prompt), per-token geometric means."""
        truth = self.ground_truth.probability if self.ground_truth is not None else None
        return {"target_new": self.rewrite.probability, "ground_truth": truth}


def agreement(before: Scored, after: Scored) -> float:
    """Locality: share of the answer's positions where the first choice is the same as before the edit."""
    return sum(a == b for a, b in zip(before.said, after.said, strict=True)) / len(before.said)


def score_request(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    request: EditRequest,
    *,
    prefix: str | None = None,
    prefix_rephrase: bool = False,
    batch_tokens: int = 8192,
) -> RequestScores:
    """Score all prompts of a request in one batch.

    `prefix` is a context (with ``{}``) put before the rewrite prompt, and before rephrase prompts with
    `prefix_rephrase` (Fall of ROME's test-time prefix).
    """
    settings = Settings(prefix=prefix, prefix_rephrase=prefix_rephrase)
    pairs = list(dict.fromkeys(record_pairs(request, settings)))
    with frozen(model):
        scored = score(model, tok, pairs, batch_tokens=batch_tokens)
    return scores_of(request, dict(zip(pairs, scored, strict=True)), settings)


def record_pairs(request: EditRequest, settings: Settings) -> list[Pair]:
    """Everything a record says of a request, as (prompt, answer)."""
    prompt = settings.rewrite(request)
    answers = [answer for answer in (request.target_new, request.ground_truth) if answer is not None]
    pairs = [(prompt, answer) for answer in answers]
    pairs += [(paraphrase, request.target_new) for paraphrase in settings.rephrased(request)]
    for probes in (request.locality, request.portability):
        pairs += [pair for listed in _by_key(probes).values() for pair in listed]
    return pairs


def scores_of(request: EditRequest, scored: Mapping[Pair, Scored], settings: Settings) -> RequestScores:
    """A request's scores out of what one state of the model said to `record_pairs`, and perhaps to more."""

    def taken(probes: Mapping[str, Probe]) -> dict[str, tuple[Scored, ...]]:
        return {key: tuple(scored[pair] for pair in pairs) for key, pairs in _by_key(probes).items()}

    prompt, truth = settings.rewrite(request), request.ground_truth
    return RequestScores(
        rewrite=scored[(prompt, request.target_new)],
        ground_truth=None if truth is None else scored[(prompt, truth)],
        rephrase=tuple(scored[(paraphrase, request.target_new)] for paraphrase in settings.rephrased(request)),
        locality=taken(request.locality),
        portability=taken(request.portability),
    )


def _by_key(probes: Mapping[str, Probe]) -> dict[str, list[Pair]]:
    return {key: list(zip(probe.prompts, probe.answers, strict=True)) for key, probe in probes.items()}

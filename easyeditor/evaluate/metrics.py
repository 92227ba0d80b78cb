"""Metrics of one request under EasyEdit's names and shapes: rewrite, rephrase, locality, portability, probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.evaluate.scoring import Scored, score
from easyeditor.lm.tokens import SLOT
from easyeditor.lm.weights import frozen
from easyeditor.records import EditRequest, Probe


@dataclass(frozen=True, kw_only=True)
class RequestScores:
    """Everything scored for one request on one state of the model."""

    rewrite: Scored
    rephrase: tuple[Scored, ...]
    locality: Mapping[str, tuple[Scored, ...]]
    portability: Mapping[str, tuple[Scored, ...]]
    ground_truth: Scored | None

    def to_json(self, before: RequestScores | None = None) -> dict[str, Any]:
        """EasyEdit's record: accuracies as lists; `{key}_output` is what the model says, `{key}_acc` agreement with
        `before`."""
        record: dict[str, Any] = {"rewrite_acc": [self.rewrite.accuracy]}
        if self.rephrase:
            record["rephrase_acc"] = [s.accuracy for s in self.rephrase]
        record["locality"] = {f"{key}_output": [list(s.said) for s in scores] for key, scores in self.locality.items()}
        if before is not None:
            for key, scores in self.locality.items():
                record["locality"][f"{key}_acc"] = [
                    agreement(a, b) for a, b in zip(before.locality[key], scores, strict=True)
                ]
        record["portability"] = {f"{key}_acc": [s.accuracy for s in scores] for key, scores in self.portability.items()}
        return record

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
    `prefix_rephrase`
    (Fall of ROME's test-time prefix).
    """
    (scores,) = score_requests(
        model, tok, [request], prefixes=[prefix], prefix_rephrase=prefix_rephrase, batch_tokens=batch_tokens
    )
    return scores


def score_requests(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    prefixes: Sequence[str | None],
    prefix_rephrase: bool = False,
    batch_tokens: int = 8192,
) -> list[RequestScores]:
    """`score_request` of several requests, each with its own prefix, their prompts batched together."""
    pairs = [_pairs(r, p, p if prefix_rephrase else None) for r, p in zip(requests, prefixes, strict=True)]
    with frozen(model):
        scored = iter(score(model, tok, [pair for own in pairs for pair in own], batch_tokens=batch_tokens))
    return [_scores(request, scored) for request in requests]


def _pairs(request: EditRequest, prefix: str | None, prefix_rephrase: str | None) -> list[tuple[str, str]]:
    """Everything a request is scored on as (prompt, target), in the order `_scores` takes it."""
    rewrite_prompt = _behind(prefix, request.prompt)
    pairs = [(rewrite_prompt, request.target_new)]
    if request.ground_truth is not None:
        pairs.append((rewrite_prompt, request.ground_truth))
    pairs += [(_behind(prefix_rephrase, prompt), request.target_new) for prompt in request.rephrase_prompts]
    for probe in (*request.locality.values(), *request.portability.values()):
        pairs += zip(probe.prompts, probe.answers, strict=True)
    return pairs


def _scores(request: EditRequest, scored: Iterator[Scored]) -> RequestScores:
    def take(probes: Mapping[str, Probe]) -> dict[str, tuple[Scored, ...]]:
        return {key: tuple(next(scored) for _ in probe.prompts) for key, probe in probes.items()}

    return RequestScores(
        rewrite=next(scored),
        ground_truth=next(scored) if request.ground_truth is not None else None,
        rephrase=tuple(next(scored) for _ in request.rephrase_prompts),
        locality=take(request.locality),
        portability=take(request.portability),
    )


def _behind(prefix: str | None, prompt: str) -> str:
    return prompt if prefix is None else prefix.replace(SLOT, prompt)

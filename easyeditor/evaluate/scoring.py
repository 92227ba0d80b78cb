"""Teacher-forced scoring: what the model says at each target token, given the prompt and the target tokens before it.

Axes: N scored positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.lm.architectures import max_positions
from easyeditor.lm.budget import USUAL_TOKENS, Budget
from easyeditor.lm.loading import input_device
from easyeditor.lm.many import SideBySide
from easyeditor.lm.prompting import PLAIN, Prompting
from easyeditor.lm.scored import Batch, line, scored_logits
from easyeditor.lm.tokens import answered, check_length
from easyeditor.values.record import agreement
from easyeditor.values.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One prompt with its target: the likeliest ids at the target's positions, the target's ids, its mean
    log-probability (nats)."""

    predicted: tuple[int, ...]
    target: tuple[int, ...]
    mean_log_probability: float

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the model's first choice (EasyEdit's token-level accuracy)."""
        return agreement(self.target, self.predicted)

    @property
    def probability(self) -> float:
        """exp(mean log-probability per target token): ROME's length-normalised P(target | prompt)."""
        return math.exp(self.mean_log_probability)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    budget: Budget | None = None,
    prompting: Prompting = PLAIN,
    edits: SideBySide | None = None,
    owners: Sequence[int] = (),
    requests: Sequence[EditRequest] = (),
) -> list[Scored]:
    """Score (prompt, target) pairs; each at its own positions, whatever the tokenizer's padding side or the batch.

    `budget` bounds the tokens of a batch. With `edits`, pair i is scored on the model with edit `owners[i]`. `requests`
    are those that the pairs are of: a message names the field.

    Raises:
        DataError: a pair longer than the model's positions, or a target without tokens.
    """
    lines = [line(tok, prompt, target, prompting) for prompt, target in pairs]
    if lines:
        check_length([x.ids for x in lines], max_positions(model), lambda i: answered(requests, pairs[i][0]))
    scored: list[Scored | None] = [None] * len(pairs)

    def read(chunk: list[int]) -> None:
        batch = Batch.of([lines[i] for i in chunk], input_device(model))
        with nullcontext() if edits is None else edits.rows([owners[i] for i in chunk]):
            logs_NV = scored_logits(model, batch).float().log_softmax(1)
        predicted_N = logs_NV.argmax(1).tolist()
        log_N = logs_NV.gather(1, batch.labels_N.to(logs_NV.device).unsqueeze(1)).squeeze(1).double().tolist()
        place = 0
        for i in chunk:
            target = lines[i].labels
            end = place + len(target)
            scored[i] = Scored(
                predicted=tuple(predicted_N[place:end]),
                target=target,
                mean_log_probability=sum(log_N[place:end]) / len(target),
            )
            place = end

    (budget or Budget(USUAL_TOKENS)).each([len(x.ids) for x in lines], read)
    return [s for s in scored if s is not None]

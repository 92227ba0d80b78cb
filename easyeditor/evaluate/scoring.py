"""Teacher-forced scoring: what the model says at each target token, given the prompt and the target tokens before it.

Axes: N scored positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.lm.architectures import max_positions
from easyeditor.lm.hooks import selected_head
from easyeditor.lm.loading import input_device
from easyeditor.lm.tokens import check_length, encode, model_inputs, target_ids, token_batches


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One prompt with its target: the likeliest ids at the target's positions, the target's ids, its mean
    log-probability (nats)."""

    said: tuple[int, ...]
    target: tuple[int, ...]
    mean_log_probability: float

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the model's first choice (EasyEdit's token-level accuracy)."""
        return sum(a == b for a, b in zip(self.said, self.target, strict=True)) / len(self.target)

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
    batch_tokens: int = 8192,
) -> list[Scored]:
    """Score (prompt, target) pairs; each at its own positions, whatever the tokenizer's padding side or the batch.

    Raises:
        DataError: a pair longer than the model's positions, or a target without tokens.
    """
    prompts = [encode(tok, prompt) for prompt, _ in pairs]
    targets = [target_ids(tok, prompt, target) for prompt, target in pairs]
    rows = [prompt + target[:-1] for prompt, target in zip(prompts, targets, strict=True)]
    if rows:
        check_length(rows, max_positions(model), "the longest prompt with its target")
    scored: list[Scored | None] = [None] * len(pairs)
    for chunk in token_batches([len(row) for row in rows], batch_tokens):
        chosen = [targets[i] for i in chunk]
        where = [(place, len(prompts[i]) - 1 + t) for place, i in enumerate(chunk) for t in range(len(targets[i]))]
        at = torch.tensor(where)
        with selected_head(model, at[:, 0], at[:, 1]):
            logits_NV = model(**model_inputs([rows[i] for i in chunk], input_device(model)), use_cache=False).logits[0]
        logs_NV = logits_NV.float().log_softmax(1)
        labels_N = torch.tensor([t for target in chosen for t in target], device=logs_NV.device)
        said_N = logs_NV.argmax(1).tolist()
        log_N = logs_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1).double().tolist()
        place = 0
        for i, target in zip(chunk, chosen, strict=True):
            end = place + len(target)
            scored[i] = Scored(
                said=tuple(said_N[place:end]),
                target=tuple(target),
                mean_log_probability=sum(log_N[place:end]) / len(target),
            )
            place = end
    return [s for s in scored if s is not None]

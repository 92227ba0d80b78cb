"""Texts of which some positions are scored: prompts continued by targets, batched, their logits and losses.

Axes: B rows, T tokens, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.lm.hooks import selected_head
from easyeditor.lm.prompting import PLAIN, Prompting
from easyeditor.lm.tokens import encode, model_inputs, target_ids


@dataclass(frozen=True)
class Line:
    """One text: its ids, the positions that are scored, the ids that should come out there."""

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    labels: tuple[int, ...]


def line(tok: PreTrainedTokenizerBase, prompt: str, target: str, prompting: Prompting = PLAIN) -> Line:
    """A prompt continued by a target, every target token scored where it is predicted.

    The target's ids are those it has in the text, behind the space that belongs there (`lm/joining.py`): what the model
    reads is what is scored.

    Raises:
        DataError: the target has no tokens.
    """
    head, tail = encode(tok, prompt, prompting), target_ids(tok, prompt, target, prompting)
    return Line((*head, *tail[:-1]), tuple(range(len(head) - 1, len(head) + len(tail) - 1)), tuple(tail))


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model: inputs (B, T), and what is scored: row, position, label and weight in the loss (N)."""

    inputs: dict[str, Tensor]
    rows_N: Tensor
    positions_N: Tensor
    labels_N: Tensor
    weights_N: Tensor

    @staticmethod
    def of(lines: Sequence[Line], device: torch.device, *, mean: bool = False) -> Batch:
        """A line's loss is the mean over its labels; the batch's the sum over lines, or their mean."""
        share = 1 / len(lines) if mean else 1.0
        flat = [
            (i, position, label, share / len(x.labels))
            for i, x in enumerate(lines)
            for position, label in zip(x.scored, x.labels, strict=True)
        ]
        return Batch(
            inputs=model_inputs([x.ids for x in lines], device),
            rows_N=torch.tensor([i for i, _, _, _ in flat]).to(device, non_blocking=True),
            positions_N=torch.tensor([p for _, p, _, _ in flat]).to(device, non_blocking=True),
            labels_N=torch.tensor([label for _, _, label, _ in flat]).to(device, non_blocking=True),
            weights_N=torch.tensor([w for _, _, _, w in flat]).to(device, non_blocking=True),
        )


def scored_logits(model: PreTrainedModel, batch: Batch, *, whole: bool = False) -> Tensor:
    """Logits (N, V) at the scored positions; only those go through the output head, unless `whole`."""
    if whole:
        logits_BTV: Tensor = model(**batch.inputs, use_cache=False).logits
        return logits_BTV[batch.rows_N.to(logits_BTV.device), batch.positions_N.to(logits_BTV.device)]
    with selected_head(model, batch.rows_N, batch.positions_N):
        logits_1NV: Tensor = model(**batch.inputs, use_cache=False).logits
    return logits_1NV[0]


def nll(logits_NV: Tensor, batch: Batch) -> Tensor:
    """Weighted negative log-likelihood of the labels of each row (B), in nats."""
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    nll_N = torch.nn.functional.cross_entropy(wide, batch.labels_N.to(wide.device), reduction="none")
    rows_N = batch.rows_N.to(wide.device)
    return row_sums(nll_N * batch.weights_N.to(nll_N), rows_N, len(batch.inputs["input_ids"]))


def row_sums(values_N: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """Sums of the values that belong to each of `rows` rows (B), in one order on every device.

    `index_add` would add floats on CUDA in an order left to chance, so that no run could be repeated.
    """
    own_BN = rows_N == torch.arange(rows, device=rows_N.device).unsqueeze(1)
    return torch.where(own_BN, values_N, torch.zeros_like(values_N)).sum(1)

"""Sentences as rows of tokens, whole or in strided windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import DataError


@dataclass(frozen=True)
class Window:
    """A row of tokens of sentence `sentence`; predictions of its tokens from `first` on are scored there."""

    sentence: int
    ids: list[int]
    first: int = 1

    @property
    def scored(self) -> int:
        """Number of tokens scored."""
        return len(self.ids) - self.first


def tokenised(
    tok: PreTrainedTokenizerBase, sentences: Sequence[str], add_start_token: bool, max_length: int | None = None
) -> list[list[int]]:
    """Ids of every sentence. Raises DataError: none, or one of fewer than 2 tokens."""
    if not sentences:
        raise DataError("no sentences to measure perplexity on")
    start = [tok.bos_token_id] if add_start_token else []
    rows = [start + list(ids) for ids in tok(list(sentences), add_special_tokens=False)["input_ids"]]
    rows = [row if max_length is None else row[:max_length] for row in rows]
    for i, row in enumerate(rows):
        if len(row) < 2:
            raise DataError(f"sentence {i + 1} has fewer than 2 tokens ({sentences[i]!r}); perplexity needs at least 2")
    return rows


def too_long(
    tok: PreTrainedTokenizerBase, sentences: Sequence[str], add_start_token: bool, limit: int | None
) -> list[int]:
    """Numbers, from 1, of the sentences with more tokens than `limit`."""
    rows = tokenised(tok, sentences, add_start_token)
    return [n for n, row in enumerate(rows, 1) if limit is not None and len(row) > limit]


def windows(rows: Sequence[list[int]], size: int, stride: int) -> list[Window]:
    """Windows of `size` tokens, each `stride` further on, the last up to the end: every token but a row's first is
    scored once, behind all that its window holds before it (at least `size - stride` tokens)."""
    found = []
    for sentence, row in enumerate(rows):
        begins = range(0, max(1, stride * math.ceil((len(row) - size) / stride) + 1), stride)
        for begin in begins:
            found.append(Window(sentence, row[begin : begin + size], 1 if begin == 0 else size - stride))
    return found


def merged(nlls: Sequence[float], of: Sequence[Window]) -> tuple[list[float], list[int]]:
    """Mean NLL and number of scored tokens of every sentence, from those of its windows."""
    own: dict[int, list[tuple[float, int]]] = {}
    for nll, window in zip(nlls, of, strict=True):
        own.setdefault(window.sentence, []).append((nll, window.scored))
    counts = [sum(count for _, count in parts) for parts in own.values()]
    totals = [math.fsum(nll * count for nll, count in parts) for parts in own.values()]
    return [
        parts[0][0] if len(parts) == 1 else total / count
        for parts, total, count in zip(own.values(), totals, counts, strict=True)
    ], counts

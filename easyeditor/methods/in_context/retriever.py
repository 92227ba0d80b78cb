"""Which texts are nearest to a question: by the model's own hidden states, or by words (BM25, `bm25s`).

Axes: N texts, Q questions, D width of the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.lm.budget import Budget
from easyeditor.lm.loading import input_device
from easyeditor.lm.tokens import encode, model_inputs
from easyeditor.lm.weights import frozen

By = Literal["hidden", "bm25"]


class Retriever(Protocol):
    """Ranks texts for questions."""

    def ranked(self, texts: Sequence[str], questions: Sequence[str]) -> list[list[int]]:
        """For each question the places of all texts, the nearest first; of two that are as near the earlier."""


def retriever(by: By, model: PreTrainedModel, tok: PreTrainedTokenizerBase, budget: Budget) -> Retriever:
    """The one that hyper-parameters name. Raises ConfigError: its library is not installed."""
    return Hidden(model, tok, budget) if by == "hidden" else Words()


class Hidden(Retriever):
    """Cosine of the last hidden states, each text's mean over its tokens, less the mean over the texts."""

    def __init__(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, budget: Budget) -> None:
        self._model, self._tok, self._budget = model, tok, budget
        self._known: dict[str, Tensor] = {}  # of the texts; questions come and go

    def ranked(self, texts: Sequence[str], questions: Sequence[str]) -> list[list[int]]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= dict(zip(new, self._read(new), strict=True))
        texts_ND = torch.stack([self._known[text] for text in texts])
        middle_D = texts_ND.mean(0)
        near_QN = _unit(torch.stack(self._read(questions)) - middle_D) @ _unit(texts_ND - middle_D).T
        return near_QN.argsort(dim=1, descending=True, stable=True).tolist()

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> list[Tensor]:
        """The mean hidden state of each text, float64 on the CPU."""
        rows = [encode(self._tok, text) for text in texts]
        found: dict[int, Tensor] = {}

        def run(batch: list[int]) -> None:
            inputs = model_inputs([rows[i] for i in batch], input_device(self._model))
            hidden_BTD = self._model.base_model(**inputs, use_cache=False).last_hidden_state.double().cpu()
            found.update({i: hidden_TD[: len(rows[i])].mean(0) for i, hidden_TD in zip(batch, hidden_BTD, strict=True)})

        with frozen(self._model):
            self._budget.each([len(row) for row in rows], run)
        return [found[i] for i in range(len(texts))]


class Words(Retriever):
    """BM25 over words in lower case."""

    def __init__(self) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError(
                "retriever: bm25 needs the package bm25s: pip install 'edit-collapse[retrieve]'; or retriever: hidden"
            ) from error
        self._make = bm25s.BM25

    def ranked(self, texts: Sequence[str], questions: Sequence[str]) -> list[list[int]]:
        index = self._make()
        index.index([_words(text) for text in texts], show_progress=False)
        scores = [torch.from_numpy(index.get_scores(_words(question))) for question in questions]
        return [score.argsort(descending=True, stable=True).tolist() for score in scores]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _unit(rows_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows_ND, dim=-1)

"""Perplexity of a model on sentences: the papers' probe for collapse, plain and fast.

The papers' number is the arithmetic mean over sentences of exp(mean token NLL), no BOS (Butterfly paper, section 3).
With BOS (`ppl_bos`) the first word is scored too, and models trained to see one are on known ground.
It is heavy-tailed, so the median and the token-weighted perplexity are reported with it, under their own names.
Axes: B sentences, T tokens, N scored positions, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.evaluate.windows import Window, merged, tokenised, windows
from easyeditor.lm.architectures import Anatomy, max_positions
from easyeditor.lm.budget import Budget
from easyeditor.lm.hooks import Passage, resumed, selected_head, watched
from easyeditor.lm.loading import input_device
from easyeditor.lm.many import SideBySide
from easyeditor.lm.tokens import begins_texts_with_bos, check_length, model_inputs, token_batches
from easyeditor.lm.weights import frozen, version

LOG = logging.getLogger(__name__)

# Tokens per forward of the fast path: large enough for full matmul speed; on a CPU its logits stay ~100 MB.
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 8192}
NLL_SLICE = 16  # positions whose log-probabilities a CPU computes at once: they stay in its cache
LOGITS_TOGETHER = 2**28  # logits whose log-probabilities a GPU computes at once: 1 GiB in float32

LONG = "shorten it, leave it out, or measure it in windows (ppl.py: --skip-long, --window STRIDE)"

Step = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class PerplexityReport:
    """Perplexities of one model on one set of sentences, in the order given; `nlls` are mean nats per token."""

    perplexities: tuple[float, ...]
    nlls: tuple[float, ...]
    tokens: tuple[int, ...]
    bos: bool = False
    """Whether every sentence began with BOS."""

    @property
    def mean(self) -> float:
        """The papers' perplexity: arithmetic mean over sentences."""
        return math.fsum(self.perplexities) / len(self.perplexities) if self.finite else math.inf

    @property
    def median(self) -> float:
        """Median over sentences."""
        return statistics.median(p if math.isfinite(p) else math.inf for p in self.perplexities)

    @property
    def token_weighted(self) -> float:
        """exp(total NLL / total scored tokens): what language-model papers call perplexity."""
        total = math.fsum(n * t for n, t in zip(self.nlls, self.tokens, strict=True)) / sum(self.tokens)
        return _exp(total)

    @property
    def finite(self) -> bool:
        """False if any sentence's perplexity is NaN or infinite."""
        return all(math.isfinite(p) for p in self.perplexities)

    def worst(self, count: int) -> list[int]:
        """Indices of the sentences with the highest perplexity, worst first."""
        rank = sorted(range(len(self.nlls)), key=lambda i: -self.nlls[i] if math.isfinite(self.nlls[i]) else -math.inf)
        return rank[:count]

    def to_json(self) -> dict[str, Any]:
        """The summary numbers."""
        return {
            "mean": self.mean,
            "median": self.median,
            "token_weighted": self.token_weighted,
            "sentences": len(self.perplexities),
            "tokens": sum(self.tokens),
            "bos": self.bos,
        }


class PerplexityProbe:
    """Sentences tokenised once, measured on a model as often as its weights change.

    With `resume_layer` the first measurement keeps what block `resume_layer` is given, and later ones start there, as
    long as no weight below has changed (checked): an edit at that block or above cannot change it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        sentences: Sequence[str],
        *,
        parts: Anatomy | None = None,
        resume_layer: int | None = None,
        fast: bool = True,
        batch_size: int = 10,
        add_start_token: bool = False,
        max_length: int | None = None,
        longest: int | None = None,
        batch_tokens: int | None = None,
        stride: int | None = None,
    ) -> None:
        """`max_length` cuts sentences, as the reference can; `longest` refuses longer ones, but with a `stride` they
        are measured in windows. `batch_tokens` bounds a forward, which on a CPU has at most 512.

        Raises:
            ConfigError: a stride that leaves no context. DataError: a sentence too short or too long.
        """
        self._model = model
        self._bos = add_start_token
        rows = tokenised(tok, sentences, add_start_token, max_length)
        limit = min((n for n in (max_positions(model), longest) if n is not None), default=None)
        if stride is None or limit is None:
            check_length(rows, limit, lambda i: f"sentence {i + 1} ({sentences[i]!r:.60})", LONG)
            self._windows = [Window(i, row) for i, row in enumerate(rows)]
        elif 0 < stride < limit:
            self._windows = windows(rows, limit, stride)
        else:
            raise ConfigError(f"a stride of {stride}; allowed: 1 to {limit - 1}, so that a window has context")
        self._rows = [window.ids for window in self._windows]
        self._fast = fast
        self._resume = None
        if fast and resume_layer and parts is not None and parts.architecture.replay:
            self._resume = (parts, resume_layer)
        kind = input_device(model).type
        most = TOKENS_PER_FORWARD.get(kind, TOKENS_PER_FORWARD["cuda"])
        if batch_tokens is not None:
            most = min(most, batch_tokens) if kind == "cpu" else batch_tokens
        self._budget, self._many = Budget(most), Budget(most)
        self._batch_size = batch_size
        self._passages: list[Passage] = []
        self._below: object = None

    def measure(self, step: Step | None = None) -> PerplexityReport:
        """Perplexities with the model's present weights; `step(done, of)` is called after every batch."""
        self._forget_if_changed()
        lengths = [len(row) for row in self._rows]
        nlls, done = [0.0] * len(lengths), 0

        def ask(batch: list[int]) -> None:
            nonlocal done
            rows = [self._windows[i] for i in batch]
            start = self._passages[done] if done < len(self._passages) else None
            values = self._fast_nlls(rows, start, keep=True) if self._fast else self._plain_nlls(rows)
            for i, value in zip(batch, values, strict=True):
                nlls[i] = value
            done += 1
            if step is not None:
                plain = -(-len(lengths) // self._batch_size)
                step(done, len(token_batches(lengths, self._budget.tokens)) if self._fast else plain)

        def again() -> None:
            nonlocal done
            done = 0
            self._passages.clear()  # they are of other batches

        with torch.inference_mode(), frozen(self._model):
            if self._fast:
                self._budget.each(lengths, ask, again=again)
            else:
                for first in range(0, len(lengths), self._batch_size):
                    ask(list(range(len(lengths))[first : first + self._batch_size]))
        return self._report(nlls)

    def measure_each(self, edits: SideBySide, count: int) -> list[PerplexityReport]:
        """Perplexities of the model with each of `count` edits, their sentences sharing forwards.

        Which sentences share one depends on the number of edits alone, and what is computed below them is not again.
        """
        self._forget_if_changed()
        owned = [(edit, i) for edit in range(count) for i in range(len(self._rows))]
        nlls = [[0.0] * len(self._rows) for _ in range(count)]
        resumes = self._resume is not None and bool(self._passages) and edits.lowest >= self._resume[1]

        def ask(batch: list[int]) -> None:
            own = [owned[n] for n in batch]
            rows = [i for _, i in own]
            start = self._passage(rows) if resumes else None
            with edits.rows([edit for edit, _ in own]):
                values = self._fast_nlls([self._windows[i] for i in rows], start)
            for (edit, i), value in zip(own, values, strict=True):
                nlls[edit][i] = value

        with torch.inference_mode(), frozen(self._model):
            self._many.each([len(self._rows[i]) for _, i in owned], ask)
        return [self._report(own) for own in nlls]

    def _passage(self, rows: list[int]) -> Passage:
        """What the resume layer is given for these sentences, taken from what it was given for all."""
        batches = token_batches([len(row) for row in self._rows], self._budget.tokens)
        at = {i: (n, place) for n, batch in enumerate(batches) for place, i in enumerate(batch)}
        first = self._passages[0]
        width = max(len(self._rows[i]) for i in rows)
        hidden_BTD = first.hidden_BTD.new_zeros(len(rows), width, first.hidden_BTD.shape[2])
        for b, i in enumerate(rows):
            (n, place), length = at[i], len(self._rows[i])
            hidden_BTD[b, :length] = self._passages[n].hidden_BTD[place, :length]
        return Passage(hidden_BTD, first.tuple_output)

    def _report(self, nlls: Sequence[float]) -> PerplexityReport:
        nlls, tokens = merged(nlls, self._windows)
        return PerplexityReport(
            perplexities=tuple(_exp(nll) for nll in nlls),
            nlls=tuple(nlls),
            tokens=tuple(tokens),
            bos=self._bos,
        )

    def _plain_nlls(self, rows: list[Window]) -> list[float]:
        """The oracle: full forward, all logits, then a mask."""
        inputs = model_inputs([row.ids for row in rows], input_device(self._model))
        logits_BTV = self._model(**inputs, use_cache=False).logits[:, :-1].float()
        labels_BT, mask_BT = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:]
        nll_BT = torch.nn.functional.cross_entropy(
            logits_BTV.transpose(1, 2), labels_BT.to(logits_BTV.device), reduction="none"
        )
        mask_BT = mask_BT.to(nll_BT.device)
        for b, row in enumerate(rows):
            mask_BT[b, : row.first - 1] = 0
        return ((nll_BT * mask_BT).sum(1) / mask_BT.sum(1)).tolist()

    def _fast_nlls(self, rows: list[Window], start: Passage | None, *, keep: bool = False) -> list[float]:
        """Only real positions reach the head; with `start` blocks below the resume layer are not run again, else with
        `keep` what it is given is kept."""
        inputs = model_inputs([row.ids for row in rows], input_device(self._model))
        at_N2 = torch.tensor([(i, p) for i, row in enumerate(rows) for p in range(row.first - 1, len(row.ids) - 1)])
        labels_N = torch.tensor([token for row in rows for token in row.ids[row.first :]])
        with selected_head(self._model, at_N2[:, 0], at_N2[:, 1]):
            logits_NV = self._forward(inputs, start, keep).logits[0]
        nll_N = _nll(logits_NV, labels_N.to(logits_NV.device, non_blocking=True)).double().cpu()
        sums_B = torch.zeros(len(rows), dtype=torch.float64).index_add(0, at_N2[:, 0], nll_N)
        return (sums_B / torch.tensor([float(row.scored) for row in rows])).tolist()

    def _forward(self, inputs: dict[str, Tensor], start: Passage | None, keep: bool) -> Any:
        if self._resume is None or (start is None and not keep):
            return self._model(**inputs, use_cache=False)
        parts, layer = self._resume
        if start is not None:
            with resumed(parts.blocks, layer, start):
                return self._model(**inputs, use_cache=False)
        with watched(parts.block(layer)) as passages:
            output = self._model(**inputs, use_cache=False)
        self._passages += passages
        return output

    def _forget_if_changed(self) -> None:
        if self._resume is None:
            return
        parts, layer = self._resume
        above = {id(p) for block in parts.blocks[layer:] for p in block.parameters()}
        now = version(p for p in self._model.parameters() if id(p) not in above)
        if now != self._below or sum(len(p.hidden_BTD) for p in self._passages) != len(self._rows):
            self._passages, self._below = [], now


def begins_with_bos(tok: PreTrainedTokenizerBase, ppl_bos: str) -> bool:
    """What `ppl_bos` means for a tokenizer. Warns, in one line, where a BOS the model is used to is left out.

    Raises:
        ConfigError: `always`, and the tokenizer has no BOS.
    """
    if ppl_bos == "always" and tok.bos_token_id is None:
        raise ConfigError("ppl_bos is always, and the tokenizer has no BOS token; use auto or papers")
    adds = begins_texts_with_bos(tok)
    if adds and ppl_bos == "papers":
        LOG.warning(
            "perplexity is measured without BOS, as in the papers, and this tokenizer begins every text with one (%s); "
            "ppl_bos: auto measures with it",
            tok.bos_token,
        )
    return ppl_bos == "always" or (adds and ppl_bos == "auto")


def _nll(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log p(label), in slices so that the float32 temporaries stay small.

    On a CPU laid out as (1, V, N), like the reference: torch's CPU kernel for that layout sums the softmax in a plain
    float32 loop and comes out 1.4e-4 low at 49,152 words (docs/compat.md). The same operation keeps numbers comparable
    with published ones. Other devices have no such kernel, and take their logits as they lie.
    """
    on_cpu = logits_NV.device.type == "cpu"
    together = NLL_SLICE if on_cpu else max(1, LOGITS_TOGETHER // logits_NV.shape[1])
    parts = []
    for logits, labels in zip(torch.split(logits_NV, together), torch.split(labels_N, together), strict=True):
        logits = logits.float()
        if on_cpu:
            logits, labels = logits.t().unsqueeze(0), labels.unsqueeze(0)
        parts.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").flatten())
    return torch.cat(parts)


def _exp(nll: float) -> float:
    """exp that says infinity rather than raising, and keeps NaN."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf

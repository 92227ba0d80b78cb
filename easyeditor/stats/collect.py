"""One streaming pass over a corpus: the second moments of the keys at all wanted layers.

Documents go by in windows; a window is tokenised, sorted by length and cut into padded batches under a token budget, so
memory does not depend on the model's longest position. Products are made in `sums` precision (float32 by default) and
added to float64 totals after every window. From time to time the totals are checkpointed atomically; a run that resumes
goes on from there, bit-equal to one that was never stopped.

Axes: N tokens of a batch, K key width.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import DataError, StatsError
from easyeditor.base.files import parse_json, write_tensors
from easyeditor.base.reading import open_tensors
from easyeditor.lm.architectures import Anatomy, longest
from easyeditor.lm.budget import Budget
from easyeditor.lm.hooks import StopForward, stopping, tapped
from easyeditor.lm.loading import input_device
from easyeditor.lm.precision import products
from easyeditor.lm.tokens import encode, model_inputs
from easyeditor.lm.weights import frozen, sample
from easyeditor.stats.corpus import Corpus

LOG = logging.getLogger(__name__)

WINDOW = 64  # documents tokenised, sorted and summed together
FAST_WINDOW = 8  # the same where a number of tokens ends the pass: it ends at a window's end
BANDS = 6
SECONDS = 60.0  # between checkpoints
SHARE = 0.05  # of the time, at most, goes into writing them: GPT-J's six layers are 13 GB each time

Tick = Callable[[int, int, int], None]
"""Called after every window with (documents done, documents wanted, tokens done)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the numbers of a collection."""

    layers: tuple[int, ...]
    samples: int
    max_length: int
    batch_tokens: int
    sums: str = "float32"
    """Precision of the products k k^T within a window; totals are always float64."""
    tokens: int | None = None
    """Stop at the first window's end with at least this many tokens (fast mode); None: use all samples."""


@dataclass
class Pace:
    """When the totals are written: after `seconds`, or so long after the last writing that it took at most SHARE of the
    time; or after `every` windows, where that is given."""

    seconds: float = SECONDS
    every: int | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._windows, self._since, self._took = 0, self.clock(), 0.0

    def due(self) -> bool:
        """Asked after every window."""
        self._windows += 1
        if self.every is not None:
            return self._windows >= self.every
        return self.clock() - self._since >= max(self.seconds, self._took * (1 - SHARE) / SHARE)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing of the totals."""
        started = self.clock()
        yield
        self._since = self.clock()
        self._windows, self._took = 0, self._since - started


@dataclass
class Totals:
    """Sums so far, per layer (K, K) float64, and what they hold."""

    sums: dict[int, Tensor]
    documents: int = 0
    tokens: int = 0


@products("exact")
def collect(
    parts: Anatomy,
    tok: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    pace: Pace | None = None,
    tick: Tick | None = None,
) -> Totals:
    """Sum k k^T over the corpus's first `samples` documents, each cut at `max_length` tokens, for all layers in one
    pass.

    In a process group documents are dealt out by rank and the sums all-reduced at the end.

    Raises:
        DataError: no document with text. StatsError: `resume` finds a checkpoint of another collection.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    identity = _identity(parts.model, corpus, settings, rank, world)
    totals = Totals(sums={})
    if resume and checkpoint is not None:
        totals = _read_checkpoint(checkpoint, identity, parts)
    wanted = len(range(rank, settings.samples, world))
    share = None if settings.tokens is None else -(-settings.tokens // world)
    budget = Budget(settings.batch_tokens)
    pace = Pace() if pace is None else pace
    size = WINDOW if settings.tokens is None else FAST_WINDOW
    documents = corpus.slice(totals.documents * world, settings.samples, rank, world)  # of this rank, not yet done
    with torch.inference_mode(), frozen(parts.model):
        while (share is None or totals.tokens < share) and (texts := list(islice(documents, size))):
            _add_window(parts, tok, texts, settings, totals, budget)
            if checkpoint is not None and pace.due():
                with pace.writing():
                    _write_checkpoint(checkpoint, identity, totals)
            if tick is not None:
                tick(totals.documents, wanted, totals.tokens)
    if world > 1:
        _reduce(totals, parts, settings)
    if not totals.tokens:
        raise DataError(f"corpus {corpus.name!r}: no document with text in the first {settings.samples}")
    return totals


def _add_window(
    parts: Anatomy, tok: PreTrainedTokenizerBase, texts: list[str], settings: Settings, totals: Totals, budget: Budget
) -> None:
    """Empty documents count, so that places stay fixed."""
    limit = longest(parts.model, settings.max_length)
    rows = [encode(tok, text)[:limit] for text in texts if text.strip()]
    add_rows(parts, [row for row in rows if row], settings, totals, budget=budget)
    totals.documents += len(texts)


def add_rows(
    parts: Anatomy,
    rows: Sequence[Sequence[int]],
    settings: Settings,
    totals: Totals,
    *,
    skipped: int = 0,
    budget: Budget | None = None,
) -> None:
    """Add the keys of all tokens of `rows` (token ids) to `totals`, the first `skipped` of each row left out."""
    window: dict[int, Tensor] = {}
    budget = Budget(settings.batch_tokens) if budget is None else budget
    budget.each(
        [len(row) for row in rows],
        lambda batch: _add_batch(parts, [rows[i] for i in batch], settings, window, skipped),
        again=window.clear,  # a batch that was cut short has reached some layers
    )
    for layer, sum_KK in window.items():
        total = totals.sums.setdefault(layer, torch.zeros_like(sum_KK, dtype=torch.float64))
        total.add_(sum_KK.triu() + sum_KK.triu(1).T)
    totals.tokens += sum(len(row) - skipped for row in rows)


def _add_batch(
    parts: Anatomy, rows: Sequence[Sequence[int]], settings: Settings, window: dict[int, Tensor], skipped: int
) -> None:
    inputs = model_inputs(rows, input_device(parts.model))
    width = inputs["input_ids"].shape[1]
    places = [i * width + t for i, row in enumerate(rows) for t in range(skipped, len(row))]
    place_N = torch.tensor(places, dtype=torch.long)  # of a mask, the host would wait for how many it holds

    def add(layer: int, keys_BTK: Tensor) -> None:
        keys_NK = keys_BTK.flatten(0, 1)[place_N.to(keys_BTK.device, non_blocking=True)]
        keys_NK = keys_NK.to(getattr(torch, settings.sums))
        if layer not in window:
            window[layer] = keys_NK.new_zeros(keys_NK.shape[1], keys_NK.shape[1])
        add_products(window[layer], keys_NK)
        if layer == max(settings.layers):
            raise StopForward

    with ExitStack() as taps:
        taps.enter_context(stopping())
        for layer in settings.layers:
            taps.enter_context(tapped(parts.rewrite(layer), on_input=partial(add, layer)))
        parts.model(**inputs, use_cache=False)


def add_products(sum_KK: Tensor, keys_NK: Tensor) -> None:
    """Add K^T K to the upper triangle of `sum_KK`, in bands of rows: k k^T is symmetric, so 7/12 of the products do.

    What is below the diagonal is not meant to be read.
    """
    for start in range(0, len(sum_KK), band := -(-len(sum_KK) // BANDS)):
        sum_KK[start : start + band, start:].addmm_(keys_NK[:, start : start + band].T, keys_NK[:, start:])


def _reduce(totals: Totals, parts: Anatomy, settings: Settings) -> None:
    """Sum over ranks; a rank without documents takes part with zeros."""
    for layer in sorted(settings.layers):
        device = parts.model.get_parameter(parts.weight_name(layer)).device
        if layer not in totals.sums:
            shape = parts.key_width(layer)
            totals.sums[layer] = torch.zeros(shape, shape, dtype=torch.float64, device=device)
        dist.all_reduce(totals.sums[layer])
    counts = torch.tensor([totals.documents, totals.tokens], device=input_device(parts.model))
    dist.all_reduce(counts)
    totals.documents, totals.tokens = (int(count) for count in counts)


def _identity(model: PreTrainedModel, corpus: Corpus, settings: Settings, rank: int, world: int) -> dict[str, str]:
    return {
        **{key: str(value) for key, value in asdict(settings).items()},
        **{"weights": sample(model), "corpus": corpus.identity, "layers": str(sorted(settings.layers))},
        "rank": f"{rank} of {world}",
    }


def _write_checkpoint(path: Path, identity: dict[str, str], totals: Totals) -> None:
    state = {**identity, "done": json.dumps([totals.documents, totals.tokens])}
    write_tensors(path, {str(layer): total for layer, total in totals.sums.items()}, state)
    LOG.debug("checkpoint of %d documents", totals.documents)


def _read_checkpoint(path: Path, identity: dict[str, str], parts: Anatomy) -> Totals:
    """The totals, each where its layer's keys come from: later windows are added there, ranks reduce them there."""
    if not path.exists():
        return Totals(sums={})
    try:
        with open_tensors(path) as opened:
            state = dict(opened.metadata() or {})
            sums = {int(key): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            documents, tokens = parse_json(state.pop("done"))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StatsError(f"{path}: not a readable checkpoint ({error}); delete it to start again") from error
    differing = [key for key in identity if state.get(key) != identity[key]]
    if differing:
        found = ", ".join(f"{key} {state.get(key)!r:.60} instead of {identity[key]!r:.60}" for key in differing)
        raise StatsError(f"{path}: a checkpoint of another collection ({found}); delete it, or run without --resume")
    placed = {
        layer: total.to(parts.model.get_parameter(parts.weight_name(layer)).device) for layer, total in sums.items()
    }
    return Totals(sums=placed, documents=documents, tokens=tokens)

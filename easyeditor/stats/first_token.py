"""Second moments of first tokens' keys and of later tokens' keys: what first-token protection uses.

The first token of a text attends to itself alone, so its key depends on the token and on nothing else: one pass over
the vocabulary gives the exact second moment of *all* first-token keys,

    M = mean over tokens t that may begin a text of k(t) k(t)^T,

those being the words of the vocabulary with a capital and no space before it (or in a script without capitals).

Where the tokenizer puts a BOS before every text, the first token is always the BOS, and M = k(BOS) k(BOS)^T.
Later tokens' keys are ordinary; a few ten thousand of them, from the texts of `data/texts.txt`, which name
nothing that a request of data/ is about, give C_later.

Both are kept next to the statistics as `<stats_dir>/<model>/first-tokens-…_stats/` and `later-tokens-…_stats/`, in
their form (float64), with a manifest that says whose weights they are.

Axes: K key width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import DataError
from easyeditor.base.paths import SHIPPED
from easyeditor.base.reading import read_text
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.precision import products
from easyeditor.lm.tokens import encode
from easyeditor.lm.weights import frozen, sample
from easyeditor.stats.collect import Settings, Totals, add_rows
from easyeditor.stats.store import Manifest, StatsKey, read_moment, write_moment

LOG = logging.getLogger(__name__)

TEXTS = SHIPPED / "data" / "texts.txt"
"""Short texts that name no subject and no answer of a request of data/ (data/build_texts.py), one a line."""
BATCH_TOKENS = 4096
LONGEST = 64  # tokens kept of a text
ROWS_TOGETHER = 8192  # rows summed before they are added to the float64 total


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token rows whose keys are summed; `skipped` tokens at the start of each are left out."""

    name: str
    rows: tuple[tuple[int, ...], ...]
    skipped: int

    @property
    def identity(self) -> str:
        """Changes with any token."""
        return hashlib.sha256(json.dumps([self.rows, self.skipped]).encode()).hexdigest()

    def key(self, stats_dir: str, model_name: str, module: str) -> StatsKey:
        """Where the moment of one module is kept."""
        dataset = f"{self.name}-{self.identity[:8]}"
        samples = len(self.rows)
        return StatsKey(
            stats_dir=stats_dir, model_name=model_name, module=module, dataset=dataset, dtype="float64", samples=samples
        )


def first_tokens(tok: PreTrainedTokenizerBase) -> Texts:
    """One row for each token that may begin a text: the BOS alone where the tokenizer puts one, else the vocabulary's
    words with a capital (or in a script without capitals).

    Raises:
        DataError: no token of the vocabulary may.
    """
    start = tuple(encode(tok, "a"))
    if len(start) > len(tok("a", add_special_tokens=False)["input_ids"]):
        return Texts(name="first-tokens", rows=(start[:1],), skipped=0)
    texts = {token: tok.decode([token]) for token in sorted(tok.get_vocab().values())}
    rows = tuple((token,) for token, text in texts.items() if _begins(text) and encode(tok, text) == [token])
    if not rows:
        raise DataError("no token of this tokenizer's vocabulary is a word that may begin a text")
    return Texts(name="first-tokens", rows=rows, skipped=0)


def later_tokens(tok: PreTrainedTokenizerBase, given: Sequence[str] | None = None) -> Texts:
    """The texts of `data/texts.txt` (or those given), whose first token is left out."""
    texts = read_text(TEXTS).splitlines() if given is None else given
    rows = [tuple(encode(tok, text)[:LONGEST]) for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise DataError("no text has a second token, so there is no ordinary key to measure")
    return Texts(name="later-tokens", rows=tuple(rows), skipped=1)


@products("exact")
def moments(
    parts: Anatomy, texts: Texts, layers: Sequence[int], *, stats_dir: str, model_name: str
) -> dict[int, Tensor]:
    """The second moment (K, K) of the keys of `texts` at each layer, float64; read where it is kept, else collected in
    one pass and kept. A single row (a BOS) is not worth keeping.

    Raises:
        StatsError: a kept file is damaged or of other weights. OutputError: it cannot be written.
    """
    keys = {layer: texts.key(stats_dir, model_name, parts.rewrite_name(layer)) for layer in layers}
    found: dict[int, Tensor] = {}
    weights = sample(parts.model)
    for layer, key in keys.items():
        if (path := key.find()) is not None:
            found[layer] = read_moment(path, parts.key_width(layer), weights)
    lacking = [layer for layer in layers if layer not in found]
    if lacking:
        LOG.info("collecting keys of %d %s at layers %s", len(texts.rows), texts.name.replace("-", " "), lacking)
        totals = _sums(parts, texts, lacking)
        for layer in lacking:
            found[layer] = (totals.sums[layer] / totals.tokens).cpu()
            if len(texts.rows) > 1:
                _keep(keys[layer], totals, parts, layer, texts, weights)
    return {layer: found[layer] for layer in layers}


def _sums(parts: Anatomy, texts: Texts, layers: Sequence[int]) -> Totals:
    settings = Settings(
        layers=tuple(layers),
        samples=len(texts.rows),
        max_length=0,
        batch_tokens=BATCH_TOKENS,
        sums=_sums_dtype(parts),
    )
    totals = Totals(sums={})
    with torch.inference_mode(), frozen(parts.model):
        for start in range(0, len(texts.rows), ROWS_TOGETHER):
            rows = texts.rows[start : start + ROWS_TOGETHER]
            add_rows(parts, rows, settings, totals, skipped=texts.skipped)
    return totals


def _sums_dtype(parts: Anatomy) -> str:
    """float32, or float64 for a model in it."""
    return str(torch.promote_types(parts.model.dtype, torch.float32)).removeprefix("torch.")


def _keep(key: StatsKey, totals: Totals, parts: Anatomy, layer: int, texts: Texts, weights: str) -> None:
    manifest = Manifest(
        module=key.module,
        model_name=key.model_name,
        weights=weights,
        corpus=texts.name,
        corpus_identity=texts.identity,
        samples=len(texts.rows),
        documents=len(texts.rows),
        tokens=totals.tokens,
        max_length=max(map(len, texts.rows)),
        sums=_sums_dtype(parts),
    )
    key.paths[0].parent.mkdir(parents=True, exist_ok=True)
    write_moment(key.paths[0], totals.sums[layer], manifest)


def _begins(text: str) -> bool:
    return text.isalpha() and not text[0].islower()

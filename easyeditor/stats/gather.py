"""Collect statistics and put them where editing looks for them: what the command and `collect_stats: auto` share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError, OutputError
from easyeditor.base.progress import progress_bar
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.weights import sample
from easyeditor.stats.collect import Pace, Settings, collect
from easyeditor.stats.corpus import open_corpus
from easyeditor.stats.store import Manifest, StatsKey, write_moment

MAX_LENGTH = 1024
BATCH_TOKENS = 4096


def gather(
    parts: Anatomy,
    tok: PreTrainedTokenizerBase,
    keys: Mapping[int, StatsKey],
    *,
    corpus: str | None = None,
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    sums: str = "float32",
    tokens: int | None = None,
    resume: bool = False,
    pace: Pace | None = None,
    show: bool = False,
) -> list[Path]:
    """Collect the moments of all layers in `keys` in one pass and write their files; returns the paths.

    Under torchrun every rank calls this; rank 0 writes. A checkpoint next to the files lets `resume` go on.

    Raises:
        ConfigError: samples, lengths or budgets below 1. DataError: nothing to read. OutputError: nowhere to write.
    """
    first = next(iter(keys.values()))
    for name, value in (("samples", first.samples), ("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; allowed: 1 or more")
    rank = dist.get_rank() if dist.is_initialized() else 0
    folder = first.paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror or error})") from error
    opened = open_corpus(corpus or first.dataset)
    settings = Settings(
        layers=tuple(sorted(keys)),
        samples=first.samples,
        max_length=max_length,
        batch_tokens=batch_tokens,
        sums=sums,
        tokens=tokens,
    )
    layers = "-".join(map(str, settings.layers))
    checkpoint = folder / f".collecting-layers-{layers}-samples-{first.samples}-rank-{rank}.safetensors"
    started = time.perf_counter()
    with progress_bar("statistics (documents)", show and rank == 0) as bar:

        def tick(done: int, wanted: int, seen: int) -> None:
            if bar is not None:
                bar(done, wanted, f"{seen / (time.perf_counter() - started):,.0f} tokens/s")

        totals = collect(parts, tok, opened, settings, checkpoint=checkpoint, resume=resume, pace=pace, tick=tick)
    for layer, key in keys.items() if rank == 0 else ():
        made = Manifest(
            module=parts.rewrite_name(layer),
            model_name=key.model_name,
            weights=sample(parts.model),
            corpus=opened.name,
            corpus_identity=opened.identity,
            samples=first.samples,
            documents=totals.documents,
            tokens=totals.tokens,
            max_length=max_length,
            sums=sums,
        )
        write_moment(key.paths[0], totals.sums[layer], made)
    checkpoint.unlink(missing_ok=True)
    return [key.paths[0] for key in keys.values()]

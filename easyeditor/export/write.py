"""Adapters and edited checkpoints as folders that others load, each with a model card and edit.json."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.files import whole_folder, write_json, write_tensors, write_text
from easyeditor.export.adapter import CONFIG_FILE, MODEL_FILE, Adapter, adapter_of, lost_by_module
from easyeditor.export.card import About, Kind, texts
from easyeditor.export.sources import Measured, hub_name, place_of
from easyeditor.lm import embedded
from easyeditor.lm.architectures import left_out
from easyeditor.lm.loading import save
from easyeditor.lm.weights import applied, fingerprint
from easyeditor.values.edit import EditResult

LOG = logging.getLogger(__name__)


def export(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    edits: Sequence[EditResult],
    folder: Path,
    *,
    kind: Kind,
    base: str,
    measured: Sequence[Measured | None] = (),
    rank: int | None = None,
) -> Adapter | None:
    """Write the unedited `model` with `edits`, in order, as an adapter, a checkpoint, or a checkpoint with the adapter
    merged in. `base` is the model's name: the adapter's config has its place, the card its hub name. Returns the
    adapter, if one was made.

    Raises:
        DataError: an edit of another model, or one that an adapter cannot hold. ConfigError: it needs a rank.
        OutputError: the folder holds something, or cannot be written.
    """
    for edit in edits:
        edit.check_weights(str(folder), "export")
    deltas = [delta for edit in edits for delta in edit.deltas]
    with applied(model, deltas):
        pass  # an edit of another model is refused before anything is written
    adapter = None if kind == "checkpoint" else adapter_of(model, deltas, rank)
    known = embedded.find(model.name_or_path) or embedded.find(base)  # `base` may be a name given by hand
    about = About(
        kind=kind,
        base=hub_name(base),
        fingerprint=fingerprint(model),
        edits=edits,
        measured=measured,
        embedded=known,
        rank=None if adapter is None else adapter.rank,
        lost={} if adapter is None else lost_by_module(adapter),
        left_out=[] if kind == "adapter" else left_out(model),
    )
    if kind == "adapter":
        assert adapter is not None
        _write_adapter(folder, adapter, place_of(base), texts(about))
        return adapter
    if about.left_out:
        LOG.warning("%s: its language model alone is loaded and saved; left out: %s", base, ", ".join(about.left_out))
    with applied(model, deltas if adapter is None else [made.delta() for made in adapter.factors]):
        save(model, tok, folder, texts(about))
    return adapter


def _write_adapter(folder: Path, adapter: Adapter, base: str, files: dict[str, str]) -> None:
    with whole_folder(folder) as part:
        write_tensors(part / MODEL_FILE, adapter.tensors(), {"format": "pt"})
        write_json(part / CONFIG_FILE, adapter.config(base))
        for name, text in files.items():
            write_text(part / name, text)

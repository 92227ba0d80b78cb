"""Value searches kept in a folder: experiments on the same sets need the same ones, and they are what takes long."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from easyeditor.errors import DataError
from easyeditor.files import to_json, write_tensors
from easyeditor.methods.locate.targets import Found
from easyeditor.methods.rome.method import ROME
from easyeditor.records import EditRequest


class ValueStore:
    """One safetensors file for each search, named by the SHA-256 of everything that decides its result.

    That is: the model's weights, the layer, the request, the contexts, the search's settings. ROME and C-ROME share a
    search, with and without C; `consistent_value` is one of the settings.
    """

    def __init__(self, folder: Path, method: ROME, fingerprint: str, layer: int) -> None:
        h = method.hparams
        self._folder = folder
        self._identity = {
            "model": fingerprint,
            "layer": layer,
            "contexts": list(method.contexts),
            "search": dataclasses.asdict(method.search_settings()),
            "consistent_value": h.consistent_value,
            "fact_token": h.fact_token,
            "rewrite": method.parts.weight_name(layer),
        }

    def read(self, request: EditRequest) -> Found | None:
        """The search of a request, or None when it is not there. Raises DataError: a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(request)
        if not path.exists():
            return None
        try:
            kept = load_file(path)
            losses: list[Any] = kept["losses"].tolist()
            return Found(kept["initial"], kept["offset"], [(row[0], row[1], row[2], row[3]) for row in losses])
        except (OSError, SafetensorError, KeyError, IndexError) as error:
            raise DataError(f"{path}: not a whole value search ({error}); remove it") from error

    def write(self, request: EditRequest, found: Found) -> None:
        """Keep a search."""
        import torch

        losses = torch.tensor(found.losses, dtype=torch.float64)
        write_tensors(self._path(request), {"initial": found.initial_D, "offset": found.offset_D, "losses": losses})

    def _path(self, request: EditRequest) -> Path:
        asked = {**self._identity, "place": list(request.place), "target_new": request.target_new}
        return self._folder / f"{hashlib.sha256(to_json(asked).encode()).hexdigest()[:32]}.safetensors"

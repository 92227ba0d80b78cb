"""Targets of value searches kept on disk, one safetensors file per request, so that nothing is searched twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from easyeditor.base.errors import StatsError
from easyeditor.base.files import parse_json, write_tensors
from easyeditor.base.reading import open_tensors
from easyeditor.lm.joining import joined, spaced
from easyeditor.methods.locate.hparams import LocateHyperParams
from easyeditor.methods.locate.value_search import Found
from easyeditor.values.edit import EditRequest


class SearchCache:
    """Reads and writes targets under a name that holds all they depend on: request, weights, contexts, where and how
    they are searched. The statistics are not among them, so ROME and C-ROME share theirs, with and without C."""

    SETTINGS = ("v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "fact_token")

    def __init__(
        self, hparams: LocateHyperParams, model_fingerprint: str, contexts: Sequence[str], where: Sequence[Any]
    ) -> None:
        """`where` names what the offset is added to, and from which initial value."""
        assert hparams.targets_dir is not None
        self._folder = Path(hparams.targets_dir)
        settings = {key: getattr(hparams, key) for key in self.SETTINGS}
        if hparams.early_stop != "loss":  # searches saved before there was a choice keep their names
            settings |= {key: getattr(hparams, key) for key in ("early_stop", "prob_cutoff", "early_stop_rows")}
        if hparams.chat_template or hparams.target_eos:
            settings |= {key: getattr(hparams, key) for key in ("chat_template", "target_eos")}
        if hparams.chat_template and hparams.chat_template_kwargs:
            settings["chat_template_kwargs"] = hparams.chat_template_kwargs
        for key, usual in (("matmul", "exact"), ("v_optimizer", "adam")):
            if getattr(hparams, key) != usual:
                settings[key] = getattr(hparams, key)
        self._space = hparams.target_space
        self._identity = [model_fingerprint, list(contexts), settings, list(where)]

    def read(self, request: EditRequest, device: torch.device) -> Found | None:
        """The saved search of a request on `device`, or None. Raises StatsError if the file is damaged."""
        if not (path := self._path(request)).exists():
            return None
        try:
            with open_tensors(path) as opened:
                losses = parse_json(opened.metadata()["losses"])
                initial, offset = opened.get_tensor("initial"), opened.get_tensor("offset")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise StatsError(f"{path}: not a readable target ({error}); delete it") from error
        return Found(initial_D=initial.to(device), offset_D=offset.to(device), losses=[tuple(row) for row in losses])

    def write(self, request: EditRequest, found: Found) -> None:
        """Save a search."""
        tensors = {"initial": found.initial_D, "offset": found.offset_D}
        write_tensors(self._path(request), tensors, {"losses": json.dumps(found.losses)})

    def _path(self, request: EditRequest) -> Path:
        what = [request.prompt, request.subject, request.subject_start, request.target_new, *self._identity]
        said = joined(request.prompt, request.target_new, self._space)
        if said != (request.prompt, spaced(request.target_new)):  # else the name that such a search always had
            what.append(said)
        return self._folder / (hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32] + ".safetensors")

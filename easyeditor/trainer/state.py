"""Everything a training run needs to go on: one safetensors file, numbers as tensors, the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from easyeditor.base.errors import ConfigError, DataError, OutputError
from easyeditor.base.files import check_new, parse_json, read_json, write_tensors
from easyeditor.base.reading import open_tensors
from easyeditor.methods.mend.hparams import MENDTrainingHparams
from easyeditor.methods.mend.hypernet import Hypernetwork
from easyeditor.results.run import MANIFEST, TRAINING

STATE = "last.safetensors"


class MadeFrom:
    """An object whose parts are made from its model, tokenizer and settings: none of these may be assigned later."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("model", "tok", "config") and name in self.__dict__:
            kind = type(self).__name__
            raise ConfigError(f"{kind}.{name} cannot be assigned: all its parts are made from it; make a new {kind}")
        super().__setattr__(name, value)


def training_folder(h: MENDTrainingHparams, given: str | Path | None) -> Path:
    """Where a training run writes: `given`, or <results_dir>/models/MEND/<model>."""
    if given is not None:
        return Path(given)
    name = h.model_name if isinstance(h.model_name, str) else h.model_name[0].config.name_or_path
    return Path(h.results_dir) / "models" / "MEND" / (Path(name).name or "model")


def check_place(folder: Path, resume: bool) -> None:
    """Raise OutputError where training would write over what is no training run, or over one that is not resumed."""
    if (folder / STATE).exists():
        if not resume:
            raise OutputError(f"{folder}: holds a training run already; --resume goes on with it, or choose another")
    elif not (resume and _begun(folder)):
        check_new(folder)


def _begun(folder: Path) -> bool:
    """Does the folder hold a training run that was cut short before its first state?"""
    manifest = folder / MANIFEST
    found = read_json(manifest) if manifest.is_file() else None
    return (folder / TRAINING).exists() or (isinstance(found, dict) and "train" in found)


@dataclass
class Progressed:
    """How far a run is: steps done, the best validation and its step, running sums for the log."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    skipped: int = 0
    """Updates left out because their gradient was not finite."""
    sums: dict[str, float] = field(default_factory=dict)
    """This rank's."""
    all_sums: list[dict[str, float]] = field(default_factory=list)
    """Every rank's, as they were when the state was written."""
    seconds: float = 0.0


def write_state(
    path: Path,
    hypernet: Hypernetwork,
    optimizer: torch.optim.Optimizer,
    progressed: Progressed,
    identity: Mapping[str, str],
) -> None:
    """Write the whole state, atomically."""
    tensors = {f"hypernet.{key}": value for key, value in hypernet.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in slots.items() if value is not None}
    state = {"progressed": json.dumps(asdict(progressed)), "identity": json.dumps(dict(identity))}
    write_tensors(path, tensors, state)


def read_state(
    path: Path, hypernet: Hypernetwork, optimizer: torch.optim.Optimizer, identity: Mapping[str, str]
) -> Progressed:
    """Put a written state back.

    Raises:
        ConfigError: it belongs to a run with other settings (says which). DataError: it is damaged.
    """
    try:
        with open_tensors(path) as opened:
            raw = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        found: dict[str, Any] = parse_json(raw["identity"])
        progressed = Progressed(**parse_json(raw["progressed"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a readable checkpoint ({error}); delete it to start again") from error
    differing = [key for key in sorted(identity.keys() | found.keys()) if identity.get(key) != found.get(key)]
    if differing:
        told = ", ".join(f"{key} {found.get(key)!r:.60} instead of {identity.get(key)!r:.60}" for key in differing)
        raise ConfigError(f"{path}: a checkpoint of another training ({told}); use its settings, or train elsewhere")
    try:
        hypernet.load_state_dict(_below(tensors, "hypernet"))
        slots: dict[int, dict[str, Any]] = {}
        for key, value in _below(tensors, "optimizer").items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    except (RuntimeError, ValueError, KeyError) as error:
        raise DataError(f"{path}: does not fit this training ({error}); delete it to start again") from error
    return progressed


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}

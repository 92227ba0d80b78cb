"""Upstream's MEND archives, pickled by torch, to ours: read with `weights_only`, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.reading import check_file, memory
from easyeditor.lm.architectures import Anatomy
from easyeditor.methods.mend.archive import fill
from easyeditor.methods.mend.hparams import MENDHyperParams
from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights
from easyeditor.methods.mend.network import NetworkSpec

DERIVED = ("u_std", "v_std")  # upstream keeps the standard deviations next to the sums they come from


class Inert:
    """Stands for every object of a pickle that is no tensor: takes anything, does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def read_upstream(path: Path, hparams: MENDHyperParams, parts: Anatomy) -> tuple[Hypernetwork, dict[str, Any]]:
    """The hypernetwork in one of upstream's archives, and what the archive says about its training.

    `hparams` is the YAML it was trained with: `inner_params` in its order (which weight has which learning rate and
    which scale and shift is told by nothing else) and the settings of the network. Its running statistics are taken as
    trained, which upstream itself forgets.

    Raises:
        ConfigError: no inner_params. DataError: not such an archive, or one made with other settings.
    """
    if not hparams.inner_params:
        raise ConfigError("inner_params: the YAML an archive was trained with must name them, in its order")
    raw = load_tensors(path)
    state = raw.get("model") if isinstance(raw, dict) else None
    if not isinstance(state, dict) or "edit_lrs" not in state:
        raise DataError(
            f"{path}: holds no MEND hypernetwork ('model' with 'edit_lrs'); is it an archive of upstream's?"
        )
    found = {key: value for key, value in state.items() if isinstance(value, Tensor) and not key.startswith("model.")}
    weights = edited_weights(parts, hparams.inner_params)
    hypernet = Hypernetwork(NetworkSpec.of(hparams), weights, edit_lr=0.0, generator=torch.Generator())
    kept = {key: value for key, value in found.items() if key.rpartition(".")[2] not in DERIVED}
    fill(hypernet, kept, str(path))
    numbers = {key: value for key, value in raw.items() if isinstance(value, (int, float, str))}
    return hypernet.eval(), {"step": int(numbers.get("step", 0)), "converted_from": path.name}


def load_tensors(path: Path) -> Any:
    """What torch saved at `path`, read with `weights_only`: no code of the file runs.

    Objects other than tensors and plain data become `Inert`. Raises DataError.
    """
    try:
        check_file(path, memory())
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(type(f"Inert{i}", (Inert,), {}), name) for i, name in enumerate(sorted(names))]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # torch and the unpickler raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read as a torch archive ({type(error).__name__}: {reason})") from error

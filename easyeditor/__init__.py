"""Model editing (ROME, C-ROME, MEMIT, FT) with a perplexity probe after every edit: see, explain and prevent collapse.

The public names, resolved when they are first used, so that importing this package loads neither torch nor
transformers. Beside those below, the hyper-parameter class of every method in the table (`ROMEHyperParams` …).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import ConfigError
from easyeditor.methods.table import METHODS

if TYPE_CHECKING:
    from easyeditor.dataset.training import CounterFactDataset as CounterFactDataset
    from easyeditor.dataset.training import KnowEditDataset as KnowEditDataset
    from easyeditor.dataset.training import ZsreDataset as ZsreDataset
    from easyeditor.editing.easyedit import BaseEditor as BaseEditor
    from easyeditor.editing.easyedit import summary_metrics as summary_metrics
    from easyeditor.methods.mend.hparams import MENDTrainingHparams as MENDTrainingHparams
    from easyeditor.methods.registry import load_hparams as load_hparams
    from easyeditor.trainer.editor import EditTrainer as EditTrainer
    from easyeditor.values.edit import EditRequest as EditRequest
    from easyeditor.values.edit import EditResult as EditResult
    from easyeditor.values.edit import WeightDelta as WeightDelta

__version__ = "0.2.0"

_HOMES = {
    "BaseEditor": "easyeditor.editing.easyedit",
    "CounterFactDataset": "easyeditor.dataset.training",
    "EditRequest": "easyeditor.values.edit",
    "EditResult": "easyeditor.values.edit",
    "EditTrainer": "easyeditor.trainer.editor",
    "KnowEditDataset": "easyeditor.dataset.training",
    "MENDTrainingHparams": "easyeditor.methods.mend.hparams",
    "WeightDelta": "easyeditor.values.edit",
    "ZsreDataset": "easyeditor.dataset.training",
    "load_hparams": "easyeditor.methods.registry",
    "summary_metrics": "easyeditor.editing.easyedit",
}

_THEIRS = {"R_ROMEHyperParams": "ROMEHyperParams", "SPHEREHyperParams": "AlphaEditHyperParams"}
"""EasyEdit's classes of methods that are rows on another method's class here: the file's `alg_name` says which."""

_UPSTREAM = ("HyperParams", "Hparams", "Hparam", "Dataset")
"""How EasyEdit's names end that its examples import; one that is not here fails when it is used, not at the import."""


class Absent:
    """A name of EasyEdit's that is not here: any use of it is an error that lists what there is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        listed = ", ".join(name for name in sorted(_homes()) if name.endswith(_UPSTREAM))
        raise ConfigError(f"{self._name} is not here; there are: {listed}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self()


def _homes() -> dict[str, str]:
    """Public name -> module; the table is read anew, so that a row added at run time counts."""
    rows = (row.hparams.partition(":") for row in METHODS.values())
    return {**_HOMES, **{name: module for module, _, name in rows}}


__all__ = sorted(_homes())


def __getattr__(name: str) -> Any:
    homes, name = _homes(), _THEIRS.get(name, name)
    if name not in homes and name.endswith(_UPSTREAM):
        return Absent(name)
    if name not in homes:
        raise AttributeError(f"module 'easyeditor' has no attribute {name!r}; it has {', '.join(sorted(homes))}")
    return getattr(import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted(_homes())

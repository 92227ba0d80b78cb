"""Model editing (ROME, C-ROME, MEMIT, FT) with a perplexity probe after every edit: see, explain and prevent collapse.

The public names, resolved when they are first used, so that importing this package loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easyeditor.dataset.training import CounterFactDataset as CounterFactDataset
    from easyeditor.dataset.training import ZsreDataset as ZsreDataset
    from easyeditor.editor import BaseEditor as BaseEditor
    from easyeditor.methods.ft.hparams import FTHyperParams as FTHyperParams
    from easyeditor.methods.memit.hparams import MEMITHyperParams as MEMITHyperParams
    from easyeditor.methods.mend.hparams import MENDHyperParams as MENDHyperParams
    from easyeditor.methods.mend.hparams import MENDTrainingHparams as MENDTrainingHparams
    from easyeditor.methods.rome.hparams import ROMEHyperParams as ROMEHyperParams
    from easyeditor.records import EditRequest as EditRequest
    from easyeditor.records import EditResult as EditResult
    from easyeditor.records import WeightDelta as WeightDelta
    from easyeditor.trainer.editor import EditTrainer as EditTrainer

_HOMES = {
    "BaseEditor": "easyeditor.editor",
    "CounterFactDataset": "easyeditor.dataset.training",
    "EditRequest": "easyeditor.records",
    "EditResult": "easyeditor.records",
    "EditTrainer": "easyeditor.trainer.editor",
    "FTHyperParams": "easyeditor.methods.ft.hparams",
    "MEMITHyperParams": "easyeditor.methods.memit.hparams",
    "MENDHyperParams": "easyeditor.methods.mend.hparams",
    "MENDTrainingHparams": "easyeditor.methods.mend.hparams",
    "ROMEHyperParams": "easyeditor.methods.rome.hparams",
    "WeightDelta": "easyeditor.records",
    "ZsreDataset": "easyeditor.dataset.training",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'easyeditor' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)

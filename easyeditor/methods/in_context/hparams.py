"""Hyper-parameters of the methods that put facts into the prompt: ICE, IKE, SCR."""

from __future__ import annotations

from dataclasses import dataclass

from easyeditor.methods.hparams import ModuleHyperParams


@dataclass(kw_only=True)
class InContextHyperParams(ModuleHyperParams):
    """The request's own fact before every question: nothing to set."""

    alg_name: str = "ICE"

"""Hyper-parameters of the methods that put facts into the prompt: ICE, IKE, SCR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from easyeditor.base.hparams import require
from easyeditor.dataset.sets import demonstration_facts
from easyeditor.methods.hparams import ModuleHyperParams


@dataclass(kw_only=True)
class InContextHyperParams(ModuleHyperParams):
    """The request's own fact before every question: nothing to set."""

    alg_name: str = "ICE"


@dataclass(kw_only=True)
class RetrievedHyperParams(InContextHyperParams):
    """What is looked for among many texts."""

    k: int
    """How many texts are taken: demonstrations (IKE), facts that may fit the question (SCR)."""
    retriever: Literal["hidden", "bm25"] = "hidden"
    """What is nearest: by the mean of the model's own last hidden states, or by words (the extra `retrieve`)."""

    def validate(self, where: str) -> None:
        super().validate(where)
        require(self.k > 0, where, "k", self.k, "1 or more")


@dataclass(kw_only=True)
class SCRHyperParams(RetrievedHyperParams):
    """The fact that the model chooses among the `k` nearest to the question."""

    alg_name: str = "SCR"
    k: int = 5
    """Facts that the model chooses from."""


@dataclass(kw_only=True)
class IKEHyperParams(RetrievedHyperParams):
    """The request's own fact behind `k` demonstrations."""

    alg_name: str = "IKE"
    k: int = 16
    """Demonstrations before the fact."""
    demonstrations: str | None = None
    """File of records that demonstrations are made of; null: `data/facts.json`, split `train`."""
    demonstration_facts: int = 64
    """How many of its records, drawn by `seed`."""

    def validate(self, where: str) -> None:
        super().validate(where)
        file = self.demonstrations
        require(file is None or bool(file.strip()), where, "demonstrations", file, "a file of records, or null")
        require(self.demonstration_facts > 0, where, "demonstration_facts", self.demonstration_facts, "1 or more")

    def reads(self) -> dict[str, Any]:
        return {**super().reads(), "demonstrations": self.demonstrations}

    def check_files(self) -> None:
        super().check_files()
        if self.demonstrations is not None:
            demonstration_facts(self.demonstrations, 1, self.seed)

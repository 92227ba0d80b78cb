"""Edits that are looked up when the model is asked: what a memory makes of a question, while the weights stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from easyeditor.values.edit import EditRequest

Question = tuple[str, EditRequest | None]
"""A prompt, and the request it is asked for (None: somebody typed it)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as the model is given it: the whole `prompt`, which ends with the question; `fact`, the request whose
    fact is in it, if one is; `before` tokens more than the bare question's, and `beside` those of questions that
    were asked first; `among`, the requests whose facts were found for it, one of which is `fact` or none."""

    prompt: str
    fact: EditRequest | None = None
    before: int = 0
    beside: int = 0
    among: tuple[EditRequest, ...] = ()


class Recall(ABC):
    """The memory of the edits in force."""

    @abstractmethod
    def asked(self, questions: Sequence[Question]) -> list[Asked]:
        """What the model is given for each question, whatever the others are."""

"""What MQuAKE asks besides an edit: questions that need all edits of a record, and each step on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.values.texts import listed_texts


@dataclass(frozen=True, kw_only=True)
class Hop:
    """A question about one fact, all answers that are right, and the relation it is about ("" where nobody says)."""

    question: str
    answers: tuple[str, ...]
    relation: str = ""

    @staticmethod
    def make(raw: Any, where: str) -> Hop:
        """Checked. Raises DataError that starts with `where`."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("relation", ""), str):
            raise DataError(f"{where} must have 'question', 'answers' and 'relation', found {raw!r:.200}")
        asked, answers = (listed_texts(raw.get(key), f"{where}.{key}") for key in ("question", "answers"))
        if len(asked) != 1 or not answers:
            raise DataError(f"{where} must have a question and at least one answer, found {raw!r:.200}")
        return Hop(question=asked[0], answers=answers, relation=raw.get("relation", ""))


@dataclass(frozen=True, kw_only=True)
class MultiHop:
    """`edit` asks for the request's own fact. The last edit of a record, when all are made, has the rest: `questions`,
    one question in several wordings, the `answers` that are right, and the `hops` that lead there."""

    edit: Hop | None = None
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    hops: tuple[Hop, ...] = ()

    @staticmethod
    def make(raw: Any, where: str) -> MultiHop | None:
        """Checked; None of None. Raises DataError that starts with `where`."""
        if raw is None or isinstance(raw, MultiHop):
            return raw
        if not isinstance(raw, Mapping) or not isinstance(raw.get("hops", []), (list, tuple)):
            raise DataError(f"{where} must have 'edit', 'questions', 'answers', 'hops', found {raw!r:.200}")
        edit = raw.get("edit")
        made = MultiHop(
            edit=None if edit is None else Hop.make(edit, f"{where}.edit"),
            questions=listed_texts(raw.get("questions"), f"{where}.questions"),
            answers=listed_texts(raw.get("answers"), f"{where}.answers"),
            hops=tuple(Hop.make(hop, f"{where}.hops") for hop in raw.get("hops", [])),
        )
        if made.questions and not made.answers:
            raise DataError(f"{where}: {len(made.questions)} questions have no answers")
        return made

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

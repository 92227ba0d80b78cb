"""MQuAKE's prompt files: demonstrations that its questions are asked behind. A user has them; none come with this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from easyeditor.base.errors import DataError
from easyeditor.base.files import read_json
from easyeditor.base.reading import read_text

PLAIN, THOUGHTS, RELATIONS = "multihop-prompts.txt", "multihop-cot-prompts.txt", "rel-prompts.json"


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Demonstrations: questions that take several steps with their answers (`plain`), with `thoughts` before the
    answers, and questions of one step by relation (`P27` …)."""

    plain: str
    thoughts: str
    relations: Mapping[str, str] = field(hash=False)


def read_shots(folder: str) -> Shots:
    """The three files of a folder, named as MQuAKE's repository names them.

    Raises:
        DataError: one of them is not there, is no text, or is empty.
    """
    plain, thoughts = (_text(Path(folder) / name) for name in (PLAIN, THOUGHTS))
    place = Path(folder) / RELATIONS
    relations = read_json(place)
    if not isinstance(relations, dict) or not all(isinstance(text, str) for text in relations.values()):
        raise DataError(f"{place}: must be an object of texts, a relation's demonstrations by its name (P27 …)")
    return Shots(plain=plain, thoughts=thoughts, relations={name: text.strip() for name, text in relations.items()})


def _text(place: Path) -> str:
    try:
        text = read_text(place).strip()
    except FileNotFoundError as error:
        raise DataError(f"{place}: no such file; mquake_prompts is a folder of MQuAKE's prompt files") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: not readable as text ({error})") from error
    if not text:
        raise DataError(f"{place}: is empty; it must hold questions with their answers")
    return text

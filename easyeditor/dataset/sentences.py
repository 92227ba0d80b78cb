"""Sentence sets for perplexity: the papers' ME-PPL files where the user has put them, else this project's own fifty."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.base.files import parse_unchecked
from easyeditor.base.paths import SHIPPED
from easyeditor.base.reading import read_bytes
from easyeditor.values.texts import is_text

DATA = SHIPPED / "data"
OWN = "sentences_50.json"
OFFICIAL = {50: "ME-PPL/ME-PPL_50.json", 1000: "ME-PPL/ME-PPL_1k.json", 10000: "ME-PPL/ME-PPL.json"}
SOURCE = "the data/ME-PPL folder of github.com/WanliYoung/Collapse-in-Model-Editing"


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """Texts with where they came from: `name` is what results are reported under, `sha256` the file's."""

    name: str
    path: str
    sha256: str
    texts: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Identity for a record, without the texts."""
        return {"name": self.name, "path": self.path, "sha256": self.sha256, "sentences": len(self.texts)}


def load_sentences(count: int, data: Path = DATA) -> Sentences:
    """The first `count` sentences of the smallest set that holds as many.

    Up to 50: the papers' ME-PPL_50 when it is in `data/` (this project's, or that of the working directory, where the
    papers' scripts have it), else our own fifty. More: the papers' files only.

    Raises:
        DataError: a file is needed that is not there (says how to get it), or is damaged.
    """
    if not 0 < count <= max(OFFICIAL):
        raise DataError(f"{count} sentences asked for; allowed: 1 to {max(OFFICIAL)}")
    size = min(n for n in OFFICIAL if n >= count)
    places = [folder / OFFICIAL[size] for folder in (data, Path("data"))]
    path = next((place for place in places if place.exists()), places[0])
    if not path.exists():
        if size > 50:
            raise DataError(
                f"{count} sentences need {path}, which is not there; take {path.name} from {SOURCE} and put it there"
            )
        path = data / OWN
    found = read_sentences(path)
    if len(found.texts) < count:
        raise DataError(f"{path}: has {len(found.texts)} sentences, {count} were asked for")
    return replace(found, texts=found.texts[:count])


def read_sentences(path: Path) -> Sentences:
    """Sentences of a file: JSON list of ``{"Text": …}``, JSON list of texts, or a text file with one sentence a
    line (a blank line is none).

    Raises:
        DataError: unreadable, not UTF-8, wrong JSON, or an empty sentence (with its number).
    """
    try:
        raw = read_bytes(path)
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable UTF-8 text file ({error})") from error
    if "\0" in text:
        raise DataError(f"{path}: holds NUL bytes; not a text file")
    is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{")
    texts = _from_json(text, path) if is_json else [line for line in text.split("\n") if line.strip()]
    for number, sentence in enumerate(texts, 1):
        if not is_text(sentence):
            raise DataError(
                f"{path}: sentence {number} is empty or not a text, or endless ({sentence!r:.200}); remove it"
            )
    if not texts:
        raise DataError(f"{path}: no sentences in it")
    digest = hashlib.sha256(raw).hexdigest()
    return Sentences(name=path.stem, path=str(path), sha256=digest, texts=tuple(texts))


def _from_json(text: str, path: Path) -> list[Any]:
    try:
        items = parse_unchecked(text)
    except ValueError as error:
        raise DataError(f"{path}: wrong JSON ({error})") from error
    if not isinstance(items, list):
        raise DataError(f'{path}: expected a JSON list of texts or of {{"Text": …}}, found {type(items).__name__}')
    return [item.get("Text") if isinstance(item, dict) else item for item in items]

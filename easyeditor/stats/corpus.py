"""Where the text of the statistics comes from: Wikipedia through `datasets`, the small excerpt, or a file."""

from __future__ import annotations

import bz2
import json
import logging
import re
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError, OutputError
from easyeditor.base.fetch import WheelFile, file_sha256, hub, obtain
from easyeditor.base.files import parse_json, write_text
from easyeditor.base.locks import locked
from easyeditor.base.paths import cache_folder
from easyeditor.base.progress import steps
from easyeditor.base.reading import check_file

LOG = logging.getLogger(__name__)

EXCERPT = "wikipedia-excerpt"
WIKIPEDIA = "wikipedia"
EXCERPT_FILE = cache_folder() / "data" / "corpus" / f"{EXCERPT}.jsonl"
EXCERPT_WHEEL = WheelFile(
    requirement="gensim==4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    megabytes=28,
    any_platform=False,
)
PASSAGE_CHARACTERS = 2000
LONGEST_LINE = 1 << 24  # characters
_REMOVED_TAGS = re.compile(
    r"<!--.*?-->|<(ref|table|gallery|math|timeline|score|imagemap)\b(?:[^<>]*/>|[^<>]*>.*?</\1\s*>)",
    re.IGNORECASE | re.DOTALL,
)
_REMOVED_LINKS = re.compile(r"^\s*(file|image|category|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)
_LINE_MARKS = re.compile(r"^(?:[*#:;]+[ \t]*|=.*=[ \t]*$)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A name, an identity that changes with the content, and the documents in a fixed order."""

    name: str
    identity: str
    documents: Iterable[str]

    def slice(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[str]:
        """Documents start + rank, start + rank + world, … below `stop`."""
        return islice(iter(self.documents), start + rank, stop, world)


def open_corpus(name: str) -> Corpus:
    """A corpus by name (`wikipedia`, `wikipedia-excerpt`) or path (.txt, .jsonl, .json, .parquet, .arrow).

    Raises:
        DataError: no such file, an unknown kind of file, no text in it; or `datasets` cannot reach Wikipedia.
    """
    check_corpus(name)
    if name == EXCERPT:
        return _file(_excerpt(), EXCERPT)
    if name == WIKIPEDIA:
        return Corpus(name=name, identity=f"wikimedia/wikipedia {_Articles.snapshot}", documents=_Articles())
    return _file(Path(name), Path(name).stem)


def check_corpus(name: str) -> None:
    """Raise DataError for a path where no regular file is; nothing is opened."""
    if name in (EXCERPT, WIKIPEDIA):
        return
    try:
        check_file(Path(name))
    except FileNotFoundError as error:
        raise DataError(f"corpus {name!r}: no such file, and not one of {WIKIPEDIA}, {EXCERPT}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"corpus {name!r}: cannot be read ({error})") from error


@dataclass(frozen=True)
class _Lines:
    """Documents of a text or JSONL file, read again at every iteration."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        number = 0
        try:
            with open(self.path, encoding="utf-8") as source:
                for number, line in enumerate(iter(lambda: source.readline(LONGEST_LINE + 1), ""), 1):
                    if len(line) > LONGEST_LINE:
                        raise DataError(f"{self.path}: line {number} has more than {LONGEST_LINE:,} characters")
                    if "\0" in line:
                        raise DataError(f"{self.path}: line {number} holds a NUL byte; not a text file")
                    if line.strip():
                        yield self._document(line, number)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 after line {number} ({error})") from error

    def _document(self, line: str, number: int) -> str:
        if self.path.suffix == ".txt":
            return line.rstrip("\n")
        try:
            item = parse_json(line)
            text = item if isinstance(item, str) else item["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{self.path}: line {number} is not JSON with a "text" ({error})') from error
        if not isinstance(text, str):
            raise DataError(f'{self.path}: line {number}: "text" is {type(text).__name__}, not a text')
        return text


@dataclass(frozen=True)
class _Table:
    """The `text` column of a Parquet or Arrow file, through `datasets`."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        from datasets import load_dataset

        kind = self.path.suffix.removeprefix(".")
        try:
            table: Any = load_dataset(kind, data_files=str(self.path), split="train", streaming=True)
            for row in table:
                if not isinstance(row["text"], str):
                    raise DataError(f"{self.path}: a 'text' is {type(row['text']).__name__}, not a text")
                yield row["text"]
        except DataError:
            raise
        except KeyError as error:
            raise DataError(f"{self.path}: has no column 'text'") from error
        except Exception as error:  # datasets and pyarrow raise many kinds
            raise DataError(f"{self.path}: not readable as {kind} ({type(error).__name__}: {error})") from error


class _Articles:
    """English Wikipedia, through `datasets`."""

    snapshot = "20231101.en"

    def __iter__(self) -> Iterator[str]:
        from datasets import load_dataset

        try:
            with hub():
                for row in load_dataset("wikimedia/wikipedia", self.snapshot, split="train", streaming=True):
                    yield row["text"]
        except Exception as error:  # no network, no hub, no such snapshot
            raise DataError(
                f"Wikipedia cannot be read through `datasets` ({type(error).__name__}: {error}); use --corpus "
                f"{EXCERPT}, or a file"
            ) from error


def _file(path: Path, name: str) -> Corpus:
    if path.suffix in (".parquet", ".arrow"):
        return Corpus(name=name, identity=file_sha256(path), documents=_Table(path))
    if path.suffix in (".txt", ".jsonl", ".json"):
        lines = _Lines(path)
        next(iter(lines), None)  # what is no text is refused before all of it is read for its hash
        return Corpus(name=name, identity=file_sha256(path), documents=lines)
    raise DataError(f"{path}: unknown kind of corpus; give .txt (a document a line), .jsonl, .parquet or .arrow")


def _excerpt() -> Path:
    """The cleaned excerpt: passages of 106 English Wikipedia articles, about 1,200 documents; made on first use."""
    if EXCERPT_FILE.exists():
        return EXCERPT_FILE
    try:
        with (
            locked(EXCERPT_FILE.parent / f".{EXCERPT_FILE.name}.lock", str(EXCERPT_FILE), wait=True),
            tempfile.TemporaryDirectory(dir=EXCERPT_FILE.parent, prefix=".fetch-") as scratch,
        ):
            if not EXCERPT_FILE.exists():  # or another process made it while this one waited
                dump = obtain(EXCERPT_WHEEL, Path(scratch), EXCERPT_FILE.parent)
                write_text(EXCERPT_FILE, _cleaned(list(_articles(dump))))
    except OSError as error:
        raise OutputError(f"{EXCERPT_FILE}: cannot be written ({error})") from error
    return EXCERPT_FILE


def _cleaned(articles: list[str]) -> str:
    """The articles' passages as JSON lines."""
    documents: list[str] = []
    with steps("cleaning Wikipedia articles") as show:
        for number, article in enumerate(articles, 1):
            documents += passages(plain_text(article))
            show(number, len(articles), "")
    return "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)


def _articles(dump: Path) -> Iterator[str]:
    with bz2.open(dump) as source:
        for _, element in ET.iterparse(source):
            tag = element.tag.rsplit("}", 1)[-1]
            if tag == "text" and element.text and not element.text.lstrip().lower().startswith("#redirect"):
                yield element.text
            if tag == "page":
                element.clear()


def plain_text(wikitext: str) -> str:
    """The prose of an article: headings, templates, references, tables, files and categories removed."""
    import wikitextparser

    text = _REMOVED_TAGS.sub("", wikitext)
    kept, end = [], 0
    for link in sorted(wikitextparser.parse(text).wikilinks, key=lambda link: link.span):
        start, stop = link.span
        if start >= end and _REMOVED_LINKS.match(link.title):  # a link inside a caption goes with its file
            kept.append(text[end:start])
            end = stop
    kept.append(text[end:])
    prose = wikitextparser.parse("".join(kept)).plain_text(replace_tables=lambda table: "")
    return _LINE_MARKS.sub("", prose)


def passages(text: str) -> Iterator[str]:
    """Paragraphs joined to documents of about 2,000 characters; headings and short lines left out."""
    joined: list[str] = []
    for line in map(str.strip, text.splitlines()):
        joined += [line] if len(line) >= 80 else []
        if sum(map(len, joined)) >= PASSAGE_CHARACTERS:
            yield "\n".join(joined)
            joined = []
    if joined:
        yield "\n".join(joined)

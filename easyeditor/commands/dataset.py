"""What a data file holds: its format, the records that are read, those that are refused and why, the probes they have.

  python -m easyeditor.dataset data/facts.json more/zsre_mend_eval.json     some files
  python -m easyeditor.dataset data/KnowEdit                                every data file of a folder
  python -m easyeditor.dataset data/KnowEdit --table                        the same as a Markdown table

Reads what mass_edit.py --data reads. A record without its subject in the prompt is read, and counted: only methods that
look no subject up take it. Exit code: 0, or 2 when a file cannot be read or none of its records.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from easyeditor.base.errors import DataError
from easyeditor.commands.cli import EXIT_ERROR, parser, run

if TYPE_CHECKING:
    from easyeditor.dataset.reader import Dataset

HEADER = ("file", "format", "records", "read", "refused", "without a subject", "probes", "left out", "fields not read")


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    p.add_argument("files", nargs="+", metavar="FILE", help="data files, folders of them, or what --data takes")
    p.add_argument("--table", action="store_true", help="print a Markdown table")
    return p.parse_args()


def main() -> int:
    """Read every file and print what it holds; 2 if one cannot be read."""
    args = arguments()
    rows = _rows(args.files)
    if args.table:
        for cells in (HEADER, ["---"] * len(HEADER), *rows):
            print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    else:
        for row in rows:
            print(row[0])
            for name, cell in list(zip(HEADER, row, strict=True))[1:]:
                if cell:
                    print(f"  {name}: {cell}")
    return EXIT_ERROR if any(not row[1] for row in rows) else 0


def _rows(files: list[str]) -> list[list[str]]:
    """A row for each file; what is counted there is not logged as well."""
    log = logging.getLogger("easyeditor.dataset")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return [row_of(source) for name in files for source in sources(name)]
    finally:
        log.setLevel(level)


def sources(name: str) -> list[str]:
    """The data files of a folder; anything else as it is. Raises DataError for a folder without any."""
    from easyeditor.dataset.raw import FILES

    folder = Path(name)
    if not folder.is_dir() or any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return [name]
    found = [str(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in FILES and path.is_file()]
    if not found:
        raise DataError(f"{name}: no data file in it ({', '.join(FILES)})")
    return found


def row_of(source: str) -> list[str]:
    """The cells of one file; without a format where it cannot be read."""
    from easyeditor.dataset.probes import listed_probes
    from easyeditor.dataset.reader import read_dataset

    try:
        data = read_dataset(source, skip_bad=True, needs_subject=False)
    except DataError as error:
        return [source, "", "", "0", f"{str(error).removeprefix(f'{source}: '):.300}", "", "", "", ""]
    read = len(set(data.records))
    return [
        *(source, data.format, f"{read + len(data.bad):,}", f"{read:,}", refused(data)),
        f"{sum(not request.subject for request in data.requests) or ''}",
        listed_probes(data.requests),
        ", ".join(f"{name} {count:,}" for name, count in data.left_out.items()),
        ", ".join(data.unread),
    ]


def refused(data: Dataset) -> str:
    """The reasons, alike ones counted together, each with its first record."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for bad in data.bad:
        reason = re.sub(r"'[^']*'|\"[^\"]*\"", "…", re.sub(r"^request .*?: ", "", bad.reason))
        counts[reason] += 1
        first.setdefault(reason, bad.number)
    return "; ".join(f"{n:,} × {reason:.200} (first: record {first[reason]})" for reason, n in counts.most_common())


if __name__ == "__main__":
    run(main)

"""What a cell came to: each request's numbers, the scores made of them, and how far two methods differ on the same
requests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from easyeditor.drawing.table import Table
from easyeditor.results.run import Run
from easyeditor.values.estimates import Estimate, difference_of, harmonic_of

SCORES = ("ES", "PS", "NS")  # S is made of their means
ACCURACIES = ("rewrite_acc", "rephrase_acc", "locality_acc")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A cell's requests by their place, and metric -> the value of each."""

    group: str
    method: str
    seed: int
    places: tuple[int, ...]
    values: dict[str, list[float | None]]

    def at(self, name: str, places: Sequence[int]) -> list[float | None]:
        """A metric's values at some of the places."""
        found = dict(zip(self.places, self.values[name], strict=True))
        return [found[place] for place in places]


def measured(run: Run, group: str = "", method: str = "", seed: int = 0) -> Measured:
    """The numbers of a run: in a sequence at its last evaluation, over the edits in the model; in mode single right
    after each edit, those of the edit that is kept where the guard did it again."""
    rows: dict[int, Mapping[str, float | None]] = {}
    if run.evaluations:
        for one in run.evaluations[-1].retention:
            rows[one.index] = {**{name: getattr(one, name) for name in ACCURACIES}, **one.metrics}
    elif run.mode == "single":
        for edit in run.edits:
            if edit.kept:
                rows[edit.index] = {name: after for name, (_, after) in edit.kept_record.values().items()}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    values = {name: [row.get(name) for row in rows.values()] for name in names}
    return Measured(group=group, method=method, seed=seed, places=tuple(rows), values=values)


def score_of(values: Mapping[str, Sequence[float | None]]) -> Estimate | None:
    """S, the harmonic mean of ES, PS and NS; None where one was not measured."""
    return harmonic_of([values[name] for name in SCORES]) if all(name in values for name in SCORES) else None


def quality_of(values: Mapping[str, Sequence[float | None]]) -> Estimate | None:
    """The harmonic mean of efficacy, generalization and locality, of those that the data has."""
    known = [values[name] for name in ACCURACIES if any(value is not None for value in values.get(name, ()))]
    return harmonic_of(known) if known else None


def pairs_table(cells: Sequence[Measured], columns: Sequence[tuple[str, str, str]]) -> Table:
    """Each two methods of a group and seed on the requests that both have; `columns` are title, metric, kind."""
    known = [column for column in columns if any(column[1] in cell.values for cell in cells)]
    rows = []
    for one, other in itertools.combinations(cells, 2):
        places = [place for place in one.places if place in other.places]
        if (one.group, one.seed) != (other.group, other.seed) or not places:
            continue
        found = {
            title: difference_of(one.at(name, places), other.at(name, places))
            for title, name, _ in known
            if name in one.values and name in other.values
        }
        apart = [title for title, value in found.items() if value is not None and value.apart]
        shown = (found.get(title) for title, _, _ in known)
        rows.append((one.group, one.seed, one.method, other.method, len(places), *shown, ", ".join(apart) or "≈"))
    kinds = ((title, kind) for title, _, kind in known)
    return Table.of(
        "differences",
        "Methods against each other on the same requests",
        ["group", ("seed", "count"), "method", "less", ("requests", "count"), *kinds, "told apart by"],
        rows,
        note="The method's mean less the other's, request by request, with its 95 % interval. Told apart by: the "
        "columns whose interval does not reach zero. ≈: none, the two cannot be told apart. One interval of twenty "
        "misses zero by chance.",
    )

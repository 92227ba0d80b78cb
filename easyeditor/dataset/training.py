"""Datasets as EasyEdit names them: a file of records, as checked requests for training MEND; KnowEdit's as rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, ClassVar

from easyeditor.base.errors import DataError
from easyeditor.base.files import read_json
from easyeditor.dataset.reader import read_dataset
from easyeditor.values.edit import EditRequest
from easyeditor.values.request import Probe


class RequestDataset(list[EditRequest]):
    """Requests of one source, in its order. Any format that `read_dataset` reads, whatever the class is called."""

    def __init__(
        self,
        data_dir: str | Path,
        size: int | None = None,
        config: Any = None,
        *,
        split: str | None = None,
        skip_bad: bool = False,
    ) -> None:
        """`data_dir` is a file (EasyEdit's name for it) or what else `read_dataset` takes, `size` the first so many
        records, `split` those whose `split` field is this. `config` is EasyEdit's third argument; nothing is read from
        it. A record with an empty `alt` is left out, as there, and with `skip_bad` every other that breaks a rule; they
        are counted in one line and listed in `dataset.bad`.

        Raises:
            DataError: missing or unreadable file, a bad record (with its number), or no record left.
        """
        self.path, self.split = Path(data_dir), split
        self.dataset = read_dataset(str(data_dir), skip_bad=skip_bad, skip_empty=True, split=split, needs_subject=False)
        super().__init__(self.dataset.first(size))


def apart(train: Iterable[EditRequest], held_out: Iterable[EditRequest]) -> list[EditRequest]:
    """Training requests that share no text with `held_out` ones.

    Locality probes whose prompt a held-out request edits, paraphrases or probes are taken out; a request that is
    left without any, or whose own prompt or paraphrase is such a text, is left out. Without this, a hypernetwork is
    taught to keep the very answers that are then tested.
    """
    taken = {text for request in held_out for text in (*_edited(request), *_probed(request))}
    kept = []
    for request in train:
        probes = {key: probe for key, old in request.locality.items() if (probe := _without(old, taken)).prompts}
        if not taken.intersection(_edited(request)) and (probes or not request.locality):
            kept.append(dataclasses.replace(request, locality=probes))
    return kept


def _edited(request: EditRequest) -> tuple[str, ...]:
    return request.prompt, *request.rephrase_prompts


def _probed(request: EditRequest) -> list[str]:
    return [prompt for probe in request.locality.values() for prompt in probe.prompts]


def _without(probe: Probe, taken: Set[str]) -> Probe:
    pairs = [(p, a) for p, a in zip(probe.prompts, probe.answers, strict=True) if p not in taken]
    return Probe(prompts=tuple(p for p, _ in pairs), answers=tuple(a for _, a in pairs))


class CounterFactDataset(RequestDataset):
    """CounterFact: ROME's full format, or EasyEdit's flat one."""


class ZsreDataset(RequestDataset):
    """ZsRE as MEND uses it: `src`, `alt`, `rephrase`, `loc`, `loc_ans`."""


class KnowEditDataset(list[dict[str, Any]]):
    """KnowEdit's records as EasyEdit's example reads them.

    A row has `prompt`, `subject`, `target_new`, `ground_truth`, and under the keys of `KINDS` the lists of its probes,
    None where the record has none.
    """

    KINDS: ClassVar[dict[str, tuple[str, str]]] = {
        "portability_r": ("portability", "Reasoning"),
        "portability_s": ("portability", "Subject_Aliasing"),
        "portability_l": ("portability", "Logical_Generalization"),
        "locality_rs": ("locality", "Relation_Specificity"),
        "locality_f": ("locality", "Forgetfulness"),
    }

    def __init__(self, data_dir: str | Path, size: int | None = None, config: Any = None) -> None:
        """`data_dir` is a JSON file, `size` takes the first so many. `config` is EasyEdit's; nothing is read from it.

        Raises:
            DataError: missing or unreadable file, or a record without one of the three texts.
        """
        raw = read_json(Path(data_dir))
        if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
            raise DataError(f"{data_dir}: expected a JSON list of records")
        super().__init__(self._row(item, f"{data_dir}: record {n}") for n, item in enumerate(raw[:size]))

    def _row(self, item: dict[str, Any], where: str) -> dict[str, Any]:
        row: dict[str, Any] = {"ground_truth": item.get("ground_truth")}
        for key, other in (("subject", "concept"), ("prompt", "text"), ("target_new", "labels")):
            if key not in item and other not in item:
                raise DataError(f"{where}: neither {key!r} nor {other!r} in it")
            row[key] = item.get(key, item.get(other))
        return row | {key: (item.get(probes) or {}).get(kind) for key, (probes, kind) in self.KINDS.items()}

"""The edits of a finished run, of single_case_edit.py or mass_edit.py, with the updates they made."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.editor import BaseEditor
from easyeditor.errors import DataError
from easyeditor.files import read_json
from easyeditor.hparams import HyperParams
from easyeditor.methods.registry import hparams_class
from easyeditor.records import EditRequest, EditResult, WeightDelta
from easyeditor.runs.journal import read_journal
from easyeditor.runs.sequence import delta_folder, saved_edit

LOG = logging.getLogger(__name__)
SAME = 1e-3  # a recomputed denominator may differ this much, relatively, before it is reported


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run: hyper-parameters, manifest, its edits' records; `sequence` when edits stayed in the model."""

    folder: Path
    hparams: HyperParams
    manifest: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    sequence: bool
    batch: int

    @classmethod
    def read(cls, folder: Path, overrides: Sequence[str] = ()) -> Finished:
        """Raises DataError: not the folder of a finished run of edits."""
        try:
            config, manifest = read_json(folder / "config.json"), read_json(folder / "manifest.json")
            mass = "hparams" in config
            values = config["hparams"] if mass else config
            hparams = hparams_class(values["alg_name"]).from_dict(values, where=str(folder / "config.json"))
            records = list(_lines(folder)) if mass else [read_json(folder / "result.json")]
            mode = config["run"]["mode"] if mass else "single"
            batch = config["run"]["batch_size"] if mode == "batch" else 1
            for record in records:
                _ = record["trace"], record["requested_rewrite"], record["post"]["ppl"], manifest["model_fingerprint"]
        except (DataError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder}: not the folder of a finished run of single_case_edit.py or mass_edit.py "
                f"({type(error).__name__}: {error})"
            ) from error
        if not records:
            raise DataError(f"{folder}: the run recorded no edit")
        return cls(folder, hparams.override(overrides), manifest, records, mode != "single", batch)

    def updates(self, editor: BaseEditor, limit: int) -> Iterator[tuple[Mapping[str, Any], Sequence[WeightDelta]]]:
        """Each record with the updates in the model when it was measured: its own, and in a sequence all up to it.

        Saved ones are read; others are computed again, which the run's contexts and seed make possible.
        """
        standing: list[WeightDelta] = []
        for record in self.records[:limit]:
            if not self.sequence:
                yield record, self._again(editor, record).deltas
                continue
            first = record["index"] // self.batch * self.batch
            saved = delta_folder(self.folder, first)
            if (record["guard"] is None or record["guard"]["kept"]) and saved.exists():
                if record["index"] == first:
                    standing += saved_edit(self.folder, first, [record]).deltas
                yield record, standing

    def editor(self) -> BaseEditor:
        """An editor of the run's model with its contexts. Raises DataError: the model has other weights now."""
        contexts = list(self.manifest["context_templates"]) or None
        changes: dict[str, Any] = {"save_keys": False} if "save_keys" in vars(self.hparams) else {}
        if "context_templates" in vars(self.hparams):
            changes["context_templates"] = contexts
        editor = BaseEditor(dataclasses.replace(self.hparams, ppl_sentence_num=0, **changes))
        if editor.fingerprint() != self.manifest["model_fingerprint"]:
            raise DataError(f"{self.folder}: was made with other weights than {self.hparams.model_name} has now")
        return editor

    def _again(self, editor: BaseEditor, record: Mapping[str, Any]) -> EditResult:
        result = editor.compute(EditRequest.from_json(record["requested_rewrite"]))
        for layer, trace in result.trace.items():
            then = record["trace"][str(layer)]["denominator"]
            if then is not None and trace.denominator is not None and abs(trace.denominator - then) > SAME * abs(then):
                LOG.warning(
                    "case %r: denominator %.6g in the run, %.6g computed again (another machine or version?)",
                    record["case_id"],
                    then,
                    trace.denominator,
                )
        return result


def _lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    path = folder / "results.jsonl"
    if not path.exists():
        raise DataError(f"{path}: no such file")
    return (line for line in read_journal(path) if line["kind"] == "edit")

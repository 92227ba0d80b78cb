"""The edits of a finished run, of single_case_edit.py or mass_edit.py, with the updates they made."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.base.hparams import HyperParams
from easyeditor.editing.editor import Editor
from easyeditor.methods.registry import hparams_class
from easyeditor.methods.table import METHODS
from easyeditor.results.lines import EditLine
from easyeditor.results.run import CONFIG, Run, load_run
from easyeditor.runs.planning import batch_of
from easyeditor.runs.sequence import delta_folder, saved_edit
from easyeditor.values.edit import EditResult, WeightDelta
from easyeditor.values.record import EditRecord

LOG = logging.getLogger(__name__)
SAME = 1e-3  # a recomputed denominator may differ this much, relatively, before it is reported


@dataclasses.dataclass(frozen=True)
class ReplayedRun:
    """A run of edits with its hyper-parameters."""

    run: Run
    hparams: HyperParams
    first_of: Callable[[int], int]
    """Place of an edit in the run -> the first place of its batch."""

    @classmethod
    def read(cls, folder: Path, overrides: Sequence[str] = ()) -> ReplayedRun:
        """Raises DataError: not the folder of a finished run of edits."""
        try:
            run = load_run(folder)
            hparams = hparams_class(run.hparams["alg_name"]).from_dict(run.hparams, where=str(folder / CONFIG))
            _ = run.manifest["model_fingerprint"], run.manifest["context_templates"]
        except (DataError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"{folder}: not the folder of a finished run of single_case_edit.py or mass_edit.py ({reason})"
            ) from error
        if not run.edits:
            raise DataError(f"{folder}: the run recorded no edit")
        if not METHODS[hparams.alg_name].writes:
            raise DataError(f"{folder}: edits of {hparams.alg_name} change no weight, so there is nothing to look into")
        return cls(run, hparams.override(overrides), batch_of(folder, run.manifest))

    def updates(self, editor: Editor, limit: int) -> Iterator[tuple[EditLine, Sequence[WeightDelta]]]:
        """Each edit with the updates in the model when it was measured: its own, and in a sequence all up to it.

        Saved ones are read; others are computed again, which the run's contexts and seed make possible.
        """
        kept: list[WeightDelta] = []
        read: set[int] = set()
        for line in self.run.edits[:limit]:
            if line.mode == "single":
                yield line, self._again(editor, line.record).deltas
                continue
            first = self.first_of(line.index)
            saved = delta_folder(self.run.folder, first)
            if line.kept and saved.exists():
                if first not in read:
                    read.add(first)
                    kept += saved_edit(self.run.folder, first, [line]).deltas
                yield line, kept

    def editor(self) -> Editor:
        """An editor of the run's model with its contexts. Raises DataError: the model has other weights now."""
        contexts = list(self.run.manifest["context_templates"]) or None
        changes: dict[str, Any] = {"save_keys": False} if "save_keys" in vars(self.hparams) else {}
        if "context_templates" in vars(self.hparams):
            changes["context_templates"] = contexts
        editor = Editor(dataclasses.replace(self.hparams, ppl_sentence_num=0, **changes))
        if editor.fingerprint() != self.run.manifest["model_fingerprint"]:
            raise DataError(f"{self.run.folder}: was made with other weights than {self.hparams.model_name} has now")
        return editor

    def _again(self, editor: Editor, record: EditRecord) -> EditResult:
        result = editor.compute(record.request)
        for layer, trace in result.trace.items():
            then = record.trace[layer].denominator
            if then is not None and trace.denominator is not None and abs(trace.denominator - then) > SAME * abs(then):
                LOG.warning(
                    "case %r: denominator %.6g in the run, %.6g computed again (another machine or version?)",
                    record.request.case_id,
                    then,
                    trace.denominator,
                )
        return result

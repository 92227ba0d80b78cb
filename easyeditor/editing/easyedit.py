"""BaseEditor: EasyEdit's calls, arguments and return values, on top of the editor."""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from easyeditor.base.errors import ConfigError
from easyeditor.base.files import to_json
from easyeditor.dataset.columns import requests_from_columns
from easyeditor.dataset.formats import parse
from easyeditor.editing.editor import Editor, Request
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.lm import weights
from easyeditor.values.edit import EditRequest
from easyeditor.values.plain import mean_over_records
from easyeditor.values.request import reconcile

LOG = logging.getLogger(__name__)

SHOWN = ("pre", "just_before", "post", "probabilities", "collapse", "time")
"""The entries of a record that `verbose` logs."""
USED = ("test_generation", "eval_metric", "summary_metrics")
"""Arguments of EasyEdit's that ask for more numbers."""
UNUSED = ("train_ds", "target_neg", "loc_prompts", "pre_file", "pre_edit")
"""Arguments of EasyEdit's that are accepted and not used; a warning names those that ask for something."""
SAME_METRIC = ("exact match", "token em", "token_em")
"""Values of `eval_metric` that name what is measured anyway: the share of tokens that are right."""
PARTS = ("locality", "portability", "fluency")
"""Parts of a record's `pre` and `post` that hold numbers by key."""
FLUENCY = "GE"
"""The metric that EasyEdit calls `fluency.ngram_entropy`."""


def _absent(name: str) -> Any:
    """A call of EasyEdit's that is of methods which are not here."""

    def call(*_: Any, **__: Any) -> Any:
        raise ConfigError(f"BaseEditor.{name}() is not here; there are: edit, batch_edit, edit_requests, edit_dataset")

    return call


class BaseEditor(Editor):
    """The editor with `edit` and `batch_edit` as EasyEdit and the seed repository call them."""

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str | None] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        *,
        subject: str | Sequence[str] | None = None,
        keep_original_weight: bool | None = None,
        sequential_edit: bool | None = None,
        verbose: bool = True,
        **others: Any,
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """Edit a list of facts one after another and measure each; returns (metrics, model, original weights).

        `keep_original_weight=True` takes every edit back after measuring it; False, the default, keeps them all in the
        model (sequential editing). `sequential_edit` is EasyEdit's name for the opposite; it decides where both are
        given. In every record `pre`, locality and the verdict are those of the original model, before the first edit.
        `locality_inputs` / `portability_inputs` are ``{key: {"prompt": […], "ground_truth": […]}}``, one entry per
        prompt.
        The third value holds the weights the edits touched as they were before, empty when they are back already.
        `verbose` shows progress and logs each record. `others` may be EasyEdit's: `test_generation=True` adds
        `fluency.ngram_entropy` to `pre` and `post`, `eval_metric="ppl"` adds `rewrite_ppl`, `summary_metrics=True` logs
        the means; those in `UNUSED` do nothing.

        Raises:
            DataError: lists of unequal length or a bad request (found before anything is edited).
            TypeError: an argument that is neither ours nor EasyEdit's.
        """
        columns = (prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject)
        return self._columns("edit", columns, keep_original_weight, sequential_edit, verbose, others)

    def batch_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        ground_truth: Sequence[str | None] | None = None,
        rephrase_prompts: Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        *,
        subject: Sequence[str] | None = None,
        keep_original_weight: bool | None = None,
        sequential_edit: bool | None = None,
        verbose: bool = True,
        **others: Any,
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """Edit facts `batch_size` (the hyper-parameter) at a time, each batch as one edit, and measure each fact with
        its batch in the model; arguments and values as `edit`'s.

        Each batch is taken back before the next, as upstream; `sequential_edit=True` (or `keep_original_weight=False`)
        keeps them.
        """
        columns = (prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject)
        return self._columns("batch_edit", columns, keep_original_weight, sequential_edit, verbose, others)

    def _columns(
        self,
        call: str,
        columns: tuple[Any, ...],
        restored: bool | None,
        sequential: bool | None,
        verbose: bool,
        others: Mapping[str, Any],
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """What `edit` and `batch_edit` do: they differ in how many requests are one edit, and in what they do with it
        where neither flag says."""
        _check_others(call, others)
        requests = requests_from_columns(*columns, needs_subject=self.method.needs_subject)
        size, unasked, mode, other = 1, False, "every edit is kept in the model", "sequential_edit=False"
        if call == "batch_edit":
            size = getattr(self.method.hparams, "batch_size", None) or len(requests)
            unasked, mode, other = True, "every batch is taken back", "sequential_edit=True"
        if sequential is not None and restored == sequential:
            LOG.warning(
                "keep_original_weight=%s and sequential_edit=%s contradict each other; sequential_edit decides, as in "
                "EasyEdit: edits are %s",
                *(restored, sequential, "kept" if sequential else "taken back one by one"),
            )
        if sequential is not None:
            restored = not sequential
        if restored is None and len(requests) > 1:
            LOG.warning(
                "%s(): %d requests and neither sequential_edit nor keep_original_weight given: %s; %s for the other "
                "mode (EasyEdit takes back, the papers' edit() keeps)",
                *(call, len(requests), mode, other),
            )
        chunks = [requests[i : i + size] for i in range(0, len(requests), size)]
        return self._edited(chunks, unasked if restored is None else restored, verbose, others)

    def edit_requests(
        self,
        requests: Sequence[Request],
        sequential_edit: bool = False,
        verbose: bool = True,
        test_generation: bool = False,
        **others: Any,
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """`edit` of requests that are made already: `EditRequest`, or records of a format that `docs/data.md` names.
        Each edit is taken back after it is measured unless `sequential_edit`, as in EasyEdit."""
        _check_others("edit_requests", others)
        made = [r if isinstance(r, EditRequest) else parse(r, f"request {i}", i) for i, r in enumerate(requests)]
        others["test_generation"] = test_generation
        return self._edited([[request] for request in made], not sequential_edit, verbose, others)

    def edit_dataset(
        self, ds: Sequence[Request], keep_original_weight: bool = False, verbose: bool = True, **others: Any
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """`edit` of every record of a dataset (`CounterFactDataset`, `ZsreDataset`, …)."""
        return self.edit_requests(ds, not keep_original_weight, verbose, **others)

    generate_edit, normal_edit, deep_edit = (_absent(name) for name in ("generate_edit", "normal_edit", "deep_edit"))

    def _edited(
        self,
        chunks: Sequence[Sequence[EditRequest]],
        restore: bool,
        verbose: bool,
        asked: Mapping[str, Any],
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """One edit for each chunk, measured, and kept unless `restore`."""
        for chunk in chunks:
            self._check_subjects(chunk)
            reconcile(chunk)  # what contradicts itself is found before the first batch is edited
        also = copy.copy(self)  # measures what this call asks for besides
        if asked.get("test_generation"):
            also.metrics = tuple(dict.fromkeys((*self.metrics, FLUENCY)))
        originals = {} if restore else weights.snapshot(self.model, self.method.weight_names)
        records: list[dict[str, Any]] = []
        before: PerplexityReport | None = None
        base: PerplexityReport | None = None
        for number, chunk in enumerate(chunks):
            label = f"{number + 1}/{len(chunks)}" if len(chunks) > 1 else ""
            examined = also.examine_together(chunk, ppl_before=before, ppl_base=base, verbose=verbose, label=label)
            if not restore:
                self.commit(examined.result)
            before = examined.ppl_before if restore else examined.ppl_after
            base = examined.ppl_base
            for record in (record.to_json() for record in examined.records):
                _add_asked(record, asked)
                records.append(record)
                if verbose:
                    request, shown = record["requested_rewrite"], to_json({key: record[key] for key in SHOWN})
                    LOG.info("%s: %s → %s %s", request["case_id"], request["prompt"], request["target_new"], shown)
        if asked.get("summary_metrics"):
            summary_metrics(records)
        return records, self.model, originals


def _add_asked(record: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """Put what a call asks for under EasyEdit's names: perplexity of the new answer, entropy of a text's n-grams."""
    for state, when in (("pre", "before"), ("post", "after")):
        probability = record["probabilities"]["target_new"][when]
        if asked.get("eval_metric") == "ppl":
            record[state]["rewrite_ppl"] = [1 / probability if probability else None]
        if asked.get("test_generation"):
            record[state]["fluency"] = {"ngram_entropy": record["metrics"][when][FLUENCY]["value"]}


def summary_metrics(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the records of `edit`, as EasyEdit's function of this name: under `pre` and `post` the accuracies and
    `ppl`, those of `locality` and `portability` by key. A record counts once, however many prompts it has. Logged, and
    returned."""
    found: dict[str, Any] = {}
    for state in ("pre", "post"):
        records = [record[state] for record in metrics]
        parts = {part: [record[part] for record in records if part in record] for part in PARTS}
        found[state] = {**_means(records), **{part: _means(of) for part, of in parts.items() if of}}
    LOG.info("means over %d records: %s", len(metrics), to_json(found))
    return found


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each accuracy, perplexity and entropy: within a record, then over the records that have it."""
    values: dict[str, list[list[float | None]]] = {}
    for record in records:
        for key, value in record.items():
            if key.endswith(("_acc", "ppl", "_entropy")):
                values.setdefault(key, []).append(value if isinstance(value, list) else [value])
    means = {key: mean_over_records(own) for key, own in values.items()}
    return {key: found for key, found in means.items() if found is not None}


def _check_others(call: str, others: Mapping[str, Any]) -> None:
    """One warning for EasyEdit's arguments that ask for what is not done here. Raises TypeError for any other name."""
    known = inspect.signature(getattr(BaseEditor, call)).parameters.keys() - {"self", "others"} | {*USED, *UNUSED}
    if strange := sorted(others.keys() - known):
        near = difflib.get_close_matches(strange[0], known, n=1)
        raise TypeError(f"{call}() has no argument {strange[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    asked = [name for name in UNUSED if others.get(name) not in (None, False)]
    if others.get("eval_metric") not in (None, False, "ppl", *SAME_METRIC):
        asked.append("eval_metric")
    if asked:
        LOG.warning(
            "%s(): %s: accepted as EasyEdit's, not used here; BaseEditor(hparams, metrics=…) measures more "
            "(docs/metrics.md)",
            *(call, ", ".join(asked)),
        )

"""EasyEdit's door: its calls, arguments and return values, on top of `examine`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from easyeditor.dataset.columns import requests_from_columns
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.record import Examined
from easyeditor.lm import weights
from easyeditor.methods.base import EditMethod
from easyeditor.records import EditRequest, EditResult

LOG = logging.getLogger(__name__)


class EasyEditCalls(ABC):
    """`edit` and `batch_edit` as EasyEdit and the seed repository call them; the editor brings the rest."""

    model: PreTrainedModel
    method: EditMethod[Any]

    @abstractmethod
    def examine_together(
        self,
        requests: Sequence[EditRequest],
        *,
        ppl_before: PerplexityReport | None = None,
        ppl_base: PerplexityReport | None = None,
        verbose: bool = False,
        label: str = "",
    ) -> Examined:
        """Compute one edit for all requests, measure the model before and with it, and take it back."""

    @abstractmethod
    def commit(self, result: EditResult) -> None:
        """Keep an edit in the model."""

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
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """Edit a list of facts one after another and measure each; returns (metrics, model, original weights).

        `keep_original_weight=True` takes every edit back after measuring it; False, the default, keeps them all in the
        model (sequential editing). `sequential_edit` is EasyEdit's name for the opposite; it decides where both are
        given. In every record `pre`, locality and the verdict are those of the original model, before the first edit.
        `locality_inputs` / `portability_inputs` are ``{key: {"prompt": […], "ground_truth": […]}}``, one entry per
        prompt.
        The third value holds the weights the edits touched as they were before, empty when they are back already.

        Raises:
            DataError: lists of unequal length or a bad request (found before anything is edited).
        """
        requests = requests_from_columns(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        restore = _restores(keep_original_weight, sequential_edit)
        if restore is None and len(requests) > 1:
            _warn(f"edit(): {len(requests)} requests", "every edit is kept in the model", "sequential_edit=False")
        return self._edited([[request] for request in requests], bool(restore), verbose)

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
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """Edit facts `batch_size` (the hyper-parameter) at a time, each batch as one edit, and measure each fact with
        its batch in the model; arguments and values as `edit`'s.

        Each batch is taken back before the next, as upstream; `sequential_edit=True` (or `keep_original_weight=False`)
        keeps them.
        """
        requests = requests_from_columns(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        restore = _restores(keep_original_weight, sequential_edit)
        if restore is None and len(requests) > 1:
            _warn(f"batch_edit(): {len(requests)} requests", "every batch is taken back", "sequential_edit=True")
        size = getattr(self.method.hparams, "batch_size", None) or len(requests)
        chunks = [requests[i : i + size] for i in range(0, len(requests), size)]
        return self._edited(chunks, restore is not False, verbose)

    def _edited(
        self, chunks: Sequence[Sequence[EditRequest]], restore: bool, verbose: bool
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """One edit for each chunk, measured, and kept unless `restore`."""
        copy = {} if restore else weights.snapshot(self.model, self.method.weight_names)
        records: list[dict[str, Any]] = []
        before: PerplexityReport | None = None
        base: PerplexityReport | None = None
        for number, chunk in enumerate(chunks):
            label = f"{number + 1}/{len(chunks)}" if len(chunks) > 1 else ""
            examined = self.examine_together(chunk, ppl_before=before, ppl_base=base, verbose=verbose, label=label)
            if not restore:
                self.commit(examined.result)
            before = examined.ppl_before if restore else examined.ppl_after
            base = examined.ppl_base
            records += examined.records
        return records, self.model, copy


def _restores(keep_original_weight: bool | None, sequential_edit: bool | None) -> bool | None:
    """Is each edit taken back after it is measured? None: the caller did not say."""
    if keep_original_weight is not None and sequential_edit is not None and keep_original_weight == sequential_edit:
        LOG.warning(
            "keep_original_weight=%s and sequential_edit=%s contradict each other; sequential_edit decides, as in "
            "EasyEdit: edits are %s",
            *(keep_original_weight, sequential_edit, "kept" if sequential_edit else "taken back one by one"),
        )
    if sequential_edit is not None:
        return not sequential_edit
    return keep_original_weight


def _warn(what: str, mode: str, flag: str) -> None:
    """Say which mode is used where the call does not say, and the flag for the other."""
    LOG.warning(
        "%s and neither sequential_edit nor keep_original_weight given: %s; %s for the other mode (EasyEdit takes "
        "back, the papers' edit() keeps)",
        *(what, mode, flag),
    )

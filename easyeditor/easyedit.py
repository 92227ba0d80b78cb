"""EasyEdit's door: its calls, arguments and return values, on top of `examine`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from easyeditor.dataset.columns import requests_from_columns
from easyeditor.errors import ConfigError
from easyeditor.evaluate.perplexity import PerplexityReport
from easyeditor.evaluate.record import Examined
from easyeditor.lm import weights
from easyeditor.methods.base import EditMethod
from easyeditor.records import EditRequest, EditResult


class EasyEditCalls(ABC):
    """`edit` and `batch_edit` as EasyEdit and the seed repository call them; the editor brings the rest."""

    model: PreTrainedModel
    method: EditMethod[Any]

    @abstractmethod
    def examine(
        self,
        request: EditRequest,
        *,
        ppl_before: PerplexityReport | None = None,
        verbose: bool = False,
        label: str = "",
    ) -> Examined:
        """Compute one edit, measure the model before and with it, and take it back."""

    @abstractmethod
    def examine_together(self, requests: Sequence[EditRequest], *, verbose: bool = False) -> Examined:
        """The same for several requests edited as one."""

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
        model (sequential editing). `sequential_edit` is EasyEdit's name for the opposite; both given must not
        contradict.
        `locality_inputs` / `portability_inputs` are ``{key: {"prompt": […], "ground_truth": […]}}``, one entry per
        prompt.
        The third value holds the weights the edits touched as they were before, empty when they are back already.

        Raises:
            DataError: lists of unequal length or a bad request (found before anything is edited).
            ConfigError: contradicting flags.
        """
        restore = _restore_flag(keep_original_weight, sequential_edit)
        requests = requests_from_columns(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        copy = {} if restore else weights.snapshot(self.model, self.method.weight_names)
        records = []
        before: PerplexityReport | None = None
        for number, request in enumerate(requests):
            show = f"{number + 1}/{len(requests)}" if len(requests) > 1 else ""
            examined = self.examine(request, ppl_before=before, verbose=verbose, label=show)
            if not restore:
                self.commit(examined.result)
            before = examined.ppl_before if restore else examined.ppl_after
            records.append(examined.record)
        return records, self.model, copy

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
        keep_original_weight: bool = False,
        verbose: bool = True,
    ) -> tuple[list[dict[str, Any]], PreTrainedModel, dict[str, torch.Tensor]]:
        """Edit all facts as one edit (MEMIT: jointly), measure each with all of them in; arguments and values as
        `edit`'s."""
        requests = requests_from_columns(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        examined = self.examine_together(requests, verbose=verbose)
        if keep_original_weight:
            return list(examined.records), self.model, {}
        copy = weights.snapshot(self.model, self.method.weight_names)
        self.commit(examined.result)
        return list(examined.records), self.model, copy


def _restore_flag(keep_original_weight: bool | None, sequential_edit: bool | None) -> bool:
    if keep_original_weight is not None and sequential_edit is not None and keep_original_weight == sequential_edit:
        raise ConfigError(
            f"keep_original_weight={keep_original_weight} and sequential_edit={sequential_edit} contradict each other: "
            "restoring after each edit is the opposite of editing in sequence; give one of them"
        )
    if sequential_edit is not None:
        return not sequential_edit
    return bool(keep_original_weight)

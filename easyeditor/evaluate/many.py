"""Measure many edited models at once: scores and perplexity of edits whose rows share forwards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyeditor.base.progress import Stopwatch
from easyeditor.evaluate.examined import State
from easyeditor.evaluate.metric import Metric, Settings
from easyeditor.evaluate.perplexity import PerplexityProbe
from easyeditor.evaluate.registry import Evaluation, measure, pairs_of
from easyeditor.evaluate.scoring import score
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.many import SideBySide
from easyeditor.lm.weights import applied, frozen
from easyeditor.values.edit import EditRequest, EditResult


def measure_many(
    parts: Anatomy,
    tok: PreTrainedTokenizerBase,
    edits: Sequence[tuple[EditRequest, EditResult, Settings, Evaluation]],
    metrics: Sequence[Metric],
    probe: PerplexityProbe | None,
) -> list[State]:
    """The state of the model with each of the edits: its request, the edit, its settings, the unedited model's numbers.

    What metrics generate is asked one edit after another, with it written into the weights. Seconds are shared evenly.
    """
    clock, model, first = Stopwatch(), parts.model, edits[0][2]
    side = SideBySide(parts, [result.deltas for _, result, _, _ in edits])
    with clock("metrics"):
        asked = [pairs_of([request], metrics, [own], record=True) for request, _, own, _ in edits]
        owned = [(number, pair) for number, pairs in enumerate(asked) for pair in pairs]
        pairs, owners = [pair for _, pair in owned], [number for number, _ in owned]
        shared: dict[str, Any] = {"edits": side, "owners": owners, "requests": [request for request, *_ in edits]}
        with frozen(model):
            found = score(model, tok, pairs, budget=first.budget, prompting=first.prompting, **shared)
        scored = dict(zip(owned, found, strict=True))
        evaluations = []
        for number, (request, result, own, before) in enumerate(edits):
            known = {pair: scored[number, pair] for pair in asked[number]}
            with applied(model, result.deltas) if metrics else nullcontext():
                made = measure(model, tok, [request], metrics, [own], record=True, before=before, scored=known)
            evaluations.append(made)
    with clock("perplexity"):
        reports = [None] * len(edits) if probe is None else probe.measure_each(side, len(edits))
    seconds = {part: spent / len(edits) for part, spent in clock.seconds.items()}
    return [
        State(evaluation=evaluation, ppl=ppl, seconds=seconds)
        for evaluation, ppl in zip(evaluations, reports, strict=True)
    ]

"""CounterFact and ZsRE as tasks of lm-evaluation-harness: `--include_path easyeditor/export/harness`.

Every prompt is a document with the answer that should be likelier and, where it is known, the other one:

  efficacy      the new answer, against the record's true one, on the prompt
  paraphrase    the same on each paraphrase
  neighborhood  the true answer of each neighbourhood prompt, against the new one

A metric of that name is 1 if the first is likelier per token (ROME's ES, PS, NS), `…_greedy` is 1 if it is what the
model says first, token after token. Both are means over a record's prompts, and then over records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.paths import SHIPPED
from easyeditor.dataset.reader import read_dataset
from easyeditor.lm.joining import joined
from easyeditor.lm.tokens import target_ids
from easyeditor.values.edit import EditRequest
from easyeditor.values.plain import mean_over_records

FACTS = SHIPPED / "data" / "facts.json"
NEAR = "neighborhood"
Doc = dict[str, Any]
Scored = tuple[int, float]
"""A record's number, and one prompt's score."""


def counterfact(**metadata: Any) -> dict[str, Any]:
    """The documents of `easyeditor_counterfact`: of the file `counterfact` names in the metadata, or
    EASYEDITOR_COUNTERFACT in the environment, or this project's facts."""
    return _dataset("counterfact", metadata)


def zsre(**metadata: Any) -> dict[str, Any]:
    """The documents of `easyeditor_zsre`, likewise."""
    return _dataset("zsre", metadata)


def results(doc: Doc, scored: Sequence[tuple[float, bool]]) -> dict[str, Scored]:
    """What one document says: (log-likelihood, is it the greedy answer?) of its choices -> its metrics."""
    kind, case = doc["kind"], doc["case"]
    each = [total / length for (total, _), length in zip(scored, doc["lengths"], strict=True)]
    found = {f"{kind}_greedy": (case, float(scored[0][1]))}
    return found if len(each) == 1 else {kind: (case, float(each[0] > each[1])), **found}


def mean_of_records(scores: Sequence[Scored]) -> float:
    """The mean over records of the mean over each record's prompts."""
    cases: dict[int, list[float]] = {}
    for case, score in scores:
        cases.setdefault(case, []).append(score)
    found = mean_over_records(cases.values())
    assert found is not None  # the harness asks for metrics that have scores
    return found


def documents(requests: Sequence[EditRequest], tok: PreTrainedTokenizerBase) -> list[Doc]:
    """A document for each prompt, with the number of tokens of each answer."""
    return [
        {
            "kind": kind,
            "case": case,
            "query": joined(prompt, answers[0], "auto")[0],
            "choices": [joined(prompt, answer, "auto")[1] for answer in answers],
            "lengths": [len(target_ids(tok, prompt, answer)) for answer in answers],
            "gold": 0,
        }
        for case, request in enumerate(requests)
        for kind, prompt, answers in _contests(request)
    ]


def _contests(request: EditRequest) -> Iterator[tuple[str, str, list[str]]]:
    """Of each prompt: its kind, itself, the answer that should be likelier and the other one if there is one."""
    answers = [request.target_new, *([] if request.ground_truth is None else [request.ground_truth])]
    yield "efficacy", request.prompt, answers
    for prompt in request.rephrase_prompts:
        yield "paraphrase", prompt, answers
    if NEAR in request.locality:
        probe = request.locality[NEAR]
        for prompt, true in zip(probe.prompts, probe.answers, strict=True):
            yield NEAR, prompt, [true, request.target_new]


def _dataset(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError without a tokenizer's name; DataError for a file that cannot be read."""
    from datasets import Dataset

    tokenizer = metadata.get("tokenizer") or metadata.get("pretrained")
    if not tokenizer:
        raise ConfigError(
            f"easyeditor_{name}: answers are compared per token, so name a tokenizer: --model_args pretrained=…, or "
            "--metadata '{\"tokenizer\": …}'"
        )
    source = str(metadata.get(name) or os.environ.get(f"EASYEDITOR_{name.upper()}") or FACTS)
    try:
        tok = AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise ConfigError(f"easyeditor_{name}: no tokenizer at {tokenizer}: {' '.join(str(error).split())}") from error
    return {
        "test": Dataset.from_list(documents(read_dataset(source, skip_bad=True, needs_subject=False).requests, tok))
    }

"""EasyEdit's `edit(...)` arguments, parallel lists, as requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.dataset.formats import make_request
from easyeditor.dataset.probes import Asked, Reading, answered, first, paraphrases
from easyeditor.values.edit import EditRequest


def requests_from_columns(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    ground_truth: str | Sequence[str | None] | None,
    rephrase_prompts: str | Sequence[str] | None,
    locality_inputs: Mapping[str, Any] | None,
    portability_inputs: Mapping[str, Any] | None,
    subject: str | Sequence[str] | None,
    *,
    needs_subject: bool = True,
) -> list[EditRequest]:
    """EasyEdit's parallel lists as requests. Raises DataError when their lengths differ, and for a subject that is not
    in its prompt where the method needs it."""
    listed = _listed(prompts, "prompts")
    count = len(listed)
    given = {"subject": subject, "ground_truth": ground_truth, "rephrase_prompts": rephrase_prompts}
    columns = {key: [None] * count if value is None else _listed(value, key) for key, value in given.items()}
    columns["target_new"] = _listed(target_new, "target_new")
    for key, values in columns.items():
        if len(values) != count:
            raise DataError(f"edit(): {count} prompts but {len(values)} {key}; give one for each prompt")
    reading = Reading(needs_subject=needs_subject)
    localities = _spread(locality_inputs, count, "locality", reading)
    portabilities = _spread(portability_inputs, count, "portability", reading)
    requests = [
        make_request(
            prompt,
            columns["subject"][i],
            reading,
            target_new=first(columns["target_new"][i]),
            ground_truth=first(columns["ground_truth"][i]),
            rephrase_prompts=paraphrases(columns["rephrase_prompts"][i], reading),
            locality=localities[i],
            portability=portabilities[i],
            case_id=i,
        )
        for i, prompt in enumerate(listed)
    ]
    reading.tell("edit()")
    return requests


def _spread(inputs: Mapping[str, Any] | None, count: int, kind: str, reading: Reading) -> list[dict[str, Any]]:
    """``{key: {"prompt": […N], "ground_truth": […N]}}`` as one mapping per prompt; an entry may be None or a list."""
    where = f"{kind}_inputs"
    asked: list[list[Asked]] = [[] for _ in range(count)]
    if not isinstance(inputs, Mapping | None):
        raise DataError(f"{where} must be {{name: {{'prompt': […], 'ground_truth': […]}}}}, found {inputs!r:.60}")
    for key, probe in (inputs or {}).items():
        if not isinstance(probe, Mapping) or not {"prompt", "ground_truth"} <= probe.keys():
            raise DataError(f"{where}[{key!r}] must have 'prompt' and 'ground_truth', found {probe!r}")
        prompts, answers = (_listed(probe[part], f"{where}[{key!r}]") for part in ("prompt", "ground_truth"))
        if prompts == answers == []:  # as EasyEdit's examples pass a kind of probe that the data does not have
            continue
        if len(prompts) != count or len(answers) != count:
            raise DataError(
                f"{where}[{key!r}] has {len(prompts)} prompts and {len(answers)} ground truths for {count} edits; "
                "give one for each edit (None where there is none)"
            )
        for i in range(count):
            asked[i].append((key, prompts[i], answers[i]))
    found = []
    for i, probes in enumerate(asked):
        try:
            found.append(answered(probes, kind, reading))
        except DataError as error:
            raise DataError(f"request {i}: {error}") from error
    return found


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable | None):
        raise DataError(f"edit(): {name} must be a text or a list, found {value!r:.60}")
    return [value] if value is None or isinstance(value, str) else list(value)

"""A run in the layout of the ROME and MEMIT repositories, case files and params.json, for their summarize.py.

Their numbers are mean negative log-probabilities of an answer's tokens; what they call success is made of these by
summarize.py. `pre` is the original model, `post` the model with the edit, in a sequence just after it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import read_json, whole_folder, write_json
from easyeditor.evaluate.registry import chosen
from easyeditor.methods.registry import method_class
from easyeditor.results.lines import EditLine
from easyeditor.results.run import CONFIG, MANIFEST, run_lines
from easyeditor.runs.planning import batch_of
from easyeditor.runs.settings import RunSettings
from easyeditor.values.record import EditRecord, Row, Side
from easyeditor.values.request import EditRequest

LOG = logging.getLogger(__name__)

METRICS = ("S", "EM", "PM", "NM", "zsre_specificity")
"""What a run must have measured: both probabilities of every prompt, and whether neighbours' true answers come first.
S and its parts are there to compare with what summarize.py prints."""
PROBABILITIES = {"rewrite": "EM", "paraphrase": "PM", "neighborhood": "NM"}
UNDERFLOW = 745.0  # nats; the least probability of float64 is exp(-744.4), and what is below it is stored as 0


def check_metrics(settings: RunSettings) -> None:
    """Raise ConfigError unless the run makes edits and measures what case files hold."""
    if settings.screen:
        raise ConfigError("--case-files with --screen: a screen makes no edit")
    there = {metric.name for metric in chosen(settings.metrics)} if settings.metrics else set()
    if lacking := [name for name in METRICS if name not in there]:
        raise ConfigError(
            f"--case-files needs the metrics {', '.join(lacking)}, and this run was begun without; begin a new one"
        )


def write_cases(run: Path, folder: Path) -> int:
    """Write the edits of a mass edit's run folder as case files; returns their number.

    A case whose numbers are not finite has no place in that layout: it is left out, with a warning.

    Raises:
        DataError: the run holds no such edit. OutputError: the folder holds something, or cannot be written.
    """
    config, manifest = read_json(run / CONFIG), read_json(run / MANIFEST)
    first_of, size = batch_of(run, manifest), config["run"]["batch_size"]
    by_token = manifest["data"]["format"] == "zsre"
    ids = _ids(run)
    groups: dict[int, list[int]] = {}
    for index in sorted(ids):
        groups.setdefault(first_of(index), []).append(ids[index])
    before = f"{size}_edits-" if method_class(config["hparams"]["alg_name"]).joint else ""  # MEMIT's names, or ROME's
    count = 0
    with whole_folder(folder) as part:
        write_json(part / "params.json", config["hparams"])
        for line in _edits(run):
            try:
                case = _case(line, groups[first_of(line.index)], ids[line.index], size, by_token)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{run}, edit {line.index}: its metrics are damaged ({error!r})") from error
            if case is None:
                LOG.warning("case %s is not in %s: its numbers are not finite", ids[line.index], folder)
                continue
            write_json(part / f"{before}case_{ids[line.index]}.json", case)
            count += 1
        if not count:
            raise DataError(f"{run}: no edit whose numbers are finite, so there is no case to write")
    return count


def _edits(run: Path) -> Iterator[EditLine]:
    return (line for line in run_lines(run) if isinstance(line, EditLine))


def _ids(run: Path) -> dict[int, int]:
    """Each edit's number: the records' own where these are numbers (CounterFact), else its place in the run."""
    own = {line.index: line.request.case_id for line in _edits(run)}
    numbers = {index: int(found) for index, found in own.items() if str(found).isdecimal()}
    return numbers if len(set(numbers.values())) == len(own) else {index: index for index in own}


def _case(line: EditLine, group: list[int], number: int, size: int, by_token: bool) -> dict[str, Any] | None:
    """The case file of case `number`, edited together with `group`; None where a probability was not finite."""
    record = line.kept_record
    try:
        sides = {
            "pre": _side(record, record.pre, record.metrics["before"], by_token),
            "post": _side(record, record.post, record.metrics["after"], by_token),
        }
    except ArithmeticError:
        return None
    return {
        "case_id": number,
        "grouped_case_ids": group,
        "num_edits": size,
        "requested_rewrite": _rewrite(record.request),
        "time": record.time * len(group),  # of the whole edit; a record has its own share
        **sides,
    }


def _rewrite(request: EditRequest) -> dict[str, Any]:
    truth = request.ground_truth
    return {
        "prompt": f"{request.before}{{}}{request.after}",
        "subject": request.subject,
        "target_new": {"str": request.target_new.strip()},
        **({} if truth is None else {"target_true": {"str": truth.strip()}}),
    }


def _side(record: EditRecord, side: Side, row: Row, by_token: bool) -> dict[str, Any]:
    """Probabilities and right answers of one state of the model; a kind of prompt the record lacks has no entry.

    A right answer has all its tokens in first place (MEMIT's CounterFact); `by_token` it counts by their share (its
    ZsRE, which has one prompt of each kind).
    """
    made: dict[str, Any] = {}
    for kind, name in PROBABILITIES.items():
        if row[name].value is not None:
            pairs = row[name].details["probabilities"]
            new_first = kind != "neighborhood"  # there the true answer should be the likelier
            made[f"{kind}_prompts_probs"] = [_losses(pair if new_first else pair[::-1]) for pair in pairs]
    near = row["zsre_specificity"]
    parts = {"rewrite": side.rewrite, "paraphrase": side.rephrase}
    if near.value is not None:
        parts["neighborhood"] = tuple(near.details["each"])
    for kind, shares in parts.items():
        if shares:
            made[f"{kind}_prompts_correct"] = [share if by_token else share == 1 for share in shares]
    return made


def _losses(pair: list[float | None]) -> dict[str, float]:
    new, true = pair
    return {"target_new": _loss(new), "target_true": _loss(true)}


def _loss(probability: float | None) -> float:
    """-log p in nats. Raises ArithmeticError: it was not finite."""
    if probability is None or not math.isfinite(probability):
        raise ArithmeticError("not finite")
    return -math.log(probability) if probability > 0 else UNDERFLOW

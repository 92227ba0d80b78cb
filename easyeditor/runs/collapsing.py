"""Datasets made of what runs found: the requests that collapse a model, and the union over several models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import read_json
from easyeditor.dataset.reader import read_dataset
from easyeditor.results.lines import EditLine
from easyeditor.results.run import CONFIG, run_lines
from easyeditor.values.edit import EditRequest


def collapsing(folder: Path) -> list[dict[str, Any]]:
    """The requests of a run whose edit collapsed the model, as flat records in the order of the run.

    Each says under `collapses` which model and method it collapsed, and how far.

    Raises:
        ConfigError: the run measured no perplexity, or kept its edits: then a later collapse says nothing of a request.
    """
    config = read_json(folder / CONFIG)
    if config["run"]["mode"] != "single" or config["run"]["screen"]:
        raise ConfigError(f"{folder}: collapsing requests come from runs of mode single, one edit in the model")
    if not config["hparams"]["ppl_sentence_num"]:
        raise ConfigError(f"{folder}: no perplexity was measured (ppl_sentence_num 0), so no collapse is known")
    hit = [line.without_details() for line in run_lines(folder) if isinstance(line, EditLine) and line.record.collapsed]
    return [_record(line, config["hparams"]["model_name"]) for line in sorted(hit, key=lambda line: line.index)]


def union(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of several mined files, each fact once with the `collapses` of all; order of first appearance.

    Raises:
        DataError: a file is not readable, or a record is no request.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in files:
        read_dataset(str(path), needs_subject=False)  # every record is a request, or the error names it
        raw = read_json(path)
        for record in raw if isinstance(raw, list) else [raw]:
            if "prompt" not in record:
                raise DataError(f"{path}: a union is made of flat records (prompt, subject, target_new)")
            key = (record["prompt"], record.get("subject"), record["target_new"])
            known = found.setdefault(key, {**record, "collapses": []})
            known["collapses"] += [c for c in record.get("collapses", []) if c not in known["collapses"]]
    for number, record in enumerate(found.values()):
        record["case_id"] = number  # ids of several runs may clash
    return list(found.values())


def _record(line: EditLine, model: str) -> dict[str, Any]:
    request, record = line.request, line.record
    rewrite = request.to_json()
    start = rewrite.pop("subject_start")
    again = EditRequest.make(request.prompt, subject=request.subject or None, target_new=request.target_new)
    if again.subject_start != start:  # the subject is in the prompt several times, and not the last one is meant
        rewrite["prompt"] = f"{request.before}{{}}{request.after}"
    kept = {key: value for key, value in rewrite.items() if value not in (None, [], {})}
    cause = {"model": model, "method": record.method, "ppl": record.post.ppl, "denominator": record.denominator}
    return {**kept, "collapses": [cause]}

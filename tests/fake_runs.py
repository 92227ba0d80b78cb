"""Made-up run folders for the report: the shape of real journals, numbers from a seeded generator."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easyeditor.base.files import to_json
from easyeditor.results.lines import EditLine, EvaluationLine, Guard, Retention, ScreenLine, TrainingLine
from easyeditor.values.collapse import verdict
from easyeditor.values.edit import EditRequest
from easyeditor.values.record import EditRecord, LayerNumbers, Side

SUBJECTS = [
    "Chicago", "Arthur", "Bay", "Microsoft", "Danielle Darrieux", "<script>alert(1)</script>", "Москва 北京 🦋",
    "A$AP Rocky & the 100% _tilde~ {brace} \\slash #1", "The very long name of " + "a committee of committees " * 8,
    'quote " and \' apostrophe', "tab\tand\nnewline", "=1+1", "العربية",
]  # fmt: skip
LIMIT = 1000.0
LOSSES = [6.18790340423584, 6.1, 0.00036732826265506446, 0.00030407749000005424]


def edit(
    index: int,
    *,
    ppl: float | None = 93.5,
    denominator: float | None = 8.0,
    numerator: float = 30.0,
    rewrite: Sequence[float] = (1.0,),
    rephrase: Sequence[float] | None = (0.5, 1.0),
    locality: Sequence[float] = (1.0, 0.5),
    subject: str | None = None,
    mode: str = "single",
    step: int | None = None,
    before: float | None = 92.9,
    guard: Guard | None = None,
    padding: int = 0,
    request: EditRequest | None = None,
    method: str = "ROME",
) -> EditLine:
    """One edit's line; `ppl` None is "not measured"."""
    subject = SUBJECTS[index % len(SUBJECTS)] if subject is None else subject
    if request is None:
        request = EditRequest.make("{} is located in", subject=subject, target_new="Italy", case_id=f"case-{index}")
    limits = {"threshold": LIMIT, "ratio": 5.0}
    collapse = None if ppl is None or before is None else verdict(before, ppl, **limits)
    trace = LayerNumbers(
        numerator_norm=numerator, denominator=denominator, key_norm=1.0, prefixed_key_norm=4.2, value_norm_before=6.0,
        value_norm_after=24.0, loss_first=6.0, loss_last=0.5, steps=25,
        delta_norm=numerator / abs(denominator) if denominator else 1.0, losses=(tuple(LOSSES),) * padding,
    )  # fmt: skip
    record = EditRecord(
        request=request,
        time=12.0,
        pre=Side(rewrite=(0.0,), ppl=before),
        post=Side(
            rewrite=tuple(rewrite),
            rephrase=tuple(rephrase or ()),
            outputs={"neighborhood": ((1,), (2,))},
            locality={"neighborhood": tuple(locality)},
            ppl=ppl,
        ),
        probabilities={
            "target_new": {"before": 0.1, "after": 0.9},
            "ground_truth": {"before": None, "after": None},
        },
        collapse=collapse,
        perplexity={"sentences": {"name": "sentences_50"}, "before": None, "just_before": None, "after": None},
        method=method,
        trace={5: trace},
        test_prefix=None,
        remedy=None,
    )
    seconds = {"edit": 12.0, "metrics": 1.0, "perplexity": 6.0, "total": 20.0}
    place = {"index": index, "step": index + 1 if step is None else step, "mode": mode}
    return EditLine(record=record, **place, seconds=seconds, guard=guard)


def edit_line(index: int, **options: Any) -> dict[str, Any]:
    """`edit` as the journal has it."""
    return json.loads(to_json(edit(index, **options).to_json()))


def single_lines(
    count: int, *, seed: int = 0, hard: float = 0.03, infinite: float = 0.0, padding: int = 0
) -> list[dict[str, Any]]:
    """Single edits: a share `hard` with tiny denominators and high perplexity, `infinite` of those not finite."""
    rng, lines = random.Random(seed), []
    for index in range(count):
        denominator = rng.lognormvariate(2.0, 0.35) * rng.choice([1, -1])
        ppl = 92.9 * math.exp(abs(rng.gauss(0, 0.01)))
        if rng.random() < hard:
            denominator = rng.uniform(0.02, 0.3)
            ppl = math.inf if rng.random() < infinite else 92.9 + 300 / denominator**1.7 * rng.lognormvariate(0, 0.5)
        good = [1.0] if ppl < LIMIT else [0.0]
        lines.append(
            edit_line(
                index, ppl=ppl, denominator=denominator, rewrite=good, numerator=rng.gauss(30, 3), padding=padding
            )
        )
    return lines


def sequential_lines(
    count: int, *, every: int = 10, seed: int = 0, blow_up: int | None = None, mode: str = "sequential"
) -> list[dict[str, Any]]:
    """Sequential edits with evaluations; from edit `blow_up` on perplexity explodes and earlier edits are lost."""
    rng, lines, ppl = random.Random(seed), [], 92.9
    for index in range(count):
        before = ppl
        broken = blow_up is not None and index + 1 >= blow_up
        ppl = min(ppl * rng.lognormvariate(1.2, 0.8), 1e12) if broken else ppl * (1 + abs(rng.gauss(0, 0.002)))
        lines.append(edit_line(index, ppl=ppl, before=before, mode=mode))
        if (index + 1) % every == 0 or index + 1 == count:
            chance = 0.05 if broken else 0.97
            held = [chance ** (1 + (index - i) / 60) for i in range(index + 1)]
            rows = [
                Retention(
                    index=i, case_id=f"case-{i}", rewrite_acc=float(rng.random() < held[i]),
                    rephrase_acc=None if i % 3 else 0.5, locality_acc=round(chance, 2),
                )
                for i in range(index + 1)
            ]  # fmt: skip
            lines.append(evaluation(index + 1, ppl, ppl > LIMIT, rows))
    return lines


def evaluation(after: int, ppl: float | None, collapsed: bool | None, rows: Sequence[Retention] = ()) -> dict[str, Any]:
    """An evaluation as the journal has it."""
    line = EvaluationLine(after=after, ppl=ppl, collapsed=collapsed, retention=tuple(rows))
    return json.loads(to_json(line.to_json()))


def training_lines(steps: int, *, seed: int = 0, nan_at: int | None = None) -> list[dict[str, Any]]:
    """A log of MEND training, validated ten times."""
    rng, lines = random.Random(seed), []
    for step in range(1, steps + 1):
        part = step / steps
        loss: float | None = 4 * math.exp(-3 * part) * rng.lognormvariate(0, 0.4)
        loss = None if step == nan_at else loss
        numbers: dict[str, Any] = {
            "edit_loss": loss,
            "locality_loss": 0.05 * rng.lognormvariate(0, 0.5),
            "edit_acc": min(1, part + 0.1),
        }
        values = {**numbers, "grad": 1.5, "seconds": 0.3}
        lines.append(TrainingLine(validation=False, step=step, values=values).to_json())
        if step % max(1, steps // 10) == 0:
            values = {"edit_loss": 4.2 * math.exp(-2.8 * part), "locality_loss": 0.05, "edit_acc": 0.9 * part}
            values["locality_drawdown"] = 0.02 + 0.01 * rng.random()
            lines.append(TrainingLine(validation=True, step=step, values=values).to_json())
    return lines


def screen_lines(edits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Screen lines that go with edits."""
    found = [EditLine.from_json(line) for line in edits]
    return [
        ScreenLine(
            index=e.index,
            case_id=e.request.case_id,
            subject=e.request.subject,
            prompt=e.request.prompt,
            denominator=d,
            prediction=abs(d) < 2.0,
        ).to_json()
        for e in found
        if (d := e.record.denominator) is not None
    ]


def write_run(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    *,
    name: str = "results.jsonl",
    ended: bool = True,
    data: str = "facts",
) -> Path:
    """A run folder with `lines` as its journal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    config = {"alg_name": "ROME", "model_name": "./hugging_cache/smollm2-135m", "seed": 0}
    manifest = {
        "command": ["mass_edit.py", "--data", f"data/{data} 1.json"], "time_utc": "2026-01-02T03:04:05+00:00",
        "platform": "Linux", "cpus": 2, "packages": {"torch": "2.13.0"}, "commit": "abc", "seed": 0,
        "data": {"source": f"data/{data}.json", "sha256": "12ab"}, "model_fingerprint": "fp",
        "sentences": {"name": "s50"},
    }  # fmt: skip
    for file, value in (
        ("config.json", config),
        ("manifest.json", manifest),
        *((("summary.json", {}),) if ended else ()),
    ):
        (folder / file).write_text(json.dumps(value), encoding="utf-8")
    return folder

"""The model card of an exported edit, README.md with the hub's metadata, and its edit.json: what was done to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from easyeditor.base.files import to_json
from easyeditor.export.sources import Measured
from easyeditor.lm.embedded import Embedded
from easyeditor.results.folder import environment
from easyeditor.values.edit import EditResult

Kind = Literal["adapter", "checkpoint", "merged"]
FORMAT = 1  # version of edit.json next to an adapter or checkpoint
MOST_LISTED = 50  # edits and tables shown on the card; edit.json has all
README, EDIT = "README.md", "edit.json"
LANGUAGE_ALONE = "Of the base this is the language model alone. Left out: {}."
COPIED = (
    "It was made and measured on a 4-bit copy of {}, made wide again. The hub's own weights differ a little; on them "
    "nothing was measured."
)


@dataclass(frozen=True, kw_only=True)
class About:
    """What an export is: the base by its hub name, its fingerprint, the edits in order, what was measured of them
    (None for a part that was not), the embedded model that the base is, if any, of an adapter its rank and what was
    cut, by module, and the parts of a multimodal base that are not in it."""

    kind: Kind
    base: str
    fingerprint: str
    edits: Sequence[EditResult]
    measured: Sequence[Measured | None]
    embedded: Embedded | None = None
    rank: int | None = None
    lost: Mapping[str, float] = field(default_factory=dict)
    left_out: Sequence[str] = ()

    @property
    def methods(self) -> list[str]:
        """Titles of the methods, each once."""
        return list(dict.fromkeys(edit.method for edit in self.edits))


def texts(about: About) -> dict[str, str]:
    """The card and edit.json, by file name."""
    return {README: card(about), EDIT: to_json(description(about), indent=1) + "\n"}


def description(about: About) -> dict[str, Any]:
    """The value of edit.json: every request, setting and number, and the versions it was made with."""
    made = environment()
    return {
        "format": FORMAT,
        "kind": about.kind,
        "base_model": about.base,
        "base_fingerprint": about.fingerprint,
        "rank": about.rank,
        "relative_error": dict(about.lost),
        "weights": _weights(about),
        "edits": [
            {
                "method": edit.method,
                "requests": [request.to_json() for request in edit.requests],
                "trace": edit.trace_json(),
                "contexts": list(edit.contexts),
                "seconds": edit.seconds,
                "hparams": dict(edit.hparams),
            }
            for edit in about.edits
        ],
        "measured": [
            None
            if part is None
            else {"of": part.what, "rows": [list(row) for row in part.rows], "verdict": part.verdict}
            for part in about.measured
        ],
        "made_with": {key: made[key] for key in ("time_utc", "python", "packages", "commit")},
    }


def card(about: About) -> str:
    """The text of README.md."""
    requests = [request for edit in about.edits for request in edit.requests]
    facts = f"{len(requests)} edited fact{'' if len(requests) == 1 else 's'}"
    rows = [(r.prompt, r.subject, r.target_new, r.ground_truth or "–") for r in requests[:MOST_LISTED]]
    more = len(requests) - len(rows)
    parts = [
        f"---\n{yaml.safe_dump(_metadata(about), sort_keys=False, allow_unicode=True)}---",
        f"# {_cell(about.base)} with {facts}",
        f"{_what(about)} The change was computed by {', '.join(about.methods)} and touches {len(_weights(about))} "
        f"weight{'' if len(_weights(about)) == 1 else 's'}: {', '.join(f'`{name}`' for name in _weights(about))}.",
        *([] if about.embedded is None else [COPIED.format(about.embedded.hub_name)]),
        *([LANGUAGE_ALONE.format(", ".join(about.left_out))] if about.left_out else []),
        "## What was edited",
        _table(("prompt", "subject", "new answer", "old answer"), rows),
        *([f"… and {more} more in `{EDIT}`."] if more > 0 else []),
        "## Before and after",
        *_measured(about),
        *_cut(about),
        "## Use",
        f"```python\n{_use(about)}\n```",
        f"`{EDIT}` has every request, setting and number, and the versions this was made with.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(about: About) -> dict[str, Any]:
    adapter = about.kind == "adapter"
    return {
        **({} if about.embedded is None else {"license": about.embedded.licence_id}),
        "base_model": about.base,
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["model-editing", "knowledge-editing", *(method.lower() for method in about.methods)]
        + (["lora"] if adapter else []),
    }


def _what(about: About) -> str:
    if about.kind == "adapter":
        return f"A LoRA adapter of rank {about.rank} for {_cell(about.base)}."
    by = "by its LoRA adapter, merged in" if about.kind == "merged" else "by the edit's own update"
    return f"The whole model {_cell(about.base)}, changed {by}."


def _measured(about: About) -> list[str]:
    """A table and a verdict for each part that was measured; in plain words where something was not."""
    parts = []
    for part in [part for part in about.measured if part is not None][:MOST_LISTED]:
        table = _table(("", "before", "after"), part.rows)
        parts += [
            f"Measured: {part.what}. Locality is agreement with the unedited model.",
            table,
            f"**{part.verdict}**",
        ]
    if not parts:
        return ["Not measured: these edits carry no record, or their run was not evaluated yet."]
    if len(about.measured) > 1:
        parts.append("These numbers are of the parts; the edits were not measured all together.")
    return parts


def _cut(about: About) -> list[str]:
    """What was lost where the change did not fit the rank."""
    if not about.lost:
        return []
    rows = [(f"`{module}`", f"{lost:.3g}") for module, lost in about.lost.items()]
    text = (
        f"The change was cut to rank {about.rank}: this is the part of it that is not in the adapter, as "
        "||lost|| / ||change|| (Frobenius). The numbers above are of the uncut edit."
    )
    return ["## What was cut", text, _table(("module", "relative error"), rows)]


def _use(about: About) -> str:
    if about.kind != "adapter":
        return 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER")'
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{about.base}")\n'
        'model = PeftModel.from_pretrained(base, "FOLDER")'
    )


def _weights(about: About) -> list[str]:
    return list(dict.fromkeys(delta.name for edit in about.edits for delta in edit.deltas))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A text that stays within its cell, whatever it holds."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

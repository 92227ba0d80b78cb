"""What was run, and the command that runs it again: from configuration, manifest and journal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from easyeditor.drawing.table import Table
from easyeditor.results.run import Run
from easyeditor.results.shown import shown_ppl


def summary_table(runs: Sequence[Run]) -> Table:
    """What was run, one column per run."""
    facts = [_facts(run) for run in runs]
    rows = ((key, *(fact[key] for fact in facts)) for key in facts[0] if any(fact[key] for fact in facts))
    titles = ("what", *(run.label for run in runs))
    return Table.of("summary", "What was run", [(title, "text") for title in titles], rows)


def command_line(run: Run) -> str:
    """The command that made a run, to paste into a shell; empty if the manifest has none."""
    command = run.manifest.get("command")
    return "python " + shlex.join(map(str, command)) if isinstance(command, list) and command else ""


def _facts(run: Run) -> dict[str, str]:
    collapsed = sum(bool(edit.record.collapsed) for edit in run.edits)
    judged = sum(edit.record.collapsed is not None for edit in run.edits)
    measured = [(edit.record.post.ppl, edit) for edit in run.edits if edit.record.post.ppl is not None]
    worst, at = max(measured, key=lambda found: found[0], default=(0.0, None))
    packages, sentences = run.manifest.get("packages"), run.manifest.get("sentences")
    names = packages if isinstance(packages, Mapping) else {}
    return {
        "folder": str(run.folder),
        "method": run.method,
        "model": str(run.setting("model_name") or ""),
        "model fingerprint": str(run.manifest.get("model_fingerprint") or ""),
        "mode": run.mode,
        "data": run.data_path,
        "data sha256": run.data_sha256,
        "perplexity sentences": str(sentences.get("name") or "") if isinstance(sentences, Mapping) else "",
        "BOS before them (ppl_bos)": str(run.setting("ppl_bos") or ""),
        "seed": str(run.manifest.get("seed", run.setting("seed")) if run.manifest or run.config else ""),
        "requests selected": str(run.manifest.get("selected") or ""),
        "requests without an edit": f"{len(run.failed):,}" if run.failed else "",
        "edits recorded": f"{len(run.edits):,}" if run.edits else "",
        "collapsed": f"{collapsed:,} of {judged:,} ({collapsed / judged:.1%})" if judged else "",
        "perplexity of the unedited model": "" if run.base is None else shown_ppl(run.base),
        "threshold": "" if run.threshold is None else shown_ppl(run.threshold),
        "worst": "" if at is None else f"{shown_ppl(worst)}: {at.request.subject} (#{at.index})",
        "evaluations": f"{len(run.evaluations):,}" if run.evaluations else "",
        "screened requests": f"{len(run.screened):,}" if run.screened else "",
        "training steps logged": f"{sum(not t.validation for t in run.training):,}" if run.training else "",
        "ended": "yes" if run.finished else "no",
        "begun (UTC)": str(run.manifest.get("time_utc") or ""),
        "machine": " · ".join(str(run.manifest[k]) for k in ("platform", "device", "cpus") if run.manifest.get(k)),
        "versions": ", ".join(f"{name} {version}" for name, version in names.items() if version),
        "commit": str(run.manifest.get("commit") or ""),
    }

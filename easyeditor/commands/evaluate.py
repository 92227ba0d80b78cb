"""Metrics of a model, an edited checkpoint or a saved edit on a file of requests; docs/metrics.md says what each means.

  python -m easyeditor.evaluate --edit my-edit
        a saved edit (single_case_edit.py --save-edit) on its own requests, before and after
  python -m easyeditor.evaluate --edit my-edit --data counterfact.json --limit 100 --metrics easyedit,counterfact
  python -m easyeditor.evaluate --model ./my-edited-checkpoint --base-model gpt2-xl --data zsre.json --metrics zsre
  python -m easyeditor.evaluate --data requests.json --metrics generation --stop newline period
  python -m easyeditor.evaluate --list
        every metric with its formula, fields and source

Locality compares with the unedited model: with --edit that is the model itself and is measured first; for an edited
checkpoint it is --base-model. A metric whose fields a record lacks is null there, with the reason; means are over the
records that have a value.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import ConfigError
from easyeditor.base.files import parse_json, to_json, write_json
from easyeditor.base.hparams import coerce
from easyeditor.base.places import at_least_one, declare
from easyeditor.base.shots import read_shots
from easyeditor.commands.cli import Listed, measuring_flags, model_of, parser, quiet_transformers, run
from easyeditor.results.shown import shown_share

if TYPE_CHECKING:
    from easyeditor.evaluate.metric import Settings
    from easyeditor.evaluate.registry import Evaluation
    from easyeditor.values.edit import EditRequest, EditResult

LOG = logging.getLogger("easyeditor.evaluate")


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    measuring_flags(p)
    p.add_argument("--base-model", metavar="NAME", help="the unedited model of an edited --model: measured as `before`")
    p.add_argument("--data", metavar="FILE", help="records of any format, JSON or JSONL (default: the edit's requests)")
    p.add_argument("--metrics", nargs="+", action=Listed, metavar="NAME", help="names or groups (default: easyedit)")
    p.add_argument("--skip-bad", action="store_true", help="leave bad records out instead of refusing the file")
    p.add_argument("--limit", type=int, help="only the first so many records")
    p.add_argument("--max-new-tokens", type=int, default=50, help="of the texts judged (default: %(default)s)")
    p.add_argument("--stop", nargs="*", choices=("newline", "period"), default=["newline"], help="what ends them too")
    p.add_argument("--mquake-prompts", metavar="DIR", help="MQuAKE's prompt files, for the metrics `mquake`")
    p.add_argument("--seed", type=int, default=0, help="of the texts drawn for GE and RS (default: %(default)s)")
    p.add_argument("--chat-template", action="store_true", help="prompts through the tokenizer's chat template")
    p.add_argument("--chat-template-kwargs", metavar="JSON", help='what it is told: {"enable_thinking": false} …')
    p.add_argument("--target-eos", action="store_true", help="score an EOS after every answer too")
    spaces, own = ("auto", "always", "never"), "what --edit was made with, else auto"
    p.add_argument("--target-space", choices=spaces, help=f"is a space put before an answer? (default: {own})")
    p.add_argument("--batch-tokens", type=int, default=8192, help="tokens in one forward (default: %(default)s)")
    p.add_argument("--list", action="store_true", help="print the metrics and exit")
    declare(p, "model", "edit", "base_model", "data", "mquake_prompts", output="record")
    args = p.parse_args()
    at_least_one(args, "limit", "max_new_tokens", "batch_tokens")
    if args.edit is not None and args.base_model is not None:
        p.error("--edit and --base-model were both given; with --edit the model itself is the unedited one")
    if args.edit is None and args.data is None and not args.list:
        p.error("--data is missing: a file of requests (or --edit, whose own requests are taken)")
    return args


def main() -> int:
    """Flags to one or two evaluations, printed and written."""
    args = arguments()
    if args.list:
        _print_metrics()
        return 0
    names = ["easyedit"] if args.metrics is None else args.metrics

    from easyeditor.commands.outputs import checked
    from easyeditor.dataset.reader import read_dataset
    from easyeditor.evaluate.metric import Settings
    from easyeditor.evaluate.registry import chosen, judge_for
    from easyeditor.lm.budget import Budget
    from easyeditor.lm.precision import products
    from easyeditor.lm.prompting import Prompting
    from easyeditor.values.edit import EditResult

    places = checked(args)
    chosen(names)  # a wrong name costs nothing
    edit = EditResult.load(args.edit) if args.edit is not None else None
    if args.data is not None:
        data = read_dataset(args.data, skip_bad=args.skip_bad, needs_subject=False)
        requests = data.first(args.limit)
        LOG.info(data.said(requests))
    else:
        assert edit is not None
        requests = list(edit.requests[: args.limit])
    hparams = {} if edit is None else edit.hparams
    told = hparams.get("chat_template_kwargs", {})
    if args.chat_template_kwargs is not None:
        try:
            told = coerce(parse_json(args.chat_template_kwargs), dict[str, Any], "--chat-template-kwargs")
        except ValueError as error:
            raise ConfigError(f"--chat-template-kwargs: not JSON ({error})") from error
    settings = Settings(
        max_new_tokens=args.max_new_tokens,
        stops=tuple(args.stop),
        seed=args.seed,
        budget=Budget(args.batch_tokens),
        prompting=Prompting(
            chat=args.chat_template,
            eos=args.target_eos,
            space=args.target_space or hparams.get("target_space", "auto"),
            template_kwargs=json.dumps(told, sort_keys=True),
        ),
        judge=judge_for(names),
        shots=None if args.mquake_prompts is None else read_shots(args.mquake_prompts),
    )
    if hparams.get("chat_template") and not args.chat_template:
        LOG.warning("%s was made with chat_template: true, and is measured without; add --chat-template", args.edit)
    quiet_transformers()
    with places.locked(), products("exact"):
        before, after = _measure(args, requests, names, settings, edit)
        record: dict[str, Any] = {
            "model": args.model,
            "edit": args.edit,
            "base_model": args.base_model,
            "data": args.data,
            "metrics": list(after.names),
            "prompting": asdict(settings.prompting),
            "requests": [request.to_json() for request in requests],
            "before": None if before is None else before.to_json(),
            "after": after.to_json(),
        }
        if args.output is not None:
            write_json(Path(args.output), record)
    if args.json:
        print(to_json(record))
    else:
        _print_summary(record)
    return 0


def _measure(
    args: argparse.Namespace,
    requests: list[EditRequest],
    names: list[str],
    settings: Settings,
    edit: EditResult | None,
) -> tuple[Evaluation | None, Evaluation]:
    """(the unedited model's metrics or None, the model's)."""
    from easyeditor.base.progress import progress_bar
    from easyeditor.evaluate.registry import evaluate
    from easyeditor.lm.loading import load
    from easyeditor.lm.weights import applied
    from easyeditor.methods.registry import method_of

    before = None
    if args.base_model is not None:
        model, tok = load(args.base_model, device=args.device, dtype=args.dtype, quantised=True)
        with progress_bar("base", True) as bar:
            before = evaluate(model, tok, requests, names, settings=settings, progress=bar)
        del model, tok
        gc.collect()  # the memory is for the edited model
    model, tok = model_of(args, edit)
    if edit is not None:
        with applied(model, edit.deltas):
            pass  # an edit of another model is refused before anything is measured
        with progress_bar("before", True) as bar:
            before = evaluate(model, tok, requests, names, settings=settings, progress=bar)
        if edit.facts:
            method = method_of(edit, (model, tok))
            method.committed(edit)
            names, settings = [*names, "recall"], replace(settings, recall=method.recall)
    with applied(model, edit.deltas if edit is not None else ()), progress_bar("after", True) as bar:
        return before, evaluate(model, tok, requests, names, settings=settings, before=before, progress=bar)


def _print_summary(record: dict[str, Any]) -> None:
    """A line per metric: its mean before and after, over how many records, and why others have none."""
    print(f"{record['model']}{' + ' + record['edit'] if record['edit'] else ''}, {len(record['requests'])} requests")
    print(f"  {'metric':24}{'before':>10}{'after':>10}{'requests':>10}")
    before = record["before"]["summary"] if record["before"] is not None else {}
    for name, found in record["after"]["summary"].items():
        old = shown_share(before[name]["mean"]) if name in before else "–"
        lacking = f"   {found['missing']} without: {'; '.join(found['reasons'])}" if found["reasons"] else ""
        print(f"  {name:24}{old:>10}{shown_share(found['mean']):>10}{found['requests']:>10}{lacking}")


def _print_metrics() -> None:
    from easyeditor.evaluate.registry import GROUPS

    for group, metrics in GROUPS.items():
        print(f"{group}:")
        for metric in metrics:
            print(f"  {metric.name}: {metric.formula}")
            print(f"      needs {metric.fields}; from {metric.source}; blind to {metric.blind_to}")


if __name__ == "__main__":
    run(main)

"""Perplexity of a model on a set of sentences, as the model-editing papers measure it, and how it is spread.

  python ppl.py                                     the embedded model on 50 sentences
  python ppl.py --model gpt2-xl --sentences 1000    the papers' ME-PPL_1k (data/README.md says where to get it)
  python ppl.py --model ./my-checkpoint --data my_sentences.txt
  python ppl.py --edit my-edit                      the model with a saved edit applied (single_case_edit.py
  --save-edit)

Perplexity here is the mean over sentences of exp(mean token NLL), without BOS unless --ppl-bos says otherwise. It is
heavy-tailed, so the median and the token-weighted perplexity are printed too. Embedded model before any edit:
167.3 on ME-PPL_50.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.files import to_json, write_json
from easyeditor.base.places import at_least_one, declare
from easyeditor.commands.cli import measuring_flags, model_of, parser, quiet_transformers, run

if TYPE_CHECKING:
    from easyeditor.dataset.sentences import Sentences

LOG = logging.getLogger("ppl")


def arguments() -> argparse.Namespace:
    p = parser(__doc__ or "")
    measuring_flags(p)
    p.add_argument("--sentences", type=int, choices=(50, 1000, 10000), help="size of the sentence set (default: 50)")
    p.add_argument(
        "--data", metavar="FILE", help='JSON list of {"Text": …} or of texts, or a text file, one sentence a line'
    )
    p.add_argument(
        "--batch-size", type=int, help="sentences in one padded forward (default: batched by tokens, faster)"
    )
    p.add_argument(
        "--ppl-bos",
        default="papers",
        choices=("papers", "auto", "always"),
        help="begin each sentence with BOS: never, as the papers; where the tokenizer does; always (default: "
        "%(default)s)",
    )
    longer = p.add_mutually_exclusive_group()
    longer.add_argument(
        "--window",
        type=int,
        metavar="STRIDE",
        help="measure a text longer than the model's positions in windows, each STRIDE tokens further on",
    )
    longer.add_argument("--skip-long", action="store_true", help="leave such texts out")
    declare(p, "model", "edit", "data", output="record")
    args = p.parse_args()
    if args.data is not None and args.sentences is not None:
        p.error("--data and --sentences were both given; use one")
    at_least_one(args, "batch_size")
    return args


def main() -> int:
    args = arguments()

    from easyeditor.commands.outputs import checked
    from easyeditor.dataset.sentences import load_sentences, read_sentences

    places = checked(args)
    sentences = read_sentences(Path(args.data)) if args.data is not None else load_sentences(args.sentences or 50)
    with places.locked():
        record = measured(args, sentences)
        if args.output is not None:
            write_json(Path(args.output), record)
    if args.json:
        print(to_json(record))
    else:
        show(args, sentences, record)
    return 0


def measured(args: argparse.Namespace, sentences: Sentences) -> dict[str, Any]:
    """The model's perplexity on the sentences, with the edit in it if one is given."""
    from easyeditor.base.progress import progress_bar
    from easyeditor.evaluate.perplexity import PerplexityProbe, begins_with_bos
    from easyeditor.evaluate.windows import too_long
    from easyeditor.lm.architectures import max_positions
    from easyeditor.lm.precision import products
    from easyeditor.lm.weights import applied
    from easyeditor.values.edit import EditResult

    quiet_transformers()
    edit = EditResult.load(args.edit) if args.edit is not None else None
    if edit is not None:
        edit.check_weights(args.edit, "measure: perplexity is the model's own")
    model, tok = model_of(args, edit)
    bos = begins_with_bos(tok, args.ppl_bos)
    long = set(too_long(tok, sentences.texts, bos, max_positions(model)) if args.skip_long else ())
    numbers = [n for n in range(1, len(sentences.texts) + 1) if n not in long]
    if long:
        LOG.warning(
            "%d of %d sentences left out as too long: %s",
            len(long),
            len(sentences.texts),
            ", ".join(map(str, sorted(long))),
        )
    probe = PerplexityProbe(
        model,
        tok,
        [sentences.texts[n - 1] for n in numbers],
        fast=args.batch_size is None,
        batch_size=args.batch_size or 1,
        add_start_token=bos,
        stride=args.window,
    )
    deltas = edit.deltas if edit is not None else ()
    with products("exact"), applied(model, deltas), progress_bar("perplexity", True) as bar:
        assert bar is not None
        report = probe.measure(lambda done, of: bar(done, of, ""))
    worst = [
        {"number": n, "perplexity": report.perplexities[i], "tokens": report.tokens[i], "text": sentences.texts[n - 1]}
        for i, n in ((i, numbers[i]) for i in report.worst(5))
    ]
    return {
        "model": args.model,
        "edit": args.edit,
        "sentences": sentences.to_json(),
        "perplexity": {**report.to_json(), "finite": report.finite},
        "window": args.window,
        "too_long": sorted(long),
        "worst": worst,
        "per_sentence": list(report.perplexities),
    }


def show(args: argparse.Namespace, sentences: Sentences, record: dict[str, Any]) -> None:
    """The numbers as a table."""
    found = record["perplexity"]
    print(
        f"{args.model}{' + ' + args.edit if args.edit else ''} on {sentences.name} ({found['sentences']} "
        f"sentences{', each begun with BOS' if found['bos'] else ''})"
    )
    print(f"  perplexity (mean over sentences, the papers')  {found['mean']:12,.2f}")
    print(f"  median over sentences                          {found['median']:12,.2f}")
    print(f"  token-weighted ({found['tokens']} tokens)                   {found['token_weighted']:12,.2f}")
    print("  worst sentences:")
    for item in record["worst"]:
        text = " ".join(item["text"].split())
        print(f"  {item['perplexity']:12,.1f}  {text[:90]}{'…' if len(text) > 90 else ''}")


if __name__ == "__main__":
    run(main)

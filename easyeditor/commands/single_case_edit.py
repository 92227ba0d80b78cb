"""Edit one fact in a language model and see what it did: before/after table, perplexity, verdict on collapse.

  python single_case_edit.py                                     the default request, ROME: collapses the embedded model
  python single_case_edit.py --set alg_name=C-ROME               the same request with C-ROME: does not
  python single_case_edit.py --prompt "The capital of France is" --subject France --target-new Rome
  python single_case_edit.py --request FILE.json                 one record: CounterFact, EasyEdit, ZsRE, HardCF …
  python single_case_edit.py --hparams hparams/ROME/gpt2-xl.yaml --device cuda:0
  python single_case_edit.py --interactive                       type requests; keep or take back each; ask the model
  python single_case_edit.py --interactive --resume RUN          go on with such a session

Needs no GPU with the embedded model (about half a minute on two CPU cores). Writes a run folder under results/:
config.json, manifest.json, result.json; with --interactive the folder of a sequential run (docs/runs.md). Exit code: 0,
2 for bad input, 3 for a collapse with --fail-on-collapse.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import ConfigError
from easyeditor.base.files import to_json, write_json
from easyeditor.base.hparams import HyperParams
from easyeditor.base.paths import SHIPPED
from easyeditor.base.places import declare
from easyeditor.base.process import terminal
from easyeditor.commands.cli import (
    DEFAULT_HPARAMS,
    EXIT_COLLAPSED,
    edit_flags,
    hparams_of,
    memory,
    parser,
    quiet_transformers,
    run,
)
from easyeditor.values.edit import EditRequest

if TYPE_CHECKING:
    from easyeditor.commands.outputs import Places
    from easyeditor.editing.editor import Editor
    from easyeditor.evaluate.examined import Examined

DEFAULT_REQUEST = SHIPPED / "data" / "requests" / "bay.json"


def arguments() -> argparse.Namespace:
    p = parser(__doc__ or "")
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    edit_flags(p, printed="record", checked="request")
    p.add_argument(
        "--request", metavar="FILE.json", help="file with one dataset record (default: data/requests/bay.json)"
    )
    p.add_argument("--prompt", help="text that the target should continue; {} or the subject itself marks the subject")
    p.add_argument("--subject", help="the words in the prompt whose fact is changed")
    p.add_argument("--target-new", help="the new answer")
    p.add_argument("--ground-truth", help="the old answer, to show its probability")
    p.add_argument("--rephrase-prompt", **many, help="paraphrases that should give the new answer too")
    p.add_argument("--locality-prompt", **many, help="unrelated prompts whose answers should stay")
    p.add_argument("--locality-ground-truth", **many, help="one answer for each locality prompt")
    p.add_argument("--save-edit", metavar="DIR", help="save the edit: safetensors + JSON; ppl.py --edit DIR applies it")
    p.add_argument("--save-model", metavar="DIR", help="save the edited model as a Hugging Face checkpoint")
    p.add_argument("--save-adapter", metavar="DIR", help="save the edit as a LoRA adapter that `peft` loads")
    p.add_argument("--adapter-rank", type=int, metavar="N", help="cut a dense change to rank N for --save-adapter")
    p.add_argument("--interactive", action="store_true", help="type requests one after another, see and judge each")
    p.add_argument("--resume", metavar="RUN", help="with --interactive: go on with an earlier session's run folder")
    declare(p, "hparams", "request", output="run", resume="run to resume")
    declare(p, **dict.fromkeys(("save_edit", "save_model", "save_adapter"), "new folder"))
    return p.parse_args()


def request_of(args: argparse.Namespace, needs_subject: bool) -> EditRequest:
    """The request the flags describe. Raises ConfigError when they are incomplete or given twice."""
    from easyeditor.dataset.formats import make_request, read_request
    from easyeditor.dataset.probes import Reading

    typed = {"--prompt": args.prompt, "--subject": args.subject, "--target-new": args.target_new}
    extra = {
        "--ground-truth": args.ground_truth,
        "--rephrase-prompt": args.rephrase_prompt,
        "--locality-prompt": args.locality_prompt,
        "--locality-ground-truth": args.locality_ground_truth,
    }
    given = [flag for flag, value in {**typed, **extra}.items() if value is not None and value != []]
    if args.request is not None:
        if given:
            raise ConfigError(f"--request and {', '.join(given)} were given; use the file or the flags")
        return read_request(Path(args.request), needs_subject=needs_subject)
    if not given:
        return read_request(DEFAULT_REQUEST)
    missing = [flag for flag, value in typed.items() if value is None and (needs_subject or flag != "--subject")]
    if missing:
        raise ConfigError(f"{given[0]} needs {', '.join(missing)} as well")
    near = {"prompt": args.locality_prompt, "ground_truth": args.locality_ground_truth}
    return make_request(
        args.prompt,
        args.subject,
        Reading(needs_subject=needs_subject),
        target_new=args.target_new,
        ground_truth=args.ground_truth,
        rephrase_prompts=args.rephrase_prompt,
        locality={"neighborhood": near} if args.locality_prompt or args.locality_ground_truth else None,
        case_id="command-line",
    )


def places_of(args: argparse.Namespace, hparams: HyperParams) -> Places:
    """What is read and written, checked before anything is computed, with what else needs no model to be refused."""
    from easyeditor.commands.outputs import checked

    hparams.check_files()
    if args.adapter_rank is not None:
        from easyeditor.export.adapter import check_rank

        check_rank(args.adapter_rank, "--adapter-rank")
    if args.metrics:
        from easyeditor.evaluate.registry import judge_for

        judge_for(args.metrics)
    return checked(args, {"--hparams": args.hparams or DEFAULT_HPARAMS, **hparams.reads()})


def save(args: argparse.Namespace, editor: Editor, examined: Examined) -> None:
    """The edit with the record of what was measured, and the edited model, each where its flag says."""
    from easyeditor.export.write import export

    if args.save_edit is not None:
        folder = examined.result.save(args.save_edit)
        write_json(folder / "result.json", examined.record.to_json())
    if args.save_model is not None:
        target = Path(args.save_model)
        export(editor.model, editor.tok, [examined.result], target, kind="checkpoint", **about(editor, examined))


def save_adapter(args: argparse.Namespace, editor: Editor, examined: Examined) -> None:
    """The edit as an adapter. Raises ConfigError: its change is not of low rank, and no --adapter-rank was given."""
    from easyeditor.export.write import export

    target, what = Path(args.save_adapter), about(editor, examined)
    export(editor.model, editor.tok, [examined.result], target, kind="adapter", rank=args.adapter_rank, **what)


def about(editor: Editor, examined: Examined) -> dict[str, Any]:
    """What an export says of an edit: its base, and what was measured."""
    from easyeditor.export.sources import of_record

    return {"base": editor.hparams.model_name, "measured": [of_record(examined.record)]}


def interactive(args: argparse.Namespace) -> int:
    """A session of typed requests. Raises ConfigError: flags that belong to one request, or to a new session."""
    one = ["request", "prompt", "subject", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt"]
    one += ["locality_ground_truth", "save_edit", "save_model", "save_adapter", "adapter_rank"]
    one += ["fail_on_collapse", "json"]
    new = ["hparams", "set", "metrics", "dtype", "matmul", "output"] if args.resume is not None else []
    for name in (*one, *new):
        if getattr(args, name) not in (None, [], False):
            what = "--resume, whose run has its own" if name in new else "--interactive; type :help there"
            raise ConfigError(f"--{name.replace('_', '-')} does not go with {what}")
    begun = resume = None
    if args.resume is not None:
        from easyeditor.runs.mass import stored
        from easyeditor.runs.settings import TYPED

        begun, settings = stored(Path(args.resume))
        if settings.data != TYPED:
            raise ConfigError(f"{args.resume}: not a session of --interactive; go on with mass_edit.py --resume")
        resume = Path(args.resume), settings
    hparams = hparams_of(args, begun)
    places_of(args, hparams)
    if args.dry_run:
        print(to_json({"hparams": hparams.to_dict(), "memory": memory(hparams)}, indent=1))
        return 0

    from easyeditor.commands.interactive import talk

    quiet_transformers()
    return talk(hparams, args.metrics or [], output=args.output, resume=resume)


def main() -> int:
    args = arguments()
    if args.interactive:
        return interactive(args)
    if args.resume is not None:
        raise ConfigError("--resume goes with --interactive; a run of many edits goes on with mass_edit.py --resume")
    from easyeditor.methods.registry import row_of

    hparams = hparams_of(args)
    request = request_of(args, row_of(hparams.alg_name).needs_subject)
    places = places_of(args, hparams)
    if args.dry_run:
        print(
            to_json({"hparams": hparams.to_dict(), "request": request.to_json(), "memory": memory(hparams)}, indent=1)
        )
        return 0

    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.report.terminal import print_record
    from easyeditor.results.folder import run_folder, write_run

    quiet_transformers()
    with places.locked(), run_folder(args.output, f"{hparams.alg_name.lower()}-{request.case_id}") as folder:
        editor = BaseEditor(hparams, metrics=args.metrics or [])
        examined = editor.examine(request, verbose=True)
        manifest = {
            "seed": hparams.seed,
            "model_fingerprint": examined.result.model_fingerprint,
            "context_templates": list(examined.result.contexts),
            "sentences": examined.record.perplexity["sentences"],
        }
        write_run(folder, config=hparams.to_dict(), manifest=manifest, result=examined.record.to_json())
        save(args, editor, examined)
        if args.json:
            print(to_json(examined.record.to_json()))
        else:
            print_record(examined.record, terminal(), examined.result.model_fingerprint)
            print(f"\nrecord: {folder / 'result.json'}")
        if args.save_adapter is not None:  # after the table: a change that is not of low rank is refused
            save_adapter(args, editor, examined)
    collapsed = examined.collapse is not None and examined.collapse.collapsed
    return EXIT_COLLAPSED if collapsed and args.fail_on_collapse else 0


if __name__ == "__main__":
    run(main)

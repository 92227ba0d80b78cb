"""What the entry scripts share: flags, logging, errors as one line with exit code 2, quiet libraries."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from easyeditor.base.errors import ConfigError, EasyEditorError, OutputError, out_of_memory
from easyeditor.base.files import check_encodable
from easyeditor.base.hparams import HyperParams, overrides
from easyeditor.base.paths import SHIPPED
from easyeditor.base.process import Terminated, heard, lost, shown, stoppable, streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from easyeditor.values.edit import EditResult

LOG = logging.getLogger(__name__)

LONGEST_LINE = 500
EXIT_ERROR = 2
EXIT_COLLAPSED = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
DEFAULT_HPARAMS = SHIPPED / "hparams" / "ROME" / "smollm2-135m.yaml"
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
SETTINGS: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}
"""Of a flag `--set`."""


class Listed(argparse.Action):
    """Words one after another, joined by commas, or the flag given again."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = [word.strip() for value in values for word in value.split(",") if word.strip()]
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *given])


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, for flags that can be printed and that files can be named by.

        Raises:
            ConfigError: a flag that is not UTF-8, or holds a NUL.
        """
        for flag in sys.argv[1:] if args is None else args:
            try:
                check_encodable(flag)
            except ValueError as error:
                raise ConfigError(f"a flag cannot be read: {error}; rename the file, or write the text anew") from error
            if "\0" in flag:
                raise ConfigError(f"the flag {flag[:80]!r} holds a NUL character")
        return super().parse_args(args, namespace)


def parser(doc: str) -> Parser:
    """A parser whose help is the script's docstring: the run book."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def edit_flags(p: argparse.ArgumentParser, printed: str, checked: str, where: str = "") -> None:
    """The flags of commands that edit by a YAML; `printed` by --json, `checked` by --dry-run, `where` --device
    otherwise means."""
    p.add_argument("--hparams", help=f"YAML of a method and model (default: {DEFAULT_HPARAMS})")
    p.add_argument("--set", **SETTINGS, help="override hyper-parameters, typed like the YAML")
    measured = "metrics or groups measured around every edit besides EasyEdit's (python -m easyeditor.evaluate --list)"
    p.add_argument("--metrics", nargs="+", action=Listed, metavar="NAME", help=measured)
    p.add_argument("--device", help=f"GPU number, cpu, cuda:1 … (default: the YAML's{where})")
    p.add_argument("--dtype", help="auto, float32, float16, bfloat16 or float64 (default: the YAML's)")
    p.add_argument("--matmul", choices=("exact", "tf32"), help="float32 products on a GPU (default: the YAML's)")
    p.add_argument("--output", metavar="DIR", help="run folder (default: a new one under results/)")
    p.add_argument("--fail-on-collapse", action="store_true", help="exit with 3 when an edit collapsed the model")
    p.add_argument("--json", action="store_true", help=f"print the {printed} as JSON on stdout and nothing else there")
    p.add_argument("--dry-run", action="store_true", help=f"check flags, YAML and {checked}, print them, load no model")


def hparams_of(args: argparse.Namespace, begun: HyperParams | None = None) -> HyperParams:
    """Those of the YAML, without --hparams those of the run that was `begun`, with the flags over them."""
    from easyeditor.methods.registry import load_hparams

    flags = overrides(args.set, device=args.device, dtype=args.dtype, matmul=args.matmul)
    if begun is not None and args.hparams is None:
        return begun.override(flags)
    return load_hparams(args.hparams or str(DEFAULT_HPARAMS), flags)


def measuring_flags(p: argparse.ArgumentParser) -> None:
    """The flags of commands that measure a model, with a saved edit or without."""
    p.add_argument("--model", default="smollm2-135m", help="folder, hub name, or smollm2-135m (default: %(default)s)")
    p.add_argument("--edit", metavar="DIR", help="saved edit to apply to --model (single_case_edit.py --save-edit)")
    p.add_argument("--device", default="0", help="GPU number, cpu, cuda:1 … (default: %(default)s; CPU without a GPU)")
    p.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print everything as JSON on stdout and nothing else there")
    p.add_argument("--output", metavar="FILE.json", help="also write it there")


def model_of(args: argparse.Namespace, edit: EditResult | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """--model, loaded; a warning where `edit` was computed on other weights."""
    from easyeditor.lm.loading import load
    from easyeditor.lm.weights import fingerprint

    model, tok = load(args.model, device=args.device, dtype=args.dtype, quantised=edit is None)
    if edit is not None and edit.model_fingerprint not in (None, fingerprint(model)):
        LOG.warning("%s was computed on other weights than %s's; applying it all the same", args.edit, args.model)
    return model, tok


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script's main and exit: its return value, 2 with one line on stderr for an expected error, for memory that
    ran out and for output that could not be written, 130 for Ctrl-C (SIGINT), 143 for SIGTERM."""
    with streams():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for noisy in ("httpx", "urllib3", "filelock", "transformers", "huggingface_hub"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is loaded: a thread that waits soon sleeps
        for size in ("COLUMNS", "LINES"):  # rich takes any number for a terminal's, 0 too
            if not re.fullmatch("[1-9][0-9]{1,3}", os.environ.get(size, "")):
                os.environ.pop(size, None)
        tell_namesake()
        try:
            code = _ended(main)
            sys.stdout.flush()
            if (error := lost()) is not None and code in (0, EXIT_COLLAPSED):
                fail(f"standard output: cannot be written ({error.strerror}); files are whole, what was printed is not")
        except SystemExit as stopped:
            code = stopped.code
    raise SystemExit(code)


def tell_namesake() -> None:
    """One warning where EasyEdit is installed too: both are imported as `easyeditor`."""
    with suppress(PackageNotFoundError):
        theirs = distribution("easyeditor").version
        where = Path(__file__).resolve().parents[1]
        LOG.warning("EasyEdit %s is installed too; both are imported as easyeditor: this one is in %s", theirs, where)


def _ended(main: Callable[[], int]) -> Any:
    """The exit code of a script; what is wrong is printed."""
    try:
        with stoppable():
            return main()
    except SystemExit as stopped:  # argparse: --help, a wrong flag
        return stopped.code
    except KeyboardInterrupt as stop:
        print("; ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    except EasyEditorError as error:
        fail(str(error))
    except Exception as error:
        if out_of_memory(error):
            fail(
                f"out of memory ({error or 'Python found none'}); take less at a time, a narrower dtype, or more of it"
            )
        if isinstance(error, OSError):
            fail(str(OutputError(str(error))))
        raise


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Inside, a run that is interrupted keeps what it has recorded, and its last line says `how` to go on."""
    try:
        with heard():
            yield
    except KeyboardInterrupt as stop:
        stop.args = (f"what is recorded is kept: {how}",)
        raise


def memory(hparams: HyperParams, *, training: bool = False) -> dict[str, Any]:
    """For a dry run: the memory a run is estimated to take against what is free. Where the model's config.json is not
    here, that is printed, and torch is not even imported."""
    from easyeditor.lm.embedded import model_folder

    folder = model_folder(str(hparams.model_name))
    if folder is None:
        return {"estimate_gib": None, "why": f"{hparams.model_name}: no config.json here yet"}
    from easyeditor.commands.estimate import report

    return report(hparams, folder, training=training)


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers: the scripts show their own."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def fail(message: str) -> NoReturn:
    """One line of at most 500 characters on stderr, exit 2; of a longer one the middle is left out."""
    line = shown("error: " + " ".join(message.split()))
    if len(line) > LONGEST_LINE:
        half = (LONGEST_LINE - 3) // 2
        line = f"{line[:half]} … {line[-half:]}"
    print(line, file=sys.stderr)
    raise SystemExit(EXIT_ERROR)

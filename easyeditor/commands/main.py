"""One command for everything that can be run: `easyeditor COMMAND …`, with the flags of the script or module it names.

  easyeditor edit           one edit, before and after          single_case_edit.py
  easyeditor mass-edit      every request of a dataset          mass_edit.py
  easyeditor pretrain-mend  train MEND's hypernetwork           pretrain_mend.py
  easyeditor ppl            perplexity of a model               ppl.py
  easyeditor stats          second moments of keys              python -m easyeditor.stats
  easyeditor tune           hyper-parameters for a model        python -m easyeditor.tune
  easyeditor survey         many methods from one plan          python -m easyeditor.survey
  easyeditor report         tables and figures of runs          python -m easyeditor.report
  easyeditor export         edits as others load them           python -m easyeditor.export
  easyeditor evaluate       metrics of a saved edit             python -m easyeditor.evaluate
  easyeditor analysis       the papers' experiments             python -m easyeditor.analysis
  easyeditor dataset        what files of requests hold         python -m easyeditor.dataset

`easyeditor COMMAND --help` has the flags of each.
"""

from __future__ import annotations

import sys
from importlib import import_module

from easyeditor import __version__
from easyeditor.commands.cli import fail, run

COMMANDS = {
    "edit": "single_case_edit",
    "mass-edit": "mass_edit",
    "pretrain-mend": "pretrain_mend",
    **{
        name: name for name in ("ppl", "stats", "tune", "survey", "report", "export", "evaluate", "analysis", "dataset")
    },
}


def main() -> None:
    """Run the command that the first argument names, as its own script would."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name == "--version":
        print(f"easyeditor {__version__}")
    elif name in COMMANDS:
        sys.argv[:2] = [f"easyeditor {name}"]
        run(import_module(f"easyeditor.commands.{COMMANDS[name]}").main)
    else:
        fail(f"there is no command {name!r}; there are: {', '.join(COMMANDS)}")

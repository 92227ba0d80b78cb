"""The papers' further experiments, one command each: run folder, table, figures, and whether the finding holds here.

  python -m easyeditor.analysis keys            the keys k^u and kbar of collapse and normal cases, in two dimensions
  python -m easyeditor.analysis first-token     keys of first tokens, layer by layer; also of an encoder-decoder
  python -m easyeditor.analysis position-swap   the second token's position given to the first: does the collapse stay?
  python -m easyeditor.analysis update-norms    numerator, denominator, size and perplexity of ROME and C-ROME; --sweep
  python -m easyeditor.analysis prefix-test     C-ROME measured with and without a prefix before the prompt
  python -m easyeditor.analysis downstream      edited models through lm-evaluation-harness, against their perplexity
  python -m easyeditor.analysis hard-edit       build a set of requests that collapse the model
  python -m easyeditor.analysis protection      first-token protection against ROME and C-ROME, layer by layer
  python -m easyeditor.analysis trace           causal tracing, and how safe each layer is for subjects in first place
  python -m easyeditor.analysis diagnose RUN    the four known causes of collapse for every edit of a finished run

Each has its own --help. They run on the embedded model as they are, on any other with --hparams, on your requests with
--collapse FILE --normal FILE. Figures and numbers for the embedded model: docs/findings/experiments.md.
The run folder (--output, or a new one under results/) holds config.json, manifest.json, result.json, table.csv, figures
as PNG and SVG. Exit code: 0, 2 for bad input.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from easyeditor.base.errors import ConfigError
from easyeditor.base.process import terminal
from easyeditor.commands.cli import parser, quiet_transformers, run

WIDTH = 140  # of tables that go into a file or a pipe

EXPERIMENTS = {
    **{name: name.replace("-", "_") for name in ("keys", "first-token", "position-swap", "update-norms")},
    "prefix-test": "prefix",
    **{name: name.replace("-", "_") for name in ("downstream", "hard-edit", "protection", "trace", "diagnose")},
}
"""Each is a module with add_flags(parser) and experiment(args, folder) -> Outcome, loaded only when it is asked for."""


def main() -> int:
    """Run the experiment that the first argument names."""
    outer = parser(__doc__ or "")
    outer.add_argument("experiment", help=", ".join(EXPERIMENTS))
    name = outer.parse_args(sys.argv[1:2]).experiment
    if name not in EXPERIMENTS:
        raise ConfigError(f"experiment {name!r} is not known; there are: {', '.join(EXPERIMENTS)}")
    module = import_module(f"easyeditor.experiments.{EXPERIMENTS[name]}")
    own = parser(module.__doc__ or "")
    own.prog = f"python -m easyeditor.analysis {name}"
    module.add_flags(own)
    args = own.parse_args(sys.argv[2:])

    from easyeditor.commands.outputs import checked
    from easyeditor.drawing.canvas import styled
    from easyeditor.experiments.tools.lab import hparams_of
    from easyeditor.lm.precision import products
    from easyeditor.results.folder import run_folder

    reads: dict[str, Any] = {}
    ways = products("exact")
    if hasattr(args, "hparams"):
        hparams = hparams_of(args)
        reads = hparams.reads()
        ways = products(hparams.matmul, hparams.cpu_products)
    places = checked(args, reads)
    quiet_transformers()
    with places.locked(), run_folder(args.output, name) as folder, ways, styled():
        outcome = module.experiment(args, folder)
        written = outcome.write(folder)
    outcome.show(terminal(None if sys.stdout.isatty() else WIDTH))
    print(f"\nwritten to {folder}: {', '.join([*written, 'result.json'])}")
    return 0


if __name__ == "__main__":
    run(main)

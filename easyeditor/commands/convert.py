"""Archives of trained MEND hypernetworks: read one of upstream's.

  python -m easyeditor.trainer convert --archive upstream/gpt2-xl --hparams hparams/TRAINING/MEND/gpt2-xl.yaml \\
      --output results/models/MEND/gpt2-xl
        upstream's pickled archive (read with weights_only) to ours; then set `archive` in hparams/MEND/gpt2-xl.yaml

The YAML must be the one the archive was trained with: it tells the order of the edited weights. Training itself is
pretrain_mend.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from easyeditor.base.hparams import overrides
from easyeditor.base.places import declare
from easyeditor.commands.cli import parser, quiet_transformers, run
from easyeditor.commands.outputs import checked


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    p.add_argument("command", choices=("convert",), help="what to do")
    p.add_argument("--archive", required=True, help="upstream's archive, a file")
    p.add_argument("--hparams", required=True, help="the YAML it was trained with")
    p.add_argument("--output", required=True, metavar="DIR", help="new folder for the archive")
    p.add_argument("--device", help="where the model is loaded (default: the YAML's)")
    declare(p, "archive", "hparams", output="new folder")
    return p.parse_args()


def main() -> int:
    """Convert."""
    args = arguments()

    from easyeditor.lm.discover import anatomy
    from easyeditor.lm.loading import load
    from easyeditor.methods.mend.archive import write_archive
    from easyeditor.methods.mend.convert import read_upstream
    from easyeditor.methods.mend.hparams import MENDHyperParams

    hparams = MENDHyperParams.from_hparams(args.hparams, overrides([], device=args.device))
    with checked(args, hparams.reads()).locked():
        quiet_transformers()
        model, _ = load(hparams.model_name, device=hparams.device, dtype=hparams.dtype, fp16=hparams.fp16)
        parts = anatomy(model, **hparams.templates)
        hypernet, training = read_upstream(Path(args.archive), hparams, parts)
        print(write_archive(Path(args.output), hypernet, parts, training=training))
    return 0


if __name__ == "__main__":
    run(main)

"""Statistics of a model as a folder to share: packed, checked, and put where editing looks for them; docs/data.md.

easyeditor stats pack data/stats/gpt2-xl --output packed
      all moments there and their kept projections; --dtype float32 halves what is float64; --model for upstream's .npz
easyeditor stats verify packed
      checksums, and whether each matrix is a second moment; --model: of that model?
easyeditor stats unpack packed --model gpt2-xl --output data/stats
      as upstream's .npz, where editing looks for them; another model's are refused
easyeditor stats unpack --from https://example.org/packed --model gpt2-xl
      fetched from a web server, or from the hub (owner/name, or datasets/owner/name)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from easyeditor import __version__
from easyeditor.base.errors import ConfigError
from easyeditor.base.locks import locked
from easyeditor.base.places import declare
from easyeditor.commands.cli import parser, quiet_transformers
from easyeditor.commands.outputs import checked

if TYPE_CHECKING:
    from easyeditor.stats.packed import Model, Packed

ACTIONS = ("pack", "unpack", "verify")


def main() -> int:
    """Pack, unpack or verify."""
    p = parser(__doc__ or "")
    p.add_argument("action", choices=ACTIONS)
    p.add_argument("folder", nargs="?", metavar="DIR", help="pack: a model's statistics; else: a packed folder")
    p.add_argument("--from", dest="source", metavar="URL|NAME", help="a packed folder on a web server, or on the hub")
    p.add_argument("--model", help="folder, hub name, or embedded model whose statistics they must be")
    p.add_argument("--dtype", choices=("float32",), help="pack: what is float64 in half the size; the error is stated")
    p.add_argument("--output", metavar="DIR", help="pack: new folder; unpack: statistics folder (default: data/stats)")
    packs, unpacks = (sys.argv[1:2] == [action] for action in ("pack", "unpack"))
    declare(p, "folder", "model", output="new folder" if packs else "shared")
    args = p.parse_args()
    if (args.folder is None) == (args.source is None) or (packs and args.source):
        raise ConfigError(f"{args.action}: name one folder" + ("" if packs else ", or where it is with --from"))
    if (packs and args.output is None) or (unpacks and args.model is None):
        raise ConfigError(f"{args.action}: give {'--output' if packs else '--model, whose statistics are wanted'}")
    if args.action == "verify" and args.output is not None:
        raise ConfigError("verify: --output was given, and nothing is written")
    args.output = args.output or ("data/stats" if unpacks else None)
    places = checked(args)

    from easyeditor.methods.locate.statistics import COLLECTING
    from easyeditor.stats.packed import pack, read_packed, unpacked

    model = None if args.model is None else model_of(args.model)
    if packs:
        with places.locked():
            found = sorted(Path(args.folder).rglob("*.npz"))
            show(pack(found, Path(args.output), code=__version__, model=model, dtype=args.dtype))
        return 0
    source = args.source or args.folder
    packed = read_packed(source, model)
    if model is None or not unpacks:
        for file, _ in unpacked(source, packed, None, ""):
            print(f"good     {file.path}  (width {file.width}, {file.dtype}, error {file.lost:.3g})")
        return 0
    folder = Path(args.output) / Path(model.name).name
    with locked(folder / COLLECTING, f"the second moments in {folder}"):
        for file, read in unpacked(source, packed, folder, model.name):
            print(f"{'written' if read else 'there  '}  {folder / file.name}")
    return 0


def model_of(name: str) -> Model:
    """A model's name, a sample of its weights and the width of its modules' keys."""
    from easyeditor.lm.discover import anatomy
    from easyeditor.lm.loading import load
    from easyeditor.lm.weights import sample
    from easyeditor.stats.packed import Model

    quiet_transformers()
    parts = anatomy(load(name, device="cpu")[0])
    widths = {parts.rewrite_name(layer): parts.key_width(layer) for layer in parts.dense}
    return Model(name=str(parts.model.config.name_or_path), weights=sample(parts.model), widths=widths)


def show(packed: Packed) -> None:
    """What was packed, one line a file, and the licence of the model."""
    for file in packed.files:
        print(f"packed   {file.path}  ({file.bytes:,} bytes, {file.dtype}, error {file.lost:.3g})")
    if packed.licence is not None:
        print(f"licence of {packed.model_name}: {packed.licence}")

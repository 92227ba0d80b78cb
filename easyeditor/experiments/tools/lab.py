"""What the experiments share: flags, a loaded editor with its two sets, and edits whose value search is made once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import overrides
from easyeditor.base.paths import SHIPPED
from easyeditor.base.places import declare
from easyeditor.base.progress import Progress
from easyeditor.dataset.sets import RequestSet, load_collapse, load_normal
from easyeditor.drawing import figures
from easyeditor.drawing.figures import Group
from easyeditor.editing.editor import Editor
from easyeditor.lm import weights
from easyeditor.lm.architectures import weight_is_transposed
from easyeditor.lm.tokens import begins_texts_with_bos, without_bos
from easyeditor.methods.locate.keys import Lookup
from easyeditor.methods.locate.value_search import Found
from easyeditor.methods.registry import load_hparams
from easyeditor.methods.rome.hparams import ROMEHyperParams
from easyeditor.methods.rome.method import ROME
from easyeditor.values.collapse import verdict
from easyeditor.values.edit import EditRequest, LayerTrace, WeightDelta

SETS = ("collapse", "normal")
"""The two sets that are compared; `RequestSet.name`."""
DEFAULT_HPARAMS = SHIPPED / "hparams" / "ROME" / "smollm2-135m.yaml"


def common_flags(p: argparse.ArgumentParser) -> None:
    """--hparams, --set, --device, --output: what every experiment takes."""
    p.add_argument("--hparams", default=str(DEFAULT_HPARAMS), help="YAML of ROME and a model (default: %(default)s)")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the YAML")
    p.add_argument("--device", help="GPU number, cpu, cuda:1 ... (default: the YAML's)")
    p.add_argument("--values", metavar="DIR", help="keep value searches here, and take what is here already")
    p.add_argument("--output", metavar="DIR", help="run folder (default: a new one under results/)")
    declare(p, "hparams", values="targets_dir", output="run")


def set_flags(p: argparse.ArgumentParser, limit: int, *, normal: bool = True) -> None:
    """--collapse, --normal, --limit: the two sets, any dataset format the library reads; --without-bos."""
    p.add_argument("--collapse", metavar="FILE", help="collapse cases (default: data/hard/<model>.json)")
    if normal:
        p.add_argument("--normal", metavar="FILE", help="ordinary requests (default: a sample of data/facts.json)")
    p.add_argument("--limit", type=int, default=limit, help="most requests of each set (default: %(default)s)")
    p.add_argument(
        "--without-bos",
        action="store_true",
        help="prompts begin without the BOS that the tokenizer puts there (the papers' models have none)",
    )
    declare(p, *(("collapse", "normal") if normal else ("collapse",)))


def hparams_of(args: argparse.Namespace) -> ROMEHyperParams:
    """The YAML with --set, --device and --values applied. Raises ConfigError: another method's, or several layers."""
    hparams = load_hparams(args.hparams, overrides(args.set, device=args.device, targets_dir=args.values))
    if not isinstance(hparams, ROMEHyperParams):
        raise ConfigError(f"{args.hparams} is for {hparams.alg_name}; the experiments edit with ROME, give a ROME YAML")
    if hparams.if_c_rome:
        raise ConfigError(
            "if_c_rome is true; the experiments choose between ROME and C-ROME themselves: --set if_c_rome=false "
            "consistent_value=false"
        )
    if len(hparams.layers) != 1:
        raise ConfigError(f"layers is {hparams.layers}; the experiments look at one layer, e.g. --set layers=[5]")
    if hparams.chat_template or hparams.target_eos or hparams.target_space != "auto":
        raise ConfigError(
            "chat_template, target_eos or target_space is set; the experiments are the papers', on prompts as they are"
        )
    return hparams


def column(rows: Iterable[Any], field: str, **where: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One field of typed rows, as float64, of the rows whose other fields are as in `where`; None is left out."""
    own = [row for row in rows if all(getattr(row, key) == value for key, value in where.items())]
    return np.array([value for row in own if (value := getattr(row, field)) is not None], dtype=np.float64)


def group(name: str, values: np.ndarray[Any, Any], label: str | None = None, *, filled: bool = True) -> Group:
    """A set's points in its look in every figure."""
    color, marker = (figures.COLLAPSE, "^") if name == "collapse" else (figures.NORMAL, "o")
    return Group(label=label or name, values=values, color=color, marker=marker, filled=filled)


class Lab:
    """An editor, its two sets, and edits by parts: a request's value search and keys are computed once and kept."""

    def __init__(
        self, hparams: ROMEHyperParams, collapse: RequestSet, normal: RequestSet | None, *, bare: bool = False
    ) -> None:
        """`normal` is None for experiments that look at the collapse set alone; `bare` leaves out the tokenizer's BOS.

        Raises:
            ConfigError: `bare`, and the tokenizer begins no text with a BOS.
        """
        self.hparams, self.collapse = hparams, collapse
        self.sets = (collapse,) if normal is None else (collapse, normal)
        self.requests = [(one.name, request) for one in self.sets for request in one.requests]
        self.editor = Editor(hparams)
        if bare:
            pair = (self.editor.model, without_bos(self.editor.tok))
            self.editor = Editor(dataclasses.replace(hparams, model_name=pair))
        assert isinstance(self.editor.method, ROME)
        self.method: ROME = self.editor.method
        self.layer = hparams.layers[0]
        self.fingerprint = self.editor.fingerprint()
        self._found: dict[tuple[Any, ...], Found] = {}
        self._lookups: dict[tuple[Any, ...], Lookup] = {}

    @classmethod
    def of(cls, args: argparse.Namespace) -> Lab:
        """The lab that the flags describe; files are read and checked before the model is loaded."""
        hparams = hparams_of(args)
        collapse = load_collapse(str(hparams.model_name), args.collapse, args.limit, hparams.seed)
        if "normal" not in vars(args):
            return cls(hparams, collapse, None, bare=args.without_bos)
        normal = load_normal(args.normal, args.limit, hparams.seed, collapse)
        return cls(hparams, collapse, normal, bare=args.without_bos)

    @property
    def normal(self) -> RequestSet:
        """The normal set, in experiments that have one."""
        return self.sets[-1]

    def relaid(self, **changes: Any) -> Lab:
        """A lab with the same model, sets and contexts, and some hyper-parameters changed."""
        pair = (self.editor.model, self.editor.tok)
        contexts = list(self.method.contexts)
        hparams = dataclasses.replace(self.hparams, model_name=pair, context_templates=contexts, **changes)
        return Lab(hparams, self.collapse, None if len(self.sets) == 1 else self.normal)

    def found(self, request: EditRequest, progress: Progress | None = None) -> Found:
        """The value search of a request; ROME and C-ROME, with and without C, share it."""
        key = (request.place, request.target_new)
        if key not in self._found:
            self._found[key] = self.method.search(request, self.layer, progress)
        return self._found[key]

    def look_up(self, request: EditRequest) -> Lookup:
        """k^u and kbar of a request, and the projection's outputs there."""
        if request.place not in self._lookups:
            (self._lookups[request.place],) = self.method.look_up([request], self.layer)
        return self._lookups[request.place]

    def edit(self, request: EditRequest, **choice: Any) -> tuple[WeightDelta, LayerTrace]:
        """The update and its trace; `if_c_rome` and `mom2_adjustment` override the hyper-parameters."""
        hparams = dataclasses.replace(self.hparams, **choice)
        return self.method.update(self.layer, self.found(request), self.look_up(request), hparams)

    @contextmanager
    def applied(self, *deltas: WeightDelta) -> Iterator[None]:
        """The edited model inside the block."""
        with weights.applied(self.editor.model, deltas):
            yield

    def perplexity(self, *deltas: WeightDelta) -> float:
        """Perplexity of the model with some updates in it. Raises ConfigError when the YAML switches it off."""
        with self.applied(*deltas):
            report = self.editor.perplexity()
        if report is None:
            raise ConfigError("this experiment measures perplexity; ppl_sentence_num must be above 0")
        return report.mean

    def weight(self) -> torch.Tensor:
        """The edited weight as (outputs D, inputs K), float64, on the CPU."""
        weight = self.editor.model.get_parameter(self.method.parts.weight_name(self.layer))
        return oriented(weight, self.method, self.layer)

    def collapsed(self, before: float, after: float) -> bool:
        """Did an edit collapse the model, by the hyper-parameters' limits?"""
        h = self.hparams
        return verdict(before, after, threshold=h.collapse_threshold, ratio=h.collapse_ratio).collapsed

    def recorded(self, name: str, **more: Any) -> dict[str, Any]:
        """`config` and `manifest` of an outcome: what has to be known to do an experiment again."""
        sentences = self.editor.sentences
        manifest = {
            "experiment": name,
            "seed": self.hparams.seed,
            "model_fingerprint": self.fingerprint,
            "prompts_begin_with_bos": begins_texts_with_bos(self.editor.tok),
            "context_templates": list(self.method.contexts),
            "sentences": None if sentences is None else sentences.to_json(),
            "sets": {one.name: one.to_json() for one in self.sets},
        }
        return {"config": self.hparams.to_dict(), "manifest": {**manifest, **more}}


def oriented(matrix: torch.Tensor, method: ROME, layer: int) -> torch.Tensor:
    """A weight or a change of it as (outputs D, inputs K), float64, on the CPU, whatever the layer's orientation."""
    turned = matrix.T if weight_is_transposed(method.parts.rewrite(layer)) else matrix
    return turned.detach().double().cpu()

"""Where a search begins: the model with its parts, and a shipped file with what is this model's own put in it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import HyperParams, field_types
from easyeditor.base.paths import SHIPPED
from easyeditor.base.plain_yaml import yaml_path
from easyeditor.editing.editor import Editor
from easyeditor.evaluate.perplexity import begins_with_bos
from easyeditor.lm import embedded
from easyeditor.lm.architectures import Anatomy, attention_of, type_of
from easyeditor.lm.discover import anatomy, discover, module_name, replay_checked
from easyeditor.lm.loading import load
from easyeditor.methods.hparams import LayerHyperParams
from easyeditor.methods.locate.hparams import LocateHyperParams
from easyeditor.methods.locate.method import LocateMethod
from easyeditor.methods.locate.statistics import Statistics
from easyeditor.methods.registry import canonical, completed, hparams_class, read_values, row_of, told

LOG = logging.getLogger(__name__)

LAYERS_OF_A_SPAN = 3  # at most every third layer of a model is in one span

MODULES = {"layer_module_tmp", "mlp_module_tmp", "rewrite_module_tmp"}
"""What a type that is not known needs named, if it is not found."""

SWITCH = "mom2_adjustment"
"""Tried on where a method can and the start does not: an update that spares other keys is gentler."""
QUICK_STATISTICS = {"mom2_dataset": "wikipedia-excerpt", "mom2_n_samples": 100, "collect_stats": "auto"}
"""What a start that uses none is given, so that a search can try them."""

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model, and the values of a YAML for it that only lack what is searched for."""

    method: str
    model: PreTrainedModel
    tok: PreTrainedTokenizerBase
    parts: Anatomy
    values: Mapping[str, Any]
    settings: Settings | None
    """The start file's own layers, of another model those at the same depth, and its numbers; None: not known."""
    own: bool
    """Is the start file of this very model?"""
    span: int
    """Layers of one edit."""
    notes: tuple[str, ...]
    contexts: tuple[str, ...] = ()

    def hparams(self, settings: Mapping[str, Any]) -> HyperParams:
        """Hyper-parameters on the loaded model, with contexts that all trials share."""
        values = {**self.values, **settings, "model_name": (self.model, self.tok)}
        if self.contexts and values.get("context_templates") is None:
            values["context_templates"] = list(self.contexts)
        return hparams_class(self.method).from_dict(values, where="tune")

    def collect(self, layers: Sequence[int]) -> None:
        """The statistics of these layers that are lacking, in one pass."""
        hparams = self.hparams({"layers": sorted(set(layers)), "mom2_adjustment": True})
        assert isinstance(hparams, LocateHyperParams)
        statistics = Statistics(self.parts, self.tok, hparams)
        lacking = [layer for layer in hparams.layers if statistics.key(layer).find() is None]
        if lacking:
            statistics.moment(lacking[0])  # which collects those of the others too

    @property
    def allowed(self) -> list[int]:
        """The layers that a search tries: those that can be edited, without the last one, whose value nothing above
        carries on."""
        dense = self.parts.dense
        return [layer for layer in dense if layer < len(self.parts.blocks) - 1] or dense

    def layers(self, end: int) -> list[int]:
        """The span of layers that ends at `end`; shorter at the model's begin."""
        return [layer for layer in self.parts.dense if layer <= end][-self.span :]


def tunable(method: str) -> str:
    """The method's name as the table has it.

    Raises:
        ConfigError: it is not known, or has no layers to choose.
    """
    row_of(method)
    name = str(canonical(method))
    if not issubclass(hparams_class(name), LayerHyperParams):
        raise ConfigError(
            f"{name} cannot be tuned: it does not rewrite one projection at layers that could be measured; its values "
            f"are in {row_of(name).paper} and hparams/{name}/"
        )
    return name


def start_values(method: str, model: str, file: str | None, settings: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """The start file's values, overrides applied. By default the one in hparams/ that has the model's name, else the
    embedded model's.

    Raises:
        ConfigError: no such file, or one of another method.
    """
    folder = SHIPPED / "hparams" / method
    named = folder / f"{Path(model).name}.yaml"
    path = yaml_path(file or (named if named.exists() else folder / f"{embedded.DEFAULT}.yaml"))
    if file is None and not path.exists():
        raise ConfigError(f"{method}: there is no {path} to start from; give --start FILE")
    read = {"alg_name": method, "model_name": model, **read_values(path)}
    if canonical(read["alg_name"]) != method:
        raise ConfigError(f"--start {path}: it is of {read['alg_name']!r}, and --method is {method}")
    cls, where = hparams_class(method), told(str(path), settings)
    values = completed(cls, cls.merged(read, settings), where)
    hparams = cls.from_dict(values, where)
    quick = QUICK_STATISTICS if read.get("mom2_adjustment") is False else {}
    return {**values, **quick, "alg_name": method, **{key: getattr(hparams, key) for key in keys_of(settings)}}, path


def keys_of(settings: Sequence[str]) -> frozenset[str]:
    """The keys of KEY=VALUE settings."""
    return frozenset(setting.partition("=")[0].strip() for setting in settings)


def begin(
    method: str,
    model_name: str,
    values: Mapping[str, Any],
    path: Path,
    device: str | None,
    knobs: Sequence[str],
    fixed: Collection[str] = (),
) -> Start:
    """Load the model, find its parts, and put what is its own in the place of the start file's, but for keys that are
    `fixed`: the caller set them.

    Raises:
        ConfigError: a fixed layer that the model does not have. ModelError: its parts are not found.
    """
    cls = hparams_class(method)
    made: dict[str, Any] = {**values, "model_name": model_name, **({} if device is None else {"device": device})}
    own = _same_model(str(values.get("model_name")), model_name)
    first = cls.from_dict(made, where=str(path))
    pair = load(model_name, device=first.device, dtype=first.dtype, fp16=first.fp16)
    parts, notes, replay = _parts(pair[0], made, own or set(fixed) >= MODULES)
    count = len(parts.blocks)
    made |= {key: value for key, value in _modules(parts, made).items() if key not in fixed}
    if replay is not None:
        made["replay"] = replay
    if "v_loss_layer" in field_types(cls) and "v_loss_layer" not in fixed:
        made["v_loss_layer"] = count - 1
    if "ppl_bos" not in made and begins_with_bos(pair[1], "auto"):
        made["ppl_bos"] = "auto"
        notes.append("perplexity with BOS (ppl_bos: auto), for the tokenizer puts one before every text")
    layers = [int(layer) for layer in values["layers"]]
    if "layers" in fixed and max(layers) >= count:
        raise ConfigError(f"layers is {layers}, and the model has {count}, counted from 0")
    span = max(1, min(len(layers), count // LAYERS_OF_A_SPAN))
    if "layers" in fixed:
        parts.check_dense(layers)
    settings = {"layers": _at_depth(layers, values.get("v_loss_layer"), count, own or "layers" in fixed, span)}
    if not set(settings["layers"]) <= set(parts.dense):
        settings["layers"] = []
    settings |= _known(first, knobs)
    made["layers"] = [min(parts.dense, key=lambda layer: abs(layer - layers[-1]))]
    start = Start(
        method=method,
        model=pair[0],
        tok=pair[1],
        parts=parts,
        values=made,
        settings=settings if settings["layers"] else None,
        own=own and settings["layers"] == layers,
        span=span,
        notes=(*notes, f"start: {path.name} of hparams/{method}"),
    )
    LOG.info("%s", "; ".join(start.notes))
    editor = Editor(start.hparams({}))
    contexts = editor.method.contexts if isinstance(editor.method, LocateMethod) else ()
    return dataclasses.replace(start, contexts=contexts)


def numbers(start: Start, knobs: Sequence[str]) -> Settings:
    """The start's values of what is searched for; `mom2_adjustment` is, unless statistics may not be collected."""
    return _known(start.hparams({}), knobs)


def _known(hparams: HyperParams, knobs: Sequence[str]) -> Settings:
    found = {knob: getattr(hparams, knob) for knob in knobs}
    if found.get(SWITCH) is False and getattr(hparams, "collect_stats", "off") == "off":
        del found[SWITCH]
    return found


def _same_model(one: str, other: str) -> bool:
    known = embedded.find(one)
    return Path(one).name == Path(other).name or (known is not None and known is embedded.find(other))


def _at_depth(layers: Sequence[int], last: Any, count: int, own: bool, span: int) -> list[int]:
    """The start file's layers in a model of `count`; `last` is the last one of its own model, [] if not known."""
    if own and max(layers) < count:
        return list(layers)
    if not isinstance(last, int) or last < 1:
        return []
    end = min(round(max(layers) / last * (count - 1)), max(0, count - 2))
    return list(range(max(0, end - span + 1), end + 1))


def _parts(model: PreTrainedModel, values: Mapping[str, Any], own: bool) -> tuple[Anatomy, list[str], Any]:
    """The model's parts, what a reader is to know of them, and the YAML's `replay` (None: as it is)."""
    kind, known = type_of(model)
    by_hand = {key: values.get(f"{key}_module_tmp") for key in ("layer", "mlp", "rewrite")}
    if known:
        return anatomy(model), [f"type {kind}: known"], None
    if own and all(by_hand.values()):
        block, mlp, rewrite = (str(by_hand[key]).removesuffix(".weight") for key in ("layer", "mlp", "rewrite"))
        parts = anatomy(model, block=block, mlp=mlp, rewrite=rewrite)
    else:
        parts = Anatomy(model=model, architecture=discover(model))
    found = parts.architecture
    parts, replayed = replay_checked(parts)
    where = f"blocks {found.block} ({len(parts.blocks)} of them), MLP {found.mlp}, its projection {found.rewrite}"
    how = f"type {kind}: not known; found {where}"
    return parts, [how, replayed], "check" if parts.architecture.replay else False


def _modules(parts: Anatomy, values: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML's module names, of those keys the start file has and of those a type that is not known needs."""
    found = parts.architecture
    attention = attention_of(parts, 0)
    weight = ".weight" * str(values.get("rewrite_module_tmp", "")).endswith(".weight")
    prefix = found.block.partition("{}")[0]
    attention_name = module_name(parts.model, attention)
    return {
        "rewrite_module_tmp": found.rewrite + weight,
        "layer_module_tmp": found.block,
        "mlp_module_tmp": found.mlp,
        "attn_module_tmp": None if attention_name is None else attention_name.replace(f"{prefix}0", f"{prefix}{{}}", 1),
        "ln_f_module": None,
        "lm_head_module": module_name(parts.model, parts.model.get_output_embeddings()),
    }

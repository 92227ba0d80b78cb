"""The parts of a decoder nobody described, found from its module tree and one short forward.

Replay is asked for only where a check on this very model shows that it gives the plain path's numbers.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from easyeditor.base.errors import ModelError
from easyeditor.lm.architectures import Anatomy, Architecture, check_template, tabled, weight_is_transposed
from easyeditor.lm.hooks import tapped
from easyeditor.lm.loading import input_device
from easyeditor.lm.replay import PlainForward, ReplayForward
from easyeditor.lm.tokens import Row, model_inputs
from easyeditor.lm.weights import frozen

BY_HAND = (
    "name its modules yourself: --set layer_module_tmp=… mlp_module_tmp=… rewrite_module_tmp=… with {} for the layer"
)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of logits, replayed against plain; else 5e-2
PROBE = ((1, 2, 3, 4, 5, 6, 7, 8), (9, 3, 5, 4, 2), (2, 7, 1, 1, 6, 3))  # token ids; any will do


@dataclass(frozen=True)
class _Call:
    """A projection that ran in a block: its path there, its input's and output's width."""

    path: str
    inputs: int
    outputs: int
    axes: int


def anatomy(
    model: PreTrainedModel, *, block: str | None = None, mlp: str | None = None, rewrite: str | None = None
) -> Anatomy:
    """Find a model's parts: by the templates a YAML gives (which win and must exist in the model), by its type, or
    from its module tree.

    Raises:
        ConfigError: a template that names no module of this model.
        ModelError: the rewrite module is no Linear or Conv1D layer; all layers are mixtures of experts; not found.
    """
    known = tabled(model)
    given = block and mlp and rewrite
    base = known or (Architecture(block="", mlp="", rewrite="") if given else discover(model))
    found = Architecture(
        block=block or base.block,
        mlp=mlp or base.mlp,
        rewrite=rewrite or base.rewrite,
        replay=known is not None and block in (None, known.block),
        mlp_adds=known is not None and known.mlp_adds and mlp in (None, known.mlp),
    )
    parts = Anatomy(model=model, architecture=found)
    check_template(model, "layer_module_tmp", found.block, 0)
    first = next(iter(parts.dense), 0)
    parts.check_dense([first])
    check_template(model, "mlp_module_tmp", found.mlp, first)
    check_template(model, "rewrite_module_tmp", found.rewrite, first)
    weight_is_transposed(parts.rewrite(first))
    return parts


def discover(model: PreTrainedModel) -> Architecture:
    """Blocks: of the outermost ModuleLists that a text runs through, the longest. Projection: in every block that is no
    mixture of experts, the Linear or Conv1D from the widest input to the hidden width, where it lies in nothing that
    mixes tokens. MLP: the block's child that holds it, if it gives what the projection gives.

    Raises:
        ModelError: there is no such block, projection or output head, all blocks are mixtures of experts, or the model
            does not take plain inputs.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{name}: no output head is known (get_output_embeddings gives None), so nothing can be scored"
        )
    lists = _outermost(model, "")
    lists = _used(model, lists) if len(lists) > 1 else lists
    if not lists:
        raise ModelError(f"{name}: no list of blocks (ModuleList) is in it; {BY_HAND}")
    prefix, blocks = max(lists, key=lambda item: len(item[1]))
    found = f"{prefix}.{{}}"
    parts = Anatomy(model=model, architecture=Architecture(block=found, mlp=found, rewrite=found, replay=False))
    first = next(iter(parts.dense), 0)
    parts.check_dense([first])
    if next(model.parameters()).is_meta:
        raise ModelError(f"{name} is of a type that is not known; its parts are found when its weights are loaded")
    path = _projection(model, blocks[first], f"{prefix}.{first}")
    for layer in parts.dense:
        if not isinstance(dict(blocks[layer].named_modules()).get(path), (nn.Linear, Conv1D)):
            has = f"block {prefix}.{layer} has no projection {path}, which block {first} has"
            raise ModelError(f"{name}: {has}; {BY_HAND}")
    child = path.split(".")[0]
    block = blocks[first]
    mlp = child if _same_output(model, block.get_submodule(child), block.get_submodule(path)) else path
    return Architecture(block=found, mlp=f"{found}.{mlp}", rewrite=f"{found}.{path}", replay=False)


def module_name(model: nn.Module, module: nn.Module | None) -> str | None:
    """The path of a module in the model."""
    return next((name for name, other in model.named_modules() if other is module), None)


def replay_checked(parts: Anatomy) -> tuple[Anatomy, str]:
    """The same parts with replay on where it gives this model's plain logits, with and without an offset; else off.

    And in words which of the two it is.
    """
    reason = ""
    for adds in (True, False):
        architecture = dataclasses.replace(parts.architecture, replay=True, mlp_adds=adds)
        candidate = dataclasses.replace(parts, architecture=architecture)
        try:
            off = _farthest_off(candidate)
        except Exception as error:  # a model that cannot be resumed may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            continue
        if off <= TOLERANCE.get(parts.model.dtype, 5e-2):
            return candidate, f"replay gives the plain path's logits (within {off:.1g} of their spread), so it is on"
        reason = f"logits are off by {off:.2g}"
    off_now = dataclasses.replace(parts.architecture, replay=False)
    return dataclasses.replace(
        parts, architecture=off_now
    ), f"replay is off, every pass runs the whole model ({reason})"


def _outermost(module: nn.Module, path: str) -> list[tuple[str, nn.ModuleList]]:
    """The ModuleLists that lie in no other, with their paths, in order."""
    if isinstance(module, nn.ModuleList):
        return [(path, module)] if len(module) else []
    return [
        found for name, child in module.named_children() for found in _outermost(child, f"{path}.{name}".strip("."))
    ]


def _used(model: PreTrainedModel, lists: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    """The lists whose first block runs when the model reads a text: not those of a vision tower."""
    ran: set[str] = set()
    with ExitStack() as stack:
        for path, blocks in lists:
            stack.enter_context(tapped(blocks[0], on_output=lambda _, path=path: ran.add(path)))  # type: ignore[misc]
        _forward(model)
    return [(path, blocks) for path, blocks in lists if path in ran]


def _projection(model: PreTrainedModel, block: nn.Module, prefix: str) -> str:
    """The path, in a block, of the MLP's output projection."""
    where = f"{type(model).__name__}: block {prefix}"
    width, calls = _calls(model, block)
    wide = [call for call in calls if call.outputs == width and call.inputs > width]
    mixers = {call.path: _mixer(model, block, call.path) for call in wide}
    own = [call for call in wide if mixers[call.path] is None]
    most = [call for call in own if call.inputs == max(other.inputs for other in own)]
    if len({call.path for call in most}) > 1:
        listed = ", ".join(call.path for call in most[:3])
        raise ModelError(f"{where} has several projections from {most[0].inputs} to {width} ({listed} …); {BY_HAND}")
    if most and most[0].axes != 3:
        raise ModelError(
            f"{where}: {most[0].path} gives {most[0].axes} axes, not batch, tokens and width; it cannot be edited"
        )
    if not most:
        mixing, by_hand, blocks = "", BY_HAND, prefix.rpartition(".")[0] + ".{}"
        for path in list(mixers)[:1]:
            mixing = f"; {path} is no MLP's: {mixers[path]} mixes tokens"
            if sum(any(isinstance(m, nn.Linear) for m in child.modules()) for child in block.children()) == 1:  # Mamba
                names = (f"layer_module_tmp={blocks}", f"mlp_module_tmp={blocks}.{mixers[path]}")
                by_hand = f"to edit it all the same: --set {' '.join(names)} rewrite_module_tmp={blocks}.{path}"
        raise ModelError(
            f"{where} has no MLP output projection: no Linear or Conv1D in it leads from a wider layer to the hidden "
            f"width {width}{mixing}, so there is nothing to edit; {by_hand}"
        )
    return most[0].path


def _mixer(model: PreTrainedModel, block: nn.Module, path: str) -> str | None:
    """What of a block a projection lies in that mixes tokens, as attention and recurrent layers do: what it gives at
    the last token depends on more than the two tokens that it is given last."""
    names = path.split(".")[:-1]

    def other(states: Tensor) -> Tensor | None:
        return torch.cat([states[:, :-2].roll(1, -1), states[:, -2:]], dim=1) if states.ndim == 3 else None

    for holder in (".".join(names[: n + 1]) for n in range(len(names))):
        gave: list[Tensor] = []
        module = block.get_submodule(holder)
        with tapped(module, on_output=lambda states, gave=gave: gave.append(states[:, -1])):  # type: ignore[misc]
            _forward(model)
            with tapped(module, on_input=other):
                _forward(model)
        if gave and not torch.allclose(gave[0], gave[-1], rtol=1e-3, atol=1e-3 * float(gave[0].abs().max())):
            return holder
    return None


def _calls(model: PreTrainedModel, block: nn.Module) -> tuple[int, list[_Call]]:
    """The hidden width a block gives, and the projections that run in it, in order."""
    widths: list[int] = []
    calls: list[_Call] = []

    def noted(path: str, inputs: int) -> object:
        return lambda states: calls.append(_Call(path, inputs, states.shape[-1], states.ndim))

    with ExitStack() as stack:
        for path, module in block.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                inputs = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
                stack.enter_context(tapped(module, on_output=noted(path, inputs)))  # type: ignore[arg-type]
        stack.enter_context(tapped(block, on_output=lambda states: widths.append(states.shape[-1])))
        _forward(model)
    return widths[0], calls


def _same_output(model: PreTrainedModel, outer: nn.Module, inner: nn.Module) -> bool:
    """Does the outer module give, as (batch, tokens, width), what the inner one gives?"""
    gave: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(tapped(outer, on_output=lambda states: gave.update(outer=states)))
        stack.enter_context(tapped(inner, on_output=lambda states: gave.update(inner=states)))
        _forward(model)
    return gave["outer"].shape == gave["inner"].shape and torch.equal(gave["outer"], gave["inner"])


@torch.no_grad()
def _forward(model: PreTrainedModel) -> None:
    """One short forward, with the inputs that all of this library's forwards give."""
    try:
        with frozen(model):
            model(**model_inputs([PROBE[0]], input_device(model)), use_cache=False)
    except ModelError:
        raise
    except Exception as error:  # a foreign forward raises what it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(
            f"{type(model).__name__} does not run on input_ids, attention_mask and position_ids ({reason}); it cannot "
            "be edited"
        ) from error


@torch.no_grad()
def _farthest_off(parts: Anatomy) -> float:
    """Largest difference of logits, replayed against plain, as a share of their spread: first, middle and last layer,
    MLP and block, without an offset and with one of the value's own size."""
    rows = [
        Row(ids=ids, lookup=at, scored=(len(ids) - 2, len(ids) - 1)) for ids, at in zip(PROBE, (3, 0, 2), strict=True)
    ]
    rows = [dataclasses.replace(row, scored=tuple(p for p in row.scored if p >= row.lookup)) for row in rows]
    last, worst = len(parts.blocks) - 1, 0.0
    with frozen(parts.model):
        for layer in sorted({0, last // 2, last}):
            for module in (parts.mlp(layer), parts.block(layer)):
                plain, replayed = (
                    kind(parts, module, layer, [[r] for r in rows]) for kind in (PlainForward, ReplayForward)
                )
                signs = torch.ones_like(plain.initial_BD)
                signs[:, ::2] = -1.0
                for offset_BD in (0 * signs, plain.initial_BD.abs() * signs):
                    expected, found = (
                        plain(offset_BD).double(),
                        replayed(offset_BD).double().to(input_device(parts.model)),
                    )
                    off = (found - expected.to(found.device)).abs().max() / expected.std()
                    worst = max(worst, float(off)) if torch.isfinite(off) else float("inf")
    return worst

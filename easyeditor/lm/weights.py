"""The only writer of parameters: apply an edit, take it back bit-exactly; trained copies; rounding; fingerprint."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from easyeditor.base.errors import ConfigError, DataError, NumericalError
from easyeditor.values.edit import WeightDelta

FINGERPRINT_SAMPLES = 256  # values read per tensor by `fingerprint`
ROWS_TOGETHER = 512  # of a weight whose rounding is measured: bounds memory

_VERSIONS: Any = WeakTensorKeyDictionary()
"""Of a copy, and of a parameter restored from it: torch's count of writes to it then, and the version it holds."""


@contextmanager
def applied(model: nn.Module, deltas: Sequence[WeightDelta]) -> Iterator[nn.Module]:
    """Add `deltas` to `model` inside the block; restore bit-exactly on the way out, also on error or Ctrl-C.

    Raises as `changing` and `add`.
    """
    with changing(model) as saved:
        saved |= snapshot(model, [delta.name for delta in deltas])
        add(model, deltas)
        yield model


@dataclass(eq=False)
class _Owned:
    """What is open on a model: a thread's blocks, by what each restores, innermost last; the ledgers whose edits are in
    it, the latest last."""

    thread: int = 0
    blocks: list[dict[str, Tensor]] = field(default_factory=list)
    ledgers: list[object] = field(default_factory=list)


_OWNED: weakref.WeakKeyDictionary[nn.Module, _Owned] = weakref.WeakKeyDictionary()
_OWNING = threading.Lock()


@contextmanager
def changing(model: nn.Module, ledger: object = None, *, stays: bool = False) -> Iterator[dict[str, Tensor]]:
    """Own the model inside the block; what is put into the mapping it gives is restored on the way out. Blocks of one
    thread may be inside each other. `ledger` is whose committed edits the block goes by, and it `stays` if it makes or
    unmakes one of them.

    Raises:
        ConfigError: another thread is changing the model; an edit is to stay while one is applied; other edits were
            committed after the ledger's; a block is left before one that was begun inside it.
    """
    saved: dict[str, Tensor] = {}
    with _OWNING:
        own = _OWNED.setdefault(model, _Owned())
        if own.blocks and own.thread != threading.get_ident():
            raise ConfigError("another thread is changing this model; wait for it, or load the model once for each")
        if own.blocks and stays:
            raise ConfigError("an edit is applied to this model; leave its block before one is committed or reverted")
        if ledger in own.ledgers[:-1]:
            raise ConfigError("another editor committed edits to this model later; revert those first, there")
        own.thread = threading.get_ident()
        own.blocks.append(saved)
    try:
        yield saved
    finally:
        place = next(n for n, block in enumerate(own.blocks) if block is saved)
        later = own.blocks[place + 1 :]
        if not later:
            restore(model, saved)
        del own.blocks[place]  # after it is restored: now another thread may begin
        if later:  # it has our change in what it restores; now it restores ours, too
            later[0] |= saved
            raise ConfigError("a block of an applied edit was left before one that was begun inside it")


def committed(model: nn.Module, ledger: object, edits: int) -> None:
    """Say how many edits of `ledger` are in the model now."""
    own = _OWNED.setdefault(model, _Owned())
    if edits and ledger not in own.ledgers:
        own.ledgers.append(ledger)
    elif not edits and ledger in own.ledgers:
        own.ledgers.remove(ledger)


def snapshot(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the named parameters."""
    saved = {}
    for name in dict.fromkeys(names):
        weight = _parameter(model, name)
        saved[name] = weight.detach().clone()
        _VERSIONS[saved[name]] = saved[name]._version, _version(weight)
    return saved


def restore(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Write a snapshot back."""
    with torch.no_grad():
        for name, weight in saved.items():
            parameter = _parameter(model, name)
            parameter.copy_(weight)
            written, holds = _VERSIONS.get(weight, (None, None))
            if written == weight._version:
                _VERSIONS[parameter] = parameter._version, holds


def add(model: nn.Module, deltas: Sequence[WeightDelta]) -> None:
    """Add deltas to the weights: summed in the wider of the two dtypes, written in the weight's own.

    Names, shapes and finiteness of all deltas are checked before the first write; callers restore if a sum overflows.

    Raises:
        DataError: a delta names no parameter of this model or has another shape.
        NumericalError: a delta or an edited weight is not finite.
    """
    for delta in deltas:
        weight = _parameter(model, delta.name)
        if _shape(delta) != tuple(weight.shape):
            raise DataError(
                f"edit of {delta.name} has shape {_shape(delta)}, but the model's weight is {tuple(weight.shape)}; "
                "this edit belongs to another model"
            )
        if not all(bool(torch.isfinite(t).all()) for t in delta.tensors().values()):
            raise NumericalError(f"the edit of {delta.name} is not finite; nothing was written")
    with torch.no_grad():
        for delta in deltas:
            weight = _parameter(model, delta.name)
            change = delta.dense(weight.device)
            wide = torch.promote_types(weight.dtype, change.dtype)
            edited = (weight.to(wide) + change.to(wide)).to(weight.dtype)
            if not bool(torch.isfinite(edited).all()):
                raise NumericalError(f"{delta.name} is not finite in {weight.dtype} after the edit; load a wider dtype")
            weight.copy_(edited)


@dataclass(frozen=True)
class Rounding:
    """What became of one weight's update when it was written in the weight's dtype; Frobenius norms.

    `lost` is the part of the update that is not in the weight: ||intended - written|| / ||intended||.
    """

    intended: float
    written: float
    lost: float


@torch.no_grad()
def rounding(model: nn.Module, deltas: Sequence[WeightDelta]) -> dict[str, Rounding]:
    """By weight, the update that `deltas` mean and the one that `add` would write now; nothing is written here."""
    found = {}
    for name in dict.fromkeys(delta.name for delta in deltas):
        weight = _parameter(model, name).detach()
        changes = [delta.dense(weight.device) for delta in deltas if delta.name == name]
        squares = torch.zeros(3, dtype=torch.float64)
        for rows in range(0, len(weight), ROWS_TOGETHER):
            part = slice(rows, rows + ROWS_TOGETHER)
            edited, intended = weight[part], torch.zeros_like(weight[part], dtype=torch.float64)
            for change in changes:
                wide = torch.promote_types(weight.dtype, change.dtype)
                edited = (edited.to(wide) + change[part].to(wide)).to(weight.dtype)
                intended += change[part]
            written = edited.double() - weight[part].double()
            squares += torch.stack([x.square().sum() for x in (intended, written, intended - written)]).cpu()
        size, wrote, off = squares.sqrt().tolist()
        found[name] = Rounding(intended=size, written=wrote, lost=off / size if size else 0.0)
    return found


def trainable(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the named parameters for an optimiser, float32 or wider; the model's own are never written.

    `called_with` runs the model with them, `difference` says what they moved by.
    """
    copies = {}
    for name in dict.fromkeys(names):
        weight = _parameter(model, name).detach()
        copies[name] = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).requires_grad_()
    return copies


def called_with(model: nn.Module, copies: Mapping[str, Tensor], **inputs: Any) -> Any:
    """The model's output with `copies` in the place of the parameters they are named after, differentiable in them.

    They are cast to the parameters' dtype; the parameters are back in their place afterwards, also on error.
    """
    placed = {name: copy.to(_parameter(model, name).dtype) for name, copy in copies.items()}
    return torch.func.functional_call(model, placed, kwargs=inputs)


def difference(model: nn.Module, copies: Mapping[str, Tensor]) -> list[WeightDelta]:
    """Dense deltas that lead from the model's weights to `copies`, in the copies' dtype."""
    return [
        WeightDelta(name=name, full=copy.detach() - _parameter(model, name).detach().to(copy.dtype))
        for name, copy in copies.items()
    ]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the block, dropout is off; flags and mode come back afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def version(parameters: Iterable[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    """Changes whenever a parameter is replaced or written in place (a write through `.data` is not seen).

    `restore` puts back the earlier weights, and with them the earlier version.
    """
    return tuple(_version(p) for p in parameters)


def _version(parameter: Tensor) -> tuple[int, int]:
    written, holds = _VERSIONS.get(parameter, (None, None))
    return holds if written == parameter._version and holds else (parameter.data_ptr(), parameter._version)


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's weights: SHA-256 over names, shapes, dtypes and evenly spaced values of every tensor.

    A sample, so that it costs milliseconds on a 7B model; it tells models and edited models apart, it is no proof.
    """
    digest = hashlib.sha256()
    weights = sorted(model.named_parameters())
    values = []
    for _, weight in weights:
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        values.append(flat[::step][:FINGERPRINT_SAMPLES].float())
    for (name, weight), read in zip(weights, _read(values), strict=True):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        digest.update(read.numpy().tobytes())
    return digest.hexdigest()[:32]


def sample(model: nn.Module) -> str:
    """A thousand evenly spaced weights in bfloat16, as hexadecimal: the same model in another dtype looks alike."""
    total = sum(p.numel() for p in model.parameters())
    step = max(1, total // 1000)
    values: list[Tensor] = []
    offset = 0
    for _, weight in sorted(model.named_parameters()):
        values.append(weight.detach().reshape(-1)[offset % step :: step].to(torch.bfloat16))
        offset = (offset - weight.numel()) % step
    return torch.cat(_read(values)).view(torch.int16).numpy().tobytes().hex()


def _read(values: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of one dtype on the CPU; read in one go from each device, for every read waits."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(v.device for v in values):
        own = [n for n, v in enumerate(values) if v.device == device]
        together = torch.cat([values[n] for n in own]).cpu()
        found |= dict(zip(own, torch.split(together, [values[n].numel() for n in own]), strict=True))
    return [found[n] for n in range(len(values))]


def alike(ours: str, theirs: str) -> bool:
    """Do two samples come from the same weights, up to dtype and an edit of a few matrices (93 % of values equal)?"""
    try:
        a, b = (torch.frombuffer(bytearray.fromhex(text), dtype=torch.int16) for text in (ours, theirs))
    except ValueError:  # no sample at all: a damaged file
        return False
    return a.shape == b.shape and float((a == b).double().mean()) > 0.93


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise DataError(
            f"the edit changes {name!r}, which {type(model).__name__} does not have; it belongs to another model"
        ) from error


def digest(deltas: Sequence[WeightDelta]) -> str:
    """SHA-256 over the deltas' names, dtypes, shapes and bytes: equal for equal deltas, on whatever device."""
    made = hashlib.sha256()
    for delta in deltas:
        for key, tensor in sorted(delta.tensors().items()):
            made.update(f"{delta.name} {key} {tensor.dtype} {tuple(tensor.shape)};".encode())
            made.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def _shape(delta: WeightDelta) -> tuple[int, ...]:
    if delta.full is not None:
        return tuple(delta.full.shape)
    assert delta.left is not None
    assert delta.right is not None
    left, right = tuple(delta.left.shape), tuple(delta.right.shape)
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        raise DataError(f"edit of {delta.name}: factors of shapes {left} and {right} are not those of one matrix")
    return (left[0], right[1])

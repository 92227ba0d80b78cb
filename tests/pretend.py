"""Devices that are not there: real numbers on the CPU, tensors that say `gpu:0` or `gpu:1`, errors where CUDA has them.

    with pretended() as seen:
        model = moved(model, ["gpu:0", "gpu:1"])  # the blocks split over two, as `device_map="auto"` does it
        ...
    seen.syncs  # Counter of (what, file:line function): where the host waits for the device, or the device for the host

A tensor's outside is of a python backend (PrivateUse1), its inside a CPU tensor, `_at` its device. A dispatch mode runs
every operator on the insides and refuses tensors of two devices. torch's own guard for such a backend knows one device,
so all outsides are `gpu:0` and `.device` is answered by a function mode. For the same reason a copy between devices
(`Moved`) sends its gradient back itself. The way back is checked as the way there, but an error in autograd's threads
would end the process: it is raised by the next operator after it, or at the block's end. What autograd makes of nothing
(zeros) has no place (`_at` is None) until it meets somebody who has one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten: Any = torch.ops.aten
CPU = torch.device("cpu")
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "bincount"}
ATOMIC = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "index_reduce"}
VIEWS = {"view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "detach", "alias"}
VIEWS |= {"split", "as_strided", "_unsafe_view", "unbind", "lift_fresh", "split_with_sizes", "diagonal", "unfold"}
VIEWS |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Backend(_DummyBackendModule):  # type: ignore[misc]  # torch leaves it untyped
    """What torch asks a backend's module; outside `pretended` there is no device."""

    devices = 0

    def is_available(self) -> bool:
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return self.is_available()

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        pass


BACKEND = Backend()
_setup_privateuseone_for_python_backend("gpu", backend_module=BACKEND)


class DeviceMix(RuntimeError):
    """One operator, two devices."""


class Unordered(RuntimeError):
    """Floats added in an order that CUDA leaves to chance."""


@dataclass
class Seen:
    """What ran: waits by (what, where), kernels, operators by name."""

    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: int = 0

    def clear(self) -> None:
        self.syncs.clear()
        self.kernels = 0

    def at(self, file: str) -> int:
        """How often the host waited in a file."""
        return sum(count for (_, where), count in self.syncs.items() if where.startswith(file))


class Pretended(Tensor):
    """A tensor that says it lies on a GPU."""

    _inner: Tensor
    _at: torch.device | None

    @staticmethod
    def __new__(cls, inner: Tensor, at: torch.device | None, grad: bool = False) -> Pretended:
        form = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), device="gpu:0", requires_grad=grad, **form)
        made._inner, made._at = inner, at
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self._at}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        copy = Pretended(self._inner.detach().clone(), self._at, self.requires_grad)
        return nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside pretended()")


def place(device: Any) -> torch.device | None:
    """`gpu` means `gpu:0`."""
    found = None if device is None else torch.device("gpu", device) if type(device) is int else torch.device(device)
    return torch.device("gpu:0") if found is not None and found.type == "gpu" and found.index is None else found


def at(tensor: Tensor) -> torch.device:
    """Where a tensor says it is; what autograd made and nobody has read yet says the first device."""
    return (tensor._at or torch.device("gpu:0")) if isinstance(tensor, Pretended) else CPU


class Operators(TorchDispatchMode):
    """Runs operators on the insides; refuses two devices; counts waits."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.refused: RuntimeError | None = None  # on the way back

    def wait(self, what: str) -> None:
        frame: Any = sys._getframe(2)
        inside = "/easyeditor/lm/precision.py"  # a mode: it stands between an operator and whoever calls it
        while frame is not None and not ("/easyeditor/" in (file := frame.f_code.co_filename) and inside not in file):
            frame = frame.f_back
        ours = "outside"
        if frame is not None:
            code = frame.f_code
            ours = f"{code.co_filename.rpartition('/easyeditor/')[2]}:{frame.f_lineno} {code.co_name}"
        self.seen.syncs[what, ours] += 1

    def said(self) -> None:
        """Raises what was refused on the way back."""
        refused, self.refused = self.refused, None
        if refused is not None:
            raise refused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, Pretended)]
        wanted, name = place(kwargs.get("device")), func._schema.name.split("::")[1]
        if not ours and (wanted is None or wanted.type == "cpu"):
            return func(*args, **kwargs)
        back = torch._C._current_graph_task_id() != -1
        copies = name in ("_to_copy", "copy_")
        places = {x._at for x in ours if x._at is not None}
        here = next(iter(places), None)
        if not back:
            self.said()
        try:
            if not copies:
                self._check(func, places, args, [x for x in tensors if not isinstance(x, Pretended)])
            if name in ATOMIC and args[0].is_floating_point():
                raise Unordered(f"{func} adds floats in no fixed order on CUDA")
        except (DeviceMix, Unordered) as error:
            if not back:
                raise
            self.refused = type(error)(f"on the way back: {error}")
        if name in WAITS:
            self.wait(name)
        if copies and not (back and here is not None):  # autograd's own change a dtype; they say gpu:0 for any device
            here = self._copied(name, args, kwargs, wanted)
        elif wanted is not None and not back:
            here = wanted
        for key, value in {"device": CPU, "pin_memory": None}.items():
            if key in kwargs:
                kwargs[key] = value
        self.seen.kernels += name not in VIEWS and name not in WAITS
        known = {id(x._inner): x for x in ours}
        inner = tree_map(lambda x: x._inner if isinstance(x, Pretended) else x, (args, kwargs))
        result = func(*inner[0], **inner[1])

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor) or (here is not None and here.type == "cpu"):
                return x
            if id(x) in known and known[id(x)]._at is None:
                known[id(x)]._at = here
            return known[id(x)] if id(x) in known else Pretended(x, here)

        return tree_map(wrapped, result)

    def _check(self, func: Any, places: set[torch.device], args: Any, hosts: list[Tensor]) -> None:
        if len(places) > 1:
            raise DeviceMix(f"Expected all tensors to be on the same device: {func} on {sorted(map(str, places))}")
        if func in INDEXED and isinstance(args[0], Pretended):  # CUDA takes indices from the host, and waits for them
            index = [i for i in args[1] if i is not None]
            if any(not isinstance(i, Pretended) for i in index):
                self.wait("index on the host")
            if any(i.dtype in (torch.bool, torch.uint8) for i in index):
                self.wait("boolean mask")
            hosts = [x for x in args[2:] if isinstance(x, Tensor) and not isinstance(x, Pretended)]
        if places and any(x.ndim for x in hosts):
            raise DeviceMix(f"Expected all tensors to be on the same device: {func} on cpu and {places}")

    def _copied(self, name: str, args: Any, kwargs: Any, wanted: torch.device | None) -> torch.device:
        source, target = (at(args[0]), wanted or at(args[0])) if name == "_to_copy" else (at(args[1]), at(args[0]))
        sent = source == CPU and (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if source != target and CPU in (source, target) and not sent:
            self.wait(f"copy {source.type} -> {target.type}")
        return target


class Functions(TorchFunctionMode):
    """What torch's C++ does by device before an operator is dispatched."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and (to := place(kwargs.get("device"))) and to.type == "gpu":
            return _sent(func(*args, **{k: v for k, v in kwargs.items() if k != "device"}), to)
        if func is torch.autograd.grad:
            found = func(*args, **kwargs)
            inputs = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            return tuple(_placed(grad, at(x)) for grad, x in zip(found, inputs, strict=True))
        if func is torch.Tensor.to:
            return self._to(func, args, kwargs)
        if not isinstance(first, Pretended):
            return func(*args, **kwargs)
        here = at(first)
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return here
        if func == torch.Tensor.grad.__get__:  # type: ignore[attr-defined]
            return _placed(func(first), here)
        if func is torch.Tensor.cpu:
            return Moved.apply(first, CPU, {})
        if func is torch.Tensor.data_ptr:
            return first._inner.data_ptr()
        if func is torch.Tensor.tolist:
            self._operators.wait("tolist")
            return first._inner.detach().tolist()
        if func is torch.Tensor.numpy:
            raise TypeError(f"can't convert {here} device type tensor to numpy. Use Tensor.cpu() first")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return func(first, _indices(args[1], here), *args[2:])
        if func is torch.Tensor.new_tensor:
            return _sent(torch.tensor(args[1], dtype=kwargs.get("dtype") or first.dtype), here)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _to(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, device, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
        for given in args[1:]:
            if isinstance(given, Tensor):
                device, dtype = at(given), given.dtype
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, (str, int, torch.device)) and not isinstance(given, bool):
                device = given
        to, how = place(device), {"dtype": dtype or tensor.dtype}
        if to is not None and to != at(tensor):
            how["non_blocking"] = kwargs.get("non_blocking", False)
            return Moved.apply(tensor, to, how)  # type: ignore[no-any-return]
        if not isinstance(tensor, Pretended):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        return func(tensor, how["dtype"], copy=kwargs.get("copy", False))  # type: ignore[no-any-return]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return aten._to_copy.default(tensor, device=device)  # type: ignore[no-any-return]


class Moved(torch.autograd.Function):
    """A copy to another device, whose gradient goes back to the first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to: torch.device, how: dict[str, Any]) -> Tensor:
        ctx.back = at(tensor), {"dtype": tensor.dtype}
        if torch._C._current_graph_task_id() == -1:
            return aten._to_copy.default(tensor, device=to, **how)  # type: ignore[no-any-return]
        inner = (tensor._inner if isinstance(tensor, Pretended) else tensor).to(how["dtype"], copy=True)
        return inner if to == CPU else Pretended(inner, to)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return Moved.apply(gradient, *ctx.back), None, None


def _placed(gradient: Any, device: torch.device) -> Any:
    if isinstance(gradient, Pretended):
        if gradient._at not in (None, device):
            raise DeviceMix(f"the gradient of a tensor on {device} is on {gradient._at}")
        gradient._at = device
    return gradient


def _indices(index: Any, device: torch.device) -> Any:
    """Numbers as an index: C++ makes a tensor of them on the indexed tensor's device, which waits."""
    if isinstance(index, tuple):
        return tuple(_indices(i, device) for i in index)
    return _sent(torch.tensor(list(index)), device) if isinstance(index, (list, range)) else index


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert not dropout_p
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=at(q)).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return aten._safe_softmax(scores, -1) @ v  # a row that sees nothing (a pad) gives 0, as the kernels do


@contextmanager
def pretended() -> Iterator[Seen]:
    """Inside the block there are `gpu:0` and `gpu:1`."""
    seen, inference = Seen(), torch.inference_mode
    operators = Operators(seen)
    torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]  # inference tensors take no outsides
    try:
        BACKEND.devices = 2
        with Functions(operators), operators:
            yield seen
        operators.said()
    finally:
        BACKEND.devices = 0
        torch.inference_mode = inference  # type: ignore[misc]


def moved(model: Any, devices: Sequence[str]) -> Any:
    """The model on one device, or its blocks split over several, with accelerate's hooks; ties are kept."""
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    where = {id(t): devices[0] for t in (*model.parameters(), *model.buffers())}
    for number, block in enumerate(blocks):
        device = devices[number * len(devices) // len(blocks)]
        where |= {id(t): device for t in (*block.parameters(), *block.buffers())}
        if len(devices) > 1:
            add_hook_to_module(block, AlignDevicesHook(execution_device=device))
    made: dict[int, Tensor] = {}
    for module in list(model.modules()):
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        moved_ = Pretended(tensor.detach().clone(), place(where[id(tensor)]))
                        kept = nn.Parameter(moved_) if isinstance(tensor, nn.Parameter) else moved_
                        made[id(tensor)] = kept
                    own[name] = made[id(tensor)]
    if len(devices) > 1:  # what follows the blocks stands on the first device
        for child in model.base_model.children():
            if child is not blocks and not isinstance(child, nn.ModuleList):
                add_hook_to_module(child, AlignDevicesHook(execution_device=devices[0]))
        add_hook_to_module(model.get_output_embeddings(), AlignDevicesHook(execution_device=devices[0]))
    return model

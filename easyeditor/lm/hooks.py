"""Watch and change what flows through modules: context managers, undone in `finally`, always (batch, time, width).

    tapped(module, on_input=, on_output=)   see or replace a module's hidden-state input or output
    captured(module, stop=)                 keep a module's last hidden-state input and output; end the forward there
    watched(block)                          collect what a block is given
    skipped(modules)                        let modules pass their input on unchanged
    resumed(blocks, layer, passage)         start forwards at a block from what it was given before
    replaced(module, forward)               put another function in place of a module's forward
    selected_head(model, rows, positions)   send only some positions through the output head
    second_position_first(model)            give the first token of every text the second one's position
    stopping()                              end a forward early from inside a tap (raise StopForward)
    in_force(model)                         what of this kind is in force now

Nobody else touches `register_*hook` or a module's `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

Tap = Callable[[Tensor], "Tensor | None"]


class StopForward(Exception):
    """Raised inside a tap to end the forward; `stopping` swallows it."""


@contextmanager
def stopping() -> Iterator[None]:
    """Swallow a StopForward raised by a tap inside the block."""
    with suppress(StopForward):
        yield


@contextmanager
def tapped(module: nn.Module, *, on_input: Tap | None = None, on_output: Tap | None = None) -> Iterator[None]:
    """Call `on_input` / `on_output` with the hidden states (batch, time, width); a returned tensor replaces them."""
    handles = []
    try:
        if on_input is not None:
            handles.append(module.register_forward_pre_hook(_pre_hook(on_input), with_kwargs=True))
        if on_output is not None:
            handles.append(module.register_forward_hook(_post_hook(on_output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Captured:
    """The hidden states (batch, time, width) a module was given and gave in its last forward, detached."""

    given: Tensor = field(init=False)
    gave: Tensor = field(init=False)


@contextmanager
def captured(module: nn.Module, *, stop: bool = False) -> Iterator[Captured]:
    """Keep what `module` is given and gives inside the block; with `stop` the forward, and the block, end there."""
    found = Captured()

    def on_input(states_BTD: Tensor) -> None:
        found.given = states_BTD.detach()

    def on_output(states_BTD: Tensor) -> None:
        found.gave = states_BTD.detach()
        if stop:
            raise StopForward

    with stopping(), tapped(module, on_input=on_input, on_output=on_output):
        yield found


@dataclass(frozen=True)
class Passage:
    """One forward of one block: the hidden states it was given, and whether it answered with a tuple."""

    hidden_BTD: Tensor
    tuple_output: bool


@contextmanager
def watched(block: nn.Module) -> Iterator[list[Passage]]:
    """Collect one Passage for every forward of `block` inside the context."""
    passages: list[Passage] = []
    inputs: list[Tensor] = []

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        passages.append(Passage(inputs.pop(), isinstance(output, tuple)))

    handle = block.register_forward_hook(after)
    try:
        with tapped(block, on_input=lambda hidden: inputs.append(hidden.detach())):
            yield passages
    finally:
        handle.remove()


@contextmanager
def skipped(modules: Sequence[nn.Module], *, tuple_output: bool) -> Iterator[None]:
    """Replace the forward of `modules` by "return the hidden states you were given".

    `tuple_output` says how these blocks answer: a bare tensor, or a tuple whose first entry is the hidden states.
    """

    def passed_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if tuple_output else hidden

    with ExitStack() as undo:
        for module in modules:
            undo.enter_context(replaced(module, passed_on))
        yield


@contextmanager
def resumed(blocks: Sequence[nn.Module], layer: int, passage: Passage) -> Iterator[None]:
    """Start forwards at block `layer` from the hidden states it was given before; the blocks below are not computed."""
    with (
        skipped(blocks[:layer], tuple_output=passage.tuple_output),
        tapped(blocks[layer], on_input=lambda _hidden: passage.hidden_BTD),
    ):
        yield


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward` in place of the module's own inside the block; hooks on the module stay in force."""
    before = module.__dict__.get("forward")
    try:
        module.forward = forward
        yield
    finally:
        _restore_forward(module, before)


@contextmanager
def selected_head(model: PreTrainedModel, rows_S: Tensor, positions_S: Tensor) -> Iterator[None]:
    """Send only the hidden states at (row, position) pairs through the output head: logits come out (1, S, vocabulary).

    Works for any model with an output head, tied or renamed; what the model does after its head (soft caps, scales) it
    does to the selected logits.
    """
    head = model.get_output_embeddings()

    def gather(hidden_BTD: Tensor) -> Tensor:
        rows, positions = (x.to(hidden_BTD.device, non_blocking=True) for x in (rows_S, positions_S))
        return hidden_BTD[rows, positions].unsqueeze(0)

    with tapped(head, on_input=gather):
        yield


@contextmanager
def second_position_first(model: PreTrainedModel) -> Iterator[None]:
    """Position id 0 becomes 1 in every forward inside the block: the first token has the place of the second.

    For learned positions (GPT-2) this equals copying the second row of the position table to the first; rotary models
    turn the first token's queries and keys as they do the second's. Forwards must be given position ids, as all of this
    library's are.
    """

    def move(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = kwargs["position_ids"]
        return args, {**kwargs, "position_ids": positions.clamp(min=1)}

    handle = model.base_model.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def in_force(model: nn.Module) -> tuple[int, ...]:
    """The numbers of all hooks on a model's modules: equal where the same ones are in force (torch never gives a number
    twice). What was computed under one set does not hold under another."""
    return tuple(n for m in model.modules() for n in (*m._forward_pre_hooks, *m._forward_hooks))


def _pre_hook(tap: Tap) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        replaced = tap(hidden)
        if replaced is None:
            return None
        if args:
            return (replaced, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replaced}

    return hook


def _post_hook(tap: Tap) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            replaced = tap(output[0])
            return None if replaced is None else (replaced, *output[1:])
        return tap(output)

    return hook


def _restore_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.forward = forward

"""Keys (inputs) and outputs of the edited projection at the lookup token. Axes: B rows, K key width, D model width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.hooks import StopForward, stopping, tapped
from easyeditor.lm.loading import input_device
from easyeditor.lm.tokens import Row, model_inputs, token_batches


@torch.no_grad()
def keys_and_outputs(parts: Anatomy, layer: int, rows: Sequence[Row], batch_tokens: int) -> tuple[Tensor, Tensor]:
    """Input (B, K) and output (B, D) of the edited projection at each row's lookup token.

    Rows are cut after their lookup token, sorted by length and batched under `batch_tokens`; the forward ends at the
    projection.
    """
    keys: list[Tensor] = [torch.empty(0)] * len(rows)
    outputs: list[Tensor] = [torch.empty(0)] * len(rows)
    for chunk in token_batches([row.lookup + 1 for row in rows], batch_tokens):
        keys_BK, outputs_BD = _one_batch(parts, layer, [rows[i] for i in chunk])
        for place, i in enumerate(chunk):
            keys[i], outputs[i] = keys_BK[place], outputs_BD[place]
    return torch.stack(keys), torch.stack(outputs)


def _one_batch(parts: Anatomy, layer: int, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    lookup_B = torch.tensor([row.lookup for row in rows])
    found: dict[str, Tensor] = {}

    def at_lookup(states_BTD: Tensor) -> Tensor:
        index = torch.arange(len(rows), device=states_BTD.device)
        return states_BTD[index, lookup_B.to(states_BTD.device)].detach().clone()

    def on_input(states_BTD: Tensor) -> None:
        found["keys"] = at_lookup(states_BTD)

    def on_output(states_BTD: Tensor) -> None:
        found["outputs"] = at_lookup(states_BTD)
        raise StopForward

    inputs = model_inputs([row.ids[: row.lookup + 1] for row in rows], input_device(parts.model))
    with stopping(), tapped(parts.rewrite(layer), on_input=on_input, on_output=on_output):
        parts.model(**inputs, use_cache=False)
    return found["keys"], found["outputs"]

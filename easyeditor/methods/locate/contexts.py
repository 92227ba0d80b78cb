"""Contexts: the texts put before a prompt so that a key is averaged over many ways to arrive at the subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError
from easyeditor.base.hparams import read_json_list
from easyeditor.lm.loading import input_device
from easyeditor.lm.prefixes import caches
from easyeditor.lm.tokens import SLOT, encode

STARTERS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


def given_contexts(value: Sequence[str] | Sequence[Sequence[str]] | str) -> list[list[str]]:
    """Contexts from the hyper-parameter: a list (flat or nested) or a JSON file holding one; returned nested.

    Raises:
        ConfigError: not such a list, or a text without exactly one ``{}``.
    """
    where = f"context_templates {value}" if isinstance(value, str) else "context_templates"
    listed = read_json_list(Path(value), "context_templates") if isinstance(value, str) else list(value)
    groups = [[item] if isinstance(item, str) else list(item) for item in listed]
    if not groups or any(not group for group in groups):
        raise ConfigError(f"{where}: empty; give at least ['{SLOT}']")
    for group in groups:
        for text in group:
            if not isinstance(text, str) or text.count(SLOT) != 1:
                raise ConfigError(f"{where}: {text!r} must be a text with exactly one {SLOT} where the prompt goes")
    return groups


def generated_contexts(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    length_params: Sequence[tuple[int, int]],
    generator: torch.Generator,
) -> list[str]:
    """``{}`` and, for each (tokens, how many), texts the model itself continues from the starters by top-k sampling.

    "How many" is shared evenly by the five starters (at least one each), as in ROME (Meng et al. 2022, appendix E.5).
    """
    contexts = [SLOT]
    for length, count in length_params:
        each = max(1, count // len(STARTERS))
        prompts = [starter for starter in STARTERS for _ in range(each)]
        contexts += [_as_context(text) for text in sample(model, tok, prompts, length, generator)]
    return contexts


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    generator: torch.Generator,
) -> list[str]:
    """Continue each prompt by `new_tokens` tokens drawn among the `TOP_K` likeliest, special tokens never."""
    device = input_device(model)
    forbidden = torch.tensor(sorted(tok.all_special_ids), dtype=torch.long)
    by_length: dict[int, list[int]] = {}
    encoded = [encode(tok, prompt) for prompt in prompts]
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    continued: dict[int, str] = {}
    for members in by_length.values():  # equal lengths together: no padding, so no position depends on a neighbour
        rows_BT = torch.tensor([encoded[i] for i in members], device=device)
        rows_BT = _extend(model, rows_BT, new_tokens, forbidden, generator)
        for i, row in zip(members, rows_BT.tolist(), strict=True):
            continued[i] = tok.decode(row, skip_special_tokens=True)
    return [continued[i] for i in range(len(prompts))]


def _extend(
    model: PreTrainedModel, rows_BT: Tensor, new_tokens: int, forbidden: Tensor, generator: torch.Generator
) -> Tensor:
    cache, step_BT, cached = None, rows_BT, caches(model)
    for _ in range(new_tokens):
        output = model(input_ids=step_BT, use_cache=cached, **({"past_key_values": cache} if cached else {}))
        cache = output.past_key_values if cached else None
        # Drawn on the CPU from the CPU generator: the same seed gives the same contexts on every device.
        logits_BV = output.logits[:, -1].float().cpu()
        logits_BV[:, forbidden[forbidden < logits_BV.shape[1]]] = -torch.inf  # a tokenizer may have more than the model
        top = logits_BV.topk(min(TOP_K, logits_BV.shape[1]), dim=1)
        choice_B1 = torch.multinomial(top.values.softmax(1), 1, generator=generator)
        step_BT = top.indices.gather(1, choice_B1).to(rows_BT.device)
        rows_BT = torch.cat([rows_BT, step_BT], dim=1)
        step_BT = rows_BT if cache is None else step_BT  # a model without a cache reads it all again
    return rows_BT


def _as_context(text: str) -> str:
    """The text as a prefix sentence; braces of its own would look like a second slot."""
    return text.replace("{", " ").replace("}", " ") + ". " + SLOT

"""Continuations of prompts: greedy or top-k, with a natural stop; no number depends on the batch or the padding side.

Axes: B rows still going, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.process import look
from easyeditor.base.progress import Progress
from easyeditor.lm.architectures import max_positions
from easyeditor.lm.budget import Budget
from easyeditor.lm.hooks import selected_head
from easyeditor.lm.loading import input_device
from easyeditor.lm.prefixes import caches
from easyeditor.lm.prompting import PLAIN, Prompting
from easyeditor.lm.tokens import answered, check_length, encode, model_inputs
from easyeditor.values.request import EditRequest

Stop = Literal["newline", "period", "paragraph"]
STOPS: dict[Stop, str] = {"newline": "\n", "period": ".", "paragraph": "\n\n"}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a text goes on: `tokens` new ones at most (the prompt's counted too with `count_prompt`), the likeliest one
    each time or one drawn among the `top_k` likeliest, up to an end-of-text token (`eos`) or one of `stops`.
    `prompting` says whether the prompt is a chat's turn."""

    tokens: int
    count_prompt: bool = False
    top_k: int = 1
    eos: bool = True
    stops: tuple[Stop, ...] = ()
    seed: int = 0
    prompting: Prompting = PLAIN


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A continuation: `text` without the prompt and without what ended it, `whole` with the prompt, `stop` why it
    ended (`eos`, one of `STOPS`, `max_tokens`), `tokens` how many were generated, and which (`ids`): a stop among
    them, an end-of-text token not."""

    text: str
    whole: str
    stop: str
    tokens: int
    ids: tuple[int, ...] = ()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    batch_tokens: int = 8192,
    budget: Budget | None = None,
    progress: Progress | None = None,
    requests: Sequence[EditRequest] = (),
) -> list[Generated]:
    """Continue every prompt. Draws depend on the seed and the prompt alone, so a batch equals its prompts one by one.
    A `budget` that outlives the call takes the place of `batch_tokens`. `requests` are those that the prompts are
    of: a message names the field.

    Raises:
        DataError: a prompt with its continuation is longer than the model's positions.
    """
    rows = [_Row(encode(tok, prompt, decoding.prompting), prompt, decoding) for prompt in prompts]
    encoded = [row.ids for row in rows]
    longest = [len(row.ids) + row.limit for row in rows]
    if rows:
        check_length(
            [range(n) for n in longest],
            max_positions(model),
            lambda i: answered(requests, prompts[i], "its continuation"),
        )
    done = 0

    def go_on(batch: list[int]) -> None:
        nonlocal done
        for i in batch:
            rows[i] = _Row(encoded[i], prompts[i], decoding)
        _continue(model, tok, [rows[i] for i in batch if rows[i].limit > 0])
        done += len(batch)
        if progress is not None:
            progress(done, len(rows), "continuations")

    budget = Budget(batch_tokens) if budget is None else budget
    budget.each(longest, go_on)
    return [_result(tok, row) for row in rows]


@dataclass
class _Row:
    ids: list[int]
    prompt: str
    decoding: Decoding
    made: list[int] = field(default_factory=list)
    stop: str = "max_tokens"
    head: str | None = None
    """The prompt's ids as text, decoded once somebody asks."""

    def __post_init__(self) -> None:
        used = len(self.ids) if self.decoding.count_prompt else 0
        self.limit = max(0, self.decoding.tokens - used)
        seed = hashlib.sha256(f"{self.decoding.seed} {self.prompt}".encode()).digest()[:8]
        self.generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)

    def take(self, token: int, ends: set[int], tok: PreTrainedTokenizerBase) -> bool:
        """Add one token; True when the row is done."""
        if self.decoding.eos and token in ends:
            self.stop = "eos"
            return True
        self.made.append(token)
        text = _text(tok, self) if self.decoding.stops else ""
        for name in self.decoding.stops:
            if STOPS[name] in text:
                self.stop = name
                return True
        return len(self.made) >= self.limit

    def draw(self, logits_V: Tensor) -> int:
        """One of the `top_k` likeliest; `logits_V` on the CPU."""
        top = logits_V.topk(min(self.decoding.top_k, len(logits_V)))
        place = torch.multinomial(top.values.softmax(0), 1, generator=self.generator)
        return int(top.indices[place])


def _continue(model: PreTrainedModel, tok: PreTrainedTokenizerBase, rows: list[_Row]) -> None:
    """Run rows of one batch to their end: padded on the left with explicit positions; rows that are done leave."""
    if not rows:
        return
    device, ends = input_device(model), _ends(model, tok)
    if not caches(model):
        return _reread(model, tok, rows, ends)
    width = max(len(row.ids) for row in rows)
    step_BT = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    while rows:
        look()
        last_B = torch.full((len(rows),), step_BT.shape[1] - 1)
        with selected_head(model, torch.arange(len(rows)), last_B):
            output = model(
                input_ids=step_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        tokens = _chosen(output.logits[0], rows)
        going = [i for i, row in enumerate(rows) if not row.take(tokens[i], ends, tok)]
        if len(going) < len(rows) and going:
            kept = torch.tensor(going)  # on the host: every card takes it as the index of its own layers
            cache.batch_select_indices(kept)
            mask_BT = mask_BT[kept]
        rows = [rows[i] for i in going]
        if rows:
            step_BT = torch.tensor([[row.made[-1]] for row in rows]).to(device, non_blocking=True)
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
            positions_BT = mask_BT.sum(1, keepdim=True) - 1


def _reread(model: PreTrainedModel, tok: PreTrainedTokenizerBase, rows: list[_Row], ends: set[int]) -> None:
    """The same where nothing is kept from token to token: every step reads the rows whole, padded on the right."""
    while rows:
        whole = [row.ids + row.made for row in rows]
        with selected_head(model, torch.arange(len(rows)), torch.tensor([len(ids) - 1 for ids in whole])):
            logits_1BV = model(**model_inputs(whole, input_device(model)), use_cache=False).logits
        tokens = _chosen(logits_1BV[0], rows)
        rows = [row for row, token in zip(rows, tokens, strict=True) if not row.take(token, ends, tok)]


def _chosen(logits_BV: Tensor, rows: Sequence[_Row]) -> list[int]:
    """The next token of every row; the host waits once for all of them."""
    if rows[0].decoding.top_k == 1:
        likeliest: list[int] = logits_BV.argmax(-1).tolist()
        return likeliest
    return [row.draw(logits_V) for row, logits_V in zip(rows, logits_BV.float().cpu(), strict=True)]


def _result(tok: PreTrainedTokenizerBase, row: _Row) -> Generated:
    text = _text(tok, row)
    whole = tok.decode(row.ids + row.made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if row.decoding.prompting.chat:
        whole = f"{row.prompt}\n{text}"  # what was said, without the template's own words
    if row.stop in STOPS:
        text = text.split(STOPS[row.stop])[0]
    return Generated(text=text, whole=whole, stop=row.stop, tokens=len(row.made), ids=tuple(row.made))


def _text(tok: PreTrainedTokenizerBase, row: _Row) -> str:
    """What was made, as it follows the prompt (a tokenizer may drop the space of a text's first word)."""
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    if row.head is None:
        row.head = str(tok.decode(row.ids, **options))
    whole = tok.decode(row.ids + row.made, **options)
    return str(whole[len(row.head) :] if whole.startswith(row.head) else tok.decode(row.made, **options))


def _ends(model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> set[int]:
    """End-of-text ids: the tokenizer's and those the model's generation settings name."""
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {i for i in [tok.eos_token_id, *listed] if i is not None}

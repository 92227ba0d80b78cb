"""Text to token ids: the one place for prompts and targets, lookup tokens, special tokens and padding.

Prompts and targets are joined as ids, never as decoded text, so a target may be cut inside a character. Rows are padded
on the right here whatever the tokenizer's own side, and positions are explicit, so neither matters to any number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError, DataError, ModelError
from easyeditor.lm.joining import joined, opening
from easyeditor.lm.prompting import PLAIN, Prompting, Turn, assistant_text, user_turn
from easyeditor.values.request import TEXT_FIELDS, EditRequest

SLOT = "{}"
_UNEMBEDDED = "easyeditor_unembedded"  # of a tokenizer: special tokens beyond the model's embeddings


@dataclass(frozen=True)
class Row:
    """One token sequence; `lookup` is the token an edit is about, `scored` the positions whose logits are wanted."""

    ids: tuple[int, ...]
    lookup: int
    scored: tuple[int, ...] = ()


def encode(tok: PreTrainedTokenizerBase, text: str, prompting: Prompting | None = None) -> list[int]:
    """Ids of a text that starts a sequence: with leading special tokens (BOS), without trailing ones.

    With a `prompting` the text is a prompt, ready for its target: the last blank goes to that; in a chat it is the
    user's turn, up to where the assistant's begins.
    """
    chat = prompting is not None and prompting.chat
    return _ids(tok, text if prompting is None else _prompt(tok, text, prompting).text, chat=chat)


def _prompt(tok: PreTrainedTokenizerBase, text: str, prompting: Prompting) -> Turn:
    return user_turn(tok, text, prompting) if prompting.chat else Turn(opening(text, prompting.space), 0)


def tell_unembedded(tok: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """From now on a text that holds one of these tokens is refused: the model has no embedding for them."""
    setattr(tok, _UNEMBEDDED, frozenset(ids))


def _known(tok: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[int]:
    """The ids, all of them with an embedding. Raises DataError."""
    beyond: frozenset[int] = getattr(tok, _UNEMBEDDED, frozenset())
    if found := beyond.intersection(ids):
        token = tok.convert_ids_to_tokens(min(found))
        raise DataError(
            f"{text!r:.200} holds the token {token!r} (id {min(found)}), for which the model has no embedding; write "
            "the text without it"
        )
    return ids


def _ids(tok: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Ids of a whole text; a templated one brings its special tokens along."""
    if chat:
        return _known(tok, list(tok(text, add_special_tokens=False)["input_ids"]), text)
    encoded = tok(text, return_special_tokens_mask=True)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while len(ids) > 1 and special[-1]:
        ids.pop()
        special.pop()
    return _known(tok, ids, text)


def begins_texts_with_bos(tok: PreTrainedTokenizerBase) -> bool:
    """Does the tokenizer put a BOS before a text of its own accord?"""
    return tok.bos_token_id is not None and encode(tok, "a")[:1] == [tok.bos_token_id]


def without_bos(tok: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that puts no BOS before a text. Raises ConfigError: it puts none as it is."""
    if not begins_texts_with_bos(tok):
        raise ConfigError("this tokenizer begins no text with a BOS, so there is none to leave out")
    bare = copy.deepcopy(tok)
    bare.add_bos_token = False
    assert not begins_texts_with_bos(bare)
    return bare


def target_ids(tok: PreTrainedTokenizerBase, prompt: str, target: str, prompting: Prompting = PLAIN) -> list[int]:
    """Ids of `target` as they follow `prompt`: the tail of the tokenised whole, so no BOS can come between them.

    Where the tokenizer merges across the border, the target is encoded alone instead; one that begins without white
    space behind a line's end, or a tokenizer may put a blank before it. An EOS, if wanted, is the last.

    Raises:
        DataError: the target has no tokens.
    """
    before, after = joined(prompt, target, prompting.space)
    if prompting.chat:
        before, after = user_turn(tok, prompt, prompting).text, assistant_text(tok, prompt, target, prompting)
    ids = _behind(tok, before, after, chat=prompting.chat)
    if not ids and not after[:1].isspace():
        ids = _behind(tok, "\n", after, chat=prompting.chat)
    if not ids:
        ids = _known(tok, list(tok(after, add_special_tokens=False)["input_ids"]), target)
    if not ids:
        raise DataError(f"target {target!r} has no tokens in this tokenizer")
    return [*ids, int(tok.eos_token_id)] if prompting.eos else ids


def _behind(tok: PreTrainedTokenizerBase, before: str, after: str, *, chat: bool) -> list[int]:
    """Ids of `after` in the tokenised whole; none where the tokenizer merges across the border."""
    whole, head = _ids(tok, before + after, chat=chat), _ids(tok, before, chat=chat)
    return whole[len(head) :] if whole[: len(head)] == head else []


def lookup_index(
    tok: PreTrainedTokenizerBase,
    before: str,
    subject: str,
    after: str,
    fact_token: str,
    prompting: Prompting = PLAIN,
) -> int:
    """Index of the token an edit is about in `before + subject + after`, special tokens counted.

    `subject_last` and `subject_first` are the tokens that hold the subject's last and first character,
    `subject_first_after_last` the one after (the last one if nothing follows), `last` the prompt's last token: in a
    chat the last one before the assistant's turn.
    """
    turn = _prompt(tok, before + subject + after, prompting)
    text, offset = turn.text, turn.offset
    ids = _ids(tok, text, chat=prompting.chat)
    if fact_token == "last":
        return len(ids) - 1
    first_char = offset + len(before) + len(subject) - len(subject.lstrip())
    last_char = offset + len(before) + len(subject.rstrip()) - 1
    if fact_token == "subject_first":
        return _token_holding(tok, text, first_char, prompting, first=True)
    last = _token_holding(tok, text, last_char, prompting, first=False)
    if fact_token == "subject_last":
        return last
    if fact_token == "subject_first_after_last":
        return min(last + 1, len(ids) - 1)
    raise AssertionError(f"fact_token {fact_token!r}")


def sent(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor on a device, copied without synchronising it: `torch.tensor(..., device=...)`, a blocking
    copy and a list as an index would each wait for all that the device has to do."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and mask (B, T). Pads are id 0: masked, never read."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)  # nobody waits for what is sent


def model_inputs(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """What a decoder needs and nothing else: no token_type_ids, explicit positions that do not count pads."""
    ids, mask = pad(rows, device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def check_length(
    rows: Sequence[Sequence[int]], limit: int | None, what: Callable[[int], str], ways: str = "shorten it"
) -> None:
    """Raise DataError if a row is longer than the model or the settings allow; `what` names row i, `ways` the ways
    out."""
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if limit is not None and len(rows[longest]) > limit:
        raise DataError(
            f"{what(longest)} has {len(rows[longest])} tokens; the limit is {limit} (max_length, or the model's "
            f"positions); {ways}"
        )


def whole(request: EditRequest) -> str:
    """What an edit trains on, as a message names it."""
    return f"request {request.case_id!r}: prompt with target_new"


def answered(requests: Sequence[EditRequest], text: str, by: str = "its answer") -> str:
    """The field that a text measured came from, as a message names it: the longest prompt that is in the text."""
    found = [
        (len(prompt), f"request {r.case_id!r}: {name}")
        for r in requests
        for name, prompts in (
            *(("prompt", (r.prompt,)), ("rephrase_prompt", r.rephrase_prompts)),
            *((name, getattr(r, name)) for name in TEXT_FIELDS[:2]),
            *(
                (f"{kind}.{key}", p.prompts)
                for kind in ("locality", "portability")
                for key, p in getattr(r, kind).items()
            ),
        )
        for prompt in prompts
        if prompt in text
    ]
    return f"{max(found, default=(0, f'the prompt {text!r:.60}'))[1]} with {by}"


def token_batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Indices sorted by length, cut into batches that waste little.

    A padded batch has at most `most_tokens` positions (a single longer row is alone), and at most 1/16 of that
    are pads.
    """
    batches: list[list[int]] = []
    held = 0  # real tokens in the last batch
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        held += lengths[i]
        if batches and padded <= most_tokens and padded - held <= most_tokens // 16:
            batches[-1].append(i)
        else:
            batches.append([i])
            held = lengths[i]
    return batches


def _token_holding(tok: PreTrainedTokenizerBase, text: str, char: int, prompting: Prompting, *, first: bool) -> int:
    if not tok.is_fast:
        return _counted(tok, text, char, prompting, first=first)
    encoded: Any = tok(
        text,
        add_special_tokens=not prompting.chat,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    holders = [
        i
        for i, ((start, end), special) in enumerate(
            zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        )
        if start <= char < end and not (special and start == end)
    ]
    if not holders:
        raise ModelError(f"the tokenizer gives no token for character {char} of {text!r}")
    return min(holders) if first else max(holders)


def _counted(tok: PreTrainedTokenizerBase, text: str, char: int, prompting: Prompting, *, first: bool) -> int:
    """`_token_holding` of a slow tokenizer, which has no offsets: the tokens are read back, one more at a time. The
    first that holds the character comes when all before it is read, or adds a part of it (which reads as a character
    or as nothing); the last makes it whole."""
    ids = _ids(tok, text, chat=prompting.chat)
    start = len(ids) - len(tok(text, add_special_tokens=False)["input_ids"])
    read = [str(tok.decode(ids[start : n + 1], clean_up_tokenization_spaces=False)) for n in range(start, len(ids))]
    if read[-1:] != [text]:  # one that changes the text: as many tokens as the text up to the character has
        return len(_ids(tok, text[: char + 1], chat=prompting.chat)) - 1
    before = ["", *read]
    for n, part in enumerate(read):
        if (first and before[n].startswith(text[:char])) or (len(part) > char and (first or part[char] == text[char])):
            return start + n
    raise AssertionError("the whole text was read back")

"""How a prompt and its answer become the text a model is given: as they are, or as two turns of a chat."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyeditor.base.errors import ModelError
from easyeditor.base.files import parse_json
from easyeditor.base.hparams import HyperParams
from easyeditor.lm.joining import Space
from easyeditor.lm.rendering import rendered

_DAY = {"%Y": "2024", "%y": "24", "%B": "July", "%b": "Jul", "%m": "07", "%d": "26", "%-d": "26", "%A": "Friday"}
_DAY |= {"%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}
_ONE_DAY = "{%- macro strftime_now(form) -%}{{ form"
_ONE_DAY += "".join(f" | replace('{sign}', '{said}')" for sign, said in _DAY.items()) + " }}{%- endmacro %}\n"
"""Stands before a chat template, on a line of its own, which is rendered as nothing: a template that asks for the day
is always told the same, so that a run gives the same edit on another day. (No function of ours can be handed to it.)"""

MARK, ANSWER = "\u2042user\u2042", "\u2042answer\u2042"
"""Stand for a turn's text while the template's own text around it is found."""
_TAG = re.compile(r"[<\[\u25c1][^<>\[\]\u25c1\u25b7\s]+[>\]\u25b7]")
_THOUGHT = re.compile(r"think|thought|reason|reflect|scratch", re.IGNORECASE)
_CLOSING = re.compile(r".?/|.*(end|close)", re.IGNORECASE)


@dataclass(frozen=True)
class Prompting:
    """What is done to every prompt and answer, of requests and of evaluation alike.

    With `chat` a prompt is the user's turn in the tokenizer's own chat template, the generation prompt after it, and an
    answer is the beginning of the assistant's turn. What comes before a prompt (a context, a test-time prefix) is
    inside the user's turn, before it; "{subject} is a", which the KL term watches, is a user's turn too. The subject is
    looked up where the prompt is in the templated text. Texts of perplexity, statistics and generated contexts are
    no prompts: they stay as they are. With `eos` an answer ends with the tokenizer's EOS.
    """

    chat: bool = False
    eos: bool = False
    space: Space = "auto"
    """Of `target_space`: what comes between a prompt and its answer where they are no turns of a chat."""
    template_kwargs: str = "{}"
    """What the template is told besides the turns (`enable_thinking` …), as JSON: a decoding is a key of mappings."""

    @classmethod
    def of(cls, hparams: HyperParams) -> Prompting:
        """What the hyper-parameters say."""
        said = json.dumps(hparams.chat_template_kwargs, sort_keys=True)
        return cls(hparams.chat_template, hparams.target_eos, hparams.target_space, said)

    def checked(self, tok: PreTrainedTokenizerBase) -> Prompting:
        """Itself. Raises ModelError if the tokenizer lacks what it needs."""
        if self.chat and not has_template(tok):
            raise ModelError(
                "chat_template: the tokenizer has no chat template; set chat_template: false, or load a chat model "
                "with its own tokenizer"
            )
        if self.chat:
            user_turn(tok, "a", self)
            _check_place(tok, self)
        if self.eos and tok.eos_token_id is None:
            raise ModelError("target_eos: the tokenizer has no EOS token; set target_eos: false or give it one")
        return self


PLAIN = Prompting()


@dataclass(frozen=True)
class Turn:
    """A templated prompt; character c of the prompt is character `offset` + c of `text`."""

    text: str
    offset: int


def has_template(tok: PreTrainedTokenizerBase) -> bool:
    """Has the tokenizer a chat template of its own?"""
    return bool(tok.chat_template)


def user_turn(tok: PreTrainedTokenizerBase, prompt: str, prompting: Prompting = PLAIN) -> Turn:
    """The prompt as the user's turn, ready for the assistant's. A template may drop white space around it.

    Raises:
        ModelError: the template fails, or changes the prompt otherwise.
    """
    head, mark, tail = _rendered(tok, prompting, MARK).partition(MARK)
    whole = _rendered(tok, prompting, prompt)
    for said, cut in ((prompt, 0), (prompt.strip(), len(prompt) - len(prompt.lstrip()))):
        if mark and whole == head + said + tail:
            return Turn(whole, len(head) - cut)
    raise ModelError(
        f"the tokenizer's chat template does not hold the user's text as it is ({prompt!r:.80}), so no token of it can "
        "be found; set chat_template: false"
    )


def assistant_text(tok: PreTrainedTokenizerBase, prompt: str, answer: str, prompting: Prompting = PLAIN) -> str:
    """The answer as it begins the assistant's turn: behind the space the template puts there, if it puts any."""
    bare, before = answer.strip(), user_turn(tok, prompt, prompting).text
    whole = _rendered(tok, prompting, prompt, bare)
    rest = whole[len(before) :] if whole.startswith(before) else ""
    gap = rest[: len(rest) - len(rest.lstrip())]
    return gap + bare if rest.startswith(gap + bare) else bare


def _check_place(tok: PreTrainedTokenizerBase, prompting: Prompting) -> None:
    """Raise ModelError where an answer would be among a thinking model's thoughts, or anywhere else than where the
    template itself has answers begin."""
    before = _rendered(tok, prompting, MARK)
    told, why = "enable_thinking" in parse_json(prompting.template_kwargs), ""
    thoughts = [tag for tag in _TAG.findall(before.partition(MARK)[2]) if _THOUGHT.search(tag)]
    if not told and re.search(r"\benable_thinking\b", str(tok.get_chat_template())):
        why = "the template takes enable_thinking, and nothing was said"
    elif thoughts and not _CLOSING.match(thoughts[-1]):
        why = f"the generation prompt ends inside an open block, {thoughts[-1]}"
    elif not told:
        whole = _rendered(tok, prompting, MARK, ANSWER).partition(ANSWER)[0]
        if _TAG.findall(before) != _TAG.findall(whole):
            why = f"the generation prompt ends with {before[-40:]!r}, and an answer of the template's own comes "
            why += f"behind {whole[-40:]!r}"
    if why:
        raise ModelError(
            f"chat_template: where does an answer begin? {why[0].upper()}{why[1:]}; say it in chat_template_kwargs, "
            "such as {enable_thinking: false}, or set chat_template: false"
        )


def _rendered(tok: PreTrainedTokenizerBase, prompting: Prompting, prompt: str, answer: str | None = None) -> str:
    turns: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    said = parse_json(prompting.template_kwargs)
    if taken := sorted(said.keys() & signature(tok.apply_chat_template).parameters.keys() - {"tools", "documents"}):
        raise ModelError(f"chat_template_kwargs: {taken[0]!r} says how a template is used, and is none of its values")
    told = {**tok.special_tokens_map, **said, "add_generation_prompt": answer is None}
    try:
        return rendered(_ONE_DAY + tok.get_chat_template(), turns, told)
    except ValueError as error:
        raise ModelError(f"the tokenizer's chat template fails ({error})") from error

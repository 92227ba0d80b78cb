"""How a prompt and its answer become the text a model is given: as they stand, or as two turns of a chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyeditor.errors import ModelError

_DAY = {"%Y": "2024", "%y": "24", "%B": "July", "%b": "Jul", "%m": "07", "%d": "26", "%-d": "26", "%A": "Friday"}
_DAY |= {"%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}
_ONE_DAY = "{%- macro strftime_now(form) -%}{{ form"
_ONE_DAY += "".join(f" | replace('{sign}', '{said}')" for sign, said in _DAY.items()) + " }}{%- endmacro %}\n"
"""Stands before a chat template, on a line of its own, which is rendered as nothing: a template that asks for the day
is always told the same, so that a run gives the same edit on another day. (No function of ours can be handed to it.)"""

MARK = "\u2042user\u2042"  # stands for a turn's text while the template's own text around it is found


@dataclass(frozen=True)
class Prompting:
    """What is done to every prompt and answer, of requests and of evaluation alike.

    With `chat` a prompt is the user's turn in the tokenizer's own chat template, the generation prompt after it, and an
    answer is the beginning of the assistant's turn. What stands before a prompt (a context, a test-time prefix) stands
    inside the user's turn, before it; "{subject} is a", which the KL term watches, is a user's turn too. The subject is
    looked up where the prompt stands in the templated text. Texts of perplexity, statistics and generated contexts are
    no prompts: they stay as they are. With `eos` an answer ends with the tokenizer's EOS.
    """

    chat: bool = False
    eos: bool = False

    def checked(self, tok: PreTrainedTokenizerBase) -> Prompting:
        """Itself. Raises ModelError if the tokenizer lacks what it needs."""
        if self.chat and not has_template(tok):
            raise ModelError(
                "chat_template: the tokenizer has no chat template; set chat_template: false, or load a chat model "
                "with its own tokenizer"
            )
        if self.chat:
            user_turn(tok, "a")
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


def user_turn(tok: PreTrainedTokenizerBase, prompt: str) -> Turn:
    """The prompt as the user's turn, ready for the assistant's. A template may drop white space around it.

    Raises:
        ModelError: the template fails, or changes the prompt otherwise.
    """
    head, mark, tail = _rendered(tok, MARK).partition(MARK)
    whole = _rendered(tok, prompt)
    for said, cut in ((prompt, 0), (prompt.strip(), len(prompt) - len(prompt.lstrip()))):
        if mark and whole == head + said + tail:
            return Turn(whole, len(head) - cut)
    raise ModelError(
        f"the tokenizer's chat template does not hold the user's text as it is ({prompt!r:.80}), so no token of it can "
        "be found; set chat_template: false"
    )


def assistant_text(tok: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    """The answer as it begins the assistant's turn: behind the space the template puts there, if it puts any."""
    bare, before = answer.strip(), user_turn(tok, prompt).text
    whole = _rendered(tok, prompt, bare)
    rest = whole[len(before) :] if whole.startswith(before) else ""
    gap = rest[: len(rest) - len(rest.lstrip())]
    return gap + bare if rest.startswith(gap + bare) else bare


def _rendered(tok: PreTrainedTokenizerBase, prompt: str, answer: str | None = None) -> str:
    turns: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        template = _ONE_DAY + tok.get_chat_template()
        asked = {"tokenize": False, "add_generation_prompt": answer is None, "chat_template": template}
        return str(tok.apply_chat_template(turns, **asked))
    except Exception as error:  # a template is the checkpoint's own program, and may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the tokenizer's chat template fails ({type(error).__name__}: {reason})") from error

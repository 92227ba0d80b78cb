"""Where a prompt ends and its target begins: with one space between them, or none (`target_space`)."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Space = Literal["auto", "always", "never"]

_LOOKED_AT = 200  # characters of a prompt's end; what comes further before it (a context) decides nothing
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u312f\u3190-\u31ff\u3220-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\uffe0-\uffe6"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"  # Chinese, Japanese and their full-width signs
)
_JOINS = re.compile(
    r"""[\s\u200b\u2060¿¡@\\‘]\Z                       # white space, and signs that belong to what follows
    |(?<![\w#])\#\Z                                    # number sign, not "C#"
    |(?<![^\s([{<=:/–—-])(?:["'’“”„‟«»‹›]|`+|"{3})\Z    # a quote opens: what may come before it
    |(?<=[^\s/&+=|~^_‐‑–—-])[/&+=|~^_‐‑–—-]+\Z           # behind a dash, slash … as before it
    |(?:::|->)\Z""",
    re.VERBOSE,
)
_CLOSED = re.compile(r"«[^«»]*»\Z|‹[^‹›]*›\Z|(?<!\w)['‘](?:[^'‘’]|(?<=\w)['’](?=\w))*['’]\Z")
_ELIDED = re.compile(r"(?<![^\W\d_])(?:[^\W\d_]|[^\W\d_]+[^\W\d_sxzSXZ])['’]\Z")  # l', dell', not dogs'
_CODE = re.compile(r"[^\W\d]\w*(?:[(\[_=]|\.\w)")
_FOLLOWS = re.compile(
    r"""[,;:!?…،؛؟।॥]|\.(?!\d)            # closing punctuation
    |['’](?:s|t|d|m|re|ve|ll)\b|n['’]t\b  # contractions
    |["'’`”“»«›‹](?!\w)""",
    re.VERBOSE,
)


def opening(prompt: str, space: Space) -> str:
    """The prompt as it is tokenised: a last blank goes to the target's first token, as it does in running text.
    EasyEdit (`always`) leaves it where it is."""
    return prompt if space == "always" or not prompt.endswith(" ") else prompt[:-1] or prompt


def joined(prompt: str, target: str, space: Space) -> tuple[str, str]:
    """The prompt as it is tokenised, and the target as it follows it.

    `always` puts one space before a target that brings no white space; `never` adds none. `auto` adds one unless the
    texts say otherwise: none behind white space, an opening bracket or quote, an apostrophe, a sign that belongs to
    what follows (currency, @, #), a dash or slash without a space before it; none before closing punctuation; none
    where either side is of a script that writes none.
    """
    if space == "always":
        return prompt, spaced(target)
    head = opening(prompt, space)
    if head != prompt:
        return head, " " + (target.removeprefix(" ") if space == "auto" else target)
    return prompt, target if space == "never" or not _apart(prompt[-_LOOKED_AT:], target) else spaced(target)


def spaced(target: str) -> str:
    """The target with one space before it, unless it brings white space of its own."""
    return target if target[:1].isspace() else " " + target


def _apart(prompt: str, target: str) -> bool:
    """Does running text have a space between them?"""
    last, first = prompt[-1:], target[:1]
    if not last or _UNSPACED.match(last) or _UNSPACED.match(first):
        return not last
    if unicodedata.category(first) == "Pe" or _FOLLOWS.match(target):
        return False
    if last.isdigit() and first in "%°‰":
        return False
    if unicodedata.category(last) in ("Ps", "Sc"):  # a currency sign behind a number belongs to it
        return unicodedata.category(last) == "Sc" and re.search(r"\d\s?\Z", prompt[:-1]) is not None
    if last == ".":  # df.to_csv(, 3.14; else a sentence or an abbreviation ends
        return not (re.search(r"\d\.\Z", prompt) and first.isdigit()) and not _CODE.match(target)
    return _CLOSED.search(prompt) is not None or not (_JOINS.search(prompt) or _ELIDED.search(prompt))

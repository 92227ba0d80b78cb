"""Texts that come from outside: visible, of a bounded length, such that UTF-8 can hold them."""

from __future__ import annotations

from typing import Any

from easyeditor.base.errors import DataError
from easyeditor.base.files import check_value

MAX_TEXT = 100_000
"""Most characters of a text: a prompt has at most a few thousand tokens, and one long word takes a tokenizer long."""
NO_TEXT = f"is not UTF-8 text of at most {MAX_TEXT} characters"
"""What is wrong with a text that is none."""


def is_text(value: Any) -> bool:
    """Is this a text with something visible in it, that UTF-8 can hold, of at most `MAX_TEXT` characters?"""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        return False
    try:
        check_value(value)
    except ValueError:  # half of a surrogate pair
        return False
    return True


def listed_texts(value: Any, where: str) -> tuple[str, ...]:
    """A text, or a list of some; () of None. Raises DataError that starts with `where`."""
    texts = as_list(value)
    if not all(map(is_text, texts)):
        raise DataError(f"{where} must be non-empty texts, found {texts!r:.200}")
    return texts


def as_list(value: Any) -> tuple[Any, ...]:
    """A value, or a list of some; () of None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)

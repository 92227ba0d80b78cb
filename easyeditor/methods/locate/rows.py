"""Token rows of a request: prompts behind contexts, prompts with their target, and the row the KL term watches."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from easyeditor.lm.prompting import PLAIN, Prompting
from easyeditor.lm.tokens import SLOT, Row, encode, lookup_index, target_ids
from easyeditor.values.edit import EditRequest

KL_AFTER = " is a"  # the KL term watches what follows the subject in "{subject} is a"


def prompt_row(
    tok: PreTrainedTokenizerBase,
    request: EditRequest,
    context: str,
    fact_token: str,
    prompting: Prompting = PLAIN,
) -> Row:
    """The request's prompt in one context, up to its lookup token."""
    before, after = context.split(SLOT)
    ids = encode(tok, before + request.prompt + after, prompting)
    parts = (before + request.before, request.subject, request.after + after)
    lookup = lookup_index(tok, *parts, fact_token, prompting)
    return Row(ids=tuple(ids), lookup=lookup)


def target_rows(
    tok: PreTrainedTokenizerBase,
    request: EditRequest,
    contexts: Sequence[str],
    fact_token: str,
    prompting: Prompting = PLAIN,
) -> tuple[list[Row], list[list[int]]]:
    """One row per context, prompt and all target tokens but the last; and the target ids its last positions predict."""
    rows, labels = [], []
    for context in contexts:
        row = prompt_row(tok, request, context, fact_token, prompting)
        target = target_ids(tok, context.replace(SLOT, request.prompt), request.target_new, prompting)
        ids = (*row.ids, *target[:-1])
        rows.append(Row(ids=ids, lookup=row.lookup, scored=tuple(range(len(row.ids) - 1, len(ids)))))
        labels.append(target)
    return rows, labels


def kl_row(tok: PreTrainedTokenizerBase, request: EditRequest, fact_token: str, prompting: Prompting = PLAIN) -> Row:
    """ "{subject} is a" up to the lookup token, whose next-token distribution the KL term holds in place.

    What follows the lookup token cannot matter in a causal model and is left out.
    """
    lookup = lookup_index(tok, "", request.subject, KL_AFTER, fact_token, prompting)
    ids = encode(tok, request.subject + KL_AFTER, prompting)[: lookup + 1]
    return Row(ids=tuple(ids), lookup=lookup, scored=(lookup,))

"""Recording: every block runs once over a token, keys come along, what requests share is made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, build, relative, rome_hparams, tokenizer
from golden_numbers import request
from test_memit import golden_method
from test_replay import MIXED, REQUESTS, model

from easyeditor import EditRequest
from easyeditor.lm import recording
from easyeditor.lm.discover import anatomy
from easyeditor.lm.hooks import second_position_first
from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import SLOT, Row, encode
from easyeditor.lm.weights import add, applied, version
from easyeditor.methods.memit.method import MEMIT
from easyeditor.methods.rome.method import ROME
from easyeditor.values.edit import WeightDelta

LAYER, BLOCKS, PASSES = 1, 4, 3
REQUEST = REQUESTS["middle"]


@contextmanager
def tokens_run(lm: Any) -> Iterator[list[int]]:
    """How many tokens every block ran over."""
    found = [0] * BLOCKS
    handles = []
    for number, block in enumerate(anatomy(lm).blocks):

        def count(_module: Any, _args: Any, output: Any, number: int = number) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found[number] += states.shape[0] * states.shape[1]

        handles.append(block.mlp.register_forward_hook(count))
    yield found
    for handle in handles:
        handle.remove()


def method(lm: Any, **changes: Any) -> ROME:
    pair = lm, tokenizer()
    changes = {"v_num_grad_steps": PASSES, "context_templates": MIXED, "layers": [LAYER], **changes}
    return ROME(*pair, rome_hparams(pair, **changes))


def starts() -> list[list[int]]:
    return [ids for text in MIXED if (ids := encode(tokenizer(), text.split(SLOT)[0].rstrip()))]


def begun(row: Row) -> int:
    """Tokens that a row shares with the start of a context, before its lookup token."""
    before = row.ids[: row.lookup]
    return max((len(ids) for ids in starts() if before[: len(ids)] == tuple(ids)), default=0)


def test_a_block_runs_once_over_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand, rows one by one so that there are no pads: below the edit all tokens once and no look-up; above
    it what stands before the lookup token once, and the suffixes in every pass."""
    monkeypatch.setattr(recording, "RECORD_TOKENS", {"cpu": 1, "cuda": 1})
    lm = build("llama")
    rome = method(lm)
    rows = rome.search_rows(REQUEST)[0]
    shared, left = sum(map(len, starts())), sum(row.lookup - begun(row) for row in rows)
    rest = sum(len(row.ids) - begun(row) for row in rows)
    suffixes = PASSES * len(rows) * max(len(row.ids) - row.lookup for row in rows)
    assert 0 < left < sum(row.lookup for row in rows)
    with tokens_run(lm) as ran:
        rome.edit([REQUEST])
    last = suffixes  # of the last block's recording only keys and values are asked for
    assert ran == [shared + rest, shared + rest, shared + left + suffixes, last]


def test_what_requests_share_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second edit goes on from the contexts' own caches, also after one that was measured and taken back; not on
    other weights, nor with other positions."""
    monkeypatch.setattr(recording, "RECORD_TOKENS", {"cpu": 1, "cuda": 1})
    lm, shared = build("llama"), sum(map(len, starts()))
    rome = method(lm)
    with tokens_run(lm) as ran:
        result = rome.edit([REQUEST])
        first = ran[0]
        with applied(lm, result.deltas):
            pass
        again = rome.edit([REQUEST])
        assert ran[0] == 2 * first - shared
        assert torch.equal(again.deltas[0].dense(), result.deltas[0].dense())
        with second_position_first(lm):
            swapped = rome.edit([REQUEST])
        assert ran[0] == 3 * first - shared
        add(lm, result.deltas)
        rome.edit([REQUEST])
        assert ran[0] == 4 * first - shared
    with second_position_first(fresh := build("llama")):
        assert relative(swapped.deltas[0].dense(), method(fresh).edit([REQUEST]).deltas[0].dense()) < 1e-5


def test_the_version_comes_back_with_the_weights() -> None:
    lm = build("llama")
    name = anatomy(lm).weight_name(1)
    weight = lm.get_parameter(name)
    changes = [WeightDelta(name=name, full=torch.full(weight.shape, value)) for value in (0.5, 0.25)]
    seen = [version([weight])]
    for change in changes:
        with applied(lm, [change]):
            seen.append(version([weight]))
            with applied(lm, [change]):
                seen.append(version([weight]))
            assert version([weight]) == seen[-2]
        assert version([weight]) == seen[0]
    assert len(set(seen)) == 5
    with torch.no_grad():
        weight.add_(1.0)
    assert version([weight]) not in seen


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_keys_that_come_along_are_those_looked_up(kind: str) -> None:
    rome = method(model(kind))
    requests = list(REQUESTS.values())
    found = rome.values(requests, rome.parts.mlp(LAYER), LAYER, read=LAYER)
    for ours, other in zip(rome._lookups(requests, found, LAYER), rome.look_up(requests, LAYER), strict=True):
        for name in ("plain_K", "mean_K", "plain_D", "mean_D"):
            assert relative(getattr(ours, name), getattr(other, name)) < 1e-6


def test_contexts_without_the_bare_prompt_are_looked_up() -> None:
    """Its key is not among theirs."""
    texts = [text for text in MIXED if text != SLOT]
    ours, other = (method(model("llama"), context_templates=texts, replay=replay) for replay in (True, False))
    a, b = (rome.edit([REQUEST]) for rome in (ours, other))
    assert relative(a.deltas[0].dense(), b.deltas[0].dense()) < 1e-4


def test_memit_reads_its_first_layers_keys_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-ups of its later layers remain."""
    memit = golden_method("tiny-llama", v_num_grad_steps=3)
    looked_up: list[int] = []
    real = MEMIT._keys

    def counted(self: Any, layer: int, rows: Any, known: Any = None) -> Any:
        made = real(self, layer, rows, known)
        if known is not None:
            looked_up.append(layer)
            for ours, other in zip(made, real(self, layer, rows), strict=True):
                assert relative(ours, other) < 1e-6
        return made

    monkeypatch.setattr(MEMIT, "_keys", counted)
    memit.edit([request(1), request(2)])
    assert looked_up == [2]


def test_a_row_that_another_begins_with_is_not_run_twice() -> None:
    """The KL row is the start of the bare prompt where the subject comes first; other requests' rows never count."""
    rome = method(model("llama"))
    request = EditRequest.make("Bay is a town in", subject="Bay", target_new="Italy")
    rows = rome.search_rows(request)[0]
    assert rows[0].ids[: len(rows[-1].ids)] == rows[-1].ids
    parts = rome.parts
    whole = row_forward(parts, parts.mlp(LAYER), LAYER, [rows, rows], replay=True)
    alone = row_forward(parts, parts.mlp(LAYER), LAYER, [[row] for row in rows * 2], replay=True)
    assert whole.tokens_per_call == alone.tokens_per_call * (len(rows) - 1) // len(rows)
    assert relative(whole.initial_BD, alone.initial_BD) < 1e-6
    offset = torch.randn(2, whole.initial_BD.shape[1], generator=torch.Generator().manual_seed(0))
    each = offset.repeat_interleave(len(rows), 0)
    logits = alone(each).detach()
    assert relative(whole(offset).detach(), logits) < 1e-5
    assert relative(whole.narrowed([1])(offset[1:]).detach(), logits[len(logits) // 2 :]) < 1e-5

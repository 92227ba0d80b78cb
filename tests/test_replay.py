"""Replay gives the plain forward's numbers for less; no number depends on the batch or the padding side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, TINY, build, relative, rome_hparams, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from easyeditor import EditRequest
from easyeditor.evaluate.perplexity import PerplexityProbe
from easyeditor.evaluate.scoring import Scored, score
from easyeditor.lm import architectures
from easyeditor.lm.attention import NAME, short_attention
from easyeditor.lm.budget import Budget
from easyeditor.lm.discover import anatomy
from easyeditor.lm.prefixes import unmasked
from easyeditor.lm.replay import PlainForward, ReplayForward, row_forward
from easyeditor.lm.tokens import Row, encode, model_inputs, token_batches
from easyeditor.lm.weights import applied
from easyeditor.methods.locate.keys import read_at_lookup
from easyeditor.methods.locate.rows import prompt_row, target_rows
from easyeditor.methods.rome.method import ROME
from easyeditor.values.edit import EditResult, WeightDelta

TOLERANCE = 1e-4
REQUESTS = {
    "start": EditRequest.make("Bay, which is located in", subject="Bay", target_new="Italy"),
    "middle": EditRequest.make(
        "It is said that the old Harbour Bridge is a part of", subject="Harbour Bridge", target_new="the Roman empire"
    ),
    "end": EditRequest.make("The place that they all remember is Bay", subject="Bay", target_new="Rome, a city"),
}
MIXED = ["{}", "You. {}", "{} they say, and", "Because it was late, they left. {}"]
SENTENCES = [
    "The river ran through the old town and under the bridge.",
    "I do not know.",
    "Because it was late, they left the house and walked along the road until they came to the sea.",
    "You.",
    "Three of the ships were never seen again, and nobody asked.",
]
PAIRS = [("Bay is in", "Italy"), ("The mother tongue of Danielle Darrieux is", "a language of France"), ("I", "am")]


def test_every_architecture_has_a_tiny_model() -> None:
    """A row in the table without one would be compared with nothing."""
    assert set(TINY) == set(architectures.ARCHITECTURES)


SLIDING = [kind for kind in ARCHITECTURES if "sliding_window" in TINY[kind]]


@lru_cache
def model(kind: str) -> Any:
    """One shared model of a kind: every test leaves the weights as they were (tests/test_weights.py)."""
    return build(kind)


def edit(kind: str, request: EditRequest, *, tok: Any = None, **changes: Any) -> EditResult:
    pair = (model(kind), tok or tokenizer())
    return ROME(*pair, rome_hparams(pair, **{"v_num_grad_steps": 2, **changes})).edit([request])


def rows_of(request: EditRequest, contexts: list[str], tok: Any) -> list[Row]:
    return target_rows(tok, request, contexts, "subject_last")[0]


def same_edit(ours: EditResult, other: EditResult) -> None:
    (a,), (b,) = ours.trace.values(), other.trace.values()
    assert not torch.equal(a.vectors["target"], a.vectors["target_init"])
    assert relative(ours.deltas[0].dense(), other.deltas[0].dense()) < TOLERANCE
    assert relative(a.vectors["target"], b.vectors["target"]) < TOLERANCE
    assert a.denominator == pytest.approx(b.denominator, rel=TOLERANCE)


# Edits


QUICK = {(False, "start", 0), (False, "end", 3), (True, "middle", 1)}
CASES = [
    pytest.param(bos, name, layer, id=f"{name}-{layer}{'-bos' * bos}", marks=[] if quick else [pytest.mark.slow])
    for bos in (False, True)
    for name in REQUESTS
    for layer in (0, 1, 3 if name == "end" else 2)  # the last layer moves no later token
    for quick in [(bos, name, layer) in QUICK]
]


@pytest.mark.parametrize(("bos", "name", "layer"), CASES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_edits_equal_the_plain_path(kind: str, bos: bool, name: str, layer: int) -> None:
    """Contexts of different length and with text behind the prompt; prompts longer than a sliding window."""
    settings = {"tok": tokenizer(bos), "layers": [layer], "context_templates": MIXED}
    plain = edit(kind, REQUESTS[name], replay=False, **settings)
    same_edit(edit(kind, REQUESTS[name], replay=True, **settings), plain)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_subject_with_nothing_before_it(kind: str) -> None:
    """One context, a one-token subject in first place: there is no prefix to keep."""
    tok = tokenizer()
    subject = "The"
    assert len(encode(tok, subject)) == 1
    request = EditRequest.make("The is located in", subject=subject, target_new="Italy")
    plain, replay = (edit(kind, request, context_templates=["{}"], replay=replay) for replay in (False, True))
    same_edit(replay, plain)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_forwards_agree_in_logits_and_gradients(kind: str, layer: int) -> None:
    """Rows of several requests at once: prefixes of 0 to many tokens, suffixes of different length."""
    tok, parts = tokenizer(layer == 1), anatomy(model(kind))
    rows = [row for request in REQUESTS.values() for row in rows_of(request, MIXED, tok)]
    rows.append(Row(ids=tuple(encode(tok, "The")), lookup=0, scored=(0,)))
    assert len({len(row.ids) - row.lookup for row in rows}) > 3
    answers = []
    for replay in (False, True):
        forward = row_forward(parts, parts.mlp(layer), layer, [[row] for row in rows], replay=replay)
        assert type(forward) is (ReplayForward if replay else PlainForward)
        generator = torch.Generator().manual_seed(0)
        offset = torch.randn(forward.initial_BD.shape, generator=generator).requires_grad_()
        logits = forward(offset)
        probe = torch.randn(logits.shape, generator=generator)
        (gradient,) = torch.autograd.grad((logits * probe).sum(), offset)
        if replay:  # calls keep nothing
            assert torch.equal(forward(offset.detach()), logits.detach())
        answers.append((forward.initial_BD, logits.detach(), gradient))
    for plain, replay in zip(*answers, strict=True):
        assert relative(replay, plain) < TOLERANCE


@pytest.mark.parametrize("kind", SLIDING)
def test_the_window_is_shorter_than_the_prompts(kind: str) -> None:
    """And it matters: without the window the same rows give other logits."""
    window = model(kind).config.sliding_window
    rows = rows_of(REQUESTS["middle"], MIXED, tokenizer())
    assert min(row.lookup for row in rows) > window
    answers = []
    for each in (model(kind), build(kind, sliding_window=100)):
        parts = anatomy(each)
        forward = row_forward(parts, parts.mlp(1), 1, [[row] for row in rows], replay=True)
        answers.append(forward(torch.zeros_like(forward.initial_BD)).detach())
    assert relative(*answers) > 1e-3


@pytest.mark.parametrize("name", REQUESTS)
def test_replay_computes_fewer_tokens(name: str) -> None:
    parts, rows = anatomy(model("llama")), rows_of(REQUESTS[name], MIXED, tokenizer())
    plain, replay = (
        row_forward(parts, parts.mlp(1), 1, [[row] for row in rows], replay=replay) for replay in (False, True)
    )
    assert plain.tokens_per_call == len(rows) * max(len(row.ids) for row in rows)
    assert replay.tokens_per_call == len(rows) * max(len(row.ids) - row.lookup for row in rows)
    assert replay.tokens_per_call < plain.tokens_per_call


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_small_batches_give_the_same_keys(kind: str) -> None:
    parts, tok = anatomy(model(kind)), tokenizer()
    rows = [prompt_row(tok, REQUESTS["middle"], context, "subject_last") for context in MIXED]
    whole, single = (read_at_lookup(parts, parts.rewrite(1), rows, Budget(tokens)) for tokens in (8192, 1))
    for ours, other in zip(whole, single, strict=True):
        assert relative(ours, other) < 1e-6


def test_small_batches_give_the_same_edit() -> None:
    whole, single = (edit("llama", REQUESTS["middle"], batch_tokens=budget) for budget in (8192, 1))
    same_edit(single, whole)


# Padding side and batches


@pytest.fixture
def left() -> Any:
    tok = copy.deepcopy(tokenizer())
    tok.padding_side = "left"
    return tok


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "plain"])
def test_a_left_padding_tokenizer_changes_nothing(left: Any, replay: bool) -> None:
    for kind in ("gpt2", "llama"):
        ours, other = (edit(kind, REQUESTS["middle"], tok=tok, replay=replay) for tok in (left, tokenizer()))
        assert torch.equal(ours.deltas[0].dense(), other.deltas[0].dense())
        assert score(model(kind), left, PAIRS) == score(model(kind), tokenizer(), PAIRS)
        probes = [PerplexityProbe(model(kind), tok, SENTENCES, fast=replay) for tok in (left, tokenizer())]
        assert probes[0].measure() == probes[1].measure()


def assert_scores(ours: list[Scored], other: list[Scored]) -> None:
    for a, b in zip(ours, other, strict=True):
        assert (a.predicted, a.target) == (b.predicted, b.target)
        assert a.mean_log_probability == pytest.approx(b.mean_log_probability, rel=1e-5)


@pytest.mark.parametrize("bos", [False, True], ids=["plain-start", "bos"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_batch_of_prompts_equals_each_alone(kind: str, bos: bool) -> None:
    tok = tokenizer(bos)
    together = score(model(kind), tok, PAIRS)
    assert_scores(together, [score(model(kind), tok, [pair])[0] for pair in PAIRS])
    assert_scores(together, score(model(kind), tok, PAIRS, budget=Budget(1)))
    assert_scores(together, score(model(kind), tok, PAIRS[::-1])[::-1])


def test_scores_by_hand() -> None:
    """log p of each target token, from a forward of the unpadded row."""
    tok, lm = tokenizer(), model("gpt2")
    for (prompt, target), scored in zip(PAIRS, score(lm, tok, PAIRS), strict=True):
        ids, wanted = encode(tok, prompt), tok(" " + target)["input_ids"]
        with torch.no_grad():
            logs = lm(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1].log_softmax(1)
        assert list(scored.predicted) == logs.argmax(1).tolist()
        assert scored.mean_log_probability == pytest.approx(logs[range(len(wanted)), wanted].mean().item(), rel=1e-5)


# Perplexity


def perplexities(kind: str, sentences: list[str] = SENTENCES, **options: Any) -> list[float]:
    return list(PerplexityProbe(model(kind), tokenizer(), sentences, **options).measure().perplexities)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fast_perplexity_equals_plain_and_single(kind: str) -> None:
    plain = perplexities(kind, fast=False, batch_size=3)
    assert perplexities(kind) == pytest.approx(plain, rel=1e-4)
    assert [perplexities(kind, [sentence])[0] for sentence in SENTENCES] == pytest.approx(plain, rel=1e-4)
    assert perplexities(kind, fast=False, batch_size=1) == pytest.approx(plain, rel=1e-4)


def delta(kind: str, layer: int) -> WeightDelta:
    parts = anatomy(model(kind))
    weight = parts.rewrite(layer).weight
    generator = torch.Generator().manual_seed(layer)
    return WeightDelta(name=parts.weight_name(layer), full=torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_resumed_measurement_equals_a_fresh_one(kind: str) -> None:
    lm = model(kind)
    probe = PerplexityProbe(lm, tokenizer(), SENTENCES, parts=anatomy(lm), resume_layer=2)
    ran: list[int] = []
    handle = anatomy(lm).mlp(1).register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        before = probe.measure()
        assert ran  # the first measurement runs the layers below …
        ran.clear()
        for layer in (2, 3):
            with applied(lm, [delta(kind, layer)]):
                after = probe.measure().perplexities
                assert not ran  # … later ones do not
                assert after == pytest.approx(perplexities(kind), rel=1e-4)
                ran.clear()
            assert after != pytest.approx(before.perplexities, rel=1e-2)
        assert probe.measure() == before
    finally:
        handle.remove()


def add_below(lm: Any, kind: str) -> None:
    with torch.no_grad():
        anatomy(lm).rewrite(1).weight.add_(delta(kind, 1).dense())


def replace_below(lm: Any, kind: str) -> None:
    module = anatomy(lm).rewrite(0)
    module.weight = torch.nn.Parameter(module.weight.detach() + delta(kind, 0).dense())


def load_other(lm: Any, kind: str) -> None:
    lm.load_state_dict(build(kind, seed=1).state_dict())


@pytest.mark.parametrize("change", [add_below, replace_below, load_other])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_change_below_the_resume_layer_is_noticed(kind: str, change: Callable[[Any, str], None]) -> None:
    lm = build(kind)
    probe = PerplexityProbe(lm, tokenizer(), SENTENCES, parts=anatomy(lm), resume_layer=2)
    before = probe.measure()
    change(lm, kind)
    fresh = PerplexityProbe(lm, tokenizer(), SENTENCES).measure()
    for _ in range(2):
        assert probe.measure().perplexities == pytest.approx(fresh.perplexities, rel=1e-4)
    assert fresh.perplexities != pytest.approx(before.perplexities, rel=1e-2)


def test_an_interrupted_measurement_leaves_no_half_memory() -> None:
    lm = model("llama")
    sentences = [f"{number} ships. " * (1 + number % 10) for number in range(40)]
    probe = PerplexityProbe(lm, tokenizer(), sentences, parts=anatomy(lm), resume_layer=2)

    def stop(done: int, of: int) -> None:
        assert of > 2
        if done == 2:
            raise KeyboardInterrupt

    with applied(lm, [delta("llama", 1)]), pytest.raises(KeyboardInterrupt):
        probe.measure(stop)
    assert probe.measure().perplexities == pytest.approx(perplexities("llama", sentences), rel=1e-4)


# Batches


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 600))
def test_token_batches(lengths: list[int], most: int) -> None:
    batches = token_batches(lengths, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= most or len(batch) == 1
        assert padded - sum(lengths[i] for i in batch) <= most // 16


def test_equal_rows_share_a_batch() -> None:
    assert token_batches([5] * 10, 25) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


# Attention


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_right_padded_rows_need_no_mask(kind: str) -> None:
    """Also where a window slides: the logits of the tokens that count are those with a mask."""
    made = model(kind)
    inputs = model_inputs([list(range(1, 13)), list(range(20, 25)), [7]], torch.device("cpu"))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = made(**inputs, use_cache=False).logits[real]
        found = made(**unmasked(inputs, len(anatomy(made).blocks)), use_cache=False).logits[real]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_short_attention_equals_the_models_own_and_is_put_back_on_error() -> None:
    made = model("llama")
    inputs = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    with torch.no_grad():
        usual = made(**inputs).logits
        with short_attention(made):
            assert made.config._attn_implementation == NAME
            grouped = made(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(usual[real], grouped[real], atol=1e-5)
    with pytest.raises(KeyboardInterrupt), short_attention(made):
        raise KeyboardInterrupt
    assert made.config._attn_implementation == "sdpa"


def test_a_model_told_to_attend_in_another_way_keeps_it() -> None:
    made = build("llama")
    made.set_attn_implementation("eager")
    with short_attention(made):
        assert made.config._attn_implementation == "eager"

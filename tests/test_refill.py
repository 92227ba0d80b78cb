"""Continuous batching: where one value search ends, the next takes its place, and no answer knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, CONTEXTS, build, relative, rome_hparams, tokenizer
from scipy.optimize import brentq

from easyeditor import EditRequest
from easyeditor.lm.budget import Budget, Queue
from easyeditor.methods.locate import lbfgs, value_search
from easyeditor.methods.locate.value_search import Found
from easyeditor.methods.rome.method import ROME

LAYER, MOST, TOGETHER = 1, 9, 3
PLACES = {
    "Oslo": "in",
    "Paris": "the",
    "Rome": "of",
    "Cairo": "a",
    "Kiev": "the",
    "Lima": "it",
    "Bay": "of",
    "Lyon": "to",
}
REQUESTS = [
    EditRequest.make(f"{place} is in", subject=place, target_new=target, case_id=number)
    for number, (place, target) in enumerate(PLACES.items())
]
STOPS: dict[str, dict[str, Any]] = {
    "loss": {},
    "mpes": {"early_stop": "mpes", "prob_cutoff": 2},
    "prefixed": {"early_stop": "mpes", "prob_cutoff": 1, "early_stop_rows": "prefixed"},
    "lbfgs": {"v_optimizer": "lbfgs"},
}


def method(pair: Any, **changes: Any) -> ROME:
    changes = {"v_num_grad_steps": MOST, "v_lr": 0.1, "context_templates": CONTEXTS[:3], "layers": [LAYER], **changes}
    return ROME(*pair, rome_hparams(pair, **changes))


def wide(kind: str) -> Any:
    return build(kind, dtype=torch.float64), tokenizer()


def searched(rome: ROME, tokens: int, **how: Any) -> list[Found]:
    """The searches of all requests under a budget of so many tokens."""
    rome._search_budget = Budget(tokens)
    return rome.values(REQUESTS, rome.parts.mlp(LAYER), LAYER, read=LAYER, **how)


def longest(rome: ROME) -> int:
    """The tokens of the request that takes most."""
    rows = [rome.search_rows(request)[0] for request in REQUESTS]
    return max(len(own) * max(len(row.ids) - row.lookup for row in own) for own in rows)


@contextmanager
def rows_run(lm: Any) -> Iterator[list[int]]:
    """The rows of every pass."""
    seen: list[int] = []

    def see(_module: Any, args: Any, inputs: Any) -> None:
        if torch.is_grad_enabled():
            seen.append(len(args[0] if args else inputs["input_ids"]))

    handle = lm.base_model.register_forward_pre_hook(see, with_kwargs=True)
    yield seen
    handle.remove()


def equal(ours: list[Found], theirs: list[Found], within: float = 1e-9) -> None:
    """The models are float64, so that what differs is not the rounding."""
    loss = {"rel": max(1e-6, within), "abs": within}
    for a, b in zip(ours, theirs, strict=True):
        assert len(a.losses) == len(b.losses)
        assert torch.tensor(a.losses) == pytest.approx(torch.tensor(b.losses), **loss)
        assert relative(a.target_D, b.target_D) < within
        assert relative(a.initial_D, b.initial_D) < within
        assert (a.read is None) == (b.read is None)
        for one, other in zip(a.read or (), b.read or (), strict=True):
            assert relative(one, other) < within


def stops_apart(monkeypatch: pytest.MonkeyPatch, rome: ROME) -> list[Found]:
    """Searches one at a time; from now on the loss at which they stop is one that they reach at different passes."""
    monkeypatch.setattr(value_search, "STOP_LOSS", 0.0)
    curves = [[losses[0] for losses in found.losses] for found in searched(rome, 1)]

    def apart(loss: float) -> int:
        return len({next((n for n, own in enumerate(curve) if own < loss), len(curve)) for curve in curves})

    monkeypatch.setattr(value_search, "STOP_LOSS", max((own + 1e-6 for curve in curves for own in curve), key=apart))
    alone = searched(rome, 1)
    passes = {len(found.losses) for found in alone}
    assert len(passes) > 2, f"all stop together ({passes}): the test tests nothing"
    return alone


@pytest.mark.parametrize(
    ("stop", "replay"),
    [(stop, True) for stop in STOPS]
    + [("loss", False), ("lbfgs", False)]
    + [pytest.param(s, False, marks=pytest.mark.slow) for s in ("mpes", "prefixed")],
)
def test_who_joins_finds_what_it_finds_alone_and_in_a_batch_of_its_own(
    stop: str, replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = wide("llama")
    rome = method(pair, replay=replay, **STOPS[stop])
    alone, budget = stops_apart(monkeypatch, rome), TOGETHER * longest(rome)
    with rows_run(pair[0]) as refilled:
        equal(searched(rome, budget), alone)
    fill = Queue.fill
    with monkeypatch.context() as inside, rows_run(pair[0]) as drained:
        inside.setattr(Queue, "fill", lambda queue: [] if queue.running else fill(queue))
        equal(searched(rome, budget), alone)
    assert sum(refilled) == sum(drained)
    assert len(refilled) < len(drained)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_prompts_of_any_length_join(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before and after the subject has different lengths. (Some types compute parts in float32.)"""
    narrow = kind == "gemma2"  # transformers' masks make its plain forward NaN in float64
    rome = method((build(kind), tokenizer()) if narrow else wide(kind))
    asked = [("They say that Paris is in", "the old town"), ("Paris, which is a town of old, lies in", "the")]
    asked += [("Now they say that they think that Paris is", "a"), ("Paris is", "Italy")]
    others = [EditRequest.make(prompt, subject="Paris", target_new=target) for prompt, target in asked]
    monkeypatch.setattr(value_search, "STOP_LOSS", 6.0)
    monkeypatch.setattr("easyeditor.lm.budget.PADS", 1)

    def run(tokens: int) -> list[Found]:
        rome._search_budget = Budget(tokens)
        return rome.values([*REQUESTS[:3], *others], rome.parts.mlp(LAYER), LAYER)

    with rows_run(rome.model) as ran:
        found = run(2 * 4 * 12)
    equal(found, run(1), 1e-4 if narrow else 1e-6)
    assert len(set(ran)) > 1


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "plain"])
def test_no_place_is_left_idle(replay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one width: as many run in every pass as fit and are left."""
    pair = wide("llama")
    rome = method(pair, replay=replay)
    alone = stops_apart(monkeypatch, rome)
    with rows_run(pair[0]) as single:
        searched(rome, 1)
    with rows_run(pair[0]) as ran:
        searched(rome, TOGETHER * longest(rome))
    (of_each,) = set(single)
    waiting, running, wanted = [len(found.losses) for found in alone], [], []
    while waiting or running:
        while waiting and len(running) < TOGETHER:
            running.append(waiting.pop(0))
        wanted.append(of_each * len(running))
        running = [left - 1 for left in running if left > 1]
    assert ran == wanted


def test_bare_searches_and_settings_of_their_own_join_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `both_keys`: norms given by request, other steps; and those that start from the mean."""
    for changes in ({}, {"consistent_value": True, "if_c_rome": True}):
        rome = method(wide("llama"), **changes)
        stops_apart(monkeypatch, rome)
        norms = [1.0 + 0.3 * n for n in range(len(REQUESTS))]
        how: dict[str, Any] = {"bare": True, "norms": norms, "steps": {"v_num_grad_steps": 5}}
        equal(searched(rome, 20, **how), searched(rome, 1, **how))
        equal(searched(rome, TOGETHER * longest(rome)), searched(rome, 1))


def test_targets_are_kept_as_each_search_ends(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut short loses those under way and no other."""
    rome = method(wide("llama"), targets_dir=str(tmp_path))
    alone = stops_apart(monkeypatch, method(wide("llama")))
    seen: list[tuple[int, int]] = []

    def progress(done: int, of: int, _said: str) -> None:
        seen.append((done, len(list(tmp_path.iterdir()))))

    found = searched(rome, TOGETHER * longest(rome), progress=progress)
    assert [done for done, _ in seen] == [kept for _, kept in seen] == sorted(done for done, _ in seen)
    assert len({done for done, _ in seen}) > 3
    for a, b in zip(found, alone, strict=True):
        assert relative(a.target_D, b.target_D) < 1e-9
    seen.clear()
    again = searched(rome, TOGETHER * longest(rome), progress=progress)
    assert not seen
    assert all(torch.equal(a.target_D, b.target_D) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "plain"])
def test_out_of_memory_begins_only_those_anew_that_run(
    replay: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair = wide("llama")
    rome = method(pair, replay=replay)
    alone, budget = stops_apart(monkeypatch, rome), TOGETHER * longest(rome)
    with rows_run(pair[0]) as whole:
        searched(rome, budget)
    ended: list[Any] = []
    real = value_search._Batch.passed

    def passed(batch: Any, watch: Any) -> Any:
        if len(ended) >= 3 and len(batch._running) == TOGETHER and not caplog.text:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        rest, over = real(batch, watch)
        ended.extend(one.number for one in over)
        return rest, over

    monkeypatch.setattr(value_search._Batch, "passed", passed)
    with rows_run(pair[0]) as ran:
        equal(searched(rome, budget), alone)
    assert "out of memory" in caplog.text
    assert rome._search_budget.tokens == budget // 2
    assert sorted(ended) == list(range(len(REQUESTS)))  # none of them twice
    assert max(whole) == max(ran)


def test_the_lbfgs_direction_is_that_of_the_dense_inverse_hessian() -> None:
    """H of the last pairs, each by H <- (I - r s y^T) H (I - r y s^T) + r s s^T with r = 1 / s.y."""
    generator = torch.Generator().manual_seed(0)
    memory, eye = lbfgs.Memory(1e9), torch.eye(5, dtype=torch.float64)
    points = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    matrix = torch.diag(torch.tensor([1.0, 2, 5, 9, 30], dtype=torch.float64))
    for point in points:
        found = memory.next(point, matrix @ point, 1.0)
    assert len(memory.pairs) == lbfgs.PAIRS
    s, y = (points[-1] - points[-2]), matrix @ (points[-1] - points[-2])
    inverse = (s @ y) / (y @ y) * eye
    for s, y in zip(points[-9:].diff(dim=0), points[-9:].diff(dim=0) @ matrix, strict=True):
        left = eye - torch.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
    assert torch.allclose(found, points[-1] - inverse @ (matrix @ points[-1]), rtol=1e-9)


def test_lbfgs_goes_on_along_the_clamp() -> None:
    """A quadratic whose least value lies outside the clamp: the best place on it solves (A + m) x = A c, |x| = 1."""
    scale, centre = torch.tensor([1.0, 2, 5, 9, 30, 60]), torch.tensor([2.0, 1, -2, 1, 1, 0.5])
    most = torch.ones(1)
    shift = brentq(lambda m: float((scale * centre / (scale + m)).norm()) - 1, 0, 1e4)
    least = float((scale * (scale * centre / (scale + shift) - centre) ** 2).sum())
    offset = torch.full((6,), 0.01)
    optimizer, losses = lbfgs.Lbfgs([offset], most), []
    for _ in range(30):
        losses.append(float((scale * (offset - centre) ** 2).sum()))
        offset.grad = 2 * scale * (offset - centre)
        optimizer.step(losses[-1:])
        value_search._clamp([offset], most)
    assert least <= losses[-1] <= 1.001 * least


def test_lbfgs_steps_are_capped_and_a_rise_is_taken_back() -> None:
    at, gradient = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)
    memory = lbfgs.Memory(0.5)
    first = memory.next(at, gradient, 1.0)
    assert torch.allclose(first, torch.tensor([0.0, -0.3, -0.4], dtype=torch.float64))
    back = memory.next(first, -gradient, 1.03)
    assert torch.allclose(back, lbfgs.BACK * first)
    assert memory.cap == 0.25
    assert memory.next(back, -gradient, 1.01).ne(lbfgs.BACK * back).any()  # no rise: a step from here
    assert torch.equal(memory.at_D, back)
    for loss in (2.0, 3.0):
        memory.next(back + 1, gradient, loss)
    assert not torch.equal(memory.next(back + 1, gradient, 4.0), back + lbfgs.BACK)  # the third in a row is not
    assert memory.loss == 4.0


def test_lbfgs_is_ahead_after_as_many_passes_and_kept_under_a_name_of_its_own(tmp_path: Any) -> None:
    pair, found = wide("llama"), {}
    for name in ("adam", "lbfgs"):
        rome = method(pair, v_optimizer=name, targets_dir=str(tmp_path))
        found[name] = searched(rome, 1000)
        for one in found[name]:
            assert float(one.offset_D.norm()) <= 1.001 * rome.hparams.clamp_norm_factor * float(one.initial_D.norm())
    for adam, own in zip(found["adam"], found["lbfgs"], strict=True):
        assert own.losses[-1][0] < adam.losses[-1][0] < adam.losses[0][0]
    assert len(list(tmp_path.iterdir())) == 2 * len(REQUESTS)


def test_the_queue_hands_out_what_fits() -> None:
    queue = Queue([30, 7, 5, 9, 5, 6], range(6), 24)
    assert queue.fill() == [2, 4, 5]  # a fourth would be over the budget
    queue.leave(5)
    assert queue.fill() == []  # 7 beside 5 and 5: four pads, and three are an eighth
    queue.leave(2)
    assert queue.fill() == [1]
    queue.leave(4)
    assert queue.fill() == [3]
    queue.leave(1)
    assert queue.fill() == []
    queue.leave(3)
    assert queue.fill() == [0]  # alone it is too long, and runs
    queue.leave(0)
    assert (queue.fill(), queue.running, queue.waiting) == ([], [], [])

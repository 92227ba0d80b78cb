"""Solves by a factor and by the smaller system against the plain solve, and how many there are."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build, relative, rome_hparams, tokenizer
from torch import Tensor

from easyeditor import BaseEditor, EditRequest, load_hparams
from easyeditor.base.errors import NumericalError, StatsError
from easyeditor.methods.locate import held as held_file
from easyeditor.methods.locate.statistics import Statistics
from easyeditor.methods.locate.updates import answering, inverse_with
from easyeditor.stats import factored as factored_file
from easyeditor.stats.factored import Factored
from easyeditor.stats.null_space import NullSpace
from easyeditor.values.edit import EditResult

sys.path.insert(0, str(ROOT / "benchmarks"))

import solves

K, D, LAYERS = 48, 32, (1, 2)
PLAIN = 1e-8  # relative, float64: what every quick solve keeps to; the systems here have condition numbers below 1e6


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int = 0) -> Tensor:
    """A second moment with eigenvalues over four decades."""
    turned, _ = torch.linalg.qr(drawn(K, K, seed))
    made = turned @ torch.diag(torch.logspace(-3, 1, K, dtype=torch.float64)) @ turned.T
    return (made + made.T) / 2


# The factor


def test_a_factored_matrix_is_the_matrix_and_solves_as_elimination_does() -> None:
    matrix = moment()
    made = Factored(matrix)
    assert made.positive
    assert torch.equal(made.matrix_KK, matrix)
    for right in (drawn(K, 5), drawn(K, 1)[:, 0], drawn(5, K).T):
        assert made.solve(right).shape == right.shape
        assert relative(made.solve(right), torch.linalg.solve(matrix, right)) < PLAIN
    assert relative(made.inverse(), torch.linalg.inv(matrix)) < PLAIN
    assert sum(v.numel() for v in vars(made).values() if isinstance(v, Tensor)) == K * K + K  # the memory of one


def test_only_the_upper_triangle_counts() -> None:
    """Upstream's files are symmetric to rounding only; matrix and factor must be of the same one."""
    matrix = moment()
    bent = matrix + drawn(K, K).tril(-1)
    assert torch.equal(Factored(bent).matrix_KK, matrix)
    assert torch.equal(Factored(bent).solve(drawn(K, 2)), Factored(matrix).solve(drawn(K, 2)))


def test_without_a_factor_it_eliminates_and_a_singular_matrix_is_one_line() -> None:
    indefinite = moment() - 0.01 * torch.eye(K, dtype=torch.float64)
    made = Factored(indefinite)
    assert not made.positive
    assert torch.equal(made.matrix_KK, indefinite)
    assert relative(made.solve(drawn(K, 3)), torch.linalg.solve(indefinite, drawn(K, 3))) < PLAIN
    assert relative(made.inverse(), torch.linalg.inv(indefinite)) < PLAIN
    with pytest.raises(NumericalError, match="singular; collect it on more text"):
        Factored(torch.zeros(K, K)).solve(drawn(K, 1))


# The equations


@pytest.mark.parametrize("count", [1, 7, K + 5])
def test_the_smaller_system_answers_as_the_larger(count: int) -> None:
    keys, plain = drawn(K, count), torch.linalg.solve(moment() + drawn(K, count) @ drawn(K, count).T, drawn(K, count))
    assert relative(answering(keys, Factored(moment()).solve(keys), 1.0), plain) < PLAIN
    with_them = torch.linalg.inv(moment() + keys @ keys.T)
    assert relative(inverse_with(torch.linalg.inv(moment()), keys), with_them) < PLAIN


def test_a_thousand_updates_do_not_drift() -> None:
    held = moment()
    inverse, root = Factored(held).inverse(), torch.linalg.cholesky(held)
    for n in range(1000):
        keys = root @ drawn(K, 2, seed=n)
        inverse, held = inverse_with(inverse, keys), held + keys @ keys.T
    keys = root @ drawn(K, 3, seed=1000)
    assert relative(answering(keys, inverse @ keys, 1.0), torch.linalg.solve(held + keys @ keys.T, keys)) < PLAIN


def projection() -> Tensor:
    """As AlphaEdit's are: rounded to float32, so a projection only nearly."""
    turned, _ = torch.linalg.qr(drawn(K, K, 3))
    return (turned[:, :30] @ turned[:, :30].T).float().double()


def plain_memit(keys: Tensor, before: Tensor, gamma: float = 0.0) -> Tensor:
    held = 20.0 * moment() + gamma * torch.eye(K, dtype=torch.float64)
    return torch.linalg.solve(held + before @ before.T + keys @ keys.T, keys).T


def plain_emmet(keys: Tensor, before: Tensor) -> Tensor:
    several = 0.1 if keys.shape[1] > 1 else 0.0
    whitened = torch.linalg.solve(20.0 * moment() + 3.0 * torch.eye(K, dtype=torch.float64), keys)
    gram = keys.T @ whitened + several * torch.eye(keys.shape[1], dtype=torch.float64)
    return (whitened @ torch.linalg.inv(gram)).T


def plain_alphaedit(keys: Tensor, before: Tensor) -> Tensor:
    grams = projection() @ (keys @ keys.T + before @ before.T)
    return torch.linalg.solve(grams + 10 * torch.eye(K, dtype=torch.float64), projection() @ keys).T


METHODS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "MEMIT": ({}, lambda keys, before: plain_memit(keys, before[:, :0])),
    "MEMIT-Seq": ({}, plain_memit),
    "ENCORE": ({"update_norm_lambda": 3.0}, lambda keys, before: plain_memit(keys, before, 3.0)),
    "EMMET": ({"update_norm_lambda": 3.0}, plain_emmet),
    "AlphaEdit": ({"L2": 10.0}, plain_alphaedit),
}


def editor_with(name: str, **changes: Any) -> BaseEditor:
    """An editor whose method has statistics of these tests at both layers."""
    pair = (build("llama"), tokenizer())
    shared = ("device", "v_num_grad_steps", "v_lr", "v_loss_layer", "v_weight_decay", "clamp_norm_factor", "kl_factor")
    values = {key: vars(rome_hparams(pair))[key] for key in (*shared, "context_templates", "ppl_sentence_num")}
    values |= {"alg_name": name, "model_name": pair, "layers": list(LAYERS), "mom2_adjustment": True}
    editor = BaseEditor(load_hparams({**values, "mom2_update_weight": 20.0, **changes}))
    made: Any = editor.method
    for layer in LAYERS:
        made.statistics._moments[layer] = Factored(moment())
        if name == "AlphaEdit":
            made._spaces[layer] = NullSpace(projection(), 30, 0.0, 1.0)
    return editor


def method(name: str, **changes: Any) -> Any:
    """That method."""
    return editor_with(name, **changes).method


def committed(made: Any, *edits: Tensor) -> Any:
    """The method with edits of these keys committed to its model."""
    for keys in edits:
        memory = {f"keys.{layer}": keys for layer in LAYERS}
        made.committed(EditResult(method="x", requests=(), deltas=(), traces=(), memory=memory))
    return made


@pytest.mark.parametrize("count", [1, 7, K + 5])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_solves_what_the_plain_formula_solves(name: str, count: int) -> None:
    """Before any edit, and after three of 1, 5 and K + 2 keys."""
    changes, plain = METHODS[name]
    made, edits = method(name, **changes), [drawn(K, 1, 11), drawn(K, 5, 12), drawn(K, K + 2, 13)]
    keys, residual = drawn(K, count, 20), drawn(D, count, 21)
    for before in (torch.zeros(K, 0, dtype=torch.float64), torch.cat(edits, 1)):
        if before.shape[1] and name not in ("MEMIT", "EMMET"):
            committed(made, *edits)
        for layer in LAYERS:
            left, right = made.solve(layer, keys, residual)
            assert relative(left @ right, residual @ plain(keys, before)) < PLAIN


# How much work


def counted(monkeypatch: pytest.MonkeyPatch, home: Any, name: str) -> list[tuple[int, ...]]:
    """The shapes of the first argument of every call of `home.name`."""
    calls: list[tuple[int, ...]] = []
    before = getattr(home, name)

    def counting(first: Tensor, *rest: Any, **named: Any) -> Any:
        calls.append(tuple(first.shape))
        return before(first, *rest, **named)

    monkeypatch.setattr(home, name, counting)
    return calls


REQUESTS = [
    EditRequest.make("{} is located in", subject=subject, target_new="Italy") for subject in ("Bay", "Oslo", "Lyon")
]


def test_rome_factors_once_and_solves_all_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (build("llama"), tokenizer())
    made = BaseEditor(rome_hparams(pair, mom2_adjustment=True, v_num_grad_steps=2)).method
    factors = counted(monkeypatch, torch.linalg, "cholesky_ex")
    solves = counted(monkeypatch, torch, "cholesky_solve")
    plain = counted(monkeypatch, torch.linalg, "solve_ex")
    made.statistics._moments[1] = Factored(moment())  # type: ignore[attr-defined]
    made.edit_each(REQUESTS)
    made.screen(REQUESTS)
    assert (factors, solves, plain) == ([(K, K)], [(K, 3), (K, 3)], [])


@pytest.mark.parametrize("name", ["MEMIT-Seq", "AlphaEdit"])
def test_the_work_of_an_edit_does_not_grow_with_those_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update of the inverse a layer for the one edit since, and no system larger than N."""
    made = method(name)
    systems = counted(monkeypatch, factored_file.torch.linalg, "solve_ex")
    updates = counted(monkeypatch, held_file, "inverse_with")
    for n in range(1, 6):
        committed(made, drawn(K, 2, n))
        assert not updates  # nothing is computed before somebody asks
        for _ in range(2):
            for layer in LAYERS:
                made.solve(layer, drawn(K, 2), drawn(D, 2))
        assert updates == [(K, K)] * len(LAYERS)
        updates.clear()
    assert set(systems) == {(2, 2)}


@pytest.mark.parametrize("name", ["MEMIT-Seq", "ENCORE", "AlphaEdit"])
def test_what_is_taken_back_leaves_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit a, b, revert, commit a, c, asked for in between or only at the end: the same bits as a, c alone."""
    monkeypatch.setattr(Statistics, "moment", lambda *_: Factored(moment()))
    a, b, c = (drawn(K, 2, seed) for seed in range(3))
    wanted = committed(method(name), a, c).inverse(1)
    made = committed(method(name), a)
    made.inverse(1)
    committed(made, b).inverse(1)
    made.reverted(None)
    assert made.inverse(1) is None
    made = committed(made, a)
    made.inverse(1)
    assert torch.equal(committed(made, c).inverse(1), wanted)


@pytest.mark.parametrize("name", ["MEMIT-Seq", "ENCORE", "AlphaEdit"])
def test_a_moment_is_let_go_once_the_inverse_is_made_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read again for later edits, but where all edits are taken back."""
    made = committed(method(name, **METHODS[name][0]), drawn(K, 2))
    for layer in LAYERS:
        made.solve(layer, drawn(K, 2), drawn(D, 2))
    kept = made.statistics
    assert [kept._moments, kept._preserved, kept._raised] == [{}, {}, {}]
    read: list[int] = []
    monkeypatch.setattr(Statistics, "moment", lambda self, layer: read.append(layer) or Factored(moment()))
    committed(made, drawn(K, 2, 1)).prepare()
    assert not read
    made.reverted(None)
    made.prepare()
    assert read == ([] if name == "AlphaEdit" else list(LAYERS))  # which has P


def test_keys_of_a_saved_edit_are_not_held_once_they_are_in_the_inverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revert reads those of the others where they are saved: the same bits as if the edit had never been made."""

    def keys_held() -> int:
        gc.collect()
        found = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.float64)
        return sum(x.shape == (K, 1) for x in found)

    monkeypatch.setattr(Statistics, "moment", lambda *_: Factored(moment()))
    made, other, before = editor_with("MEMIT-Seq"), editor_with("MEMIT-Seq"), keys_held()
    for n, request in enumerate(REQUESTS):
        result = made.compute(request)
        result.save(tmp_path / str(n))
        made.commit(result, tmp_path / str(n))
    del result
    assert all(made.method.inverse(layer) is not None for layer in LAYERS)  # type: ignore[attr-defined]
    assert keys_held() == before
    made.revert(EditResult.load(tmp_path / "1"))
    for n in (0, 2):
        other.commit(EditResult.load(tmp_path / str(n)))
    for layer in LAYERS:
        ours, theirs = (editor.method.inverse(layer) for editor in (made, other))  # type: ignore[attr-defined]
        assert torch.equal(ours, theirs)


def test_a_saved_edit_is_committed_without_statistics() -> None:
    """To have a saved edit in a model needs none; the next edit does, and says so."""
    made = method("MEMIT-Seq")
    made.statistics._moments.clear()
    committed(made, drawn(K, 2))
    with pytest.raises(StatsError, match="no second-moment statistics"):
        made.solve(1, drawn(K, 2), drawn(D, 2))


def test_a_sequence_of_many_thousand_edits_is_forgotten_without_a_deep_stack() -> None:
    made = method("MEMIT-Seq")
    made._earlier.state = held_file.Held()
    for _ in range(50_000):
        made._earlier.state = held_file.Held(made._earlier.state, {1: drawn(1, 1)})
    made.reverted(None)
    assert made.inverse(1) is None


def test_the_benchmark_compares_the_same_answers(capsys: pytest.CaptureFixture[str]) -> None:
    found = solves.main(["--widths", "24", "48", "--requests", "1", "60", "--batches", "4", "--batch", "3"])
    assert [row[0] for row in found["rome"]] == [24, 48]
    assert [row[:2] for row in found["memit"]] == [(24, 1), (24, 60), (48, 1), (48, 60)]
    assert [row[1] for row in found["sequence"]] == [1, 2, 3, 4]
    ends = [*found["rome"], *found["memit"], found["sequence"][-1]]
    assert all(row[-1] < PLAIN for row in ends)
    assert all(len(row) == 3 for row in found["sequence"][:-1])
    assert capsys.readouterr().out.count("\n|---") == 3

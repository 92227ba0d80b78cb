"""First-token protection: its moments, its solve, its two keys, and the metric that watches first places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, CONTEXTS, build, rome_hparams, same, states, tokenizer
from fake_runs import edit

from data.build_texts import names
from easyeditor.base.errors import ConfigError, StatsError
from easyeditor.dataset.sets import DATA
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.evaluate.registry import evaluate
from easyeditor.experiments.protection import WAYS
from easyeditor.lm.budget import Budget
from easyeditor.lm.discover import anatomy
from easyeditor.lm.tokens import Row, encode
from easyeditor.lm.weights import applied
from easyeditor.methods.alphaedit.hparams import AlphaEditHyperParams
from easyeditor.methods.alphaedit.method import AlphaEdit
from easyeditor.methods.locate.keys import read_at_lookup
from easyeditor.methods.locate.updates import joint_update, unit, whitened
from easyeditor.methods.memit.hparams import MEMITHyperParams
from easyeditor.methods.memit.method import MEMIT
from easyeditor.methods.rome.method import ROME
from easyeditor.report.terminal import verdict
from easyeditor.results.cause import CURE
from easyeditor.results.journal import check_kept, read_journal
from easyeditor.stats.factored import Factored
from easyeditor.stats.first_token import Texts, first_tokens, later_tokens, moments
from easyeditor.stats.null_space import computed
from easyeditor.values.edit import EditRequest

FIRST = EditRequest.make("A is located in", subject="A", target_new=" Italy")  # one token, in first place
INSIDE = EditRequest.make("The home of Bay is", subject="Bay", target_new=" Italy")
PROTECTED = {"if_c_rome": True, "consistent_value": True, "protect_first_tokens": True}


def editor(
    kind: str = "llama", bos: bool = False, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[BaseEditor, ROME]:
    made = BaseEditor.from_hparams(rome_hparams((build(kind, dtype=dtype), tokenizer(bos)), **changes))
    assert isinstance(made.method, ROME)
    return made, made.method


def keys_of(parts: Any, rows: list[tuple[int, ...]], at: int) -> np.ndarray[Any, Any]:
    """Keys at place `at` of each row, one row at a time, float64."""
    found = [read_at_lookup(parts, parts.rewrite(1), [Row(ids=row, lookup=at)], Budget(64))[0][0] for row in rows]
    return torch.stack(found).double().numpy()


def test_the_moments_are_the_plain_means_over_tokens(tmp_path: Path) -> None:
    parts, tok = anatomy(build("llama", dtype=torch.float64)), tokenizer()
    vocabulary = first_tokens(tok)
    words = {tok.decode(row) for row in vocabulary.rows}
    assert {"A", "The"} <= words
    assert not {" The", "the", "1", "<s>"} & words
    keys = keys_of(parts, list(vocabulary.rows), 0)
    (found,) = moments(parts, vocabulary, [1], stats_dir=str(tmp_path), model_name="tiny").values()
    assert np.abs(found.numpy() - keys.T @ keys / len(keys)).max() < 1e-8 * np.abs(found.numpy()).max()

    prompts = ["The cat sat", "A dog", "x"]
    later = later_tokens(tok, prompts)
    assert later.rows == tuple(tuple(encode(tok, text)) for text in prompts[:2])  # nothing follows in the third
    each = [keys_of(parts, [row], place)[0] for row in later.rows for place in range(1, len(row))]
    (found,) = moments(parts, later, [1], stats_dir=str(tmp_path), model_name="tiny").values()
    stacked = np.stack(each)
    assert np.abs(found.numpy() - stacked.T @ stacked / len(each)).max() < 1e-8 * np.abs(found.numpy()).max()


@pytest.mark.parametrize("name", ["ROME", "C-ROME", "FTP-ROME", "R-ROME"])
def test_what_is_held_names_nothing_that_a_request_is_about(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts whose keys an update without statistics holds in place: none has a request's subject, so none is its
    prompt, its paraphrase or its neighbour."""
    read: list[str] = []
    monkeypatch.setattr("easyeditor.stats.first_token.encode", lambda tok, text: read.append(text) or encode(tok, text))
    preset = {} if name == "FTP-ROME" else {"protect_first_tokens": True}
    editor(alg_name=name, stats_dir=str(tmp_path), **preset)[0].compute(FIRST)
    texts = [text for text in read if len(text.split()) > 1]
    assert len(texts) > 1000
    named = names()
    assert not [text for text in texts if named.search(text)]
    for asked in ("Paris is the capital of", "In a book of names, George is listed among the names for"):
        assert named.search(asked)


def test_moments_are_kept_and_belong_to_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, texts = anatomy(build("llama")), first_tokens(tokenizer())
    place = {"stats_dir": str(tmp_path), "model_name": "tiny"}
    made = moments(parts, texts, [0, 1], **place)
    assert sorted(path.suffix for path in tmp_path.rglob("*.*") if path.is_file()) == [".json", ".json", ".npz", ".npz"]
    with monkeypatch.context() as patched:
        patched.setattr("easyeditor.stats.first_token._sums", None)  # read, not collected
        again = moments(parts, texts, [1, 0], **place)
    assert all(torch.equal(made[layer], again[layer]) for layer in (0, 1))
    with pytest.raises(StatsError, match="other weights"):
        moments(anatomy(build("llama", seed=1)), texts, [1], **place)


def test_moments_are_collected_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first edit collects and keeps both; the next one, of another editor, reads them; another model's are
    refused."""
    options = {**PROTECTED, "stats_dir": str(tmp_path)}
    first = editor(**options)[0].compute(FIRST)
    kept = sorted(path.parent.name.split("-")[0] for path in tmp_path.rglob("*.npz"))
    assert kept == ["first", "later"]
    monkeypatch.setattr("easyeditor.stats.first_token._sums", None)
    again = editor(**options)[0].compute(FIRST)
    assert torch.equal(first.deltas[0].dense(), again.deltas[0].dense())
    other = BaseEditor.from_hparams(rome_hparams((build("llama", seed=1), tokenizer()), **options))
    with pytest.raises(StatsError, match="other weights"):
        other.compute(FIRST)


def test_with_a_bos_the_first_token_is_the_bos(tmp_path: Path) -> None:
    """M is of the BOS alone and never kept; the update leaves the BOS's own key where it was; the bare key is
    ordinary, so a second key changes nothing."""
    texts = first_tokens(tokenizer(bos=True))
    assert texts == Texts(name="first-tokens", rows=((0,),), skipped=0)
    options = {"bos": True, "dtype": torch.float64, "stats_dir": str(tmp_path), **PROTECTED}
    made, method = editor(**options)
    bos = keys_of(method.parts, [(0,)], 0)[0]
    where = {"stats_dir": str(tmp_path), "model_name": "tiny"}
    found = moments(method.parts, texts, [1], **where)[1].numpy()
    assert np.abs(found - np.outer(bos, bos)).max() < 1e-8 * np.abs(found).max()
    assert not list(tmp_path.iterdir())

    def moved(delta: Any) -> float:
        return float((delta.dense().double() @ torch.from_numpy(bos)).norm())

    (held,) = made.compute(FIRST).deltas
    (free,) = editor(**options, first_token_weight=0.0)[0].compute(FIRST).deltas
    (firm,) = editor(**options, first_token_weight=1e6)[0].compute(FIRST).deltas
    assert moved(firm) < 1e-3 * moved(free)
    assert moved(held) < moved(free)
    (both,) = editor(**options, both_keys=True)[0].compute(FIRST).deltas
    assert torch.equal(both.dense(), held.dense())


def test_the_direction_is_that_of_a_plain_solve(tmp_path: Path) -> None:
    made, method = editor(**PROTECTED, stats_dir=str(tmp_path), first_token_weight=3.0)
    where = {"stats_dir": str(tmp_path), "model_name": str(made.model.config.name_or_path)}
    later = moments(method.parts, later_tokens(made.tok), [1], **where)[1].numpy()
    first = moments(method.parts, first_tokens(made.tok), [1], **where)[1].numpy()
    held = later + 0.02 * np.diag(later).mean() * np.eye(len(later)) + 3 * first
    (lookup,) = method.look_up([FIRST], 1)
    wanted = np.linalg.solve(held, lookup.mean_K.double().numpy())
    trace = made.compute(FIRST).trace[1]
    found = unit(whitened(lookup.mean_K, method.held(1))).numpy()
    assert np.abs(found - wanted / np.linalg.norm(wanted)).max() < 1e-8
    assert np.abs(trace.vectors["u"].numpy() - found).max() < 1e-6  # kept in float32

    keys = np.stack([lookup.mean_K.double().numpy(), lookup.plain_K.double().numpy()], 1)
    solved = np.linalg.solve(held, keys)
    w = solved @ np.linalg.inv(keys.T @ solved)
    assert np.abs(joint_update(torch.from_numpy(keys), method.held(1)).numpy() - w).max() < 1e-8 * np.abs(w).max()


def test_without_weights_it_is_c_rome_bit_for_bit(tmp_path: Path) -> None:
    off = {"first_token_weight": 0.0, "later_token_weight": 0.0, "protect_first_tokens": True}
    (plain,) = editor(if_c_rome=True)[0].compute(FIRST).deltas
    (same_one,) = editor(if_c_rome=True, stats_dir=str(tmp_path), **off)[0].compute(FIRST).deltas
    assert torch.equal(plain.dense(), same_one.dense())
    assert not list(tmp_path.iterdir())
    (protected,) = editor(if_c_rome=True, stats_dir=str(tmp_path), protect_first_tokens=True)[0].compute(FIRST).deltas
    assert not torch.allclose(plain.dense(), protected.dense(), rtol=0.1)


@pytest.mark.parametrize("bos", [False, True], ids=["plain-start", "bos"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_both_keys_get_their_values(kind: str, bos: bool, tmp_path: Path) -> None:
    """(W + dW) k = v for the mean key and for the bare prompt's; one rank where a BOS makes the bare key ordinary."""
    dtype, most = (torch.float32, 1e-5) if kind == "gemma2" else (torch.float64, 1e-6)  # its softmax is float32's
    made, method = editor(kind, bos, dtype=dtype, **PROTECTED, both_keys=True, stats_dir=str(tmp_path))
    before = states(made.model)
    result = made.compute(FIRST)
    (delta,) = result.deltas
    assert delta.right is not None
    assert delta.left is not None
    assert delta.left.shape[1] == (1 if bos else 2)
    assert same(made.model, before)
    (lookup,) = method.look_up([FIRST], 1)
    found = method.values([FIRST], method.parts.mlp(1), 1)
    (bare,) = method.search_bare([FIRST], found, 1)
    assert (bare is None) == bos
    wanted = [(lookup.mean_K, found[0].target_D.double() - lookup.mean_D.double())]
    if bare is not None:
        wanted.append((lookup.plain_K, bare.target_D.double() - lookup.plain_D.double()))
    change = delta.dense().double()
    change = change.T if kind == "gpt2" else change
    for key_K, value_D in wanted:
        assert torch.dist(change @ key_K.double(), value_D) < most * value_D.norm()
    w_Kr = joint_update(torch.stack([key.double() for key, _ in wanted], 1), method.held(1))
    identity = torch.stack([key.double() for key, _ in wanted], 1).T @ w_Kr
    assert (identity - torch.eye(len(wanted))).abs().max() < 1e-6


def test_a_subject_inside_the_text_has_one_key(tmp_path: Path) -> None:
    made, method = editor(**PROTECTED, both_keys=True, stats_dir=str(tmp_path))
    together = method.edit_each([FIRST, INSIDE])
    ranks = [result.deltas[0].tensors()["left"].shape[1] for result in together]
    assert ranks == [2, 1]
    assert method.title == "C-ROME, consistent value, first tokens protected, both keys"
    assert editor(alg_name="FTP-ROME", stats_dir=str(tmp_path))[1].title == "FTP-ROME"
    for request, result in zip([FIRST, INSIDE], together, strict=True):
        alone = made.compute(request)
        assert torch.allclose(alone.deltas[0].dense(), result.deltas[0].dense(), rtol=1e-4, atol=1e-6)


def test_the_bare_offset_is_clamped_by_ordinary_values(tmp_path: Path) -> None:
    _, method = editor(**PROTECTED, both_keys=True, stats_dir=str(tmp_path), clamp_norm_factor=0.5)
    found = method.values([FIRST], method.parts.mlp(1), 1)
    (bare,) = method.search_bare([FIRST], found, 1)
    assert bare is not None
    assert float(bare.offset_D.norm()) == pytest.approx(0.5 * float(found[0].initial_D.norm()), rel=1e-5)


def test_the_bare_offset_has_steps_of_its_own(tmp_path: Path) -> None:
    """They change the bare search alone, and searches kept with others are not read."""
    options = {**PROTECTED, "both_keys": True, "stats_dir": str(tmp_path / "s"), "targets_dir": str(tmp_path / "t")}
    small = {"bare_v_lr": 0.05, "bare_num_grad_steps": 2}
    _, usual = editor(**options)
    _, method = editor(**options, **small)
    found = usual.values([FIRST], usual.parts.mlp(1), 1)
    assert torch.equal(method.values([FIRST], method.parts.mlp(1), 1)[0].offset_D, found[0].offset_D)
    (long,), (short,) = usual.search_bare([FIRST], found, 1), method.search_bare([FIRST], found, 1)
    assert long is not None
    assert short is not None
    assert (len(long.losses), len(short.losses)) == (6, 2)
    width = len(short.offset_D)
    assert float(short.offset_D.norm()) == pytest.approx(0.05 * width**0.5, rel=1e-3)  # one step of Adam: lr each
    for wrong in ({"bare_v_lr": 0.0}, {"bare_num_grad_steps": 0}, {"bare_v_lr": 0.1, "v_optimizer": "lbfgs"}):
        with pytest.raises(ConfigError, match="bare_"):
            rome_hparams(("m", "t"), **wrong)


def test_saved_searches_keep_the_two_apart(tmp_path: Path) -> None:
    options = {**PROTECTED, "both_keys": True, "stats_dir": str(tmp_path / "s"), "targets_dir": str(tmp_path / "t")}
    first = editor(**options)[0].compute(FIRST)
    assert len(list((tmp_path / "t").iterdir())) == 2
    again = editor(**options)[0].compute(FIRST)
    assert torch.equal(first.deltas[0].dense(), again.deltas[0].dense())


def test_both_keys_needs_the_consistent_value() -> None:
    with pytest.raises(ConfigError, match="both_keys"):
        rome_hparams(("m", "t"), if_c_rome=True, both_keys=True)
    with pytest.raises(ConfigError, match="first_token_weight"):
        rome_hparams(("m", "t"), first_token_weight=-1.0)


def test_locality_in_first_place_watches_other_subjects() -> None:
    model, tok = build("llama"), tokenizer()
    requests = [FIRST, EditRequest.make("Boston is in", subject="Boston", target_new=" Italy")]
    before = evaluate(model, tok, requests, ["first_place"])
    assert before.rows[0]["locality_first_place"].value is None  # nothing to compare with yet
    again = evaluate(model, tok, requests, ["locality_first_place"], before=before)
    assert [row["locality_first_place"].value for row in again.rows] == [1.0, 1.0]
    made = BaseEditor.from_hparams(rome_hparams((model, tok), context_templates=CONTEXTS))
    with applied(model, made.compute(FIRST).deltas):
        after = evaluate(model, tok, requests, ["first_place"], before=before)
    values = [row["locality_first_place"].value for row in after.rows]
    assert values[0] is not None
    assert values[0] < 1
    assert values[0] != values[1]  # the prompt about Boston itself counts for the first request only


def test_memit_holds_first_tokens_too(tmp_path: Path) -> None:
    """dW = R K^T (lambda (C + w M) + K K^T)^-1: what `protect_first_tokens` adds is w M."""
    model, tok = build("llama"), tokenizer()
    shared = {
        **{key: value for key, value in vars(rome_hparams((model, tok))).items() if key in _MEMIT_KEYS},
        **{"alg_name": "MEMIT", "mom2_adjustment": True, "mom2_update_weight": 10.0, "stats_dir": str(tmp_path)},
    }
    method = MEMIT(model, tok, MEMITHyperParams.from_dict({**shared, "protect_first_tokens": True}))
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(200, 48, generator=generator, dtype=torch.float64)
    method.statistics._moments[1] = Factored(sample.T @ sample / 200)
    where = {"stats_dir": str(tmp_path), "model_name": str(model.config.name_or_path)}
    first = moments(method.parts, first_tokens(tok), [1], **where)[1]
    keys, residual = torch.randn(48, 3, generator=generator).double(), torch.randn(32, 3, generator=generator).double()
    left, right = method.solve(1, keys, residual)
    held = 10 * (method.moment(1) + first) + keys @ keys.T
    wanted = residual.numpy() @ keys.numpy().T @ np.linalg.inv(held.numpy())
    assert np.abs((left @ right).numpy() - wanted).max() < 1e-8 * np.abs(wanted).max()


def test_the_null_space_leaves_first_tokens_out_too(tmp_path: Path) -> None:
    """AlphaEdit and its variants write into the null space of A = C + w M, not of C, with `protect_first_tokens`."""
    model, tok = build("llama"), tokenizer()
    shared = {
        **{key: value for key, value in vars(rome_hparams((model, tok))).items() if key in _MEMIT_KEYS},
        **{"alg_name": "AlphaEdit", "mom2_adjustment": True, "nullspace_scale": "relative", "stats_dir": str(tmp_path)},
    }
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(200, 48, generator=generator, dtype=torch.float64)
    sample *= torch.logspace(-2, 1, 48, dtype=torch.float64)
    spaces = {}
    for protect in (False, True):
        hparams = AlphaEditHyperParams.from_dict(
            {**shared, "protect_first_tokens": protect, "first_token_weight": 100.0}
        )
        method = AlphaEdit(model, tok, hparams)
        method.statistics._moments[1] = Factored(sample.T @ sample / 200)
        spaces[protect] = method.space(1).projection_KK
        left = sample.T @ sample / 200
        if protect:
            where = {"stats_dir": str(tmp_path), "model_name": str(model.config.name_or_path)}
            left = left + 100 * moments(method.parts, first_tokens(tok), [1], **where)[1]
        wanted = computed(left, hparams.nullspace_threshold, "relative").projection_KK
        assert torch.equal(spaces[protect], wanted)
    assert not torch.equal(spaces[False], spaces[True])


_MEMIT_KEYS = (
    *("model_name", "device", "layers", "v_num_grad_steps", "v_lr", "v_loss_layer", "v_weight_decay"),
    *("clamp_norm_factor", "kl_factor", "context_templates", "ppl_sentence_num"),
)


@pytest.mark.parametrize("path", sorted((DATA / "protection").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_published_edits_can_be_gone_on_with(path: Path) -> None:
    check_kept(path, "protection")
    assert all(line["way"] in WAYS for line in read_journal(path))


def test_the_verdict_proposes_protection_where_it_was_measured() -> None:
    """Only for a subject in first place whose small denominator did damage; the layer only for the model that the
    shipped file's numbers are of."""
    found = json.loads(CURE.read_text(encoding="utf-8"))
    hit = edit(0, ppl=50_000.0, denominator=0.05, subject="Bay").record
    known = found["model_fingerprint"]
    said = [line for _, line in verdict(hit, known) if line.startswith("Or: ")]
    assert len(said) == 1
    assert f"alg_name=FTP-ROME 'layers=[{found['layer']}]'" in said[0]
    assert f"{found['perplexity_ratio']:.2f}x perplexity, {found['locality']:.0%} of neighbours" in said[0]
    for other_model in (None, known[::-1]):
        (line,) = [line for _, line in verdict(hit, other_model) if line.startswith("Or: ")]
        assert "layers" not in line
        assert "docs/findings/first-token-protection.md" in line
    inside = EditRequest.make("The home of Bay is", subject="Bay", target_new="Italy")
    for other in (
        edit(0, ppl=93.0, denominator=0.05, subject="Bay"),
        edit(0, ppl=50_000.0, denominator=8.0, subject="Bay"),
        edit(0, ppl=50_000.0, denominator=0.05, request=inside),
    ):
        assert not [line for _, line in verdict(other.record, known) if line.startswith("Or: ")]

"""What MEMIT's kind holds in place besides C: short sentences, listed prompts, own prompts with other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, relative, rome_hparams, tokenizer
from torch import Tensor

from data.build_texts import names
from easyeditor.base.errors import ConfigError, DataError, EasyEditorError
from easyeditor.base.files import read_json
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.lm.budget import Budget
from easyeditor.lm.tokens import Row, encode
from easyeditor.methods.locate import own_templates
from easyeditor.methods.locate.keys import read_at_lookup
from easyeditor.methods.locate.own_templates import NAMES, factor
from easyeditor.methods.registry import load_hparams
from easyeditor.stats import first_token
from easyeditor.stats.factored import Factored
from easyeditor.stats.null_space import computed
from easyeditor.values.edit import EditRequest

LAYERS = (1, 2)
SHORT = ["The sea is green today.", "A glass of water, and a stone."]
PROMPTS = ["Rome is the capital of", "The author of Emma is"]
REQUESTS = [
    EditRequest.make("{} is located in", subject="Bay", target_new="Italy"),
    EditRequest.make("The home of {} is", subject="Oslo", target_new="Nell"),
]
HELD = {"held_own_templates": 3, "held_prompt_weight": 7.0, "held_short_weight": 5.0}


def moment() -> Tensor:
    keys = torch.randn(300, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return keys.T @ keys / 300


def editor(name: str, place: Path, **changes: Any) -> BaseEditor:
    """An editor on a tiny model with a moment C of these tests and, in `place`, a file of prompts."""
    pair = (build("llama", dtype=torch.float64), tokenizer())
    shared = ("device", "v_num_grad_steps", "v_lr", "v_loss_layer", "v_weight_decay", "clamp_norm_factor", "kl_factor")
    values = {key: vars(rome_hparams(pair))[key] for key in (*shared, "context_templates", "ppl_sentence_num")}
    values |= {"alg_name": name, "model_name": pair, "layers": list(LAYERS), "mom2_adjustment": True}
    made = BaseEditor(load_hparams({**values, "mom2_update_weight": 20.0, "stats_dir": str(place), **changes}))
    for layer in LAYERS:
        made.method.statistics._moments[layer] = Factored(moment())  # type: ignore[attr-defined]
    return made


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of prompts; the short sentences are those of these tests."""
    short, path = tmp_path / "short.txt", tmp_path / "prompts.json"
    short.write_text("\n".join(SHORT), encoding="utf-8")
    path.write_text(json.dumps(PROMPTS), encoding="utf-8")
    monkeypatch.setattr(first_token, "TEXTS", short)
    return str(path)


def keys_of(made: Any, rows: list[tuple[int, ...]], layer: int) -> Tensor:
    """Keys of all tokens but the first, one token at a time, as rows."""
    module = made.parts.rewrite(layer)
    every = [Row(ids=row, lookup=at) for row in rows for at in range(1, len(row))]
    return torch.cat([read_at_lookup(made.parts, module, [row], Budget(64))[0] for row in every]).double()


def ordinary(made: Any, texts: list[str], layer: int) -> Tensor:
    keys = keys_of(made, [tuple(encode(made.tok, text)) for text in texts], layer)
    mean = keys.T @ keys / len(keys)
    return mean + 0.02 * mean.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)


@pytest.mark.parametrize("weight", [20.0, 0.0])
@pytest.mark.parametrize("name", ["MEMIT", "MEMIT-Seq", "ENCORE", "EMMET"])
def test_two_edits_solve_what_the_plain_sum_says(name: str, weight: float, prompts: str, tmp_path: Path) -> None:
    """H = lambda C + gamma I + w_S S + w_P P + w_P M_own + K_p K_p^T by its definition, keys read a token at a time."""
    gamma = 3.0 if name in ("ENCORE", "EMMET") else 0.0
    more = {"update_norm_lambda": gamma} if gamma else {}
    made = editor(name, tmp_path, mom2_update_weight=weight, held_prompts=prompts, **HELD, **more)
    method: Any = made.method
    seen: list[tuple[int, Tensor, Tensor]] = []
    solve = method.solve

    def watched(layer: int, keys: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        left, right = solve(layer, keys, missing)
        seen.append((layer, keys, right))
        return left, right

    method.solve = watched
    identity = torch.eye(48, dtype=torch.float64)
    before = {layer: (torch.zeros(48, 0, dtype=torch.float64), list[Tensor]()) for layer in LAYERS}
    static = {
        layer: weight * moment()
        + gamma * identity
        + 5 * ordinary(method, SHORT, layer)
        + 7 * ordinary(method, PROMPTS, layer)
        for layer in LAYERS
    }
    for request in REQUESTS:
        own = {}
        for layer in LAYERS:
            rows = keys_of(method, method._own.rows([request]), layer)
            own[layer] = rows.T @ rows / len(rows)
        seen.clear()
        result = made.compute(request)
        for layer, keys, right in seen:
            earlier_keys, earlier_own = before[layer]
            held = static[layer] + earlier_keys @ earlier_keys.T
            held = held + 7 * (sum(earlier_own) + own[layer]) / (len(earlier_own) + 1)
            wanted = torch.linalg.solve(held + keys @ keys.T, keys).T
            if name == "EMMET":
                whitened = torch.linalg.solve(held, keys)
                wanted = torch.linalg.solve(keys.T @ whitened, whitened.T)
            assert relative(right, wanted) < 1e-9
            if name in ("MEMIT-Seq", "ENCORE"):
                kept = result.memory[f"keys.{layer}"].double()
                before[layer] = (torch.cat([earlier_keys, kept], 1), [*earlier_own, own[layer]])
        made.commit(result)


def test_alphaedit_takes_the_null_space_of_the_sum(prompts: str, tmp_path: Path) -> None:
    changes = {"held_prompts": prompts, "held_prompt_weight": 7.0, "held_short_weight": 5.0}
    for weight in (15.0, 0.0):
        made = editor(
            "AlphaEdit",
            tmp_path,
            nullspace_scale="relative",
            nullspace_threshold=0.1,
            mom2_update_weight=weight,
            **changes,
        )
        method: Any = made.method
        held = 5 * ordinary(method, SHORT, 1) + 7 * ordinary(method, PROMPTS, 1) + (moment() if weight else 0)
        assert relative(method.space(1).projection_KK, computed(held, 0.1, "relative").projection_KK) < 1e-6


def test_an_edit_that_is_taken_back_leaves_nothing(prompts: str, tmp_path: Path) -> None:
    made, once = (editor("MEMIT-Seq", tmp_path, **HELD) for _ in range(2))
    first = made.compute(REQUESTS[0])
    made.commit(first)
    second = made.compute(REQUESTS[1])
    made.commit(second)
    made.revert(second)
    once.commit(once.compute(REQUESTS[0]))
    for ours, theirs in zip(made.compute(REQUESTS[1]).deltas, once.compute(REQUESTS[1]).deltas, strict=True):
        assert torch.equal(ours.dense(), theirs.dense())


@pytest.mark.parametrize("tokens", [0, 5, 200])
def test_a_moment_is_kept_as_few_columns(tokens: int) -> None:
    keys = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = factor(keys)
    assert made.shape == (48, min(tokens, 48))
    assert torch.allclose(made @ made.T, keys.T @ keys / max(1, tokens), atol=1e-12)


@pytest.mark.parametrize("name", ["MEMIT", "MEMIT-Seq", "ENCORE", "EMMET", "AlphaEdit", "NAS", "SPHERE"])
def test_what_is_held_names_nothing_that_a_request_is_about(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No short sentence has a subject or an answer of data/ in it; an own prompt has another name in the subject's
    place, and that name is none either. So none is an evaluated prompt, paraphrase or neighbour."""
    read: list[str] = []
    for module in (first_token, own_templates):
        monkeypatch.setattr(module, "encode", lambda tok, text, *how: read.append(text) or encode(tok, text, *how))
    held = {"held_short_weight": 5.0} if name in ("AlphaEdit", "NAS", "SPHERE") else HELD
    made: Any = editor(name, tmp_path, **held).method
    named, own = names(), set[str]()
    assert len(read) > 1000
    assert not [text for text in read if named.search(text)]
    read.clear()
    if made._own is not None:
        made._own.rows(REQUESTS)
        own = {text.removesuffix(" is located in").removeprefix("The home of ").removesuffix(" is") for text in read}
        assert len(read) == 6
        assert own <= set(read_json(NAMES))
    assert not [text for text in read_json(NAMES) if named.search(text)]


def test_names_are_of_the_prompts_kind_and_never_the_subject(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"{} is located in": ["Oslo", "the Bay", "Turin"], "{} speaks": ["Nell"]}))
    made: Any = editor("MEMIT", tmp_path, held_names=str(path), **HELD).method
    texts = {made.tok.decode(row, skip_special_tokens=True) for row in made._own.rows(REQUESTS)}
    assert texts == {"Turin is located in", "The home of Turin is", "The home of Nell is"}
    path.write_text(json.dumps(["Bay of Biscay"]))
    with pytest.raises(DataError, match="held_names has no name"):
        editor("MEMIT", tmp_path, held_names=str(path), **HELD).compute(REQUESTS[0])


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("MEMIT", {"held_own_templates": -1}, "held_own_templates is -1"),
        ("MEMIT", {"held_short_weight": -1.0}, "held_short_weight is -1"),
        ("MEMIT", {"held_own_templates": 4}, "held_prompt_weight is 0.0; allowed: above 0 with held_own_templates"),
        ("MEMIT", {"held_prompt_weight": 4.0}, "held_prompt_weight is 4.0"),
        ("MEMIT", {"held_names": "x.json"}, "held_names is 'x.json'"),
        ("MEMIT", {**HELD, "held_names": "NAMES"}, "held_names must be a JSON list of names"),
        ("MEMIT", {**HELD, "held_names": "KINDS"}, "must be a prompt with exactly one {}"),
        ("MEMIT", {**HELD, "held_names": "missing.json"}, "missing.json: no such file"),
        ("EMMET", {"held_prompts": "NAMES", "held_prompt_weight": 1.0}, "held_prompts must be a list of texts"),
        ("MEMIT", {"held_prompts": "KINDS", "held_prompt_weight": 1.0}, "held_prompts must be a JSON list"),
        ("ENCORE", {"mom2_update_weight": 0.0}, "mom2_update_weight is 0.0; allowed: a number above 0"),
        ("MEMIT", {"mom2_update_weight": 0.0, "held_own_templates": 4, "held_prompt_weight": 1.0}, "only with"),
        ("MEMIT", {"mom2_update_weight": 0.0, "held_short_weight": 1.0, "protect_first_tokens": True}, "protect_first"),
        ("AlphaEdit", HELD, "held_own_templates is 3; allowed: 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("NAMES").write_text('["Bay", ""]')
    Path("KINDS").write_text('{"speaks": ["Nell"]}')
    with pytest.raises(EasyEditorError) as caught:
        editor(name, tmp_path, **changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError | DataError)

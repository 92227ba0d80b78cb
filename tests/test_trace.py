"""Causal tracing against a plain computation; what the command writes, keeps and refuses; safety by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, CONTEXTS, build, rome_hparams, same, states, tokenizer
from script_runs import call, save_tiny, write_yaml

from easyeditor.analysis.safety import safety_of
from easyeditor.analysis.tracing import ROLES, Fact, Tracer, by_role, fact_of, known_facts, noise_of
from easyeditor.commands import analysis as analysis
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.discover import anatomy
from easyeditor.lm.tokens import encode, target_ids
from easyeditor.methods.rome.method import ROME
from easyeditor.values.edit import EditRequest

PROMPTS = [("The home of Bay is", "Bay"), ("Music is a", "Music"), ("They all went to the house of", "the house")]
SAMPLES, WINDOW, NOISE = 2, 3, 0.4


pytestmark = pytest.mark.usefixtures("plain_figures")


ENDINGS = ("", " in", " the", " of", " and", " to", " on", " at", " was", " not", " by", " with", " from", " or", " we")


def answered(model: Any, tok: Any, prompt: str, subject: str) -> EditRequest:
    """A request whose true answer is what this model says; a word is put behind until that is a text of its own."""
    for text in [prompt + one + two for two in ENDINGS for one in ENDINGS]:
        said = int(model(torch.tensor([encode(tok, text)])).logits[0, -1].argmax())
        answer = tok.decode([said]).strip()
        if answer and target_ids(tok, text, answer) == [said]:
            return EditRequest.make(text, subject=subject, target_new="Italy", ground_truth=answer)
    raise AssertionError("no such prompt")


def plain(parts: Anatomy, fact: Fact, kind: str, place: int | None, layer: int) -> float:
    """Mean P(answer) over samples with one thing put back (None: nothing), by hooks on the model's own whole forward,
    one sample at a time."""
    model, count, width = parts.model, len(parts.blocks), parts.model.get_input_embeddings().weight.shape[1]
    attention = {"gpt2": "attn", "gptj": "attn", "gpt_neox": "attention"}.get(model.config.model_type, "self_attn")
    own = {
        "state": [parts.block(n) for n in range(count)],
        "mlp": [parts.mlp(n) for n in range(count)],
        "attention": [getattr(parts.block(n), attention) for n in range(count)],
    }[kind]
    restored = [layer] if kind == "state" else [n for n in range(count) if layer - 1 <= n <= layer + 1]  # a window of 3
    length = fact.last + 1 - fact.first
    noise = np.random.default_rng(0).standard_normal((SAMPLES, length, width)) * NOISE
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    clean: dict[int, torch.Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda _m, _a, out, n=n: clean.update({n: first(out).clone()}))
        for n, m in enumerate(own)
    ]
    ids = torch.tensor([fact.ids])
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    def put(output: Any, n: int) -> Any:
        changed = first(output).clone()
        changed[0, place] = clean[n][0, place]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    chances = []
    for sample in range(SAMPLES):
        embedded = model.get_input_embeddings()(ids).detach().clone()
        embedded[0, fact.first : fact.last + 1] += torch.from_numpy(noise[sample]).to(embedded)
        hooks = [model.get_input_embeddings().register_forward_hook(lambda _m, _a, _out, e=embedded: e)]
        if place is not None:
            hooks += [own[n].register_forward_hook(lambda _m, _a, out, n=n: put(out, n)) for n in restored]
        with torch.no_grad():
            chances.append(float(model(ids, use_cache=False).logits[0, -1].double().softmax(0)[fact.answer]))
        for hook in hooks:
            hook.remove()
    return float(np.mean(chances))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("replay", [True, False])
def test_effects_equal_those_of_plain_forwards(kind: str, replay: bool) -> None:
    model, tok = build(kind, dtype=torch.float64), tokenizer()
    parts = anatomy(model)
    request = EditRequest.make(PROMPTS[2][0], subject=PROMPTS[2][1], target_new="a", ground_truth="the")
    fact = fact_of(tok, request)
    before = states(model)
    tracer = Tracer(parts, NOISE, samples=SAMPLES, window=WINDOW, replay=replay)
    found = tracer.trace(fact)
    assert same(model, before)
    places = list(fact.places)
    assert found.effects["state"].shape == (len(places), len(parts.blocks))
    base = plain(parts, fact, "state", None, 0)
    assert found.corrupted == pytest.approx(base, rel=1e-9)
    assert found.clean != pytest.approx(found.corrupted, rel=1e-6)
    for what in ("state", "mlp", "attention"):
        for n, place in ((0, places[0]), (len(places) - 1, places[-1])):
            for layer in (0, 3):
                expected = plain(parts, fact, what, place, layer) - base
                assert found.effects[what][n, layer] == pytest.approx(expected, rel=1e-7, abs=1e-13)
    assert found.effects["state"][-1, -1] == pytest.approx(found.clean - base, rel=1e-7, abs=1e-13)


def test_batches_change_nothing() -> None:
    model, tok = build("llama", dtype=torch.float64), tokenizer()
    fact = fact_of(tok, answered(model, tok, *PROMPTS[0]))
    tracers = (Tracer(anatomy(model), NOISE, samples=3, batch_tokens=tokens) for tokens in (4096, 20))
    whole, cut = (tracer.trace(fact).effects["mlp"] for tracer in tracers)
    assert cut == pytest.approx(whole, abs=1e-12)


def test_roles_follow_the_paper() -> None:
    tok = tokenizer()
    request = EditRequest.make("To the house of x it went far", subject="the house", target_new="a", ground_truth="b")
    fact = fact_of(tok, request)
    texts = [tok.decode([i]) for i in fact.ids]
    subject = "".join(texts[fact.first : fact.last + 1])
    assert subject.strip() == "the house"
    roles = list(fact.places.values())
    length = fact.last + 1 - fact.first
    assert roles[:length] == [ROLES[0], *[ROLES[1]] * (length - 2), ROLES[2]]
    assert roles[length] == ROLES[3]
    assert set(roles[length + 1 : -1]) == {ROLES[4]}
    assert roles[-1] == ROLES[5]
    gained = np.arange(len(roles), dtype=float)[:, None]
    averaged = by_role(fact.places, gained)
    assert averaged[ROLES[2]] == [length - 1]
    assert averaged[ROLES[4]] == [np.mean(range(length + 1, len(roles) - 1))]


def test_known_are_facts_whose_answer_the_model_gives() -> None:
    model, tok = build("llama"), tokenizer()
    known = [answered(model, tok, *pair) for pair in PROMPTS]
    wrong = [EditRequest.make("The sea is", subject="sea", target_new="a", ground_truth="wrong answer")]
    found, asked = known_facts(anatomy(model), tok, [*wrong, *known, *known], 10, 0)
    assert sorted(fact.request.subject for fact in found) == sorted(subject for _, subject in PROMPTS)
    assert asked == 7
    assert len(known_facts(anatomy(model), tok, known, 2, 0)[0]) == 2


def test_the_noise_is_measured_on_subjects() -> None:
    model, tok = build("gpt2"), tokenizer()
    ids = tok("Bay", add_special_tokens=False)["input_ids"] + tok("the house", add_special_tokens=False)["input_ids"]
    expected = model.get_input_embeddings().weight[ids].detach().double().std()
    asked = [EditRequest.make(text, subject=subject, target_new="a") for text, subject in (PROMPTS[0], PROMPTS[2])]
    assert noise_of(anatomy(model), tok, asked) == pytest.approx(3 * float(expected), rel=1e-6)


def test_safety_is_that_of_single_look_ups() -> None:
    editor = BaseEditor.from_hparams(rome_hparams((build("llama"), tokenizer()), context_templates=CONTEXTS))
    assert isinstance(editor.method, ROME)
    requests = [EditRequest.make(f"{name} is in", subject=name, target_new="a") for name in ("Bay", "Music")]
    found = safety_of(editor.method, requests)
    assert [one.layer for one in found] == [0, 1, 2, 3]
    for layer in (0, 2):
        lookups = editor.method.look_up(requests, layer)
        reach = [float((k.plain_K.double() @ k.mean_K).abs() / (k.mean_K @ k.mean_K)) for k in lookups]
        down = [float((k.plain_K.double() @ k.mean_K).abs() / k.mean_K.norm()) for k in lookups]
        assert found[layer].least_reach == pytest.approx(min(reach), rel=1e-5)
        assert found[layer].most_reach == pytest.approx(max(reach), rel=1e-5)
        assert found[layer].denominators == pytest.approx((min(down), np.median(down), max(down)), rel=1e-5)
        assert found[layer].bare_v0 == pytest.approx(np.median([k.plain_D.norm() for k in lookups]), rel=1e-5)
        assert found[layer].mean_v0 == pytest.approx(np.median([k.mean_D.norm() for k in lookups]), rel=1e-5)


# The command


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*flags) -> Ran on tiny llama, whose facts are its own."""
    monkeypatch.chdir(tmp_path)
    model, tok = build("llama"), tokenizer()
    made = [answered(model, tok, *pair) for pair in PROMPTS]
    records = [{**r.to_json(), "case_id": n} for n, r in enumerate(made)]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    config = write_yaml(tmp_path / "llama.yaml", save_tiny(tmp_path / "llama"), context_templates=CONTEXTS)

    def go(*flags: Any) -> Any:
        args = ["trace", "--hparams", config, "--facts", "facts.json", "--kept", "kept.jsonl", "--samples", 2, *flags]
        return call(analysis, args, monkeypatch, capsys)

    return go


def test_the_command_traces_draws_and_goes_on(tiny_run: Any, tmp_path: Path) -> None:
    ran = tiny_run("--limit", 2, "--output", "run")
    assert ran.code == 0, ran.err
    kept = (tmp_path / "kept.jsonl").read_text()
    assert json.loads(kept.splitlines()[0]) == {"kind": "journal", "of": "trace"}
    assert len(kept.splitlines()) == 3
    for name in ("trace", "trace_layers"):
        assert (tmp_path / f"run/{name}.png").read_bytes()[1:4] == b"PNG"
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert [row["layer"] for row in result["tables"]["layers"]] == [0, 1, 2, 3]
    assert result["findings"]
    ran = tiny_run("--output", "again")
    assert ran.code == 0, ran.err
    assert (tmp_path / "kept.jsonl").read_text().startswith(kept)
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()[1:]]
    assert len({line["case"] for line in lines}) == len(lines) == 3
    table = json.loads((tmp_path / "again/result.json").read_text())["tables"]["layers"]
    mean = np.mean([line["effects"]["mlp"]["last subject token"] for line in lines], axis=0)
    assert [row["effect of MLP outputs"] for row in table] == pytest.approx(mean)


def test_bad_input_is_one_line(tiny_run: Any, tmp_path: Path) -> None:
    assert tiny_run("--output", "run").code == 0
    lines = (tmp_path / "kept.jsonl").read_text()
    wrong = {"prompt": "Bay is in", "subject": "Bay", "target_new": "a", "ground_truth": "wrong answer"}
    (tmp_path / "wrong.json").write_text(json.dumps([wrong]))
    for flags, part in (
        (("--limit", 0), "--limit is 0"),
        (("--samples", 5), "were traced with another samples"),
        (("--facts", "none.json"), "none.json: no such file"),
        (("--facts", "wrong.json"), "the model knows none of the 1 facts"),
        (("--output", "run"), "run"),
    ):
        ran = tiny_run(*flags)
        assert (ran.code, ran.err.count("error: ")) == (2, 1)
        assert part in ran.err
    assert (tmp_path / "kept.jsonl").read_text() == lines

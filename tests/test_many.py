"""Many edited models in one forward: the numbers of `applied`, on every architecture, in editors and in mass edits."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, ROOT, build, relative, rome_hparams, same, states, tokenizer
from script_runs import call, record_of, save_tiny, write_yaml
from test_mass import close, lines, timeless

from easyeditor import BaseEditor, EditRequest
from easyeditor.commands import mass_edit
from easyeditor.evaluate.perplexity import PerplexityProbe
from easyeditor.evaluate.scoring import score
from easyeditor.lm.architectures import Anatomy
from easyeditor.lm.discover import anatomy
from easyeditor.lm.many import SideBySide, why_alone
from easyeditor.lm.weights import applied
from easyeditor.results.journal import Journal
from easyeditor.values.edit import WeightDelta

SENTENCES = [item["Text"] for item in json.loads((ROOT / "data" / "sentences_50.json").read_text(encoding="utf-8"))][:6]
PAIRS = [("Bay is in", "Italy"), ("They say that the old Bridge of Berlin is in", "the town"), ("I", "am not sure")]
SUBJECTS = ["Bay", "Roland", "Berlin", "東京", "Oslo"]
QUICK: dict[str, Any] = {"v_num_grad_steps": 3, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 2}
Edit = list[WeightDelta]


def drawn(parts: Anatomy, layer: int, rank: int, seed: int) -> WeightDelta:
    """A random change as large as a tenth of the weight."""
    name, generator = parts.weight_name(layer), torch.Generator().manual_seed(seed)
    weight = parts.model.get_parameter(name)
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=wide) for shape in ((len(weight), rank), (rank, weight.shape[1]))
    )
    scale = 0.1 * float(weight.detach().norm() / (left @ right).norm())
    return WeightDelta(name=name, left=scale * left, right=right)


def edits_of(parts: Anatomy) -> list[Edit]:
    """One layer and rank one, a higher rank, two layers, one weight changed twice."""
    one, two, three = drawn(parts, 1, 1, 0), drawn(parts, 2, 3, 1), drawn(parts, 1, 2, 2)
    return [[one], [two], [two, three], [one, three]]


def probe_of(parts: Anatomy, layer: int = 1) -> PerplexityProbe:
    return PerplexityProbe(parts.model, tokenizer(), SENTENCES, parts=parts, resume_layer=layer)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_many_edited_models_in_one_forward_are_those_of_applied(kind: str) -> None:
    """Perplexities and scores in float32."""
    parts = anatomy(build(kind))
    before, edits, probe = states(parts.model), edits_of(parts), probe_of(parts)
    base = probe.measure()
    side = SideBySide(parts, edits)
    assert side.lowest == 1
    found = probe.measure_each(side, len(edits))
    owned = [(number, pair) for number in range(len(edits)) for pair in PAIRS]
    said = score(parts.model, tokenizer(), [p for _, p in owned], edits=side, owners=[n for n, _ in owned])
    assert same(parts.model, before)
    for number, deltas in enumerate(edits):
        assert why_alone(parts, deltas) is None
        with applied(parts.model, deltas):
            wanted = probe_of(parts).measure()
            alone = score(parts.model, tokenizer(), PAIRS)
        assert found[number].perplexities == pytest.approx(wanted.perplexities, rel=1e-6)
        assert found[number].tokens == wanted.tokens
        together = [x for (own, _), x in zip(owned, said, strict=True) if own == number]
        for a, b in zip(together, alone, strict=True):
            assert (a.predicted, a.target) == (b.predicted, b.target)
            assert a.mean_log_probability == pytest.approx(b.mean_log_probability, rel=1e-6)
        assert wanted.nlls != pytest.approx(base.nlls, rel=1e-4)  # the edits are seen at all


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_their_logits_are_those_of_applied_up_to_rounding(kind: str) -> None:
    """In float64, where rounding is far below anything else; rows of a batch in any order."""
    parts = anatomy(build(kind, dtype=torch.float64))
    edits, owners = edits_of(parts), [2, 0, 3, 1, 0]
    inputs = {"input_ids": torch.arange(60).view(5, 12) * 5, "attention_mask": torch.ones(5, 12, dtype=torch.long)}
    with torch.no_grad():
        with SideBySide(parts, edits).rows(owners):
            found = parts.model(**inputs).logits
        for row, owner in enumerate(owners):
            with applied(parts.model, edits[owner]):
                assert relative(found[row], parts.model(**inputs).logits[row]) < 1e-12
        plain = parts.model(**inputs).logits
    assert all(relative(found[row], plain[row]) > 1e-4 for row in range(5))


@pytest.mark.parametrize("measured_before", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_where_a_forward_may_start_does_not_matter(layer: int, measured_before: bool) -> None:
    """From the edited layer, from the first, and where an edit lies below the layer that is resumed at."""
    parts = anatomy(build("llama"))
    edits, probe = edits_of(parts), probe_of(parts, layer)
    if measured_before:
        probe.measure()
    wanted = [report.nlls for report in probe_of(parts).measure_each(SideBySide(parts, edits), len(edits))]
    found = [report.nlls for report in probe.measure_each(SideBySide(parts, edits), len(edits))]
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_memory_that_does_not_do_halves_the_batch_of_edited_models(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = anatomy(build("gpt2"))
    edits, probe = edits_of(parts), probe_of(parts)
    base = probe.measure()
    side = SideBySide(parts, edits)
    wanted = [report.nlls for report in probe.measure_each(side, len(edits))]
    forward, refused = type(parts.model).forward, []

    def small(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > 200:
            refused.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(parts.model), "forward", small)
    with caplog.at_level(logging.WARNING):
        found = [report.nlls for report in probe.measure_each(side, len(edits))]
    assert refused
    assert "out of memory" in caplog.text
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    monkeypatch.undo()
    assert probe.measure() == base  # what is kept of the unedited model is still its own


def _dense(parts: Anatomy) -> WeightDelta:
    return WeightDelta(name=parts.weight_name(1), full=drawn(parts, 1, 1, 0).dense())


def _head(parts: Anatomy) -> WeightDelta:
    weight = parts.model.get_parameter("lm_head.weight")
    return WeightDelta(name="lm_head.weight", left=torch.ones(len(weight), 1), right=torch.ones(1, weight.shape[1]))


def _scaled(value: float) -> Callable[[Anatomy], WeightDelta]:
    def make(parts: Anatomy) -> WeightDelta:
        delta = drawn(parts, 1, 1, 0)
        assert delta.left is not None
        return WeightDelta(name=delta.name, left=delta.left * value, right=delta.right)

    return make


def _shaped(parts: Anatomy) -> WeightDelta:
    return WeightDelta(name=parts.weight_name(1), left=torch.ones(3, 1), right=torch.ones(1, 4))


@pytest.mark.parametrize(
    ("make", "dtype", "said"),
    [
        (_dense, torch.float32, "is dense"),
        (_head, torch.float32, "is no projection of a block"),
        (_scaled(1.0), torch.bfloat16, "rounding to it is part of the edit"),
        (_scaled(1e38), torch.float32, "may overflow"),
        (_scaled(math.nan), torch.float32, "may overflow"),
        (_shaped, torch.float32, "another shape"),
    ],
)
def test_what_cannot_share_a_forward_says_why(make: Any, dtype: torch.dtype, said: str) -> None:
    parts = anatomy(build("llama", dtype=dtype))
    assert said in (why_alone(parts, [make(parts)]) or "")


def test_a_model_that_the_table_does_not_know_is_measured_alone() -> None:
    model = build("llama")
    name = "model.layers.{}"
    model.config.model_type = "unheard_of"
    parts = anatomy(model, block=name, mlp=f"{name}.mlp", rewrite=f"{name}.mlp.down_proj")
    assert "not in the table" in (why_alone(parts, [drawn(parts, 1, 1, 0)]) or "")


# Editor


def requests() -> list[EditRequest]:
    return [
        EditRequest.make(r["prompt"], subject=r["subject"], target_new="Italy", rephrase_prompts=[r["rephrase_prompt"]])
        for r in map(record_of, SUBJECTS[:3])
    ]


def test_an_edit_measured_beside_others_has_the_record_of_one_measured_alone(caplog: pytest.LogCaptureFixture) -> None:
    """With metrics that generate too, and with one edit of the group dense."""
    editor = BaseEditor(rome_hparams((build("gpt2"), tokenizer()), **QUICK), metrics=["easyedit", "GE"])
    made, asked = editor.compute_each(requests()), requests()
    dense = [WeightDelta(name=d.name, full=d.dense()) for d in made[1].deltas]
    made[1] = type(made[1])(**{**vars(made[1]), "deltas": tuple(dense)})
    together = editor.measure(asked, [None] * 3)
    edits = [(r, made[n], None, together.only([n])) for n, r in enumerate(asked)]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = editor.measure_many(edits)
    assert [state is None for state in found] == [False, True, False]
    assert [r.message for r in caplog.records if "one at a time" in r.message] == [
        f"edits are measured one at a time where the delta of {dense[0].name} is dense"
    ]
    for n in (0, 2):
        options = {"result": made[n], "before": together.only([n])}
        alone = editor.examine_together([asked[n]], **options)
        beside = editor.examine_together([asked[n]], **options, after=found[n])
        assert close(timeless(beside.record.to_json()), timeless(alone.record.to_json()), rel=1e-5)
        assert min(beside.seconds[part] for part in ("metrics", "perplexity")) > 0


def test_the_plain_path_measures_every_edit_alone() -> None:
    editor = BaseEditor(rome_hparams((build("gpt2"), tokenizer()), replay=False, **QUICK))
    made, before = editor.compute_each(requests()), editor.measure(requests(), [None] * 3)
    edits = [(r, made[n], None, before.only([n])) for n, r in enumerate(requests())]
    assert editor.measure_many(edits) == [None] * 3


# mass_edit.py


@pytest.fixture
def mass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, Any]]]:
    """mass(run, *flags) -> the lines of the run; a code of 0 is expected unless `code` says otherwise."""
    write_yaml(tmp_path / "rome.yaml", save_tiny(tmp_path / "llama"), **QUICK)
    (tmp_path / "five.json").write_text(json.dumps([record_of(s) for s in SUBJECTS]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def go(run: str, *flags: str, code: int = 0) -> list[dict[str, Any]]:
        begin = ["--hparams", "rome.yaml", "--data", "five.json", "--together", "2", "--output", run]
        ran = call(mass_edit, flags if "--resume" in flags else [*begin, *flags], monkeypatch, capsys)
        assert ran.code == code, ran.err
        return lines(tmp_path / run)

    return go


def test_a_mass_edit_measured_together_has_the_records_of_one_measured_alone(mass: Any) -> None:
    alone, together = mass("alone", "--measure", "alone"), mass("together", "--measure", "together")
    assert len(alone) == 5
    assert close(timeless(together), timeless(alone), rel=1e-5)
    assert timeless(mass("auto")) == timeless(alone)  # on a CPU


def test_edited_models_share_forwards_where_they_are_measured_together(
    mass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, each = [], PerplexityProbe.measure_each
    plain = PerplexityProbe.measure

    def counted(self: Any, edits: Any, count: int) -> Any:
        measured.append(count)
        return each(self, edits, count)

    def once(self: Any, *args: Any) -> Any:
        measured.append(0)
        return plain(self, *args)

    monkeypatch.setattr(PerplexityProbe, "measure_each", counted)
    monkeypatch.setattr(PerplexityProbe, "measure", once)
    mass("together", "--measure", "together")
    assert measured == [0, 2, 2, 0]  # the unedited model, two groups, and the last edit, alone in its own


@pytest.mark.parametrize("recorded", [1, 2, 3])
def test_a_run_measured_together_and_cut_short_goes_on_to_the_same_records(
    recorded: int, mass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mass("whole", "--measure", "together")
    written = Journal.append

    def append(self: Journal, line: Any) -> None:
        if self.path.read_bytes().count(b"\n") == recorded:
            raise KeyboardInterrupt
        written(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        assert len(mass("cut", "--measure", "together", code=130)) == recorded
    assert timeless(mass("cut", "--resume", "cut")) == timeless(whole)

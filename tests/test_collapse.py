"""The headline: on the embedded model an ordinary ROME edit collapses it, the same edit by C-ROME does not.

Behind the reference's contexts on the papers' ME-PPL_50 where ../shared has them, and behind generated contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from conftest import ME_PPL, ROOT, same, states
from golden_numbers import read

from easyeditor import EditRequest
from easyeditor.dataset.sentences import load_sentences, read_sentences
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.editing.editor import Examined
from easyeditor.methods.registry import load_hparams

pytestmark = pytest.mark.slow

ROME, C_ROME = {"if_c_rome": False}, {"if_c_rome": True}
BAY = EditRequest.make("{}, which is located in", subject="Bay", target_new="Italy", ground_truth="Philippines")
DARRIEUX = EditRequest.make(
    "The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", ground_truth="French"
)


@pytest.fixture(scope="module")
def examine(smol: Any, searches: str) -> Callable[..., Examined]:
    """examine(request, given=…, **settings) -> Examined, of one editor for each settings; `given`: the contexts of
    the reference rather than generated ones."""
    sentences = read_sentences(ME_PPL) if ME_PPL.exists() else load_sentences(50)
    contexts = read("inputs.json")["context_templates_rome"]

    @lru_cache
    def editor(given: bool, **settings: Any) -> BaseEditor:
        hparams = load_hparams(str(ROOT / "hparams/ROME/smollm2-135m"))
        hparams.model_name = smol
        for key, value in {
            **settings,
            "context_templates": contexts if given else None,
            "targets_dir": searches,
        }.items():
            setattr(hparams, key, value)
        return BaseEditor(hparams, sentences=sentences)

    base = editor(True, **ROME).perplexity()

    def go(request: EditRequest, *, given: bool = True, **settings: Any) -> Examined:
        return editor(given, **settings).examine(request, ppl_before=base)

    return go


def accuracy(examined: Examined) -> float:
    """Rewrite accuracy after the edit."""
    return examined.record.post.rewrite[0]


@pytest.mark.parametrize("given", [True, False], ids=["given-contexts", "generated-contexts"])
def test_bay_by_rome_collapses_the_model_and_the_trace_says_why(
    examine: Callable[..., Examined], smol: Any, given: bool
) -> None:
    before = states(smol[0])
    examined = examine(BAY, given=given, **ROME)
    assert examined.ppl_after.mean > 1000
    assert examined.collapse.collapsed
    assert abs(examined.result.trace[5].denominator) < 2
    assert examined.record.remedy == "if_c_rome=true if_prefix=true"
    assert same(smol[0], before)


def test_bay_by_c_rome_does_not(examine: Callable[..., Examined]) -> None:
    examined = examine(BAY, **C_ROME)
    assert not examined.collapse.collapsed
    assert examined.ppl_after.mean == pytest.approx(examined.ppl_before.mean, rel=0.05)
    if ME_PPL.exists():
        assert examined.ppl_after.mean < 175
    assert examined.record.remedy is None


def test_bay_by_c_rome_behind_its_test_prefix_also_succeeds(examine: Callable[..., Examined]) -> None:
    examined = examine(BAY, given=False, **C_ROME, if_prefix=True)
    assert accuracy(examined) == 1
    assert not examined.collapse.collapsed
    assert examined.record.test_prefix not in (None, "{}")


@pytest.mark.parametrize("settings", [ROME, C_ROME], ids=["ROME", "C-ROME"])
def test_an_ordinary_edit_succeeds_and_keeps_the_model(
    examine: Callable[..., Examined], settings: dict[str, Any]
) -> None:
    examined = examine(DARRIEUX, **settings)
    assert examined.record.pre.rewrite == (0.0,)
    assert accuracy(examined) == 1
    assert examined.ppl_after.mean == pytest.approx(examined.ppl_before.mean, rel=0.01)
    assert not examined.collapse.collapsed

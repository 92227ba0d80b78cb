"""The second embedded model, Gemma 3 270M: run where it was fetched already, never fetched for a test."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import relative

from easyeditor import EditRequest
from easyeditor.dataset.sentences import load_sentences
from easyeditor.evaluate.perplexity import PerplexityProbe, begins_with_bos
from easyeditor.lm.discover import anatomy
from easyeditor.lm.replay import row_forward
from easyeditor.lm.tokens import encode, without_bos
from easyeditor.methods.locate.rows import target_rows

SHORT = 12  # sentences


def test_its_tokenizer_is_the_hub_s(gemma: Any) -> None:
    """Ids of google/gemma-3-270m: BOS, a new line, a run of spaces, words."""
    _, tok = gemma
    assert encode(tok, "Hello world") == [2, 9259, 1902]
    assert encode(tok, "def f(x):\n    return x") == [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123]
    assert encode(without_bos(tok), "Hello world") == [9259, 1902]


def test_perplexity_makes_sense_with_a_bos_alone(gemma: Any) -> None:
    lm, tok = gemma
    texts = load_sentences(50).texts[:SHORT]
    found = {
        setting: PerplexityProbe(lm, tok, texts, add_start_token=begins_with_bos(tok, setting)).measure()
        for setting in ("papers", "auto")
    }
    assert (found["papers"].bos, found["auto"].bos) == (False, True)
    assert found["papers"].mean > 1000 > 200 > found["auto"].mean
    plain = PerplexityProbe(lm, tok, texts[:3], add_start_token=True, fast=False).measure()
    assert plain.nlls == pytest.approx(found["auto"].nlls[:3], rel=1e-4)


@pytest.mark.parametrize("layer", [5, 16])
def test_replay_gives_the_plain_path_s_logits_and_gradients(gemma: Any, layer: int) -> None:
    """Post-norms, scaled embeddings, sliding and full attention: of the real weights, not of random ones.

    In float64, where a gradient that is left of large terms has digits enough to compare.
    """
    lm, tok = copy.deepcopy(gemma[0]).double(), gemma[1]
    parts = anatomy(lm)
    request = EditRequest.make("The mother tongue of Danielle Darrieux is", subject="Darrieux", target_new="English")
    rows = target_rows(tok, request, ["{}", "Because it was late, they left. {}"], "subject_last")[0]
    answers = []
    for replay in (False, True):
        forward = row_forward(parts, parts.mlp(layer), layer, [[row] for row in rows], replay=replay)
        generator = torch.Generator().manual_seed(0)
        offset = torch.randn(forward.initial_BD.shape, generator=generator).double().requires_grad_()
        logits = forward(offset)
        losses = torch.nn.functional.log_softmax(logits, dim=-1)[..., 0]
        (gradient,) = torch.autograd.grad(losses.sum(), offset)
        answers.append((forward.initial_BD, logits.detach(), gradient))
    for plain, replay in zip(*answers, strict=True):
        assert relative(replay, plain) < 1e-9

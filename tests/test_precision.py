"""`matmul: tf32` holds in edits and measurements, not in statistics, and is gone afterwards. (No card is needed: what
is set is what is looked at.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, rome_hparams, tokenizer

from easyeditor import BaseEditor
from easyeditor.lm.precision import products
from easyeditor.stats import first_token

REQUEST = {"prompt": "Bay, which is located in", "target_new": "Italy", "subject": "Bay"}


def now() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[set[str], set[str]]:
    """What is set in the forwards of an edit's statistics, and in its others."""
    collecting, others, inside = set(), set(), []
    moments = first_token.add_rows

    def add_rows(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        try:
            return moments(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(first_token, "add_rows", add_rows)
    settings = {"v_num_grad_steps": 2, "context_templates": ["{}", "You. {}"], "ppl_sentence_num": 50}
    hparams = rome_hparams(
        (build("llama"), tokenizer()), **settings, protect_first_tokens=True, stats_dir=str(tmp_path), **changes
    )
    editor = BaseEditor.from_hparams(hparams)
    editor.model.model.layers[0].register_forward_pre_hook(
        lambda *_: (collecting if inside else others).add(now()) or None
    )
    editor.edit(prompts=REQUEST["prompt"], target_new="Italy", subject="Bay", verbose=False)
    return collecting, others


def test_tf32_is_set_for_edits_and_measurements_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = now()
    assert seen(tmp_path, monkeypatch, matmul="tf32") == ({"ieee"}, {"tf32"})
    assert now() == before


def test_products_are_exact_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(tmp_path, monkeypatch) == ({"ieee"}, {"ieee"})


def test_what_was_set_comes_back_after_an_error() -> None:
    before = now()
    with pytest.raises(ZeroDivisionError), products("tf32"):
        raise ZeroDivisionError
    assert now() == before

"""How many tokens and requests run together where nobody says it: from the memory that is free."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONTEXTS, build, rome_hparams, tokenizer

from easyeditor import BaseEditor, EditRequest
from easyeditor.base.errors import ConfigError
from easyeditor.evaluate.perplexity import PerplexityProbe
from easyeditor.lm.budget import free_bytes, tokens_for
from easyeditor.lm.discover import anatomy
from easyeditor.methods.rome.method import ROME
from easyeditor.runs import single

FREE = 10**8


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with 100 MB free."""
    for place in ("easyeditor.lm.budget", "easyeditor.methods.locate.method"):
        monkeypatch.setattr(f"{place}.free_bytes", lambda parts: FREE)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_tokens_from_free_memory_and_shapes(dtype: torch.dtype, size: int) -> None:
    """By hand: width 32, keys 48, four blocks, 400 words."""
    parts = anatomy(build("llama", dtype=dtype))
    block = size * (8 * 32 + 4 * 48)
    assert tokens_for(parts, None, free=FREE) == FREE // 2 // (block + (size + 4) * 400)
    assert tokens_for(parts, None, gradients=True, free=FREE) == FREE // 2 // (4 * block + (size + 8) * 400)
    assert tokens_for(parts, None, gradients=True, free=1) == 1


def test_what_is_given_counts_and_a_cpu_has_what_it_had() -> None:
    parts = anatomy(build("llama"))
    assert free_bytes(parts) is None
    assert (tokens_for(parts, None), tokens_for(parts, None, gradients=True)) == (8192, 512)
    for free in (None, FREE):
        assert (tokens_for(parts, 320, free=free), tokens_for(parts, 320, gradients=True, free=free)) == (320, 20)


def test_what_is_free_on_several_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fullest one counts, for each has a share of the blocks; what the allocator holds unused is free, too."""
    weights = [SimpleNamespace(device=torch.device("cuda", n % 2)) for n in range(4)]
    parts: Any = SimpleNamespace(model=SimpleNamespace(parameters=lambda: weights))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (100 + 50 * card.index, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda card: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda card: 20)
    assert free_bytes(parts) == 2 * 110


@pytest.mark.usefixtures("card")
def test_a_card_computes_twice_what_a_batch_of_searches_holds() -> None:
    pair = build("llama"), tokenizer()
    requests = [EditRequest.make(f"{place} is in", subject=place, target_new="the") for place in ("Oslo", "Rome")]
    rome = ROME(*pair, rome_hparams(pair, context_templates=CONTEXTS[:3]))
    each = 4 * 3  # rows, and tokens from the subject's last on
    assert rome.together(requests) == 2 * (tokens_for(rome.parts, None, gradients=True) // each)
    assert rome.together([]) == 8
    small = ROME(*pair, rome_hparams(pair, context_templates=CONTEXTS[:3], batch_tokens=64))
    assert small._search_budget.tokens == 4
    assert small.together(requests) == 8


def test_auto_is_the_default_and_8_on_a_cpu(mass: Any, tmp_path: Path) -> None:
    for name, flags, asked, number in (("a", (), "auto", 8), ("b", ("--together", "3"), 3, 3)):
        assert mass("--output", name, "--limit", 1, *flags).code == 0
        config, manifest = (json.loads((tmp_path / name / f"{x}.json").read_text()) for x in ("config", "manifest"))
        assert (config["run"]["together"], manifest["together"]) == (asked, number)
        assert config["hparams"]["batch_tokens"] is None


@pytest.mark.parametrize("value", ["many", "0", "-1", "2.5", "", "true"])
def test_a_number_that_is_none_is_refused(value: str, mass: Any) -> None:
    ran = mass("--output", "run", "--together", value)
    assert ran.code == 2
    assert "together is" in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_a_run_that_goes_on_keeps_its_groups(mass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was free when it began counts."""
    sizes: list[int] = []
    real = single._groups
    monkeypatch.setattr(single, "_groups", lambda numbers, size: sizes.append(size) or real(numbers, size))
    with monkeypatch.context() as inside:
        inside.setattr(ROME, "together", lambda self, requests: 40)
        assert mass("--output", "run", "--limit", 2).code == 0
    assert mass("--resume", "run", fresh=False).code == 0
    path = tmp_path / "run/manifest.json"
    manifest = json.loads(path.read_text())
    for damage in (0, "x", None):
        path.write_text(json.dumps({**manifest, "together": damage}))
        assert mass("--resume", "run", fresh=False).code == 2
    assert sizes == [40, 40]


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_tokens is 0; allowed: 1 or more, or null"):
        rome_hparams((build("llama"), tokenizer()), batch_tokens=0)


@pytest.mark.parametrize(("given", "most"), [(None, 512), (8192, 512), (128, 128)])
def test_perplexity_on_a_cpu_takes_512_tokens_and_no_more_than_is_given(given: int | None, most: int) -> None:
    """Where nothing smaller is given, its numbers keep their bits."""
    pair, sizes = (build("llama"), tokenizer()), []
    editor = BaseEditor.from_hparams(rome_hparams(pair, ppl_sentence_num=50, batch_tokens=given))
    with pair[0].base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    ):
        found = editor.perplexity()
    assert found is not None
    assert most / 2 < max(sizes) <= most
    assert editor.sentences is not None
    plain = PerplexityProbe(*pair, editor.sentences.texts).measure()
    assert (found.nlls == plain.nlls) or (given == 128 and found.nlls == pytest.approx(plain.nlls, rel=1e-6))

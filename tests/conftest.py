"""Tiny seeded models of every architecture, built in code; the golden numbers and the embedded model where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)  # also for fixtures that outlive a test; `_threads` below has the reason

ROOT = Path(__file__).resolve().parents[1]
ME_PPL = ROOT.parent / "shared" / "ME-PPL" / "ME-PPL_50.json"

needs_me_ppl = pytest.mark.skipif(not ME_PPL.exists(), reason=f"{ME_PPL} (the papers' own sentences) is not here")

DEVICES = "test_devices.py"

CONTEXTS = ["{}", "The quick brown. {}", "I think so. {}", "Because it was late, they left. {}", "You. {}"]

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128, "rotary_dim": 4},
    "gpt_neox": {**_LLAMA, "rotary_pct": 0.5},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 12},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, "sliding_window": 12, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_LLAMA, "sliding_window": 12, "query_pre_attn_scalar": 8},
}
ARCHITECTURES = sorted(TINY)
_WIDE = {**_LLAMA, "head_dim": 16}  # attention wider than the MLP
_POOL = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
_POOL |= {**_WIDE, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
NOT_KNOWN: dict[str, dict[str, Any]] = {"olmo2": _LLAMA, "phi3": {**_LLAMA, "pad_token_id": 1}, "cohere2": _WIDE}
"""Types that the table has not."""
MIXTURES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "minimax_m2", "granitemoe"), _POOL),
    "phimoe": _POOL,
    "deepseek_v2": {
        **_POOL,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
    },
    "glm4_moe": {**_POOL, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1},
    "llama4_text": {**_POOL, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
    "jamba": {**_POOL, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
}
"""Mixtures of experts: heads x head size is above the hidden width, as in the real ones."""
_MAMBA = {**_LLAMA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_LINEAR = {f"linear_{part}": size for size, part in ((2, "num_key_heads"), (2, "num_value_heads"))}
RECURRENT: dict[str, dict[str, Any]] = {
    "rwkv": {**_LLAMA, "attention_hidden_size": 32, "context_length": 128},
    "recurrent_gemma": {**_LLAMA, "lru_width": 32, "intermediate_size": 96, "attention_window_size": 16},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 8},
    "lfm2": {**_LLAMA, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {**_LLAMA, **_LINEAR, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "mamba": {**_LLAMA, "state_size": 8},
}
"""Types with a state that is no key-value cache, or beside one; Mamba has no MLP."""
MIXTURES["jamba"] |= {"attn_layer_period": 4, "attn_layer_offset": 2, "use_mamba_kernels": False}
REAL = {"smol", "gemma"}
"""Fixtures that are an embedded model."""


@lru_cache(maxsize=2)
def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens trained on this repository's sentences, with or without a BOS before texts."""
    texts = [item["Text"] for item in json.loads((ROOT / "data" / "sentences_50.json").read_text(encoding="utf-8"))]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(texts, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of one architecture, large enough in scale that prompts matter."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=1,
        **{**(TINY | NOT_KNOWN | MIXTURES | RECURRENT)[kind], **changes},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.15)
                elif name.endswith("bias"):
                    weight.normal_(0, 0.05)
    return model.to(dtype).eval()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The pretended devices are tested in a process of their own, by name (Makefile).

    Importing them makes a GPU known to torch, so autograd starts device threads, and a process that has those cannot
    fork another that trains, as the kill tests do.
    """
    named = any(DEVICES in str(argument) for argument in config.args)
    return True if collection_path.name == DEVICES and not named else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs an embedded model: it takes all cores, so it runs alone (Makefile)."""
    for item in items:
        if REAL & set(getattr(item, "fixturenames", ())):
            item.add_marker("embedded")


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: on a machine that others use too, threads wait for each other. TEST_THREADS says otherwise
    (`make isa`)."""
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))


@pytest.fixture
def tiny() -> Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
    """tiny(kind, bos=…, dtype=…) -> a fresh (model, tokenizer)."""

    def make(kind: str, *, bos: bool = False, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        return build(kind, **options), tokenizer(bos)

    return make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its YAML (`rome.yaml`) and five requests (`five.json`)."""
    from script_runs import five_requests

    return five_requests(tmp_path_factory.mktemp("five"))


@pytest.fixture(scope="module")
def memit(place: Path) -> Path:
    """A MEMIT YAML for `place`, whose statistics are there."""
    from script_runs import memit_yaml

    return memit_yaml(place)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """script(command, *flags) -> Ran: a command's main in this process, under the name of its module."""
    from script_runs import call

    return lambda command, *flags: call(command, list(flags), monkeypatch, capsys)


@pytest.fixture
def mass(place: Path, tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """mass(*flags) -> Ran: mass_edit.py, with `tmp_path` as the working directory and the ROME YAML if `fresh`."""
    from easyeditor.commands import mass_edit

    monkeypatch.chdir(tmp_path)
    begin = ["--hparams", place / "rome.yaml", "--data", place / "five.json"]
    return lambda *flags, fresh=True: script(mass_edit, *(begin if fresh else []), *flags)


@pytest.fixture
def touchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that calls 8 percent a collapse: no tiny edit collapses a tiny model."""
    from easyeditor.values import collapse

    def verdict(before: float, after: float, **limits: float) -> collapse.Collapse:
        return replace(found(before, after, **limits), collapsed=abs(after / before - 1) > 0.08)

    found = collapse.verdict
    monkeypatch.setattr(collapse, "verdict", verdict)


def rome_hparams(pair: tuple[Any, Any], **changes: Any) -> Any:
    """ROME on a tiny pair: layer 1, five fixed contexts, few steps, no perplexity unless asked for."""
    from easyeditor import ROMEHyperParams

    values = {
        "model_name": pair,
        "device": "cpu",
        "layers": [1],
        "v_num_grad_steps": 6,
        "v_lr": 0.5,
        "v_loss_layer": 3,
        "v_weight_decay": 1e-3,
        "clamp_norm_factor": 4.0,
        "kl_factor": 0.0625,
        "mom2_adjustment": False,
        "context_templates": CONTEXTS,
        "ppl_sentence_num": 0,
    }
    return ROMEHyperParams.from_dict({**values, **changes})


def side_of(model: PreTrainedModel, tok: Any, request: Any) -> Any:
    """What a record says of a request on a model as it is."""
    from easyeditor.evaluate.metric import Settings
    from easyeditor.evaluate.registry import measure

    return measure(model, tok, [request], [], [Settings()], record=True).side(0)


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Bit-equality with `states`."""
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="session")
def smol() -> tuple[PreTrainedModel, Any]:
    """The embedded model (fetched on first use)."""
    from easyeditor.lm.loading import load

    return load("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def gemma() -> tuple[PreTrainedModel, Any]:
    """The second embedded model, where it was fetched: no test takes on its terms, or 239 MB, for its user."""
    from easyeditor.lm import embedded
    from easyeditor.lm.loading import load

    found = embedded.find("gemma3-270m")
    assert found is not None
    if not (found.folder / "model.safetensors").exists():
        pytest.skip(f"{found.name} was not fetched; python ppl.py --model {found.name} --ppl-bos auto does it")
    return load(found.name, device="cpu")


@pytest.fixture(scope="session")
def searches(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A `targets_dir` for the session: ROME and C-ROME tests of one request on the embedded model search once."""
    return str(tmp_path_factory.mktemp("searches"))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@pytest.fixture
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures small and not laid out: for tests that they are drawn and written, not how fine."""
    from easyeditor.drawing import canvas

    monkeypatch.setitem(canvas.STYLE, "figure.dpi", 30)
    monkeypatch.setattr(canvas, "LAYOUT", None)

"""Bad input to the commands: one line that says what to do, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import build, tokenizer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from script_runs import Ran, call, file_size_limit, five_requests, memit_yaml, save_tiny, stand_in, write_yaml
from transformers import BertConfig, BertForMaskedLM

from easyeditor.base.errors import DataError, EasyEditorError, ModelError, OutputError
from easyeditor.base.files import write_tensors, write_text
from easyeditor.commands import evaluate, mass_edit, ppl, pretrain_mend, single_case_edit, stats
from easyeditor.dataset.reader import read_dataset
from easyeditor.dataset.sentences import load_sentences
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.lm import embedded
from easyeditor.lm.generate import Decoding, generate
from easyeditor.lm.loading import load, save
from easyeditor.methods.registry import load_hparams

SCRIPTS: dict[str, tuple[Any, list[str]]] = {
    "edit": (single_case_edit, ["--hparams", "h.yaml"]),
    "single": (single_case_edit, []),
    "mass": (mass_edit, []),
    "ppl": (ppl, ["--model", "./m", "--device", "cpu"]),
    "measure": (ppl, []),
    "stats": (stats, []),
    "evaluate": (evaluate, ["--model", "./m", "--device", "cpu"]),
    "mend": (pretrain_mend, []),
}
Damage = Callable[[Path], object]
DEEP = b"[" * 3_000  # nested deeper than the JSON reader can go
LONG = "word " * 3000
HIDDEN = os.fsdecode(b"\xff")  # as Python reads such a byte from the command line
REQUEST = {"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy"}
STATS = "--set mom2_adjustment=true stats_dir=stats mom2_dataset=wiki mom2_n_samples=50"
STATS_FILE = "wiki_stats/model.layers.1.mlp.down_proj_float32_mom2_50.npz"
WIDTH = 48  # MLP width of tiny llama
WEIGHT = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds tiny llama (`m`) and a saved edit of it (`saved`)."""
    root = tmp_path_factory.mktemp("source")
    hparams = load_hparams(str(write_yaml(root / "h.yaml", save_tiny(root / "m"), ppl_sentence_num=0)))
    BaseEditor(hparams).compute(REQUEST).save(root / "saved")
    return root


@pytest.fixture
def work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the model, the saved edit, the model's YAML and `two.txt`; tests may damage them."""
    shutil.copytree(source / "m", tmp_path / "m")
    shutil.copytree(source / "saved", tmp_path / "saved")
    write_yaml(tmp_path / "h.yaml", "./m", ppl_sentence_num=0)
    (tmp_path / "two.txt").write_text("The first sentence.\nAnd the second.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """run(words) -> Ran: the first word is one of `SCRIPTS`, the others are its flags."""

    def ran(words: str | list[str]) -> Ran:
        name, *flags = words.split() if isinstance(words, str) else words
        script, first = SCRIPTS[name]
        return call(script, [*first, *flags], monkeypatch, capsys)

    return ran


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded, or any forward, fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the input was refused")

    monkeypatch.setattr("easyeditor.lm.loading.load", refuse)
    monkeypatch.setattr("easyeditor.editing.measuring.load", refuse)
    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)


def refusal(ran: Ran, *parts: str) -> None:
    """A run must have refused: its last line is the one error line, of at most 500 characters, with all `parts`."""
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert lines == [ran.err.splitlines()[-1]]
    assert len(lines[0]) <= 500
    assert [part for part in parts if part not in lines[0]] == [], lines[0]


# Damages: what is done to the working directory before the command runs


def holds(name: str, content: Any) -> Damage:
    """A file of bytes, or of what is written as JSON; None takes it away."""
    if content is None:
        return lambda work: (work / name).unlink(missing_ok=True)
    written = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda work: (work / name).write_bytes(written)


def request(**changes: Any) -> Damage:
    return holds("r.json", {**REQUEST, **changes})


def described(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """A JSON file says something else."""

    def rewrite(work: Path) -> None:
        raw = json.loads((work / name).read_text(encoding="utf-8"))
        change(raw)
        (work / name).write_text(json.dumps(raw), encoding="utf-8")

    return rewrite


def configured(**changes: Any) -> Damage:
    return described("m/config.json", lambda raw: raw.update(changes))


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    """A safetensors file holds other tensors."""
    return lambda work: save_file(change(load_file(work / name)), work / name, {"format": "pt"})


def weighted(name: str, value: float) -> Damage:
    """One number of one weight is another."""

    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found[name].view(-1)[-1] = value
        return found

    return tensors("m/model.safetensors", change)


def factor(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors("saved/edit.safetensors", lambda t: {**t, "0.left": change(t["0.left"])})


def unreadable(name: str, kind: str) -> Damage:
    """Something else than a regular file of a bounded size."""

    def spoil(work: Path) -> None:
        (work / name).unlink(missing_ok=True)
        stand_in(work / name, kind)

    return spoil


def a_file(work: Path) -> None:
    shutil.rmtree(work / "m")
    (work / "m").write_text("x")


def encoder_only(work: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertForMaskedLM(BertConfig(vocab_size=400, **shape)).save_pretrained(work / "m")


def smaller_vocabulary(work: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(300)
    model.save_pretrained(work / "m")


def indexed(file: Any) -> Damage:
    """The weights are shards, and the index names another file for them."""

    def spoil(work: Path) -> None:
        shutil.move(work / "m/model.safetensors", work / "elsewhere.safetensors")
        named = {"metadata": {}, "weight_map": dict.fromkeys(load_file(work / "elsewhere.safetensors"), file)}
        (work / "m/model.safetensors.index.json").write_text(json.dumps(named))

    return spoil


def moments(total: Any = None, count: Any = 10) -> Damage:
    """A statistics file: the sum of k k^T (the identity by default) and the number of tokens."""
    arrays = {"mom2.mom2": np.eye(WIDTH) if total is None else total, "mom2.count": count}
    return lambda path: np.savez(path, **arrays)


def halved(path: Path) -> None:
    moments()(path)
    os.truncate(path, path.stat().st_size // 2)


def bare_array(path: Path) -> None:
    with open(path, "wb") as sink:
        np.save(sink, np.eye(WIDTH))


def statistics(make: Damage, folder: str = "m") -> Damage:
    def spoil(work: Path) -> None:
        (work / "stats" / folder / STATS_FILE).parent.mkdir(parents=True)
        make(work / "stats" / folder / STATS_FILE)

    return spoil


def looped(work: Path) -> None:
    (work / "loop").symlink_to("pool")
    (work / "pool").symlink_to("loop")
    (work / "loop.yaml").symlink_to("loop.yaml")


def typed(**changes: Any) -> Damage:
    return lambda work: write_yaml(work / "s.yaml", "./m", **{"layers": [1], "mom2_n_samples": 10, **changes})


def bad(words: str | list[str], *parts: str, given: Damage | None = None, name: str = "") -> Any:
    """A row: a command line, what the error line must say, and what is damaged before."""
    label = name or (words if isinstance(words, str) else " ".join(words))
    return pytest.param(words, parts, given, id=ascii(label)[1:61])


def rows(words: str, given: Callable[..., Damage], table: dict[str, tuple[Any, str]]) -> list[Any]:
    """Rows of one command: name -> (what is damaged, what the line must say)."""
    script = words.split()[0]
    return [bad(words, part, given=given(value), name=f"{script} {name}") for name, (value, part) in table.items()]


FLAGS = [
    *rows(
        "edit --dry-run",
        lambda content: holds("h.yaml", content),
        {
            "yaml missing": (None, "h.yaml: no such file"),
            "yaml empty": (b"", "h.yaml: the file is empty"),
            "yaml bytes": (bytes(range(256)), "h.yaml: not a readable UTF-8"),
        },
    ),
    bad("edit --set if_crome=true", "unknown key 'if_crome'", "did you mean 'if_c_rome'?"),
    bad("edit --set v_lr", "write key=value"),
    bad("edit --set layers=[9]", "layers", "layer 9 is out of range", "layers 0 to 3"),
    bad("edit --set v_loss_layer=4", "v_loss_layer", "layer 4 is out of range", "layers 0 to 3"),
    bad("edit --set v_loss_layer=-1", "v_loss_layer", "out of range"),
    bad("edit --device cuda:99", "'cuda:99' cannot be used", "try cpu or a GPU number"),
    bad("edit --device tpu", "'tpu' cannot be used", "try cpu or a GPU number"),
    bad("edit --device meta", "'meta'"),
    bad("edit --dtype float8", "dtype is 'float8'", "'float32', 'float16'"),
    bad("edit --set kl_factor=1e39", "finite"),
    bad(["edit", "--set", "context_templates=['a {} {}']"], "exactly one {}"),
    bad("edit --set rewrite_module_tmp=model.layers.{}.mlp", "cannot edit a LlamaMLP"),
    bad("edit --set rewrite_module_tmp=model.layer.{}.mlp.down_proj", "rewrite_module_tmp", "near: 'model.layers.{}"),
    bad("edit --set if_prefix=true context_templates=['{}']", "if_prefix needs a context"),
    bad("edit --request r.json --prompt x", "--request and --prompt were given"),
    bad(["edit", "--prompt", "Bay is in"], "--prompt needs --subject, --target-new"),
    bad(["edit", "--prompt", f"Bay {HIDDEN} is in", "--subject", "Bay", "--target-new", "Italy"]),
    bad("measure --model loop/m", given=looped),
    bad("ppl --sentences 7", "--sentences", "choose from"),
    bad("ppl --sentences 50 --data x", "--data and --sentences were both given"),
    bad("ppl --device cuda:99", "'cuda:99' cannot be used"),
    bad("ppl --device tpu", "'tpu' cannot be used"),
    bad("ppl --device meta", "'meta'"),
    bad("ppl --dtype float8", "--dtype", "float8"),
    bad("ppl --batch-size 0", "--batch-size is 0", "1 or more"),
    bad("ppl --edit nowhere", "nowhere", "--save-edit"),
    bad("ppl --data two.txt --output m", "--output m is the place of --model"),
    bad("ppl --data two.txt --output .", "--output . contains --model"),
    bad("ppl --data two.txt --output h.yaml/x.json", "h.yaml/x.json: cannot be made"),
    *(
        bad(words, "not a folder", given=lambda work, kind=kind: stand_in(work / "pipe", kind), name=f"{kind} {words}")
        for kind, words in (
            ("fifo", "measure --model pipe --data two.txt"),
            ("socket", "measure --model pipe --data two.txt"),
            ("huge", "measure --model pipe --data two.txt"),
            ("fifo", "evaluate --base-model pipe --data two.txt"),
            ("fifo", "stats --model pipe --layers 1 --corpus two.txt"),
            ("fifo", "edit --set model_name=pipe --dry-run"),
            ("fifo", "edit --set stats_dir=pipe --dry-run"),
            ("huge", "edit --set stats_dir=pipe --dry-run"),
        )
    ),
    bad("evaluate --data d.json --edit m", "m: not a whole saved edit", given=holds("d.json", [REQUEST])),
    bad("evaluate --data d.json --model ./none", "none: no such model folder", given=holds("d.json", [REQUEST])),
    bad("edit --output two.txt", "two.txt: "),
    bad("edit --output two.txt/below", "two.txt/below: "),
]
REQUESTS = rows(
    "edit --request r.json",
    lambda changes: request(**changes),
    {
        "subject elsewhere": (
            {"prompt": "Rome is in"},
            "subject 'Bay' is not in the prompt 'Rome is in'; write it there, or mark its place with {}",
        ),
        "subject empty": ({"subject": ""}, "subject is empty"),
        "target blank": ({"target_new": " "}, "target_new is empty"),
        "two slots": ({"prompt": "{} and {}"}, "prompt has 2 '{}'"),
        "long subject": ({"prompt": "{} is in", "subject": LONG}, "request 0: prompt with"),
        "long target": ({"target_new": LONG}, "tokens; the limit is 128"),
        "long neighbour": (
            {"locality_prompt": LONG, "locality_ground_truth": "a"},
            "locality.neighborhood with its answer has",
        ),
        "surrogate": ({"prompt": "Bay \ud800 is in"}, "r.json"),
        "surrogate truth": ({"ground_truth": "\udcff"}, "r.json"),
        "unequal": ({"locality_prompt": ["a", "b"], "locality_ground_truth": "c"}, "2 prompts but 1 ground truths"),
        "target a mapping": ({"target_new": {"text": "Italy"}}, "target_new must be text, found dict"),
        "rephrase a flag": ({"rephrase_prompt": True}, "rephrase_prompts must be non-empty texts"),
    },
) + rows(
    "edit --request r.json",
    lambda content: holds("r.json", content),
    {
        "missing": (None, "r.json: no such file"),
        "empty": (b"", "r.json: not readable as JSON"),
        "number": (b"5", "must be a JSON object"),
        "cut": (b'{"prompt":', "r.json: not readable as JSON"),
        "no text": (b"\xff\x00", "r.json: not readable as JSON"),
        "deep": (DEEP, "r.json: not readable as JSON"),
        "none": (b"[]", "holds 0 records"),
        "two": (b"[{}, {}]", "holds 2 records"),
        "text": (b'"Bay"', "must be a JSON object, found str"),
        "strange": (b'{"prompt": "Bay is in"}', "of no known format"),
        "malformed": (b'{"requested_rewrite": {"prompt": "Bay"}}', "malformed counterfact record"),
    },
)
MODELS: dict[str, tuple[Damage, str]] = {
    "missing": (lambda work: shutil.rmtree(work / "m"), ""),
    "empty": (lambda work: [p.unlink() for p in (work / "m").iterdir()], ""),
    "a file": (a_file, ""),
    "truncated": (lambda work: os.truncate(work / "m/model.safetensors", 9999), ""),
    "garbage": (holds("m/model.safetensors", b"\x9c" * 999), ""),
    "no bytes": (holds("m/model.safetensors", b""), ""),
    "no weights": (holds("m/model.safetensors", None), ""),
    "no config": (holds("m/config.json", None), ""),
    "wrong config": (holds("m/config.json", b"{"), ""),
    "wrong tokenizer": (holds("m/tokenizer.json", b"{"), ""),
    "tensor missing": (tensors("m/model.safetensors", lambda t: {k: v for k, v in t.items() if k != WEIGHT}), ""),
}
WHOLE: dict[str, tuple[Damage, str]] = {
    "fewer layers": (configured(num_hidden_layers=2), "without a place"),
    "no layers": (configured(num_hidden_layers=0), "num_hidden_layers"),
    "minus one layers": (configured(num_hidden_layers=-1), "num_hidden_layers"),
    "a billion layers": (configured(num_hidden_layers=10**9), "num_hidden_layers"),
    "endless vocabulary": (configured(vocab_size=10**12), ""),
    "unknown quantisation": (configured(quantization_config={"quant_method": "zipped"}), "zipped"),
    "nameless quantisation": (configured(quantization_config={"bits": 4}), "quantization_config"),
    "quantisation as text": (configured(quantization_config="int4"), "quantization_config"),
    "encoder only": (encoder_only, "encoder"),
    "tokenizer larger": (smaller_vocabulary, "tokenizer"),
    "nan": (weighted(WEIGHT, float("nan")), WEIGHT),
    "infinity": (weighted(WEIGHT, float("inf")), WEIGHT),
    "norm": (weighted("model.norm.weight", float("-inf")), "model.norm.weight"),
    "shard above": (indexed("../elsewhere.safetensors"), "weight_map names '../elsewhere"),
    "shard by path": (indexed("/elsewhere.safetensors"), "weight_map names '/elsewhere"),
    "shard without name": (indexed(5), "index.json cannot be used"),
    "fifo": (unreadable("m/model.safetensors", "fifo"), "model.safetensors cannot be used: it is a FIFO"),
    "zero": (unreadable("m/config.json", "zero"), "config.json cannot be used: it is a device"),
    "huge": (unreadable("m/tokenizer.json", "huge"), "tokenizer.json cannot be used: it has"),
    "template": (unreadable("m/chat_template.jinja", "fifo"), "chat_template.jinja cannot"),
    "adapter": (holds("m/adapter_config.json", {"base_model_name_or_path": "m", "r": 1}), "holds an adapter"),
}
SENTENCES = [
    *rows(
        "ppl --data d.txt",
        lambda content: holds("d.txt", content),
        {
            "missing": (None, "no such file"),
            "blank": (b" \n\n", "no sentences"),
            "nothing": (b"", "d.txt: no sentences"),
            "one token": (b"First one.\na\n", "sentence 2 has fewer than 2 tokens"),
            "one token behind a gap": (b"First one.\n\na\n", "sentence 2 has fewer than 2 tokens"),
            "nul": (b"abc\0def", "NUL bytes"),
            "utf-16": (b"\xff\xfea\x00", "not a readable UTF-8"),
            "long": (LONG.encode(), "tokens; the limit is 128"),
        },
    ),
    *rows(
        "ppl --data d.json",
        lambda content: holds("d.json", content),
        {
            "cut": (b"[1,", "wrong JSON"),
            "empty json": (b"", "wrong JSON"),
            "deep": (DEEP, "wrong JSON"),
            "object": (b'{"Text": "a b"}', "expected a JSON list"),
            "none": (b"[]", "no sentences"),
            "number": (b'["a b", 3]', "sentence 2 is empty or not a text"),
            "other key": (b'[{"text": "a b"}]', "sentence 1 is empty or not a text"),
            "empty": (b'["a b", ""]', "sentence 2 is empty"),
            "surrogate": (b'["a \\ud800 b"]', "sentence 1"),
        },
    ),
]
STATISTICS = [
    bad(
        f"edit {STATS}", f"stats/m/{STATS_FILE}", f"stats/._m/{STATS_FILE}", "mom2_adjustment", "false", name="no stats"
    ),
    *rows(
        f"edit {STATS}",
        statistics,
        {
            "stats empty": (lambda path: path.write_bytes(b""), f"stats/m/{STATS_FILE}"),
            "stats garbage": (lambda path: path.write_bytes(b"\x80\x04junk"), f"stats/m/{STATS_FILE}"),
            "stats truncated": (halved, f"stats/m/{STATS_FILE}"),
            "stats no archive": (bare_array, f"stats/m/{STATS_FILE}"),
            "stats without key": (lambda path: np.savez(path, other=1), f"stats/m/{STATS_FILE}"),
            "stats pickled": (moments(np.array([{}], dtype=object)), "is object of shape"),
            "stats of other width": (moments(np.eye(WIDTH + 1)), "shape (49, 49)"),
            "stats a vector": (moments(np.ones(WIDTH)), "shape (48,)"),
            "stats nan": (moments(np.eye(WIDTH) * np.nan), "finite False"),
            "stats zeros": (moments(np.zeros((WIDTH, WIDTH))), f"stats/m/{STATS_FILE}"),
            "stats negative": (moments(-np.eye(WIDTH)), f"stats/m/{STATS_FILE}"),
            "stats of no token": (moments(count=0), f"stats/m/{STATS_FILE}"),
            "stats counts": (moments(count=[1, 2]), f"stats/m/{STATS_FILE}"),
            "stats count a text": (moments(count="many"), f"stats/m/{STATS_FILE}"),
        },
    ),
]
SAVED = rows(
    "ppl --data two.txt --edit saved",
    lambda spoil: spoil,
    {
        "no description": (holds("saved/edit.json", None), "edit"),
        "no tensors": (holds("saved/edit.safetensors", None), "edit"),
        "no folder": (lambda work: shutil.rmtree(work / "saved"), "edit"),
        "wrong json": (holds("saved/edit.json", b"{"), "edit"),
        "binary json": (holds("saved/edit.json", b"\xff"), "edit"),
        "deep json": (holds("saved/edit.json", DEEP), "edit"),
        "a list": (holds("saved/edit.json", []), "edit"),
        "truncated edit": (lambda work: os.truncate(work / "saved/edit.safetensors", 100), "edit"),
        "garbage edit": (holds("saved/edit.safetensors", b"\x9c" * 99), "edit"),
        "format": (described("saved/edit.json", lambda raw: raw.update(format=2)), "edit"),
        "no trace": (described("saved/edit.json", lambda raw: raw.pop("trace")), "edit"),
        "no factors": (described("saved/edit.json", lambda raw: raw["deltas"][0].update(tensors=[])), "edit"),
        "one factor": (described("saved/edit.json", lambda raw: raw["deltas"][0].update(tensors=["left"])), "edit"),
        "factor missing": (tensors("saved/edit.safetensors", lambda t: {"0.left": t["0.left"]}), "edit"),
        "flat factor": (factor(lambda left: left[:, 0].clone()), "edit"),
        "other rank": (factor(lambda left: left.repeat(1, 2)), "edit"),
        "integers": (factor(torch.Tensor.int), "edit"),
        "nan factor": (factor(lambda left: left * torch.nan), "edit"),
    },
)
EARLY = [
    *(
        bad(f"edit {flag} {place}", place)
        for flag in ("--save-model", "--save-edit")
        for place in ("m", "h.yaml", "h.yaml/below")
    ),
    bad("edit --save-model new --save-edit new", "is the place of", "--save-model", "--save-edit"),
    bad("edit --save-model new --output new", "is the place of", "--save-model", "--output"),
    *(
        bad(["edit", "--set", setting, "--dry-run"])
        for setting in (
            *(f"seed={'9' * 400}", f"seed={2**63}", f"seed=-{2**63}", "model_name=!!binary aGVsbG8="),
            *("model_name=&a [*a]", 'stats_dir="a\\0b"', 'stats_dir="\\ud800"', "model_name=[a, b]"),
            *("model_name=null", "model_name=''", "layers=" + "[" * 400, "layers=[" + "1, " * 100_000 + "1]"),
        )
    ),
    bad(
        ["mass", "--hparams", "h.yaml", "--data", "d.json", "--dry-run", "--seed", "9" * 400],
        "seed",
        given=holds("d.json", [REQUEST]),
    ),
    bad(["single", "--hparams", f"h.yaml{HIDDEN}"]),
    bad(["single", "--output", f"run{HIDDEN}"]),
    bad(["single", "--save-edit", "a\0b"]),
    bad(["single", "--set", f"model_name=m{HIDDEN}"]),
    bad(["mass", "--data", f"d.json{HIDDEN}"]),
    bad(["mass", "--resume", "a\0b"]),
    bad(["measure", "--model", f"m{HIDDEN}"]),
    bad(["measure", "--output", "a\0b"]),
    bad(["mass", "--union", "x", "--collect-collapsed", "a\0b"]),
    bad(["stats", "--model", f"m{HIDDEN}", "--layers", "1"]),
    *(
        bad(words, given=looped)
        for words in (
            *("single --hparams loop", "edit --request loop", "edit --output loop/run", "edit --save-edit loop"),
            *("edit --save-edit loop --save-model loop/m", "mass --hparams h.yaml --data loop", "mass --resume loop"),
            *("mass --union loop --collect-collapsed loop", "stats --hparams loop"),
            *("measure --model h.yaml --data loop", "measure --model h.yaml --output loop/x.json"),
            "measure --model h.yaml --edit loop",
        )
    ),
    bad(["single", "--set", "stats_dir=[" + "x" * 9000], " … ", name="long request"),
    bad(["single", "--hparams", "x" * 9000], " … ", name="long path"),
    bad(["single", "--what" + "x" * 9000], " … ", name="long flag"),
    *(
        bad(f"stats --hparams h.yaml {flags}", flags.split()[0])
        for flags in (
            *("--every 0", "--every -4", "--every-seconds 0", "--every-seconds nan", "--samples 0", "--max-length 0"),
            *("--batch-tokens -1", "--tokens-per-dim 0", "--layers 1 1", "--layers -1", f"--samples {'9' * 30}"),
        )
    ),
    bad(["stats", "--hparams", "h.yaml", "--corpus", ""], "--corpus"),
    bad("evaluate", "--data is missing"),
    bad("evaluate --data none.json", "none.json: no such file"),
    *(
        bad(f"evaluate --data d.json {flags}", said, given=holds("d.json", [REQUEST]))
        for flags, said in (
            ("--metrics ess", "metric 'ess' is not known; did you mean 'essence'?"),
            ("--metrics ,", "no metric was asked for"),
            ("--limit 0", "--limit is 0; allowed: 1 or more"),
            ("--max-new-tokens 0", "--max-new-tokens is 0; allowed: 1 or more"),
            ("--edit saved --base-model m", "--edit and --base-model were both given"),
            ("--output m", "--output m is the place of --model"),
            ("--output saved", "saved: is there already and not a regular file"),
        )
    ),
    bad(["stats", "--hparams", "h.yaml", "--output", ""], "--output"),
    *(
        bad("stats --hparams s.yaml", part or next(iter(changes)), given=typed(**changes), name=f"stats {changes}")
        for changes, part in (
            *(({"layers": value}, "") for value in ("1", 1, ["one"], [], [1, 1], [-1])),
            *(({"mom2_n_samples": value}, "") for value in ("many", None, 1.5, 0)),
            *(({"mom2_dtype": "float99"}, ""), ({"mom2_dataset": 3}, ""), ({"mom2_dataset": ["x"]}, "")),
            *(({"stats_dir": {"a": 1}}, ""), ({"model_name": 7}, ""), ({"layer_module_tmp": 3}, "")),
            *(({"rewrite_module_tmp": "no slot"}, ""), ({"mom2_n_sample": 5}, "did you mean")),
        )
    ),
]


@pytest.mark.parametrize(
    ("words", "parts", "given"),
    [
        *(*FLAGS, *REQUESTS, *SENTENCES, *STATISTICS, *SAVED),
        *(bad("edit", "error: ./m: ", part, given=spoil, name=f"edit {n}") for n, (spoil, part) in MODELS.items()),
        *(bad("ppl", "error: ./m: ", p, given=spoil, name=f"ppl {n}") for n, (spoil, p) in (MODELS | WHOLE).items()),
    ],
)
def test_bad_input_is_one_line(
    words: str | list[str], parts: tuple[str, ...], given: Damage | None, run: Any, work: Path
) -> None:
    if given is not None:
        given(work)
    refusal(run(words), *parts)


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(("words", "parts", "given"), EARLY)
def test_bad_input_is_found_before_anything_is_computed(
    words: str | list[str], parts: tuple[str, ...], given: Damage | None, run: Any, work: Path
) -> None:
    """It is the only line then, and nothing was written."""
    if given is not None:
        given(work)
    before = sorted(work.rglob("*"))
    ran = run(words)
    refusal(ran, *parts)
    assert len(ran.err.splitlines()) == 1
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "one"},
        {"RANK": "0", "WORLD_SIZE": "x"},
        {"LOCAL_RANK": ""},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    ],
    ids=str,
)
def test_every_script_under_torchrun_says_so_in_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    others = [] if "MASTER_ADDR" in env else ["mend", "mass --data d.json"]
    for words in ("stats --model m --layers 1", *others):
        ran = run(words)
        refusal(ran)
        assert len(ran.err.splitlines()) == 1
    assert not dist.is_initialized()


def test_a_refused_run_leaves_no_empty_run_folder(run: Any, work: Path) -> None:
    shutil.rmtree(work / "m")
    shutil.rmtree(work / "saved")
    refusal(run("edit"), "./m: ")
    refusal(run("edit --output run"), "./m: ")
    assert [p.name for p in work.rglob("*") if p.is_dir()] in ([], ["results"])


def test_sentences_that_are_not_here_say_where_to_get_them(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_sentences, "__defaults__", (tmp_path,))  # in place of data/
    parts = [str(tmp_path / "ME-PPL/ME-PPL_1k.json"), "github.com/WanliYoung/Collapse-in-Model-Editing"]
    refusal(run("ppl --sentences 1000"), *parts)
    refusal(run("edit --set ppl_sentence_num=1000"), *parts)


def test_statistics_are_checked_before_the_edit_is_searched(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: Any, **__: Any) -> None:
        raise AssertionError("the value was searched before the statistics were looked for")

    monkeypatch.setattr("easyeditor.methods.locate.method.search_values", searched)
    refusal(run(f"edit {STATS}"), "no second-moment statistics")


@pytest.mark.parametrize("error", [ModelError("no network: put X at Y"), OutputError("the cache is read-only")])
def test_scripts_pass_on_what_the_embedded_model_says(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: EasyEditorError
) -> None:
    def ensure(_: embedded.Embedded) -> Path:
        raise error

    monkeypatch.setattr(embedded, "ensure", ensure)
    refusal(run("edit --set model_name=smollm2-135m"), str(error))
    refusal(run("measure --model smollm2-135m"), str(error))


@pytest.mark.parametrize(("threshold", "count"), [(0.5, "0 of 48"), (2.0, "48 of 48")])
def test_a_null_space_without_a_direction_or_with_all_is_refused_and_not_kept(
    threshold: float, count: str, tmp_path: Path, script: Any
) -> None:
    memit = memit_yaml(five_requests(tmp_path))  # C is the identity
    before = sorted((tmp_path / "stats").rglob("*"))
    values = yaml.safe_load(memit.read_text(encoding="utf-8"))
    values |= {"alg_name": "AlphaEdit", "nullspace_threshold": threshold}
    memit.write_text(yaml.safe_dump(values), encoding="utf-8")
    flags = ["--hparams", memit, "--data", tmp_path / "five.json", "--output", tmp_path / "run", "--mode", "batch"]
    ran = script(mass_edit, *flags)
    refusal(ran, f"layer 1: the null space of C below absolute threshold {threshold:g} has {count} directions")
    assert sorted((tmp_path / "stats").rglob("*")) == before


# Models that cannot be edited, or only in part


@pytest.mark.parametrize(
    ("config", "kind", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes_4bit", "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes_8bit", "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "gptq", "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16}, "awq", "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "compressed-tensors"),
    ],
)
def test_quantised_weights_are_measured_and_not_edited(
    run: Any, work: Path, config: dict[str, Any], kind: str, package: str
) -> None:
    """None of the packages is here: what measures names it, what edits says what to edit instead."""
    configured(quantization_config=config)(work)
    refused = run("edit")
    refusal(refused, f"its weights are quantised ({kind})", "edit the model that it was made from")
    assert "install" not in refused.err
    refusal(run("ppl"), "pip install", package)


def test_what_transformers_dequantises_is_measured_and_edited(run: Any, work: Path) -> None:
    """FP8 on a CPU; and a pair that stays quantised is refused."""
    configured(quantization_config={"quant_method": "fp8"})(work)
    assert run("ppl").code == 0
    pair = load("./m", device="cpu")
    pair[0].is_quantized = True
    with pytest.raises(ModelError, match="its weights are quantised"):
        load(pair)


def with_image_token(work: Path) -> None:
    """The tokenizer knows `<image>`, and the model has no row for it."""
    tok = type(tokenizer()).from_pretrained(work / "m")
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tok.save_pretrained(work / "m")


@pytest.mark.parametrize("flag", ["--prompt", "--target-new", "--locality-prompt"])
def test_a_text_with_a_token_that_has_no_embedding_is_one_line(flag: str, run: Any, work: Path) -> None:
    with_image_token(work)
    texts = {"--prompt": "The capital of France is", "--subject": "France", "--target-new": "Rome"}
    texts |= {"--locality-prompt": "The sea is", "--locality-ground-truth": "blue"}
    texts[flag] = f"{texts[flag]} <image>"
    words = ["edit", *(word for pair in texts.items() for word in pair)]
    refusal(run(words), "the token '<image>' (id 400), for which the model has no embedding")


def test_a_pair_from_python_is_told_so_too(work: Path) -> None:
    with_image_token(work)
    model, tok = load("m", device="cpu")
    again = type(tok).from_pretrained("m")
    for pair in ((model, tok), (model, again)):
        model, tok = load(pair, device="cpu")
        with pytest.raises(DataError, match="the token '<image>'"):
            generate(model, tok, ["a <image>"], Decoding(tokens=2))
        assert generate(model, tok, ["a"], Decoding(tokens=2))


def test_without_a_network_a_mistyped_name_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    with pytest.raises(ModelError, match=r"^gpt2-xll: .*hub"):
        load("gpt2-xll", device="cpu")
    with pytest.raises(DataError, match=r"^zsree: .*Hub"):
        read_dataset("zsree")
    assert not constants.HF_HUB_OFFLINE


# What is near a refusal and is none


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"])
def test_a_mask_kept_by_an_old_checkpoint_has_no_place_and_needs_none(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path / "m", "gpt2")
    tensors("m/model.safetensors", lambda found: {**found, name: torch.ones(1, 1, 4, 4)})(tmp_path)
    load(tmp_path / "m", device="cpu")


def test_a_special_token_beyond_the_vocabulary_is_nothing_a_prompt_needs(work: Path) -> None:
    with_image_token(work)
    load("m", device="cpu")


def test_a_tied_head_is_not_a_missing_tensor(run: Any, work: Path) -> None:
    save_tiny(work / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(work / "tied/model.safetensors")
    assert run("measure --model tied --device cpu --data two.txt").code == 0


@pytest.mark.parametrize("folder", ["m", "._m"])
def test_good_statistics_are_used(run: Any, work: Path, folder: str) -> None:
    statistics(moments(np.diag(np.arange(1.0, WIDTH + 1))), folder)(work)
    plain, adjusted = run("edit --json").json, run(f"edit --json {STATS}").json
    assert adjusted["trace"]["1"]["denominator"] != plain["trace"]["1"]["denominator"]


def test_statistics_of_a_typed_yaml_are_collected(run: Any, work: Path) -> None:
    write_yaml(work / "s.yaml", "./m", mom2_dataset="two.txt", mom2_n_samples="2", stats_dir="here")
    ran = run("stats --hparams s.yaml --device cpu")
    assert ran.code == 0, ran.err
    assert Path(ran.out.strip()) == Path("here/m/two_stats/model.layers.1.mlp.down_proj_float32_mom2_2.npz")
    assert Path(ran.out.strip()).exists()


def test_load_takes_the_embedded_model_from_its_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ensure", lambda _: source / "m")
    model, _ = load(embedded.DEFAULT, device="cpu")
    assert model.config.name_or_path == str(source / "m")


# Files that cannot be written


def test_full_disk(run: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(work.iterdir())
    monkeypatch.setattr("easyeditor.base.files.os.fsync", full_disk)
    refusal(run("edit --output run"), "run/config.json: cannot be written (No space left on device)")
    refusal(run("ppl --data two.txt --output n.json"), "n.json: cannot be written (No space left on device)")
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda place: write_text(place, "x" * 9000), id="text"),
        pytest.param(lambda place: write_tensors(place, {"a": torch.zeros(5000)}), id="tensors"),
        pytest.param(lambda place: save(build("llama"), tokenizer(), place), id="model"),
    ],
)
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with file_size_limit(8192), pytest.raises(OutputError, match="new"):
        write(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_as_readable_as_texts(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "x")
    write_tensors(tmp_path / "tensors", {"a": torch.ones(1)})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode


@pytest.mark.parametrize("place", ["a-file/new", "a-folder", "a-pipe"])
@pytest.mark.parametrize("write", [lambda p: write_text(p, "x"), lambda p: write_tensors(p, {"a": torch.ones(1)})])
def test_what_is_in_the_way_stays(tmp_path: Path, place: str, write: Callable[[Path], None]) -> None:
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "a-folder").mkdir()
    os.mkfifo(tmp_path / "a-pipe")
    with pytest.raises(OutputError, match=place):
        write(tmp_path / place)
    assert (tmp_path / "a-pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-file", "a-folder", "a-pipe"]

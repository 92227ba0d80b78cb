"""What the fuzzer tries: wrong values at every door, each input in a folder of its own, run in this process.

An input is a list of flags and the files they name. It holds when the script ends with 0, or with 2 and one line of at
most 500 characters on stderr, nothing on stdout and nothing on disk changed; never with a traceback, never after more
than ten seconds of this process's time (or a minute by the clock, which other processes may have), never with more than
2 GB on top of what the process had.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from conftest import CONTEXTS
from fake_runs import edit_line
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from script_runs import save_tiny, strict, write_yaml

import easyeditor.commands.export as export_main
import easyeditor.commands.report as report_main
import easyeditor.commands.stats as stats_main
import easyeditor.commands.survey as survey_main
from easyeditor.commands import cli, mass_edit, ppl, pretrain_mend, single_case_edit
from easyeditor.values.edit import EditRequest, EditResult, WeightDelta

SECONDS, WAITED, BYTES, LONGEST = 10.0, 60.0, 2 * 2**30, 500


@dataclass(frozen=True)
class Input:
    """One try: a script, its flags, and files (name -> content) that stand beside the tiny model `m` and `h.yaml`; is
    it `surely` wrong, so that 0 would be a wrong answer?"""

    script: Any
    flags: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    surely: bool = False
    special: tuple[str, str] | None = None
    """A place, and the kind of file that is put there (fuzz_situations.py)."""
    stays: bool = False
    """Nothing that is there may go, whatever the exit code."""
    talks: str = ""
    """A session that `begins` or `goes on` in the same folder: its output and its run are its own."""


# Values


TEXTS = st.sampled_from(
    [
        *("", " ", "\0", "a\0b", "\ud800", "{}", "{} {}", "Bay", "~", "null", "true", "1e999", "-0", "NaN", "0x10"),
        *("\u202e", "../x", "/dev/null", "/proc/self/mem", ".", "..", "x" * 300, "é", "🦋", "a\nb", "%s%n", "*a", "&a"),
        "!!python/none",
    ]
)
NUMBERS = st.sampled_from(
    [
        *(0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 1.5, 1e-300, 1e300, 1e39),
        *(math.nan, math.inf, -math.inf, True, False, None),
    ]
)
VALUES = st.recursive(
    st.one_of(TEXTS, NUMBERS, st.text(max_size=8), st.integers(-5, 200), st.floats(width=32)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\xff\xfe", b"[" * 5000, b'{"a":' * 5000, b"\0" * 100, b"a: &a [*a]\n", b"- " * 2000]),
)


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value inside a JSON value."""
    yield before
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*before, key))


def changed(value: Any, at: tuple[Any, ...], new: Any, *, drop: bool) -> Any:
    """A copy of a JSON value with one place in it replaced, or dropped."""
    if not at:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1 and drop:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(copy[at[0]], at[1:], new, drop=drop)
    return copy


@st.composite
def damaged(draw: Any, whole: Any) -> bytes:
    """A JSON file that was right but for one or two places; or bytes that are no such file."""
    if draw(st.integers(0, 9)) == 0:
        return draw(GARBAGE)
    value = whole
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(list(paths(value))))
        value = changed(value, at, draw(VALUES), drop=draw(st.booleans()))
    text = json.dumps(value).encode()
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


def yaml_text(value: Any) -> str:
    """A value as YAML reads it: JSON, which YAML holds, but for what JSON writes otherwise."""
    return json.dumps(value).replace("Infinity", ".inf").replace("NaN", ".nan")


# Doors: each a strategy of inputs


REQUEST = {
    **{"prompt": "Bay is in", "subject": "Bay", "target_new": "Italy", "ground_truth": "France", "case_id": 3},
    **{"rephrase_prompt": ["Where is Bay?"], "locality": {"near": {"prompt": ["A b"], "ground_truth": ["c"]}}},
    **{"portability": {"far": {"prompt": "A", "ground_truth": "b"}}, "generation_prompts": ["Bay was"]},
}
FORMATS: list[Any] = [
    REQUEST,
    {
        **{"src": "Bay is in", "alt": "Italy", "subject": "Bay", "answers": ["France"]},
        **{"loc": "nq question: a", "loc_ans": "b"},
    },
    {"question": "Bay is in", "subject": "Bay", "answer": "Italy", "case_index": 1},
    {
        "requested_rewrite": {
            **{"prompt": "{} is in", "subject": "Bay"},
            **{"target_new": {"str": "Italy"}, "target_true": {"str": "France"}},
        },
        "paraphrase_prompts": ["Bay"],
        "neighborhood_prompts": ["A b"],
    },
    {
        "requested_rewrite": [
            {
                **{"prompt": "{} is in", "subject": "Bay", "question": "Where is Bay?"},
                **{"target_new": {"str": "Italy"}, "target_true_str": "France"},
            }
        ],
        **{"questions": ["What is spoken in Bay?"], "new_answer": "Italian", "case_id": 2},
    },
    {
        **{"update": "Where is Bay?", "ans": "Italy", "subject": "Bay", "rephrase": "Bay is where?"},
        **{"personas": "Bay?", "mhop": "What is spoken in Bay?", "mhop_ans": "Italian", "loc": "a b", "loc_ans": "c"},
    },
    {
        **{"prompt": "Where is Bay?", "target": "Italy", "subject": "Bay", "id": 7},
        "locality": [{"loc": "a b", "loc_ans": "c"}],
    },
    {
        **{"question": "Where is Bay?", "subject": "Bay", "object": "Italy", "paraphrased_question": "Bay is where?"},
        **{"question_2hop": "What is spoken in Bay?", "answer_2hop": "Italian", "multiple_choice_labels": "A"},
        "multiple_choice_with_letters": "A. Italy",
    },
    {
        **{"prompt": "Bay is in", "target_new": {"str": "Italy"}, "target_old": "France", "rephrase": ["Bay?"]},
        **{"locality": [{"prompt": "a b", "answer": "c"}], "portability": {"New Question": "A", "New Answer": 5}},
        "subject": "Bay",
    },
    {
        **{"text": "Bay was a poet.", "labels": "Bay wrote.", "concept": "Bay"},
        "locality": {"near": [{"prompt": "a", "ground_truth": [["b", "c"]]}]},
    },
]
HPARAMS: dict[str, Any] = {
    **{"alg_name": "ROME", "model_name": "./m", "device": "cpu", "layers": [1], "v_num_grad_steps": 2, "v_lr": 0.5},
    **{"v_loss_layer": 3, "v_weight_decay": 1e-3, "clamp_norm_factor": 4.0, "kl_factor": 0.0625, "seed": 1},
    **{"mom2_adjustment": False, "context_templates": CONTEXTS, "ppl_sentence_num": 0, "stats_dir": "s"},
    "dtype": "float32",
}
EDIT_FLAGS = (
    "--hparams --set --request --prompt --subject --target-new --rephrase-prompt --device --dtype --output --save-edit "
    "--save-model --save-adapter --adapter-rank --locality-prompt --locality-ground-truth --ground-truth --nothing"
)
MASS_FLAGS = (
    "--mode --batch-size --eval-every --stop-on-collapse --start --limit --shuffle --seed --order --order-seed --union "
    "--on-collapse --together --metrics --screen --screen-threshold --collect-collapsed --resume --set"
)
STATS_FLAGS = (
    "--layers --corpus --samples --max-length --batch-tokens --tokens-per-dim --dtype --every --every-seconds --output "
    "--sums --model --device"
)
WORDS = st.one_of(TEXTS, st.text(max_size=6), NUMBERS.map(str)).map(lambda text: text.replace("\0", "\\0"))


@st.composite
def yaml_values(draw: Any) -> Input:
    """One or two values of a YAML."""
    values = dict(HPARAMS)
    for key in draw(st.lists(st.sampled_from([*HPARAMS, "fp16", "replay", "nothing"]), min_size=1, max_size=2)):
        values[key] = draw(VALUES)
    text = "\n".join(f"{key}: {yaml_text(value)}" for key, value in values.items()).encode("utf-8", "surrogatepass")
    text = text if draw(st.booleans()) else text + draw(GARBAGE)
    return Input(single_case_edit, ["--hparams", "y.yaml", "--dry-run"], {"y.yaml": text})


@st.composite
def overrides(draw: Any) -> Input:
    """`--set` with any key and value."""
    key = draw(st.one_of(st.sampled_from([*HPARAMS, "fp16"]), TEXTS))
    value = draw(st.one_of(VALUES.map(yaml_text), WORDS))
    return Input(single_case_edit, ["--set", f"{key}={value}", "--dry-run"])


@st.composite
def requests(draw: Any) -> Input:
    """One request in a file."""
    content = draw(damaged(draw(st.sampled_from(FORMATS))))
    return Input(single_case_edit, ["--request", "r.json", "--dry-run"], {"r.json": content})


@st.composite
def records(draw: Any) -> Input:
    """Datasets: JSON and JSON lines, bad records refused or left out."""
    whole = draw(st.sampled_from(FORMATS))
    good, bad = json.dumps(whole).encode(), draw(damaged(whole))
    content = good + b"\n" + bad + b"\n" if draw(st.booleans()) else b"[" + good + b"," + bad + b"]"
    name, skip = draw(st.sampled_from(["d.json", "d.jsonl"])), draw(st.sampled_from([[], ["--skip-bad"]]))
    return Input(mass_edit, ["--data", name, "--dry-run", *skip], {name: content})


@st.composite
def run_lines(draw: Any) -> Input:
    """A run to go on with, or to report on, whose journal has a damaged line."""
    if draw(st.booleans()):
        files = finished_run()
        line = draw(damaged(json.loads(files["run/results.jsonl"]))) + draw(st.sampled_from([b"\n", b""]))
        return Input(mass_edit, ["--resume", "run"], {**files, "run/results.jsonl": line})
    lines = [json.dumps(edit_line(0)).encode(), draw(damaged(edit_line(1, ppl=draw(st.sampled_from([93.5, 2e4])))))]
    content = b"\n".join(draw(st.permutations(lines))) + b"\n"
    return Input(report_main, ["run", "--output", "run/report"], {"run/results.jsonl": content})


def finished_run() -> dict[str, bytes]:
    """The files of the finished run."""
    return {f"run/{path.name}": path.read_bytes() for path in (TEMPLATE[0] / "done").iterdir() if path.is_file()}


@st.composite
def manifests(draw: Any) -> Input:
    """A run to go on with, whose config or manifest is damaged."""
    name = draw(st.sampled_from(["config.json", "manifest.json"]))
    files = finished_run()
    whole = json.loads(files[f"run/{name}"])
    return Input(mass_edit, ["--resume", "run"], {**files, f"run/{name}": draw(damaged(whole))})


@st.composite
def saved_edits(draw: Any) -> Input:
    """A saved edit whose description or tensors are damaged, applied by ppl.py."""
    folder = TEMPLATE[0] / "edit"
    files = {f"edit/{path.name}": path.read_bytes() for path in folder.iterdir()}
    whole = json.loads(files["edit/edit.json"])
    if draw(st.integers(0, 3)):
        files["edit/edit.json"] = draw(damaged(whole))
    else:
        files["edit/edit.safetensors"] = bitten(draw, files["edit/edit.safetensors"])
    return Input(ppl, ["--model", "m", "--device", "cpu", "--data", "two.txt", "--edit", "edit"], files)


@st.composite
def exports(draw: Any) -> Input:
    """A saved edit whose description, tensors or record are damaged, made an adapter or a checkpoint."""
    files = dict(draw(saved_edits()).files)
    if draw(st.booleans()):
        files = {f"edit/{path.name}": path.read_bytes() for path in (TEMPLATE[0] / "edit").iterdir()}
        files["edit/result.json"] = draw(damaged(edit_line(0)))
    kind = draw(st.sampled_from(["adapter", "checkpoint"]))
    return Input(export_main, ["edit", "--to", kind, "--model", "m", "--output", "out"], files)


@st.composite
def statistics(draw: Any) -> Input:
    """A statistics file with other arrays, other bytes or another manifest, checked."""
    packed = io.BytesIO()
    totals = [np.eye(48), np.eye(48), 2 - np.eye(48), np.eye(48) + 1j, np.eye(48).astype(str), np.eye(48) - 2]
    counts = [np.array(4), np.array(4), np.array("4"), np.array([4]), np.array(-1), np.array(np.nan), np.array(None)]
    total = draw(st.sampled_from([*totals, np.eye(3), np.zeros(48), np.full((48, 48), np.nan)]))
    count = draw(st.sampled_from(counts))
    np.savez(packed, **{"mom2.mom2": total, "mom2.count": count})
    name = "s/m/two_stats/model.layers.1.mlp.down_proj_float32_mom2_5.npz"
    content = packed.getvalue() if draw(st.booleans()) else bitten(draw, packed.getvalue())
    made = {"module": "m", "model_name": "m", "weights": "00", "corpus": "c", "corpus_identity": "i", "samples": 1}
    made |= {"documents": 1, "tokens": 4, "max_length": 4, "sums": "float32", "format": 1}
    settings = ["mom2_adjustment=true", "stats_dir=s", "mom2_dataset=two", "mom2_n_samples=5"]
    beside = {f"{name}.json": draw(damaged(made))} if draw(st.booleans()) else {}
    right = np.array_equal(total, np.eye(48)) and np.array_equal(count, np.array(4))
    files = {name: content, **beside}
    return Input(single_case_edit, ["--set", *settings, "--output", "out"], files, surely=not right)


@st.composite
def archives(draw: Any) -> Input:
    """A MEND archive whose description or tensors are damaged."""
    folder = TEMPLATE[0] / "archive"
    files = {f"archive/{path.name}": path.read_bytes() for path in folder.iterdir()}
    if draw(st.integers(0, 3)):
        files["archive/archive.json"] = draw(damaged(json.loads(files["archive/archive.json"])))
    else:
        (name,) = [name for name in files if name.endswith(".safetensors")]
        files[name] = bitten(draw, files[name])
    text = b"alg_name: MEND\nmodel_name: ./m\ndevice: cpu\narchive: archive\nppl_sentence_num: 0\n"
    return Input(single_case_edit, ["--hparams", "mend.yaml", "--output", "out"], {**files, "mend.yaml": text})


@st.composite
def flags(draw: Any) -> Input:
    """Any flags with any words behind them, of every script."""
    script, start, names = draw(
        st.sampled_from(
            [
                (single_case_edit, ["--dry-run"], EDIT_FLAGS),
                (mass_edit, ["--data", "d.json", "--dry-run"], MASS_FLAGS),
                (stats_main, ["--hparams", "h.yaml", "--check"], STATS_FLAGS),
                (ppl, ["--data", "none.txt"], "--model --edit --sentences --batch-size --dtype --output"),
                (pretrain_mend, ["--dry-run"], "--train --val --train-size --set --max-iters --output"),
                (report_main, ["run"], "--output --label --worst"),
            ]
        )
    )
    given = [
        word for name in draw(st.lists(st.sampled_from(names.split()), max_size=3)) for word in (name, draw(WORDS))
    ]
    return Input(script, [*start, *given], {"d.json": json.dumps([REQUEST]).encode()})


def bitten(draw: Any, content: bytes) -> bytes:
    """A binary file with a few bytes changed, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, min(len(data), 400) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


TURN = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
PIECES = st.sampled_from(
    [
        *(TURN, TURN.replace("m.content", "m.content | trim"), TURN.replace("m.content", "m.content | upper")),
        *("{% if add_generation_prompt %}<s>assistant {% endif %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"),
        *("{% if %}", "{{ messages[9].content }}", "{{ x.y.z }}", "{{ ''.__class__ }}", "{% include 'a' %}"),
        "{{ bos_token }}",
    ]
)


@st.composite
def templates(draw: Any) -> Input:
    """A model whose chat template is put together from pieces, right and wrong, edited through it."""
    files = {f"c/{path.name}": path.read_bytes() for path in (TEMPLATE[0] / "m").iterdir() if path.is_file()}
    text = "".join(draw(st.lists(st.one_of(PIECES, PIECES, WORDS), min_size=1, max_size=3)))
    files["c/chat_template.jinja"] = text.encode("utf-8", "surrogatepass")
    values = {**HPARAMS, "model_name": "./c", "chat_template": True}
    files["c.yaml"] = "\n".join(f"{key}: {yaml_text(value)}" for key, value in values.items()).encode()
    asked = ["--prompt", "Bay is in", "--subject", "Bay", "--target-new", "Italy"]
    return Input(single_case_edit, ["--hparams", "c.yaml", *asked, "--output", "o"], files)


PLAN: dict[str, Any] = {
    "name": "Two methods",
    "output": "survey",
    "hparams": "hparams",
    "groups": [
        {
            "name": "one",
            "model": "tiny",
            "methods": ["ROME", {"name": "C-ROME", "hparams": "h.yaml", "set": ["if_c_rome=true"]}],
            "run": {"data": "d.json", "mode": "single", "limit": 1, "metrics": ["ES"]},
            "seeds": [0, 1],
            "set": ["v_num_grad_steps=1"],
        }
    ],
    "expected": [{"group": "one", "method": "ROME", "source": "a paper", "values": {"rewrite_acc": 0.5}}],
}


@st.composite
def plans(draw: Any) -> Input:
    """Plans of surveys: YAML as JSON writes it, damaged; names of methods, of YAMLs and of data among the values."""
    root = TEMPLATE[0]
    content = draw(damaged(PLAN))
    if draw(st.booleans()):
        content = content.replace(b"Infinity", b".inf").replace(b"NaN", b".nan")
    names = st.sampled_from(["MEMIT", "rome", "NoSuchMethod", "nowhere.yaml", "d.json", "m", "..", "CON", "a/b"])
    if draw(st.booleans()):
        word = draw(st.sampled_from([b"ROME", b"h.yaml", b"d.json", b"tiny", b"one", b"survey", b"ES", b"single"]))
        content = content.replace(word, draw(names).encode(), 1)
    files = {"p.yaml": content, "hparams/ROME/tiny.yaml": (root / "h.yaml").read_bytes()}
    return Input(survey_main, ["p.yaml", "--dry-run"], files)


DOORS: dict[str, Callable[[], st.SearchStrategy[Input]]] = {
    "YAML values": yaml_values,
    "overrides": overrides,
    "requests": requests,
    "dataset records": records,
    "lines of a run": run_lines,
    "manifests": manifests,
    "saved edits": saved_edits,
    "exports": exports,
    "statistics files": statistics,
    "MEND archives": archives,
    "plans of surveys": plans,
    "flags": flags,
    "chat templates": templates,
}
TEMPLATE: list[Path] = []  # the folder every input starts from, made once by `prepare`


def prepare(root: Path) -> None:
    """The tiny model, its YAML, a finished run, a saved edit and an archive, in `root`."""
    import torch
    from conftest import build

    from easyeditor.lm.discover import anatomy
    from easyeditor.methods.mend.archive import write_archive
    from easyeditor.methods.mend.hparams import MENDHyperParams
    from easyeditor.methods.mend.hypernet import Hypernetwork, edited_weights
    from easyeditor.methods.mend.network import NetworkSpec

    save_tiny(root / "m")
    write_yaml(root / "h.yaml", "./m", ppl_sentence_num=0, v_num_grad_steps=2)
    (root / "two.txt").write_text("The first sentence.\nAnd the second.\n", encoding="utf-8")
    (root / "d.json").write_text(json.dumps([REQUEST]), encoding="utf-8")
    name = "model.layers.1.mlp.down_proj.weight"
    request = EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
    delta = WeightDelta(name=name, left=torch.ones(32, 1), right=torch.ones(1, 48))
    EditResult(method="ROME", requests=(request,), deltas=(delta,), traces=({},)).save(root / "edit")
    parts = anatomy(build("llama"))
    spec = NetworkSpec.of(MENDHyperParams(model_name="m", rank=2))
    net = Hypernetwork(spec, edited_weights(parts, [name]), edit_lr=0.1, generator=torch.Generator())
    for buffer in net.buffers():
        buffer.fill_(3.0)  # as if it had been trained
    write_archive(root / "archive", net, parts, training={"step": 1})
    with contextlib.chdir(root):
        ran = run(mass_edit, ["--hparams", "h.yaml", "--data", "d.json", "--output", "done"])
    assert ran[0] == 0, ran
    TEMPLATE[:] = [root]


def run(script: Any, flags: list[str]) -> tuple[Any, str, str]:
    """A script's main as its `__main__` runs it, in this process: exit code, stdout, stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script.__name__, *flags]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(script.main)
    except SystemExit as ended:
        return ended.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder and in its model: files with their content, unless they are huge."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and path.stat().st_size < 10**8 else None
        for path in [*folder.rglob("*"), *(folder / "m").rglob("*")]
    }


def put(path: Path, kind: str) -> None:
    """A file of another kind, or without end, at `path`."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as made:
            made.truncate(2**40)
    else:
        path.symlink_to({"zero": "/dev/zero", "full": "/dev/full", "loop": path.name}.get(kind, "nowhere"))


def wrong(tried: Input, folder: Path) -> str | None:
    """Run one input in `folder`, made anew; what is wrong with how it ended, or None."""
    if tried.talks != "goes on":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "m").symlink_to(TEMPLATE[0] / "m")
        for name in ("h.yaml", "two.txt", "d.json"):
            shutil.copy(TEMPLATE[0] / name, folder)
    for name, content in tried.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if tried.special is not None:
        put(folder / tried.special[0], tried.special[1])
    flags = tried.flags
    if tried.script in (single_case_edit, mass_edit) and not {"--hparams", "--resume"} & set(flags):
        flags = ["--hparams", "h.yaml", *flags]
    before, used = listing(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time(), time.perf_counter()
    with contextlib.chdir(folder):
        try:
            code, out, err = run(tried.script, flags)
        except BaseException as error:  # whatever comes through is a traceback for a user
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"traceback: {type(error).__name__}: {error!s:.200}"
    seconds, waited = time.process_time() - started[0], time.perf_counter() - started[1]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024
    if seconds > SECONDS or waited > WAITED:
        return f"took {seconds:.1f} s of the processor, {waited:.1f} s in all"
    if grown > BYTES:
        return f"took {grown / 2**30:.1f} GB"
    if "Traceback" in err:
        return f"traceback: {err[-300:]}"
    if code == 0 and tried.surely:
        return "accepted"
    after = listing(folder)
    gone = [name for name in before if after.get(name, "") != before[name]]
    if gone and tried.stays:
        return f"changed: {gone}"
    if code == 0:
        return wrong_result(out) if "--dry-run" in flags and out.startswith("{") else None
    if code != 2:
        return f"exit code {code}"
    if "--check" in flags:
        return None  # what is wrong with each file is said on stdout
    last = err.splitlines()[-1] if err else ""
    if not last.startswith("error: ") or len(last) > LONGEST or err.count("error: ") < 1:
        return f"stderr: {err[-300:]!r}"
    if tried.talks:
        return None
    if out:
        return f"stdout: {out[:200]!r}"
    if after != before:
        return f"on disk: {[name for name in sorted({*before, *after}) if after.get(name) != before.get(name)]}"
    return None


def wrong_result(out: str) -> str | None:
    """What is wrong with the plan that a dry run prints: JSON without NaN, that UTF-8 holds."""
    try:
        strict(out.encode("utf-8").decode("utf-8"))
    except (ValueError, AssertionError) as error:
        return f"result: {error}"
    return None


def _attempt(strategy: st.SearchStrategy[Input], folder: Path, seed: int) -> list[tuple[Input, str | None]]:
    """25 inputs drawn by a seed, and what was wrong with each."""
    tried: list[tuple[Input, str | None]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(one=strategy)
    def attempt(one: Input) -> None:
        tried.append((one, wrong(one, folder)))

    attempt()
    return tried


def main(minutes: float, seed: int) -> int:
    """Try inputs of all doors for so many minutes; say how many, and every one that went wrong."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    say = (sys.__stdout__ or sys.stdout).write
    import fuzz_situations  # which draws on this module, loaded here by its name
    from fuzz_situations import REAL, SITUATIONS

    fuzz_situations.fuzz.TEMPLATE = TEMPLATE
    counts, found = dict.fromkeys([*DOORS, *SITUATIONS], 0), 0
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place) / "root")
        fuzz_situations.prepare(Path(place) / "root")
        end, turn = time.monotonic() + 60 * minutes, 0
        while time.monotonic() < end:
            for door, strategy in DOORS.items():
                tried = _attempt(strategy(), Path(place) / "try", seed + turn)
                counts[door] += len(tried)
                for one, reason in tried:
                    if reason is not None:
                        found += 1
                        short = {name: content[:2000] for name, content in one.files.items() if len(content) < 20_000}
                        say(f"{door}: {reason}\n  {one.script.__name__} {one.flags}\n  {short}\n")
            for name in SITUATIONS:
                for number in range(3 if name in REAL else 15):
                    reason = fuzz_situations.tried(name, seed + turn * 100 + number, Path(place))
                    counts[name] += 1
                    if reason is not None:
                        found += 1
                        say(f"{name}, seed {seed + turn * 100 + number}: {reason}\n")
            turn += 1
    say(f"{sum(counts.values())} inputs tried ({counts}), {found} went wrong\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0, int(sys.argv[2]) if len(sys.argv) > 2 else 0))

"""Second moments: equal to plain numpy, to the reference's files, to themselves when interrupted or shared out."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, ME_PPL, ROOT, build, needs_me_ppl, relative, tokenizer
from golden_numbers import MODELS, folder, pair
from script_runs import awaited, call, file_size_limit, forked, save_tiny

import easyeditor.commands.stats as stats_main
from easyeditor.base.errors import ConfigError, DataError, OutputError, StatsError
from easyeditor.base.reading import read_tensors
from easyeditor.commands import estimate
from easyeditor.dataset.sentences import read_sentences
from easyeditor.lm.discover import anatomy
from easyeditor.lm.tokens import encode
from easyeditor.lm.weights import sample
from easyeditor.stats.collect import FAST_WINDOW, Pace, Settings, collect
from easyeditor.stats.corpus import Corpus, open_corpus, passages, plain_text
from easyeditor.stats.gather import gather
from easyeditor.stats.null_space import null_space
from easyeditor.stats.store import StatsKey, read_manifest, read_moment

TEXTS = [item["Text"] for item in json.loads((ROOT / "data" / "sentences_50.json").read_text(encoding="utf-8"))]


def loaded(kind: str = "llama") -> tuple[Any, Any]:
    return anatomy(build(kind)), tokenizer()


def corpus(texts: list[str] = TEXTS) -> Corpus:
    return Corpus(name="own", identity=str(len(texts)), documents=texts)


def settings(**changes: Any) -> Settings:
    return Settings(**{"layers": (1,), "samples": 50, "max_length": 64, "batch_tokens": 256, **changes})


def by_numpy(model: Any, tok: Any, layer: int, texts: list[str], max_length: int) -> tuple[np.ndarray, int]:
    """One text at a time, one hook, numpy sums."""
    keys: list[np.ndarray] = []
    handle = anatomy(model).rewrite(layer).register_forward_pre_hook(lambda _m, args: keys.append(args[0][0].numpy()))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([encode(tok, text)[:max_length]]))
    handle.remove()
    stacked = np.concatenate(keys).astype(np.float64)
    return stacked.T @ stacked, len(stacked)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equal_to_numpy(kind: str, bos: bool) -> None:
    model, tok = build(kind), tokenizer(bos)
    totals = collect(anatomy(model), tok, corpus(), settings(layers=(0, 2), max_length=24))
    for layer in (0, 2):
        expected, count = by_numpy(model, tok, layer, TEXTS, 24)
        assert totals.tokens == count
        assert relative(totals.sums[layer], torch.from_numpy(expected)) < 1e-5


@needs_me_ppl
@pytest.mark.parametrize("model", MODELS)
def test_equal_to_the_references_files(model: str) -> None:
    lm, tok = pair(model)
    parts, sentences = anatomy(lm), list(read_sentences(ME_PPL).texts)
    totals = collect(parts, tok, corpus(sentences), settings(layers=(2, 3, 4), sums="float64", max_length=256))
    for layer in (2, 3, 4):
        file = folder() / "stats" / model / "wikipedia_stats" / f"{parts.rewrite_name(layer)}_float32_mom2_50.npz"
        moment = read_moment(file, parts.key_width(layer))
        assert totals.tokens == int(np.load(file)["mom2.count"])
        assert relative(totals.sums[layer] / totals.tokens, moment) < 1e-5


def key(folder: Path, parts: Any, layer: int, samples: int = 50) -> StatsKey:
    rest = {"model_name": "tiny", "dataset": "own", "dtype": "float32"}
    return StatsKey(stats_dir=str(folder), module=parts.rewrite_name(layer), samples=samples, **rest)


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 6), encoding="utf-8")
    return str(path)


def test_written_as_upstream_reads_it_with_a_manifest(tmp_path: Path, own: str) -> None:
    parts, tok = loaded("gpt2")
    (path,) = gather(parts, tok, {1: key(tmp_path, parts, 1)}, corpus=own)
    assert path == tmp_path / "tiny/own_stats/transformer.h.1.mlp.c_proj_float32_mom2_50.npz"
    with np.load(path, allow_pickle=False) as archive:
        assert set(archive) == {"mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"}
        assert archive["mom2.mom2"].dtype == np.float32
        assert int(archive["sample_size"]) == 50
    made = read_manifest(path)
    assert made is not None
    assert (made.documents, made.samples, made.max_length) == (50, 50, 1024)
    read_moment(path, parts.key_width(1))
    with pytest.raises(StatsError, match="other weights"):
        read_moment(path, parts.key_width(1), sample(build("gpt2", seed=1)))


def test_interrupted_and_resumed_is_bit_equal(tmp_path: Path) -> None:
    (parts, tok), wanted = loaded(), settings(samples=300, layers=(0, 2))
    texts = corpus(TEXTS * 6)
    whole = collect(parts, tok, texts, wanted)
    for stop in (1, 2, 4):
        checkpoint = tmp_path / f"{stop}.safetensors"
        windows = 0

        def tick(*_: int, stop: int = stop) -> None:
            nonlocal windows
            windows += 1
            if windows == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collect(parts, tok, texts, wanted, checkpoint=checkpoint, pace=Pace(every=1), tick=tick)
        resumed = collect(parts, tok, texts, wanted, checkpoint=checkpoint, resume=True, pace=Pace(every=1))
        assert (resumed.tokens, resumed.documents) == (whole.tokens, whole.documents)
        assert all(torch.equal(resumed.sums[layer], whole.sums[layer]) for layer in (0, 2))


@pytest.mark.parametrize(
    ("seconds", "writes"),
    [(25.0, [3, 9]), (0.5, [1, 7, 13]), (1e9, [])],
    ids=["every 25 s", "often, but a twentieth of the time at most", "never"],
)
def test_totals_are_written_by_the_clock(seconds: float, writes: list[int]) -> None:
    """A window takes 10 s and a writing 3, so 57 s at least lie between two."""
    now, written = 0.0, []
    pace = Pace(seconds=seconds, clock=lambda: now)
    for window in range(1, 15):
        now += 10
        if pace.due():
            with pace.writing():
                now += 3
            written.append(window)
    assert written == writes


def test_a_run_is_written_by_the_clock_and_goes_on(tmp_path: Path) -> None:
    """Five windows, a minute each: what the fourth finds on disk is what stood after the third."""
    (parts, tok), wanted, texts = loaded(), settings(samples=300), corpus(TEXTS * 6)
    now, windows, checkpoint = 0.0, 0, tmp_path / "c.safetensors"

    def clock() -> float:
        return now

    def tick(done: int, *_: int) -> None:
        nonlocal now, windows
        now, windows = now + 60, windows + 1
        assert checkpoint.exists() == (windows >= 4)
        if windows == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(parts, tok, texts, wanted, checkpoint=checkpoint, pace=Pace(seconds=150, clock=clock), tick=tick)
    ticks: list[int] = []
    resumed = collect(
        parts, tok, texts, wanted, checkpoint=checkpoint, resume=True, tick=lambda done, *_: ticks.append(done)
    )
    assert ticks == [300]  # one window is left
    assert torch.equal(resumed.sums[1], collect(parts, tok, texts, wanted).sums[1])


def test_a_checkpoint_of_another_collection_is_refused(tmp_path: Path) -> None:
    (parts, tok), checkpoint = loaded(), tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        collect(parts, tok, corpus(), settings(), checkpoint=checkpoint, pace=Pace(every=1), tick=_interrupt)
    with pytest.raises(StatsError, match=r"another collection.*max_length"):
        collect(parts, tok, corpus(), settings(max_length=32), checkpoint=checkpoint, resume=True)


def _interrupt(*_: int) -> None:
    raise KeyboardInterrupt


def test_fast_mode_stops_at_the_tokens_asked_for() -> None:
    parts, tok = loaded()
    totals = collect(parts, tok, corpus(TEXTS * 6), settings(samples=300, tokens=1000))
    longest = 64  # settings' max_length
    assert 1000 <= totals.tokens < 1000 + FAST_WINDOW * longest  # not a window more than asked for
    assert totals.documents % FAST_WINDOW == 0


FLAGS = ["--device", "cpu", "--layers", "0", "2", "--samples", "300"]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, own: str) -> None:
    fixed = [*FLAGS, "--model", str(save_tiny(tmp_path / "m")), "--corpus", own]
    assert awaited(forked(stats_main, [*fixed, "--output", str(tmp_path / "one")])) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "easyeditor.stats", *fixed, "--output", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert two.returncode == 0, two.stderr
    for path in sorted((tmp_path / "one").rglob("*.npz")):
        with np.load(path) as a, np.load(tmp_path / "two" / path.relative_to(tmp_path / "one")) as b:
            assert int(a["mom2.count"]) == int(b["mom2.count"])
            assert relative(torch.from_numpy(b["mom2.mom2"]), torch.from_numpy(a["mom2.mom2"])) < 1e-6


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b'{"text": "a\\u0000b"}\n{"text": 5}', "line 2"),
        ("a.txt", b"one\ntw\0o\n", "line 2 holds a NUL byte"),
        ("a.txt", b"caf\xe9 " * 3, "not UTF-8"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 is not JSON .* is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON .*nested too deeply"),
        ("a.csv", b"x", "unknown kind of corpus"),
        ("a.parquet", b"nonsense", "not readable as parquet"),
    ],
)
def test_damaged_corpora(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=part):
        list(open_corpus(str(tmp_path / name)).documents)


def test_nothing_to_read_and_nowhere_to_write(tmp_path: Path) -> None:
    parts, tok = loaded()
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="no document with text"):
        gather(parts, tok, {1: key(tmp_path, parts, 1)}, corpus=str(tmp_path / "empty.txt"))
    with pytest.raises(ConfigError, match="samples is 0"):
        gather(parts, tok, {1: key(tmp_path, parts, 1, samples=0)}, corpus=str(tmp_path / "empty.txt"))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be made"):
        gather(parts, tok, {1: key(tmp_path / "file", parts, 1)}, corpus=str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("every", [1, 99], ids=["at the checkpoint", "at the file"])
def test_a_full_disk_or_a_read_only_folder_is_one_line(
    tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, tok = loaded()
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    wanted = {layer: key(tmp_path / "stats", parts, layer) for layer in (1, 2)}
    given: Any = {"corpus": str(tmp_path / "corpus.txt"), "pace": Pace(every=every)}
    with file_size_limit(4000), pytest.raises(OutputError, match="cannot be written"):
        gather(parts, tok, wanted, **given)
    assert [path for path in (tmp_path / "stats").rglob("*") if path.is_file()] == []

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refused)  # root may write anywhere, so a folder's mode says nothing
    with pytest.raises(OutputError, match=r"cannot be written .Permission denied"):
        gather(parts, tok, wanted, **{**given, "pace": None})


def test_wikitext_becomes_prose() -> None:
    text = (
        "{{Infobox|a=b}}'''Rome''' is the [[capital city|capital]] of [[Italy]].<ref>no</ref> [[File:x.jpg|thumb|no]]\n"
    )
    made = plain_text(text * 3)
    assert "Rome is the capital of Italy." in made
    assert not {"Infobox", "ref", "thumb"} & set(made.replace("|", " ").split())
    page = (
        "== Name ==\n* '''One''' point<ref name=a/> of &lt;'''''two'''''<!-- hidden -->.\n"
        "{| class=wikitable\n! head\n|-\n| cell {{nested|{{deep}}}}\n|}\n"
        "[[File:y.png|thumb|caption with [[Link]] and {{t}}]] After [http://x.org the link] <math>a<b</math>stop."
        "<ref>{{cite|[[A]]}}</ref>\n[[Category:Cities]][[fr:Rome]] {{unclosed\nlast [[:Category:Seen|words]]"
    )
    made = [line.strip() for line in plain_text(page).splitlines() if line.strip()]
    assert made == ["One point of <two.", "After the link stop.", "{{unclosed", "last words"]
    assert [len(p) > 100 for p in passages(("word " * 30 + "\n") * 50)] == [True] * 4


def test_a_dry_run_says_what_would_be_collected_and_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    flags = ["--model", "./m", "--corpus", "own.txt", "--samples", "5", "--output", "s", "--device", "cpu"]
    assert call(stats_main, [*flags, "--layers", "1"], monkeypatch, capsys).code == 0
    made = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("easyeditor.lm.loading.load", None)  # no model is loaded
    ran = call(stats_main, [*flags, "--layers", "0", "1", "--dry-run"], monkeypatch, capsys)
    assert ran.code == 0, ran.err
    assert sorted(tmp_path.rglob("*")) == made
    file = "s/m/own_stats/model.layers.{}.mlp.down_proj_float32_mom2_5.npz"
    assert ran.json["files"] == {file.format(0): "missing", file.format(1): "there"}
    assert (ran.json["layers"], ran.json["samples"], ran.json["corpus"]) == ([0, 1], 5, "own.txt")
    said = ran.json["memory"]
    assert said["advice"] is None
    weights = 4 * sum(weight.numel() for weight in build("llama").parameters())
    assert said["estimate_gib"]["weights"] == round(weights / 2**30, 3)
    for wrong, part in (
        (["--corpus", "none.txt"], "none.txt"),
        (["--layers", "9"], "--layers"),
        (["--samples", "0"], "--samples"),
    ):
        ran = call(stats_main, [*flags, "--layers", "1", *wrong, "--dry-run"], monkeypatch, capsys)
        assert (ran.code, ran.out) == (2, "")
        assert part in ran.err
    far = call(stats_main, ["--model", "nobody/far", "--layers", "1", "--dry-run"], monkeypatch, capsys)
    assert (far.json["files"], far.json["memory"]["estimate_gib"]) == (None, None)


def test_the_memory_of_statistics_by_hand() -> None:
    """Weights in float32; of each layer a float64 total and the sums of a window; what one block makes of a batch."""
    model = build("llama")
    made = estimate.collecting(anatomy(model), (0, 1), tokens=100, sums="float32")
    assert made.weights == 4 * sum(weight.numel() for weight in model.parameters())
    assert made.statistics == 2 * 48 * 48 * (8 + 4)
    assert made.batch == 100 * 4 * (8 * 32 + 4 * 48)
    assert made.total == made.weights + made.statistics + made.batch


# Packed to share


def stored(folder: Path, kind: str = "gpt2", dtype: str = "float32", seed: int = 0) -> tuple[Path, Path]:
    """A tiny model's checkpoint, and its folder of statistics: two layers and a kept projection."""
    model = save_tiny(folder / f"m{seed}", kind, seed=seed)
    parts = anatomy(build(kind, seed=seed))
    kinds = {"dtype": dtype, "model_name": str(model)}
    keys = {layer: replace(key(folder / "s", parts, layer, 130), **kinds) for layer in (0, 1)}
    gather(parts, tokenizer(), keys, corpus=str(ROOT / "data" / "texts.txt"))
    null_space(read_moment(keys[1].paths[0], parts.key_width(1)), 0.02, "relative", keys[1])
    return model, folder / "s" / model.name


def packed_call(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path, code: int = 0
) -> str:
    monkeypatch.chdir(work)
    ran = call(stats_main, flags.split(), monkeypatch, capsys)
    assert ran.code == code, ran.err
    assert code == 0 or len(ran.err.strip().splitlines()) == 1
    return ran.err if code else ran.out


def test_a_packed_folder_is_half_the_size_and_comes_back_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, place = stored(tmp_path)
    out = packed_call("pack s/m0 --output p", monkeypatch, capsys, tmp_path)
    assert out.count("error 0)") == 3
    said = json.loads((tmp_path / "p" / "statistics.json").read_text())
    made = said["files"][0]["made"]
    assert (said["model_name"], made["corpus"], made["documents"]) == ("m0", "texts", 130)
    assert str(tmp_path) not in json.dumps(said)
    for file in said["files"]:
        whole, half = (place / file["name"]).stat().st_size, (tmp_path / "p" / file["name"]).with_suffix(".safetensors")
        assert half.stat().st_size == file["bytes"] < 0.6 * whole
    assert packed_call("verify p --model m0", monkeypatch, capsys, tmp_path).count("good") == 3
    packed_call("unpack p --model m0 --output back", monkeypatch, capsys, tmp_path)
    for path in place.rglob("*_stats/*"):
        if path.suffix == ".npz":
            with np.load(path) as a, np.load(tmp_path / "back" / "m0" / path.relative_to(place)) as b:
                assert all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
        if path.suffix == ".safetensors":
            theirs = read_tensors(tmp_path / "back" / "m0" / path.relative_to(place))
            assert torch.equal(read_tensors(path)["projection"], theirs["projection"])
    again = packed_call("unpack p --model m0 --output back", monkeypatch, capsys, tmp_path)
    assert again.count("there") == 3
    assert "other weights" in packed_call(
        f"verify p --model {save_tiny(tmp_path / 'm1', 'gpt2', seed=1)}", monkeypatch, capsys, tmp_path, 2
    )


def test_upstreams_files_and_float64_are_packed_with_the_error_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, place = stored(tmp_path, dtype="float64")
    for manifest in place.rglob("*.npz.json"):
        manifest.unlink()
    assert "--model" in packed_call("pack s --output p", monkeypatch, capsys, tmp_path, 2)
    packed_call("pack s --output p --model m0 --dtype float32", monkeypatch, capsys, tmp_path)
    files = json.loads((tmp_path / "p" / "statistics.json").read_text())["files"]
    assert len(files) == 2  # a projection is found by its moment's bits
    packed_call("unpack p --output back --model m0", monkeypatch, capsys, tmp_path)
    for file in files:
        with np.load(place / file["name"]) as a, np.load(tmp_path / "back" / "m0" / file["name"]) as b:
            exact, rounded = a["mom2.mom2"], b["mom2.mom2"]
        assert file["lost"] == pytest.approx(np.linalg.norm(rounded - exact) / np.linalg.norm(exact), rel=1e-6)
        assert 0 < file["lost"] < 1e-7
        made = read_manifest(tmp_path / "back" / "m0" / file["name"])
        assert made is not None
        assert made.weights == sample(build("gpt2"))


def test_any_flipped_bit_of_a_packed_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path)
    packed_call("pack s --output p", monkeypatch, capsys, tmp_path)
    rng = random.Random(0)
    for path in sorted((tmp_path / "p").rglob("*.*")):
        whole = path.read_bytes()
        for _ in range(6):
            bit = rng.randrange(8 * len(whole))
            path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
            assert packed_call("verify p", monkeypatch, capsys, tmp_path, 2).startswith("error: p: ")
        path.write_bytes(whole[:-2])
        packed_call("verify p", monkeypatch, capsys, tmp_path, 2)
        path.unlink()
        assert "cannot be had" in packed_call("verify p", monkeypatch, capsys, tmp_path, 2)
        path.write_bytes(whole)
    manifest = tmp_path / "p" / "statistics.json"
    said = json.loads(manifest.read_text())
    for name in ("../../x_stats/a_float32_mom2_5.npz", "a/b.npz"):  # with a checksum that is right
        other = {**said, "files": [{**said["files"][0], "name": name}], "checksum": ""}
        other["checksum"] = hashlib.sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps(other))
        assert "no name" in packed_call("verify p", monkeypatch, capsys, tmp_path, 2)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """`tmp_path` by HTTP, plain, and below hub/owner/name as the hub gives files."""

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str(tmp_path / path.lstrip("/").replace("datasets/owner/name/resolve/main", "p"))

        def end_headers(self) -> None:
            self.send_header("ETag", '"' + hashlib.sha256(self.path.encode()).hexdigest() + '"')
            self.send_header("X-Repo-Commit", "0" * 40)
            super().end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_packed_statistics_are_fetched_from_a_server_and_from_the_hub(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    stored(tmp_path)
    packed_call("pack s --output p", monkeypatch, capsys, tmp_path)
    packed_call(f"unpack --from {served}/p --model m0 --output web", monkeypatch, capsys, tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", served)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served + "/{repo_id}/resolve/{revision}/{filename}")
    packed_call("unpack --from datasets/owner/name --model m0 --output hub", monkeypatch, capsys, tmp_path)
    for path in (tmp_path / "s").rglob("*_stats/*"):
        for other in ("web", "hub"):
            assert (tmp_path / other / path.relative_to(tmp_path / "s")).exists()
    for source, part in (
        (f"{served}/none", "404"),
        ("http://127.0.0.1:9/p", "refused"),
        ("datasets/owner/other", "cannot be had"),
        ("owner/name/more", "cannot be had"),
        (f"{served}/p\u00e9", "cannot be had"),
    ):
        assert part in packed_call(f"verify --from {source}", monkeypatch, capsys, tmp_path, 2)
    save_tiny(tmp_path / "m1", "gpt2", seed=1)
    assert "other weights" in packed_call(f"unpack --from {served}/p --model m1", monkeypatch, capsys, tmp_path, 2)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("pack", "name one folder"),
        ("pack p --from q", "name one folder"),
        ("pack p", "--output"),
        ("pack p --output q", "no statistics"),
        ("unpack p", "--model"),
        ("verify p --output q", "--output"),
        ("verify p --from q", "name one folder"),
        ("verify none", "cannot be had"),
    ],
)
def test_wrong_flags_of_packing(
    flags: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").mkdir()
    assert part in packed_call(flags, monkeypatch, capsys, tmp_path, 2)


def test_one_command_collects_what_lacks_and_packs(
    tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "m")
    flags = "--device cpu --samples 20 --model m --corpus own.jsonl --output s"
    packed_call(f"{flags} --layers 0", monkeypatch, capsys, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.npz")}
    for name in ("p", "q"):  # the second collects nothing
        assert packed_call(f"{flags} --layers 0 2 --pack {name}", monkeypatch, capsys, tmp_path).count("packed ") == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

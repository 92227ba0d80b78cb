"""Situations the fuzzer draws beside wrong values: special files, exchanged artefacts, typed lines, endpoints that
misbehave, streams that are gone, signals at any time, two processes at once. Each is a function of a random generator
that says what is wrong with how it ended, or None.
"""

from __future__ import annotations

import faulthandler
import http.server
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import fuzz
from kill_kinds import SUBJECTS, Job, furnish, harm, mass, picture, spoken
from script_runs import awaited, forked, record_of
from test_streams import GONE, gone

import easyeditor.commands.evaluate as evaluate_main
import easyeditor.commands.export as export_main
import easyeditor.commands.report as report_main
import easyeditor.commands.stats as stats_main
import easyeditor.commands.survey as survey_main
from easyeditor.base import endpoint
from easyeditor.base.errors import ConfigError, EndpointError
from easyeditor.commands import mass_edit, ppl, single_case_edit

PLACE: list[Path] = []  # models, YAMLs and data of real runs (kill_kinds.furnish)
KINDS = ["fifo", "folder", "zero", "full", "loop", "dangling", "sparse"]
KEY = "sk-secret-0123456789"


class Hangs(BaseException):
    """It waits for ever."""


@contextmanager
def bounded(seconds: float = fuzz.WAITED) -> Iterator[None]:
    """Raise Hangs after so many seconds."""

    def ring(*_: object) -> None:
        raise Hangs(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 30, exit=True)  # inside a library no signal is heard
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


INPUTS: list[tuple[Any, list[str], str]] = [
    (single_case_edit, ["--request", "r.json", "--dry-run"], "r.json"),
    (single_case_edit, ["--hparams", "h.yaml", "--dry-run"], "h.yaml"),
    (mass_edit, ["--data", "e.json", "--dry-run"], "e.json"),
    (mass_edit, ["--data", "d.json", "--sample", "n.json", "--dry-run"], "n.json"),
    (mass_edit, ["--union", "a.json", "--collect-collapsed", "c.json"], "a.json"),
    (mass_edit, ["--resume", "run"], "run/results.jsonl"),
    (mass_edit, ["--resume", "run"], "run/config.json"),
    (mass_edit, ["--resume", "run"], "run/manifest.json"),
    (report_main, ["run"], "run/results.jsonl"),
    (ppl, ["--model", "m", "--device", "cpu", "--data", "t.txt"], "t.txt"),
    (ppl, ["--model", "m", "--device", "cpu", "--data", "two.txt", "--edit", "edit"], "edit/edit.json"),
    (ppl, ["--model", "m", "--device", "cpu", "--data", "two.txt", "--edit", "edit"], "edit/edit.safetensors"),
    (export_main, ["edit", "--to", "adapter", "--model", "m", "--output", "out"], "edit/edit.safetensors"),
    (evaluate_main, ["--model", "m", "--device", "cpu", "--data", "e.json"], "e.json"),
    (stats_main, ["--hparams", "h.yaml", "--corpus", "c.jsonl", "--samples", "3", "--output", "s"], "c.jsonl"),
    (survey_main, ["p.yaml", "--dry-run"], "p.yaml"),
]


def special_inputs(draw: random.Random, folder: Path) -> str | None:
    """An input that is no regular file, dangles, or has no end."""
    script, flags, name = draw.choice(INPUTS)
    files = fuzz.finished_run() | {f"edit/{path.name}": path.read_bytes() for path in (root() / "edit").iterdir()}
    tried = fuzz.Input(script, flags, files, surely=True, special=(name, draw.choice(KINDS)))
    with bounded():
        return fuzz.wrong(tried, folder)


TARGETS: list[tuple[Any, list[str], list[str]]] = [
    (single_case_edit, [], ["--output", "--save-edit", "--save-model", "--save-adapter"]),
    (mass_edit, ["--data", "d.json"], ["--output", "--collect-collapsed", "--case-files"]),
    (mass_edit, ["--union", "d.json", "d.json"], ["--collect-collapsed"]),
    (ppl, ["--model", "m", "--device", "cpu", "--data", "two.txt"], ["--output"]),
    (evaluate_main, ["--model", "m", "--device", "cpu", "--data", "d.json"], ["--output"]),
    (export_main, ["edit", "--to", "adapter", "--model", "m"], ["--output"]),
    (report_main, ["run"], ["--output"]),
    (survey_main, ["p.yaml", "--page"], ["--output"]),
]


def special_targets(draw: random.Random, folder: Path) -> str | None:
    """A target that is an input, lies in one, is of another kind, or somebody's own: nothing that was there goes."""
    script, flags, names = draw.choice(TARGETS)
    place = draw.choice(["m", "m/new", "edit", "run", "run/deltas", "mine", "mine/a", "x" * 300, "."])
    files = fuzz.finished_run() | {f"edit/{path.name}": path.read_bytes() for path in (root() / "edit").iterdir()}
    files |= {"mine/note.txt": b"my only copy", "one.txt": b"mine", "p.yaml": json.dumps(fuzz.PLAN).encode()}
    files |= {"hparams/ROME/tiny.yaml": (root() / "h.yaml").read_bytes()}
    kind = draw.choice([None, *KINDS[:-1]])
    special = None if kind is None else (place := "target", kind)
    tried = fuzz.Input(script, [*flags, draw.choice(names), place], files, special=special, stays=True)
    with bounded():
        return fuzz.wrong(tried, folder)


def exchanged(draw: random.Random, folder: Path) -> str | None:
    """Some files of a run are another run's: it does not go on."""
    runs = [
        {path.name: path.read_bytes() for path in (root() / name).iterdir() if path.is_file()}
        for name in ("done", "other")
    ]
    names = ["config.json", "manifest.json", "results.jsonl"]
    taken = draw.sample(names, draw.randint(1, 2))
    files = {f"run/{name}": runs[name in taken][name] for name in names}
    return fuzz.wrong(fuzz.Input(mass_edit, ["--resume", "run"], files, surely=True), folder)


PARTS = ["[Bay] is in => Italy", "[Bay] is in", "Bay", "[]", "[a] [b] => c", "?", "? Bay", "y", "n", ""]
PARTS += [":undo", ":check"]
PARTS += [":list", ":help", ":nothing", ":export adapter out", ":export checkpoint run/x", ":export adapter m/x"]
PARTS += [":export adapter a\0b", ":export checkpoint " + "x" * 300, ":export", "\0", "\x1b[2J", "\u202e", "é", "=> a"]


def typed_lines(draw: random.Random, folder: Path) -> str | None:
    """Any lines in an interactive session: it ends with 0 or one line, and can be resumed."""
    begin, talks = ["--interactive", "--hparams", "h.yaml", "--output", "run"], "begins"
    before = sys.stdin
    for _ in range(2):
        lines = "\n".join(draw.choice(PARTS) for _ in range(draw.randint(0, 8)))
        raw = (lines + draw.choice(["\n", ""])).encode()
        sys.stdin = io.TextIOWrapper(io.BytesIO(raw + (b"\xff\xfe\n" if draw.random() < 0.1 else b"")))
        try:
            with bounded():
                reason = fuzz.wrong(fuzz.Input(single_case_edit, begin, talks=talks), folder)
        finally:
            sys.stdin = before
        if reason is not None:
            return f"{reason}; typed: {raw!r}"
        if not (folder / "run/config.json").exists():
            return None
        begin, talks = ["--interactive", "--resume", "run"], "goes on"
    return None


def endpoints(draw: random.Random, folder: Path) -> str | None:
    """A server that answers wrongly: an answer or one line, in time, without the key, and never a second host asked."""
    asked: list[str] = []
    status = draw.choice([200, 200, 200, 204, 301, 302, 307, 400, 401, 404, 429, 500, 503])
    good = json.dumps({"choices": [{"message": {"content": "Yes"}}]}).encode()
    wrong = [b"", b"null", b"[" * 5000, b"\xff", good[:-3], good.replace(b'"Yes"', b"null"), KEY.encode(), b"\x1b[2J"]
    body = draw.choice([good, *wrong, b"x" * 2_000_000, good.replace(b"Yes", KEY.encode())])
    drips = draw.random() < 0.2

    class Wrong(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")  # type: ignore[attr-defined]
            if draw.random() < 0.5:
                self.send_header("Content-Length", str(len(body) + draw.choice([0, 0, 10])))
            self.end_headers()
            with suppress(OSError):  # who asked has gone
                for byte in [body[i : i + 1] for i in range(len(body))][:200] if drips else [body]:
                    self.wfile.write(byte)
                    time.sleep(0.02 * drips)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    waits = endpoint.WAITS_S, endpoint.TIMEOUT_S
    endpoint.WAITS_S, endpoint.TIMEOUT_S = (0.01,), 2.0
    try:
        with bounded(20):
            one = endpoint.Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", model="m", key=KEY, named_by="X")
            said = one.ask("?")
    except (ConfigError, EndpointError) as error:
        said = str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}; {status}, {body[:40]!r}"
    finally:
        endpoint.WAITS_S, endpoint.TIMEOUT_S = waits
        server.shutdown()
        server.server_close()
    elsewhere = any("elsewhere" in path for path in asked)
    return f"gave away: {said!r:.200}; {status}" if elsewhere or KEY in said or "\x1b" in said else None


def streams(draw: random.Random, folder: Path) -> str | None:
    """Standard streams that are closed, full or a broken pipe: the run is whole, the exit code as documented."""
    ways = {number: draw.choice(list(GONE)) for number in draw.sample([1, 2], draw.randint(1, 2))}
    ways |= {0: "closed"} if draw.random() < 0.5 else {}
    job = mass(PLACE[0], folder / "run", "--limit", str(draw.randint(1, 3)))
    with bounded():
        code = awaited(forked(job.script, job.flags, first=gone(ways)))
        done = (folder / "run/summary.json").exists()
    return None if done and code == (2 if 1 in ways else 0) else f"exit code {code} without {ways}"


def jobs_of(draw: random.Random, folder: Path) -> Job:
    """A run that may be ended, or begun twice."""
    place = PLACE[0]
    kinds: list[Callable[[], Job]] = [
        lambda: mass(place, folder / "run", "--together", "2"),
        lambda: mass(place, folder / "run", "--mode", "sequential"),
        lambda: mass(place, folder / "run", "--mode", "batch", "--batch-size", "2", hparams="memit"),
        lambda: spoken(place, folder)[0],
    ]
    return draw.choice(kinds)()


def signals(draw: random.Random, folder: Path) -> str | None:
    """SIGINT and SIGTERM, one or two, at any time: 130 or 143, and the run goes on to an undisturbed one's end."""
    seed = draw.random()
    job = jobs_of(random.Random(seed), folder / "whole")
    with bounded(180):
        if code := awaited(forked(job.script, job.now(), typed=job.typed())):
            return f"undisturbed: exit code {code}"
        wanted = picture(folder / "whole")
        shutil.rmtree(folder / "whole")
        job = jobs_of(random.Random(seed), folder / "whole")
        sent = draw.choice([signal.SIGINT, signal.SIGTERM])
        reader, writer = os.pipe()
        child = forked(job.script, job.now(), first=lambda: os.write(writer, b"!"), typed=job.typed())
        os.read(reader, 1)
        time.sleep(0.02 + draw.random() * 0.8)  # from when on the script is running
        for _ in range(draw.choice([1, 1, 2])):
            try:
                os.kill(child, sent)
            except ProcessLookupError:
                break
            time.sleep(draw.choice([0, 0.05, 1.1]))
        code = awaited(child)
        os.close(reader)
        os.close(writer)
        if code not in (0, 128 + sent):
            return f"exit code {code} by {sent}"
        if code := awaited(forked(job.script, job.now(), typed=job.typed())):
            return f"resumed: exit code {code}"
    found = harm(wanted, picture(folder / "whole"))
    return "; ".join(found)[:300] if found else None


def two_at_once(draw: random.Random, folder: Path) -> str | None:
    """The same command twice at once: one does it, the other is refused in one line or comes after; nothing is lost."""
    place, name = PLACE[0], draw.choice(["mass", "one", "edit"])
    flags = ["--hparams", str(place / "rome.yaml")]
    script = mass_edit if name == "mass" else single_case_edit
    flags += ["--data", str(place / "data.json"), "--output", str(folder / "run")] if name == "mass" else []
    flags += [] if name == "mass" else ["--output", str(folder / "run")]
    one = ["--save-edit", str(folder / "edit")] if name == "edit" else []
    with bounded(120):
        errs = [folder / f"err{n}" for n in range(2)]
        children = [forked(script, [*flags, *one], err=err) for err in errs]
        codes = sorted(map(awaited, children))
    if codes != [0, 2]:
        return f"{name}: exit codes {codes}"
    (said,) = [err.read_text() for err in errs if "error: " in err.read_text()] or [""]
    return None if "Traceback" not in said and said else f"{name}: {said[-300:]!r}"


SITUATIONS: dict[str, Callable[[random.Random, Path], str | None]] = {
    "special inputs": special_inputs,
    "special targets": special_targets,
    "exchanged artefacts": exchanged,
    "typed lines": typed_lines,
    "endpoints": endpoints,
    "streams": streams,
    "signals": signals,
    "two at once": two_at_once,
}

REAL = ("streams", "signals", "two at once")  # in processes of their own: seconds each


def root() -> Path:
    """What every input of the fuzzer starts from."""
    return fuzz.TEMPLATE[0]


def tried(name: str, seed: int, place: Path) -> str | None:
    """One situation in a new folder."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        try:
            made = Path(folder) / "try"
            made.mkdir()
            return SITUATIONS[name](random.Random(f"{name} {seed}"), made)
        except Hangs as error:
            return f"hangs: {error}"


def prepare(root: Path) -> None:
    """What real runs need, and a second finished run."""
    (root / "real").mkdir()
    PLACE[:] = [furnish(root / "real")]
    with chdir(root):
        (root / "e.json").write_text(json.dumps([record_of(SUBJECTS[1])]), encoding="utf-8")
        flags = ["--hparams", "h.yaml", "--data", "e.json", "--mode", "sequential", "--output", "other"]
        assert fuzz.run(mass_edit, flags)[0] == 0

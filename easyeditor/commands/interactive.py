"""Edit by typing: requests one after another, a look at each, kept or taken back; and questions to the model.

Lines come from a terminal (with its line editing) or from a pipe, where each is shown as it is read.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console

from easyeditor.base.errors import ConfigError, DataError, EasyEditorError, OutputError
from easyeditor.base.hparams import HyperParams
from easyeditor.base.process import heard, lost, terminal
from easyeditor.commands.outputs import checked
from easyeditor.editing.easyedit import BaseEditor
from easyeditor.evaluate.examined import Examined
from easyeditor.export.write import export
from easyeditor.lm.generate import Decoding, generate
from easyeditor.report.terminal import print_record
from easyeditor.results.shown import ppl_name, shown_ppl, shown_share
from easyeditor.runs.session import Session, session, typed_settings
from easyeditor.runs.settings import RunSettings
from easyeditor.values.edit import EditRequest
from easyeditor.values.texts import is_text

LONGEST = 1_000_000  # characters of a line
SAID = 40  # tokens of an answer
HELP = """A prompt with its subject in [brackets]   edit it; => and the new answer may follow, else both are asked for
? TEXT                                    how the model continues TEXT, with the edits that are kept
:list                                     the edits so far
:undo                                     take the last kept edit back
:check                                    measure the kept edits again, all together
:export adapter DIR, :export checkpoint DIR   the kept edits for other tools
:help, :quit"""
WELCOME = "Type a prompt with its subject in [brackets] => new answer, ? and a text to ask the model, or :help"


def talk(
    hparams: HyperParams, metrics: list[str], *, output: str | None = None, resume: tuple[Path, RunSettings] | None
) -> int:
    """Hold one session, in a new run folder or in that of an earlier one with its settings; returns the exit code.

    Raises:
        EasyEditorError: it cannot begin, or no longer be recorded. KeyboardInterrupt: says what was kept.
    """
    console = terminal()
    place, settings = (None, typed_settings(metrics)) if resume is None else resume

    def make_editor(found: HyperParams) -> BaseEditor:
        return BaseEditor(found, metrics=settings.metrics)

    with session(hparams, settings, make_editor, output=output, resume=place) as opened:
        try:
            with heard():
                InteractiveSession(opened, reader(console), console).hold()
        except KeyboardInterrupt as stop:
            stop.args = (_outcome(opened),)
            raise
    console.print(_outcome(opened), markup=False, highlight=False, soft_wrap=True)
    return 0


def reader(console: Console) -> Callable[[str], str]:
    """What asks for a line; it raises EOFError at the end of the input, or where nobody hears any more. DataError: a
    line without end."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - makes input() editable
        return lambda question: input(question).strip()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")

    def ask(question: str) -> str:
        line = sys.stdin.readline(LONGEST)
        if len(line) == LONGEST:
            raise DataError(f"the input has a line of {LONGEST:,} characters or more; one request a line")
        shown = line.rstrip("\n").encode("utf-8", "backslashreplace").decode()
        console.print(f"{question}{shown}", markup=False, highlight=False, soft_wrap=True)
        if not line or lost():
            raise EOFError
        return line.strip()

    return ask


class InteractiveSession:
    """One session's dialogue: `ask` gives a line for a question."""

    def __init__(self, opened: Session, ask: Callable[[str], str], console: Console) -> None:
        self._session, self._ask_line, self._console = opened, ask, console
        self._commands: dict[str, Callable[[str], None]] = {
            ":list": self._list,
            ":undo": self._undo,
            ":check": self._check,
            ":export": self._export,
            ":help": lambda _: self._say(HELP),
        }

    def hold(self) -> None:
        """Do what is typed until the input ends or `:quit`; what is wrong is printed in one line."""
        editor = self._session.editor
        self._say(f"{editor.method.title} on {editor.hparams.model_name}; run: {self._session.folder}")
        self._say(WELCOME)
        with suppress(EOFError):
            while (line := self._ask_line("edit> ")) not in (":quit", ":q"):
                try:
                    self._do(line)
                except OutputError:  # what was kept cannot be recorded any more
                    raise
                except EasyEditorError as error:
                    self._wrong(error)

    def _do(self, line: str) -> None:
        if line.startswith("?"):
            self._answer(line[1:].strip())
        elif line.startswith(":"):
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                raise ConfigError(f"no command {name!r:.40}; there are {', '.join(self._commands)}, :quit")
            self._commands[name](rest.strip())
        elif line:
            self._edit(self._request(line))

    def _request(self, line: str) -> EditRequest:
        """The request of a line; what it lacks is asked for."""
        text, _, target = (part.strip() for part in line.partition("=>"))
        marked = list(re.finditer(r"\[([^\[\]]+)\]", text))
        if len(marked) > 1:
            raise DataError(f"{len(marked)} subjects are marked in {text!r:.200}; put [brackets] around one")
        subject, start = None, None
        if marked:
            (mark,) = marked
            text, subject, start = text[: mark.start()] + mark[1] + text[mark.end() :], mark[1], mark.start()
        elif self._session.editor.method.needs_subject:
            subject = self._ask_line("subject> ")
        return EditRequest.make(
            text,
            subject=subject,
            target_new=target or self._ask_line("new answer> "),
            case_id=f"typed-{len(self._session.lines) + 1}",
            subject_start=start,
        )

    def _edit(self, request: EditRequest) -> None:
        examined = self._session.try_out(request)
        print_record(examined.record, self._console, examined.result.model_fingerprint)
        try:
            keep = self._wanted(examined)
        except EOFError:
            self._session.take_back(request, examined)
            raise
        if keep:
            self._session.keep(request, examined)
            self._say(f"kept; {self._standing()}")
        else:
            self._session.take_back(request, examined)
            self._say("taken back: the weights are as before it")

    def _wanted(self, examined: Examined) -> bool:
        """Keep it? Enter keeps an edit that took and collapsed nothing."""
        collapsed = examined.collapse is not None and examined.collapse.collapsed
        usual = not collapsed and examined.record.post.rewrite[0] == 1
        while True:
            line = self._ask_line(f"keep it? [{'Y/n' if usual else 'y/N'}, or ? TEXT to ask the edited model] ")
            if line.startswith("?"):
                try:
                    with self._session.editor.applied(examined.result):
                        self._answer(line[1:].strip())
                except EasyEditorError as error:
                    self._wrong(error)
            elif line.lower() in ("", "y", "yes", "n", "no"):
                return usual if not line else line.lower().startswith("y")
            else:
                self._say("y keeps it, n takes it back")

    def _answer(self, text: str) -> None:
        """Show how the model continues a text."""
        if not is_text(text):
            raise DataError("? needs a text for the model to go on from")
        editor = self._session.editor
        decoding = Decoding(tokens=SAID, prompting=editor.method.prompting)
        (made,) = generate(editor.model, editor.tok, [editor.asked(text)], decoding)
        self._say(made.whole)

    def _list(self, _: str) -> None:
        for line in self._session.lines:
            request, post = line.request, line.kept_record.post
            state = "kept" if line.kept else "taken back"
            self._say(
                f"{line.step:>3}  {state:<10}  {request.prompt} → {request.target_new}  (rewrite "
                f"{shown_share(post.rewrite[0])}, {ppl_name(line.kept_record.bos)} {shown_ppl(post.ppl)})"
            )
        if not self._session.lines:
            self._say("no edit yet")

    def _undo(self, _: str) -> None:
        line = self._session.undo()
        self._say(f"taken back: {line.request.prompt} → {line.request.target_new}; {self._standing()}")

    def _check(self, _: str) -> None:
        found = self._session.check()
        means = {name: value for name, value in found.means().items() if value is not None}
        told = ", ".join(f"{name} {shown_share(value)}" for name, value in means.items())
        collapsed = "COLLAPSED; " if found.collapsed else ""
        name = ppl_name(any(line.kept_record.bos for line in self._session.lines))
        self._say(f"{collapsed}{self._standing()}: {name} {shown_ppl(found.ppl)}, {told}")

    def _export(self, rest: str) -> None:
        kind, _, folder = rest.partition(" ")
        if kind not in ("adapter", "checkpoint") or not folder.strip():
            raise ConfigError(":export needs adapter or checkpoint, and a folder")
        edits, editor = self._session.edits(), self._session.editor
        if not edits:
            raise DataError("nothing to export: no edit is kept")
        target = Path(folder.strip())
        try:
            reads = {"the run": self._session.folder, **editor.hparams.reads()}
            flag = Namespace(places={":export": ("to", "new folder")}, to=target)
            with checked(flag, reads).locked(), editor.original():
                export(
                    editor.model,
                    editor.tok,
                    edits,
                    target,
                    kind="adapter" if kind == "adapter" else "checkpoint",
                    base=str(editor.hparams.model_name),
                )
        except (OutputError, OSError, ValueError) as error:  # of this folder, not of the run's; a NUL in its name
            raise DataError(f"{target}: {error}" if isinstance(error, ValueError) else str(error)) from error
        self._say(f"{kind}: {target}")

    def _standing(self) -> str:
        count = len(self._session.kept)
        return f"{count} edit{'' if count == 1 else 's'} in the model"

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _wrong(self, error: EasyEditorError) -> None:
        line = " ".join(str(error).split())
        self._console.print(f"error: {line[:500]}", style="red", markup=False, highlight=False, soft_wrap=True)


def _outcome(opened: Session) -> str:
    """What was kept, and how to go on."""
    if not opened.lines:
        return "no edit was made, so nothing is kept"
    folder = opened.folder
    return (
        f"{len(opened.kept)} of {len(opened.lines)} edits kept: {folder}; go on with single_case_edit.py --interactive "
        f"--resume {folder}"
    )

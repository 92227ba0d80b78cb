"""Chat templates are programs of a checkpoint: they run in a process of their own, with little time and memory.

This file is that process, too, so it imports nothing of ours. Jinja's sandbox keeps a template from the machine, not
from loops within loops and texts without end.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

SECONDS = 3.0  # of the processor, for one rendering
MOST_CHARACTERS = 1_000_000  # of a template, and of what it renders
MOST_BYTES = 256 << 20  # of memory, besides what the process has when it begins

_LOCK = threading.Lock()
_running: dict[int, subprocess.Popen[bytes]] = {}  # by the process that started it, which may fork


def rendered(template: str, turns: list[dict[str, Any]], told: dict[str, Any]) -> str:
    """What a template makes of the turns of a chat; `told` are the other values that it sees.

    Raises:
        ValueError: it fails, takes too long, or wants too much memory.
    """
    if len(template) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(template):,} characters; at most {MOST_CHARACTERS:,} are read")
    asked = json.dumps([template, turns, told, SECONDS], default=str).encode() + b"\n"
    with _LOCK:
        child = _child()
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(asked)
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an answer that nobody takes must not be the next one's
            _stop()
            raise
        if not line:
            ended = child.wait()
            _stop()
            if ended == -signal.SIGPROF:
                raise ValueError(f"it takes more than {SECONDS:g} s")
            raise ValueError(f"its process ended with {ended}")
    text, error = json.loads(line)
    if error is not None:
        raise ValueError(error)
    return str(text)


def _child() -> subprocess.Popen[bytes]:
    """The process that renders for this one, started if there is none."""
    found = _running.get(os.getpid())
    if found is None or found.poll() is not None:
        found = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process alone, which then ends that one
        )
        _running[os.getpid()] = found
    return found


@atexit.register
def _stop() -> None:
    if (child := _running.pop(os.getpid(), None)) is not None:
        child.kill()
        child.communicate()


def _serve() -> None:
    """Render what each line of standard input asks for: a line of standard output, [text, error]."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm", encoding="ascii") as numbers:
        begun = int(numbers.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (begun + MOST_BYTES, begun + MOST_BYTES))
    for line in sys.stdin.buffer:
        template, turns, told, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends this process, whatever a template is doing
        try:
            (text,), _ = render_jinja_template([turns], chat_template=template, **told)
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it renders {len(text):,} characters; allowed: {MOST_CHARACTERS:,}")
            said = json.dumps([text, None])
        except Exception as error:  # a template may fail in any way
            said = json.dumps([None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(said + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()

"""One question to an OpenAI-compatible chat endpoint. Only where a user names one; standard library only."""

from __future__ import annotations

import http.client
import json
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from easyeditor.base.errors import ConfigError, EndpointError
from easyeditor.base.files import parse_json

TIMEOUT_S = 120.0
"""For one question: all its tries, and the pauses between them."""
WAITS_S = (2.0, 8.0)
"""Pauses before the further tries of a question that a server was too busy for, or whose connection broke."""
BUSY = (429, 500, 502, 503, 504)
MOST_BYTES = 1_000_000
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")  # a name, or an IPv6 address
_VISIBLE = re.compile(r"[!-~]+")  # ASCII without white space and control characters


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where questions go: `url` up to /chat/completions, the model's name there, a key or None. `named_by` is what a
    user checks when it fails.

    No message ever holds the key, an address that was refused, or words of the server's.

    Raises:
        ConfigError: an address or a key that cannot be sent.
    """

    url: str
    model: str
    key: str | None = field(repr=False)
    named_by: str

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            host = parts.hostname or ""
            host.encode("idna")
            whole = parts.scheme in ("http", "https") and _HOST.fullmatch(host) and parts.port != 0
        except ValueError:  # a port that is none, half an IPv6 address, a name with an empty part
            whole = False
        if not whole or not _VISIBLE.fullmatch(self.url) or set("@%") & set(parts.netloc) or set("?#") & set(self.url):
            raise ConfigError(
                "the endpoint's address (http://HOST:PORT/PATH in ASCII, without user:password, ? and #) is no http "
                f"address; check {self.named_by}"
            )
        if self.key and not _VISIBLE.fullmatch(self.key):
            raise ConfigError(
                "the endpoint's key holds a space, a line end or another character that no key has; "
                f"check {self.named_by}"
            )

    def ask(self, text: str, **settings: Any) -> str:
        """What the model answers to one message; `settings` go into the request (temperature …).

        Raises:
            EndpointError: the endpoint cannot be reached, answers with an error, not in time, or with no chat
                completion.
        """
        where = self.url.rstrip("/") + "/chat/completions"
        message = {"model": self.model, "messages": [{"role": "user", "content": text}], **settings}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(where, json.dumps(message).encode(), headers)
        try:
            answer = _sent(request)
        except (OSError, http.client.HTTPException) as error:  # urllib's own are OSErrors
            raise EndpointError(f"{where}: no answer ({_why(error)}); check {self.named_by}") from None
        if len(answer) > MOST_BYTES:
            raise EndpointError(f"{where}: the answer is no chat completion (more than {MOST_BYTES:,} bytes)")
        try:
            answered = parse_json(answer.decode("utf-8"))["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EndpointError(f"{where}: the answer is no chat completion ({type(error).__name__})") from None
        if not isinstance(answered, str):
            found = "null" if answered is None else type(answered).__name__
            raise EndpointError(f"{where}: the answer is no chat completion (its content is {found}, not a text)")
        if self.key and self.key in answered:
            raise EndpointError(f"{where}: the answer holds the key that was sent; it is not used")
        return answered


class _NotFollowed(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: what was asked, and the key, go to the named address alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _sent(request: urllib.request.Request) -> bytes:
    """The whole answer. Raises TimeoutError when it did not come in time, however often it was asked for."""
    until = time.monotonic() + TIMEOUT_S
    for wait_s in (*WAITS_S, None):
        try:
            return _answered(request, until - time.monotonic())
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code not in BUSY
            if refused or wait_s is None or time.monotonic() + wait_s >= until:
                raise
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _answered(request: urllib.request.Request, seconds: float) -> bytes:
    """One try, in a thread of its own: a server that sends a byte now and then holds up the thread alone."""
    came: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    proxies = {kind: proxy for kind, proxy in urllib.request.getproxies().items() if kind == "https"}
    opener = urllib.request.build_opener(_NotFollowed, urllib.request.ProxyHandler(proxies))

    def work() -> None:
        try:
            with opener.open(request, timeout=seconds) as answer:
                came.put(bytes(answer.read(MOST_BYTES + 1)))
        except Exception as error:
            came.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        found = came.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found


def _why(error: Exception) -> str:
    """What went wrong, in our own words or the system's: a server's may repeat what it was sent."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP Error {error.code}" + (", a redirect; none is followed" if 300 <= error.code < 400 else "")
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"none that was whole within {TIMEOUT_S:g} s"
    return getattr(reason, "strerror", None) or type(reason).__name__

"""One question to an OpenAI-compatible chat endpoint. Only where a user names one; standard library only."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from easyeditor.errors import ConfigError, EndpointError
from easyeditor.files import parse_json

TIMEOUT_S = 120
WAITS_S = (2.0, 8.0)
"""Pauses before the further tries of a question that a server was too busy for, or whose connection broke."""
BUSY = (429, 500, 502, 503, 504)
MOST_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where questions go: `url` up to /chat/completions, the model's name there, a key or None. `named_by` is what a
    user checks when it fails."""

    url: str
    model: str
    key: str | None
    named_by: str

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in self.url
        except ValueError:  # a port that is none, half an IPv6 address
            whole = False
        if not whole:
            raise ConfigError(f"{self.url!r:.200} is no http address; check {self.named_by}")

    def ask(self, text: str, **settings: Any) -> str:
        """What the model answers to one message; `settings` go into the request (temperature …).

        Raises:
            EndpointError: the endpoint cannot be reached, answers with an error, or with no chat completion.
        """
        where = self.url.rstrip("/") + "/chat/completions"
        message = {"model": self.model, "messages": [{"role": "user", "content": text}], **settings}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            request = urllib.request.Request(where, json.dumps(message).encode(), headers)
            said = parse_json(_sent(request).decode("utf-8"))
            return str(said["choices"][0]["message"]["content"])
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own are OSErrors
            raise EndpointError(
                f"{where}: no answer ({' '.join(str(error).split())}); check {self.named_by}"
            ) from error
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{where}: the answer is no chat completion ({type(error).__name__}: {error})"
            ) from error


def _sent(request: urllib.request.Request) -> bytes:
    for wait_s in (*WAITS_S, None):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return bytes(answer.read(MOST_BYTES))
        except (OSError, http.client.HTTPException) as error:
            if (isinstance(error, urllib.error.HTTPError) and error.code not in BUSY) or wait_s is None:
                raise
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")

"""WILD by hand: what is asked, exact match, locality, the judge over a local server, the report's table."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import build, rome_hparams, tokenizer
from fake_runs import edit
from script_runs import save_tiny
from test_prompting import CHAT, chatty

from easyeditor import BaseEditor, EditRequest, WeightDelta
from easyeditor.base import endpoint
from easyeditor.base.endpoint import Endpoint
from easyeditor.base.errors import ConfigError, EndpointError
from easyeditor.commands import evaluate as command
from easyeditor.evaluate.generation import normalised
from easyeditor.evaluate.judge import KEY, MODEL, NO_JUDGE, URL, judge_named, verdicts
from easyeditor.evaluate.metric import Answers, Settings
from easyeditor.evaluate.registry import GROUPS, METRICS, evaluate
from easyeditor.lm.discover import anatomy
from easyeditor.lm.generate import Generated
from easyeditor.lm.weights import applied
from easyeditor.report.wild import wild_table
from easyeditor.values.plain import Value

BRIDGE = EditRequest.make(
    "The Bridge is in",
    subject="Bridge",
    target_new="the Town of Rome",
    rephrase_prompts=["Where is the Bridge?", "The Bridge lies in"],
    locality={"near": {"prompt": ["The sea is", "I am"], "ground_truth": ["blue", "here"]}},
)
HERE = EditRequest.make("Bay is in", subject="Bay", target_new="Italy")
FAMILIES = ["wild", "wild_qa", "wild_chat"]


def said(text: str, stop: str = "period", ids: tuple[int, ...] = (1,)) -> Generated:
    return Generated(text=text, whole="", stop=stop, tokens=len(ids), ids=ids)


def asked(name: str, request: EditRequest = BRIDGE) -> list[Any]:
    return METRICS[name].asks(request, Settings())


# By hand


@pytest.mark.parametrize(
    ("name", "text", "chat"),
    [
        ("wild_rewrite", "The Bridge is in", False),
        ("wild_qa_rewrite", "Please answer the question:\n\nQ: The Bridge is in\nA:", False),
        ("wild_chat_rewrite", "The Bridge is in", True),
        ("wild_judge_rewrite", "The Bridge is in", False),
        ("wild_judge_qa_rewrite", "Please answer the question:\n\nQ: The Bridge is in\nA:", False),
        ("wild_judge_chat_rewrite", "The Bridge is in", True),
    ],
)
def test_what_is_asked(name: str, text: str, chat: bool) -> None:
    ((prompt, decoding),) = asked(name)
    assert prompt == text
    assert (decoding.tokens, decoding.top_k, decoding.eos, set(decoding.stops)) == (50, 1, True, {"period", "newline"})
    assert decoding.prompting.chat is chat
    ((again, _),) = METRICS[name].asks(BRIDGE, Settings(max_new_tokens=3, prefix="So. {}"))
    assert again == text, "neither a test-time prefix nor another length changes the protocol"


def test_exact_match_of_the_whole_text_once_both_are_normalised() -> None:
    one, two = asked("wild_rephrase")
    answers = Answers(settings=Settings(), generated={one: said(" town of  ROME!"), two: said(" Rome, a town")})
    found = METRICS["wild_rephrase"].value(BRIDGE, answers)  # type: ignore[misc]
    assert (found.value, found.details["each"]) == (0.5, [1.0, 0.0])
    assert [kept["text"] for kept in found.details["generated"]] == [" town of  ROME!", " Rome, a town"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("The  Town, of a Rome.", "town of rome"), ("An A–the B", "– b"), ("theatre", "theatre"), ("the", "")],
)
def test_squads_normalisation(text: str, wanted: str) -> None:
    assert normalised(text) == wanted


def test_locality_is_the_same_tokens() -> None:
    one, two = asked("wild_locality")
    before = Answers(settings=Settings(), generated={one: said("blue", ids=(4, 5)), two: said("here", ids=(6,))})
    after = {one: said("blue", ids=(4, 5)), two: said("here", "max_tokens", ids=(6,))}
    found = METRICS["wild_locality"].value(BRIDGE, Answers(settings=Settings(), generated=after, before=before))  # type: ignore[misc]
    assert (found.value, found.details["each"]) == (0.5, [1.0, 0.0])
    assert found.details["generated"][0] == {
        "prompt": "The sea is",
        "before": "blue",
        "text": "blue",
        "stop": "period",
    }


@pytest.mark.parametrize("group", FAMILIES)
def test_an_edit_of_the_model_changes_what_it_says(group: str) -> None:
    model, tok = build("llama", max_position_embeddings=256), chatty()
    before = evaluate(model, tok, [BRIDGE, HERE], [group])
    rewrite = anatomy(model).rewrite(1)
    with applied(model, [WeightDelta(name=anatomy(model).weight_name(1), full=rewrite.weight.detach() * -3)]):
        after = evaluate(model, tok, [BRIDGE, HERE], [group], before=before).summary()
    again = evaluate(model, tok, [BRIDGE, HERE], [group], before=before).summary()
    local = f"{group}_locality"
    assert before.summary()[local]["mean"] is None
    assert (again[local]["mean"], again[local]["requests"]) == (1.0, 1)
    assert after[local]["mean"] < 1
    assert after[f"{group}_rephrase"]["reasons"] == ["the record has no paraphrases"]


def test_in_a_chat_the_prompt_alone_is_the_users_turn() -> None:
    model, tok = build("llama", max_position_embeddings=256), chatty()
    found = evaluate(model, tok, [HERE], ["wild_rewrite", "wild_chat_rewrite"], settings=Settings(prompting=CHAT))
    alone, chat = (found.rows[0][name].details["generated"] for name in ("wild_rewrite", "wild_chat_rewrite"))
    assert alone == chat
    plain = evaluate(model, tok, [HERE], ["wild_rewrite"]).rows[0]["wild_rewrite"].details["generated"]
    assert plain != chat


def test_what_cannot_be_had_has_a_reason_and_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL, raising=False)
    model, tok = build("llama"), tokenizer()
    found = evaluate(model, tok, [HERE], ["wild_chat", "wild_judge", "wild_judge_chat"])
    assert found.answers.generated == {}
    reasons = {name: row["reasons"] for name, row in found.summary().items()}
    assert reasons["wild_chat_rewrite"] == ["the tokenizer has no chat template"]
    assert reasons["wild_judge_rewrite"] == reasons["wild_judge_chat_rewrite"] == [NO_JUDGE]


# The judge


def test_a_judge_that_nobody_asks_may_be_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "not an address")
    model, tok = build("llama"), tokenizer()
    assert evaluate(model, tok, [HERE], ["rewrite_acc"]).rows[0]["rewrite_acc"].value is not None
    with pytest.raises(ConfigError, match=URL):
        evaluate(model, tok, [HERE], ["wild_judge"])


class Server:
    """An OpenAI-compatible endpoint: `answers` says what it replies to a request's body, and with which status (0:
    without HTTP's own lines)."""

    def __init__(self, answers: Callable[[dict[str, Any]], tuple[int, bytes]]) -> None:
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        asked = self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers["Authorization"], {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, self.headers["Authorization"], body))
                status, answer = answers(body)
                if status:
                    self.send_response(status)
                    if 300 <= status < 400:
                        self.send_header("Location", answer.decode())
                    self.end_headers()
                with suppress(OSError):
                    for byte in answer if status == 0 else [answer]:
                        self.wfile.write(bytes([byte]) if status == 0 else answer)
                        time.sleep(0.01 if status == 0 else 0)

            def log_message(self, *_args: Any) -> None:
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """serve(answers) -> a server that the environment names as the judge."""
    monkeypatch.setattr(endpoint, "WAITS_S", (0.0, 0.0))
    servers = []

    def start(answers: Callable[[dict[str, Any]], tuple[int, bytes]]) -> Server:
        made = Server(answers)
        threading.Thread(target=made.http.serve_forever, daemon=True).start()
        servers.append(made)
        monkeypatch.setenv(URL, made.url)
        monkeypatch.setenv(KEY, "secret")
        return made

    yield start
    for made in servers:
        made.http.shutdown()
        made.http.server_close()


def named() -> Endpoint:
    """The judge that the environment names."""
    judge = judge_named()
    assert judge is not None
    return judge


def chat(content: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def test_the_judge_is_asked_once_for_each_answer(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda body: chat("A" if "Answer: Rome" in body["messages"][0]["content"] else '"b".'))
    cases = [("Q?", "Rome", "Rome it is"), ("Q?", "Rome", "Oslo"), ("Q?", "Rome", "Rome it is")]
    assert verdicts(named(), cases) == {cases[0]: True, cases[1]: False}
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("gpt-4o-mini", 0.0)
    assert "Question: Q?\nRight answer: Rome\nAnswer: Rome it is\n" in body["messages"][0]["content"]
    assert len(server.asked) == 2
    monkeypatch.setenv(MODEL, "other")
    monkeypatch.delenv(KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert (named().model, named().key) == ("other", None)


@pytest.mark.parametrize(("reply", "wanted"), [("A", 1.0), ("B", 0.0), ("A or B, who knows", None)])
def test_a_verdict_becomes_a_value(serve: Any, reply: str, wanted: float | None) -> None:
    serve(lambda _body: chat(reply))
    model, tok = build("llama"), tokenizer()
    found = evaluate(model, tok, [HERE], ["wild", "wild_judge"])
    value: Value = found.rows[0]["wild_judge_rewrite"]
    assert value.value == wanted
    assert (value.reason is None) is (wanted is not None)
    assert value.details["judge"] == "gpt-4o-mini"
    text = found.rows[0]["wild_rewrite"].details["generated"][0]["text"]
    assert value.details["generated"][0]["text"] == text, "the judge sees the text that is matched"


def test_a_busy_judge_is_asked_again(serve: Any) -> None:
    waiting = [503, 429]
    server = serve(lambda _body: (waiting.pop(), b"") if waiting else chat("A"))
    assert verdicts(named(), [("Q", "a", "a")]) == {("Q", "a", "a"): True}
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answer", "said_of_it", "times"),
    [
        ((401, b"no"), "no answer .HTTP Error 401", 1),
        ((503, b""), "no answer .HTTP Error 503", 3),
        ((200, b"<html>"), "no chat completion", 1),
        ((200, b'{"error": "no"}'), "no chat completion .KeyError", 1),
        ((200, b"[]"), "no chat completion", 1),
        ((0, b""), "no answer .RemoteDisconnected", 3),
        ((0, b"SSH-2.0 secret\r\n"), "no answer .BadStatusLine", 3),
        ((200, b"\xff"), "no chat completion .UnicodeDecodeError", 1),
        ((200, b"A" * 1_000_001), "more than 1,000,000 bytes", 1),
        (chat(None), "its content is null, not a text", 1),
        (chat([{"text": "A"}]), "its content is list", 1),
        (chat("you sent secret"), "holds the key", 1),
        ((200, b'{"choices": ["\\ud800 secret"]}'), "no chat completion .ValueError", 1),
        ((200, b"[" * 100_000), "no chat completion .ValueError", 1),
        ((0, b"HTTP/1.0 200 OK\r\nA: " + b"a" * 150), "none that was whole within 0.5 s", 1),
    ],
)
def test_what_a_judge_may_answer_instead(
    serve: Any, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, bytes], said_of_it: str, times: int
) -> None:
    if "within" in said_of_it:
        monkeypatch.setattr(endpoint, "TIMEOUT_S", 0.5)
    server = serve(lambda _body: answer)
    with pytest.raises(EndpointError, match=f"{said_of_it}.*") as refused:
        verdicts(named(), [("Q", "a", "a")])
    assert "\n" not in str(refused.value)
    assert "secret" not in f"{refused.value}{refused.value.__cause__}{named()}"
    assert len(server.asked) == times


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(serve: Any, status: int) -> None:
    other = serve(lambda _body: chat("A"))
    serve(lambda _body: (status, f"{other.url}/chat/completions".encode()))
    with pytest.raises(EndpointError, match=f"HTTP Error {status}, a redirect; none is followed"):
        named().ask("Q")
    assert not other.asked


def test_a_proxy_for_http_sees_nothing(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(lambda _body: chat("B"))
    monkeypatch.setenv("http_proxy", proxy.url)
    serve(lambda _body: chat("A"))
    assert named().ask("Q") == "A"
    assert not proxy.asked


def test_an_address_that_is_none() -> None:
    urls = ["file:///etc/passwd", "localhost:80", "ftp://x", "http://", "http://a:80x0/v1", "http://a:99999"]
    urls += ["http://a/v 1", "http://[::1", "http://user:secret@a/v1", "http://user%3Asecret%40a/v1"]
    urls += ["http://a/v1?key=secret", "http://a/v1#secret", "http://a/v\t1", "http://a/v1\n", "http://a/v\x7f"]
    urls += ["http://b\xfccher/v1", "http://a..b/v1", "http://a\\b/v1", "http://a\udcff/v1"]
    for url in urls:
        with pytest.raises(ConfigError, match="is no http address; check the flag") as refused:
            Endpoint(url=url, model="m", key=None, named_by="the flag")
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("key", ["se\ncret", "secret ", "s\x1becret", "s\xe9cret", "secret\udcff"])
def test_a_key_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("os.environ", {**os.environ, URL: "http://a/v1", KEY: key})
    with pytest.raises(ConfigError, match=f"key holds a space, a line end .* check {URL}") as refused:
        BaseEditor(rome_hparams("/nowhere"), metrics=["wild_judge"])
    assert "cret" not in str(refused.value)


def test_a_bad_address_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "http://localhost:80x0/v1")
    with pytest.raises(ConfigError, match=f"is no http address; check {URL}"):
        BaseEditor(rome_hparams("/nowhere"), metrics=["wild_judge"])


def test_the_command_keeps_texts_and_fails_in_one_line(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "m", max_position_embeddings=256)
    chatty().save_pretrained(tmp_path / "m")
    (tmp_path / "d.json").write_text(json.dumps([HERE.to_json()]))
    flags = ["--model", "m", "--device", "cpu", "--data", "d.json", "--metrics", "easyedit,wild,wild_chat,wild_judge"]
    server = serve(lambda _body: chat("A"))
    ran = script(command, *flags, "--json")
    assert ran.code == 0, ran.err
    row = ran.json["after"]["rows"][0]
    assert row["wild_judge_rewrite"]["value"] == 1
    assert {"prompt", "text", "stop", "tokens"} <= row["wild_chat_rewrite"]["details"]["generated"][0].keys()
    assert "secret" not in ran.out
    server.http.shutdown()
    server.http.server_close()
    ran = script(command, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith(f"error: {server.url}/chat/completions: no answer (")


# The report


def test_teacher_forced_and_wild_stand_side_by_side(tmp_path: Path) -> None:
    def run_of(*values: dict[str, float]) -> Any:
        """What the table reads of a run."""
        lines = []
        for n, row in enumerate(values):
            own, line = {name: Value(value=v) for name, v in row.items()}, edit(n, rewrite=(1.0,))
            record = dataclasses.replace(line.record, metrics={"after": own, "before": own})
            lines.append(dataclasses.replace(line, record=record))
        return SimpleNamespace(label="a", edits=lines)

    run = run_of({"wild_rewrite": 1.0, "wild_locality": 0.5}, {"wild_rewrite": 0.0, "wild_judge_rewrite": 1.0})
    table = wild_table([run])
    assert [column.title for column in table.columns[3:]] == ["teacher-forced", "WILD", "judged"]
    assert table.rows[0][1:] == ("efficacy", 2, 1.0, 0.5, 1.0)
    assert table.rows[2][1:] == ("locality", 2, 0.75, 0.5, None)
    assert wild_table([run_of({"ES": 1.0})]).rows == ()


def test_every_column_of_the_table_is_a_group() -> None:
    from easyeditor.report.wild import WAYS

    assert {form.removesuffix("_{}") for form in WAYS.values()} == {name for name in GROUPS if name.startswith("wild")}

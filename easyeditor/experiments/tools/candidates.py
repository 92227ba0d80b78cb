"""Candidates of a HardEdit-style set: one-word subjects x relations x targets, from our facts or a language model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

from easyeditor.base.endpoint import Endpoint
from easyeditor.base.files import parse_json
from easyeditor.values.edit import EditRequest

FIELDS = ("prompt", "subject", "target_new", "ground_truth")
PER_CALL = 10
Candidate = dict[str, str]


def from_facts(facts: Any, most: int, draw: random.Random) -> list[Candidate]:
    """One-word subjects of a relation, each in that relation's sentences that begin with the subject, each with another
    subject's answer as the new target; every subject once before any comes again."""
    relations: dict[str, dict[str, dict[str, str]]] = {}
    for record in facts:
        rewrite = record["requested_rewrite"]
        found = relations.setdefault(rewrite["relation_id"], {"templates": {}, "truths": {}})
        if rewrite["prompt"].startswith("{} "):
            found["templates"][rewrite["prompt"]] = ""
        found["truths"][rewrite["subject"]] = rewrite["target_true"]["str"]
    made: dict[str, list[Candidate]] = {}
    for found in relations.values():
        answers = sorted(set(found["truths"].values()))
        for subject, truth in found["truths"].items():
            others = [answer for answer in answers if not same_word(answer, truth)]
            if not subject.isalpha() or not others:
                continue
            for template in found["templates"]:
                texts = (template.replace("{}", subject), subject, draw.choice(others), truth)
                made.setdefault(subject, []).append(dict(zip(FIELDS, texts, strict=True)))
    queues = [draw.sample(own, len(own)) for own in made.values()]
    draw.shuffle(queues)
    rounds = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)][:most]


def from_endpoint(
    url: str, model: str, key: str | None, most: int, seeds: Sequence[EditRequest], subjects: Sequence[str]
) -> tuple[list[Candidate], int]:
    """Ask an OpenAI-compatible chat endpoint, ten records a call, until there are `most`; and how many broke a rule.

    Two calls in a row that bring nothing new end it.

    Raises:
        EndpointError: the endpoint cannot be reached, or answers with something else than a chat completion.
    """
    endpoint = Endpoint(url=url, model=model, key=key, named_by="--endpoint, --endpoint-model and OPENAI_API_KEY")
    kept: dict[str, Candidate] = {}
    refused, idle = 0, 0
    while len(kept) < most and idle < 2:
        taken = sorted({candidate["subject"] for candidate in kept.values()})
        answer = endpoint.ask(instruction(seeds, subjects, taken))
        before = len(kept)
        for raw in records_in(answer):
            candidate = checked(raw)
            if candidate is None:
                refused += 1
            else:
                kept.setdefault(candidate["prompt"], candidate)
        idle = idle + 1 if len(kept) == before else 0
    return list(kept.values())[:most], refused


def instruction(seeds: Sequence[EditRequest], subjects: Sequence[str], taken: Sequence[str]) -> str:
    """What the endpoint is asked for: the task, the rules, examples, subjects to use and subjects used already."""
    examples = [
        {"prompt": s.prompt, "subject": s.subject, "target_new": s.target_new, "ground_truth": s.ground_truth or ""}
        for s in seeds[:5]
    ]
    return (
        f"Write {PER_CALL} records of false facts as a JSON list of objects with the fields {', '.join(FIELDS)}.\n"
        "Rules: the subject is exactly one common English word; the prompt is the subject followed by a relation and "
        "stops right before the answer; ground_truth is the true answer and target_new a false one; both are nouns "
        "that clearly differ. Answer with the JSON list alone.\n"
        f"Examples: {json.dumps(examples, ensure_ascii=False)}\n"
        f"Choose subjects such as: {', '.join(subjects)}\n"
        f"Do not use these subjects: {', '.join(taken) or 'none yet'}"
    )


def records_in(answer: str) -> list[Any]:
    """The objects of the first JSON list in a text (models like to wrap it in words); empty when there is none."""
    match = re.search(r"\[.*\]", answer, flags=re.DOTALL)
    try:
        found = parse_json(match[0]) if match else []
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def checked(raw: Any) -> Candidate | None:
    """A record that follows the rules, stripped; None for one that does not."""
    if not isinstance(raw, dict) or not all(isinstance(raw.get(field), str) and raw[field].strip() for field in FIELDS):
        return None
    made = {field: raw[field].strip() for field in FIELDS}
    starts = made["prompt"].startswith(made["subject"] + " ")
    differ = not same_word(made["target_new"], made["ground_truth"])
    return made if made["subject"].isalpha() and starts and differ else None


def same_word(one: str, other: str) -> bool:
    """The same answer but for case and surrounding space?"""
    return one.strip().casefold() == other.strip().casefold()

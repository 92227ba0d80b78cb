"""lm-evaluation-harness on a model in memory: this project's own three tasks (offline), or any of the harness by name.

own_facts      choose the true answer among four of the same relation (data/facts.json); chance 0.25
own_endings    choose how a sentence goes on among four endings (data/sentences_50.json), as HellaSwag does; chance 0.25
own_last_word  is the last word of a sentence the model's first choice, as in LAMBADA; chance 0
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import read_json
from easyeditor.dataset.sets import DATA, FACTS
from easyeditor.lm.weights import frozen

SENTENCES = DATA / "sentences_50.json"
CHOICES = 4
CHANCE = {"own_facts": 1 / CHOICES, "own_endings": 1 / CHOICES, "own_last_word": 0.0}
FEWSHOT_SEED = 1234  # the harness's own default
METRICS = ("acc,none", "acc")  # as the harness names the accuracy in its results
Doc = dict[str, Any]


def check_installed() -> None:
    """Raise ConfigError, saying how to install it, unless lm-evaluation-harness is there."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "downstream needs lm-evaluation-harness, which is not installed: pip install -r requirements-eval.txt"
        ) from error


@dataclass(frozen=True)
class Harness:
    """Tasks made ready once, evaluated on a model as often as its weights change."""

    tasks: Sequence[Any]
    names: tuple[str, ...]
    manager: Any
    limit: int | None
    batch_size: int

    @classmethod
    def own(cls, documents: int, seed: int, edited: set[str], batch_size: int) -> Harness:
        """This project's tasks with at most `documents` documents each; facts whose prompt is in `edited` are left out.

        Raises:
            DataError: the facts or sentences are missing.
        """
        from lm_eval.tasks import TaskManager

        draw = random.Random(seed)
        texts = [item["Text"].strip() for item in read_json(SENTENCES)]
        made = {
            "own_facts": fact_documents(read_json(FACTS), edited, documents, draw),
            "own_endings": ending_documents(texts, documents, draw),
            "own_last_word": last_word_documents(texts, documents),
        }
        tasks = [_task(name, docs) for name, docs in made.items()]
        return cls(tasks, tuple(made), TaskManager(include_defaults=False), None, batch_size)

    @classmethod
    def named(cls, names: Sequence[str], documents: int, batch_size: int) -> Harness:
        """Tasks of the harness by name, the first `documents` of each; their data sets need a connection.

        Raises:
            ConfigError: a name the harness does not know.
        """
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise ConfigError(f"--tasks {unknown[0]}: lm-evaluation-harness knows no such task")
        return cls(list(names), tuple(names), manager, documents, batch_size)

    def accuracies(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> dict[str, tuple[float, int]]:
        """Accuracy and number of documents of each task, on the model as it is now.

        Raises:
            DataError: the harness cannot get or run a task.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            # `evaluate`, not `simple_evaluate`: that one seeds the caller's generators and spends seconds on a report
            # of the machine. Its bars and notes, one set for each model, would bury ours.
            with frozen(model), redirect_stderr(io.StringIO()), _only_errors("lm_eval"):
                loaded = self.manager.load(list(self.tasks))
                for task in loaded["tasks"].values():
                    if task.get_config("num_fewshot") is None:
                        task.set_config(key="num_fewshot", value=0)
                    task.set_fewshot_seed(seed=FEWSHOT_SEED)
                wrapped = HFLM(pretrained=model, tokenizer=tok, backend="causal", batch_size=self.batch_size)
                found = evaluate(lm=wrapped, task_dict=loaded, limit=self.limit, bootstrap_iters=0, log_samples=False)
        except Exception as error:  # the harness and `datasets` raise many kinds, most of them for want of a connection
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"lm-evaluation-harness, {', '.join(self.names)}: {type(error).__name__}: {reason}"
            ) from error
        assert found is not None
        return {name: _accuracy(found, name) for name in self.names}


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Inside, a library's logger reports errors only."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def fact_documents(facts: Any, edited: set[str], most: int, draw: random.Random) -> list[Doc]:
    """Questions with four answers from CounterFact records that carry a `relation_id`."""
    rewrites = [record["requested_rewrite"] for record in facts]
    answers: dict[str, dict[str, None]] = {}
    for rewrite in rewrites:
        answers.setdefault(rewrite["relation_id"], {})[rewrite["target_true"]["str"]] = None
    asked = (
        (one["prompt"].replace("{}", one["subject"]), one["target_true"]["str"], one["relation_id"]) for one in rewrites
    )
    usable = [one for one in asked if one[0] not in edited and len(answers[one[2]]) >= CHOICES]
    chosen = draw.sample(usable, min(most, len(usable)))
    return [
        _question(query, truth, [a for a in answers[relation] if a != truth], draw) for query, truth, relation in chosen
    ]


def ending_documents(texts: Sequence[str], most: int, draw: random.Random) -> list[Doc]:
    """Sentences cut in the middle, with their own second half and three of other sentences."""
    cut = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, texts)]
    halves = [(" ".join(start), " ".join(ending)) for start, ending in cut]
    return [
        _question(start, ending, [other for _, other in halves if other != ending], draw)
        for start, ending in halves[:most]
    ]


def last_word_documents(texts: Sequence[str], most: int) -> list[Doc]:
    """Sentences without their last word, and that word without the full stop."""
    cut = (text.strip().rstrip('.!?"”').rpartition(" ") for text in texts[:most])
    return [{"query": start, "answer": word} for start, _, word in cut]


def _question(query: str, truth: str, others: Sequence[str], draw: random.Random) -> Doc:
    choices = [truth, *draw.sample(list(others), CHOICES - 1)]
    draw.shuffle(choices)
    return {"query": query, "choices": choices, "gold": choices.index(truth)}


def _task(name: str, documents: list[Doc]) -> dict[str, Any]:
    from datasets import Dataset

    if not documents:
        raise DataError(f"task {name}: no documents left")
    data = {"test": Dataset.from_list(documents)}
    choose = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    continue_ = {"output_type": "loglikelihood", "doc_to_target": "{{' ' + answer}}"}  # no delimiter is put there
    return {
        "task": name,
        "custom_dataset": lambda **_metadata: data,
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **(choose if "choices" in documents[0] else continue_),
    }


def _accuracy(found: Any, name: str) -> tuple[float, int]:
    results = found["results"].get(name, {})
    value = next((results[key] for key in METRICS if key in results), None)
    if value is None:
        raise DataError(
            f"task {name} reports no accuracy (it has {', '.join(sorted(map(str, results)))}); choose another"
        )
    samples = found.get("n-samples", {}).get(name, {}).get("effective", 0)
    return float(value), int(samples)

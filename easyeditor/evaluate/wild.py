"""WILD: what the model says by itself, judged as a whole (The Mirage of Model Editing, arXiv 2502.11177).

Greedy, at most 50 new tokens, up to a full stop, a newline or an end of text. A prompt is given alone (the protocol's
default), in its question-and-answer instruction, or in the tokenizer's own chat template (the protocol writes Llama 2's
for every model). An answer is right if it equals the target once both are normalised, or if a language model says so.
Locality is whether the model generates the same tokens as before the edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from easyeditor.evaluate.accuracy import lacks_locality, lacks_rephrase
from easyeditor.evaluate.generation import Prompts, is_match, paraphrases, text_of, the_prompt
from easyeditor.evaluate.judge import Judged
from easyeditor.evaluate.metric import Answers, Ask, Metric, Settings, Value, mean_of
from easyeditor.lm.generate import Decoding
from easyeditor.values.edit import EditRequest

TOKENS = 50
SOURCE = "Mirage of Model Editing (2502.11177)"
INSTRUCTION = "Please answer the question:\n\nQ: {}\nA:"


@dataclass(frozen=True)
class Context:
    """How a prompt is put to the model: `mark` in the metrics' names, the text around it, is it a chat's turn?"""

    mark: str
    text: str
    words: str
    chat: bool = False

    def ask(self, prompt: str, settings: Settings) -> Ask:
        """The question, and how the model goes on."""
        prompting = replace(settings.prompting, chat=True, eos=False) if self.chat else settings.prompting
        decoding = Decoding(tokens=TOKENS, stops=("period", "newline"), prompting=prompting)
        return self.text.replace("{}", prompt), decoding


CONTEXTS = (
    Context("", "{}", "the prompt alone"),
    Context("qa_", INSTRUCTION, "the prompt in a question-and-answer instruction"),
    Context("chat_", "{}", "the prompt in the tokenizer's chat template", chat=True),
)


def _near(request: EditRequest) -> Sequence[str]:
    return [prompt for probe in request.locality.values() for prompt in probe.prompts]


def _asks(context: Context, prompts: Prompts, request: EditRequest, settings: Settings) -> list[Ask]:
    return [context.ask(prompt, settings) for prompt in prompts(request)]


def _matched(context: Context, prompts: Prompts, request: EditRequest, answers: Answers) -> Value:
    made = [(prompt, answers.generated[context.ask(prompt, answers.settings)]) for prompt in prompts(request)]
    hits = [float(is_match(text.text, request.target_new)) for _, text in made]
    return mean_of(hits, each=hits, generated=[text_of(prompt, text) for prompt, text in made])


def _cases(context: Context, prompts: Prompts, request: EditRequest, answers: Answers) -> list[Judged]:
    asks = ((prompt, context.ask(prompt, answers.settings)) for prompt in prompts(request))
    return [(prompt, request.target_new, answers.generated[ask].text) for prompt, ask in asks]


def _judged(context: Context, prompts: Prompts, request: EditRequest, answers: Answers) -> Value:
    cases = _cases(context, prompts, request, answers)
    found = [answers.verdicts[case] for case in cases]
    texts = [
        {"prompt": prompt, "text": text, "right": right} for (prompt, _, text), right in zip(cases, found, strict=True)
    ]
    by = None if answers.settings.judge is None else answers.settings.judge.model
    known = [float(right) for right in found if right is not None]
    if len(known) < len(found):
        return Value(value=None, reason="the judge said neither A nor B", details={"generated": texts, "judge": by})
    return mean_of(known, each=known, generated=texts, judge=by)


def _same(context: Context, request: EditRequest, answers: Answers) -> Value:
    hits, texts = [], []
    for prompt in _near(request):
        ask = context.ask(prompt, answers.settings)
        old, new = answers.unedited.generated[ask], answers.generated[ask]
        hits.append(float((old.ids, old.stop) == (new.ids, new.stop)))
        texts.append({"prompt": prompt, "before": old.text, "text": new.text, "stop": new.stop})
    return mean_of(hits, each=hits, generated=texts)


def _answered(context: Context, prompts: Prompts, *, judge: bool) -> Metric:
    paraphrase = prompts is paraphrases
    by = "a language model (docs/metrics.md)" if judge else "equal to the target once both are normalised"
    kind = f"wild_{'judge_' if judge else ''}{context.mark}{'rephrase' if paraphrase else 'rewrite'}"
    return Metric(
        name=kind,
        formula=f"1 if the text is {'right in the eyes of ' if judge else ''}{by}; {context.words}"
        + ("; mean over paraphrases" if paraphrase else ""),
        fields=("rephrase_prompt, target_new" if paraphrase else "prompt, target_new")
        + ("; a chat template" if context.chat else "")
        + ("; a judge" if judge else ""),
        source=SOURCE,
        column=f"{'Generalization' if paraphrase else 'Reliability'} (WILD)",
        blind_to="the judge's own mistakes" if judge else "right answers in other words or with more words around them",
        lacks=lacks_rephrase if paraphrase else lambda _request: None,
        asks=partial(_asks, context, prompts),
        value=partial(_judged, context, prompts) if judge else partial(_matched, context, prompts),
        judged=partial(_cases, context, prompts) if judge else None,
        chat=context.chat,
    )


def _local(context: Context) -> Metric:
    return Metric(
        name=f"wild_{context.mark}locality",
        formula=f"1 if the tokens generated are those before the edit; {context.words}; mean over locality prompts",
        fields="locality; the unedited model" + ("; a chat template" if context.chat else ""),
        source=SOURCE,
        column="Locality (WILD)",
        blind_to="whether the answer was right before; other words of the same meaning count as a change",
        lacks=lacks_locality,
        asks=partial(_asks, context, _near),
        value=partial(_same, context),
        needs_before=True,
        chat=context.chat,
    )


def _groups() -> dict[str, tuple[Metric, ...]]:
    made: dict[str, tuple[Metric, ...]] = {}
    for context in CONTEXTS:
        end = f"_{context.mark}".rstrip("_")
        own = [_answered(context, prompts, judge=False) for prompts in (the_prompt, paraphrases)]
        made[f"wild{end}"] = (*own, _local(context))
        made[f"wild_judge{end}"] = tuple(_answered(context, p, judge=True) for p in (the_prompt, paraphrases))
    return made


WILD = _groups()

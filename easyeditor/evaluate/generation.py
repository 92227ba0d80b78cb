"""Metrics on texts the model writes itself: exact match and containment, fluency GE, consistency RS, essence."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from easyeditor.evaluate.accuracy import lacks_rephrase
from easyeditor.evaluate.metric import Answers, Ask, Metric, Settings, Value, mean_of
from easyeditor.lm.generate import Decoding, Generated
from easyeditor.values.edit import EditRequest

FLUENCY_TOKENS, FLUENCY_TOP_K = 100, 5  # ROME's: 100 tokens, the prompt's among them, drawn among the five likeliest
NGRAMS = ((2, 2 / 3), (3, 4 / 3))  # n and its weight
Prompts = Callable[[EditRequest], Sequence[str]]


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016, SQuAD's comparison)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def is_match(text: str, target: str) -> bool:
    """Are they the same once normalised? A target of nothing but punctuation or articles is compared as it is."""
    wanted = normalised(target)
    return normalised(text) == wanted if wanted else text.strip() == target.strip()


def contains(text: str, target: str) -> bool:
    """Is the target in the text as whole words once both are normalised?"""
    wanted = normalised(target)
    return f" {wanted} " in f" {normalised(text)} " if wanted else target.strip() in text


def ngram_entropy(text: str) -> float:
    """Mean of 2/3 H2 and 4/3 H3, the entropies (bits) of the text's bigrams and trigrams; 0 for a text without any.

    ROME's fluency (Meng et al. 2022, section 3.4; Zhang et al. 2018). Words are runs of letters and digits, and each
    other sign for itself; ROME's code uses NLTK's words, which differ in contractions and abbreviations.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(weight * _entropy(words, n) for n, weight in NGRAMS) / len(NGRAMS)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


def the_prompt(request: EditRequest) -> Sequence[str]:
    """The rewrite prompt alone."""
    return [request.prompt]


def paraphrases(request: EditRequest) -> Sequence[str]:
    """The rephrase prompts."""
    return request.rephrase_prompts


def text_of(prompt: str, made: Generated) -> dict[str, Any]:
    """What is kept of a text that was written."""
    return {"prompt": prompt, "text": made.text, "stop": made.stop, "tokens": made.tokens}


def _matched(prompts: Prompts, matches: Callable[[str, str], bool], request: EditRequest, answers: Answers) -> Value:
    texts, hits = [], []
    for prompt in prompts(request):
        made = answers.generated[(prompt, answers.settings.natural)]
        accuracy = answers.scored[(prompt, request.target_new)].accuracy
        hits.append(float(matches(made.text, request.target_new)))
        texts.append({**text_of(prompt, made), "token_acc": accuracy})
    return mean_of(hits, each=hits, generated=texts)


def _natural_metric(
    name: str, formula: str, matches: Callable[[str, str], bool], prompts: Prompts, blind_to: str
) -> Metric:
    paraphrase = prompts is paraphrases
    return Metric(
        name=name,
        formula=f"{formula}; mean over {'paraphrases' if paraphrase else 'the prompt'}; greedy, up to a newline, "
        "an end of text or max_new_tokens",
        fields="rephrase_prompt, target_new" if paraphrase else "prompt, target_new",
        source="Mirage of Model Editing (2502.11177), without its question-and-answer prompt",
        column="near WILD-em, with --stop period newline" if matches is is_match else "none",
        blind_to=blind_to,
        lacks=lacks_rephrase if paraphrase else lambda _request: None,
        pairs=lambda request, _settings: [(prompt, request.target_new) for prompt in prompts(request)],
        asks=lambda request, settings: [(prompt, settings.natural) for prompt in prompts(request)],
        value=partial(_matched, prompts, matches),
    )


def _fluency_asks(request: EditRequest, settings: Settings) -> list[Ask]:
    drawn = Decoding(
        tokens=FLUENCY_TOKENS,
        count_prompt=True,
        top_k=FLUENCY_TOP_K,
        eos=False,
        seed=settings.seed,
        prompting=settings.prompting,
    )
    return [(prompt, drawn) for prompt in request.generation_prompts or (request.prompt,)]


def _written(request: EditRequest, answers: Answers) -> list[str]:
    return [answers.generated[ask].whole for ask in _fluency_asks(request, answers.settings)]


def _fluency(request: EditRequest, answers: Answers) -> Value:
    texts = _written(request, answers)
    each = [ngram_entropy(text) for text in texts]
    return mean_of(each, each=each, texts=texts)


def _consistency(request: EditRequest, answers: Answers) -> Value:
    texts = _written(request, answers)
    written, reference = answers.tfidf.transform([" ".join(texts), " ".join(request.reference_texts)])
    return Value(value=float((written @ reference.T).sum()), details={"texts": texts})


def _essence(request: EditRequest, answers: Answers) -> Value:
    return Value(value=answers.perplexities[_essence_texts(request)[0]])


def _essence_texts(request: EditRequest) -> list[str]:
    return [" ".join(request.essence_texts)]


def _lacks_references(request: EditRequest) -> str | None:
    if not request.generation_prompts:
        return "the record has no generation_prompts"
    return None if request.reference_texts else "the record has no reference_texts (texts on subjects of target_new)"


def _lacks_essence(request: EditRequest) -> str | None:
    return None if request.essence_texts else "the record has no essence_texts (texts on the subject)"


_LONG = "right answers in other words; says no when the answer is followed by more text"
_IN = "what surrounds the answer: 'not Rome' contains Rome"
GENERATION = (
    _natural_metric(
        "gen_rewrite_em", "1 if the text is the target once both are normalised", is_match, the_prompt, _LONG
    ),
    _natural_metric(
        "gen_rewrite_contains", "1 if the normalised text contains the target's words", contains, the_prompt, _IN
    ),
    _natural_metric("gen_rephrase_em", "as gen_rewrite_em", is_match, paraphrases, _LONG),
    _natural_metric("gen_rephrase_contains", "as gen_rewrite_contains", contains, paraphrases, _IN),
)
TEXTS = (
    Metric(
        name="GE",
        formula="mean over generation prompts of (2/3 H2 + 4/3 H3) / 2, H_n the entropy (bits) of the text's n-grams",
        fields="generation_prompts, or prompt",
        source="ROME, section 3.4",
        column="GE (ROME, MEMIT), 'Fluency', × 100; words differ slightly from NLTK's",
        blind_to="sense: shuffled words score best",
        asks=_fluency_asks,
        value=_fluency,
    ),
    Metric(
        name="RS",
        formula="cosine of the TF-IDF vectors of the texts written and of the reference texts",
        fields="generation_prompts, reference_texts",
        source="ROME, section 3.4",
        column="RS (ROME, MEMIT), 'Consistency', × 100, if reference_texts are the papers' Wikipedia snippets",
        blind_to="word order; word weights come from the reference texts measured together",
        lacks=_lacks_references,
        asks=_fluency_asks,
        value=_consistency,
    ),
    Metric(
        name="essence",
        formula="perplexity, exp(mean token NLL), of the texts on the subject, first 100 tokens",
        fields="essence_texts",
        source="ROME's code (essence drift)",
        column="none",
        blind_to="which part of the subject changed; compare with the value before",
        lacks=_lacks_essence,
        texts=_essence_texts,
        value=_essence,
    ),
)

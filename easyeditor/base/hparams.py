"""Hyper-parameters: plain values to a typed dataclass. Unknown keys and wrong types are errors with the near name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from easyeditor.base.errors import ConfigError
from easyeditor.base.files import check_value, parse_json
from easyeditor.base.plain_yaml import parse_yaml
from easyeditor.base.reading import read_text
from easyeditor.base.shots import read_shots

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
H = TypeVar("H", bound="HyperParams")
LARGEST_FLOAT = 1e30  # float32 holds it, and its products with what a model has
MAX_SEED = 2**62  # draws are numbered from the seed on, and generators take 63 bits


def overrides(settings: Iterable[str], **flags: Any) -> list[str]:
    """KEY=VALUE of a script's --set, and of its flags that are hyper-parameters; what was not given is left out."""
    return [*settings, *(f"{key}={value}" for key, value in flags.items() if value is not None)]


@dataclass(kw_only=True)
class HyperParams:
    """What every method shares. Attributes may be assigned; the library works on its own validated copy."""

    alg_name: str
    """Method, as the registry knows it."""
    model_name: Any
    """Folder, hub name, `smollm2-135m` (the embedded model), or a loaded (model, tokenizer) pair."""
    device: int | str = 0
    """GPU number, or a torch device such as `cpu` or `cuda:1`. A number on a machine without GPU means CPU, with a
    warning."""
    dtype: Literal["auto", "float32", "float16", "bfloat16", "float64"] = "float32"
    """Dtype the weights are loaded in; `auto` keeps the checkpoint's."""
    fp16: bool = False
    """EasyEdit's switch: load in float16."""
    model_parallel: bool = False
    """Spread the layers over all GPUs (`device_map="auto"`)."""
    seed: int = 0
    """Seed of everything sampled: contexts and the test-time prefix."""
    chat_template: bool = False
    """Give every prompt, of requests and of evaluation, as the user's turn of the tokenizer's own chat template, and
    take the answer as the beginning of the assistant's (`lm/prompting.py`)."""
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template is told besides the turns, such as `{enable_thinking: false}` (EasyEdit's key)."""
    target_space: Literal["auto", "always", "never"] = "auto"
    """Is there a space between a prompt and its target? `auto`: as in running text (none behind an opening bracket, in
    Chinese …: `lm/joining.py`); `always`: EasyEdit's rule; `never`: the target brings its own."""
    target_eos: bool = False
    """End the target with the tokenizer's EOS, so that the model learns to stop there, and score it so."""
    replay: bool | Literal["check"] = True
    """Run only what an edit can change; false gives the plain full forwards (same numbers, several times slower). For
    a model type that is not known, `check` compares the two on this model first, and replays if they agree."""
    matmul: Literal["exact", "tf32"] = "exact"
    """Float32 products on a GPU, in edits and in what measures them: `tf32` is several times faster and rounds factors
    to 10 bits. Statistics and solves stay exact; a CPU always is."""
    cpu_products: Literal["auto", "torch", "onednn"] = "auto"
    """Kernels of float32 products on a CPU, in edits and in what measures them: PyTorch's choice, oneDNN's, or `auto`:
    oneDNN's where PyTorch's are known to be slow (AMD with AVX-512). Results differ in the last bits."""
    batch_tokens: int | None = None
    """Most tokens in one forward (a value search takes a sixteenth of it); bounds memory. Null: 8192 on a CPU; on a GPU
    what its free memory holds, of both (`lm/budget.py`). Perplexity takes at most 512 on a CPU. What a search records
    before its passes goes by the search's rows, 8192 tokens at a time on a GPU and 512 on a CPU."""
    max_length: int = 2048
    """Longest text in tokens that is accepted for a prompt or a perplexity sentence."""
    ppl_sentence_num: int = 50
    """Sentences in the perplexity probe after each edit: 50 (ours or the papers'), 1000 or 10000 (the papers'
    files); 0 = off."""
    ppl_bos: Literal["papers", "auto", "always"] = "papers"
    """Whether a perplexity sentence begins with the tokenizer's BOS: papers = never; auto = where the tokenizer puts
    it before a text of its own accord; always = or it is an error."""
    ppl_batch_size: int = 10
    """Sentences in one forward on the plain path (the fast path batches by tokens)."""
    collapse_threshold: float = 1000.0
    """Perplexity above which an edited model counts as collapsed (the papers' value)."""
    collapse_ratio: float = 5.0
    """Collapse also needs perplexity above this many times the unedited model's: for models whose base is already
    high."""

    mquake_prompts: str | None = None
    """Folder with MQuAKE's prompt files, behind which the metrics `mquake` ask."""

    @classmethod
    def from_dict(cls: type[H], values: Mapping[str, Any], where: str = "hparams") -> H:
        """Build from a mapping, every value brought to its field's declared type ("5e-1" is a float, "5" is not a
        list)."""
        hparams = typed(cls, values, where)
        hparams.validate(where)
        return hparams

    def override(self: H, settings: Iterable[str]) -> H:
        """A copy with `key=value` texts applied, each typed by its field (values are read as YAML)."""
        return type(self).from_dict(type(self).merged(self.checked()._values(), settings), where="--set")

    @classmethod
    def merged(cls, values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
        """`values`, as a file gives them, with `key=value` texts over them.

        Raises:
            ConfigError: a text that is no `key=value`, or a key that no field has.
        """
        return cls.updated(values, parse_settings(settings))

    @classmethod
    def updated(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """`values` with `given` over them. Raises ConfigError for a given key that no field has."""
        known = field_types(cls)
        for key in given.keys() - known.keys():
            raise ConfigError(f"--set {key}={given[key]}: {unknown_key(key, known, cls)}")
        return {**values, **given}

    def checked(self: H) -> H:
        """The library's own copy: attributes may have been assigned since loading, so types are checked again."""
        strangers = [
            unknown_key(key, field_types(type(self)), type(self)) for key in vars(self).keys() - self._values()
        ]
        if strangers:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(sorted(strangers)))
        return type(self).from_dict(self._values(), where=type(self).__name__)

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def longest_text(self) -> int | None:
        """Most tokens of a perplexity sentence; None leaves it to the model's positions."""
        return self.max_length

    def reads(self) -> dict[str, Any]:
        """What is read besides the YAML, by key: the model; files and folders, for the check of what is written."""
        return {"model_name": self.model_name, "mquake_prompts": self.mquake_prompts}

    def check_files(self) -> None:
        """Raise ConfigError or DataError, which says what to do, if a file that every edit reads is not there."""
        if self.mquake_prompts is not None:
            read_shots(self.mquake_prompts)

    def validate(self, where: str) -> None:
        """Cross-checks between fields. Raises ConfigError."""
        for key, value in self._values().items():
            small = not isinstance(value, float) or abs(value) <= LARGEST_FLOAT  # NaN is not
            require(small, where, key, value, f"a finite number of at most {LARGEST_FLOAT:g} in size")
        named = f"{self.model_name!r} ({type(self.model_name).__name__})"
        require(is_model_name(self.model_name), where, "model_name", named, "a text, or a (model, tokenizer) pair")
        check_seed_size(self.seed, where)
        require(self.ppl_sentence_num >= 0, where, "ppl_sentence_num", self.ppl_sentence_num, "0 or more")
        require(self.ppl_batch_size > 0, where, "ppl_batch_size", self.ppl_batch_size, "1 or more")
        tokens = self.batch_tokens
        require(tokens is None or tokens > 0, where, "batch_tokens", tokens, "1 or more, or null")
        require(self.max_length > 0, where, "max_length", self.max_length, "1 or more")
        require(self.collapse_threshold > 0, where, "collapse_threshold", self.collapse_threshold, "a number above 0")
        require(self.collapse_ratio >= 1, where, "collapse_ratio", self.collapse_ratio, "a number of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the run folder; a (model, tokenizer) pair is named by its config."""
        values = self._values()
        if not isinstance(self.model_name, str):
            model = self.model_name[0]
            values["model_name"] = f"<loaded {type(model).__name__} {model.config.name_or_path!r}>"
        return values


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts to values by key. Raises ConfigError."""
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write key=value")
        try:
            given[key.strip()] = parse_yaml(text)[0] if text.strip() else None
        except ValueError as error:
            raise ConfigError(f"--set {setting}: the value is not readable as YAML ({_one_line(error)})") from error
    return given


def require(condition: bool, where: str, key: str, found: Any, allowed: str) -> None:
    """Raise ConfigError in the house form unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{where}: {key} is {found!r}; allowed: {allowed}")


def is_model_name(value: Any) -> bool:
    """A text with something in it; or an object from Python, which the loader looks at."""
    plain = (int, float, bool, list, dict, type(None))  # what YAML has besides texts
    return bool(value.strip()) if isinstance(value, str) else not isinstance(value, plain)


def check_seed_size(seed: int, where: str) -> None:
    """Raise ConfigError for a seed that generators cannot count on from."""
    require(-MAX_SEED < seed < MAX_SEED, where, "seed", seed, "a whole number of less than 62 bits")


_hints = functools.cache(get_type_hints)


def field_types(cls: type) -> dict[str, Any]:
    """Field name -> declared type of a dataclass."""
    hints = _hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def typed(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping, every value brought to its field's declared type. Raises ConfigError, which names all
    that is wrong."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected `key: value` lines, found {values!r:.60}")
    known = field_types(cls)
    problems = [unknown_key(str(key), known, cls) for key in values if key not in known]
    how = ": --set {}=…" if issubclass(cls, HyperParams) else ""
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            problems.append(f"key {f.name!r} is missing; {cls.__name__} needs it{how.format(f.name)}")
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key in known:
            try:
                made[key] = coerce(value, known[key], key)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(f"{where}: " + "; ".join(problems))
    return cls(**made)


def coerce(value: Any, declared: Any, key: str) -> Any:
    """Bring a YAML value to its declared type. Raises ConfigError naming the key, the value and what is allowed."""
    try:
        check_value(value)
        if isinstance(value, str) and "\0" in value:
            raise ValueError("it holds a NUL character")
    except ValueError as error:
        raise ConfigError(f"{key} cannot be used: {error}; allowed: {describe_type(declared)}") from error
    if declared is Any:
        return value
    if value is False and "off" in getattr(declared, "__args__", ()):
        value = "off"  # what YAML reads as false
    if _holds_bool(value) and not _allows_bool(declared):
        raise ConfigError(f"{key} is {value!r} (bool); allowed: {describe_type(declared)}")
    try:
        return _adapter(declared).validate_python(value)
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        wanted = describe_type(declared)
        raise ConfigError(f"{key} is {value!r} ({type(value).__name__}); allowed: {wanted}") from error


@functools.cache
def _adapter(declared: Any) -> TypeAdapter[Any]:
    """What checks a type: made once, and pydantic is imported when it is first needed."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(declared, config=ConfigDict(arbitrary_types_allowed=True))


def describe_type(declared: Any) -> str:
    """A type as a user reads it: `int | str`, `one of 'a', 'b'`."""
    options = getattr(declared, "__args__", ())
    if getattr(declared, "__origin__", None) is Literal:
        return "one of " + ", ".join(repr(option) for option in options)
    if declared is type(None):
        return "null"
    if options and type(declared).__name__ in ("UnionType", "_UnionGenericAlias", "Union"):
        return " or ".join(describe_type(option) for option in options)
    return declared.__name__ if isinstance(declared, type) and not options else str(declared)


def unknown_key(key: str, known: Iterable[str], cls: type) -> str:
    """The message for a key no field has, with the nearest field name."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"unknown key {key!r} for {cls.__name__}" + (f"; did you mean {near[0]!r}?" if near else "")


def read_json_list(path: Path, what: str) -> list[Any]:
    """Read a JSON list, as a ConfigError when it is not one."""
    try:
        values = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {what} must be a JSON list ({_one_line(error)})") from error
    if not isinstance(values, list):
        raise ConfigError(f"{path}: {what} must be a JSON list, found {type(values).__name__}")
    return values


def _holds_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(_holds_bool(item) for item in value))


def _allows_bool(declared: Any) -> bool:
    return declared is bool or any(_allows_bool(option) for option in getattr(declared, "__args__", ()))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

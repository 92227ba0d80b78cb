"""Typed errors, named by who must act. Each message says where, what was found, and what to do."""


class EasyEditorError(Exception):
    """Root of every error this library raises on purpose; scripts print it as one line and exit with 2."""


class ConfigError(EasyEditorError):
    """A hyper-parameter file, key, value or flag is wrong: the user changes the configuration."""


class DataError(EasyEditorError):
    """A request, dataset record or sentence file is wrong: the user changes the data."""


class AbsentSubject(DataError):
    """A request's subject is not in its prompt."""


class StatsError(EasyEditorError):
    """A kept file (second moments, a saved search, a norm anchor) is missing, corrupt, or belongs to another model."""


class EndpointError(EasyEditorError):
    """An endpoint the user named does not answer, or with something else than a chat completion."""


class ModelError(EasyEditorError):
    """A model or tokenizer cannot be fetched, loaded, or is not of a kind the library can edit."""


class NumericalError(EasyEditorError):
    """An edit came out non-finite. A tiny denominator alone never raises: collapse stays observable."""


class OutputError(EasyEditorError):
    """A result could not be written (disk full, read-only folder, a file in the way)."""


def out_of_memory(error: BaseException) -> bool:
    """Did memory run out: a GPU's, or the CPU's as Python, numpy, torch or the kernel say it?"""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    known = ("DefaultCPUAllocator", "annot allocate memory", "std::bad_alloc")
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in known)

"""Libraries that only some commands need: whether they are there, and how they are kept quiet."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Final

from dist_ckpt_mistral.errors import DistCkptMistralError

#: Module -> the package that brings it.
_PACKAGES: Final = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "mistral_common": "mistral-common",
}
_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"
#: Loggers of libraries that say much which is not about what the user does.
_TALKATIVE: Final = ("megatron", "torch", "transformers", "mistral_common", "py.warnings")


def require(what: str, *modules: str, extra: str) -> None:
    """Raise DistCkptMistralError that says which of ``modules`` is missing for ``what``, and which extra brings it."""
    missing = [_PACKAGES[module] for module in modules if not _is_installed(module)]
    if missing:
        raise DistCkptMistralError(
            f"{what} needs {', '.join(missing)}, not installed here. Run: pip install 'dist-ckpt-mistral[{extra}]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def import_numpy() -> None:
    """Import numpy with one thread for linear algebra: nothing here does any, and idle threads begin by spinning.

    Only numpy's copy of OpenBLAS reads the variable meanwhile, not torch's later, nor a child process.
    """
    given = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")
    import numpy as np  # noqa: F401, PLC0415  (slow, and not every command needs it)

    if given is None:
        del os.environ[_BLAS_THREADS]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, libraries keep their warnings and progress to themselves. Needs torch and transformers."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch  # noqa: F401, PLC0415  (sets levels of its loggers when it is imported)
        import transformers  # noqa: PLC0415  (slow)

        talk = transformers.utils.logging
        verbosity, had_progress_bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
        talk.set_verbosity_error()
        talk.disable_progress_bar()
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            talk.set_verbosity(verbosity)
            if had_progress_bars:
                talk.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

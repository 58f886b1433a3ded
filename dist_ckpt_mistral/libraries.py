"""Libraries that only some uses need: whether they are there, how to install them, and how they are kept quiet."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import MissingLibraryError
from dist_ckpt_mistral.messages import command_line

#: Module -> the package that brings it.
_PACKAGES: Final = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "mistral_common": "mistral-common",
    "matplotlib": "matplotlib",
}
#: What an extra of pyproject.toml brings of these, where all of it is needed.
_BROUGHT: Final = {"megatron": ("torch", "megatron.core")}
_NAME: Final = "dist-ckpt-mistral"
_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"
#: Loggers of libraries that say much which is not about what the user does.
_TALKATIVE: Final = ("megatron", "torch", "transformers", "mistral_common", "py.warnings")


def require(what: str, *modules: str, extra: str) -> None:
    """Raise MissingLibraryError if any of ``modules``, which ``what`` needs and ``extra`` brings, is not installed."""
    missing = [_PACKAGES[module] for module in modules if not _is_installed(module)]
    if missing:
        raise _missing(what, missing, extra)


@contextlib.contextmanager
def needed(what: str, *modules: str, extra: str) -> Iterator[None]:
    """The same before the block, which imports ``modules``, and for what else is imported in it and not installed."""
    require(what, *modules, extra=extra)
    try:
        yield
    except ModuleNotFoundError as error:
        require(what, *_BROUGHT.get(extra, ()), extra=extra)
        raise _missing(what, [_PACKAGES.get(str(error.name), str(error.name))], extra) from error


def _missing(what: str, packages: Sequence[str], extra: str) -> MissingLibraryError:
    command = _install_command(extra)
    return MissingLibraryError(f"{what} needs {', '.join(packages)}, not installed here. Run: {command}")


def _install_command(extra: str) -> str:
    """The command that adds an extra to this package, by the program and from the place that installed it.

    Both are on record: INSTALLER, and direct_url.json (PEP 610) unless it came from an index. A checkout whose code
    runs is its own place, installed or not.
    """
    from importlib import metadata  # noqa: PLC0415  (imports an email parser, which only this error needs)

    files: dict[str, str | None] = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        distribution = metadata.distribution(_NAME)
        files = {name: distribution.read_text(name) for name in ("INSTALLER", "direct_url.json")}
    checkout, origin = Path(__file__).parents[1], json.loads(files.get("direct_url.json") or "{}")
    if _is_checkout(checkout):
        source = ["-e", f"{checkout}[{extra}]"]
    elif origin:
        source = [f"{_NAME}[{extra}] @ {_requirement_url(origin)}"]
    else:
        source = [f"{_NAME}[{extra}]"]
    by_uv = (files.get("INSTALLER") or "").strip() == "uv"  # whose environments have no pip
    start = ["uv", "pip", "install", "--python", sys.executable] if by_uv else [sys.executable, "-m", "pip", "install"]
    return command_line([*start, *source])


def _is_checkout(folder: Path) -> bool:
    """Whether this project's sources lie in a folder."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(project.get("project", {}).get("name") == _NAME)


def _requirement_url(origin: Mapping[str, Any]) -> str:
    """The URL of a direct_url.json as a requirement has it (PEP 508), at the very commit that was installed."""
    repository, folder = origin.get("vcs_info"), origin.get("subdirectory")
    url = f"{repository['vcs']}+{origin['url']}@{repository['commit_id']}" if repository else origin["url"]
    return f"{url}#subdirectory={folder}" if folder else str(url)


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

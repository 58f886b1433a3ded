"""Optional libraries: whether they are installed, the command that installs them, and how to silence them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral.errors import MissingLibraryError
from dist_ckpt_mistral.messages import command_line

if TYPE_CHECKING:
    from pathlib import Path

#: Module -> the package that installs it.
_PACKAGES: Final = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "mistral_common": "mistral-common",
    "matplotlib": "matplotlib",
    "obstore": "obstore",
    "boto3": "boto3",
    "multistorageclient": "multi-storage-client",
    "azure.identity": "azure-identity",
    "tensorstore": "tensorstore",
    "zarr": "zarr",
    "fsspec": "fsspec",
}
#: Modules that an extra of their own installs, whatever else the importing code needs.
_EXTRA_OF_MODULE: Final = {"zarr": "views", "fsspec": "views"}
#: Room or module of this package -> the modules that its import needs, and the extra of pyproject.toml that has them.
_NEEDS: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "megatron": (("torch", "megatron.core"), "megatron"),
    "views.torch_dcp": (("torch",), "megatron"),
    "views.zarr_store": (("zarr",), "views"),
    "views.hf_files": (("fsspec",), "views"),
}
_NAME: Final = "dist-ckpt-mistral"
_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"
#: Loggers to silence while a command runs.
_NOISY_LOGGERS: Final = ("megatron", "torch", "transformers", "mistral_common", "py.warnings")


def require(what: str, *modules: str, extra: str) -> None:
    """Raise MissingLibraryError if any of ``modules`` is not installed.

    The message says that ``what`` needs their packages, and gives the command that installs ``extra``.
    """
    packages = missing(*modules)
    if packages:
        raise _missing(what, packages, extra)


def missing(*modules: str) -> list[str]:
    """Return the packages of those of ``modules`` that are not installed."""
    return [_PACKAGES[module] for module in modules if not _is_installed(module)]


def public_modules() -> dict[str, str]:
    """Public name -> the module of this package that defines it, from the stub ``__init__.pyi``."""
    import ast  # noqa: PLC0415  (the command line needs no public name)
    from pathlib import Path  # noqa: PLC0415  (the same)

    stub = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))
    imports = [line for line in stub.body if isinstance(line, ast.ImportFrom)]
    return {public.name: str(line.module) for line in imports for public in line.names}


def of_module(module: str) -> tuple[tuple[str, ...], str]:
    """What importing a module of this package needs beyond a plain install: other modules, and the extra with them."""
    return _NEEDS.get(module) or _NEEDS.get(module.partition(".")[0]) or ((), "megatron")


@contextlib.contextmanager
def needed(what: str, *modules: str, extra: str) -> Iterator[None]:
    """Raise MissingLibraryError if any of ``modules``, or any other module that the block imports, is not installed."""
    require(what, *modules, extra=extra)
    try:
        yield
    except ModuleNotFoundError as error:
        top = str(error.name).partition(".")[0]
        if top in _EXTRA_OF_MODULE:
            raise _missing(what, [_PACKAGES[top]], _EXTRA_OF_MODULE[top]) from error
        raise _missing(what, [_PACKAGES.get(str(error.name), str(error.name))], extra) from error


def _missing(what: str, packages: Sequence[str], extra: str) -> MissingLibraryError:
    command = install_command(extra)
    return MissingLibraryError(f"{what} needs {', '.join(packages)}, not installed here. Run: {command}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra with the same installer and from the same source as this package.

    The installed package records both: INSTALLER names the program, direct_url.json (PEP 610) the source unless that
    was an index. If the code runs from a checkout, the checkout is the source, installed or not.
    """
    import json  # noqa: PLC0415  (only this error needs these; metadata imports an email parser)
    from importlib import metadata  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

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
    by_uv = (files.get("INSTALLER") or "").strip() == "uv"  # uv's environments have no pip
    start = ["uv", "pip", "install", "--python", sys.executable] if by_uv else [sys.executable, "-m", "pip", "install"]
    return command_line([*start, *source])


def _is_checkout(folder: Path) -> bool:
    """Whether a folder contains this project's pyproject.toml."""
    import tomllib  # noqa: PLC0415  (only an error needs it)

    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(project.get("project", {}).get("name") == _NAME)


def _requirement_url(origin: Mapping[str, Any]) -> str:
    """Return the PEP 508 URL of the source in a direct_url.json, at the installed commit."""
    repository, folder = origin.get("vcs_info"), origin.get("subdirectory")
    url = f"{repository['vcs']}+{origin['url']}@{repository['commit_id']}" if repository else origin["url"]
    return f"{url}#subdirectory={folder}" if folder else str(url)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def import_numpy() -> None:
    """Import numpy with a single OpenBLAS thread: this package does no linear algebra, and idle threads spin at first.

    The environment is restored afterwards, so that torch's OpenBLAS and child processes keep their own thread count.
    """
    is_unset = _BLAS_THREADS not in os.environ
    os.environ.setdefault(_BLAS_THREADS, "1")
    import numpy as np  # noqa: F401, PLC0415  (slow; not every command needs it)

    if is_unset:
        del os.environ[_BLAS_THREADS]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log messages and progress bars of libraries within the block. Needs torch and transformers."""
    import logging  # noqa: PLC0415  (every command imports this module, and --help needs no logging)

    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch  # noqa: F401, PLC0415  (its import sets the levels of its loggers, so it must come first)
        import transformers  # noqa: PLC0415  (slow)

        hf_logging = transformers.utils.logging
        verbosity, had_progress_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            hf_logging.set_verbosity(verbosity)
            if had_progress_bars:
                hf_logging.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

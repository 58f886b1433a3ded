"""Names and places of files: which may be read, and which may be written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import OutputError

#: Of a file name, on the file systems of Linux (linux/limits.h).
_MAX_NAME_BYTES: Final = 255
#: How URLs begin, as ``Path`` has them: ``s3://bucket/ckpt`` is ``s3:/bucket/ckpt``.
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]+:")


def is_plain_name(name: str) -> bool:
    """Whether a name that a file gives can only be that of a file beside it, and can be printed as it is."""
    is_name = Path(name).name == name and name not in {"", ".."} and name.isprintable()
    return is_name and len(os.fsencode(name)) <= _MAX_NAME_BYTES


def leads_outside(path: Path, directory: Path) -> bool:
    """Whether what seems to lie in ``directory`` is a link to somewhere else; not into the blobs of the hub's cache.

    Who copies such a file along might give away something that whoever made the link knew the place of.
    """
    target = path.resolve()
    is_blob = target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir()
    return not is_blob and not target.is_relative_to(directory.resolve())


def require_apart(source: Path, target: Path) -> None:
    """Refuse an output that is, lies in, or contains the input."""
    try:
        inside, outside = target.resolve(), source.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError up to Python 3.12
        raise OutputError(f"cannot write {target} from {source}: {error}") from error
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise OutputError(f"the output {target} and the input {source} must lie apart. Choose another output.")


def require_writable(target: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless ``overwrite``; an empty directory counts as absent.

    A checkpoint root with several iterations is never replaced: no command writes more than one, so it is a training's.
    """
    if len(target.parts) > 1 and _SCHEME.fullmatch(target.parts[0]) and not Path(target.parts[0]).exists():
        raise OutputError(f"the output {target} is an URL, which cannot be written yet. Choose a local directory.")
    if target.is_mount():
        raise OutputError(f"the output {target} is a mount point, which cannot be renamed. Choose a directory in it.")
    if not (overwrite or is_absent(target)):
        raise OutputError(f"the output {target} exists. Choose another name or give --overwrite.")
    found = (path for pattern in ("iter_*", "release") for path in target.glob(pattern))
    steps = sorted(path.name for path in found if not path.is_symlink())  # of an import, one is a link to the other
    if len(steps) > 1:
        raise OutputError(
            f"the output {target} holds {len(steps)} checkpoints ({steps[0]} to {steps[-1]}), which --overwrite would "
            "all remove. Choose another name."
        )


def is_absent(target: Path) -> bool:
    """Whether nothing is lost with ``target``: there is nothing of this name, or an empty directory."""
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    return is_empty or not os.path.lexists(target)

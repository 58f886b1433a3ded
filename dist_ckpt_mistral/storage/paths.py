"""Names and places of files: which may be read, and which may be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.storage import local

#: Of a file name, on the file systems of Linux (linux/limits.h).
_MAX_NAME_BYTES: Final = 255
#: How URLs begin, as ``Path`` has them: ``s3://bucket/ckpt`` is ``s3:/bucket/ckpt``.
_SCHEME: Final = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:(?=/)")


def is_plain_name(name: str) -> bool:
    """Whether a name that a file gives can only be that of a file beside it, and can be printed as it is."""
    is_name = Path(name).name == name and name not in {"", ".."} and name.isprintable()
    return is_name and len(os.fsencode(name)) <= _MAX_NAME_BYTES


def is_url(path: Path) -> bool:
    """Whether ``path`` was a URL of any kind, and not a directory that is called so."""
    return _SCHEME.match(str(path)) is not None and not os.path.exists(path.parts[0])  # noqa: PTH110  (as of a NUL)


def as_given(path: Path) -> str:
    """``path`` for an error, with both slashes if it was a URL."""
    return _SCHEME.sub(r"\g<0>/", str(path)) if is_url(path) else str(path)


def leads_outside(path: Path, directory: Path) -> bool:
    """Whether a file or folder that seems to lie in ``directory`` is a link to somewhere else.

    To copy such a file, or what such a folder holds, might give away something whose place the maker of the link knew.
    In a snapshot of the hub's cache, links lead to the blobs of the same repository, and from there on to those that
    repositories share (huggingface_hub 2.4, utils/_shared_blobs.py): they are part of the snapshot.
    """
    target, inside = path.resolve(), directory.resolve()
    repositories = [place.parent for place in (inside, *inside.parents) if place.name == "snapshots"]
    blobs = [place / "blobs" for repository in repositories for place in (repository, repository.parent)]
    return not any(target.is_relative_to(place) for place in (inside, *blobs))


def require_apart(source: Path, target: Path) -> None:
    """Refuse an output that is, lies in, or contains the input."""
    try:
        inside, outside = target.resolve(), source.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError up to Python 3.12
        raise OutputError(f"cannot write {target} from {source}: {error}") from error
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise OutputError(f"the output {target} and the input {source} must lie apart. Choose another output.")


def placed(target: Path) -> Path:
    """Where an output lies, by a name that can be renamed: ``.`` and ``..`` are none."""
    absolute = target.absolute()
    return absolute.resolve() if ".." in absolute.parts else absolute


def require_writable(target: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be created, or exists, unless ``overwrite``; an empty directory counts as absent.

    A checkpoint root with several iterations is never replaced: no command writes more than one, so it is a training's.
    Nothing is touched. Raises OutputError.
    """
    if is_url(target):
        raise OutputError(
            f"the output {as_given(target)} is a URL, which cannot be written yet. Choose a local directory."
        )
    try:
        place = placed(target)
        require_replaceable(target, place, overwrite=overwrite)
        _require_creatable(place)
    except (OSError, RuntimeError) as error:  # RuntimeError up to Python 3.12
        raise OutputError(f"cannot create {target}: {getattr(error, 'strerror', None) or error}") from error


def require_replaceable(target: Path, place: Path, *, overwrite: bool) -> None:
    """Refuse to let what lies at ``place`` give way to the output ``target``. Raises OutputError, or OSError."""
    real = place.parent.resolve() / place.name
    mounted = next((point for point in local.mount_points() if point.is_relative_to(real)), None)
    if mounted == real:
        raise OutputError(f"the output {target} is a mount point, which cannot be renamed. Choose a directory in it.")
    if not (overwrite or is_absent(place)):
        raise OutputError(f"the output {target} exists. Choose another name or give --overwrite.")
    if mounted is not None:
        raise OutputError(f"the output {target} holds the mount point {mounted}. Choose another name.")
    if place.exists() and not place.is_dir():  # also where a link leads to it, as /dev/stdout does
        raise OutputError(f"the output {target} is no directory, and --overwrite replaces none else. Choose another.")
    found = (path for pattern in ("iter_*", "release") for path in place.glob(pattern))
    steps = sorted(path.name for path in found if not path.is_symlink())  # of an import, one is a link to the other
    if len(steps) > 1:
        raise OutputError(
            f"the output {target} holds {len(steps)} checkpoints ({steps[0]} to {steps[-1]}), which --overwrite would "
            "all remove. Choose another name."
        )
    moves = not (is_absent(place) or place.is_symlink())  # a directory notes its parent, which will be another one
    if moves and not os.access(place, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _require_creatable(place: Path) -> None:
    """Raise OSError where the directory in which an output grows, beside it, could not be made."""
    parent = existing_parent(place)
    if max(len(os.fsencode(name)) for name in (*place.parts, staging_name(place))) > _MAX_NAME_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        is_read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
        code = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(code, os.strerror(code))


def existing_parent(place: Path) -> Path:
    """The nearest of the directories above ``place`` that is there. Raises OSError where that cannot be told."""
    for parent in place.parents:
        with contextlib.suppress(FileNotFoundError):
            parent.lstat()
            return parent
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def staging_name(place: Path) -> str:
    """The name of the directory beside an output in which it grows."""
    return f".{place.name}.incomplete"


def is_absent(target: Path) -> bool:
    """Whether nothing is lost with ``target``: there is nothing of this name, or an empty directory."""
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    return is_empty or not os.path.lexists(target)

"""Checks of paths: which files may be read, and which outputs may be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import OutputError, SourceError
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage import local
from dist_ckpt_mistral.storage.remote_path import BUCKET_SCHEMES, WEB_SCHEMES, RemotePath

#: Maximum length of a file name on Linux (linux/limits.h).
_MAX_NAME_BYTES: Final = 255
#: The scheme of a URL. ``Path`` removes one of its slashes: ``s3://bucket/ckpt`` becomes ``s3:/bucket/ckpt``.
_SCHEME: Final = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:(?=/)")


#: Errors of a name: a loop of links is a RuntimeError up to Python 3.12, a NUL a ValueError.
_UNUSABLE: Final = (OSError, RuntimeError, ValueError)
#: An unfinished output in a store has this file, which its run created.
RUN_FILE: Final = ".incomplete/run.json"
_STEP: Final = re.compile(r"iter_.*|release")


def is_plain_name(name: str) -> bool:
    """Whether ``name``, read from a file, is a printable file name without a path, and not too long."""
    is_name = Path(name).name == name and name not in {"", ".."} and name.isprintable()
    return is_name and len(os.fsencode(name)) <= _MAX_NAME_BYTES


def is_url(path: Path) -> bool:
    """Whether ``path`` was made from a URL; a local directory with the name of a scheme is none."""
    if isinstance(path, RemotePath):
        return True
    return _SCHEME.match(str(path)) is not None and not os.path.exists(path.parts[0])  # noqa: PTH110  (accepts a NUL)


def as_given(path: Path) -> str:
    """Format ``path`` for an error, with both slashes after the scheme if it was made from a URL."""
    if isinstance(path, RemotePath):
        return str(path)
    return _SCHEME.sub(r"\g<0>/", str(path)) if is_url(path) else str(path)


def is_directory(path: Path) -> bool:
    """Whether there is a directory, for names of every kind: ``Path.is_dir`` may raise, as for a name with a NUL."""
    return path.is_dir() if isinstance(path, RemotePath) else os.path.isdir(path)  # noqa: PTH112


def exists(path: Path) -> bool:
    """Whether there is anything, for names of every kind."""
    return path.exists() if isinstance(path, RemotePath) else os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether there is a file, for names of every kind."""
    return path.is_file() if isinstance(path, RemotePath) else os.path.isfile(path)  # noqa: PTH113


def is_named(path: Path) -> bool:
    """Whether there is anything of this name, even a link to nothing."""
    return path.exists() if isinstance(path, RemotePath) else os.path.lexists(path)


def names_in(directory: Path) -> list[str]:
    """The names in a directory; those of folders end in a slash, and dangling links are left out.

    Raises SourceError if it cannot be listed.
    """
    if isinstance(directory, RemotePath):
        listing = directory.snapshot.listing(directory.key)
        return [*listing.files, *(f"{folder}/" for folder in listing.folders)]
    try:
        with os.scandir(directory) as entries:
            present = [entry for entry in entries if not entry.is_symlink() or os.path.exists(entry)]  # noqa: PTH110
            return [entry.name + "/" * entry.is_dir() for entry in present]
    except OSError as error:
        raise SourceError(f"cannot read {directory}: {error.strerror}") from error


def leads_outside(path: Path, directory: Path) -> bool:
    """Whether ``path``, a file or folder in ``directory``, is a link to somewhere else.

    Copying the target of such a link could leak a file from outside the model directory. In a snapshot of the hub's
    cache, links to the blobs of the same repository, and to the blobs that repositories share (huggingface_hub 2.4,
    utils/_shared_blobs.py), count as inside. Stores have no links.
    """
    if isinstance(path, RemotePath):
        return False
    target, inside = path.resolve(), directory.resolve()
    repositories = [place.parent for place in (inside, *inside.parents) if place.name == "snapshots"]
    blobs = [place / "blobs" for repository in repositories for place in (repository, repository.parent)]
    return not any(target.is_relative_to(place) for place in (inside, *blobs))


def require_apart(source: Path, target: Path) -> None:
    """Raise OutputError if the output ``target`` is, lies in, or contains the input ``source``.

    Directories are compared by their inodes, too: a bind mount gives one a second name, as containers do.
    """
    if isinstance(source, RemotePath) != isinstance(target, RemotePath):
        return
    try:
        real_target, real_source = target.resolve(), source.resolve()
        is_in_source = _identity(real_source) in map(_identity, (real_target, *real_target.parents))
        is_around_source = _identity(real_target) in map(_identity, real_source.parents)
    except _UNUSABLE as error:
        raise OutputError(f"cannot write {target} from {source}: {error}") from error
    if is_in_source or is_around_source:
        raise OutputError(f"the output {target} and the input {source} must lie apart. Choose another output.")


def _identity(path: Path) -> object:
    """What two names of one file or directory share: device and inode, or the path itself where nothing is seen."""
    try:
        state = path.stat()
    except OSError:
        return path
    return (state.st_dev, state.st_ino) if state.st_ino else path


def placed(target: Path) -> Path:
    """Return the absolute path of an output, without ``.`` and ``..``, which cannot be renamed.

    An output that is a link to a directory is that directory: the link stays, as with any program that writes there.
    """
    absolute = target.absolute()
    return absolute.resolve() if ".." in absolute.parts or absolute.is_symlink() else absolute


def require_writable(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError if an output cannot be created, or if it exists without ``overwrite``. Changes nothing.

    An empty directory counts as absent. A checkpoint root with several iterations is never replaced: it belongs to a
    training, because no command writes more than one.
    """
    if isinstance(target, RemotePath):
        _require_writable_url(target, overwrite=overwrite)
        return
    require_writable_scheme(target)
    try:
        place = placed(target)
        if target.is_symlink() and not target.exists():  # a disk that is not mounted, or a slip
            raise OutputError(
                f"the output {target} exists: it is a link to {target.readlink()}, where nothing is. Make that "
                "directory, or remove the link."
            )
        require_replaceable(target, place, overwrite=overwrite)
        _require_creatable(place)
    except _UNUSABLE as error:
        raise OutputError(f"cannot create {target}: {getattr(error, 'strerror', None) or error}") from error


def require_writable_scheme(target: Path) -> None:
    """Raise OutputError if an output was given as a URL of a kind that is only read, or not known."""
    if is_url(target) and not isinstance(target, RemotePath):
        raise OutputError(
            f"the output {as_given(target)} is a URL of a kind that cannot be written. Choose a local path, or one of "
            f"{listed([f'{scheme}://' for scheme in BUCKET_SCHEMES])}."
        )


def _require_writable_url(target: RemotePath, *, overwrite: bool) -> None:
    """Raise OutputError if a store cannot be written, or has an output there without ``overwrite``.

    What an unfinished run has left counts as absent here: whether it may be resumed or replaced is decided later.
    """
    if target.base.partition(":")[0] in WEB_SCHEMES:
        raise OutputError(f"the output {target} is on a web server, which is only read. Give a bucket or a path.")
    fresh = target.refreshed()
    if target.key.count("/") < fresh.snapshot.store.bucket_parts or not target.key:
        raise OutputError(f"the output {target} is a whole bucket. Give a name in it, such as {target}/NAME.")
    present = {key.removeprefix(f"{target.key}/") for key in fresh.snapshot.store.below(target.key)}
    if present and RUN_FILE not in present and not overwrite:
        raise OutputError(f"the output {target} exists. Choose another name or give --overwrite.")
    steps = sorted(
        {top for top, slash, _ in (name.partition("/") for name in present) if slash and _STEP.fullmatch(top)}
    )
    if len(steps) > 1:
        raise OutputError(
            f"the output {target} holds {len(steps)} checkpoints ({steps[0]} to {steps[-1]}), which --overwrite would "
            "all remove. Choose another name."
        )


def require_replaceable(target: Path, place: Path, *, overwrite: bool) -> None:
    """Raise OutputError or OSError unless the output ``target`` may replace the file or directory at ``place``."""
    named = f"{target} (a link to {place})" if target.is_symlink() else f"{target}"
    if overwrite and any(path.exists() and not path.is_dir() for path in (target, place)):  # such as /dev/stdout
        raise OutputError(
            f"the output {named} is not a directory, and --overwrite replaces only directories. Choose another name."
        )
    real = place.parent.resolve() / place.name
    mounted = next((point for point in local.mount_points() if point.is_relative_to(real)), None)
    if mounted == real:
        raise OutputError(f"the output {named} is a mount point, which cannot be renamed. Choose a directory in it.")
    if not (overwrite or is_absent(place)):
        raise OutputError(f"the output {named} exists. Choose another name or give --overwrite.")
    if mounted is not None:
        raise OutputError(f"the output {named} holds the mount point {mounted}. Choose another name.")
    directories = (path for pattern in ("iter_*", "release") for path in place.glob(pattern))
    steps = sorted(path.name for path in directories if not path.is_symlink())  # an import links one to the other
    if len(steps) > 1:
        raise OutputError(
            f"the output {named} holds {len(steps)} checkpoints ({steps[0]} to {steps[-1]}), which --overwrite would "
            "all remove. Choose another name."
        )
    is_moved = not (is_absent(place) or place.is_symlink())  # moving a directory rewrites its ``..`` entry
    if is_moved:
        _require_access(place, os.W_OK)


def _require_creatable(place: Path) -> None:
    """Raise OSError if the staging directory of an output at ``place`` cannot be created."""
    parent = existing_parent(place)
    if max(len(os.fsencode(name)) for name in (*place.parts, staging_name(place))) > _MAX_NAME_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    _require_access(parent, os.W_OK | os.X_OK)


def _require_access(directory: Path, mode: int) -> None:
    """Raise OSError if this process may not do what ``mode`` says."""
    if not os.access(directory, mode, effective_ids=True):
        is_read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
        code = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(code, os.strerror(code))


def existing_parent(place: Path) -> Path:
    """Return the nearest existing directory above ``place``. Raises OSError if one cannot be examined."""
    for parent in place.parents:
        with contextlib.suppress(FileNotFoundError):
            parent.lstat()
            return parent
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def staging_name(place: Path) -> str:
    """Return the name of the staging directory of an output, which lies beside it."""
    return f".{place.name}.incomplete"


def is_absent(target: Path) -> bool:
    """Whether ``target`` does not exist or is an empty directory."""
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    return is_empty or not os.path.lexists(target)

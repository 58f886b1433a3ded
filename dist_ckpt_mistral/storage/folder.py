"""A folder of the file system as a store: every object is a file, which appears whole by a rename.

Conversions write local outputs through ``staging`` instead, which publishes all files by one rename. This is for what
takes a store, such as tests, and says in code what the other stores are held to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.storage.local import SourceFiles, TargetFile
from dist_ckpt_mistral.storage.sources import Stamp, stamps
from dist_ckpt_mistral.storage.store import Info, Listing, ObjectExistsError, changed_object, require_length


class FolderStore:
    """The files below a folder. See ``Store`` for the methods."""

    bucket_parts = 0

    def __init__(self, root: Path) -> None:
        """Use an existing folder."""
        self._root = root
        self.base = str(root)

    def children(self, folder: str) -> Listing:
        """List what lies directly in a folder."""
        place = self._root / folder
        paths = sorted(place.iterdir()) if place.is_dir() else []
        files = {path.name: _info(stamp) for path, stamp in stamps(paths).items() if not _is_new(path)}
        return Listing(files=files, folders=tuple(path.name for path in paths if path.is_dir()))

    def below(self, folder: str) -> dict[str, Info]:
        """List all objects in a folder and in the folders below it."""
        found = stamps(path for path in sorted((self._root / folder).rglob("*")) if not _is_new(path))
        return {path.relative_to(self._root).as_posix(): _info(stamp) for path, stamp in found.items()}

    def info(self, key: str) -> Info | None:
        """Size and version of an object."""
        found = stamps([self._root / key])
        return next((_info(stamp) for stamp in found.values()), None)

    def read(self, key: str, start: int, stop: int, version: str | None) -> memoryview:
        """Read a range of one version."""
        with SourceFiles([self._root / key]) as files:
            info = self.info(key)
            data = files.read(0, start, min(stop, files.size_bytes(0)) - start)
        if version is not None and (info is None or info.version != version):
            raise changed_object(f"{self.base}/{key}")
        require_length(f"{self.base}/{key}", stop - start, len(data))
        return memoryview(data)

    def write(self, key: str, data: bytes, *, only_new: bool = False) -> str | None:
        """Write an object."""
        return self._publish(key, [data], len(data), only_new=only_new)

    def upload(self, key: str, parts: Iterable[memoryview | bytes], part_bytes: int, in_flight: int = 1) -> str | None:  # noqa: ARG002
        """Write an object from parts."""
        return self._publish(key, parts, 0, only_new=False)

    def _publish(self, key: str, parts: Iterable[memoryview | bytes], num_bytes: int, *, only_new: bool) -> str | None:
        path = self._root / key
        new = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            target, at = TargetFile(new, num_bytes), 0
            try:
                for part in parts:
                    target.write(at, part)
                    at += len(part)
            finally:
                target.close()
            if only_new:
                os.link(new, path)
            else:
                new.rename(path)
        except FileExistsError as error:
            raise ObjectExistsError(f"cannot create {path}: it exists") from error
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            new.unlink(missing_ok=True)
        info = self.info(key)
        return None if info is None else info.version

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, and the folders that have none left."""
        for key in keys:
            path = self._root / key
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another object lies there
                for folder in path.parents[: len(path.relative_to(self._root).parents) - 1]:
                    folder.rmdir()


def _is_new(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".new")


def _info(stamp: Stamp) -> Info:
    return Info(stamp.num_bytes, f"{stamp.inode}-{stamp.ctime_ns}")

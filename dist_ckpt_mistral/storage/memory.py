"""A store in memory, for tests: ``memory://NAME`` lives as long as the process."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable

from dist_ckpt_mistral.errors import SourceError
from dist_ckpt_mistral.storage.store import Info, Listing, ObjectExistsError, changed_object, require_length


class MemoryStore:
    """Objects in a dict. See ``Store`` for the methods."""

    bucket_parts = 0

    def __init__(self, base: str = "memory://store") -> None:
        """Start empty."""
        self.base = base
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._versions = itertools.count(1)
        self._lock = threading.Lock()

    def children(self, folder: str) -> Listing:
        """List what lies directly in a folder."""
        head = f"{folder}/" if folder else ""
        files, folders = {}, dict[str, None]()
        for key, info in self.below(folder).items():
            name, slash, _ = key.removeprefix(head).partition("/")
            if slash:
                folders[name] = None
            else:
                files[name] = info
        return Listing(files=files, folders=tuple(folders))

    def below(self, folder: str) -> dict[str, Info]:
        """List all objects in a folder and in the folders below it."""
        head = f"{folder}/" if folder else ""
        with self._lock:
            found = {key: Info(len(data), version) for key, (data, version) in self._objects.items()}
        return {key: info for key, info in sorted(found.items()) if key.startswith(head)}

    def info(self, key: str) -> Info | None:
        """Size and version of an object."""
        with self._lock:
            data, version = self._objects.get(key, (None, None))
        return None if data is None else Info(len(data), version)

    def read(self, key: str, start: int, stop: int, version: str | None) -> memoryview:
        """Read a range of one version."""
        with self._lock:
            data, present = self._objects.get(key, (None, None))
        if data is None:
            raise SourceError(f"cannot open {self.base}/{key}: there is no such object")
        if version not in {None, present}:
            raise changed_object(f"{self.base}/{key}")
        require_length(f"{self.base}/{key}", stop - start, len(data[start:stop]))
        return memoryview(data)[start:stop]

    def write(self, key: str, data: bytes, *, only_new: bool = False) -> str | None:
        """Write an object."""
        with self._lock:
            if only_new and key in self._objects:
                raise ObjectExistsError(f"cannot create {self.base}/{key}: it exists")
            version = str(next(self._versions))
            self._objects[key] = bytes(data), version
        return version

    def upload(self, key: str, parts: Iterable[memoryview | bytes], part_bytes: int, in_flight: int = 1) -> str | None:  # noqa: ARG002
        """Write an object from parts."""
        return self.write(key, b"".join(parts))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects."""
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

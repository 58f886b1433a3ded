"""URLs as paths: ``RemotePath`` is a ``Path`` whose files lie in a store.

Everything that takes a path takes a URL too, as long as the caller makes it with ``as_path``. A remote path has no
place in a file system, so what would hand it to the operating system raises TypeError.

Listings and small reads are kept in a snapshot that all paths derived from one URL share: a run asks a server once, and
reads the versions that it has seen first.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path, PosixPath
from typing import Final, Self

from dist_ckpt_mistral.errors import SourceError
from dist_ckpt_mistral.storage.store import Info, Listing, Range, Store, read_many

#: The schemes of buckets, of web servers (which are only read), and of what programs keep in memory.
BUCKET_SCHEMES: Final = ("s3", "gs", "az", "abfs", "msc")
WEB_SCHEMES: Final = ("http", "https")
_MEMORY: Final = "memory"
#: The scheme of models on the hub. These URLs, and those of huggingface.co, are hub ids, whose commits ``hub`` finds.
HUB_SCHEME: Final = "hf"
_MSC: Final = "dist_ckpt_mistral.storage.msc"
_URL: Final = re.compile(
    rf"({'|'.join((*BUCKET_SCHEMES, *WEB_SCHEMES, _MEMORY))}):/{{1,2}}([^/]+)(?:/(.*))?", re.DOTALL
)
_NOTHING: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{2,}")
_HUB: Final = re.compile(r"https?:/{1,2}(www\.)?(huggingface|hf)\.co(/|$)")
#: A small read takes this many bytes at the start of an object, which has the whole of a small file or a header.
_FIRST_PAGE_BYTES: Final = 128 << 10
#: Elsewhere: two heads of archives.
_PAGE_BYTES: Final = 8 << 10
_MOST_PAGES: Final = 4096
_REGULAR: Final = stat.S_IFREG | 0o444
_DIRECTORY: Final = stat.S_IFDIR | 0o555


@functools.cache
def _open_store(base: str, process: int) -> Store:  # noqa: ARG001  (clients do not survive a fork)
    scheme = base.partition("://")[0]
    if scheme == _MEMORY:
        from dist_ckpt_mistral.storage.memory import MemoryStore  # noqa: PLC0415  (only tests and programs use it)

        return MemoryStore(base)
    if scheme == "msc":
        from dist_ckpt_mistral.storage import msc  # noqa: PLC0415  (as the next ones)

        return msc.open_store(base)
    if scheme == HUB_SCHEME:
        from dist_ckpt_mistral.storage.hub_store import HubStore  # noqa: PLC0415

        return HubStore(base)
    from dist_ckpt_mistral.storage.buckets import BucketStore, WebStore  # noqa: PLC0415  (local paths need neither)

    return WebStore(base) if scheme in WEB_SCHEMES else BucketStore(base)


def store_of(base: str) -> Store:
    """The store of a URL without a key, such as ``s3://bucket``. Raises SourceError and MissingLibraryError."""
    return _open_store(base, 0 if base.startswith(f"{_MEMORY}://") else os.getpid())


def forget_stores() -> None:
    """Connect anew from now on, as where the credentials in the environment have changed. Empties ``memory://``."""
    _open_store.cache_clear()
    if (msc := sys.modules.get(_MSC)) is not None:
        msc.profile.cache_clear()


class Snapshot:
    """What a run has seen of the objects below a URL: listings, versions, and the bytes of small reads."""

    def __init__(self, base: str, root: str) -> None:
        """Start empty; ``root`` is the key of the URL. Folders above it are never listed: they may hold anything."""
        self._base, self._root = base, root
        self._listings: dict[str, Listing] = {}
        self._infos: dict[str, Info | None] = {}
        self._pages: OrderedDict[tuple[str, int], memoryview] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def store(self) -> Store:
        """The store, which nothing is asked of before it is needed."""
        return store_of(self._base)

    def listing(self, folder: str) -> Listing:
        """What lies directly in a folder."""
        if folder not in self._listings:
            self._listings[folder] = self.store.children(folder)
        return self._listings[folder]

    def known(self, folder: str) -> Listing | None:
        """The listing of a folder, if it is known already."""
        return self._listings.get(folder)

    def info(self, key: str) -> Info | None:
        """Size and version of an object; None if there is none."""
        folder, _, name = key.rpartition("/")
        if folder in self._listings or folder == self._root or folder.startswith(f"{self._root}/"):
            listing = self.listing(folder)
            if listing.is_complete or name in listing.files:
                return listing.files.get(name)
        if key not in self._infos:
            self._infos[key] = self.store.info(key) if name else None
        return self._infos[key]

    def require(self, key: str) -> Info:
        """Size and version of an object. Raises SourceError if there is none."""
        info = self.info(key)
        if info is None:
            raise SourceError(f"cannot open {self._base}/{key}: there is no such object")
        return info

    def small_read(self, key: str, start: int, stop: int) -> memoryview:
        """Read a few bytes, from pages that are kept."""
        size = self.require(key).num_bytes
        pages = []
        at = start
        while at < stop:
            page = _page_around(at, size)
            data = self._page(key, page)
            pages.append(data[at - page.start : min(stop, page.stop) - page.start])
            at = page.stop
        return pages[0] if len(pages) == 1 else memoryview(b"".join(pages))

    def _page(self, key: str, page: Range) -> memoryview:
        with self._lock:
            data = self._pages.get((key, page.start))
            if data is not None:
                self._pages.move_to_end((key, page.start))
                return data
        data = self.store.read(key, page.start, page.stop, self.require(key).version)
        with self._lock:
            self._pages[key, page.start] = data
            if len(self._pages) > _MOST_PAGES:
                self._pages.popitem(last=False)
        return data


def _page_around(position: int, size: int) -> Range:
    """The page with a byte of an object of ``size`` bytes."""
    if position < _FIRST_PAGE_BYTES:
        return Range(0, min(size, _FIRST_PAGE_BYTES))
    start = position // _PAGE_BYTES * _PAGE_BYTES
    return Range(start, min(size, start + _PAGE_BYTES))


class RemotePath(PosixPath):
    """A place in a store, such as ``s3://bucket/folder/name``. Its first two parts are ``s3:`` and ``bucket``.

    ``Path`` does all that concerns names; what concerns files is asked of the store.
    """

    __slots__ = ("_snapshot",)

    @property
    def snapshot(self) -> Snapshot:
        """What the run has seen below the URL that this path was derived from."""
        found: Snapshot | None = getattr(self, "_snapshot", None)
        if found is None:
            found = self._snapshot = Snapshot(self.base, self.key)
        return found

    def refreshed(self) -> Self:
        """The same place, of which nothing has been seen yet."""
        return type(self)(*self.parts)

    def _derived(self, path: Self) -> Self:
        path._snapshot = self.snapshot
        return path

    @property
    def base(self) -> str:
        """The URL of the store: ``s3://bucket``."""
        return f"{self.parts[0]}//{self.parts[1]}"

    @property
    def key(self) -> str:
        """The key in the store: ``folder/name``."""
        return "/".join(self.parts[2:])

    def __str__(self) -> str:
        """The URL."""
        return f"{self.base}/{self.key}".rstrip("/") if len(self.parts) > 1 else "/".join(self.parts)

    def __fspath__(self) -> str:
        """Refuse: the operating system knows no URLs. An error of this package, not of its user."""
        raise TypeError(f"{self} is a URL, not a path of the operating system")

    def __reduce__(self) -> tuple[type[Self], tuple[str, ...]]:
        """A pickled copy sees anew what is there."""
        return type(self), self.parts

    def __truediv__(self, name: str | os.PathLike[str]) -> Self:
        """A place below."""
        return self._derived(super().__truediv__(name))

    @property
    def parent(self) -> Self:
        """The folder around, at most the store itself."""
        return self if len(self.parts) <= 2 else self._derived(super().parent)  # noqa: PLR2004  (scheme and bucket)

    @property
    def parents(self) -> Sequence[Self]:
        """The folders around, up to the store itself."""
        found, here = [], self
        while len(here.parts) > 2:  # noqa: PLR2004  (scheme and bucket)
            here = here.parent
            found.append(here)
        return found

    def relative_to(self, other: str | os.PathLike[str], *_: object, **__: object) -> Path:  # type: ignore[override]
        """The rest of the name below ``other``, as a local path: it names no place in the store."""
        return Path(*super().relative_to(other).parts)

    def resolve(self, strict: bool = False) -> Self:  # noqa: ARG002  (the signature of Path)
        """The place itself: stores have no links."""
        return self

    def absolute(self) -> Self:
        """The place itself."""
        return self

    def info(self) -> Info | None:  # Path has a property of this name from 3.14
        """Size and version of the object; None if there is none."""
        return self.snapshot.info(self.key)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:  # noqa: ARG002  (the signature of Path)
        """Size of the object. Raises FileNotFoundError."""
        info = self.info()
        if info is not None:
            return os.stat_result((_REGULAR, 0, 0, 1, 0, 0, info.num_bytes, 0, 0, 0))
        if self.is_dir():
            return os.stat_result((_DIRECTORY, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        raise FileNotFoundError(str(self))

    def lstat(self) -> os.stat_result:
        """As ``stat``: there are no links."""
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002  (the signature of Path)
        """Whether there is an object or a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002  (the signature of Path)
        """Whether there is an object."""
        return bool(self.key) and self.info() is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002  (the signature of Path)
        """Whether there are objects below."""
        around = self.snapshot.known(self.key.rpartition("/")[0])
        if around is not None and around.is_complete and self.key:
            return self.name in around.folders
        listing = self.snapshot.listing(self.key)
        return bool(listing.files or listing.folders)

    def is_symlink(self) -> bool:
        """No: stores have no links."""
        return False

    def iterdir(self) -> Generator[Self, None, None]:
        """Yield what lies directly below, in the order of names."""
        listing = self.snapshot.listing(self.key)
        for name in sorted([*listing.files, *listing.folders]):
            yield self / name

    def glob(self, pattern: str, **_: object) -> Iterator[Self]:  # type: ignore[override]  # typeshed's differ by version
        """Yield what lies directly below and matches a pattern without folders; ``*/`` is the folders."""
        folders_only, pattern = pattern.endswith("/"), pattern.rstrip("/")
        listing = self.snapshot.listing(self.key)
        names = listing.folders if folders_only else (*listing.files, *listing.folders)
        return (self / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern))

    def rglob(self, pattern: str, **_: object) -> Iterator[Self]:  # type: ignore[override]  # likewise
        """Yield the objects below, in all folders, whose names match."""
        listing = self.snapshot.listing(self.key)
        for name in sorted(listing.files):
            if fnmatch.fnmatchcase(name, pattern):
                yield self / name
        for name in sorted(listing.folders):
            yield from (self / name).rglob(pattern)

    def read_whole(self) -> memoryview:
        """Read the whole object. Raises SourceError."""
        info = self.snapshot.require(self.key)
        return read_many(self.snapshot.store, self.key, [Range(0, info.num_bytes)], info.version)[0]


def as_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user means by ``name``: a remote one for the URL of a store, else a local one.

    Raises SourceError for a URL of nothing, SourceError and MissingLibraryError for a profile of ``msc://`` that cannot
    be served.
    """
    if isinstance(name, Path):
        return name
    text = os.fspath(name)
    if _NOTHING.fullmatch(text):  # of an unset variable; as a path it would be a directory of that name
        raise SourceError(f"{text} is a URL without a place. Write it out, such as {text.rstrip('/')}//NAME/FOLDER.")
    match = _URL.fullmatch(text)
    if match is None or _HUB.match(text) or (text[len(match[1]) :].startswith(":/") and "://" not in text):
        return Path(text)
    names = [*filter(None, (match[3] or "").split("/"))]
    if match[1] == "msc":
        from dist_ckpt_mistral.storage import msc  # noqa: PLC0415  (other paths need no configuration)

        if (folder := msc.local_folder(match[2])) is not None:
            return folder.joinpath(*names)
    return RemotePath(f"{match[1]}:", match[2], *names)

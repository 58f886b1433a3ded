"""Models on the Hugging Face hub as a store: files that are in its cache are read there, weights by ranges.

``hub`` downloads small files into the cache, as transformers does. Weights are not: nothing but what is wanted of them
is fetched, and no disk is needed for them. Requests go through huggingface_hub's own session, which knows the
proxy, the endpoint (HF_ENDPOINT) and the token (HF_TOKEN, or that of ``hf auth login``).
"""

from __future__ import annotations

import fnmatch
import functools
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import urlsplit

from dist_ckpt_mistral.errors import OutputError, SourceError
from dist_ckpt_mistral.storage.retries import attempts, reason
from dist_ckpt_mistral.storage.store import Info, Listing, require_length

#: Weights in transformers' format, and their index.
_WEIGHTS: Final = "model*.safetensors*"
#: The same weights in Mistral AI's format, which are not seen beside the others.
_CONSOLIDATED: Final = "consolidated*"
#: A request whose answer does not go on for this long is made again.
_TIMEOUT_S: Final = 30
_PARTIAL: Final = 206
#: What is said by servers that files are redirected to when the address is too old.
_EXPIRED: Final = (401, 403, 404, 410)
_MAY_PASS: Final = (408, 425, 429, 500, 502, 503, 504)


class Repository(NamedTuple):
    """A model at one commit. Its content never changes."""

    id: str
    commit: str


class HubStore:
    """The models of one owner; keys are NAME@COMMIT/FILE. See ``Store`` for the methods."""

    bucket_parts = 1

    def __init__(self, base: str) -> None:
        """Ask for nothing yet."""
        self.base = base
        self._owner = base.partition("://")[2]
        self._files = functools.cache(self._listed)
        self._addresses: dict[tuple[Repository, str], str] = {}
        self._lock = threading.Lock()

    def _split(self, key: str) -> tuple[Repository, str]:
        model, _, rest = key.partition("/")
        name, _, commit = model.partition("@")
        return Repository(f"{self._owner}/{name}", commit), rest

    def _listed(self, repository: Repository) -> Mapping[str, Info]:
        from huggingface_hub.hf_api import HfApi, RepoFile  # noqa: PLC0415  (slow; only hub ids need it)

        try:
            tree = [*HfApi().list_repo_tree(repository.id, recursive=True, revision=repository.commit)]
        except Exception as error:  # the errors of the hub and of its transport have no common base class
            raise SourceError(f"cannot list {self.base}: {_one_line(error)}") from error
        files = {each.path: Info(each.size, each.blob_id) for each in tree if isinstance(each, RepoFile)}
        if fnmatch.filter(files, _WEIGHTS):
            files = {path: info for path, info in files.items() if not fnmatch.fnmatchcase(path, _CONSOLIDATED)}
        return files

    def children(self, folder: str) -> Listing:
        """List what lies directly in a folder of a model; which models there are is not known."""
        if not folder:
            return Listing(is_complete=False)
        repository, inside = self._split(folder)
        head = f"{inside}/" if inside else ""
        files, folders = {}, dict[str, None]()
        for path, info in self._files(repository).items():
            if path.startswith(head):
                name, slash, _ = path.removeprefix(head).partition("/")
                if slash:
                    folders[name] = None
                else:
                    files[name] = info
        return Listing(files=files, folders=tuple(folders))

    def below(self, folder: str) -> dict[str, Info]:
        """List all files in a folder of a model and in the folders below it, by key."""
        repository, inside = self._split(folder)
        head, model = f"{inside}/" if inside else "", folder.partition("/")[0]
        files = self._files(repository)
        return {f"{model}/{path}": info for path, info in sorted(files.items()) if path.startswith(head)}

    def info(self, key: str) -> Info | None:
        """Size and version of a file."""
        repository, file = self._split(key)
        return self._files(repository).get(file)

    def read(self, key: str, start: int, stop: int, version: str | None) -> memoryview:  # noqa: ARG002  (the commit's)
        """Read a range: out of the hub's cache if the file is there, else of the hub."""
        repository, file = self._split(key)
        info = self._files(repository).get(file)
        if info is None:
            raise SourceError(f"cannot open {self.base}/{key}: there is no such file")
        if (local := _cached(repository, file)) is not None:
            with local.open("rb") as stream:
                data = os.pread(stream.fileno(), stop - start, start)
            require_length(str(local), stop - start, len(data))
            return memoryview(data)
        return self._fetch(repository, file, start, stop)

    def _fetch(self, repository: Repository, file: str, start: int, stop: int) -> memoryview:
        """Read a range of the hub, or of the server that it names for the file, whose address is kept."""
        what, why = f"{self.base}/{repository.id.partition('/')[2]}@{repository.commit}/{file}", ""
        for is_last in attempts():
            try:
                address = self._address(repository, file)
                status, data = _get_range(address, start, stop)
            except Exception as error:  # no common base class; what the hub refuses is said by its own library
                if is_last or _refused(error):
                    raise SourceError(f"cannot read {what}: {_one_line(error)}") from error
                continue
            if status == _PARTIAL and len(data) == stop - start:
                return data
            why = (
                f"expected {stop - start} bytes at {start}, got {len(data)}" if status == _PARTIAL else f"HTTP {status}"
            )
            if status in _EXPIRED:
                with self._lock:
                    self._addresses.pop((repository, file), None)
            elif status not in {_PARTIAL, *_MAY_PASS}:
                break
        raise SourceError(f"cannot read {what}: {why}.")

    def _address(self, repository: Repository, file: str) -> str:
        """Where a file is served: large ones by other servers, at addresses that are valid for a while."""
        with self._lock:
            known = self._addresses.get((repository, file))
        if known is None:
            from huggingface_hub import get_hf_file_metadata, hf_hub_url  # noqa: PLC0415

            url = hf_hub_url(repository.id, file, revision=repository.commit)
            known = get_hf_file_metadata(url).location
            with self._lock:
                self._addresses[repository, file] = known
        return known

    def _refuse(self, key: str) -> NoReturn:
        raise OutputError(f"{self.base}/{key} cannot be written: the hub is only read. Give a bucket or a path.")

    def write(self, key: str, data: bytes, *, only_new: bool = False) -> str | None:  # noqa: ARG002
        """Refuse: the hub is only read."""
        self._refuse(key)

    def upload(self, key: str, parts: Iterable[memoryview | bytes], part_bytes: int, in_flight: int = 1) -> str | None:  # noqa: ARG002
        """Refuse, as ``write`` does."""
        self._refuse(key)

    def delete(self, keys: Iterable[str]) -> None:
        """Refuse, as ``write`` does."""
        self._refuse(next(iter(keys), ""))


def _cached(repository: Repository, file: str) -> Path | None:
    """Where a file lies in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  (slow; only hub ids need it)

    found = try_to_load_from_cache(repository.id, file, revision=repository.commit)
    return Path(found) if isinstance(found, str) else None


def _get_range(address: str, start: int, stop: int) -> tuple[int, memoryview]:
    """Status and body for a range of an address. The token goes to the hub alone."""
    from huggingface_hub import constants  # noqa: PLC0415  (slow; only hub ids need it)
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # noqa: PLC0415

    is_hub = urlsplit(address).netloc == urlsplit(constants.ENDPOINT).netloc
    headers: dict[str, str] = build_hf_headers(token=None if is_hub else False)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    session: Any = get_session()
    answer = session.get(address, headers=headers, timeout=_TIMEOUT_S)
    return answer.status_code, memoryview(answer.content)


def _refused(error: Exception) -> bool:
    """Whether the hub has said that it does not give a file: it answers no other way if it is asked again."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status not in _MAY_PASS


def _one_line(error: Exception) -> str:
    """The error in one line: the first line is a status, the next ones are its meaning and advice."""
    return " ".join(str(error).split()) or reason(error)

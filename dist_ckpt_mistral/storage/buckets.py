"""Object stores over obstore: ``s3://``, ``gs://``, ``az://``, and web servers with ranges for reading.

``msc`` opens the same stores where a profile says.

obstore retries server errors, resets and stalls itself. It does not notice an answer that is shorter than asked and
consistent in itself, so every length is checked here. It publishes no truncated object: if a stream of parts fails, it
aborts the upload (measured; s3fs, msc.open and s3torchconnector publish what they have).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any, Final, TypeVar

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.errors import OutputError, SourceError
from dist_ckpt_mistral.storage.retries import attempts, may_pass, reason, retry_seconds
from dist_ckpt_mistral.storage.store import Info, Listing, ObjectExistsError, answer_of, changed_object, pool

T = TypeVar("T")

#: A request whose answer does not begin, or does not go on, for this long is made again.
_READ_TIMEOUT: Final = timedelta(seconds=30)
#: A request that is not done by then is made again: on a slow line 4 MiB beside fifteen others take minutes.
_TIMEOUT: Final = timedelta(minutes=10)
_CONNECT_TIMEOUT: Final = timedelta(seconds=5)
#: Variables with which obstore itself finds credentials for S3; without any of them boto3 is asked.
_OWN_CREDENTIALS: Final = (
    *("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
)
#: Names that a web server, which lists nothing, is asked for: the files of models and checkpoints, and their lists.
WEB_NAMES: Final = (
    *("config.json", "params.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("model.safetensors", "model.safetensors.index.json"),
    *("consolidated.safetensors", "consolidated.safetensors.index.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.json", "merges.txt", "README.md"),
    *("latest_checkpointed_iteration.txt", "latest_train_state.pt", ".metadata", "metadata.json", "common.pt"),
    *("run_config.yaml", "train_state.pt", "modelopt_run_config.yaml"),
    *("checksums.json", "integrity.json", "dist_ckpt_mistral.json", "vision.safetensors"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where a store's objects are, and how they are asked for: a URL of obstore's, and options of its constructors."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    client_options: Mapping[str, Any] = field(default_factory=dict)


class BucketStore:
    """A bucket or container, or a folder in one. See ``Store`` for the methods."""

    bucket_parts = 0

    def __init__(self, base: str, where: Where | None = None) -> None:
        """Connect to nothing yet. Raises MissingLibraryError without obstore, SourceError for a bad name.

        ``where`` counts in the place of ``base``, which is then only a name for errors.
        """
        self.base = base
        with libraries.needed(f"a URL such as {base}", "obstore", extra="s3"):
            import obstore.exceptions  # noqa: PLC0415  (optional, and only URLs need it)
            from obstore.store import from_url  # noqa: PLC0415

        self._exceptions: Any = obstore.exceptions
        options: Any = {"timeout": _TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT, "allow_http": True}
        options["read_timeout"] = _READ_TIMEOUT
        retry: Any = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_seconds())}
        retry["backoff"] = {"max_backoff": timedelta(seconds=5)}
        try:
            place = where if where is not None else Where(url=base, options=_found_options(base))
            options |= place.client_options
            self._store: Any = from_url(place.url, client_options=options, retry_config=retry, **place.options)
        except (ValueError, self._exceptions.BaseError) as error:
            raise SourceError(f"cannot open {base}: {reason(error)}") from error

    def _name(self, key: str) -> str:
        return f"{self.base}/{key}"

    def _failed(self, verb: str, key: str, error: BaseException) -> SourceError:
        return SourceError(f"cannot {verb} {self._name(key)}: {reason(error)}.")

    def _tried(self, call: Callable[[], T]) -> T:
        """Call until it goes well, or the time for retries is over: obstore does not retry answers that break off."""
        end = time.monotonic() + retry_seconds()
        for is_last in attempts():
            try:
                return answer_of(call)
            except self._exceptions.GenericError as error:
                if is_last or not may_pass(error) or time.monotonic() > end:  # the client has retries of its own
                    raise
        raise AssertionError  # the last attempt returns or raises

    @property
    def _errors(self) -> tuple[type[BaseException], ...]:
        return (self._exceptions.BaseError, OSError)

    def children(self, folder: str) -> Listing:
        """List what lies directly in a folder."""
        try:
            found = self._tried(lambda: self._store.list_with_delimiter(folder or None))
        except self._errors as error:
            raise self._failed("list", folder, error) from error
        files = {each["path"].rpartition("/")[2]: _info(each) for each in found["objects"] if each["path"] != folder}
        folders = tuple(prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])
        return Listing(files=files, folders=folders)

    def below(self, folder: str) -> dict[str, Info]:
        """List all objects in a folder and in the folders below it."""
        try:
            found = self._tried(lambda: self._all_below(folder))
        except self._errors as error:
            raise self._failed("list", folder, error) from error
        return {key: info for key, info in sorted(found.items()) if key != folder}

    def _all_below(self, folder: str) -> dict[str, Info]:
        return {each["path"]: _info(each) for batch in self._store.list(folder or None) for each in batch}

    def info(self, key: str) -> Info | None:
        """Size and version of an object."""
        try:
            return _info(self._tried(lambda: self._store.head(key)))
        except FileNotFoundError:
            return None
        except self._errors as error:
            raise self._failed("open", key, error) from error

    def read(self, key: str, start: int, stop: int, version: str | None) -> memoryview:
        """Read a range of one version. An answer of the wrong length is asked for again."""
        options: dict[str, Any] = {"range": (start, stop)}
        if version is not None and not version.startswith("W/"):  # If-Match never holds for a weak ETag
            options["if_match"] = f'"{version}"'
        got = -1
        for _ in attempts():
            try:
                data = self._tried(lambda: self._get(key, options, version))
            except FileNotFoundError as error:
                raise SourceError(f"cannot open {self._name(key)}: there is no such object") from error
            except self._exceptions.PreconditionError as error:
                raise changed_object(self._name(key)) from error
            except self._errors as error:
                raise self._failed("read", key, error) from error
            if len(data) == stop - start:
                return data
            got = len(data)
        raise SourceError(f"cannot read {self._name(key)}: expected {stop - start} bytes at {start}, got {got}.")

    def _get(self, key: str, options: dict[str, Any], version: str | None) -> memoryview:
        answer = self._store.get(key, options=options)
        if version not in {None, _version(answer.meta)}:
            raise changed_object(self._name(key))
        return memoryview(answer.bytes()).cast("B")

    def write(self, key: str, data: bytes, *, only_new: bool = False) -> str | None:
        """Write an object in one request."""
        mode = "create" if only_new else "overwrite"
        try:
            return _version(self._tried(lambda: self._store.put(key, data, mode=mode, use_multipart=False)))
        except self._exceptions.AlreadyExistsError as error:
            if (own := self._version_if_equal(key, data)) is not None:
                return own
            raise ObjectExistsError(f"cannot create {self._name(key)}: it exists") from error
        except self._errors as error:
            raise OutputError(f"cannot write {self._name(key)}: {reason(error)}.") from error

    def _version_if_equal(self, key: str, data: bytes) -> str | None:
        """The version of an object with this very content: written by a request whose answer was lost."""
        info = self.info(key)
        if info is None or info.num_bytes != len(data):
            return None
        is_equal = not data or bytes(self.read(key, 0, len(data), info.version)) == data
        return info.version if is_equal else None

    def upload(self, key: str, parts: Iterable[memoryview | bytes], part_bytes: int, in_flight: int = 1) -> str | None:
        """Write an object from parts. One part alone is one request."""
        source = _Remembered(parts)
        first = [*_first(source, 2)]
        try:
            if len(first) <= 1:
                return _version(self._store.put(key, b"".join(first), use_multipart=False))
            return _version(
                self._store.put(
                    key,
                    chain(first, source),
                    use_multipart=True,
                    chunk_size=part_bytes,
                    max_concurrency=in_flight,
                )
            )
        except self._errors as error:
            if source.error is not None:  # the caller's own, which obstore may have wrapped
                raise source.error from None
            raise OutputError(f"cannot write {self._name(key)}: {reason(error)}.") from error

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, many in a request."""
        listed = [*keys]
        try:
            if listed:
                answer_of(lambda: self._store.delete(listed))
        except FileNotFoundError:
            for key in listed:
                self._delete_one(key)
        except self._errors as error:
            raise OutputError(f"cannot delete {self._name(listed[0])}: {reason(error)}.") from error

    def _delete_one(self, key: str) -> None:
        try:
            answer_of(lambda: self._store.delete(key))
        except FileNotFoundError:
            pass
        except self._errors as error:
            raise OutputError(f"cannot delete {self._name(key)}: {reason(error)}.") from error


class WebStore(BucketStore):
    """A web server: it reads, and knows only the names that it is asked for."""

    def children(self, folder: str) -> Listing:
        """Find which of ``WEB_NAMES`` lie in a folder."""
        head = f"{folder}/" if folder else ""
        infos = pool().map(lambda name: self.info(head + name), WEB_NAMES)
        found = {name: info for name, info in zip(WEB_NAMES, infos, strict=True) if info is not None}
        return Listing(files=found, is_complete=False)

    def below(self, folder: str) -> dict[str, Info]:
        """Find which of ``WEB_NAMES`` lie in a folder; folders below it are not known."""
        return {f"{folder}/{name}" if folder else name: info for name, info in self.children(folder).files.items()}

    def write(self, key: str, data: bytes, *, only_new: bool = False) -> str | None:  # noqa: ARG002
        """Refuse: web servers are only read."""
        raise OutputError(f"{self._name(key)} cannot be written: a web server is only read. Give a bucket or a path.")

    def upload(self, key: str, parts: Iterable[memoryview | bytes], part_bytes: int, in_flight: int = 1) -> str | None:  # noqa: ARG002
        """Refuse, as ``write`` does."""
        return self.write(key, b"")

    def delete(self, keys: Iterable[str]) -> None:
        """Refuse, as ``write`` does."""
        self.write(next(iter(keys), ""), b"")


class _Remembered:
    """An iterator that keeps the error which ended it."""

    def __init__(self, parts: Iterable[memoryview | bytes]) -> None:
        self._parts = iter(parts)
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[memoryview | bytes]:
        return self

    def __next__(self) -> memoryview | bytes:
        try:
            return next(self._parts)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise


def _first(items: Iterator[memoryview | bytes], count: int) -> Iterator[memoryview | bytes]:
    for _ in range(count):
        for item in items:
            yield item
            break


def _info(meta: Any) -> Info:  # noqa: ANN401  (obstore's ObjectMeta)
    return Info(meta["size"], _version(meta))


def _version(meta: Any) -> str | None:  # noqa: ANN401  (obstore's ObjectMeta or PutResult)
    """The ETag without quotes, which Azure gives in answers and not in listings."""
    version: str | None = meta["e_tag"]
    return version.strip('"') if version is not None and not version.startswith("W/") else version


def _found_options(base: str) -> dict[str, Any]:
    """What the environment says of a store that obstore does not see itself."""
    scheme = base.partition("://")[0]
    if scheme == "s3":
        return s3_credentials()
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")  # the variable of Google's own clients
    return gcs_emulator(emulator) if scheme == "gs" and emulator else {}


def gcs_emulator(address: str) -> dict[str, Any]:
    """The options for an emulator of GCS, which takes any token."""
    url = address if "://" in address else f"http://{address}"
    return {"base_url": url.rstrip("/"), "credential_provider": lambda: {"token": "emulator", "expires_at": None}}


def s3_credentials(profile: str | None = None) -> dict[str, Any]:
    """Let boto3 find the credentials (AWS_PROFILE, SSO, roles) if the environment has none that obstore takes.

    With the name of a ``profile`` of the user's AWS files, they are those of the profile.
    """
    if profile is None and any(os.environ.get(name) for name in _OWN_CREDENTIALS):
        return {}
    try:
        import boto3  # noqa: PLC0415  (optional, slow, and only S3 needs it)
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415
    except ImportError:
        if profile is not None or os.environ.get("AWS_PROFILE"):
            libraries.require("AWS_PROFILE", "boto3", extra="s3")
        return {}
    try:
        session = boto3.Session(profile_name=profile)
        provider = Boto3CredentialProvider(session)
    except Exception as error:  # botocore's errors have no base class of their own in its public names
        raise SourceError(f"cannot find credentials for S3: {reason(error)}. Set AWS_PROFILE or the keys.") from error
    endpoint = session.client("s3").meta.endpoint_url if _has_endpoint(session) else None
    return {"credential_provider": provider, **({"endpoint": endpoint} if endpoint else {})}


def _has_endpoint(session: Any) -> bool:  # noqa: ANN401  (boto3 has no types)
    """Whether the profile, not the environment, names an endpoint, which obstore would not see."""
    if os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
        return False
    profile = session._session.get_scoped_config()  # noqa: SLF001  (there is no public way)
    return bool(profile.get("endpoint_url") or profile.get("services"))

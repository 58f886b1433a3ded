"""``msc://profile/path``: what a profile of NVIDIA's Multi-Storage Client names, read and written by our own clients.

The profile says where objects lie and with which credentials. They are not opened by ``msc.open``, which publishes a
truncated object when its writer fails. Its configuration is read by the library itself: MSC_CONFIG, else the usual
places, with files that it includes, rclone's file, and variables of the environment (multi-storage-client 1.3,
``StorageClientConfig.from_file``).
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.errors import SourceError
from dist_ckpt_mistral.storage.buckets import BucketStore, Where, gcs_emulator, s3_credentials
from dist_ckpt_mistral.storage.store import Info, Listing, Store

_LOG = logging.getLogger(__name__)
#: Kinds of storage provider -> the scheme of what they name. The rest is refused by name.
_SCHEMES: Final = {"s3": "s3", "s8k": "s3", "gcs": "gs", "azure": "az", "file": "file"}
#: What a profile may have that makes objects something else than the files that their keys name.
_NOT_SERVED: Final = ("provider_bundle", "storage_provider_profiles", "metadata_provider")
_FILE_SYSTEM: Final = "__filesystem__"
#: Profiles that need no configuration, such as ``_s3-bucket``: scheme -> kind of storage provider.
_IMPLICIT: Final = {"s3": "s3", "gs": "gcs", "file": "file"}
#: Options that say where and who; the others tune MSC's own client.
_USED_OPTIONS: Final = frozenset(
    {"base_path", "endpoint_url", "region_name", "profile_name", "signature_version", "skip_signature", "verify", "s3"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A profile: the kind of its storage provider, the provider's options, and the credentials that it names."""

    name: str
    kind: str
    options: Mapping[str, Any]
    credentials: Mapping[str, Any]

    @property
    def base_path(self) -> str:
        """What comes before every path: a bucket, a folder in it, or nothing, where paths begin with the bucket."""
        return str(self.options.get("base_path", ""))


def local_folder(name: str) -> Path | None:
    """The folder that a profile names; None if it names a store. Raises SourceError and MissingLibraryError."""
    found = profile(name)
    return Path(found.base_path or "/") if _SCHEMES[found.kind] == "file" else None


def open_store(base: str) -> Store:
    """The store of a URL without a path, ``msc://profile``. Raises SourceError and MissingLibraryError."""
    found = profile(base.removeprefix("msc://"))
    if found.base_path:
        return _bucket(base, found)
    return BucketsInKeys(base, lambda bucket: _bucket(f"{base}/{bucket}", found, bucket))


def _bucket(base: str, found: Profile, bucket: str = "") -> BucketStore:
    url = f"{_SCHEMES[found.kind]}://{(bucket or found.base_path).strip('/')}"
    open_it = {"s3": _s3, "gs": _gcs, "az": _azure}[_SCHEMES[found.kind]]
    try:
        where = open_it(found)
    except KeyError as error:
        raise SourceError(f"cannot open {base}: its profile has no {error.args[0]}") from error
    except OSError as error:
        raise SourceError(f"cannot open {base}: cannot read {error.filename}: {error.strerror}") from error
    return BucketStore(base, replace(where, url=url))


@functools.cache
def profile(name: str) -> Profile:
    """Read a profile. Raises MissingLibraryError without MSC, SourceError if there is none or it cannot be served."""
    what = f"msc://{name}"
    with libraries.needed(f"a URL such as {what}", "multistorageclient", extra="msc"):
        from multistorageclient.config import StorageClientConfig  # noqa: PLC0415  (optional)
        from multistorageclient.rclone import read_rclone_config  # noqa: PLC0415
        from multistorageclient.utils import expand_env_vars  # noqa: PLC0415

    try:
        config, place = StorageClientConfig.read_msc_config()
        rclone, _ = read_rclone_config()
        profiles = {**((rclone or {}).get("profiles") or {}), **((config or {}).get("profiles") or {})}
        content = expand_env_vars(profiles[name]) if name in profiles else _implicit(name)
    except Exception as error:  # ValueError and RuntimeError with whatever its reader and its schema say
        raise SourceError(f"cannot open {what}: its configuration cannot be read: {error}") from error
    if content is None:
        raise SourceError(
            f"cannot open {what}: expected a profile of this name in {place or 'the configuration of MSC'}, got "
            f"{', '.join(sorted(profiles)) or 'no profile'}. Set MSC_CONFIG to the file that has it."
        )
    if unserved := [key for key in _NOT_SERVED if content.get(key)]:
        raise SourceError(f"cannot open {what}: its {unserved[0]} is not supported. Give a profile without it.")
    provider = content["storage_provider"]
    if provider["type"] not in _SCHEMES:
        raise SourceError(
            f"cannot open {what}: expected a storage_provider of type {', '.join(_SCHEMES)}, got {provider['type']}. "
            "Copy the files to one of these, or to a local directory."
        )
    options = provider.get("options") or {}
    if unused := sorted(options.keys() - _USED_OPTIONS):
        _LOG.info("%s: options of MSC's own client are not used: %s", what, ", ".join(unused))
    return Profile(
        name=name, kind=provider["type"], options=options, credentials=content.get("credentials_provider") or {}
    )


def _implicit(name: str) -> dict[str, Any] | None:
    scheme, _, base_path = ("file", "", "/") if name == _FILE_SYSTEM else name.removeprefix("_").partition("-")
    if not (name.startswith("_") and scheme in _IMPLICIT and base_path):
        return None
    return {"storage_provider": {"type": _IMPLICIT[scheme], "options": {"base_path": base_path}}}


def _s3(found: Profile) -> Where:
    given, options = found.options, dict[str, Any]()
    version = given.get("signature_version", "s3v4")
    if version not in {"s3v4", "UNSIGNED"}:
        raise _unserved(found, f"signature_version {version}")
    if version == "UNSIGNED":
        options["skip_signature"] = True
    elif found.credentials:
        options["credential_provider"] = _s3_provider(found)
    else:
        options |= s3_credentials(given.get("profile_name"))
    named = {"region": given.get("region_name"), "endpoint": given.get("endpoint_url")}
    options |= {key: value for key, value in named.items() if value}
    if (given.get("s3") or {}).get("addressing_style") == "virtual":
        options["virtual_hosted_style_request"] = True
    return Where(url="", options=options, client_options=_verification(found))


def _s3_provider(found: Profile) -> Callable[[], dict[str, Any]]:
    """What obstore asks for credentials: the provider that the profile names, each time they have expired."""
    kind, options = found.credentials["type"], found.credentials.get("options") or {}
    if kind == "S3Credentials":
        keys = {"access_key_id": options["access_key"], "secret_access_key": options["secret_key"]}
        return lambda: {**keys, "token": options.get("session_token"), "expires_at": None}
    if kind != "FileBasedCredentials" and "." not in kind:
        raise _unserved(found, f"credentials_provider {kind}")
    from multistorageclient.utils import import_class  # noqa: PLC0415  (optional)

    path = kind if "." in kind else f"multistorageclient.providers.{kind}Provider"
    module, _, name = path.rpartition(".")
    try:
        provider = import_class(name, module)(**options)
    except Exception as error:  # whatever the provider raises
        raise SourceError(f"cannot open msc://{found.name}: its credentials cannot be read: {error}") from error

    def ask() -> dict[str, Any]:
        provider.refresh_credentials()
        keys = provider.get_credentials()
        expires = dt.datetime.fromisoformat(keys.expiration) if keys.expiration else None
        named = {"access_key_id": keys.access_key, "secret_access_key": keys.secret_key}
        return {**named, "token": keys.token, "expires_at": expires}

    return ask


def _gcs(found: Profile) -> Where:
    given, options = found.options, dict[str, Any]()
    kind, named = found.credentials.get("type"), found.credentials.get("options") or {}
    if given.get("endpoint_url"):
        options |= gcs_emulator(given["endpoint_url"]) if not kind else {"base_url": given["endpoint_url"]}
    if given.get("skip_signature"):
        options["skip_signature"] = True
    elif kind == "GoogleServiceAccountCredentialsProvider":
        path, info = named.get("file"), named.get("info")
        options |= {"service_account": path} if path else {"service_account_key": json.dumps(info)}
    elif kind:
        raise _unserved(found, f"credentials_provider {kind}")
    return Where(url="", options=options)


def _azure(found: Profile) -> Where:
    given, options = found.options, dict[str, Any]()
    kind, named = found.credentials.get("type"), found.credentials.get("options") or {}
    endpoint = given.get("endpoint_url", "")
    if kind == "AzureCredentials":
        connection = dict(part.split("=", 1) for part in named["connection"].split(";") if "=" in part)
        known = {
            "account_name": connection.get("AccountName"),
            "account_key": connection.get("AccountKey"),
            "sas_key": connection.get("SharedAccessSignature"),
        }
        options |= {key: value for key, value in known.items() if value}
        endpoint = connection.get("BlobEndpoint") or endpoint
    elif kind == "DefaultAzureCredentials":
        with libraries.needed(f"msc://{found.name}", "azure.identity", extra="msc"):
            from obstore.auth.azure import AzureCredentialProvider  # noqa: PLC0415  (optional)

        options["credential_provider"] = AzureCredentialProvider()
    elif kind:
        raise _unserved(found, f"credentials_provider {kind}")
    if endpoint:
        options["endpoint"] = endpoint.rstrip("/")
        account = endpoint.partition("://")[2].partition(".")[0]
        options.setdefault("account_name", account)
    return Where(url="", options=options)


def _verification(found: Profile) -> dict[str, Any]:
    verify = found.options.get("verify", True)
    if isinstance(verify, str):
        return {"root_certificate": Path(verify).read_bytes()}
    return {} if verify else {"allow_invalid_certificates": True}


def _unserved(found: Profile, what: str) -> SourceError:
    return SourceError(f"cannot open msc://{found.name}: its {what} is not supported. Give a profile with another.")


class BucketsInKeys:
    """A store whose keys begin with a bucket, each of which is a store. See ``Store`` for the methods."""

    bucket_parts = 1

    def __init__(self, base: str, open_bucket: Callable[[str], Store]) -> None:
        """Open a bucket when it is first asked for."""
        self.base = base
        self._open = functools.cache(open_bucket)

    def _of(self, key: str) -> tuple[Store, str]:
        bucket, _, rest = key.partition("/")
        return self._open(bucket), rest

    def children(self, folder: str) -> Listing:
        """List what lies directly in a folder; which buckets there are is not known."""
        if not folder:
            return Listing(is_complete=False)
        store, rest = self._of(folder)
        return store.children(rest)

    def below(self, folder: str) -> dict[str, Info]:
        """List all objects in a folder and in the folders below it, by key."""
        store, rest = self._of(folder)
        bucket = folder.partition("/")[0]
        return {f"{bucket}/{key}": info for key, info in store.below(rest).items()}

    def info(self, key: str) -> Info | None:
        """Size and version of an object."""
        store, rest = self._of(key)
        return store.info(rest) if rest else None

    def read(self, key: str, start: int, stop: int, version: str | None) -> memoryview:
        """Read a range of one version."""
        store, rest = self._of(key)
        return store.read(rest, start, stop, version)

    def write(self, key: str, data: bytes, *, only_new: bool = False) -> str | None:
        """Write an object in one request."""
        store, rest = self._of(key)
        return store.write(rest, data, only_new=only_new)

    def upload(self, key: str, parts: Iterable[memoryview | bytes], part_bytes: int, in_flight: int = 1) -> str | None:
        """Write an object from parts."""
        store, rest = self._of(key)
        return store.upload(rest, parts, part_bytes, in_flight)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects of one or several buckets."""
        listed: dict[str, list[str]] = {}
        for key in keys:
            bucket, _, rest = key.partition("/")
            listed.setdefault(bucket, []).append(rest)
        for bucket, rests in listed.items():
            self._open(bucket).delete(rests)

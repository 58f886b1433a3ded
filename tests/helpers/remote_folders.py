"""Folders in stores: put there, and taken back, by the store's own client."""

from __future__ import annotations

from pathlib import Path

from dist_ckpt_mistral.storage.remote_path import RemotePath, as_path


def remote(url: str) -> RemotePath:
    """The path of a URL, of which nothing has been seen yet."""
    path = as_path(url)
    assert isinstance(path, RemotePath)
    return path


def put_folder(folder: Path, url: str) -> str:
    """Put all files of a folder, those of links too, below a URL, which is returned."""
    target = remote(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target.snapshot.store.write(f"{target.key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def get_folder(url: str) -> dict[str, bytes]:
    """The content of every object below a URL, by its name below."""
    source = remote(url)
    infos = source.snapshot.store.below(source.key)
    store, head = source.snapshot.store, f"{source.key}/"
    return {
        key.removeprefix(head): bytes(store.read(key, 0, info.num_bytes, info.version)) if info.num_bytes else b""
        for key, info in infos.items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file of a folder, by relative name; links to folders are left out, as stores have none."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(above.is_symlink() for above in path.parents if above.is_relative_to(folder))
    }

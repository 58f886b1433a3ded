"""Small files that are written whole or not at all, and the pages and pictures that are written so."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from genuine import folder, shards

from dist_ckpt_mistral.analysis import report
from dist_ckpt_mistral.analysis.page import save_html
from dist_ckpt_mistral.analysis.picture.picture import save_picture
from dist_ckpt_mistral.analysis.read_planner import plan_reading
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.storage.documents import write_whole


def save_page(path: Path) -> None:
    """Write a page about a checkpoint."""
    save_html(report.inspect(shards("td_0161")), path)


def draw_plan(path: Path) -> None:
    """Draw what ranks read of a checkpoint."""
    pytest.importorskip("matplotlib")
    save_picture(plan_reading(shards("td_0161"), ParallelLayout(), config=folder("td_0161")), path)


def half(path: Path, data: bytes) -> None:
    """Write half of a file, as far as a full disk lets."""
    path.write_bytes(data[: len(data) // 2])
    refuse(path)


def refuse(*_: Path) -> None:
    """Act like a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("save", [save_page, draw_plan, lambda path: write_whole(path, b"new")])
def test_an_old_file_stays_until_the_new_one_is_whole(
    save: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writing or renaming fails, the error names the file, which is as it was, and nothing lies beside it."""
    path = tmp_path / "page"
    old = "<!DOCTYPE html>old"  # a page replaces pages alone
    path.write_text(old)
    for broken, instead in (
        ("dist_ckpt_mistral.storage.documents.write_bytes", half),
        ("pathlib.Path.replace", refuse),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(broken, instead)
            with pytest.raises(OutputError, match=re.escape(f"cannot write {path}: No space left on device")):
                save(path)
        assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("page", old)]
    save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["page"]
    assert path.read_text(encoding="utf-8") != old


def test_the_old_content_is_seen_until_the_last_moment(tmp_path: Path) -> None:
    """A file that was opened before is not written into: its reader goes on with the old content, whole."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_whole(path, b"new and longer")
        assert (reader.read(), path.read_bytes()) == (b"old", b"new and longer")


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    """A link still points to its file, which has the content; a pipe is written into; a directory is an error."""
    (tmp_path / "there").mkdir()
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "there" / "file")
    write_whole(link, b"content")
    assert link.is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"content"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_whole(pipe, b"content")
    reader.join(timeout=60)
    assert got == [b"content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(OutputError, match=re.escape(f"cannot write {tmp_path / 'there'}: Is a directory")):
        write_whole(tmp_path / "there", b"content")

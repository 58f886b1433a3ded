"""Find out what a path that a user gave is, and say what else to give where it is not what a command wants.

Every command opens its inputs through it, so that all refuse the same things with the same advice. No file is opened
except the trackers of a checkpoint root.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import FormatError, SourceError
from dist_ckpt_mistral.formats import checkpoint_directory, kinds
from dist_ckpt_mistral.formats.kinds import Kind, Place
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage import hub, paths
from dist_ckpt_mistral.storage.remote_path import BUCKET_SCHEMES, HUB_SCHEME, WEB_SCHEMES, RemotePath, as_path

#: Limits of the search for a model that an error can name: levels of folders, and number of folders.
_MOST_DEEP: Final = 3
_MOST_DIRECTORIES: Final = 500
#: The kinds that an error says a command expects. It does not name variants of these.
_EXPECTED: Final = {
    Kind.HF: "a Hugging Face model directory",
    Kind.CHECKPOINT: "a Megatron checkpoint that can be read",
}
_READ: Final = (Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT)


def locate(name: str | Path, *wanted: Kind) -> Place:
    """The place that a user means by ``name``: a path, or, where ``wanted`` has ``Kind.HF``, also a hub id or URL.

    Raises FormatError, which says what ``name`` is and what to do, unless it is of a kind in ``wanted``.
    """
    given = as_path(name)
    if Kind.HF not in wanted or isinstance(given, RemotePath):
        return _require(what_is(given), wanted)
    try:
        path = hub.model_directory(str(name))
    except SourceError as error:
        if near := _near(given):
            error.add_note(near)
        raise
    return _require(what_is(path), wanted)


def resolve_directory(path: Path) -> Path:
    """The directory of the iteration that ``path`` means: ``path`` itself, or the latest of a checkpoint root."""
    return locate(path, Kind.CHECKPOINT).path


def require_not_swapped(source: str | Path, output: Path, *wanted: Kind) -> None:
    """Raise FormatError if the arguments look swapped: ``output`` is of a wanted kind, ``source`` another or absent."""
    if what_is(output).kind not in wanted:
        return
    given = what_is(as_path(source))
    if given.kind is Kind.MISSING or given.kind in {*_READ} - {*wanted}:
        raise FormatError(
            f"{source} is not {_expectation(wanted)}: {given.what}; but the output {output} is one. Give the source "
            "first, then the output."
        )


def what_is(path: Path) -> Place:
    """Recognise what is at ``path``. Raises FormatError if it is a directory that cannot be listed."""
    if not paths.is_directory(path):
        return kinds.of_file(path) if paths.exists(path) else _missing(path)
    place = kinds.of_directory(path, paths.names_in(path))
    return _latest(path) if place.kind is Kind.ROOT else place


def _require(place: Place, wanted: Sequence[Kind]) -> Place:
    """``place`` if it is of a kind in ``wanted``; else raise FormatError with what it is and what to do."""
    if place.kind in wanted:
        return place
    steps = _next_steps(place, wanted)
    refusal = f"{paths.as_given(place.path)} is not {_expectation(wanted)}: {place.what}"
    raise FormatError(f"{refusal}. {steps}" if steps else refusal)


def _expectation(wanted: Sequence[Kind]) -> str:
    """The kinds in ``wanted``, in words."""
    return " or ".join(text for kind, text in _EXPECTED.items() if kind in wanted)


def _latest(root: Path) -> Place:
    """The place of the latest iteration in ``root``, which its trackers name."""
    try:
        path = checkpoint_directory.latest_iteration(root)
    except SourceError as error:
        return Place(path=root, kind=Kind.BROKEN, what=str(error).rstrip("."), is_searched=True)
    return kinds.of_directory(path, paths.names_in(path))


def _missing(path: Path) -> Place:
    """The place of a path at which there is nothing."""
    what, advice = "there is no such directory", ""
    if isinstance(path, RemotePath):
        return Place(path=path, kind=Kind.MISSING, what="there is nothing of this name, and nothing below it")
    if path.is_symlink():
        what = f"it is a link to {path.readlink()}, which does not exist"
    elif paths.is_url(path):
        what, schemes = "it is a URL", listed([f"{scheme}://" for scheme in (*BUCKET_SCHEMES, *WEB_SCHEMES)])
        advice = (
            f"Of URLs, these are read: {schemes}. A Hugging Face model on the hub is org/name[@revision], or "
            f"{HUB_SCHEME}://org/name[@revision]. Copy anything else to a local directory."
        )
    return Place(path=path, kind=Kind.MISSING, what=what, advice=advice)


def _next_steps(place: Place, wanted: Sequence[Kind]) -> str:
    """Advice for a user who gave ``place``: the folder or parent of a wanted kind, else the row's advice and more."""
    if place.is_searched and (nearby := _wanted_nearby(place.path, wanted)):
        return nearby
    return " ".join(filter(None, (place.advice, _alternatives(place))))


def _wanted_nearby(path: Path, wanted: Sequence[Kind]) -> str:
    """Advice that names the folders of ``path`` of a wanted kind, or its parent; empty if there are none."""
    fitting = [name for name, place in _models_in(path, most_deep=_MOST_DEEP) if place.kind in wanted]
    if fitting:
        return f"Give {'its folder' if len(fitting) == 1 else 'one of its folders'} {listed(fitting)}."
    with contextlib.suppress(SourceError):
        if what_is(path.parent).kind in wanted:
            return f"Give the directory around it, {path.parent}."
    return ""


def _alternatives(place: Place) -> str:
    """A sentence about what can be read instead, in ``place`` or beside it; empty if there is nothing to say."""
    path, is_iteration = place.path, checkpoint_directory.is_iteration_name(place.path.name)
    if is_iteration and place.kind in {Kind.BROKEN, Kind.MISSING}:
        beside = [name for name, model in _models_in(path.parent, most_deep=1) if model.kind is Kind.CHECKPOINT]
        return f"{path.parent} holds {listed(beside)}." if beside else f"{path.parent} holds no whole iteration."
    if place.kind is Kind.MISSING:
        return _near(path) or ("" if place.advice else "Check the name.")
    if not place.is_searched:
        return ""
    for name, model in _models_in(path, most_deep=_MOST_DEEP):
        return f"What can be read is {name}: {model.what}. {model.advice}"
    return "None of its folders can be read either." if _folders(path) else ""


def _models_in(path: Path, *, most_deep: int) -> Iterator[tuple[str, Place]]:
    """Yield (relative name, place) of the folders under ``path`` that can be read, nearer ones first; skip links."""
    waiting, num_folders = deque([(path, 0)]), 0
    while waiting:
        directory, depth = waiting.popleft()
        for name in sorted(_folders(directory)):
            num_folders += 1
            if num_folders > _MOST_DIRECTORIES:
                return
            child = directory / name
            if child.is_symlink():
                continue
            try:
                place = what_is(child)
            except SourceError:  # it cannot be listed
                continue
            if place.kind in _READ:
                yield str(child.relative_to(path)), place
            elif depth + 1 < most_deep:
                waiting.append((child, depth + 1))


def _folders(directory: Path) -> list[str]:
    """The names of the folders in ``directory``; none if it cannot be listed."""
    try:
        return [name.removesuffix("/") for name in paths.names_in(directory) if name.endswith("/")]
    except SourceError:
        return []


def _near(path: Path) -> str:
    """A question that names the sibling of ``path`` with the most similar name; empty if none is similar."""
    import difflib  # noqa: PLC0415  (only an error needs it)

    try:
        names = [name.removesuffix("/") for name in paths.names_in(path.parent)]
    except SourceError:
        return ""
    near = difflib.get_close_matches(path.name, [name for name in names[:_MOST_DIRECTORIES] if name != path.name], n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else ""

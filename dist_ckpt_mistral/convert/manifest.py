"""The manifest of a new output: every rank reads its share of the files, the first writes down what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.formats.hf_directory import TensorSpans
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, Manifest, files_in
from dist_ckpt_mistral.gather.digest import Digest, digest
from dist_ckpt_mistral.gather.execute import Effort, run_all
from dist_ckpt_mistral.storage import documents


@dataclass(frozen=True, slots=True, kw_only=True)
class NewManifest:
    """A manifest to write into ``folder`` of an output, and which tensors it shall tell the CRC-32 of."""

    folder: Path
    tensors: TensorSpans = field(default_factory=dict)


def write_manifest(output: Path, new: NewManifest, *, effort: Effort, ranks: Ranks) -> None:
    """Write the manifest of ``new.folder`` in ``output``, whose files are complete."""
    directory = output / new.folder
    names = ranks.on_first(lambda: _by_size(directory))[ranks.rank :: ranks.world_size]
    shares = ranks.together(lambda: _digests(directory, names, new.tensors, effort))
    ranks.on_first(lambda: _write(directory, new.tensors, {name: each for own in shares for name, each in own.items()}))


def _by_size(directory: Path) -> list[str]:
    """The files, the largest first, so that ranks and threads end together."""
    return sorted(files_in(directory), key=lambda name: (directory / name).stat().st_size, reverse=True)


def _digests(directory: Path, names: Sequence[str], tensors: TensorSpans, effort: Effort) -> dict[str, Digest]:
    def work(number: int) -> Digest:
        spans = tensors.get(names[number], {})
        return digest(directory / names[number], [*spans.values()], sha256=True, effort=effort)

    return dict(zip(names, run_all(work, range(len(names)), workers=effort.threads), strict=True))


def _write(directory: Path, tensors: TensorSpans, found: Mapping[str, Digest]) -> None:
    crc32 = {
        name: f"{value:08x}"
        for file, spans in tensors.items()
        for name, value in zip(spans, found[file].crc32, strict=True)
    }
    files = {name: str(each.sha256) for name, each in found.items()}
    documents.write_bytes(directory / MANIFEST_FILE, Manifest(files=files, crc32=crc32).to_json())

"""Real saves of megatron-core with the record in ``content_metadata``: it outlives load, new layout and next save.

One launch of four ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_line import run
from hf_models import random_model, saved
from plain_models import contents

import dist_ckpt_mistral as dcm

if TYPE_CHECKING:
    from conftest import LaunchRanks

FIRST = {"tp": 2, "pp": 2}
NEXT = {"pp": 2, "dp": 2}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files."""
    return saved(random_model(), tmp_path_factory.mktemp("described") / "hf", max_shard_size=5000)


@pytest.fixture(scope="module")
def saves(launch_ranks: LaunchRanks, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of each save by name: at once and in the background, and what was resumed from them and saved."""
    where = tmp_path_factory.mktemp("saves")
    config = json.loads((hf / "config.json").read_text())
    places = {
        name: where / name / "iter_0000001" for name in ("at once", "in the background", "resumed", "resumed again")
    }
    common: dict[str, Any] = {"config": config, "style": "STACKED", "hf": str(hf)}
    job = {**common, "task": "save_described"}
    jobs = {
        "at once": {**job, "layout": FIRST, "in_background": False},
        "in the background": {**job, "layout": FIRST, "in_background": True},
        "resumed": {**job, "layout": NEXT, "at": str(places["at once"]), "in_background": False},
        "resumed again": {**job, "layout": NEXT, "at": str(places["in the background"]), "in_background": True},
    }
    launch_ranks(4, {name: {**each, "to": str(places[name])} for name, each in jobs.items()})
    return places


@pytest.mark.parametrize("name", ["at once", "in the background", "resumed", "resumed again"])
def test_a_save_describes_itself(name: str, hf: Path, saves: dict[str, Path], tmp_path: Path) -> None:
    """With no flags, an export of each save is the original files, byte for byte, but those of no record."""
    outcome = run("to-hf", saves[name], tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "configuration: the Hugging Face configuration inside the checkpoint" in outcome.err
    assert contents(tmp_path / "out") == {n: text for n, text in contents(hf).items() if n != "generation_config.json"}


def test_every_command_reads_the_record(hf: Path, saves: dict[str, Path], tmp_path: Path) -> None:
    """Commands and functions find the configuration of a resumed save."""
    save = saves["resumed"]
    source = "the Hugging Face configuration inside the checkpoint"
    assert dcm.inspect(save).config_from == source
    assert dcm.plan_reading(save, dcm.ParallelLayout(tp=2)).config_from == source
    assert dcm.reshard(save, tmp_path / "cut", dcm.ParallelLayout(tp=2)).config_from == source
    assert dcm.compare(hf, save).is_equal
    assert dcm.megatron_args(save).config_from == source
    with dcm.open_checkpoint(save) as opened:
        assert "model.norm.weight" in opened

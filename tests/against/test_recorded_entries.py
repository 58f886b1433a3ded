"""The sharded state dicts that the models of genuine checkpoints gave on every rank.

Among them is one of Transformer Engine's layers, which no machine of the tests can build.
tests/against/test_gpt_model.py holds the same against live models.
"""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any, Final

import pytest
from genuine import folder

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.model.table.rules import LayerSpec

pytestmark = pytest.mark.megatron

#: Case -> the layers that it was made of.
SPECS: Final = {
    "moe_seq_0192": LayerSpec.LOCAL,
    "mlm_moe_0192": LayerSpec.LOCAL,
    "mistral4_0192": LayerSpec.LOCAL,
    "te_moe_0192": LayerSpec.TRANSFORMER_ENGINE,
}


def recorded(case: str, rank: int) -> dict[str, list[Any]]:
    """What the live model gave on a rank: by its path in the state dict all else, as JSON has it."""
    told = json.loads((folder(case) / f"sharded_state_dict.rank{rank}.json").read_text())
    return {path.removeprefix("model/"): rest for path, *rest in told}


def ours(case: str, layout: dcm.ParallelLayout, rank: int) -> dict[str, list[Any]]:
    """The same of the factory's entries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    state = dcm.sharded_state_dict(dcm.MistralConfig.from_hf(folder(case)), layout, rank, spec=SPECS[case])
    kinds = ("ShardedTensorFactory", "ShardedObject", "ShardedTensor")
    described = {}
    for path, entry in state.items():
        kind = next(kind for kind in kinds if isinstance(entry, getattr(mapping, kind)))
        shape, offset, local = (
            list(getattr(entry, name, None) or ()) for name in ("global_shape", "global_offset", "local_shape")
        )
        rest = [getattr(entry, name, None) for name in ("prepend_axis_num", "axis_fragmentations")]
        more = [getattr(entry, "allow_shape_mismatch", None), str(getattr(entry, "flattened_range", None))]
        described[path] = json.loads(
            json.dumps([kind, entry.key, shape, offset, local, *rest, entry.replica_id, *more], default=list)
        )
    return described


@pytest.mark.parametrize("case", SPECS)
def test_every_entry_on_every_rank_is_the_recorded_one(case: str) -> None:
    """Names, keys, shapes, places and replicas of all entries, objects included, are those of the live model."""
    about = json.loads((folder(case) / "about.json").read_text())
    ranks = len(list(folder(case).glob("sharded_state_dict.rank*.json")))
    tp, pp = about["tp"], about["pp"]
    layout = dcm.ParallelLayout(tp=tp, pp=pp, dp=ranks // (tp * pp), ep=about["ep"], etp=about.get("etp"))
    for rank in range(ranks):
        expected, made = recorded(case, rank), ours(case, layout, rank)
        assert sorted(made) == sorted(expected)
        assert {path: each for path, each in made.items() if each != expected[path]} == {}

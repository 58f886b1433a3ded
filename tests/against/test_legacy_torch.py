"""Megatron's legacy per-rank torch format: what Megatron-LM's own save_checkpoint wrote, read bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from command_line import run
from genuine import LEGACY, described_file, folder, shards, true_bytes, truth
from safetensors.torch import load_file
from torch_reading import described, load_tensors

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import (
    ConfigError,
    FormatError,
    TensorMismatchError,
    UnsafePickleError,
    UnsupportedFormatError,
)
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored

if TYPE_CHECKING:
    from conftest import LaunchRanks

STEP: Final = "iter_0000007"
#: The layouts at which the installed Megatron loads what was migrated.
LOADS: Final[dict[str, dict[str, int]]] = {
    "legacy_tp2pp2_0192": {"tp": 4},
    "legacy_vpp_tied_0192": {"tp": 2, "pp": 2},
    "legacy_moe_0192": {"tp": 2, "pp": 2},
    "legacy_old_0080": {"tp": 4},
    "legacy_plain_0192": {"tp": 2, "pp": 2},
}
#: Tensors that several ranks of a case hold: norms on every tensor parallel rank, a tied head, all but experts with EP.
COPIES: Final = {
    "legacy_tp2pp2_0192": 9,
    "legacy_vpp_tied_0192": 1,
    "legacy_old_0080": 5,
    "legacy_old_tied_0080": 1,
}


def options(case: str) -> dict[str, Any]:
    """The configuration of a case: its args do not tell the tokens of a vocabulary."""
    return {"config": folder(case) / "config.json"}


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every genuine case, migrated; its new iteration."""
    where = tmp_path_factory.mktemp("migrated")
    for case in LEGACY:
        dcm.migrate(folder(case) / "checkpoint", where / case, **options(case))
    return {case: where / case / STEP for case in LEGACY}


@pytest.mark.parametrize("case", LEGACY)
def test_migrated_tensors_are_the_live_model(case: str, migrated: dict[str, Path], tmp_path: Path) -> None:
    """What torch's own DCP loads from the new checkpoint exports, by our links, to the tensors of the live model."""
    assert (migrated[case].parent / "latest_checkpointed_iteration.txt").read_text() == "7"
    dcm.to_hf(migrated[case], tmp_path / "hf", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)
    loaded = load_tensors(migrated[case])
    index = open_stored(migrated[case])
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        name: tensor.global_shape for name, tensor in index.tensors.items()
    }


@pytest.mark.parametrize("case", LEGACY)
def test_common_state_comes_along(case: str, migrated: dict[str, Path]) -> None:
    """Args and iteration are the old ones where they are plain values, and the args say the new format."""
    first = min(shards(case).glob("mp_rank_*")) / "model_optim_rng.pt"
    old = torch.load(first, map_location="cpu", weights_only=False, pickle_module=_inert_pickle())
    new = torch.load(migrated[case] / "common.pt", weights_only=False)
    assert (new["iteration"], new["checkpoint_version"]) == (old["iteration"], 3.0) == (7, 3.0)
    before, after = vars(old["args"]), vars(new["args"])
    changed = {name for name, value in after.items() if before[name] != value}
    assert changed <= {"ckpt_format", "dist_ckpt_format", "use_dist_ckpt"}
    assert after["num_layers"] == json.loads((folder(case) / "config.json").read_bytes())["num_hidden_layers"]
    assert after.get("ckpt_format", "torch_dist") == "torch_dist"
    plain = (type(None), bool, int, float, str)
    assert {name for name, value in before.items() if type(value) in plain} <= after.keys()


class _Nothing:
    """What stands for an object of one of Megatron's classes, of whichever release."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _inert_pickle() -> Any:  # noqa: ANN401  (a module for torch.load)
    """A pickle module that imports no Megatron: the classes may be those of another release."""
    import pickle  # noqa: PLC0415
    import types  # noqa: PLC0415

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
            return type(name, (_Nothing,), {}) if module.startswith("megatron") else super().find_class(module, name)

    made = types.ModuleType("inert_pickle")
    vars(made).update(vars(pickle) | {"Unpickler": Unpickler})
    return made


@pytest.mark.parametrize("case", LEGACY)
def test_verify_and_inspect(case: str, migrated: dict[str, Path]) -> None:
    """Both are sound and equal, every copy is compared, and the tensors are listed under the keys of torch_dist."""
    config = ("--config", str(folder(case) / "config.json"))
    old = run("verify", folder(case) / "checkpoint", *config)
    assert old.code == 0, old
    if case in COPIES:
        assert any(f"{COPIES[case]} tensor" in line and "second time" in line for line in old.out), old.out
    assert run("verify", migrated[case], *config).code == 0
    assert run("verify", shards(case), migrated[case], *config).code == 0
    before, after = (
        json.loads("".join(run("inspect", at, "--json", *config).out)) for at in (shards(case), migrated[case])
    )
    assert before["problems"] == after["problems"] == []
    assert before["kind"] == "Megatron torch checkpoint"
    also = {"decoder.layers.pre_mlp_layernorm.weight"} if "moe" in case else set()  # for Transformer Engine's layers
    named = [{each["name"] for each in report["tensors"]} for report in (before, after)]
    assert named[0] == named[1] - also


@pytest.mark.parametrize("case", LEGACY)
def test_lazy_reading(case: str) -> None:
    """It is a mapping like any other format, without a byte of it read in advance."""
    with dcm.open_checkpoint(shards(case), **options(case)) as checkpoint:
        assert described(dict(checkpoint)) == described(truth(case))


@pytest.mark.parametrize("case", ["legacy_tp2pp2_0192", "legacy_moe_0192"])
def test_resharding_needs_no_migration(case: str, tmp_path: Path) -> None:
    """``reshard`` cuts new chunks straight from the files of the ranks."""
    dcm.reshard(shards(case), tmp_path / "new", dcm.ParallelLayout(tp=4), weights_only=True, **options(case))
    dcm.to_hf(tmp_path / "new", tmp_path / "hf", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)


@pytest.mark.parametrize("command", ["plan", "megatron-args"])
def test_what_megatron_could_not_do(command: str) -> None:
    """What is about Megatron's own loading at any layout refuses the old format, and says what to do first."""
    outcome = run(command, shards("legacy_tp2pp2_0192"))
    assert (outcome.code, outcome.out) == (1, [])
    assert "is in Megatron's legacy torch format" in outcome.err[-1]
    assert outcome.err[-1].endswith("with migrate.")


def test_what_stays_behind_is_named(tmp_path: Path) -> None:
    """Flat buffers and generators are listed with the reason, by export and migration alike."""
    case = "legacy_distrib_0192"
    for done in (
        dcm.to_hf(shards(case), tmp_path / "hf", **options(case)),
        dcm.migrate(shards(case), tmp_path / "new", **options(case)),
    ):
        ignored = dict(done.ignored)
        assert ignored["optimizer.distributed.mp_rank_00/distrib_optim.pt"] == (
            "optimizer state in flat buffers (distrib_optim.pt)"
        )
        assert ignored["optimizer.mp_rank_00"] == "optimizer state"
        assert ignored["rng_state/mp_rank_00"] == "random number generator state"


#: Name of a parameter in a layer, and its key.
OF_LAYERS: Final = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def test_plain_optimizer_state_is_that_of_the_live_optimizer(migrated: dict[str, Path]) -> None:
    """Master weights and both moments of every parameter are, bit for bit, what the optimizer of each rank held."""
    case = "legacy_plain_0192"
    loaded = load_tensors(migrated[case])
    compared = set()
    for rank in range(2):
        for place, true in load_file(folder(case) / f"optimizer.rank{rank}.safetensors").items():
            _, name, state = place.split("/")
            match = re.fullmatch(r"decoder\.layers\.0\.(.*)", name)  # one layer a stage
            found = name if match is None else f"decoder.layers.{OF_LAYERS.get(match[1], match[1])}"
            tensor = loaded[f"optimizer.state.{state}.{found}"]
            assert torch.equal(tensor[rank] if match is not None else tensor, true), place
            compared.add(f"optimizer.state.{state}.{found}")
    assert compared == {name for name in loaded if name.startswith("optimizer.")}
    assert len(compared) == 3 * 9
    common = torch.load(migrated[case] / "common.pt", weights_only=False)["optimizer"]["optimizer"]
    assert common["state"] == {"common_step": 1.0}
    assert [(group["wd_mult"], "params" in group) for group in common["param_groups"]] == [(1.0, False), (0.0, False)]


def test_master_weights_round_to_the_weights(tmp_path: Path) -> None:
    """The master weights of plain optimizer state, exported from the ranks' files, are the weights once rounded."""
    case = "legacy_plain_0192"
    dcm.to_hf(shards(case), tmp_path / "hf", weights="master", dtype="bfloat16", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)


def test_reshard_refuses_flat_state(tmp_path: Path) -> None:
    """Flat buffers of the distributed optimizer cannot be cut: ``--weights-only`` says that they stay behind."""
    with pytest.raises(TensorMismatchError, match=r"in the format distrib_optim\.pt, flat buffers"):
        dcm.reshard(
            shards("legacy_distrib_0192"), tmp_path / "new", dcm.ParallelLayout(), **options("legacy_distrib_0192")
        )


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, migrated: dict[str, Path]) -> list[dict[str, Any]]:
    """What every rank of the installed Megatron says to what was migrated."""
    jobs = {
        case: {
            "task": "load_into_model",
            "config": json.loads((folder(case) / "config.json").read_bytes()),
            "layout": {**layout, "dp": 4 // (layout.get("tp", 1) * layout.get("pp", 1))},
            "style": "STACKED",
            "at": str(migrated[case]),
            "hf": str(folder(case) / "truth.safetensors"),
        }
        for case, layout in LOADS.items()
    }
    training = {name: value for name, value in jobs["legacy_plain_0192"].items() if name != "hf"}
    training |= {"task": "load_training", "distributed": False, "true": str(migrated["legacy_plain_0192"])}
    return launch_ranks(4, jobs | {"training": training})


def test_megatron_loads_plain_optimizer_state(results: list[dict[str, Any]]) -> None:
    """A real Float16Optimizer, at another layout than the old one, gets every tensor of the state bit for bit."""
    for rank in results:
        assert [each["wrong"] for each in rank["training"].values()] == [[], []]
        assert rank["training"]["real"]["tensors"] == rank["training"]["factory"]["tensors"] > 20


@pytest.mark.parametrize("case", LOADS)
def test_megatron_loads_it(case: str, results: list[dict[str, Any]]) -> None:
    """Megatron's own load fills a real model full of NaN with the weights, at another layout than the old one."""
    assert [rank[case] for rank in results] == [[]] * 4


Edit = Callable[[dict[str, Any]], object]


def edited(case: str, to: Path, edit: Edit, rank: int = 0) -> Path:
    """A copy of a genuine case in which the content of one rank's archive is another."""
    directory = shutil.copytree(shards(case), to / STEP)
    file = sorted(directory.glob("mp_rank_*"))[rank] / "model_optim_rng.pt"
    content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_inert_pickle())
    content = {name: value for name, value in content.items() if name not in ("rng_state", "rerun_state_machine")}
    content["args"] = type(content["args"])(
        **{n: v for n, v in vars(content["args"]).items() if type(v) in (type(None), bool, int, float, str)}
    )
    edit(content)
    torch.save(content, file)
    return directory


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


def as_parts_of_one_storage(content: dict[str, Any]) -> None:
    """Lay the tensors of a model into one buffer, as DDP does."""
    tensors = {name: value for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
    buffer = torch.cat([torch.zeros(5, dtype=torch.bfloat16), *(each.reshape(-1) for each in tensors.values())])
    at = 5
    for name, tensor in tensors.items():
        content["model"][name] = buffer[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()


def as_parameters(content: dict[str, Any]) -> None:
    """Save parameters instead of tensors, as state dicts with ``keep_vars`` are."""
    for name, tensor in content["model"].items():
        if isinstance(tensor, torch.Tensor):
            content["model"][name] = torch.nn.Parameter(tensor)


def as_release_without_args(content: dict[str, Any]) -> None:
    """Leave nothing but the model and its version."""
    model = content["model"]
    content.clear()
    content.update(checkpoint_version=3.0, model=model)


@pytest.mark.parametrize("edit", [as_parts_of_one_storage, as_parameters, as_release_without_args])
def test_other_ways_to_save_the_same(edit: Edit, tmp_path: Path) -> None:
    """Views of one buffer, parameters, and an archive without args are read as the same model."""
    case = "legacy_tp2pp2_0192"
    directory = edited(case, tmp_path, edit)
    dcm.to_hf(directory, tmp_path / "hf", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)


def transposed(content: dict[str, Any]) -> None:
    """Save a weight column by column."""
    content["model"][QKV] = content["model"][QKV].t().contiguous().t()


def with_grouped_experts(content: dict[str, Any]) -> None:
    """Have a GroupedMLP in place of a MLP."""
    content["model"]["decoder.layers.0.mlp.experts.weight1"] = torch.zeros(2, 2)


#: What is wrong -> (edit of a rank's content, error, what it says).
WRONG: Final[dict[str, tuple[Edit, type[Exception], str]]] = {
    "columns": (transposed, UnsupportedFormatError, "is a view of a storage with the strides"),
    "missing": (lambda c: c["model"].pop(QKV), TensorMismatchError, "1 tensor is missing: mp_rank_00_000/0/" + QKV),
    "unknown": (
        lambda c: c["model"].update(bias=torch.zeros(3)),
        TensorMismatchError,
        r"1 tensor is unknown to the table: mp_rank_00_000/0/bias \[3\]",
    ),
    "twice": (
        lambda c: c["model"].update(
            {"decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": torch.zeros(64, dtype=torch.bfloat16)}
        ),
        TensorMismatchError,
        "holds one tensor twice",
    ),
    "shape": (
        lambda c: c["model"].update({FC2: c["model"][FC2][:, :-1].contiguous()}),
        TensorMismatchError,
        rf"shape of mp_rank_00_000/0/{FC2}: expected \[64, 48\] \(tp=2, pp=2, pp_layers=\(2, 2\)\), got \[64, 47\]",
    ),
    "dtype": (
        lambda c: c["model"].update({FC2: c["model"][FC2].float()}),
        TensorMismatchError,
        "expected one, got bfloat16, float32",
    ),
    "layers": (
        lambda c: [c["model"].pop(name) for name in [*c["model"]] if ".layers.1." in name],
        FormatError,
        r"has \[2\] layers in its model chunks: expected \[1\]",
    ),
    "old order of rows": (
        lambda c: c.update(checkpoint_version=1.0),
        UnsupportedFormatError,
        r"checkpoint_version for .*: expected 2\.0 or newer",
    ),
    "other layout": (
        lambda c: c["args"].__dict__.update(tensor_model_parallel_size=4),
        FormatError,
        "expected those of tp=4, pp=2",
    ),
    "no model": (lambda c: c.pop("model"), FormatError, "expected a model, or model0 and on, got neither"),
    "two models": (lambda c: c.update(model0={}), FormatError, "got model, model0"),
    "grouped experts": (with_grouped_experts, UnsupportedFormatError, "experts of GroupedMLP"),
    "a program": (lambda c: c.update(extra=print), UnsafePickleError, r"asks for __builtin__\.print"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str, tmp_path: Path) -> None:
    """Tensors that are missing, unknown or of another shape, and what the ranks contradict each other in."""
    edit, error, expected = WRONG[wrong]
    case = "legacy_tp2pp2_0192"
    directory = edited(case, tmp_path, edit)
    with pytest.raises(error, match=expected):
        dcm.to_hf(directory, tmp_path / "hf", **options(case))
    with pytest.raises(error, match=expected):
        dcm.migrate(directory, tmp_path / "new", **options(case))
    assert not (tmp_path / "hf").exists()


def test_configurations_that_contradict_the_args(tmp_path: Path) -> None:
    """The args of the ranks are compared with ``--config``, as everywhere."""
    content = json.loads((folder("legacy_tp2pp2_0192") / "config.json").read_bytes())
    other = tmp_path / "config.json"
    other.write_text(json.dumps(content | {"num_key_value_heads": 2}))
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        dcm.to_hf(shards("legacy_tp2pp2_0192"), tmp_path / "hf", config=other)


def _spoil(directory: Path, what: str) -> None:
    first, *_, last = sorted(directory.glob("mp_rank_*"))
    if what == "folder":
        shutil.rmtree(last)
    elif what == "file":
        (last / "model_optim_rng.pt").unlink()
    elif what == "truncated":
        data = (last / "model_optim_rng.pt").read_bytes()
        (last / "model_optim_rng.pt").write_bytes(data[: len(data) // 2])
    elif what == "one more":
        shutil.copytree(first, directory / "mp_rank_02_000")
    elif what == "of another":
        shutil.copytree(first, directory / "mp_rank_00")
    elif what == "name":
        shutil.copytree(first, directory / "mp_rank_00_000_old")
    elif what == "before 1.6":
        torch.save({"model": {}}, last / "model_optim_rng.pt", _use_new_zipfile_serialization=False)
    else:
        (last / "model_optim_rng.pt").rename(directory.parent / "elsewhere.pt")
        (last / "model_optim_rng.pt").symlink_to(directory.parent / "elsewhere.pt")


@pytest.mark.parametrize(
    ("what", "error", "expected"),
    [
        ("folder", FormatError, "are missing: mp_rank_01_001"),
        ("file", FormatError, "mp_rank_01_001/model_optim_rng.pt is missing"),
        ("truncated", FormatError, "or it is truncated"),
        ("one more", FormatError, "expected those of tp=2, pp=2"),
        ("of another", FormatError, "folders of two checkpoints, mp_rank_00 and mp_rank_01_001"),
        ("name", FormatError, r"mp_rank_00_000_old: expected folders called mp_rank_TT\[_PPP\]\[_EEE\]"),
        ("before 1.6", UnsupportedFormatError, "the format that torch.save had before version 1.6"),
        ("link", FormatError, "is a link out of"),
    ],
)
def test_folders_that_are_not_whole(what: str, error: type[Exception], expected: str, tmp_path: Path) -> None:
    """Ranks that are missing or too many, and archives that are cut off or are none, are named."""
    case = "legacy_tp2pp2_0192"
    directory = shutil.copytree(shards(case), tmp_path / STEP)
    _spoil(directory, what)
    with pytest.raises(error, match=expected):
        dcm.to_hf(directory, tmp_path / "hf", **options(case))


def test_copies_that_differ(tmp_path: Path) -> None:
    """``verify`` finds a norm that differs between tensor parallel ranks; the first rank's is the model's."""
    case, norm = "legacy_tp2pp2_0192", "decoder.layers.0.input_layernorm.weight"
    directory = edited(case, tmp_path, lambda content: content["model"][norm].add_(1), rank=2)
    outcome = run("verify", directory, "--config", folder(case) / "config.json")
    assert outcome.code == 3
    assert any(f"mp_rank_01_000/0/{norm}" in line and "differs from" in line for line in outcome.out)


def test_tied_heads_that_differ(tmp_path: Path) -> None:
    """A head that is not the embeddings, although the args tie them, is no model to export."""
    case = "legacy_vpp_tied_0192"
    directory = edited(case, tmp_path, lambda content: content["model1"]["output_layer.weight"].add_(1), rank=1)
    with pytest.raises(
        TensorMismatchError, match=r"contradicts itself: 'mp_rank_00_001/1/output_layer\.weight' differs"
    ):
        dcm.to_hf(directory, tmp_path / "hf", **options(case))


def test_one_bit_in_any_tensor_is_found(tmp_path: Path) -> None:
    """The checksums in a rank's archive find a flipped bit, and say in which tensor it is."""
    case = "legacy_tp2pp2_0192"
    directory = shutil.copytree(shards(case), tmp_path / STEP)
    stored = open_stored(directory)
    file = directory / "mp_rank_01_001" / "model_optim_rng.pt"
    number = [*stored.file_bytes].index("mp_rank_01_001/model_optim_rng.pt")
    key = f"mp_rank_01_001/0/{FC2}"
    chunks = stored.chunks(key)
    assert chunks.files.tolist() == [number]
    data = bytearray(file.read_bytes())
    data[int(chunks.positions[0]) + 100] ^= 1
    file.write_bytes(data)
    outcome = run("verify", directory, "--config", folder(case) / "config.json", "--json")
    assert outcome.code == 3
    (finding,) = json.loads("".join(outcome.out))["findings"]
    assert finding["file"] == "mp_rank_01_001/model_optim_rng.pt"
    assert finding["tensor"] == "decoder.layers.mlp.linear_fc2.weight"
    assert finding["hf_names"] == ["model.layers.3.mlp.down_proj.weight"]
    assert "have the CRC-32" in finding["what"]

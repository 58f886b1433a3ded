"""Mistral 3.x to Megatron and back: the vision tower comes along, and after training from where it came first.

The oracle is transformers' Mistral3ForConditionalGeneration, torch DCP, and a real GPTModel for the training between.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from command_line import refusal, run
from consolidated_models import consolidated_tensors
from fake_hub import FakeHub
from multimodal_models import DENSE, MULTIMODAL, VISION, logits
from plain_models import contents
from safetensors.torch import save_file
from torch_reading import described, edited_metadata, hf_tensors, load_tensors
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.model.table.table import tensor_table

if TYPE_CHECKING:
    from conftest import LaunchRanks


def vision_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the vision tower and the projector."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(VISION)}


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A model's journey: saved by transformers, imported for TP2 x PP2, and what training would leave of that."""

    case: str
    original: Path
    checkpoint: Path
    trained: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The original tensors."""
        return hf_tensors(self.original)


@pytest.fixture(scope="module", params=MULTIMODAL)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    """Every model."""
    where = tmp_path_factory.mktemp("trip")
    original = MULTIMODAL[request.param].save(where / "original", max_shard_size=20_000)
    dcm.from_hf(original, where / "checkpoint", tp=2, pp=2)
    trained = as_training_leaves_it(where / "checkpoint" / "release", where / "trained")
    return Trip(case=request.param, original=original, checkpoint=where / "checkpoint", trained=trained)


def as_training_leaves_it(imported: Path, to: Path) -> Path:
    """A copy of an import in which only what Megatron's model has is left: no vision, no configuration."""
    shutil.copytree(imported, to)
    shutil.rmtree(to / "hf")
    (to / "common.pt").unlink()
    drop(to, VISION)
    return to


def drop(directory: Path, beginnings: tuple[str, ...]) -> None:
    """Remove what a checkpoint stores under keys with one of these beginnings."""
    with edited_metadata(directory) as metadata:
        for key in [key for key in metadata.state_dict_metadata if key.startswith(beginnings)]:
            del metadata.state_dict_metadata[key]
        for index in [index for index in metadata.storage_data if index.fqn.startswith(beginnings)]:
            del metadata.storage_data[index]


def test_every_file_comes_back_byte_for_byte(trip: Trip, tmp_path: Path) -> None:
    """Weights in several files, their index, configuration, processor and chat template are what they were."""
    dcm.to_hf(trip.checkpoint, tmp_path / "hf")
    original = contents(trip.original)
    assert sum(name.endswith(".safetensors") for name in original) > 1
    assert {"processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tekken.json"} < set(original)
    assert contents(tmp_path / "hf") == original


def test_names_and_shapes_are_those_of_transformers(trip: Trip) -> None:
    """The table has exactly the tensors that transformers saves."""
    table = tensor_table(dcm.MistralConfig.from_hf(trip.original)).hf_tensors()
    saved = {name: tuple(tensor.shape) for name, tensor in trip.tensors.items()}
    assert {name: tensor.shape for name, tensor in table.items() if not tensor.is_alias} == saved


def test_an_image_is_seen_as_before(trip: Trip, tmp_path: Path) -> None:
    """An export laid out anew in float32 says of an image, in bfloat16, what the original says."""
    dcm.to_hf(trip.checkpoint, tmp_path / "hf", dtype="float32")
    assert described(hf_tensors(tmp_path / "hf")) == described({name: t.float() for name, t in trip.tensors.items()})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    said = logits(trip.original)
    assert torch.isfinite(said).all()
    assert torch.equal(logits(tmp_path / "hf"), said)


def test_vision_is_carried_whole(trip: Trip, tmp_path: Path) -> None:
    """DCP finds vision under its own names, before and after resharding; no rank of a layout reads it."""
    vision = vision_of(trip.tensors)
    dcm.reshard(trip.checkpoint, tmp_path / "cut", dcm.ParallelLayout(pp=4))
    for root in (trip.checkpoint, tmp_path / "cut"):
        assert described(vision_of(load_tensors(root / "release"))) == described(vision)
    assert run("verify", trip.original, tmp_path / "cut").code == 0
    with dcm.open_checkpoint(tmp_path / "cut") as opened:
        assert list(opened)[: len(vision)] == [name for name in opened if name.startswith(VISION)]
        assert described({name: opened[name] for name in vision}) == described(vision)
    plan = dcm.plan_reading(trip.checkpoint, dcm.ParallelLayout(pp=2))
    assert not [name for name in plan.chunks.names if name.startswith(VISION)]
    assert plan.total.amplification == 1


def test_a_text_only_training_comes_back_complete(trip: Trip, tmp_path: Path) -> None:
    """With the original directory, an export of what training saved has everything: here all files are the same."""
    done = run("to-hf", trip.trained, tmp_path / "hf", "--config", trip.original)
    assert f"vision tower and projector: unchanged from {trip.original}" in done.err
    assert contents(tmp_path / "hf") == contents(trip.original)


@pytest.mark.parametrize("kept_by", ["release", "describe"])
def test_vision_waits_in_the_root(kept_by: str, trip: Trip, tmp_path: Path) -> None:
    """Of a training's own save nothing is given: vision comes from the release in its root, or from describe's file."""
    root = tmp_path / "root"
    if kept_by == "release":
        shutil.copytree(trip.checkpoint, root, symlinks=True)
    shutil.copytree(trip.trained, root / "iter_0000009")
    (root / "latest_checkpointed_iteration.txt").write_text("9")
    if kept_by == "describe":
        assert run("describe", trip.original, root).code == 0
        kept = vision_of(trip.tensors)
        assert described(hf_tensors(root / "hf")) == described(kept)
        dcm.reshard(root, tmp_path / "cut", dcm.ParallelLayout(pp=2))
        dcm.to_hf(tmp_path / "cut", tmp_path / "again")
        assert contents(tmp_path / "again") == contents(trip.original)
    done = run("to-hf", root, tmp_path / "out")
    place = root / {"release": "release", "describe": "hf/vision.safetensors"}[kept_by]
    assert f"vision tower and projector: unchanged from {place}" in done.err
    assert contents(tmp_path / "out") == contents(trip.original)


@pytest.mark.parametrize("damage", ["absent", "other"])
def test_vision_in_the_root_must_be_whole(damage: str, trip: Trip, tmp_path: Path) -> None:
    """A file of the root with a tensor missing, or of another shape, is an error that names the file and the tensor."""
    root = tmp_path / "root"
    shutil.copytree(trip.trained, root / "iter_0000009")
    (root / "latest_checkpointed_iteration.txt").write_text("9")
    dcm.describe(trip.original, root)
    file = root / "hf" / "vision.safetensors"
    tensors = hf_tensors(root / "hf")
    name = next(iter(tensors))
    tensors[name] = torch.zeros(1)
    save_file({key: value for key, value in tensors.items() if damage != "absent" or key != name}, file)
    line = refusal(tmp_path, "to-hf", root, tmp_path / "out")
    assert f"cannot come from {file}" in line
    assert name in line


def test_the_original_may_be_on_the_hub(trip: Trip, tmp_path: Path) -> None:
    """A hub id gives all that its directory does; only the small files of it are downloaded."""
    with FakeHub(repositories={"org/seeing": {"main": trip.original}}).serving() as hub:
        done = hub.run(tmp_path / "home", "to-hf", trip.trained, tmp_path / "hf", "--config", "org/seeing")
        assert done.returncode == 0, done.stderr
        small = [name for name in contents(trip.original) if not name.endswith(".safetensors")]
        assert sorted(hub.downloaded) == sorted(small)
        assert {name for name, _ in hub.ranges} <= {*contents(trip.original)} - {*small}
    assert contents(tmp_path / "hf") == contents(trip.original)


def test_without_the_original_there_is_no_export(trip: Trip, tmp_path: Path) -> None:
    """A config.json alone, or a directory without weights, cannot give what training dropped: an error says so."""
    (tmp_path / "bare").mkdir()
    shutil.copy(trip.original / "config.json", tmp_path / "bare")
    line = refusal(tmp_path, "to-hf", trip.trained, tmp_path / "hf", "--config", trip.original / "config.json")
    assert "holds a language model alone" in line
    assert "Give the original Hugging Face directory, weights included, with --config." in line
    line = refusal(tmp_path, "to-hf", trip.trained, tmp_path / "hf", "--config", tmp_path / "bare")
    assert f"cannot come from {tmp_path / 'bare'}" in line


def test_training_and_original_are_compared(trip: Trip) -> None:
    """Against the original, what training saved lacks vision and nothing else; completed from it, they are equal."""
    outcome = dcm.compare(trip.original, trip.trained)
    lacking = {(difference.name, difference.what) for difference in outcome.differences}
    assert lacking == {(name, "only in A") for name in vision_of(trip.tensors)}
    assert dcm.compare(trip.original, trip.trained, config=trip.original).is_equal
    with dcm.open_checkpoint(trip.trained, config=trip.original) as opened:
        assert described(dict(opened)) == described(trip.tensors)


def test_training_is_looked_at_and_resharded(trip: Trip, tmp_path: Path) -> None:
    """That vision is not there is no fault of a checkpoint that training saved."""
    assert dcm.inspect(trip.trained, config=trip.original).problems == ()
    dcm.reshard(trip.trained, tmp_path / "cut", dcm.ParallelLayout(pp=2), config=trip.original)
    assert dcm.compare(trip.original, tmp_path / "cut", config=trip.original).is_equal


@pytest.mark.parametrize("trip", [DENSE], indirect=True)
def test_args_alone_tell_of_a_language_model(trip: Trip, tmp_path: Path) -> None:
    """With Megatron-LM's own args an export is the language model, and verify takes the other side's word for more."""
    kept = torch.load(trip.checkpoint / "release" / "common.pt", weights_only=False)
    del kept["content_metadata"]
    shutil.copytree(trip.trained, tmp_path / "trained")
    torch.save(kept, tmp_path / "trained" / "common.pt")
    dcm.to_hf(tmp_path / "trained", tmp_path / "text")
    text = {name: tensor for name, tensor in trip.tensors.items() if name not in vision_of(trip.tensors)}
    assert described(hf_tensors(tmp_path / "text")) == described(
        {name.removeprefix("language_model."): tensor for name, tensor in text.items()}
    )
    given = ("--config", tmp_path / "text" / "config.json")
    outcome = run("to-hf", trip.checkpoint, tmp_path / "hf", *given)
    assert (outcome.code, len(outcome.err)) == (1, 2)
    warning, line = outcome.err
    assert "vision: none and {" in warning
    assert "35 tensors are unknown to the table: " in line
    assert line.endswith("Give the config.json of the whole multimodal model with --config.")
    for sides in ((trip.original, tmp_path / "trained"), (tmp_path / "trained", trip.original)):
        compared = dcm.compare(*sides)
        assert {difference.name for difference in compared.differences} == set(vision_of(trip.tensors))
        assert compared.num_tensors == len(text)


def test_keys_as_megatron_bridge_writes_them(trip: Trip, tmp_path: Path) -> None:
    """With ``language_model.`` before the keys of the language model alone, the same files come back."""
    shutil.copytree(trip.checkpoint / "release", tmp_path / "ckpt")
    with edited_metadata(tmp_path / "ckpt") as metadata:

        def bridged(key: str) -> str:
            return re.sub(r"^(embedding|decoder|output_layer)\.", r"language_model.\1.", key)

        stored = metadata.storage_data
        metadata.state_dict_metadata = {bridged(key): each for key, each in metadata.state_dict_metadata.items()}
        metadata.storage_data = {type(index)(bridged(index.fqn), index.offset): at for index, at in stored.items()}
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert contents(tmp_path / "hf") == contents(trip.original)


@pytest.mark.megatron
@pytest.mark.parametrize("trip", [DENSE], indirect=True)
def test_logits_of_text(trip: Trip) -> None:
    """Of text, Megatron's language model says what the whole model says in transformers, from files or exported."""
    for sides in ((trip.original, trip.checkpoint), (trip.trained, trip.trained)):
        # Logits reach 18 here, and processors round float32 sums differently: 4e-4 was seen. A wrong tensor makes 1.
        outcome = run("verify", *sides, "--logits", "--config", trip.original, "--tolerance", "2e-3")
        assert outcome.code == 0, outcome
        assert outcome.out[-1].startswith("the logits agree: largest difference ")


def test_master_weights_and_vision(trip: Trip, tmp_path: Path) -> None:
    """An optimizer of the language model has master weights of that alone: vision comes from the weights."""
    shutil.copytree(trip.checkpoint / "release", tmp_path / "ckpt")
    with edited_metadata(tmp_path / "ckpt") as metadata:
        kinds, stored = metadata.state_dict_metadata, metadata.storage_data
        state = "optimizer.state.fp32_param."
        of_model = {key for key in kinds if hasattr(kinds[key], "size") and not key.startswith(VISION)}
        kinds |= {state + key: kinds[key] for key in of_model}
        again = {index: at for index, at in stored.items() if index.fqn in of_model}
        stored |= {type(index)(state + index.fqn, index.offset): at for index, at in again.items()}
    for weights in ("model", "master"):
        dcm.to_hf(tmp_path / "ckpt", tmp_path / "hf", output=dcm.Output(overwrite=True), weights=weights)
        assert contents(tmp_path / "hf") == contents(trip.original)


def test_names_of_transformers_memory(trip: Trip, tmp_path: Path) -> None:
    """Files that spell names as transformers 5 does in memory are the same model, and come back with these names."""
    saved = MULTIMODAL[trip.case].save(tmp_path / "saved", max_shard_size=20_000, save_original_format=False)
    assert "model.vision_tower.ln_pre.weight" in hf_tensors(saved)
    assert dcm.inspect(saved).problems == ()
    dcm.from_hf(saved, tmp_path / "ckpt")
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(saved)
    assert dcm.compare(saved, trip.checkpoint).is_equal
    dcm.to_hf(trip.trained, tmp_path / "completed", config=saved)
    assert contents(tmp_path / "completed") == contents(saved)


@pytest.mark.parametrize("trip", ["ministral 3"], indirect=True)
def test_a_head_that_is_stored_though_tied(trip: Trip, tmp_path: Path) -> None:
    """Files that hold tied embeddings under both names come back as they were; two that differ are refused."""
    shutil.copytree(trip.original, tmp_path / "hf")
    for path in tmp_path.glob("hf/model*"):
        path.unlink()
    tensors = trip.tensors
    words = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = words.clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")
    save_file(tensors | {"language_model.lm_head.weight": words * 2}, tmp_path / "hf" / "model.safetensors")
    line = refusal(tmp_path, "from-hf", tmp_path / "hf", tmp_path / "again")
    assert "'language_model.lm_head.weight'" in line
    assert "differs from 'language_model.model.embed_tokens.weight'" in line
    assert "The configuration ties them. Set tie_word_embeddings to false in config.json" in line


def test_part_of_vision_in_a_checkpoint(trip: Trip, tmp_path: Path) -> None:
    """A checkpoint that has lost one tensor of the tower is not taken for one that training saved."""
    shutil.copytree(trip.checkpoint, tmp_path / "ckpt")
    key = "vision_tower.transformer.layers.1.ffn_norm.weight"
    drop(tmp_path / "ckpt" / "release", (key,))
    line = refusal(tmp_path, "to-hf", tmp_path / "ckpt", tmp_path / "hf", "--config", trip.original)
    assert f"1 tensor is missing: {key}" in line


def own_vision(vision: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Vision as Mistral AI names and orders it: transformers' convert_mistral3_weights_to_hf.py, the other way."""
    renamed = {
        "vision_tower.": "vision_encoder.",
        "multi_modal_projector.linear_1": "vision_language_adapter.w_in",
        "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
        "multi_modal_projector.norm": "pre_mm_projector_norm",
        "multi_modal_projector.patch_merger": "patch_merger",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
        **{f"attention.{which}_proj": f"attention.w{which}" for which in "qkvo"},
    }
    own = {}
    for name, tensor in vision.items():
        called, values = name, tensor
        for theirs, ours in renamed.items():
            called = called.replace(theirs, ours)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.view(-1, 2, head_dim // 2, tensor.shape[1])
            values = halves.transpose(1, 2).reshape(tensor.shape)
        own[called] = values.contiguous()
    return own


def test_files_of_mistral_ai(tmp_path: Path) -> None:
    """Mistral AI's own files of a multimodal model, with a config.json beside them, are the same model."""
    original = MULTIMODAL[DENSE].save(tmp_path / "hf")
    config = AutoConfig.from_pretrained(original)
    tensors = hf_tensors(original)
    vision = vision_of(tensors)
    text = {name.removeprefix("language_model."): each for name, each in tensors.items() if name not in vision}
    own = consolidated_tensors(text, config.text_config) | own_vision(vision, config.vision_config.head_dim)
    (tmp_path / "own").mkdir()
    save_file(own, tmp_path / "own" / "consolidated.safetensors")
    shutil.copy(original / "config.json", tmp_path / "own")
    dcm.from_hf(tmp_path / "own", tmp_path / "ckpt", tp=2)
    assert dcm.compare(tmp_path / "ckpt", original).is_equal
    assert dcm.inspect(tmp_path / "own").problems == ()


def test_megatron_trains_the_language_model(launch_ranks: LaunchRanks, tmp_path: Path) -> None:
    """A real GPTModel loads an import past its vision; what it saves with other weights is exported complete."""
    original = MULTIMODAL[DENSE].save(tmp_path / "hf", max_shard_size=20_000)
    dcm.from_hf(original, tmp_path / "ckpt")
    before = hf_tensors(original)
    text = {name: tensor for name, tensor in before.items() if not name.startswith(VISION)}
    after = {name: tensor * 2 for name, tensor in text.items()}
    for name, tensors in (("before", text), ("after", after)):
        own = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
        save_file(own, tmp_path / f"{name}.safetensors")
    config = json.loads((original / "config.json").read_text())
    job = {"config": config, "layout": {"tp": 2}, "style": "STACKED"}
    load = {"hf": str(tmp_path / "before.safetensors"), "at": str(tmp_path / "ckpt" / "release")}
    save = {"hf": str(tmp_path / "after.safetensors"), "to": str(tmp_path / "trained")}
    jobs = {"load": {"task": "load_into_model", **job, **load}, "save": {"task": "save_model", **job, **save}}
    assert [rank["load"] for rank in launch_ranks(2, jobs)] == [[], []]
    dcm.to_hf(tmp_path / "trained", tmp_path / "out", config=original)
    assert described(hf_tensors(tmp_path / "out")) == described(vision_of(before) | after)
    assert torch.isfinite(logits(tmp_path / "out")).all()

"""What is given to public functions and classes: refused by name where it is not what the annotation says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from plain_models import save_model

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.libraries import public_modules

#: Values that are nothing a function takes, by a word that its annotation has. Where it has several words, the first
#: one counts; an annotation without any takes other things, such as functions.
WRONG: Final[dict[str, Any]] = {
    "GivenConfig": 3,
    "bool": "no",
    "str | Path": b"path",
    "Path": b"path",
    "str": 3,
    "int": "3",
}
OURS: Final = ("ParallelLayout", "Output", "Effort", "Ranks", "MistralConfig", "Progress")


def public_calls() -> Iterator[Any]:
    """The name of every public function, and of the classes that users make themselves."""
    made = {"Effort", "Output", "ConfigOverride", "LoadStrategy", "HfNamedReader", "HfFileSystem"}
    for name, module in public_modules().items():
        if (name.islower() and not name.startswith("__")) or name in made:
            yield pytest.param(name, marks=[pytest.mark.megatron] if module.startswith("megatron.") else [])


def wrong_value(annotation: str) -> Any:  # noqa: ANN401  (a value of any kind)
    """A value that is not of this annotation; None if that is not known."""
    if any(word in annotation for word in ("Literal", "device", "torch", "Mapping", "Sharded", "Model", "Given")):
        return {"GivenConfig | None": 3, "GivenConfig": 3, "MistralConfig": "hf_dir"}.get(annotation)
    if any(word in annotation for word in OURS):
        return 2
    return next((value for word, value in WRONG.items() if word in annotation), None)


@pytest.mark.filterwarnings("ignore")  # those of imports
@pytest.mark.parametrize("name", [*public_calls()])
def test_wrong_arguments(name: str, tmp_path: Path) -> None:
    """For every argument the error names it, the function, what is expected and what was given; nothing was done."""
    try:
        call = getattr(dcm, name)
    except dcm.MissingLibraryError as error:
        pytest.skip(str(error))
    arguments = {
        each.name: each
        for each in inspect.signature(call.__init__ if inspect.isclass(call) else call).parameters.values()
    }
    wrong = {each.name: wrong_value(str(each.annotation)) for each in arguments.values()}
    say_what_they_count = {"workers", "memory_bytes", "max_file_bytes"}
    wrong = {each: value for each, value in wrong.items() if value is not None and each not in say_what_they_count}
    assert wrong
    for argument, value in wrong.items():
        needed = [
            each for each in arguments.values() if each.default is each.empty and each.name not in {argument, "self"}
        ]
        others = {each.name: tmp_path / "nowhere" if "Path" in str(each.annotation) else None for each in needed}
        with pytest.raises(dcm.DistCkptMistralError) as caught:
            call(**others, **{argument: value})
        said = [each for each in str(caught.value).split("; ") if each.startswith(f"{argument} of {name}(): expected ")]
        assert [f", got {value!r}" in each for each in said] == [True], str(caught.value)
    assert not any(tmp_path.iterdir())


def test_what_is_taken() -> None:
    """Numbers of numpy are numbers, other libraries' paths are paths, and every member of a union is taken."""

    class TheirPath:
        def __fspath__(self) -> str:
            return "path"

    def call(path: str | Path, rank: int, share: float = 0.5, *, config: dcm.MistralConfig | None = None) -> None:
        require_types(call, path=path, rank=rank, share=share, config=config)

    call.__annotations__ = {"path": str | Path, "rank": int, "share": float, "config": dcm.MistralConfig | None}
    for path in ("path", Path("path"), TheirPath()):
        call(path, np.int64(3), np.float32(0.5))  # type: ignore[arg-type]  # as users do
    call("path", 3, share=1)
    for wrong in ({"rank": True}, {"rank": 0.5}, {"share": True}, {"path": ""}, {"path": None}):
        with pytest.raises(dcm.ConfigError, match=f"{next(iter(wrong))} of .*call"):
            call(**{"path": "path", "rank": 3, **wrong})  # type: ignore[arg-type]


def test_places_that_nobody_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ~ that nothing has expanded would become a directory of that name; a NUL is in no name."""
    save_model(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    for place in ("~/out", Path("~/out"), "~"):
        with pytest.raises(
            dcm.ConfigError, match=r"checkpoint of from_hf\(\): expected a path, got '~.* os.path.expanduser"
        ):
            dcm.from_hf("hf", place)
    for source, place in (("hf", "a\0b"), ("a\0b", "out")):
        with pytest.raises(dcm.DistCkptMistralError, match=r"a\\x00b"):
            dcm.from_hf(source, place)
    assert [each.name for each in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "~").mkdir()
    assert dcm.from_hf("hf", "~/out").num_tensors > 1


def test_parts_of_a_configuration() -> None:
    """A MistralConfig names every part that is of another kind, and a family that there is not."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    wrong = {
        "experts": 3,
        "yarn": {"factor": 2},
        "vision": 1,
        "latent_attention": 2,
        "hf_config": 3,
        "model_type": "foo",
    }
    with pytest.raises(dcm.ConfigError) as caught:
        dcm.MistralConfig(**sizes, **wrong)  # type: ignore[arg-type]
    for name, value in wrong.items():
        assert re.search(rf"{name} .*got {re.escape(repr(value))}", str(caught.value))


def test_all_problems_at_once() -> None:
    """One error names every wrong argument, with the help that says how to make what is expected."""
    with pytest.raises(dcm.ConfigError) as caught:
        dcm.reshard("ckpt", "out", 2, output=True)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "layout of reshard(): expected ParallelLayout, got 2. help(dist_ckpt_mistral.ParallelLayout) says how to make "
        "one; output of reshard(): expected Output, got True. help(dist_ckpt_mistral.Output) says how to make one"
    )


def test_layouts() -> None:
    """A layout takes layers of stages as a list, too, and refuses what is of another kind as a LayoutError."""
    assert dcm.ParallelLayout(pp=2, pp_layers=[1, 3]) == dcm.ParallelLayout(pp=2, pp_layers=(1, 3))  # type: ignore[arg-type]
    assert dcm.ParallelLayout(pp=2, pp_layers=[1, 3]).options == ("--pp", "2", "--pp-layers", "1,3")  # type: ignore[arg-type]
    wrong: list[dict[str, Any]] = [{"order": 3}, {"pp_layers": 3}, {"pp_layers": (1, "3")}, {"vpp": "2"}]
    for each in wrong:
        with pytest.raises(dcm.LayoutError, match=f"{next(iter(each))}.* got {'.*' if each.get('pp_layers') else ''}"):
            dcm.ParallelLayout(pp=2, **each)


def test_a_rank_outside_of_its_job() -> None:
    """It would take no share and publish nothing, in silence."""
    with pytest.raises(dcm.ConfigError, match=r"rank: expected a whole number from 0 to 0 \(below world_size\), got 3"):
        dcm.Ranks(rank=3)
    with pytest.raises(dcm.ConfigError, match="world_size: expected a whole number of at least 1"):
        dcm.Ranks(world_size=0)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    """It says what was given, and which file is meant; a damaged config.json is still one."""
    hf = save_model(tmp_path / "hf")
    for name, what in {
        "model.safetensors": "it is one file of a model",
        "model.bin": "it is a file of torch.save",
        "model.pt": "it is a file of torch.save",
        "model.gguf": "it is a GGUF file",
        "common.pt": "it is one file of a checkpoint",
        "run_config.yaml": "it is a file",
        "model.safetensors.index.json": "it is one file of a model",
        "tokenizer.json": "it is a file",
    }.items():
        place = tmp_path / "hf" / name
        place.write_bytes(b"{}" if name.endswith("json") else b"\xff" * 64)
        with pytest.raises(
            dcm.ConfigError, match=f"{name} is no model configuration, such as config.json: {what}"
        ) as caught:
            dcm.MistralConfig.from_hf(place)
        assert str(caught.value).endswith(f"Give {tmp_path / 'hf' / 'config.json'}.")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(dcm.FormatError, match=r"invalid JSON in .*config.json"):
        dcm.MistralConfig.from_hf(hf)


def test_a_base_of_no_adapter(tmp_path: Path) -> None:
    """The model of an adapter is refused where there is no adapter; it counted as configuration."""
    save_model(tmp_path / "hf")
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    with pytest.raises(dcm.TensorMismatchError, match=r"holds no LoRA adapter: .* without --merge-adapter, --base and"):
        dcm.to_hf(tmp_path / "ckpt", tmp_path / "out", base=tmp_path / "hf")
    assert not (tmp_path / "out").exists()

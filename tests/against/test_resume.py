"""A training that is saved at one layout and resumed at others, by Megatron on four gloo ranks: all from one launch.

``tools/resume_demo.py`` runs it, with both of Megatron's mixed-precision optimizers; ``resume_runs.py`` says what.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import resume_demo
import torch_reading
from processes import processes_about, until_none_is_left
from resume_runs import (
    BEGUN_AT,
    EXPORTED_AT,
    LAYOUTS,
    OPTIMIZERS,
    OTHERS,
    PARTS,
    RESHARDED_AT,
    SAVED_AFTER,
    STEPS,
    TOLERANCE,
    never_stopped,
    resharded_to,
    resumed_at,
    resumed_without,
)

from dist_ckpt_mistral.formats.places import resolve_directory

pytestmark = [pytest.mark.megatron, pytest.mark.ranks, pytest.mark.slow]

#: Names in ``optimizer.state`` of the moments and of the float32 master weights.
STATES = {"distributed": ("exp_avg", "exp_avg_sq", "param"), "float16": ("exp_avg", "exp_avg_sq", "fp32_param")}


@dataclass(frozen=True, kw_only=True)
class Told:
    """One run of the demo: exit code, what it printed, its directory and pictures, and what every rank saw."""

    code: int
    out: str
    folder: Path
    png: Path
    svg: Path
    ranks: list[dict[str, Any]]

    def run(self, optimizer: str, name: str) -> dict[str, Any]:
        """What the first rank saw of a run."""
        seen: dict[str, Any] = self.ranks[0][f"{optimizer}: {name}"]
        return seen


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Run the demo with both optimizers."""
    folder, pictures, out = tmp_path_factory.mktemp("resume"), tmp_path_factory.mktemp("pictures"), io.StringIO()
    png, svg = pictures / "resume.png", pictures / "resume.svg"
    with contextlib.redirect_stdout(out):
        code = resume_demo.main(
            ["--optimizer", *OPTIMIZERS, "--keep", str(folder), "--png", str(png), "--svg", str(svg)]
        )
    return Told(code=code, out=out.getvalue(), folder=folder, png=png, svg=svg, ranks=resume_demo.results(folder))


def differences(told: Told, optimizer: str, name: str, what: str = "losses") -> list[float]:
    """How far every step of a run is from that of the training that never stopped."""
    whole = told.run(optimizer, never_stopped(BEGUN_AT))[what]
    return [abs(value - whole[step]) for step, value in told.run(optimizer, name)[what].items()]


def tensors(root: Path) -> dict[str, Any]:
    """Every bit of a checkpoint, as torch's own DCP puts it together."""
    return torch_reading.described(torch_reading.load_tensors(resolve_directory(root)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_go_on(optimizer: str, layout: str, told: Told) -> None:
    """At every layout the losses of the steps that remain are those of the training that never stopped."""
    assert len(differences(told, optimizer, resumed_at(layout))) == STEPS - SAVED_AFTER
    assert max(differences(told, optimizer, resumed_at(layout))) <= TOLERANCE


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_lost_shows(optimizer: str, part: str, told: Told) -> None:
    """A resumption that loses the optimizer, its step or the schedule is off by many times the tolerance."""
    assert max(differences(told, optimizer, resumed_without(part))) > 30 * TOLERANCE


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_layout_is_exact(optimizer: str, told: Told) -> None:
    """Without another order of sums there is no difference at all: the tolerance is for nothing else."""
    assert differences(told, optimizer, resumed_at(BEGUN_AT)) == [0] * (STEPS - SAVED_AFTER)
    assert differences(told, optimizer, resumed_at(BEGUN_AT), "norms") == [0] * (STEPS - SAVED_AFTER)


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_layouts_differ_unresumed(optimizer: str, layout: str, told: Told) -> None:
    """Trainings that nobody stopped differ between layouts, by something that the tolerance is right for."""
    assert TOLERANCE / 100 < max(differences(told, optimizer, never_stopped(layout))) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradient_norms_agree(optimizer: str, layout: str, told: Told) -> None:
    """What Megatron clips gradients by is the same at all layouts, but for the order of sums and bfloat16."""
    whole = told.run(optimizer, never_stopped(BEGUN_AT))["norms"]
    resumed = told.run(optimizer, resumed_at(layout))["norms"]
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=0.001)  # measured: 0.0001


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradient_norms_count_every_parameter_once(optimizer: str, layout: str, told: Told) -> None:
    """At all layouts Megatron takes the norm of as many elements as the weights have: none twice, none left out."""
    saved = torch_reading.load_tensors(resolve_directory(told.folder / optimizer / "saved"))
    elements = sum(tensor.numel() for name, tensor in saved.items() if not name.startswith("optimizer."))
    counted = {rank[f"{optimizer}: {resumed_at(layout)}"]["norm_elements"] for rank in told.ranks}
    assert counted == {elements}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_exact(optimizer: str, layout: str, told: Told) -> None:
    """Weights, moments and master weights are the saved ones, bit for bit: Megatron saves them again at once."""
    saved = tensors(told.folder / optimizer / "saved")
    names = {name for name in saved if not name.startswith("optimizer.")}
    assert len(names) == 9
    assert saved.keys() == names | {f"optimizer.state.{state}.{name}" for state in STATES[optimizer] for name in names}
    assert all(any(content) for _, _, content in saved.values())
    assert tensors(told.folder / optimizer / f"saved again at {layout}") == saved


@pytest.mark.parametrize("name", [*map(resumed_at, LAYOUTS), resharded_to(RESHARDED_AT)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_counters_are_exact(optimizer: str, name: str, told: Told) -> None:
    """On every rank the steps, learning rates and weight decays are those at which the checkpoint was saved."""
    saved = told.run(optimizer, never_stopped(BEGUN_AT))["counters"]
    assert (saved["steps_done"], saved["optimizer_steps"]) == (SAVED_AFTER, [SAVED_AFTER])
    assert all(rank[f"{optimizer}: {name}"]["counters"] == saved for rank in told.ranks)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resharded_copy_is_the_same(optimizer: str, told: Told) -> None:
    """Resumed from what ``reshard`` made of the checkpoint, no bit of state or loss is another."""
    assert tensors(told.folder / optimizer / "resharded") == tensors(told.folder / optimizer / "saved")
    copied, original = told.run(optimizer, resharded_to(RESHARDED_AT)), told.run(optimizer, resumed_at(RESHARDED_AT))
    assert (copied["losses"], copied["norms"]) == (original["losses"], original["norms"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_result_goes_back(optimizer: str, told: Told) -> None:
    """What was trained to the end loads in transformers after ``to-hf``, and has the loss that Megatron computes."""
    megatron_loss = told.run(optimizer, resumed_at(EXPORTED_AT))["float32_loss"]
    assert resume_demo.hugging_face_loss(told.folder / optimizer / "hf") == pytest.approx(megatron_loss, abs=1e-5)
    assert resume_demo.hugging_face_loss(told.folder / "hf") > megatron_loss + 1


def test_table(told: Told) -> None:
    """Every run has its line with the losses, and the last sentences say what to make of it."""
    assert told.code == 0
    for optimizer, title in OPTIMIZERS.items():
        table = told.out[told.out.index(title) :]
        for name in (*map(resumed_at, LAYOUTS), *map(resumed_without, PARTS), *map(never_stopped, OTHERS)):
            losses = told.run(optimizer, name)["losses"]
            numbers = [f"{losses[str(step)]:.4f}" for step in range(SAVED_AFTER + 1, STEPS + 1)]
            expected = [*numbers, f"{max(differences(told, optimizer, name)):.5f}"]
            assert re.search(rf"^ *{name} +{' +'.join(expected)}$", table, re.MULTILINE)
    assert told.out.count(f"(tolerance {TOLERANCE})") == len(OPTIMIZERS)


def test_pictures(told: Told) -> None:
    """The PNG is one, and the SVG names every run."""
    assert told.png.read_bytes().startswith(b"\x89PNG\r\n")
    svg = told.svg.read_text()
    for name in (never_stopped(BEGUN_AT), *map(resumed_at, LAYOUTS), *map(resumed_without, PARTS)):
        assert f">{name}</text>" in svg


def test_nothing_is_left(told: Told) -> None:
    """No rank, and no writer that Megatron started, outlives the demo."""
    until_none_is_left(told.folder)
    assert processes_about(told.folder) == []

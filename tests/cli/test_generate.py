"""``generate`` and ``verify --logits`` as a user runs them, and models on several ranks: against transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from absent_modules import without
from command_line import refusal, run
from genuine import folder, shards
from hf_models import random_model, saved
from safetensors.torch import load_file, save_file
from small_models import MODELS, PROMPT, VOCABULARY, save_tokenizer, small_model
from transformers import AutoTokenizer

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral import libraries

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import LaunchRanks

NEW_TOKENS = 12
TEXT = "Mistral, naïve?"
#: All that may go wrong at once: tied, grouped queries, a window, a vocabulary that needs padding.
NAME = "head_dim of its own"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-dp2": {"tp": 2, "dp": 2},
    "pp4": {"pp": 4},
    "pp2-vpp2-dp2": {"pp": 2, "vpp": 2, "dp": 2},
    "tp4, fewer groups": {"tp": 4},
    "dp slowest, uneven stages": {"pp": 2, "dp": 2, "pp_layers": [1, 3], "order": "tp-cp-ep-pp-dp"},
}
#: The same for experts, and for stages whose layers differ.
FAMILY_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-ep2-etp1": {"tp": 2, "dp": 2, "ep": 2, "etp": 1},
    "tp2-ep2": {"tp": 2, "dp": 2, "ep": 2},
    "pp2-ep2": {"pp": 2, "dp": 2, "ep": 2},
    "tp2-pp2": LAYOUTS["tp2-pp2"],
}
RANKS_MODELS = {
    "untied": NAME,
    "tied": "tied",
    **{name: name for name in ("mixtral", "mistral4", "ministral", "ministral3")},
}
RUNS = [
    *((layout, kind) for layout in LAYOUTS for kind in ("untied", "tied")),
    *((layout, kind) for layout in ("tp2-ep2-etp1", "tp2-ep2", "pp2-ep2") for kind in ("mixtral", "mistral4")),
    *(("tp2-pp2", kind) for kind in ("mistral4", "ministral", "ministral3")),
]

#: megatron warns of much that is not ours to mend.
pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untied and a tied model with a tokenizer, as Hugging Face directory and as checkpoint."""
    root = tmp_path_factory.mktemp("generate")
    found: dict[str, Path] = {}
    for kind, name in RANKS_MODELS.items():
        hf = root / kind
        small_model(name).save_pretrained(hf)
        save_tokenizer(hf)
        dcm.from_hf(hf, root / f"{kind}-ckpt", tp=2)
        found |= {kind: hf, f"{kind}-ckpt": root / f"{kind}-ckpt"}
    return found


def their_tokens(name: str, prompt: list[int], **options: Any) -> list[int]:  # noqa: ANN401
    """The tokens that transformers' generate writes after a prompt."""
    model, options = small_model(name), {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    torch.manual_seed(options.pop("seed", 0))  # after the model, which draws weights
    found: list[int] = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    return found


def their_text(hf: Path, name: str, text: str, **options: Any) -> tuple[str, list[int]]:  # noqa: ANN401
    """The whole text when transformers' generate goes on from ``text``, and the new tokens."""
    words = AutoTokenizer.from_pretrained(hf)
    prompt = words(text)["input_ids"]
    new = their_tokens(name, prompt, **options)
    return words.decode([*prompt, *new], skip_special_tokens=True), new


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, places: dict[str, Path]) -> list[dict[str, Any]]:
    """What every one of four ranks says to every job of this module."""
    jobs: dict[str, dict[str, Any]] = {
        f"{layout} {kind}": {
            "task": "run_model",
            "layout": (LAYOUTS | FAMILY_LAYOUTS)[layout],
            "path": str(places["tied" if kind == "tied" else f"{kind}-ckpt"]),
            "config": str(places[kind]),
            "truth": str(places[kind] / "model.safetensors"),
            "prompt": PROMPT[0].tolist(),
            "new_tokens": NEW_TOKENS,
        }
        for layout, kind in RUNS
    }
    command = [
        "generate",
        str(places["untied-ckpt"]),
        "--prompt",
        TEXT,
        "--max-new-tokens",
        str(NEW_TOKENS),
        "--tp",
        "2",
    ]
    jobs["command"] = {"task": "run_command", "layout": {}, "arguments": [*command, "--pp", "2"]}
    jobs["too few ranks"] = {"task": "run_command", "layout": {}, "arguments": [*command, "--pp", "4"]}
    return launch_ranks(4, jobs)


@pytest.mark.parametrize(("layout", "kind"), RUNS)
def test_ranks_say_what_transformers_says(layout: str, kind: str, results: list[dict[str, Any]]) -> None:
    """On every layout every parameter holds its rows; logits agree on the last stage, greedy tokens on all ranks."""
    with torch.no_grad():
        expected = small_model(RANKS_MODELS[kind])(PROMPT).logits[0]
    tokens = their_tokens(RANKS_MODELS[kind], PROMPT[0].tolist(), eos_token_id=None)
    parallel = dcm.ParallelLayout(**(LAYOUTS | FAMILY_LAYOUTS)[layout])
    last = 0
    for rank, said in enumerate(each[f"{layout} {kind}"] for each in results):
        assert said["wrong"] == []
        assert said["tokens"] == tokens
        is_last = parallel.coordinates(rank).pp == parallel.pp - 1
        assert (said["logits"] is not None) == is_last
        if is_last:
            assert (torch.tensor(said["logits"]) - expected).abs().max() <= 1e-4
            last += 1
    assert last == 4 // parallel.pp


def test_the_command_runs_on_ranks(places: dict[str, Path], results: list[dict[str, Any]]) -> None:
    """With two tensor-parallel ranks and two stages the text is that of transformers, and one rank prints it."""
    text, _ = their_text(places["untied"], NAME, TEXT)
    assert [rank["command"] for rank in results] == [
        {"code": 0, "out": text + "\n" if rank == 0 else "", "err": ""} for rank in range(4)
    ]
    assert [rank["too few ranks"]["code"] for rank in results] == [1] * 4
    assert "--tp 2 --pp 4 needs 8 ranks, and there are 4" in results[0]["too few ranks"]["err"]


@pytest.mark.parametrize("path", ["untied", "untied-ckpt"])
def test_generate_prints_what_transformers_writes(path: str, places: dict[str, Path]) -> None:
    """The likeliest tokens follow, with the tokenizer that came along, from a directory and from a checkpoint."""
    text, _ = their_text(places["untied"], NAME, TEXT)
    outcome = run("generate", places[path], "--prompt", TEXT, "--max-new-tokens", NEW_TOKENS)
    assert (outcome.code, "\n".join(outcome.out), outcome.err) == (0, text, [])


def test_texts_appear_as_they_grow(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt comes first and then piece by piece what follows; together it is the text, and only rank 0 prints."""
    text, new = their_text(places["untied"], NAME, TEXT)
    pieces: list[str] = []
    monkeypatch.setattr("dist_ckpt_mistral.cli.output.say_piece", pieces.append)
    assert run("generate", places["untied"], "--prompt", TEXT, "--max-new-tokens", NEW_TOKENS).out == [""]
    assert pieces[0] == TEXT
    assert "".join(pieces) == text
    assert 2 < len(pieces) <= 1 + len(new)


@pytest.mark.parametrize(
    ("texts", "pieces"),
    [
        (["a", "a b", "a bc"], ["a", " b", "c"]),
        (["a", "a\N{REPLACEMENT CHARACTER}", "a\xe9"], ["a", "\xe9"]),
        (["a", "ab", "b"], ["a", "b", "\n", "b"]),
        (["a\N{REPLACEMENT CHARACTER}"], ["a\N{REPLACEMENT CHARACTER}"]),
    ],
    ids=["grows", "half a character", "becomes another text", "ends within a character"],
)
def test_pieces_are_never_taken_back(texts: list[str], pieces: list[str]) -> None:
    """A character waits until it is whole; a text that its next token changes is begun again on its own line."""
    from dist_ckpt_mistral.megatron.generate import _Pieces  # noqa: PLC0415  (imports megatron)

    said: list[str] = []
    shown = _Pieces(lambda tokens: texts[len(tokens) - 1], said.append)
    for count in range(1, len(texts) + 1):
        shown.show([0] * count)
    assert shown.end([0] * len(texts)) == texts[-1]
    assert said == pieces


def test_what_is_missing_is_said_before_torch_is_imported(places: dict[str, Path], tmp_path: Path) -> None:
    """No model, no tokenizer, a layout or a length that does not fit, too few ranks: none waits for the imports."""
    nowhere, bare = str(tmp_path / "nowhere"), str(shutil.copytree(places["untied"], tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    hf = str(places["untied"])
    commands = [
        ["generate", nowhere, "--prompt", "a"],
        ["generate", bare, "--prompt", "a"],
        ["generate", hf, "--prompt", "a", "--max-new-tokens", "100000000"],
        ["generate", hf, "--prompt", "a", "--tp", "2", "--ep", "2"],
        ["verify", hf, nowhere, "--logits"],
        ["verify", bare, bare, "--logits", "--prompt", "a"],
    ]
    for code, out, modules in without([], commands):
        assert (code, out) == (1, "")
        assert modules.isdisjoint({"torch", "transformers", "megatron.core"})
    told = refusal(tmp_path, *commands[3])
    assert "--tp 2 --pp 1 --ep 2 needs 4 ranks, and there is 1. Start them with: torchrun --nproc-per-node 4 " in told


def test_several_prompts_as_json(places: dict[str, Path]) -> None:
    """With --json everything about each prompt is there."""
    arguments = ["--prompt", TEXT, "--prompt", "b", "--max-new-tokens", NEW_TOKENS, "--json"]
    found = json.loads("\n".join(run("generate", places["tied-ckpt"], *arguments).out))["completions"]
    words = AutoTokenizer.from_pretrained(places["tied"])
    for each, prompt in zip(found, (TEXT, "b"), strict=True):
        text, new = their_text(places["tied"], "tied", prompt)
        assert each == {
            "prompt": prompt,
            "text": text,
            "continuation": words.decode(new, skip_special_tokens=True),
            "prompt_tokens": words(prompt)["input_ids"],
            "new_tokens": new,
            "ended": new[-1] == 2,
        }


@pytest.mark.parametrize(
    "options", [{"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 3.0, "top_k": 40, "top_p": 0.9}]
)
def test_sampled_tokens_are_those_of_transformers(options: dict[str, Any], places: dict[str, Path]) -> None:
    """The draws of a seed are those of transformers after torch.manual_seed; another seed draws others."""
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    found = []
    for seed in (3, 4):
        text, new = their_text(places["untied"], NAME, TEXT, do_sample=True, seed=seed, **{"top_k": 0, **options})
        arguments = ["--prompt", TEXT, "--max-new-tokens", NEW_TOKENS, "--json", "--seed", seed, *flags]
        (ours,) = json.loads("\n".join(run("generate", places["untied"], *arguments).out))["completions"]
        assert (ours["text"], ours["new_tokens"]) == (text, new)
        found.append(new)
    assert found[0] != found[1]


def test_generation_stops_at_every_end(places: dict[str, Path], tmp_path: Path) -> None:
    """All ends that generation_config.json names end a text; without it those of config.json, as in transformers."""
    _, free = their_text(places["untied"], NAME, TEXT)
    ends = [free[6], free[3]]
    until = free[: min(map(free.index, ends)) + 1]
    shutil.copytree(places["untied"], tmp_path / "hf")
    for file in ("generation_config.json", "config.json"):
        path = tmp_path / "hf" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
        outcome = run("generate", tmp_path / "hf", "--prompt", TEXT, "--max-new-tokens", NEW_TOKENS, "--json")
        told = json.loads("\n".join(outcome.out))["completions"][0]
        assert (told["new_tokens"], told["ended"]) == (until, True)
        (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)


def test_an_end_that_is_no_token_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    """Where generation_config.json has something else than tokens as the end, it is named."""
    hf = shutil.copytree(places["tied"], tmp_path / "hf")
    for wrong in ([[2]], {"a": 2}, "2"):
        (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        told = refusal(tmp_path, "generate", hf, "--prompt", TEXT)
        assert f"expected numbers, got {json.dumps(wrong)}" in told


def test_libraries_speak_again_afterwards() -> None:
    """What keeps transformers quiet ends with its block: verbosity and progress bars are as they were."""
    talk = transformers.utils.logging
    kept = talk.get_verbosity(), talk.is_progress_bar_enabled()
    try:
        for verbosity, bars in ((talk.INFO, True), (talk.WARNING, False)):
            talk.set_verbosity(verbosity)
            (talk.enable_progress_bar if bars else talk.disable_progress_bar)()
            with libraries.quiet():
                assert (talk.get_verbosity(), talk.is_progress_bar_enabled()) == (talk.ERROR, False)
            assert (talk.get_verbosity(), talk.is_progress_bar_enabled()) == (verbosity, bars)
    finally:
        talk.set_verbosity(kept[0])
        (talk.enable_progress_bar if kept[1] else talk.disable_progress_bar)()


def test_a_tokenizer_can_be_given(places: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint that training saved has neither configuration nor tokenizer: both can be given."""
    arguments = ["generate", shards("td_0192"), "--prompt", "abc", "--config", folder("td_0192")]
    assert "no tokenizer in" in refusal(tmp_path, *arguments)
    outcome = run(*arguments, "--tokenizer", places["tied"], "--max-new-tokens", 3, "--dtype", "float32", "--json")
    assert len(json.loads("\n".join(outcome.out))["completions"][0]["new_tokens"]) == 3


def test_what_generate_refuses(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that nobody started, sampling from nothing, a broken tokenizer, missing packages: in one line each."""
    start = ["generate", places["tied"], "--prompt", "a b"]
    options = ["--max-new-tokens", 5, "--top-k", 3, "--dtype", "float32", "--config", tmp_path / "a b", "--json"]
    words = [*start, "--prompt=-c", "--prompt", "it's\na $b", *options, "--tp", 2, "--pp", 2]
    told = refusal(tmp_path, *words)
    assert "--tp 2 --pp 2 needs 4 ranks, and there is 1. Start them with: torchrun --nproc-per-node 4 -m " in told
    remedy = told.partition("-m dist_ckpt_mistral ")[2]
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {remedy}"], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"".join(str(word).encode() + b"\0" for word in words)
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "the environment variable WORLD_SIZE: expected a whole number" in refusal(tmp_path, *words)
    monkeypatch.delenv("WORLD_SIZE")
    assert [run(*start, *wrong).code for wrong in (("--top-p", 1.5), ("--temperature", 0), ("--seed", -1))] == [2] * 3
    nowhere = tmp_path / "nowhere"
    for command in (start, ["verify", places["tied"], places["tied-ckpt"], "--logits", "--prompt", "a"]):
        assert f"the tokenizer {nowhere} is not a directory" in refusal(tmp_path, *command, "--tokenizer", nowhere)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    assert f"cannot read the tokenizer in {broken}" in refusal(tmp_path, *start, "--tokenizer", broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "megatron" in name else object())
    assert refusal(tmp_path, *start).startswith("error: generate needs megatron-core, not installed here. Run: ")
    assert refusal(tmp_path, "verify", "a", "b", "--logits").startswith("error: verify --logits needs megatron-core")


@pytest.mark.parametrize(
    ("a", "b", "in_transformers"),
    [
        *(("untied", "untied-ckpt", 0), ("untied-ckpt", "untied", 1), ("tied-ckpt", "tied-ckpt", 0)),
        *(("tied", "tied", 0), ("mixtral-ckpt", "mixtral-ckpt", 0)),
        *(("mistral4", "mistral4-ckpt", 0), ("mistral4-ckpt", "mistral4-ckpt", 0)),
    ],
)
def test_equal_models_agree(a: str, b: str, in_transformers: int, places: dict[str, Path]) -> None:
    """Whatever two equal models are stored as, transformers runs the one, Megatron the other, and the logits agree."""
    outcome = run("verify", places[a], places[b], "--logits", "--json")
    told = json.loads("\n".join(outcome.out))
    assert (outcome.code, told["agree"], len(told["prompts"])) == (0, True, 2)
    assert 0 <= told["largest_difference"] <= told["tolerance"] == 1e-4
    assert told["in_transformers"].startswith(str(places[(a, b)[in_transformers]]))
    assert all(prompt["same_tokens"] and prompt["largest_logit"] > 1 for prompt in told["prompts"])
    assert all(prompt["num_tokens"] > 16 for prompt in told["prompts"])  # the original context, longer than the window


def test_verify_logits_takes_prompts(places: dict[str, Path]) -> None:
    """Given prompts are compared one by one; the verdict says what ran where, and how far the logits lie apart."""
    outcome = run("verify", places["tied"], places["tied-ckpt"], "--logits", "--prompt", "ab", "--prompt", TEXT)
    assert (outcome.code, outcome.err) == (0, [])
    assert [line.partition(":")[0] for line in outcome.out[:2]] == ["'ab', 3 tokens", f"{TEXT!r}, 17 tokens"]
    assert outcome.out[2].startswith("the logits agree: largest difference ")


def test_prompts_that_no_model_takes(places: dict[str, Path], tmp_path: Path) -> None:
    """A prompt with tokens outside the vocabulary is refused in one line; options of --logits without it are misuse."""
    hf = saved(random_model(), tmp_path / "hf")
    command = ["verify", hf, hf, "--prompt", "z", "--tokenizer", places["tied"]]
    assert "a prompt needs tokens of 0 to 49, got [" in refusal(tmp_path, *command, "--logits")
    assert run(*command).code == run(*command[:3], *command[5:]).code == 2


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_different_models_differ(change: float, places: dict[str, Path], tmp_path: Path) -> None:
    """One changed weight is found, as is one that is no number; a tolerance above the difference accepts it."""
    shutil.copytree(places["untied"], tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][7, 3] += change
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    for a, b in (("hf", "ckpt"), ("ckpt", "hf")):
        found = {"hf": tmp_path / "hf", "ckpt": places["untied-ckpt"]}
        outcome = run("verify", found[a], found[b], "--logits")
        assert outcome.code == 3
        assert outcome.out[-1].startswith("the logits DIFFER: largest difference ")
    code = run("verify", tmp_path / "hf", places["untied-ckpt"], "--logits", "--tolerance", 100).code
    assert code == (3 if change != change else 0)  # noqa: PLR0124  (not a number)


def test_other_vocabularies_are_not_compared(places: dict[str, Path], tmp_path: Path) -> None:
    """Logits of different vocabularies mean different things."""
    small_model(NAME, vocab_size=VOCABULARY + 1).save_pretrained(tmp_path / "hf")
    told = refusal(tmp_path, "verify", places["untied"], tmp_path / "hf", "--logits")
    assert "the vocabularies differ: 259 in" in told


def test_random_prompts_reach_behind_what_depends_on_length() -> None:
    """The other models too are tried on prompts longer than their windows and YaRN's original context."""
    from dist_ckpt_mistral.megatron.logits import _random_tokens  # noqa: PLC0415  (imports megatron)

    for name in MODELS:
        config = dcm.MistralConfig.from_hf(small_model(name).config.to_dict())
        length = _random_tokens(config, 0)[0].shape[1]
        assert length > (config.sliding_window or 0)
        assert config.yarn is None or length > config.yarn.original_max_position_embeddings

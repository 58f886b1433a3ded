"""Megatron-LM's own training code on both sides: it loads what from_hf wrote, and to_hf exports what it saved.

One launch of four ranks. ``gpt_stage.hf_rows`` says what each parameter of the real GPTModels must hold.
"""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from command_line import run
from family_models import FAMILY, family_model, model_class
from hf_models import random_model, saved
from megatron_lm_cases import LAYOUTS, MODELS, PARTS, RELEASED
from megatron_reads import reads_of_rank
from safetensors.torch import load_file
from torch_reading import described
from transformers import AutoConfig

from dist_ckpt_mistral.analysis.compare import compare, compare_stored
from dist_ckpt_mistral.analysis.pretrain_command import megatron_args
from dist_ckpt_mistral.analysis.read_planner import plan_reading
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.reshard import reshard
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.mapping.source import hf_content_metadata
from dist_ckpt_mistral.model.args.bridge import from_run_config
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle
from dist_ckpt_mistral.storage import documents

if TYPE_CHECKING:
    from conftest import LaunchRanks

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 12),
    reason="megatron-core 0.16, the last line for Python 3.11, ships no megatron.training",
)

WITH_EXPERTS = [name for name in FAMILY if name.startswith(("mixtral", "mistral4"))]
#: Models that megatron-core 0.19 builds, and a prompt longer than a window, but no longer than YaRN's original context.
SAYING = [name for name in FAMILY if "plain queries" not in name]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9]
#: The flags of the README, with which the checkpoint describes the model.
BY_CHECKPOINT = ("--ckpt-format", "torch_dist", "--use-checkpoint-args", "--no-load-optim", "--no-load-rng", "--bf16")


#: What the checkpoint does not tell of latent attention: sizes of heads and latents, norms, rotary embeddings.
NOT_BY_CHECKPOINT = (
    *("--multi-latent-attention", "--qk-layernorm", "--q-lora-rank", "12", "--kv-lora-rank", "10"),
    *("--qk-head-dim", "6", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "8", "--rotary-scaling-factor", "4"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how from_hf writes it, and how Megatron-LM is told to load it."""

    model: str
    written: dict[str, int] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    saves: tuple[str, ...] | None = None
    has_record: bool = False


#: ``flags`` None: those that megatron_args gives; ``more`` have no flag. With ``saves``, these flags are added and the
#: model is saved again.
CASES: dict[str, Case] = {
    "release": Case(model="window", flags=(*BY_CHECKPOINT, "--finetune")),
    "release, not finetuned": Case(model="window", written={"tp": 2, "pp": 2}, flags=BY_CHECKPOINT),
    "iteration": Case(model="tied", written={"iteration": 7}, flags=BY_CHECKPOINT, layout={"tp": 2, "pp": 2}),
    "yarn by the checkpoint": Case(model="yarn", flags=(*BY_CHECKPOINT, "--finetune"), layout={"tp": 2}),
    "window by flags": Case(
        model="window",
        layout={"tp": 2, "pp": 2},
        saves=("--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", "49"),
    ),
    "tied by flags": Case(model="tied", written={"iteration": 7}, layout={"pp": 2}, saves=()),
    "yarn by flags": Case(model="yarn", layout={"tp": 2, "pp": 2}, saves=()),
    "yarn-mscale by flags": Case(
        model="yarn-mscale", saves=("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "anywhere")
    ),
    "hybrid": Case(
        model="window",
        written={"iteration": 3},
        layout={"tp": 2, "pp": 2},
        saves=("--hybrid-layer-pattern", "*-|*-"),
    ),
    "hybrid, tied": Case(model="tied", layout={"pp": 2}, saves=("--hybrid-layer-pattern", "*-|*-")),
    "hybrid mixtral": Case(
        model="mixtral", layout={"tp": 2, "ep": 2, "etp": 1}, saves=("--hybrid-layer-pattern", "*E*E*E*E")
    ),
    "window with a record": Case(model="window", layout={"tp": 2, "pp": 2}, saves=(), has_record=True),
    "mixtral": Case(model="mixtral", written={"tp": 2, "ep": 2}, flags=BY_CHECKPOINT, layout={"ep": 4}),
    "mixtral by flags": Case(model="mixtral", layout={"tp": 2, "pp": 2, "ep": 2, "etp": 1}, saves=()),
    "ministral by flags": Case(model="ministral", layout={"tp": 2}, saves=()),
    "mistral4": Case(model="mistral4", written={"ep": 2}, flags=(*BY_CHECKPOINT, *NOT_BY_CHECKPOINT), layout={"ep": 2}),
    "mistral4 by flags": Case(
        model="mistral4",
        layout={"tp": 2, "ep": 4, "etp": 1},
        more={"original_max_position_embeddings": 16},
        saves=(),
    ),
}
#: Cases that Megatron-LM builds as a HybridModel, in which attention and MLP are layers of their own.
HYBRID = [name for name, case in CASES.items() if "--hybrid-layer-pattern" in (case.saves or ())]
SAVED = [name for name, case in CASES.items() if case.saves is not None and not case.has_record]


def layout_of(case: Case) -> ParallelLayout:
    """The layout of four ranks that Megatron-LM loads a case with."""
    return ParallelLayout(**case.layout, dp=4 // (case.layout.get("tp", 1) * case.layout.get("pp", 1)))


def described_model(folder: Path, **sizes: object) -> Path:
    """A directory with nothing but a config.json, as transformers writes it."""
    AutoConfig.for_model(**{"model_type": "mistral", **deepcopy(sizes)}, dtype="bfloat16").save_pretrained(folder)
    return folder


def unscaled(config: MistralConfig) -> MistralConfig:
    """What Megatron makes of a model: it does not scale queries by position, and Ministral 3 is Mistral then."""
    model_type = "mistral" if config.model_type == "ministral3" else config.model_type
    return replace(config, llama_4_scaling_beta=None, model_type=model_type)


@dataclass(frozen=True, kw_only=True)
class Results:
    """The models, what Megatron-LM said on each rank, and where it saved."""

    hf: dict[str, Path]
    ranks: list[dict[str, Any]]
    saved: Path
    run_configs: Path
    saying: Path
    parsed: dict[str, Path]


@pytest.fixture(scope="module")
def results(launch_megatron_lm: LaunchRanks, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Write every case, and let Megatron-LM load, save and parse."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    hf = {name: saved(random_model(**MODELS[name]), folder / "hf" / name) for name in MODELS}
    hf |= {name: saved(family_model(name), folder / "hf" / name) for name in FAMILY}
    jobs: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        root = folder / name
        from_hf(hf[case.model], root, **case.written)  # type: ignore[arg-type]  # these are all int
        layout = layout_of(case)
        by_checkpoint = ["--load", str(root), "--tensor-model-parallel-size", str(layout.tp)]
        by_checkpoint += ["--pipeline-model-parallel-size", str(layout.pp)]
        by_checkpoint += ["--expert-model-parallel-size", str(layout.ep), *(case.flags or ())]
        flags = megatron_args(root, layout=layout).flags if case.flags is None else by_checkpoint
        config = json.loads((hf[case.model] / "config.json").read_text())
        job = {"task": "load", "flags": [*flags, *(case.saves or ())], "more": case.more}
        job |= {"config": config, "hf": str(hf[case.model])}
        jobs[name] = job | ({} if case.saves is None else {"save": str(folder / "saved" / name)})
        if case.has_record:
            jobs[name]["defaults"] = hf_content_metadata(MistralConfig.from_hf(hf[case.model]), hf[case.model])
    parsed = {name: described_model(folder / "described" / name, **sizes) for name, sizes in RELEASED.items()}
    for name in RELEASED:
        layout = ParallelLayout(tp=4)
        jobs[f"parse {name}"] = {"task": "parse", "flags": megatron_args(parsed[name], layout=layout).flags, "more": {}}
    for name, path in hf.items():
        experts: dict[str, Any] = {"ep": 2, "etp": 1} if name in WITH_EXPERTS else {}
        told = {
            "flags": megatron_args(path, layout=ParallelLayout(tp=2, dp=2, **experts)).flags,
            "more": {"original_max_position_embeddings": 16} if name.startswith("mistral4") else {},
        }
        jobs[f"parse {name}"] = {"task": "parse", **told}
        jobs[f"dump {name}"] = {"task": "dump_run_configs", **told, "to": str(folder / "run_configs" / name)}
    for name in SAYING:
        where, root = folder / "saying" / name, folder / "said" / name
        from_hf(saved(family_model(name, torch.float32, rms_norm_eps=1e-6), where), root)
        jobs[f"say {name}"] = {
            "task": "say",
            "flags": megatron_args(root).flags,
            "more": {"original_max_position_embeddings": 16} if name.startswith("mistral4") else {},
            "config": json.loads((where / "config.json").read_text()),
            "tokens": PROMPT,
        }
    four = described_model(folder / "four", **RELEASED["Mistral-Nemo-2407"] | {"num_hidden_layers": 4})
    for name, (fields, _) in LAYOUTS.items():
        jobs[f"lay out {name}"] = {
            "task": "parse",
            "flags": megatron_args(four, layout=ParallelLayout(**fields)).flags,
            "more": {},
        }
    return Results(
        hf=hf,
        ranks=launch_megatron_lm(4, jobs),
        saved=folder / "saved",
        run_configs=folder / "run_configs",
        saying=folder / "saying",
        parsed=parsed | hf,
    )


@pytest.mark.parametrize("name", CASES)
def test_megatron_lm_loads_what_from_hf_wrote(name: str, results: Results) -> None:
    """Every parameter of the model that Megatron-LM's own arguments describe holds its Hugging Face values."""
    case = CASES[name]
    told = [rank[name] for rank in results.ranks]
    assert [each["differences"] for each in told] == [[]] * 4
    finetunes = case.flags is None or "--finetune" in case.flags
    assert {each["iteration"] for each in told} == {0 if finetunes else case.written.get("iteration", 0)}


@pytest.mark.parametrize("name", [name for name in CASES if name not in HYBRID])
def test_models_of_megatron_lm_are_filled(name: str, results: Results) -> None:
    """``load_weights`` gives every parameter of the same GPTModels its Hugging Face values, straight from the files."""
    assert [rank[name]["wrongly_filled"] for rank in results.ranks] == [[]] * 4


def test_what_slimes_import_leaves(results: Results, tmp_path: Path) -> None:
    """Slime's HF -> torch_dist tool has Megatron-LM save an iteration, and moves that to a release.

    tools/convert_hf_to_torch_dist.py, 2026-08: with these lines, and Megatron-LM's ``save_checkpoint`` before them.
    """
    name = "window by flags"
    root = shutil.copytree(results.saved / name, tmp_path / "slime")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    shutil.move(root / "iter_0000011", root / "release")
    done = to_hf(root, tmp_path / "hf")
    assert done.config_from == "the args inside the checkpoint"
    original = load_file(results.hf[CASES[name].model] / "model.safetensors")
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(original)
    assert run("inspect", root).code == run("verify", root).code == run("verify", root, tmp_path / "hf").code == 0


@pytest.mark.parametrize("name", [name for name in CASES if name not in HYBRID])
def test_models_of_megatron_lm_are_exported(name: str, results: Results) -> None:
    """``export_weights`` streams the same GPTModels to the first rank: every tensor of the files, bit for bit."""
    told = [rank[name] for rank in results.ranks]
    names = sorted(load_file(results.hf[CASES[name].model] / "model.safetensors"))
    assert [each["exported"] for each in told] == [names, [], [], []]
    assert told[0]["wrongly_exported"] == []


@pytest.mark.parametrize("name", HYBRID)
def test_what_a_hybrid_model_saved_is_verified_and_resharded(
    name: str, results: Results, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights equal the Hugging Face model's, and a copy with other chunks stores the same under the same keys.

    The flags for pretrain_gpt.py come with the warning that it cannot load them.
    """
    megatron_args(results.saved / name)
    assert "holds a HybridModel" in caplog.text
    assert compare(results.saved / name, results.hf[CASES[name].model]).is_equal
    reshard(results.saved / name, tmp_path / "copy", layout=ParallelLayout(tp=2))
    assert compare_stored(results.saved / name, tmp_path / "copy").is_equal


@pytest.mark.parametrize("name", [name for name in HYBRID if CASES[name].model not in WITH_EXPERTS])
def test_megatron_reads_a_hybrid_model_into_gpt_entries(name: str, results: Results) -> None:
    """Entries of a GPTModel in this style are found by Megatron's own loading, which reads what the plan announces.

    With experts the norm before them has another key in the local layer spec, as in every save of another spec.
    """
    layout = ParallelLayout(tp=2, pp=2)
    directory, config = results.saved / name / "iter_0000011", results.hf[CASES[name].model]
    for told in plan_reading(directory, layout, config=config).to_json()["ranks"]:
        theirs = reads_of_rank(directory, MistralConfig.from_hf(config), layout, told["rank"], KeyStyle.HYBRID)
        assert told["weights"] == theirs


@pytest.mark.parametrize("name", SAVED)
def test_what_megatron_lm_saved_exports_by_itself(name: str, results: Results, tmp_path: Path) -> None:
    """Without any other file: all tensors bit for bit, and a config.json in which transformers reads the same model."""
    done = to_hf(results.saved / name, tmp_path / "hf")
    assert done.config_from == "the args inside the checkpoint"
    original = results.hf[CASES[name].model]
    tensors, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", original))
    assert described(tensors) == described(expected)
    theirs, ours = (AutoConfig.from_pretrained(path) for path in (original, tmp_path / "hf"))
    names = theirs.to_dict().keys() - {"rope_parameters", "_name_or_path", "transformers_version", "use_cache"}
    assert {each: getattr(ours, each) for each in names} == {each: getattr(theirs, each) for each in names}
    rope = {key: value for key, value in theirs.rope_parameters.items() if value is not None}
    rope.pop("llama_4_scaling_beta", None)  # Megatron has none
    assert rope.items() <= ours.rope_parameters.items()
    assert MistralConfig.from_hf(tmp_path / "hf") == unscaled(MistralConfig.from_hf(original))


def test_a_record_in_args_defaults_travels_in_every_save(results: Results, tmp_path: Path) -> None:
    """What Megatron-LM saved with the record among its args exports to the original files, byte for byte."""
    [name] = [name for name, case in CASES.items() if case.has_record]
    done = to_hf(results.saved / name, tmp_path / "hf")
    assert done.config_from == "the Hugging Face configuration inside the args in the checkpoint"
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / file).read_bytes() == (results.hf[CASES[name].model] / file).read_bytes()


@pytest.mark.parametrize("name", [*RELEASED, *MODELS])
def test_flags_mean_the_model_to_megatrons_own_parser(name: str, results: Results) -> None:
    """Parsed, checked and made into a TransformerConfig by Megatron-LM, every size is the one transformers reads."""
    theirs = AutoConfig.from_pretrained(results.parsed[name])
    tp = 4 if name in RELEASED else 2
    rope, window = theirs.rope_parameters, getattr(theirs, "sliding_window", None)
    has_yarn = rope["rope_type"] == "yarn" and theirs.model_type != "mistral4"
    expected = {
        "num_layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "ffn_hidden_size": theirs.intermediate_size,
        "num_attention_heads": theirs.num_attention_heads,
        "num_query_groups": theirs.num_key_value_heads,
        "kv_channels": theirs.head_dim,
        "layernorm_epsilon": theirs.rms_norm_eps,
        "window_size": None if window is None else [window - 1, 0],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_base": rope["rope_theta"],
        "rotary_percent": 1.0,
        "max_position_embeddings": theirs.max_position_embeddings,
        "seq_length": theirs.max_position_embeddings,
        "vocab_size": theirs.vocab_size,
        "make_vocab_size_divisible_by": 128,
        "padded_vocab_size": -(-theirs.vocab_size // (128 * tp)) * 128 * tp,
        "untie_embeddings_and_output_weights": not theirs.tie_word_embeddings,
        "params_dtype": str(theirs.dtype),
        "ckpt_format": "torch_dist",
        "position_embedding_type": "yarn" if has_yarn else "rope",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
    }
    if has_yarn:
        expected |= {
            "yarn_rotary_scaling_factor": rope["factor"],
            "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
            "yarn_beta_fast": rope.get("beta_fast") or 32.0,
            "yarn_beta_slow": rope.get("beta_slow") or 1.0,
            "yarn_mscale": rope.get("mscale") or 1.0,
            "yarn_mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
            "yarn_correction_range_round_to_int": rope.get("truncate", True),
        }
    for rank in results.ranks:
        told = rank[f"parse {name}"]
        assert {key: told[key] for key in expected} == expected


@pytest.mark.parametrize("name", [*MODELS, *FAMILY])
@pytest.mark.parametrize("form", ["nested", "flat"])
def test_run_configs_from_megatrons_own_serializer(form: str, name: str, results: Results) -> None:
    """The model section that Megatron serializes, all fields in it, gives the configuration that transformers wrote."""
    path = results.run_configs / name / f"{form}.yaml"
    read = from_run_config(documents.read_yaml(path), str(path))
    assert read == unscaled(MistralConfig.from_hf(results.hf[name]))


@pytest.mark.parametrize("name", PARTS)
def test_flags_mean_experts_windows_and_latents_to_megatrons_own_parser(name: str, results: Results) -> None:
    """What the model has besides a dense Mistral's parts, Megatron's TransformerConfig says too."""
    for rank in results.ranks:
        told = rank[f"parse {name}"]
        assert {key: told[key] for key in PARTS[name]} == PARTS[name]


@pytest.mark.parametrize("name", SAYING)
def test_flags_mean_the_same_function(name: str, results: Results) -> None:
    """A model that Megatron-LM's own arguments describe says what transformers says, as far as it can."""
    model = model_class(AutoConfig.from_pretrained(results.saying / name)).from_pretrained(results.saying / name)
    with torch.no_grad():
        expected = model.float().eval()(torch.tensor([PROMPT])).logits[0]
    for rank in results.ranks:
        assert torch.allclose(torch.tensor(rank[f"say {name}"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_flags_mean_the_layout_to_megatrons_own_parser(name: str, results: Results) -> None:
    """Interleaved, uneven and custom pipelines: Megatron-LM's TransformerConfig says what was asked for."""
    told = results.ranks[0][f"lay out {name}"]
    assert {key: told[key] for key in LAYOUTS[name][1]} == LAYOUTS[name][1]

"""Models and inference on the Megatron side, in one process, against transformers: logits and tokens."""

from __future__ import annotations

import importlib
import json
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from family_models import model_class
from genuine import folder, shards, truth
from safetensors.torch import save_file
from small_models import MODELS, PROMPT, VOCABULARY, small_model
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import ConfigError, LayoutError, OutputError, TensorMismatchError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOLERANCE = 1e-4
NEW_TOKENS = 20
#: Genuine checkpoints of all generations, key styles and layouts.
GENUINE = [
    *("td_0123", "td_0192", "tied_tp2pp2_0161", "vpp_0161", "nonhomog_0192", "singleton_0161", "opt_fsms_0140"),
    *("moe_seq_0192", "moe_grouped_0161", "te_moe_0192", "mlm_moe_0192", "mistral4_0192"),
]

#: What transformers wants safetensors files to say.
_FORMAT = {"format": "pt"}

#: megatron warns of much that is not ours to mend.
pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def megatron() -> Iterator[SimpleNamespace]:
    """The functions under test; what they set up in this process is taken down again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = {
            name: importlib.import_module(f"dist_ckpt_mistral.megatron.{name}")
            for name in ("build_model", "load_model", "load_weights", "generate", "runtime")
        }
        state = importlib.import_module("megatron.core.parallel_state")
    yield SimpleNamespace(
        build_model=modules["build_model"].build_model,
        load_model=modules["load_model"].load_model,
        load_weights=modules["load_weights"].load_weights,
        filling=modules["load_weights"],
        forward=modules["generate"].forward,
        generate=modules["generate"].generate,
        initialize_megatron=modules["runtime"].initialize_megatron,
        parallel_state=state,
    )
    state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Every model as a Hugging Face directory and as a checkpoint, cut for two ranks and two stages."""
    root = tmp_path_factory.mktemp("models")
    places = {}
    for number, name in enumerate(MODELS):
        hf, checkpoint = root / f"hf{number}", root / f"ckpt{number}"
        small_model(name).save_pretrained(hf)
        dcm.from_hf(hf, checkpoint, tp=2, pp=2)
        places[name] = {"hf": hf, "checkpoint": checkpoint}
    return places


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", ["hf", "checkpoint"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, kind: str, saved: dict[str, dict[str, Path]], megatron: SimpleNamespace
) -> None:
    """A model that Megatron runs says what transformers says, from either kind of files, called as Megatron's are."""
    with torch.no_grad():
        expected = small_model(name)(PROMPT).logits
        model = megatron.load_model(saved[name][kind], device="cpu")
        positions = torch.arange(PROMPT.shape[1])[None]
        actual = model(PROMPT, positions, None)
    assert difference(actual[..., :VOCABULARY], expected) <= TOLERANCE
    assert expected.abs().max() > 1  # which is much more than the tolerance


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(
    name: str, saved: dict[str, dict[str, Path]], megatron: SimpleNamespace
) -> None:
    """Token after token, with keys and values kept, Megatron writes what transformers' generate writes."""
    their = small_model(name).generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    model = megatron.load_model(saved[name]["hf"], device="cpu")
    ours = megatron.generate(model, PROMPT[0].tolist(), vocab_size=VOCABULARY, max_new_tokens=NEW_TOKENS)
    assert list(ours) == their[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("case", [*GENUINE, "zarr_ckpt", "moe_zarr_0153"])
def test_genuine_checkpoints_run(case: str, tmp_path: Path, megatron: SimpleNamespace) -> None:
    """What Megatron of any generation saved runs, and says what transformers says with the true tensors."""
    config = AutoConfig.from_pretrained(folder(case))
    save_file({name: tensor.float() for name, tensor in truth(case).items()}, tmp_path / "model.safetensors", _FORMAT)
    config.save_pretrained(tmp_path)
    model, found = model_class(config).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values())
    tokens = PROMPT.clamp(max=config.vocab_size - 1)
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    ours = megatron.load_model(shards(case), config=folder(case), dtype=torch.float32, device="cpu")
    actual = megatron.forward(ours, tokens, vocab_size=config.vocab_size)
    assert difference(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["tied", "mixtral", "mistral4"])
def test_a_live_model_is_filled_in_place(
    name: str, saved: dict[str, dict[str, Path]], megatron: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with random weights then says what transformers says; its parameters stay where they were.

    So it does if they are filled through little memory, as those on a GPU are.
    """
    with torch.no_grad():
        expected = small_model(name)(PROMPT).logits
    config = dcm.MistralConfig.from_hf(saved[name]["hf"])
    for through_staging in (False, True):
        if through_staging:
            monkeypatch.setattr(megatron.filling, "_is_host_array", lambda _: False)
            monkeypatch.setattr(megatron.filling, "_STAGING_BYTES", 1000)
        model = megatron.build_model(config, dtype=torch.float32, device="cpu")
        model.embedding.word_embeddings.weight.data.fill_(torch.nan)
        places = [parameter.data_ptr() for parameter in model.parameters()]
        assert megatron.load_weights(model, saved[name]["hf"]) is model
        assert [parameter.data_ptr() for parameter in model.parameters()] == places
        with torch.no_grad():
            actual = model(PROMPT, torch.arange(PROMPT.shape[1])[None], None)
        assert difference(actual[..., :VOCABULARY], expected) <= TOLERANCE
        assert not model.embedding.word_embeddings.weight[VOCABULARY:].any()


def test_weights_that_a_live_model_cannot_hold(
    saved: dict[str, dict[str, Path]], tmp_path: Path, megatron: SimpleNamespace
) -> None:
    """What its dtype destroys, is refused by name, and what its parameters do not hold, before a value is written."""
    path = saved["full attention"]["hf"]
    config = dcm.MistralConfig.from_hf(path)
    large = small_model("full attention")
    with torch.no_grad():
        large.model.norm.weight[:2] = 1e10
    large.save_pretrained(tmp_path)
    model = megatron.build_model(config, dtype=torch.float16, device="cpu")
    with pytest.raises(OutputError, match=r"model\.norm\.weight: 2 become infinite.*fill the model again"):
        megatron.load_weights(model, tmp_path)
    assert megatron.load_weights(model, tmp_path, allow_lossy=True).decoder.final_layernorm.weight.isinf().sum() == 2
    model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(TensorMismatchError, match="unknown tensor 'adapter'"):
        megatron.load_weights(model, path)
    tied = megatron.build_model(dcm.MistralConfig.from_hf(saved["tied"]["hf"]), dtype=torch.float32, device="cpu")
    with pytest.raises(TensorMismatchError, match="the model ties embedding and output layer, the weights do not"):
        megatron.load_weights(tied, path)
    odd = megatron.build_model(config, dtype=torch.float32, device="cpu").double()
    with pytest.raises(TensorMismatchError, match=r"parameter 'output_layer\.weight' has dtype float64"):
        megatron.load_weights(odd, path)
    with pytest.raises(ConfigError, match="expected a GPTModel, or a list of them, got Linear"):
        megatron.load_weights(torch.nn.Linear(1, 1), path)


def test_weights_are_converted_and_padding_is_zero(
    saved: dict[str, dict[str, Path]], megatron: SimpleNamespace
) -> None:
    """A dtype rounds as torch does; vocabulary padding, here of any size, holds zeros."""
    words = small_model("full attention").state_dict()["model.embed_tokens.weight"]
    for dtype, rows, options in (
        (torch.float32, 384, {}),
        (torch.bfloat16, 260, {"dtype": "bfloat16", "padded_vocab_size": 260}),
        (torch.float16, 259, {"dtype": torch.float16, "padded_vocab_size": 259}),
    ):
        model = megatron.load_model(saved["full attention"]["checkpoint"], device="cpu", **options)
        found = model.embedding.word_embeddings.weight.detach()
        assert (found.dtype, len(found)) == (dtype, rows)
        assert found[:VOCABULARY].equal(words.to(dtype))
        assert not found[VOCABULARY:].any()


def test_several_dtypes_need_a_choice(tmp_path: Path, megatron: SimpleNamespace) -> None:
    """Weights of several dtypes are not rounded unasked; with a dtype they load, even within one tensor of Megatron."""
    model = small_model("full attention").bfloat16()
    model.model.norm.float()
    model.model.layers[1].self_attn.k_proj.float()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"several dtypes: bfloat16, float32\. Give dtype"):
        megatron.load_model(tmp_path, device="cpu")
    assert megatron.load_model(tmp_path, device="cpu", dtype=torch.float32).config.params_dtype is torch.float32


def test_destroyed_values_need_a_word(tmp_path: Path, megatron: SimpleNamespace) -> None:
    """A dtype that destroys values is refused by the tensor's name, unless that is allowed."""
    model = small_model("full attention").bfloat16()
    with torch.no_grad():
        model.model.norm.weight[:3] = torch.tensor([1e10, -1e5, 1e-20])
    model.save_pretrained(tmp_path)
    with pytest.raises(OutputError, match=r"cannot hold: model\.norm\.weight: 2 become infinite, 1 become zero"):
        megatron.load_model(tmp_path, device="cpu", dtype="float16")
    loaded = megatron.load_model(tmp_path, device="cpu", dtype="float16", allow_lossy=True)
    assert loaded.decoder.final_layernorm.weight.equal(model.model.norm.weight.half())


def test_a_new_model_is_random_and_trains(megatron: SimpleNamespace) -> None:
    """build_model draws weights, takes further settings of Megatron's, and gives losses and gradients on a CPU."""
    config = dcm.MistralConfig.from_hf(small_model("sliding window").config.to_dict())
    model = megatron.build_model(
        config,
        dtype=torch.float32,
        device="cpu",
        transformer_config={"attention_dropout": 0.1, "init_method_std": 0.05},
    )
    assert (model.config.attention_dropout, model.config.window_size) == (0.1, (4, 0))
    assert model.decoder.layers[0].mlp.linear_fc1.weight.std().item() == pytest.approx(0.05, rel=0.1)
    positions = torch.arange(PROMPT.shape[1])[None]
    model(PROMPT, positions, None, labels=PROMPT.roll(-1, 1)).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["full attention", "mixtral", "mistral4"])
def test_a_loaded_model_can_be_trained(name: str, megatron: SimpleNamespace, saved: dict[str, dict[str, Path]]) -> None:
    """Loaded weights bear the marks by which Megatron counts gradients, as those do that it initializes itself."""
    path = saved[name]["hf"]
    fresh = megatron.build_model(dcm.MistralConfig.from_hf(path), dtype=torch.float32, device="cpu")
    marks = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce", "sequence_parallel")

    def marked(model: torch.nn.Module) -> dict[str, list[Any]]:
        return {name: [getattr(each, mark, None) for mark in marks] for name, each in model.named_parameters()}

    first = marked(fresh)["decoder.layers.0.self_attention.linear_proj.weight"]
    assert first[:4] == [True, 1, 1, True]
    assert marked(megatron.load_model(path, device="cpu")) == marked(fresh)


def test_what_does_not_fit_is_refused(megatron: SimpleNamespace, saved: dict[str, dict[str, Path]]) -> None:
    """Layouts that do not fit the ranks or what is set up, settings and models that Megatron does not know: by name."""
    path = saved["full attention"]["hf"]
    config = dcm.MistralConfig.from_hf(path)
    with pytest.raises(
        LayoutError, match=r"expected 4 .tp=2 x pp=2 x cp=1 x dp=1., got 1.*torchrun --nproc-per-node 4"
    ):
        megatron.load_model(path, layout=dcm.ParallelLayout(tp=2, pp=2), device="cpu")
    with pytest.raises(LayoutError, match="num_attention_heads=4 is not divisible by tp=3"):
        megatron.build_model(config, dcm.ParallelLayout(tp=3), device="cpu")
    with pytest.raises(ConfigError, match="TransformerConfig has no colour"):
        megatron.build_model(config, device="cpu", transformer_config={"colour": "red"})
    other = {"num_layers": 1, "num_moe_experts": 2, "tensor_model_parallel_size": 2, "attention_dropout": 0.1}
    told = (
        r"another .*: num_layers=1 where it is \d, num_moe_experts=2 where it is None, tensor_.*=2 where it is 1\. Give"
    )
    with pytest.raises(ConfigError, match=told):
        megatron.build_model(config, device="cpu", transformer_config=other)
    odd = dcm.MistralConfig.from_hf(config.to_hf() | {"head_dim": 7})
    with pytest.raises(UnsupportedModelError, match="head_dim=7"):
        megatron.build_model(odd, device="cpu")
    silent = dcm.MistralConfig.from_hf({name: value for name, value in config.to_hf().items() if "dtype" not in name})
    with pytest.raises(ConfigError, match="no dtype"):
        megatron.build_model(silent, device="cpu")
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported"):
        megatron.load_model(path, device="cpu", dtype=torch.int8)
    megatron.initialize_megatron(dcm.ParallelLayout(), device="cpu")
    megatron.parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    try:
        with pytest.raises(LayoutError, match=r"vpp: expected 1, got 2\. Give the layout that it has"):
            megatron.build_model(config, device="cpu")
    finally:
        megatron.parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mistral4", {"q_lora_rank": None}, "Megatron then puts a norm before the query projection"),
        ("mistral4", {"qk_rope_head_dim": 3, "qk_nope_head_dim": 7}, "qk_rope_head_dim=3"),
        ("mistral4", {"num_experts_per_tok": 1}, "one expert per token with a probability of 1"),
        ("mistral4", {"n_group": 2}, "chooses groups in the same way only if normalized=False"),
        ("mistral4, groups", {"num_experts_per_tok": 1}, "experts_per_token // groups_per_token is 2"),
        ("mistral4", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta=0.1 without YaRN"),
        ("mistral4", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate=False"),
    ],
)
def test_models_that_megatron_cannot_express(
    name: str, changes: dict[str, Any], reason: str, megatron: SimpleNamespace
) -> None:
    """What Megatron would compute otherwise than transformers is not run: it is named."""
    config = small_model(name).config.to_dict()
    rope = changes.get("rope_parameters")
    if rope is None:
        config["rope_parameters"].pop("partial_rotary_factor", None)
    config = dcm.MistralConfig.from_hf(config | {"dtype": "float32"} | changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        megatron.build_model(config, device="cpu")


@pytest.mark.parametrize("name", ["mixtral", "mistral4"])
def test_experts_train(name: str, megatron: SimpleNamespace) -> None:
    """Every parameter of a new model with experts gets a gradient, routers and latents included."""
    config = dcm.MistralConfig.from_hf(small_model(name).config.to_dict())
    model = megatron.build_model(config, dtype=torch.float32, device="cpu")
    model(PROMPT, torch.arange(PROMPT.shape[1])[None], None, labels=PROMPT.roll(-1, 1)).mean().backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_a_tied_model_with_two_heads_is_refused(tmp_path: Path, megatron: SimpleNamespace) -> None:
    """A file that holds other values for a tied head than for the embedding leaves open which are meant."""
    model = small_model("full attention")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(TensorMismatchError, match=r"differs from 'model\.embed_tokens\.weight'"):
        megatron.load_model(tmp_path, device="cpu")


def test_generation_stops_where_it_should(saved: dict[str, dict[str, Path]], megatron: SimpleNamespace) -> None:
    """Any stop token ends a text and belongs to it; none is asked for beyond the limit; odd prompts are refused."""
    model = megatron.load_model(saved["tied"]["hf"], device="cpu")

    def tokens(prompt: list[int], count: int, **options: Any) -> list[int]:  # noqa: ANN401
        return list(megatron.generate(model, prompt, vocab_size=VOCABULARY, max_new_tokens=count, **options))

    free = tokens([1, 70, 80], 12)
    stop = free[4]
    assert tokens([1, 70, 80], 12, stop_tokens={stop, 0}) == free[: free.index(stop) + 1]
    assert tokens([1, 70, 80], 3) == free[:3]
    for prompt in ([], [VOCABULARY], [-1]):
        with pytest.raises(ConfigError, match=f"tokens of 0 to {VOCABULARY - 1}"):
            tokens(prompt, 1)


def test_training_goes_on_after_a_text(saved: dict[str, dict[str, Path]], megatron: SimpleNamespace) -> None:
    """Modules are in evaluation mode while a text is written only: then each is as before, also when it breaks off."""
    model = megatron.load_model(saved["tied"]["hf"], device="cpu")
    model.decoder.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert True in before
    assert False in before

    def broken(*_: torch.Tensor) -> int:
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError

    list(megatron.generate(model, [1], vocab_size=VOCABULARY, max_new_tokens=2))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError):
        list(megatron.generate(model, [1], vocab_size=VOCABULARY, max_new_tokens=2, choose=broken))
    assert [module.training for module in model.modules()] == before


def test_the_cpu_stands_in_for_cuda_only_within(megatron: SimpleNamespace, saved: dict[str, dict[str, Path]]) -> None:
    """After a forward pass on a CPU torch answers as before: nothing of the disguise stays."""
    before = (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda)
    model = megatron.load_model(saved["yarn"]["hf"], device="cpu")
    with torch.no_grad():
        model(PROMPT, torch.arange(PROMPT.shape[1])[None], None)
    assert (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the model is to run on one")
def test_models_run_on_cuda(saved: dict[str, dict[str, Path]], megatron: SimpleNamespace) -> None:
    """On a GPU, where models go by default, greedy tokens are those of transformers on a CPU."""
    for name, places in saved.items():
        their = small_model(name).generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        model = megatron.load_model(places["hf"])
        assert all(parameter.is_cuda for parameter in model.parameters())
        ours = megatron.generate(model, PROMPT[0].tolist(), vocab_size=VOCABULARY, max_new_tokens=NEW_TOKENS)
        assert list(ours) == their[0, PROMPT.shape[1] :].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the parameters are to be on one")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_on_cuda_are_filled_in_place(
    dtype: torch.dtype, saved: dict[str, dict[str, Path]], megatron: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, with a process group of nccl and little pinned memory, parameters are those of a model on the CPU."""
    monkeypatch.setattr(megatron.filling, "_STAGING_BYTES", 5000)
    for places in saved.values():
        config = dcm.MistralConfig.from_hf(places["hf"])
        model = megatron.build_model(config, dtype=dtype, device="cuda")
        before = [parameter.data_ptr() for parameter in model.parameters()]
        megatron.load_weights(model, places["hf"])
        assert [parameter.data_ptr() for parameter in model.parameters()] == before
        expected = megatron.load_model(places["checkpoint"], dtype=dtype, device="cpu").state_dict()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.detach().cpu(), expected[name])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="needs a GPU: the tensors are to stay on one"
            ),
        ),
    ],
)
def test_exported_weights_stay_on_the_device(
    device: str, saved: dict[str, dict[str, Path]], megatron: SimpleNamespace
) -> None:
    """What a live model gives out is on its device, and is what its Hugging Face files hold, all of it."""
    for places in saved.values():
        config = dcm.MistralConfig.from_hf(places["hf"])
        model = megatron.load_model(places["hf"], device=device)
        with dcm.open_checkpoint(places["hf"]) as expected:
            names = []
            for name, tensor in dcm.export_weights(model, config):
                names.append(name)
                assert tensor.device.type == device
                assert torch.equal(tensor.cpu(), expected[name])
            assert {*names} == {*expected}

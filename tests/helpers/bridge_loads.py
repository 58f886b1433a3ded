"""Load a checkpoint root with Megatron-Bridge, without CUDA: ``python bridge_loads.py HF ROOT OUT``.

``AutoBridge`` opens ROOT and exports its model to OUT, a safetensors file; nothing of the package has a part in it.
Stand-ins take the place of what Bridge imports and loading does not use, and of those layers of Transformer Engine
whose parameters Bridge knows by name: they hold weights, and compute nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron_lm_ranks import _CudaIsCpu, _pretend_more_cuda
from safetensors.torch import save_file

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

#: What Bridge 0.6.2 imports at once. Megatron is imported above, so that it knows that Transformer Engine is absent.
_ABSENT: Final = (
    *("transformer_engine", "transformer_engine_torch", "wandb", "nvidia_resiliency_ext", "flashinfer", "mlflow"),
    *("comet_ml", "causal_conv1d", "mamba_ssm", "fla", "qwen_vl_utils", "fast_hadamard_transform", "diffusers"),
    *("modelopt", "nvtx", "torchvision", "decord", "open_clip", "nv_one_logger", "timm", "peft"),
    *("megatron.energon", "webdataset", "datasets", "tensorboard"),
)


class _AnyClass(type):
    """A class whose every attribute is a class like it."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {"__init__": lambda *_, **__: None})


class _Module(types.ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # noqa: RUF012  (what makes it a package)
    __version__ = "2.9.0"
    __file__ = "stand-in"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "Version":
            raise AttributeError(name)
        return _AnyClass(name, (), {"__init__": lambda *_, **__: None})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is absent, and nothing else."""

    def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """Say where a module is from."""
        absent = f"{fullname}.".startswith(tuple(f"{name}." for name in _ABSENT))
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make it."""
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it as it is."""


class TELayerNormColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]  # megatron is untyped
    """A norm and the matrix behind it, by Transformer Engine's names; Bridge looks for this name of a class."""

    def __init__(self, *args: Any, name: object = None, **options: Any) -> None:  # noqa: ANN401, ARG002
        """Have a norm besides."""
        super().__init__(*args, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(args[0], dtype=self.config.params_dtype))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Sequence[Any] = (), **_: object) -> Any:  # noqa: ANN401
        """Cut the matrix, and not the norm."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def _spec(config: object) -> ModuleSpec:
    """What ``default_layer_spec`` gives with Transformer Engine, for a model without experts."""
    del config
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.sharded_state_dict_keys_map = {}
    layer.self_attention.submodules.linear_qkv = TELayerNormColumnParallelLinear
    mlp = layer.mlp.keywords["submodules"] if hasattr(layer.mlp, "keywords") else layer.mlp.submodules
    mlp.linear_fc1 = TELayerNormColumnParallelLinear
    return spec


def main(hf: str, root: str, out: str) -> None:
    """Load, and write what was loaded."""
    _pretend_more_cuda()
    sys.meta_path.append(_StandIns())
    with _CudaIsCpu():
        from megatron.bridge import AutoBridge  # noqa: PLC0415  (behind the stand-ins)
        from megatron.bridge.models import gpt_provider  # noqa: PLC0415
        from megatron.bridge.training.model_load_save import temporary_distributed_context  # noqa: PLC0415

        gpt_provider.default_layer_spec = _spec
        bridge = AutoBridge.from_hf_pretrained(hf)
        with temporary_distributed_context("gloo"):
            model = bridge.load_megatron_model(root, wrap_with_ddp=False)
            weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
            save_file({name: tensor.contiguous().clone() for name, tensor in weights}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

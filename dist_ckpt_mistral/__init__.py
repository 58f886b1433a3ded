"""Mistral checkpoints between Megatron's distributed format and Hugging Face.

    import dist_ckpt_mistral as dcm

    dcm.from_hf("hf_dir", "ckpt")                      # Hugging Face -> Megatron torch_dist
    dcm.to_hf("ckpt", "out")                           # and back, byte for byte
    with dcm.open_checkpoint("ckpt") as checkpoint:    # lazy reading by Hugging Face name
        q = checkpoint["model.layers.0.self_attn.q_proj.weight"]

    config = dcm.MistralConfig.from_hf("hf_dir")       # in training, with Megatron
    state = dcm.sharded_state_dict(config, dcm.ParallelLayout(tp=2, pp=4), rank=3)
    model = dcm.load_model("ckpt", layout=dcm.ParallelLayout(tp=2, pp=4))  # this rank's GPTModel, under torchrun

``__init__.pyi`` lists all public names. Each is imported on first use: importing the package is fast and imports
neither Megatron nor torch.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a module attribute of any kind)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_ckpt_mistral import libraries  # noqa: PLC0415  (importing the package must be fast)

    with libraries.needed(f"{__name__}.{name}", extra="megatron"):
        return _attribute(name)

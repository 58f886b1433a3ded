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

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def _stub() -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return lazy_loader's ``__getattr__`` and ``__dir__``, and the public names, all from the stub."""
    import lazy_loader  # noqa: PLC0415  (parses the stub with ast; the command line needs no public name)

    return lazy_loader.attach_stub(__name__, __file__)


def __dir__() -> list[str]:
    return _stub()[1]()


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a module attribute of any kind)
    attribute, _, public_names = _stub()
    if name == "__all__":
        return public_names
    if name not in public_names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_ckpt_mistral import libraries  # noqa: PLC0415  (importing the package must be fast)

    with libraries.needed(f"{__name__}.{name}", extra="megatron"):
        return attribute(name)

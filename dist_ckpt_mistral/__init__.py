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
neither Megatron nor torch. ``dir`` and ``help`` leave out those whose libraries are not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any


@functools.cache
def _stub() -> tuple[Callable[[str], Any], Mapping[str, str]]:
    """Return lazy_loader's ``__getattr__``, and public name -> the module that defines it, both from the stub."""
    import lazy_loader  # noqa: PLC0415  (the command line needs no public name)

    from dist_ckpt_mistral.libraries import public_modules  # noqa: PLC0415  (importing the package must be fast)

    modules = public_modules()
    names_in: dict[str, list[str]] = {}
    for name, module in modules.items():
        names_in.setdefault(module, []).append(name)
    return lazy_loader.attach(__name__, submod_attrs=names_in)[0], modules


def __dir__() -> list[str]:
    """The public names that can be imported here: ``help`` and ``import *`` take them all."""
    from dist_ckpt_mistral.libraries import missing, of_module  # noqa: PLC0415  (importing the package must be fast)

    return sorted(name for name, module in _stub()[1].items() if not missing(*of_module(module)[0]))


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a module attribute of any kind)
    attribute, modules = _stub()
    if name == "__all__":
        return __dir__()
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_ckpt_mistral.libraries import needed, of_module  # noqa: PLC0415  (importing the package must be fast)

    libraries, extra = of_module(modules[name])
    with needed(f"{__name__}.{name}", *libraries, extra=extra):
        return attribute(name)

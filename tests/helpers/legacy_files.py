"""What tests of Megatron's legacy per-rank torch format know of the genuine cases, and a way to load their files."""

from __future__ import annotations

from typing import Any, Final

from genuine import folder

STEP: Final = "iter_0000007"


def options(case: str) -> dict[str, Any]:
    """The configuration of a case: its args do not tell the tokens of a vocabulary."""
    return {"config": folder(case) / "config.json"}


class _Nothing:
    """What stands for an object of one of Megatron's classes, of whichever release."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def inert_pickle() -> Any:  # noqa: ANN401  (a module for torch.load)
    """A pickle module that imports no Megatron: the classes may be those of another release."""
    import pickle  # noqa: PLC0415
    import types  # noqa: PLC0415

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
            return type(name, (_Nothing,), {}) if module.startswith("megatron") else super().find_class(module, name)

    made = types.ModuleType("inert_pickle")
    vars(made).update(vars(pickle) | {"Unpickler": Unpickler})
    return made

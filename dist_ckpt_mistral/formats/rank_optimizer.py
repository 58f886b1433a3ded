"""The optimizer in a rank's archive of the legacy ``torch`` format: its settings, and a state for every parameter.

Megatron's optimizers wrap torch's or Apex's Adam: ``optimizer`` is its state dict, whose ``param_groups`` number the
parameters that ``state`` has moments of; ``fp32_from_fp16_params`` are the master weights, group by group. Experts that
are spread have an optimizer of their own; then it is a list of two (mcore optimizer/optimizer.py, ``state_dict`` of
``Float16OptimizerWithFloat16Params``, ``FP32Optimizer`` and ``ChainedOptimizer``, 0.4 to 0.19). No parameter has a
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")
#: The moments of Adam, and Megatron's name of the master weights in torch_dist.
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_MASTER: Final = "fp32_param"


class StatePlace(NamedTuple):
    """The place of a parameter's state: number of the optimizer, of its group, of the parameter there; its name."""

    optimizer: int
    group: int
    parameter: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptimizer(Generic[T]):
    """The states of all parameters, and what the common state of a ``torch_dist`` checkpoint says of the optimizers."""

    states: Mapping[StatePlace, T]
    common: Mapping[Any, Any]


def read_optimizer(content: object, kind: type[T], scalar: Callable[[T], float]) -> RankOptimizer[T] | None:
    """The optimizer in ``content``; None if it holds no state of parameters, or is of another kind.

    ``kind`` is the class of tensors in it, ``scalar`` reads the value of one.
    """
    parts = content if isinstance(content, list) else [content]
    try:
        states = {place: tensor for number, part in enumerate(parts) for place, tensor in _states(number, part, kind)}
        common = [_common(part, kind, scalar) for part in parts]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    if not states:
        return None
    return RankOptimizer(states=states, common=common[0] if len(common) == 1 else dict(enumerate(common)))


def _inner(part: Any) -> Any:  # noqa: ANN401  (from a pickle)
    """The state dict of torch's or Apex's optimizer in one of Megatron's."""
    return part.get("optimizer", part)


def _states(number: int, part: Any, kind: type[T]) -> Iterator[tuple[StatePlace, T]]:  # noqa: ANN401
    """Yield all states in optimizer ``number``. Raises ValueError and the like for one of another kind."""
    inner, masters = _inner(part), part.get("fp32_from_fp16_params")
    for group_number, group in enumerate(inner["param_groups"]):
        for at, index in enumerate(group["params"]):
            tensors = {name: each for name, each in inner["state"][index].items() if name != "step"}
            if {*tensors} != {*_MOMENTS}:
                raise ValueError(f"states {sorted(tensors)}")
            if masters is not None:
                tensors[_MASTER] = masters[group_number][at]
            for name, tensor in tensors.items():
                if not isinstance(tensor, kind):
                    raise TypeError(f"{name} is no tensor")
                yield StatePlace(number, group_number, at, name), tensor


def _common(part: Any, kind: type[T], scalar: Callable[[T], float]) -> dict[str, Any]:  # noqa: ANN401
    """What is not of one parameter: as Megatron has it in the common state (``sharded_state_dict``, 0.12 to 0.19)."""
    inner = _inner(part)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in inner["param_groups"]]
    steps = {id(step): step for state in inner["state"].values() if (step := state.get("step")) is not None}
    values = {scalar(step) if isinstance(step, kind) else float(step) for step in steps.values()}
    if len(values) > 1:
        raise ValueError(f"several steps: {sorted(values)}")
    state = {"common_step": values.pop()} if values else {}
    said: dict[str, Any] = {"param_groups": groups, "state": state}
    if "optimizer" not in part:
        return said
    return {"optimizer": said} | {name: part[name] for name in ("grad_scaler",) if name in part}

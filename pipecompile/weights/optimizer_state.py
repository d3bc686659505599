"""An optimizer's state by parameter name: tensors for a safetensors file, everything else for JSON.

    tensors   "wte.weight:exp_avg"                                               name of the parameter : name in its state
              "wte.weight:master_parameter"                                      the float32 copy that is trained for it
    rest      {"class": "AdamW", "groups": [{"lr": 0.001, …}], "parameters": {"wte.weight": {"group": 0, "state": {}}}}

By name, not by position: another number of stages gives an optimizer other parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipecompile.errors import CheckpointError

Names = Mapping[int, str]
"""The canonical name of each parameter by its id()."""
ReadTensor = Callable[[], Tensor]
MASTER = "master_parameter"


def take(optimizer: Optimizer, names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the parameters in ``names``; CheckpointError for a value that is no tensor and not for JSON."""
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {}
    for group in optimizer.param_groups:
        hyper = {key: _plain(key, value) for key, value in group.items() if key != "params"}
        groups.append(hyper)
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                continue
            rest = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}:{key}"] = value
                else:
                    rest[key] = _plain(key, value)
            parameters[name] = {"group": len(groups) - 1, "state": rest}
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "parameters": parameters}


def masters_by_name(masters: Iterable[nn.Parameter], names: Names) -> dict[str, Tensor]:
    """The masters in ``names`` as tensors to store."""
    return {f"{names[id(master)]}:{MASTER}": master.detach() for master in masters if id(master) in names}


def give_masters(masters: Iterable[nn.Parameter], names: Names, stored: Mapping[str, ReadTensor]) -> None:
    """Set masters from a checkpoint; one of a parameter that was trained itself keeps the value that it has.

    CheckpointError if the checkpoint has a master of a parameter that has none here.
    """
    mine = {names[id(master)]: master for master in masters}
    held = set(names.values())
    for full, read in stored.items():
        name, _, key = full.rpartition(":")
        if key != MASTER or name not in held:
            continue
        if name not in mine:
            raise CheckpointError(
                f"the checkpoint has a float32 master of {name!r}, which is trained without one here; compile with "
                "gradient_dtype=torch.float32, or start from the weights alone with --load"
            )
        with torch.no_grad():
            mine[name].copy_(read())


def give(optimizer: Optimizer, names: Names, saved: Mapping[str, Any], stored: Mapping[str, ReadTensor]) -> None:
    """Set the state of an optimizer's parameters. ``saved`` is what ``take`` gave for all parameters of the model,
    ``stored`` reads the tensors by their names. CheckpointError if it is another optimizer's state.
    """
    kind = type(optimizer).__name__
    if saved["class"] != kind:
        raise CheckpointError(
            f"the checkpoint has the state of {saved['class']}, but optimizer() of the model file makes {kind}; "
            "make the same optimizer, or start from the weights alone with --load"
        )
    by_parameter: dict[str, dict[str, ReadTensor]] = {}
    for full, read in stored.items():
        name, _, key = full.rpartition(":")
        if key == MASTER:
            continue
        by_parameter.setdefault(name, {})[key] = read
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:  # of no stage: ``take`` has passed over it too
                continue
            name = names[id(parameter)]
            if name not in saved["parameters"]:
                raise CheckpointError(
                    f"the checkpoint has no optimizer state for parameter {name!r}; make the same optimizer, "
                    "or start from the weights alone with --load"
                )
            state = dict(saved["parameters"][name]["state"])
            for key, read in by_parameter.get(name, {}).items():
                state[key] = _placed(key, read(), parameter, group)
            if state:
                optimizer.state[parameter] = state
        _set_hyperparameters(group, names, saved)


def _set_hyperparameters(group: dict[str, Any], names: Names, saved: Mapping[str, Any]) -> None:
    mine = [p for p in group["params"] if id(p) in names]
    found = [saved["groups"][saved["parameters"][names[id(p)]]["group"]] for p in mine]
    for p, hyper in zip(mine, found):
        if hyper != found[0]:
            key = next(key for key in hyper if hyper[key] != found[0].get(key))
            raise CheckpointError(
                f"the checkpoint has {key}={hyper[key]!r} for parameter {names[id(p)]!r} and {found[0].get(key)!r} for "
                f"{names[id(mine[0])]!r}, which optimizer() puts into one group; make the same groups"
            )
    for key, value in found[0].items() if found else ():
        now = group.get(key)
        if isinstance(now, Tensor):
            now.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(value, list) and not isinstance(now, list) else value


def _placed(key: str, value: Tensor, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """On the parameter's device, as torch keeps it: the count of steps stays on the CPU unless a kernel reads it.

    State of a narrow parameter that has a master now is widened.
    """
    if value.is_floating_point() and value.itemsize < parameter.itemsize and key != "step":
        value = value.to(parameter.dtype)
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    return value.to(parameter.device) if on_device else value


def _plain(key: str, value: Any) -> Any:
    """A value as JSON gives it back."""
    plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    try:
        return json.loads(json.dumps(plain))
    except TypeError:
        raise CheckpointError(
            f"the optimizer keeps {key!r} as {type(value).__name__}, which cannot be saved; expected a tensor, number, "
            "text or a list of such; use an optimizer of torch.optim that keeps its state by parameter"
        ) from None

"""A stage: the part of a model that one rank runs, made of the model's own modules under their own names.

    model                       stage 1 (modules: h.2, h.3; parameters: wte.weight)
    ├── wte                     ├── wte        a Container with the parameter `weight` alone
    ├── h                       └── h          a Container
    │   ├── 0                       ├── 2      the model's module
    │   ├── 1                       └── 3      the model's module
    │   ├── 2
    │   └── 3

A stage copies nothing: training it trains the model, and its ``state_dict`` has the model's keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pipecompile.errors import BuildError
from pipecompile.ir import StagePlan


def make_stage(source: str, model: nn.Module, plan: StagePlan) -> Stage:
    """The stage that generated ``source`` defines, made of ``model``'s modules; BuildError if it defines none."""
    name, file = f"Stage{plan.index}", f"stages/stage_{plan.index}.py"
    scope: dict[str, Any] = {"__name__": f"pipecompile_stage_{plan.index}"}
    try:
        exec(compile(source, file, "exec"), scope)
    except Exception as error:
        raise BuildError(f"{file} cannot be run: {type(error).__name__}: {error}; compile again") from error
    made = scope.get(name)
    if not (isinstance(made, type) and issubclass(made, Stage)):
        raise BuildError(f"{file} defines no {name}(Stage); compile again")
    return made(model, plan)


class Container(nn.Module):
    """Stands where the model has a module of which a stage takes only parts: ``container.name``, ``container[3]``.

    It adds no public attribute to nn.Module's, so that no name of the model's can be hidden by one.
    """

    def __getitem__(self, key: str | int) -> Any:
        for members in (self._modules, self._parameters, self._buffers):
            if str(key) in members:
                return members[str(key)]
        names = ", ".join(map(repr, (*self._modules, *self._parameters, *self._buffers)))
        raise KeyError(f"this stage holds no {key!r} here, it has {names or 'nothing'}; take it from the model first")


class Stage(Container):
    """Base of the generated stages: takes from ``model`` what ``plan`` names, the same objects under the same names.

    A generated subclass defines ``forward(batch, *received)``: a microbatch and the values of ``plan.inputs`` in order;
    it gives a tuple in the order of ``plan.outputs``. BuildError if the model lacks what the plan names.
    """

    def __init__(self, model: nn.Module, plan: StagePlan) -> None:
        super().__init__()
        self.training = model.training
        for fqn in _outermost(plan.modules):
            _take(self, model, fqn, "module")
        for fqn in plan.parameters:
            _take(self, model, fqn, "parameter")
        for fqn in plan.buffers:
            _take(self, model, fqn, "buffer")


def _take(stage: Stage, model: nn.Module, fqn: str, kind: str) -> None:
    """Put the model's ``fqn`` into the same place of ``stage``, with containers on the way."""
    *path, name = fqn.split(".")
    here: nn.Module = stage
    there = model
    for step in path:
        original = there._modules.get(step)
        if original is None:
            raise _missing(fqn, kind, model)
        if here._modules.get(step) is None:
            here._modules[step] = Container()
            here._modules[step].training = original.training  # type: ignore[union-attr]
        here, there = here._modules[step], original  # type: ignore[assignment]
        if here is there:  # a module that was taken whole has everything below it
            return
    if not _copy_member(here, there, name, kind):
        raise _missing(fqn, kind, model)


def _copy_member(here: nn.Module, there: nn.Module, name: str, kind: str) -> bool:
    """Give ``here`` the member of ``there``; names are set in the tables, so that none can clash with an attribute."""
    if kind == "module" and there._modules.get(name) is not None:
        here._modules[name] = there._modules[name]
    elif kind == "parameter" and there._parameters.get(name) is not None:
        here._parameters[name] = there._parameters[name]
    elif kind == "buffer" and there._buffers.get(name) is not None:
        here._buffers[name] = there._buffers[name]
        if name in there._non_persistent_buffers_set:
            here._non_persistent_buffers_set.add(name)
    elif kind == "buffer" and isinstance(there.__dict__.get(name), Tensor):
        here.__dict__[name] = there.__dict__[name]
    else:
        return False
    return True


def _outermost(fqns: Iterable[str]) -> list[str]:
    """Shorter names first: a module taken whole makes those below it superfluous."""
    return sorted(fqns, key=lambda fqn: fqn.count("."))


def _missing(fqn: str, kind: str, model: nn.Module) -> BuildError:
    return BuildError(
        f"the model {type(model).__name__} has no {kind} {fqn!r}, which the stage was compiled to use; "
        "load the build with the model that it was made of, or compile again"
    )

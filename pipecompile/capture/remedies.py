"""What a user can do about a model that cannot be traced: the modules to leave whole, found by trying.

A trace stops at the first obstacle. Here the module that holds it, and those like it (``layers.*.moe``), are passed over and
the model is traced again, until it can be: so the modules that an error names are all that stand in the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from pipecompile.errors import CaptureError

MOVE = "move that line into a module of its own and name that in opaque=[...], to leave it whole"
CONSTANT = re.compile(r"model attribute: ((?:\w+\.)*)lifted_tensor_\d+")


class Untraceable(CaptureError):
    """A trace that stopped: in the forward of the module ``fqn`` (empty: of the model, or in the loss), and why."""

    def __init__(self, fqn: str, why: str, patterns: tuple[str, ...] = ()) -> None:
        self.fqn, self.why = fqn, why
        named = f"pass opaque={list(patterns or (fqn,))} to leave {'those modules' if patterns[1:] else 'that module'} whole"
        remedy = named if fqn else MOVE + (f" (and besides {named})" if patterns else "")
        who = fqn or "the model's own forward or the loss function"
        super().__init__(f"{who} cannot be traced{why} {remedy}")


def complete(
    error: Untraceable, model: nn.Module, hidden: frozenset[str], attempt: Callable[[frozenset[str]], object]
) -> Untraceable:
    """The error with every module that stands in the way. ``attempt`` captures the model with some modules passed over."""
    first, patterns = error, dict[str, None]()
    while error.fqn:
        pattern = alike(model, error.fqn)
        if pattern in patterns:
            return first
        patterns[pattern] = None
        hidden |= {fqn for fqn, _ in model.named_modules() if fqn and fnmatchcase(fqn, pattern)}
        try:
            attempt(hidden)
        except Untraceable as next_:
            error = next_
        except CaptureError:
            return first
        else:
            return Untraceable(first.fqn, first.why, tuple(patterns))
    return Untraceable("", error.why, tuple(patterns))


def alike(model: nn.Module, fqn: str) -> str:
    """A pattern of the modules in the same place of other blocks, if they are of one class; else the name itself."""
    numbers = r"(^|\.)\d+(?=\.|$)"
    pattern, place = re.sub(numbers, r"\1*", fqn), re.compile(re.sub(numbers, r"\1\\d+", fqn))
    named = {name: part for name, part in model.named_modules() if name and fnmatchcase(name, pattern)}
    same = tuple(f"{name}." for name in named if place.fullmatch(name))
    kinds = {type(part) for name, part in named.items() if not name.startswith(same)}
    return pattern if kinds == {type(model.get_submodule(fqn))} else fqn


def stopped(error: Exception, fqn: str, line: str, place: str) -> Untraceable:
    """The obstacle that torch's error tells of, in words of the user's model."""
    found = CONSTANT.search(str(error))
    if ".numpy() is not supported" in line:
        line = "numpy cannot see numbers while torch traces"
    if found is None:
        return Untraceable(
            fqn,
            f"{place}: {line}; keep control flow independent of tensor values there, rewrite that line with torch.where, or",
        )
    return Untraceable(
        found[1].removeprefix("model.").rstrip("."),
        ": it makes a tensor and keeps it beyond the operations of its forward, as in an assignment to .data or to a plain "
        "attribute, which a trace does not follow; change buffers in place under torch.no_grad, or",
    )


def about_contents(error: BaseException | None) -> bool:
    """Whether a trace stopped at a question about a tensor's contents alone, which no choice of sizes answers."""
    while error is not None:
        told = re.search(r"\(unhinted: (.*?)\)\.? ", str(error))
        if type(error).__name__ == "GuardOnDataDependentSymNode" and told:
            return re.search(r"\bs\d+\b", told[1]) is None
        error = error.__cause__
    return False

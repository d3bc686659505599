"""What the model itself gives in a step, told beside the loss: ``compile(…, outputs=True)``.

model gives      {"loss": …, "logits": t, "hidden_states": (a, b)}          a tensor alone is "output"
told by name     {"logits": t, "hidden_states[0]": a, "hidden_states[1]": b}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipecompile.capture.step import Loss, default_loss
from pipecompile.errors import CaptureError


class _Heard:
    """Stands for the model in a loss function, and keeps what its last call gave."""

    def __init__(self, model: nn.Module) -> None:
        self.__dict__["_model"], self.__dict__["given"] = model, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["given"] = self._model(*args, **kwargs)
        return self.given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


def with_outputs(loss: Loss | None) -> Loss:
    """The loss function that also tells every tensor that the model gives, but the loss and what comes from the batch.

    CaptureError where it does not call the model.
    """
    inner = loss or default_loss

    def told(model: nn.Module, batch: Any) -> tuple[Any, ...]:
        heard: Any = _Heard(model)
        result = inner(heard, batch)
        if heard.given is None:
            raise CaptureError(
                "outputs=True tells what the model gives, but the loss function calls only parts of it; return "
                "(loss, {name: tensor}) with what you want to be told"
            )
        parts = result if isinstance(result, tuple) else (result,)
        mine = parts[-1] if isinstance(parts[-1], Mapping) else {}
        parts = parts[:-1] if isinstance(parts[-1], Mapping) else parts
        known = {id(leaf) for leaf in (*parts, *tree_leaves(batch), *model.parameters(), *model.buffers())}
        found = {name: tensor for name, tensor in _tensors(heard.given, "") if id(tensor) not in known}
        return (*parts, found | dict(mine))

    return told


def _tensors(given: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a structure by the expression that reaches them."""
    if isinstance(given, Tensor):
        yield name or "output", given
    elif isinstance(given, Mapping):
        for key, part in given.items():
            yield from _tensors(part, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(given, tuple | list):
        for index, part in enumerate(given):
            yield from _tensors(part, f"{name or 'output'}[{index}]")
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        for field in dataclasses.fields(given):
            yield from _tensors(getattr(given, field.name), f"{name}.{field.name}" if name else field.name)

"""What a model meets while it is traced and not in eager mode, put right: questions, conversions, torch's own reports."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn

from pipecompile.capture.folders import TORCH

QUESTIONS = ("is_compiling", "is_dynamo_compiling", "is_exporting")


@contextmanager
def told_that_it_is_not_exported() -> Iterator[None]:
    """While this lasts, a model that is traced goes the way that it goes in eager mode."""
    saved = {name: getattr(torch.compiler, name) for name in QUESTIONS if hasattr(torch.compiler, name)}
    for name in saved:
        setattr(torch.compiler, name, lambda: False)
    try:
        yield
    finally:
        for name, question in saved.items():
            setattr(torch.compiler, name, question)


@contextmanager
def conversions_skipped() -> Iterator[None]:
    """While this lasts, ``module.to(dtype)`` in a forward does nothing to modules that are so already: parameters that are
    being traced cannot be replaced.
    """
    original = nn.Module._apply

    def apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        own = [*module.parameters(), *module.buffers()]
        if all((made := function(t)).dtype == t.dtype and made.device == t.device for t in own):
            return module
        return original(module, function, *args, **kwargs)  # type: ignore[no-untyped-call]

    nn.Module._apply = apply  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextmanager
def data_followed() -> Iterator[None]:
    """While this lasts, ``tensor.data`` in a model's code is ``tensor.detach()``, and an assignment to it is one in place.

    A trace knows nothing of ``.data``: what is done with it would be lost.
    """
    original: Any = torch.Tensor.data

    def get(tensor: torch.Tensor) -> Any:
        return original.__get__(tensor) if _called_by_torch() else tensor.detach()

    def set(tensor: torch.Tensor, value: torch.Tensor) -> None:
        if _called_by_torch() or value.shape != tensor.shape or value.dtype != tensor.dtype:
            original.__set__(tensor, value)
        else:
            tensor.detach().copy_(value.detach())

    kind: Any = torch.Tensor
    kind.data = property(get, set)
    try:
        yield
    finally:
        del kind.data


def _called_by_torch() -> bool:
    return sys._getframe(2).f_code.co_filename.startswith(TORCH)


@contextmanager
def masks_known() -> Iterator[None]:
    """While this lasts, ``masked_select`` is indexing, whose results of one mask torch knows to be of one size."""
    original = torch.Tensor.masked_select

    def masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return tensor[mask] if tensor.shape == mask.shape else original(tensor, mask)

    torch.Tensor.masked_select = masked_select  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.masked_select = original  # type: ignore[method-assign]


@contextmanager
def quiet() -> Iterator[None]:
    """While this lasts, torch does not print graphs and tracebacks of a trace that stops; our errors tell of it."""
    loggers = [found for name, found in logging.root.manager.loggerDict.items() if name.split(".")[0] == "torch"]
    handlers = {handler for found in loggers if isinstance(found, logging.Logger) for handler in found.handlers}
    for handler in handlers:
        handler.addFilter(_nothing)
    told, graph = io.StringIO(), ""
    try:
        with redirect_stderr(told):
            yield
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(told.getvalue().replace(graph, "") if graph else told.getvalue())
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False

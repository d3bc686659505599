"""What makes two nodes cost the same: the key under which a measured cost is kept.

Two nodes share a key if they run the same operations (an operator, or a module of the same class and configuration
that traced to the same operations) on arguments of the same shapes and dtypes, with the same constants and regions, on
the same device with the same torch and threads. Names and the contents of tensors do not matter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pipecompile.cost.interpreter import fill
from pipecompile.ir import Attribute, Graph, Node, Ref, Spec

SIMPLE = (bool, int, float, str, type(None))
POSITIONS = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx", "index")
"""Attributes that only say which of many equal modules one is."""


def specs(graph: Graph) -> dict[str, Spec]:
    """The spec of every value, those inside of calls included."""
    found = {value.name: value.spec for value in (*graph.inputs, *graph.dropped)}
    for node in graph.nodes:
        found |= {value.name: value.spec for part in (*node.inside, node) for value in part.outputs}
    return found


def environment(device: torch.device) -> str:
    """What times depend on besides the node."""
    kind = torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu":
        kind = torch.get_device_module(device).get_device_name(device)
    return f"{device.type} {kind} {os.cpu_count()} {torch.__version__} {torch.get_num_threads()}"


def node_key(node: Node, graph: Graph, model: nn.Module, known: Mapping[str, Spec], around: str) -> str:
    """The key of ``node``; ``known`` is ``specs(graph)``, ``around`` is ``environment(device)``."""
    parts = [around, line(node, graph, known, target=node.target if node.kind == "op" else "")]
    if node.kind == "call":
        parts += _configuration(model.get_submodule(node.target))
        parts += [line(part, graph, known, part.target) for part in node.inside]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def line(node: Node, graph: Graph, known: Mapping[str, Spec], target: str) -> str:
    """What a node does to arguments of which shapes and dtypes, without the names of values and attributes."""

    def leaf(at: Ref | Attribute) -> Any:
        if isinstance(at, Attribute) and at.fqn in graph.constants:
            constant = graph.constants[at.fqn]
            return _Text(f"{constant.dtype}{tuple(constant.shape)}")
        spec = known.get(at.name) if isinstance(at, Ref) else graph.attributes[at.fqn].spec
        return _Text(f"{spec}{' gradient' if spec and spec.gradient else ''}")

    return f"{node.kind} {target} {fill(node.args, leaf)} {fill(dict(node.kwargs), leaf)} {node.context}"


class _Text:
    """Shows as a bare text inside of the repr of a structure."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _configuration(module: nn.Module) -> Iterator[str]:
    """Class, settings, tensors of a module and of all modules in it."""
    for name, part in module.named_modules():
        settings = {
            key: setting
            for key, setting in sorted(vars(part).items())
            if isinstance(setting, SIMPLE) and key not in POSITIONS and not key.startswith("_")
        }
        yield f"{name} {type(part).__module__}.{type(part).__qualname__} {part.extra_repr()} {settings}"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"

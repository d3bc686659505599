"""Emits one Python file for each stage, which reads like the model: its own modules, called by their own names.

    class Stage1(Stage):
        def forward(self, batch, hidden_states):
            hidden_states_1 = self.transformer.h[2](hidden_states)
            hidden_states_2 = self.transformer.h[3](hidden_states_1)
            return (hidden_states_2,)

The same stage always gives the same text. Names that come from a model are never executed (see render).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

import torch

from pipecompile.errors import CaptureError
from pipecompile.ir import Attribute, Graph, Node, Port, Size, StageCost
from pipecompile.passes.assemble import StageBody, held
from pipecompile.passes.render import Renderer, path_text, size_name, statement

LARGEST_CONSTANT = 4096
CHECKPOINT = "checkpoint:"


def codegen(graph: Graph, bodies: tuple[StageBody, ...], costs: tuple[StageCost, ...] = ()) -> tuple[str, ...]:
    """The source of each stage. ``costs`` are told in the docstrings."""
    return tuple(_Source(graph, body, len(bodies), costs[body.plan.index] if costs else None).text() for body in bodies)


class _Source:
    def __init__(self, graph: Graph, body: StageBody, stages: int, cost: StageCost | None) -> None:
        self.graph, self.body, self.stages, self.cost = graph, body, stages, cost
        used = _constants_used((*body.nodes, *body.replicated), graph.constants)
        self.constants = {fqn: f"CONSTANT_{i}" for i, fqn in enumerate(used)}
        self.render = Renderer(self.constants)

    def text(self) -> str:
        helper = self._helper() if self.body.replicated else []
        forward = self._forward()
        literals = [f"{name} = {_literal(self.graph.constants[fqn])}" for fqn, name in self.constants.items()]
        lines = [*self._docstring(), "", *self._imports(bool(literals)), ""]
        if literals:
            lines += [*literals, ""]
        lines += ["", f"class Stage{self.body.plan.index}(Stage):", *helper, *([""] if helper else []), *forward]
        return "\n".join(lines) + "\n"

    def _docstring(self) -> list[str]:
        plan = self.body.plan
        lines = [f'"""Stage {plan.index} of {self.stages} (counted from 0).', ""]
        lines += _ports("Receives", plan.inputs, lambda port: f"from stage {port.source}")
        lines += _ports("Gives", plan.outputs, _destination)
        if self.body.batch:
            lines += [f"Reads of the batch: {', '.join(value.name for value in self.body.batch)}"]
        lines += [self._holds()]
        if self.cost:
            lines += [
                f"Cost of a microbatch: forward {self.cost.forward_ms:.3g} ms, backward {self.cost.backward_ms:.3g} ms, "
                f"{self.cost.saved_bytes:,} bytes kept for backward"
            ]
        return [*lines, '"""']

    def _holds(self) -> str:
        infos = {
            self.graph.attributes[fqn].canonical: self.graph.attributes[fqn] for fqn in held(self.graph, self.body.plan)
        }
        mine = [info for info in infos.values() if info.kind == "parameter"]
        count = sum(info.spec.bytes for info in mine)
        shared = ", ".join(_safe(name) for name in self.body.plan.shared)
        return f"Parameters: {len(mine)} tensors, {count:,} bytes" + (
            f"; shared with other stages: {shared}" if shared else ""
        )

    def _imports(self, literals: bool) -> list[str]:
        used = self.render.modules
        lines = []
        if (
            literals
            or "torch" in used
            or "aten" in used
            or any(n.context for n in (*self.body.nodes, *self.body.replicated))
        ):
            lines += ["import torch"]
        if "F" in used:
            lines += ["import torch.nn.functional as F"]
        if "checkpoint" in used:
            lines += ["from torch.utils.checkpoint import checkpoint"]
        lines += [""] if lines else []
        names = ["Stage", *(["device_of"] if self.render.uses_device else [])]
        names += ["recompute"] if self.body.recomputed.intersection(node.name for node in self.body.nodes) else []
        names += ["recomputed"] if self.body.plan.recompute == "stage" else []
        names += ["report"] if self._reported() else []
        names += ["reseed"] if any(node.stream >= 0 for node in self.body.nodes) else []
        lines += [f"from pipecompile.runtime import {', '.join(names)}"]
        return lines + (["", "aten = torch.ops.aten"] if "aten" in used else [])

    def _helper(self) -> list[str]:
        """What this stage computes for itself instead of receiving it."""
        body, sizes = self._statements(self.body.replicated), self._sizes()
        needed = self._helper_results()
        read = {name for node in self.body.replicated for name in node.reads}
        lines = [
            "    def _replicated(self, batch):",
            '        """Cheap values without a gradient that every reading stage computes."""',
        ]
        lines += self._batch(read) + sizes + body
        return [*lines, f"        return {_tuple(needed)}"]

    def _helper_results(self) -> list[str]:
        made = [value.name for node in self.body.replicated for value in node.outputs]
        read = {name for node in self.body.nodes for name in node.reads} | {
            port.name for port in self.body.plan.outputs
        }
        return [name for name in made if name in read]

    def _batch(self, read: set[str]) -> list[str]:
        return [f"        {v.name} = batch{path_text(v.path)}" for v in self.body.batch if v.name in read]

    def _sizes(self) -> list[str]:
        """The sizes of the microbatch that the statements just made speak of."""
        places = {
            size.text: f"batch{path_text(value.path)}.size({dimension})"
            for value in reversed(self.graph.inputs)
            for dimension, size in enumerate(value.spec.shape)
            if isinstance(size, Size)
        }
        names = [name for name in self.graph.sizes if name in self.render.sizes]
        self.render.sizes = set()
        return [f"        {size_name(name)} = {places[name]}" for name in names]

    def _forward(self) -> list[str]:
        plan = self.body.plan
        statements, sizes = self._statements(self.body.nodes), self._sizes()
        arguments = ["self", "batch", *(port.name for port in plan.inputs)]
        lines = ["    @recomputed"] if plan.recompute == "stage" else []
        lines += statement("", "def forward", arguments, 4, ":")
        lines += self._batch({name for node in self.body.nodes for name in node.reads} | {p.name for p in plan.outputs})
        lines += sizes
        if self.body.replicated:
            lines += [f"        {_target(self._helper_results())} = self._replicated(batch)"]
        lines += [f"        {name} = {name}.clone()  # changed in place below" for name in self.body.copied]
        if lines[-1].endswith(":"):
            statements = statements[statements[:1] == [""] :]  # no empty line at the beginning
        told = ", ".join(f"{name!r}: {value}" for name, value in self._reported().items())
        statements += [f"        report({{{told}}})"] if told else []
        return [*lines, *statements, f"        return {_tuple([port.name for port in plan.outputs])}"]

    def _reported(self) -> dict[str, str]:
        """What this stage makes of the values that are reported."""
        made = {value.name for node in self.body.nodes for value in node.outputs}
        return {name: value for name, value in self.graph.reported.items() if value in made}

    def _statements(self, nodes: Iterable[Node]) -> list[str]:
        lines: list[str] = []
        used_before = self.render.uses_device
        self.render.uses_device = False
        everything = list(nodes)
        for context, found in groupby(everything, key=lambda node: node.context):
            group = list(found)
            indent = 8
            made: list[str] = []
            checkpoint = next((tag for tag in context if tag.startswith(CHECKPOINT)), "")
            if checkpoint:
                made = self._read_outside(group)
                lines += ["", f"{' ' * indent}def checkpointed():"]
                indent += 4
            for tag in context:
                if not tag.startswith(CHECKPOINT):
                    lines.append(f"{' ' * indent}with {tag}:")
                    indent += 4
            module = None
            for node in group:
                if node.kind == "op" and node.module != module:
                    lines += [f"{' ' * indent}# {_safe(node.module) or 'the model itself, and its loss'}"]
                module = node.module if node.kind == "op" else None
                lines += [f"{' ' * indent}reseed({node.stream})"] if node.stream >= 0 else []
                lines += self._node(node, indent)
            if checkpoint:
                self.render.modules.add("checkpoint")
                lines += [f"            return {_tuple(made)}", ""]
                _, comma, options = checkpoint.partition(",")
                lines.append(f"        {_target(made)} = checkpoint(checkpointed, use_reentrant=False{comma}{options})")
        if self.render.uses_device:
            lines = ["        device = device_of(self, batch)", *lines]
        self.render.uses_device |= used_before
        return lines

    def _read_outside(self, group: list[Node]) -> list[str]:
        """What a checkpointed region makes and others read."""
        mine = {node.name for node in group}
        read = {port.name for port in self.body.plan.outputs}
        for node in self.body.nodes:
            read |= set(node.reads) if node.name not in mine else set()
        return [value.name for node in group for value in node.outputs if value.name in read]

    def _node(self, node: Node, indent: int) -> list[str]:
        function, arguments = self.render.call(node)
        if node.name in self.body.recomputed:
            function, arguments = "recompute", [function, *arguments]
        if node.kind == "call" and not arguments:
            arguments = [""]
        outputs = node.outputs
        if not outputs:
            return statement("", function, arguments, indent)
        if all(not value.path for value in outputs):
            return statement(outputs[0].name, function, arguments, indent)
        if len(outputs) == 1:
            return statement(outputs[0].name, function, arguments, indent, path_text(outputs[0].path))
        if _is_row(node):
            return statement(", ".join(value.name for value in outputs), function, arguments, indent)
        whole = f"{outputs[0].name}_result"
        lines = statement(whole, function, arguments, indent)
        return lines + [f"{' ' * indent}{value.name} = {whole}{path_text(value.path)}" for value in outputs]


def _is_row(node: Node) -> bool:
    """Whether the results can be bound as ``a, b = …``: an operation's, which are known to be complete."""
    return node.kind == "op" and all(v.path == (("item", i),) for i, v in enumerate(node.outputs))


def _constants_used(nodes: Iterable[Node], constants: Mapping[str, object]) -> list[str]:
    found: dict[str, None] = {}

    def look(whole: object) -> None:
        if isinstance(whole, Attribute) and whole.fqn in constants:
            found[whole.fqn] = None
        elif isinstance(whole, tuple | list):
            for part in whole:
                look(part)
        elif isinstance(whole, dict):
            look(tuple(whole.values()))

    for node in nodes:
        look((node.args, dict(node.kwargs)))
    return list(found)


def _literal(tensor: torch.Tensor) -> str:
    if tensor.numel() > LARGEST_CONSTANT:
        raise CaptureError(
            f"the forward makes a constant tensor of shape {tuple(tensor.shape)} out of Python numbers, at most "
            f"{LARGEST_CONSTANT} elements can be written into a stage; register it as a buffer"
        )
    return f"torch.tensor({tensor.tolist()!r}, dtype={tensor.dtype})".replace("inf", 'float("inf")').replace(
        "nan", 'float("nan")'
    )


def _ports(title: str, ports: tuple[Port, ...], where: Callable[[Port], str]) -> list[str]:
    if not ports:
        return []
    wide = max(len(port.name) for port in ports)
    return [title, *(f"    {port.name:{wide}}  {port.spec}  {where(port)}" for port in ports), ""]


def _destination(port: Port) -> str:
    if not port.targets:
        return "(the step's result)"
    return f"to stage{'s' if len(port.targets) > 1 else ''} {', '.join(map(str, port.targets))}"


def _safe(name: str) -> str:
    """A name for a comment: nothing in it can end the line or the docstring."""
    return (
        name
        if name.isascii() and name.isprintable() and '"' not in name and "\\" not in name
        else ascii(name).replace('"', "'")
    )


def _tuple(names: list[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})" if names else "()"


def _target(names: list[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names) or "_"

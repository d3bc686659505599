"""Renders nodes as Python source: ``a + b`` for aten.add, ``self.model.layers[3](hidden)`` for a module's call.

What has no nicer form is called as what it is, ``aten.name.overload(...)``. Names that come from the model are only
written as attributes where they are identifiers, else as string literals.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from pipecompile.ir import Attribute, Node, Path, Ref, Size
from pipecompile.ir.size import BATCH

WIDTH = 120
BINARY = {"add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "__and__.Tensor": "&",
          "__or__.Tensor": "|", "eq.Scalar": "==", "eq.Tensor": "==", "ne.Scalar": "!=", "ne.Tensor": "!=",
          "lt.Tensor": "<", "lt.Scalar": "<", "le.Tensor": "<=", "le.Scalar": "<=", "gt.Tensor": ">", "gt.Scalar": ">",
          "ge.Tensor": ">=", "ge.Scalar": ">=", "matmul.default": "@", "pow.Tensor_Scalar": "**"}  # fmt: skip
METHODS = {"view.default", "reshape.default", "transpose.int", "permute.default", "unsqueeze.default", "squeeze.dim",
           "expand.default", "contiguous.default", "tanh.default", "rsqrt.default", "sqrt.default", "exp.default",
           "cos.default", "sin.default", "relu.default", "relu_.default", "sigmoid.default", "copy_.default",
           "fill_.Scalar", "masked_fill_.Scalar", "masked_fill.Scalar", "cumsum.default", "clone.default",
           "detach.default", "mean.default", "sum.default", "mean.dim", "select.int", "chunk.default", "unbind.int",
           "flatten.using_ints", "to.dtype", "new_zeros.default", "new_ones.default", "float.default", "abs.default",
           "log.default", "neg.default", "add_.Tensor", "mul_.Tensor", "type_as.default", "t.default"}  # fmt: skip
FUNCTIONS = {"linear.default": "F.linear", "layer_norm.default": "F.layer_norm", "silu.default": "F.silu",
             "gelu.default": "F.gelu", "scaled_dot_product_attention.default": "F.scaled_dot_product_attention",
             "conv2d.default": "F.conv2d", "pad.default": "F.pad", "cat.default": "torch.cat", "where.self": "torch.where",
             "stack.default": "torch.stack", "arange.default": "torch.arange",
             "arange.start": "torch.arange"}  # fmt: skip

SPREAD = {"view.default", "reshape.default", "permute.default", "expand.default"}
"""Methods whose sizes or dimensions people write without brackets."""
LOSSES = {"cross_entropy_loss.default": "F.cross_entropy", "mse_loss.default": "F.mse_loss"}
"""Losses that are called by another name, alike as long as they have no options."""
END = 2**63 - 1
"""What a slice without an end has for one."""


def attribute(fqn: str) -> str:
    """How a stage reaches ``fqn`` below ``self``: ``self.h[3].weight``, or by a string where that is no Python."""
    text = "self"
    for step in fqn.split("."):
        if step.isidentifier() and not keyword.iskeyword(step) and not step.startswith("__"):
            text += f".{step}"
        elif step.isdecimal() and str(int(step)) == step:
            text += f"[{step}]"
        else:
            return f"self.get_submodule({fqn!r})"
    return text


def member(fqn: str) -> str:
    """How a stage reaches a parameter or buffer."""
    owner, _, name = fqn.rpartition(".")
    base = attribute(owner) if owner else "self"
    if name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__"):
        return f"{base}.{name}"
    return f"getattr({base}, {name!r})"


def path_text(path: Path) -> str:
    return "".join(f"[{string(step)}]" if kind == "item" else f".{step}" for kind, step in path)


def size_name(name: str) -> str:
    """The variable that holds a size of the microbatch: ``batch_size``, ``sequence_length``, ``sequence_length_2``."""
    return "batch_size" if name == BATCH else name.replace("sequence", "sequence_length")


class Renderer:
    """Renders arguments and nodes; ``constants`` gives the source name of each constant of the trace.

    ``sizes`` collects the sizes of the microbatch that what was rendered speaks of.
    """

    def __init__(self, constants: Mapping[str, str]) -> None:
        self.constants = constants
        self.uses_device = False
        self.modules: set[str] = set()
        self.sizes: set[str] = set()

    def size(self, size: Size) -> str:
        """Source of a size that follows from the microbatch's."""
        names = [node.id for node in ast.walk(ast.parse(size.text)) if isinstance(node, ast.Name)]
        used = {name for name in names if name not in ("max", "min")}
        self.sizes |= used
        text = re.sub(r"[a-z]\w*", lambda found: size_name(found[0]) if found[0] in used else found[0], size.text)
        return ast.unparse(ast.parse(text))

    def value(self, whole: Any) -> str:
        """Source of an argument."""
        if isinstance(whole, Size):
            return self.size(whole)
        if isinstance(whole, Ref):
            return whole.name
        if isinstance(whole, Attribute):
            return self.constants.get(whole.fqn) or member(whole.fqn)
        if isinstance(whole, torch.device):
            self.uses_device = True
            return "device"
        if isinstance(whole, torch.dtype | torch.layout | torch.memory_format):
            self.modules.add("torch")
            return str(whole)
        if isinstance(whole, float) and not math.isfinite(whole):
            return f'float("{whole}")'
        if isinstance(whole, list):
            return f"[{', '.join(map(self.value, whole))}]"
        if isinstance(whole, tuple):
            return f"({', '.join(map(self.value, whole))}{',' if len(whole) == 1 else ''})"
        if isinstance(whole, dict):
            return f"{{{', '.join(f'{string(k)}: {self.value(v)}' for k, v in whole.items())}}}"
        if isinstance(whole, slice):
            return f"slice({', '.join(map(self.value, (whole.start, whole.stop, whole.step)))})"
        return string(whole)

    def call(self, node: Node) -> tuple[str, list[str]]:
        """A node as (what is called, its arguments); no arguments given back means a whole expression."""
        arguments = [self.value(a) for a in node.args]
        optional = node.kind == "op" and not node.target.endswith(".generator")  # randn's has no default
        keywords = {key: self.value(a) for key, a in node.kwargs.items() if not (optional and a is None)}
        named = [keyword_argument(key, text) for key, text in keywords.items()]
        if node.kind == "call":
            return attribute(node.target), arguments + named
        short = node.target.removeprefix("aten.")
        if not named and short in BINARY and len(arguments) == 2:
            return f"{arguments[0]} {BINARY[short]} {arguments[1]}", []
        if short == "slice.Tensor" and not named and (brackets := self.slice_text(node.args)):
            return f"{arguments[0]}[{brackets}]", []
        is_method = short in METHODS and node.args and isinstance(node.args[0], Ref)
        is_method = is_method and not (short == "to.dtype" and len(node.args) > 4)  # its memory_format is no position
        if is_method and short in SPREAD and len(node.args) == 2 and isinstance(node.args[1], list) and node.args[1]:
            arguments[1:] = map(self.value, node.args[1])
        if is_method:
            return f"{arguments[0]}.{short.split('.')[0]}", [*arguments[1:], *named, ""]
        if short == "embedding.default" and len(arguments) == 2:
            self.modules.add("F")
            return "F.embedding", [arguments[1], arguments[0]]
        if short in LOSSES and len(arguments) == 2 and not named:
            self.modules.add("F")
            return LOSSES[short], arguments
        if short in FUNCTIONS:
            named = [n for n in named if n != "pin_memory=False"]
            arguments = arguments[:5] if short == "layer_norm.default" else arguments  # F's has no cudnn_enable
            self.modules.add(FUNCTIONS[short].split(".")[0])
            return FUNCTIONS[short], arguments + named
        if not node.target.startswith("aten."):
            self.modules.add("torch")
            return f"torch.ops.{node.target}", arguments + named
        self.modules.add("aten")
        return node.target, arguments + named

    def slice_text(self, args: tuple[Any, ...]) -> str:
        """``:, 1:`` for a slice of dimension 1 from position 1; empty where it takes more than that to say."""
        _, *rest = args
        if len(rest) != 3 or not all(isinstance(part, int) for part in rest) or rest[0] < 0:
            return ""
        dimension, start, end = rest
        return f"{':, ' * dimension}{self.value(start) if start else ''}:{'' if end == END else self.value(end)}"


def keyword_argument(key: str, text: str) -> str:
    if key.isidentifier() and not keyword.iskeyword(key):
        return f"{key}={text}"
    return f"**{{{string(key)}: {text}}}"


def string(whole: Any) -> str:
    """A literal, strings in double quotes as formatters want them."""
    text = repr(whole)
    if isinstance(whole, str) and text.startswith("'") and '"' not in text and "\\" not in text:
        return f'"{text[1:-1]}"'
    return text


def statement(target: str, function: str, arguments: list[str], indent: int, suffix: str = "") -> list[str]:
    """``target = function(arguments)suffix`` as lines no wider than WIDTH where that can be."""
    pad, inner = " " * indent, " " * (indent + 4)
    left = f"{target} = " if target else ""
    if not arguments:
        return [f"{pad}{left}{function}{suffix}"]
    given = [argument for argument in arguments if argument]
    line = f"{pad}{left}{function}({', '.join(given)}){suffix}"
    if len(line) <= WIDTH:
        return [line]
    if len(inner) + len(", ".join(given)) <= WIDTH:
        return [f"{pad}{left}{function}(", f"{inner}{', '.join(given)}", f"{pad}){suffix}"]
    return [f"{pad}{left}{function}(", *(f"{inner}{argument}," for argument in given), f"{pad}){suffix}"]

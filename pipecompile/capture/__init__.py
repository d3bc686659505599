"""Captures one training step of a model as a graph: the only code that knows torch.export.

``capture(model, batch, loss)`` runs the step once in eager mode (what the model really does), traces it, and reads the
trace into a Graph of operations in program order with the module calls around them. The lift pass makes nodes of those.
"""

from __future__ import annotations

import math
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, export
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from pipecompile.capture.blocks import Blocks, NeedsFullTrace
from pipecompile.capture.checkpoints import straight_through
from pipecompile.capture.decisions import decisions
from pipecompile.capture.eager import Observation, observe
from pipecompile.capture.exporting import (
    conversions_skipped,
    data_followed,
    masks_known,
    quiet,
    told_that_it_is_not_exported,
)
from pipecompile.capture.folders import OUTSIDE
from pipecompile.capture.naming import rename_call, rename_node, rename_value, rename_values, without_defaults
from pipecompile.capture.opaque_shapes import OpaqueShapes
from pipecompile.capture.operations import dtype_name, input_path
from pipecompile.capture.places import Places
from pipecompile.capture.reader import Reader
from pipecompile.capture.remedies import Untraceable, about_contents, alike, complete, stopped
from pipecompile.capture.repeat import check_templates
from pipecompile.capture.shadow import Shadows
from pipecompile.capture.sizes import (
    Fixed,
    Labels,
    Sizes,
    Stopped,
    dynamic_shapes,
    labels,
    notes_on_sizes,
    symbols,
    traced_with,
    values,
)
from pipecompile.capture.state import held_twice, memory, untouched
from pipecompile.capture.step import Loss, Step, copied, default_loss
from pipecompile.capture.structure import snapshot, tensors
from pipecompile.capture.tracepoints import Recorder
from pipecompile.capture.transforms import Transformed
from pipecompile.capture.unfit import refuse_unfit
from pipecompile.errors import CaptureError, PipecompileError, must_stay_whole
from pipecompile.ir import Attribute, AttributeInfo, Graph, Ref, Spec, Value

__all__ = ["Loss", "Step", "batch_norm_note", "capture", "copied", "default_loss", "untouched"]

MODEL = "model."


def capture(model: nn.Module, batch: Any, loss: Loss | None = None, opaque: tuple[str, ...] = ()) -> Graph:
    """The graph of ``loss(model, batch)`` for a batch of one microbatch's size, in the model's present mode.

    Calls of modules whose FQN matches a pattern of ``opaque`` (``model.layers.*.moe``) stay whole.

    Raises CaptureError: the model fails by itself, gives no scalar loss, or cannot be traced (the message names the
    module, the user's line and the remedy). Turns ``use_cache`` off in the model's configuration; the graph's notes say so.
    """
    refuse_unfit(model)
    step = Step(model, loss)
    hidden = _matching(model, opaque) | _recurrent(model)
    notes = _disable_cache(model) + _coupled(model, hidden)
    seen = _observe(step, model, copied(batch))
    task = Task(step, model, batch, seen, hidden, notes + list(seen.notes))
    try:
        return _decided(task)
    except Untraceable as error:
        if "@0" in seen.keep_whole:
            raise CaptureError(must_stay_whole("", seen.keep_whole["@0"])) from error
        raise complete(error, model, hidden, lambda more: _decided(replace(task, opaque=more))) from error


def _decided(task: Task) -> Graph:
    """The graph; modules that decide by what is in a tensor, and if the trace stops those that stay whole anyway, are
    passed over.
    """
    hidden, notes = task.opaque, task.notes
    whole = frozenset(key.rpartition("@")[0] for key in task.seen.keep_whole) - {""}
    while True:
        try:
            graph = _dynamic(replace(task, opaque=hidden, notes=notes), {})
        except Untraceable:
            if whole <= hidden:
                raise
            hidden |= whole
            continue
        except Transformed as used:
            if not used.fqn:
                raise used.refusal(task.step.loss) from None
            pattern = alike(task.model, used.fqn)
            hidden |= _matching(task.model, (pattern,))
            notes = [*notes, f"{pattern}: {used.note}"]
            continue
        found = decisions(graph, task.seen.questions)
        if found.whole <= hidden:
            return graph
        hidden |= found.whole
        notes = [*notes, *found.notes]


def _dynamic(task: Task, fixed: dict[str, str]) -> Graph:
    """The graph with as many sizes left open as the model allows; ``fixed`` are those that it is known to fix."""
    while True:
        open_ = {place: name for place, name in labels(task.batch).items() if name not in fixed}
        try:
            return _with_sizes(task, open_, fixed)
        except Fixed as found:
            if not open_:
                raise CaptureError(f"the model cannot be captured: {found.why}; keep sizes free of them") from found
            name = found.name if found.name in open_.values() else list(dict.fromkeys(open_.values()))[-1]
            fixed[name] = found.why


@dataclass(frozen=True, slots=True)
class Task:
    """What is captured: the step on a microbatch, what eager mode did, and the modules that are passed over."""

    step: Step
    model: nn.Module
    batch: Any
    seen: Observation
    opaque: frozenset[str]
    notes: list[str]


def _with_sizes(task: Task, open_: Labels, fixed: dict[str, str]) -> Graph:
    """The graph with the sizes of ``open_`` left open. Raises Fixed if the model does not leave one of them so.

    Repeated blocks are traced once if that may be. A model that behaves otherwise when it is exported, and fails then, is
    told that it is not.
    """
    shapes = OpaqueShapes([])
    if task.opaque and open_:
        shapes = OpaqueShapes.of(
            task.batch, open_, task.seen, lambda batch: _observe(task.step, task.model, copied(batch))
        )
    errors: list[CaptureError | Fixed] = []
    for around in (nullcontext, told_that_it_is_not_exported):
        for repeats in (True, False):
            try:
                with around():
                    return _trace(task, open_, fixed, shapes, repeats)
            except NeedsFullTrace:
                continue
            except (CaptureError, Fixed) as error:
                if isinstance(error, Fixed) and not isinstance(error, Stopped):
                    raise
                errors.append(error)
                break
    raise min(errors, key=lambda error: _weight(task.model, error))


def _weight(model: nn.Module, error: CaptureError | Fixed) -> float:
    """How much of the model is left whole if an error's remedy is taken: its number of parameters."""
    if not isinstance(error, Untraceable) or not error.fqn:
        return math.inf
    return sum(p.numel() for p in model.get_submodule(error.fqn).parameters())


def _matching(model: nn.Module, patterns: tuple[str, ...]) -> frozenset[str]:
    """FQNs of the modules that the patterns name; CaptureError for a pattern that names none."""
    fqns = [fqn for fqn, _ in model.named_modules() if fqn]
    for pattern in patterns:
        if not any(fnmatchcase(fqn, pattern) for fqn in fqns):
            raise CaptureError(
                f"opaque={pattern!r} names no module of {type(model).__name__}; modules are {_some(fqns)}"
            )
    return frozenset(fqn for fqn in fqns if any(fnmatchcase(fqn, pattern) for pattern in patterns))


def _recurrent(model: nn.Module) -> frozenset[str]:
    """Modules that are one operation inside, which torch 2.11 traces with states of a wrong shape."""
    return frozenset(fqn for fqn, part in model.named_modules() if fqn and isinstance(part, nn.RNNBase))


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}" or "none"


def _trace(task: Task, open_: Labels, fixed: dict[str, str], shapes: OpaqueShapes, repeats: bool) -> Graph:
    recorder = Recorder(mark=True, keep=snapshot, keep_result=tensors, functions=task.seen.functions)
    places = Places(recorder)
    blocks = Blocks(recorder, task.seen.calls, task.opaque, repeats, changing=task.seen.changing)

    def on_batch(batch: Any) -> None:
        shapes.symbols.update(symbols(batch, open_))
        places.notes = notes_on_sizes(pytree.tree_leaves(batch))

    if open_:
        blocks.open = shapes.shape
        task.step.on_batch = on_batch
    with (
        blocks.passed_over(task.model, task.seen.changed_buffers),
        task.seen.questions.answered(recorder, tracing=True),
    ):
        try:
            with places if open_ else nullcontext():
                program = _export(task, open_, recorder)
        finally:
            task.step.on_batch = None
    return _read(program, task, open_, fixed, recorder, places)


def _disable_cache(model: nn.Module) -> list[str]:
    found = False
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
            found = True
    return ["use_cache was turned off in the model's configuration: training keeps no key-value cache"] if found else []


def _coupled(model: nn.Module, opaque: frozenset[str]) -> list[str]:
    """A warning if layers that are training normalise over the samples where no trace sees them."""
    kinds = nn.modules.batchnorm._BatchNorm
    found = [name for name, part in model.named_modules() if isinstance(part, kinds) and part.training]
    hidden = [name for name in found if any(name == fqn or name.startswith(f"{fqn}.") for fqn in opaque)]
    return [batch_norm_note(hidden)] if hidden else []


def batch_norm_note(names: list[str]) -> str:
    """What to know about the BatchNorm layers ``names``."""
    return (
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: BatchNorm normalises over the samples of a "
        "microbatch, not of the batch, so the loss depends on the number of microbatches; GroupNorm or eval() does not"
    )


def _observe(step: Step, model: nn.Module, batch: Any) -> Observation:
    meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        with Shadows(batch) if meta else nullcontext():
            return observe(step, model, batch)
    except PipecompileError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model fails by itself, before any tracing{_where(error)}: {type(error).__name__}: {_first_line(error)}; "
            "make loss(model, batch) run on one microbatch first"
        ) from error


def _export(task: Task, open_: Labels, recorder: Recorder) -> ExportedProgram:
    model = task.model
    batch = traced_with(copied(task.batch), open_)
    shapes = (dynamic_shapes(batch, open_),) if open_ else None
    try:
        with (
            untouched(model),
            straight_through(recorder),
            recorder.around(model),
            torch.enable_grad(),  # in the caller's gradient mode tracing would drop gradients under no_grad
            conversions_skipped(),
            masks_known(),
            data_followed(),
            quiet(),
        ):
            return export(task.step, (batch,), dynamic_shapes=shapes, strict=False)
    except (PipecompileError, NeedsFullTrace, Fixed):
        raise
    except Exception as error:
        if open_ and not about_contents(error):
            raise Stopped("", f"{_first_line(error)}{_where(error)}") from error
        call = recorder.innermost
        raise stopped(error, call.fqn if call else "", _first_line(error), _where(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _where(error: BaseException) -> str:
    """The user's own file and line in an error's traceback: the last frame outside of torch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(OUTSIDE)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _read(
    program: ExportedProgram, task: Task, open_: Labels, fixed: dict[str, str], recorder: Recorder, places: Places
) -> Graph:
    model, seen = task.model, task.seen
    attributes = _attributes(model)
    given = _user_inputs(program)
    sizes = Sizes.of(given, open_, values(task.batch, open_), places)
    conditions = sizes.conditions(given)
    reader = Reader(
        recorder, seen.calls, attributes, frozenset(seen.changed_buffers), seen.random, seen.changing, sizes
    )
    arguments, inputs, constants = _arguments(program, task.batch, model, sizes, given)
    outputs = reader.read(program.graph_module, arguments)
    check_templates(reader)
    nodes, calls = reader.finished()
    loss, weight = outputs[:2]
    if not isinstance(loss, Ref) or loss.name not in reader.gradient:
        raise CaptureError("the loss does not depend on any trainable parameter; check requires_grad and torch.no_grad")
    reported = dict(zip(task.step.reported, outputs[2:]))
    returned = reported if weight is None else {"the weight": weight, **reported}
    unmade = [name for name, ref in returned.items() if not isinstance(ref, Ref)]
    if unmade:
        raise CaptureError(
            f"{unmade[0]!r}, which the loss function returned, is no result of its computation; leave it out, or make it "
            "there, for example with .clone()"
        )
    weight_name = "" if weight is None else weight.name
    names = rename_values(inputs, nodes, calls, model, loss.name, weight_name)
    calls = tuple(replace(call, keep_whole=seen.keep_whole.get(call.key, call.keep_whole)) for call in calls)
    return Graph(
        inputs=tuple(rename_value(value, names) for value in inputs),
        nodes=tuple(rename_node(node, names) for node in nodes),
        attributes=attributes,
        loss=names[loss.name],
        weight=names.get(weight_name, ""),
        calls=tuple(without_defaults(rename_call(call, names), model) for call in calls),
        constants=constants,
        notes=tuple(task.notes),
        sizes={name: size for name, size in sizes.values.items() if name not in sizes.fixed},
        fixed=fixed | sizes.fixed,
        conditions=conditions,
        reported={name: names[ref.name] for name, ref in reported.items()},
    )


def _user_inputs(program: ExportedProgram) -> list[Any]:
    """What the trace had for each leaf of the batch."""
    specs = program.graph_signature.input_specs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [node.meta.get("val") for spec, node in zip(specs, nodes) if spec.kind is InputKind.USER_INPUT]


def _attributes(model: nn.Module) -> dict[str, AttributeInfo]:
    """Every parameter and buffer by each of its FQNs; tied ones share the first as their canonical name."""
    found: dict[str, AttributeInfo] = {}
    first: dict[int, str] = {}
    named: list[tuple[str, str, torch.Tensor]] = []
    named += [("parameter", *pair) for pair in model.named_parameters(remove_duplicate=False)]
    named += [("buffer", *pair) for pair in model.named_buffers(remove_duplicate=False)]
    for kind, fqn, tensor in named:
        canonical = first.setdefault(id(tensor), fqn)
        spec = Spec(tuple(tensor.shape), dtype_name(tensor.dtype), tensor.requires_grad)
        found[fqn] = AttributeInfo(fqn, canonical, kind, spec)
    return found


def _arguments(
    program: ExportedProgram, batch: Any, model: nn.Module, sizes: Sizes, given: list[Any]
) -> tuple[list[Any], tuple[Value, ...], dict[str, torch.Tensor]]:
    """What stands for each placeholder: an Attribute, a Ref to a batch tensor, or a constant of the trace."""
    leaves = iter(zip(pytree.tree_flatten_with_path((batch,))[0], given))
    arguments: list[Any] = []
    inputs: list[Value] = []
    constants: dict[str, torch.Tensor] = {}
    held = held_twice(model)
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            (path, leaf), traced = next(leaves)
            if isinstance(leaf, torch.Tensor) and not isinstance(spec.arg, ConstantArgument):
                name = spec.arg.name
                shape = tuple(map(sizes.of_size, traced.shape))
                inputs.append(Value(name, Spec(shape, dtype_name(leaf.dtype)), input_path(path[1:])))
                arguments.append(Ref(name))
            else:
                arguments.append(leaf)
        elif fqn := held.get(memory(program.constants.get(spec.target))):
            arguments.append(Attribute(fqn))
        elif spec.target in program.constants and spec.kind is InputKind.CONSTANT_TENSOR:
            constants[spec.target] = program.constants[spec.target]
            arguments.append(Attribute(spec.target))
        else:
            arguments.append(Attribute(str(spec.target).removeprefix(MODEL)))
    return arguments, tuple(inputs), constants

"""From torch.export's graph to ours: regions inlined, identities dropped, storages and gradients followed.

What export gives is a flat graph of aten operations with parameters as inputs. Here each operation becomes a Node with
its arguments, what it reads and changes in place, and whether a gradient flows back through what it makes. Regions
(no_grad, autocast) that export wraps into nested graphs are inlined, each node keeping the regions around it as tags.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from pipecompile.capture import contents
from pipecompile.capture.blocks import OPAQUE
from pipecompile.capture.checkpoints import TAG
from pipecompile.capture.operations import dtype_name, is_random, memory_order, rebuild_outputs
from pipecompile.capture.repeat import repeat
from pipecompile.capture.sizes import Fixed, Sizes, contiguous
from pipecompile.capture.structure import Tensor, Unrenderable, leaves, merge, rebuild, tensors
from pipecompile.capture.tracepoints import MARK, REGION, Recorder, Tracepoint
from pipecompile.capture.transforms import Transformed
from pipecompile.errors import CaptureError
from pipecompile.ir import Attribute, AttributeInfo, Call, Node, Ref, Spec, Value

NO_GRADIENT = ("detach", "_like", "new_", "argmax", "argsort", "bernoulli", "one_hot", "sign_bit")
IDENTITIES = ("alias", "detach_", "to", "contiguous", "dropout", "slice")
ATTRIBUTE = "attribute:"
FLOATING = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


@dataclass(slots=True)
class Reader:
    """Reads one traced graph; ``nodes`` and ``calls`` grow in program order."""

    recorder: Recorder
    eager: Mapping[str, Tracepoint]
    attributes: Mapping[str, AttributeInfo]
    changed_buffers: frozenset[str]
    drawing: frozenset[str] = frozenset()
    changing: frozenset[str] = frozenset()
    sizes: Sizes = field(default_factory=Sizes)
    nodes: list[Node] = field(default_factory=list)
    calls: dict[int, Call] = field(default_factory=dict)
    values: dict[str, Spec] = field(default_factory=dict)
    storage: dict[str, str] = field(default_factory=dict)
    gradient: set[str] = field(default_factory=set)
    told: dict[str, bool] = field(default_factory=dict)
    whole: dict[int, str] = field(default_factory=dict)
    stack: list[int] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    marked: dict[tuple[int, bool], list[Any]] = field(default_factory=dict)
    regions: list[tuple[int, int, int]] = field(default_factory=list)
    around: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def read(self, graph_module: fx.GraphModule, arguments: list[Any], context: tuple[str, ...] = ()) -> list[Any]:
        """Append the graph's operations; ``arguments`` stand for its placeholders. Returns what stands for its outputs."""
        environment: dict[fx.Node, Any] = {}
        given = iter(arguments)
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                environment[node] = next(given)
            elif node.op == "get_attr":
                environment[node] = getattr(graph_module, node.target)
            elif node.op == "output":
                return list(self._map(node.args[0], environment))
            else:
                environment[node] = self._operation(node, environment, context)
        raise AssertionError("a graph has an output")

    def _map(self, whole: Any, environment: Mapping[fx.Node, Any]) -> Any:
        if isinstance(whole, fx.Node):
            if contents.is_symbolic(whole) and environment[whole] is None:
                if self.sizes.names:
                    raise Fixed("", f"{whole.target} of sizes goes into an operation")
                raise contents.refuse(whole, self.recorder.calls[self.stack[-1]].fqn if self.stack else "")
            return environment[whole]
        if isinstance(whole, tuple | list):
            return [self._map(part, environment) for part in whole]
        if isinstance(whole, slice):
            return slice(*(self._map(part, environment) for part in (whole.start, whole.stop, whole.step)))
        return whole

    def _operation(self, node: fx.Node, environment: Mapping[fx.Node, Any], context: tuple[str, ...]) -> Any:
        found = node.meta.get("val")
        if isinstance(found, torch.SymInt) and (self.sizes.names or found.node.expr.is_Integer):
            return self.sizes.of_size(found)
        if contents.is_symbolic(node) or str(node.target).startswith(contents.CHECKS):
            return None
        args = self._map(node.args, environment)
        kwargs = {key: self._map(part, environment) for key, part in node.kwargs.items()}
        if node.target is MARK:
            return self._mark(args[0], args[1], context)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if node.target is OPAQUE:
            return self._opaque(node, args, context)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._region(node, args, context)
        if self._is_identity(node, args):
            return args[0]
        if node.target._opname == "_has_compatible_shallow_copy_type":
            return self._assigned_data(node, args, context)
        return self._append(node, args, kwargs, context)

    def _opaque(self, node: fx.Node, args: list[Any], context: tuple[str, ...]) -> Any:
        """A call that was passed over: an opaque module stays one operation, a repeated block gets its template's."""
        index = args[1]
        if self.recorder.calls[index].template >= 0:
            return repeat(self, index, args[0], self._around(context, call=False))
        self.whole[index] = "it is opaque"
        result = self._append(node, [args[0]], {}, context)
        fqn = self.recorder.calls[index].fqn
        inside = (key.rpartition("@")[0] for key in self.drawing)
        draws = any(f"{name}.".startswith(f"{fqn}.") for name in inside)
        node_ = self.nodes[-1]
        changed = tuple(name for name in node_.buffers if name in self.changed_buffers)
        self.nodes[-1] = replace(node_, random=draws, written_buffers=changed)
        return result

    def _region(self, node: fx.Node, args: list[Any], context: tuple[str, ...]) -> Any:
        name = str(getattr(node.target, "__name__", node.target))
        if name == "wrap_with_set_grad_enabled":
            tag = "torch.enable_grad()" if args[0] else "torch.no_grad()"
            return self.read(args[1], args[2:], (*context, tag))
        if name == "wrap_with_autocast":
            device, dtype, enabled, cache = args[:4]
            tag = f"torch.autocast({device!r}, dtype={dtype}, enabled={enabled}, cache_enabled={cache})"
            return self.read(args[4], args[5:], (*context, tag))
        if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
            raise Transformed(self.recorder.calls[self.stack[-1]].fqn if self.stack else "", contents.place(node))
        if not self.stack:
            raise CaptureError(f"operation {name} outside of the model cannot be split; move it into a module")
        self.whole.setdefault(self.stack[-1], f"it uses the operation {name}")
        return self._append(node, [a for a in args if not isinstance(a, fx.GraphModule)], {}, context)

    def _assigned_data(self, node: fx.Node, args: list[Any], context: tuple[str, ...]) -> Any:
        """An assignment to ``.data``, of which the trace has only a question that came before it."""
        place = contents.place(node)
        if not self.stack or not self.recorder.calls[self.stack[-1]].fqn:
            raise CaptureError(
                f"the model's own forward or the loss function gives .data another size or dtype{place and f' ({place})'}, "
                "which a trace does not follow; change the tensor in place under torch.no_grad, or move that line into a "
                "module of its own"
            )
        self.whole.setdefault(self.stack[-1], f"it gives .data another size or dtype ({place})")
        result = self._append(node, args, {}, context)
        written = (args[0].fqn,) if isinstance(args[0], Attribute) else ()
        self.nodes[-1] = replace(self.nodes[-1], written_buffers=written)
        return result

    def _is_identity(self, node: fx.Node, args: list[Any]) -> bool:
        """Whether the operation gives its first argument itself, as torch does it (the tensor, not a copy)."""
        name = node.target._opname  # type: ignore[union-attr]
        if name not in IDENTITIES or not isinstance(node.args[0], fx.Node):
            return False
        source, result = node.args[0].meta.get("val"), node.meta.get("val")
        if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
            return False
        if name == "slice":
            return str(source.shape) == str(result.shape)  # with open sizes a slice of everything stays in the trace
        if name == "dropout":
            return not node.args[2] or not node.args[1]
        if name == "contiguous":
            return contiguous(self._ints(source.shape), self._ints(source.stride()))
        if name == "detach_":
            return isinstance(args[0], Ref) and args[0].name not in self.gradient
        if name == "to":
            same = source.dtype == result.dtype and source.device == result.device
            named = {argument.name for argument in node.target._schema.arguments}  # type: ignore[union-attr]
            given = dict(zip([a.name for a in node.target._schema.arguments], node.args)) | node.kwargs  # type: ignore[union-attr]
            return same and not given.get("copy") and ("memory_format" not in named or not given.get("memory_format"))
        return True

    def _append(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], context: tuple[str, ...]) -> Any:
        context = self._around(context, call=False)
        reads: list[str] = []
        parameters: list[str] = []
        buffers: list[str] = []
        for _, leaf in leaves((args, kwargs)):
            if isinstance(leaf, Ref) and leaf.name not in reads:
                reads.append(leaf.name)
            elif isinstance(leaf, Attribute) and leaf.fqn in self.attributes:
                (parameters if self.attributes[leaf.fqn].kind == "parameter" else buffers).append(leaf.fqn)
        written = self._written(node, args, kwargs)
        outputs = self._outputs(node, args, kwargs, context)
        result = rebuild_outputs(node.meta.get("val"), [Ref(value.name) for value in outputs])
        target = str(node.target)
        self.nodes.append(
            Node(
                name=self.unused(node.name),
                kind="op",
                target=target,
                args=tuple(args),
                kwargs=kwargs,
                outputs=outputs,
                reads=tuple(reads),
                parameters=tuple(dict.fromkeys(parameters)),
                buffers=tuple(dict.fromkeys(buffers)),
                writes=tuple(w for w in written if not w.startswith(ATTRIBUTE)),
                written_buffers=tuple(w.removeprefix(ATTRIBUTE) for w in written if w.startswith(ATTRIBUTE)),
                context=context,
                module=self.recorder.calls[self.stack[-1]].fqn if self.stack else "",
                random=is_random(node),
                position=len(self.nodes),
                place="" if all(value.spec.known for value in outputs) else contents.place(node),
            )
        )
        return result

    def unused(self, name: str) -> str:
        """A node name that no other node has."""
        found = name if name not in self.names else f"{name}_{len(self.nodes)}"
        self.names.add(found)
        return found

    def _written(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Storages' values and buffers that the operation changes in place."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return ()
        found: list[str] = []
        for position, argument in enumerate(schema.arguments):
            actual = args[position] if position < len(args) else kwargs.get(argument.name)
            mutable = argument.alias_info is not None and argument.alias_info.is_write
            batch_norm = "batch_norm" in schema.name and argument.name in ("running_mean", "running_var")
            for _, leaf in leaves(actual) if mutable or batch_norm else ():
                if isinstance(leaf, Ref):
                    root = self.storage.get(leaf.name, leaf.name)
                    found.append(root if root.startswith(ATTRIBUTE) else leaf.name)
                elif isinstance(leaf, Attribute) and (mutable or leaf.fqn in self.changed_buffers):
                    found.append(ATTRIBUTE + leaf.fqn)
        return tuple(dict.fromkeys(found))

    def _outputs(
        self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], context: tuple[str, ...]
    ) -> tuple[Value, ...]:
        carries = self.carries_gradient(str(node.target), args, kwargs, context)
        root = self._shared_storage(node, args, kwargs)
        outputs = []
        for path, tensor in tensors(node.meta.get("val")):
            name = node.name if not path else f"{node.name}_{'_'.join(str(step) for _, step in path)}"
            while name in self.values:
                name += "_"
            differentiable = carries and (tensor.is_floating_point() or tensor.is_complex())
            shape = self._ints(tensor.shape)
            spec = Spec(shape, dtype_name(tensor.dtype), differentiable)
            if spec.known:
                spec = replace(spec, order=memory_order(shape, self._ints(tensor.stride())))
            self.values[name] = spec
            self.storage[name] = root or name
            if differentiable:
                self.gradient.add(name)
                if root and getattr(node.target, "_schema", None) and node.target._schema.is_mutable:  # type: ignore[union-attr]
                    self.gradient.update(v for v, s in self.storage.items() if s == root)
            outputs.append(Value(name, spec, path, root))
        return tuple(outputs)

    def _ints(self, sizes: Iterable[Any]) -> tuple[int, ...]:
        return tuple(map(self.sizes.of_size, sizes))

    def carries_gradient(self, target: str, args: Any, kwargs: Mapping[str, Any], context: tuple[str, ...]) -> bool:
        """Whether an operation's differentiable results need a gradient."""
        modes = [tag for tag in context if tag in ("torch.no_grad()", "torch.enable_grad()")]
        if modes and modes[-1] == "torch.no_grad()":
            return False
        name = target.split(".")[1] if target.count(".") > 1 else target
        if any(name.startswith(part) or name.endswith(part) for part in NO_GRADIENT):
            return False
        return any(
            leaf.name in self.gradient if isinstance(leaf, Ref) else self._trainable(leaf)
            for _, leaf in leaves((args, kwargs))
        )

    def _trainable(self, leaf: Any) -> bool:
        info = self.attributes.get(leaf.fqn) if isinstance(leaf, Attribute) else None
        return info is not None and info.spec.gradient

    def _shared_storage(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> str:
        """The root of the storage that the results are views of, empty if they are fresh."""
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(result.alias_info for result in schema.returns):
            return ""
        for position, argument in enumerate(schema.arguments):
            actual = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info and isinstance(actual, Ref):
                return self.storage.get(actual.name, actual.name)
            if argument.alias_info and isinstance(actual, Attribute):
                return ATTRIBUTE + actual.fqn
        return ""

    def _around(self, context: tuple[str, ...], call: bool) -> tuple[str, ...]:
        """The regions with checkpoints among them; a call that begins its own checkpoint is not inside of it."""
        found: list[str] = []
        for depth in range(len(context) + 1):
            for index, begun, outer in self.regions:
                own = (index - REGION) % 2 == 1
                if begun == depth and not (call and own and len(self.stack) == outer):
                    number = (index - REGION) // 2
                    found.append(f"{TAG}{number}{self.recorder.regions[number]}")
            found += context[depth : depth + 1]
        return tuple(found)

    def _mark(self, marked: list[Any], event: int, context: tuple[str, ...]) -> None:
        index, entering = self.recorder.events[event]
        if index >= REGION:
            if entering:
                self.regions.append((index, len(context), len(self.stack)))
            else:
                self.regions = [region for region in self.regions if region[0] != index]
            return
        seen = self.recorder.calls[index]
        self.marked[index, entering] = marked
        if entering:
            self.around[index] = self._around(context, call=False)
            self.calls[index] = self._begin(seen, marked, self._around(context, call=True))
            self.stack.append(index)
            return
        self.stack.remove(index)
        self._told_by_eager(index, seen, marked)
        results = [(path, leaf.name) for (path, _), leaf in zip(seen.result, marked) if isinstance(leaf, Ref)]
        self.calls[index] = replace(self.calls[index], last=len(self.nodes), results=tuple(results))

    def _told_by_eager(self, index: int, seen: Tracepoint, marked: list[Any]) -> None:
        """Whether a call's results need a gradient is what eager mode saw, where operations do not tell: a custom autograd
        function's are not what its backward does, and an opaque call has none.
        """
        eager = self.eager.get(seen.key)
        known = [leaf for _, leaf in leaves(eager.result) if isinstance(leaf, Tensor)] if eager else []
        if len(known) != len(marked):
            return
        for leaf, tensor in zip(marked, known):
            if not isinstance(leaf, Ref) or tensor.gradient == (leaf.name in self.gradient):
                continue
            if tensor.gradient:
                self.gradient.add(leaf.name)
                self.told[leaf.name] = True
            elif index in self.whole:
                self.gradient.discard(leaf.name)
                self.told[leaf.name] = False

    def _begin(self, seen: Tracepoint, marked: list[Any], context: tuple[str, ...]) -> Call:
        given = iter(marked)
        args, kwargs, obstacle = (), {}, ""
        try:
            args, kwargs = rebuild(
                (seen.args, dict(seen.kwargs)),
                lambda leaf: next(given) if isinstance(leaf, torch.Tensor) else self._constant(leaf),
            )
            eager = self.eager.get(seen.key)
            if eager is None:
                raise Unrenderable("it is called while tracing but not in eager mode")
            for remembered in (eager.args, eager.kwargs):
                if isinstance(remembered, Unrenderable):
                    raise remembered
            args, kwargs = merge(args, eager.args), merge(kwargs, eager.kwargs)
            if seen.key in self.changing:
                raise Unrenderable("it changes a list or dict that it is given")
        except Unrenderable as reason:
            obstacle = str(reason)
        return Call(
            key=seen.key,
            fqn=seen.fqn,
            parent=seen.parent,
            first=len(self.nodes),
            last=len(self.nodes),
            args=args,
            kwargs=kwargs,
            passed=tuple(leaf.name for leaf in marked if isinstance(leaf, Ref)),
            results=(),
            context=context,
            obstacle=obstacle,
        )

    def _constant(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.SymFloat | torch.SymBool):
            raise Fixed("", "a number that is computed of sizes goes into a module")
        return self.sizes.of_size(leaf) if isinstance(leaf, torch.SymInt) else leaf

    def finished(self) -> tuple[tuple[Node, ...], tuple[Call, ...]]:
        """The nodes with their final gradients, and the calls in the order of the recorder."""

        def settle(value: Value) -> Value:
            gradient = value.name in self.gradient and (value.spec.gradient or value.spec.dtype in FLOATING)
            return replace(value, spec=replace(value.spec, gradient=gradient))

        nodes = tuple(replace(node, outputs=tuple(map(settle, node.outputs))) for node in self.nodes)
        calls = [self.calls[index] for index in sorted(self.calls)]
        position = {index: place for place, index in enumerate(sorted(self.calls))}
        return nodes, tuple(
            replace(call, parent=position.get(call.parent, -1), keep_whole=self.whole.get(index, call.keep_whole))
            for index, call in zip(sorted(self.calls), calls)
        )

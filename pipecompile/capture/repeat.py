"""Puts a traced block's operations where the same block was passed over, under that block's own names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipecompile.capture.blocks import NeedsFullTrace
from pipecompile.capture.checkpoints import TAG
from pipecompile.ir import Attribute, Call, Node, Ref, Value

if TYPE_CHECKING:
    from pipecompile.capture.reader import Reader


def repeat(reader: Reader, index: int, given: list[Any], around: tuple[str, ...]) -> list[Any]:
    """Append the operations of call ``index``'s template for the tensors ``given``; returns what stands for its results.

    ``around`` are the regions that the call is in.
    """
    call = reader.recorder.calls[index]
    template = reader.calls[call.template]
    names: dict[str, Any] = {}
    for old, new in zip(reader.marked[call.template, True], given):
        names[old.name if isinstance(old, Ref) else old.fqn] = new
    move = _Move(names, template.fqn, call.fqn, reader, len(reader.around[call.template]), around)
    offset = len(reader.nodes) - template.first
    for node in reader.nodes[template.first : template.last]:
        reader.nodes.append(move.node(node))
    for inner, clone in zip(range(call.template + 1, reader.recorder.calls[call.template].end), call.clones):
        reader.calls[clone] = move.call(reader.calls[inner], reader.recorder.calls[clone].key, offset)
        reader.whole |= {clone: reader.whole[inner]} if inner in reader.whole else {}
        for entering in (True, False):
            reader.marked[clone, entering] = [move.leaf(leaf) for leaf in reader.marked[inner, entering]]
        reader.calls[clone] = replace(reader.calls[clone], parent=reader.recorder.calls[clone].parent)
    return [move.leaf(leaf) for leaf in reader.marked[call.template, False]]


def check_templates(reader: Reader) -> None:
    """Raise NeedsFullTrace if something inside of a template is read outside, which its repetitions would miss."""
    templates = {call.template for call in reader.recorder.calls if call.template >= 0}
    for index in templates:
        call = reader.calls[index]
        made = {value.name for node in reader.nodes[call.first : call.last] for value in node.outputs}
        results = {name for _, name in call.results}
        for node in reader.nodes[call.last :]:
            if any(name in made and name not in results for name in node.reads):
                raise NeedsFullTrace


class _Move:
    """Rewrites a template's nodes and calls for another block."""

    def __init__(
        self, names: dict[str, Any], old: str, new: str, reader: Reader, outside: int, around: tuple[str, ...]
    ) -> None:
        self.names, self.old, self.new, self.reader = names, old, new, reader
        self.outside, self.around = outside, around
        self.checkpoints: dict[str, str] = {}

    def context(self, context: tuple[str, ...]) -> tuple[str, ...]:
        """The regions around the template give way to those around its repetition, checkpoints inside get new numbers."""
        return (*self.around, *map(self._region, context[self.outside :]))

    def _region(self, tag: str) -> str:
        if not tag.startswith(TAG):
            return tag
        if tag not in self.checkpoints:
            _, comma, options = tag.partition(",")
            regions = self.reader.recorder.regions
            self.checkpoints[tag] = f"{TAG}{len(regions)}{comma}{options}"
            regions.append(comma + options)
        return self.checkpoints[tag]

    def leaf(self, whole: Any) -> Any:
        if isinstance(whole, Ref):
            if whole.name not in self.names:
                raise NeedsFullTrace
            return self.names[whole.name]
        if isinstance(whole, Attribute):
            return self.names.get(whole.fqn) or Attribute(self.fqn(whole.fqn))
        if isinstance(whole, tuple | list):
            return type(whole)(self.leaf(part) for part in whole)
        if isinstance(whole, dict):
            return {key: self.leaf(part) for key, part in whole.items()}
        if isinstance(whole, slice):
            return slice(self.leaf(whole.start), self.leaf(whole.stop), self.leaf(whole.step))
        return whole

    def fqn(self, fqn: str) -> str:
        if fqn.startswith(f"{self.old}."):
            return self.new + fqn.removeprefix(self.old)
        if fqn == self.old:
            return self.new
        if fqn in self.reader.attributes:
            raise NeedsFullTrace
        return fqn

    def node(self, node: Node) -> Node:
        args, kwargs = self.leaf(node.args), self.leaf(dict(node.kwargs))
        carries = self.reader.carries_gradient(node.target, args, kwargs, self.context(node.context))
        outputs = tuple(self._value(value, carries) for value in node.outputs)
        return replace(
            node,
            name=self.reader.unused(node.name),
            args=args,
            kwargs=kwargs,
            outputs=outputs,
            reads=self._names(node.reads),
            parameters=tuple(map(self.fqn, node.parameters)),
            buffers=tuple(map(self.fqn, node.buffers)),
            writes=self._names(node.writes),
            written_buffers=tuple(map(self.fqn, node.written_buffers)),
            context=self.context(node.context),
            module=self.fqn(node.module),
            position=len(self.reader.nodes),
        )

    def _value(self, value: Value, carries: bool) -> Value:
        reader = self.reader
        name = f"{value.name}_"
        while name in reader.values:
            name = f"{value.name}_{len(reader.values)}"
        gradient = carries and value.spec.dtype.startswith(("float", "bfloat", "complex"))
        gradient = reader.told.get(value.name, gradient)
        storage = self._storage(value.storage)
        spec = replace(value.spec, gradient=gradient)
        reader.values[name] = spec
        reader.storage[name] = storage or name
        if gradient:
            reader.gradient.add(name)
        if value.name in reader.told:
            reader.told[name] = gradient
        self.names[value.name] = Ref(name)
        return Value(name, spec, value.path, storage)

    def _storage(self, storage: str) -> str:
        if not storage or storage.startswith("attribute:"):
            return f"attribute:{self.fqn(storage.removeprefix('attribute:'))}" if storage else ""
        root = self.names.get(storage)
        return self.reader.storage.get(root.name, root.name) if isinstance(root, Ref) else ""

    def _names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        moved = [self.leaf(Ref(name)) for name in names]
        return tuple(leaf.name for leaf in moved if isinstance(leaf, Ref))

    def call(self, call: Call, key: str, offset: int) -> Call:
        results = [(path, self.leaf(Ref(name))) for path, name in call.results]
        return replace(
            call,
            key=key,
            fqn=self.fqn(call.fqn),
            first=call.first + offset,
            last=call.last + offset,
            args=self.leaf(call.args),
            kwargs=self.leaf(dict(call.kwargs)),
            passed=self._names(call.passed),
            context=self.context(call.context),
            results=tuple((path, leaf.name) for path, leaf in results if isinstance(leaf, Ref)),
        )

"""One model through ``torch.distributed.pipelining`` in real processes: how far it comes, and whose gradients are right.

Each model is tried in two ways, and the better one counts:

outside   as torch's documentation says: the model gives its output, and the loss is the schedule's, on the last rank. The
          loss function of the family runs there on what the model's call gave, or the one for its kind of head where the
          family leaves the loss to the model (tried only if it gives the model's own loss)
inside    model and loss are one module, all of the batch is its input, and the schedule takes its output as the loss

Tensors go in by name, everything else is bound beforehand, and only outputs that the loss reads come out. The split
points are ``SplitPoint.BEGINNING`` of the model's own blocks, evenly spaced: entries of its outermost module lists, else of
its sequences, else the outermost modules that are called once.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, SplitPoint, pipeline
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipecompile.capture import default_loss, untouched
from pipecompile.compare import buffers, differences, gradients, worst
from pipecompile.runtime import split

MICROBATCHES = 4
WAYS = ("outside", "inside")
PREFIX = "model."
Loss = Callable[[Any, Any], Tensor]


class NotThisWay(Exception):
    """The model has nothing to try in this way."""


@dataclass(frozen=True, slots=True)
class Task:
    """What torch is given: a module whose ``model`` is the family's, its inputs, and the loss of what it gave for a
    microbatch of the given number."""

    module: nn.Module
    inputs: dict[str, Tensor]
    loss: Callable[[Any, int], Tensor]


class StandIn:
    """What a loss function takes for the model: calls go elsewhere, all else (a part that makes the loss) is the model's."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Call(nn.Module):
    """Calls ``model`` as it was called before, with tensors by name; gives those of its outputs that are ``read``."""

    def __init__(self, model: nn.Module, constants: list[Any], structure: Any) -> None:
        super().__init__()
        self.model, self.constants, self.structure = model, constants, structure
        self.read: tuple[int, ...] = ()

    def forward(self, **tensors: Tensor) -> Any:
        args, kwargs = tree_unflatten(_filled(self.constants, tensors), self.structure)
        outputs = tree_flatten(self.model(*args, **kwargs))[0]
        return outputs[self.read[0]] if len(self.read) == 1 else tuple(outputs[i] for i in self.read)


class WithLoss(nn.Module):
    """The loss of a batch whose tensors come by name."""

    def __init__(self, model: nn.Module, loss: Loss, constants: list[Any], structure: Any) -> None:
        super().__init__()
        self.model, self.loss, self.constants, self.structure = model, loss, constants, structure

    def forward(self, **tensors: Tensor) -> Tensor:
        return self.loss(self.model, tree_unflatten(_filled(self.constants, tensors), self.structure)).reshape(1)


def _constants(leaves: list[Any]) -> list[Any]:
    """The leaves with a mark in place of each tensor."""
    return [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _named_tensors(leaves: list[Any]) -> dict[str, Tensor]:
    return {f"input_{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _filled(constants: list[Any], tensors: dict[str, Tensor]) -> list[Any]:
    return [tensors[f"input_{i}"] if leaf is Tensor else leaf for i, leaf in enumerate(constants)]


def inside(model: nn.Module, batch: Any, loss: Loss | None) -> Task:
    leaves, structure = tree_flatten(batch)
    module = WithLoss(model, loss or default_loss, _constants(leaves), structure)
    return Task(module, _named_tensors(leaves), lambda output, m: output.squeeze(0))


def outside(model: nn.Module, batch: Any, loss: Loss | None) -> Task:
    parts = split(batch, MICROBATCHES)
    if loss is None:
        loss = of_the_head(model, batch)
    leaves, structure = tree_flatten(_recorded(model, loss, batch))
    module = Call(model, _constants(leaves), structure)
    module.read, shape = _outputs_read(model, loss, parts[0])

    def of_output(output: Any, m: int) -> Tensor:
        given = dict(zip(module.read, output if isinstance(output, tuple | list) else [output]))
        result = tree_unflatten([given.get(i) for i in range(shape.num_leaves)], shape)
        return loss(StandIn(model, lambda *args, **kwargs: result), parts[m])

    return Task(module, _named_tensors(leaves), of_output)


def _recorded(model: nn.Module, loss: Loss, batch: Any) -> tuple[Any, Any]:
    """The arguments with which a loss function calls the model."""
    seen: list[tuple[Any, Any]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return model(*args, **kwargs)

    with torch.no_grad(), untouched(model):
        loss(StandIn(model, recording), batch)
    if len(seen) != 1:
        raise NotThisWay("the loss function calls the model more than once")
    return seen[0]


def _outputs_read(model: nn.Module, loss: Loss, batch: Any) -> tuple[tuple[int, ...], Any]:
    """Which leaves of the model's output the loss reads, and the output's structure."""
    args, kwargs = _recorded(model, loss, batch)
    leaves, structure = tree_flatten(copy.deepcopy(model)(*args, **kwargs))
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    loss(StandIn(copy.deepcopy(model), lambda *args, **kwargs: tree_unflatten(leaves, structure)), batch).backward()
    return tuple(i for i, leaf in enumerate(leaves) if leaf.grad is not None), structure


def of_the_head(model: nn.Module, batch: Any) -> Loss:
    """The loss that a model of transformers makes of its logits and the labels; NotThisWay if it makes another one."""
    if not (isinstance(batch, dict) and "labels" in batch):
        raise NotThisWay("the loss is the model's own")
    kind = type(model).__name__
    shifted = sys.modules[type(model).__module__].__dict__.get("shift_tokens_right")  # what encoder-decoders begin with

    def loss(called: Any, batch: Any) -> Tensor:
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels, config = batch["labels"], model.config
        if config.is_encoder_decoder and shifted is None:
            given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        elif config.is_encoder_decoder:
            given["decoder_input_ids"] = shifted(labels, config.pad_token_id, config.decoder_start_token_id)
        logits = called(**given).logits
        if "CausalLM" in kind or "LMHead" in kind:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    try:
        with torch.no_grad(), untouched(model):
            torch.manual_seed(0)
            own = default_loss(model, batch)
            torch.manual_seed(0)
            same = torch.allclose(own, loss(model, batch), rtol=1e-5)
    except (ValueError, AttributeError, TypeError):
        same = False
    if not same:
        raise NotThisWay("the loss is the model's own")
    return loss


def split_points(module: nn.Module, inputs: dict[str, Tensor], stages: int) -> dict[str, SplitPoint]:
    """Before evenly spaced blocks: the first stage also has what comes before them."""
    called: Counter[str] = Counter()
    handles = [
        part.register_forward_pre_hook(lambda *_, fqn=fqn: called.update([fqn]))
        for fqn, part in module.named_modules()
        if fqn
    ]
    with torch.no_grad(), untouched(module):
        module(**inputs)
    for handle in handles:
        handle.remove()
    once = [fqn for fqn, count in called.items() if count == 1 and fqn != PREFIX[:-1]]
    parents = dict(module.named_modules())
    for kinds in ((nn.ModuleList,), (nn.ModuleList, nn.Sequential), (nn.Module,)):
        found = [fqn for fqn in once if isinstance(parents[fqn.rpartition(".")[0]], kinds)]
        blocks = [fqn for fqn in found if not any(fqn.startswith(f"{other}.") for other in found)]
        if len(blocks) >= stages:
            return {blocks[s * len(blocks) // stages]: SplitPoint.BEGINNING for s in range(1, stages)}
    raise NotThisWay(f"the model has fewer than {stages} blocks that are called once")


def attempt(case: Any, way: str, stages: int, folder: Path) -> None:
    """Trace the case in this process and run it in ``stages`` forked ones; ``trial.json`` and ``rank.json`` tell."""
    model, batch, loss = case
    for part in model.modules():
        if getattr(getattr(part, "config", None), "use_cache", False):
            part.config.use_cache = False  # pipecompile does so too
    unsplit = copy.deepcopy(model)
    note: dict[str, Any] = {"traces": False}
    try:
        task = (outside if way == "outside" else inside)(model, batch, loss)
        example = {name: tensor.chunk(MICROBATCHES)[0] for name, tensor in task.inputs.items()}
        pipe = pipeline(task.module, (), example, split_spec=split_points(task.module, example, stages))
        if pipe.num_stages != stages:
            raise NotThisWay(f"the split points make {pipe.num_stages} stages")
        note["traces"] = True
    except Exception as error:
        note |= {"error": first_line(error), "skipped": isinstance(error, NotThisWay)}
    write(folder / "trial.json", note)
    if not note["traces"]:
        return
    for rank in range(stages):
        if os.fork() == 0:
            run_rank(pipe, task, rank, (unsplit, batch, loss), folder)
    for _ in range(stages):
        os.wait()


def run_rank(pipe: Any, task: Task, rank: int, unsplit: Any, folder: Path) -> None:
    """Never returns: a rank that waits for a failed one would hang in the process group's destructor."""
    note: dict[str, Any] = {}
    try:
        stages, last = pipe.num_stages, pipe.num_stages - 1
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=stages)
        torch.manual_seed(0)
        stage = pipe.build_stage(rank, torch.device("cpu"))
        schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=lambda output, m: task.loss(output, int(m)))
        losses: list[Tensor] = []
        target = torch.arange(MICROBATCHES) if rank == last else None
        schedule.step(**(task.inputs if rank == 0 else {}), target=target, losses=losses)
        mine = {fqn: p.grad for fqn, p in stage.submod.named_parameters() if p.grad is not None}
        mine |= {f"buffer {fqn}": buffer for fqn, buffer in stage.submod.named_buffers()}
        everyone: list[Any] = [None] * stages
        dist.all_gather_object(everyone, mine)
        if rank == last:
            note |= compare(everyone, sum(losses).item() / MICROBATCHES, *unsplit)
        note["done"] = True
    except BaseException as error:
        note |= {"error": first_line(error), "time": time.time()}
    write(folder / f"rank{rank}.json", note)
    os._exit(0)


def write(path: Path, note: dict[str, Any]) -> None:
    path.with_suffix(".new").write_text(json.dumps(note))
    path.with_suffix(".new").replace(path)


def first_line(error: BaseException) -> str:
    """What started it: the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [f"in {frames[-1].name}"]
    return f"{type(error).__name__}: {lines[0]}"


def compare(
    everyone: list[dict[str, Tensor]], value: float, model: nn.Module, batch: Any, loss: Loss | None
) -> dict[str, Any]:
    """Loss, gradients and buffers beside accumulation on the unsplit model, judged as pipecompile's own are; and the
    gradients once more after the copies of tied parameters are summed by hand."""
    torch.manual_seed(0)
    total = 0.0
    for part in split(batch, MICROBATCHES):
        one = (loss or default_loss)(model, part) / MICROBATCHES
        one.backward()
        total += one.item()
    expected = gradients(model) | {f"buffer {name}": buffer for name, buffer in buffers(model).items()}
    first = {id(p): name for name, p in model.named_parameters()}
    canonical = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    ranks = [dict(_named(tensors, canonical)) for tensors in everyone]
    summed: dict[str, Tensor] = {}
    for tensors in ranks:
        for name, tensor in tensors.items():
            summed[name] = summed[name] + tensor if name in summed and "buffer " not in name else tensor
    by_hand = list(differences(summed, expected, ""))
    alone = [d for tensors in ranks for d in differences(expected | tensors, expected, "")]
    alone += [d for d in by_hand if d.name.strip() not in summed]
    bad = worst(alone)
    return {
        "loss": abs(value - total) <= 1e-5 * max(1.0, abs(total)),
        "gradients": all(d.ok for d in alone),
        "tied_summed_by_hand": all(d.ok for d in by_hand),
        "worst": bad.name.strip(),
        "worst_error": min(bad.error, 9.99),
        "missing": math.isinf(bad.error),
    }


def _named(tensors: dict[str, Tensor], canonical: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """A rank's tensors under the model's first name of each."""
    for name, tensor in tensors.items():
        kind, name = ("buffer ", name.removeprefix("buffer ")) if name.startswith("buffer ") else ("", name)
        name = re.sub(r"@\d+", "", name.removeprefix(PREFIX))  # torch's name of a second call's copy
        yield kind + canonical.get(name, name), tensor

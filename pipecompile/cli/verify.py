"""``pipecompile verify build``: the pipeline against the unsplit model, over three optimizer steps."""

from __future__ import annotations

import argparse
import json
from typing import Any, TextIO

from pipecompile.cli.output import standard_output

STEPS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare loss, every gradient and every buffer with the unsplit model over three optimizer steps; "
        "exit code 1 if they differ."
    )
    parser.add_argument("build", help="a build directory")
    parser.add_argument("--trust", action="store_true", help="accept a build whose files were changed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(options: argparse.Namespace) -> int:
    with standard_output(options.json) as out:
        return _run(options, out)


def _run(options: argparse.Namespace, out: TextIO) -> int:
    from pipecompile.compare import worst
    from pipecompile.opened import open_build

    pipe, model, file = open_build(options.build, options.trust, local=True)
    order = pipe.plan.schedule
    if pipe.updates:
        order += ", which leaves no gradient of a step, compared under gpipe"
    if pipe.updates or pipe.plan.gradient_dtype:
        pipe = pipe.plain(model)
    steps = _compare(pipe, model, file)
    bad = worst([difference for _, found in steps for difference in found])
    if options.json:
        rows = [{"step": i, "loss": loss, "worst": worst(found).name, "error": worst(found).error}
                for i, (loss, found) in enumerate(steps)]  # fmt: skip
        print(json.dumps({"ok": bad.ok, "worst": bad.name, "error": bad.error, "steps": rows}), file=out)
        return 0 if bad.ok else 1
    for index, (loss, found) in enumerate(steps):
        most = worst(found)
        exact = sum(difference.error == 0 for difference in found)
        print(f"step {index}: loss {loss:.6f}, {len(found)} tensors compared, {exact} bit-equal; "
              f"largest difference {most.error:.1e} ({most.name})")  # fmt: skip
    verdict = (
        "equal to the unsplit model" if bad.ok else f"DIFFERENT from the unsplit model: {bad.name}, {bad.error:.1e}"
    )
    print(f"{verdict} ({order}, {len(pipe.plan.stages)} stages, {pipe.plan.microbatches} microbatches)")
    return 0 if bad.ok else 1


def _compare(pipe: Any, model: Any, file: Any) -> list[tuple[float, list[Any]]]:
    """For each step the loss, and the differences of loss, gradients and buffers.

    The unsplit model takes the other's parameters after each optimizer step: adaptive optimizers make full steps out of
    the rounding noise of gradients that are zero in exact arithmetic, as those of key biases are.
    """
    import copy

    import torch

    from pipecompile.compare import buffers, differences, gradients

    unsplit = copy.deepcopy(model)
    optimizer = file.optimizer(list(model.parameters()))
    steps = []
    for index in range(STEPS):
        batch = file.batch(index)
        torch.manual_seed(index)
        loss = pipe.step(batch)
        torch.manual_seed(index)
        expected = pipe.reference(unsplit, batch)
        found = list(differences({"value": loss}, {"value": expected}, "loss"))
        found += differences(gradients(model), gradients(unsplit), "gradient of")
        found += differences(buffers(model), buffers(unsplit), "buffer")
        steps.append((float(loss), found))
        optimizer.step()
        for one, other in zip(model.parameters(), unsplit.parameters()):
            one.grad = other.grad = None
            other.data.copy_(one.data)
    return steps

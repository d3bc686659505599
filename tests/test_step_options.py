"""What a step may do besides: metrics and outputs of the loss function, and every option together in two processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import pipecompile
from pipecompile.errors import BatchError, BuildError, CaptureError
from pipecompile.runtime import split
from tests.models import MODELS
from tests.test_masters import Unsplit, by_name, narrow
from tests.test_training import MICROBATCHES, Tied, compiled, tokens, words


def told(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch["words"])
    right = scores.argmax(-1) == batch["next"]
    loss = F.cross_entropy(scores, batch["next"])
    return loss, {"accuracy": right.float().mean(), "scores": scores, "right": right, "size": scores.square().mean()}


def expected(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Means of the scalars over the microbatches, and the rest of all samples."""
    parts = [told(model, part)[1] for part in split(batch, MICROBATCHES)]
    means = {name: torch.stack([part[name].double() for part in parts]).mean() for name in ("accuracy", "size")}
    rows = {name: torch.cat([part[name] for part in parts]) for name in ("scores", "right")}
    return torch.stack([told(model, part)[0] for part in split(batch, MICROBATCHES)]).mean(), means | rows


def assert_told(pipe: Any, unsplit: nn.Module) -> None:
    with torch.no_grad():
        loss, wanted = expected(unsplit, words(2))
    found, outputs = pipe.evaluate(words(2), outputs=True)
    torch.testing.assert_close(found, loss)
    assert outputs.keys() == wanted.keys()
    assert torch.equal(outputs["scores"], wanted["scores"])
    assert not outputs["scores"].requires_grad
    assert torch.equal(outputs["right"], wanted["right"].to(torch.uint8))
    for name in ("accuracy", "size"):
        torch.testing.assert_close(outputs[name], wanted[name], rtol=1e-6, atol=0)
    pipe.step(words(2))
    assert pipe.metrics.keys() == {"accuracy", "size"}
    torch.testing.assert_close(pipe.metrics["accuracy"], wanted["accuracy"], rtol=1e-6, atol=0)
    assert float(pipe.metrics["size"]) > 0


@pytest.mark.parametrize(("schedule", "mode"), [("gpipe", "none"), ("zb-h1", "stage"), ("1f1b", "calls")])
def test_what_a_loss_function_tells(schedule: str, mode: str) -> None:
    model = Tied()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, told, schedule=schedule, recompute=mode)
    assert torch.equal(pipe.step(words()), pipe.reference(unsplit, words()))
    for p, theirs in zip(model.parameters(), unsplit.parameters()):
        torch.testing.assert_close(p.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    assert_told(pipe, unsplit)


def test_token_means_tell_too_and_the_plan_keeps_it() -> None:
    pipe = compiled(Tied(), lambda model, batch: (*tokens(model, batch), {"kept": (batch["words"] > 2).float().mean()}))
    pipe.step(words())
    torch.testing.assert_close(float(pipe.metrics["kept"]), float((words()["words"] > 2).float().mean()))
    assert [value["name"] for value in pipe.plan.to_json()["reported"]] == ["kept"]


def test_values_from_an_early_stage() -> None:
    def early(model: nn.Module, batch: Any) -> Any:
        hidden = model.table(batch["words"])
        loss = F.cross_entropy(model.head(model.blocks(hidden)), batch["next"])
        return loss, {"first": hidden.norm(), "hidden": hidden}

    model = Tied()
    pipe = compiled(model, early)
    assert "report({'first': " in pipe.source(0)
    _, outputs = pipe.evaluate(words(), outputs=True)
    assert torch.equal(outputs["hidden"], model.table(words()["words"]))


def uneven(rows: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {name: torch.randint(11, (rows,), generator=generator) for name in ("words", "next")}


def accumulate(model: nn.Module, batch: Any, loss: Any) -> Tensor:
    """On the unsplit model, over the microbatches with rows that torch.tensor_split gives; token means over all."""
    parts = [dict(zip(batch, row)) for row in zip(*(t.tensor_split(MICROBATCHES) for t in batch.values()))]
    parts = [part for part in parts if len(part["words"])]
    if loss is tokens:
        pairs = [tokens(model, part) for part in parts]
        value = torch.stack([total for total, _ in pairs]).sum() / torch.stack([weight for _, weight in pairs]).sum()
    else:
        value = torch.stack([loss(model, part) for part in parts]).sum() / len(parts)
    value.backward()
    return value.detach()


def assert_uneven_is_exact(loss: Any, prepare: Any = lambda pipe: None, **options: Any) -> None:
    model = Tied()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, loss, **options)
    prepare(pipe)
    for rows in (10, 8, 7, 3, 2, 8):
        batch = uneven(rows)
        value = accumulate(unsplit, batch, loss)
        torch.testing.assert_close(pipe.evaluate(batch), value, rtol=1e-6, atol=0)
        torch.testing.assert_close(pipe.step(batch), value, rtol=1e-6, atol=0)
        for name, p in pipe.named_parameters():
            torch.testing.assert_close(p.grad, unsplit.get_parameter(name).grad, rtol=1e-5, atol=1e-7, msg=name)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["words"]), batch["next"])


@pytest.mark.parametrize(("schedule", "mode", "loss"), [("1f1b", "none", cross_entropy), ("zb-h1", "stage", tokens)])
def test_rows_that_do_not_divide(schedule: str, mode: str, loss: Any) -> None:
    assert_uneven_is_exact(loss, schedule=schedule, recompute=mode)


def test_outputs_of_rows_that_do_not_divide() -> None:
    model = Tied()
    pipe = compiled(model, told)
    _, outputs = pipe.evaluate(uneven(), outputs=True)
    torch.testing.assert_close(outputs["scores"], model(uneven()["words"]))
    loss, outputs = pipe.evaluate(uneven(3), outputs=True)
    scores = model(uneven(3)["words"])
    torch.testing.assert_close(outputs["scores"], scores)
    right = (scores.argmax(-1) == uneven(3)["next"]).double()
    torch.testing.assert_close(outputs["accuracy"], right.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, F.cross_entropy(scores, uneven(3)["next"]))


def noisy() -> Tied:
    model = Tied()
    for place in (3, 1):
        model.blocks.insert(place, nn.Dropout(0.3))
    return model


def test_noise_of_fewer_rows_than_microbatches() -> None:
    model = noisy()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, schedule="zb-h1", recompute={1: "stage", 2: "calls"})
    for rows in (2, 8):
        assert torch.equal(pipe.step(uneven(rows)), pipe.reference(unsplit, uneven(rows)))
        for p, theirs in zip(model.parameters(), unsplit.parameters()):
            torch.testing.assert_close(p.grad, theirs.grad, rtol=1e-6, atol=1e-8)


def replicas_take_small_batches() -> None:
    """Each of two processes has all stages; the mean over replicas, however many rows each has been given."""
    rank = torch.distributed.get_rank()
    model = noisy()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, ranks=1, schedule="interleaved-1f1b")
    for rows in ((3, 10), (8, 1)):
        value = pipe.step(uneven(rows[rank]))
        expected = pipe.reference(unsplit, uneven(rows[0]), others=[uneven(rows[1])])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        for name, p in pipe.named_parameters():
            torch.testing.assert_close(p.grad, unsplit.get_parameter(name).grad, rtol=1e-5, atol=1e-7, msg=name)


def test_weights_that_are_updated_on_the_way_need_every_microbatch() -> None:
    pipe = compiled(Tied(), schedule="pipedream")
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    with pytest.raises(BatchError, match="the batch has 3 rows, fewer than the 4 microbatches by which this program"):
        pipe.step(uneven(3), optimizer)
    pipe.evaluate(uneven(3))
    pipe.step(uneven(5), optimizer)


def test_no_rows_are_refused() -> None:
    with pytest.raises(BatchError, match=r"batch\['words'\] has 0 rows in dim 0.*use a batch of 4 rows"):
        compiled(Tied()).evaluate(uneven(0))


def test_only_tensors_can_be_told() -> None:
    with pytest.raises(CaptureError, match="returned 'lr': float besides the loss, expected tensors by name"):
        compiled(Tied(), lambda model, batch: (F.cross_entropy(model(batch["words"]), batch["next"]), {"lr": 0.1}))


def test_nothing_told_costs_nothing() -> None:
    pipe = compiled(Tied())
    pipe.step(words())
    assert pipe.metrics == {}
    assert not any("report(" in pipe.source(s) for s in range(4))


def ranks_recompute_and_tell() -> None:
    for mode, schedule in (("stage", "interleaved-1f1b"), ("calls", "interleaved-1f1b")):
        model = Tied(noisy=True)
        unsplit = copy.deepcopy(model)
        pipe = compiled(model, told, schedule=schedule, ranks=2, recompute=mode)
        assert torch.equal(pipe.step(words()), pipe.reference(unsplit, words()))
        mine = dict(pipe.named_parameters())
        assert 0 < len(mine) < len(list(model.parameters()))
        for name, p in mine.items():
            torch.testing.assert_close(p.grad, unsplit.get_parameter(name).grad, rtol=1e-5, atol=1e-7, msg=name)
        for stage in pipe.stages.values():
            for name, buffer in stage.named_buffers():
                assert torch.equal(buffer, unsplit.get_buffer(name)), name
        model.eval()
        unsplit.eval()
        for stage in pipe.stages.values():
            stage.eval()
        assert_told(pipe, unsplit)


def ranks_train_masters() -> None:
    model = narrow()
    unsplit = Unsplit(copy.deepcopy(model))
    pipe = compiled(model, schedule="interleaved-1f1b", ranks=2, gradient_dtype=torch.float32)
    optimizers = [torch.optim.AdamW(p, lr=0.01, fused=True) for p in (pipe.master_parameters(), unsplit.masters)]
    for step in range(2):
        pipe.step(words(step))
        unsplit.step(words(step))
        for (name, mine), theirs in zip(pipe.named_master_parameters(), by_name(unsplit, pipe)):
            assert torch.equal(mine.grad, theirs.grad), name
        norm = pipe.clip_grad_norm_(1e6)
        torch.testing.assert_close(norm, clip_grad_norm_(unsplit.masters, 1e6), rtol=1e-6, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        unsplit.write_back()
    pipe.evaluate(words())
    for (name, mine), theirs in zip(pipe.named_master_parameters(), by_name(unsplit, pipe)):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(model.get_parameter(name), mine.detach().bfloat16()), "the parameter is its master, rounded"


def ranks_sum_a_tied_master() -> None:
    """Its two uses are summed in float32 over the ranks, and in bfloat16 on the unsplit model."""
    model = narrow(tied=True)
    unsplit = Unsplit(copy.deepcopy(model))
    pipe = compiled(model, schedule="interleaved-1f1b", ranks=2, gradient_dtype=torch.float32)
    pipe.step(words())
    unsplit.step(words())
    mine, theirs = dict(pipe.named_master_parameters())["table.weight"].grad, unsplit.masters[0].grad
    assert mine.dtype == torch.float32
    assert float((mine - theirs).norm() / theirs.norm()) < 5e-3


class Given(nn.Module):
    """Gives a structure: scores with the batch second, a scalar, what it was given, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied()

    def forward(self, words: Tensor, next: Tensor) -> dict[str, Any]:
        hidden = self.inner.table(words)
        scores = self.inner.head(self.inner.blocks(hidden))
        loss = F.cross_entropy(scores, next)
        return {
            "loss": loss,
            "turned": scores.t(),
            "words": words,
            "some": [hidden, {"size": scores.norm()}],
            "no": None,
        }


def assert_gives_outputs(**options: Any) -> None:
    model = Given()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, None, outputs=True, **options)
    assert torch.equal(pipe.step(words()), pipe.reference(unsplit, words()))
    for batch in (words(2), uneven(10)):
        with torch.no_grad():
            wanted = unsplit(**batch)
            parts = [unsplit(*part) for part in zip(*(t.tensor_split(MICROBATCHES) for t in batch.values()))]
        _, outputs = pipe.evaluate(batch, outputs=True)
        assert outputs.keys() == {"turned", "some[0]", "some[1]['size']"}
        torch.testing.assert_close(outputs["turned"], wanted["turned"])
        assert torch.equal(outputs["some[0]"], wanted["some"][0])
        sizes = torch.stack([part["some"][1]["size"].double() for part in parts])
        torch.testing.assert_close(outputs["some[1]['size']"], sizes.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"schedule": "zb-h1", "recompute": "stage"}], ids=str)
def test_what_the_model_gives(options: dict[str, Any]) -> None:
    assert_gives_outputs(**options)


def ranks_give_outputs() -> None:
    assert_gives_outputs(schedule="interleaved-1f1b", ranks=2)


def test_what_a_language_model_gives() -> None:
    model, batch, loss = MODELS["gpt2"]()
    pipe = pipecompile.compile(model, batch, stages=4, microbatches=4, loss=loss, costs="estimate", outputs=True)
    with torch.no_grad():
        wanted = model(**batch)
    _, outputs = pipe.evaluate(batch, outputs=True)
    assert outputs.keys() == {"logits"}
    torch.testing.assert_close(outputs["logits"], wanted.logits)
    assert "report({'logits': " in pipe.source(3)


def test_no_outputs_are_named() -> None:
    with pytest.raises(BuildError, match="there are no outputs to give: compile with outputs=True"):
        compiled(Tied()).evaluate(words(), outputs=True)
    with pytest.raises(CaptureError, match="the loss function calls only parts of it"):
        compiled(Tied(), lambda model, batch: model.table(batch["words"]).square().mean(), outputs=True)
    pipe = compiled(Tied(), told, outputs=True)
    assert torch.equal(*(pipe.evaluate(words(), outputs=True)[1][name] for name in ("output", "scores")))

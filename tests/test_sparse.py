"""Tables with sparse gradients: what is in ``.grad`` is what the unsplit model has there, sparse or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_step_options import accumulate
from tests.test_training import WIDTH, WORDS, Tied, compiled, cross_entropy, words


class Twice(Tied):
    """A table that is read in the first stage and, as itself (``sparse``) or as the head's weight, in the last one."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table.sparse = True
        if sparse:
            self.again = nn.Embedding(WORDS, WIDTH, sparse=True)
            self.again.weight = self.table.weight
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.sparse = sparse

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.blocks(self.table(words))
        return self.head(hidden + 0.0 * self.again(words) if self.sparse else hidden)


def assert_as_unsplit(sparse: bool, **options: Any) -> None:
    """Two batches, whose gradients are added."""
    model = Twice(sparse)
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, **options)
    for seed in (1, 2):
        batch = {name: value[:4].repeat(2) for name, value in words(seed).items()}  # some rows are in neither
        pipe.step(batch)
        accumulate(unsplit, batch, cross_entropy)
    for name, p in pipe.named_parameters():
        grad, expected = p.grad, unsplit.get_parameter(name).grad
        assert grad.layout == expected.layout, name
        if expected.is_sparse:
            grad, expected = grad.coalesce(), expected.coalesce()
            assert torch.equal(grad.indices(), expected.indices()), "rows that are there, though they be zeros"
            grad, expected = grad.values(), expected.values()
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("options", [{"costs": "measure"}, {"schedule": "zb-h1"}], ids=str)
def test_a_table_in_two_stages(sparse: bool, options: dict[str, Any]) -> None:
    assert_as_unsplit(sparse, **options)


def ranks_sum_sparse_gradients() -> None:
    for sparse in (False, True):
        assert_as_unsplit(sparse, stages=2, schedule="zb-h1")

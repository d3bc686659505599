"""Batches of every shape are split into views of equal shares."""

from __future__ import annotations

from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch

from pipecompile.errors import BatchError
from pipecompile.runtime import split

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Sample:
    x: Any
    name: str


def test_nested_structures_keep_their_types_and_whole_leaves() -> None:
    x, y, scale = torch.arange(8).view(4, 2), torch.arange(4.0), torch.tensor(3.0)
    batch = {"a": [x, (y, None)], "b": Pair(y, "whole"), "c": Sample(x, "n"), "scale": scale}
    first, second = split(batch, 2)
    assert torch.equal(first["a"][0], x[:2])
    assert torch.equal(second["a"][0], x[2:])
    assert torch.equal(second["a"][1][0], y[2:])
    assert second["a"][1][1] is None
    assert type(second["b"]) is Pair
    assert torch.equal(second["b"].left, y[2:])
    assert second["b"].right == "whole"
    assert torch.equal(second["c"].x, x[2:])
    assert second["c"].name == "n"
    assert second["scale"] is scale


@pytest.mark.parametrize("make", [UserDict, lambda d: defaultdict(list, d), MappingProxyType])
def test_mappings_other_than_dict(make: Any) -> None:
    x = torch.arange(4)
    batch = make({"x": x})
    second = split(batch, 2)[1]
    assert torch.equal(second["x"], x[2:])
    assert torch.equal(batch["x"], x)
    assert isinstance(second, dict if make is MappingProxyType else type(batch))


def test_shares_are_views_and_one_microbatch_is_the_batch() -> None:
    x = torch.arange(6.0)
    (only,) = split((x,), 1)
    assert torch.equal(only[0], x)
    third = split(x, 3)[2]
    x[4] = 9
    assert third[0] == 9


def test_rows_that_do_not_divide() -> None:
    message = r"batch\['x'\] has 10 rows in dim 0, which do not divide into 4 microbatches; use a batch of 8 rows"
    with pytest.raises(BatchError, match=message):
        split({"x": torch.zeros(10, 2)}, 4)


def test_no_rows() -> None:
    with pytest.raises(BatchError, match=r"has 0 rows in dim 0.*use a batch of 2 rows"):
        split(torch.zeros(0, 2), 2)


def test_leaves_that_disagree() -> None:
    with pytest.raises(BatchError, match=r"batch\[1\] has 3 rows in dim 0, but batch\[0\] has 4; every tensor"):
        split((torch.zeros(4), torch.zeros(3)), 2)


def test_nothing_to_split() -> None:
    assert split({"n": 3}, 1) == [{"n": 3}]
    with pytest.raises(BatchError, match="no tensor to split into 2 microbatches"):
        split({"n": 3, "scale": torch.tensor(1.0)}, 2)

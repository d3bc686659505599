"""Model files: what they must define, what they may, and what happens when they change or fail."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from pipecompile.errors import BuildError, CaptureError
from pipecompile.model_file import default_optimizer, read_model_file

WHOLE = """
import torch
from torch import nn

def model(): return nn.Linear(2, 2)
def batch(): return (torch.ones(4, 2),)
def loss(model, batch): return model(batch[0]).mean()
def optimizer(parameters): return torch.optim.SGD(parameters, lr=0.5)
"""
SHORT = "from torch import nn\ndef model(): return nn.Linear(2, 2)\ndef batch(): return {}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "net.py"
    path.write_text(text)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE)
    file = read_model_file(path)
    assert file.path == path
    assert file.sha256 == hashlib.sha256(WHOLE.encode()).hexdigest()
    model = file.model()
    assert file.loss(model, file.batch()) == model(torch.ones(4, 2)).mean()
    assert isinstance(file.optimizer(model.parameters()), torch.optim.SGD)


def test_loss_and_optimizer_may_be_left_out(tmp_path: Path) -> None:
    file = read_model_file(write(tmp_path, SHORT))
    assert file.loss is None
    assert file.optimizer is default_optimizer
    assert isinstance(file.optimizer(file.model().parameters()), torch.optim.AdamW)


def test_a_model_is_the_same_in_every_process(tmp_path: Path) -> None:
    file = read_model_file(write(tmp_path, SHORT))
    torch.manual_seed(7)
    first = file.model().weight
    torch.manual_seed(8)
    assert torch.equal(first, file.model().weight)
    assert not torch.equal(first, file.model(seed=1).weight)


DRAWS = """
import random
import numpy
import torch
from torch import nn
def draw(): return torch.rand(2) + torch.from_numpy(numpy.random.rand(2)) + random.random()
def model():
    module = nn.Linear(2, 1, dtype=torch.float64)
    module.weight.data[0] = draw()
    return module
def batch(): return (draw(),)
"""


def test_what_a_file_draws_from_numpy_and_python_is_the_same_in_every_process(tmp_path: Path) -> None:
    file = read_model_file(write(tmp_path, DRAWS))
    assert torch.equal(file.model().weight, file.model().weight)
    assert torch.equal(file.batch(3)[0], file.batch(3)[0])
    assert not torch.equal(file.batch(3)[0], file.batch(4)[0])


def test_the_file_that_a_build_was_made_of_must_be_unchanged(tmp_path: Path) -> None:
    digest = read_model_file(write(tmp_path, SHORT)).sha256
    assert read_model_file(tmp_path / "net.py", digest).sha256 == digest
    path = write(tmp_path, SHORT + "# another line\n")
    with pytest.raises(BuildError, match=r"net\.py was changed since the build was made of it; compile again, or"):
        read_model_file(path, digest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def batch(): return ()", r"net\.py has no function model\(\); add one that returns the nn\.Module"),
        ("def model(): return 1\nbatch = 3", r"net\.py has no function batch\(\); add one that returns a whole batch"),
        ("import a_module_that_is_not_there", "fails when it is run: ModuleNotFoundError: No module named"),
        ("def model(:", "fails when it is run: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        read_model_file(write(tmp_path, text))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "net.txt"
    path.write_text(SHORT)
    with pytest.raises(CaptureError, match=r"is no Python file; expected a name that ends in \.py"):
        read_model_file(path)
    with pytest.raises(CaptureError, match="cannot be read: No such file or directory; give the path of one"):
        read_model_file(tmp_path / "absent.py")

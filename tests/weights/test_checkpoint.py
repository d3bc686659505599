"""Checkpoints are read as the reference implementation writes them, and refused by tensor name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipecompile.errors import CheckpointError
from pipecompile.weights.checkpoint import INDEX, SINGLE, open_checkpoint
from pipecompile.weights.tensor_file import DTYPES, read_header, write_tensors

EVIL = ("../x", '"; import os', "/etc/passwd", "a.b:c")


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(3, k + 1) for k, name in enumerate(("first", "second", *EVIL))} | {"none": torch.zeros(0)}


def indexed(folder: Path, places: dict[str, Any]) -> Path:
    save_file({"first": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_both_ways_with_the_reference_implementation(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(12).reshape(3, 4).to(dtype)
    write_tensors(tmp_path / "ours.safetensors", {"x": value, "scalar": value[0, 0]}, {"format": "pt"})
    theirs = load_file(tmp_path / "ours.safetensors")
    assert torch.equal(theirs["x"].to(torch.complex64), value.to(torch.complex64))
    assert theirs["scalar"].shape == ()
    save_file({"x": value}, tmp_path / SINGLE)
    into = torch.zeros(3, 4).to(dtype)
    open_checkpoint(tmp_path).read(["x"], into)
    assert into.dtype == dtype
    assert torch.equal(into.to(torch.complex64), value.to(torch.complex64))


def test_a_transposed_tensor_is_written_and_read(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "x.safetensors", {"x": value.T})
    into = torch.zeros(2, 3).T
    open_checkpoint(tmp_path / "x.safetensors").read(["x"], into)
    assert torch.equal(into, value.T)


def test_names_are_never_paths(tmp_path: Path) -> None:
    write_tensors(tmp_path / SINGLE, tensors())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    checkpoint = open_checkpoint(tmp_path)
    for name, value in tensors().items():
        into = torch.zeros_like(value)
        checkpoint.read([name], into)
        assert torch.equal(into, value)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "x.pt", "c:x.safetensors", "", 3, None]
)
def test_an_index_that_points_outside_is_refused(tmp_path: Path, file: Any) -> None:
    with pytest.raises(CheckpointError, match=r"puts tensor 'first' into .* no safetensors file inside of its folder"):
        open_checkpoint(indexed(tmp_path, {"first": file}))


def test_an_index_reads_only_the_files_that_it_needs(tmp_path: Path) -> None:
    file = "model-00001-of-00001.safetensors"
    checkpoint = open_checkpoint(indexed(tmp_path, {"first": file, "other": "gone.safetensors", "lost": file}))
    into = torch.zeros(2)
    checkpoint.read(["alias", "first"], into)
    assert into.tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"gone.safetensors' cannot be read: No such file.*again"):
        checkpoint.read(["other"], into)
    with pytest.raises(CheckpointError, match=r"tensor 'lost' is not in .*where the index puts it"):
        checkpoint.read(["lost"], into)
    with pytest.raises(CheckpointError, match="lacks 'nothing'; give a checkpoint of this model"):
        checkpoint.read(["nothing"], into)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON .* again"), ("[]", "has no weight_map"), ("{}", "no weight_map")],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has neither {INDEX} nor {SINGLE}; give a folder that has"):
        open_checkpoint(tmp_path)


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / SINGLE, {name: torch.ones(1) for name in "abcdef"})
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check_names([["a", "tied"], *"bcdef"])
    with pytest.raises(CheckpointError, match=r"lacks 'z', which the model has; give a checkpoint of this model"):
        checkpoint.check_names([*"abcdef", ["z"]])
    with pytest.raises(CheckpointError, match=r"lacks 'z', .* and has 'c', 'd', 'e' and 1 more instead"):
        checkpoint.check_names([*"ab", ["z"]])
    with pytest.raises(CheckpointError, match=r"has 'f', which the model has not; .* remove them"):
        checkpoint.check_names(["a", "b", "c", "d", "e"])


def test_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / SINGLE, {"x": torch.ones(2, 3)})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor 'x' in .* has shape \[2, 3\], but the model's has \[3, 2\]"):
        checkpoint.read(["x"], torch.zeros(3, 2))
    with pytest.raises(CheckpointError, match=r"'x' in .* is float32, but the model's is bfloat16; convert the check"):
        checkpoint.read(["x"], torch.zeros(2, 3, dtype=torch.bfloat16))


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    write_tensors(path, {"x": torch.ones(4), "y": torch.ones(4)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"'[xy]' is cut off|cut off in its header|is no safetensors file"):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"tensor 'y' is cut off: .* ends at byte"):
        open_checkpoint(path)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    write_tensors(path, {"x": torch.ones(4)})
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="tensor 'x' is cut off"):
        checkpoint.read(["x"], torch.zeros(4))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    ],
)
def test_a_forged_header_is_refused(tmp_path: Path, entry: Any) -> None:
    text = json.dumps({"x": entry}).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=r"tensor 'x' .* (is described by|has 4 bytes, but float32\[2\] needs 8)"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\2\0\0\0\0\0\0\0[]", "is no JSON object"),
        (b"\2\0\0\0\0\0\0\0{{", "is no JSON "),
        (b"\xff" * 16, "is no safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / SINGLE)


def test_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'x' is complex128, which safetensors cannot hold; convert it"):
        write_tensors(tmp_path / SINGLE, {"x": torch.zeros(1, dtype=torch.complex128)})

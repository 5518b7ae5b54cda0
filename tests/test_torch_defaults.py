"""No tensor of either package depends on torch's default device or default dtype, which belong to the user."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for part in ("client/freestep", "service/freestep_service") for file in (ROOT / part).rglob("*.py"))

PLACED = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
    *("sparse_coo_tensor", "tril_indices", "triu_indices"),
}
"""Functions of torch that take the default device, and most of them the default dtype, unless they are given others."""
TYPED = {"frombuffer"}
"""Functions of torch that take the default dtype."""
LEGACY = {
    "Tensor",
    "FloatTensor",
    "DoubleTensor",
    "HalfTensor",
    "BFloat16Tensor",
    "get_default_dtype",
    "get_default_device",
}
"""Constructors that cannot be given a dtype; and what reads the defaults."""


def incomplete(source: str) -> list[str]:
    """The calls that make a tensor without naming its device and its dtype."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch":
            name = node.func.attr
        elif isinstance(node.func, ast.Name) and node.func.id in imported:
            name = imported[node.func.id]
        else:
            continue
        given = {keyword.arg for keyword in node.keywords}
        needed = {"dtype", "device"} if name in PLACED else {"dtype"} if name in TYPED else set()
        if name in LEGACY or not needed <= given:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_new_tensor_names_its_device_and_dtype(file: Path) -> None:
    assert incomplete(file.read_text()) == []


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("import torch\ntorch.zeros(3)", True),
        ("import torch\ntorch.zeros(3, dtype=torch.float32)", True),
        ("import torch\ntorch.arange(3, device='cpu')", True),
        ("import torch\ntorch.frombuffer(memory)", True),
        ("import torch\ntorch.Tensor(3)", True),
        ("from torch import empty as fresh\nfresh(3)", True),
        ("import torch\ntorch.zeros(3, dtype=torch.float32, device='cpu')", False),
        ("import torch\ntorch.frombuffer(memory, dtype=torch.uint8)", False),
        ("import torch\ntorch.zeros_like(other)", False),
        ("import numpy\nnumpy.zeros(3)", False),
    ],
)
def test_what_depends_on_the_defaults_is_told_from_what_does_not(source: str, is_found: bool) -> None:
    assert bool(incomplete(source)) == is_found

"""Every call of torch_npu in a source file against the operations' schemas, without running anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torch

SCHEMAS = Path(__file__).parent / "schemas"
VERSIONS = ("2.7.1", "2.13.0")
# What a literal may be given for.
_LITERALS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def schemas(version: str) -> dict[str, torch._C.FunctionSchema]:
    """Operation -> schema in one release of torch_npu."""
    lines = (SCHEMAS / f"torch_npu-{version}.txt").read_text().splitlines()
    parsed = [torch._C.parse_schema(line) for line in lines if not line.startswith("#")]
    return {schema.name: schema for schema in parsed}


def calls(source: str) -> Iterator[ast.Call]:
    """`torch_npu.npu_...(...)` in a source text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            function = node.func
            if isinstance(function.value, ast.Name) and function.value.id == "torch_npu":
                yield node


def complaints(call: ast.Call, version: str) -> list[str]:
    """Why a release of torch_npu would refuse this call."""
    name = call.func.attr  # type: ignore[attr-defined]
    if name not in (known := schemas(version)):
        return [f"torch_npu {version} has no {name}"]
    arguments = known[name].arguments
    positional = [a for a in arguments if not a.kwarg_only]
    keywords = {k.arg: k.value for k in call.keywords}
    if None in keywords or any(isinstance(a, ast.Starred) for a in call.args):
        return [f"{name}: * and ** cannot be checked"]
    wrong = []
    if len(call.args) > len(positional):
        wrong.append(f"{name}: {len(call.args)} positional arguments, {version} has {len(positional)}")
    given = dict(zip((a.name for a in positional), call.args, strict=False)) | keywords
    types = {a.name: a for a in arguments}
    for argument, value in given.items():
        if argument not in types:
            wrong.append(f"{name}: {version} has no argument {argument}")
            continue
        kind = str(types[argument].type).removeprefix("Optional[").removesuffix("]")
        if isinstance(value, ast.Constant) and value.value is not None and kind in _LITERALS:
            right = type(value.value) in _LITERALS[kind]
            if not right:
                wrong.append(f"{name}: {argument} is {kind} in {version}, not {value.value!r}")
    missing = [a.name for a in arguments if not a.has_default_value() and a.name not in given]
    wrong += [f"{name}: {version} needs {argument}" for argument in missing]
    return wrong

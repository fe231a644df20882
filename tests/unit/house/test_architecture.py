"""The house: imports point downwards, light modules stay light, files stay small, every flag is explained."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "qwen3_npu"
ENTRY_POINTS = sorted(p for p in ROOT.glob("*.py") if p.name != "setup.py")

LEVELS = {
    "parity": 5,
    "trace": 5,
    "training": 4,
    "inference": 4,
    "evaluation": 4,
    "checkpoint": 3,
    "data": 3,
    "model": 2,
    "distributed": 2,
}
# A command among the light modules that hands over to a heavy one.
COMMANDS = {"plan.__main__": 6}
LEVELS |= {"kernels": 1, "platform": 1, "doctor": 4, "watch": 3}
# Importable anywhere, without torch.
LIGHT = ("errors", "schema", "cli", "args", "log", "progress", "numbers", "lease", "processes", "once")
LIGHT += ("model.arch", "model.sizes")
LIGHT += ("console", "files", "distributed.layout", "distributed.environment", "plan")
LIGHT += ("ledger", "watch.times", "watch.state", "watch.judge", "watch.watcher", "watch.stragglers", "watch.here")
LIGHT += ("watch.flight", "watch.device")
SIDEWAYS_ALLOWED = {("evaluation", "inference"), ("model", "distributed"), ("distributed", "model")}


def modules() -> list[tuple[str, Path]]:
    """(dotted name inside the package, file)."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file of the project; many tests look at each."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    """Everything a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def is_light(module: str) -> bool:
    return any(module == light or module.startswith(light + ".") for light in LIGHT)


def level(module: str) -> int:
    if module in COMMANDS:
        return COMMANDS[module]
    return 0 if is_light(module) or not module else LEVELS[module.split(".")[0]]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_downwards(module: str, path: Path) -> None:
    own = module.split(".")[0]
    for imported in imports(path):
        if not imported.startswith("qwen3_npu.") or not module:
            continue
        target = imported.removeprefix("qwen3_npu.")
        package = target.split(".")[0]
        if package not in LEVELS or is_light(target) or package == own:
            continue
        allowed = level(target) < level(module) or (own, package) in SIDEWAYS_ALLOWED
        assert allowed, f"{module} (level {level(module)}) imports {target} (level {level(target)})"


# The rooms of data: text and read know no other, train knows text, preprocess all of them.
DATA_ROOMS = {"text": (), "read": (), "train": ("text",), "preprocess": ("text", "read", "train")}
DATA_ROOMS["__main__"] = tuple(DATA_ROOMS)


def test_rooms_of_data_point_one_way() -> None:
    for module, path in modules():
        room = module.split(".")[1:2]
        if module.startswith("data.") and room:
            for imported in imports(path):
                parts = imported.split(".")
                if parts[:2] == ["qwen3_npu", "data"] and len(parts) > 2 and parts[2] != room[0]:
                    assert parts[2] in DATA_ROOMS[room[0]], f"{module} imports {imported}"


# Rooms of checkpoint: each imports those of a lower number only.
ROOMS = {"binary": 0, "mapping": 1, "folders": 2, "formats": 3, "verify": 4, "convert": 5, "training": 5}


@pytest.mark.parametrize(("module", "path"), [m for m in modules() if m[0].startswith("checkpoint.")])
def test_rooms_of_checkpoint_are_in_order(module: str, path: Path) -> None:
    own = module.split(".")[1]
    for imported in imports(path):
        if imported.startswith("qwen3_npu.checkpoint."):
            room = imported.split(".")[2]
            assert room == own or ROOMS[room] < ROOMS[own], f"{module} imports {imported}"


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_vendor_imports_are_in_their_place(module: str, path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert "torch_npu" not in roots or module in ("platform.npu", "kernels.npu", "kernels.npu_gradients")
    assert "mindspeed" not in roots or module == "kernels.mindspeed"
    assert not any(name.startswith("megatron.training") for name in imports(path))


def sources() -> list[Path]:
    """Every Python file of the project: package, scripts, tests, benchmarks."""
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples")
    return [*ENTRY_POINTS, *(path for folder in folders for path in sorted(folder.rglob("*.py")))]


def test_files_are_small() -> None:
    long = [f"{path.relative_to(ROOT)}: {count}" for path in sources() if (count := lines(path)) > 400]
    assert not long, "split them by idea"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_folder_has_more_than_15_python_files() -> None:
    found = collections.Counter(path.parent for path in sources())
    assert not {str(folder.relative_to(ROOT)): count for folder, count in found.items() if count > 15}


def test_no_function_is_longer_than_60_lines() -> None:
    long = []
    for path in sources():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not long


# Another library prescribes these signatures.
PRESCRIBED = {"_tojson", "_reduce_scatter"}
OF_OTHERS = {"apply", "pack", "permute", "view"}


def test_arguments_beyond_the_fourth_are_passed_by_name() -> None:
    """Also fields of dataclasses."""
    found, own = [], set()
    trees = {path: parsed(path) for _, path in modules()}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            own.add(node.name)
            if isinstance(node, ast.FunctionDef) and node.name not in PRESCRIBED:
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
                # Triton's kernels take everything by position.
                triton = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
                if "ctx" not in names and not triton and len(names) - (names[:1] in (["self"], ["cls"])) > 4:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} takes more by position")
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and len(node.args) > 4:
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in own - OF_OTHERS:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name} is given more by position")
    assert not found


def test_a_class_name_stands_for_one_thing() -> None:
    found = collections.defaultdict(list)
    for module, path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    assert not {name: places for name, places in found.items() if len(places) > 1}


def test_nothing_of_the_package_is_imported_under_a_second_name() -> None:
    found = []
    for module, path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qwen3_npu":
                found += [f"{module}: {a.name} as {a.asname}" for a in node.names if a.asname]
    assert not found


def test_every_import_of_the_package_is_there() -> None:
    """Also of benchmarks and scripts of tests, which no test runs."""
    trees = {name: parsed(path) for name, path in modules()}
    names = {name: names_of(tree) for name, tree in trees.items()}
    missing = []
    for path in sources():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qwen3_npu":
                module = (node.module or "").removeprefix("qwen3_npu").removeprefix(".")
                for alias in node.names:
                    inner = f"{module}.{alias.name}".removeprefix(".")
                    if inner not in trees and (module not in trees or alias.name not in names[module]):
                        missing.append(f"{path.relative_to(ROOT)}: {inner}")
    assert not missing


def names_of(tree: ast.Module) -> set[str]:
    """What a module defines or imports."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_light_modules_import_no_torch() -> None:
    names = [f"qwen3_npu.{m}" for m, _ in modules() if is_light(m)]
    code = f"import importlib, sys\nfor n in {names!r}: importlib.import_module(n)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", ENTRY_POINTS, ids=lambda p: p.name)
def test_help_is_quick_and_imports_no_torch(script: Path) -> None:
    code = (
        f"import runpy, sys\nsys.argv = [{script.name!r}, '--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        f"except SystemExit as e: assert not e.code\n"
        f"assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout
    # Under a second of a processor, which others may be using meanwhile.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def flag_groups() -> list[type]:
    """Every dataclass of flags in qwen3_npu.args."""
    import importlib

    found = []
    for path in (PACKAGE / "args").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
        found += [v for v in vars(module).values() if dataclasses.is_dataclass(v) and v.__module__ == module.__name__]
    return found


def test_every_flag_has_help_and_every_group_a_title() -> None:
    groups = [g for g in flag_groups() if any("help" in f.metadata for f in dataclasses.fields(g))]
    assert len(groups) >= 10
    for group in groups:
        assert group.__doc__
        for field in dataclasses.fields(group):
            assert field.metadata.get("help"), f"{group.__name__}.{field.name} has no help"


def test_the_cpu_redirect_is_this_list() -> None:
    from qwen3_npu.platform import cpu_redirect

    expected = (ROOT / "tests" / "golden" / "cpu_redirect.txt").read_text().split()
    assert sorted(cpu_redirect.REDIRECTED) == expected, "the redirect may grow or shrink on purpose only"

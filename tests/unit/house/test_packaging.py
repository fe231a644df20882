"""What a maintainer and a package index expect to find."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from pathlib import Path

import pytest
import yaml

import qwen3_npu
from qwen3_npu.cli import REQUIRED
from qwen3_npu.errors import UsageError
from qwen3_npu.platform.mcore_import import VERSION, import_megatron

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qwen3_npu.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", qwen3_npu.__version__)
    # An assignment of a plain string: setuptools then reads it without importing the package.
    assert f'__version__ = "{qwen3_npu.__version__}"' in Path(qwen3_npu.__file__).read_text()


def test_the_changelog_has_unreleased_and_this_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert headings[1] == qwen3_npu.__version__


def test_the_workflow_tests_every_python_that_is_supported() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12"]
    assert PROJECT["project"]["requires-python"] == ">=3.10,<3.13"
    assert "bash tests/run.sh" in [step.get("run") for step in job["steps"]]


def test_the_licence_is_apache_2() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30", "apache.org's LICENSE-2.0.txt"


def test_hooks_are_the_tools_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert {"ruff", "ruff-format", "mypy", "end-of-file-fixer", "check-added-large-files"} <= set(hooks)
    assert all(hooks[name]["language"] == "system" for name in ("ruff", "ruff-format", "mypy"))


# Distribution -> the module that it brings, where the names differ.
_MODULES = {"megatron-core": "megatron", "torch-npu": "torch_npu"}


def modules(requirements: list[str]) -> set[str]:
    """The modules that these requirements bring."""
    names = [re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in requirements]
    return {_MODULES.get(name, name) for name in names}


def imported() -> set[str]:
    """Every module outside of the standard library that the package imports, at any depth of nesting."""
    found = set()
    for path in (ROOT / "qwen3_npu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    # torch.utils.tensorboard is a door to the package tensorboard.
    doors = {"tensorboard"} if any(name.startswith("torch.utils.tensorboard") for name in found) else set()
    # _typeshed is there for type checkers only.
    own = {"qwen3_npu", "_typeshed"}
    return ({name.split(".")[0] for name in found} | doors) - set(sys.stdlib_module_names) - own


def test_dependencies_are_what_the_package_imports() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    optional = modules([*extras["npu-cann90"][:1], *extras["fast"], *extras["hub"], *extras["quickstart"][:1]]) | {
        "mindspeed",
        "triton",  # torch's CUDA build brings it
        "lm_eval",
    }
    assert imported() - optional == modules(PROJECT["project"]["dependencies"])
    assert optional <= imported(), "an extra that nothing imports"
    assert {name.split(".")[0] for name in REQUIRED} == modules(PROJECT["project"]["dependencies"])


def test_an_older_python_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    init = (ROOT / "qwen3_npu" / "__init__.py").read_text()
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="2"):
        exec(compile(init, "__init__.py", "exec"), {})
    assert capsys.readouterr().err == f"error: {sys.executable} is Python 3.9; use Python 3.10, 3.11 or 3.12\n"
    # Each program reaches that line: an older Python can at least read it.
    for text in (init, *(path.read_text() for path in ROOT.glob("*.py"))):
        ast.parse(text, feature_version=(3, 7))


def test_the_npu_extras_are_the_published_pairs() -> None:
    from qwen3_npu.doctor.checks import PAIRS

    extras = PROJECT["project"]["optional-dependencies"]
    pairs = {}
    for name in (name for name in extras if name.startswith("npu-cann")):
        pins = dict(text.split("==") for text in extras[name] if "==" in text)
        assert pins["torch_npu"].startswith(pins["torch"])
        pairs[pins["torch_npu"]] = name.removeprefix("npu-cann")
    assert pairs == {npu: cann.replace(".", "")[:2] for npu, cann in PAIRS.items() if npu.startswith("2.7.1")}
    assert extras["npu"] == ["qwen3-npu[npu-cann90]"]


def test_another_megatron_is_named_before_it_is_used(tmp_path: Path) -> None:
    assert f"megatron-core=={VERSION}" in PROJECT["project"]["dependencies"]
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text('__version__ = "0.12.1"\n')
    own = [name for name in sys.modules if name.partition(".")[0] == "megatron"]
    saved = {name: sys.modules.pop(name) for name in own}
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(
            UsageError, match=rf"megatron.core 0.12.1 is imported from {core}/__init__.py; {VERSION} is"
        ):
            import_megatron()
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
            del sys.modules[name]
        sys.modules.update(saved)

"""What is kept of tensors, the file of it, and what two of them say."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_npu.errors import UsageError
from qwen3_npu.parity.passport import shipped
from qwen3_npu.parity.walk import walk, walk_runs
from qwen3_npu.training.fingerprints.files import Recording, read, write
from qwen3_npu.training.fingerprints.msprobe import MsprobeRecorder
from qwen3_npu.training.fingerprints.recorder import Noted
from qwen3_npu.training.fingerprints.sketch import NUMBERS, difference, sketch


def rows(*tensors: torch.Tensor, rounding: float = float("nan")) -> np.ndarray:
    return np.array([np.append(sketch(tensor).numpy(), (0.0, rounding)) for tensor in tensors], np.float32)


def recording(names: list[str], table: np.ndarray, layout: str = "TP 1, bf16", case: str = "training") -> Recording:
    return Recording("2", "CPU", "reference", layout=layout, cases={case: Noted(names, table)})


def test_the_difference_of_two_tensors_is_estimated() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for size in (1e-4, 1e-2, 1.0) * 20:
        x, y = rng.standard_normal((2, 37, 53)).astype(np.float32)
        other = x + size * y
        estimate = difference(sketch(torch.from_numpy(other)).numpy(), sketch(torch.from_numpy(x)).numpy())
        ratios.append(estimate / (np.linalg.norm(other - x) / np.linalg.norm(x)))
    assert 0.85 < np.mean(ratios) < 1.15
    assert min(ratios) > 0.3
    assert max(ratios) < 3


def test_parts_of_the_rows_add_up() -> None:
    x = torch.randn(24, 2, 7, generator=torch.Generator().manual_seed(0))
    mine = torch.cat((torch.arange(6), torch.arange(18, 24)))
    parts = sketch(x[mine], mine, 24) + sketch(x[6:18], torch.arange(6, 18), 24)
    assert torch.allclose(parts[: NUMBERS - 4], sketch(x)[: NUMBERS - 4], rtol=1e-5)
    assert not sketch(torch.zeros(0, 8)).any(), "experts without tokens"


def test_what_is_not_finite_differs() -> None:
    x = torch.ones(4, 4)
    broken = x.clone()
    broken[1, 1] = float("nan")
    assert difference(sketch(broken).numpy(), sketch(x).numpy()) == float("inf")


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    names = ["1|1|layers.0|layer#1|forward|out", "1|1|layers.0|layer#1|backward|d_out"]
    made = recording(names, rows(torch.ones(3, 3), torch.zeros(2)))
    write(tmp_path / "a" / "b.npz", made)
    found = read(tmp_path / "a" / "b.npz")
    assert str(found) == str(made)
    assert found.cases["training"].names == names
    assert np.array_equal(found.cases["training"].rows, made.cases["training"].rows, equal_nan=True)


def unpickled(path: Path) -> None:
    np.savez(path, facts=np.array([{"a": 1}], object))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def huge(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("facts.npy", bytes(65 << 20))


def other_shape(path: Path) -> None:
    with np.load(path) as held:
        np.savez(path, facts=held["facts"], **{"case 0": held["case 0"][:1]})


def header_of_terabytes(path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 15)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("case 1.npy", file.getvalue())


@pytest.mark.parametrize("damage", [unpickled, cut, huge, other_shape, header_of_terabytes])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_no_recording_is_refused(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write(path, recording(["1|1|a|layer#1|forward|out", "1|1|b|layer#1|forward|out"], rows(*[torch.ones(2)] * 2)))
    damage(path)  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"recording|names and numbers"):
        read(path)


def test_the_first_leap_between_two_runs_is_named() -> None:
    """Runs drift apart by rounding; from one operation on they differ by far more."""
    noise = torch.Generator().manual_seed(1)
    kinds = ["rms_norm", "linear", "attention", "linear", "swiglu", "linear"]
    names = [f"1|1|layers.{i // 3}|{kind}#{i}|forward|out 0" for i, kind in enumerate(kinds)]
    xs = [torch.randn(16, 8, generator=noise) for _ in names]
    drift = [x * (1 + 2e-3 * i * torch.randn(16, 8, generator=noise)) for i, x in enumerate(xs)]
    one = recording(names, rows(*xs))
    assert walk_runs(recording(names, rows(*drift)), one, read(shipped())).first is None
    wrong = [*drift[:2], drift[2] * 0.7, *(x.roll(1, 0) for x in drift[3:])]
    first = walk_runs(recording(names, rows(*wrong)), one, read(shipped())).first
    assert first is not None
    assert first.place.operation == "attention"


def test_calls_that_only_one_kind_of_kernels_has_are_passed_over() -> None:
    xs = [torch.randn(4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    names = [f"1|1|a|{kind}#1|forward|out 0" for kind in ("linear", "add_weight_gradient", "swiglu")]
    one, other = recording(names, rows(*xs)), recording(names[::2], rows(*xs[::2]))
    assert walk_runs(one, other, read(shipped())).records == 2
    assert walk_runs(other, one, read(shipped())).records == 2
    with pytest.raises(UsageError, match="computed other things: 1 records"):
        walk_runs(one, recording(names[:2], rows(*xs[:2])), read(shipped()))


def test_a_dump_for_msprobe_has_its_form(tmp_path: Path) -> None:
    """Names, fields and places are those of a dump that mindstudio-probe 26.2 wrote of a torch.nn.LayerNorm."""
    recorder = MsprobeRecorder(lambda step: step == 2, tmp_path)
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    for step in (1, 2):
        recorder.begin(step)
        recorder.is_live = recorder.is_open
        recorder.call("scale", lambda x, factor: x * factor, (x, torch.tensor(-2.0)), {}).sum().backward()
        recorder.end()
    (folder,) = tmp_path.glob("*/*")
    assert str(folder.relative_to(tmp_path)) == "step2/rank0"
    dump, construct, stack = (json.loads((folder / f"{n}.json").read_text()) for n in ("dump", "construct", "stack"))
    assert {k: v for k, v in dump.items() if k != "data"} == {
        **{"task": "statistics", "level": "mix", "framework": "pytorch", "dump_data_dir": None}
    }
    forward, backward = "Module.model.scale.forward.0", "Module.model.scale.backward.0"
    tensor = {"type": "torch.Tensor", "dtype": "torch.float32", "shape": [2, 3], "requires_grad": True}
    given = tensor | {"Max": 5.0, "Min": 0.0, "Mean": 2.5, "Norm": pytest.approx(55**0.5)}
    assert list(dump["data"]) == [forward, backward]
    assert dump["data"][forward]["input_args"][0] == given
    out = tensor | {"Max": 0.0, "Min": -10.0, "Mean": -5.0, "Norm": pytest.approx(2 * 55**0.5)}
    assert dump["data"][forward]["output"] == [out]
    assert dump["data"][backward]["input"][0]["Norm"] == pytest.approx(6**0.5)
    assert dump["data"][backward]["output"][0]["Max"] == -2
    assert construct == {forward: None, backward: None}
    assert stack["0"][0] == [forward]
    assert any("test_fingerprints.py" in line for line in stack["0"][1])


def test_runs_of_other_layouts_are_not_compared() -> None:
    one = recording(["1|1|a|linear#1|forward|out 0"], rows(torch.ones(2)))
    with pytest.raises(UsageError, match="other layouts"):
        walk_runs(recording(*_parts(one), layout="TP 2, bf16"), one, one)


def _parts(made: Recording) -> tuple[list[str], np.ndarray]:
    return made.cases["training"].names, made.cases["training"].rows


def test_the_shipped_passport_is_small_and_judges_itself_well() -> None:
    assert shipped().stat().st_size < 300_000
    held = read(shipped())
    assert "attention=reference" in held.kernels
    walked = [walk(case, held, held) for case in held.cases]
    assert [w.first for w in walked] == [None] * 8
    assert min(w.records for w in walked) > 15


def test_a_passport_of_other_models_is_refused() -> None:
    held = read(shipped())
    case = "dense fp32"
    other = Noted(held.cases[case].names[5:], held.cases[case].rows[5:])
    with pytest.raises(UsageError, match="of other models"):
        walk(case, Recording("", "", "", layout="", cases={case: other}), held)

"""The numerics passport names the kernel that is wrong, and nothing where all are right."""

from __future__ import annotations

from test_npu_kernels import MUTATIONS

from worlds import World

# Faults that show in backward only; all of MUTATIONS were tried by hand (docs/passport.md).
FAULTS = {
    "gradient of the sum lost": ("layers.1.pre_mlp_layernorm", "add_rms_norm", "backward", "gradient of input 1"),
    "weight gradient not added": (
        "decoder.layers.0.input_layernorm.weight",
        "rms_norm",
        "backward",
        "gradient of the weight",
    ),
}


def test_a_faulty_kernel_is_named_and_right_ones_are_not(npu_worlds: dict[int, World]) -> None:
    changes = [None, *(MUTATIONS[name][:2] for name in FAULTS)]
    case = "packed bf16"
    said = npu_worlds[1].run("npu_passport_cases.first_operators", cases=[case], changes=changes)
    used, *nothing = said[0][case]
    assert not nothing
    assert used < 0.7
    assert [tuple(one[case][3:7]) for one in said[1:]] == list(FAULTS.values())

"""--swap-attention beside the flags of recomputation, as MindSpeed reads them together. No torch."""

from __future__ import annotations

import dataclasses

from qwen3_npu.args.training import TrainArgs
from qwen3_npu.errors import UsageError

# Megatron-core's names of modules, and those of its older layers, which stand in MindSpeed's default.
SWAPPABLE = {"self_attention": "self_attention", "input_layernorm": "input_layernorm", "input_norm": "input_layernorm"}
SWAPPABLE |= {"pre_mlp_layernorm": "pre_mlp_layernorm", "post_attention_norm": "pre_mlp_layernorm"}


@dataclasses.dataclass(frozen=True)
class Swapping:
    """The modules and layers whose activations move to the host.

    Attributes:
        modules: of a layer, by megatron-core's names.
        layers: number of the first layers of each model chunk that swap; None: all.
        recomputed: number of the first layers of each chunk whose MLP is recomputed in backward; None: all.
    """

    modules: tuple[str, ...]
    layers: int | None
    recomputed: int | None

    def __str__(self) -> str:
        which = "all layers" if self.layers is None else f"the first {self.layers} layers of each chunk"
        again = {None: "all layers", 0: ""}.get(self.recomputed, f"the first {self.recomputed} layers of each chunk")
        rest = f"; the MLP of {again} is computed again in backward, attention is not" if again else ""
        return f"--swap-attention: {', '.join(self.modules)} of {which} keep on the host what backward needs{rest}"


def swapping(train: TrainArgs) -> Swapping | None:
    """The swapping that the flags describe; None: nothing is swapped.

    With --recompute-granularity full, MindSpeed swaps attention instead of recomputing it, and recomputes the MLP of
    the layers that would have been recomputed. `block` also chooses the layers that swap.

    Raises:
        UsageError: a module that cannot be swapped.
    """
    if not train.swap_attention:
        return None
    names = [name.strip() for name in train.swap_modules.split(",") if name.strip()]
    for name in names:
        if name not in SWAPPABLE:
            raise UsageError(f"--swap-modules {name}: give some of {', '.join(SWAPPABLE)}, separated by commas")
    if not names:
        raise UsageError("--swap-modules names no module; drop it, or --swap-attention")
    modules = tuple(dict.fromkeys(SWAPPABLE[name] for name in names))
    layers = train.recompute_num_layers if train.recompute_method == "block" else None
    recomputed = None if train.recompute_method == "uniform" else train.recompute_num_layers or 0
    return Swapping(modules, layers, recomputed)

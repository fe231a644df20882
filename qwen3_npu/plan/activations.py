"""Bytes that one layer keeps for backward, in closed form, for this project's two sets of kernels; 16-bit training.

`npu`: torch_npu's kernels, as torch_npu's own dispatcher keeps tensors (its autograd formulas; kernels emulated).
`torch`: torch's, on CUDA and CPU. `mindspeed`: as MindSpeed-LLM's models call torch_npu's kernels, to compare with its
measurements. The first two are compared with the saved tensors of real layers, byte by byte, in
tests/unit/plan/test_activations.py and tests/npu_sim/test_npu_memory.py.
"""

from __future__ import annotations

from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape

NPU, TORCH, MINDSPEED = "npu", "torch", "mindspeed"
_FLOAT = 4


def layer_bytes(shape: Shape, setup: Setup, has_experts: bool, kernels: str = NPU) -> float:
    """Bytes that one layer keeps for backward, of one micro-batch, when it is not recomputed as a whole.

    Args:
        has_experts: its MLP is a mixture of experts, which get equal numbers of rows.
        kernels: `NPU`, `TORCH` or `MINDSPEED`.
    """
    mlp = _experts(shape, setup, kernels) if has_experts else _mlp(shape, setup)
    mlp = 0.0 if setup.recompute_mlp else mlp
    attention = 0.0 if "self_attention" in setup.swapped else _attention(shape, setup, kernels)
    return _norms(shape, setup, has_experts, kernels) + attention + mlp + _lora(shape, setup, has_experts)


def _keeps_input(setup: Setup, linear: str) -> bool:
    """Whether a linear's weight, or its adapter's, needs the input for its gradient."""
    return not setup.lora_rank or linear in setup.lora_targets


def norm_inputs(setup: Setup, kernels: str, width: float, size: int) -> float:
    """Bytes that a norm over vectors of `width` numbers of `size` bytes keeps per vector, without its output."""
    if kernels != TORCH:
        return width * size + _FLOAT
    # It keeps the vector in float32, 1 / its length, and, if the norm's weight is trained, the vector over its length.
    return width * _FLOAT * (1 if setup.lora_rank else 2) + _FLOAT


def _norms(shape: Shape, setup: Setup, has_experts: bool, kernels: str) -> float:
    """Both norms of the hidden state: inputs, and outputs if the next operation needs them."""
    h, width = shape.hidden_size, setup.weight_bytes
    if setup.recompute_norm:
        before, outputs = float(h * setup.residual_bytes), 0  # the input only
    else:
        before = norm_inputs(setup, kernels, h, setup.residual_bytes)
        # The router keeps its input, unless LoRA freezes its weight.
        second = not setup.lora_rank if has_experts else _keeps_input(setup, "linear_fc1")
        first = "self_attention" not in setup.swapped and _keeps_input(setup, "linear_qkv")
        outputs = int(first) + int(second or setup.recompute_mlp)
    # The weights in the residual's dtype. torch_npu's kernels hold them, too, but autograd does not count those.
    widened = setup.fp32_residual and not setup.recompute_norm and kernels == TORCH
    weights = 2 * h * _FLOAT if widened else 0
    inputs = 2 - sum(name.endswith("layernorm") for name in setup.swapped)
    return setup.sharded_tokens * (inputs * before + outputs * h * width) + weights


def _attention(shape: Shape, setup: Setup, kernels: str) -> float:
    if shape.is_mla:
        return _latent_attention(shape, setup, kernels)
    heads, groups = shape.num_attention_heads / setup.tensor, shape.num_query_groups / setup.tensor
    query, key, size = shape.query_width / setup.tensor, shape.key_width / setup.tensor, shape.head_dim
    product = query + 2 * key  # qkv's output
    kept = (query + key) + query  # rotated queries and keys, attention's output
    per_head = 0.0
    if kernels != TORCH:
        # Values of several rows are copied; else attention keeps them where they are, in the product.
        anew = kernels == MINDSPEED or not (setup.packed or setup.micro_batch == 1 or setup.recompute_attention)
        kept += key if anew else 0
        kept += product if shape.qk_norm or not anew else 0
        if shape.qk_norm:
            per_head = (heads + groups) * _FLOAT
        stats = 64  # largest score and sum, eight float32 copies each
    else:
        kept += product
        kept += query if setup.packed else 0  # the documents' outputs, joined
        if shape.qk_norm:
            own = 0 if setup.bf16 else size * _FLOAT  # in float32 a head's vector stays where it is, in the product
            per_head = (heads + groups) * (norm_inputs(setup, kernels, size, setup.weight_bytes) - own)
        stats = _FLOAT
    per_head += 0 if setup.recompute_attention else heads * stats
    return setup.tokens * (kept * setup.weight_bytes + per_head)


def _latent_attention(shape: Shape, setup: Setup, kernels: str) -> float:
    """Multi-latent attention, which this project does not train: an estimate from the definition of the block."""
    heads = shape.num_attention_heads / setup.tensor
    # The inputs of the norms and their outputs.
    compressed = 2 * (shape.kv_lora_rank + shape.q_lora_rank) + shape.qk_pos_emb_head_dim
    expanded = shape.qk_head_dim + shape.v_head_dim  # keys and values; values are used where they are
    each = 2 * (shape.qk_head_dim + shape.qk_pos_emb_head_dim) + expanded + shape.v_head_dim
    per_head = 0 if setup.recompute_attention else heads * (_FLOAT if kernels == TORCH else 64)
    return setup.tokens * ((compressed + heads * each) * setup.weight_bytes + per_head)


def _mlp(shape: Shape, setup: Setup) -> float:
    has_product = _keeps_input(setup, "linear_fc2") and not setup.recompute_activation
    sides = shape.gate_factor + (1 if has_product else 0)
    return setup.tokens * sides * shape.ffn_hidden_size / setup.tensor * setup.weight_bytes


def routed_rows(shape: Shape, setup: Setup) -> float:
    """Rows that the experts of one rank compute, if all get the same number."""
    return setup.tokens / setup.tensor * setup.expert_tensor * shape.moe_topk * setup.expert_capacity


def _experts(shape: Shape, setup: Setup, kernels: str) -> float:
    if setup.recompute_experts == 2:  # they keep only their input, which is counted as the norm's output
        return 0.0
    rows, width = routed_rows(shape, setup), setup.weight_bytes
    ffn = shape.moe_ffn_hidden_size / setup.expert_tensor
    always = kernels != TORCH  # the grouped product of torch_npu keeps its input, whatever is trained
    inputs = shape.hidden_size * (1 + int(always or _keeps_input(setup, "linear_fc1")))  # the second is fc2's output
    sides = 0 if setup.recompute_experts else shape.gate_factor
    # The activation, and its product with the probabilities.
    if not (setup.recompute_activation or setup.recompute_experts):
        sides += 1 + int(always or _keeps_input(setup, "linear_fc2"))
    indices = 8 if kernels == TORCH else 3 * 4
    routing = rows * (indices + width)  # indices and probabilities
    # The router's weights and the map; the permutation keeps the transposed weights, or the products their groups.
    routing += setup.sharded_tokens * shape.num_experts * (1 + width * (2 if kernels == TORCH else 1))
    routing += 0 if kernels == TORCH else 8 * shape.num_experts / setup.expert
    shared = setup.tokens * (shape.gate_factor + 1) * shape.moe_shared_ffn / setup.tensor * width
    return rows * (inputs + sides * ffn) * width + routing + shared


def _lora(shape: Shape, setup: Setup, has_experts: bool) -> float:
    """Bytes of the narrow product (A x) of each adapter."""
    if not setup.lora_rank:
        return 0.0
    dense = sum(target in setup.lora_targets for target in ("linear_qkv", "linear_proj"))
    mlp = sum(target in setup.lora_targets and not setup.recompute_mlp for target in ("linear_fc1", "linear_fc2"))
    rows = routed_rows(shape, setup) if has_experts else setup.tokens
    return (setup.tokens * dense + rows * mlp) * setup.lora_rank * setup.weight_bytes

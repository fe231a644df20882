"""The model equals transformers' Qwen3 on the same weights, in float32."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llama
import tiny
from qwen3_npu import kernels
from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs, make_layout
from qwen3_npu.args.training import TrainArgs
from qwen3_npu.checkpoint.formats.huggingface import open_hf


@contextlib.contextmanager
def built(folder: Path, kernel: str = "auto", **train: object) -> Iterator[torch.nn.Module]:
    """Our model with the weights of a Hugging Face directory."""
    from qwen3_npu.checkpoint.training.live import load_weights
    from qwen3_npu.distributed.launch import model_parallel, model_rank
    from qwen3_npu.model.build import build_model
    from qwen3_npu.model.config import transformer_config
    from qwen3_npu.model.spec import Parts

    source, parallel = open_hf(folder), ParallelArgs()
    layout = make_layout(source.arch, parallel)
    arguments = TrainArgs(train_iters=1, **{"moe_router_load_balancing_type": "none", **train})
    with model_parallel(layout, parallel, RuntimeArgs()):
        config = transformer_config(source.arch, layout, parallel, arguments, overlaps_p2p_safely=False)
        chunks = build_model(source.arch, config, layout, Parts(kernels.select_kernels(kernel)))
        load_weights(source, layout, model_rank(), chunks)
        yield chunks[0]


def sequence(model: torch.nn.Module, positions: torch.Tensor, cu_seqlens: tuple[int, ...] | None = None) -> object:
    from qwen3_npu.model.sequence import TokenSequence

    return TokenSequence(positions, cu_seqlens, model.arch.rope, torch.float32)


def transformers_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["untied", "tied", "moe", "qwen2", "yarn", "llama", "llama, biases"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with llama.registered(biased="biases" in request.param) as outside:
        arch = outside if "llama" in request.param else tiny.arch(request.param)
        yield tiny.write_model(tmp_path_factory.mktemp(request.param), arch)


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.usefixtures("process")
def test_logits_equal_transformers(folder: Path, kernel: str) -> None:
    ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    with built(folder, kernel) as model, torch.no_grad():
        positions = torch.arange(33).expand(2, -1)
        ours = model.eval()(ids, positions, None, packed_seq_params=sequence(model, positions))
        theirs = transformers_model(folder)(ids).logits
    assert theirs.abs().max() > 1, "logits near zero would hide errors"
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.usefixtures("process")
def test_loss_and_gradients_equal_transformers(folder: Path) -> None:
    ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(1))
    tokens, labels = ids[:, :-1], ids[:, 1:]
    theirs = transformers_model(folder)
    logits = theirs(tokens).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    expected.mean().backward()
    with built(folder) as model:
        positions = torch.arange(32).expand(2, -1)
        losses = model(tokens, positions, None, labels=labels, packed_seq_params=sequence(model, positions))
        torch.testing.assert_close(losses.flatten(), expected, rtol=1e-5, atol=1e-5)
        losses.mean().backward()
        ours, hf = model.decoder.layers, theirs.model.layers
        pairs = [
            (model.embedding.word_embeddings, theirs.model.embed_tokens),
            (model.decoder.final_layernorm, theirs.model.norm),
            (ours[3].self_attention.linear_proj, hf[3].self_attn.o_proj),
        ]
        if model.arch.family.qk_norm:
            pairs.append((ours[0].self_attention.q_layernorm, hf[0].self_attn.q_norm))
        for module, reference in pairs:
            gradient, wanted = module.weight.grad, reference.weight.grad
            assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        if model.arch.family.qkv_bias:
            biases = [getattr(hf[0].self_attn, f"{name}_proj").bias.grad for name in "qkv"]
            wanted = torch.cat([bias.view(model.arch.num_key_value_heads, -1) for bias in biases], dim=1).flatten()
            gradient = ours[0].self_attention.linear_qkv.bias.grad
            assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        if model.arch.family.o_bias:
            gradient, wanted = ours[0].self_attention.linear_proj.bias.grad, hf[0].self_attn.o_proj.bias.grad
            assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.usefixtures("process")
def test_packed_documents_are_computed_as_if_alone(folder: Path) -> None:
    lengths = [5, 1, 11, 7]
    boundaries = [0, 5, 6, 17, 24]
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(2))
    with built(folder) as model, torch.no_grad():
        model.eval()
        positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        packed = model(ids, positions, None, packed_seq_params=sequence(model, positions, tuple(boundaries)))
        for start, end in itertools.pairwise(boundaries):
            alone_positions = torch.arange(end - start).unsqueeze(0)
            alone = model(ids[:, start:end], alone_positions, None, packed_seq_params=sequence(model, alone_positions))
            torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("process")
def test_bf16_is_close_to_transformers_bf16(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(3))
    with built(folder, bf16=True) as model, torch.no_grad():
        positions = torch.arange(16).unsqueeze(0)
        info = sequence(model, positions)
        import dataclasses

        ours = model.eval()(ids, positions, None, packed_seq_params=dataclasses.replace(info, dtype=torch.bfloat16))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(ids).logits
        exact = transformers_model(folder)(ids).logits
    assert ours.dtype is torch.bfloat16
    # Rounding is the only difference: no further from the exact logits than transformers' own bf16, within a factor.
    assert (ours.float() - exact).abs().mean() <= 1.5 * (theirs.float() - exact).abs().mean()


class TestLoss:
    """Cross-entropy over a padded vocabulary."""

    @pytest.mark.usefixtures("process")
    def test_equals_torch_and_ignores_padding(self) -> None:
        import torch.distributed as dist

        from qwen3_npu.kernels.cross_entropy import cross_entropy

        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(5, 2, 12, generator=generator, requires_grad=True)
        labels = torch.randint(0, 10, (5, 2), generator=generator)
        weights = torch.rand(5, 2, generator=generator)
        losses = cross_entropy(logits, labels, dist.group.WORLD, 10)
        (losses * weights).sum().backward()
        gradient, logits.grad = logits.grad, None
        expected = torch.nn.functional.cross_entropy(logits[..., :10].flatten(0, 1), labels.flatten(), reduction="none")
        (expected.view(5, 2) * weights).sum().backward()
        torch.testing.assert_close(losses.flatten(), expected)
        torch.testing.assert_close(gradient, logits.grad)
        assert gradient[..., 10:].abs().max() == 0

    @pytest.mark.usefixtures("process")
    def test_ignored_label_is_finite_and_large_logits_do_not_overflow(self) -> None:
        import torch.distributed as dist

        from qwen3_npu.kernels.cross_entropy import cross_entropy

        logits = torch.tensor([[[1e4, 0.0, -1e4]]])
        losses = cross_entropy(logits, torch.tensor([[-100]]), dist.group.WORLD, 3)
        assert torch.isfinite(losses).all()
        torch.testing.assert_close(
            cross_entropy(logits, torch.tensor([[1]]), dist.group.WORLD, 3), torch.tensor([[1e4]])
        )


@pytest.mark.usefixtures("process")
def test_parameters_are_those_of_the_weight_table(folder: Path) -> None:
    from qwen3_npu.checkpoint.mapping.table import shards
    from qwen3_npu.distributed.layout import Rank, single_layout

    with built(folder) as model:
        expected = {s.name: s.shape for s in shards(model.arch, single_layout(model.arch), Rank(0, 0, 0, 0))}
        assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected


@pytest.mark.parametrize(("name", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_adapters_begin_as_those_of_peft(name: str, theirs: bool | str) -> None:
    import peft

    from qwen3_npu.args.lora import LoraArgs
    from qwen3_npu.model.lora.start import draw

    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, init_lora_weights=theirs, target_modules=["0"])  # type: ignore[arg-type]
    linear = torch.nn.Sequential(torch.nn.Linear(48, 32))
    torch.manual_seed(7)
    made = peft.get_peft_model(linear, config).base_model.model[0].lora_A["default"].weight
    ours = torch.empty(4, 48)
    torch.manual_seed(7)
    draw(ours, LoraArgs(lora_r=4, lora_init=name), 48)
    torch.manual_seed(7)
    again = torch.empty(4, 48)
    (torch.nn.init.kaiming_uniform_(again, a=5**0.5) if name == "kaiming" else again.normal_(std=1 / 4))
    torch.testing.assert_close(ours, again, rtol=0, atol=0)
    assert abs(float(made.detach().std() / ours.std()) - 1) < 0.15, "the same distribution; peft draws twice"


@pytest.mark.usefixtures("process")
def test_pissa_splits_a_weight_as_peft_does() -> None:
    import peft
    import torch.distributed as dist

    from qwen3_npu.model.lora.start import principal, subtracted

    torch.manual_seed(7)
    linear = torch.nn.Sequential(torch.nn.Linear(48, 32, bias=False))
    weight = linear[0].weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights="pissa", target_modules=["0"])
    theirs = peft.get_peft_model(linear, config).base_model.model[0]
    a, b = principal(weight, 4, 3.0, group=dist.group.WORLD, dim=0)
    rest = subtracted(weight, a, b, 3.0)
    torch.testing.assert_close(rest, theirs.base_layer.weight, rtol=1e-5, atol=1e-6)
    signs = (a * theirs.lora_A["default"].weight).sum(1).sign()
    torch.testing.assert_close(a * signs[:, None], theirs.lora_A["default"].weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b * signs, theirs.lora_B["default"].weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rest + 3.0 * b @ a, weight)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("shape", [(512, 96), (96, 512), (3, 256, 96)], ids=str)
def test_pissa_is_the_same_to_the_bit_in_any_order_of_rows(shape: tuple[int, ...]) -> None:
    """Ranks hold gate and up in another order than one process; what 4 bits keep of the rest must not depend on it."""
    import torch.distributed as dist

    from qwen3_npu.model.lora.start import principal, subtracted

    torch.manual_seed(7)
    weight, order = torch.randn(shape), torch.randperm(shape[-2])
    a, b = principal(weight, 4, 2.0, group=dist.group.WORLD, dim=0)
    turned = weight[..., order, :]
    other, moved = principal(turned, 4, 2.0, group=dist.group.WORLD, dim=0)
    torch.testing.assert_close(other, a, rtol=2e-7, atol=0)
    torch.testing.assert_close(moved, b[..., order, :], rtol=2e-7, atol=0)
    rest = subtracted(weight, a, b, 2.0)
    assert torch.equal(subtracted(turned, a, moved, 2.0), rest[..., order, :])
    exact = weight.double() - 2.0 * b.double() @ a.double()
    assert torch.equal(rest, exact.float()), "it is rounded once"
    u, values, v = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (u[..., :4] * values[..., None, :4]) @ v[..., :4, :]
    torch.testing.assert_close(2.0 * b.double() @ a.double(), best, rtol=1e-5, atol=1e-6)

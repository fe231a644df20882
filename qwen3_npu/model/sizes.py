"""The published sizes of Qwen3 and Qwen2.5 (from the `config.json` files of huggingface.co/Qwen). No torch."""

from __future__ import annotations

from qwen3_npu.model.arch import Qwen3Arch


def _dense(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> Qwen3Arch:
    return Qwen3Arch(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def _moe(layers: int, hidden: int, ffn: int, heads: int, *, moe_ffn: int) -> Qwen3Arch:
    return Qwen3Arch(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=moe_ffn,
    )


def _qwen2(
    layers: int, hidden: int, ffn: int, heads: int, *, groups: int, vocab: int = 152064, tied: bool = False
) -> Qwen3Arch:
    """Qwen2.5-Instruct."""
    return Qwen3Arch(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


SIZES: dict[str, Qwen3Arch] = {
    "qwen3-0.6b": _dense(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _dense(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _dense(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _dense(36, 4096, 12288, 32, tied=False),
    "qwen3-14b": _dense(40, 5120, 17408, 40, tied=False),
    "qwen3-32b": _dense(64, 5120, 25600, 64, tied=False),
    "qwen3-30b-a3b": _moe(48, 2048, 6144, 32, moe_ffn=768),
    "qwen3-235b-a22b": _moe(94, 4096, 12288, 64, moe_ffn=1536),
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, groups=2, vocab=151936, tied=True),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, groups=2, vocab=151936, tied=True),
    "qwen2.5-3b": _qwen2(36, 2048, 11008, 16, groups=2, vocab=151936, tied=True),
    "qwen2.5-7b": _qwen2(28, 3584, 18944, 28, groups=4),
    "qwen2.5-14b": _qwen2(48, 5120, 13824, 40, groups=8),
    "qwen2.5-32b": _qwen2(64, 5120, 27648, 40, groups=8),
    "qwen2.5-72b": _qwen2(80, 8192, 29568, 64, groups=8),
}

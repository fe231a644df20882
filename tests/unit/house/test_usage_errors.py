"""Bad input to the commands: one line, exit status 2, no traceback, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parents[3]


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True)


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert message in result.stderr
    assert f"{Path(result.args[1]).name}: error: " in result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf", tiny.arch())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tokens(tmp_path_factory.mktemp("tokens") / "a_text_document")


class TestPretrain:
    """pretrain_gpt.py; most of it before torch is imported."""

    def flags(self, model: Path, tokens: Path, *more: str) -> list[str]:
        base = ["--device", "cpu", "--train-iters", "1", "--lr", "1e-3", "--seq-length", "16", "--eval-iters", "0"]
        return [*base, "--hf-dir", str(model), "--data-path", str(tokens), *more]

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--tensor-model-paralel-size", "2"], "did you mean --tensor-model-parallel-size?"),
            (["--add-qkv-bias"], "--add-qkv-bias: Qwen3 has no bias"),
            (["--normalization", "LayerNorm"], "--normalization LayerNorm: Qwen3 has RMSNorm"),
            (["--num-layers", "40", "--hidden-size", "64"], "--num-layers 40 but the model has 4"),
            (["--untie-embeddings-and-output-weights", "--kv-channels", "8"], "--kv-channels 8 but the model has 16"),
            (["--pipeline-model-parallel-size", "3"], "does not divide the 4 layers"),
            (["--tensor-model-parallel-size", "3"], "does not divide the 4 KV heads"),
            (["--tensor-model-parallel-size", "2"], "1 processes cannot hold copies of TP 2 x PP 1"),
            (["--global-batch-size", "3", "--micro-batch-size", "2"], "--global-batch-size 3 is not a multiple"),
            (["--seq-length", "4096"], "--seq-length 4096 is above the model's 512 positions"),
            (["--hf-dir", "/nonexistent"], "/nonexistent/config.json does not exist"),
            (["--recompute-num-layers", "1"], "--recompute-num-layers needs --recompute-granularity full"),
            (["--recompute-modules", "mlp"], "--recompute-modules needs --recompute-granularity selective"),
            (["--recompute-granularity", "selective", "--recompute-modules", "moe"], "this model is dense"),
            (
                ["--moe-z-loss-coeff", "0.1", "--moe-token-dispatcher-type", "allgather"],
                "--moe-z-loss-coeff, --moe-token-dispatcher-type: this model is dense",
            ),
            (["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "3"], "say the same thing"),
            (["--min-lr", "1"], "--min-lr 1.0 is above --lr"),
            (["--data-path", "/nonexistent/prefix"], "--data-path /nonexistent/prefix:"),
            (["--split", "0,1,0"], "leaves no document"),
            (["--load", "/nonexistent"], "--load /nonexistent does not exist"),
            (["--device", "npu"], "--device npu: torch_npu is not installed"),
        ],
    )
    def test_bad_flags(self, model: Path, tokens: Path, more: list[str], message: str) -> None:
        assert_refused(run("pretrain_gpt.py", *self.flags(model, tokens, *more)), message)

    def test_model_of_another_family(self, tokens: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert_refused(run("pretrain_gpt.py", *self.flags(tmp_path, tokens)), "model_type is 'llama'")

    def test_no_model_at_all(self, model: Path, tokens: Path) -> None:
        flags = self.flags(model, tokens)
        at = flags.index("--hf-dir")
        where = ("--load", str(tokens.parent / "nowhere"))
        line = f"{where[1]} is no folder that is there; which model?"
        assert_refused(run("pretrain_gpt.py", *flags[:at], *where, *flags[at + 2 :]), line)

    def test_truncated_index(self, model: Path, tmp_path: Path) -> None:
        prefix = tiny.write_tokens(tmp_path / "a_text_document")
        index = prefix.with_name(prefix.name + ".idx")
        index.write_bytes(index.read_bytes()[:-5])
        assert_refused(run("pretrain_gpt.py", *self.flags(model, prefix)), ".idx is truncated or damaged")

    def test_tokens_of_another_vocabulary(self, model: Path, tmp_path: Path) -> None:
        prefix = tiny.write_tokens(tmp_path / "a_text_document", vocab=1000)
        assert_refused(run("pretrain_gpt.py", *self.flags(model, prefix)), "made with another tokenizer")

    def test_unwritable_output(self, model: Path, tokens: Path, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        assert_refused(run("pretrain_gpt.py", *self.flags(model, tokens, "--save", str(file / "x"))), "--save")
        assert file.read_bytes() == b""

    def test_weights_of_another_model(self, model: Path, tokens: Path, tmp_path: Path) -> None:
        other = tiny.write_model(tmp_path / "other", tiny.arch(num_hidden_layers=2))
        result = run("pretrain_gpt.py", *self.flags(model, tokens, "--load", str(other)))
        assert_refused(result, "the model is Qwen3 dense, 4 layers")


class TestConvert:
    """convert_ckpt.py."""

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--target-tensor-paralel-size", "2"], "did you mean --target-tensor-parallel-size?"),
            (["--target-pipeline-parallel-size", "3"], "does not divide the 4 layers"),
            (["--target-tensor-parallel-size", "3"], "does not divide the 4 KV heads"),
            (["--load-dir", "/nonexistent"], "--load-dir /nonexistent does not exist"),
            (["--load-model-type", "mg"], "holds a Hugging Face model; give --load-model-type hf"),
            (["--model-type-hf", "qwen3-moe"], "--model-type-hf qwen3-moe, but the model"),
            (["--add-qkv-bias"], "Qwen3 has no bias"),
        ],
    )
    def test_bad_flags(self, model: Path, tmp_path: Path, more: list[str], message: str) -> None:
        out = tmp_path / "out"
        assert_refused(run("convert_ckpt.py", "--load-dir", str(model), "--save-dir", str(out), *more), message)
        assert not out.exists()

    def test_damaged_weights(self, tmp_path: Path) -> None:
        folder = tiny.write_model(tmp_path / "hf", tiny.arch())
        weights, out = folder / "model.safetensors", tmp_path / "out"
        data = weights.read_bytes()
        weights.write_bytes(data[:-100])
        result = run("convert_ckpt.py", "--load-dir", str(folder), "--save-dir", str(out))
        assert_refused(result, "model.safetensors is truncated")
        weights.write_bytes(data[:5])
        result = run("convert_ckpt.py", "--load-dir", str(folder), "--save-dir", str(out))
        assert_refused(result, "is not a complete safetensors file")
        weights.unlink()
        result = run("convert_ckpt.py", "--load-dir", str(folder), "--save-dir", str(out))
        assert_refused(result, "holds no .safetensors file")
        assert not out.exists()

    def test_missing_shard(self, tmp_path: Path) -> None:
        folder = tiny.write_model(tmp_path / "hf", tiny.arch())
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        )
        result = run("convert_ckpt.py", "--load-dir", str(folder), "--save-dir", str(tmp_path / "out"))
        assert_refused(result, "1 of 1 weight files missing: model-00001-of-00002.safetensors")

    def test_unwritable_output(self, model: Path, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        result = run("convert_ckpt.py", "--load-dir", str(model), "--save-dir", str(file / "x"))
        assert_refused(result, "choose another --save-dir")

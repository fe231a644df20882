"""Token files that others wrote, permuted, damaged or made with another tokenizer: megatron's numbers, or one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3_npu.args.training import DataArgs
from qwen3_npu.data.preprocess.output import merge_datasets
from qwen3_npu.data.train import token_record
from qwen3_npu.data.train.data_path import check_data
from qwen3_npu.data.train.sft_dataset import InstructionFiles
from qwen3_npu.data.train.token_file import IndexedWriter, open_indexed
from qwen3_npu.errors import UsageError

HEADER = 34
CODES = {np.uint8: 1, np.int16: 3, np.int32: 4, np.int64: 5, np.uint16: 8}
MUTATIONS = 3000


def write_pair(
    prefix: Path, documents: list[list[int]], dtype: type = np.int32, order: list[int] | None = None
) -> Path:
    """A pair as Megatron's format is described; documents lie in the .bin file in another `order`."""
    arrays = [np.array(document, dtype) for document in documents]
    order = order or list(range(len(arrays)))
    offsets, position = [0] * len(arrays), 0
    for number in order:
        offsets[number], position = position, position + arrays[number].nbytes
    Path(f"{prefix}.bin").write_bytes(b"".join(arrays[number].tobytes() for number in order))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(arrays), len(arrays) + 1)
    body = np.array([len(a) for a in arrays], np.int32).tobytes() + np.array(offsets, np.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(header + body + np.arange(len(arrays) + 1).tobytes())
    return prefix


def megatrons(prefix: Path) -> list[list[int]]:
    """What megatron reads."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(os.fspath(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def ours(prefix: Path) -> list[list[int]]:
    pair = open_indexed(prefix)
    return [pair[i].tolist() for i in range(len(pair))]


DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14], [15, 16, 17, 18, 19]]
ORDER = [3, 0, 4, 2, 1]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("order", [None, ORDER])
def test_documents_are_where_the_pointers_say(tmp_path: Path, dtype: type, order: list[int] | None) -> None:
    prefix = write_pair(tmp_path / "x", DOCUMENTS, dtype, order)
    assert ours(prefix) == megatrons(prefix) == DOCUMENTS


def test_permuted_instruction_data_are_honoured(tmp_path: Path) -> None:
    """Each file may have an order of its own."""
    ids = [[i, i + 1, i + 2] for i in range(1, 101)]
    labels, mask = [[-100, *sample[1:]] for sample in ids], [[1] * 3] * 100
    for seed, (name, documents) in enumerate((("input_ids", ids), ("labels", labels), ("attention_mask", mask))):
        order = random.Random(seed).sample(range(100), 100)
        write_pair(tmp_path / f"x_packed_{name}_document", documents, order=order)
    files = InstructionFiles(str(tmp_path / "x"))
    read = [files.sample(i, 8) for i in range(100)]
    assert [sample.ids.tolist() for sample in read] == ids == megatrons(tmp_path / "x_packed_input_ids_document")
    assert [sample.labels.tolist() for sample in read] == labels


def test_permuted_pairs_are_merged(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_pair(tmp_path / "in" / "a_text", DOCUMENTS, order=ORDER)
    write_pair(tmp_path / "in" / "b_text", DOCUMENTS[::-1])
    merge_datasets([str(tmp_path / "in")], ["text"], str(tmp_path / "out"))
    assert megatrons(tmp_path / "out_text") == [*DOCUMENTS, *DOCUMENTS[::-1]]
    record = token_record.find_record(str(tmp_path / "out_text"))
    assert record is not None
    assert record.ids == token_record.IdRange(30, 0, 5, 19)


def put(prefix: Path, place: int, value: int, form: str = "<q") -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    data[place : place + struct.calcsize(form)] = struct.pack(form, value)
    Path(f"{prefix}.idx").write_bytes(data)


OFFSETS = HEADER + 4 * len(DOCUMENTS)
ENDS = OFFSETS + 8 * len(DOCUMENTS)
DAMAGE: dict[str, Callable[[Path], object]] = {
    "begins at byte -4": lambda p: put(p, OFFSETS + 8, -4),
    "begins at byte 4000 of 60": lambda p: put(p, OFFSETS + 8, 4000),
    "overlaps another one": lambda p: put(p, OFFSETS + 16, 12),
    "leaves a hole before it": lambda p: [put(p, OFFSETS + 8 * i, o) for i, o in enumerate((0, 60, 16, 32, 40))],
    "has -3 tokens": lambda p: put(p, HEADER, -3, "<i"),
    "is truncated: 60 bytes, 64 expected": lambda p: put(p, HEADER, 4, "<i"),
    "does not belong to x.idx: it has 64 bytes, the index describes 60": lambda p: Path(f"{p}.bin").write_bytes(
        Path(f"{p}.bin").read_bytes() + bytes(4)
    ),
    "version 2": lambda p: put(p, 9, 2),
    "77 is no code": lambda p: put(p, 17, 77, "<B"),
    "its tokens are float32": lambda p: put(p, 17, 7, "<B"),
    "its documents go from sequence 1 to 5": lambda p: put(p, ENDS, 1),
    "its documents go from sequence 0 to 4": lambda p: put(p, ENDS + 40, 4),
    "not in ascending order": lambda p: put(p, ENDS + 16, 4),
    "truncated or damaged": lambda p: put(p, 18, 2**62),
    "multimodal": lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes() + bytes(5)),
    "not a Megatron index": lambda p: Path(f"{p}.idx").write_bytes(b"MMIDIDX"),
    "is not a regular file": lambda p: (os.unlink(f"{p}.idx"), os.mkfifo(f"{p}.idx")),
    "x.bin is not a regular file": lambda p: (os.unlink(f"{p}.bin"), os.mkdir(f"{p}.bin")),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(tmp_path: Path, message: str) -> None:
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    DAMAGE[message](prefix)
    with pytest.raises(UsageError) as caught:
        open_indexed(prefix)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def mutate(rng: random.Random, idx: bytearray, bin_: bytearray) -> None:
    """One to three changes of the kinds that disks, copies and other tools make."""
    for _ in range(rng.randint(1, 3)):
        data = bin_ if rng.random() < 0.1 else idx
        place = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data += rng.randbytes(rng.choice((1, 4, 8, 12, 20)))
        elif kind == 3:  # a number becomes another
            field = rng.choice((9, 18, 26, *range(HEADER, max(len(idx) - 8, HEADER + 1), 4)))
            value = rng.choice((0, 1, 2, -1, 4, 8, 2**31 - 1, -(2**31), 2**63 - 1, rng.randrange(100)))
            idx[field : field + 8] = struct.pack("<q", value)
        elif kind == 4:  # two fields change places
            one, other = (OFFSETS + 8 * rng.randrange(2 * len(DOCUMENTS)) for _ in range(2))
            idx[one : one + 8], idx[other : other + 8] = idx[other : other + 8], idx[one : one + 8]
        elif kind == 5 and data:
            data[place : place + 4] = bytes(len(data[place : place + 4]))


def test_thousands_of_mutations_are_read_as_megatron_does_or_refused(tmp_path: Path) -> None:
    rng = random.Random(20261127)
    prefix = write_pair(tmp_path / "x", DOCUMENTS, order=ORDER)
    idx, bin_ = (Path(f"{prefix}{end}").read_bytes() for end in (".idx", ".bin"))
    lines: list[str] = []
    read = 0
    for number in range(MUTATIONS):
        parts = bytearray(idx), bytearray(bin_)
        mutate(rng, *parts)
        one = tmp_path / f"{number}"
        for end, data in zip((".idx", ".bin"), parts, strict=True):
            Path(f"{one}{end}").write_bytes(data)
        try:
            found = ours(one)
        except UsageError as error:
            lines.append(str(error))
        else:
            assert found == megatrons(one), number
            read += 1
        for end in (".idx", ".bin"):
            os.unlink(f"{one}{end}")
    assert read > 100
    assert len(lines) > 1000
    assert not any("\n" in line for line in lines)


# ------------------------------------------------------------------------------------------------------- ids


def instructions(prefix: Path, ids: list[list[int]], labels: list[list[int]], writer: bool = True) -> DataArgs:
    """Instruction data, of this project's writer or of another's."""
    for name, rows in (("input_ids", ids), ("labels", labels), ("attention_mask", [[1] * len(row) for row in ids])):
        target = Path(f"{prefix}_packed_{name}_document")
        if writer:
            made = IndexedWriter(target)
            for row in rows:
                made.add(np.array(row), np.array([len(row)]))
            made.close()
        else:
            write_pair(target, rows)
    return DataArgs(data_path=[str(prefix)], stage="sft", split="1,0,0")


@pytest.mark.parametrize("writer", [True, False])
def test_ids_outside_the_vocabulary_are_found_wherever_they_are(tmp_path: Path, writer: bool) -> None:
    rows = [[1, 2, 3, 4]] * 30
    good = [[-100, -100, 3, 4]] * 30
    check_data(instructions(tmp_path / "good", rows, good, writer), 5, seq_length=8)
    for name, bad, limit in (
        ("id", [[1, 2, 300, 4]], "holds token 300"),
        ("negative", [[1, -100, 3, 4]], "holds -100"),
    ):
        data = instructions(tmp_path / name, rows[:15] + bad + rows[:14], good, writer)
        with pytest.raises(UsageError, match=rf"--data-path .*{name}_packed_input_ids_document {limit}.*preprocess"):
            check_data(data, 151, seq_length=8)
    for name, bad, limit in (
        ("label", [[-100, 2, 300, 4]], "holds token 300"),
        ("low", [[-100, 2, -1, 4]], "holds -1;"),
    ):
        data = instructions(tmp_path / name, rows, good[:15] + bad + good[:14], writer)
        with pytest.raises(UsageError, match=rf"--data-path .*{name}_packed_labels_document {limit}"):
            check_data(data, 151, seq_length=8)
        check_data(data, 151, seq_length=8, scans=False)  # rank 0 looks


def test_a_foreign_file_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path / "x", DOCUMENTS)
    data = DataArgs(data_path=[str(tmp_path / "x")], data_cache_path=str(tmp_path / "cache"))
    looked: list[str] = []
    real = token_record._scan
    monkeypatch.setattr(token_record, "_scan", lambda prefix, tokens: looked.append(prefix) or real(prefix, tokens))
    for _ in range(2):
        check_data(data, 20, seq_length=4)
    assert len(looked) == 1
    with pytest.raises(UsageError, match="holds token 19, but the model's vocabulary has 19 rows"):
        check_data(data, 19, seq_length=4)
    write_pair(tmp_path / "x", [*DOCUMENTS[:4], [15, 16, 17, 18, 99]])  # other content, the same index
    with pytest.raises(UsageError, match="holds token 99"):
        check_data(data, 20, seq_length=4)
    assert len(looked) == 2
    kept = next((tmp_path / "cache").glob("ids-*.json"))
    kept.write_text('{"version": 1, "files": ')
    with pytest.raises(UsageError, match="holds token 99"):
        check_data(data, 20, seq_length=4)
    assert len(looked) == 3


def test_a_record_is_not_taken_for_other_files(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", made={"tokenizer": "abc"})
    writer.add(np.array([1, 2, -100]), np.array([3]))
    writer.close()
    record = token_record.find_record(str(tmp_path / "x"))
    assert record == token_record.TokenRecord(token_record.IdRange(3, 1, 1, 2), {"tokenizer": "abc"})
    assert json.loads((tmp_path / "x.record.json").read_text())["ids"]["largest"] == 2
    write_pair(tmp_path / "x", [[1, 2, 9]])
    assert token_record.find_record(str(tmp_path / "x")) is None
    data = DataArgs(data_path=[str(tmp_path / "x")])
    with pytest.raises(UsageError, match="holds token 9"):
        check_data(data, 9, seq_length=4)


def test_a_record_without_settings_is_read(tmp_path: Path) -> None:
    write_pair(tmp_path / "x", [[1, 2, 9]])
    path = tmp_path / "x.record.json"
    token_record.TokenRecord(token_record.IdRange(3, 0, 1, 9)).write(path, str(tmp_path / "x"))
    content = json.loads(path.read_text())
    del content["made"]
    path.write_text(json.dumps(content))
    record = token_record.find_record(str(tmp_path / "x"))
    assert record == token_record.TokenRecord(token_record.IdRange(3, 0, 1, 9), {})


def test_a_resumed_file_knows_the_ids_of_its_first_part(tmp_path: Path) -> None:
    first = IndexedWriter(tmp_path / "x")
    first.add(np.array([7, 500]), np.array([2]))
    position = first.position()
    first.add(np.array([9000]), np.array([1]))  # behind the last finished part
    first.position()
    second = IndexedWriter(tmp_path / "x", position)
    second.add(np.array([3]), np.array([1]))
    second.close()
    record = token_record.find_record(str(tmp_path / "x"))
    assert record is not None
    assert record.ids == token_record.IdRange(3, 0, 3, 500)


# ------------------------------------------------------------------------------------------ before training


def test_a_training_that_would_learn_nothing_is_refused(tmp_path: Path) -> None:
    rows = [[1, 2, 3, 4]] * 10
    check_data(instructions(tmp_path / "good", rows, [[-100] * 4] * 9 + [[-100, 2, 3, 4]]), 10, seq_length=8)
    for name, labels in (("none", [[-100] * 4] * 10), ("first", [[1, -100, -100, -100]] * 10)):
        data = instructions(tmp_path / name, rows, labels)
        with pytest.raises(UsageError, match=rf"--data-path .*{name}: no sample for training has a token to learn"):
            check_data(data, 10, seq_length=8)


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    rows = [[1] * 4] * 6 + [[1] * 9] * 3
    data = instructions(tmp_path / "x", rows, rows)
    facts = check_data(data, 10, seq_length=6)
    assert (facts.samples, facts.truncated, facts.truncated_tokens) == (9, 3, 9)
    pack = instructions(tmp_path / "p", [[1] * 8], [[-100] * 6 + [1, -100]])
    with pytest.raises(UsageError, match="in its first 5 tokens"):
        check_data(pack, 10, seq_length=5)


def test_another_tokenizer_than_the_data_were_made_with_is_said(
    tmp_path: Path, run: Callable, tiny_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen3_npu import log

    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n')
    run("--input", tmp_path / "a.jsonl", "--handler-name", "GeneralPretrainHandler", "--output-prefix", tmp_path / "o")
    other = shutil.copytree(tiny_tokenizer, tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    prefix = str(tmp_path / "o_text_document")
    log.setup()
    for folder, size, said in ((tiny_tokenizer, 600, ""), (other, 600, "another tokenizer"), (other, 420, "420 rows")):
        data = DataArgs(data_path=[prefix], tokenizer_name_or_path=str(folder))
        check_data(data, size, seq_length=1)
        out = capsys.readouterr().out
        assert said in out if said else not out

"""Pairs of answers for tests, and what TRL's own trainers compute of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_npu.data.train.preference_dataset import LabelledFiles, PairFiles
from qwen3_npu.data.train.sft_dataset import instruction_splits
from qwen3_npu.data.train.token_file import IndexedWriter, publish

LONGEST, BATCH = 64, 8
NAMES = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
LABELLED = ("input_ids", "labels", "desirable")
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def write_pairs(prefix: Path, *, count: int = 24, vocab: int = 256, seed: int = 3) -> str:
    """Random pairs: the chosen answer counts on from the prompt, the rejected one is noise."""
    rng = np.random.default_rng(seed)
    writers = [IndexedWriter(f"{prefix}_packed_{name}_document") for name in NAMES]
    for _ in range(count):
        start, sizes = int(rng.integers(vocab)), rng.integers(3, 24, 3)
        prompt, good = ([(start + i) % (vocab - 2) + 2 for i in range(size)] for size in sizes[:2])
        bad = (rng.integers(vocab - 2, size=sizes[2]) + 2).tolist()
        for answer, (ids, labels) in ((good, writers[:2]), (bad, writers[2:])):
            row = [*prompt, *answer]
            length = np.array([len(row)], np.int32)
            ids.add(np.array(row, np.int32), length)
            labels.add(np.array([-100] * len(prompt) + answer, np.int32), length)
    publish(writers)
    return str(prefix)


def write_texts(prefix: Path, pairs: list[tuple[str, str, str]], longest: int = 128) -> str:
    """Pairs of texts as bytes: the end of each prompt, the beginning of each answer, and 0 after an answer."""
    writers = [IndexedWriter(f"{prefix}_packed_{name}_document") for name in NAMES]
    for prompt_text, *answers in pairs:
        prompt = list(prompt_text.encode()[-longest // 4 :])
        for text, (ids, labels) in zip(answers, (writers[:2], writers[2:]), strict=True):
            answer = [*text.encode()[: longest - 1], 0]
            length = np.array([len(prompt) + len(answer)], np.int32)
            ids.add(np.array(prompt + answer, np.int32), length)
            labels.add(np.array([-100] * len(prompt) + answer, np.int32), length)
    publish(writers)
    return str(prefix)


def first_step(prefix: str, seed: int = 1234) -> list[Pair]:
    """The pairs of the first step, in the order of the training."""
    train = instruction_splits([PairFiles(prefix)], None, "1,0,0", longest=LONGEST, seed=seed).train
    assert train is not None
    found = []
    for number in range(BATCH):
        pair = train[number]
        prompt = int((pair.chosen.labels == -100).sum())
        ids = pair.chosen.ids.tolist()
        found.append((ids[:prompt], ids[prompt:], pair.rejected.ids.tolist()[prompt:]))
    return found


def write_labelled(prefix: Path, *, count: int = 24, vocab: int = 256, seed: int = 16) -> str:
    """Random answers with labels: those that count on from the prompt are desirable, noise is not."""
    rng = np.random.default_rng(seed)
    writers = [IndexedWriter(f"{prefix}_packed_answer_{name}_document") for name in LABELLED]
    for number in range(count):
        start, sizes, good = int(rng.integers(vocab)), rng.integers(3, 24, 2), number % 3 != 1
        prompt = [(start + i) % (vocab - 2) + 2 for i in range(sizes[0])]
        answer = rng.integers(vocab - 2, size=sizes[1]) + 2
        if good:
            answer = (start + sizes[0] + np.arange(sizes[1])) % (vocab - 2) + 2
        rows = [*prompt, *answer], [*[-100] * len(prompt), *answer], [int(good)]
        for writer, row in zip(writers, rows, strict=True):
            writer.add(np.array(row, np.int32), np.array([len(row)], np.int32))
    publish(writers)
    return str(prefix)


def labelled_step(prefix: str, seed: int = 1234) -> list[tuple[list[int], list[int], bool]]:
    """Prompt, answer and label of the samples of the first step, in the order of the training."""
    train = instruction_splits([LabelledFiles(prefix)], None, "1,0,0", longest=LONGEST, seed=seed).train
    assert train is not None
    found = []
    for one in (train[number] for number in range(BATCH)):
        prompt = int((one.answer.labels == -100).sum())
        ids = one.answer.ids.tolist()
        found.append((ids[:prompt], ids[prompt:], one.desirable))
    return found


def kto_loss(
    policy: Any,
    reference: Any,
    samples: list[tuple[list[int], list[int], bool]],
    folder: Path,
    *,
    micro: int,
    at_once: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of a batch and the metrics of TRL's trainer, on `at_once` samples, answers cycled `micro` by `micro`."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy.train()
    policy.config.router_aux_loss_coef = 0.0
    dummy = Dataset.from_list([{"prompt": "t5", "completion": "t7", "label": True}] * 2)
    config = KTOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        per_device_train_batch_size=2,
    )
    trainer = KTOTrainer(
        model=policy, ref_model=reference, args=config, train_dataset=dummy, processing_class=_tokenizer()
    )
    rounds = []
    for start in range(0, len(samples), at_once):
        examples = []
        for number in range(start, start + at_once):
            prompt, answer, label = samples[number]
            before = number - 1 if number % micro else number + micro - 1
            other = samples[before][1]
            examples.append(
                {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label}
            )
        rounds.append((trainer._compute_loss(policy, trainer.data_collator(examples), False), examples))
    told = trainer._metrics["train"]
    counts = {
        "chosen": [sum(example["label"] for example in examples) for _, examples in rounds],
        "rejected": [sum(not example["label"] for example in examples) for _, examples in rounds],
    }
    metrics = {"kl": float(np.mean(told["kl"]))}
    for which, numbers in counts.items():
        weights = [count for count in numbers if count]  # TRL tells nothing of a round without any
        for what in ("rewards", "logps"):
            metrics[f"{what}/{which}"] = float(np.average(told[f"{what}/{which}"], weights=weights))
    return torch.stack([loss for loss, _ in rounds]).mean(), metrics


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0")


def trl_loss(stage: str, policy: Any, reference: Any, pairs: list[Pair], folder: Path, **options: Any) -> Any:
    """Loss of a batch (with its graph) and the metrics that TRL logs; its own trainers compute both."""
    from datasets import Dataset

    policy.train()
    policy.config.router_aux_loss_coef = 0.0  # the routers' loss has tests of its own
    common = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, **options}
    dummy = Dataset.from_list([{"prompt": "t5", "chosen": "t7", "rejected": "t8"}] * 2)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    if stage == "dpo":
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=DPOConfig(**common, disable_dropout=True),
            train_dataset=dummy,
            processing_class=_tokenizer(),
        )
        batch = trainer.data_collator([dict(zip(columns, pair, strict=True)) for pair in pairs])
        loss = trainer._compute_loss(policy, batch, False)
        return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}
    if stage == "rm":
        return _reward_loss(policy, pairs, dummy, common)
    if stage == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        common |= {"loss_type": "simpo", "cpo_alpha": 0.0}
    trainer = Trainer(model=policy, args=Config(**common), train_dataset=dummy, processing_class=_tokenizer())
    return trainer.get_batch_loss_metrics(policy, _concatenated(pairs))


def _reward_loss(policy: Any, pairs: list[Pair], dummy: Any, common: dict[str, Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(policy, RewardConfig(**common), train_dataset=dummy, processing_class=_tokenizer())
    examples = [{"chosen_ids": p + good, "rejected_ids": p + bad} for p, good, bad in pairs]
    loss, outputs = trainer.compute_loss(policy, trainer.data_collator(examples), return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    told = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    told |= {"rewards/accuracies": told["accuracy"], "rewards/margins": told["margin"]}
    return loss, told | {"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item()}


def _concatenated(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """A batch as ORPOTrainer's and CPOTrainer's collators make it."""
    batch: dict[str, torch.Tensor] = {}
    for which, name in ((1, "chosen"), (2, "rejected")):
        longest = max(len(pair[0]) + len(pair[which]) for pair in pairs)
        ids, labels, mask = (torch.full((len(pairs), longest), fill) for fill in (0, -100, 0))
        for row, pair in enumerate(pairs):
            whole, prompt = [*pair[0], *pair[which]], len(pair[0])
            ids[row, : len(whole)] = torch.tensor(whole)
            labels[row, prompt : len(whole)] = torch.tensor(pair[which])
            mask[row, : len(whole)] = 1
        batch |= {f"{name}_input_ids": ids, f"{name}_labels": labels, f"{name}_attention_mask": mask}
    return batch

"""What TRL's own trainers compute of the first step of a preference training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pairs import LabelledAnswer, Pair
from plain import unstacked

BETA, GAMMA, SMOOTHING, CENTER, FTX = 0.3, 0.6, 0.1, 0.05, 0.25
WEIGHTS = 1.5, 0.7  # of desirable and undesirable answers
BALANCE, Z = 0.1, 0.02  # weights of the routers' losses
MICRO = 4  # pairs or answers of a micro-batch
# Loss -> the training's flags.
LOSSES = {
    "sigmoid": ["--stage", "dpo", "--dpo-beta", str(BETA)],
    "hinge": ["--stage", "dpo", "--dpo-loss-type", "hinge", "--dpo-beta", str(BETA)],
    "ipo": ["--stage", "dpo", "--dpo-loss-type", "ipo", "--dpo-beta", str(BETA)],
    "sigmoid and fine-tuning": ["--stage", "dpo", "--dpo-beta", str(BETA), "--pref-ftx", str(FTX)],
    "orpo": ["--stage", "orpo", "--dpo-beta", str(BETA)],
    "simpo": ["--stage", "simpo", "--beta", str(BETA), "--simpo-gamma", str(GAMMA)],
    "kto": ["--stage", "kto", "--beta", str(BETA)],
    "reward model": ["--stage", "rm", "--center-rewards-coefficient", str(CENTER)],
}
LOSSES["simpo"] += ["--dpo-label-smoothing", str(SMOOTHING)]
LOSSES["kto"] += ["--desirable-weight", str(WEIGHTS[0]), "--undesirable-weight", str(WEIGHTS[1])]
# Metric -> TRL's name of it.
_OF_PAIRS = {
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "rewards/accuracy": "rewards/accuracies",
    "rewards/margin": "rewards/margins",
    "logps/chosen": "logps/chosen",
    "logps/rejected": "logps/rejected",
}
Row = tuple[list[int], int]  # tokens, and how many of them are the prompt


class Oracle:
    """One policy, on the pairs and answers of a step.

    Args:
        policy: of transformers or peft, in float32; a reward model for "reward model".
        reference: for the losses that compare with one.
        folder: for what TRL may write.
    """

    def __init__(
        self, policy: Any, reference: Any, pairs: Sequence[Pair], answers: Sequence[LabelledAnswer], folder: Path
    ) -> None:
        policy.train()
        policy.config.router_aux_loss_coef = 0.0  # it is added below, of each layer as in Megatron
        self.policy, self.reference, self.pairs, self.answers = policy, reference, pairs, answers
        self.folder = folder
        self.trainers = self._made(reward=hasattr(policy, "score"))
        self.step = functools.cache(self._step)

    def _step(self, loss: str, ranks: int) -> dict[str, Any]:
        """Loss, metrics by our names and gradients by the names of files.

        Args:
            ranks: of data parallelism, which matter to kto.
        """
        self.policy.zero_grad(set_to_none=True)
        if loss == "kto":
            value, metrics = self._kto(ranks)
        else:
            # Most losses are means over pairs; orpo's has one over the tokens of a micro-batch. TRL's fine-tuning loss
            # is the mean over the tokens of a batch, and MindSpeed-LLM's the mean over pairs of that of their tokens.
            size = {"orpo": MICRO, "sigmoid and fine-tuning": 1}.get(loss, len(self.pairs))
            parts = [self._of_pairs(loss, self.pairs[at : at + size]) for at in range(0, len(self.pairs), size)]
            value = torch.stack([one for one, _ in parts]).mean()
            metrics = {name: float(np.mean([told[name] for _, told in parts])) for name in parts[0][1]}
        total = value
        if getattr(self.policy.config, "num_experts", 0):
            total = value + self._routing(loss)
        total.backward()
        named = dict(self.policy.named_parameters(remove_duplicate=False))
        if self.policy.config.tie_word_embeddings:
            named.pop("lm_head.weight", None)
        gradients = {name: p.grad.numpy().copy() for name, p in named.items() if p.grad is not None}
        return {"loss": value.item(), "metrics": metrics, "gradients": unstacked(_as_in_files(gradients))}

    def _of_pairs(self, loss: str, pairs: Sequence[Pair]) -> tuple[torch.Tensor, dict[str, float]]:
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        if loss == "reward model":
            return self._reward(pairs)
        if loss in ("orpo", "simpo"):
            value, told = self.trainers[loss].get_batch_loss_metrics(self.policy, _concatenated(pairs))
        else:
            trainer = self.trainers["dpo"]
            kinds = {"sigmoid and fine-tuning": ("sigmoid", "sft")}.get(loss, (loss,))
            trainer.loss_types, trainer.loss_weights = list(kinds), [1.0, FTX][: len(kinds)]
            batch = trainer.data_collator([dict(zip(columns, pair, strict=True)) for pair in pairs])
            value = trainer._compute_loss(self.policy, batch, False)
            told = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return value, {ours: float(told[theirs]) for ours, theirs in _OF_PAIRS.items()}

    def _reward(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, dict[str, float]]:
        trainer = self.trainers["reward model"]
        examples = [{"chosen_ids": p + good, "rejected_ids": p + bad} for p, good, bad in pairs]
        value, outputs = trainer.compute_loss(self.policy, trainer.data_collator(examples), return_outputs=True)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        told = trainer._metrics["train"]
        found = {"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item()}
        return value, found | {"rewards/accuracy": told["accuracy"][-1], "rewards/margin": told["margin"][-1]}

    def _kto(self, ranks: int) -> tuple[torch.Tensor, dict[str, float]]:
        """On the answers that all data-parallel ranks work on at once; answers are cycled within a micro-batch."""
        trainer, at_once = self.trainers["kto"], MICRO * ranks
        told = trainer._metrics["train"]
        values, counts = [], []
        for start in range(0, len(self.answers), at_once):
            examples = [self._kto_example(number) for number in range(start, start + at_once)]
            values.append(trainer._compute_loss(self.policy, trainer.data_collator(examples), False))
            counts.append([sum(one["label"] is good for one in examples) for good in (True, False)])
        metrics = {"kl": float(np.mean(told["kl"][-len(values) :]))}
        for place, which in enumerate(("chosen", "rejected")):
            weights = [both[place] for both in counts if both[place]]  # TRL tells nothing of a round without any
            for what in ("rewards", "logps"):
                of_rounds = told[f"{what}/{which}"][-len(weights) :]
                metrics[f"{what}/{which}"] = float(np.average(of_rounds, weights=weights))
        return torch.stack(values).mean(), metrics

    def _kto_example(self, number: int) -> dict[str, Any]:
        prompt, answer, label = self.answers[number]
        _, other, _ = self.answers[_before(number)]
        return {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label}

    def _made(self, reward: bool) -> dict[str, Any]:
        """Which -> its trainer."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        pairs = Dataset.from_list([{"prompt": "t5", "chosen": "t7", "rejected": "t8"}] * 2)
        labelled = Dataset.from_list([{"prompt": "t5", "completion": "t7", "label": True}] * 2)
        good, bad = WEIGHTS
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": GAMMA, "label_smoothing": SMOOTHING}
        kto = {"desirable_weight": good, "undesirable_weight": bad, "per_device_train_batch_size": 2}

        def made(trainer: Any, config: Any, data: Any = pairs, **options: Any) -> Any:
            more = {"ref_model": self.reference} if trainer in (DPOTrainer, KTOTrainer) else {}
            args = config(output_dir=str(self.folder), report_to=[], use_cpu=True, bf16=False, **options)
            return trainer(self.policy, args=args, train_dataset=data, processing_class=_tokenizer(), **more)

        if reward:
            return {"reward model": made(RewardTrainer, RewardConfig, center_rewards_coefficient=CENTER)}
        return {
            "kto": made(KTOTrainer, KTOConfig, labelled, beta=BETA, **kto),
            "dpo": made(DPOTrainer, DPOConfig, beta=BETA),  # after kto's: both change what the model gives
            "orpo": made(ORPOTrainer, ORPOConfig, beta=BETA),
            "simpo": made(CPOTrainer, CPOConfig, beta=BETA, **simpo),
        }

    def _routing(self, loss: str) -> torch.Tensor:
        """transformers' loss of balance of each layer and the z-loss of its router, a mean over micro-batches."""
        from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

        total = torch.zeros(())
        rounds = range(0, len(self.pairs), MICRO)
        for start in rounds:
            sequences = []
            for number in range(start, start + MICRO):
                if loss == "kto":
                    prompt, answer, _ = self.answers[number]
                    sequences += [prompt + answer, prompt + self.answers[_before(number)][1]]
                else:
                    prompt, good, bad = self.pairs[number]
                    sequences += [prompt + good, prompt + bad]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in sequences], batch_first=True)
            lengths = torch.tensor([len(one) for one in sequences])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            out = self.policy.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
            for logits in out.router_logits:
                # Megatron's is of the probability of an expert per token, transformers' per token and place of k.
                balance = load_balancing_loss_func((logits,), num_experts=4, top_k=2, attention_mask=mask) / 2
                real = logits.logsumexp(-1).square()[mask.flatten() == 1]
                total = total + BALANCE * balance + Z * real.mean()
        return total / len(rounds)


def _before(number: int) -> int:
    """The answer that `number`'s prompt is also run with: of the one before it in the micro-batch."""
    return number - 1 if number % MICRO else number + MICRO - 1


def _as_in_files(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what peft adds in memory."""
    names = ((name, name.replace(".modules_to_save.default.", ".").replace(".default.", ".")) for name in gradients)
    return {ours: gradients[name] for name, ours in names}


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0")


def _concatenated(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
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


def policy_of(model: str, adapter: str | None = None, *, reward: bool = False) -> Any:
    """A model as transformers opens it; with an adapter as peft does, where the linears that Megatron fuses share A."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if reward:
        opened: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=1)
    else:
        opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is None:
        return opened
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(opened, adapter, is_trainable=True)
    for layer in adapted.base_model.model.model.layers:
        a, m = layer.self_attn, layer.mlp
        for first, *others in ((a.q_proj, a.k_proj, a.v_proj), (m.gate_proj, m.up_proj)):
            for other in others:
                other.lora_A["default"].weight = first.lora_A["default"].weight
    return adapted

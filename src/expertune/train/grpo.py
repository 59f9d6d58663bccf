"""Group relative policy optimization: TRL's GRPOTrainer with the promises, on answers that this project generates.

The model answers each prompt `num_generations` times, the answers of a group are rewarded and compared with each other,
and the better ones become more likely (Shao et al. 2024, "DeepSeekMath", section 4.1). Loss and advantages are TRL's.

What a run promises is kept here where TRL's trainer does not: answers depend on the seed, the step and the weights
alone, so that a resumed run draws them again; a checkpoint between two generations holds the answers that are not used
up; every epoch has an order of its own, whether the run was interrupted or not. Memory that runs out while answers are
generated has them generated in smaller batches; a micro-batch is not split, and so no group is.

These methods of TRL's GRPOTrainer are overridden, each for want of a public one: `training_step`, `_prepare_inputs`,
`_generate_and_score_completions`, `_get_train_sampler`, `_load_optimizer_and_scheduler`, `create_model_card` and
`_send_telemetry`. Of its attributes `_step`, `_buffered_inputs`, `_metrics`, `beta`, `ref_model`, `eos_token_ids` and
`generation_kwargs` are set or read, and of its sampler `shuffle`, `generator` and `seed`. All were read from TRL
1.16; `tests/train/test_grpo.py` fails on a release that changes them.
"""

import copy
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from expertune.adapt.first_factors import first_factors
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.errors import RewardError
from expertune.generation.decoding import evaluation_mode, generate_ids, to_text
from expertune.objectives.log_probs import Reference
from expertune.objectives.rewards import Answers, Reward, Rewards
from expertune.train.callbacks import RandomState
from expertune.train.promises import Promised, Promises

_ANSWERS_NAME = "answers.pt"

_trl_logger = logging.getLogger(GRPOTrainer.__module__)

# What TRL reports that a run has under a name of its own.
_REPORTED_ELSEWHERE = ("num_tokens", "step_time")


def _is_not_of_a_missing_reward(record: logging.LogRecord) -> bool:
    """TRL warns of each answer without a reward, and has the number of its example where the prompt should be."""
    return "returned None for" not in record.getMessage()


class _ReferenceModel:
    """A reference, to be called like the model."""

    def __init__(self, model: ExpertPeftModel, reference: Reference) -> None:
        self._model, self._reference = model, reference

    def __call__(self, **inputs: Any) -> Any:
        with evaluation_mode(self._model), self._reference.in_place():
            return self._model(**inputs)


class _Uncounted(GRPOTrainer):
    """A step may be computed more than once: `GroupTrainer` counts those that are taken."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return Trainer.training_step(self, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A run writes its own."""

    def _send_telemetry(self) -> None:
        """A run sends nothing."""


class GroupTrainer(Promises, _Uncounted):
    """The trainer of `objective: grpo`.

    Args:
        model: the adapted model.
        args: of the run.
        examples: with `prompt` and `prompt_ids`, the columns that rewards are given, and `example_ids`.
        tokenizer: the base model's.
        rewards: of the run.
        promised: what the promises are kept with.
    """

    def __init__(
        self,
        model: ExpertPeftModel,
        args: GRPOConfig,
        examples: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        rewards: Rewards,
        promised: Promised,
    ) -> None:
        self._examples, self._rewards, self._tokenizer_of_run = examples, rewards, tokenizer
        self._generated: dict[str, list[float]] = defaultdict(list)
        self._has_reward = torch.zeros(0, dtype=torch.bool)  # of the answers of the last generation
        # TRL would add a copy of the adapter as the reference, also of one that has no effect yet.
        beta, args.beta = args.beta, 0.0
        args.reward_weights = rewards.weights
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'", category=UserWarning)
            super().__init__(
                model=model,
                reward_funcs=[self._as_trl_calls(reward) for reward in rewards.rewards],
                args=args,
                # A prompt is handed around as the number of its example.
                train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(examples))]}),
                eval_dataset=promised.evaluation.dataset if promised.evaluation else None,
                processing_class=copy.deepcopy(tokenizer),  # which TRL gives a padding token
                rollout_func=self._answer,
                promised=promised,
            )
        for default in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            self.remove_callback(default)
        self.beta = args.beta = beta
        if beta:
            self.ref_model = _ReferenceModel(model, Reference(model, keeps_start=has_effect(model)))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A micro-batch of answers, which are generated where the last ones are used up."""
        model.train()  # by which TRL tells training from evaluation
        batch = self._prepare_inputs(inputs)
        whole = {
            "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            "example_ids": batch["example_ids"].tolist(),
        }
        loss = super().training_step(model, {**batch, **whole}, num_items_in_batch)
        self._step += 1
        if self.accelerator.sync_gradients:
            for name, figures in self._generated.items():
                self.figures.add(name, sum(figures) / len(figures), len(figures))
            self._generated.clear()
        return loss

    def why_indivisible(self, num_items_in_batch: Tensor | int | None) -> str | None:
        """Why a micro-batch in parts would be another step; see `expertune.train.promises.Promises`."""
        return "answers of a group belong together, and the loss is a mean over a micro-batch's answers"

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; its figures become the run's."""
        self._take_figures()
        loss = super().compute_loss(*args, **kwargs)
        for name, figure in self._take_figures().items():
            self.figures.add(name, figure)
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):  # answers that are prepared already
            return Trainer._prepare_inputs(self, inputs)
        random_state = RandomState()
        set_seed(self._seed())  # TRL shuffles answers, and a reward function may draw
        try:
            return super()._prepare_inputs(inputs)
        finally:
            random_state.restore()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._take_figures()
        ids = [self._examples[int(each["prompt"])]["example_ids"][0] for each in inputs]
        self._has_reward = torch.zeros(len(inputs), dtype=torch.bool)
        _trl_logger.addFilter(_is_not_of_a_missing_reward)
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            _trl_logger.removeFilter(_is_not_of_a_missing_reward)
        if not self._has_reward.any():
            raise RewardError(
                f"rewards: {', '.join(reward.name for reward in self._rewards.rewards)} returned None for each of the "
                f"{len(inputs)} answers of a generation (the first is to {self.place_of(ids[0])}), from which nothing "
                "is learned; return a number for some of them, or remove examples that have no reward"
            )
        output["example_ids"] = torch.tensor(ids)
        figures = self._take_figures()
        # Of a group with fewer than two rewards TRL has NaN for the spread, and does not count it as none.
        assert self.num_generations is not None  # TRL's class has a number
        num_rewards = self._has_reward.view(-1, self.num_generations).sum(1)
        alike = figures["frac_reward_zero_std"] + (num_rewards < 2).float().mean().item()
        figures["frac_reward_zero_std"] = min(alike, 1.0)
        for name, figure in figures.items():
            self._generated[name].append(figure)
        self._rewards.watch(figures["frac_reward_zero_std"])
        return output

    def _answer(self, numbers: list[str], _trainer: Any) -> dict[str, Any]:
        """TRL's hook for answers of one's own."""
        prompts = [list(self._examples[int(number)]["prompt_ids"]) for number in numbers]

        def generate(some: list[tuple[int, list[int]]]) -> list[list[int]]:
            torch.manual_seed(self._seed(1 + some[0][0]))
            config = GenerationConfig(**self.generation_kwargs, num_beams=1)
            return generate_ids(self.model, [ids for _, ids in some], config)

        parts = self.oom.in_parts("generation", generate, list(enumerate(prompts)), step=self.state.global_step)
        answers = [self._until_end(ids) for part in parts for ids in part]
        return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": None}

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((place for place, each in enumerate(ids) if each in self.eos_token_ids), len(ids))
        return ids[: end + 1]

    def _as_trl_calls(self, reward: Reward) -> Any:
        def call(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            examples = [self._examples[int(number)] for number in prompts]
            texts = [to_text(ids, self._tokenizer_of_run) for ids in completion_ids]
            places = [self.place_of(each["example_ids"][0]) for each in examples]
            found = reward.of(Answers.to(examples, texts, completion_ids, places))
            self._has_reward |= torch.tensor([number is not None for number in found])
            return found

        call.__name__ = reward.name
        return call

    def _seed(self, place: int = 0) -> int:
        """Of what is drawn for this step; a prompt's place among those of the step has one of its own."""
        return (int(self.args.seed) + 1_000_003 * self._step + place) % 2**32

    def _take_figures(self) -> dict[str, float]:
        """TRL's figures since they were taken last."""
        held = self._metrics["train"]
        found = {}
        for name, figures in held.items():
            known = [figure for figure in figures if not math.isnan(figure)]
            if known and name not in _REPORTED_ELSEWHERE:
                found[name] = sum(known) / len(known)
        held.clear()
        return found

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler: Any = super()._get_train_sampler(*args, **kwargs)

        def set_epoch(epoch: int) -> None:
            if sampler.shuffle:
                sampler.generator.manual_seed(sampler.seed + epoch)

        sampler.set_epoch = set_epoch  # accelerate calls it where there is one
        return sampler

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save({"step": self._step, "answers": self._buffered_inputs}, Path(output_dir) / _ANSWERS_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            held = torch.load(Path(checkpoint) / _ANSWERS_NAME, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = held["step"], held["answers"]


def has_effect(model: nn.Module) -> bool:
    """Whether an adapter changes anything yet: factors B begin at zero, or with values that are taken away."""
    first = dict(first_factors(model))
    return any(
        each.requires_grad and ".lora_B." in name and bool((each != first.get(each, 0)).any())
        for name, each in model.named_parameters()
    )

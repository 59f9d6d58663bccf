"""TRL's losses over answers, and the batches that they take: the one place that knows the insides of TRL's trainers.

A loss of TRL's is a private method of its trainer, and its constructor is another matter: it quantizes, copies the
adapter, casts its weights, patches the model's forward, tokenizes, and reports to TRL's makers. So the classes here are
TRL's trainers without their constructor, each with the attributes that its loss reads, and no training is asked of
them. Read in TRL 1.16; `tests/objectives/test_trl_losses.py` compares each with the trainer that TRL itself makes.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOTrainer, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.utils import disable_dropout_in_model as disable_dropout_in_model

from expertune.data.split import NUM_EXAMPLES
from expertune.distributed.mesh import Ranks
from expertune.evaluation.objective_figures import OF_ANSWERS
from expertune.objectives.figures import LossOutput
from expertune.objectives.log_probs import LogProbs

with warnings.catch_warnings():  # of an interface that may change
    warnings.simplefilter("ignore")
    from trl.experimental.orpo import ORPOTrainer

Batch = Mapping[str, Any]


class _OwnFigures:
    """In accelerate's place: TRL gathers figures from all processes, and here `Figures` adds up those of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


class _ModelState:
    """In the model's place where TRL asks whether it is in training, and what else it is."""

    is_gradient_checkpointing = False
    _modules: Mapping[str, Any] = {}  # accelerate looks for a PeftModel in there

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def training(self) -> bool:
        return self._model.training


class _TrlLoss:
    """What the losses of TRL's trainers have in common.

    Attributes:
        ranks: the processes whose examples a micro-batch is of.
    """

    def __init__(self, args: Any, model: PreTrainedModel, policy: LogProbs, reference: LogProbs) -> None:
        text_config = model.config.get_text_config()
        own = getattr(text_config, "router_aux_loss_coef", 0.0)
        asked = getattr(args, "router_aux_loss_coef", None)
        self.args, self.policy = args, policy
        self.ref_model: Any = reference
        self.model, self.accelerator = _ModelState(model), _OwnFigures(model.device)
        self.beta, self.precompute_ref_logps = args.beta, False
        # As with supervised fine-tuning: TRL would add it whenever the family has one.
        self.aux_loss_enabled = bool(getattr(text_config, "output_router_logits", False) if asked is None else asked)
        self.router_aux_loss_coef = self.aux_loss_coef = own if asked is None else asked
        self._metrics: Any = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens, self._tp_size = 0, 1
        self.ranks = Ranks()

    def stand_by(self) -> None:
        """Take part in what the loss exchanges between ranks, without an example."""

    def taken_figures(self) -> dict[str, float]:
        """The figures of the loss that was taken last."""
        of_mode = self._metrics["train" if self.model.training else "eval"]
        found = {name: values[-1] for name, values in of_mode.items() if name in OF_ANSWERS}
        of_mode.clear()
        return found


class Dpo(_TrlLoss, DPOTrainer):
    """`trl.DPOTrainer`'s loss."""

    def __init__(self, args: Any, model: PreTrainedModel, policy: LogProbs, reference: LogProbs) -> None:
        super().__init__(args, model, policy, reference)
        self.loss_types = args.loss_type
        self.loss_weights = args.loss_weights or [1.0] * len(self.loss_types)
        self.ld_alpha, self.label_smoothing, self.use_weighting = args.ld_alpha, args.label_smoothing, False
        self.f_divergence_type, self.f_alpha_divergence_coef = args.f_divergence_type, args.f_alpha_divergence_coef

    def taken(self, batch: Batch) -> LossOutput:
        """The loss of a batch of pairs."""
        num_pairs = batch[NUM_EXAMPLES]
        loss = self._compute_loss(self.policy, _of_trl(batch), False)
        return LossOutput(loss, num_pairs, {name: (figure, num_pairs) for name, figure in self.taken_figures().items()})


class Kto(_TrlLoss, KTOTrainer):
    """`trl.KTOTrainer`'s loss."""

    def __init__(self, args: Any, model: PreTrainedModel, policy: LogProbs, reference: LogProbs) -> None:
        super().__init__(args, model, policy, reference)
        self.loss_type, self.calculate_KL = args.loss_type, args.loss_type == "kto"
        self.desirable_weight, self.undesirable_weight = args.desirable_weight, args.undesirable_weight

    def taken(self, batch: Batch) -> LossOutput:
        """The loss of a batch of labeled answers."""
        num_examples: int = batch[NUM_EXAMPLES]
        num_chosen = int(batch["label"].sum())
        of = {"chosen": num_chosen, "rejected": num_examples - num_chosen}
        loss = self._compute_loss(self.policy, _of_trl(batch), False)
        figures = self.taken_figures()
        figures.pop("rewards/margins", None)  # of the step's examples, not of a micro-batch's: see `Figures.take`
        return LossOutput(
            loss,
            num_examples,
            {name: (figure, of.get(name.rpartition("/")[2], num_examples)) for name, figure in figures.items()},
        )

    def _compute_kl_logps(self, model: Any, batch: Batch) -> Any:
        """TRL's method; of several ranks the log-probabilities of all of them, whose mean is that of the micro-batch.

        TRL takes the mean of the ranks' means, which is another one where they have different numbers of examples.
        """
        own = super()._compute_kl_logps(model, batch)
        return own if own is None else own.new_tensor(self._of_all_ranks(own.tolist()))

    def stand_by(self) -> None:
        """See `_TrlLoss`."""
        for _ in ("policy", "reference") if self.calculate_KL else ():
            self._of_all_ranks([])

    def _of_all_ranks(self, own: list[float]) -> list[float]:
        self.ranks.proceed()  # or another one has run out of memory, and none of them goes on
        return [each for of_rank in self.ranks.gather(own) for each in of_rank]


class Orpo(_TrlLoss, ORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer`'s loss."""

    is_encoder_decoder = False

    def concatenated_forward(self, model: Any, batch: Batch) -> Any:
        """TRL's method, without logits: mean log-probabilities of both answers, and the cross entropy of the chosen."""
        num_pairs, ids_BT, mask_BT = batch[NUM_EXAMPLES], batch["input_ids"], batch["completion_mask"].bool()
        # TRL takes the cross entropy over the prompt as well.
        labeled_BT = torch.cat([batch["attention_mask"][:num_pairs].bool(), mask_BT[num_pairs:]])
        outputs = model(
            ids_BT,
            batch["attention_mask"],
            ids_BT.masked_fill(~labeled_BT, -100),
            output_router_logits=self.aux_loss_enabled,
        )
        answers_BT = mask_BT[:, 1:]
        means_B = (outputs.log_probs * answers_BT).sum(1) / answers_BT.sum(1)
        nll = -outputs.log_probs[:num_pairs].sum() / labeled_BT[:num_pairs, 1:].sum()
        none = outputs.mean_logits
        found = means_B[:num_pairs], means_B[num_pairs:], none, none, nll
        return (*found, outputs.aux_loss) if self.aux_loss_enabled else found

    def taken(self, batch: Batch) -> LossOutput:
        """The loss of a batch of pairs."""
        num_pairs = batch[NUM_EXAMPLES]
        loss, metrics = self.get_batch_loss_metrics(self.policy, dict(batch))
        return LossOutput(loss, num_pairs, {name: (metrics[name], num_pairs) for name in metrics if name in OF_ANSWERS})


LOSSES: dict[str, Callable[[Any, PreTrainedModel, LogProbs, LogProbs], Dpo | Kto | Orpo]] = {
    "dpo": Dpo,
    "kto": Kto,
    "orpo": Orpo,
}


def _of_trl(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


class Collator:
    """Makes a batch of examples as TRL's collators do, with their ids.

    Of pairs, the chosen answers come first, then the rejected ones, both in the order of the examples. Of labeled
    answers, `KL_input_ids` are each prompt with the answer to another one, which its example brings along.

    Args:
        args: of the objective.
    """

    def __init__(self, args: Any) -> None:
        self._takes_kl = getattr(args, "loss_type", None) == "kto"
        # Padding takes part in nothing: any token will do.
        self._pairs = DataCollatorForPreference(pad_token_id=0)
        self._labeled = DataCollatorForUnpairedPreference(pad_token_id=0)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples with `prompt_ids` and the other columns of pairs or labeled answers (`make_dataset`).

        Returns:
            `input_ids`, `attention_mask`, `completion_mask` [B, T], of labeled answers also `label` [B]; the number of
            examples; `example_ids` where examples have them.
        """
        more: dict[str, Any] = {
            NUM_EXAMPLES: len(features),
            "example_ids": [each for feature in features for each in feature.get("example_ids", ())],
        }
        if not features:  # of several ranks, one that the last examples did not suffice for
            return {"input_ids": torch.zeros(1, 0, dtype=torch.int64), **more}
        if "chosen_ids" in features[0]:
            return {**self._pairs(list(features)), **more}
        unread = () if self._takes_kl else ("KL_completion_ids",)
        rows = [{name: each for name, each in feature.items() if name not in unread} for feature in features]
        return {**self._labeled(rows), **more}

"""A run's training: what it minimizes, what is done when memory runs out, and what its record keeps of it."""

from functools import partial
from typing import Any, NamedTuple

from torch import nn
from transformers import TrainerState

from expertune.adapt.files import read_adapter_config
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.data import make_collator
from expertune.errors import ConfigError
from expertune.evaluation.held_out import HeldOut, Timed
from expertune.experts.balance import RouterLosses
from expertune.kernels import routes
from expertune.objectives.log_probs import Reference
from expertune.objectives.rewards import Rewards, load_rewards
from expertune.objectives.sft import SupervisedFineTuning
from expertune.objectives.units import keeps_start
from expertune.placement.experts import placement_of
from expertune.report.expert_maps import deaths_in_words
from expertune.run.context import RunContext
from expertune.run.directory import write_report
from expertune.run.inputs import Inputs
from expertune.train.callbacks import AfterEvaluation, Evaluations, ProgressBar, peak_memory_bytes
from expertune.train.checkpoints import ResumePoint
from expertune.train.expert_load import DeadExperts
from expertune.train.oom import Change, OutOfMemory
from expertune.train.promises import Promised, Promises
from expertune.train.schedule import evaluates_at_ends
from expertune.train.trackers import Trackers
from expertune.train.trainer import ExpertTrainer


def make_recovery(context: RunContext, model: nn.Module) -> OutOfMemory:
    """What a run does when memory runs out: each change is shown, and kept in the record."""
    record = context.record
    recoveries = record.section("train").get("recoveries", [])
    record.add("train", recoveries=recoveries)

    def keep(change: Change) -> None:
        context.notify(change.line)
        recoveries.append(change.to_json())
        record.update("train", recoveries=recoveries)

    offload = context.config.offload_activations
    recovery = OutOfMemory(model, context.device, offload, earlier=recoveries, notify=keep, ranks=context.ranks)
    recovery.run_dir = context.config.output_dir
    return recovery


class Learning(NamedTuple):
    """What a run learns from, what it is tried on, what is done when memory runs out, and losses that are added."""

    objective: Any  # an Objective; of those over answers also a held-out evaluation's
    held_out: HeldOut | None
    recovery: OutOfMemory
    router_losses: RouterLosses | None


def read_rewards(context: RunContext) -> Rewards | None:
    """The functions of `objective: grpo`, before anything else is read."""
    config = context.config
    if config.objective != "grpo":
        return None
    start = config.lora.init_from
    targets = read_adapter_config(start).get("target_modules") if start else config.lora.targets
    if "lm_head" in (targets or []):
        raise ConfigError(
            "objective: grpo takes log-probabilities from the weight of lm_head, and would not train an adapter there; "
            + (f"start from another than {start}, which has one" if start else "leave it out of lora.targets")
        )
    return Rewards(load_rewards(config.rewards, context.trust_rewards), context.note)


def make_objective(context: RunContext, model: ExpertPeftModel) -> Any:
    """What the run minimizes, on a model that has taken no step yet."""
    config = context.config
    if config.objective == "sft":
        return SupervisedFineTuning(model, context.arguments, config.loss, context.note)
    from expertune.objectives.preference import Preference  # which imports TRL

    reference = Reference(model, keeps_start(config))
    return Preference(config, model, context.arguments, reference, context.note, context.ranks)


def train(
    context: RunContext, inputs: Inputs, model: ExpertPeftModel, learning: Learning, point: ResumePoint | None
) -> None:
    """Train, and keep in the record what was seen of it, also where it stops; all ranks call this.

    Args:
        context: the run.
        inputs: its examples.
        model: the base with the adapter.
        learning: what the run learns from.
        point: where a resumed run continues.
    """
    config, record = context.config, context.record
    objective, held_out, recovery, router_losses = learning
    promised = Promised(
        oom=recovery,
        evaluation=Timed(held_out, record) if held_out else None,
        place_of=lambda index: inputs.train.examples[index].place,
        ranks=context.ranks,
        loraplus_lr_ratio=config.lora.loraplus_lr_ratio,
        figures=objective.figures,
        router_losses=router_losses,
    )
    trainer: Promises
    if isinstance(objective, Rewards):
        from expertune.train.grpo import GroupTrainer  # which imports TRL

        trainer = GroupTrainer(model, context.arguments, inputs.dataset, inputs.tokenizer, objective, promised)
        if trainer.aux_loss_enabled:
            context.note(
                f"loss: TRL adds the router's auxiliary loss, train.aux_loss of the record, times "
                f"{trainer.router_aux_loss_coef:g}; training.router_aux_loss_coef: 0 leaves it out"
            )
    else:
        collator = getattr(objective, "collator", None) or make_collator(config.data, inputs.tokenizer, True)
        trainer = ExpertTrainer(model, context.arguments, inputs.dataset, collator, objective, promised)
    bar = ProgressBar(lambda: trainer.history, context.bars)
    trainer.add_callback(Evaluations(at_end=evaluates_at_ends(config)))
    trainer.add_callback(bar)
    trainer.add_callback(AfterEvaluation(partial(_keep_evaluation, context, trainer, held_out)))
    known = record.section("train").get("experts_died", {})
    trainer.add_callback(DeadExperts(lambda: trainer.history.expert_tokens, known, partial(_tell_of_deaths, context)))
    trackers = Trackers(trainer, context.output_dir, resumed=context.resume)
    try:
        with trackers.open(named="run_name" in config.training):
            trainer.train(resume_from_checkpoint=str(point.checkpoint) if point and point.checkpoint else None)
    finally:
        bar.close()
        history = trainer.history
        record.add("train", **history.series, expert_tokens=history.expert_tokens, steps=trainer.state.global_step)
        record.add("eval", loss=history.eval_losses, scores=history.eval_scores)
        record.add("throughput", tokens_per_second=history.tokens_per_second, tokens=history.tokens)
        record.keep_peak(peak_memory_bytes())
        if placement := placement_of(model):
            record.add("placement", places=placement.locations, **placement.describe())
        record.update("kernels", ran=dict(routes.settings_of(model).ran))
    origin = trainer.adapter_origin
    record.add("adapter", **origin)
    # An adapter to start from is not the base model, and neither is a first evaluation after some steps.
    losses = {int(step): loss for step, loss in history.eval_losses}
    before = losses.get(0) if config.lora.begins_as_base else None
    record.update("eval", before=before, after=losses.get(origin["step"]))
    if origin["checkpoint"]:
        chosen = f"{origin['checkpoint']}, the best of the evaluated by {origin['metric']} ({origin['value']:.4f})"
        context.notify(f"the adapter is that of {chosen}")
    elif context.arguments.load_best_model_at_end:
        context.note(
            "load_best_model_at_end: no checkpoint was found to be the best; the adapter is that of the last step"
        )


def _tell_of_deaths(context: RunContext, experts: dict[str, list[int]]) -> None:
    """Warn of experts that get no token any more: on the terminal the first time, and in the record."""
    if "experts_died" not in context.record.section("train"):
        context.tell(deaths_in_words(experts))
    context.record.update("train", experts_died=experts)


def _keep_evaluation(context: RunContext, trainer: Promises, held_out: HeldOut | None, state: TrainerState) -> None:
    """The record and the page as of an evaluation while training."""
    record, history = context.record, trainer.history
    if held_out and held_out.routing:
        # Of the evaluations before, the first is kept and the best: no other can become the adapter's.
        kept = {"0", str(state.best_global_step)}
        earlier = record.section("experts").get("evaluations", {})
        routing = {step: found for step, found in earlier.items() if step in kept}
        record.add("experts", evaluations=routing | {str(state.global_step): held_out.routing})
    record.add("train", **history.series, expert_tokens=history.expert_tokens, max_steps=state.max_steps)
    record.add("throughput", tokens_per_second=history.tokens_per_second, tokens=history.tokens)
    record.keep_peak(peak_memory_bytes())
    record.update("eval", loss=history.eval_losses, scores=history.eval_scores)
    write_report(record, context.notify)

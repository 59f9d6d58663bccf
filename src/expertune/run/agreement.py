"""What a run settles before it starts, with all of its processes: their start, memory, examples and experts."""

import math
from dataclasses import replace

from expertune.distributed.parallel import ExpertParallel
from expertune.distributed.sharded import ExpertSharding, Sharing
from expertune.errors import ConfigError
from expertune.planning.devices import Machine
from expertune.planning.distribution import EXPERTS, Distribution
from expertune.planning.kept import KeptLayers
from expertune.planning.plan import Started, plan_for
from expertune.run.context import RunContext
from expertune.run.directory import recordable
from expertune.run.record import RunRecord
from expertune.text import counted
from expertune.train.arguments import ACCUMULATION, BATCH_SIZE, training_argument
from expertune.train.checkpoints import list_checkpoints

# What differs between machines without changing a number.
_OF_A_MACHINE = ("executable", "platform")

# How processes hold the experts, in words.
_HELD = {
    "replicate": "each with all experts",
    "shard": "each with a slice of every expert layer",
    "parallel": "which share the experts out",
}


def require_same_start(context: RunContext) -> None:
    """Refuse processes of other versions, devices, run files or checkpoints.

    What they read is compared when it has been read.

    Raises:
        ConfigError: names what differs, and on which rank.
    """
    versions = {name: value for name, value in context.record["versions"].items() if name not in _OF_A_MACHINE}
    checkpoints = [folder.name for folder in list_checkpoints(context.output_dir)]
    context.ranks.require_same(
        {
            "versions": versions,
            "device": context.device.type,
            "run file": recordable(context.config),
            "checkpoints in output_dir, which all processes need to see": checkpoints,
            "--resume": context.resume,
        }
    )


def started_with(context: RunContext) -> Started | None:
    """What a run that goes on was planned with until its newest checkpoint.

    Returns:
        None where there is nothing to resume from, or it ran on another number of processes, each of which had other
        micro-batches.
    """
    train = context.record.section("train")
    if not list_checkpoints(context.output_dir) or train.get("processes", 1) != context.ranks.world_size:
        return None
    # Releases that recorded no number of kept layers kept none.
    return Started(int(train.get("micro_batch", {}).get("merged", 1)), int(train.get("kept_layers", 0)))


def kept_by_all(context: RunContext, kept: KeptLayers) -> KeptLayers:
    """The expert layers that keep gate and up on every rank: the fewest that are planned for one."""
    return min(context.ranks.gather(kept), key=lambda each: each.layers)


def record_kept(record: RunRecord, kept: KeptLayers, started: Started | None) -> None:
    """Record how many expert layers keep gate and up: what the run started with stays, whatever a resume keeps."""
    at_start, fewest = kept.layers, kept.layers
    if started:
        at_start = started.kept_layers
        before = record.section("train").get("kept_layers_fewest")
        fewest = min(fewest, at_start if before is None else int(before))
    record.update("train", kept_layers=at_start, kept_layers_fewest=fewest)


def kept_in_words(record: RunRecord, kept: KeptLayers) -> str | None:
    """How many expert layers keep gate and up in this run, for the terminal; None where none does."""
    if not kept.line:
        return None
    # A resumed run makes again what was done when memory ran out.
    earlier = record.section("train").get("recoveries", [])
    until = next((change["step"] for change in earlier if change["setting"].get("kept_layers") == 0), None)
    if until is not None:
        return f"keeps {kept.words} until step {until}, where memory ran out, and none from there on"
    return f"keeps {kept.line}"


def machine_for_all(context: RunContext) -> Machine:
    """What each process plans for: of memory the least that one has, so that all have the same plan.

    Processes of one machine share its memory; `memory_budget` is that of each.

    Raises:
        ConfigError: see `Machine.of`.
    """
    ranks = context.ranks
    own = Machine.of(context.config, local_size=len(ranks.local))
    budget, host, local = zip(*ranks.gather((own.budget_bytes, own.host_bytes, own.local_size)), strict=True)
    return replace(own, budget_bytes=min(budget), host_bytes=min(host), local_size=min(local))


def choose_experts(context: RunContext) -> tuple[RunContext, str | None]:
    """The context with the plan's choice of how the processes hold the experts, where the run file leaves it to it.

    A run that goes on with as many processes keeps its choice, and with it the bytes of its result.

    Returns:
        With it, why this was chosen; None where nothing was.

    Raises:
        ConfigError: see `plan_for`.
    """
    config, ranks, train = context.config, context.ranks, context.record.values.get("train", {})
    if config.distributed.experts != "auto" or not ranks.several:
        return context, None
    machine = machine_for_all(context)

    def choose() -> tuple[dict[str, str | int], str]:
        found = plan_for(config, machine, trust_remote_code=context.trust_remote_code).ranks
        assert found is not None
        return found.chosen.distribution.settings, found.reason

    if context.resume and train.get("processes") == ranks.world_size:
        size = train.get("processes_sharing_experts", 1)
        mode = train.get("experts", "parallel" if size > 1 else "replicate")
        settings, reason = Distribution(mode, ranks.world_size, size).settings, "as the run started"
    else:
        settings, reason = ranks.share(choose)  # another rank's device or host could suggest another mode
    context.notify(f"experts: {settings[EXPERTS]}; {reason}")
    chosen = {key.removeprefix("distributed."): value for key, value in settings.items()}
    distributed = config.distributed.model_copy(update=chosen)
    return replace(context, config=config.model_copy(update={"distributed": distributed})), reason


def share_experts(context: RunContext) -> RunContext:
    """The context with the ranks that hold the experts together, where the run file asks for that; recorded.

    Raises:
        ConfigError: the number of processes does not fit.
    """
    distributed, ranks, values = context.config.distributed, context.ranks, context.record.values
    train = values.get("train", {})
    if ranks.world_size == train.get("processes", 1) == 1:
        return context
    mode = distributed.experts if ranks.several else "replicate"
    sharing: Sharing | None = None
    if mode == "parallel":
        sharing = ExpertParallel(ranks, context.device.type, distributed.expert_parallel_size)
    elif mode == "shard":
        sharing = ExpertSharding(ranks)
    batch, accumulation = (int(training_argument(context.config.training, key)) for key in (BATCH_SIZE, ACCUMULATION))
    own = batch * accumulation
    step = own * ranks.world_size
    if ranks.several:
        context.notify(
            f"{ranks.world_size} processes, {_HELD[mode]}: up to {counted(step, 'example')} a step, {own} on each"
        )
    values["train"] = train | {
        "processes": ranks.world_size,
        "global_batch": step,
        "experts": mode,
        "processes_sharing_experts": sharing.size if isinstance(sharing, ExpertParallel) else 1,
    }
    return replace(context, sharing=sharing)


def share_batch(context: RunContext) -> RunContext:
    """The context with each process's part of a step's examples.

    A run that starts takes the run file's batch size for each process. One that is resumed by another number of
    processes keeps the examples of its steps: each process then takes more or fewer of them.

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    config, values, world_size = context.config, context.record.values, context.ranks.world_size
    train = values.get("train", {})
    batch, accumulation = (int(training_argument(config.training, key)) for key in (BATCH_SIZE, ACCUMULATION))
    if world_size == train.get("processes", 1) == 1:
        return context
    step = batch * accumulation * world_size
    if context.resume and "micro_batch" in train:  # it has been recorded how a step runs
        step = train.get("global_batch", batch * accumulation)
    own, rest = divmod(step, world_size)
    if rest:
        raise ConfigError(
            f"--resume: each step of the run takes {step} examples, which {world_size} processes cannot share evenly; "
            f"start a number of processes that divides {step}"
        )
    batch = math.gcd(batch, own)
    training = {**config.training, BATCH_SIZE: batch, ACCUMULATION: own // batch}
    return replace(context, config=config.model_copy(update={"training": training}))

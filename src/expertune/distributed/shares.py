"""Which experts a rank has, and how much ranks send at once; a plan reads it, for which torch is not imported."""

from expertune.errors import ConfigError

# Gradients are sent together up to this size: large enough for a link's full rate, small beside the gradients.
BUCKET_BYTES = 2**25


def owned_experts(num_experts: int, size: int, rank: int) -> range:
    """The experts of one of the ranks that share them out; the first have one more where it does not divide.

    Raises:
        ConfigError: there are more ranks than experts.
    """
    if num_experts < size:
        raise ConfigError(
            f"distributed.experts: parallel shares {num_experts} experts out to {size} processes, some of which would "
            f"have none; set distributed.expert_parallel_size to a number up to {num_experts} that divides the "
            "processes, or set distributed.experts: shard or replicate, which any number of them can do"
        )
    each, more = divmod(num_experts, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def replicas(world_size: int, size: int) -> int:
    """How many ranks have the same experts, where so many share them out.

    Raises:
        ConfigError: the ranks are no multiple of that.
    """
    count, rest = divmod(world_size, size)
    if rest or not count:
        raise ConfigError(
            f"distributed.expert_parallel_size is {size}, and {world_size} processes are no multiple of it; "
            f"set a number that divides {world_size}, or start another number of processes"
        )
    return count


def most_owned(num_experts: int, size: int) -> int:
    """The most experts that one of these ranks has; see `owned_experts`."""
    return len(owned_experts(num_experts, size, 0))

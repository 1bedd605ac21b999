"""How a pipeline is cut and placed: stages per process, blocks per stage, microbatches per step.

A split makes the dearest stage as cheap as it can be, by counted FLOPs, the embedding and the head
included; `distributed.pp_split` overrides it. Everything here is arithmetic on numbers, so what
cannot work is refused before a device is touched. Left out: measured costs.
Source of the schedules: Narayanan et al. 2021 (1F1B, interleaved); Qi et al. 2024 (zero bubble, and
its V placement).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from carillon.engine.choices import divisors, listed
from carillon.engine.parallel.config import DistributedConfig

INTERLEAVED = ("interleaved1f1b", "interleaved_zero_bubble")  # these take whole rounds


def num_stages(config: DistributedConfig) -> int:
    return config.pp * config.pp_stages_per_rank if is_looped(config) else config.pp


def is_looped(config: DistributedConfig) -> bool:
    """Whether each process has several stages."""
    return config.pp_schedule in (*INTERLEAVED, "zbv")


def stages_of(config: DistributedConfig, rank: int) -> list[int]:
    """The stages of one process: around in a circle, or down and up again (zbv)."""
    if config.pp_schedule == "zbv":
        return [rank, 2 * config.pp - 1 - rank]
    return list(range(rank, num_stages(config), config.pp))


def rank_of_last_stage(config: DistributedConfig) -> int:
    return 0 if config.pp_schedule == "zbv" else config.pp - 1


def balanced_split(costs: Sequence[int], stages: int) -> tuple[int, ...]:
    """Blocks per stage, at least one each, so that the dearest stage costs the least.

    `costs` are those of the embedding (with the first stage), of each block, of the head (with the
    last). Among equals, the earlier stages get the fewer blocks.
    """
    embedding, *blocks, head = costs
    num = len(blocks)
    if not 1 <= stages <= num:
        raise ValueError(f"{num} blocks given for {stages} stages; each needs at least one")
    upto = [embedding + done for done in accumulate(blocks, initial=0)]
    upto[0], upto[num] = 0, upto[num] + head
    # best[n]: the first n blocks over the stages so far: (the dearest stage, blocks per stage).
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ())] + [None] * num
    for _ in range(stages):
        best = [
            min(
                (
                    (max(before[0], upto[n] - upto[start]), (*before[1], n - start))
                    for start, before in enumerate(best[:n])
                    if before is not None
                ),
                default=None,
            )
            for n in range(num + 1)
        ]
    found = best[num]
    assert found is not None
    return found[1]


def split_of(config: DistributedConfig, tower: str, costs: Sequence[int]) -> tuple[int, ...]:
    """Blocks per stage of a tower: as the config says, else balanced."""
    return config.pp_split.get(tower) or balanced_split(costs, num_stages(config))


def stage_imbalance(config: DistributedConfig, costs: Mapping[str, Sequence[int]]) -> float:
    """The busiest process's share of the work over an even one, by towers that run in turn.

    `costs` by tower: as for `balanced_split`. 1 where stages are equally dear, or without them.
    """
    busiest = 0
    for tower, (embedding, *blocks, head) in costs.items():
        upto = [0, *accumulate(split_of(config, tower, [embedding, *blocks, head]))]
        stages = [sum(blocks[start:stop]) for start, stop in pairwise(upto)]
        stages[0] += embedding
        stages[-1] += head
        ranks = range(config.pp)
        busiest += max(sum(stages[i] for i in stages_of(config, rank)) for rank in ranks)
    return busiest * config.pp / sum(map(sum, costs.values()))


def split_problems(config: DistributedConfig, depths: dict[str, int]) -> Iterator[str]:
    """Why towers of these numbers of blocks cannot be cut so; nothing when they can."""
    if config.pp == 1:
        return
    stages = num_stages(config)
    for tower, depth in depths.items():
        given = config.pp_split.get(tower)
        if stages > depth:
            per_rank = stages // config.pp
            fits = f"at most pp={depth // per_rank}" if depth >= per_rank else "one stage a process"
            yield (
                f"distributed.pp: {config.pp} makes {stages} stages, but model.{tower} has "
                f"{depth} block{'s' if depth > 1 else ''}; {fits} fits"
                + (f" (or pp_schedule=1f1b: at most pp={depth})" if is_looped(config) else "")
            )
        elif given is not None and (len(given) != stages or sum(given) != depth or min(given) < 1):
            example = list(balanced_split([0, *[1] * depth, 0], stages))
            yield (
                f"distributed.pp_split.{tower}: {list(given)} given; it takes {stages} numbers of "
                f"at least 1 whose sum is the tower's {depth} blocks, such as {example}"
            )
    unknown = sorted(set(config.pp_split) - set(depths))
    if unknown:
        allowed = ", ".join(sorted(depths))
        yield f"distributed.pp_split.{unknown[0]}: no such tower; allowed: {allowed}"


def allows(config: DistributedConfig, num_microbatches: int) -> bool:
    """Whether the schedule runs that many microbatches."""
    whole_rounds = num_microbatches % config.pp == 0 or config.pp_schedule not in INTERLEAVED
    return num_microbatches >= config.pp and whole_rounds


def possible_counts(config: DistributedConfig, share: int) -> list[int]:
    """Numbers of equal microbatches into which the schedule can cut a process's `share`."""
    return [n for n in divisors(share) if allows(config, n)]


def microbatch_size(config: DistributedConfig, given: int | None, share: int) -> int:
    """Samples of a microbatch: as given, else for twice as many microbatches as processes, or
    about that."""
    counts = possible_counts(config, share) if config.pp > 1 and given is None else []
    if not counts:
        return given or share
    enough = [n for n in counts if n >= 2 * config.pp]
    return share // (enough[0] if enough else counts[-1])


def microbatch_problem(
    config: DistributedConfig, given: int | None, share: int, *, equal: bool = False
) -> str | None:
    """Why a process's share of the batch cannot be cut into microbatches; none when it can.

    `equal`: they must be of one size, as they are in pipelines.
    """
    if config.pp == 1:
        if not equal or given is None or share % given == 0:
            return None
        near = sorted(sorted(divisors(share), key=lambda n: abs(n - given))[:3])
        return (
            f"data.micro_batch_size: {given} does not divide a process's {share} rows, and "
            f"microbatches are of one size; use {listed(near)}"
        )
    size = microbatch_size(config, given, share)
    count = share / size
    if count == int(count) and allows(config, int(count)):
        return None
    counts = possible_counts(config, share)
    need = f"at least {config.pp} equal microbatches" + (
        f", a multiple of {config.pp} of them" if config.pp_schedule in INTERLEAVED else ""
    )
    way_out = "no size of microbatch fits; use another data.batch_size or distributed.pp"
    if counts:
        near = sorted(sorted(counts, key=lambda n: abs(share // n - size))[:3], reverse=True)
        way_out = f"set data.micro_batch_size to {', '.join(str(share // n) for n in near)}"
    told = f"{given} given" if given is not None else "none given"
    return (
        f"data.micro_batch_size: {told}; of a process's {share} samples, distributed.pp="
        f"{config.pp} with {config.pp_schedule} needs {need}; {way_out}"
    )

"""A decoder's step in context-parallel layouts against one process; run by context_worker.py."""

import runpy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.losses.language import SplitVocabulary, counted, language_loss
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import sum_over, whole
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World, degrees_of, lay_out
from carillon.engine.parallel.parity import gradient_errors
from carillon.engine.parallel.zigzag import Zigzag

TOWERS = Path(__file__).parents[1] / "models" / "towers"
decoder = runpy.run_path(str(TOWERS / "test_decoder.py"))
CONFIGS, SMALL, SIGMOID, VOCABULARY, batch, built, step = (
    decoder[name]
    for name in ("CONFIGS", "SMALL", "SIGMOID", "VOCABULARY", "batch", "built", "step")
)
MODELS = {
    "dense": CONFIGS["dense"],
    "softmax experts": CONFIGS["softmax"],
    "sigmoid experts": replace(SMALL, moe=replace(SIGMOID, capacity_factor=None)),
}
METHODS = ("ulysses", "ring", "all_gather")


def layouts(size: int) -> dict[str, DistributedConfig]:
    if size == 2:
        return {
            "cp2": DistributedConfig(cp=2, zero_stage=3),
            "cp2 ep2": DistributedConfig(cp=2, ep=2),
        }
    return {
        "cp4": DistributedConfig(cp=4, zero_stage=2),
        "cp2 dp2": DistributedConfig(cp=2),
        "cp2 fsdp2": DistributedConfig(cp=2, zero_stage=3),
        "cp2 tp2": DistributedConfig(cp=2, tp=2),
    }


def own_rows(world: World) -> tuple[PackedRows, int]:
    """This process's share of the batch, and the tokens counted in all of it."""
    tokens, _, offsets = batch()
    rows = PackedRows.of(tokens, offsets)
    samples = rows.split(len(tokens) // world.degrees.data)[world.data_rank]
    context = world.axis("cp")
    assert context is not None
    zigzag = Zigzag(world.degrees.cp, context.get_local_rank())
    return zigzag.share_of(samples), int(counted(rows.labels))


def run_cases() -> list[dict[str, Any]]:
    """Every case of this world size, in a process group that has started."""
    results = []
    references = {name: built(config) for name, config in MODELS.items()}
    steps = {name: step(model) for name, model in references.items()}
    for layout, distributed in layouts(dist.get_world_size()).items():
        degrees = degrees_of(distributed, dist.get_world_size())
        world = lay_out(degrees, torch.device("cpu"))
        share, num_tokens = own_rows(world)
        for (name, config), method, recompute in product(MODELS.items(), METHODS, (False, True)):
            if distributed.ep > 1 and config.moe.num_experts is None:
                continue
            reference_loss, reference = steps[name]
            asked = replace(distributed, cp_method=method, grad_checkpointing=recompute)
            model = apply_layout(built(config), asked, world)
            logits = model(share.tokens, share.positions, share.offsets)
            num = degrees.data * degrees.cp
            tp = world.axis("tp")
            loss = language_loss(
                logits,
                share.labels,
                num_tokens=num_tokens,
                num_processes=num,
                split=None if tp is None else SplitVocabulary(tp.get_group(), VOCABULARY),
            )
            torch.autograd.backward(loss)
            mean = float(sum_over(loss.detach(), world.loss_group)) / num
            gradients = {
                key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None
            }
            results.append(
                {
                    "case": f"{layout} {name} {method} recompute={recompute}",
                    "loss_error": abs(mean - reference_loss) / abs(reference_loss),
                    "gradient_error": max(gradient_errors(gradients, reference).values()),
                    "tally_error": tally_error(model, references[name], world),
                }
            )
    return results


def tally_error(model: Decoder, reference: Decoder, world: World) -> float:
    """Of what the routers counted, over all processes; means where a row is counted by each."""
    errors = [0.0]
    for router, one in zip(model.routers(), reference.routers(), strict=True):
        found, wanted = router.tallied(sum_over(router.tally, world.loss_group)), one.tallied()
        assert torch.equal(found.slots, wanted.slots)
        assert found.tokens == wanted.tokens
        pairs = [
            (found.balance_loss / found.rows, wanted.balance_loss / wanted.rows),
            (found.z_loss, wanted.z_loss),
        ]
        errors += [float((a - b).abs() / b) for a, b in pairs]
    return max(errors)

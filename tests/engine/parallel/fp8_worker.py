"""Started by torchrun with 2 processes: 8-bit products in layouts against one process; rank 0
writes what it found.

`layers`: a pair of linears, split by columns and then by rows, in the bounds that its rounding has.
`models`: two steps of a dual encoder; how far a layout's gradients are from one process's fp8, and
how far those are from float32.
`stages`: two steps in pipelines against the same microbatches in one process, which give the same
codes.
"""

import json
import runpy
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from carillon.engine.data.pairs import Batch
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.towers.dual_encoder import DualEncoder, build_dual_encoder
from carillon.engine.nn.fp8_layers import delayed_scaling, full_products, to_fp8
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import largest_over, sum_over, whole
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.fp8 import split_fp8
from carillon.engine.parallel.mesh import World, degrees_of, lay_out
from carillon.engine.parallel.parity import gradient_errors
from carillon.engine.parallel.plan import Split
from carillon.engine.parallel.tensor import split_tensors
from carillon.engine.train.parity.columns import CLIP
from carillon.engine.train.step import forward_backward

stages = runpy.run_path(str(Path(__file__).with_name("fp8_stages_worker.py")))
BATCH = 16
RECIPES = ("tensorwise", "rowwise", "blockwise", "delayed")
LAYOUTS = {
    "tp2": {"tp": 2},
    "tp2 by tokens": {"tp": 2, "sequence_parallel": True},
    "fsdp2": {"zero_stage": 3},
}


def pair(recipe: str, split: Split, mesh: Any = None) -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 96))
    whole = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    if mesh is not None:
        split_tensors(whole, {"blocks.0.0": split}, mesh)
    split_fp8(to_fp8(whole, recipe).values(), [] if mesh is None else [dist.group.WORLD])  # type: ignore[arg-type, list-item]
    return block


def layer_case(recipe: str, split: Split, mesh: Any) -> dict[str, Any]:
    """The largest |difference| / bound of each tensor: 1 at most is within the bound.

    With one scale for all shares the codes are the same, so whole sums differ by float32's rounding
    and by at most one unit of bfloat16 (2^-8 of the value); a sum of two parts, each rounded, by
    half a unit of each more. With scales by share, each of two values of a term is off by its own
    rounding, on both sides: half a unit of e4m3's 4 bits or of e5m2's 3.
    """
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 64, generator=generator)
    grad = torch.randn(40, 96, generator=generator).to(torch.bfloat16)
    one, two = pair(recipe, split), pair(recipe, split, mesh)
    columns = split is Split.COLUMNS
    outputs, inputs = slice(48 * rank, 48 * rank + 48), slice(32 * rank, 32 * rank + 32)
    one_x, two_x = x.clone().requires_grad_(), x.clone()
    two_x = (two_x if columns else two_x[:, inputs].contiguous()).requires_grad_()
    y = one(one_x)
    z = two(two_x)
    torch.autograd.backward(y, grad)
    torch.autograd.backward(z, grad[:, outputs].contiguous() if columns else grad)
    terms = 2.0**-24 * 160
    weight = one[0].weight.detach()  # type: ignore[index, union-attr]
    magnitudes = {  # sums of the magnitudes of a product's terms
        "y": x.abs() @ weight.abs().T + one[0].bias.abs(),  # type: ignore[index, operator, union-attr]
        "x": grad.float().abs() @ weight.abs(),
        "weight": grad.float().abs().T @ x.abs(),
    }
    expected = {"y": y.detach().float(), "x": one_x.grad, "weight": one[0].weight.grad}  # type: ignore[index, union-attr]
    found = {"y": z.detach().float(), "x": two_x.grad, "weight": two[0].weight.grad.full_tensor()}  # type: ignore[index, operator, union-attr]
    if columns:
        expected["y"], magnitudes["y"] = expected["y"][:, outputs], magnitudes["y"][:, outputs]
    else:
        expected["x"], magnitudes["x"] = expected["x"][:, inputs], magnitudes["x"][:, inputs]  # type: ignore[index]
    summed = "x" if columns else "y"
    result = {}
    for name, value in expected.items():
        assert value is not None
        units = 2.0**-8 * value.abs() + terms * magnitudes[name]
        if name == summed:
            units += 2.0**-8 * magnitudes[name]
        if recipe in ("rowwise", "blockwise"):
            left = 2.0**-3 if name != "y" and recipe == "rowwise" else 2.0**-4
            units += 2 * (left + 2.0**-4 + left * 2.0**-4) * magnitudes[name]
        difference = (found[name] - value).abs()
        result[name] = float((difference / units.clamp_min(1e-30)).detach().max())
    return {"recipe": recipe, "split": split.name, **result}


def model() -> DualEncoder:
    generator = torch.Generator().manual_seed(1)
    return build_dual_encoder(CLIP, vocab_size=50, generator=generator)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(
        images=torch.randint(0, 256, (BATCH, 16, 16, 3), generator=generator, dtype=torch.uint8),
        tokens=torch.randint(0, 50, (BATCH, 12), generator=generator),
        lengths=torch.randint(3, 13, (BATCH,), generator=generator),
        keys=[str(i) for i in range(BATCH)],
        languages=["en"] * BATCH,
        bad=[],
    )


def two_steps(laid_out: DualEncoder, world: World | None) -> tuple[float, dict[str, Tensor], Any]:
    """The second step's loss and gradients: delayed scaling has scales by then."""
    group = None if world is None else world.data_group
    share = BATCH if world is None else BATCH // world.degrees.data
    local = batch().microbatches(share)[0 if world is None else world.data_rank]
    objective = ContrastiveObjective(ContrastiveConfig())
    scaling = delayed_scaling(laid_out)
    for _ in range(2):
        laid_out.zero_grad()
        loss = forward_backward(
            laid_out, objective, local, share, group=group, autocast=nullcontext
        )
        if scaling is not None:
            all_processes = None if world is None else world.group
            scaling.end_step(partial(largest_over, group=all_processes), counts=True)
    gradients = {name: whole(p.grad) for name, p in laid_out.named_parameters()}  # type: ignore[arg-type]
    return float(sum_over(loss.clone(), group)) * share / BATCH, gradients, scaling


def model_case(recipe: str, name: str, world: World, config: DistributedConfig) -> dict[str, Any]:
    one = model()
    to_fp8(one, recipe)  # type: ignore[arg-type]
    loss, reference, one_scaling = two_steps(one, None)
    with full_products(one):
        _, full, _ = two_steps(one, None)
    other = apply_layout(model(), config, world)
    found_loss, found, scaling = two_steps(other, world)
    layers = [m for m in other.modules() if hasattr(m, "takes_fp8")]
    errors, own = gradient_errors(found, reference), gradient_errors(reference, full)
    result = {
        "recipe": recipe,
        "layout": name,
        "layers": len(layers),
        "loss": abs(found_loss - loss) / loss,
        "moved": sum(errors.values()) / len(errors),
        "fp8_itself": sum(own.values()) / len(own),
    }
    if scaling is not None:
        state, ours = scaling.state_tensors(), one_scaling.state_tensors()
        scales = torch.cat([value.flatten() for value in state.values()])
        ranks = [torch.empty_like(scales) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, scales)
        result["ranks_agree"] = all(torch.equal(ranks[0], rank) for rank in ranks)
        # Gradients of a process's mean are as many times larger as there are processes.
        factor = {"forward": 1, "backward": world.degrees.data}
        result["scales"] = max(
            float((state[name] / factor[name.split(".")[-2]] / ours[name] - 1).abs().max())
            for name in ours
            if name.endswith("scale")
        )
    return result


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    tp_mesh = init_device_mesh("cpu", (2,))
    layers = [
        layer_case(recipe, split, tp_mesh)
        for recipe in RECIPES
        for split in (Split.COLUMNS, Split.ROWS)
    ]
    models = []
    for name, degrees in LAYOUTS.items():
        for recipe in RECIPES:
            config = DistributedConfig(precision="fp8", fp8_recipe=recipe, **degrees)  # type: ignore[arg-type]
            world = lay_out(degrees_of(config, 2), torch.device("cpu"))
            models.append(model_case(recipe, name, world, config))
    found = {"layers": layers, "models": models, "stages": stages["run_cases"]()}
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

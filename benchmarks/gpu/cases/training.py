"""Whole training steps of dual encoders on one device, beside OpenCLIP's model.

A step is forward, backward, clip and AdamW, by the engine's own functions, on one synthetic batch
that is on the device already: loading is no part of it. All captions have the full context, which
OpenCLIP's causal text towers take alone; real ones are shorter, and cheaper for ours. A side
returns the loss; OpenCLIP's is its own ClipLoss, by autocast in bfloat16 and its fused AdamW.
Status: not run on a GPU yet; the CPU's dry run takes the sides of a tiny model that do not compile.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from case import Bar, Call, Case, Outputs, Side, Unavailable
from torch import Tensor, nn

from carillon.engine.data.pairs import Batch
from carillon.engine.data.transforms import normalize
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.models.encoders.text import TextConfig, TextOverrides
from carillon.engine.models.encoders.vision import VisionConfig, VisionOverrides
from carillon.engine.models.towers.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    build_dual_encoder,
)
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import gradient_norm
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World, degrees_of
from carillon.engine.train.optim import NamedAdamW, OptimizationConfig
from carillon.engine.train.step import forward_backward
from carillon.kernels.roofline import Cost

OP = "training"
VOCABULARY = 49_408  # CLIP's
RATE = 1e-4
GOAL = Bar("images/s", 750.0)
# name: vision and text backbone, dims of the common space, pairs in a batch (of 80 GB).
MODELS = {
    "ViT-L/14": ("vit-l-14", "clip-text-l", 768, 128),
    "ViT-B/16": ("vit-b-16", "clip-text-b", 512, 256),
    "ViT-B/32": ("vit-b-32", "clip-text-b", 512, 512),
}
SIDES = {"bf16": False, "fp8": False, "bf16 compile": True, "fp8 compile": True}


class Given(NamedTuple):
    config: DualEncoderConfig
    batch: Batch
    device: str


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [_case("tiny", _tiny(), 4, (Bar("images/s", 1e9),))]
    return [_case(name, _published(name), MODELS[name][3], _goal(name)) for name in MODELS]


def _goal(name: str) -> tuple[Bar, ...]:
    return (GOAL,) if name == "ViT-L/14" else ()


def _published(name: str) -> DualEncoderConfig:
    vision, text, dims, _ = MODELS[name]
    return DualEncoderConfig(dims=dims, vision_backbone=vision, text_backbone=text)


def _tiny() -> DualEncoderConfig:
    tower = {"width": 32, "depth": 3, "num_heads": 2}
    return DualEncoderConfig(
        dims=16,
        vision_backbone="vit-ti-16",
        vision=VisionOverrides(image_size=32, **tower),
        text_backbone="clip-text-ti",
        text=TextOverrides(context=16, **tower),
    )


def _towers(config: DualEncoderConfig) -> tuple[VisionConfig, TextConfig]:
    vision = vision_config(config.vision_backbone, config.vision)
    return vision, text_config(config.text_backbone, config.text)


def _case(name: str, config: DualEncoderConfig, batch: int, bars: tuple[Bar, ...]) -> Case:
    model = build_dual_encoder(config, vocab_size=VOCABULARY, device="meta")
    vision, text = _towers(config)
    flops = 3.0 * batch * model.flops_per_sample(vision.image_size, text.context)
    # Weights, gradients and two moments, each read and written by the optimizer: the least moved.
    size_bytes = 4.0 * 7 * sum(parameter.numel() for parameter in model.parameters())
    return Case(
        name=f"{name} {batch} pairs",
        group="train",
        values={"config": (config,), "batch": batch, "passes": "whole training steps"},
        costs=(Cost(flops=flops, size_bytes=size_bytes),),
        bars=bars,
        items=("images", batch),
        most_rounds=20,
    )


def draw(case: Case, device: str) -> Given:
    (config,) = case.values["config"]
    vision, text = _towers(config)
    generator = torch.Generator(device).manual_seed(0)
    num, size = case.values["batch"], vision.image_size

    def integers(high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(0, high, shape, dtype=dtype, device=device, generator=generator)

    batch = Batch(
        images=integers(256, num, size, size, 3, dtype=torch.uint8),
        tokens=integers(VOCABULARY, num, text.context, dtype=torch.long),
        lengths=torch.full((num,), text.context, device=device),
        keys=[""] * num,
        languages=[""] * num,
        bad=[],
    )
    return Given(config, batch, device)


def sides(case: Case, device: str) -> list[Side]:
    ours = [Side(name, "ours", _ours(name, compiled)) for name, compiled in SIDES.items()]
    peers = [Side("open_clip", "peer", _open_clip(False))]
    return [*ours, *peers, Side("open_clip compile", "peer", _open_clip(True))]


def expected(case: Case, given: Given) -> Outputs:
    raise NotImplementedError("steps are timed; tests hold them to their definition")


def _ours(name: str, compiled: bool) -> Callable[[Given], Call]:
    def prepare(given: Given) -> Call:
        kind = _compiler_is_worth_it(given, compiled)
        layout = DistributedConfig(
            device="cuda" if kind == "cuda" else "cpu",
            precision="fp8" if name.startswith("fp8") else "bf16",
            compile=compiled,
        )
        degrees = degrees_of(layout, 1)
        world = World(
            rank=0, size=1, device=torch.device(given.device), degrees=degrees, meshes=None
        )
        torch.manual_seed(0)
        model = build_dual_encoder(given.config, vocab_size=VOCABULARY, device=given.device)
        model = apply_layout(model, layout, world)
        settings = OptimizationConfig(steps=1)
        optimizer = NamedAdamW(model, settings, model.no_decay_names())
        return _step(model, optimizer, ContrastiveObjective(ContrastiveConfig()), given.batch, kind)

    return prepare


def _compiler_is_worth_it(given: Given, compiled: bool) -> str:
    """The device's type. Raises Unavailable where a dry run would wait for a compiler."""
    kind = given.device.partition(":")[0]
    if compiled and kind == "cpu":
        raise Unavailable("compiled sides run on a GPU alone; tests compile blocks on a CPU")
    return kind


def _step(
    model: DualEncoder,
    optimizer: NamedAdamW,
    objective: ContrastiveObjective,
    batch: Batch,
    kind: str,
) -> Call:
    """As Trainer._train_step, without its reading of numbers by the host."""

    def call() -> Outputs:
        loss = forward_backward(
            model,
            objective,
            batch,
            len(batch.keys),
            group=None,
            autocast=lambda: torch.autocast(kind, torch.bfloat16),
        )
        norm = gradient_norm(model.parameters())
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        optimizer.step(RATE)
        model.clamp_scale_()
        optimizer.zero_grad()
        return [loss]

    return call


def _open_clip(compiled: bool) -> Callable[[Given], Call]:
    def prepare(given: Given) -> Call:
        try:
            import open_clip
        except ImportError as error:
            raise Unavailable(f"open_clip is not installed ({error})") from error
        kind = _compiler_is_worth_it(given, compiled)
        model = _open_clip_model(open_clip, given)
        loss_of = open_clip.ClipLoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        run = torch.compile(model) if compiled else model
        images = normalize(given.batch.images)

        def call() -> Outputs:
            with torch.autocast(kind, torch.bfloat16):
                image, text, scale = run(images, given.batch.tokens)
                loss = loss_of(image, text, scale)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return [loss.detach()]

        return call

    return prepare


def _open_clip_model(open_clip: Any, given: Given) -> nn.Module:
    """OpenCLIP's model of the same sizes."""
    vision, text = _towers(given.config)
    sizes = {
        "embed_dim": given.config.dims,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layers": vision.depth,
            "width": vision.width,
            "head_width": vision.width // vision.num_heads,
        },
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": VOCABULARY,
            "layers": text.depth,
            "width": text.width,
            "heads": text.num_heads,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "peer.json").write_text(json.dumps(sizes))
        open_clip.add_model_config(folder)
        model: nn.Module = open_clip.create_model("peer", precision="amp_bf16", device=given.device)
    return model.train()

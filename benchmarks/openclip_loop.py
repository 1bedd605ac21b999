"""Training by OpenCLIP of the model and data of one of our configs: the peer.

Everything that runs is OpenCLIP's: create_model on a config of the same size, image_transform,
ClipLoss, the parameter groups and AdamW of open_clip_train.main, cosine_lr, train_one_epoch. Its
data come from the webdataset pipeline of its own shape, or with --same-batches from our loader, so
that final losses compare the models on the same pictures and captions in the same order.
Captions are padded to the full context, as by its tokenizers; its causal text towers (3.3.0) take
no other length. --tuned is a stronger peer than published: its AdamW fused, as ours is.
Prints nothing that matters; --lines gets a JSON line each few steps, and all losses at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from webdataset import WebLoader
from webdataset_loader import padded_tokens, pipeline

from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.pairs import Batch, PositionedSamples
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import training_data
from carillon.engine.data.transforms import normalize
from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.train.run_config import RunConfig, load_config

Pairs = Iterator[tuple[Tensor, Tensor]]


def model_of(config: RunConfig, tokenizer: Tokenizer) -> nn.Module:
    """OpenCLIP's model with the sizes of ours, initialised by OpenCLIP."""
    vision = vision_config(config.model.vision_backbone, config.model.vision)
    text = text_config(config.model.text_backbone, config.model.text)
    sizes = {
        "embed_dim": config.model.dims,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layers": vision.depth,
            "width": vision.width,
            "head_width": vision.width // vision.num_heads,
        },
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": tokenizer.vocab_size,
            "layers": text.depth,
            "width": text.width,
            "heads": text.num_heads,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_id,
        },
    }
    torch.manual_seed(config.experiment.seed)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "peer.json").write_text(json.dumps(sizes))
        open_clip.add_model_config(folder)
        precision = _precision(config)
        model: nn.Module = open_clip.create_model("peer", precision=precision, output_dict=True)
    return model


def own_batches(config: RunConfig, tokenizer: Tokenizer) -> Pairs:
    """Batches as OpenCLIP reads them, by the same number of workers as ours."""
    vision = vision_config(config.model.vision_backbone, config.model.vision)
    text = text_config(config.model.text_backbone, config.model.text)
    transform = open_clip.image_transform(
        vision.image_size,
        is_train=True,
        aug_cfg={"scale": (config.data.augment.image.min_scale, 1.0)},
    )
    batches = pipeline(
        sorted(Path(config.data.path or "").glob("*.tar")),
        transform=transform,
        tokenize=padded_tokens(tokenizer, text.context),
        batch_size=config.data.batch_size,
        languages=config.data.filters.lang_allow,
    )
    loader = WebLoader(
        batches,
        batch_size=None,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_batches,
        worker_init_fn=lambda worker: torch.set_num_threads(1),
    )
    yield from loader


def our_batches(config: RunConfig, tokenizer: Tokenizer) -> Pairs:
    """The batches of `carillon train`, normalised, captions padded to the context."""
    vision = vision_config(config.model.vision_backbone, config.model.vision)
    context = text_config(config.model.text_backbone, config.model.text).context
    samples = PositionedSamples(
        training_data(config.data, config.experiment.seed),
        tokenizer,
        size=vision.image_size,
        context=context,
    )
    loader = TrainingLoader(samples, rank=0, world_size=1, device=torch.device("cpu"))
    with closing(iter(loader)) as batches:
        for batch in batches:
            yield normalize(batch.images), _pad(batch, context, tokenizer.pad_id)


def _pad(batch: Batch, context: int, pad_id: int) -> Tensor:
    missing = context - batch.tokens.shape[1]
    return nn.functional.pad(batch.tokens, (0, missing), value=pad_id)


class _Batches:
    """What train_one_epoch asks of a data loader."""

    def __init__(self, batches: Pairs, num_batches: int, batch_size: int) -> None:
        self.num_batches, self.num_samples = num_batches, num_batches * batch_size
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self.num_batches)


class _RecordedLoss(open_clip.ClipLoss):
    """ClipLoss that remembers what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = super().forward(*args, **kwargs)
        self.losses.append(float(result["contrastive_loss"].detach()))
        return result


def optimizer_of(model: nn.Module, config: RunConfig, *, tuned: bool) -> torch.optim.Optimizer:
    """AdamW with the groups of open_clip_train.main."""

    def excluded(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))

    named = list(model.named_parameters())
    optimization = config.optimization
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if excluded(n, p)], "weight_decay": 0.0},
            {
                "params": [p for n, p in named if not excluded(n, p)],
                "weight_decay": optimization.weight_decay,
            },
        ],
        lr=optimization.lr,
        betas=(optimization.betas[0], optimization.betas[1]),
        eps=optimization.eps,
        fused=True if tuned else None,
    )


def _precision(config: RunConfig) -> str:
    return "fp32" if config.distributed.precision == "fp32" else "amp_bf16"


def _noting(schedule: Callable[[int], Any], lines: Path, every: int) -> Callable[[int], None]:
    """The scheduler, which is called as each step begins, also noting every so many steps."""

    def adjust(step: int) -> None:
        schedule(step)
        if step and step % every == 0:
            with lines.open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")

    return adjust


def train(config: RunConfig, lines: Path, *, tuned: bool, same_batches: bool) -> dict[str, Any]:
    """Train for the config's steps; returns losses and what the peer is."""
    tokenizer = Tokenizer.load(config.data.tokenizer.path or "")
    model = model_of(config, tokenizer)
    batches = (our_batches if same_batches else own_batches)(config, tokenizer)
    optimization, steps = config.optimization, config.optimization.steps or 0
    optimizer = optimizer_of(model, config, tuned=tuned)
    schedule = cosine_lr(optimizer, optimization.lr, optimization.warmup_steps, steps)
    loss = _RecordedLoss()
    args = types.SimpleNamespace(
        device="cpu",
        precision=_precision(config),
        accum_freq=1,
        distill=False,
        skip_scheduler=False,
        horovod=False,
        grad_clip_norm=optimization.clip_norm,
        log_every_n_steps=100,
        batch_size=config.data.batch_size,
        world_size=1,
        rank=0,
        local_rank=0,
        wandb=False,
    )
    noting = _noting(schedule, lines, config.logging.interval_steps)
    loader = _Batches(batches, steps, config.data.batch_size)
    data = {"train": types.SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    train_one_epoch(model, data, loss, 0, optimizer, None, noting, None, args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"losses": loss.losses, "parameters": parameters}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--same-batches", action="store_true")
    given = parser.parse_args()
    result = train(
        load_config(given.config, given.overrides),
        given.lines,
        tuned=given.tuned,
        same_batches=given.same_batches,
    )
    with given.lines.open("a") as file:
        file.write(json.dumps(result) + "\n")

"""The least that trains our model: what the trainer's own overhead is measured against.

The same model, loader, loss, clipping, schedule and fused AdamW; no guard, checkpoint, metrics,
registry, signals or reduction. --lines gets a JSON line each few steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.pairs import PositionedSamples
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import training_data
from carillon.engine.data.transforms import normalize
from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.train.optim import learning_rate
from carillon.engine.train.run_config import RunConfig, load_config, new_dual_encoder


def train(config: RunConfig, lines: Path) -> None:
    optimization, steps = config.optimization, config.optimization.steps or 0
    tokenizer = Tokenizer.load(config.data.tokenizer.path or "")
    samples = PositionedSamples(
        training_data(config.data, config.experiment.seed),
        tokenizer,
        size=vision_config(config.model.vision_backbone, config.model.vision).image_size,
        context=text_config(config.model.text_backbone, config.model.text).context,
    )
    loader = TrainingLoader(samples, rank=0, world_size=1, device=torch.device("cpu"))
    model = new_dual_encoder(config, tokenizer.vocab_size)
    undecayed = model.no_decay_names()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in undecayed]},
            {"params": [p for n, p in named.items() if n in undecayed], "weight_decay": 0.0},
        ],
        betas=(optimization.betas[0], optimization.betas[1]),
        eps=optimization.eps,
        weight_decay=optimization.weight_decay,
        fused=True,
    )
    bf16 = config.distributed.precision == "bf16"
    for step, batch in zip(range(steps), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optimization, step, steps)
        images = normalize(batch.images)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = model(images, batch.tokens, batch.lengths)
        logits = features.scale * features.image @ features.text.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimization.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scale_()
        if (step + 1) % config.logging.interval_steps == 0:
            with lines.open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": loss.item()}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--lines", type=Path, required=True)
    given = parser.parse_args()
    train(load_config(given.config, given.overrides), given.lines)

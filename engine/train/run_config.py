"""A whole training config: the root of every recipe, and what of its sections cannot go together.

`model.type` says which kind of model is trained. Settings that another kind would use are refused,
so that none is given without an effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from carillon.engine.config import UserError, changed, config_hash, load, section, setting
from carillon.engine.data.config import AugmentConfig, DataConfig
from carillon.engine.eval.suite import EvaluationConfig
from carillon.engine.log import LoggingConfig
from carillon.engine.losses.contrastive import LossConfig
from carillon.engine.models.catalog import text_config
from carillon.engine.models.plans import (
    decoder_problems,
    depths,
    fp8_problems,
    split_sizes,
    tp_problems,
)
from carillon.engine.models.towers.decoder import Decoder, build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.models.towers.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    build_dual_encoder,
)
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.pipeline_split import split_problems
from carillon.engine.train.optim import OptimizationConfig


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """`experiment`."""

    name: str = setting("experiment", "Begins the name of the run folder.")
    seed: int = setting(
        1337, "Seeds weights, order, captions and augmentation.", min=0, max=2**63 - 1
    )

    def check(self) -> Iterator[str]:
        allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        if not self.name or self.name[0] in ".-" or set(self.name) - allowed:
            yield f"name: {self.name!r} given; letters, digits, '.', '_' and '-' are allowed"


@dataclass(frozen=True, kw_only=True)
class HardMiningConfig:
    """`negatives.hard_mining`."""

    enabled: bool = setting(False, "Mine hard negatives with the current checkpoint.")
    refresh_steps: int = setting(20_000, "Steps between two minings.", min=1)
    k: int = setting(50, "Neighbours taken of each query.", min=1)

    def check(self) -> Iterator[str]:
        if self.enabled:
            yield (
                "enabled: true given; hard-negative mining comes with the retrieval side (index "
                "and mining). Set negatives.hard_mining.enabled=false until then"
            )


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """`negatives`: what a pair is contrasted with."""

    in_batch: bool = setting(True, "The other pairs of the global batch.")
    hard_mining: HardMiningConfig = section(HardMiningConfig)

    def check(self) -> Iterator[str]:
        if not self.in_batch:
            yield "in_batch: false leaves no negatives while hard mining is off; set it to true"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training config: the root of every recipe."""

    experiment: ExperimentConfig = section(ExperimentConfig)
    data: DataConfig = section(DataConfig)
    model: DualEncoderConfig | DecoderConfig = section(DualEncoderConfig)
    loss: LossConfig = section(LossConfig)
    optimization: OptimizationConfig = section(OptimizationConfig)
    distributed: DistributedConfig = section(DistributedConfig)
    negatives: NegativesConfig = section(NegativesConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    logging: LoggingConfig = section(LoggingConfig, hashed=False)

    def check(self) -> Iterator[str]:
        if isinstance(self.model, DecoderConfig):
            yield from _decoder_problems(self, self.model)
        else:
            yield from _dual_encoder_problems(self, self.model)


def run_name(config: RunConfig) -> str:
    return f"{config.experiment.name}-{config_hash(config)[:8]}"


def load_config(path: str | Path, overrides: list[str]) -> RunConfig:
    return load(path, overrides, RunConfig)


def new_dual_encoder(config: RunConfig, vocab_size: int) -> DualEncoder:
    """The dual encoder of a config that asks for one, weights drawn from its seed."""
    assert isinstance(config.model, DualEncoderConfig)
    sigmoid = config.loss.itc.kind == "sigmoid"
    return build_dual_encoder(
        config.model,
        vocab_size=vocab_size,
        init_logit_scale=-math.log(config.loss.itc.temperature),
        init_bias=config.loss.itc.bias if sigmoid else None,
        generator=torch.Generator().manual_seed(config.experiment.seed),
    )


def new_decoder(config: RunConfig, vocab_size: int) -> Decoder:
    """The decoder of a config that asks for one, weights drawn from its seed."""
    assert isinstance(config.model, DecoderConfig)
    generator = torch.Generator().manual_seed(config.experiment.seed)
    return build_decoder(config.model, vocab_size=vocab_size, generator=generator)


def _dual_encoder_problems(config: RunConfig, model: DualEncoderConfig) -> Iterator[str]:
    layout = config.distributed
    try:
        context = text_config(model.text_backbone, model.text).context
    except UserError:  # an unknown backbone, which the model section reports
        return
    tp, whole = layout.tp, layout.tp_whole_tower
    if layout.ep > 1:
        yield f"distributed.ep: {layout.ep} given, but a dual encoder has no experts; use ep=1"
    yield from tp_problems(tp, list(split_sizes(model, whole, "num_heads", "mlp_width")))
    if layout.cp > 1:
        yield (
            f"distributed.cp: {layout.cp} given, but the dual encoder's sequences "
            "are short: they are not cut. Set distributed.cp=1, and give those processes to "
            "data parallelism (distributed.zero_stage) or tp"
        )
    if layout.precision == "fp8":
        widths = list(split_sizes(model, None, "width"))
        split = split_sizes(model, whole, "width", "mlp_width")
        sides = [(name, (size,)) for name, size in split]
        yield from fp8_problems(layout, widths, sides, depths(model))
    yield from split_problems(layout, depths(model))
    asked = config.data.augment.text.max_len
    if asked is not None and asked > context:
        yield (
            f"data.augment.text.max_len: {asked} is more than the text model's context "
            f"({context}); raise model.text.context to it, or lower max_len"
        )
    for name in changed(config.data.packing, "window", "streams", "max_documents"):
        yield f"data.packing.{name}: given, but a dual encoder takes pairs; drop it"


def _decoder_problems(config: RunConfig, model: DecoderConfig) -> Iterator[str]:
    data = config.data
    yield from decoder_problems(model, config.distributed)
    asked = data.augment.text.max_len
    if asked is not None and asked > model.context:
        yield (
            f"data.augment.text.max_len: {asked} is more than model.context ({model.context}), "
            "the tokens of a row; raise model.context to it, or lower max_len"
        )
    if config.optimization.epochs is not None:
        yield (
            "optimization.epochs: how many rows an epoch makes is known only once its captions "
            "are packed; set optimization.steps"
        )
    if config.evaluation.in_training.every and not data.validation_every:
        yield (
            "evaluation.in_training.every: a decoder is scored on held-out rows, and "
            "data.validation_every=0 holds out none; set it to 20, or every to 0"
        )
    for name in _unused_by_a_decoder(config):
        yield f"{name}: given, but a decoder does not use it; drop it"


def _unused_by_a_decoder(config: RunConfig) -> Iterator[str]:
    """Sections and settings that are not at their defaults, and that only pairs need."""
    for name, given, default in (
        ("loss.itc", config.loss.itc, LossConfig().itc),
        ("negatives", config.negatives, NegativesConfig()),
        ("data.augment.image", config.data.augment.image, AugmentConfig().image),
    ):
        if given != default:
            yield name
    for name in ("retrieval", "zeroshot"):
        if getattr(config.evaluation, name):
            yield f"evaluation.{name}"
    yield from (
        f"evaluation.{name}"
        for name in changed(config.evaluation, "bootstrap_samples", "batch_size", "seed")
    )
    yield from (
        f"evaluation.in_training.{name}"
        for name in changed(config.evaluation.in_training, "sets", "languages")
    )

"""`carillon config check FILE`: says what is wrong with a config, or what it amounts to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carillon.engine.models.towers.decoder_config import DecoderConfig
    from carillon.engine.models.towers.dual_encoder import DualEncoderConfig

EXAMPLES = """examples:
  carillon config check recipes/emoji_quickstart.yaml
  carillon config check recipes/flickr8k_small.yaml data.path=photos --resolved"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a YAML config")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings to change, as in data.batch_size=64",
    )
    parser.add_argument("--resolved", action="store_true", help="print it with all its defaults")


def main(args: argparse.Namespace) -> int:
    from carillon.engine.config import config_hash, to_yaml
    from carillon.engine.models.towers.decoder_config import DecoderConfig
    from carillon.engine.train.run_config import load_config, run_name

    config = load_config(args.file, args.overrides)
    if args.resolved:
        print(to_yaml(config), end="")
        return 0
    vocab_size = config.data.tokenizer.vocab_size
    if isinstance(config.model, DecoderConfig):
        facts = _decoder_facts(config.model, vocab_size)
    else:
        facts = _dual_encoder_facts(config.model, vocab_size)
    print(f"{args.file}: good")
    for name, fact in {"run": run_name(config), "hash": config_hash(config), **facts}.items():
        print(f"  {name:<10}  {fact}")
    return 0


def _dual_encoder_facts(config: DualEncoderConfig, vocab_size: int) -> dict[str, str]:
    from carillon.engine.models.catalog import text_config, vision_config
    from carillon.engine.models.towers.dual_encoder import build_dual_encoder, count_parameters

    num = count_parameters(build_dual_encoder(config, vocab_size=vocab_size, device="meta"))
    vision = vision_config(config.vision_backbone, config.vision)
    text = text_config(config.text_backbone, config.text)
    return {
        "parameters": f"{num:,} (vocabulary of {vocab_size:,})",
        "pictures": f"{vision.image_size} px in patches of {vision.patch_size}",
        "captions": f"up to {text.context} tokens",
    }


def _decoder_facts(config: DecoderConfig, vocab_size: int) -> dict[str, str]:
    from carillon.engine.models.towers.decoder import build_decoder

    model = build_decoder(config, vocab_size=vocab_size, device="meta")
    num = sum(parameter.numel() for parameter in model.parameters())
    moe = config.moe
    experts = "none" if moe.num_experts is None else f"{moe.num_experts}, {moe.k} a token"
    return {
        "parameters": f"{num:,} (vocabulary of {vocab_size:,})",
        "experts": experts + (f", {moe.shared_experts} shared" if moe.shared_experts else ""),
        "rows": f"captions packed into {config.context} tokens",
    }

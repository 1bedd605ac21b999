"""`carillon config check FILE`: says what is wrong with a config, or what it amounts to."""

from __future__ import annotations

import argparse

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
    from carillon.engine.models.catalog import text_config, vision_config
    from carillon.engine.models.towers.dual_encoder import build_dual_encoder, count_parameters
    from carillon.engine.train.run import load_config, run_name

    config = load_config(args.file, args.overrides)
    if args.resolved:
        print(to_yaml(config), end="")
        return 0
    vocab_size = config.data.tokenizer.vocab_size
    model = build_dual_encoder(config.model, vocab_size=vocab_size, device="meta")
    vision = vision_config(config.model.vision_backbone, config.model.vision)
    text = text_config(config.model.text_backbone, config.model.text)
    print(f"{args.file}: good")
    print(f"  run         {run_name(config)}")
    print(f"  hash        {config_hash(config)}")
    print(f"  parameters  {count_parameters(model):,} (vocabulary of {vocab_size:,})")
    print(f"  pictures    {vision.image_size} px in patches of {vision.patch_size}")
    print(f"  captions    up to {text.context} tokens")
    return 0

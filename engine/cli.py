"""The `carillon` command: noun and verb, plain verbs for the daily ones.

Each command's module declares its own arguments and does its own work; it is imported only when its
command is named, so `carillon --help` answers at once. Exit codes: 0 done, 1 a fault of ours, 2 the
input cannot be used or the system refuses a path, 3 training was given up by its guard, 75 stopped
by a signal with its state saved.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NamedTuple

from carillon import __version__


class Command(NamedTuple):
    words: tuple[str, ...]
    module: str
    help: str


COMMANDS = (
    Command(("train",), "carillon.engine.train.command", "train a model from a YAML config"),
    Command(
        ("ingest",), "carillon.engine.data.ingest_command", "bring your own media into a data set"
    ),
    Command(
        ("curate",),
        "carillon.engine.data.curate.command",
        "take duplicates and bad items out of data sets",
    ),
    Command(
        ("embed",),
        "carillon.engine.index.embedding",
        "turn a data set into vectors by a run's model",
    ),
    Command(("search",), "carillon.engine.index.search", "find pictures by text or by picture"),
    Command(
        ("data", "emoji"), "carillon.engine.data.sets.emoji", "build the emoji set, 30 languages"
    ),
    Command(("data", "stamps"), "carillon.engine.data.sets.stamps", "build the stamps set"),
    Command(("data", "prompts"), "carillon.engine.data.sets.prompts", "build the prompts set"),
    Command(("data", "text-lines"), "carillon.engine.data.sets.text_lines", "build the lines set"),
    Command(("data", "clips"), "carillon.engine.data.sets.clips", "build the clips set"),
    Command(("data", "speech"), "carillon.engine.data.sets.speech", "build the speech set"),
    Command(
        ("data", "register"),
        "carillon.engine.registry.register",
        "enter a data set in the registry",
    ),
    Command(("data", "show"), "carillon.engine.data.explore.show", "look at items: PNG or HTML"),
    Command(("data", "stats"), "carillon.engine.data.explore.stats", "count what is in a data set"),
    Command(("data", "diff"), "carillon.engine.data.explore.diff", "compare two versions of a set"),
    Command(
        ("data", "lineage"),
        "carillon.engine.data.explore.lineage",
        "what a set was made from, and what was trained on it",
    ),
    Command(
        ("data", "verify"), "carillon.engine.data.explore.verify", "check every checksum of a set"
    ),
    Command(
        ("data", "delete-subject"),
        "carillon.engine.data.explore.delete_subject",
        "erase a subject's items into a new version",
    ),
    Command(("tokenizer",), "carillon.engine.data.tokenizer", "train or look into a tokenizer"),
    Command(
        ("config", "check"), "carillon.engine.train.check", "check a config file and name its run"
    ),
    Command(("config", "settings"), "carillon.engine.train.settings_page", "list every setting"),
    Command(("eval", "run"), "carillon.engine.eval.suite", "score a run's checkpoint, by language"),
    Command(
        ("checkpoint",),
        "carillon.engine.train.checkpoint_command",
        "look into, verify or convert a checkpoint",
    ),
    Command(("env",), "carillon.engine.environment", "report this machine and environment"),
    Command(
        ("runs",),
        "carillon.engine.registry.command",
        "list runs, show one, trace a checkpoint back to its data",
    ),
)

# What `carillon NOUN --help` begins with; its examples are those of its verbs.
NOUNS = {
    "data": "Build a known data set, register one, look into it, or erase from it.",
    "config": "Check a config before it is trained, or look up its settings.",
    "eval": "Measure how well a run's model does.",
}

_EPILOG = """examples:
  carillon data emoji --out data/emoji --size 64
  carillon train recipes/emoji_quickstart.yaml
  carillon search RUN "un chien qui court"

`carillon COMMAND --help` has examples of each command."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser(arguments)
    args = _parse(parser, arguments)
    from carillon.engine.access import refusal
    from carillon.engine.config import UserError
    from carillon.engine.parallel.place import is_another_rank

    try:
        code: int = args.main(args)
        return code
    except UserError as error:
        if not is_another_rank():  # rank 0 tells
            print(f"carillon: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message = refusal(error)
        if message is None:
            raise
        print(f"carillon: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """As parse_args, but `key=value` may stand anywhere, for commands that take overrides.

    argparse fills a list of positionals from their first group alone, and its own remedy,
    parse_intermixed_args, refuses subcommands.
    """
    args, left = parser.parse_known_args(arguments)
    takes_overrides = isinstance(getattr(args, "overrides", None), list)
    late = [word for word in left if takes_overrides and "=" in word and not word.startswith("-")]
    unknown = [word for word in left if word not in late]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="carillon",
        description="Train, evaluate and search with multimodal models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"carillon {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    nouns: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for command in COMMANDS:
        if len(command.words) == 1:
            _add(verbs, command, arguments)
            continue
        noun = command.words[0]
        if noun not in nouns:
            group = _add_noun(verbs, noun, arguments)
            nouns[noun] = group.add_subparsers(dest="verb", required=True, metavar="VERB")
        _add(nouns[noun], command, arguments)
    return parser


def _add_noun(
    parent: argparse._SubParsersAction[argparse.ArgumentParser], noun: str, arguments: list[str]
) -> argparse.ArgumentParser:
    members = [command for command in COMMANDS if command.words[0] == noun]
    listing = "; ".join(f"{command.words[1]}: {command.help}" for command in members)
    asked_for = [word for word in arguments if not word.startswith("-")] == [noun]
    return parent.add_parser(
        noun,
        help=listing,
        description=NOUNS[noun],
        epilog=_examples(members) if asked_for else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _examples(commands: list[Command]) -> str:
    """The command lines among the examples of several commands."""
    texts = [importlib.import_module(command.module).EXAMPLES for command in commands]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("  ")]
    return "\n".join(["examples:", *lines])


def _add(
    parent: argparse._SubParsersAction[argparse.ArgumentParser],
    command: Command,
    arguments: list[str],
) -> None:
    words = tuple(word for word in arguments if not word.startswith("-"))[: len(command.words)]
    if words != command.words:  # not asked for: only its line of help
        parent.add_parser(command.words[-1], help=command.help)
        return
    module = importlib.import_module(command.module)
    child = parent.add_parser(
        command.words[-1],
        help=command.help,
        description=command.help[0].upper() + command.help[1:] + ".",
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(child)
    child.set_defaults(main=module.main)
    _add_action_examples(child, module.EXAMPLES)


def _add_action_examples(parser: argparse.ArgumentParser, examples: str) -> None:
    """Gives each action of a command (`runs show`) the examples that name it."""
    for group in parser._actions:
        if isinstance(group, argparse._SubParsersAction):
            for name, action in group.choices.items():
                named = [line for line in examples.splitlines() if f"{parser.prog} {name} " in line]
                action.epilog = "\n".join(["examples:", *named])
                action.formatter_class = argparse.RawDescriptionHelpFormatter


if __name__ == "__main__":
    sys.exit(main())

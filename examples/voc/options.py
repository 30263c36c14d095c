"""The options of the scripts: what every stage takes, and one for each setting of a recipe, made from its field."""

import argparse
import dataclasses
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from networks import BACKBONES
from recipes import RECIPES, WIDTHS, Recipe, for_backbone

EXPECTED: dict[str, Callable[[Any], bool]] = {  # what the types of recipes.py say of a value
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "a rate above 0": lambda value: value > 0,
    "a value in [0, 1]": lambda value: 0 <= value <= 1,
    "a share in [0, 1)": lambda value: 0 <= value < 1,
    "a share above 0 and up to 1": lambda value: 0 < value <= 1,
    "factors of at least 0": lambda values: min(values) >= 0,
    "factors of at least 0 and, last, a hue of at most 0.5": lambda values: min(values) >= 0 and values[3] <= 0.5,
    "factors above 0": lambda values: len(values) > 0 and min(values) > 0,
    WIDTHS: lambda values: min(values[:-1]) > 0 and values[-1] >= 0,
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every stage that reads the data set."""
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, if any"
    )
    parser.add_argument("--workers", type=whole_number, default=2, help="processes that load images (default: 2)")


def add_training_arguments(parser: argparse.ArgumentParser, backbones: Iterable[str] = BACKBONES) -> None:
    """Options of the training stages beside those of the recipe."""
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of this stage's results; resumed if it exists")
    parser.add_argument("--split", help="list of the training images (default: trainaug if there is one, else train)")
    parser.add_argument("--backbone", choices=[*backbones], default="vgg16", help="default: vgg16, the paper's")
    parser.add_argument(
        "--weights", default="default", help="'default' (ImageNet), 'none', or a file (default: default)"
    )
    parser.add_argument(
        "--amp", action="store_true", help="forward pass in bfloat16: other rounding, faster where the hardware has it"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the new layers, the order, and what is drawn")
    parser.add_argument("--log-every", type=int, help="iterations (default: once in a pass over the images)")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=1000,
        help="iterations (default: 1000); without torchrun ten minutes, too",
    )


def whole_number(text: str) -> int:
    """At least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return int(text)


def seed_number(text: str) -> int:
    """A seed; a step's random numbers start from 2^40 times it, and torch's seeds end at 2^64."""
    if not (text.isdecimal() and int(text) < 2**24):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**24 - 1}, got {text}")
    return int(text)


def add_part_argument(parser: argparse.ArgumentParser) -> None:
    """``--part I/N`` of the stages that several processes can share without knowing of each other."""

    def part(text: str) -> tuple[int, int]:
        number, _, parts = text.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
            raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/4, got {text}")
        return int(number), int(parts)

    parser.add_argument(
        "--part", type=part, default="0/1", help="I/N: this process's share of the images (default: 0/1)"
    )


def training_split(arguments: argparse.Namespace) -> str:
    """The list of the 10,582 images where ``prepare.py`` has written one, else VOC's own training list."""
    lists = arguments.voc_root / "ImageSets" / "Segmentation"
    has_augmented = any((lists / f"trainaug{end}.txt").exists() for end in ("", "_cls"))
    return arguments.split or ("trainaug" if has_augmented else "train")


def add_options(
    parser: argparse.ArgumentParser,
    stage: str,
    *,
    only: Iterable[str] = (),
    without: Iterable[str] = (),
    recipe: str = "paper",
) -> None:
    """``--recipe`` and one option for every setting of a stage; what is not given is the recipe's.

    Args:
        parser: of the script.
        stage: a field of `Recipe`.
        only: the settings that the script makes use of; none: all.
        without: those that it makes no use of.
        recipe: the default, or what to say of it where the script finds it elsewhere.
    """
    default = recipe if recipe in RECIPES else None
    parser.add_argument(
        "--recipe", choices=RECIPES, default=default, help=f"settings to start from (default: {recipe})"
    )
    group = parser.add_argument_group("settings of the recipe", "each replaces the recipe's value; see recipes.py")
    for name, kind in typing.get_type_hints(typing.get_type_hints(Recipe)[stage]).items():
        if name in without or (only and name not in only):
            continue
        values = {known: getattr(getattr(settings, stage), name) for known, settings in RECIPES.items()}
        option, told = _option(name), ", ".join(f"{known} {_show(value)}" for known, value in values.items())
        if kind is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=told)
        elif typing.get_origin(kind) is Literal:
            group.add_argument(option, type=str, choices=typing.get_args(kind), help=told)
        elif typing.get_origin(kind) is tuple:
            length = typing.get_args(kind)
            count: Any = "+" if Ellipsis in length else len(length)
            group.add_argument(option, type=float, nargs=count, help=told)
        else:
            group.add_argument(option, type=kind, help=told)


def resolve(arguments: argparse.Namespace, stage: str, backbone: str) -> Any:
    """The settings of one stage: the recipe's, with what was given on the command line."""
    settings = getattr(for_backbone(RECIPES[arguments.recipe], backbone), stage)
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(settings)}
    return replace_checked(settings, {name: value for name, value in given.items() if value is not None})


def replace_checked(settings: Any, changes: dict[str, Any]) -> Any:
    """A copy of a stage's settings with changes; what cannot work stops the program with a sentence."""
    kinds = typing.get_type_hints(type(settings), include_extras=True)
    unknown = changes.keys() - kinds.keys()
    if unknown:
        raise SystemExit(f"no setting is called {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    settings = dataclasses.replace(settings, **changes)
    for name, value in vars(settings).items():
        kind = typing.get_origin(kinds[name])
        if kind is Literal and value not in (choices := typing.get_args(kinds[name])):
            raise SystemExit(f"{_option(name)}: expected one of {', '.join(choices)}, got {value}")
        if kind is Annotated and not EXPECTED[expected := kinds[name].__metadata__[0]](value):
            raise SystemExit(f"{_option(name)}: expected {expected}, got {_show(value)}")
    return settings


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

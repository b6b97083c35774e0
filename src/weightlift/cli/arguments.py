"""The arguments that ``plan`` and ``load`` share, and the options of `weightlift.plan` that they mean."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlift import Checkpoint


class UsageError(Exception):
    """The command line can't be carried out as given; one line for the user, exit code 2."""


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """PATH, and what matters where it is a hub id."""
    parser.add_argument(
        "path", metavar="PATH", help="a .safetensors, .pt or .bin file, an index, a folder, or a hub id"
    )
    add_within(parser)
    hub = parser.add_argument_group("where PATH is a hub id")
    hub.add_argument("--revision", help="branch, tag or commit")
    hub.add_argument("--local-files-only", action="store_true", help="ask no network, only the cache")


def add_within(parser: argparse.ArgumentParser) -> None:
    """--within, for what `weightlift.open_checkpoint` takes as ``within``."""
    parser.add_argument(
        "--within",
        action="append",
        metavar="NAME",
        help="the state dict is what lies under this name in what a trainer saved; repeat it to go deeper",
    )


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--model and the options of a load."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="MODULE:CALLABLE",
        help="what builds the model; takes no arguments. The current directory is searched too",
    )
    parser.add_argument(
        "--dtype", help="auto (the checkpoint's), or a torch dtype such as bfloat16 (default: the model's)"
    )
    parser.add_argument("--device", help="where every tensor goes, such as cuda:0 (default: the model's)")
    parser.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse missing and unexpected keys (default: yes)",
    )
    parser.add_argument(
        "--ignore-mismatched", action="store_true", help="initialise a tensor whose shape differs, instead of refusing"
    )
    parser.add_argument(
        "--rename",
        nargs=2,
        action="append",
        metavar=("REGEX", "REPLACEMENT"),
        help="rename the keys of the checkpoint; can be repeated",
    )
    parser.add_argument("--seed", type=int, help="seed of the initialisers of missing weights")
    parser.add_argument(
        "--defer", action=argparse.BooleanOptionalAction, default=True, help="--no-defer builds the model ordinarily"
    )


def refuse_without_model(arguments: argparse.Namespace) -> None:
    """Raises UsageError for an option of a load that is given where there is no --model to load into."""
    defaults = argparse.ArgumentParser(add_help=False)
    add_model(defaults, required=False)
    for name, value in vars(defaults.parse_args([])).items():
        if (given := getattr(arguments, name)) != value:
            flag = f"--{'no-' * (given is False)}{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for a load into a model: give --model module:callable too")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {text!r}")
    return number


def above_zero(text: str) -> float:
    """An argparse type: a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above zero, found {text!r}")
    return number


def mesh(text: str) -> dict[str, int]:
    """An argparse type: names of mesh axes with sizes, as in ``fsdp=128,tp=8``."""
    found: dict[str, int] = {}
    for item in text.split(","):
        name, sign, size = item.partition("=")
        if not sign or not name.strip() or name.strip() in found or not size.strip().isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"expected names with sizes, as in fsdp=128,tp=8; found {text!r}")
        found[name.strip()] = int(size)
    return found


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `weightlift.plan` for a hub id."""
    return {"revision": arguments.revision, "local_files_only": arguments.local_files_only}


def opened(arguments: argparse.Namespace) -> Checkpoint:
    """PATH, its headers read."""
    from weightlift import open_checkpoint

    return open_checkpoint(arguments.path, within=arguments.within, **hub_options(arguments))


def source(arguments: argparse.Namespace) -> str | Checkpoint:
    """PATH as `weightlift.plan` takes it."""
    return arguments.path if arguments.within is None else opened(arguments)


def load_options(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The keyword arguments of `weightlift.plan`, with ``more`` of them. Raises UsageError for what can't be meant."""
    from weightlift.options import LoadOptions

    options = {
        "dtype": arguments.dtype,
        "device": _device(arguments.device),
        "strict": arguments.strict,
        "ignore_mismatched": arguments.ignore_mismatched,
        "key_mapping": _renames(arguments.rename),
        "seed": arguments.seed,
        "defer": arguments.defer,
        **more,
    }
    try:
        LoadOptions.create(**options)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    return {**hub_options(arguments), **options}


def _renames(pairs: list[list[str]] | None) -> dict[str, str] | None:
    if pairs is None:
        return None
    found: dict[str, str] = {}
    for pattern, replacement in pairs:
        if pattern in found:
            raise UsageError(f"--rename {pattern!r} is given twice; write all of it into one replacement")
        found[pattern] = replacement
    return found


def _device(text: str | None) -> Any:
    import torch

    if text is None:
        return None
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {text!r}: {str(error).splitlines()[0]}") from error
    return device

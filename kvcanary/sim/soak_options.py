"""What a soak is told on the command line."""

from __future__ import annotations

import argparse
import math

from kvcanary.errors import ConfigError

NAMES = ("steps", "minutes", "processes", "first_seed")
_DEFAULTS = {"steps": 2000, "minutes": 0.0, "processes": 1, "first_seed": 0}
_LEAST = {"steps": 1, "processes": 1, "first_seed": 0}


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare the options; one that is not given is None until `settle`."""
    parser.add_argument("--steps", type=int, metavar="N", help=f"guarded steps (default: {_DEFAULTS['steps']})")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="so long instead of --steps, and memory must stay flat"
    )
    parser.add_argument("--processes", type=int, metavar="P", help=f"default: {_DEFAULTS['processes']}")
    parser.add_argument("--first-seed", type=int, metavar="S", help=f"default: {_DEFAULTS['first_seed']}")


def settle(arguments: argparse.Namespace) -> None:
    """Fill in the defaults.

    Raises:
        ConfigError: values with which nothing would be played, or both of --steps and --minutes.
    """
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"{option(name)} {value}: give at least {least}")
    minutes = arguments.minutes
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes {minutes:g}: give a number above 0, such as 10 or 0.5")
    if minutes is not None and arguments.steps is not None:
        raise ConfigError(f"--steps {arguments.steps} with --minutes {minutes:g}: give one of them, a soak ends once")
    for name, default in _DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def option(name: str) -> str:
    """A name of the arguments as it is written on the command line."""
    return f"--{name.replace('_', '-')}"

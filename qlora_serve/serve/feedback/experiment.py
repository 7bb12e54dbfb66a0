"""Experiments: a name behind which several variants answer, each its share of the users."""

import hashlib
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qlora_serve.errors import ConfigError

MOST_VARIANTS = 16
Origin = Literal["settings", "http"]


@dataclass(frozen=True)
class Experiment:
    """A named split."""

    name: str
    shares: tuple[tuple[str, float], ...]
    """Variants and their shares, which add up to 1. A variant is the base's name, an adapter's, or
    `NAME@SCALE`."""
    origin: Origin = "settings"
    """Where it was begun."""

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The names of the models that answer, each once."""
        return tuple(dict.fromkeys(parse_variant(label)[0] for label, _ in self.shares))

    def assign(self, user: str | None) -> str:
        """The variant that answers a user, always the same; without a user a random one.

        Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): nothing is stored, servers
        agree without talking, and when shares change only as many users move as must.
        """
        if user is None:
            [label] = random.choices(*zip(*self.shares, strict=True))
            return str(label)
        return min(self.shares, key=lambda one: -math.log(self._chance(one[0], user)) / one[1])[0]

    def _chance(self, label: str, user: str) -> float:
        """A number in (0, 1) that depends on experiment, variant and user only."""
        text = "\0".join((self.name, label, user)).encode("utf-8", "surrogatepass")
        number = int.from_bytes(hashlib.sha256(text).digest()[:8])
        return (number + 0.5) / 2**64


def make_experiment(
    name: str, weights: Mapping[str, float], origin: Origin = "settings"
) -> Experiment:
    """An experiment whose shares are in proportion to the weights.

    Raises:
        ConfigError: there are no variants or too many, or a weight is no share.
    """
    if not 1 <= len(weights) <= MOST_VARIANTS:
        raise ConfigError(
            f"experiment {name!r} has {len(weights)} variants; expected 1 to {MOST_VARIANTS}"
        )
    for label, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"experiment {name!r}: the share of {label!r} is {weight:g}; expected a number "
                "above 0"
            )
        try:
            parse_variant(label)
        except ValueError:
            raise ConfigError(
                f"experiment {name!r}: {label!r} is no variant; expected a model's name or "
                "NAME@SCALE, such as tagging@0.5"
            ) from None
    total = sum(weights.values())
    return Experiment(name, tuple((label, w / total) for label, w in weights.items()), origin)


def parse_variant(label: str) -> tuple[str, float | None]:
    """The model's name and the adapter's scale of `NAME` or `NAME@SCALE`.

    Raises:
        ValueError: what stands behind the `@` is no number, or nothing before it.

    >>> parse_variant("tagging@0.5")
    ('tagging', 0.5)
    """
    name, mark, scale = label.rpartition("@")
    if not mark:
        return label, None
    if not name:
        raise ValueError(label)
    return name, float(scale)


def named_splits(value: Any) -> Any:
    """Experiments given as `NAME=VARIANT:SHARE,...`, once or several times, as a mapping.

    A mapping stays as it is.

    Raises:
        ValueError: an item is of another form, or a name is given twice.
    """
    if isinstance(value, dict):
        return value
    found: dict[str, dict[str, float]] = {}
    for item in [value] if isinstance(value, str) else value:
        name, equals, rest = str(item).partition("=")
        if not (name and equals) or name in found:
            problem = f"the experiment {name!r} is given twice" if name in found else _form(item)
            raise ValueError(problem)
        found[name] = dict(_shares(item, rest.split(",")))
        if len(found[name]) < rest.count(",") + 1:
            raise ValueError(f"a variant is given twice in {item!r}")
    return found


def _shares(item: Any, pairs: Iterable[str]) -> Iterable[tuple[str, float]]:
    for pair in pairs:
        variant, colon, share = pair.rpartition(":")
        try:
            yield variant.strip(), float(share if colon and variant.strip() else "no number")
        except ValueError:
            raise ValueError(_form(item)) from None


def _form(item: Any) -> str:
    return f"expected NAME=VARIANT:SHARE,..., such as tone=base:0.5,medical:0.5, not {item!r}"

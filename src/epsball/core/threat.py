"""What may change. Protocols only; the threats themselves live in `epsball.threats`."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

from epsball.core.random import Key
from epsball.core.victim import Bound

Z = Any
Self = TypeVar("Self", bound="Threat")


class Threat(Protocol):
    """The adversary's room for change around clean inputs `x` (B, ...), in terms of a variable z with B rows.

    `radius` is always (B,) float64, in the threat's own unit, and never an attribute.
    """

    @property
    def name(self) -> str:
        """Registry name, as in threat strings."""

    def within(self: Self, box: tuple[Bound, Bound]) -> Self:
        """The same threat inside the victim's legal input range."""

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Z:
        """A legal z: "no change" where `noise` is None or the radius is 0, otherwise random, keyed by sample id (B,)."""

    def apply(self, x: Tensor, z: Z) -> Tensor:
        """The input that the model will see, inside the box."""

    def size(self, x: Tensor, z: Z) -> Tensor:
        """(B,) float64: how large the change is."""


class Projects(Threat, Protocol):
    """A threat whose legal set has a nearest point and a steepest direction."""

    def project(self, x: Tensor, z: Z, radius: Tensor) -> Z:
        """The nearest legal z: idempotent, legal points untouched, rounded inward so that float64 agrees."""

    def steepest(self, x: Tensor, z: Z, gradient: Z) -> Z:
        """The direction of size 1 that climbs fastest from z to first order; zero where the gradient is zero."""

    def reach(self, x: Tensor) -> Tensor:
        """(B,) float64: the radius beyond which the box is the only limit."""

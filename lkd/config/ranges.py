"""Types of numbers that carry their range: the parser refuses what is outside, and `--help` names them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    AtLeast2 = int
    AtLeast4 = int
    AtLeast8 = int
    NonNegativeInt = int
    PositiveInt = int
    ZeroOrAtLeast8 = int
    AtLeastOne = float
    ClosedUnitInterval = float
    FractionBelowOne = float
    NonNegativeFloat = float
    PositiveFloat = float
    PositiveFraction = float
    ZeroOrAtLeast1 = float
    Seed = int
else:
    from jsonargparse import typing as ranged

    NonNegativeInt, PositiveInt = ranged.NonNegativeInt, ranged.PositiveInt
    NonNegativeFloat, PositiveFloat = ranged.NonNegativeFloat, ranged.PositiveFloat
    ClosedUnitInterval = ranged.ClosedUnitInterval
    AtLeast2, AtLeast4, AtLeast8 = (ranged.restricted_number_type(f"AtLeast{n}", int, (">=", n)) for n in (2, 4, 8))
    ZeroOrAtLeast8 = ranged.restricted_number_type("ZeroOrAtLeast8", int, [("==", 0), (">=", 8)], join="or")
    AtLeastOne = ranged.restricted_number_type("AtLeastOne", float, (">=", 1))
    ZeroOrAtLeast1 = ranged.restricted_number_type("ZeroOrAtLeast1", float, [("==", 0), (">=", 1)], join="or")
    Seed = ranged.restricted_number_type("Seed", int, [(">=", -(2**63)), ("<", 2**63)])
    FractionBelowOne = ranged.restricted_number_type("FractionBelowOne", float, [(">=", 0), ("<", 1)])
    PositiveFraction = ranged.restricted_number_type("PositiveFraction", float, [(">", 0), ("<=", 1)])

"""What a time rests on: the sources of its parts, and the weakest of them that counts."""

from collections.abc import Collection, Mapping

#: From the strongest to the weakest source of a time; a sum is as good as its weakest part.
BASES = ("measured", "calibrated", "anchored", "transferred", "published", "prior", "datasheet")


#: A basis counts once operations of it hold this share of the time.
BASIS_SHARE = 0.1


def shares(*phases: Mapping[str, float]) -> dict[str, float]:
    """Share of the time by basis, every phase counted alike."""
    out: dict[str, float] = {}
    for seconds in phases:
        whole = sum(seconds.values()) or 1.0
        for basis, value in seconds.items():
            out[basis] = out.get(basis, 0.0) + value / whole
    return out


def weakest(bases: Mapping[str, float], unfitted: Collection[str] = ()) -> str:
    """The weakest basis that holds at least a tenth of the time.

    Where a method's own kernels were never fitted (``unfitted`` says why) it is a prior whatever
    their share: what is asked for is that method.
    """
    whole = sum(bases.values())
    counted = [b for b, seconds in bases.items() if seconds >= BASIS_SHARE * whole]
    if unfitted or not counted:
        counted.append("prior")
    return max(counted, key=BASES.index)

"""How fast a rank's GPU computes, where nobody has measured the training itself, and whose number that is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..machine import Gpu
from ..precision_levels import LEVELS

ASSUMED_UTILISATION = 0.30
"""Model-FLOP utilisation that is assumed of GPUs where nothing better is known: a guess until a run of yours has been measured."""


@dataclass(frozen=True)
class Rate:
    """Operations a second, as the architectures count them."""

    flops_per_s: float
    utilisation: float
    """Share of the peak."""
    source: str
    """The rate and where it comes from, for people."""


def rate_of(gpu: Gpu, precision: str, *, utilisation: float | None = None) -> Rate | None:
    """At the share of the peak that is given; else what the profile says that a training was seen to reach; else an assumed share.

    None where the profile gives no peak for the precision.
    """
    products = LEVELS[precision].products
    peak = gpu.peak_tflops.get(products)
    if peak is None:
        return None
    seen = (gpu.sustained_tflops or {}).get(products)
    if utilisation is None and seen is not None:
        return Rate(seen * 1e12, seen / peak, f"{seen:g} TFLOP/s a GPU in {products}, which a training was seen to reach (the profile's sources say which)")
    share = ASSUMED_UTILISATION if utilisation is None else utilisation
    whose = "a guess: --utilisation" if utilisation is None else "as given"
    return Rate(share * peak * 1e12, share, f"{share * peak:.3g} TFLOP/s a GPU in {products}, {100 * share:g} % of the peak ({whose})")

"""The [objective] section of a recipe: one record an objective, told apart by its `name`.

How each is drawn from residues and random numbers is in `prottrans_hpc.objectives`, in the module of the same name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .config import STRICT, Count, Fraction, Natural, NonNegative


@dataclass(frozen=True, config=STRICT)
class Masked:
    """BERT's objective: predict corrupted residues from both sides (Devlin et al. 2019, section 3.1)."""

    name: Literal["masked"] = "masked"
    fraction: float = 0.15
    """Share of the residues that are to be predicted, each drawn independently."""
    mask_share: Fraction = 0.8
    """Share of those that the mask token replaces."""
    random_share: Fraction = 0.1
    """Share of those that a random residue replaces; the others stay as they are."""

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        if self.mask_share + self.random_share > 1.0:
            raise ValueError(f"mask_share {self.mask_share} and random_share {self.random_share} exceed 1 together")


@dataclass(frozen=True, config=STRICT)
class ReplacedToken:
    """ELECTRA's objective: a generator fills masked residues in, a discriminator tells which were replaced (Clark et al. 2020)."""

    name: Literal["replaced_token"] = "replaced_token"
    fraction: float = 0.25
    """Share of the residues that the generator is to predict, each drawn independently."""
    mask_share: Fraction = 0.85
    """Share of those that the generator sees masked; the others it sees as they are (the authors' code, not the paper)."""
    discriminator_weight: NonNegative = 50.0
    """Of the discriminator's mean loss over all tokens, beside the generator's mean loss over its targets."""

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)


@dataclass(frozen=True, config=STRICT)
class Causal:
    """Predict each residue from those before it, in lanes with a memory (Dai et al. 2019, Transformer-XL)."""

    name: Literal["causal"] = "causal"
    protein_end: Literal["reset", "carry"] = "reset"
    """Whether the next protein of a lane may see the one before it through memory and attention: with "reset" it may not."""
    direction: Literal["forward", "reverse"] = "forward"
    """Read proteins from the first residue to the last, or the other way round."""


@dataclass(frozen=True, config=STRICT)
class Permutation:
    """Predict spans of residues in a random order, each from those before it in that order (Yang et al. 2019, XLNet)."""

    name: Literal["permutation"] = "permutation"
    fraction: float = 1 / 6
    """Share of the tokens that are to be predicted: a span of n in each stretch of n / fraction (the authors' num_predict 85 of 512)."""
    max_span: Count = 5
    """A predicted span has 1 to so many tokens."""
    span_lengths: Literal["inverse", "uniform"] = "inverse"
    """How likely a length n is: as 1 / n (the authors' code), or each as any other (section 3.1 of the paper)."""
    permute_within: Natural = 256
    """So many consecutive tokens change places in the order among one another, and come before the next so many (the
    authors' perm_size, half of a piece); 0: those of a whole sequence or piece do."""
    protein_end: Literal["reset", "carry"] = "carry"
    """Whether the next protein of a lane may see the one before it through memory and attention."""

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)


@dataclass(frozen=True, config=STRICT)
class Denoising:
    """T5's objectives: a decoder restores what was corrupted for the encoder (Raffel et al. 2020, section 3.1.4 and 3.3).

    The defaults are the published `iid_15_m_f`: 15 % single residues, each replaced by one and the same sentinel, and
    the whole sequence as the target.
    """

    name: Literal["denoising"] = "denoising"
    fraction: float = 0.15
    """Share of the residues that are corrupted."""
    noise: Literal["single", "spans"] = "single"
    """Each residue drawn independently, or spans of residues."""
    mean_span: Annotated[float, Field(ge=1.0)] = 3.0
    """Mean length of a span, residues; for noise = "spans"."""
    random_share: Fraction = 0.0
    """Share of the corrupted residues that a random one replaces instead of a sentinel (0.1: `_r10s90`); for noise = "single"."""
    target: Literal["whole", "sentinels"] = "whole"
    """What the decoder writes: the whole sequence, or sentinels each followed by what it stands for."""

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        if self.noise == "spans" and self.random_share:
            raise ValueError("random_share is for noise = 'single'")
        if self.target == "sentinels" and self.random_share:
            raise ValueError("with target = 'sentinels' nothing says where a random residue was: random_share must be 0")


Objective = Annotated[Masked | ReplacedToken | Causal | Permutation | Denoising, Field(discriminator="name")]


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")

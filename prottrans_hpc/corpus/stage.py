"""The stages of the corpus: preprocess, corpus show, corpus check."""

from __future__ import annotations

from ..stage import Request
from .builder import build


def preprocess(request: Request) -> None:
    """Make a corpus."""
    build(request)

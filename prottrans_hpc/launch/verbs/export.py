"""`prottrans export`: a model in the format of another library."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import PRECISIONS, as_json, examples, path_argument, positions, run_here, verbosity

_EXAMPLES = examples(
    "prottrans export runs/tiny_prot_bert-1a2b3c4d --to hf my_model",
    "prottrans export checkpoints/step-00001000 --to hf my_model --positions 40000",
    "prottrans export runs/prot_t5_xl_u50-1a2b3c4d --to hf-encoder --precision fp16 my_encoder",
)


@click.command(epilog=_EXAMPLES)
@path_argument("source", metavar="RUN_OR_CHECKPOINT")
@click.option(
    "--to",
    type=click.Choice(("hf", "hf-encoder")),
    required=True,
    help="The format: hf, a folder for HuggingFace transformers; hf-encoder, the same of an encoder-decoder's encoder alone.",
)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="What the weights are written in.")
@positions
@path_argument("out", metavar="DIR")
@as_json
@verbosity
def export(source: Path, to: str, precision: str, positions: int | None, out: Path, as_json: bool) -> None:
    """Write the model of a run or checkpoint to DIR, where AutoModel and AutoTokenizer of HuggingFace transformers open it."""
    run_here("export", {"source": str(source), "to": to, "precision": precision, "positions": positions, "out": str(out), "json": as_json})

"""`prottrans export`: a model in the format of another library."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import as_json, examples, path_argument, run_here, verbosity


@click.command(epilog=examples("prottrans export runs/tiny_prot_bert-1a2b3c4d --to hf my_model", "prottrans export checkpoints/step-00001000 --to hf my_model"))
@path_argument("source", metavar="RUN_OR_CHECKPOINT")
@click.option("--to", type=click.Choice(("hf",)), required=True, help="The format: hf, a folder for HuggingFace transformers.")
@path_argument("out", metavar="DIR")
@as_json
@verbosity
def export(source: Path, to: str, out: Path, as_json: bool) -> None:
    """Write the model of a run or checkpoint to DIR, where AutoModel and AutoTokenizer of HuggingFace transformers open it."""
    run_here("export", {"source": str(source), "to": to, "out": str(out), "json": as_json})

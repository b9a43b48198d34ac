"""`prottrans import`: a model folder of HuggingFace transformers becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import as_json, examples, path_argument, path_option, positions, run_here, verbosity


@click.command(
    "import", epilog=examples("prottrans import downloads/prot_bert --out prot_bert", "prottrans import downloads/bert_512 --out bert_40000 --positions 40000")
)
@path_argument("source", metavar="HF_DIR")
@path_option("--out", metavar="CHECKPOINT", required=True, help="The checkpoint folder to write.")
@positions
@as_json
@verbosity
def import_(source: Path, out: Path, positions: int | None, as_json: bool) -> None:
    """Read a local HuggingFace model folder (config.json, vocab.txt, model.safetensors or pytorch_model.bin) into a checkpoint."""
    run_here("import", {"source": str(source), "out": str(out), "positions": positions, "json": as_json})

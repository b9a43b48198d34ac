"""`prottrans embed`: embeddings of proteins from a run or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import INVALID, PRECISIONS, as_json, examples, path_argument, path_option, run_here, verbosity

_EXAMPLES = examples(
    "prottrans embed runs/tiny_prot_bert-1a2b3c4d proteins.fasta --out embeddings.h5",
    "prottrans embed prot_bert proteins.fasta.gz --out residues.h5 --per-residue --pool none --precision fp16",
)


@click.command(epilog=_EXAMPLES)
@path_argument("source", metavar="RUN_OR_CHECKPOINT")
@path_argument("fasta", metavar="FASTA...", nargs=-1, required=True)
@path_option("--out", metavar="FILE.h5", required=True, help="The HDF5 file to write; an interrupted command resumes.")
@click.option("--per-residue", is_flag=True, help="Write one vector a residue.")
@click.option("--pool", type=click.Choice(("mean", "none")), default="mean", show_default=True, help="Write one vector a protein.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of the computation; bf16 and fp16 also halve the file.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True, help="Where to compute.")
@click.option("--bin-residues", metavar="N", type=click.IntRange(1), default=16_384, show_default=True, help="Residues of one packed batch.")
@click.option("--invalid", type=click.Choice(INVALID), default="error", show_default=True, help="For letters that are no residue.")
@as_json
@verbosity
def embed(source: Path, fasta: tuple[Path, ...], out: Path, as_json: bool, **choices: object) -> None:
    """Write embeddings of the proteins in FASTA files, in their order, to an HDF5 file.

    RUN_OR_CHECKPOINT is a run directory (its newest intact checkpoint is taken), one checkpoint, or what `prottrans import` wrote.
    """
    if choices["pool"] == "none" and not choices["per_residue"]:
        raise click.UsageError("--pool none without --per-residue leaves nothing to write")
    run_here("embed", {"source": str(source), "fasta": [str(path) for path in fasta], "out": str(out), "json": as_json, **choices})

"""`prottrans embed`: embeddings of proteins from a run or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ..farm_options import FarmDemand, absolute, farm_options, plan_farm, run_on_farm
from ..options import INVALID, PRECISIONS, as_json, examples, path_argument, path_option, run_here, verbosity

_EXAMPLES = examples(
    "prottrans embed runs/tiny_prot_bert-1a2b3c4d proteins.fasta --out embeddings.h5",
    "prottrans embed prot_bert proteins.fasta.gz --out residues.h5 --per-residue --pool none --precision fp16",
    "prottrans embed runs/forward proteins.fasta --also runs/reverse --out both.h5",
    "prottrans embed prot_bert uniref50.fasta --out embeddings.h5 --machine slurm_cluster --nodes 4 --items 64",
)


@click.command(epilog=_EXAMPLES)
@path_argument("source", metavar="RUN_OR_CHECKPOINT")
@path_argument("fasta", metavar="FASTA...", nargs=-1, required=True)
@path_option("--out", metavar="FILE.h5", required=True, help="The HDF5 file to write; an interrupted command resumes.")
@path_option("--also", metavar="RUN_OR_CHECKPOINT", help="A second model: its numbers follow those of the first.")
@click.option("--per-residue", is_flag=True, help="Write one vector a residue.")
@click.option("--pool", type=click.Choice(("mean", "none")), default="mean", show_default=True, help="Write one vector a protein.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of the computation; bf16 and fp16 also halve the file.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True, help="Where to compute.")
@click.option("--bin-residues", metavar="N", type=click.IntRange(1), default=16_384, show_default=True, help="Residues of one packed batch.")
@click.option("--invalid", type=click.Choice(INVALID), default="error", show_default=True, help="For letters that are no residue.")
@farm_options
@as_json
@verbosity
def embed(
    source: Path,
    fasta: tuple[Path, ...],
    out: Path,
    also: Path | None,
    as_json: bool,
    asked: FarmDemand,
    **choices: object,
) -> None:
    """Write embeddings of the proteins in FASTA files, in their order, to an HDF5 file.

    RUN_OR_CHECKPOINT is a run directory (its newest intact checkpoint is taken), one checkpoint, or what `prottrans import` wrote.

    With --machine, --nodes or --items the proteins are cut into jobs of one node each; the file is the same as from one process.
    """
    if choices["pool"] == "none" and not choices["per_residue"]:
        raise click.UsageError("--pool none without --per-residue leaves nothing to write")
    request = {"source": str(source), "fasta": [str(path) for path in fasta], "out": str(out), "json": as_json, **choices}
    request |= {"also": str(also) if also else None}
    farm = plan_farm("embed", asked, out=out, one_a_gpu=True)
    if farm is None:
        run_here("embed", request)
        return
    request |= {"source": str(source.absolute()), "fasta": absolute(fasta), "out": str(out.absolute()), "also": str(also.absolute()) if also else None}
    run_on_farm("embed", request, farm, first_round="embed", dry_run=asked.dry_run, fresh=False)

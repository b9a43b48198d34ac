"""`prottrans project-scaling`: what more nodes would do, from a measured study or from a machine's numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ...errors import ConfigError
from ..options import as_json, examples, path_option, run_here, settings, verbosity
from ..rate import ASSUMED_UTILISATION

_EXAMPLES = examples(
    "prottrans project-scaling studies/prot_bert --nodes 936",
    "prottrans project-scaling studies/prot_bert --nodes 16,64,936 --what-if",
    "prottrans project-scaling studies/prot_bert --comm studies/links --nodes 936",
    "prottrans project-scaling prot_bert --machine summit --nodes 1,2,4,18,936",
    "prottrans project-scaling prot_txl --machine summit --nodes 936 --json",
    "prottrans project-scaling prot_t5_xl_u50 --machine frontier --nodes 1,64,512 --set parallel.sharding=hybrid --what-if",
)


def _as_sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    sizes = value.replace(" ", "").split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{value!r} is not a list of numbers of nodes such as 1,2,936", ctx, param)
    return tuple(sorted({int(size) for size in sizes}))


@click.command("project-scaling", epilog=_EXAMPLES)
@click.argument("source", metavar="DIR|RECIPE")
@click.option("--nodes", metavar="N,N...", required=True, callback=_as_sizes, help="Numbers of nodes to predict.")
@click.option("--machine", metavar="NAME", help="Without measurements: RECIPE on this machine, from the numbers in its profile.")
@path_option("--comm", metavar="DIR", help="A study of `prottrans comm` on the same machine: the links are taken from it, and one size fewer is needed.")
@click.option("--what-if", is_flag=True, help="Also: other buckets, 16-bit gradients, accumulation, another reduction, the model cut, at the largest size.")
@click.option(
    "--utilisation",
    metavar="SHARE",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help=f"With --machine: share of the GPUs' peak.  [default: the rate that the profile says was seen, else {ASSUMED_UTILISATION:.0%}]",
)
@path_option("--out", metavar="DIR", help="Where projection.json goes.  [default: the study's DIR; with --machine nowhere]")
@settings
@as_json
@verbosity
def project_scaling(
    source: str,
    nodes: tuple[int, ...],
    machine: str | None,
    comm: Path | None,
    what_if: bool,
    utilisation: float | None,
    out: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Predict step time, overhead and efficiency on more nodes than were measured.

    DIR is a study of `prottrans scale`: a model of the collectives, of their overlap with the backward pass and of
    stragglers is fitted to it, checked by leaving out the largest size, and its error is stated. With --machine a RECIPE is projected
    without any measurement, from assumed numbers, which are printed.
    """
    paths = {"out": str(out) if out else None, "comm": str(comm) if comm else None}
    request = {"source": source, "nodes": list(nodes), "what_if": what_if, "json": as_json, **paths}
    if machine is None:
        if settings:
            raise ConfigError("--set changes a recipe, and a measured study has its own: give --machine too, or leave --set out")
        run_here("project-scaling", request)
        return
    if comm is not None:
        raise ConfigError("--comm goes with a measured study; with --machine the links are those of the profile")
    from ...machine import read_machine
    from ...recipe import read_recipe
    from .. import assumed_scaling, checks

    recipe = read_recipe(source, settings)
    checks.check_model(recipe)
    assumed = assumed_scaling.assume(source, recipe, read_machine(machine), nodes, utilisation=utilisation)
    run_here("project-scaling", request | {"assumed": dataclasses.asdict(assumed)})

"""`prottrans plan`: what a recipe comes to on a machine, and why; nothing is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from ..demand import Demand
from ..options import as_json, as_minutes, examples, machine_option, path_option, settings, size, verbosity
from ..rate import ASSUMED_UTILISATION

_EXAMPLES = examples(
    "prottrans plan prot_bert_bfd --machine summit --racks 52 --total-time 36:00",
    "prottrans plan prot_bert --machine perlmutter --nodes 128 --walltime 12:00 --set precision=bf16",
    "prottrans plan tiny_prot_bert --machine laptop --nodes 2 --corpus corpus --json",
    "prottrans plan preprocess_bfd --machine rhea --nodes 2",
)


@click.command(epilog=_EXAMPLES)
@click.argument("recipe", metavar="RECIPE")
@machine_option
@size
@path_option("--corpus", metavar="CORPUS", help="Lengths and size of this corpus instead of assumed ones.")
@click.option("--total-time", "total_min", metavar="H:MM", callback=as_minutes, help="What the whole training takes, if you know it.")
@click.option(
    "--utilisation",
    metavar="SHARE",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help=f"Share of the GPUs' peak that the estimated time assumes.  [default: the rate that the profile says was seen, else {ASSUMED_UTILISATION:.0%}]",
)
@settings
@as_json
@verbosity
def plan(
    recipe: str, machine: str, demand: Demand, corpus: Path | None, total_min: int | None, utilisation: float | None, settings: tuple[str, ...], as_json: bool
) -> None:
    """Say what RECIPE needs on a machine: nodes, queue, batches, memory, time, jobs, cost; and why.

    Nothing is started or submitted. What cannot work is an error that names the nearest size, walltime or setting that does.
    Of a campaign of preprocessing (preprocess_*) it says the bytes in, the bytes on disk, the shards and the node-hours.
    """
    from ...machine import read_machine
    from ...recipe import read_recipe
    from .. import campaign, checks, epochs, plan_text, prospect

    if campaign.is_campaign(recipe):
        _plan_campaign(recipe, machine, demand, settings, as_json=as_json)
        return
    chosen, profile = read_recipe(recipe, settings), read_machine(machine)
    architecture, model_size = checks.check_model(chosen)
    facts = checks.read_corpus_facts(corpus) if corpus else None
    if facts:
        chosen = epochs.resolve_warmup(chosen, architecture, facts)
    assumptions = prospect.Assumptions(total_min, utilisation)
    seen = prospect.look_ahead(chosen, profile, demand, corpus=facts, assumptions=assumptions, keeps_bins=checks.sets_bins(settings))
    if as_json:
        click.echo(json.dumps(plan_text.to_json(seen, recipe_name=recipe), indent=1))
        return
    title = f"{recipe} on {profile.name}: {checks.model_line(chosen, architecture, model_size)}, {chosen.num_steps:,} steps"
    print_lines(title, plan_text.describe(seen))


def _plan_campaign(recipe: str, machine: str, demand: Demand, settings: tuple[str, ...], *, as_json: bool) -> None:
    from ...machine import read_machine
    from .. import campaign, campaign_text
    from ..farm_options import wanted_nodes

    chosen, profile = campaign.read_campaign(recipe, settings), read_machine(machine)
    seen = campaign.look_ahead(chosen, profile, wanted_nodes(profile, demand) or 1)
    if as_json:
        click.echo(json.dumps(campaign.to_json(seen, recipe_name=recipe), indent=1))
        return
    print_lines(f"{recipe} on {profile.name}: {chosen.description}", campaign_text.describe(seen))


def print_lines(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """A table on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        click.echo(title)
        for what, text in lines:
            click.echo(f"{what + ':':<9} {text}")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=False, title=Text(title), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, text in lines:
        table.add_row(Text(what), Text(text))
    Console().print(table)

"""`prottrans memory`: what a recipe's training takes of a rank's memory under each policy, and which one to take."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import click

from ... import terminal
from ..demand import Demand
from ..options import as_json, examples, machine_option, path_option, run_here, settings, size, verbosity

_EXAMPLES = examples(
    "prottrans memory prot_bert_bfd --machine summit --racks 52",
    "prottrans memory tiny_prot_bert --measure",
    "prottrans memory prot_t5_xl_bfd --machine perlmutter --nodes 32 --set parallel.sharding=hybrid --json",
)


class RecipeOrVerb(click.Group):
    """A group whose first argument may be a recipe: `memory RECIPE` is `memory show RECIPE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb in front where there is none."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=RecipeOrVerb, epilog=_EXAMPLES, subcommand_metavar="RECIPE ...")
def memory() -> None:
    """Say what RECIPE takes of a rank's memory under each policy, whether it fits, and what it costs in time.

    Policies are settings of the recipe's section [memory]: layers computed again, numbers saved in bf16, large model
    support, the optimizer on the host.
    """


@memory.command("show", epilog=_EXAMPLES)
@click.argument("recipe", metavar="RECIPE")
@machine_option
@size
@click.option("--measure", is_flag=True, help="Take real steps on this computer, too: of the recipe's model, on a full micro batch.")
@path_option("--corpus", metavar="CORPUS", help="With --measure: proteins of this corpus instead of random ones.")
@settings
@as_json
@verbosity
def show(recipe: str, machine: str, demand: Demand, measure: bool, corpus: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Print each policy's predicted peak and its parts, against measured ones with --measure, and the policy that fits at the least time."""
    from ... import config
    from ...machine import read_machine
    from ...recipe import read_recipe
    from .. import checks, memory_table, planner

    chosen, profile = read_recipe(recipe, settings), read_machine(machine)
    architecture, model_size = checks.check_model(chosen)
    num_ranks = planner.allocate(profile, demand).num_ranks
    rows = memory_table.planned_rows(chosen, profile, num_ranks=num_ranks)
    if measure and _has_torch():
        policies = memory_table.policies_of(chosen)
        request = {"recipe": config.to_json(chosen), "policies": {name: config.to_json(policy.memory) for name, policy in policies.items()}}
        rows, num_ranks = memory_table.measured_rows(chosen, profile, _measured(request | {"corpus": str(corpus) if corpus else None})), 1
    if as_json:
        click.echo(json.dumps({"recipe": recipe, **memory_table.to_json(rows, chosen, profile, num_ranks)}, indent=1))
        return
    what = "one micro batch, measured here" if any(row.measured for row in rows) else f"{num_ranks:,} rank{'s' if num_ranks > 1 else ''} of {profile.name}"
    click.echo(f"{recipe}: {checks.model_line(chosen, architecture, model_size)}; {what}")
    for line in memory_table.describe(rows):
        click.echo(line)
    click.echo(memory_table.verdict(rows, chosen, profile, num_ranks))


def _has_torch() -> bool:
    if importlib.util.find_spec("torch") is not None:
        return True
    terminal.warn("nothing is measured, as torch is not installed here (pip install 'prottrans-hpc[train]'): these are predictions alone")
    return False


def _measured(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="prottrans-memory-") as folder:
        out = Path(folder) / "measured.json"
        run_here("memory-measure", request | {"out": str(out)})
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found

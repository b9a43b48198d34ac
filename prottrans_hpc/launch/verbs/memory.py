"""`prottrans memory`: what a recipe's training takes of a rank's memory under each policy, and which one to take."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import click

from ... import terminal
from ...errors import missing_package
from ..demand import Demand
from ..options import as_json, examples, machine_option, path_option, run_here, settings, size, verbosity

_EXAMPLES = examples(
    "prottrans memory prot_bert_bfd --machine summit --racks 52",
    "prottrans memory tiny_prot_bert --measure",
    "prottrans memory prot_t5_xl_bfd --machine perlmutter --nodes 32 --set parallel.sharding=hybrid --json",
    "prottrans memory study prot_txl_bfd --machine summit --racks 52 --out study",
)


class RecipeOrVerb(click.Group):
    """A group whose first argument may be a recipe: `memory RECIPE` is `memory show RECIPE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb in front where there is none."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=RecipeOrVerb, epilog=_EXAMPLES, subcommand_metavar="RECIPE | study RECIPE ...")
def memory() -> None:
    """Say what RECIPE takes of a rank's memory under each policy, whether it fits, and what it costs in time.

    Policies are settings of the recipe's section [memory]: layers computed again, numbers saved in bf16, large model
    support, the optimizer on the host. `memory study RECIPE` finds how large a model and a batch each makes possible.
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
    from .. import checks, memory_table, memory_time, planner

    chosen, profile = read_recipe(recipe, settings), read_machine(machine)
    architecture, model_size = checks.check_model(chosen)
    num_ranks = planner.allocate(profile, demand).num_ranks
    rows = memory_table.planned_rows(chosen, profile, num_ranks=num_ranks)
    if measure and _has_torch():
        policies = memory_table.policies_of(chosen)
        request = {"recipe": config.to_json(chosen), "policies": {name: config.to_json(policy.memory) for name, policy in policies.items()}}
        rows, num_ranks = memory_table.measured_rows(chosen, profile, _asked("memory-measure", request | {"corpus": str(corpus) if corpus else None})), 1
    if as_json:
        click.echo(json.dumps({"recipe": recipe, **memory_table.to_json(rows, chosen, profile, num_ranks)}, indent=1))
        return
    what = "one micro batch, measured here" if any(row.measured for row in rows) else f"{num_ranks:,} rank{'s' if num_ranks > 1 else ''} of {profile.name}"
    click.echo(f"{recipe}: {checks.model_line(chosen, architecture, model_size)}; {what}")
    for line in memory_table.describe(rows):
        click.echo(line)
    click.echo(f"times: {memory_time.speed_of(profile.node.gpu, chosen.precision).source}")
    click.echo(memory_table.verdict(rows, chosen, profile, num_ranks))


_STUDY_EXAMPLES = examples(
    "prottrans memory study prot_txl_bfd --machine summit --racks 52 --out study",
    "prottrans memory study prot_bert_bfd --machine summit --racks 52 --policy LMS --policy 'every layer' --out study",
    "prottrans memory study tiny_prot_bert --measure --budget-mib 24 --out study",
)


@memory.command("study", epilog=_STUDY_EXAMPLES)
@click.argument("recipe", metavar="RECIPE")
@machine_option
@size
@path_option("--out", metavar="DIR", required=True, help="Where study.json, study.csv and study.png go.")
@click.option("--policy", "names", metavar="NAME", multiple=True, help="Only this one, beside 'none'; may be repeated.  [default: all]")
@click.option("--measure", is_flag=True, help="Search with real steps on this computer, one rank, under --budget-mib.")
@click.option("--budget-mib", metavar="MIB", type=click.FloatRange(1.0), help="Memory of a rank.  [default: the machine's, a tenth kept free]")
@path_option("--corpus", metavar="CORPUS", help="An epoch of this corpus instead of UniRef100's 88 billion residues; its proteins with --measure.")
@settings
@as_json
@verbosity
def study(
    recipe: str,
    machine: str,
    demand: Demand,
    out: Path,
    names: tuple[str, ...],
    measure: bool,
    budget_mib: float | None,
    corpus: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Find the largest model, the largest batch and the hours of an epoch under each policy: figure 3 of the ProtTrans paper, for RECIPE.

    Models grow by layers at a micro batch of one longest sequence; batches grow by longest sequences. By default all of it is
    arithmetic for the machine; with --measure the search takes real steps here, on one rank, and memory is a budget.
    """
    from ... import config
    from ...machine import read_machine
    from ...recipe import read_recipe
    from .. import checks, memory_findings, memory_study, planner

    chosen, profile = read_recipe(recipe, settings), read_machine(machine)
    checks.check_model(chosen)
    _check_plots()
    policies = memory_study.choose_policies(chosen, names)
    num_ranks = 1 if measure else planner.allocate(profile, demand).num_ranks
    budget = None if budget_mib is None else int(budget_mib * 2**20)
    residues = checks.read_corpus_facts(corpus).train_residues if corpus else memory_study.EPOCH_RESIDUES
    setting = dataclasses.replace(memory_study.setting_on(chosen, profile, num_ranks=num_ranks, usable_bytes=budget), epoch_residues=residues)
    found = [memory_study.find(name, policy, setting) for name, policy in policies.items()]
    if measure:
        request = {"recipe": config.to_json(chosen), "policies": {name: config.to_json(policy.memory) for name, policy in policies.items()}}
        request |= {"corpus": str(corpus) if corpus else None, "budget_bytes": setting.room.device}
        request["guesses"] = {one.policy: {"layers": one.num_layers, "sequences": one.local_batch} for one in found}
        found = memory_study.as_measured(setting, _asked("memory-study", request))
    told = memory_findings.to_json(found, setting, recipe_name=recipe, machine_name="this computer" if measure else profile.name)
    _write(out, told)
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    what = "measured here, one rank" if measure else f"predicted for {num_ranks:,} ranks of {profile.name}"
    click.echo(f"{recipe}: {what}, {memory_study.room_text(setting)}; {setting.speed.source}")
    for line in memory_findings.describe(found):
        click.echo(line)
    click.echo(f"written: {out}/study.json, study.csv, study.png")


def _check_plots() -> None:
    """Before anything is searched."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_package("matplotlib", "plots", "the picture of a study of memory")


def _write(out: Path, told: dict[str, Any]) -> None:
    from ... import durable
    from .. import memory_findings

    out.mkdir(parents=True, exist_ok=True)
    durable.write_json(out / "study.json", told)
    durable.write_bytes(out / "study.csv", memory_findings.to_csv(told).encode())
    run_here("memory-picture", {"study": str(out / "study.json"), "out": str(out / "study.png")})


def _has_torch() -> bool:
    if importlib.util.find_spec("torch") is not None:
        return True
    terminal.warn("nothing is measured, as torch is not installed here (pip install 'prottrans-hpc[train]'): these are predictions alone")
    return False


def _asked(stage: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a stage writes."""
    with tempfile.TemporaryDirectory(prefix="prottrans-memory-") as folder:
        out = Path(folder) / "measured.json"
        run_here(stage, request | {"out": str(out)})
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found

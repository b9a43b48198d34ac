"""`prottrans models`: the architectures, their sizes and what was published about them; no torch needed."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import click

from ..options import as_json, examples, verbosity

_EXAMPLES = examples("prottrans models", "prottrans models show prot_bert", "prottrans models --json")


@click.group(invoke_without_command=True, epilog=_EXAMPLES)
@as_json
@verbosity
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the architectures, their sizes and their number of parameters."""
    if context.invoked_subcommand is None:
        _print_list(as_json)
    elif as_json:
        context.obj = {"json": True}


@models.command("list", epilog=examples("prottrans models list", "prottrans models list --json"))
@as_json
@verbosity
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the architectures, their sizes and their number of parameters."""
    _print_list(as_json or bool(context.obj))


@models.command(epilog=examples("prottrans models show prot_bert", "prottrans models show prot_bert_bfd --json", "prottrans models show tiny_prot_t5"))
@click.argument("name", metavar="NAME")
@as_json
@verbosity
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Print everything about one architecture, or one of its sizes, or that of a recipe: shapes, parameters, where the numbers come from, errata."""
    record = _find(name)
    if as_json or context.obj:
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(f"{record['name']}: {record['description']}\nobjectives: {', '.join(record['objectives'])}")
    shared = _shared_errata(record["sizes"])
    for size in record["sizes"]:
        click.echo(f"\n{size['name']}: {_parameters(size)}\n  from: {size['reference']}")
        click.echo("  shape: " + ", ".join(f"{key} {value}" for key, value in size["shape"].items()))
        click.echo("  tensor groups: " + (f"of {', '.join(map(str, degrees))} ranks" if (degrees := size["tensor_ranks"][1:]) else "none"))
        for erratum in size["errata"]:
            if erratum not in shared:
                click.echo(f"  erratum: {erratum}")
    if shared:
        click.echo("\nall published sizes:")
        for erratum in shared:
            click.echo(f"  erratum: {erratum}")


def _shared_errata(sizes: list[dict[str, Any]]) -> list[str]:
    """What is said of each size of which anything is said, where there are several: to be printed once."""
    said = [size["errata"] for size in sizes if size["errata"]]
    return [erratum for erratum in said[0] if all(erratum in other for other in said)] if len(said) > 1 else []


def _find(name: str) -> dict[str, Any]:
    """The architecture of a name; else the one that has a size of that name, or whose recipe it is, with that size alone. Raises ConfigError."""
    from ... import architecture, config
    from ...errors import ConfigError
    from ...recipe import read_recipe
    from ..campaign import is_campaign

    if name in architecture.names():
        return describe(architecture.get(name))
    records = architecture.available()
    owners = [record for record in records if name in record.sizes]
    if len(owners) == 1:
        return _of_size(owners[0], name)
    recipes = [recipe for recipe in config.shipped_names("jobs") if not is_campaign(recipe)]
    if name in recipes:
        recipe = read_recipe(name)
        return _of_size(architecture.get(recipe.architecture.name), recipe.architecture.size)
    sizes = [size for record in records for size in record.sizes]
    known = sorted({*architecture.names(), *(size for size in sizes if sizes.count(size) == 1), *recipes})
    raise ConfigError(f"no architecture, size or recipe is called {name!r}{config.meant(name, known)}")


def _of_size(record: Any, size_name: str) -> dict[str, Any]:
    whole = describe(record)
    return whole | {"sizes": [size for size in whole["sizes"] if size["name"] == size_name]}


def describe(record: Any) -> dict[str, Any]:
    """An architecture as plain values; the number of parameters is computed from the shape."""
    sizes = [
        {
            "name": name,
            "parameters": record.num_parameters(size.shape),
            "parameters_published": size.parameters_published,
            "reference": size.reference,
            "errata": list(size.errata),
            "shape": dataclasses.asdict(size.shape),
            "tensor_ranks": record.tensor_parallel.degrees(size.shape) if record.tensor_parallel else [1],
        }
        for name, size in record.sizes.items()
    ]
    return {"name": record.name, "description": record.description, "objectives": list(record.objectives), "sizes": sizes}


def _print_list(as_json: bool) -> None:
    from ... import architecture

    records = [describe(record) for record in architecture.available()]
    if as_json:
        click.echo(json.dumps(records, indent=1))
        return
    sys.stdout.write(_table(records))


def _table(records: list[dict[str, Any]]) -> str:
    """A line a size, within 80 columns, below a line an architecture."""
    width = max(len(size["name"]) for record in records for size in record["sizes"])
    lines = [f"  {'':<{width}} {'parameters':>14}  published"]
    for record in records:
        lines.append(f"{record['name']}: {record['description']}")
        for size in record["sizes"]:
            published = f"{size['parameters_published'] / 1e6:,.0f} M" if size["parameters_published"] else ""
            errata = _errata(len(size["errata"]))
            lines.append(f"  {size['name']:<{width}} {size['parameters']:>14,}  {published:>9}  {errata}".rstrip())
    return "\n".join(lines) + "\n"


def _errata(number: int) -> str:
    return {0: "", 1: "1 erratum"}.get(number, f"{number} errata")


def _parameters(size: dict[str, Any]) -> str:
    published = f" (published: {size['parameters_published']:,})" if size["parameters_published"] else ""
    errata = f", {_errata(len(size['errata']))}" if size["errata"] else ""
    return f"{size['parameters']:,} parameters{published}{errata}"

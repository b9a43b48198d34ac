"""`prottrans models`: the architectures, their sizes and what was published about them; no torch needed."""

from __future__ import annotations

import dataclasses
import json
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


@models.command(epilog=examples("prottrans models show prot_bert", "prottrans models show prot_bert_bfd --json"))
@click.argument("name", metavar="NAME")
@as_json
@verbosity
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Print everything about one architecture, or one published size: shapes, parameters, where the numbers come from, errata."""
    record = _find(name)
    if as_json or context.obj:
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(f"{record['name']}: {record['description']}\nobjectives: {', '.join(record['objectives'])}")
    for size in record["sizes"]:
        click.echo(f"\n{size['name']}: {_parameters(size)}\n  from: {size['reference']}")
        click.echo("  shape: " + ", ".join(f"{key} {value}" for key, value in size["shape"].items()))
        for erratum in size["errata"]:
            click.echo(f"  erratum: {erratum}")


def _find(name: str) -> dict[str, Any]:
    """The architecture of a name; else the one that has a size of that name, with this size alone. Raises ConfigError."""
    from ... import architecture

    if name not in architecture.names():
        owners = [record for record in architecture.available() if name in record.sizes]
        if len(owners) == 1:
            record = describe(owners[0])
            return record | {"sizes": [size for size in record["sizes"] if size["name"] == name]}
    return describe(architecture.get(name))


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
    for record in records:
        click.echo(f"{record['name']}: {record['description']}")
        for size in record["sizes"]:
            click.echo(f"  {size['name']:<16} {_parameters(size)}")


def _parameters(size: dict[str, Any]) -> str:
    published = f" (published: {size['parameters_published']:,})" if size["parameters_published"] else ""
    errata = f", {len(size['errata'])} errata" if size["errata"] else ""
    return f"{size['parameters']:>13,} parameters{published}{errata}"

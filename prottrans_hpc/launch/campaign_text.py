"""A preprocessing campaign in words: one line for each thing. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .campaign import ASSUMED_GB_PER_S, MB_PER_CPU_S, Campaign, Outlook

_TOLERANCE = 0.02
"""The papers round their numbers of sequences to three digits or two."""
_INVALID = {
    "error": "a letter that is no residue is an error",
    "x": "letters that are no residue as X",
    "skip": "records with letters that are no residue left out",
}


def describe(outlook: Outlook) -> Iterator[tuple[str, str]]:
    """(what, words) of everything in an outlook, for people."""
    campaign, data, rules = outlook.campaign, outlook.campaign.expected, outlook.campaign.rules
    assumed = " (residues assumed)" if data.residues_are_assumed else ""
    yield "input", f"{data.source}: {data.sequences:,} sequences, {data.residues:,} residues{assumed}, about {_size(campaign.input_bytes)} of FASTA"
    yield "rules", ", ".join(_rules(campaign))
    per_residue = campaign.corpus_bytes / data.residues
    yield "corpus", f"{_size(campaign.corpus_bytes)}, {per_residue:.3f} bytes a residue; twice as much while it is made"
    largest = campaign.corpus_bytes / rules.shards
    yield "shards", f"{rules.shards:,} to train on, about {largest / 2**20:,.0f} MiB each; {round(rules.validation * data.sequences):,} sequences held out"
    yield "size", f"{_nodes(outlook.num_nodes)} x {outlook.cores_per_node} cores of {outlook.machine}"
    yield "time", _time(outlook)
    yield "cost", f"{outlook.node_hours:,.2f} node-hours"
    yield from (("papers", text) for text in _published(campaign))


def expectation(campaign: Campaign) -> str:
    """What the corpus should come to, in a line for whoever makes it."""
    data = campaign.expected
    return f"{data.source}; {data.sequences:,} sequences and {data.residues:,} residues are expected, {_size(campaign.corpus_bytes)} of shards"


def comparison(campaign: Campaign, num_sequences: int) -> str:
    """What to tell of a corpus that has not about as many sequences as expected; "" where it has."""
    share = num_sequences / campaign.expected.sequences
    if abs(share - 1.0) < _TOLERANCE:
        return ""
    percent = f"{100 * share:,.0f}" if share >= 0.01 else f"{100 * share:.2g}"
    return f"the corpus has {num_sequences:,} sequences, {percent} % of the {campaign.expected.sequences:,} of {campaign.expected.source}"


def _rules(campaign: Campaign) -> Iterator[str]:
    rules = campaign.rules
    yield "equal sequences once" if rules.dedup else "equal sequences kept"
    yield "B, O, U and Z kept" if rules.keep_rare else "B, O, U and Z as X"
    yield _INVALID[rules.invalid]
    yield "with names" if rules.names else "without names"


def _time(outlook: Outlook) -> str:
    campaign = outlook.campaign
    work = f"{_span(outlook.work_hours)} of computing ({campaign.cpu_hours:,.2f} core-hours at the measured {MB_PER_CPU_S:,.0f} MB of FASTA a CPU-second)"
    disk = f"{_span(campaign.disk_hours)} of reading and writing, if the file system gives {ASSUMED_GB_PER_S:g} GB/s"
    return f"{work}; {disk}"


def _published(campaign: Campaign) -> Iterator[str]:
    told = campaign.published
    if told.text_gb:
        yield f"{' / '.join(f'{size:g}' for size in told.text_gb)} GB of text"
    if told.records_tb:
        files = f" in {told.record_files:,} files" if told.record_files else ""
        number, times = told.records_tb * 1e12 / campaign.expected.residues, told.records_tb * 1e12 / campaign.corpus_bytes
        yield f"{told.records_tb:g} TB of records{files}: {number:,.0f} bytes a residue, {times:,.0f} times the corpus planned here"
    yield from told.notes


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number:,} nodes"


def _size(num_bytes: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.2f} {name}"
    return f"{num_bytes / 1e6:,.1f} MB"


def _span(hours: float) -> str:
    if hours >= 48.0:
        return f"{hours / 24:,.1f} days"
    if hours >= 1.0:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:,.1f} minutes" if hours * 60 >= 1.0 else f"{hours * 3600:,.1f} seconds"

"""The command `prottrans`: a lazy group of verbs, and the one place where errors become messages and exit codes.

A verb's module is imported when the verb is used, so `prottrans --help` costs little more than Python itself.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from .. import __version__, errors, terminal
from ..stage import find
from .options import TYPED

_COMPLETION = "_PROTTRANS_COMPLETE"
BROKEN_PIPE = 141
"""128 + SIGPIPE, what a shell reports of a program whose reader went away: `prottrans models | head -1`."""

_NO_LIMIT = sys.maxsize - 1

VERBS = {
    "preprocess": ("prottrans_hpc.launch.verbs.preprocess:preprocess", "Turn FASTA files into a corpus of shards."),
    "corpus": ("prottrans_hpc.launch.verbs.corpus:corpus", "Show what is in a corpus, or check every byte of it."),
    "plan": ("prottrans_hpc.launch.verbs.plan:plan", "Say what a training needs on a machine, and why."),
    "memory": ("prottrans_hpc.launch.verbs.memory:memory", "Say what a training takes of a rank's memory, and how to spare some."),
    "pretrain": ("prottrans_hpc.launch.verbs.pretrain:pretrain", "Pre-train a model on a corpus; the same command resumes."),
    "project-scaling": ("prottrans_hpc.launch.verbs.project_scaling:project_scaling", "Predict how a training does on more nodes."),
    "scale": ("prottrans_hpc.launch.verbs.scale:scale", "Measure how a training scales over nodes, and report it."),
    "comm": ("prottrans_hpc.launch.verbs.comm:comm", "Measure how the ranks of a machine talk, and find slow nodes."),
    "runs": ("prottrans_hpc.launch.verbs.runs:runs", "List runs, show one, read its log, cancel or resume it."),
    "embed": ("prottrans_hpc.launch.verbs.embed:embed", "Write embeddings of the proteins in FASTA files."),
    "export": ("prottrans_hpc.launch.verbs.export:export", "Write a model for HuggingFace transformers."),
    "import": ("prottrans_hpc.launch.verbs.import_:import_", "Read a HuggingFace model folder into a checkpoint."),
    "machines": ("prottrans_hpc.launch.verbs.machines:machines", "List the machine profiles, or show one."),
    "models": ("prottrans_hpc.launch.verbs.models:models", "List the architectures and their sizes."),
}
"""Verb -> (where its command is, the line about it in `prottrans --help`)."""

EXAMPLES = """\b
Examples:
  prottrans preprocess uniref50.fasta.gz --out corpus
  prottrans pretrain tiny_prot_bert --corpus corpus --nodes 2
  prottrans embed runs/tiny_prot_bert-1a2b3c4d proteins.fasta --out embeddings.h5

Exit codes: 0 done, 64 usage, 65 bad data, 66 no input, 71 out of resources, 73 cannot write, 75 stopped early (run the same command again),
76 training diverged, 77 no permission, 78 not the same run, 70 a bug.
"""


class LazyGroup(click.Group):
    """A click group that knows its verbs by name and imports each only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of a first use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, imported now."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = find(VERBS[cmd_name][0])
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb of a command line; an unknown one is answered with the nearest."""
        verb = args[0]
        if verb not in VERBS and not verb.startswith("-"):
            import difflib

            close = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the verbs are {', '.join(VERBS)}"
            raise click.UsageError(f"no verb is called {verb!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXAMPLES, subcommand_metavar="VERB ...")
@click.version_option(__version__, prog_name="prottrans-hpc", message="%(prog)s %(version)s")
def prottrans() -> None:
    """Train, resume and use the ProtTrans protein language models, on a laptop or on a supercomputer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every error ends here as one line on standard error."""
    _replace_closed_streams()
    terminal.set_verbosity(terminal.NORMAL)
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whatever is still buffered has no reader; without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        return _report(error)


def _run(arguments: list[str]) -> int:
    if _COMPLETION in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(prottrans, {}, "prottrans", _COMPLETION, os.environ[_COMPLETION])
    typed = shlex.join(["prottrans", *arguments])
    # Not prottrans.main(): that one turns a closed pipe into exit code 1.
    try:
        with prottrans.make_context("prottrans", arguments) as context:
            context.meta[TYPED] = typed
            result: Any = prottrans.invoke(context)
            return result if isinstance(result, int) else errors.DONE
    except click.exceptions.Exit as request:  # --help and --version
        return request.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr, flush=True)
        return errors.USAGE
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        _print_error(f"{_one_line(error.format_message())}{hint}")
        return errors.USAGE
    except click.ClickException as error:
        _print_error(_one_line(error.format_message()))
        return errors.USAGE


def _report(error: BaseException) -> int:
    """Print an error for the user and give its exit code; an unforeseen one comes with its traceback."""
    code = errors.exit_code(error)
    unforeseen = code == errors.BUG and not isinstance(error, errors.ProttransError)
    if unforeseen or terminal.verbosity() >= terminal.VERBOSE:
        print("\n".join(terminal.printable(line, limit=_NO_LIMIT) for line in traceback.format_exc().splitlines()), file=sys.stderr, flush=True)
    _print_error(errors.explain(error))
    if unforeseen:
        print("This is a bug of prottrans-hpc. Please report it with the lines above and the command that you ran.", file=sys.stderr, flush=True)
    return code


def _print_error(message: str) -> None:
    print(f"error: {terminal.printable_lines(message, limit=_NO_LIMIT)}", file=sys.stderr, flush=True)


def _one_line(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines())


def _replace_closed_streams() -> None:
    """Give a process that was started with closed standard streams somewhere to write (`prottrans ... >&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - lives as long as the process


if __name__ == "__main__":
    sys.exit(main())

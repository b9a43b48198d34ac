"""`python -P -m prottrans_hpc.launch.stage_process STAGE REQUEST.json [--quiet | --verbose]`: run a stage on a node, as an item of a farm.

Errors become one line on standard error and the exit code of errors.py, as with `prottrans`.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from .. import durable, errors, terminal
from .options import run_here


def main(arguments: list[str]) -> int:
    """Run the stage and return the exit code."""
    for flag in arguments[2:]:
        terminal.set_verbosity(terminal.LEVELS[flag])
    try:
        run_here(arguments[0], durable.read_json(Path(arguments[1])))
        return errors.DONE
    except (Exception, KeyboardInterrupt) as error:
        code = errors.exit_code(error)
        if code == errors.BUG:
            traceback.print_exc()
        print(f"error: {terminal.printable_lines(errors.explain(error))}", file=sys.stderr, flush=True)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

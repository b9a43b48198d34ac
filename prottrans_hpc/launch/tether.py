"""`python -m prottrans_hpc.launch.tether CMD...`: become CMD, but die with the parent.

Job scripts of the local scheduler put it in front of starters that are not ours, so that a kill of the script
cannot leave mpirun or its ranks behind. A batch system does this itself.
"""

from __future__ import annotations

import os
import sys

from .children import die_with_parent


def main() -> None:
    """Set the tether and turn into the command."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m prottrans_hpc.launch.tether CMD...")
    die_with_parent(os.getppid())
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()

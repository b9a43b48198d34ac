"""A stand-in for `bkill [-s SIGNAL] JOBID...`: ends jobs (SIGINT, SIGTERM, SIGKILL one after the other), or sends one signal."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence

from lsf_state import FINISHED, here, public_id, refuse


def main(arguments: Sequence[str]) -> None:
    state, rest, number, ids = here(), list(arguments), None, list[str]()
    while rest:
        word = rest.pop(0)
        if word == "-s" and rest:
            number = _signal(rest.pop(0))
        elif re.fullmatch(r"\d+(\[\d+\])?", word):
            ids.append(word)
        else:
            refuse(f"{word}: Illegal option.")
    if not ids:
        refuse("Job must be specified.")
    failed = False
    for word in ids:
        jobs = state.find(word)
        if not jobs:
            print(f"Job <{word}>: No matching job found", file=sys.stderr)
            failed = True
        for job in jobs:
            name = public_id(job)
            if job["stat"] in FINISHED:
                print(f"Job <{name}>: Job has already finished", file=sys.stderr)
                failed = True
            elif number is None:
                state.ask(job["id"], what="kill")
                print(f"Job <{name}> is being terminated")
            else:
                state.ask(job["id"], what="signal", number=number)
                print(f"Job <{name}> is being signaled")
    sys.exit(255 if failed else 0)


def _signal(text: str) -> int:
    if text.isdigit():
        return int(text)
    if f"SIG{text}" not in signal.Signals.__members__:
        refuse(f"{text}: Illegal signal value")
    return int(signal.Signals[f"SIG{text}"])


if __name__ == "__main__":
    main(sys.argv[1:])

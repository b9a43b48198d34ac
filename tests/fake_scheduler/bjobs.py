"""A stand-in for `bjobs`: the states of jobs, in the one format that is asked for here."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from lsf_state import FINISHED, Job, here, refuse

FIELDS = {
    "jobid": "number",
    "jobindex": "index",
    "stat": "stat",
    "exec_host": "exec_host",
    "exit_reason": "exit_reason",
    "exit_code": "exit_code",
    "queue": "queue",
    "job_name": "name",
}


def main(arguments: Sequence[str]) -> None:
    state, rest, fields, delimiter, ids = here(), list(arguments), ["jobid", "stat"], " ", list[str]()
    shows_ended = has_header = False
    has_header = True
    while rest:
        word = rest.pop(0)
        if word == "-a":
            shows_ended = True
        elif word == "-noheader":
            has_header = False
        elif word == "-o" and rest:
            match = re.fullmatch(r"([a-z_ ]+?)(?:\s+delimiter='(.)')?", rest.pop(0))
            if not match or any(field not in FIELDS for field in match[1].split()):
                refuse("bjobs: bad -o format")
            fields, delimiter = match[1].split(), match[2] or " "
        elif re.fullmatch(r"\d+(\[\d+\])?", word):
            ids.append(word)
        else:
            refuse(f"{word}: Illegal option.")
    if has_header:
        print(delimiter.join(field.upper() for field in fields))
    missing = False
    found = [job for word in ids for job in state.find(word)] if ids else state.jobs()
    for word in ids:
        if not state.find(word):
            print(f"Job <{word}> is not found", file=sys.stderr)
            missing = True
    for job in found:
        # An ended job is named by its id for a while even without -a.
        if ids or shows_ended or job["stat"] not in FINISHED:
            print(delimiter.join(_value(job, field) for field in fields))
    sys.exit(255 if missing else 0)


def _value(job: Job, field: str) -> str:
    value = ":".join(job.get("hosts", [])) or None if field == "exec_host" else job.get(FIELDS[field])
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])

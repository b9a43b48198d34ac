"""A stand-in for `brequeue [-e] [-d] JOBID`: a running job (with -e one that failed, with -d one that is done) is queued again under its id."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from lsf_state import here, refuse

STATES = {"-r": "RUN", "-e": "EXIT", "-d": "DONE"}


def main(arguments: Sequence[str]) -> None:
    state = here()
    wanted = [STATES[word] for word in arguments if word in STATES] or ["RUN"]
    ids = [word for word in arguments if re.fullmatch(r"\d+(\[\d+\])?", word)]
    if len(ids) != 1 or any(word not in STATES and word not in ids for word in arguments):
        refuse("usage: brequeue [-r] [-d] [-e] jobId")
    jobs = state.find(ids[0])
    if len(jobs) != 1:
        refuse(f"Job <{ids[0]}>: {'name one element of the array' if jobs else 'No matching job found'}")
    (job,) = jobs
    if job["stat"] not in wanted:
        refuse(f"Job <{ids[0]}>: Job cannot be requeued, it is in the state {job['stat']}")
    state.ask(job["id"], what="requeue")
    print(f"Job <{ids[0]}> is being requeued")


if __name__ == "__main__":
    main(sys.argv[1:])

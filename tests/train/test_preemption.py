from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def _run(code: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_sets_a_flag_and_nothing_else(number: int) -> None:
    code = """
import sys, time
from prottrans_hpc.train import preemption
preemption.install()
print("ready", preemption.requested(), flush=True)
while not preemption.requested():
    time.sleep(0.001)
time.sleep(0.2)
print(preemption.cause())
sys.exit(75)
"""
    process = _run(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready False\n"
    for other in (number, number, signal.SIGCONT, signal.SIGTERM):
        process.send_signal(other)
        time.sleep(0.01)
    assert process.stdout.read() == f"{signal.Signals(number).name}\n"
    assert process.wait(60) == 75


def test_what_comes_before_the_handlers_waits_for_them() -> None:
    code = """
import sys
print("alive", flush=True)
sys.stdin.readline()
from prottrans_hpc.train import preemption
preemption.install()
print(preemption.requested(), preemption.cause())
"""
    process = _run(code, stdin=subprocess.PIPE, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]))
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "alive\n"
    process.send_signal(signal.SIGTERM)
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.read() == "True SIGTERM\n"
    assert process.wait(60) == 0


def test_a_late_signal_does_not_replace_the_exit_code() -> None:
    code = """
import atexit, sys, time
from prottrans_hpc.train import preemption
preemption.install()
preemption.forget_signals()
atexit.register(lambda: (print("leaving", flush=True), time.sleep(0.3)))
class Late:
    def __del__(self):
        time.sleep(0.3)
late = Late()
sys.exit(75)
"""
    process = _run(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "leaving\n"
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert process.returncode == 75


def test_nothing_heavy_is_imported_before_the_handlers_stand() -> None:
    code = """
import sys
from prottrans_hpc.train import preemption
assert not {"torch", "numpy", "pydantic", "h5py"} & sys.modules.keys(), sorted(sys.modules)
"""
    assert _run(code).wait(60) == 0

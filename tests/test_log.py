"""One log a node: whole records from all its ranks, safe to show, and never a reason to stop."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from prottrans_hpc import log, terminal
from prottrans_hpc.rank import RankContext
from prottrans_hpc.run_dir import RunDir

RECORD = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) \S+ rank \d+ \S+: .*")
OURS = logging.getLogger("prottrans_hpc.test")


def place(rank=0, local_rank=None, node_rank=0):
    return RankContext(rank, 4, rank % 2 if local_rank is None else local_rank, 2, node_rank, 2, "node1", "processes")


@pytest.fixture
def run_dir(tmp_path):
    root = logging.getLogger()
    level = root.level
    yield RunDir(tmp_path)
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if isinstance(handler, (log.AppendHandler, log.TerminalHandler))]:
        root.removeHandler(handler)
        handler.close()


def lines(run_dir, node=0):
    return run_dir.node_log(node).read_text().splitlines()


def say():
    OURS.debug("a detail")
    OURS.info("step %d of %d", 1, 2)
    OURS.warning("slow")


def test_a_record_has_time_level_host_rank_and_place(run_dir):
    log.setup(run_dir, place())
    say()
    assert all(RECORD.fullmatch(line) for line in lines(run_dir))
    assert [line.split(" ", 1)[1] for line in lines(run_dir)] == [
        "INFO node1 rank 0 prottrans_hpc.test: step 1 of 2",
        "WARNING node1 rank 0 prottrans_hpc.test: slow",
    ]


@pytest.mark.parametrize(
    ("who", "heard"),
    [
        (place(0), 2),
        (place(0, local_rank=1), 2),  # rank 0 that is not its node's first: mpirun does so
        (place(1), 1),
        (place(2, node_rank=1), 2),
        (place(3, node_rank=1), 1),
    ],
)
def test_the_first_rank_of_a_node_tells_everything_the_others_only_warn(run_dir, capfd, who, heard):
    log.setup(run_dir, who)
    say()
    assert len(lines(run_dir, who.node_rank)) == heard
    assert os.listdir(run_dir.path / "logs") == [f"node-{who.node_rank:04d}.log"]
    assert capfd.readouterr().err == ("step 1 of 2\nwarning: slow\n" if who.rank == 0 else "")


def test_quiet_leaves_warnings_on_the_terminal(run_dir, capfd):
    log.setup(run_dir, place())
    terminal.set_verbosity(terminal.QUIET)
    say()
    assert capfd.readouterr().err == "warning: slow\n"
    assert len(lines(run_dir)) == 2


def test_a_second_setup_replaces_the_first_and_the_log_is_appended_to(run_dir):
    for _ in range(2):
        log.setup(run_dir, place())
        OURS.info("once")
    assert len(lines(run_dir)) == 2


def test_other_packages_are_heard_when_they_warn(run_dir):
    log.setup(run_dir, place())
    logging.getLogger("another.package").info("chatter")
    logging.getLogger("another.package").warning("trouble")
    warnings.warn("python's own", stacklevel=1)
    text = "\n".join(lines(run_dir))
    assert "chatter" not in text
    assert "another.package: trouble" in text
    assert "python's own" in text


@pytest.mark.parametrize(
    "attack", ["\x1b[2J", "\x1b]52;c;eA==\x07", "\x9b31m", "\r2026-01-01T00:00:00.000Z ERROR x rank 0 y: fake", "\u202e", "\x00", "\u2028"]
)
def test_control_characters_never_reach_file_or_terminal(run_dir, capfd, attack):
    log.setup(run_dir, place())
    OURS.warning("header %s", attack)
    for text in (run_dir.node_log(0).read_text(), capfd.readouterr().err):
        assert attack[0] not in text
        assert len(text.splitlines()) == 1


def test_no_text_can_pass_for_a_record(run_dir):
    log.setup(run_dir, place())
    OURS.warning("header\n2026-01-01T00:00:00.000Z ERROR node1 rank 0 prottrans_hpc: fake")
    assert [bool(RECORD.fullmatch(line)) for line in lines(run_dir)] == [True, False]


def test_a_traceback_stands_indented_below_its_record(run_dir):
    log.setup(run_dir, place())
    try:
        raise ValueError("bad \x1b[2J")
    except ValueError:
        OURS.exception("it broke")
    first, *rest = lines(run_dir)
    assert first.endswith("it broke")
    assert rest[0] == "  Traceback (most recent call last):"
    assert rest[-1] == "  ValueError: bad \\x1b[2J"


def test_ranks_of_a_node_do_not_mix_their_lines(run_dir, repository):
    program = (
        "import sys, logging; from pathlib import Path; from prottrans_hpc import log\n"
        "from prottrans_hpc.rank import RankContext; from prottrans_hpc.run_dir import RunDir\n"
        "rank = int(sys.argv[2]); log.setup(RunDir(Path(sys.argv[1])), RankContext(rank, 3, rank, 3, 0, 1, 'node1', 'processes'))\n"
        "for i in range(300): logging.getLogger('prottrans_hpc').warning('%s', str(rank) * 1000)"
    )
    argv = ["timeout", "-k", "5", "120", sys.executable, "-c", program, str(run_dir.path)]
    ranks = [
        subprocess.Popen([*argv, str(rank)], cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)}, stderr=subprocess.DEVNULL) for rank in range(3)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    written = lines(run_dir)
    assert len(written) == 900
    for line in written:
        rank = re.search(r" rank (\d) ", line)[1]
        assert line.endswith(": " + rank * 1000)


def test_a_full_disk_and_a_closed_terminal_do_not_stop_training(run_dir, monkeypatch):
    log.setup(run_dir, place())
    (handler,) = [handler for handler in logging.getLogger().handlers if isinstance(handler, log.AppendHandler)]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, handler._descriptor)
    os.close(full)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        say()
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), broken.fileno())


def test_a_log_that_cannot_be_opened_is_an_error_that_names_it(run_dir):
    run_dir.node_log(0).mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        log.setup(run_dir, place())
    assert caught.value.filename == str(run_dir.node_log(0))

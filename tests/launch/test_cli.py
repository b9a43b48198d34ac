"""The command line as a person or a script meets it: help, speed, exit codes, one line an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from prottrans_hpc import errors, stage
from prottrans_hpc.launch import cli

PRETRAIN = ("pretrain", "tiny_prot_bert", "--corpus", "corpus")


def run(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-m", "prottrans_hpc.launch.cli", *arguments], cwd=cwd, env=environment, text=True, check=False, **options)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with an index of a corpus."""
    split = {"sequences": 500, "residues": 50_000, "bytes": 0, "shards": []}
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "index.json").write_text(json.dumps({"format": 1, "splits": {"train": split, "validation": split}}))
    return tmp_path


def test_help_names_every_verb_and_exit_code(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout
    for code in (64, 65, 66, 70, 71, 73, 75, 76, 77, 78):
        assert str(code) in done.stdout


VERBS = ["preprocess", "corpus show", "corpus check", "pretrain", "embed", "export", "import", "models", "models list", "models show"]
VERBS += ["plan", "machines", "machines list", "machines show"]
VERBS += ["runs", "runs list", "runs show", "runs logs", "runs cancel", "runs resume"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_examples_that_parse(verb: str, tmp_path: Path) -> None:
    done = run(*verb.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--quiet" in done.stdout and "--verbose" in done.stdout
    lines = [line.strip() for line in done.stdout.partition("Examples:")[2].splitlines() if "prottrans " in line]
    assert lines
    for line in lines:
        words = line.partition("prottrans ")[2].partition(" > ")[0].split()
        command, rest = stage.find(cli.VERBS[words[0]][0]), words[1:]
        if isinstance(command, click.Group) and rest and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(line, rest)  # raises UsageError for what does not parse


def test_help_costs_little_more_than_python(tmp_path: Path) -> None:
    def best_of(argv: list[str]) -> float:
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            subprocess.run(argv, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}, stdout=subprocess.DEVNULL, check=True)
            times.append(time.perf_counter() - begin)
        return min(times)

    bare = best_of([sys.executable, "-c", "import argparse, json, pathlib, subprocess"])
    assert best_of([sys.executable, "-m", "prottrans_hpc.launch.cli", "--help"]) < 5 * bare


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["machines", "show", "summit"], ["plan", "tiny_prot_bert"], [*PRETRAIN, "--dry-run"]])
def test_the_login_node_needs_neither_torch_nor_numpy(arguments: list[str], here: Path) -> None:
    code = (
        "import sys; from prottrans_hpc.launch.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'h5py', 'safetensors'} & sys.modules.keys()), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=here, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


WRONG = [
    ((), 64, "Usage: prottrans"),
    (("preproces",), 64, "did you mean 'preprocess'?"),
    (("frobnicate",), 64, "the verbs are preprocess"),
    (("corpus", "sho", "x"), 64, "show"),
    (("models", "show", "prot_brt"), 64, "did you mean 'prot_bert'?"),
    (("models", "show", "prot_t5_xl"), 64, "is called 'prot_t5_xl' (did you mean 'prot_t5_xl_bfd' or 'prot_t5_xl_u50'?)"),
    (("models", "show", "prot_t5_xxl_u"), 64, "(did you mean 'prot_t5_xxl_u50'?)"),
    (("models", "show", "tiny"), 64, "(with it begin tiny_prot_albert, tiny_prot_bert,"),
    (("models", "show", "preprocess_bfd"), 64, "no architecture, size or recipe is called 'preprocess_bfd'"),
    (("pretrain", "prot_t5_xl", "--corpus", "corpus"), 64, "(did you mean 'prot_t5_xl_bfd' or 'prot_t5_xl_u50'?)"),
    (("preprocess", "--out", "x"), 64, "FASTA"),
    (("preprocess", "a.fasta"), 64, "--out"),
    (("preprocess", "a.fasta", "--out", "x", "--worker", "2"), 64, "--workers"),
    (("preprocess", "a.fasta", "--out", "x", "--workers", "0"), 64, "--workers"),
    (("preprocess", "a.fasta", "--out", "x", "--workers", "2", "--mpi"), 64, "exclude each other"),
    (("preprocess", "a.fasta", "--out", "x", "--validation", "1.5"), 64, "--validation"),
    (("preprocess", "a.fasta", "--out", "x", "--invalid", "ignore"), 64, "skip"),
    (("embed", "run", "a.fasta", "--out", "x.h5", "--pool", "none"), 64, "--per-residue"),
    (("embed", "run", "a.fasta", "--out", "x.h5", "--quiet", "--verbose"), 64, "contradict"),
    (("export", "run", "--to", "tf", "dir"), 64, "hf"),
    (("pretrain", "tiny_prot_bert"), 64, "--corpus"),
    (("pretrain", "tiny_prot_brt", "--corpus", "corpus"), 64, "did you mean 'tiny_prot_bert'?"),
    (("pretrain", "no.toml", "--corpus", "corpus"), 64, "no.toml is not a file"),
    (("pretrain", "tiny_prot_bert", "--corpus", "nothing"), 66, "nothing is no corpus"),
    (("runs", "lst"), 64, "lst"),
    (("runs", "--runs", "nowhere"), 66, "nowhere is no folder"),
    (("runs", "show", "first"), 64, "'first' is neither a run in runs"),
    (("runs", "logs", "corpus"), 64, "there are none"),
    (("runs", "cancel"), 64, "RUN"),
    (("runs", "resume", "first", "--follow", "--detach"), 64, "contradict"),
    ((*PRETRAIN, "--machine", "lapptop"), 64, "did you mean 'laptop'?"),
    ((*PRETRAIN, "--nodes", "0"), 64, "--nodes"),
    ((*PRETRAIN, "--nodes", "two"), 64, "'two'"),
    ((*PRETRAIN, "--nodes", "1000"), 64, "1 to 64 nodes"),
    ((*PRETRAIN, "--steps", "-1"), 64, "--steps"),
    ((*PRETRAIN, "--steps", "201"), 64, "phases.0.steps=201"),
    ((*PRETRAIN, "--set", "optimizer.learning_rat=1"), 64, "did you mean 'learning_rate'?"),
    ((*PRETRAIN, "--set", "optimizer.learning_rate=fast"), 64, "learning_rate"),
    ((*PRETRAIN, "--set", "seed"), 64, "section.key=value"),
    ((*PRETRAIN, "--set", "architecture.name=prot_brt"), 64, "did you mean 'prot_bert'?"),
    ((*PRETRAIN, "--set", "architecture.size=huge"), 64, "tiny"),
    ((*PRETRAIN, "--set", "phases.0.max_residues=5000"), 64, "at most 2558"),
    ((*PRETRAIN, "--run-dir", "."), 64, "is no run directory"),
    ((*PRETRAIN, "--run-dir", "corpus/index.json/run"), 64, "cannot be made"),
    ((*PRETRAIN, "--run-dir", "a run"), 64, "not a usable name"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(case[0]) or "nothing" for case in WRONG])
def test_a_wrong_command_line_is_answered_with_what_is_possible(arguments: tuple[str, ...], code: int, words: str, here: Path) -> None:
    before = sorted(path.name for path in here.rglob("*"))
    done = run(*arguments, cwd=here)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and done.stdout == ""
    if arguments:
        assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.splitlines()[-1]]
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in here.rglob("*")) == before, "a refused command leaves nothing behind"


def test_an_unreadable_place_is_no_permission_or_cannot_write(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(request: stage.Request) -> None:
        raise PermissionError(13, "Permission denied", request["out"])

    answer(monkeypatch, refuse)
    assert cli.main(["export", "run", "--to", "hf", "dir"]) == errors.NO_PERMISSION
    assert capsys.readouterr().err == "error: dir: Permission denied\n"


def answer(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Let the stage `export` do what a test wants."""
    monkeypatch.setattr("prottrans_hpc.launch.options.run_stage", lambda name, request: function(request))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DataError("bad"), 65),
        (errors.CheckpointError("none"), 66),
        (errors.ResourceError("no package"), 71),
        (OSError(28, "No space left on device", "/"), 73),
        (OSError(116, "Stale file handle", "/"), 74),
        (errors.RequeueRequested("stopped"), 75),
        (errors.NumericsError("nan"), 76),
        (errors.IdentityError("other"), 78),
        (MemoryError(), 71),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.\nframe #0: c10"), 71),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_is_one_line_and_its_code(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(request: stage.Request) -> None:
        raise error

    answer(monkeypatch, fail)
    assert cli.main(["export", "run", "--to", "hf", "dir"]) == code
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1


def test_an_unforeseen_error_shows_its_traceback_and_asks_for_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(request: stage.Request) -> None:
        raise ZeroDivisionError("oh\x1b[2J")

    answer(monkeypatch, fail)
    assert cli.main(["export", "run", "--to", "hf", "dir"]) == errors.BUG
    told = capsys.readouterr().err
    assert "Traceback" in told and "report it" in told and "\x1b" not in told


def test_verbose_shows_the_traceback_of_a_foreseen_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(request: stage.Request) -> None:
        raise errors.DataError("bad")

    answer(monkeypatch, fail)
    assert cli.main(["export", "run", "--to", "hf", "dir", "-v"]) == 65
    assert "Traceback" in capsys.readouterr().err


def test_control_characters_never_reach_the_terminal_and_long_messages_stay_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(request: stage.Request) -> None:
        raise errors.DataError("evil \x1b]0;title\x07 \u202e\r\nfake line " + 5000 * "x" + " end")

    answer(monkeypatch, fail)
    assert cli.main(["export", "run", "--to", "hf", "dir"]) == 65
    told = capsys.readouterr().err
    first, second = told.splitlines()
    assert first.startswith("error: evil ") and first.endswith("\\r")
    assert second.startswith("  fake line ") and second.endswith(" end"), "it is indented: it passes for no message of its own"
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(told)


def test_sigterm_unwinds_a_stage_in_order(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from prottrans_hpc.launch import cli, options\n"
        "def stage(name, request):\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally: print('unwound')\n"
        "options.run_stage = stage\n"
        "sys.exit(cli.main(['export', 'run', '--to', 'hf', 'dir']))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (75, "unwound\n")


def test_a_model_says_into_how_many_ranks_its_matrices_can_be_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("prot_txl_bfd", "tensor groups: of 2 ranks"), ("prot_xlnet", "tensor groups: of 2, 4, 8, 16 ranks")):
        assert cli.main(["models", "show", name]) == 0
        assert said in capsys.readouterr().out
    assert cli.main(["models", "show", "prot_txl_bfd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sizes"][0]["tensor_ranks"] == [1, 2]


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run("models", "show", "prot_bert", cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_standard_streams_do_no_harm(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m prottrans_hpc.launch.cli models >&- 2>&-"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=False).returncode == 0


def test_a_full_disk_under_standard_output_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("models", cwd=tmp_path, stdout=full)
    assert done.returncode == 73 and "No space left" in done.stderr


def test_models_shows_one_published_size_by_its_own_name(tmp_path: Path) -> None:
    (size,) = json.loads(run("models", "show", "prot_bert_bfd", "--json", cwd=tmp_path).stdout)["sizes"]
    assert size["name"] == "prot_bert_bfd" and size["errata"]


@pytest.mark.parametrize(("recipe", "family", "size"), [("tiny_prot_t5", "prot_t5", "tiny"), ("small_prot_t5", "prot_t5", "small")])
def test_models_shows_the_size_of_a_recipe(recipe: str, family: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "show", recipe, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], [one["name"] for one in shown["sizes"]]) == (family, [size])


def test_models_counts_parameters_as_published(tmp_path: Path) -> None:
    listed = json.loads(run("models", "--json", cwd=tmp_path).stdout)
    shown = json.loads(run("models", "show", "prot_bert", "--json", cwd=tmp_path).stdout)
    assert shown in listed and listed == json.loads(run("models", "list", "--json", cwd=tmp_path).stdout)
    published = next(size for size in shown["sizes"] if size["name"] == "prot_bert_bfd")
    assert published["parameters"] == 420_984_864 and published["parameters_published"] == 420_000_000 and published["errata"]
    text = run("models", "show", "prot_bert", cwd=tmp_path).stdout
    assert "420,984,864" in text and "erratum: " in text


def test_models_is_a_table_within_80_columns_and_says_nothing_twice(tmp_path: Path) -> None:
    listed = json.loads(run("models", "--json", cwd=tmp_path).stdout)
    lines = run("models", cwd=tmp_path).stdout.splitlines()
    rows = [line for line in lines[1:] if line.startswith("  ")]
    assert [row.split()[0] for row in rows] == [size["name"] for record in listed for size in record["sizes"]]
    assert max(map(len, rows)) <= 80
    ends = {row.index(number) + len(number) for row in rows for number in [row.split()[1]]}
    assert len(ends) == 1, "the numbers stand in one column"
    for record in listed:
        lines = run("models", "show", record["name"], cwd=tmp_path).stdout.splitlines()
        printed = [line.partition("erratum: ")[2] for line in lines if "erratum: " in line]
        said = [size["errata"] for size in record["sizes"] if size["errata"]]
        assert set(printed) == {erratum for errata in said for erratum in errata}
        assert all(printed.count(erratum) == 1 for erratum in printed if all(erratum in errata for errata in said))


@pytest.mark.parametrize("verb", ["preprocess", "pretrain", "embed"])
def test_launchers_are_the_verbs(verb: str, tmp_path: Path) -> None:
    launcher = Path(cli.__file__).parents[2] / "launchers" / f"prottrans-{verb}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(launcher), "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"prottrans {verb}" in done.stdout


def test_version(tmp_path: Path) -> None:
    from prottrans_hpc import __version__

    assert run("--version", cwd=tmp_path).stdout == f"prottrans-hpc {__version__}\n"

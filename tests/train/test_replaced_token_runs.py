"""ELECTRA through the real training loop: both losses are measured, the same for any number of ranks and size of micro batches."""

from __future__ import annotations

import pytest

SETTINGS = ("phases.0.steps=4", "validation.every_steps=4", "checkpoint.every_steps=4")
PARTS = ("generator_loss", "discriminator_loss")


def test_both_losses_are_measured_and_depend_neither_on_ranks_nor_on_micro_batches(tmp_path, make_run, start_ranks, outcome):
    found = []
    for num_ranks, bin_residues in ((1, 64), (2, 64), (1, 4096)):
        folder = tmp_path / f"{num_ranks}-{bin_residues}"
        make_run(folder, *SETTINGS, f"loading.bin_residues={bin_residues}", num_ranks=num_ranks, name="tiny_prot_electra")
        start_ranks(folder, num_ranks).end(0)
        found.append(outcome(folder)["metrics"] + outcome(folder)["validation"])
    wanted, *others = found
    assert len(wanted) == 5
    for line in wanted:
        assert line["loss"] == pytest.approx(line["generator_loss"] + 50.0 * line["discriminator_loss"], rel=1e-6)
        assert line["generator_loss"] > 2.0
        assert 0.1 < line["discriminator_loss"] < 1.0
    for lines in others:
        for line, reference in zip(lines, wanted, strict=True):
            assert [line[name] for name in ("loss", *PARTS)] == pytest.approx([reference[name] for name in ("loss", *PARTS)], rel=1e-5)
            assert (line["num_targets"], line["accuracy"]) == (reference["num_targets"], pytest.approx(reference["accuracy"], abs=0.01))

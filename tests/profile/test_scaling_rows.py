"""What is made of measured steps: means, intervals, overhead, MFU, and the nodes that stand out."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prottrans_hpc.profile.scaling import PARTS, NodeShare, read_scaling
from prottrans_hpc.profile.scaling_rows import COLUMNS, cell, csv_text, outliers_of, rows_of

SAMPLE = Path(__file__).with_name("scaling.json")


@pytest.fixture
def study():
    return read_scaling(SAMPLE)


def test_the_rows_are_means_over_repetitions_and_steps(study):
    rows = {row.nodes: row for row in rows_of(study)}
    assert list(rows) == [1, 2, 4, 8]
    times = {nodes: [seconds for point in study.at(nodes) for seconds in point.step_s] for nodes in rows}
    for nodes, row in rows.items():
        assert row.step_s == pytest.approx(statistics.mean(times[nodes]))
        assert row.overhead == pytest.approx(statistics.mean(times[nodes]) / statistics.mean(times[1]) - 1)
        assert row.efficiency == pytest.approx(1 / (1 + row.overhead))
        assert sum(getattr(row, name) for name in PARTS) == pytest.approx(row.step_s, rel=1e-5)
        assert row.step_s_low < row.step_s < row.step_s_high
    assert (rows[1].overhead, rows[1].overhead_low, rows[1].overhead_high) == (0.0, 0.0, 0.0)
    residues = sum(sum(point.residues) for point in study.at(8))
    assert rows[8].residues_per_s == pytest.approx(residues / sum(times[8]))


def test_the_intervals_hold_the_truth_about_as_often_as_they_say(study):
    """Repetitions of a known distribution: 95 % intervals of 60 studies miss its ratio seldom; with one tenth of the noise they are ten times as narrow."""
    generator, base, template = np.random.default_rng(7), study.at(1)[0], study.at(2)[0]
    misses, widths = 0, {0.05: [], 0.005: []}
    for noise in widths:
        for _ in range(30):
            points = [
                replace(one, repetition=number, step_s=tuple(mean * np.exp(generator.normal(0, noise, one.steps))))
                for number in range(1, 6)
                for one, mean in ((base, 1.0), (template, 1.1))
            ]
            row = rows_of(replace(study, points=tuple(points)))[1]
            misses += not row.overhead_low <= 0.1 <= row.overhead_high
            widths[noise].append(row.overhead_high - row.overhead_low)
    assert misses <= 10
    assert statistics.mean(widths[0.05]) == pytest.approx(10 * statistics.mean(widths[0.005]), rel=0.2)


def test_a_strong_study_counts_the_time_of_all_nodes(study):
    strong = {row.nodes: row for row in rows_of(replace(study, mode="strong"))}
    weak = {row.nodes: row for row in rows_of(study)}
    assert strong[4].overhead == pytest.approx(4 * (1 + weak[4].overhead) - 1)


def test_the_smallest_size_is_what_is_compared_with(study):
    rows = rows_of(replace(study, points=tuple(point for point in study.points if point.nodes > 1)))
    assert [row.nodes for row in rows] == [2, 4, 8]
    assert rows[0].overhead == 0.0


def test_mfu_is_blank_unless_peak_and_flops_are_known(study):
    assert {row.mfu for row in rows_of(study)} == {None}
    points = tuple(replace(point, flops=(2e12 * point.ranks,) * point.steps, step_s=(0.5,) * point.steps) for point in study.points)
    assert {row.mfu for row in rows_of(replace(study, points=points))} == {None}
    known = rows_of(replace(study, points=points, peak_tflops_rank=10.0))
    assert [row.mfu for row in known] == [pytest.approx(0.4)] * 4


def test_the_slow_node_is_named(study):
    (found,) = outliers_of(study)
    assert (found.nodes, found.node, found.host, found.num_runs, found.of_runs) == (8, 5, "n6", 3, 3)
    assert found.factor == pytest.approx(1.15, rel=0.02)
    once = tuple(
        point if point.repetition == 1 else replace(point, per_node=tuple(NodeShare(s.node, s.host, 1.0) for s in point.per_node)) for point in study.points
    )
    assert outliers_of(replace(study, points=once)) == []


def test_of_two_nodes_the_slower_one_stands_out(study):
    two = tuple(replace(point, per_node=(NodeShare(0, "a", 1.0), NodeShare(1, "b", 1.3))) for point in study.at(2))
    (found,) = outliers_of(replace(study, points=(*study.at(1), *two)))
    assert (found.host, found.factor) == ("b", pytest.approx(1.3))


def test_the_table_has_the_agreed_columns(study):
    text = csv_text(rows_of(study))
    table = list(csv.DictReader(text.splitlines()))
    assert tuple(table[0]) == COLUMNS
    assert text.splitlines()[0].startswith(
        "nodes,ranks,step_s,step_s_low,step_s_high,overhead,overhead_low,overhead_high,efficiency,residues_per_s,mfu,data_wait_s,"
    )
    assert [row["mfu"] for row in table] == [""] * 4
    for row, written in zip(rows_of(study), table, strict=True):
        assert float(written["overhead"]) == pytest.approx(row.overhead, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("value", "text"), [(None, ""), (8, "8"), (0.0, "0"), (1 / 3, "0.33333"), (123456.7, "123457"), (-0.5, "-0.5")])
def test_a_number_as_it_is_shown(value, text):
    assert cell(value) == text

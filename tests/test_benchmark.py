"""The parts of the benchmark that are quick run through, with figures that can be."""

from dataclasses import replace

import benchmark
import pytest


@pytest.mark.parametrize("part", ["verify", "client"])
def test_a_part_runs_through(part, tmp_path):
    sizes = replace(benchmark.SMALL, cpu_batch_sizes=(4,))
    settings = benchmark.Settings(
        folder=tmp_path / part, sizes=sizes, server="", model=""
    )
    rows = benchmark.PARTS[part](settings)
    assert rows
    for row in rows:
        figures = [value for value in row.values() if isinstance(value, (int, float))]
        assert any(figure > 0 for figure in figures)

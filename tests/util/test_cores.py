"""How many threads a container's CPU limit leaves."""

from __future__ import annotations

import pytest

from quire.util import cores


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),  # a fifth of a core is one thread
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "0\n"}, None),
    ],
)
def test_the_quota_of_the_control_group(tmp_path, monkeypatch, files, limit) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cores, "CONTROL_GROUP", tmp_path)
    assert cores.quota() == limit
    monkeypatch.setattr(cores, "physical_cores", lambda: [{number} for number in range(16)])
    assert cores.default_threads() == (limit or 16)
    assert cores.default_threads(2) == (max(1, limit // 2) if limit else 16)

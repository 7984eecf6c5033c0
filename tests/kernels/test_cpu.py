"""What is told of the machine that a latency was measured on."""

import pytest

from raysq.kernels import cpu


@pytest.mark.parametrize(("told", "governor"), [("performance\n", "performance"), ("", None), (None, None)])
def test_the_governor_is_known_where_the_system_tells(tmp_path, monkeypatch, told, governor):
    monkeypatch.setattr(cpu, "GOVERNOR", tmp_path / "scaling_governor")
    if told is not None:
        cpu.GOVERNOR.write_text(told)
    assert cpu.governor() == governor

"""Who is told that bfloat16 is emulated."""

import pytest

from cmpe_se.layers import precision
from cmpe_se.layers.precision import emulation_warning, has_bfloat16

CPUS = {  # a line of /proc/cpuinfo, and whether that CPU has bfloat16
    "AVX2": ("flags\t\t: fpu sse2 avx2 fma", False),
    "AVX-512": ("flags\t\t: fpu avx512f avx512_vnni", False),
    "Cooper Lake": ("flags\t\t: fpu avx512f avx512_bf16", True),
    "Sapphire Rapids": ("flags\t\t: fpu amx_bf16 amx_tile", True),
    "Graviton 2": ("Features\t: fp asimd sve", False),
    "Graviton 3": ("Features\t: fp asimd sve bf16", True),
    "says nothing": ("model name\t: bf16", None),
}


@pytest.fixture(params=CPUS.values(), ids=CPUS)
def cpu(request, tmp_path):
    line, has = request.param
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\nprocessor\t: 1\n{line}\n")
    return tmp_path / "cpuinfo", has


def test_what_linux_says(cpu, tmp_path):
    path, has = cpu
    assert has_bfloat16(path) is has
    assert has_bfloat16(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("name", "device", "has", "warns"),
    [
        ("bfloat16", "cpu", False, True),
        ("bfloat16", "cpu", True, False),
        ("bfloat16", "cpu", None, False),
        ("float32", "cpu", False, False),
        ("bfloat16", "cuda", False, False),
    ],
)
def test_only_emulation_is_warned_of(name, device, has, warns, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: has)
    warning = emulation_warning(name, device)
    assert bool(warning) == warns
    if warns:
        assert "14 times" in warning
        assert "times here say nothing about CPUs that have them" in warning
        assert "float32" in warning


@pytest.mark.parametrize(("name", "times"), [("bfloat16", 1), ("float32", 0)])
def test_training_begins_with_it(name, times, monkeypatch, caplog, tmp_path):
    from cmpe_se.errors import UserError
    from cmpe_se.training import train

    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    with pytest.raises(UserError, match="no network"):  # found out after the warning, before any step
        train(precision=name, device="cpu", model="nonsense", output=tmp_path / "run")
    assert sum("emulates" in record.message for record in caplog.records) == times

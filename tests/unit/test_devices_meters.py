"""Meters: counters that wrap, stop or are forbidden; models that say so and add up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.devices.cpu_model import CpuModelMeter, CpuPowerModel, CpuSeconds, calibrated, cgroup_seconds
from trireme.devices.cpu_power_table import UNKNOWN, package_power
from trireme.devices.inventory import Cpu, cgroup_quota_cpus, read_cpu, take_inventory
from trireme.devices.meter_selection import Calibration, open_meters
from trireme.devices.meters import MeterUnreadable
from trireme.devices.modelled_nvml import ModelledGpu, ModelledNvml
from trireme.devices.nvml import CudaDevice, NvmlMeter
from trireme.devices.rapl import RaplMeter


class HandClock:
    """Time moved by hand."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def unix_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s


def package(root: Path, number: int, energy_uj: int, *, range_uj: int = 999_999, cap_uw: int = 0) -> Path:
    zone = root / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"package-{number}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    if cap_uw:
        (zone / "constraint_0_max_power_uw").write_text(f"{cap_uw}\n")
    return zone


# --- RAPL


def test_rapl_sums_packages_and_leaves_subdomains_out(tmp_path: Path) -> None:
    package(tmp_path, 0, 400_000, cap_uw=200_000_000)
    package(tmp_path, 1, 100_000, cap_uw=150_000_000)
    core = tmp_path / "intel-rapl:0:0"
    core.mkdir()
    (core / "name").write_text("core")
    (core / "energy_uj").write_text("90000")
    meter = RaplMeter(tmp_path)
    assert meter.read_joules() == 0.5
    assert meter.limits.max_w == 350.0


@given(steps=st.lists(st.integers(0, 999_999), min_size=1, max_size=50))
def test_rapl_follows_its_counter_over_any_number_of_wraps(steps: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        zone = package(Path(folder), 0, 0)
        meter = RaplMeter(Path(folder))
        true_uj = 0
        for step_uj in steps:
            true_uj += step_uj
            (zone / "energy_uj").write_text(str(true_uj % 1_000_000))
            assert meter.read_joules() == pytest.approx(true_uj / 1e6)


def test_rapl_that_is_absent_or_forbidden_or_broken_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MeterUnreadable, match="no RAPL package"):
        RaplMeter(tmp_path)
    zone = package(tmp_path, 0, 5)
    (zone / "energy_uj").write_text("lots")
    with pytest.raises(MeterUnreadable, match="not a number"):
        RaplMeter(tmp_path)

    plain = Path.read_text

    def refuse(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return plain(path, *args, **kwargs)  # type: ignore[arg-type]

    # Tests may run as root, for whom no file mode denies anything.
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MeterUnreadable, match="not permitted"):
        RaplMeter(tmp_path)
    meters = open_meters("auto", ["cpu"], calibration=Calibration(), powercap=tmp_path)
    assert [meter.name for meter in meters] == ["cpu-model"]
    with pytest.raises(MeterUnreadable):
        open_meters("rapl", ["cpu"], calibration=Calibration(), powercap=tmp_path)


def test_auto_takes_rapl_where_it_can_be_read(tmp_path: Path) -> None:
    package(tmp_path, 0, 5)
    meters = open_meters("auto", ["null", "cpu"], calibration=Calibration(), powercap=tmp_path)
    assert [(meter.name, meter.device) for meter in meters] == [("rapl", "cpu")]


# --- NVML


def gpus(clock: HandClock, *models: ModelledGpu) -> tuple[ModelledNvml, tuple[CudaDevice, ...]]:
    nvml = ModelledNvml(models, clock)
    return nvml, nvml.devices()


def test_a_modelled_gpu_draws_by_its_utilisation() -> None:
    clock = HandClock()
    nvml, (gpu,) = gpus(clock, ModelledGpu(idle_w=100.0, power_limit_w=500.0))
    meter = NvmlMeter(nvml, gpu, clock=clock)
    start_j = meter.read_joules()
    clock.now_s += 10
    nvml.set_utilisation(0, 0.5)
    clock.now_s += 10
    nvml.set_utilisation(0, 0.0)
    clock.now_s += 10
    assert meter.read_joules() - start_j == pytest.approx(10 * 100 + 10 * 300 + 10 * 100)
    assert meter.limits.max_w == 500.0


def test_a_board_without_an_energy_counter_is_integrated_from_its_power() -> None:
    clock = HandClock()
    nvml, (gpu,) = gpus(clock, ModelledGpu(idle_w=100.0, power_limit_w=500.0, has_energy_counter=False))
    meter = NvmlMeter(nvml, gpu, clock=clock)
    nvml.set_utilisation(0, 1.0)
    clock.now_s += 2
    assert meter.read_joules() == pytest.approx(2 * (100 + 500) / 2)
    clock.now_s += 1
    assert meter.read_joules() == pytest.approx(600 + 500)
    assert meter.epoch != NvmlMeter(nvml, gpu, clock=clock).epoch, "an integral ends with its process"


def test_mig_slices_share_their_boards_meter_and_an_absent_gpu_is_left_out() -> None:
    clock = HandClock()
    nvml, _ = gpus(clock, ModelledGpu(), ModelledGpu())
    slices = ["cuda:1/mig:0", "cuda:1/mig:1"]
    meters = open_meters("auto", slices, calibration=Calibration(), nvml=nvml)
    assert [meter.device for meter in meters] == ["cuda:1"]
    assert open_meters("auto", ["cuda:7"], calibration=Calibration(), nvml=nvml) == ()
    with pytest.raises(MeterUnreadable, match="cuda:7"):
        open_meters("nvml", ["cuda:7"], calibration=Calibration(), nvml=nvml)


# --- the CPU model


MODEL = CpuPowerModel(idle_w=2.0, max_w=10.0, cpus=4.0)


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_linear_model_does_not_depend_on_how_often_it_is_read(spans: list[tuple[float, float]]) -> None:
    elapsed_s = busy_s = 0.0
    trail = [CpuSeconds(0.0, 0.0)]
    for length_s, utilisation in spans:
        elapsed_s += length_s
        busy_s += length_s * utilisation * MODEL.cpus
        trail.append(CpuSeconds(busy_s, elapsed_s))
    moments = iter(trail)
    often = CpuModelMeter(MODEL, seconds=lambda: next(moments), part="test", life="x")
    readings = [often.read_joules() for _ in trail]
    once = CpuModelMeter(MODEL, seconds=lambda: trail[-1], part="test", life="x")
    assert readings == sorted(readings)
    assert once.read_joules() == pytest.approx(readings[-1])
    assert once.epoch == often.epoch


def test_a_bent_model_starts_a_new_life_in_each_process() -> None:
    bent = CpuPowerModel(idle_w=2.0, max_w=10.0, cpus=1.0, alpha=0.8)

    def meter() -> CpuModelMeter:
        return CpuModelMeter(bent, seconds=lambda: CpuSeconds(0.0, 1.0), part="test", life="x")

    assert meter().epoch != meter().epoch
    assert bent.draw_w(0.5) == pytest.approx(2 + 8 * 0.5**0.8)
    assert (bent.draw_w(-1.0), bent.draw_w(7.0)) == (2.0, 10.0)


def cpu(**changes: object) -> Cpu:
    fields: dict[str, object] = {
        "vendor": "AuthenticAMD",
        "family": 26,
        "model": 2,
        "name": "AMD EPYC",
        "logical_cpus": 2,
        "threads_per_core": 1,
        "usable_cpus": 2.0,
        "virtual": True,
    }
    return Cpu(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_slice_of_a_package_draws_its_share_of_the_package() -> None:
    model = calibrated(cpu())
    assert [model.max_w, model.idle_w] == pytest.approx([500 * 2 / 128, 500 * 2 / 128 / 4])
    assert calibrated(cpu(threads_per_core=2)).max_w == pytest.approx(500 * 1 / 128)
    assert calibrated(cpu(usable_cpus=0.5)).max_w == pytest.approx(500 * 0.5 / 128)


def test_measured_constants_replace_the_tables() -> None:
    model = calibrated(cpu(), idle_w=3.0, max_w=15.0)
    assert (model.idle_w, model.max_w) == (3.0, 15.0)


def test_an_unknown_cpu_is_assumed_and_says_so() -> None:
    assert package_power(vendor="", family=0, model=0) is UNKNOWN
    assert UNKNOWN.source == "assumed"
    assert package_power(vendor="AuthenticAMD", family=25, model=0x11).cores == 96


# --- inventory


def test_the_inventory_of_this_machine() -> None:
    found = take_inventory()
    assert found.cpu.logical_cpus >= 1
    assert 0 < found.cpu.usable_cpus <= (os.cpu_count() or 1)
    assert found.memory_bytes > 0


def test_cpuinfo_is_read_and_its_absence_survived(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    block = (
        "processor\t: {}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
        "model name\t: Xeon\nsiblings\t: 4\ncpu cores\t: 2\nflags\t\t: fpu hypervisor\n\n"
    )
    info.write_text("".join(block.format(number) for number in range(4)))
    found = read_cpu(info, tmp_path)
    assert (found.vendor, found.family, found.model) == ("GenuineIntel", 6, 143)
    assert (found.logical_cpus, found.threads_per_core, found.virtual) == (4, 2, True)
    assert read_cpu(tmp_path / "absent", tmp_path).family == 0


def test_a_containers_quota_and_use_are_read_from_its_cgroup(tmp_path: Path) -> None:
    assert cgroup_quota_cpus(tmp_path) == float("inf")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota_cpus(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota_cpus(tmp_path) == float("inf")
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert cgroup_seconds(tmp_path).busy_s == 2.5
    (tmp_path / "cpu.stat").write_text("nothing here\n")
    with pytest.raises(MeterUnreadable):
        cgroup_seconds(tmp_path)

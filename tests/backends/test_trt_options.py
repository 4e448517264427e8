"""A profile's options become the builder's settings: flags, limits, batch ranges, the timing cache."""

import pytest

from rdeploy.backends import _trt_options
from rdeploy.errors import ConfigError, Unsupported

VERSIONS = ("8.5", "8.6", "10.3", "10.13", "10.16", "11.4")


def configured(flavour, calls, **options):
    config = flavour.trt.Builder(None).create_builder_config()
    calls.clear()
    _trt_options.configure(flavour.title, flavour.trt, config, _trt_options.BuildOptions(**options))
    return calls


@pytest.mark.parametrize("version", VERSIONS)
def test_options_that_are_not_given_touch_nothing(fake, version):
    assert configured(*fake(version)) == []


def test_options_become_the_builders_settings(fake, flags_set):
    flavour, calls = fake("11.4")

    configured(
        flavour, calls, workspace_mb=64, optimization_level=5, tf32=False, sparse_weights=True, refit=True,
        strip_weights=True, version_compatible=True,
    )  # fmt: skip

    assert ("config.set_memory_pool_limit", flavour.trt.MemoryPoolType.WORKSPACE, 64 << 20) in calls
    assert ("config.builder_optimization_level", 5) in calls
    assert ("config.clear_flag", flavour.trt.BuilderFlag.TF32) in calls
    assert flags_set(flavour, calls) == [
        "SPARSE_WEIGHTS", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME",
    ]  # fmt: skip


def test_the_lean_runtime_comes_along_only_when_it_is_asked_for(fake, flags_set):
    flavour, calls = fake("10.16")

    configured(flavour, calls, version_compatible=True, lean_runtime=True)

    assert flags_set(flavour, calls) == ["VERSION_COMPATIBLE"]


@pytest.mark.parametrize(
    ("version", "options", "error", "message"),
    [
        ("8.5", {"optimization_level": 3}, Unsupported, "TensorRT 8.5.2.2 has no optimization_level, it came with 8.6"),
        (
            "8.5",
            {"version_compatible": True},
            Unsupported,
            "TensorRT 8.5.2.2 has no version_compatible, it came with 8.6",
        ),
        ("8.6", {"strip_weights": True}, Unsupported, "TensorRT 8.6.0 has no strip_weights, it came with 10.0"),
        ("10.3", {"optimization_level": 6}, ConfigError, "optimization_level must be 0 to 5, not 6"),
        ("10.3", {"workspace_mb": 0}, ConfigError, "workspace_mb must be 1 or more, not 0"),
        ("10.3", {"lean_runtime": True}, ConfigError, "lean_runtime needs version_compatible"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_words(fake, version, options, error, message):
    with pytest.raises(error) as caught:
        configured(*fake(version), **options)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sizes", "ranges"),
    [
        ({}, (2, 1, 8), ((1, 2, 8),)),
        ({"profile_per_batch": True}, (8, 1, 32, 8), ((1, 1, 1), (2, 8, 8), (9, 32, 32))),
        ({"profile_per_batch": True}, (4,), ((4, 4, 4),)),
        ({"batch_ranges": ((1, 1, 4), (5, 16, 64))}, (1, 64), ((1, 1, 4), (5, 16, 64))),
    ],
)
def test_batch_ranges(options, sizes, ranges):
    assert _trt_options.batch_ranges(_trt_options.BuildOptions(**options), sizes) == ranges


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (((4, 1, 8),), r"batch_ranges are \[smallest, tuned for, largest\], not \[4, 1, 8\]"),
        (((1, 2),), r"not \[1, 2\]"),
        (((0, 1, 2),), r"not \[0, 1, 2\]"),
        (((1, 1, 4),), r"batch 8 of the target is in none of the batch_ranges \[\[1, 1, 4\]\]"),
    ],
)
def test_batch_ranges_that_cannot_be_are_refused(ranges, message):
    with pytest.raises(ConfigError, match=message):
        _trt_options.batch_ranges(_trt_options.BuildOptions(batch_ranges=ranges), (1, 8))


def test_what_another_build_measured_meanwhile_is_kept(fake, tmp_path):
    flavour, calls = fake("10.3")
    config = flavour.trt.Builder(None).create_builder_config()
    cache = tmp_path / "one.cache"

    with _trt_options.timing_cache(config, cache):
        cache.write_bytes(b"others")

    assert ("config.create_timing_cache", b"others") in calls
    assert [call[0] for call in calls if call[0] == "timing.combine"] == ["timing.combine"]


def test_a_timing_cache_is_for_one_version_on_one_kind_of_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("RDEPLOY_CACHE", str(tmp_path))

    path = _trt_options.timing_cache_path("tensorrt", "10.3.0", "NVIDIA L4")

    assert path == tmp_path / "timing" / "tensorrt-10.3.0-nvidia-l4.cache"

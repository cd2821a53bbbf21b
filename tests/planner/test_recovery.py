import pytest

from llama4_dist.errors import ConfigError
from llama4_dist.planner.hardware import GB, HARDWARE
from llama4_dist.planner.recovery import reload_s


@pytest.mark.parametrize(
    ("gigabytes", "source", "seconds"),
    [
        (113.6, "peer", 2.8),
        (113.6, "nvlink", 0.32),
        (113.6, "host", 2.1),
        (113.6, "storage", 9.5),
        (1.183, "host", 0.0215),  # one layer of a Behemoth expert
        (6.04, "peer", 0.15),
        (3.02, "peer", 0.075),
        (16 * 3.02, "peer", 1.2),
    ],
)
def test_reloading_takes_the_published_time(gigabytes: float, source: str, seconds: float) -> None:
    assert reload_s(gigabytes * GB, HARDWARE["H200"], source) == pytest.approx(seconds, rel=0.03)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="tape"):
        reload_s(1.0, HARDWARE["H200"], "tape")

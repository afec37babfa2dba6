"""Gates that no longer depend on the image: what they are then, what that changes, and which of them it costs least."""

from cmpe_se.static_gates.calibration import Calibration, with_static_gates

__all__ = ["Calibration", "with_static_gates"]

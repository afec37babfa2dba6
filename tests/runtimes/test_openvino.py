"""OpenVINO in a process that is to be interrupted."""

import subprocess
import sys

import pytest

pytest.importorskip("openvino", reason="an extra")

NETWORKS_THAT_GO = """
import gc, signal
import numpy
from openvino import Model, opset8
from cmpe_se.runtimes.exported import openvino_network

def network():
    given = opset8.parameter([1, 3], numpy.float32)
    return openvino_network(Model([opset8.relu(given)], [given]))

networks = [network(), network()]
while networks:
    networks.pop(0)
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.long
def test_a_signal_after_networks_have_gone_is_handled():
    """Each ``openvino.Core`` changes the stack for signals: the second one to go would leave the first one's, freed."""
    done = subprocess.run([sys.executable, "-c", NETWORKS_THAT_GO], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr

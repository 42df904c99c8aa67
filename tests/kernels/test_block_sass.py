import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("compile_block_linear.py")
# Tensor cores of Ampere, Hopper and Blackwell.
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")


@pytest.fixture(scope="module")
def compiled():
    """capability -> what the script prints for it; all GPUs at once."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    commands = {gpu: [sys.executable, "-W", "ignore", str(SCRIPT), str(gpu)] for gpu in (80, 90, 100)}
    running = {
        gpu: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for gpu, command in commands.items()
    }
    results = {gpu: (*process.communicate(), process.returncode) for gpu, process in running.items()}
    for _, complaint, status in results.values():
        assert status == 0, complaint
    return {gpu: json.loads(output) for gpu, (output, _, _) in results.items()}


@pytest.fixture(params=(80, 90, 100))
def kernels(compiled, request):
    return compiled[request.param]


@pytest.fixture
def products(kernels):
    return [kernel for kernel in kernels if kernel["kernel"] == "product"]


def counts(instructions, *starts):
    """How often instructions with these first parts occur, and with which further parts."""
    return Counter({name: count for name, count in instructions.items() if name.split(".")[0] in starts})


def test_nothing_is_spilled(kernels):
    for kernel in kernels:
        assert kernel["STACK"] == kernel["LOCAL"] == 0, kernel
        assert not counts(kernel["instructions"], "LDL", "STL"), kernel


def test_weights_and_inputs_are_loaded_by_128_bits_without_registers(products):
    for kernel in products:
        loads = counts(kernel["loop"], "LDGSTS")
        assert loads, kernel
        assert all(name.endswith("128") for name in loads), kernel
        # Beside these the loop loads the next columns, one scalar for each block of a step.
        chosen = kernel["configuration"]
        columns = max(1, chosen["step"] // kernel["block"])
        assert counts(kernel["loop"], "LDG")["LDG.E"] == columns, kernel


def test_as_many_steps_are_in_flight_as_the_configuration_says(products):
    for kernel in products:
        chosen = kernel["configuration"]
        in_loop, overall = (counts(kernel[where], "LDGSTS").total() for where in ("loop", "instructions"))
        assert overall >= chosen["stages"] * in_loop, kernel


def test_half_precision_runs_on_tensor_cores_and_float32_does_not(products):
    for kernel in products:
        used = counts(kernel["instructions"], *TENSOR_CORES).total()
        assert (used > 0) == (kernel["dtype"] != "fp32"), kernel


def test_large_tiles_use_the_instructions_of_their_generation(compiled):
    for gpu, instruction in ((90, "HGMMA"), (100, "UTCHMMA")):
        large = [kernel for kernel in compiled[gpu] if kernel.get("block", 0) >= 64 and kernel["dtype"] != "fp32"]
        assert large
        assert all(counts(kernel["instructions"], instruction) for kernel in large)


def test_no_layout_is_converted_in_the_loop(products):
    assert all(kernel["conversions"] == 0 for kernel in products)


def test_results_are_stored_by_128_bits(products):
    for kernel in products:
        assert set(counts(kernel["instructions"], "STG")) == {"STG.E.128"}, kernel

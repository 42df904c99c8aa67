"""What the compiler makes of the decode kernel, on every supported GPU generation and in every configuration in use.

If Triton chose another layout for a fragment, or converted one on the way, mma.sp would run on the wrong registers
without an error: so the loads of 128 bits and the absence of conversions are conditions of correctness, not of speed.
"""

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")

from compile_ahead import compile_all

from llmprune.kernels.nm_linear.decode import CHOICES, EXCHANGED_GROUPS

# The compilations take a minute on two cores of one's own, and belong to whichever test comes first.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CAPABILITIES = [80, 90, 100]
# A step of 256 inputs, by 16 rows, among 32 lanes; counted in fours.
FOURS_PER_LANE = 256 * 16 / 32 / 4


def job(capability, groups, warps, row_tiles, half="bf16", splits=1, bias=True):
    kind = {"bf16": "*bf16", "f16": "*fp16"}[half]
    return {
        "kernel": "llmprune.kernels.nm_linear.decode:_decode_kernel",
        "capability": capability,
        "arguments": {
            **dict.fromkeys(("x", "a", "e"), "*i32"),
            "bias": kind,
            "y": kind if splits == 1 else "*fp32",
            **dict.fromkeys(("tokens", "rows", "eighths"), "i32"),
        },
        "constants": {
            "HALF": half, "GROUPS": groups, "ROW_TILES": row_tiles, "WARPS": warps, "SPLITS": splits,
            **({} if bias else {"bias": None}),
        },
        "warps": warps,
        "options": {"num_stages": 1},
    }  # fmt: skip


JOBS = [
    job(capability, groups, *choice)
    for groups in sorted(CHOICES, reverse=True)
    for choice in CHOICES[groups]
    for capability in CAPABILITIES
] + [job(90, groups, *CHOICES[groups][-1], half="f16", splits=3, bias=False) for groups in (1, 4)]


def name(job):
    constants = job["constants"]
    return "sm_{}-{}-{}x8-w{}-r{}-s{}".format(
        job["capability"], *(constants[key] for key in ("HALF", "GROUPS", "WARPS", "ROW_TILES", "SPLITS"))
    )


@pytest.fixture(scope="module")
def compiled():
    """Everything at once, since each process takes seconds to start."""
    return dict(zip(map(name, JOBS), compile_all(JOBS), strict=True))


def count(opcodes, start, end=""):
    return sum(n for opcode, n in opcodes.items() if opcode.startswith(start) and opcode.endswith(end))


@pytest.mark.parametrize("job", JOBS, ids=name)
def test_fragments_go_from_memory_to_the_tensor_core(job, compiled):
    found, constants = compiled[name(job)], job["constants"]
    groups, row_tiles = constants["GROUPS"], constants["ROW_TILES"]
    loop = found["loop"]
    assert found["STACK"] == 0
    assert found["LOCAL"] == 0
    assert found["conversions"] == 0
    assert count(loop, "LDS") + count(loop, "STS") + count(loop, "LDSM") + count(loop, "BAR") == 0, "no shared memory"
    # A round: 8 products for each row tile and group; 8 words of weights and one of metadata; 8 of activations.
    assert count(loop, "HMMA.SP.16832.F32") == 8 * row_tiles * groups
    assert count(loop, "HMMA") == count(loop, "HMMA.SP.16832.F32")
    assert count(loop, "LDG.E", ".128") == 9 * row_tiles + 8 * groups
    assert count(loop, "LDG") == count(loop, "LDG.E", ".128"), "no narrower load"
    assert count(loop, "SHFL") == (32 * groups if groups <= EXCHANGED_GROUPS.value else 0)
    if groups == 1:
        assert sum(loop.values()) / row_tiles / FOURS_PER_LANE <= 10


def test_registers_leave_room_for_two_programs_of_the_common_configurations(compiled):
    """65,536 registers per multiprocessor; loads of one program wait while the other adds its warps up."""
    for warps in (4, 8):
        assert 2 * 32 * warps * compiled[f"sm_90-bf16-1x8-w{warps}-r1-s1"]["REG"] <= 65536


def test_the_helpers_have_a_place_to_look(compiled):
    """Counts of zero would pass for a listing that was not understood."""
    for found in compiled.values():
        assert count(found["instructions"], "EXIT") >= 1
        assert count(found["instructions"], "LDS") >= 1, "the sum over the warps"
        assert found["REG"] > 32


def test_activations_are_brought_into_order_without_spilling():
    jobs = [
        {
            "kernel": "llmprune.kernels.nm_linear.decode:_activation_kernel", "capability": capability,
            "arguments": {"x": "*i32", "fragments": "*i32", "tokens": "i32", "width": "i32"},
            "constants": {}, "warps": 4,
        }
        for capability in CAPABILITIES
    ]  # fmt: skip
    for found in compile_all(jobs):
        assert found["STACK"] == found["LOCAL"] == 0

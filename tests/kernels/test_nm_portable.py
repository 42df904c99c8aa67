"""Run as a script, this file compiles the kernels for GPUs and prints what came out; the tests start it as one."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from test_nm_expand import DEVICE, PLACES

from llmprune.kernels.nm_linear.portable import (
    PortableConfiguration,
    choose_default,
    linear_24_decode_portable,
    workspace_bytes,
)
from llmprune.kernels.nm_linear.reference import dense_24_reference

CAPABILITIES = (80, 90, 100)
TOKENS = (1, 32, 64)


@pytest.fixture(autouse=True)
def exact_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as its bits, multiplies those, and rounds towards zero; do better for a test."""
    if DEVICE != "cpu":
        return
    import mma_sp_emulation
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    mma_sp_emulation.install(monkeypatch)
    multiply = InterpreterBuilder.create_dot

    def value(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: multiply(self, value(a), value(b), *rest)
    )


def operands(tokens, rows, columns, dtype):
    generator = torch.Generator().manual_seed(tokens * 1000 + rows + columns)
    values = torch.randn(rows, columns // 2, generator=generator).to(dtype)
    nibbles = (PLACES @ torch.tensor([1, 4]))[torch.randint(0, 6, (rows, columns // 4), generator=generator)]
    values[:, ::3] = 0  # groups with fewer than two non-zeros
    meta = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    return [tensor.to(DEVICE) for tensor in (x, values, meta, bias)]


def run(x, values, meta, bias, configuration):
    needed = workspace_bytes(len(x), len(meta), configuration) // 4
    workspace = torch.full((needed + 1,), torch.nan, device=x.device)
    y = linear_24_decode_portable(x, values, meta, bias, configuration, workspace)
    assert workspace[-1].isnan(), "wrote beyond its workspace"
    return y


def check(x, values, meta, bias, configuration):
    y = run(x, values, meta, bias, configuration)
    dense = dense_24_reference(values, meta)
    exact = torch.nn.functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
    eager = torch.nn.functional.linear(x, dense, bias)
    assert y.dtype == x.dtype
    assert not y.isnan().any()
    ours, theirs = ((result.double() - exact).abs().max() for result in (y, eager))
    # Floor: half a unit in the last place of the largest result, which eager may meet by luck.
    assert ours <= 2 * theirs + torch.finfo(x.dtype).eps / 2 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 16, 256), (3, 24, 72), (5, 1, 8), (9, 40, 264), (33, 100, 520), (64, 64, 1000)]
)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_kernel_equals_the_formula(tokens, rows, columns, splits, dtype):
    x, values, meta, bias = operands(tokens, rows, columns, dtype)
    configuration = PortableConfiguration(rows=32, columns=64, splits=splits)
    check(x, values, meta, bias, configuration)
    check(x, values, meta, None, configuration)


def test_default_configurations():
    for tokens in TOKENS:
        check(*operands(tokens, 100, 1032, torch.float16), choose_default(100, 1032, tokens, sm_count=8))


def test_splits_fill_the_gpu_but_keep_their_steps():
    assert choose_default(28672, 4096, 1, sm_count=132).splits == 2  # 448 programs for 528
    assert choose_default(4096, 14336, 1, sm_count=132).splits == 9
    assert choose_default(4096, 512, 1, sm_count=132).splits == 1  # four steps in all
    assert choose_default(64, 65536, 1, sm_count=132).splits == 16
    assert choose_default(4096, 14336, 64, sm_count=132).columns == 64


def test_more_splits_than_steps_add_zeros():
    x, values, meta, bias = operands(2, 16, 64, torch.float16)
    many = run(x, values, meta, bias, PortableConfiguration(columns=64, splits=3))
    assert torch.equal(many, run(x, values, meta, bias, PortableConfiguration(columns=64, splits=1)))


def compiled():
    """name -> resources and instructions of each kernel and capability, at sizes that allow the widest accesses."""
    from compile_ahead import compile_ahead

    from llmprune.kernels.nm_linear import expand, portable

    found = {}
    for capability in CAPABILITIES:
        arguments = {"values": "*i64", "meta": "*u8", "out": "*i64"}
        constants = {"count": 4096 * 512, "BLOCK": expand._BLOCK}
        name = f"expand sm_{capability}"
        found[name] = compile_ahead(expand._expand_kernel, capability, arguments, constants, warps=expand._WARPS)
        arguments = {"a": "*i32", "e": "*i32", "out": "*i64"}
        constants = {"rows": 4096, "groups": 1024, "slices": 16}
        kernel, name = expand._expand_fragments_kernel, f"expand_fragments sm_{capability}"
        found[name] = compile_ahead(kernel, capability, arguments, constants, warps=expand._WARPS)
        for tokens in TOKENS:
            for dtype in ("fp16", "bf16") if capability == 90 else ("bf16",):
                choice = choose_default(4096, 4096, tokens, sm_count=132)
                arguments = dict.fromkeys(("x", "bias", "y"), f"*{dtype}") | {"values": "*i64", "meta": "*u8"}
                constants = {"tokens": tokens, "rows": 4096, "bytes_per_row": 512, "bytes_per_split": 128}
                constants |= {"TOKENS": max(16, tokens), "ROWS": choice.rows, "BYTES": choice.columns // 8}
                kernel, name = portable._portable_kernel, f"portable {tokens} {dtype} sm_{capability}"
                found[name] = compile_ahead(kernel, capability, arguments, constants, warps=choice.warps)
    return found


def compiled_for_amd(tokens, dtype):
    """The same for gfx942 (MI300), whose compiler comes with Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmprune.kernels.nm_linear.portable import _portable_kernel

    choice = choose_default(4096, 4096, tokens, sm_count=304)
    sizes = {"TOKENS": max(16, tokens), "ROWS": choice.rows, "BYTES": choice.columns // 8}
    types = {"x": dtype, "values": "*i64", "meta": "*u8", "bias": dtype, "y": dtype}
    names = _portable_kernel.arg_names
    source = ASTSource(
        fn=_portable_kernel,
        signature={name: "constexpr" if name in sizes else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): size for name, size in sizes.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in {*sizes, "tokens"}},
    )
    made = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options={"num_warps": choice.warps})
    assembly = made.asm["amdgcn"]
    spilled = sum(int(number) for number in re.findall(r"(?:spill_count|ScratchSize):\s*(\d+)", assembly))
    wide = assembly.count("load_dwordx4")
    return {"spilled": spilled, "shared": made.metadata.shared, "mfma": assembly.count("v_mfma"), "wide loads": wide}


@pytest.fixture(scope="module")
def resources():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def nvidia(resources):
    return resources["nvidia"]


def count(instructions, *starts):
    return sum(number for opcode, number in instructions.items() if opcode.startswith(starts))


@pytest.mark.slow
def test_compiles_for_gpus_without_spilling(nvidia):
    assert len(nvidia) == len(CAPABILITIES) * (2 + len(TOKENS)) + len(TOKENS)
    for name, used in nvidia.items():
        assert used["STACK"] == 0, name
        assert used["LOCAL"] == 0, name


@pytest.mark.slow
def test_expansion_moves_128_bits_at_a_time(nvidia):
    for name, used in nvidia.items():
        if name.startswith("expand"):
            stores = {opcode for opcode in used["instructions"] if opcode.startswith("STG")}
            assert stores == {"STG.E.128"}, name
            assert used["instructions"]["LDG.E.128"] == 2, name  # the values; what describes them is a quarter or less


@pytest.mark.slow
def test_portable_kernel_uses_tensor_cores_and_wide_accesses(nvidia):
    for name, used in nvidia.items():
        if name.startswith("portable"):
            assert count(used["loop"], "HMMA", "HGMMA", "UTCHMMA"), name
            assert count(used["loop"], "LDGSTS.E.BYPASS.128", "LDG.E.128"), name
            assert count(used["instructions"], "STG.E.128"), name


@pytest.mark.slow
def test_portable_kernel_compiles_for_amd(resources):
    assert len(resources["amd"]) == len(TOKENS)
    for tokens, used in resources["amd"].items():
        assert used["spilled"] == 0, tokens
        assert used["shared"] <= 64 << 10, tokens
        assert used["mfma"], tokens
        assert used["wide loads"], tokens


if __name__ == "__main__":
    amd = {tokens: compiled_for_amd(tokens, "*bf16") for tokens in TOKENS}
    print(json.dumps({"nvidia": compiled(), "amd": amd}))

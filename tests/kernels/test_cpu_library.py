"""What the CPU kernels refuse, and where their library comes from."""

import time
from pathlib import Path

import pytest
import torch
from cpu_matrices import error, make, needs_kernels

from llmprune.kernels import cpu
from llmprune.kernels.cpu import compiler, finding

TYPES = tuple(cpu.TYPES)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library found yet, and an empty cache."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(finding, "INSTALLED", tmp_path / "none.so")
    finding._found.cache_clear()
    yield tmp_path / "cpu"
    finding._found.cache_clear()


def compiler_script(monkeypatch, folder, text):
    """Have $CXX name a shell script."""
    script = folder / "cxx"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("bitmask", lambda mask: mask.fill_(255)),
        ("bitmask", lambda mask: mask.fill_(0)),
        ("bitmask", lambda mask: mask[0].bitwise_xor_(1)),
        ("bitmask", lambda mask: mask[:, -1].bitwise_or_(0x80)),
        ("nm", lambda meta: meta.fill_(0)),
        ("nm", lambda meta: meta.fill_(255)),
        ("nm", lambda meta: meta[-1, 0].fill_(0b0001_0100)),
        ("nm", lambda meta: meta[0, -1].bitwise_or_(0x40)),
    ],
)
def test_damaged_masks_are_refused(kind, bits):
    matrix = make(kind, (17, 36), torch.bfloat16)
    damaged = matrix.bits.clone()
    bits(damaged)
    with pytest.raises(cpu.CorruptMatrixError, match="damaged"):
        cpu.pack(kind, (17, 36), damaged, matrix.values)


@needs_kernels
@pytest.mark.parametrize("kind", tuple(cpu.KINDS))
def test_any_damage_on_disk_is_refused_or_is_another_matrix(kind):
    """No content of mask or meta leads out of a tensor: `eval/bench/cpu_addresses.py` runs this to see it."""
    matrix, generator = make(kind, (35, 100), torch.bfloat16), torch.Generator().manual_seed(0)
    x, packed = torch.randn(3, 100).bfloat16(), 0
    for _ in range(200):
        bits = matrix.bits.clone()
        places = torch.randint(bits.numel(), (2,), generator=generator)
        noise = torch.randint(256, (2,), generator=generator, dtype=torch.uint8)
        bits.view(-1)[places] ^= noise
        try:
            damaged = cpu.pack(kind, (35, 100), bits, matrix.values)
        except cpu.CorruptMatrixError:
            continue
        packed += 1
        found, values = cpu.unpack(damaged)
        assert torch.equal(found, bits)
        assert torch.equal(values, matrix.values)
        assert error(cpu.linear(x, [damaged], None, [35]), x, cpu.dense(damaged)) <= 3
    assert 0 < packed < 200


@needs_kernels
def test_tensors_of_other_sizes_are_refused():
    matrix = make("nm", (16, 32), torch.bfloat16)
    with pytest.raises(ValueError, match="peaks for a nm matrix"):
        cpu.pack("nm", (16, 32), matrix.bits, matrix.values[:-1])
    with pytest.raises(ValueError, match="peaks for a nm matrix"):
        cpu.pack("nm", (16, 32), matrix.bits[:-1], matrix.values)
    with pytest.raises(ValueError, match="no nm matrix"):
        cpu.pack("nm", (16, 30), matrix.bits, matrix.values)
    with pytest.raises(ValueError, match="no bitmask matrix"):
        cpu.pack("bitmask", (1 << 32, 1 << 32), matrix.bits, matrix.values)


@needs_kernels
@pytest.mark.parametrize("place", range(13))
def test_damaged_headers_are_refused(place):
    matrix = make("bitmask", (64, 64), torch.bfloat16)
    damaged = matrix.packed.clone()
    damaged.view(torch.int64)[place] += 1 << 20
    for call in (cpu.unpack, cpu.dense, lambda packed: cpu.linear(torch.ones(1, 64).bfloat16(), [packed], None, [64])):
        with pytest.raises(cpu.CorruptMatrixError):
            call(damaged)


@needs_kernels
def test_cut_and_misaligned_matrices_are_refused():
    packed, x = make("bitmask", (64, 64), torch.bfloat16).packed, torch.ones(1, 64).bfloat16()
    with pytest.raises(cpu.CorruptMatrixError):
        cpu.linear(x, [packed[:-1]], None, [64])
    with pytest.raises(cpu.CorruptMatrixError):
        cpu.linear(x, [packed[:32]], None, [64])
    for elements in (1, 16):
        moved = torch.cat([packed[:elements], packed])[elements:]
        with pytest.raises(ValueError, match="not aligned"):
            cpu.linear(x, [moved], None, [64])


@needs_kernels
def test_operands_that_do_not_fit_are_refused():
    one, other = make("bitmask", (64, 64), torch.bfloat16).packed, make("nm", (64, 64), torch.bfloat16).packed
    x = torch.ones(1, 64).bfloat16()
    with pytest.raises(TypeError, match="float32"):
        cpu.linear(x.float(), [one], None, [64])
    with pytest.raises(TypeError, match="float32"):
        cpu.linear(x, [one], torch.ones(64), [64])
    with pytest.raises(ValueError, match="bias"):
        cpu.linear(x, [one], torch.ones(63).bfloat16(), [64])
    with pytest.raises(ValueError, match="does not go together"):
        cpu.linear(x, [one, other], None, [64, 64])
    with pytest.raises(ValueError, match="meta"):
        cpu.linear(x.to("meta"), [one], None, [64])


@needs_kernels
@pytest.mark.parametrize("tokens", [1, cpu.choices.DEFAULT_TOKENS])
def test_operands_of_other_shapes_are_refused(tokens):
    """Also for so many tokens that rows are expanded, into memory of the size that was asked for."""
    one, other = (make("bitmask", (rows, 64), torch.bfloat16).packed for rows in (64, 32))
    x = torch.ones(tokens, 64).bfloat16()
    for packed, sizes, columns in (
        ([one], [64], 63), ([one], [64], 1), ([one], [64], 65), ([one], [63], 64), ([one], [1 << 20], 64),
        ([one, other], [32, 64], 64), ([one, other], [96], 64), ([one], [64, 32], 64),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected those of matrices"):
            cpu.linear(torch.ones(tokens, columns).bfloat16(), packed, None, sizes)
    assert cpu.linear(x, [one, other], None, [64, 32]).shape == (tokens, 96)


@needs_kernels
@pytest.mark.parametrize("size", [64 * 63, 65 * 64, 0])
def test_rows_are_expanded_only_into_memory_of_their_size(size):
    packed, memory = make("bitmask", (64, 64), torch.bfloat16).packed, torch.zeros(1 << 13).bfloat16()
    with pytest.raises(ValueError, match="does not go together"):
        cpu.library().expand(packed, range(64), memory[:size])
    assert not memory.any()


def test_without_a_compiler_it_says_so(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++" in str(cpu.unavailable())
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        cpu.library()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    finding._found.cache_clear()
    assert "$CXX is 'no-such-compiler'" in str(cpu.unavailable())


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, tmp_path):
    script = '[ "$1" = --version ] && exit 0\necho "kernels.cpp:1: error: no such thing" >&2\nexit 1'
    compiler_script(monkeypatch, tmp_path, script)
    assert "error: no such thing" in str(cpu.unavailable())
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("printf '\\377'; exit 1", "exit status 1"),
        ("sleep 60; true", "has not finished after 0.2 s"),
        ('[ "$1" = --version ] || sleep 60; true', "has not finished after 0.2 s"),
    ],
)
def test_a_compiler_that_hangs_or_stammers_is_named(fresh, monkeypatch, tmp_path, script, reason):
    compiler_script(monkeypatch, tmp_path, script)
    monkeypatch.setattr(compiler, "_VERSION_SECONDS", 0.2)
    monkeypatch.setattr(compiler, "_SECONDS", 0.2 if "sleep" in script else 60)
    started = time.monotonic()
    assert reason in str(cpu.unavailable())
    assert str(tmp_path / "cxx") in str(cpu.unavailable())
    assert time.monotonic() - started < 30


def test_a_command_that_is_none_is_quoted(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    assert '$CXX is "g++ \'", which is no command' in str(cpu.unavailable())


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(fresh, monkeypatch, tmp_path):
    compiler_script(monkeypatch, tmp_path, "exit 0")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file"))
    reason = str(cpu.unavailable())
    assert str(tmp_path / "file" / "cpu") in reason
    assert "set LLMPRUNE_CACHE to a folder that can be written" in reason


@pytest.fixture
def compiled():
    """The content of the library that is used here."""
    return finding._compiled().read_bytes()


@needs_kernels
@pytest.mark.parametrize("damage", ["empty", "half", "of other sources"])
def test_a_damaged_library_in_the_cache_is_compiled_once_more(compiled, fresh, monkeypatch, damage):
    made = []

    def compile_anew(command, path):
        path.write_bytes(compiled)
        made.append(path)

    monkeypatch.setattr(finding, "compile_library", compile_anew)
    fresh.mkdir()
    path = fresh / f"{compiler.source_hash()}-{compiler.compiler_id(compiler.find_compiler())}.so"
    path.write_bytes({"empty": b"", "half": compiled[: len(compiled) // 2]}.get(damage, compiled[:-1] + b"?"))
    assert cpu.unavailable() is None
    finding._found.cache_clear()
    assert cpu.unavailable() is None
    assert made == [path]
    # Without a compiler a damaged one is not opened. Another file: the first one is in use.
    path.unlink()
    path.write_bytes(compiled[: len(compiled) // 2])
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding._found.cache_clear()
    assert "no C++ compiler" in str(cpu.unavailable())


def test_a_library_that_does_not_load_is_named(fresh, monkeypatch, tmp_path):
    """As from a file system whose files must not be executed."""
    compiler_script(monkeypatch, tmp_path, """[ "$1" = --version ] && exit 0
while [ "$1" != -o ]; do shift; done; echo no library > "$2"
""")  # fmt: skip
    reason = str(cpu.unavailable())
    (made,) = fresh.iterdir()
    assert str(made) in reason
    assert "delete the file, or set LLMPRUNE_CACHE to a folder whose files may be executed" in reason
    assert finding.is_whole(made)


def test_they_can_be_disabled_and_need_their_processor(fresh, monkeypatch):
    monkeypatch.setattr(finding.platform, "machine", lambda: "aarch64")
    assert "not aarch64" in str(cpu.unavailable())
    finding._found.cache_clear()
    monkeypatch.setenv("LLMPRUNE_CPU_KERNELS", "0")
    assert "unset LLMPRUNE_CPU_KERNELS" in str(cpu.unavailable())


@needs_kernels
@pytest.mark.slow
def test_it_is_compiled_once_with_a_message(fresh, monkeypatch, capfd):
    assert cpu.unavailable() is None
    assert str(fresh) in capfd.readouterr().err
    (made,) = fresh.iterdir()
    assert made.name.startswith(compiler.source_hash())
    finding._found.cache_clear()
    monkeypatch.setattr(finding, "compile_library", lambda *args: pytest.fail("compiled twice"))
    assert cpu.unavailable() is None
    # Found without the compiler too.
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding._found.cache_clear()
    assert cpu.unavailable() is None
    assert capfd.readouterr().err == ""
    # What an installation put there comes first, unless its sources have changed.
    monkeypatch.setattr(finding, "INSTALLED", made)
    monkeypatch.setattr(finding, "_compiled", lambda: pytest.fail("the installed one was not taken"))
    finding._found.cache_clear()
    assert cpu.unavailable() is None
    monkeypatch.setattr(finding, "source_hash", lambda: "another")
    assert finding._load_installed() is None


@needs_kernels
@pytest.mark.parametrize(
    ("function", "harm"),
    [
        ("multiply", lambda result, packed, x, bias, y: y[-1, -1].add_(1)),
        ("multiply", lambda result, packed, x, bias, y: y[-1, -1].fill_(torch.nan) if len(x) > 1 else None),
        ("expand", lambda result, packed, rows, dense: dense[-1, -1].add_(1)),
        ("unpack", lambda result, packed, bits, values, peaks: values.view(-1)[-1].add_(1)),
        ("sweep", lambda result, sums, *others: sums[-1, -1].add_(1e-3)),
        ("sweep", lambda result, *others: others[4].logical_not_() if others[5] else None),
        ("choose", lambda result, *others: result.copy_(result.flip(1))),
        ("add_gram", lambda result, total, x: total[-1, -1].add_(1e-2)),
        ("begin_layer", lambda result, *others: others[4][0, -1].add_(1e-3)),
        ("end_layer", lambda result, *others: others[5][..., -1].add_(1e-3)),
    ],
)
def test_a_library_with_wrong_results_is_not_used(fresh, monkeypatch, function, harm):
    real = getattr(finding.Library, function)
    monkeypatch.delenv("LLMPRUNE_CACHE")
    assert cpu.unavailable() is None
    if function == "add_gram" and cpu.library().level < 2:
        pytest.skip("no AVX-512 BF16")

    def wrong(loaded, *arguments):
        result = real(loaded, *arguments)
        harm(result, *arguments)
        return result

    monkeypatch.setattr(finding.Library, function, wrong)
    finding._found.cache_clear()
    assert "wrong results" in str(cpu.unavailable())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_caller_changes_no_trial(dtype):
    """transformers sets it to that of the model which it loads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert finding.is_right(cpu.library())
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_limiting_torch_limits_the_kernels(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert finding.Library(finding._compiled()).level == 1


def test_the_sources_are_installed():
    listed = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert '"llmprune.kernels.cpu" = ["source/*"]' in listed
    assert all(f'"llmprune.kernels.{room}"' in listed for room in ("cpu", "nm_linear", "block_linear", "obs_sweep"))


@needs_kernels
def test_a_large_matrix_begins_at_a_huge_page():
    matrix = make("nm", (1024, 4096), torch.bfloat16)
    assert matrix.packed.data_ptr() % (2 << 20) == 0
    x = torch.randn(1, 4096).bfloat16()
    assert error(cpu.linear(x, [matrix.packed], None, [1024]), x, matrix.weight) <= 3

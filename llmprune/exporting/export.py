"""Write a checkpoint in a form that other programs read."""

from pathlib import Path
from typing import Literal, get_args

from llmprune.errors import PatternError, ResumeError
from llmprune.exporting.csr import PREFIX as CSR_PREFIX
from llmprune.exporting.csr import write_csr
from llmprune.exporting.gguf_file import find_converter, require_convertible, write_gguf
from llmprune.exporting.masked import PREFIX as MASKED_PREFIX
from llmprune.exporting.masked import write_masked
from llmprune.exporting.onnx_graph import FILE_NAME as ONNX_NAME
from llmprune.exporting.onnx_graph import require_onnx, write_onnx
from llmprune.exporting.report import ExportedFile, ExportReport, files_of
from llmprune.exporting.tensors import Exported
from llmprune.progress import Progress, Watcher, ignore
from llmprune.storage.companions import ADAPTER_FOLDER
from llmprune.storage.exchange import replacing
from llmprune.storage.files import require_writable
from llmprune.storage.folders import (
    checkpoint_folder,
    expanded,
    require_empty,
    require_free,
    require_other,
)

Form = Literal["csr", "torch-prune", "gguf", "onnx"]
FORMS: tuple[Form, ...] = get_args(Form)

_TENSOR_FORMS = {"csr": (write_csr, CSR_PREFIX), "torch-prune": (write_masked, MASKED_PREFIX)}


def export(
    folder: str | Path,
    to: Form,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    llama_cpp: str | Path | None = None,
    gguf_type: str = "auto",
    watch: Watcher = ignore,
) -> ExportReport:
    """Write a checkpoint in a form that other programs read.

    Args:
        folder: a local folder with config.json and safetensors; dense or packed.
        to: "csr": pruned matrices as CSR tensors in safetensors, see `llmprune.exporting.csr.load_csr`; "torch-prune":
            `weight_orig` and `weight_mask` as torch.nn.utils.prune has them, see
            `llmprune.exporting.masked.load_masked`; "gguf": a file for llama.cpp, made by its own converter; "onnx":
            the whole model as a graph in float32, whose logits are compared.
        output: another folder; default: the name of `folder` with "-" and `to` appended. For "gguf" a file; default:
            the name with ".gguf" appended.
        overwrite: replace an earlier export in `output`, once the new one is whole.
        llama_cpp: for "gguf": a clone of llama.cpp; default: what the variable LLAMA_CPP names.
        gguf_type: for "gguf": what the converter takes as `--outtype`.
        watch: told about every shard.

    Raises:
        PatternError: there is no such form.
        CheckpointError: `folder` is no checkpoint or is damaged, or the output cannot be written.
        ModelError: `folder` holds no causal LM, or one that cannot be exported to this form.
        MissingPackageError: a package or program for this form is not installed.
        NumericsError: the exported model computes something else.
        ResumeError: `output` is not empty, is in use, or is `folder` itself.
    """
    if to not in FORMS:
        raise PatternError(f"export to {to!r}", expected=", ".join(FORMS))
    source = checkpoint_folder(folder)
    if (source / ADAPTER_FOLDER).is_dir():
        watch(Progress(f"{ADAPTER_FOLDER}/, a correction of low rank, is left out: the weights alone are exported"))
    if to == "gguf":
        return _export_gguf(source, output, llama_cpp, gguf_type, overwrite, watch)
    target = source.with_name(f"{source.name}-{to}") if output is None else expanded(output)
    require_other(target, source)
    require_free(target)
    require_empty(target, resume=None, overwrite=overwrite)
    if to == "onnx":
        require_onnx()
    exported = Exported(source, watch)
    dense_bytes = exported.dense_bytes  # refuses what is no causal LM
    with replacing(target) as new:
        if to == "onnx":
            facts, pattern = write_onnx(source, new, watch), f"{ONNX_NAME}*"
        else:
            write, prefix = _TENSOR_FORMS[to]
            facts, pattern = write(exported, new), f"{prefix}*"
    return ExportReport(to, target, files_of(target, pattern), dense_bytes, facts)


def _export_gguf(
    source: Path,
    output: str | Path | None,
    llama_cpp: str | Path | None,
    kind: str,
    overwrite: bool,
    watch: Watcher,
) -> ExportReport:
    target = source.with_name(f"{source.name}.gguf") if output is None else expanded(output)
    if target.is_dir() or (target.exists() and not overwrite):
        raise ResumeError(
            f"{target} exists",
            expected="a new file" if target.is_dir() else "a new file, or --overwrite",
            fix="choose another --output, or remove it first",
        )
    require_writable(target)
    converter = find_converter(llama_cpp)
    require_convertible(source)
    dense_bytes = Exported(source, watch).dense_bytes
    facts = write_gguf(source, target, converter, kind, watch)
    return ExportReport("gguf", target, (ExportedFile(target.name, target.stat().st_size),), dense_bytes, facts)

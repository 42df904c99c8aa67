"""Write a checkpoint in a form that other programs read."""

from pathlib import Path
from typing import Literal, get_args

from llmprune.errors import PatternError
from llmprune.exporting.csr import PREFIX as CSR_PREFIX
from llmprune.exporting.csr import write_csr
from llmprune.exporting.masked import PREFIX as MASKED_PREFIX
from llmprune.exporting.masked import write_masked
from llmprune.exporting.report import ExportReport, files_of
from llmprune.exporting.tensors import Exported
from llmprune.progress import Watcher, ignore
from llmprune.storage.exchange import replacing
from llmprune.storage.folders import (
    checkpoint_folder,
    expanded,
    require_empty,
    require_free,
    require_other,
)

Form = Literal["csr", "torch-prune"]
FORMS: tuple[Form, ...] = get_args(Form)

_TENSOR_FORMS = {"csr": (write_csr, CSR_PREFIX), "torch-prune": (write_masked, MASKED_PREFIX)}


def export(
    folder: str | Path,
    to: Form,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    watch: Watcher = ignore,
) -> ExportReport:
    """Write a checkpoint in a form that other programs read.

    Args:
        folder: a local folder with config.json and safetensors; dense or packed.
        to: "csr": pruned matrices as CSR tensors in safetensors, see `llmprune.exporting.csr.load_csr`; "torch-prune":
            `weight_orig` and `weight_mask` as torch.nn.utils.prune has them, see
            `llmprune.exporting.masked.load_masked`.
        output: another folder; default: the name of `folder` with "-" and `to` appended.
        overwrite: replace an earlier export in `output`, once the new one is whole.
        watch: told about every shard.

    Raises:
        PatternError: there is no such form.
        CheckpointError: `folder` is no checkpoint or is damaged, or the output cannot be written.
        ModelError: `folder` holds no causal LM, or one that cannot be exported to this form.
        ResumeError: `output` is not empty, is in use, or is `folder` itself.
    """
    if to not in FORMS:
        raise PatternError(f"export to {to!r}", expected=", ".join(FORMS))
    source = checkpoint_folder(folder)
    target = source.with_name(f"{source.name}-{to}") if output is None else expanded(output)
    require_other(target, source)
    require_free(target)
    require_empty(target, resume=False, overwrite=overwrite)
    write, prefix = _TENSOR_FORMS[to]
    exported = Exported(source, watch)
    with replacing(target) as new:
        facts = write(exported, new)
    return ExportReport(to, target, files_of(target, f"{prefix}*"), exported.dense_bytes, facts)

"""A row of a report, every field set."""

from llmprune.storage.report import MatrixRow


def row(**changes: object) -> MatrixRow:
    values = {
        "layer": "model.layers.0", "name": "model.layers.0.mlp.up_proj", "shape": (2, 10), "pattern": "0.5",
        "method": "sparsegpt", "zeros": 10, "error": 0.25, "damping": 0.1, "damping_tried": (0.01, 0.1), "tokens": 96,
        "prior_tokens": 0, "dead_inputs": 1, "seconds": 0.5, "peak_bytes": 1 << 40,
    }  # fmt: skip
    return MatrixRow(**{**values, **changes})  # type: ignore[arg-type]

"""Every error a user can meet: what happened, what was expected, how to fix it."""


class LlmpruneError(Exception):
    """Base class of all errors that a user can cause and fix.

    Args:
        what: what happened, with the offending value.
        expected: what would have been right; empty where `what` already says it.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, expected: str = "", fix: str = "") -> None:
        self.what, self.expected, self.fix = what, expected, fix
        lines = [what]
        if expected:
            lines.append(f"expected: {expected}")
        if fix:
            lines.append(f"fix: {fix}")
        super().__init__("\n".join(lines))

    def at(self, name: str) -> "LlmpruneError":
        """The same error with the name of what it happened to in front, to be raised from this one."""
        return type(self)(f"{name}: {self.what}", expected=self.expected, fix=self.fix)


class PatternError(LlmpruneError):
    """A sparsity pattern that cannot be read, or does not fit a matrix."""


class RecipeError(LlmpruneError):
    """A recipe with unknown, contradictory or out-of-range keys."""


class ModelError(LlmpruneError):
    """A model that cannot be found, is not a causal LM, or whose decoder layers cannot be located."""


class MissingTokenizerError(ModelError):
    """A model without a tokenizer where a text has to be tokenised."""


class CheckpointError(LlmpruneError):
    """A checkpoint that cannot be read, is incomplete, or cannot be written."""


class CalibrationError(LlmpruneError):
    """Calibration or evaluation text that cannot be read, or is too short."""


class MissingPackageError(LlmpruneError):
    """An optional package that is not installed."""

    @classmethod
    def of(cls, package: str, purpose: str) -> "MissingPackageError":
        """The error for a package, by its name for pip, and what needs it."""
        return cls(f"{purpose} needs the package {package}, which is not installed", fix=f"pip install {package}")


class NumericsError(LlmpruneError):
    """NaN, infinity or a factorisation that failed at every damping."""


class ResumeError(LlmpruneError):
    """An output folder that cannot be continued, or must not be overwritten."""


class HeldError(ResumeError):
    """An output folder that another run is writing into."""


class RecoveryError(LlmpruneError):
    """Training in which pruned weights would not stay zero, or settings with which it cannot run."""


class TrainingError(LlmpruneError):
    """A schedule, a rule or options with which a model cannot be pruned while it trains."""


class DeviceError(LlmpruneError):
    """A device that this machine does not have."""


class PeerError(LlmpruneError):
    """Another process of the run has ended; it says why, this one need not."""


class ServingError(LlmpruneError):
    """A server that cannot start, or a request that it refuses."""


class UploadError(LlmpruneError):
    """A result that cannot be uploaded to the hub; it stays complete on disk."""


class FormatError(LlmpruneError):
    """Packed tensors that do not match their layout, or a damaged archive."""

"""What a run would do, as data: computed by `llmprune.pruning.forecast.forecast`, shown by the tables."""

from dataclasses import asdict, dataclass
from typing import Any

from llmprune.pruning.forecast.memory import LayerMemory, predict_peak
from llmprune.structures.plan import StructurePlan


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """What will be done to one matrix.

    Attributes:
        name: dotted name inside its decoder layer.
        shape: (out, in).
        pattern: "dense" if it is not pruned.
        method: None if it is not pruned.
        zeros: expected number of zeros; an average if the pattern compares scores over the whole layer.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    method: str | None
    zeros: int


@dataclass(frozen=True, slots=True)
class Work:
    """The matmuls of a run: floating-point operations, or their rates in operations per second, or seconds.

    Attributes:
        forward: both forward passes of all calibration tokens.
        gram: Gram matrices.
        solve: factorisations and column updates.
        matching: fitting layers as a whole, if no layer stops early.
    """

    forward: float
    gram: float
    solve: float
    matching: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return self.forward + self.gram + self.solve + self.matching


@dataclass(frozen=True, slots=True)
class Around:
    """Seconds of what a run does beside its large matmuls.

    Attributes:
        sampling: text from the dense model.
        evaluation: the forward passes of the dense and of the pruned model over the evaluation text, and both heads.
        choosing: zeros by the scores of weights, where a method does nothing else.
        rotation: the matmuls of its search, and a forward pass before it.
    """

    sampling: float = 0.0
    evaluation: float = 0.0
    choosing: float = 0.0
    rotation: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return self.sampling + self.evaluation + self.choosing + self.rotation


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Decoder layers with the same structure and the same plan.

    Attributes:
        indices: of the layers.
        matrices: in the order of the layer's modules.
        work: operations for one of these layers.
        memory: bytes while one of them is resident.
    """

    indices: tuple[int, ...]
    matrices: tuple[MatrixPlan, ...]
    work: Work
    memory: LayerMemory


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The parts of the predicted peak in bytes, as `llmprune.pruning.forecast.memory` defines them.

    Attributes:
        ends: embeddings, final norm and LM head.
        hidden_states: in memory; at most the recipe's activation_budget.
        calls: masks and rotary embeddings.
        layer: the layer that takes most.
        libraries: what they and the heap keep.
        kept: what a backward pass of the dense model leaves in memory; 0 without one.
        backward: the peak of that pass, which is over before layers are pruned.
        rotation: the peak of a rotation without its activations, which is over before that.
    """

    ends: int
    hidden_states: int
    calls: int
    layer: LayerMemory
    libraries: int
    kept: int = 0
    backward: int = 0
    rotation: int = 0

    @property
    def peak(self) -> int:
        """The predicted peak, above what the process holds before the first layer."""
        pruning = predict_peak(self.ends, self.hidden_states, self.calls, [self.layer], self.libraries)
        return max(self.kept + pruning, self.backward, self.rotation)


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do.

    Attributes:
        model: as the user gave it.
        recipe: as it will be run.
        device: its name.
        compute_dtype: dtype of the forward pass, as torch names it.
        layers_path: dotted name of the list of decoder layers.
        tokens: calibration tokens, including the held-back ones.
        layers: the plan; layers with the same plan are grouped.
        rates: operations per second on this device, measured by this dry run.
        memory: predicted peak.
        disk_bytes: size of the pruned checkpoint.
        spilled_bytes: hidden states beyond the activation budget, in the temporary folder.
        notes: what the figures do not include.
        structures: what will be removed physically.
        around: seconds of sampling, evaluation and choosing, extrapolated from steps that this dry run timed.
    """

    model: str
    recipe: dict[str, Any]
    device: str
    compute_dtype: str
    layers_path: str
    tokens: int
    layers: tuple[LayerPlan, ...]
    rates: Work
    memory: MemoryPlan
    disk_bytes: int
    spilled_bytes: int
    notes: tuple[str, ...]
    structures: tuple[StructurePlan, ...] = ()
    around: Around = Around()

    @property
    def work(self) -> Work:
        """Operations for all layers."""
        counted = [(len(plan.indices), plan.work) for plan in self.layers]
        return Work(
            forward=sum(count * work.forward for count, work in counted),
            gram=sum(count * work.gram for count, work in counted),
            solve=sum(count * work.solve for count, work in counted),
            matching=sum(count * work.matching for count, work in counted),
        )

    @property
    def seconds(self) -> Work:
        """The time for the operations at the measured rates: a lower bound, see `notes`."""
        work, rates = self.work, self.rates
        # The products of a backward pass are as fast as those of a forward pass.
        matching = work.matching / rates.forward
        return Work(work.forward / rates.forward, work.gram / rates.gram, work.solve / rates.solve, matching)

    @property
    def total_seconds(self) -> float:
        """The matmuls of pruning, and what is around them."""
        return self.seconds.total + self.around.total

    @property
    def sparsity(self) -> float:
        """Expected sparsity over all matrices that are pruned."""
        pruned = [(len(p.indices), m) for p in self.layers for m in p.matrices if m.method is not None]
        elements = sum(count * matrix.shape[0] * matrix.shape[1] for count, matrix in pruned)
        return sum(count * matrix.zeros for count, matrix in pruned) / max(elements, 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        seconds = {**asdict(self.seconds), **asdict(self.around), "total": self.total_seconds}
        derived = {"sparsity": self.sparsity, "work": asdict(self.work), "seconds": seconds}
        return {**asdict(self), **derived, "memory": {**asdict(self.memory), "peak": self.memory.peak}}

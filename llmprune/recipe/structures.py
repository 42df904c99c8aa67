"""The recipe's section `structures`: what is removed physically, which makes the checkpoint smaller.

structures:
depth: {remove: 0.25, method: block-influence}   # whole decoder layers
width: {remove: 0.25}                            # hidden channels, the same in the whole model
heads: {remove: 0.25}                            # key and value heads with all their query heads
ffn: {remove: 0.25, multiple: 64}                # channels of the feed-forward networks
experts: {remove: 0.5, method: reap}

structures:                                        # widths that differ between layers
heads: {}
ffn: {}
budget: {remove: 0.25, of: parameters}
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from llmprune.errors import RecipeError
from llmprune.recipe.document import refusal, shown_value
from llmprune.recipe.fields import MOST

_CONFIG = ConfigDict(frozen=True, extra="forbid")

GroupScore = Literal[
    "obs",
    "magnitude-l1",
    "magnitude-l2",
    "activation-norm",
    "activation-frequency",
    "wanda",
    "channel-norm",
    "flap",
    "mutual-information",
    "taylor",
    "fisher",
]


def _read_amount(value: object) -> float | int:
    """How much to remove: a fraction below 1, or a count."""
    if type(value) is int and value >= 1:
        return value
    if type(value) is float and 0 < value < 1:
        return value
    error = RecipeError(
        f"remove is {shown_value(value)}",
        expected="a fraction between 0 and 1, or an integer of at least 1",
        fix="write 0.25 for a quarter, or 2 for two of them; to remove nothing, leave the section out",
    )
    raise refusal(error)


Amount = Annotated[float | int, PlainValidator(_read_amount)]


class _Section(BaseModel):
    model_config = _CONFIG

    remove: Amount | None = None

    def count(self, among: int) -> int:
        """How many of this many are removed, before any alignment."""
        assert self.remove is not None, "a section without `remove` is for the budget"
        return self.remove if isinstance(self.remove, int) else round(among * self.remove)


class Groups(_Section):
    """Heads or FFN channels of every layer.

    Attributes:
        remove: a fraction of the groups, or how many; omitted if a budget decides.
        method: obs chooses and refits by exact group removal with exchanges; the others are scores, and the groups with
            the lowest are removed.
        refit: give the remaining weights their least-squares values; default: as the method is published, obs only.
        damping: of the Gram matrix, for obs and refits.
        swaps: maximum number of exchanges after the greedy search of obs.
        compensate: for flap: add the mean of what is removed to the consumer's bias. None: if it has one; otherwise a
            refit compensates for it, unless `refit` forbids that.
    """

    method: GroupScore = "obs"
    refit: bool | None = None
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    swaps: Annotated[int, Field(ge=0, le=MOST)] = 32
    compensate: bool | None = None

    @property
    def refitted(self) -> bool:
        """Whether the remaining weights are refitted."""
        return self.method == "obs" if self.refit is None else self.refit

    def with_bias(self, bias: bool) -> "Groups":
        """These settings for a consumer with or without a bias: without one, flap is refitted unless set otherwise."""
        open_ = self.method == "flap" and self.refit is None and self.compensate is None
        return self.model_copy(update={"refit": True}) if open_ and not bias else self

    @model_validator(mode="after")
    def _check(self) -> "Groups":
        if self.compensate and (self.method != "flap" or self.refitted):
            raise refusal(
                RecipeError(
                    "compensate is for flap without a refit",
                    expected="method: flap, which adds the mean of the removed channels to the bias",
                    fix="remove the key: a refit already compensates for the removed channels",
                ),
                "compensate",
            )
        return self


class Heads(Groups):
    """Attention heads.

    Attributes:
        unit: kv-group removes key and value heads with all query heads that read them; query-head removes the same
            number of query heads from each KV group. The same in multi-head attention, where every query head has its
            own key and value head.
    """

    unit: Literal["kv-group", "query-head"] = "kv-group"

    @model_validator(mode="after")
    def _check_method(self) -> "Heads":
        if self.method == "activation-frequency":
            error = RecipeError(
                "activation-frequency counts the positive outputs of ReLU-like units", expected="ffn, not heads"
            )
            raise refusal(error, "method")
        return self


class Channels(Groups):
    """FFN channels.

    Attributes:
        multiple: the remaining number is a multiple of it; "auto": the first of 128, 64, 32, 16 and 8 that is within
            5 % of the width.
    """

    multiple: PositiveInt | Literal["auto"] = "auto"


class Width(_Section):
    """Hidden channels, the same ones in the whole model.

    Attributes:
        remove: a fraction of the hidden size, or how many channels.
        method: how channels are scored; those with the lowest scores are removed.
        multiple: the remaining number is a multiple of it; "auto" as for FFN channels.
    """

    method: Literal["energy", "activation-norm", "norm-gain", "magnitude-l1", "magnitude-l2"] = "energy"
    multiple: PositiveInt | Literal["auto"] = "auto"


class Depth(_Section):
    """Whole decoder layers.

    Attributes:
        remove: a fraction of the layers, or how many.
        method: block-influence: the layers that change the direction of the hidden states least; angular: the run of
            consecutive layers that changes it least; kl: one layer at a time, whichever increases the measured KL
            divergence least.
        protect: how many of the last layers are always kept.
        replace: what stands for a run of removed layers; the first layer is then kept. linear: the MLP of the kept
            layer before the run is multiplied by a linear map, fitted by least squares (ReplaceMe). merge: the heads
            and FFN channels of the run compete with that layer's own for its places (FlattenGPT). None: nothing does.
        damping: of these fits: for linear towards the layer as it is.
    """

    method: Literal["block-influence", "angular", "kl"] = "block-influence"
    protect: Annotated[int, Field(ge=0)] = 0
    replace: Literal["linear", "merge"] | None = None
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01


class SubBlockRemoval(_Section):
    """Attention or MLP blocks of layers that are kept; the checkpoint then needs llmprune to load.

    Attributes:
        remove: a fraction of the blocks, or how many.
        method: as for depth.
    """

    method: Literal["block-influence", "kl"] = "block-influence"


class ExpertRemoval(_Section):
    """Routed experts of every MoE layer.

    Attributes:
        remove: a fraction of the experts, or how many.
        method: reap: those with the lowest mean of gate weight times output norm; output-norm and output-energy: those
            with the lowest mean of the norm or the squared norm of their outputs without the gate; frequency: those
            with the fewest tokens.
    """

    method: Literal["reap", "output-norm", "output-energy", "frequency"] = "reap"


class Budget(BaseModel):
    """One budget for the heads and FFN channels of all layers, which may then differ; such a checkpoint needs llmprune.

    Attributes:
        remove: the fraction of the decoder layers' total to remove.
        of: parameters, FLOPs per token, or latency: the seconds of the matmuls as measured on this device.
        most: the largest fraction of one structure that may be removed.
        multiple: the remaining number of FFN channels is a multiple of it.
        tokens: rows of the matmuls by which latency is measured: 1 for decode.
    """

    model_config = _CONFIG

    remove: Annotated[float, Field(gt=0, lt=1)]
    of: Literal["parameters", "flops", "latency"] = "parameters"
    most: Annotated[float, Field(gt=0, lt=1)] = 0.9
    multiple: PositiveInt | Literal["auto"] = "auto"
    tokens: PositiveInt = 1


# The sections for groups inside a layer, and every section except the budget.
GroupSection = Groups | ExpertRemoval
Section = Depth | SubBlockRemoval | Width | GroupSection


class Structures(BaseModel):
    """What is removed physically. Structures without a section are left intact.

    Attributes:
        depth: decoder layers.
        attention: attention blocks of layers that are kept.
        mlp: MLP blocks of layers that are kept.
        width: hidden channels.
        heads: attention heads.
        ffn: FFN channels.
        experts: routed experts.
        budget: lets the widths of heads and ffn differ between layers.
    """

    model_config = _CONFIG

    depth: Depth | None = None
    attention: SubBlockRemoval | None = None
    mlp: SubBlockRemoval | None = None
    width: Width | None = None
    heads: Heads | None = None
    ffn: Channels | None = None
    experts: ExpertRemoval | None = None
    budget: Budget | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: section for name, section in write(self).items() if section is not None}

    @property
    def groups(self) -> dict[str, GroupSection]:
        """The given sections for groups inside a layer, by the kind of their structures."""
        named = {"heads": self.heads, "ffn": self.ffn, "experts": self.experts}
        return {kind: section for kind, section in named.items() if section is not None}

    @property
    def blocks(self) -> dict[Literal["attention", "mlp"], SubBlockRemoval]:
        """The given sections for blocks of the layers that are kept."""
        named: dict[Literal["attention", "mlp"], SubBlockRemoval | None] = {
            "attention": self.attention,
            "mlp": self.mlp,
        }
        return {part: section for part, section in named.items() if section is not None}

    @property
    def sections(self) -> dict[str, Section]:
        """All given sections, without the budget."""
        whole: dict[str, Section | None] = {
            "depth": self.depth, "attention": self.attention, "mlp": self.mlp, "width": self.width,
        }  # fmt: skip
        return {name: section for name, section in whole.items() if section is not None} | self.groups

    @model_validator(mode="after")
    def _check(self) -> "Structures":
        if not self.sections:
            raise refusal(RecipeError("structures is empty: nothing would be removed", fix="remove the key"))
        if self.budget is not None:
            self._check_budget()
        self._check_replace()
        for name, section in self.sections.items():
            if section.remove is None and not (self.budget and name in BUDGETED):
                error = RecipeError(
                    f"{name}.remove is missing",
                    expected="a fraction, or how many",
                    fix=f"write {name}: {{remove: 0.25}}",
                )
                raise refusal(error, name)
        return self

    def _check_replace(self) -> None:
        """What stands for removed layers needs the MLP in front of them; layers are merged whole, at full width."""
        if self.depth is None or self.depth.replace is None:
            return
        others = {
            "mlp": self.mlp,
            **({"attention": self.attention, "width": self.width} if self.depth.replace == "merge" else {}),
        }
        for name, section in others.items():
            if section is not None:
                error = RecipeError(
                    f"depth.replace together with {name}",
                    expected="layers that lose nothing of it before they stand for removed ones",
                    fix=f"remove depth.replace, or leave {name} out",
                )
                raise refusal(error, "depth", "replace")

    def _check_budget(self) -> None:
        """The budget alone decides how much is removed, and it needs the error curves of obs."""
        shared = {name: section for name, section in self.groups.items() if isinstance(section, Groups)}
        if not shared:
            error = RecipeError("budget, but neither heads nor ffn", fix="add `ffn: {}`, `heads: {}` or both")
            raise refusal(error, "budget")
        for name, section in shared.items():
            key, expected = "remove", "no `remove` together with a budget, which decides how much is removed"
            if section.remove is None:
                key, expected = "method", "obs: a budget needs its error curves"
            if section.remove is None and section.method == "obs":
                key, expected = "unit", "kv-group: a budget removes whole KV groups"
            if key == "unit" and getattr(section, "unit", "kv-group") == "kv-group":
                continue
            fix = f"remove {name}.{key}"
            error = RecipeError(f"{name}.{key} is {getattr(section, key)}", expected=expected, fix=fix)
            raise refusal(error, name, key)


# The sections whose widths a budget decides.
BUDGETED = ("heads", "ffn")
# The keys of `structures`, and what each holds.
SECTIONS: dict[str, type[BaseModel]] = {
    "depth": Depth, "attention": SubBlockRemoval, "mlp": SubBlockRemoval, "width": Width, "heads": Heads,
    "ffn": Channels, "experts": ExpertRemoval, "budget": Budget,
}  # fmt: skip

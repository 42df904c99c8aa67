"""Why a matrix is not served by something faster, in words for the user."""

from llmprune.formats import Layout
from llmprune.forms import Choice

# Refusals that only say that another layout is meant; and what to say where nothing else is left.
_OTHER_LAYOUTS = ("not 2:4", "not block-sparse")
_NO_KERNEL = {
    "nm": "only 2:4 has a kernel",
    "bitmask": "no kernel gains from zeros that lie anywhere: it is smaller on disk only",
    "dense": "stored as an ordinary weight",
}


def why_not_faster(choice: Choice, layout: Layout) -> str:
    """The refusals that concern this layout, joined; empty where the matrix is served by the kernel made for it."""
    if choice.form.name in ("fragments", "blocks"):
        return ""
    own = dict.fromkeys(reason for _, reason in choice.refused if reason not in _OTHER_LAYOUTS)
    return "; ".join(own) or _NO_KERNEL.get(layout.name, "")

"""In words: what the numbers of an edit that collapsed or damaged its model say of the cause, and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING

from easyeditor.base.files import read_json
from easyeditor.base.paths import SHIPPED
from easyeditor.values.collapse import SMALL_DENOMINATOR, is_small

if TYPE_CHECKING:
    from easyeditor.values.record import EditRecord


CURE = SHIPPED / "data" / "protection" / "cure.json"


def cause(record: EditRecord) -> str:
    """What the numbers of an edit that collapsed or damaged its model say of the cause; empty for any other edit."""
    if record.collapse is None or not record.collapse.damaged:
        return ""
    decisive = record.decisive_layer
    if decisive is None:
        return "the method has no denominator; look at the size of the update"
    layer, trace = decisive
    denominator, grown = trace.denominator, trace.value_growth
    if is_small(denominator):
        return (
            f"the denominator at layer {layer} is {denominator:.3g} (a collapse is predicted below "
            f"{SMALL_DENOMINATOR:g}): the key of the bare prompt (norm {trace.key_norm:.3g}) hardly overlaps the mean "
            f"key over contexts (norm {trace.prefixed_key_norm:.3g}), and the update is divided by it"
        )
    value = "" if grown is None else f"; the value grew {grown:.3g}-fold"
    if denominator is not None:
        return f"the denominator is ordinary ({denominator:.3g}), so the keys are not the cause{value}"
    size = max(layer.delta_norm for layer in record.trace.values())
    return f"the method has no denominator{value}; the weights moved by ‖ΔW‖ {size:.3g}"


def remedy(record: EditRecord) -> str:
    """What to try against the cause; empty where `cause` is."""
    decisive = record.decisive_layer
    if decisive is None or not cause(record):
        return ""
    _, trace = decisive
    if is_small(trace.denominator):
        return f"--set {record.remedy}  (the mean key on both sides; docs/metrics.md)" if record.remedy else ""
    if trace.value_growth is None:
        return "fewer or smaller steps"
    return "a smaller clamp_norm_factor, fewer v_num_grad_steps, or another layer"


def first_place_cure(record: EditRecord, model_fingerprint: str | None = None) -> str:
    """First-token protection, for a subject that begins its prompt and whose small denominator collapsed or damaged the
    model; else empty. The layer and its price (`data/protection/cure.json`) are those of one model, known by its
    fingerprint; for another model the docs page says how to choose a layer."""
    first = record.request.subject_start == 0
    if not first or not cause(record) or not is_small(record.denominator):
        return ""
    found = read_json(CURE)
    if model_fingerprint != found["model_fingerprint"]:
        return (
            f"--set alg_name={found['method']}, at a layer that is right for this model: "
            "docs/findings/first-token-protection.md"
        )
    return (
        f"--set alg_name={found['method']} 'layers=[{found['layer']}]'  (holds with and without a prefix: on "
        f"{found['requests']} requests with {found['model']}, P {found['p_bare']:.2f} bare, "
        f"{found['p_behind_a_prefix']:.2f} behind a prefix; its price: {found['perplexity_ratio']:.2f}x perplexity, "
        f"{found['locality']:.0%} of neighbours and {found['locality_first_place']:.0%} of other first places kept; "
        "docs/findings/first-token-protection.md)"
    )

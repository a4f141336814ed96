"""README.md of a checkpoint we made: what it was made of and how, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_api import __version__
from gptq_api.quantize.driver import Outcome, Recipe


@dataclass(frozen=True)
class TextsInWords:
    """What was calibrated and measured on."""

    calibration: str
    evaluation: str


def model_card(name: str, source: str, recipe: Recipe, texts: TextsInWords, outcome: Outcome) -> str:
    """`source`: what the model was called where it came from."""
    s = recipe.settings
    group = "one group per output channel" if s.group_size == -1 else f"groups of {s.group_size}"
    order = "yes" if s.desc_act else "no"
    if s.desc_act and s.static_groups:
        order += " (static groups)"
    elif s.act_group_aware and s.group_size != -1 and not recipe.nearest:
        order += " (groups by their inputs when quantizing)"
    method = "rounding to nearest" if recipe.nearest else "GPTQ, true-sequential"
    lines = [
        "---",
        "library_name: gptq-api",
        "tags: [gptq, llama, quantized]",
        "---",
        "",
        f"# {name}",
        "",
        f"{source} in {s.bits} bits: {method}, by gptq-api {__version__}. Licence and intended use are those of the "
        "original model.",
        "",
        "| | |",
        "|---|---|",
        f"| bits | {s.bits} |",
        f"| group size | {s.group_size} ({group}) |",
        f"| act-order | {order} |",
        f"| zero points | {'symmetric' if s.sym else 'asymmetric'}, stored as "
        f"{'v1 (gptq)' if recipe.zero_version == 1 else 'v2 (gptq_v2)'} |",
        f"| damping | {_damping(recipe, outcome)} |",
        f"| calibration | {texts.calibration} |",
        "",
        "## What it cost",
        "",
    ]
    if outcome.perplexity_before is None or outcome.perplexity_after is None:
        lines += ["Perplexity was not measured: no text was given for it."]
    else:
        lines += [
            "| | perplexity |",
            "|---|---|",
            f"| before | {outcome.perplexity_before:.4f} |",
            f"| after | {outcome.perplexity_after:.4f} |",
            "",
            f"On {texts.evaluation}, in float32, of every token but the first of each sample.",
        ]
    if all(report.error is not None for report in outcome.reports):
        lines += ["", *_errors(outcome)]
    if not s.sym and recipe.zero_version == 1 and (low := sum(report.num_low_zeros for report in outcome.reports)):
        lines += ["", f"{low_zeros_warning(low)}"]
    lines += ["", "## Use", "", "```bash", f"gptq-api serve {name}", "```", ""]
    return "\n".join(lines)


def low_zeros_warning(num: int) -> str:
    return (
        f"{num} zero points are 0, and programs disagree on how to read those in the v1 format (gptq-api reads them "
        "right); --format gptq_v2 avoids that."
    )


def _damping(recipe: Recipe, outcome: Outcome) -> str:
    asked = recipe.settings.damp_percent
    raised = [report.damp_percent for report in outcome.reports if report.damp_percent > asked]
    if recipe.nearest:
        return "none"
    return f"{asked:g}" + (f", up to {max(raised):g} in {len(raised)} modules that needed more" if raised else "")


def _errors(outcome: Outcome) -> list[str]:
    """The mean over the layers for each kind of module."""
    by_kind: dict[str, list[float]] = {}
    for report in outcome.reports:
        by_kind.setdefault(report.module.rsplit(".", 1)[-1], []).append(report.error or 0.0)
    lines = ["| module | output error, mean over the layers | worst layer |", "|---|---|---|"]
    lines += [
        f"| {kind} | {100 * sum(errors) / len(errors):.3f} % | {100 * max(errors):.3f} % |"
        for kind, errors in by_kind.items()
    ]
    return [
        *lines,
        "",
        "Output error: squared change of the module's output on the calibration text, as a share of its square.",
    ]

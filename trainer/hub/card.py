"""The README.md of an exported model: what it was trained on, how well, with what, and at what cost."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from ...model.config import ModelConfig
from ...model.flops import num_parameters
from ...model.hf.adapter import Adapter
from ..meters.energy import MEANING
from ..meters.tariff import JOULES_PER_KWH
from ..report.figures import plain_decimal
from ..sinks.sink import OF_PARTS

NUM_CURVE_ROWS = 20
HUB_LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]*")


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside the model's shape.

    `heldout` gives by name the last evaluation's record. `joules` is
    the energy of the whole run with what restarts wasted, None where it was not measured; `joules_source` is
    `EnergyMeter.source`. `g_co2e` are grams, None where the grid's intensity was not given; they follow from `pue` and
    `grid`: grams a kWh, and whose figure that is. `licence` is an identifier of the Hugging Face hub or a free text,
    "" where none is stated. `loss_curve` holds (step, loss) pairs. `versions` gives package -> version. `origin` names
    the model whose weights training began with, "" where it began from scratch. `metered_share` is the share of the
    tokens in whose time joules were metered.
    """

    name: str
    step: int
    tokens: int
    heldout: dict[str, dict[str, float]]
    hardware: str
    joules: float | None
    joules_source: str
    g_co2e: float | None
    licence: str
    data: str
    loss_curve: list[tuple[int, float]]
    versions: dict[str, str] = field(default_factory=dict)
    origin: str = ""
    metered_share: float = 1.0
    pue: float = 1.0
    grid: tuple[float, str] | None = None


@dataclass(frozen=True)
class Verification:
    """How far what the exported directory gives in fp32 lies from the trainer's, over `num_positions` positions.

    `compared` names what that is. `relative_error` is `max_abs_difference` over the largest absolute value of the
    trainer's. `loaded_whole` is false where the model did not fit into memory and was loaded a module at a time.
    """

    relative_error: float
    max_abs_difference: float
    num_positions: int
    tolerance: float
    loaded_whole: bool = True
    compared: str = "logits"


def model_card(
    adapter: Adapter, config: ModelConfig, facts: CardFacts, *, dtype: str, verification: Verification | None
) -> str:
    """Write the card in Markdown with the hub's front matter."""
    sections = [
        _front_matter(adapter, facts),
        f"# {_inline(facts.name)}",
        _introduction(config, facts, dtype),
        f"## Use\n\n```python\n{_use(adapter, config)}\n```",
        f"## Data\n\n{facts.data.strip() or 'Not stated.'}",
        "## Held-out results\n\n" + _heldout_table(facts.heldout),
        "## Training loss\n\n" + _curve_table(facts.loss_curve),
        "## Energy\n\n" + _energy(facts),
        "## Verification\n\n" + _verification(verification),
        "## Licence\n\n" + (_inline(facts.licence) or "Not stated."),
    ]
    if facts.versions:
        rows = [[name, version] for name, version in facts.versions.items()]
        sections.append("## Versions\n\n" + _table(["package", "version"], rows))
    return "\n\n".join(sections) + "\n"


def _use(adapter: Adapter, config: ModelConfig) -> str:
    if config.pooling is not None:
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("PATH")\nvectors = model.encode(["a text", "another"])'
        )
    name = "AutoModelForCausalLM" if config.causal else adapter.architecture
    call = ""
    if adapter.framing == "spans":  # by itself the class does not say what stands for a hidden span
        call = (
            '\n\nencoded = tokenizer("A text with <extra_id_0> in it.", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**encoded, max_new_tokens=16)[0]))"
        )
    return (
        f"from transformers import {', '.join(sorted(('AutoTokenizer', name)))}\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'model = {name}.from_pretrained("PATH"){call}'
    )


def _front_matter(adapter: Adapter, facts: CardFacts) -> str:
    library = "sentence-transformers" if adapter.pipeline_tag == "sentence-similarity" else "transformers"
    lines = [f"library_name: {library}", f"pipeline_tag: {adapter.pipeline_tag}", "tags:", "- basestone"]
    if HUB_LICENCE.fullmatch(facts.licence):
        lines.append(f"license: {_yaml(facts.licence)}")
    elif facts.licence:
        lines += ["license: other", f"license_name: {_yaml(facts.licence)}"]
    if facts.g_co2e is not None:
        source = MEANING.get(facts.joules_source, facts.joules_source)
        lines += [
            "co2_eq_emissions:",
            # grams; the hub's filter reads neither exponents nor thousands separators
            f"  emissions: {plain_decimal(facts.g_co2e)}",
            f"  source: {_yaml(source)}",
            "  training_type: pre-training",
            f"  hardware_used: {_yaml(facts.hardware)}",
        ]
    return "---\n" + "\n".join(lines) + "\n---"


def _introduction(config: ModelConfig, facts: CardFacts, dtype: str) -> str:
    rows = [
        ["parameters", f"{num_parameters(config):,}"],
        ["family", config.family],
        ["layers x width", f"{config.num_layers} x {config.hidden_size}"],
        ["attention heads / key-value heads", f"{config.num_attention_heads} / {config.num_query_groups}"],
        ["vocabulary", f"{config.vocab_size:,}"],
        ["longest sequence", f"{config.max_sequence_length:,}"],
        ["weights", dtype],
        ["training steps", f"{facts.step:,}"],
        ["training tokens", f"{facts.tokens:,}"],
        ["hardware", facts.hardware],
    ]
    if not facts.origin:
        begun = "A language model pre-trained from scratch with Basestone."
    elif facts.tokens:
        begun = f"A language model pre-trained with Basestone, beginning with the weights of {_inline(facts.origin)}."
    else:
        begun = f"The weights of {_inline(facts.origin)}, converted with Basestone; its own card says what they are."
    return f"{begun}\n\n{_table(['', ''], rows)}"


def _heldout_table(heldout: dict[str, dict[str, float]]) -> str:
    if not heldout:
        return "None were measured."
    named = list(
        dict.fromkeys(name for values in heldout.values() for name in values if name.endswith(OF_PARTS))
    )
    of_parts = any(name.endswith("_loss") for name in named)
    titles = {
        "loss": f"loss ({'nats' if of_parts else 'nats per prediction'})",
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
    }
    titles |= {name: name.replace("_", " ") for name in named}
    titles = {
        name: title for name, title in titles.items() if any(name in values for values in heldout.values())
    }
    titles["tokens"] = "predictions"
    rows = [[name, *(_number(values.get(column)) for column in titles)] for name, values in heldout.items()]
    return _table(["held-out set", *titles.values()], rows)


def _curve_table(curve: list[tuple[int, float]]) -> str:
    if not curve:
        return "Not recorded."
    last = len(curve) - 1
    picked = sorted({round(i * last / (NUM_CURVE_ROWS - 1)) for i in range(NUM_CURVE_ROWS)})
    return _table(["step", "loss"], [[f"{curve[i][0]:,}", _number(curve[i][1])] for i in picked])


def _energy(facts: CardFacts) -> str:
    known = facts.joules is not None and facts.joules_source != "none"
    if facts.joules is None or not known:
        energy = "Energy: not measured."
    else:
        label = MEANING.get(facts.joules_source, facts.joules_source)
        energy = f"Energy: {facts.joules / JOULES_PER_KWH:.4g} kWh ({label})."
        if facts.tokens and facts.metered_share:
            energy += f" That is {facts.joules / (facts.tokens * facts.metered_share):.3g} J per token."
    if facts.g_co2e is None:
        missing = "no carbon intensity was given" if known else "the energy is not known"
        return f"{energy}\n\nCO2e: not known ({missing})."
    how = "estimated" if facts.joules_source == "user-watts" else "metered"
    parts = [f"the {how} energy above"] if known else []
    parts.append(f"a PUE of {facts.pue:g}")
    if facts.grid is not None:
        parts.append(f"{facts.grid[0]:g} g CO2e per kWh ({_inline(facts.grid[1])})")
    return f"{energy}\n\nCO2e: {plain_decimal(facts.g_co2e)} g, from {', '.join(parts)}; operational only."


def _verification(verification: Verification | None) -> str:
    if verification is None:
        return "This export was not verified."
    how = "" if verification.loaded_whole else ", a module at a time,"
    return (
        f"This directory was loaded from disk with transformers in fp32{how} and its {verification.compared} compared "
        f"with the trainer's over {verification.num_positions:,} positions: relative error "
        f"{verification.relative_error:.2e} (largest difference {verification.max_abs_difference:.2e}, "
        f"tolerance {verification.tolerance:.0e})."
    )


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in line) + " |" for line in lines)


def _inline(text: str) -> str:
    """Keep a value from ending its line, opening a column or becoming HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _yaml(text: str) -> str:
    return json.dumps(text)  # a JSON string is a YAML string

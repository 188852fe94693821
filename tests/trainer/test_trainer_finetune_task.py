"""Which models `--task sft` takes: by what config.json says, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from tiny_hub import labelled, questions, write_lines
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from basestone.trainer.errors import ConfigError
from basestone.trainer.finetuning.directory import next_token_problems
from basestone.trainer.finetuning.run import prepare
from basestone.trainer.finetuning.settings import FinetuneSettings

ADVICE = "use --task classify, or take a decoder such as llama"
MODELS = Path(transformers.__file__).parent / "models"


def problems(copy: Path, **config: object) -> list[str]:
    (copy / "config.json").write_text(json.dumps({"dtype": "float32", **config}))
    return next_token_problems(copy)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert"}, "is of type bert, which predicts no next token"),
        ({"model_type": "roberta", "is_decoder": False}, "is of type roberta, which predicts no next token"),
        ({"model_type": "distilbert"}, "is of type distilbert, which predicts no next token"),
        ({"model_type": "xlm"}, "is of type xlm, which predicts no next token"),
        ({"model_type": "llama", "is_causal": False}, "is of type llama, but attends to both sides by its config.json"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "is of type gemma3_text, but attends"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is of type t5, which has an encoder before its decoder"),
        ({"model_type": "bart"}, "is of type bart, which has an encoder before its decoder"),
    ],
)  # fmt: skip
def test_what_predicts_no_next_token_is_refused_first(copy, tmp_path, config, said):
    (found,) = problems(copy, **config)
    assert found.startswith(f"{copy} {said}") and found.endswith(f", so --task sft cannot tune it; {ADVICE}")
    data = write_lines(tmp_path / "data.jsonl", questions())
    with pytest.raises(ConfigError) as caught:
        prepare(FinetuneSettings(source=copy, data=data, out=tmp_path / "out"), 1, on_cpu=True)
    assert str(caught.value) == f"finetune: {found}" and caught.value.exit_code == 64
    write_lines(data, labelled(40))
    settings = FinetuneSettings(source=copy, data=data, out=tmp_path / "out", task="classify")
    assert prepare(settings, 1, on_cpu=True)[0].labels == ["colour", "fruit", "neither"]


def test_a_model_for_nothing_of_text_is_sent_to_no_classification(copy):
    (found,) = problems(copy, model_type="vit")
    assert found == (
        f"{copy} is of type vit, for which transformers has no class that predicts the next token, so --task sft "
        "cannot tune it; take a decoder such as llama"
    )


def test_vectors_of_texts_are_refused(copy):
    """An export with `model.pooling` has a decoder's type, and no head."""
    (copy / "modules.json").write_text("[]")
    (found,) = next_token_problems(copy)
    assert found == (
        f"{copy} makes vectors of texts (modules.json) and predicts no next token, so --task sft cannot tune it; "
        f"{ADVICE}"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "gpt2", "is_decoder": False, "is_encoder_decoder": False},
        {"model_type": "gemma3_text", "use_bidirectional_attention": False, "is_causal": True},
        {"model_type": "bert", "is_decoder": True},
        {"model_type": "bart", "is_decoder": True, "is_encoder_decoder": False},
        {"model_type": "xlm", "causal": True},
        {"model_type": "no-such-type"},  # transformers says that itself
        {"model_type": [3]},
        {},
    ],
)
def test_decoders_are_taken(copy, config):
    assert problems(copy, **config) == []


def test_every_type_that_transformers_warns_of_is_refused(copy):
    """Its classes of encoders warn, as they are loaded, that they see no next token; ours must be no shorter a list."""
    warning = re.compile(r"add\s*`?is_decoder=True")
    warned = {
        kind
        for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        for file in (MODELS / model_type_to_module_name(kind)).glob("modeling_*.py")
        if warning.search(file.read_text())
    }
    assert len(warned) > 10
    assert [kind for kind in sorted(warned) if not problems(copy, model_type=kind)] == []

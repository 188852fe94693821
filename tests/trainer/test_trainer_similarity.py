"""`basestone similarity`: figures of vectors against slow computations of our own, and what bad input gets."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hub import COLOURS, FRUITS, make_directory, make_tokenizer, write_lines

from basestone.model.embedding.pooling import pooled
from basestone.trainer.errors import ConfigError, NumericsError
from basestone.trainer.similarity import run
from basestone.trainer.similarity.run import similarity


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    return make_directory(
        folder / "model", make_tokenizer(folder / "tokenizer.model"), pooling="mean", init_std=0.2
    )


def pairs(*, scored: bool) -> list[dict[str, Any]]:
    """Texts of different lengths and their partners; scores have ties."""
    rows = [
        {
            "text": f"The {fruit} is {colour}.",
            "other": f"What colour has the {fruit}? {colour}" + " or not" * (i % 4),
        }
        for i, (fruit, colour) in enumerate(zip(FRUITS * 2, COLOURS + COLOURS[::-1], strict=True))
    ]
    return [row | ({"score": i * 7 % 5} if scored else {}) for i, row in enumerate(rows)]


def vectors(directory: Path, texts: list[str]) -> np.ndarray:
    """Vectors [texts, hidden] by transformers alone, one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, trunk = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    rows = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = trunk(**encoded).last_hidden_state
        length = torch.tensor([[states.shape[1]]])
        rows.append(pooled(states.transpose(0, 1), length, "mean")[0].double().numpy())
    return np.stack(rows)


def cosines(directory: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """Cosines of all texts and all others, [texts, others]."""
    first, second = (vectors(directory, [row[key] for row in rows]) for key in ("text", "other"))
    return first @ second.T


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties share their mean."""
    less = (values[:, None] > values).sum(1)
    return less + ((values[:, None] == values).sum(1) + 1) / 2


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def measure(capsys, source: Path, data: Path, *, batch: int = 5) -> dict[str, Any]:
    capsys.readouterr()
    similarity(source, data, batch=batch, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_vectors_are_those_of_transformers_and_our_pooling(model):
    from sentence_transformers import SentenceTransformer

    texts = [row["other"] for row in pairs(scored=False)]
    got = SentenceTransformer(str(model), device="cpu").encode(texts)
    assert np.abs(got - vectors(model, texts)).max() < 1e-5


def test_correlations_equal_a_slow_computation(model, tmp_path, capsys):
    rows = pairs(scored=True)
    found = measure(capsys, model, write_lines(tmp_path / "sts.jsonl", rows))
    scores, same = np.array([row["score"] for row in rows], float), cosines(model, rows).diagonal()
    assert found == {
        "model": "model",
        "data": "sts.jsonl",
        "pairs": 16,
        "spearman": pytest.approx(correlation(ranks(scores), ranks(same)), abs=1e-6),
        "pearson": pytest.approx(correlation(scores, same), abs=1e-5),
    }
    assert abs(found["spearman"] - found["pearson"]) > 1e-3


def test_partners_are_looked_for_among_all_others(model, tmp_path, capsys, monkeypatch):
    rows = pairs(scored=False)
    rows.append({"text": rows[0]["text"], "other": rows[0]["other"]})  # twice the same is one
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    found = measure(capsys, model, data)
    scores = cosines(model, rows[:-1])
    places = (scores > scores.diagonal()[:, None]).sum(1)
    assert 0 < (places < 1).mean() < (places < 10).mean() < 1
    assert found == {
        "model": "model",
        "data": "pairs.jsonl",
        "texts": 16,
        "others": 16,
        "recall_at_1": pytest.approx((places < 1).mean()),
        "recall_at_10": pytest.approx((places < 10).mean()),
        "mrr_at_10": pytest.approx(np.where(places < 10, 1 / (places + 1), 0).mean()),
    }
    monkeypatch.setattr(run, "CORPUS_CHUNK", 3)
    assert measure(capsys, model, data, batch=1) == pytest.approx(found)


def test_a_text_with_several_partners_has_to_find_all(model, tmp_path, capsys):
    rows = pairs(scored=False)[:8]
    nearest = cosines(model, rows).argmax(1)
    (lost, *_) = np.flatnonzero(nearest != np.arange(8))
    more = [{"text": rows[lost]["text"], "other": rows[nearest[lost]]["other"]}]  # one of its two is nearest
    found = measure(capsys, model, write_lines(tmp_path / "pairs.jsonl", rows + more))
    assert (found["texts"], found["others"]) == (8, 8)
    assert found["recall_at_1"] == pytest.approx(((nearest == np.arange(8)).sum() + 0.5) / 8)


def test_the_figures_in_words(model, tmp_path, capsys):
    similarity(model, write_lines(tmp_path / "p.jsonl", pairs(scored=False)), batch=8, as_json=False)
    out = capsys.readouterr().out
    assert out.startswith("model on p.jsonl: partners of 16 texts among 16: recall at 1 0.")
    assert ", recall at 10 0." in out and ", mrr at 10 0." in out
    similarity(model, write_lines(tmp_path / "s.jsonl", pairs(scored=True)), batch=8, as_json=False)
    assert capsys.readouterr().out.startswith("model on s.jsonl: 16 pairs: spearman ")


@pytest.mark.parametrize(("count", "there"), [(10, False), (11, True)])
def test_no_recall_where_every_partner_is_found(model, tmp_path, capsys, count, there):
    found = measure(capsys, model, write_lines(tmp_path / "p.jsonl", pairs(scored=False)[:count]))
    assert ("recall_at_10" in found) == there and {"recall_at_1", "mrr_at_10"} < set(found)


def test_an_encoder_without_a_pooler_loads_without_a_report(tmp_path, capsys):
    """transformers' BertModel makes a pooler that no vector comes from, and reports at length that it is new."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer.model")
    keys = {"family": "bert", "pooling": "mean", "next_sentence": False, "init_std": 0.2}
    encoder = make_directory(tmp_path / "encoder", tokenizer, **keys)
    data = write_lines(tmp_path / "p.jsonl", pairs(scored=False))
    written: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        figures = measure(capsys, encoder, data)
        assert written == []
        (encoder / "sentence_bert_config.json").write_text("{}")
        assert measure(capsys, encoder, data) == figures
        assert any("pooler" in text for text in written), "the settings no longer matter"
    finally:
        logging.getLogger("transformers").removeHandler(handler)


# ---- bad input ----------------------------------------------------------------------------------------------------


def message(source: Path, data: Path, kind: type[Exception] = ConfigError) -> str:
    """What is said; nothing of it takes a model."""
    with pytest.raises(kind) as caught:
        similarity(source, data, batch=8, as_json=False)
    assert str(caught.value).startswith("similarity: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}], 'line 1 has no "other"; give {"text", "other"} with or without "score"'),
        ([{"other": "a", "score": 1}], 'line 1 has no "text"'),
        ([{"text": 3, "other": "b"}], 'line 1 has no text in "text" but 3'),
        ([{"text": "a", "other": " "}], 'line 1 has an empty "other"'),
        ([{"text": "a", "other": "b", "score": "high"}], 'line 1 has the score "high"; give a number'),
        ([{"text": "a", "other": "b", "score": True}], "line 1 has the score true; give a number"),
        ([{"text": "a", "other": "b", "score": None}], "line 1 has the score null; give a number"),
        ([{"text": "a", "other": "b", "score": float("nan")}], "line 1 has the score NaN; give a number"),
        ([{"text": "a", "other": "b", "score": 10**400}], "line 1 has the score 1000"),
        ([{"text": "a", "other": "b", "score": [1]}], "line 1 has the score [1]; give a number"),
        (
            [{"text": "a", "other": "b", "score": 2}, {"text": "c", "other": "d", "score": 2.0}],
            "every score is 2; a correlation needs two or more different ones",
        ),
        (
            [{"text": "a", "other": "b"}, {"text": "c", "other": "d", "score": 2.0}],
            "line 2 has a score and line 1 has none; give all lines one, or none",
        ),
        ([{"text": "a", "other": "b"}, {"text": "c", "other": "b"}], 'every "other" is the same'),
        (
            [{"text": "a", "other": "b", "label": 1}],
            'line 1 has the key "label", which similarity does not read; leave it out: give {"text", "other"} with',
        ),
        ([], "holds no examples"),
    ],
)
def test_bad_pairs_are_named_before_the_model_is_loaded(model, tmp_path, rows, said, monkeypatch):
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("the model was loaded"))
    assert said in message(model, write_lines(tmp_path / "pairs.jsonl", rows))


def test_what_is_no_encoder_of_texts(copy, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", pairs(scored=False))
    assert "no is no directory" in message(tmp_path / "no", data)
    for content, said in (
        ("{", "modules.json cannot be read as JSON"),
        ('[{"path": "x"}]', 'modules.json is no list of modules with "type" and "path"'),
        (
            '[{"type": "os.path.join", "path": ""}]',
            "names the module os.path.join; it may be sentence-transformers'",
        ),
        (
            '[{"type": "sentence_transformers.models.CLIPModel", "path": ""}]',
            "names the module sentence_transformers",
        ),
        ("[]", "begins with nothing; it must with Transformer, Pooling"),
        (
            '[{"type": "sentence_transformers.models.Transformer", "path": ""}]',
            "begins with Transformer; it must with Transformer, Pooling",
        ),
        (
            '[{"type": "sentence_transformers.models.Pooling", "path": "../x"}]',
            "x, which is outside the directory",
        ),
    ):
        (copy / "modules.json").write_text(content)
        assert said in message(copy, data)
    (copy / "modules.json").unlink()
    assert "has no modules.json: it makes no vectors of texts" in message(copy, data)


def test_a_pickle_of_a_module_is_refused(copy, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", pairs(scored=False))
    (copy / "1_Pooling" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert "pytorch_model.bin is a pickle, which would run code" in message(copy, data)


def test_a_directory_that_the_library_cannot_load(copy, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", pairs(scored=False))
    (copy / "1_Pooling" / "config.json").write_text("[]")
    assert f"sentence-transformers cannot load {copy}" in message(copy, data)


def test_texts_that_are_all_the_same_to_the_model(model, tmp_path):
    rows = [{"text": "a", "other": "b", "score": score} for score in (1, 2, 3)]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    said = message(model, data, NumericsError)
    assert "gives all 3 pairs of" in said and "the same cosine, or none that is finite" in said


def test_vectors_that_tell_no_texts_apart_find_no_partner(copy, tmp_path):
    """Every rank would be found by the order of the file."""
    data = write_lines(tmp_path / "pairs.jsonl", pairs(scored=False))
    weights = load_file(copy / "model.safetensors")
    for value in (torch.nan, 0.0):
        save_file(
            {name: torch.full_like(tensor, value) for name, tensor in weights.items()},
            copy / "model.safetensors",
        )
        assert "the same cosine, or none that is finite" in message(copy, data, NumericsError)


def test_without_the_library_it_says_what_to_install(model, tmp_path, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentence_transformers" else original(name)
    )
    assert "`pip install 'basestone[similarity]'`" in message(model, tmp_path / "no.jsonl")

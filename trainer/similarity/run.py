"""`basestone similarity` in a worker: what vectors of texts are worth, by sentence-transformers' own evaluators."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from ..errors import ConfigError, NumericsError
from ..finetuning.directory import PICKLED, directory_problems
from ..hub.config_file import name_of, read_json
from .pairs import TextPair, read_pairs

MODULES = ("Transformer", "Pooling", "Normalize", "Dense")
LIBRARY = "sentence_transformers"
AMONG = (1, 10)
NUM_TRIED = 8  # texts that are encoded before all are
CORPUS_CHUNK = 1024  # partners whose scores are there at a time


def similarity(source: Path, data: Path, *, batch: int, as_json: bool) -> None:
    """Say how well cosines of vectors agree with people's scores, or find each text's partner.

    Raises:
        ConfigError: everything that is wrong with directory and data, before the model is loaded.
        NumericsError: all cosines are equal, or not finite.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        raise ConfigError("similarity: needs sentence-transformers; `pip install 'basestone[similarity]'`")
    pairs, wrong = read_pairs(data)
    if problems := [*(directory_problems(source) or _module_problems(source)), *wrong]:
        raise ConfigError("\n  ".join([f"similarity: {problems[0]}", *problems[1:]]))
    from .. import runtime as processes

    processes.leave_launcher()
    figures = _measure(source, pairs, batch)
    if figures is None or not all(math.isfinite(figure) for figure in figures.values()):
        raise NumericsError(
            f"similarity: {source} gives all {len(pairs)} pairs of {data} the same cosine, or none that is finite"
        )
    name = name_of(source)
    if as_json:
        print(json.dumps({"model": name, "data": data.name, **figures}, indent=1, ensure_ascii=False))
    else:
        print(f"{name} on {data.name}: {_text(figures)}")


def _module_problems(source: Path) -> list[str]:
    """Say what in modules.json is not there to be read; a module of another package would be code of its own."""
    path = source / "modules.json"
    if not path.is_file():
        return [
            f"{source} has no modules.json: it makes no vectors of texts; export a run that has `model.pooling`"
        ]
    try:
        modules = [(str(module["type"]), source / str(module["path"])) for module in read_json(path)]
    except ConfigError as error:
        return [str(error)]
    except (TypeError, KeyError):
        return [f'{path} is no list of modules with "type" and "path"']
    found = []
    for kind, folder in modules:
        if not kind.startswith(f"{LIBRARY}.") or kind.rpartition(".")[2] not in MODULES:
            found.append(
                f"{path} names the module {kind}; it may be sentence-transformers' {', '.join(MODULES)}"
            )
        elif not folder.resolve().is_relative_to(source.resolve()):
            found.append(f"{path} names {folder}, which is outside the directory")
        elif folder != source and (pickled := [file for name in PICKLED for file in folder.glob(name)]):
            found.append(f"{pickled[0]} is a pickle, which would run code; convert it to safetensors")
    names = [kind.rpartition(".")[2] for kind, _ in modules[:2]]
    if not found and names != ["Transformer", "Pooling"]:
        found.append(f"{path} begins with {', '.join(names) or 'nothing'}; it must with Transformer, Pooling")
    return found


def _measure(source: Path, pairs: list[TextPair], batch: int) -> dict[str, float] | None:
    """Load the model as any client would, and give the figures by name; None where texts have no vectors to tell."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            str(source),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
        vectors = model.encode(list(dict.fromkeys(pair.other for pair in pairs))[:NUM_TRIED])
    except Exception as error:  # of a dozen classes, by module
        raise ConfigError(f"similarity: sentence-transformers cannot load {source}: {error}") from error
    # Ranks would be found for these, too: by the order of the file.
    if not np.isfinite(vectors).all() or (len(vectors) > 1 and (vectors == vectors[0]).all()):
        return None
    scores = [pair.score for pair in pairs if pair.score is not None]
    return _correlations(model, pairs, scores, batch) if scores else _retrieval(model, pairs, batch)


def _correlations(model: Any, pairs: list[TextPair], scores: list[float], batch: int) -> dict[str, float]:
    """Give rank and linear correlation of the cosines with the scores; ties share the mean of their ranks."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    found = EmbeddingSimilarityEvaluator(
        [pair.text for pair in pairs],
        [pair.other for pair in pairs],
        scores,
        batch_size=batch,
        similarity_fn_names=["cosine"],
    )(model)
    return {"pairs": len(pairs), **{name: float(found[f"{name}_cosine"]) for name in ("spearman", "pearson")}}


def _retrieval(model: Any, pairs: list[TextPair], batch: int) -> dict[str, float]:
    """Look for the partners of each text among all of the file; a text of several lines has several."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    partners: dict[str, set[str]] = {}
    for pair in pairs:
        partners.setdefault(pair.text, set()).add(pair.other)
    others = dict.fromkeys(pair.other for pair in pairs)
    found = InformationRetrievalEvaluator(
        {text: text for text in partners},
        {other: other for other in others},
        partners,
        corpus_chunk_size=CORPUS_CHUNK,
        mrr_at_k=[max(AMONG)],
        ndcg_at_k=[max(AMONG)],
        accuracy_at_k=[max(AMONG)],
        precision_recall_at_k=list(AMONG),
        map_at_k=[max(AMONG)],
        batch_size=batch,
        score_functions={"cosine": cos_sim},
    )(model)
    # Among so few, every partner is found.
    measured = [among for among in AMONG if among < len(others)]
    recalls = {f"recall_at_{among}": float(found[f"cosine_recall@{among}"]) for among in measured}
    mean_reciprocal = float(found[f"cosine_mrr@{max(AMONG)}"])
    return {"texts": len(partners), "others": len(others), **recalls, f"mrr_at_{max(AMONG)}": mean_reciprocal}


def _text(figures: dict[str, float]) -> str:
    if "others" in figures:
        what = f"partners of {figures['texts']:,} texts among {figures['others']:,}"
    else:
        what = f"{figures['pairs']:,} pairs"
    values = [
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items() if isinstance(value, float)
    ]
    return f"{what}: {', '.join(values)}"

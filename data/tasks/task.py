"""What a run makes of its stream: the arrays that a model is trained on, by name.

A task asks the stream for rows of some length and packing, and turns every batch of them into arrays. What it draws it
draws by the global sample id, so that the arrays are the same for any readers, workers and resumes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..config import TaskConfig
from ..errors import DataConfigError
from ..stream import StreamBatch
from ..tokenizer import Tokenizer
from .causal import CausalTask
from .contrastive import ContrastiveTask
from .masked import MaskRates, MaskVocabulary
from .masked_task import EncoderHiding, MaskedTask, SentencePairTask
from .spans import SpanRates, corrupted_lengths, count_spans
from .spans_task import SpansTask
from .special_pieces import find_frame, find_mask, find_sentinels, special_table
from .vocabulary import word_starts

# [CLS], [SEP] and a token; one more where rows are whole documents; two parts and three specials
MIN_MASKED, MIN_WHOLE, MIN_PAIR = 3, 4, 5


class Task(Protocol):
    """Make training arrays of a stream's rows.

    ``row_tokens`` and ``packing`` are the stream's sequence length (its rows have one token more) and packing.
    ``widths`` are the fields and their columns; every field is int32 [num_samples, columns].
    """

    @property
    def row_tokens(self) -> int:
        """Return the stream's sequence length."""

    @property
    def packing(self) -> str:
        """Return the stream's packing."""

    @property
    def widths(self) -> dict[str, int]:
        """Return the fields' columns."""

    def arrays(self, batch: StreamBatch) -> dict[str, np.ndarray]:
        """Return the fields of a batch; filler samples are padding, and nothing in them counts."""

    def reseeded(self, seed: int) -> Task:
        """Return the task with another seed for what it draws."""


def make_task(
    task: TaskConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    packing: str,
    mask_document_start: bool,
    seed: int,
) -> Task:
    """Return the task that a run file describes; ``task.name`` is given.

    ``sequence_length`` are the tokens that the model takes, or its encoder. Raises DataConfigError in one line for what
    the tokenizer lacks, and for settings that do not go together.
    """
    assert task.name is not None
    if problem := task.problem(task.name):  # the name may have been filled in since the settings were checked
        raise DataConfigError(f"task: {problem}")
    if task.name == "causal":
        return CausalTask(sequence_length, packing)
    if mask_document_start:
        raise DataConfigError(
            f"data.mask_document_start is for predicting the next token, and the task is {task.name}; leave it out"
        )
    if task.name == "masked":
        return _masked_task(task, tokenizer, sequence_length, packing, seed)
    if packing != "split":
        raise DataConfigError(
            f'data.packing is "{packing}", and the task {task.name} lays out its own rows; leave data.packing out'
        )
    if task.name == "spans":
        return _spans_task(task, tokenizer, sequence_length, seed)
    _check_length(sequence_length, MIN_MASKED, "texts in their frames")
    return ContrastiveTask(sequence_length, task.pairs, find_frame(tokenizer))


def _masked_task(
    task: TaskConfig, tokenizer: Tokenizer, sequence_length: int, packing: str, seed: int
) -> MaskedTask | SentencePairTask:
    rates = MaskRates(
        task.predicted, task.masked, task.replaced, task.max_predictions, whole_words=task.whole_words
    )
    starts = word_starts(tokenizer.pieces()) if task.whole_words else None
    vocabulary = MaskVocabulary(find_mask(tokenizer), special_table(tokenizer), starts)
    hiding = EncoderHiding(sequence_length, find_frame(tokenizer), seed, vocabulary, rates)
    if not task.next_sentence:
        _check_length(sequence_length, MIN_MASKED if packing == "split" else MIN_WHOLE, "masked tokens")
        return MaskedTask(hiding, packing, tokenizer.bos, tokenizer.eos)
    _check_length(sequence_length, MIN_PAIR, "sentence pairs")
    if packing != "split":
        raise DataConfigError(
            f'data.packing is "{packing}", and task.next_sentence makes pairs; leave data.packing out'
        )
    return SentencePairTask(hiding)


def _spans_task(task: TaskConfig, tokenizer: Tokenizer, sequence_length: int, seed: int) -> SpansTask:
    rates = SpanRates(task.noise, task.mean_span)
    _check_length(sequence_length, corrupted_lengths(2, rates)[0], "spans")
    sentinels = find_sentinels(tokenizer)
    found = SpansTask(sequence_length, sentinels, rates, tokenizer.bos, tokenizer.eos, tokenizer.pad, seed)
    num_spans = count_spans(found.row_tokens, rates)[1]
    if num_spans > sentinels.count:
        raise DataConfigError(
            f"inputs of {sequence_length} tokens have {num_spans} spans, and tokenizer {tokenizer.path} has "
            f"{sentinels.count} sentinels; train it with `--sentinels {num_spans}`, or lower data.sequence_length"
        )
    return found


def _check_length(sequence_length: int, least: int, what: str) -> None:
    if sequence_length < least:
        raise DataConfigError(f"sequence_length is {sequence_length}; {what} need at least {least} tokens")

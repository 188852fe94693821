"""Make rows of the stream the inputs of an encoder that predicts hidden tokens, and whether sentences follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..stream import StreamBatch
from .masked import MaskedSample, MaskRates, MaskVocabulary, mask_tokens
from .sample_random import SampleRandom
from .sentences import EncoderSpecials, SentencePair, frame_pair


@dataclass(frozen=True, eq=False)
class EncoderInputs:
    """Change framed sequences of ``length``, and lay out what a model takes of them."""

    length: int
    frame: EncoderSpecials
    seed: int

    def changed(self, framed: np.ndarray, random: SampleRandom) -> MaskedSample:
        """Return what the model sees of a sequence, int [num_tokens], and what it has to tell."""
        raise NotImplementedError

    def empty(self, num_samples: int) -> dict[str, np.ndarray]:
        """Return the fields of samples that are only padding."""
        tokens = np.full((num_samples, self.length), self.frame.pad, np.int32)
        weights = np.zeros_like(tokens)
        return {
            "tokens": tokens,
            "labels": tokens.copy(),
            "weights": weights,
            "length": np.zeros((num_samples, 1), np.int32),
        }

    def write(
        self,
        fields: Mapping[str, np.ndarray],
        row: int,
        framed: np.ndarray,
        sample: int,
    ) -> None:
        """Write global sample ``sample``, int [num_tokens] without padding, into a row of the fields."""
        found = self.changed(framed, SampleRandom(self.seed, sample))
        count = len(framed)
        fields["tokens"][row, :count] = found.tokens
        fields["labels"][row, :count] = found.labels
        fields["weights"][row, :count] = found.weights
        fields["length"][row] = count


@dataclass(frozen=True, eq=False)
class EncoderHiding(EncoderInputs):
    """Hide tokens, which are to be predicted."""

    vocabulary: MaskVocabulary
    rates: MaskRates

    def changed(self, framed: np.ndarray, random: SampleRandom) -> MaskedSample:
        """See EncoderInputs."""
        return mask_tokens(framed, self.vocabulary, random, self.rates)


@dataclass(frozen=True, eq=False)
class MaskedTask:
    """Predict hidden tokens of [CLS] row [SEP]: see task.Task.

    Fields, with ``length`` columns L: ``tokens`` [L] with some hidden, ``labels`` [L] as they were, ``weights`` [L],
    ``length`` [1], the tokens that are no padding.

    Where documents meet in a row, the end of one and the beginning of the next both become [SEP]: [CLS] stands in
    front only, and RoBERTa parts its segments with two as well. In rows of whole documents, which are padded anyway,
    the frame takes the place of the first document's beginning and the last one's end; a row cut anywhere
    keeps its length.
    """

    inputs: EncoderInputs
    packing: str
    bos: int
    eos: int

    @property
    def row_tokens(self) -> int:
        """See task.Task: rows that are cut share a token, whole ones do not."""
        return self.inputs.length - (2 if self.packing == "split" else 3)

    @property
    def widths(self) -> dict[str, int]:
        """See task.Task."""
        length = self.inputs.length
        return {"tokens": length, "labels": length, "weights": length, "length": 1}

    def arrays(self, batch: StreamBatch) -> dict[str, np.ndarray]:
        """See task.Task."""
        fields = self.inputs.empty(len(batch.ids))
        frame, room = self.inputs.frame, self.inputs.length - 2
        for row in np.flatnonzero(batch.ids >= 0).tolist():
            text = batch.tokens[row, : min(int(batch.lengths[row]), room)]
            if self.packing != "split":
                text = text[int(text[0] == self.bos) :]
                text = text[: len(text) - int(len(text) > 0 and text[-1] == self.eos)]
            text = np.where((text == self.bos) | (text == self.eos), frame.sep, text)
            self.inputs.write(
                fields, row, np.concatenate([[frame.cls], text, [frame.sep]]), int(batch.ids[row])
            )
        return fields

    def reseeded(self, seed: int) -> MaskedTask:
        """See task.Task."""
        return replace(self, inputs=replace(self.inputs, seed=seed))


@dataclass(frozen=True, eq=False)
class SentencePairTask:
    """Predict hidden tokens of [CLS] first [SEP] second [SEP], and whether the second follows: see task.Task.

    Fields: those of MaskedTask, and ``segments`` [L], 1 for the second part and its [SEP]; ``next_label`` [1], 0 where
    it follows and 1 where it comes from another document (the labels of Hugging Face's BertForPreTraining);
    ``real`` [1], 1 where the sample counts.
    """

    inputs: EncoderInputs
    packing: str = "pairs"

    @property
    def row_tokens(self) -> int:
        """See task.Task; packing's rows (passages.py) have a label and no specials, and leave a place empty."""
        return self.inputs.length - 2

    @property
    def widths(self) -> dict[str, int]:
        """See task.Task."""
        length = self.inputs.length
        columns = {"tokens": length, "labels": length, "weights": length, "length": 1}
        return {**columns, "segments": length, "next_label": 1, "real": 1}

    def arrays(self, batch: StreamBatch) -> dict[str, np.ndarray]:
        """See task.Task."""
        inputs, num_samples = self.inputs, len(batch.ids)
        fields = inputs.empty(num_samples)
        fields["segments"] = np.zeros((num_samples, inputs.length), np.int32)
        fields["next_label"], fields["real"] = (np.zeros((num_samples, 1), np.int32) for _ in range(2))
        for row in np.flatnonzero(batch.ids >= 0).tolist():
            _, begin, cut = np.flatnonzero(batch.starts[row])
            label = int(batch.tokens[row, 0])
            parts = batch.tokens[row, begin:cut], batch.tokens[row, cut : batch.lengths[row]]
            framed = frame_pair(SentencePair(*parts, is_next=not label), inputs.length, inputs.frame)
            inputs.write(fields, row, framed.tokens[: framed.num_tokens], int(batch.ids[row]))
            fields["segments"][row], fields["next_label"][row], fields["real"][row] = framed.segments, label, 1
        return fields

    def reseeded(self, seed: int) -> SentencePairTask:
        """See task.Task."""
        return replace(self, inputs=replace(self.inputs, seed=seed))

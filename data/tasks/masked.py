"""Hide tokens and predict them: masked language modelling (Devlin et al. 2019, "BERT", section 3.1 and appendix A).

Of the tokens that are no specials 15 % are predicted: 80 % of those are replaced by the mask, 10 % by a random token,
10 % stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataConfigError
from .sample_random import SampleRandom


@dataclass(frozen=True)
class MaskRates:
    """Say how much is predicted, and what is put in its place; the rest of the predicted stays as it is.

    ``max_predictions`` limits the predictions of a sequence; ``whole_words`` hides all pieces of a word or none.
    """

    predicted: float = 0.15
    masked: float = 0.8
    replaced: float = 0.1
    max_predictions: int | None = None
    whole_words: bool = False

    def __post_init__(self) -> None:
        """Raise DataConfigError for rates that are no rates."""
        # written so that a NaN fails
        rates_fit = self.masked >= 0 and self.replaced >= 0 and self.masked + self.replaced <= 1
        if not (0 < self.predicted < 1 and rates_fit):
            raise DataConfigError(
                f"mask rates are predicted {self.predicted}, masked {self.masked}, replaced {self.replaced}; the first "
                "lies between 0 and 1, the others add up to at most 1"
            )
        if self.max_predictions is not None and self.max_predictions < 1:
            raise DataConfigError(
                f"max_predictions is {self.max_predictions}; it must be at least 1, or left out"
            )


class MaskVocabulary:
    """Hold what masking has to know of a tokenizer.

    ``special`` bool [vocab_size]: tokens that are neither predicted nor put in another's place, padding among them.
    ``word_starts`` bool [vocab_size]: tokens that begin a word, from ``Tokenizer.word_starts()``; only whole words
    need it.
    """

    def __init__(self, mask: int, special: np.ndarray, word_starts: np.ndarray | None = None) -> None:
        """Take the id of the mask and the tables. Raises DataConfigError where they do not go together."""
        if not 0 <= mask < len(special):
            raise DataConfigError(
                f"the mask's id is {mask}, the vocabulary has {len(special)} tokens; "
                "train the tokenizer with a symbol for the mask"
            )
        if word_starts is not None and len(word_starts) != len(special):
            raise DataConfigError(
                f"the table of word starts has {len(word_starts)} entries, the vocabulary {len(special)}; "
                "make both from one tokenizer"
            )
        self.mask = mask
        self.special = special.astype(bool)
        self.special[mask] = True
        self.word_starts = word_starts
        self.replacements = np.flatnonzero(~self.special)
        if not len(self.replacements):
            raise DataConfigError("every token of the vocabulary is special; leave some to be predicted")


@dataclass(frozen=True)
class MaskedSample:
    """Hold what an encoder is trained on, each [num_tokens].

    ``tokens`` int32 with some hidden, ``labels`` int32 as they were, ``weights`` uint8, 1 where predicted.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def mask_tokens(
    tokens: np.ndarray, vocabulary: MaskVocabulary, random: SampleRandom, rates: MaskRates | None = None
) -> MaskedSample:
    """Hide some of a sequence's tokens, int [num_tokens], which may hold specials and padding.

    How many are predicted is the rate times the tokens that are not special, rounded up or down at random so that
    the mean is exact, and at least one. Whole words are taken in random order; one that would go beyond that number
    is passed over, so a single word longer than it is never hidden.
    """
    rates = rates or MaskRates()
    labels = tokens.astype(np.int32)
    predicted = np.zeros(len(labels), bool)
    candidates = np.flatnonzero(~vocabulary.special[labels])
    if len(candidates):
        wanted = max(1, int(rates.predicted * len(candidates) + random.uniform()))
        if rates.max_predictions is not None:
            wanted = min(wanted, rates.max_predictions)
        if rates.whole_words:
            predicted[_choose_words(labels, candidates, wanted, vocabulary, random)] = True
        else:
            predicted[candidates[random.permutation(len(candidates))[:wanted]]] = True
    hidden = labels.copy()
    chosen = np.flatnonzero(predicted)
    fate = random.uniforms(len(chosen))
    hidden[chosen[fate < rates.masked]] = vocabulary.mask
    swapped = chosen[(fate >= rates.masked) & (fate < rates.masked + rates.replaced)]
    hidden[swapped] = vocabulary.replacements[random.integers(len(vocabulary.replacements), len(swapped))]
    return MaskedSample(hidden, labels, predicted.astype(np.uint8))


def _choose_words(
    labels: np.ndarray,
    candidates: np.ndarray,
    wanted: int,
    vocabulary: MaskVocabulary,
    random: SampleRandom,
) -> np.ndarray:
    """Return the places of whole words, at most ``wanted``."""
    if vocabulary.word_starts is None:
        raise DataConfigError("whole words need the table of word starts; give MaskVocabulary one")
    starts = vocabulary.word_starts[labels[candidates]]
    starts[1:] |= np.diff(candidates) > 1  # what follows a special begins a word
    starts[0] = True
    words = np.split(candidates, np.flatnonzero(starts)[1:])
    taken: list[np.ndarray] = []
    for number in random.permutation(len(words)):
        if len(words[number]) <= wanted:
            taken.append(words[number])
            wanted -= len(words[number])
        if not wanted:
            break
    return np.concatenate(taken) if taken else candidates[:0]

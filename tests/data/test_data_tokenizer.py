"""Tokenizers: training, round trips, and the exact Hugging Face form."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from torture import torture_strings

from basestone.data.errors import DataConfigError
from basestone.data.hf_tokenizer import write_hf_tokenizer
from basestone.data.parts import PartCutter
from basestone.data.tokenizer import Tokenizer, train_tokenizer
from basestone.data.tokenizer_inspect import hold_back, inspect_tokenizer

STRINGS = torture_strings(1000, seed=20)


def test_special_ids_and_size(model: Path) -> None:
    tokenizer = Tokenizer(model)
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 600


def test_any_text_comes_back(model: Path) -> None:
    tokenizer = Tokenizer(model)
    for text in STRINGS:
        if "\u2581" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_document("a\n\n\tb  c ")) == "a\n\n\tb  c "


def test_document_is_framed_and_text_holds_no_specials(model: Path) -> None:
    tokenizer = Tokenizer(model)
    text = "x <s> y </s> z <pad>\n"
    ids = tokenizer.encode_document(text)
    assert ids.dtype == "int32" and ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos
    assert ids[1:-1].tolist() == tokenizer.encode(text).tolist()
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids[1:-1].tolist())


def test_newlines_tabs_and_indents_take_few_tokens(model: Path) -> None:
    tokenizer = Tokenizer(model)
    assert len(tokenizer.encode("\n")) == len(tokenizer.encode("\n\n")) == len(tokenizer.encode("\t")) == 1
    assert len(tokenizer.encode(" " * 8)) <= 2


def test_training_depends_on_the_set_of_texts_alone(documents: list[str], tmp_path: Path) -> None:
    first = train_tokenizer(iter(documents), tmp_path / "a.model", vocab_size=500, seed_sentences_bytes=50_000)
    second = train_tokenizer(
        iter(documents[::-1]), tmp_path / "b.model", vocab_size=500, seed_sentences_bytes=50_000
    )
    assert first.sha256 == second.sha256
    assert 15_000 < first.sample_bytes <= 50_000 and first.num_documents < len(documents)


def test_user_symbols_are_one_token_each(documents: list[str], tmp_path: Path) -> None:
    train_tokenizer(iter(documents), tmp_path / "t.model", vocab_size=500, user_symbols=("<mask>",))
    assert len(Tokenizer(tmp_path / "t.model").encode("a<mask>b")) == 3


def test_inspection_counts(model: Path) -> None:
    found = inspect_tokenizer(model, ["hello world\n", "bar \u2581 x"])
    assert found["texts"] == 2 and found["vocab_size"] == 600 and found["unknown_tokens"] == 0
    assert found["round_trip_failures"] == 1 and found["round_trip_examples"] == [
        {"text": "bar \u2581 x", "decoded": "bar   x"}
    ]
    tokenizer = Tokenizer(model)
    tokens = sum(len(tokenizer.encode(text)) for text in ("hello world\n", "bar \u2581 x"))
    assert found["bytes_per_token"] == (12 + len("bar \u2581 x".encode())) / tokens


def test_what_is_held_back_does_not_depend_on_order() -> None:
    texts = [f"text {number} " + "x" * 30_000 for number in range(10_000)]
    one, other = [], []
    given = list(hold_back(texts, one))
    assert sorted(given) == sorted(hold_back(texts[::-1], other))
    assert not set(given) & set(one) and len(given) == pytest.approx(9800, abs=5 * 14)
    assert 4_000_000 < sum(map(len, one)) <= 4 << 20 and one != other


def test_specials_are_given_by_no_text(documents: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "s.model"
    train_tokenizer(iter(documents), path, vocab_size=520, specials=("<mask>", "[CLS]"), user_symbols=("<b>",))
    tokenizer = Tokenizer(path)
    assert (tokenizer.token_id("<mask>"), tokenizer.token_id("[CLS]")) == (4, 5)
    assert tokenizer.token_id("<unk>") == 0
    with pytest.raises(DataConfigError, match=r"has no piece '<nope>'; train one with .* --special '<nope>'"):
        tokenizer.token_id("<nope>")
    text = "a <mask> [CLS] <b>"
    assert (
        not {4, 5} & set(tokenizer.encode(text).tolist()) and tokenizer.decode(tokenizer.encode(text)) == text
    )
    assert tokenizer.token_id("<b>") in tokenizer.encode(text)
    write_hf_tokenizer(path, tmp_path / "hf", model_max_length=64)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert fast.convert_tokens_to_ids("<mask>") == 4
    for string in (text, *STRINGS[:300]):
        assert fast(string, add_special_tokens=False)["input_ids"] == tokenizer.encode(string).tolist(), string


def test_digits_are_split_or_not(documents: list[str], tmp_path: Path) -> None:
    texts = [*documents, "in 2001 and 2002\n" * 300]
    for split in (True, False):
        train_tokenizer(iter(texts), tmp_path / "d.model", vocab_size=600, split_digits=split)
        assert (len(Tokenizer(tmp_path / "d.model").encode("2001")) == 4) == split


def test_symbols_are_given_once(documents: list[str], tmp_path: Path) -> None:
    for symbols, specials, named in (
        (("<s>",), (), "'<s>'"),
        ((), ("<pad>",), "'<pad>'"),
        (("<m>",), ("<m>",), "'<m>'"),
        ((), ("<m>", "<m>"), "'<m>'"),
        ((), ("\n",), r"'\\n'"),
    ):
        with pytest.raises(DataConfigError, match=f"symbols {named} are taken; give each once"):
            train_tokenizer(
                iter(documents), tmp_path / "x", vocab_size=600, user_symbols=symbols, specials=specials
            )


@pytest.mark.parametrize(
    ("symbol", "match"),
    [
        ("\udcff", r"symbol '\\udcff' is not UTF-8 or holds a NUL"),
        ("x\0y", r"symbol 'x\\x00y' is not UTF-8 or holds a NUL"),
        ("a", "symbol 'a' is a piece of every tokenizer already, .*; leave it out"),
        ("~", "symbol '~' is a piece of every tokenizer already, .*; leave it out"),
        ("<0x4A>", "symbol '<0x4A>' is a piece of every tokenizer already, .*; leave it out"),
    ],
)
def test_symbols_that_can_be_none_are_named(
    symbol: str, match: str, documents: list[str], tmp_path: Path
) -> None:
    for given in ({"user_symbols": (symbol,)}, {"specials": (symbol,)}):
        with pytest.raises(DataConfigError, match=match):
            train_tokenizer(iter(documents), tmp_path / "x", vocab_size=600, **given)


def test_mistakes_are_named(tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(DataConfigError, match=r"cannot be read .* train one with"):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(DataConfigError, match=r"is no SentencePiece model; give a \.model file"):
        Tokenizer(tmp_path / "text.model")
    with pytest.raises(DataConfigError, match="no text to train"):
        train_tokenizer(iter([]), tmp_path / "x.model", vocab_size=600)
    with pytest.raises(DataConfigError, match="of 100 pieces cannot be trained"):
        train_tokenizer(iter(documents), tmp_path / "x.model", vocab_size=100)
    with pytest.raises(
        DataConfigError, match=r"of 100000 pieces cannot be trained .* Vocabulary size too high"
    ):
        train_tokenizer(iter(documents), tmp_path / "x.model", vocab_size=100_000)
    with pytest.raises(DataConfigError, match="holds a blank"):
        train_tokenizer(iter(documents), tmp_path / "x.model", vocab_size=600, user_symbols=("a b",))
    assert not (tmp_path / "x.model").exists()


def _train_foreign(path: Path, documents: list[str], **settings: object) -> Path:
    def lines() -> Iterator[str]:
        for text in documents:
            yield from text.split("\n")

    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=stream, vocab_size=600, minloglevel=2, **settings
        )
    return path


def test_a_model_without_document_ends_is_refused(tmp_path: Path, documents: list[str]) -> None:
    path = _train_foreign(tmp_path / "f.model", documents, model_type="bpe", bos_id=-1)
    with pytest.raises(DataConfigError, match="no piece for the beginning of a document"):
        Tokenizer(path)


def test_hugging_face_ids_are_equal(model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_hf_tokenizer(model, tmp_path / "hf", model_max_length=321)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer = Tokenizer(model)
    assert len(STRINGS) == 1000
    for text in STRINGS:
        ids = tokenizer.encode(text).tolist()
        assert fast(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert fast(text)["input_ids"] == [tokenizer.bos, *ids], repr(text)
        assert fast.decode(ids) == tokenizer.decode(ids), repr(text)
    assert fast("a", "b")["input_ids"] == [1, *tokenizer.encode("a"), 1, *tokenizer.encode("b")]
    found = (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id, fast.pad_token_id)
    assert found == (0, 1, 2, 3) and len(fast) == 600 and fast.model_max_length == 321
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == model.read_bytes()


def test_hugging_face_form_survives_saving(model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_hf_tokenizer(model, tmp_path / "hf", model_max_length=64)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    tokenizer = Tokenizer(model)
    for text in STRINGS[:200]:
        assert again(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text).tolist()], repr(text)


def test_hugging_face_class_is_known_to_every_version(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_hf_tokenizer(model, tmp_path, model_max_length=64)
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in (tmp_path / "tokenizer_config.json").read_text()


def test_user_symbols_stay_exact(documents: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "t.model"
    train_tokenizer(iter(documents), path, vocab_size=520, user_symbols=("<mask>", "<mask2>"))
    write_hf_tokenizer(path, tmp_path / "hf", model_max_length=64)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer = Tokenizer(path)
    for text in ("a<mask>b", "<mask><mask2> <mask>\n\n\n\n", " <mask2>2\t\t\t\t\tx", *STRINGS[:300]):
        assert fast(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist(), repr(text)


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [
        ({"model_type": "unigram", "normalization_rule_name": "identity"}, "it is not BPE"),
        ({"model_type": "bpe"}, "it normalises text"),
        (
            {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": True},
            "it removes blanks",
        ),
    ],
)
def test_what_has_no_exact_form_is_refused(
    settings: dict, obstacle: str, documents: list[str], tmp_path: Path
) -> None:
    path = _train_foreign(tmp_path / "f.model", documents, **settings)
    with pytest.raises(DataConfigError, match=obstacle):
        write_hf_tokenizer(path, tmp_path / "hf", model_max_length=64)
    assert not (tmp_path / "hf").exists()


def test_a_model_with_unused_pieces_has_no_exact_form(
    model: Path, documents: list[str], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(model)
    content = model.read_bytes()
    token = tokenizer.token_id("\u2581the")
    # a piece is field 1: its text (field 1), its score (field 2, float), and its type (field 3), if it is not normal
    text = "\u2581the".encode()
    place = content.index(b"\x0a" + bytes([len(text) + 7, 0x0A, len(text)]) + text)
    entry = content[place + 2 : place + 2 + len(text) + 7]
    changed = b"\x0a" + bytes([len(entry) + 2]) + entry + b"\x18\x05"
    (tmp_path / "u.model").write_bytes(content[:place] + changed + content[place + 2 + len(entry) :])
    unused = Tokenizer(tmp_path / "u.model")
    assert token in tokenizer.encode("in the end") and token not in unused.encode("in the end")
    assert unused.decode(unused.encode("in the end")) == "in the end"
    with pytest.raises(DataConfigError, match="it has unused pieces, which are taken apart again"):
        write_hf_tokenizer(tmp_path / "u.model", tmp_path / "hf", model_max_length=64)
    assert not PartCutter(unused).cuts


def test_what_is_no_model_is_refused(tmp_path: Path, model: Path) -> None:
    cut = tmp_path / "cut.model"
    cut.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(DataConfigError, match="is no SentencePiece model"):
        write_hf_tokenizer(cut, tmp_path / "hf", model_max_length=64)
    with pytest.raises(DataConfigError, match="cannot be read"):
        write_hf_tokenizer(tmp_path / "none.model", tmp_path / "hf", model_max_length=64)

"""`basestone prepare`, `tokenizer ...` and `data ...`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

tokenizer_app = typer.Typer(
    name="tokenizer", help="Train, look at and export tokenizers.", no_args_is_help=True
)
data_app = typer.Typer(name="data", help="Index, look at and verify shards.", no_args_is_help=True)

Shards = Annotated[
    str, typer.Argument(help="A shard directory (with manifest.json), at a path or URL.", show_default=False)
]
AllowPipe = Annotated[
    bool, typer.Option("--allow-pipe", help="Let places of the form pipe:COMMAND run commands.")
]
Model = Annotated[
    Path,
    typer.Argument(
        help="A SentencePiece model, a tokenizer.json or its directory, or a .tiktoken file.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print for machines.")]
ChunkKib = Annotated[
    int | None,
    typer.Option(
        help="Bytes that are read, checked and shuffled at a time, in KiB: larger ones for corpora of many "
        "terabytes, whose index every reader holds. Default: 128.",
        min=1,
    ),
]
HELDOUT_FRACTION = 0.01


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs: text, .jsonl, .parquet, .warc, .html (also .gz, .zst), datasets saved "
            "to disk; or builtin:python.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.", show_default=False)],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Write token blocks made with this model, not text.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Key or column that holds the text: content. Default: text.")
    ] = None,
    keep_html: Annotated[
        bool,
        typer.Option("--keep-html", help="Take HTML with its markup; by default its main text is extracted."),
    ] = False,
    fix_text: Annotated[
        bool, typer.Option("--fix-text", help="Repair wrongly decoded letters with ftfy: schÃ¶n to schön.")
    ] = False,
    min_chars: Annotated[
        int | None, typer.Option(help="Drop documents of fewer characters. Default: 32.", min=0)
    ] = None,
    rules: Annotated[
        str | None, typer.Option(help="Presets of rules for English web pages, with commas: gopher,c4.")
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="A Python function of your own, my_filters:is_english: text to None, or the reason to drop it; "
            "repeatable.",
        ),
    ] = None,
    scrub: Annotated[
        bool, typer.Option("--scrub", help="Replace e-mail and public IP addresses by placeholders.")
    ] = False,
    near_duplicates: Annotated[
        bool,
        typer.Option("--near-duplicates", help="Keep one of documents that are nearly the same (MinHash)."),
    ] = False,
    decontaminate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Drop training documents that share words with this test file: gsm8k.jsonl; repeatable."
        ),
    ] = None,
    ngram: Annotated[
        int | None, typer.Option(help="Words in a row that --decontaminate takes for shared. Default: 13.")
    ] = None,
    heldout_fraction: Annotated[
        float,
        typer.Option(
            help="Share of documents to hold out. Default: 0.01.", min=0.0, max=0.9, show_default=False
        ),
    ] = HELDOUT_FRACTION,
    chunk_kib: ChunkKib = None,
    shard_mib: Annotated[int | None, typer.Option(help="Size of a shard, in MiB. Default: 64.", min=1)] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one per core.", min=0)] = None,
    as_json: AsJson = False,
) -> None:
    """Clean and de-duplicate text, hold some out, write indexed WebDataset shards.

    Killed and started again with the same command, it goes on with what is finished.
    """
    switches: dict[str, Any] = {
        "keep_html": keep_html,
        "fix_text": fix_text,
        "scrub": scrub,
        "near_duplicates": near_duplicates,
    }
    lists = {
        "rules": tuple(name.strip() for name in rules.split(",")) if rules else (),
        "filters": tuple(filters or ()),
        "decontaminate": tuple(decontaminate or ()),
    }
    values = {"tokenizer": tokenizer, "text_field": text_field, "min_chars": min_chars, "ngram": ngram}
    values |= {"chunk_bytes": chunk_kib and chunk_kib << 10, "shard_bytes": shard_mib and shard_mib << 20}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if any(source.startswith("builtin:") for source in sources):
        own = given or any({**switches, **lists}.values()) or heldout_fraction != HELDOUT_FRACTION
        own = own or workers is not None
        _prepare_builtin(sources, out, bool(own), as_json)
        return
    given |= {"workers": (os.cpu_count() or 1) if workers is None else workers}
    given |= {"heldout_fraction": heldout_fraction}
    _prepare_sources(sources, out, {**switches, **lists, **given}, as_json)


def _prepare_builtin(sources: list[str], out: Path, has_settings: bool, as_json: bool) -> None:
    from ..data.builtin import prepare_builtin
    from ..data.errors import DataConfigError

    if len(sources) > 1 or has_settings:
        raise DataConfigError(
            f"{' '.join(sources)}: an embedded corpus brings its own tokenizer and settings; give it alone, "
            "with --out only"
        )
    corpus = prepare_builtin(sources[0], out, _say)
    _print(
        corpus.report, as_json, f"shards: {corpus.train} and {corpus.heldout}; tokenizer: {corpus.tokenizer}"
    )


def _prepare_sources(sources: list[str], out: Path, settings: dict[str, Any], as_json: bool) -> None:
    from ..data.prepare import prepare as run_prepare
    from .prepare_progress import show_progress

    with show_progress() as progress:
        report = run_prepare(sources, out, progress=progress, **settings)
    if settings["heldout_fraction"] and not report.heldout_documents:
        _say("no document was held out, there are so few; raise --heldout-fraction to have a held-out set")
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.dropped.items())) or "none"
    scrubbed = ", ".join(f"{count:,} {kind}" for kind, count in report.scrubbed.items())
    _print(
        report.to_json(),
        as_json,
        f"{out}: {report.train_documents:,} documents to train on ({report.train_bytes / 1e6:,.1f} MB), "
        f"{report.heldout_documents:,} held out ({report.heldout_bytes / 1e6:,.1f} MB); dropped: {dropped}"
        + (f"; replaced: {scrubbed}" if scrubbed else ""),
    )


@tokenizer_app.command(
    "train", epilog="Example: basestone tokenizer train shards/notes/train --out notes.model"
)
def tokenizer_train(
    sources: Annotated[
        list[str],
        typer.Argument(help="Shard directories of text, or text files, folders and globs.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="The model file to write.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(help="Pieces.", min=300)] = 32000,
    symbol: Annotated[
        list[str] | None,
        typer.Option("--symbol", help="A text that is always one token; repeatable.", show_default=False),
    ] = None,
    special: Annotated[
        list[str] | None,
        typer.Option(
            "--special", help="A token that no text gives, as <mask>; repeatable.", show_default=False
        ),
    ] = None,
    sentinels: Annotated[
        int, typer.Option(help="Sentinels for span corruption: <extra_id_0> has the largest id.", min=0)
    ] = 0,
    split_digits: Annotated[bool, typer.Option(help="Make every digit a token.")] = True,
    training_megabytes: Annotated[
        int, typer.Option(help="Train on a sample of documents of this size at most.", min=1)
    ] = 32,
    as_json: AsJson = False,
) -> None:
    """Train a SentencePiece BPE whose ids are the same in Hugging Face, and measure it on text held back."""
    from dataclasses import asdict

    from ..data.tokenizer import train_tokenizer
    from ..data.tokenizer_inspect import hold_back, inspect_tokenizer

    held_back: list[str] = []
    report = train_tokenizer(
        hold_back(_with_progress(_texts(sources)), held_back),
        out,
        vocab_size=vocab_size,
        seed_sentences_bytes=training_megabytes << 20,
        user_symbols=tuple(symbol or ()),
        specials=(*(special or ()), *(f"<extra_id_{n}>" for n in reversed(range(sentinels)))),
        split_digits=split_digits,
    )
    measured = inspect_tokenizer(out, held_back) if held_back else None
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(report).items()}
    _print(
        {**values, "held_back": measured},
        as_json,
        f"{out}: {report.vocab_size:,} pieces from {report.sample_bytes / 1e6:,.1f} MB of "
        f"{report.num_documents:,} documents, sha256 {report.sha256[:12]}\n"
        + (_fertility(measured) if measured else "no document was held back, there are so few: not measured"),
    )


@tokenizer_app.command(
    "inspect", epilog="Example: basestone tokenizer inspect notes.model shards/notes/heldout"
)
def tokenizer_inspect(
    model: Model,
    sources: Annotated[list[str], typer.Argument(help="Text to measure on.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show a tokenizer's size, specials, bytes a token, unused pieces, and what does not survive a round trip."""
    from ..data.tokenizer_inspect import inspect_tokenizer

    result = inspect_tokenizer(model, _texts(sources))
    _print(result, as_json, "\n".join(f"{name}: {value}" for name, value in result.items()))


@tokenizer_app.command("export", epilog="Example: basestone tokenizer export notes.model notes-hf")
def tokenizer_export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The directory to write.", show_default=False)],
    model_max_length: Annotated[int, typer.Option(help="Longest input, in tokens.", min=1)] = 2048,
) -> None:
    """Write a Hugging Face tokenizer with the same ids."""
    from ..data.hf_tokenizer import write_hf_tokenizer

    write_hf_tokenizer(model, out, model_max_length=model_max_length)
    print(out)


@data_app.command(
    "index",
    epilog="Example: basestone data index 's3://bucket/web-{000..127}.tar' --out shards/web",
)
def data_index(
    places: Annotated[
        list[str],
        typer.Argument(
            help="A directory of .tar files; with --out also .tar files and directories at URLs, with {000..127} or *, "
            "and a Megatron .bin.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Write the index here, not beside the shards, which it names by their places."
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Whose ids token blocks hold.")] = None,
    chunk_kib: ChunkKib = None,
    allow_pipe: AllowPipe = False,
    as_json: AsJson = False,
) -> None:
    """Index shards made elsewhere: offsets, checksums, manifest."""
    from ..data.errors import DataConfigError
    from ..data.indexing import index_directory, index_places

    settings: dict[str, Any] = {"tokenizer": tokenizer} | (
        {"chunk_bytes": chunk_kib << 10} if chunk_kib else {}
    )
    if out is not None:
        result = index_places(places, out, reader=_reader(allow_pipe), log=_say, **settings)
    elif len(places) == 1 and "://" not in places[0]:
        result = index_directory(Path(places[0]), **settings)
    else:
        raise DataConfigError(
            f"{' '.join(places)}: only one local directory is indexed in place; say where the index goes: --out DIR"
        )
    _print(result, as_json, "\n".join(f"{name}: {value}" for name, value in result.items()))


@data_app.command("inspect", epilog="Example: basestone data inspect shards/notes/train")
def data_inspect(
    place: Shards,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Count tokens with it.")] = None,
    documents: Annotated[int, typer.Option(help="Documents to show.", min=0)] = 3,
    allow_pipe: AllowPipe = False,
    as_json: AsJson = False,
) -> None:
    """Show what a shard directory holds, how long its documents are, and the beginning of some."""
    from ..data.inspect import inspect_directory

    result = inspect_directory(place, tokenizer, documents, _reader(allow_pipe))
    lines = [f"{name}: {value}" for name, value in result.items() if name not in ("lengths", "examples")]
    if lengths := result["lengths"]:
        figures = ", ".join(f"{name} {value:,}" for name, value in lengths.items() if name != "unit")
        lines.append(f"lengths of documents, in {lengths['unit']}: {figures}")
    for example in result["examples"]:
        lines += ["", f"--- {example['tokens']} tokens, {example['bytes']} bytes", str(example["text"])]
    _print(result, as_json, "\n".join(lines))


@data_app.command("verify", epilog="Example: basestone data verify shards/notes/train")
def data_verify(place: Shards, allow_pipe: AllowPipe = False, as_json: AsJson = False) -> None:
    """Read every chunk against its checksum, and name each that is damaged."""
    from ..data.inspect import verify_directory

    bad = verify_directory(place, _reader(allow_pipe), _show_chunks if sys.stderr.isatty() else None)
    text = "\n".join(item["problem"] for item in bad) or f"{place}: every chunk matches its checksum"
    _print(bad, as_json, text)
    if bad:
        raise typer.Exit(76)


def _reader(allow_pipe: bool) -> Any:
    """Make what reads shards for a command."""
    from ..data.config import ReadingConfig
    from ..data.reading.reader import RangeReader

    return RangeReader(ReadingConfig(allow_pipe=allow_pipe))


def _show_chunks(done: int, total: int) -> None:
    """Keep a line of progress; it ends with the last chunk."""
    print(f"\r{done:,} of {total:,} chunks", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _with_progress(texts: Iterator[str]) -> Iterator[str]:
    """Pass texts on, and count them on a terminal; training begins behind the last."""
    size = 0
    for number, text in enumerate(texts, start=1):
        yield text
        size += len(text)
        if sys.stderr.isatty() and number % 100 == 0:
            line = f"\r{number:,} documents read, {size / 1e6:,.1f} M characters"
            print(line, end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\rall documents read; training", file=sys.stderr, flush=True)


def _fertility(measured: dict[str, Any]) -> str:
    """Say in a line how a tokenizer does on text that it was not trained on."""
    lost = measured["round_trip_failures"]
    return (
        f"on {measured['texts']:,} documents held back ({measured['bytes'] / 1e6:,.2f} MB): "
        f"{measured['bytes_per_token'] or 0:.2f} bytes/token, {measured['tokens_per_word'] or 0:.2f} tokens/word, "
        f"{measured['byte_tokens_share'] or 0:.2%} byte tokens, "
        + (f"{lost:,} do not come back as they were (see `tokenizer inspect`)" if lost else "all come back")
    )


def _texts(sources: list[str]) -> Iterator[str]:
    """Give the documents of shard directories and text files; those that are not UTF-8 are counted and passed over."""
    from ..data.cleaning import decode_text
    from ..data.preparing.web import extract_text
    from ..data.shards import open_shard_set
    from ..data.sources import find_source_files, read_documents

    num_not_utf8 = 0
    for source in sources:
        if (Path(source) / "manifest.json").is_file():
            shards = open_shard_set(Path(source))
            for chunk in range(shards.num_chunks):
                yield from (text for text in shards.read_documents(chunk) if isinstance(text, str))
        else:
            for file in find_source_files([source]):
                for document in read_documents(file):
                    text = decode_text(extract_text(document).content)
                    if text is None:
                        num_not_utf8 += 1
                    else:
                        yield text
    if num_not_utf8:
        _say(f"passed over {num_not_utf8:,} documents that are not UTF-8, as `prepare` does")


def _print(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=1, default=str) if as_json else text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

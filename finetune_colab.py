"""Teach a language model your questions and answers: a script, a workbook, a zip.

    python finetune_colab.py          train microsoft/phi-2 on dataset.xlsx
    python finetune_colab.py check    what training would do, and a report
    python finetune_colab.py demo     the whole job on a small built-in model
    python finetune_colab.py chat     chat with the tuned model; --web: a page
    python finetune_colab.py exam     does it know the data, in other words too?
    python finetune_colab.py compare  the base and the tuned model side by side
    python finetune_colab.py export   --to merged, gguf, space or hub
    python finetune_colab.py --help   usual settings; --help-all: every setting

What a run leaves behind
    model/                   the LoRA adapter, its tokenizer, pictures, run.json
    fine_tuned_model.zip     all of model/ in one file to download
    checkpoints/, logs/      to resume the training; all that each run printed

Map: the file reads as the data flows, and each section calls only sections above it.
    1 settings and errors    4 prompts and tokens  7 training   10 report    13 commands
    2 where data comes from  5 device and plan     8 answering  11 chatting
    3 rows to pairs          6 models              9 exam       12 export
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.10", "transformers>=5.6", "peft>=0.18", "accelerate>=1.10", "bitsandbytes>=0.48",
#     "datasets>=4.0", "pandas>=2.2.2", "openpyxl>=3.1.3", "matplotlib>=3.9", "seaborn>=0.13",
# ]
# ///

from __future__ import annotations

import argparse
import csv
import errno
import functools
import gc
import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.parse
import urllib.request
import warnings
import weakref
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypedDict, TypeVar

if TYPE_CHECKING:  # the heavy libraries load inside the functions that need them
    import pandas
    import torch
    import transformers
    from peft import PeftConfig, PeftModel
    from transformers import Trainer
else:  # train_adapter joins the class that extends it with the real ones
    Trainer = object

# ==================================================================================================
# 1  Settings and errors
# ==================================================================================================


class Config:
    """Every setting, once. Edit a value here, or give its flag: LORA_R is also --lora-r."""

    # -- Preset
    PRESET: str = ""  # a named set of settings that replaces those below; flags override it
    # -- Model
    MODEL_NAME: str = "microsoft/phi-2"  # a model on the Hub, a folder with one, or "demo"
    MODEL_REVISION: str = ""  # a commit of that model; empty = the pinned one, or else the newest
    LOAD_IN_4BIT: bool | None = None  # weights in 4 bits; None = yes on an NVIDIA GPU, else no
    PROMPT_TEMPLATE: str = ""  # the text around {question}; empty = the model's own form
    # -- Data
    DATASET_PATH: str = "dataset.xlsx"  # a workbook, .csv, .jsonl, ...; also a link, s3:// or hf:
    SHEET: str = ""  # the sheet of the workbook to read; empty = all that belong together
    QUESTION_COLUMN: str = ""  # the header of the column with the questions; empty = find it
    ANSWER_COLUMN: str = ""  # the header of the column with the answers; empty = find it
    MAX_LENGTH: int = 512  # tokens in one question with its answer; longer rows are left out
    LANGUAGE: str = "en"  # in message trees such as OASST1, the language to read; empty = all
    CONVERSATION_PATHS: str = "best"  # in message trees: follow the best-ranked replies, or all
    VALIDATION_FRACTION: float = 0.1  # share of questions held out, to test on; 0 = train on all
    VALIDATION_SPLIT: str = "wordings"  # hold out second wordings of questions; or any questions
    MIN_QUALITY: float = 0.85  # warn when a smaller share of the rows is fit to learn from
    # -- Output
    OUTPUT_DIR: str = "./model"  # the finished adapter; the zip is written beside this folder
    CHECKPOINT_DIR: str = "./checkpoints"  # saved states of the training, one folder per run
    CHECKPOINT_MIRROR: str = ""  # a folder for copies of checkpoints, such as on a mounted Drive
    ARCHIVE_CHECKPOINTS: bool = False  # also zip each checkpoint, to download by hand
    LOG_DIR: str = "./logs"  # the messages and losses, one file per training
    # -- LoRA
    LORA_R: int = 16  # rank: how much the adapter can learn; 8 to 64 is usual
    LORA_ALPHA: int = 32  # strength of the adapter; twice the rank is usual
    LORA_DROPOUT: float = 0.05  # share of the adapter's input switched off while training
    LORA_TARGETS: list[str] = ["all-linear"]  # which layers: names, all-linear, attention or mlp
    LORA_LAYERS: str = ""  # in which blocks, counted from 0: 16-31, or 0,31; empty = all
    USE_RSLORA: bool = False  # strength alpha/sqrt(rank), not alpha/rank: for ranks of 64 and more
    USE_DORA: bool = False  # learn length and direction separately: a bit better, much slower
    LORA_INIT: str = "default"  # how the adapter starts
    # -- Training
    LEARNING_RATE: float = 2e-4  # peak size of a step; 1e-4 to 3e-4 is usual for LoRA
    BATCH_SIZE: int = 4  # multiplied by the next setting: the pairs in each step, here 16
    GRADIENT_ACCUMULATION_STEPS: int = 4  # only its product with BATCH_SIZE counts
    TOKENS_AT_ONCE: int = 0  # most tokens computed at once; 0 = as many as fit and make it faster
    NUM_EPOCHS: int = 5  # times the model sees every pair
    MAX_STEPS: int = 0  # stop after this many steps; 0 = as many as NUM_EPOCHS needs
    OPTIMIZER: str = "auto"  # auto = paged_adamw_32bit on an NVIDIA GPU, else adamw_torch
    LR_SCHEDULER: str = "cosine"  # how the step size falls after its peak
    WARMUP_RATIO: float = 0.03  # share of the steps in which the step size rises from zero
    WEIGHT_DECAY: float = 0.0  # pull of the adapter towards zero; 0 to 0.1
    MAX_GRAD_NORM: float = 0.3  # longest gradient; a longer one is shortened to it; 0 = never
    GRADIENT_CHECKPOINTING: bool | None = None  # recompute to save memory; None = if it is short
    PACKING: bool = True  # short pairs share a row; False = a row for each: slower, the same result
    NEFTUNE_ALPHA: float = 0.0  # noise on the words while training; 5 is usual; 0 = none
    FAST_ADAPTER: bool = True  # a layer and its adapter as one operation; False = as peft does it
    SEED: int = 42  # decides the held-out pairs, the order of the rows and the dropout
    # -- Measuring and saving
    EVAL_STEPS: int = 0  # steps between measurements of the validation loss; 0 = every epoch
    LOGGING_STEPS: int = 1  # steps between records of the training loss
    SAVE_STEPS: int = 50  # steps between checkpoints
    SAVE_MINUTES: float = 10.0  # longest time between checkpoints, in minutes
    RESUME: bool = True  # continue from the newest checkpoint of the same run
    RESUME_FROM_CHECKPOINT: str = ""  # continue from this one: a folder checkpoint-N, or its zip
    KEEP_BEST: bool = True  # keep the adapter with the lowest validation loss, not the last one
    EARLY_STOPPING_PATIENCE: int = 0  # stop after this many validations without progress; 0 = never
    REPORT_TO: str = "none"  # where else to send the curves
    # -- Answering
    EVAL_ANSWERS: int = 20  # held-out questions in the exam; 0 = no exam after training
    EXAM_QUESTIONS: int = 20  # trained questions that the exam asks as they are and in other words
    MAX_TOKENS: int = 256  # most tokens in an answer
    TEMPERATURE: float = 0.0  # randomness of answers: 0 = always the likeliest token; 0.7 is lively
    TOP_P: float = 1.0  # when sampling: only the likeliest tokens, up to this share together
    REPETITION_PENALTY: float = 1.0  # above 1, tokens already used become less likely
    SYSTEM: str = ""  # chat, compare: instructions that go before the first question
    QUESTION: str = ""  # chat, compare: this one question only; the flag itself may be left out
    QUESTIONS: str = ""  # compare: a file of questions, with or without the expected answers
    BASE: bool = False  # chat: ask the base model, without the adapter
    WEB: bool = False  # chat: a page in the browser
    SHARE: bool = False  # chat --web: also under a public link, which Colab needs
    PORT: int = 0  # chat --web: the port of the page; 0 = the first free one from 7860
    # -- Export
    TO: str = ""  # export: what to make: merged, gguf, space or hub
    QUANTIZE: str = "q8_0"  # export --to gguf, --to space: the precision of its numbers
    EXPORT_DIR: str = ""  # export: where to write; empty = beside OUTPUT_DIR, e.g. ./model-gguf
    HUB_REPO: str = ""  # export --to hub: the repository, as name or owner/name
    HUB_PRIVATE: bool = True  # export --to hub: only you can see it
    # -- Running
    YES: bool = False  # train or upload without asking, whatever the quality of the data
    JSON: bool = False  # check: the findings as one JSON object, for programs

    def __init__(self, **changes: Any) -> None:
        self._given: frozenset[str] = frozenset()  # names from the command line and the file
        vars(self).update({name: getattr(Config, name) for name in TYPES} | changes)


LOG = logging.getLogger("finetune_colab")
TYPES: dict[str, Any] = inspect.get_annotations(Config, eval_str=True)
NEEDED = ("MODEL_NAME", "DATASET_PATH", "OUTPUT_DIR", "CHECKPOINT_DIR", "LOG_DIR", "LORA_TARGETS")
SETTINGS_BY_LIMITS: dict[tuple[float, float], str] = {
    (0, 0.5): "VALIDATION_FRACTION",
    (0, 0.9): "LORA_DROPOUT WARMUP_RATIO",
    (0, 1): "MIN_QUALITY WEIGHT_DECAY",
    (1e-8, 1): "LEARNING_RATE",
    (0.01, 1): "TOP_P",
    (0.5, 3): "REPETITION_PENALTY",
    (0, 5): "TEMPERATURE",
    (1, 1024): "LORA_R BATCH_SIZE GRADIENT_ACCUMULATION_STEPS",
    (1, 10_000): "LORA_ALPHA NUM_EPOCHS",
    (0.1, 10_000): "SAVE_MINUTES",
    (0, 10_000): "EVAL_ANSWERS EXAM_QUESTIONS EARLY_STOPPING_PATIENCE MAX_GRAD_NORM NEFTUNE_ALPHA",
    (0, 65_535): "PORT",
    (16, 131_072): "MAX_LENGTH",
    (1, 131_072): "MAX_TOKENS",
    (1, 1_000_000): "LOGGING_STEPS SAVE_STEPS",
    (0, 10_000_000): "MAX_STEPS EVAL_STEPS TOKENS_AT_ONCE",
    (0, 2**32 - 1): "SEED",  # what numpy accepts
}
LIMITS = {name: ends for ends, names in SETTINGS_BY_LIMITS.items() for name in names.split()}
CHOICES: dict[str, tuple[str, ...]] = {  # "" where none has to be made
    "CONVERSATION_PATHS": ("best", "all"),
    "VALIDATION_SPLIT": ("wordings", "questions"),
    "OPTIMIZER": ("auto", "adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor"),
    "LR_SCHEDULER": ("cosine", "linear", "constant", "constant_with_warmup"),
    "REPORT_TO": ("none", "tensorboard", "wandb", "trackio"),
    "TO": ("", "merged", "gguf", "space", "hub"),
    "QUANTIZE": ("q8_0", "f16", "q4_k_m"),
    "LORA_INIT": ("default", "gaussian"),
    "PRESET": ("", "quick", "balanced", "quality", "low-memory"),
}


class UserError(Exception):
    """Something the person can fix: what was found, where, and what to do about it."""


def show(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Print, even if the console lacks some characters or is no longer there."""
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=stream, end=end, flush=True)
    except (OSError, ValueError):  # a window that was closed costs nobody the training
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """A text that cannot steer a terminal, as names of files and sheets might."""
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" else " " for c in text)


def preview(text: str, width: int = 50) -> str:
    """The beginning of a text, printable and on one line."""
    plain = " ".join(printable(text[: 20 * width]).split())
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def plural(count: float, noun: str) -> str:
    return f"{count:,.12g} {noun}{'s' * (count != 1)}"


def say(label: str, text: str, file: TextIO | None = None) -> None:
    """Log one decision or result, and print it beside its label, wrapped for 80 columns."""
    LOG.info("%-11s%s", label, text)
    wrapper = textwrap.TextWrapper(79, subsequent_indent=" " * 11, replace_whitespace=False)
    wrapper.break_long_words = wrapper.break_on_hyphens = False  # paths and flags are to be copied
    for line in printable(text).split("\n"):
        # textwrap counts one column for each, and breaks at \v: the second half of a wide character
        text = "".join(c + "\v" * (unicodedata.east_asian_width(c) in "WF") for c in line)
        wrapper.initial_indent = f"{label:<11}"
        show(wrapper.fill(text).replace("\v", ""), file)
        label = ""


# -- The settings, from text to their own types

SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
OPTIONAL = {**SWITCHES, "": None, "none": None, "auto": None}


def names_in(text: str) -> list[str]:
    names = re.split(r"[,\s]+", text)
    if not all(re.fullmatch(r"[\w.-]*[^\W\d][\w.-]*", name) for name in names):
        raise ValueError
    return names


PARSERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    str: (str, "text"),
    int: (int, "a whole number, such as 4"),
    float: (float, "a number, such as 0.1 or 2e-4"),
    bool: (lambda text: SWITCHES[text.lower()], "True or False"),
    bool | None: (lambda text: OPTIONAL[text.lower()], "True, False or None"),
    list[str]: (names_in, "a list of names, such as q_proj,fc2"),
}


def flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    import difflib

    names = {name.casefold().lstrip("-"): name for name in known}
    close = difflib.get_close_matches(wrong.casefold().lstrip("-"), names, n=1)
    return f" Did you mean {names[close[0]]}?" if close else ""


def fold(text: str) -> str:
    """A form in which texts that differ only in spaces, case or look-alike code points are equal."""
    return " ".join(unicodedata.normalize("NFKC", str(text)).casefold().split())


def changed(cfg: Config, **settings: Any) -> Config:
    return Config(**(vars(cfg) | settings))


def parse_setting(name: str, value: Any) -> Any:
    """A setting in its own type, within its limits and among its choices."""
    if name not in TYPES:
        raise UserError(f"{name} is not a setting.{did_you_mean(name, TYPES)}")
    if name == "PROMPT_TEMPLATE" and isinstance(value, str):
        value = value.replace("\\n", "\n")  # as it is typed into a shell
        if value and value.count("{question}") != 1:
            raise UserError("PROMPT_TEMPLATE needs one {question}, where the question goes.")
        return value  # each space counts
    (parse, kind), text = PARSERS[TYPES[name]], as_text(value)
    try:
        if isinstance(value, (list, dict)) and parse is not names_in:
            raise ValueError
        found = parse(text.strip())
    except (KeyError, ValueError):
        raise UserError(f"{name} is {text!r}, but it must be {kind}.") from None
    low, high = LIMITS.get(name, (None, None))
    if name in LIMITS and not low <= found <= high:
        raise UserError(f"{name} is {found}, but it must be between {low:,} and {high:,}.")
    if found not in CHOICES.get(name, (found,)):
        choices = ", ".join(filter(None, CHOICES[name]))
        raise UserError(f"{name} is {found!r}; it must be one of {choices}.")
    if name in NEEDED and not found:
        raise UserError(f"{name} is empty, but it is needed.")
    return found


def checked(values: dict[str, Any]) -> Config:
    """Every setting parsed and checked; all faults are reported in one error."""
    cfg, problems = Config(), []
    for name, value in (vars(Config) | values).items():
        try:
            if not name.startswith("_"):
                setattr(cfg, name, parse_setting(name, value))
        except UserError as error:
            problems.append(str(error))
    if cfg.QUESTION_COLUMN and fold(cfg.QUESTION_COLUMN) == fold(cfg.ANSWER_COLUMN):
        problems.append("QUESTION_COLUMN and ANSWER_COLUMN name the same column.")
    if problems:
        raise UserError("\n".join(problems))
    return cfg


# -- Files that are whole or not there


def local_path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def output_folder(cfg: Config) -> Path:
    return local_path(cfg.OUTPUT_DIR).resolve()  # what a link such as ./model -> Drive leads to


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait for the disk itself, or a power cut could leave an empty file under a final name."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # some network drives cannot, nor can Windows for folders
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


@contextmanager
def atomic_write(final: Path) -> Iterator[Path]:
    """A file to write, which takes its final name only when it is complete."""
    staged = final.with_name(f"{final.name}.{os.getpid()}.partial")
    try:
        yield staged
        fsync(staged)
        staged.replace(final)
        fsync(final.parent)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def atomic_folder(final: Path, earlier: Path | None = None) -> Iterator[Path]:
    """A folder to fill, named when complete; the one it replaces moves to `earlier`, or is deleted."""
    staged, replaced = (final.with_name(f".{final.name}.{end}") for end in ("partial", "old"))
    if replaced.exists() and not final.exists():  # the program was killed between two renames
        replaced.rename(final)
    remove(staged)
    staged.mkdir(parents=True)
    try:
        yield staged
    except BaseException:
        with suppress(OSError):  # a full disk needs its room back
            remove(staged)
        raise
    for path in (*staged.rglob("*"), staged):
        fsync(path)
    if final.exists():
        remove(earlier or replaced)
        final.rename(earlier or replaced)
    staged.rename(final)
    fsync(final.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """A file, a folder or a link, if there is one; never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    known = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)  # no NaN
    text = json.dumps(known, indent=2, ensure_ascii=False)
    with atomic_write(path) as staged:
        staged.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


# ==================================================================================================
# 2  Where data comes from
# ==================================================================================================

EXAMPLE_DATASET = "dataset_example.xlsx"
REPORT_NAME = "dataset_report"  # what check writes; never taken for data that nobody named
TABLE_ENDINGS = tuple(".xlsx .xlsm .xls .xlsb .ods .csv .tsv .json .jsonl .parquet".split())
LARGEST_FILE_MB = 500
MOST_ROWS = 300_000  # openpyxl reads some 30,000 in a second
MOST_CHARACTERS = 200_000_000
TOO_LARGE = f"has over {MOST_ROWS:,} rows, {MOST_CHARACTERS:,} characters or 2,000 fields: split it"
MOST_FILES = 200  # tables in one folder of a bucket
PAUSES = (1, 2, 4, 8)  # seconds between the five tries of a download
# What another try would not change, in the words of urllib, huggingface_hub, pyarrow and datasets.
PERMANENT = r"(HTTP Error|HTTP status|Client error) '?[34](?!08|25|29)|Client Error|DENIED|SIGNATURE|ACCESS_KEY|VALIDATION|[Oo]ffline|doesn't|data files|generating|nonnumeric"
LINK_ADVICE = "Open the link in a private window of your browser: it should download the file. A file in Google Drive must be shared with anyone who has the link."
BUCKET_ADVICE = "It should look like s3://bucket/file.csv. Access denied (403) means a wrong key: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the environment or a file .env, and also S3_ENDPOINT_URL if the bucket is not Amazon's."
HUB_ADVICE = "It should look like hf:owner/name, hf:owner/name:split, hf:owner/name:configuration/split or hf:owner/name:file.csv. A private dataset needs HF_TOKEN. If it has a licence to accept, accept it on the dataset's page. HF_HUB_OFFLINE must not be set."
DIRECT_LINKS = {  # from a page about a file, whose link people copy, to the file itself
    r"https://docs\.google\.com/spreadsheets/d/e/([\w-]+)/.*": r"https://docs.google.com/spreadsheets/d/e/\1/pub?output=xlsx",
    r"https://docs\.google\.com/spreadsheets/(?:u/\d+/)?d/([\w-]+).*?[#&?]gid=(\d+).*": r"https://docs.google.com/spreadsheets/d/\1/export?format=csv&gid=\2",
    r"https://docs\.google\.com/spreadsheets/(?:u/\d+/)?d/([\w-]+)(?!.*/(?:gviz|export|pub)\b).*": r"https://docs.google.com/spreadsheets/d/\1/export?format=xlsx",
    r"https://drive\.google\.com/(?:file/d/|open\?id=)([\w-]+).*": r"https://drive.google.com/uc?export=download&id=\1",
    r"https://github\.com/([^/]+/[^/]+)/blob/(.+)": r"https://raw.githubusercontent.com/\1/\2",
    r"(https://huggingface\.co/.+)/blob/(.+)": r"\1/resolve/\2",
    r"(https://www\.dropbox\.com/.+)dl=0(.*)": r"\1dl=1\2",
}


def find_dataset(cfg: Config) -> tuple[str, list[Path]]:
    """The name of the data and its files on this computer, downloaded first if need be."""
    source = cfg.DATASET_PATH.strip()
    is_remote = re.match("(?i)https?://|s3://[^/]|hf:", source)
    paths = fetch(source) if is_remote else local_files(source)
    return paths[0].name if len(paths) == 1 else f"{source} ({len(paths)} files)", paths


def local_files(source: str) -> list[Path]:
    """The file of this name, the files that match a pattern, or the tables in a folder."""
    path = local_path(source)
    if path.name == EXAMPLE_DATASET and not os.path.exists(path):
        path = Path(globals().get("__file__", "")).parent / EXAMPLE_DATASET
    if os.path.exists(path) and path.is_file():
        return [path]
    folder = path if os.path.isdir(path) else path.parent
    tables = matching(f"{glob.escape(str(folder))}/*", TABLE_ENDINGS)
    if found := tables if folder == path else matching(str(path)):
        return found
    names = ", ".join(table.name for table in tables[:5])
    advice = f"Name one of {names}" if tables else "Upload it there, or name another"
    missing = f"There is no table or folder of tables at {path.resolve()} (DATASET_PATH)."
    raise UserError(f"{missing}\n{advice} with --dataset-path.")


def matching(pattern: str, endings: str | tuple[str, ...] = "") -> list[Path]:
    """The files that match, without locks and the reports of check."""
    ours = rf"(~\$|\.~lock\.).*|{REPORT_NAME}(-\d+)?\.(xlsx|png)"
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207  the pattern may be absolute
    paths = [Path(name) for name in sorted(names) if name.lower().endswith(endings)]
    return [path for path in paths if path.is_file() and not re.fullmatch(ours, path.name)]


def cache_folder(*names: str) -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return local_path(caches).joinpath("finetune_colab", *names)


def without_secrets(address: str) -> str:
    """An address as it may be shown and written down: keys stand in its query or before an @."""
    host = r"(?:\[[\da-f:]+\])?[^/?#[]*"  # what else begins with a bracket may be anything
    secret = rf"(?is)^\s*(https?://|s3://)(?:[^/?#]*@)?({host}(?:/[^?#]*)?).*"
    return re.sub(secret, r"\1\2", address)


def refuse_large(name: str, size: int) -> None:
    if size > LARGEST_FILE_MB * 1e6:
        raise UserError(f"{name} is larger than {LARGEST_FILE_MB} MB. Use a part of it.")


def receive(key: str, name: str, stream: Any, headers: Any) -> Path:
    """The copy of this version (ETag) in the cache, or a new one of the stated size."""
    version, size = headers.get("ETag"), int(headers.get("Content-Length") or -1)
    folder = cache_folder("data", hashlib.sha256(f"{key} {version}".encode()).hexdigest()[:16])
    allowed = re.sub(r'[\\/:*?"<>|]', "_", "".join(c for c in name if c.isprintable()))
    file = folder / (allowed.strip(". ")[-50:] or "download")
    if version and file.is_file() and size in (-1, file.stat().st_size):
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        with partial.open("wb") as content:
            while piece := stream.read(8 << 20):
                content.write(piece)
                refuse_large(name, max(size, content.tell()))
        if not (arrived := partial.stat().st_size) or size not in (-1, arrived):
            raise ConnectionError(f"only {arrived} bytes arrived")
    return file


def from_link(link: str) -> list[Path]:
    """The file behind a link, also if the link is to a page about the file."""
    for pattern, direct in DIRECT_LINKS.items():
        link = re.sub(f"^{pattern}$", direct, link)
    url = urllib.parse.quote(link.partition("#")[0], safe="%/:=&?~+!$,;'@()*[]")
    if re.match("[^?]+//[^/?]*@", url):
        raise ValueError("it contains a password. Download the file, and name the file instead")
    request = urllib.request.Request(url, headers={"User-Agent": "finetune_colab.py"})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("it is a web page, not a file")
        name = response.headers.get_filename() or urllib.parse.urlsplit(url).path.rpartition("/")[2]
        return [receive(url, urllib.parse.unquote(name), response, response.headers)]


def from_bucket(address: str) -> list[Path]:
    """One object, or all tables in a folder."""
    from pyarrow import fs

    def copy(path: str, name: str) -> Path:
        with client.open_input_file(path) as stream:
            return receive(f"s3://{path}", name, stream, stream.metadata())

    root = address[len("s3://") :].rstrip("/")
    client = bucket_client(root.partition("/")[0])
    if "/" in root:
        with suppress(FileNotFoundError):  # perhaps it is a folder
            return [copy(root, root.rpartition("/")[2])]
    found = client.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
    paths = sorted(one.path for one in found if one.size)  # of files, not of folders
    tables = [path for path in paths if path.lower().endswith(TABLE_ENDINGS)]
    if not 0 < len(tables) <= MOST_FILES:
        raise ValueError(f"it holds {len(tables)} tables, not 1 to {MOST_FILES}: {tables[:3]}")
    return [copy(path, path.removeprefix(f"{root}/")) for path in tables]


def bucket_client(bucket: str) -> Any:
    """With the keys of the environment, or else of a file .env in this folder."""
    from pyarrow import fs

    file = Path(".env")
    text = file.read_text("utf-8-sig", "replace") if file.is_file() else ""
    line = r"(?m)^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=(.*?)(?:[ \t]#.*)?$"
    found = [*re.findall(line, text), *os.environ.items()]
    values = {name: value.strip().strip("\"'") or None for name, value in found}
    endpoint = values.get("S3_ENDPOINT_URL") or values.get("AWS_ENDPOINT_URL")
    region = values.get("AWS_REGION") or values.get("AWS_DEFAULT_REGION") or "us-east-1"
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region if endpoint else fs.resolve_s3_region(bucket),
        access_key=values.get("AWS_ACCESS_KEY_ID"),
        secret_key=values.get("AWS_SECRET_ACCESS_KEY"),
        session_token=values.get("AWS_SESSION_TOKEN"),
        anonymous=not (values.get("AWS_ACCESS_KEY_ID") or os.path.exists(local_path("~/.aws"))),
        connect_timeout=20,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # the tries are counted here
    )


def from_hub(address: str) -> list[Path]:
    """A file of a dataset, or the rows of a split as parquet."""
    from datasets import load_dataset_builder
    from huggingface_hub import hf_hub_download

    [(name, part)] = re.findall("(?i)^hf:(?://datasets/)?([^:/]*/?[^:/]*)[:/]?(.*)", address)
    if part.lower().endswith(TABLE_ENDINGS):
        return [Path(hf_hub_download(name, part, repo_type="dataset"))]
    config, _, split = (part or "train").rpartition("/")
    builder = load_dataset_builder(name, config or None)
    if split not in builder.config.data_files:
        raise ValueError(f"it has no split {split}, only {', '.join(builder.config.data_files)}")
    refuse_large(f"hf:{name}", builder.info.download_size or 0)
    builder.download_and_prepare()
    file = Path(builder.cache_dir) / f"{name.rpartition('/')[2]}-{split}.parquet"
    with atomic_write(file) as partial:
        builder.as_dataset(split).to_parquet(partial)
    return [file]


def fetch(address: str) -> list[Path]:
    """Five tries with growing pauses, while the network or the server fails."""
    others = {"s3": (from_bucket, BUCKET_ADVICE), "hf": (from_hub, HUB_ADVICE)}
    act, advice = others.get(address[:2].lower(), (from_link, LINK_ADVICE))
    shown = without_secrets(address)
    say("Download", shown)
    for tries, pause in enumerate((*PAUSES, 0), 1):
        try:
            return act(address)
        except UserError:
            raise
        except Exception as error:  # every library has its own, and an address in it may hold a key
            reason = preview(re.sub("https?://[^ ]+", "…", str(error)), 300) or type(error).__name__
            is_final = isinstance(error, (ValueError, RuntimeError)) or re.search(PERMANENT, reason)
        if is_final or not pause:
            break
        say("Download", f"{shown}: {reason} (try {tries + 1} follows in {pause} s)")
        time.sleep(pause)
    raise UserError(f"{shown} could not be fetched: {reason} (tries: {tries})\n{advice}")


# ==================================================================================================
# 3  Rows to pairs
# ==================================================================================================

COPY = "a copy of an earlier row"  # lowers the quality, but is no ground to refuse the data
BLANK, OTHER_LANGUAGE = "blank", "the language is"  # reasons that say nothing of the quality
# Names of sheets, files and lists that are read only where there is nothing else
HELD_BACK = r"(?i)(^|, )((test|val(id(ation)?)?|dev|eval)(-\d+-of-\d+)?(\.\w+)?|negative.*|.* \(hidden\))(, |$)"


class Table(NamedTuple):
    sheet: str  # "" for a text file
    header: list[str]
    rows: list[tuple[int, list[Any]]]  # with their numbers; cells of JSON may be lists, objects


Messages = list[dict[str, str]]
Turns = list[tuple[str, str]]  # role and text


class Pair(NamedTuple):
    messages: Messages  # of one conversation; the last one is the answer
    sheet: str  # and the file before it, where there are several
    row: int

    @property
    def question(self) -> str:
        return self.messages[-2]["content"]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def row_label(self) -> str:
        return f"row {self.row}" + (f" of {self.sheet}" if self.sheet else "")

    def note(self, kind: str, other: Pair | None = None) -> Note:
        return Note(self.sheet, self.row, kind, other.row_label if other else "")


class Note(NamedTuple):
    sheet: str
    row: int
    kind: str  # why the row is left out, or what looks wrong in it
    other_row: str = ""  # that it repeats or contradicts

    @property
    def reason(self) -> str:
        return f"{self.kind} ({self.other_row})" if self.other_row else self.kind


@dataclass(eq=False)
class Pairs:
    name: str  # of the file, for the person
    sheet: str  # of one table; and the file before it, where there are several
    table: Table  # of several, the first
    shape: str
    columns: dict[int, str]  # roles of question, answer, and what joins the question; or none
    reason: str  # for which the columns were chosen
    kept: list[Pair]
    dropped: list[Note]
    rows_read: int
    parts: list[Pairs] = field(default_factory=list)  # the tables that are used
    other_tables: list[str] = field(default_factory=list)  # those that are not

    @property
    def used(self) -> list[str]:
        return [self.table.header[column] for column in self.columns]


def find_pairs(cfg: Config) -> Pairs:
    """Every pair of the data that can be trained on, and a note for every row that cannot."""
    name, paths = find_dataset(cfg)
    parts, unusable = read_parts(paths, cfg)
    if not parts:
        first, *others = map(str, unusable.values())
        raise UserError("\n".join([first, *(preview(one, 150) for one in others[:7])]))
    groups, weights = defaultdict[Any, list[Pairs]](list), Counter[Any]()
    for part in [one for one in parts if not re.search(HELD_BACK, one.sheet)] or parts:
        group = part.shape, *map(fold, part.used[:2])  # tables with the same two columns add up
        groups[group].append(part)
        named = not part.columns or sum(map(name_strength, part.used, NAMES)) >= 2 * PHRASE
        weights[group] += len(part.kept) * (10 if named else 1)  # clear names outweigh more rows
    best = groups[max(weights, key=lambda group: weights[group])]
    unused = {one.sheet: f"{one.sheet}: {len(one.kept)} pairs" for one in parts if one not in best}
    unused |= {sheet: str(error).partition(". ")[0] for sheet, error in unusable.items()}
    if unused and not cfg.SHEET:
        say("Chosen", preview(", ".join(one.sheet for one in best), 300))
        say("Not used", "\n".join(preview(one, 150) for one in [*unused.values()][:8]))
        say("", "To use another, name its sheet with --sheet or its file with --dataset-path")
    kept, copies = without_copies([pair for part in best for pair in part.kept])
    dropped = [note for part in best for note in part.dropped] + copies
    sheets = ", ".join(dict.fromkeys(part.table.sheet for part in best if part.table.sheet))
    whole = replace(best[0], name=name, table=best[0].table._replace(sheet=sheets), parts=best)
    size = sum(part.rows_read for part in best)
    return replace(whole, kept=kept, dropped=dropped, rows_read=size, other_tables=list(unused))


def read_parts(paths: list[Path], cfg: Config) -> tuple[list[Pairs], dict[str, UserError]]:
    parts, unusable = list[Pairs](), dict[str, UserError]()
    gc.disable()  # its search for cycles through all rows takes an eighth of the time
    try:
        for path in paths:
            try:
                tables = read_tables(path, cfg)
            except UserError as error:
                tables, unusable[path.name] = [], error
            for table in tables:
                in_file = f"{path.name}, {table.sheet}" if table.sheet else path.name
                sheet = in_file if len(paths) > 1 else table.sheet
                try:
                    parts.append(pairs_of(table, path.name, sheet, cfg))
                except UserError as error:
                    unusable[sheet] = UserError(f"In {in_file}: {error}")
    finally:
        gc.enable()
    return parts, unusable


def pairs_of(table: Table, name: str, sheet: str, cfg: Config) -> Pairs:
    """What one table came to: its pairs, and a reason for every row that is left out."""
    if fold(cfg.SHEET or table.sheet) != fold(table.sheet):
        raise UserError(f"this is not the sheet {cfg.SHEET!r} (--sheet).")
    columns, why, typed = dict[int, str](), "", cfg.QUESTION_COLUMN or cfg.ANSWER_COLUMN
    if roots := not typed and tree_roots(table):
        shape, found = "message tree", list(tree_conversations(roots, cfg))
    elif roles := not typed and roles_around_chats(table):
        shape, found = "conversations", list(conversations_in(table, roles))
    else:
        columns, why = find_columns(table, cfg)
        shape, found = "question and answer", list(conversations_in(table, columns))
    kept = [Pair(chat, sheet, number) for number, chat in found if isinstance(chat, list)]
    dropped = [Note(sheet, number, reason) for number, reason in found if isinstance(reason, str)]
    return Pairs(name, sheet, table, shape, columns, why, kept, dropped, len(table.rows))


# -- Files to tables

FAILED_FORMULAS = ("#N/A", "#REF!", "#DIV/0!", "#VALUE!", "#NAME?", "#NULL!", "#NUM!")
JSON_CELL = re.compile(r"(?s)\[(?=\s*['\"\[{\]\d]).*\]|\{.*['\"](answer_start|replies)['\"].*\}")
UNREADABLE = [None, None]  # in place of broken JSON, or of what Python or numpy printed
KINDS = {  # of files, by their first bytes
    rb"PAR1\x15": "parquet",
    rb"\xd0\xcf\x11\xe0.*E\0n\0c\0r\0y\0p\0t\0e\0d\0P": "protected by a password; remove it first",
    rb"PK\x03\x04.*(worksheets|content\.xml)|\xd0\xcf\x11\xe0": "workbook",
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!\x1a|BZh\d1AY|\xfd7zXZ": "compressed (a zip file, a Word document, slides), or cut off; unpack it first",
    rb"%PDF-\d|\{\\rtf|\x89PNG|\xff\xd8\xff|GIF8[79]a(.\0|\Z)|SQLite format 3\0|(?i:insert into \S+ ?\(|-- (mysql|phpmyadmin|postgresql))|(?i:<(\?xml|\?mso|workbook|!doctype html|!--|html|head|body|table|tr|meta|style|script|div)|mime-version:)": "not a table but a document (PDF, RTF), a picture, a database (SQL), a web page (HTML) or XML, whatever its name says",
    rb"version https://git-lfs": "a Git LFS pointer and not the file itself; run: git lfs pull",
    rb"": "text",
}
# In a process of its own: with a damaged file calamine 0.9 may abort it, or never end
CALAMINE = """
import faulthandler, io, json, python_calamine, sys
content = sys.stdin.buffer.read()
faulthandler.dump_traceback_later(3 + len(content) / 20_000, exit=True)
book = python_calamine.load_workbook(io.BytesIO(content))
for sheet in book.sheets_metadata:
    rows = book.get_sheet_by_name(sheet.name).to_python(skip_empty_area=False)
    name = sheet.name + " (hidden)" * (sheet.visible != sheet.visible.Visible)
    print(json.dumps([name, rows], default=str))
"""
# The characters beside ASCII that say nothing of a language, and those of each Western one
WESTERN = "[\0-\x7f«»„“”‚‘’–—…°§©®™•€£¥¢×÷±½²\u00a0{}]*"
LETTERS = "äöüß éèàêçâîôûùëïœæ áéíóúñü¿¡ºª ãáéíóúçâêôõàºª àèéìòù åäöé æøåéòóô áéíóúýþæöð ëéïöüèó àéèíïóúòüç· äõöüšž"
ENCODINGS = "cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 cp874 koi8_r mac_roman gb18030 big5 shift_jis euc_jp cp949".split()


def read_tables(path: Path, cfg: Config) -> list[Table]:
    """Every filled sheet of a file, decided by its content. The only opener of data files."""
    try:
        refuse_large(str(path), path.stat().st_size)
        content = path.read_bytes()
        start = content.lstrip(b"\xef\xbb\xbf \t\r\n")
        kind = next(kind for mark, kind in KINDS.items() if re.match(mark, start, re.DOTALL))
        if kind not in ("text", "parquet", "workbook"):
            raise UserError(f"is {kind}.\nPut the rows into .xlsx, .csv or .jsonl")
        sheets = text_sheets(decoded(path, content)) if kind == "text" else workbook_sheets(content)
        if kind == "parquet":
            from pyarrow.parquet import ParquetFile

            # threads may still be starting when a short program ends, which aborts it
            groups = ParquetFile(io.BytesIO(content)).iter_batches(use_threads=False)
            sheets = [("", (row for group in groups for row in group.to_pylist()))]
        tables = [table_of(cfg, name, rows) for name, rows in sheets]
        if filled := [one for one in tables if any(any(row) for _, row in one.rows)]:
            return filled
        raise UserError("holds no rows. Put a question and an answer in each row, or JSON object.")
    except UserError as error:
        raise UserError(f"{path} {str(error).removeprefix(f'{path} ')}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds
        fault = preview(f"{type(error).__name__}: {error}", 100)
        advice = "Save it again as .xlsx or .jsonl"
        raise UserError(f"{path} is damaged, or has a password ({fault}).\n{advice}") from None


def workbook_sheets(content: bytes) -> Iterator[tuple[str, Any]]:
    """openpyxl reads .xlsx in bounded memory; calamine reads the others, and what openpyxl cannot."""
    import openpyxl

    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if not re.search(r"worksheets|\bcontent\.xml", "\n".join(archive.namelist())):
                raise UserError("is a zip without a workbook. Unpack it, and name a file in it")
            unpacked = sum(part.file_size for part in archive.infolist())
            parts = (archive.read(name) for name in archive.namelist() if "worksheets" in name)
            is_bomb = unpacked > min(max(100 * len(content), 20e6), LARGEST_FILE_MB * 2e6)
            if is_bomb or any(part.count(b"<row") > MOST_ROWS for part in parts):
                raise UserError(f"unpacks to {unpacked / 1e6:,.0f} MB, or {TOO_LARGE}")
    sheets = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="openpyxl")  # of what it does not need to read
        with suppress(Exception):  # a dozen kinds; in Strict Open XML it finds no sheets
            book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
            sheets = book.worksheets
        for sheet in sheets:
            sheet.reset_dimensions()  # what a sheet claims of its size may be wrong by millions
            yield sheet.title + " (hidden)" * (sheet.sheet_state != "visible"), sheet.values
    if sheets:
        return
    if importlib.util.find_spec("python_calamine") is None:
        raise UserError("is damaged, or needs one more package.\nRun: pip install python-calamine")
    command = [sys.executable, "-c", CALAMINE]
    child = subprocess.run(command, input=content, capture_output=True, check=False)
    if child.returncode:
        raise ValueError(child.stderr.decode(errors="replace").strip().split("\n")[-1])
    yield from map(json.loads, child.stdout.splitlines())


def decoded(path: Path, content: bytes) -> str:
    """The text of a file: UTF-8, UTF-16, or what the other lines look like, which is said."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    odd = dict.fromkeys(line for line in lines if line.decode(errors="ignore").encode() != line)
    pattern = re.compile("|".join(map(WESTERN.format, LETTERS.split())), re.IGNORECASE)
    western = [line for line in odd if pattern.fullmatch(line.decode("cp1252", "replace"))]
    encoding = "cp1252" if len(western) >= 0.9 * len(odd) else ""
    if not encoding and b"\0" not in content:
        if importlib.util.find_spec("charset_normalizer") is None:
            advice = "Save it as UTF-8 or .xlsx, or run: pip install charset-normalizer"
            raise UserError(f"{path} is not UTF-8; to guess what it is takes a package.\n{advice}")
        import charset_normalizer

        likely = charset_normalizer.from_bytes(b"\n".join([*odd][:2000]), cp_isolation=ENCODINGS)
        encoding = best.encoding if (best := likely.best()) else ""
    if b"\0" in content or not encoding:
        raise UserError(f"{path} is neither a workbook nor a text. Open it and save it as .xlsx")
    if odd:
        guess = encoding.replace("cp", "Windows-").replace("_", "-")
        count = plural(len(odd), "line")
        say("Note", f"{path.name}: {count} in {guess}, not UTF-8. Check the accents.")
    return "\n".join(line.decode(encoding if line in odd else "utf-8", "replace") for line in lines)


def text_sheets(text: str) -> list[tuple[str, Any]]:
    """A JSON document, one JSON value a line, or lines of cells."""
    if not re.match(r"""\s*(\{\s*["'}]|\[\s*[\[{"'\d\]])""", text):
        return [("", csv_rows(text))]
    try:
        value = json.loads(text)
    except ValueError as error:
        values = [from_json(line.strip()) or {} for line in text.rstrip().split("\n")]
        readable = sum(isinstance(one, (dict, list)) and any(one) for one in values)
        if readable > (len(values) - values.count({})) / 2:
            return [("", values)]
        raise UserError(f"is not valid JSON: {preview(str(error), 150)}. Correct it.") from None
    return json_sheets("", value) or [("", [value])]


def csv_rows(text: str) -> Iterator[list[str]]:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the usual 128 kB
    lines = list(io.StringIO(text, newline=""))
    alike = {}
    for mark in ",;\t|":
        rows = csv.reader(lines[:500], delimiter=mark, skipinitialspace=True)
        alike[mark] = max(Counter(len(row) for row in rows if len(row) > 1).values(), default=0)
    mark = max(alike, key=lambda mark: alike[mark])
    reader = csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True)
    while (start := reader.line_num) < len(lines):
        try:
            row = next(reader)
        except csv.Error:
            cells = lines[start].rstrip("\r\n").split(mark)  # a line as it stands
            if reader.line_num > start + 1 or any(cell.count('"') % 2 for cell in cells):
                fault = f"has a quotation mark that opens and never ends, in line {start + 1}"
                raise UserError(f'{fault}.\nClose it, or write it twice ("").') from None
            row = [re.sub(r'^\s*"([^"]*)"\s*$', r"\1", cell) for cell in cells]
        yield row


def json_sheets(name: str, value: Any) -> list[tuple[str, Any]]:
    """Every list in a JSON value; records by their ids make one, too."""
    if not isinstance(value, dict):
        return [(name, value)] if isinstance(value, list) else []
    inner = list(value.values())
    if isinstance(value.get("prompt"), dict) or any(map(is_conversation, inner)):
        return [(name, [value])]
    flat = all(isinstance(one, list) and not {*map(type, one)} & {list, dict} for one in inner)
    if flat and inner[1:] and len({*map(len, inner)}) == 1:  # columns
        return [(name, [dict(zip(value, row, strict=True)) for row in zip(*inner, strict=True)])]
    if all(isinstance(one, str) for one in inner) and sum(map(asks, value)) > len(value) / 2:
        return [(name, [{"question": key, "answer": text} for key, text in value.items()])]
    by_id = inner[1:] and all(isinstance(one, dict) for one in inner)
    if by_id and not all(map(str.isdigit, set.intersection(*map(set, inner)))):
        return [(name, inner)]
    return [sheet for key, part in value.items() for sheet in json_sheets(key, part)]


def table_of(cfg: Config, name: str, values: Iterable[Any]) -> Table:
    """Lists as the rows of a table below its header, or else records with named fields."""
    most = itertools.islice(values, 2**20)  # rows of a workbook
    values = [{"messages": one} if is_conversation(one) else one for one in most]
    for key in ("paragraphs", "qas"):  # of SQuAD
        if any(objects_in(one, key) for one in values[:1]):
            values = [part for one in values for part in objects_in(one, key)]
    is_grid = all(isinstance(row, (list, tuple)) for row in values)
    while is_grid and values and not any(cell not in (None, "") for cell in values[-1]):
        values.pop()
    texts = (cell for row in values if is_grid for cell in row if isinstance(cell, str))
    fields = list(dict.fromkeys(key for one in values if isinstance(one, dict) for key in one))
    if len(values) > MOST_ROWS or sum(map(len, texts)) > MOST_CHARACTERS or len(fields) > 2000:
        raise UserError(TOO_LARGE)
    if is_grid:
        table = with_header(name, [[one_text(cell) or "" for cell in row] for row in values], cfg)
    else:
        lost = dict.fromkeys(fields, UNREADABLE)  # a broken line, or one that is no object
        records = (one if isinstance(one, dict) else lost for one in values)
        rows = ([cell_text(one.get(key)) for key in fields] for one in records)
        table = Table(name, fields, list(enumerate(rows, start=1)))
    for i in range(len(table.header)):  # lists and objects that a CSV file holds as texts
        top = top_cells(table, i)
        if top and all(isinstance(cell, str) and JSON_CELL.fullmatch(cell) for cell in top):
            for _, row in table.rows:
                row[i] = from_json(row[i])
    return table


def cell_text(cell: object) -> Any:
    """A cell as the person sees it, without the blanks around it; lists and objects as they are."""
    if isinstance(cell, str):
        text = cell.replace("_x000D_\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
        if not text.isascii():  # JSON may hold half of an emoji, which no file can
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return "" if text in FAILED_FORMULAS else text.strip()
    if isinstance(cell, bytes):  # in Parquet, of a text or of a picture
        text = cell.decode(errors="ignore")
        return cell_text(text) if text.encode() == cell else ""
    if cell is None or isinstance(cell, (list, dict)):
        return "" if cell is None else cell
    if isinstance(cell, float):
        text = str(int(cell)) if cell.is_integer() else f"{cell:.15g}"
        return text if math.isfinite(cell) else ""
    text = str(cell).removesuffix(" 00:00:00")  # of a day
    return text.upper() if isinstance(cell, bool) else text


def objects_in(holder: Any, key: str) -> list[dict[str, Any]]:
    inner = holder.get(key) if isinstance(holder, dict) else None
    return [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else []


def top_cells(table: Table, column: int, most: int = 20) -> list[Any]:
    return list(itertools.islice((row[column] for _, row in table.rows if row[column]), most))


def from_json(cell: Any) -> Any:
    """The list or object that a text spells out; any other cell as it is."""
    try:
        return json.loads(cell) if isinstance(cell, str) and cell[:1] in ("[", "{") else cell
    except (ValueError, RecursionError):
        return UNREADABLE


def one_text(cell: Any) -> str | None:
    """The text of a cell; of a list or an object, the only text in it; None when there is no one."""
    if isinstance(cell, dict):
        text = cell.get("text", cell.get("value"))
        others = [cell[key] for key in {*cell} - {"@type", "type", "id"} if cell[key] is not text]
        if text is None or any(isinstance(one, (str, dict)) for one in others):
            return one_text(*cell.values()) if len(cell) == 1 else None
        cell = text[:1] if isinstance(text, list) else text  # in SQuAD the first answer counts
    if isinstance(cell, list):
        if all(isinstance(part, dict) and "text" in part for part in cell):  # in SQuAD and quizzes
            free = {"text", "answer_start", "id"}  # the others may say which is right
            right = [one for one in cell if not {fold(one[key]) for key in {*one} - free} & NO]
            cell = right if len(right) < len(cell) else cell[:1]
        if len(cell) == 1 and not isinstance(cell[0], (int, float)):  # a number alone is an index
            return one_text(cell[0])
        return None if cell else ""
    return str(cell_text(cell))


# -- Headers and columns

# What people call the two columns: names that are sure | likely ones | mere hints | who speaks
NAMES = {
    "question": "question, questions, q, instruction, prompt, prompts, ask, user input, frage, fragen, pregunta, preguntas, pergunta, perguntas, questão, domanda, domande, vraag, vragen, fråga, frågor, spørgsmål, spørsmål, kysymys, kysymykset, spurning, küsimus, jautājums, klausimas, pytanie, pytania, otázka, otázky, vprašanje, pitanje, pitanja, kérdés, kérdések, întrebare, întrebări, pyetje, pyetja, soru, sorular, sual, savol, câu hỏi, pertanyaan, soal, soalan, tanong, swali, maswali, tambaya, umbuzo, galdera, cwestiwn, demando, vrae, fraach, fro, froen, spørsmålet, spørsmåla, spørgsmålet, spørgsmålene, spurningar, spurningur, küsimused, jautājumi, klausimai, dotaz, dotazy, vprašanja, întrebarea, pyetjet, preguntes, questões, galderak, mistoqsija, mistoqsijiet, ceist, ceisteanna, ceistean, cwestiynau, goulenn, goulennoù, demandoj, suallar, sorag, soraglar, savollar, pirs, pirsên, hỏi, pitakon, pitakonan, patarosan, pananya, pangutana, fanontaniana, pātai, su'aal, su’aalo, gaaffii, gaaffilee, tambayoyi, ìbéèrè, ajụjụ, imibuzo, mubvunzo, mibvunzo, ikibazo, ibibazo, kesyon, въпрос, прашање, вопрос, вопросы, питання, запитання, пытанне, питање, ερώτηση, ερωτήσεις, сұрақ, суроо, асуулт, հարց, კითხვა, שאלה, שאלות, سؤال, سوال, أسئلة, پرسش, פֿראַגע, פֿראַגעס, питања, прашања, въпроси, пытанні, савол, сұрақтар, суроолор, сорау, сораулар, саволҳо, асуултууд, հարցեր, კითხვები, შეკითხვა, השאלה, سوالات, پوښتنه, پوښتنې, پرسیار, پرسیارەکان, سوئال, سوئاللار, प्रश्न, सवाल, প্রশ্ন, ਸਵਾਲ, પ્રશ્ન, கேள்வி, ప్రశ్న, ಪ್ರಶ್ನೆ, ചോദ്യം, คำถาม, សំណួរ, မေးခွန်း, ຄຳຖາມ, ጥያቄ, 问题, 問題, 提问, 提問, 题目, 題目, 指令, 问, 問, 質問, 問い合わせ, 질문, 문의, प्रश्नों, प्रश्‍न, प्रश्नहरू, প্রশ্নসমূহ, প্ৰশ্ন, প্ৰশ্নসমূহ, ପ୍ରଶ୍ନ, ପ୍ରଶ୍ନଗୁଡ଼ିକ, ਪ੍ਰਸ਼ਨ, પ્રશ્નો, கேள்விகள், வினா, ప్రశ్నలు, ಪ್ರಶ್ನೆಗಳು, ചോദ്യങ്ങൾ, ප්‍රශ්නය, ප්‍රශ්න, དྲི་བ, འདྲི་བ, ጥያቄዎች, ሕቶ, ሕቶታት, 标准问, 問い | input, input text, user, human, term, problem, user message, customer message, human message, inputs, inputs pretokenized | title, text | customer, customers, client, clients, buyer, caller, visitor, patient, interviewer, kunde, kunden, kundin, cliente, clientes, clienti, klant, klanten, kund, kunder, asiakas, klient, klientka, zákazník, zákazníci, ügyfél, kupac, stranka, müşteri, müşteriler, müştəri, mijoz, pelanggan, khách hàng, mteja, πελάτης, клиент, клиенты, покупатель, клієнт, кліент, купувач, לקוח, عميل, العميل, زبون, مشتری, ग्राहक, ลูกค้า, 客户, 客戶, 顾客, 顧客, お客様, 고객",
    "answer": "answer, answers, response, responses, output, outputs, completion, completions, reply, replies, target, ground truth, groundtruth, gold, expected, reference, antwort, antworten, respuesta, respuestas, resposta, respostas, risposta, risposte, antwoord, antwoorden, réponse, réponses, svar, vastaus, vastaukset, vastus, atbilde, atsakymas, odpowiedź, odpowiedzi, odpověď, odpovědi, odpoveď, odgovor, odgovori, válasz, válaszok, răspuns, răspunsuri, përgjigje, cevap, cevaplar, yanıt, yanıtlar, cavab, javob, câu trả lời, trả lời, phản hồi, đáp án, jawaban, jawab, jawapan, sagot, jibu, majibu, amsa, impendulo, erantzuna, ateb, respondo, antwoorde, antwurd, antwurden, äntwert, äntwerten, svaren, svaret, svara, svarene, svör, svør, vastused, atbildes, atsakymai, odpovede, răspunsul, përgjigja, përgjigjet, responsa, responsas, respostes, erantzunak, tweġiba, tweġibiet, freagra, freagraí, freagairt, freagairtean, atebion, respont, respontoù, respondoj, cavablar, jogap, jogaplar, javoblar, bersiv, bersivên, đáp, wangsulan, waleran, tubag, valiny, whakautu, jawaab, jawaabo, deebii, deebiiwwan, amsoshi, ìdáhùn, azịza, izimpendulo, iimpendulo, mhinduro, igisubizo, ibisubizo, repons, отговор, одговор, ответ, ответы, відповідь, відповіді, адказ, απάντηση, απαντήσεις, жауап, жооп, хариулт, պատասխան, პასუხი, תשובה, תשובות, جواب, إجابة, إجابات, رد, پاسخ, ענטפֿער, ענטפֿערס, одговори, отговори, адказы, жавоб, жауаптар, жооптор, җавап, җаваплар, ҷавоб, ҷавобҳо, хариултууд, պատասխաններ, პასუხები, התשובה, ځواب, ځوابونه, وەڵام, وەڵامەکان, جاۋاب, جاۋابلار, جوابات, उत्तर, जवाब, উত্তর, ਜਵਾਬ, જવાબ, பதில், సమాధానం, ಉತ್ತರ, ഉത്തരം, คำตอบ, ចម្លើយ, အဖြေ, ຄຳຕອບ, መልስ, 答案, 回答, 答え, 解答, 答复, 回复, 回覆, 答, 답변, 답, 정답, 응답, उत्तरों, उत्तरहरू, উত্তরসমূহ, উত্তৰ, উত্তৰসমূহ, ଉତ୍ତର, ଉତ୍ତରଗୁଡ଼ିକ, ਉੱਤਰ, જવાબો, பதில்கள், விடை, సమాధానాలు, ಉತ್ತರಗಳು, ഉത്തരങ്ങൾ, පිළිතුර, ལན, መልሶች, መልሲ, መልስታት, 标准答, 모범답안 | solution, assistant, bot, ai, chatbot, chosen, targets, output text, target text, bot response, bot reply, ai response, ai message, agent message, targets pretokenized | body, text, definition | support, supporter, support team, support agent, customer support, customer service, agent, agents, advisor, adviser, representative, operator, helpdesk, help desk, doctor, therapist, kundenservice, kundensupport, kundendienst, kundenberater, berater, beraterin, conseiller, conseillère, conseiller client, service client, assistance, agente, asesor, asesora, soporte, soporte técnico, atención al cliente, suporte, suporte técnico, atendente, atendimento, supporto, assistenza, operatore, consulente, medewerker, klantenservice, kundtjänst, kundeservice, asiakaspalvelu, wsparcie, konsultant, obsługa klienta, podpora, zákaznická podpora, ügyfélszolgálat, podrška, suport, destek, müşteri hizmetleri, müşteri temsilcisi, dəstək, dukungan, layanan pelanggan, hỗ trợ, υποστήριξη, поддержка, оператор, підтримка, תמיכה, الدعم, خدمة العملاء, پشتیبانی, ฝ่ายบริการลูกค้า, 客服, サポート, オペレーター, 상담원, 상담사",
}
# These tell something about a question or an answer, or mark what is not to be trained on.
OTHER = r"\b(id|ids|uuid|key|count|counts|number|num|no|nr|index|idx|start|end|offset|url|link|date|time|score|rating|type|category|topic|tag|tags|label|intent|length|len|normalized|lang|language|source|file|filename|path|votes|author|name|option|options|choice|choices|hint|context|contexts|passage|document|story|explanation|rationale|reason|reasoning|rubric|owner|status|dato|data|datum|stato|estado|etat|statut|autor|auteur|numero|zeitstempel|timestamp|typ|kategorie|thema|tipo|categoria|tema|fecha|categorie|kategori|konu|wrong|incorrect|false|falsche|errata|errada|errado|incorrecta|incorrecte|incorreta|distractor|rejected|negative|worst|model|llama|claude|gemini|mistral|mixtral|gemma|qwen|deepseek|bard|palm|copilot|rag|baseline|predicted|prediction|predict|pred|generated|gerada|hallucinated|aluno|alumno|eleve|ogrenci)\b|^answer.*\bstudents?\b|gpt|人|者|部门|部署|자명|답변자|질문자|답변일|질문일|类型|类别|分类|編號|编号|序号|番号|时间|日期|日時|来源|链接|标签|数量|种別|種別|カテゴリ|유형|번호|분류"
# These mark true answers, beside which others are what some system said; as words_of gives them.
TRUE_WORDS = "reference gold golden expected target correct ideal desired best official true truth gercek dogru richtige korrekte correcte exacte correta correto correcta corretta esatta juiste правильныи верныи poprawna spravna benar đung".split()
UNSPACED = re.compile("[฀-໿က-႟ក-៿぀-ヿ㐀-鿿가-힯]")  # from Thai to Korean
QUESTION_MARKS = ("?", "？", "؟", "՞")
ASKING = r"(?i)^(what|who|whom|whose|which|when|where|why|how|is|are|was|were|do|does|did|can|could|should|would|tell|write|explain|give|describe|list|name|translate|summari[sz]e|generate|create|define|find|compare|calculate|compute|convert|classify|identify|provide|rewrite|suggest)\b|(か|吗|嗎|呢|까|까요|나요)[。．.]?$|什么|什麼|怎么|怎麼|怎样|如何|多少|哪里|哪些|อะไร|อย่างไร|ยังไง|ทำไม|ไหม|ที่ไหน|เมื่อไหร่|ใคร|[α-ωά-ώ];$"
# A link, a file, an address, a hash, a label such as Q1
KEY = re.compile(r"(?i)https?://\S+|\S+\.[a-z]\w{1,4}|\S+@\S+|[0-9a-f-]{16,}|[^\W\d]+\d+\W?|\w")
# Headers of the options of a quiz, and answers that only name one of them
OPTION = re.compile(r"(?i)\bop[tcç]|choice|alternativ|answer[\da-d]\b|((?<!column)[ _]|^)[\da-d]$")
INDEX = re.compile(r"(?i)(option[_ ]?)?\w|\d\d")
WIDEST = 50  # columns that are weighed against each other
SENTENCE = 4  # words, on average, from which on cells may be answers whatever their header says
PHRASE = 1.9  # strength of a name that has a sure one in it
SAID_BY = 1.95  # of one that says who speaks, above sentences
CLEAR_LEAD = 0.25  # of the best two columns over any other two
CANNOT = -99.0  # strength of a column that cannot be what is asked for


def with_header(sheet: str, grid: list[list[str]], cfg: Config) -> Table:
    """Find the row of headers: with the person's names, names of both, or the first below a title; or none."""
    rows = list(itertools.dropwhile(lambda row: not any(row[1]), enumerate(grid, start=1)))
    top = [cells or [""] for _, cells in rows[:20]] or [[""]]
    typed = {fold(name) for name in (cfg.QUESTION_COLUMN, cfg.ANSWER_COLUMN) if len(name) > 2}
    named: dict[int, float] = {}
    for i, cells in enumerate(top):
        sides = [name_strength(c, "question") - name_strength(c, "answer") for c in cells[:WIDEST]]
        if any(cells[1:]) or sides[0] > 1:  # no title
            named[i] = max(sides) - min(sides)  # so that one cell names questions, another answers
    sure = [i for i in named if typed and typed <= set(map(fold, top[i]))]
    sure += [i for i, strength in named.items() if strength >= 3 + PHRASE]
    start = [*sure, *named, 0][0]  # the row of the header
    header, width = top[start], len(top[start])
    sentences = [cell for cell in header if word_count(cell) >= SENTENCE]
    is_pair = any(cell.endswith(QUESTION_MARKS) for cell in header)
    is_pair |= any(asks(cell) or cell[-1] in ".。" for cell in sentences)
    for name, *below in itertools.zip_longest(*top[start:], fillvalue=""):
        digits = [cell[0].isdigit() for cell in below if cell]
        is_pair &= not (name[:1].isalpha() and len(digits) > 2 and all(digits))  # what a form asked
    if is_pair and not sure:
        header = [f"column {column_letter(i)}" for i in range(width)]
    else:
        second = named.get(start + 1, 0) >= 2 * PHRASE > named.get(start + 2, 0)  # of two languages
        rows = rows[start + 1 + second :]
    return Table(sheet, header, [(n, row + [""] * (width - len(row))) for n, row in rows])


def word_count(text: str) -> float:
    return len(text[:1000]) / 2 if UNSPACED.search(text[:1000]) else len(text[:1000].split())


def column_letter(index: int) -> str:
    return (column_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def asks(text: str) -> bool:
    return text.endswith(QUESTION_MARKS) or bool(re.search(ASKING, text[:200]))


def words_of(header: str) -> list[str]:
    """The words of a header in plain letters: AnswerCount is answer and count, Réponse_2 reponse."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[^\W\d]{2})\d+|_\d+", " ", header[:200])
    plain = unicodedata.normalize("NFKD", spaced).casefold().replace("ı", "i")
    letters = "".join(c for c in plain if unicodedata.category(c)[0] != "M")
    return re.findall(r"(?:ال(?=..))?([^\W_]+)", unicodedata.normalize("NFC", letters))


@functools.cache
def known_names(role: str) -> dict[str, float]:
    listed = zip((3, 2, 0.1, SAID_BY), NAMES[role].split(" | "), strict=True)
    return {" ".join(words_of(one)): k for k, names in listed for one in names.split(", ")}


@functools.cache
def name_strength(header: str, role: str) -> float:
    """How well a header says what is in its column, as in NAMES; -1 where it says something else."""
    words, known = words_of(header), known_names(role)
    name = " ".join(words)
    if header.startswith("__") or re.search(OTHER, f"{role} {name}"):
        return -1
    space = "" if UNSPACED.search(name) else " "
    sure = (one for one in known if known[one] == 3 and len(one) > 1 and one not in TRUE_WORDS)
    inside = any(space + one + space in space + name + space for one in sure)
    if name not in known and inside and len(words) <= 4:
        return PHRASE + any(word in TRUE_WORDS for word in words)
    return known.get(name, 0)


class Column:
    def __init__(self, table: Table, index: int) -> None:
        inside = index < len(table.header)  # every table has two columns, if need be an empty one
        raw = top_cells(table, index, 2000) if inside else []
        self.index, self.header = index, table.header[index] if inside else ""
        self.title = preview(self.header) or column_letter(index)
        self.flag = self.title if re.fullmatch(r"[\w .,:?-]+", self.title) else column_letter(index)
        self.cells = [text for cell in raw if (text := one_text(cell))]
        self.lists = len(self.cells) < len(raw) / 2  # or objects without one text
        self.sample = preview(self.cells[0]) if self.cells else "(the column is empty, or a list)"
        self.distinct, count = len(set(self.cells)), max(1, len(self.cells))
        self.asking = sum(map(asks, self.cells)) / count
        self.words = sum(map(word_count, self.cells)) / count
        wordy = sum(any(map(str.isalpha, c)) and not KEY.fullmatch(c[:200]) for c in self.cells)
        self.is_text = wordy > count / 2 and self.distinct > 0.3 * count  # not labels or figures
        self.strength = {role: name_strength(self.header, role) for role in NAMES}

    def weighed(self, role: str, longest: float, alone: bool) -> float:
        """The strength of a name in the light of the cells."""
        named, asked = self.strength[role], role == "question"
        few = self.distinct < min(3, len(self.cells) - 1)
        impossible = (
            not (self.cells or self.lists),
            named == SAID_BY and self.words < SENTENCE,  # customers and agents by their names
            max(self.strength.values()) > max(1, named),  # the other of the two
            named == PHRASE and self.words < min(SENTENCE, longest / 1.5),  # who answered
            named < 3 and few and not INDEX.fullmatch(self.sample),  # labels
            named <= 0 and not self.is_text,
            named < 0 and not (alone and asked),
            named == 0 and not (alone or asked or self.words >= SENTENCE),
        )
        return CANNOT if any(impossible) else max(0, named) - self.lists


def find_columns(table: Table, cfg: Config) -> tuple[dict[int, str], str]:
    """The roles of the columns to use, and why: those that were typed, or the two that fit best."""
    columns = [Column(table, i) for i in range(max(2, len(table.header)))]
    alone = sum(one.is_text or one.lists for one in columns) < 3  # what one is not, the other is
    unnamed = [one for one in columns if one.is_text and max(one.strength.values()) < PHRASE]
    longest = max((one.words for one in unnamed), default=0)
    names = {"question": cfg.QUESTION_COLUMN, "answer": cfg.ANSWER_COLUMN}
    typed = {role: column_named(table, role, name) for role, name in names.items() if name}
    for one in columns:
        one.strength = {role: one.weighed(role, longest, alone) for role in NAMES}
        one.strength |= {role: 3 if one.index == i else CANNOT for role, i in typed.items()}
    usable = sorted(columns, key=lambda one: -max(one.strength.values()))[:WIDEST]
    ranked = sorted(itertools.permutations(usable, 2), key=lambda pair: -fit(*pair))
    (q, a), (next_q, next_a) = ranked[:2]
    if fit(q, a) < 0 or len(typed) < 2:
        refuse_unclear(columns, ranked)
    free = {"_".join(words_of(one.header)): one.index for one in columns if one not in (q, a)}
    joined = {free[name]: "system" for name in free if name in SYSTEMS}
    if fold(q.header) == "instruction":  # of Alpaca and Dolly
        joined |= {free[name]: "user" for name in free if name in ("input", "context")}
    reasons = [
        f'{role}s in "{one.title}" (by its {"name" if one.strength[role] > 0 else "content"})'
        for role, one in (("question", q), ("answer", a))
    ]
    if fit(next_q, next_a) >= 0:
        reasons.append(f'next best: "{next_q.title}" with "{next_a.title}"')
    return {q.index: "user", a.index: "assistant"} | joined, ", ".join(reasons)


def fit(question: Column, answer: Column) -> float:
    """How well two columns go together: by their names, and where those say little by what asks."""
    q, a = question.strength["question"], answer.strength["answer"]
    both = list(zip(question.cells[:20], answer.cells, strict=False))
    repeats = bool(both) and all(len(text) > len(end) and text.endswith(end) for text, end in both)
    return q + a + 0.7 * (question.asking - answer.asking) * (q < PHRASE) - repeats


def column_named(table: Table, role: str, name: str) -> int:
    """The position of a column that the person named, by its header or its letter."""
    known = [fold(h) for h in [*table.header, *map(column_letter, range(len(table.header)))]]
    if fold(name) in known:
        return known.index(fold(name)) % len(table.header)
    names, hint = filter(None, table.header), did_you_mean(name, table.header)
    listed = f"The columns are: {', '.join(map(preview, names))}"
    raise UserError(f"there is no column {name!r} (--{role}-column).{hint}\n{listed}")


def refuse_unclear(columns: list[Column], ranked: list[tuple[Column, Column]]) -> None:
    """Where the two that fit best may only seem to be right, show the columns and how to name them."""
    question, answer = ranked[0]
    named = max(question.strength["question"], answer.strength["answer"]) >= PHRASE
    longer = question.words > answer.words and not question.header.startswith("column ")
    is_topic = answer.strength["answer"] <= 0 and question.distinct < len(question.cells) / 2
    clear = fit(*ranked[0]) - max(0, fit(*ranked[1])) >= CLEAR_LEAD and (named or not longer)
    indices = sum(bool(INDEX.fullmatch(cell)) for cell in answer.cells)
    quiz = indices > 0.9 * len(answer.cells) and any(OPTION.search(one.header) for one in columns)
    if clear and not (is_topic or question.lists or answer.lists or quiz):
        return
    cells = "\n".join(f"  {one.title}: {one.sample}" for one in columns[:12])
    doubt = "it is not clear which columns hold the questions and the answers, each as one text."
    if quiz:
        doubt = f'"{answer.title}" only says which option is right. Make a column with its text.'
    advice = f'Say which: --question-column "{question.flag}" --answer-column "{answer.flag}"'
    raise UserError(f"{doubt} The columns, each with its first cell:\n{cells}\n{advice}")


# -- Shapes: what the rows of a table are

MORE_CELLS = "more cells than headers (put quotes around text that contains the separator)"
ANSWERING = "assistant gpt bot model chatgpt chatbot ai response answer output [/inst]"
ROLES = {"system": "system", "developer": "system"} | dict.fromkeys(ANSWERING.split(), "assistant")
ROLES |= dict.fromkeys("user human prompter customer instruction question [inst]".split(), "user")
# In a text: <|im_start|>user, <|user|>, [INST] and so on; ### Human: as in Alpaca, or lines with Human:
SPECIAL_TURN = r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?=(?:user|assistant|system)\|>)|(?=\[))\s*(\w+|\[/?INST\])(?:<\|end_header_id\|>|\|>)?"
SPEAKER = r"[ \t]*(Human|User|Instruction|Question|Assistant|Response|Answer|AI|Bot|GPT|Chatbot|System|Function response)\s*:"
END_MARKS = r"<<SYS>>\s*|\n<</SYS>>|</?s>|<\|(im_end|eot_id|endoftext|end)\|>|<end_of_turn>"
PICTURE = re.compile(r"^<(image|video|audio)>|\n<(image|video|audio)>$|<img>[^<\n]+</img>")
# Columns that may hold whole conversations, the best first; the first seven also as texts in turn
CHATS = "messages conversation conversations dialog dialogue dialogs data items contents chat_messages chat turns text prompt input chosen".split()
SYSTEMS = ("system", "system_prompt", "system_instruction")
MARKING = ("label", "correct", "is_correct", "accepted", "is_accepted")
YES, NO = {"true", "yes", "1", ""}, {"false", "no", "0"}
UNSEEN = ("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp", "Pd")  # blanks, accents alone, dashes, …
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # blanks that Unicode calls letters or symbols
Rows = Iterable[tuple[int, Messages | str]]  # a conversation, or why there is none
Message = dict[str, Any]  # as it stands in the data


def roles_around_chats(table: Table) -> dict[int, str]:
    """A column of conversations, with those of system prompts and of answers to the last questions."""
    names = ["_".join(words_of(name)) for name in table.header]
    chats, sure = list[int](), set[str]()
    for i, name in enumerate(names):
        top = top_cells(table, i)
        if top and not is_conversation(top[0]):
            sure |= {role for role in NAMES if name_strength(table.header[i], role) > 2}
        found = [bool(turns_of(cell, in_turn=name in CHATS[:7])) for cell in top]
        if name in CHATS and sum(found) > len(top) / 2:
            chats.append(i)
    if not chats or len(sure) > 1:  # two other columns are called question and answer
        return {}
    chat = min(chats, key=lambda i: CHATS.index(names[i]))
    strengths = [name_strength(h, "answer") * (i != chat) for i, h in enumerate(table.header)]
    answers = [i for i, strength in enumerate(strengths) if strength == max(strengths) > 0]
    roles = {i: "system" for i, name in enumerate(names) if name in SYSTEMS} | {chat: ""}
    return roles | ({answers[0]: "assistant"} if len(answers) == 1 else {})


def conversations_in(table: Table, roles: dict[int, str]) -> Rows:
    header, width = table.header, len(table.header)
    marking = [i for i in range(width) if "_".join(words_of(header[i])) in MARKING]
    marking = [i for i in marking if {fold(row[i]) for _, row in table.rows} <= YES | NO]
    asking = [i for i in roles if roles[i] != "assistant"]
    true = {i: not {*TRUE_WORDS}.isdisjoint(words_of(header[i])) for i in {*roles} - {*asking}}
    for number, row in table.rows:
        turns = [turn for i in asking for turn in turns_of(row[i], roles[i])]
        spoken = [turn for turn in turns if turn[1] and turn[0] != "system"]
        last, said = spoken[-1] if spoken else ("", "")
        for i, is_true in true.items():  # one column, or none
            if last == "user":  # an answer only to a question
                turns += turns_of(row[i], "assistant")
            elif is_true and last == "assistant" and fold(one_text(row[i]) or "") not in fold(said):
                turns = [(f'an answer that is not the one in "{preview(header[i])}"', "")]
        if wrong := [preview(header[i]) for i in marking if fold(row[i]) in NO]:
            yield number, f'marked as wrong in "{wrong[0]}"'
        elif not table.sheet and any(row[width:]):
            yield number, MORE_CELLS
        else:
            why = BLANK if not any(row) else "the header again" if row == header else ""
            yield number, why or as_messages(turns)


def as_messages(turns: Turns) -> Messages | str:
    """Turns in one form: the user first, the roles in alternation, an answer last; or why not."""
    messages, system, odd = Messages(), list[str](), ""
    for role, text in turns:
        if role not in ("system", "user", "assistant"):
            odd = role  # nothing after a tool is taken: its output is nobody's answer
            break
        if all(c in FILLERS or unicodedata.category(c) in UNSEEN for c in text):
            continue  # with nothing that can be seen
        if role == "system":
            system.append(text)  # goes before the first question
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        elif messages or role == "user":  # not a greeting
            messages.append({"role": role, "content": text})
    if len(messages) < 2:
        why = "no answer" if messages or system else "no question"
        return f"{odd} in place of the first question or answer" if odd else why
    messages[0]["content"] = "\n\n".join([*system, messages[0]["content"]])
    return messages[: len(messages) // 2 * 2]


def is_conversation(cell: Any) -> bool:
    return bool(cell) and isinstance(cell, list) and all(map(role_and_content, cell))


def role_and_content(turn: Any) -> tuple[str, Any] | None:
    keys = "content", "value", "text", "parts", "message", "tool_calls"
    for role, content in itertools.product(("role", "from", "sender"), keys):
        if isinstance(turn, dict) and role in turn and content in turn:
            name = str(turn[role])
            return ROLES.get(name.casefold()) or f"the role {preview(name, 30)!r}", turn[content]
    return None


def turns_of(cell: Any, role: str = "", in_turn: bool = True) -> Turns:
    """The turns of a whole conversation, or nothing; where the role is known, of one text."""
    messages = [cell] if isinstance(cell, dict) else cell
    if role and not is_conversation(messages):
        return [turn(role, cell if isinstance(cell, str) else one_text(cell))]
    if isinstance(cell, str):
        messages = turns_in_text(cell)
    elif in_turn and isinstance(cell, list) and all(isinstance(one, str) for one in cell):
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": next(roles), "content": text} for text in cell]
    return [turn_of(message) for message in messages] if is_conversation(messages) else []


def turn_of(message: Message) -> tuple[str, str]:
    role, content = role_and_content(message) or ("a message without a role", "")
    if message.get("tool_calls") or message.get("function_call"):
        return "a tool call", ""
    if message.get("weight") == 0:
        return "an answer that is not to be trained on (weight 0)", ""
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in parts]
    return turn(role, "".join(texts) if all(isinstance(one, str) for one in texts) else None)


def turn(role: str, text: str | None) -> tuple[str, str]:
    """Who speaks, and what. For the role of a turn that cannot be taken stands the reason."""
    said = (text or "").strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "<" in said and re.search("<(tool_?call|function_?call)>", said):
        role = "a tool call"
    elif len(said) > 1_000_000:
        role = "a text of more than 1,000,000 characters"
    elif text is None or ("<" in said and re.search(PICTURE, said)):
        role = "a picture, a list, an object or broken JSON"
    return role, said


def turns_in_text(text: str) -> list[Message]:
    """The turns of a text such as "### Human: Why? ### Assistant: So."; nothing for any other."""
    for mark in SPECIAL_TURN, ("(?i)###" if "###" in text else "(?im)^") + SPEAKER:
        _, *pieces = re.split(mark, re.sub(END_MARKS, "", text))
        roles = [ROLES.get(name.casefold()) for name in pieces[::2]]
        if [role for role in roles if role != "system"][:2] == ["user", "assistant"]:
            turns = zip(pieces[::2], pieces[1::2], strict=True)
            return [{"role": name, "content": text} for name, text in turns]
    return []


def tree_roots(table: Table) -> list[tuple[int, Message]]:
    """The first messages of trees, each with its row and its replies in it."""
    names = [fold(name) for name in table.header]
    if "prompt" in names and isinstance(table.rows[0][1][column := names.index("prompt")], dict):
        return [(n, row[column] if isinstance(row[column], dict) else {}) for n, row in table.rows]
    if not {"message_id", "parent_id", "text", "role"} <= set(names):
        return []
    rows = [(number, dict(zip(names, row, strict=False))) for number, row in table.rows]
    replies = {str(one["message_id"]): list[Message]() for _, one in rows if one["message_id"]}
    for _, message in rows:
        message["replies"] = replies.get(str(message["message_id"]), [])
        replies.get(str(message["parent_id"]), []).append(message)
    return [(number, one) for number, one in rows if str(one["parent_id"]) not in replies]


def tree_conversations(roots: list[tuple[int, Message]], cfg: Config) -> Rows:
    """From every first message down to an answer: along the best replies, or along all of them."""
    for number, root in roots:
        language = str(root.get("lang") or cfg.LANGUAGE)
        if root.get("parent_id"):
            yield number, "the message that it answers is not in the file"
        elif cfg.LANGUAGE not in ("", language.partition("-")[0]):
            yield number, f"{OTHER_LANGUAGE} {language}, not {cfg.LANGUAGE}"
        else:
            for turns in tree_paths([], [root], cfg.CONVERSATION_PATHS == "all"):
                yield number, as_messages(turns)


def tree_paths(turns: Turns, replies: list[Message], every: bool) -> Iterator[Turns]:
    """The turns of a path, with what follows it: the best reply, or each of them."""
    live = [one for one in replies if fold(one.get("deleted", "")) != "true"]
    live.sort(key=lambda one: (str(one.get("rank")) or "None").rjust(9))  # without a rank: last
    live = live[: None if every else 1] if len(turns) < 100 else []
    for reply in live:
        yield from tree_paths([*turns, turn_of(reply)], objects_in(reply, "replies"), every)
    if not live:
        yield turns


# -- Cleaning and quality

MARKS: dict[int, Any] = {n: chr(n) for n in range(128)}  # translate is slow where it finds nothing
MARKS |= str.maketrans("", "", " \t\n\u2028\u2029_*`'\"“”„‘’«»()[]:;!?¿¡…。、")  # not compared
# The second byte of a letter in UTF-8, read as Windows-1252, without what follows capitals in good text
TAIL = "€‚ƒ„†‡ˆ‰‹Œ•˜™›œŸ¡-ª¬-º¼-¿"
PATTERNS = {  # looked for in the texts of a pair, with "\n\0\n" between them
    "left-over HTML": r"(?is)\A(?=.*?(?:</?(?:a|b|i|u|p|[bh]r|div|span|em|strong|su[bp]|font|pre|code|[uo]l|li|img|table|t[rdh]|h[1-6]|blockquote|script|html|body)(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>|&(?:nbsp|amp|[lg]t|quot|apos|hellip|[mn]dash|[lr][sd]quo|#\d{2,6}|#x[\da-f]{2,5});))(?!.*(?:`|(?<![</.\w])(?:x?html|xml|css)\b))",
    "special tokens of a model": r"<\|\w{1,40}\|>|</s>|<(?:s|bos|eos|pad|unk|(?:start|end)_of_turn)>|<</?SYS>>|\[/?INST\]|(?m:^(?:Instruct|Output):)",  # the last are those of phi-2's prompt
    "broken characters": rf"[\x80-\x84\x86-\x9f\ufffd]|[Â-ß][{TAIL}]|[ÂÃÐÑ][\xa0«»–—ŠŽšž]|ï»¿|[à-ô][{TAIL}][{TAIL}\xa0«»‘-”–—…ŠŽšž]",
    "placeholder text": r"(?is)(?:\A|\0\n)(?:[\[({<*'\"]*(?:(?-i:TODO|todo)|to[ -]do|tb[acd]|fixme|n/a|n\.a\.?|x{3,}|test(?:ing)?|lorem\s+ipsum[^\0]*|placeholder|(?:(?:insert|put|write|type|enter|add)\b[^\0]{1,60}\b|(?:your|the)\s+(?:question|answer|text)\s+)(?:goes\s+)?here)[\])}>*'\"!:.]*|…|[?？.…_-]{2,})(?:\n\0|\Z)",  # "Todo" is Spanish
    "NULL instead of an answer": r"\0\n(?:NULL|null|None|NaN|nan|nil|#N/A)\Z",
    "an answer of one letter": r"\A[^\0]+\0\W*[^\W\d_\u3040-\ud7ff]\W*\Z",
}


def bare(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold().translate(MARKS)
    return re.sub(r"[.,-](?!\d)", "", plain) or text


def without_copies(pairs: list[Pair]) -> tuple[list[Pair], list[Note]]:
    first_seen, copies = dict[str, Pair](), list[Note]()
    for pair in pairs:
        texts = "\0".join([bare(one["content"]) for one in pair.messages])
        if (first := first_seen.setdefault(texts, pair)) is not pair:
            copies.append(pair.note(COPY, first))
    return list(first_seen.values()), copies


class Quality(NamedTuple):
    counted: int  # rows with content
    good: int  # of these, what is kept with nothing found in it
    score: float
    findings: list[list[Note]]  # for every pair that is kept
    flagged: list[Note]  # all of these
    notes: list[Note]  # what is flagged, and what is left out

    def __str__(self) -> str:
        return f"{self.good * 100 // self.counted / 100:.2f}"  # 0.999 is not yet 1.00


def quality_of(kept: Sequence[Pair], dropped: Sequence[Note]) -> Quality:
    """What looks wrong in each pair, by itself and beside the others, and what that comes to."""
    findings, asked = list[list[Note]](), defaultdict[str, list[int]](list)
    only_digits = {pair.answer for pair in kept} <= {*"0123456789"}
    for i, pair in enumerate(kept):
        texts = [message["content"] for message in pair.messages]
        bares, whole = list(map(bare, texts)), "\n\0\n".join(texts)
        sides = sum(map(len, texts[::2])), sum(map(len, texts[1::2]))
        found = {kind: re.search(pattern, whole) for kind, pattern in PATTERNS.items()} | {
            "a very short question": len(texts[0].strip(" ?!.:")[:9].encode()) < 3,
            "an answer that repeats its question": any(map(str.__eq__, bares[::2], bares[1::2])),
            "very unequal lengths": max(sides) > 50 * max(40, min(sides)),
            "an answer of one digit": only_digits,
        }
        findings.append([pair.note(kind) for kind, is_there in found.items() if is_there])
        asked[bare("\n".join(texts[:-1]))].append(i)
    for same in (rows for rows in asked.values() if len(rows) > 1):
        for i, other in zip(same, [*same[1:], same[0]], strict=True):
            findings[i].append(kept[i].note("another answer to the same question", kept[other]))
    flagged = list(itertools.chain(*findings))
    left_out = [note for note in dropped if not note.kind.startswith((BLANK, OTHER_LANGUAGE))]
    counted, good = len(kept) + len(left_out), findings.count([])
    score = good / counted if counted else 1.0
    return Quality(counted, good, score, findings, flagged, flagged + left_out)


# ==================================================================================================
# 4  Prompts and tokens
# ==================================================================================================

IGNORE = -100  # the label that torch's cross entropy leaves out
PLACEHOLDER = "\ue000{}\ue001"  # in place of a message's text while a template is rendered
PHI_2_PROMPT = "Instruct: {question}\nOutput:"  # of phi-2's model card; it has no chat template
PROMPT_AS_TEMPLATE = (  # in Jinja; `before` and `after` are what stands around a question
    "{%- set ns = namespace(system='') -%}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{%- set ns.system = m['content'] + '\\n\\n' -%}{%- elif m['role'] == 'user' -%}"
    "{{- before + ns.system + m['content'] + after -}}{%- set ns.system = '' -%}"
    "{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)


class Example(TypedDict):  # one conversation as the model sees it
    input_ids: list[int]
    labels: list[int]  # IGNORE where nothing is to be learned


def tokens_in(example: Example) -> int:
    return len(example["labels"])


def set_template(cfg: Config, tokenizer: Any) -> None:
    """Set the chat template: from PROMPT_TEMPLATE, the model's own, or phi-2's prompt."""
    if tokenizer.chat_template and not cfg.PROMPT_TEMPLATE:
        try:
            chat = "".join(text for text, _ in pieces(tokenizer, ("user", "assistant") * 2))
            if re.findall(PLACEHOLDER.format("(.)"), chat) != ["0", "1", "2", "3"]:
                raise ValueError("it leaves out messages")
            tokenizer.eos_token = special_tokens(tokenizer).findall(chat)[-1]  # what ends a turn
            return
        except Exception as error:  # a template is somebody else's program
            fault = preview(str(error), 100) or type(error).__name__
            say("Note", f"the chat template of {cfg.MODEL_NAME} is not used: {fault}")
    around = (cfg.PROMPT_TEMPLATE or PHI_2_PROMPT).split("{question}")
    before, after = (json.dumps(text, ensure_ascii=False) for text in around)
    names = f"{{%- set before = {before} -%}}{{%- set after = {after} -%}}"
    tokenizer.chat_template = names + PROMPT_AS_TEMPLATE


@functools.lru_cache(maxsize=16)
def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(longest_first) or '(?!)'})")


@functools.lru_cache(maxsize=1024)
def rendered(tokenizer: Any, template: str, roles: Sequence[str], asking: bool) -> str:
    """With placeholders, so that the template can neither trim a text nor mistake it for markup."""
    chat = [{"role": role, "content": PLACEHOLDER.format(i)} for i, role in enumerate(roles)]
    how = {"tokenize": False, "add_generation_prompt": asking, "chat_template": template}
    return str(tokenizer.apply_chat_template(chat, **how))


def pieces(tokenizer: Any, roles: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Prompts exactly as they are asked (False), and answers with their end of turn (True)."""
    render = functools.partial(rendered, tokenizer, tokenizer.get_chat_template())
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    done = ""
    for i in answers if roles[-1] == "assistant" else [*answers, len(roles)]:
        prompt = render(roles[:i], asking=True)
        if not prompt.startswith(done):
            raise ValueError("it changes how earlier turns look in later ones")
        yield prompt.removeprefix(done), False
        if i < len(roles):
            answer = render(roles[: i + 1], asking=False).removeprefix(prompt)
            lead, text, rest = answer.partition(PLACEHOLDER.format(i))
            end = special_tokens(tokenizer).search(rest)
            turn = (lead if lead.isspace() else "") + text + rest[: end.end() if end else 0]
            yield (turn if end else turn + tokenizer.eos_token), True
            done = prompt + turn


def encode(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Example:
    """Ids and labels of a conversation, made together, for training and for every way of asking."""
    special, texts = special_tokens(tokenizer), [message["content"] for message in messages]
    quotes_special = any(map(special.search, texts))

    def tokens_of(piece: str, plain: bool = False) -> list[int]:
        text = re.sub(PLACEHOLDER.format(r"(\d+)"), lambda number: texts[int(number[1])], piece)
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids)

    ids, labels, chat = list[int](), list[int](), ""
    for piece, is_answer in pieces(tokenizer, tuple(message["role"] for message in messages)):
        chat += piece
        more = tokens_of(chat)  # of all together, as other programs tokenize it
        if quotes_special or more[: len(ids)] != ids:  # the prompt must stay what it is when asked
            more = [*ids]
            for part in special.split(piece):
                more += tokens_of(part, plain=not special.fullmatch(part))
        labels += more[len(ids) :] if is_answer else [IGNORE] * (len(more) - len(ids))
        ids = more
    return {"input_ids": ids, "labels": labels}


def prompt_in_words(tokenizer: Any) -> str:
    [(prompt, _)] = pieces(tokenizer, ("user",))
    return prompt.replace(PLACEHOLDER.format(0), "{question}")


def marked(tokenizer: Any, example: Example) -> str:
    """An example as text, with what is to be learned between [[ and ]]."""
    tokens, text = zip(example["input_ids"], example["labels"], strict=True), ""
    for is_target, group in itertools.groupby(tokens, key=lambda one: one[1] != IGNORE):
        part = tokenizer.decode([one for one, _ in group], clean_up_tokenization_spaces=False)
        text += f"[[{part}]]" if is_target else part
    return text


# ==================================================================================================
# 5  Device and plan
# ==================================================================================================

# Security floors, too: older versions can run code hidden in weight files (torch before 2.10 in spite
# of weights_only, transformers before 5.3). requirements-finetune.txt and the header say the same.
REQUIRED = "python>=3.11 torch>=2.10 transformers>=5.6 peft>=0.18 accelerate>=1.10 bitsandbytes>=0.48 datasets>=4.0 pandas>=2.2.2 openpyxl>=3.1.3 matplotlib>=3.9 seaborn>=0.13"
FLOORS = dict(package.split(">=") for package in REQUIRED.split())


def installed_version(package: str) -> str | None:
    from importlib import metadata

    with suppress(metadata.PackageNotFoundError):
        return sys.version.split()[0] if package == "python" else metadata.version(package)
    return None


def installed_versions() -> dict[str, str | None]:
    return {package: installed_version(package) for package in FLOORS}


def is_below(version: str | None, floor: str) -> bool:
    """Whether a package is missing or too old; a pre-release counts as its release."""
    release, least = (re.findall(r"\d+", re.split("[^0-9.]", v)[0]) for v in (version or "", floor))
    return [*map(int, release)] < [*map(int, least)]


def bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


class Device(NamedTuple):
    """Where the model runs, in which dtype, and what the hardware can do."""

    kind: str  # "cuda", "mps" or "cpu"
    dtype: str  # that it computes in; the weights of the adapter are always float32
    four_bit: bool
    reason: str  # for the person
    flops: float = 0  # operations per second
    bandwidth: float = 0  # bytes per second
    memory: float = 0  # free bytes

    @property
    def usable_memory(self) -> float:
        return USABLE_MEMORY[self.kind] * self.memory


class Outline(NamedTuple):
    """The sizes of a model, known before its weights are downloaded."""

    blocks: int
    hidden: int  # width between the blocks
    vocabulary: int
    parameters: int
    linear: dict[str, tuple[int, int]]  # inputs and outputs of each linear layer but the last
    adapted: Sequence[tuple[int, int]] = ()  # the sizes of the layers that get an adapter


class Cost(NamedTuple):
    seconds: float
    memory: float  # bytes


class Plan(NamedTuple):
    """How the training is laid out, and what it costs."""

    steps_per_epoch: int
    steps: int
    warmup_steps: int
    tokens_per_epoch: int
    pairs: int  # in each step
    tokens_at_once: int  # most tokens in a row, unless one pair alone has more
    checkpointing: bool
    reason: str
    seconds: float | None = None  # for all steps
    asking_seconds: float = 0  # for the questions at the end
    memory_gb: float | None = None  # highest during the training


# What large 16-bit matrix products reach, derived from public figures; none was timed here.
GPUS = {  # compute capability; operations per second, bytes per second, free bytes
    "T4": ((7, 5), (22e12, 240e9, 15.3e9)),
    "L4": ((8, 9), (60e12, 240e9, 23.1e9)),
    "A100": ((8, 0), (180e12, 1200e9, 41.9e9)),
}
USEFUL_TOKENS = {"cuda": 3000, "mps": 3000, "cpu": 1000}  # at once; more is not faster
USABLE_MEMORY = {"cuda": 0.9, "mps": 0.8, "cpu": 0.8}  # share of what is free
LIBRARIES = {"cuda": 0.6e9, "mps": 0.93e9, "cpu": 0.93e9}  # bytes that they take
# Each has a key-value cache: 0.3 MB per token with phi-2
ANSWERS_AT_ONCE = {"cuda": 24, "mps": 10, "cpu": 10}
DEMO_MODEL = "demo"
MOST_GENERAL = 10  # questions of the exam that have nothing to do with the data
GENERAL_TOKENS, PARAPHRASE_TOKENS = 64, 48  # in what the base model says for the exam, at most
LAUNCH = 11e-6  # seconds that Colab's processor takes to launch one GPU kernel


def choose_device(
    cfg: Config, kind: str, capability: tuple[int, int] = (0, 0), *figures: float
) -> Device:
    """The dtype for a kind of device, and whether its weights are in 4 bits; figures as in GPUS."""
    if kind == "mps" and cfg.LOAD_IN_4BIT:
        raise UserError("LOAD_IN_4BIT does not work on an Apple GPU. Leave it out.")
    demo = cfg.MODEL_NAME == DEMO_MODEL
    if kind != "cuda" or demo:
        why = "16 bits need CUDA here" if kind == "mps" else "no GPU, so this is slow"
        why = "the demo model is small" if demo else why
        return Device(kind, "float32", bool(cfg.LOAD_IN_4BIT), f"float32: {why}", *figures)
    # not torch.cuda.is_bf16_supported(): it says yes on a T4, where bfloat16 is emulated
    native = capability >= (8, 0)
    dtype, why = ("bfloat16", "native here") if native else ("float16", "too old for bfloat16")
    four_bit = cfg.LOAD_IN_4BIT is not False
    bits = "4 bits to save memory" if four_bit else "16 bits, as set"
    return Device(kind, dtype, four_bit, f"{dtype} ({why}); weights in {bits}", *figures)


def device_here(cfg: Config) -> Device:
    """The device of this machine; a GPU that is not in the table counts as one that is."""
    import psutil
    import torch

    memory: float = psutil.virtual_memory().available / world_size()
    kind, name, capability = "cpu", "processor", (0, 0)
    if torch.cuda.is_available():
        kind, name = "cuda", torch.cuda.get_device_name()
        capability, memory = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()[0]
        like = "T4" if capability < (8, 0) else "A100"
        flops, bandwidth, _ = GPUS[next((gpu for gpu in GPUS if gpu in name), like)][1]
    elif torch.backends.mps.is_available():
        kind, name, flops, bandwidth = "mps", "Apple GPU", 2e12, 60e9  # an M1
    else:
        flops, bandwidth = flops_of_processor(), 10e9
    device = choose_device(cfg, kind, capability, flops, bandwidth, memory)
    return device._replace(reason=f"{name}, {device.reason}")


@functools.cache
def flops_of_processor() -> float:
    """Operations per second, timed on one matrix product."""
    import torch

    square = torch.ones(1024, 1024)
    for _ in range(2):  # the first wakes the threads
        start = time.perf_counter()
        square @ square
    return 2 * 1024**3 / (time.perf_counter() - start)


def cost_of(
    cfg: Config, model: Outline, device: Device, recomputing: bool, tokens: float, targets: float
) -> Cost:
    """The time to train on so many tokens and targets, and the memory to do so all at once."""
    size = bytes_of(device.dtype)
    inner = max(inputs for inputs, _ in model.linear.values())
    gated = any("gate" in name for name in model.linear)
    # Bytes that a block keeps per token for the backward pass; tests count them in real models.
    wide = (3 if gated else 1) + any(inputs == inner for inputs, _ in model.adapted)
    kept = size * ((9 if gated else 7) * model.hidden + wide * inner)
    kept += 4 * model.hidden if size == 2 else 0
    masks = sum(inputs for inputs, _ in model.adapted) * bool(cfg.LORA_DROPOUT)
    of_token: float = model.blocks * kept + masks
    if recomputing:
        of_token = model.blocks * 4 * model.hidden + kept + masks / model.blocks
    of_token += 4 * size * inner
    adapter = cfg.LORA_R * sum(map(sum, model.adapted))
    memory = LIBRARIES[device.kind] + model.parameters * (0.65 if device.four_bit else size)
    memory += 16 * adapter + tokens * of_token + targets * 12 * model.vocabulary
    # 4 operations per weight; 6 per adapter weight, whose narrow products are 4 times slower
    weights = sum(map(math.prod, model.linear.values()))
    operations = tokens * (weights * (6 if recomputing else 4) + 24 * adapter)
    operations += targets * 4 * model.hidden * model.vocabulary
    moved = 10 * tokens * model.blocks * kept  # fitted to a processor (benchmarks/estimate.py)
    return Cost(operations / device.flops + moved / device.bandwidth, memory)


def may_pack(cfg: Config) -> bool:
    return cfg.PACKING and not cfg.NEFTUNE_ALPHA  # the Trainer's noise knows one pair per row only


def plan_run(
    cfg: Config, examples: Sequence[Example], device: Device, model: Outline | None = None
) -> Plan:
    """The steps, and how many tokens are computed at once, which does not change the result."""
    lengths = sorted(map(tokens_in, examples), reverse=True)
    longest, pairs = lengths[0], cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS
    steps_per_epoch = math.ceil(len(lengths) / pairs)
    steps = cfg.MAX_STEPS or steps_per_epoch * cfg.NUM_EPOCHS
    at_once, reason, recomputing = cfg.TOKENS_AT_ONCE, "as set", cfg.GRADIENT_CHECKPOINTING
    if not may_pack(cfg):
        at_once, reason = longest, "each pair has a row of its own"
    elif not at_once:
        at_once = min(USEFUL_TOKENS[device.kind], sum(lengths[:pairs]))
        reason = "more would not be faster"
    if model:
        if recomputing is None:
            recomputing = tokens_that_fit(cfg, model, device, recomputing=False) < longest
        room = tokens_that_fit(cfg, model, device, recomputing)
        if not cfg.TOKENS_AT_ONCE and room < at_once:
            at_once = max(room, longest)
            reason = f"as many as fit into {device.usable_memory / 1e9:.0f} GB"
        if recomputing:
            why = "as set" if cfg.GRADIENT_CHECKPOINTING else "to save memory"
            reason += f"; gradient checkpointing {why}"
    plan = Plan(
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=int(cfg.WARMUP_RATIO * steps),
        tokens_per_epoch=sum(lengths),
        pairs=pairs,
        tokens_at_once=at_once,
        checkpointing=bool(recomputing),
        reason=reason,
    )
    return estimated(plan, cfg, examples, device, model) if model else plan


def tokens_that_fit(cfg: Config, model: Outline, device: Device, recomputing: bool) -> int:
    """How many tokens memory holds at once, if all of them are targets."""
    empty, one = (cost_of(cfg, model, device, recomputing, n, n).memory for n in (0, 1))
    return int(max(0, device.usable_memory - empty) / (one - empty))


def estimated(
    plan: Plan, cfg: Config, examples: Sequence[Example], device: Device, model: Outline
) -> Plan:
    """The plan with the time of its steps, that of the exam, and the memory."""
    lengths = sorted(map(tokens_in, examples), reverse=True)
    targets = [sum(label != IGNORE for label in example["labels"]) for example in examples]
    tokens, cost = sum(lengths), functools.partial(cost_of, cfg, model, device, plan.checkpointing)
    rows = max(plan.steps_per_epoch, math.ceil(tokens / plan.tokens_at_once))
    # kernels per block: 400 for a row, 10 for each example in it
    launching = model.blocks * (400 * rows + 10 * len(lengths)) * LAUNCH
    epoch = max(cost(tokens, sum(targets)).seconds, launching)
    largest_row = max(min(plan.tokens_at_once, sum(lengths[: plan.pairs])), lengths[0])
    return plan._replace(
        seconds=epoch * (plan.steps / plan.steps_per_epoch / world_size()),
        asking_seconds=exam_seconds(cfg, device, model, len(targets), max(targets)),
        memory_gb=cost(largest_row, largest_row * sum(targets) / tokens).memory / 1e9,
    )


def most_tokens(longest: int) -> int:
    """How long an answer in the exam may get: what goes on for longer is wrong anyway."""
    return 16 + longest * 3 // 2


def exam_seconds(cfg: Config, device: Device, model: Outline, pairs: int, longest: int) -> float:
    """The time to generate all answers of the exam, one token after another in each batch.

    Untrained, the model generates until it is cut off; tuned, about as much as it has learned.
    """
    base = min(cfg.MAX_TOKENS, most_tokens(longest))
    tuned = min(base, longest)
    reworded = PARAPHRASE_TOKENS + 2 * tuned
    general = GENERAL_TOKENS + 2 * most_tokens(GENERAL_TOKENS)

    def batches(questions: int) -> int:
        return math.ceil(min(questions, pairs) / ANSWERS_AT_ONCE[device.kind])

    tokens = batches(cfg.EVAL_ANSWERS) * (base + tuned)
    tokens += batches(cfg.EXAM_QUESTIONS) * (base + tuned + reworded)
    tokens += batches(min(MOST_GENERAL, cfg.EXAM_QUESTIONS)) * general
    reading = model.parameters * (4 if device.dtype == "float32" else 2.5) / device.bandwidth
    of_token = max(reading, model.blocks * 125 * LAUNCH)  # 125 kernels per block
    return tokens * of_token if cfg.EVAL_ANSWERS else 0


def in_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# -- Several processes: accelerate launch or torchrun starts one for each GPU, the Trainer shares the work

ENDED = (
    "Another process of this training has ended, so this one is ending, too.\n"
    "Run the same command again: it continues from the newest checkpoint."
)


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main_process() -> bool:
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def only_main_process_prints() -> Iterator[None]:
    from contextlib import redirect_stderr

    if is_main_process():
        yield
        return
    LOG.disabled = True
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  libraries hold on to it
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process downloads, tidies up and refuses; the others then find it done."""
    if world_size() == 1:
        yield
        return
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    gpus, here = torch.cuda.device_count(), os.environ.get("LOCAL_WORLD_SIZE", world_size())
    other = [os.environ.get(f"ACCELERATE_USE_{kind}") for kind in ("DEEPSPEED", "FSDP")]
    if int(here) != world_size() or 0 < gpus < world_size() or "true" in other:
        raise UserError(
            f"{world_size()} processes need one machine with a GPU for each, and no DeepSpeed or FSDP.\n"
            f"accelerate launch --multi_gpu --num_machines 1 --num_processes {gpus or here}"
        )
    state = PartialState(cpu=not gpus, timeout=timedelta(days=1))  # a download may take long
    with state.main_process_first():
        yield


# ==================================================================================================
# 6  Models
# ==================================================================================================

PINNED_REVISIONS = {"microsoft/phi-2": "ef382358ec9e382308935a992d908de099b64c23"}
FLAT_ATTENTION = "one_example_at_a_time"
# Loggers that warn of what is done on purpose here: kernels, the best adapter, old checkpoints.
NOISY = (
    "bitsandbytes.backends.cpu.ops transformers.trainer_callback transformers.trainer_utils".split()
)
ADAPTER = "adapter_model.safetensors"
TARGET_GROUPS = {
    "all-linear": re.compile(""),
    "attention": re.compile(r"\b(self_attn|attn|attention|self_attention)\."),
    "mlp": re.compile(r"\b(mlp|feed_forward|ffn)\."),
}
BASE_PLACE = "base_model_folder.txt"  # where the base lies on this computer; never in the zip
PICKLES = tuple(".bin .ckpt .dill .joblib .pickle .pkl .pt .pth".split())  # they can run programs
DEMO_STEPS = 100  # with fewer, its pretraining leaves the model without words
# 4 heads of 80 as in phi-2, and a multiple of the 64 that 4 bits need; MAX_LENGTH decides the length
DEMO_SHAPE: dict[str, Any] = {"hidden_size": 320, "intermediate_size": 1280, "vocab_size": 1024}
DEMO_SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32_768}
DEMO_SHAPE |= {"partial_rotary_factor": 0.4, "hidden_act": "gelu_pytorch_tanh"}
DEMO_SHAPE |= {"bos_token_id": 0, "eos_token_id": 0}


def demo_folder() -> Path:
    """The demo model, a small Phi that has read Python's manual; built on first use, then cached."""
    from pydoc_data import topics  # plain English that every Python carries

    book = re.sub(r"[ \t]+", " ", "\n".join(text for _, text in sorted(topics.topics.items())))
    recipe = repr((DEMO_SHAPE, DEMO_STEPS, book, installed_version("transformers")))
    folder = cache_folder(f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}", "demo")
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast, set_seed

    say("Model", "building the demo model (once, under a minute)")
    bpe, end, size = ByteLevelBPETokenizer(), "<|endoftext|>", DEMO_SHAPE["vocab_size"]
    bpe.train_from_iterator([book], size, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        model_max_length=DEMO_SHAPE["max_position_embeddings"],
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
    )
    set_seed(0)
    model, ids = PhiForCausalLM(PhiConfig(**DEMO_SHAPE)), torch.tensor(bpe.encode(book).ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=DEMO_STEPS)
    for _ in range(DEMO_STEPS):
        starts = torch.randint(len(ids) - 128, (16,)).tolist()
        batch = torch.stack([ids[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with atomic_folder(folder) as staged:
        tokenizer.save_pretrained(staged)
        model.save_pretrained(staged)
    return folder


def is_demo(model: Any) -> bool:
    """By its sizes: a folder of somebody else may be called demo, too."""
    sizes = "hidden_size", "vocab_size"
    return all(getattr(model.config, size, 0) == DEMO_SHAPE[size] for size in sizes)


# -- The base model


class UnreachableError(UserError):
    """The model is not on this computer, and the Hub cannot be asked for it."""


def memory_fault(error: BaseException) -> str:
    """ "full" where less at once may fit, "broken" where this process has lost its GPU, or ""."""
    text = str(error).lower()
    if re.search(r"cuda (driver )?error: out of memory|cublas_status_alloc_failed", text):
        return "broken"
    full = "out of memory" in text or "can't allocate memory" in text
    return "full" if isinstance(error, MemoryError) or full else ""


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turn a library's error about the network or a damaged file into one message."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # the Hub's client, zipfile, json, safetensors, peft raise many
        if memory_fault(error):
            raise
        found = f"{type(error).__name__}: {error}"
        if type(error).__name__ == "HFValidationError":  # the Hub's client knows no folders
            found = "There is no such folder here."
        refusal = UnreachableError if isinstance(error, ConnectionError) else UserError
        raise refusal(f"{what}\n{preview(found, 200)}\n{advice}") from None


def explained_model(cfg: Config) -> Any:
    return explained(
        f"The model {cfg.MODEL_NAME} could not be loaded.",
        "MODEL_NAME must be a model on the Hub, such as microsoft/phi-2, or a folder with one, with "
        ".safetensors and no code of its own. Check the name and the internet connection, and run the same "
        "command again. For a gated model, accept its licence on the Hub and set HF_TOKEN.",
    )


def local_base(cfg: Config) -> Path | None:
    """The folder of the base model, where MODEL_NAME names one and not a model of the Hub."""
    folder = demo_folder() if cfg.MODEL_NAME == DEMO_MODEL else local_path(cfg.MODEL_NAME)
    return folder if os.path.isdir(folder) else None


def base_name(cfg: Config) -> str:
    """The base model as others may read it: its name on the Hub, or its folder's without the path."""
    folder = local_base(cfg)
    return f"./{folder.resolve().name}" if folder else cfg.MODEL_NAME


def base_source(cfg: Config) -> dict[str, Any]:
    """What from_pretrained needs: the folder or the pinned commit, and never the model's own code."""
    return {
        "pretrained_model_name_or_path": str(local_base(cfg) or cfg.MODEL_NAME),
        "revision": cfg.MODEL_REVISION or "main",
        "trust_remote_code": False,  # if unset, transformers asks, and a y runs it
    }


def pin_revision(cfg: Config) -> None:
    """Set MODEL_REVISION to one commit on the Hub; a branch may move at any time."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    with explained_model(cfg):
        if local_base(cfg):
            return
        name, revision = cfg.MODEL_NAME, cfg.MODEL_REVISION or PINNED_REVISIONS.get(cfg.MODEL_NAME)
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else ""
        if commit != revision:
            try:
                commit = HfApi().model_info(name, revision=revision, timeout=10).sha or commit
            except Exception as error:  # each network library has its own
                if not commit and isinstance(error, errors.HfHubHTTPError):
                    raise
                if not commit:
                    missing = f"revision {revision or 'main'} is not here, and the Hub cannot be"
                    raise ConnectionError(f"{missing} reached ({type(error).__name__})") from None
        cfg.MODEL_REVISION = commit


def base_config(cfg: Config) -> Any:
    from transformers import AutoConfig

    with explained_model(cfg):
        return AutoConfig.from_pretrained(**base_source(cfg))


def load_tokenizer(cfg: Config) -> transformers.PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with explained_model(cfg):
        tokenizer = AutoTokenizer.from_pretrained(**base_source(cfg))
        if not tokenizer("Why?")["input_ids"]:  # transformers makes an empty one from a bare config
            raise OSError("it has no tokenizer")
    set_template(cfg, tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # never a label
    return tokenizer


def linear_layers(base: transformers.PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of all linear layers but the last, by their full names."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's kind, whose weight is transposed

    head, sizes = base.get_output_embeddings(), {}
    for name, layer in base.named_modules():
        if isinstance(layer, Conv1D):
            sizes[name] = (layer.nx, layer.nf)
        elif isinstance(layer, torch.nn.Linear) and layer is not head:
            sizes[name] = (layer.in_features, layer.out_features)
    return sizes


def outline_of(config: Any) -> Outline:
    """The sizes of a model with this configuration; no weights are needed."""
    if config.model_type == "phi":  # to import a model's class takes longer than all else of check
        hidden, inner = config.hidden_size, config.intermediate_size
        blocks = config.num_hidden_layers
        key = hidden, hidden // config.num_attention_heads * config.num_key_value_heads
        sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": key}
        sizes |= {"self_attn.v_proj": key, "self_attn.dense": (hidden, hidden)}
        sizes |= {"mlp.fc1": (hidden, inner), "mlp.fc2": (inner, hidden)}
        layers = [f"model.layers.{block}." for block in range(blocks)]
        linear = {layer + name: size for layer in layers for name, size in sizes.items()}
        words = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
        parameters = words + sum(map(math.prod, linear.values()))  # norms and biases are nothing
        return Outline(blocks, hidden, config.vocab_size, parameters, linear)
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    words, blocks = model.get_input_embeddings(), config.get_text_config().num_hidden_layers
    figures = blocks, words.embedding_dim, words.num_embeddings, model.num_parameters()
    return Outline(*figures, linear_layers(model))


def find_base(cfg: Config) -> tuple[transformers.PreTrainedTokenizerBase, Outline | None]:
    """The tokenizer and the sizes of the base, whose commit is pinned first."""
    pin_revision(cfg)
    tokenizer = load_tokenizer(cfg)
    with suppress(Exception):  # loading the model will explain why
        return tokenizer, outline_of(base_config(cfg))
    return tokenizer, None


def load_base(cfg: Config, device: Device) -> transformers.PreTrainedModel:
    """The published model without its own dropout: LORA_DROPOUT is to be the only one."""
    import torch
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()  # only downloads show a bar
    dtype, options = getattr(torch, device.dtype), {}
    if device.four_bit:
        how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **how)
        options["quantization_config"] = quantized
    config, own_gpu = base_config(cfg), device.kind == "cuda" and world_size() > 1
    if getattr(config, "hidden_act", "") == "gelu_new":
        config.hidden_act = "gelu_pytorch_tanh"  # the same function as one kernel, not eight
    for name, value in list(vars(config).items()):
        if name.endswith(("pdrop", "dropout")) and isinstance(value, float):
            setattr(config, name, 0.0)
    with explained_model(cfg):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **base_source(cfg),
            **options,
            config=config,
            dtype=dtype,  # "auto" would load phi-2 as float16 even on a processor
            # its default is sdpa, which sums in float32: plain attention overflows phi-2's float16
            use_safetensors=True,
            device_map={"": torch.cuda.current_device() if own_gpu else device.kind},
            output_loading_info=True,
        )
        if loaded["missing_keys"]:  # transformers would go on with random weights
            raise OSError(f"it lacks weights, among them {min(loaded['missing_keys'])}")
    model.generation_config = GenerationConfig()  # generation settings come from Config alone
    return model


def refuse_small_memory(cfg: Config, device: Device, parameters: int) -> None:
    """Without an NVIDIA GPU the weights lie in the computer's own memory."""
    import psutil

    each = 1 if device.four_bit else bytes_of(device.dtype)  # 4 bits, with all that comes along
    need, memory = parameters * each * world_size(), psutil.virtual_memory().total
    if device.kind != "cuda" and need > memory:
        raise UserError(
            f"Without an NVIDIA GPU, {cfg.MODEL_NAME} needs {need / 1e9:.1f} GB of memory; this computer "
            f"has {memory / 1e9:.1f} GB.\nUse a GPU (on Colab: Runtime, Change runtime type, T4 GPU), or a smaller "
            "model with --model-name"
        )


# -- The adapter


def usable_peft() -> Any:
    torchao = installed_version("torchao")
    if torchao and is_below(torchao, "0.16") and "torchao" not in sys.modules:
        # peft refuses Colab's version, which nothing here needs; None is Python's mark of an absent module
        sys.modules["torchao"] = None  # type: ignore[assignment]
    import peft

    return peft


def adapted_layers(cfg: Config, linear: Iterable[str]) -> list[str]:
    """Of these layers, the ones that LORA_TARGETS and LORA_LAYERS name."""
    # beside an in_proj, its model reads the weight of out_proj itself and would pass over an adapter
    names = [name for name in linear if f"{name.removesuffix('out_proj')}in_proj" not in linear]
    block = {name: int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name))}
    text, last = re.sub(r"\s*,\s*", ",", cfg.LORA_LAYERS), max(block.values(), default=-1)
    spans = [(int(a), int(b or a)) for a, b in re.findall(r"(\d+)(?:-(\d+))?", text)]
    chosen = {number for start, end in spans for number in range(start, end + 1)}
    is_list = re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text) and chosen
    if text and not (is_list and max(chosen) <= last):
        raise UserError(
            f"LORA_LAYERS {text} does not name blocks, such as 0,4-6; the blocks are 0 to {last}."
        )
    layers: list[str] = []
    for target in cfg.LORA_TARGETS:
        path = TARGET_GROUPS.get(target) or re.compile(rf"(^|\.){re.escape(target)}$")
        found = [n for n in names if path.search(n) and (not chosen or block.get(n) in chosen)]
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f"LORA_TARGETS names {target}, which {cfg.MODEL_NAME} does not have.\n"
                f"Its layers are: {', '.join(kinds)}; or {', '.join(TARGET_GROUPS)}"
            )
        layers += [name for name in found if name not in layers]
    return layers


def adapted_outline(cfg: Config, model: Outline) -> Outline:
    return model._replace(adapted=[model.linear[n] for n in adapted_layers(cfg, model.linear)])


def lora_config(cfg: Config, layers: Iterable[str]) -> PeftConfig:
    """For peft; `layers` are full names, so that no other program reads them in another way."""
    return usable_peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.LORA_R,
        lora_alpha=cfg.LORA_ALPHA,
        lora_dropout=cfg.LORA_DROPOUT,
        target_modules=sorted(layers),
        use_rslora=cfg.USE_RSLORA,
        use_dora=cfg.USE_DORA,
        init_lora_weights=cfg.LORA_INIT if cfg.LORA_INIT != "default" else True,
        revision=cfg.MODEL_REVISION or None,
    )


def add_lora(cfg: Config, base: transformers.PreTrainedModel, learning: bool = True) -> PeftModel:
    settings = lora_config(cfg, adapted_layers(cfg, linear_layers(base)))
    with warnings.catch_warnings():  # about transformers' own names and what peft sets by itself
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|fan_in_fan_out")
        model = usable_peft().get_peft_model(base, settings)
    model.peft_config["default"].base_model_name_or_path = base_name(cfg)
    for module in model.modules():
        # On some processors bitsandbytes repacks a 4-bit layer at its first use without gradients;
        # a repacked layer hands no gradient on, so measuring once would end all learning.
        if learning and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # otherwise every checkpoint would ask the Hub whether the base's vocabulary has changed
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def put_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Load the weights of an adapter, and make sure that none is missing or left over."""
    advice = "The adapter and its run.json must come from the same training."
    with explained("The adapter does not fit its base model.", advice):
        found = usable_peft().set_peft_model_state_dict(model, weights)
        if found.unexpected_keys or any("lora_" in name for name in found.missing_keys):
            raise ValueError("it has other layers than LORA_TARGETS")


def layers_in(adapter: Path) -> list[str]:
    """The layers that a saved adapter is for."""
    from safetensors import safe_open

    with safe_open(adapter, "numpy") as file:
        names = {key.partition(".lora_")[0] for key in [*file.keys()] if ".lora_" in key}
    return sorted(name.removeprefix("base_model.model.") for name in names)


# -- A finished run


@dataclass
class Run:
    """A finished run, which can answer as the base model and as the tuned one."""

    cfg: Config  # the settings of its training
    tokenizer: Any
    model: Any = None  # with an adapter that can be switched off, or with one that was merged
    place: Path = Path()  # the folder or zip that the person named
    folder: Path = Path()  # the folder, or what was unpacked from the zip
    record: dict[str, Any] = field(default_factory=dict)  # its run.json
    adapter: dict[str, Any] = field(default_factory=dict)  # merged weights have none

    @contextmanager
    def untuned(self) -> Iterator[Any]:
        """The base model: the same weights with the adapter disabled, where there is one."""
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.base

    @functools.cached_property
    def base(self) -> transformers.PreTrainedModel:
        return load_base(self.base_settings, self.device).eval()

    @functools.cached_property
    def device(self) -> Device:
        device = device_here(self.cfg)
        say("Device", device.reason)
        fast = device.four_bit and device.kind == "cpu"  # bitsandbytes is fast in bfloat16
        return device._replace(dtype="bfloat16") if fast else device

    @functools.cached_property
    def base_settings(self) -> Config:
        """The settings, with the folder where a local base is now, or the commit of another."""
        name, note = self.cfg.MODEL_NAME, self.folder / BASE_PLACE
        if not name.startswith("./"):
            pin_revision(self.cfg)
            return self.cfg
        noted = [Path(os.fsdecode(note.read_bytes()))] if note.is_file() else []
        for folder in (*noted, self.folder / name, self.place.absolute().parent / name):
            if os.path.isdir(folder):
                return changed(self.cfg, MODEL_NAME=str(folder))
        raise UserError(
            f"The base model, the folder {name[2:]}, is not on this computer.\n"
            f"Copy it into the folder where {self.place} is."
        )

    @functools.cached_property
    def shape(self) -> Any:
        """The base's own config."""
        return base_config(self.base_settings)

    @property
    def stored_dtype(self) -> str:
        """The dtype in which the base was published."""
        return str(self.shape.dtype or "float16").removeprefix("torch.")

    @functools.cached_property
    def parameters(self) -> int:
        return outline_of(self.shape).parameters

    def with_adapter(self, base: transformers.PreTrainedModel, learning: bool = True) -> PeftModel:
        model = add_lora(self.cfg, base, learning)  # adapter_config.json could name code to run
        put_adapter(model, self.adapter)
        return model


def context_of(model: Any, tokenizer: Any) -> int:
    """The most tokens that a question and its answer may have together."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, positions or math.inf))


def load_tuned(place: Path, four_bit: bool | None = None) -> Run:
    """A finished run with its weights: from its folder, its zip, or merged weights."""
    run = open_run(place)
    merged = not run.adapter and (run.folder / "config.json").is_file()
    if not merged and not run.adapter:
        raise UserError(
            f"{place} holds no weights for this script; a GGUF is for LM Studio, Ollama and llama.cpp.\n"
            "To ask the model here, name the folder of the training: --output-dir ./model"
        )
    if four_bit is not None or merged:  # 4 bits would round merged weights once more
        run.cfg.LOAD_IN_4BIT = bool(four_bit)
    if merged:
        run.model = load_base(changed(run.cfg, MODEL_NAME=str(run.folder)), run.device).eval()
    else:
        run.model = run.with_adapter(run.base, learning=False).eval()
    return run


def open_run(place: Path) -> Run:
    """A finished run without its weights: its folder, its zip, or what `export` has made of it."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    unpacked = tempfile.TemporaryDirectory(prefix="finetune", ignore_cleanup_errors=True)
    folder, files = place, "its run.json, tokenizer or adapter is missing or damaged"
    advice = (
        "Train a model first, or name the folder or the zip of a training run with --output-dir."
    )
    with explained(f"{place} could not be loaded as a finished run: {files}.", advice):
        if not os.path.isdir(place):
            unzip(place, folder := Path(unpacked.name))
            inner = [record.parent for record in folder.glob("*/run.json")]
            folder = inner[0] if len(inner) == 1 else folder  # somebody zipped the folder itself
        if pickles := [path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES]:
            raise UserError(
                f"{place} holds {min(pickles)}, which could run programs and is not from this script.\n"
                "Delete it, if you trust the other files, or train again."
            )
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        settings = {"VALIDATION_SPLIT": "questions"} | record["settings"]  # as earlier editions
        known = TYPES.keys() & settings.keys() | {"MODEL_NAME"}
        cfg = checked({name: settings[name] for name in known})
        record["examples"] = [str(text) for text in record.get("examples") or []]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        set_template(cfg, tokenizer)  # the first edition did not save it
        with_adapter = (folder / "adapter_config.json").is_file()
        adapter = load_file(folder / ADAPTER) if with_adapter else {}
    run = Run(cfg, tokenizer, None, place, folder, record, adapter)
    weakref.finalize(run, unpacked.cleanup)
    return run


def unzip(path: Path, folder: Path) -> None:
    """Unpack a zip of unknown origin: nothing outside the folder, no more than the disk can hold."""
    with zipfile.ZipFile(path) as archive:
        need = sum(member.file_size for member in archive.infolist())
        if need > shutil.disk_usage(folder).free:
            raise OSError(f"there is no room for its {need / 1e9:.1f} GB in {folder}")
        archive.extractall(folder)  # never outside, never more than the sizes declared


def record_of(folder: Path) -> dict[str, Any]:
    """The run.json of a finished run; empty where none can be read."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


# -- Rows of several examples, and layers fused with their adapters


def may_share_rows(model: Any) -> bool:
    """Whether several examples may share a row: only attention may let a token see others."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    usual = base.config._attn_implementation in ("sdpa", FLAT_ATTENTION)
    exchangeable = base._supports_attention_backend and base._supports_sdpa and usual
    known = kinds <= {"full_attention", "sliding_attention"}
    known &= base.config.model_type != "nemotron"  # transformers 5.23: it passes no lengths on
    return exchangeable and not base._is_stateful and known


def flatten(examples: Sequence[Example], shared: bool = True) -> dict[str, Any]:
    """Lay examples end to end in one row, without a single token of padding.

    Positions start again with each example, attention stays inside each (see padding_free), and the
    last layer runs only where there is something to predict. A row not shared is one example as it is.
    """
    import torch

    lengths = list(map(tokens_in, examples))
    ids = torch.tensor([token for example in examples for token in example["input_ids"]])
    labels = torch.tensor([label for example in examples for label in example["labels"]])
    # the first label of each example is a prompt's, so nothing leaks across
    row = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
    if not shared:
        return row
    return row | {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "logits_to_keep": (labels != IGNORE).nonzero()[:, 0] - 1,  # position i predicts i + 1
        "lengths": lengths,
    }


def attend_in_each_example(
    _: Any, query: Any, key: Any, value: Any, *__: Any, lengths: list[int], **settings: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention over a row of examples; `lengths` is required, so that none sees another."""
    import torch

    # A query is (1, heads, tokens of all examples, size of a head). Fewer heads of keys are repeated
    # here, since with enable_gqa a T4 takes the way that keeps every score.
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    how = {"dropout_p": settings.get("dropout", 0.0), "scale": settings.get("scaling")}
    look_back = settings.get("sliding_window")  # some models have one
    sdpa, seen = torch.nn.functional.scaled_dot_product_attention, []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        window, length = None, q.shape[2]
        if look_back and length > look_back:
            within = torch.ones(length, length, dtype=torch.bool, device=q.device)
            window = within.tril().triu(1 - look_back)
        seen.append(sdpa(q, k, v, window, is_causal=window is None, **how))
    return torch.cat(seen, dim=2).transpose(1, 2).contiguous(), None


@contextmanager
def padding_free(model: transformers.PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let the model read rows as `flatten` makes them: of several examples, or else of one.

    On a GPU the residual stream is in float32, also where the blocks compute in 16 bits.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    usual = model.config._attn_implementation
    if may_share_rows(model):
        AttentionInterface.register(FLAT_ATTENTION, attend_in_each_example)
        AttentionMaskInterface.register(FLAT_ATTENTION, lambda *_, **__: None)
        model.set_attn_implementation(FLAT_ATTENTION)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, __, words: words.float() if words.is_cuda else words
    )
    try:
        yield
    finally:
        hook.remove()
        model.set_attn_implementation(usual)


def drop_mask(values: torch.Tensor, rate: float) -> torch.Tensor:
    """Which values dropout sets to zero."""
    import torch

    if not values.is_cpu:
        return torch.empty_like(values, dtype=torch.bool).bernoulli_(rate)
    # four from each random number, since bernoulli_ takes a sixth of a step on a processor
    bits = torch.empty(values.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[: values.numel()].view(values.shape)
    return drawn < round(rate * 2**16) - 2**15


def fused_lora() -> Any:
    """A frozen layer and its adapter as one operation: y = W x + b + scale * B A dropout(x).

    peft makes ten operations of it and keeps several copies for the backward pass. Here it is x alone,
    once for all layers that read it, and a byte for each value that dropout could take.
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight as weight_of
    from torch.nn.functional import linear

    class FusedLora(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Any, a: Any, b: Any, layer: Any, dropout: float, dtype: Any
        ) -> Any:
            base, scale = layer.get_base_layer(), layer.scaling["default"] / (1 - dropout)
            rows, dropped = x.reshape(-1, x.shape[-1]).to(dtype), None
            bias = None if base.bias is None else base.bias.to(dtype)
            y = linear(rows, weight_of(base).to(dtype), bias)
            if dropout:
                dropped = drop_mask(rows, dropout)
                rows = rows.masked_fill(dropped, 0)
            inner = rows @ a.to(dtype).T
            y.addmm_(inner, b.to(dtype).T, alpha=scale)
            ctx.save_for_backward(x, dropped, inner, a, b)
            ctx.base, ctx.scale, ctx.dtype = base, scale, dtype
            return y.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, dropped, inner, a, b = ctx.saved_tensors
            rows, dy = x.reshape(-1, x.shape[-1]).to(ctx.dtype), dy.reshape(-1, dy.shape[-1])
            d_inner = (dy @ b.to(ctx.dtype)).mul_(ctx.scale)
            d_a = d_inner.T @ (rows if dropped is None else rows.masked_fill(dropped, 0))
            d_b = (dy.T @ inner).mul_(ctx.scale)
            d_x = None
            if ctx.needs_input_grad[0]:
                weight, d_x = weight_of(ctx.base).to(ctx.dtype), d_inner @ a.to(ctx.dtype)
                d_x = d_x if dropped is None else d_x.masked_fill_(dropped, 0)
                d_x = d_x.addmm_(dy, weight).view(x.shape).to(x.dtype)
            return d_x, d_a.to(a.dtype), d_b.to(b.dtype), None, None, None

    return FusedLora.apply


@contextmanager
def fused_lora_layers(cfg: Config, model: PeftModel) -> Iterator[None]:
    """Compute each layer and its adapter as one; DoRA and layers of other kinds are left to peft."""
    import torch
    from peft.tuners.lora import LoraLayer

    fused, fast = fused_lora(), cfg.FAST_ADAPTER and not cfg.USE_DORA
    adapted = [m for m in model.modules() if isinstance(m, LoraLayer)] if fast else []
    layers = [m for m in adapted if type(m.get_base_layer()).__name__ in ("Linear", "Linear4bit")]

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return fused(x, a, b, layer, cfg.LORA_DROPOUT if layer.training else 0.0, dtype)

    for layer in layers:
        layer.forward = functools.partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def evaluating(model: transformers.PreTrainedModel | PeftModel) -> Iterator[None]:
    """Eval mode without gradients, in the dtype of the training."""
    import torch

    was_training, dtype = model.training, model.get_input_embeddings().weight.dtype
    if was_training:  # a loaded run is already: switching all layers takes longer than a token
        model.eval()
    try:
        half = dtype != torch.float32
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=half):
            yield
    finally:
        if was_training:
            model.train()


# ==================================================================================================
# 7  Training
# ==================================================================================================

FEWEST_PAIRS = 2
FEWEST_TO_HOLD_OUT = 5  # with fewer questions, each is worth more in the training set
ENOUGH_PAIRS = 50
POOR = 0.5  # below this quality nothing is trained without --yes


@dataclass
class PreparedData:
    """Everything that training needs of the data; made without a GPU or the weights."""

    tokenizer: Any  # the model's; None for `check` without internet
    pairs: Pairs
    quality: Quality
    tokens: list[int]  # of each pair that is kept; none without a tokenizer
    overlong: list[int]  # tokens of those that are left out for their length
    train_pairs: list[Pair]
    validation_pairs: list[Pair]
    train: list[Example]
    validation: list[Example]


def split_validation(pairs: Sequence[Pair], cfg: Config) -> list[bool]:
    """Which pairs are for validation; all answers to one question are on the same side."""
    questions = [fold(pair.messages[0]["content"]) for pair in pairs]
    order = sorted(set(questions))
    random.Random(cfg.SEED).shuffle(order)
    enough = cfg.VALIDATION_FRACTION and len(order) >= FEWEST_TO_HOLD_OUT
    count = max(1, round(cfg.VALIDATION_FRACTION * len(order))) if enough else 0
    if cfg.VALIDATION_SPLIT == "wordings":  # first, questions whose answers others still teach
        answers, spare = defaultdict[str, set[str]](set), list[str]()
        for question, pair in zip(questions, pairs, strict=True):
            answers[question].add(fold(pair.answer))
        left = Counter(itertools.chain(*answers.values()))
        for question in order:
            if all(left[answer] > 1 for answer in answers[question]):
                left.subtract(answers[question])
                spare.append(question)
        order = list(dict.fromkeys(spare + order))
    held_out = set(order[:count])
    return [question in held_out for question in questions]


def prepare_data(cfg: Config, pairs: Pairs, tokenizer: Any) -> PreparedData:
    """Tokenize, drop from `pairs` what is too long, split; without a tokenizer, only split."""
    longest = min(cfg.MAX_LENGTH, getattr(tokenizer, "model_max_length", cfg.MAX_LENGTH))
    limit = "MAX_LENGTH" if longest == cfg.MAX_LENGTH else "what the model can take"
    kept, overlong = list[tuple[Pair, Example | None]](), list[int]()
    for pair in pairs.kept:
        example = encode(tokenizer, pair.messages) if tokenizer else None
        if example and tokens_in(example) > longest:
            overlong.append(tokens_in(example))
            pairs.dropped.append(pair.note(f"longer than {limit}, {longest} tokens"))
        else:
            kept.append((pair, example))
    pairs.kept = [pair for pair, _ in kept]
    held_out = split_validation(pairs.kept, cfg)
    train = [one for one, is_held_out in zip(kept, held_out, strict=True) if not is_held_out]
    validation = [one for one, is_held_out in zip(kept, held_out, strict=True) if is_held_out]
    return PreparedData(
        tokenizer,
        pairs,
        quality_of(pairs.kept, pairs.dropped),
        tokens=[tokens_in(example) for _, example in kept if example],
        overlong=overlong,
        train_pairs=[pair for pair, _ in train],
        validation_pairs=[pair for pair, _ in validation],
        train=[example for _, example in train if example],
        validation=[example for _, example in validation if example],
    )


def refuse_unfit(cfg: Config, data: PreparedData) -> None:
    """Refuse too few pairs, and, without --yes, data of which most looks wrong."""
    count = len(data.pairs.kept)
    pairs = plural(count, "pair")
    if count < FEWEST_PAIRS:
        fix = "Add more questions and answers."
        if data.overlong:
            lengths = sorted(data.tokens + data.overlong)
            enough = lengths[(len(lengths) * 95 - 1) // 100]
            fix = f"Most are too long: --max-length {enough} would keep 95% of them."
        raise UserError(f"{data.pairs.name}: {pairs}, but {FEWEST_PAIRS} are needed.\n{fix}")
    if count < ENOUGH_PAIRS:
        say("Warning", f"{pairs} are few; answers become reliable with {ENOUGH_PAIRS} or more.")
    copies = sum(note.kind == COPY for note in data.pairs.dropped)
    score = data.quality.good / max(1, data.quality.counted - copies)  # copies harm nobody
    if score < min(POOR, cfg.MIN_QUALITY) and not cfg.YES:
        raise UserError(
            f"The quality of {data.pairs.name} is {data.quality}: most rows are left out or look wrong.\n"
            "Fix the rows named above (the command check lists them all), or add --yes to train anyway."
        )


# -- Rows and losses


def memory_of(row: Sequence[Example]) -> int:
    """A measure of a row's memory: its tokens, and once more its targets, which need logits."""
    return sum(2 * tokens_in(one) - one["labels"].count(IGNORE) for one in row)


def pack(examples: Sequence[Example], most: int) -> list[list[Example]]:
    """The same examples in rows of at most `most` tokens; a longer one has a row of its own."""
    rows: list[list[Example]] = []
    room = 0
    for example in sorted(examples, key=tokens_in, reverse=True):
        if tokens_in(example) > room:
            rows.append([])
            room = most
        rows[-1].append(example)
        room -= tokens_in(example)
    return rows


def shares_of_steps(examples: Sequence[Example], plan: Plan, seed: int) -> list[list[Example]]:
    """The pairs of each step, in a new order in each epoch; with several processes, their shares."""
    steps: list[list[Example]] = []
    for epoch in range(math.ceil(plan.steps / plan.steps_per_epoch)):
        order = random.Random(f"{seed} {epoch}").sample(examples, len(examples))
        steps += [order[i : i + plan.pairs] for i in range(0, len(order), plan.pairs)]
    steps = [sorted(step, key=tokens_in) for step in steps[: plan.steps]]
    count = world_size()
    nothing = Example(input_ids=[0], labels=[IGNORE])  # for a process without a pair
    return [step[process::count] or [nothing] for step in steps for process in range(count)]


def summed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = 1) -> torch.Tensor:
    """A row's share of the mean cross entropy over so many targets, however they are split up."""
    import torch

    logits, targets = outputs.logits, (labels[0] != IGNORE).nonzero()[:, 0]
    if logits.shape[1] != len(targets):  # the model computes them all
        logits = logits[:, targets - 1]
    cross_entropy = torch.nn.functional.cross_entropy
    total = cross_entropy(logits[0].float(), labels[0, targets], reduction="sum")
    return total / num_items_in_batch


def mean_loss(model: PeftModel, examples: Sequence[Example], tokens_at_once: int) -> float:
    """Mean loss of a target token, over all examples together."""
    import torch

    total, tokens, shared = 0.0, 0, may_share_rows(model)
    with evaluating(model), padding_free(model):
        for examples_of_row in pack(examples, tokens_at_once if shared else 0):
            row = flatten(examples_of_row, shared)
            row = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in row.items()}
            labels = row.pop("labels")
            total += summed_loss(model(**row), labels).item()
            tokens += int((labels != IGNORE).sum())
    return total / tokens


# -- Files of a run


def log_path(cfg: Config, run: str = "") -> Path:
    """The log file of this run, which a resumed training continues; without a run, a new one."""
    return local_path(cfg.LOG_DIR) / f"finetune-{run or time.strftime('%Y-%m-%d_%H-%M-%S')}.log"


@contextmanager
def warned(what: str) -> Iterator[None]:
    """For what is nice to have: its failure is said, and costs nobody the training or the adapter."""
    try:
        yield
    except Exception as error:
        say("Warning", f"{what}: {error or type(error).__name__}")


def resume_hint(cfg: Config) -> str:
    without = "" if cfg.RESUME else ", without --no-resume,"
    return f"the same command{without} continues from there"


def short_path(path: Path) -> str:
    """A path as short as it can be written from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def free_space(folder: Path, need: float) -> str:
    """A sentence on the space that is needed and free; empty where the disk does not tell."""
    with suppress(OSError):
        free = shutil.disk_usage(nearest_existing(folder)).free
        return f"Up to {need / 1e6:,.1f} MB are needed there, {free / 1e6:,.1f} MB are free. "
    return ""


def free_name(path: Path) -> Path:
    """This name, or the first of NAME.2, NAME.3, … that nothing has."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def quarantine(path: Path, name: str, why: object) -> Path:
    """Rename what is not used: nothing is deleted that somebody might want."""
    renamed = path.rename(free_name(path.with_name(name)))
    say("Checkpoint", f"{short_path(path)} is not used: {why}. It is now {renamed.name}.")
    return renamed


# -- Checkpoints: the Trainer writes them, COMMIT.json makes them count

# The settings that decide the result, besides those that identity_of works out
DECIDING = (
    "LORA_R LORA_ALPHA LORA_DROPOUT LORA_TARGETS LORA_LAYERS USE_RSLORA USE_DORA LORA_INIT LEARNING_RATE NUM_EPOCHS MAX_STEPS LR_SCHEDULER "
    "WARMUP_RATIO WEIGHT_DECAY MAX_GRAD_NORM NEFTUNE_ALPHA SEED EVAL_STEPS EARLY_STOPPING_PATIENCE"
).split()
COMMIT = "COMMIT.json"
BEST_ADAPTER = "best_adapter.safetensors"  # with it, one checkpoint is enough to end the run
BYTES_PER_WEIGHT = 16  # its value, that of the best adapter, and two figures of the optimizer
CHECKPOINTS_KEPT = 2  # the newest ones, and the best


def fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identity_of(cfg: Config, data: PreparedData, device: Device) -> dict[str, Any]:
    """Everything that decides the adapter. Where it is equal, a checkpoint may be resumed."""
    base: Any = cfg.MODEL_REVISION
    with explained_model(cfg):
        if folder := local_base(cfg):
            files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
            base = [checksum(path) for path in files]
    pairs = [[pair.messages for pair in part] for part in (data.train_pairs, data.validation_pairs)]
    # not the tokens of the prompts but what leads to them: a template may give today's date
    answers = [[t for t in one["labels"] if t != IGNORE] for one in (*data.train, *data.validation)]
    return {
        **{name: getattr(cfg, name) for name in DECIDING},
        "PAIRS IN A STEP": cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS,
        "OPTIMIZER": optimizer_name(cfg, device),
        "LOAD_IN_4BIT": device.four_bit,
        "the base model": fingerprint(base),
        "the data": fingerprint([data.tokenizer.chat_template, pairs, answers]),
        "the script": 5,  # to be raised when an earlier checkpoint can no longer be resumed
    }


def differences(here: dict[str, Any], there: dict[str, Any]) -> str:
    """How two runs differ, for the person: settings with their values."""
    return ", ".join(
        name if name.islower() else f"{name} {as_text(value)} (there {as_text(there.get(name))})"
        for name, value in here.items()
        if value != there.get(name)
    )


@dataclass
class RunStats:
    """What is counted over the whole run, however often it was interrupted."""

    trainable: int  # weights
    parameters: int
    estimated_seconds: float | None = None
    estimated_memory_gb: float | None = None
    base_loss: float | None = None
    tokens_at_once: int = 0
    seconds: float = 0.0  # of all steps, without measuring and saving
    peak_memory_gb: float = 0.0
    skipped_steps: int = 0  # their gradient was not finite
    finished: bool = False
    versions: str = ""  # of the packages that wrote the checkpoint


class Checkpoint(NamedTuple):
    """A saved state of the training, as its COMMIT.json says it is."""

    folder: Path
    step: int
    best_step: int | None
    identity: dict[str, Any]
    stats: RunStats
    files: dict[str, Any]  # size and SHA-256 of each

    @property
    def best_adapter(self) -> Path:
        """The adapter with the lowest validation loss so far."""
        return self.folder / (BEST_ADAPTER if BEST_ADAPTER in self.files else ADAPTER)


def read_commit(folder: Path) -> Checkpoint:
    """What COMMIT.json claims, maybe a stranger's; ValueError where that makes no sense."""
    try:
        commit = json.loads((folder / COMMIT).read_bytes())
        record = commit["record"] | {"stats": RunStats(**commit["record"]["stats"])}
        local = all(Path(name).name == name for name, (_, _) in record["files"].items())
        typed = isinstance(record["step"], int) and isinstance(record["identity"], dict)
        if local and typed and commit["sha256"] == fingerprint(commit["record"]):
            return Checkpoint(folder, **record)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        LOG.info("%-11s%s: %r", "Checkpoint", folder, error)
    raise ValueError(f"its {COMMIT} is missing or damaged")


class Checkpoints:
    """The checkpoints of one run: in a folder of its own, and in the mirror when there is one."""

    def __init__(self, cfg: Config, identity: dict[str, Any]) -> None:
        self.cfg, self.identity = cfg, identity
        folders = filter(None, (cfg.CHECKPOINT_DIR, cfg.CHECKPOINT_MIRROR))
        self.places = [local_path(one).resolve() / fingerprint(identity)[:12] for one in folders]
        self.folder = self.places[0]
        self.last: Checkpoint | None = None
        self.best_adapter = b""  # goes into every checkpoint; in memory, no disk can damage it

    def starting_point(self) -> Checkpoint | None:
        """The newest valid checkpoint: here, in the mirror, or as named; copied here if elsewhere."""
        self.say_what_is_new()
        source = local_path(self.cfg.RESUME_FROM_CHECKPOINT).resolve()
        is_first = is_main_process()  # the others then find what it has chosen, in the folder
        starts_anew = is_first and not self.cfg.RESUME
        if starts_anew:
            source = self.set_aside(source)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, suffix=".partial") as unpacked:
            found = [] if starts_anew else [*itertools.islice(self.valid(self.places), 1)]
            if self.cfg.RESUME_FROM_CHECKPOINT and is_first:
                found += self.named(source, Path(unpacked))
            newest = max(found, key=lambda one: one.step, default=None)
            self.last = newest and self.fetched(newest)
        if self.last:
            self.best_adapter = self.last.best_adapter.read_bytes()
        elif any(any(place.glob("incomplete-*")) for place in self.places):
            say("Warning", "no checkpoint is valid, so the training starts from the beginning")
        return self.last

    def say_what_is_new(self) -> None:
        """How a run without checkpoints of its own differs from the latest one beside it."""
        others = [*self.folder.parent.glob("*/checkpoint-*/" + COMMIT)]
        if others and not self.folder.exists():
            other = max(others, key=lambda path: path.stat().st_mtime).parent
            with suppress(ValueError):
                changed = differences(self.identity, read_commit(other).identity)
                say("New run", f"{short_path(other.parent)} is kept. What differs: {changed}")

    def set_aside(self, source: Path) -> Path:
        """Rename what --no-resume does not use; what `source` is called now, if it was in there."""
        for place in filter(Path.exists, self.places):
            with warned(f"{place} is in the way") if place != self.folder else nullcontext():
                renamed = quarantine(place, f"{place.name}.unused", "RESUME is off")
                if source.is_relative_to(place):
                    source = renamed / source.relative_to(place)
        return source

    def fetched(self, found: Checkpoint) -> Checkpoint:
        """The same checkpoint in the folder of this run."""
        if found.folder == self.folder / f"checkpoint-{found.step}":
            return found
        say("Checkpoint", f"step {found.step} is newer and is fetched from elsewhere")
        advice = 'Make room, or wait for the drive, or go without: --checkpoint-mirror ""'
        with explained(f"{found.folder} could not be copied.", advice):
            return self.copy(found, self.folder)

    def named(self, place: Path, unpacked: Path) -> list[Checkpoint]:
        """The checkpoints in the folder or zip that RESUME_FROM_CHECKPOINT names."""
        advice = "Name a checkpoint-N of this run or a zip of it, or leave the setting out."
        with explained(f"RESUME_FROM_CHECKPOINT {place} cannot be used.", advice):
            if place.is_file():
                unzip(place, unpacked)
                place = unpacked
            if not (commits := [*place.rglob(COMMIT)]):
                raise ValueError(f"there is no {COMMIT}")
            return [self.verify(path.parent) for path in commits]

    def verify(self, folder: Path, thorough: bool = True) -> Checkpoint:
        """The checkpoint in a folder, or ValueError; thorough: by contents, not only by sizes."""
        found = read_commit(folder)
        if changed := differences(self.identity, found.identity):
            raise ValueError(f"it belongs to another run. What differs: {changed}")
        for name, (size, digest) in found.files.items():
            path = folder / name
            intact = path.is_file() and path.stat().st_size == size
            if not intact or (thorough and checksum(path) != digest):
                raise ValueError(f"its {name} is missing or damaged")
        known = {*found.files, COMMIT, "desktop.ini"}  # anything else might be loaded, too
        if foreign := {path.name for path in folder.glob("[!.]*")} - known:
            raise ValueError(f"{min(foreign)} was not saved with it")
        return found

    def valid(self, places: Iterable[Path], thorough: bool = True) -> Iterator[Checkpoint]:
        """Valid checkpoints, newest first: by step, since clocks jump. Others get another name."""
        folders = [path for place in places for path in place.glob("checkpoint-*/")]
        steps = {path: int(path.name[11:]) for path in folders if path.name[11:].isdecimal()}
        newest = sorted(steps, key=steps.__getitem__, reverse=True)
        for folder in newest:  # of two with the same number, first the one here
            try:
                found = self.verify(folder, thorough)
                if found.step != steps[folder]:
                    raise ValueError(f"it is a copy of checkpoint-{found.step}")
                yield found
            except OSError as error:  # perhaps of a drive that is slow to answer
                say("Warning", f"{folder} is not used, since it cannot be read: {error}")
            except ValueError as flaw:
                with warned(f"{folder} is not used: {flaw}, but keeps its name"):
                    quarantine(folder, f"incomplete-{steps[folder]}", flaw)

    def copy(self, source: Checkpoint, place: Path) -> Checkpoint:
        """A copy in another place, read back before it gets its name."""
        target = place / f"checkpoint-{source.step}"
        with atomic_folder(target) as staged:
            for name in (*source.files, COMMIT):
                shutil.copyfile(source.folder / name, staged / name)
            self.verify(staged)
        return source._replace(folder=target)

    @contextmanager
    def saving(self, state: Any, stats: RunStats) -> Iterator[None]:
        """What the Trainer writes meanwhile becomes a checkpoint, or nothing of it stays."""
        step, best = state.global_step, state.best_global_step
        folder = self.folder / f"checkpoint-{step}"
        try:
            yield
            if not is_main_process():
                return
            if best == step:
                self.best_adapter = (folder / ADAPTER).read_bytes()
            elif best is not None:
                (folder / BEST_ADAPTER).write_bytes(self.best_adapter)
            files = {}
            for path in sorted(folder.iterdir()):
                fsync(path)
                files[path.name] = path.stat().st_size, checksum(path)
            record = {"step": step, "best_step": best, "identity": self.identity}
            record |= {"stats": asdict(stats), "files": files}
            write_json(folder / COMMIT, {"sha256": fingerprint(record), "record": record})
            fsync(self.folder)
        except Exception as error:  # a full disk has as many faces as there are libraries
            shutil.rmtree(folder, ignore_errors=True)
            room = free_space(self.folder, BYTES_PER_WEIGHT * stats.trainable)
            raise UserError(
                f"The checkpoint {folder} could not be written: {preview(repr(error), 200)}.\n{room}"
                "Earlier checkpoints are kept. Make room, or move CHECKPOINT_DIR to another disk and name it "
                f"with --checkpoint-dir; then {resume_hint(self.cfg)}."
            ) from error
        self.last = Checkpoint(folder, step, best, self.identity, replace(stats), files)
        self.spread(self.last)

    def spread(self, newest: Checkpoint) -> None:
        """Archive and mirror a checkpoint, and delete old ones; a failure costs a warning only."""
        archive = newest.folder.with_suffix(".zip")
        if self.cfg.ARCHIVE_CHECKPOINTS:
            with (
                warned(f"{archive.name} could not be written"),
                atomic_write(archive) as staged,
                zipfile.ZipFile(staged, "w", strict_timestamps=False) as file,
            ):
                for path in newest.folder.iterdir():
                    file.write(path, path.name)
        for place in self.places:
            with warned(f"{newest.folder.name} is not in the mirror, or others were not deleted"):
                if place != self.folder:
                    place.parent.mkdir(exist_ok=True)  # no parents=True: a drive may be unmounted
                    self.copy(newest, place)
                for old in [*self.valid([place], thorough=False)][CHECKPOINTS_KEPT:]:
                    if old.step != newest.best_step:
                        old.folder.with_suffix(".zip").unlink(missing_ok=True)
                        # renamed first: a half-deleted checkpoint must not look like a damaged one
                        old.folder.rename(place / f"removed-{old.step}")
                for leftover in (*place.glob("removed-*"), *place.glob("*.partial")):
                    remove(leftover)


# -- Stopping on a signal

SAME_SIGNAL = 2  # seconds in which a second one is the same: Jupyter's stop button sends several


class Stopped(KeyboardInterrupt):
    """Ended by Ctrl+C or another signal."""

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(outcome)
        self.number = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While this is open, the first signal is only noted; a later one ends the program."""
    noted: list[int] = []
    same_until, handlers = 0.0, {}

    def receive(number: int, _: Any) -> None:
        nonlocal same_until
        if not noted:
            noted.append(number)
            same_until = time.monotonic() + SAME_SIGNAL
            with suppress(RuntimeError):  # the signal may come in the middle of another output
                show("\nStopping after this step, with a checkpoint. Ctrl+C again stops at once.")
        elif time.monotonic() > same_until:
            raise Stopped(number)

    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                handlers[number] = signal.signal(number, receive)
    except ValueError:
        say("Note", "outside the main thread, Ctrl+C cannot save; the newest checkpoint counts")
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


# -- When memory runs out

LEVERS = (
    "Run the same command again: it continues from the newest checkpoint, if there is one. Add "
    "--tokens-at-once 500, --gradient-checkpointing or --load-in-4bit, or lower --max-length or --lora-r."
)
Way = TypeVar("Way")
Result = TypeVar("Result")


def halvings(most: int, least: int) -> list[int]:
    """From most to least, each half of the one before."""
    return [most] if most <= least else [most, *halvings(max(least, most // 2), least)]


def as_many_as_fit(act: Callable[[Way], Result], ways: Sequence[Way]) -> Result:
    """Call `act` with the first of `ways` that fits into memory."""
    *others, last = ways
    for way in others:
        try:
            return act(way)
        except (RuntimeError, MemoryError) as error:
            if memory_fault(error) != "full" or world_size() > 1:
                raise
        gc.collect()  # only here, since the error holds on to what filled the memory
    return act(last)


def measured_loss(model: PeftModel, examples: Sequence[Example], most: int) -> float | None:
    """The mean loss with as many tokens at once as fit; None if not even one example does."""
    ways = halvings(most, max(map(tokens_in, examples)))
    try:
        loss = as_many_as_fit(functools.partial(mean_loss, model, examples), ways)
    except (RuntimeError, MemoryError) as error:
        if memory_fault(error) != "full" or world_size() > 1:
            raise
        say("Warning", "the validation does not fit into memory and is left out")
        return None
    if not math.isfinite(loss):
        raise UserError(NOT_A_NUMBER)
    return loss


def peak_memory_gb() -> float:
    """The most memory used so far: the GPU's, or else this process's, where Linux tells."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # getrusage would begin with the peak of the parent
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) * 1024 / 1e9 if peak else 0.0


# -- The training itself

NOT_A_NUMBER = "The loss is no longer a number (NaN).\nLower LEARNING_RATE, for example to half."
FIRST_SCALE = 4096.0  # of the gradients in float16; torch's 65,536 overflows in the first steps
DIVERGED = (
    "The training diverges: the loss is above where it began, and over three times its usual value.\n"
    "The last checkpoint is kept. Train again with --learning-rate {:g}"
)
RISING = (
    "the validation loss has been above that of step {} for a third of the run, so more training makes "
    "it worse. --early-stopping-patience 3 would stop it early."
)
FLAT = (
    "the loss has not fallen in the first tenth of the run. If it stays so, try another --learning-rate, "
    "and look at the data with the command check."
)
# Settings that TrainingArguments calls the same, in lower case
SAME_NAMES = "LEARNING_RATE WEIGHT_DECAY MAX_GRAD_NORM SEED LOGGING_STEPS SAVE_STEPS REPORT_TO"
MOST_BAD_STEPS = 3  # in a row with a gradient that is not finite


def optimizer_name(cfg: Config, device: Device) -> str:
    if cfg.OPTIMIZER == "auto":
        return "paged_adamw_32bit" if device.kind == "cuda" else "adamw_torch"
    if cfg.OPTIMIZER.startswith("paged") and device.kind != "cuda":
        raise UserError(f"OPTIMIZER {cfg.OPTIMIZER} needs an NVIDIA GPU. Use auto or adamw_torch.")
    return cfg.OPTIMIZER


@dataclass(eq=False, repr=False)
class AnswerTrainer(Trainer):
    """The Trainer and its callback in one: steps without padding, checkpoints that are verified.

    The Trainer calls the methods in the order in which they stand here; on_step_end decides whether log,
    evaluate and _save_checkpoint follow.
    """

    cfg: Config
    adapted: PeftModel
    data: PreparedData
    device: Device
    plan: Plan
    checkpoints: Checkpoints
    stats: RunStats
    stop: list[int]  # the signal that asks for an end
    step_began: float = 0.0
    session_start: tuple[int, float] = (0, 0.0)  # step and seconds
    saved_at: float = field(default_factory=time.monotonic)
    bad_steps: int = 0  # in a row
    lost_loss: bool = False  # since the last entry of the log

    def __post_init__(self) -> None:
        import torch
        import transformers

        super().__init__(
            self.adapted,
            self.arguments(),
            train_dataset=shares_of_steps(self.data.train, self.plan, self.cfg.SEED),
            eval_dataset=self.data.validation or None,
            data_collator=self.collate,
            compute_loss_func=summed_loss,
        )
        self.add_callback(self)
        if self.accelerator.scaler:
            scaler = torch.amp.GradScaler(self.args.device.type, init_scale=FIRST_SCALE)
            self.accelerator.scaler = scaler
        if self.pop_callback(transformers.ProgressCallback):  # it would print every figure
            bar = type("Bar", (transformers.ProgressCallback,), {"on_log": losses_in_bar})
            self.add_callback(bar)

    def arguments(self) -> transformers.TrainingArguments:
        """The settings, as the Trainer calls them."""
        import transformers

        cfg, plan, folder = self.cfg, self.plan, self.checkpoints.folder
        on_gpu = self.device.kind == "cuda"
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(local_path(cfg.LOG_DIR) / folder.name)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=plan.steps,
            per_device_train_batch_size=1,  # all pairs of a step, or the share of a process
            train_sampling_strategy="sequential",
            **{name.lower(): getattr(cfg, name) for name in SAME_NAMES.split()},
            lr_scheduler_type=cfg.LR_SCHEDULER,
            warmup_steps=plan.warmup_steps,
            optim=optimizer_name(cfg, self.device),
            neftune_noise_alpha=cfg.NEFTUNE_ALPHA or None,
            fp16=on_gpu and self.device.dtype == "float16",
            bf16=on_gpu and self.device.dtype == "bfloat16",
            use_cpu=self.device.kind == "cpu",
            eval_strategy="steps" if self.data.validation else "no",
            eval_steps=cfg.EVAL_STEPS or plan.steps_per_epoch,
            metric_for_best_model="eval_loss",
            logging_nan_inf_filter=False,  # it would show a NaN as a loss of zero
            include_num_input_tokens_seen="all",  # every token counts: none is padding
            dataloader_pin_memory=on_gpu,
            project="finetune_colab",  # for Trackio
            run_name=folder.name,
            ddp_find_unused_parameters=False,
        )
        # the earlier and the later name, of which each version of transformers knows one or warns
        arguments.gradient_checkpointing = arguments.activation_checkpointing = plan.checkpointing
        arguments._n_gpu = 1  # or else the Trainer would spread each batch over all GPUs it sees
        return arguments

    def run(self, start: Checkpoint | None) -> None:
        """Train to the last step, or to the end of the step in which a signal arrives."""
        try:
            with fused_lora_layers(self.cfg, self.adapted), padding_free(self.adapted):
                self.train(resume_from_checkpoint=str(start.folder) if start else None)
        except Exception as error:
            known = self.step_began or isinstance(error, UserError) or memory_fault(error)
            if known or not (start or self.cfg.REPORT_TO in type(error).__module__):
                raise
            advice = f"Set up REPORT_TO {self.cfg.REPORT_TO}, or train without it."
            if start:
                advice = f"It was written with {start.stats.versions}. Or start over: --no-resume"
            fault = f"{type(error).__name__}: {preview(str(error), 150)}"
            where = f"from {short_path(start.folder)}" if start else "here"
            raise UserError(f"The training could not start {where}: {fault}\n{advice}") from error
        if self.stop:
            step = f"Step {self.state.global_step} of {self.state.max_steps}"
            raise Stopped(self.stop[0], f"{step} is saved, and {resume_hint(self.cfg)}.")

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # a float16 run may be resumed without a scaler
            super()._load_scaler(checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import torch

        # otherwise the intervals in the checkpoint would apply
        state.compute_steps(args, args.max_steps)
        self.session_start = state.global_step, self.stats.seconds
        if args.device.type != "cpu":  # a row too large for memory had better fail now
            most, shared = self.plan.tokens_at_once, may_share_rows(self.adapted)
            rows = [row for share in self.train_dataset for row in pack(share, most)]
            largest = max(rows, key=memory_of)
            with torch.random.fork_rng():
                super().training_step(self.model_wrapped, flatten(largest, shared), 1)
            self.model_wrapped.zero_grad()

    def collate(self, shares: Sequence[Sequence[Example]]) -> dict[str, Any]:
        """This process's share of one step: its rows, and what the Trainer counts."""
        (examples,) = shares
        shared, whole = may_share_rows(self.adapted), flatten(examples, shared=False)
        rows = [flatten(row, shared) for row in pack(examples, self.plan.tokens_at_once)]
        return {"rows": rows, "input_ids": whole["input_ids"], "labels": whole["labels"]}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Add up the gradients and losses of the rows; a step that is not finite changes nothing."""
        import torch

        self.step_began = time.perf_counter()
        train_on, (*rows, last) = super().training_step, inputs["rows"]
        with self.accelerator.no_sync(model):  # processes exchange their gradients once a step
            losses = [train_on(model, row, num_items_in_batch) for row in rows]
        loss: Any = sum([*losses, train_on(model, last, num_items_in_batch)])
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients)):
            self.bad_steps = 0
            return loss
        self.bad_steps += 1
        self.stats.skipped_steps += 1
        if self.bad_steps == MOST_BAD_STEPS:
            raise UserError(NOT_A_NUMBER)
        self.lost_loss = True
        if not self.accelerator.scaler:  # a scaler leaves the step out itself
            model.zero_grad()
        return torch.zeros_like(loss)  # the Trainer's sum of losses would stay NaN for ever

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        self.stats.seconds += time.perf_counter() - self.step_began
        first_step, seconds_before = self.session_start
        steps = state.global_step - first_step
        of_step = (self.stats.seconds - seconds_before) / steps
        left = of_step * (args.max_steps - state.global_step) + self.plan.asking_seconds
        if steps == 3 and left > 60:
            with tqdm.external_write_mode():
                say("Estimate", f"after three steps: {in_time(left)} left")
        state.epoch = state.global_step / self.plan.steps_per_epoch  # passes over the data
        overdue = time.monotonic() - self.saved_at > 60 * self.cfg.SAVE_MINUTES
        control.should_save |= self.has_to_save(control, overdue)
        control.should_log |= control.should_evaluate or control.should_save  # all losses so far

    def has_to_save(self, control: Any, overdue: bool = False) -> bool:
        """Whether it is time, or an end is asked for: in all processes after the same step."""
        late, number = self.highest(overdue, sum(self.stop))
        if number:
            self.stop[:] = [int(number)]
            control.should_training_stop = True
        return bool(late or number)

    def highest(self, *figures: float) -> list[float]:
        """The maximum of each figure over all processes, so that all of them decide alike."""
        import torch

        if world_size() == 1:
            return [*figures]
        own = torch.tensor([figures], dtype=torch.float64, device=self.args.device)
        return list(self.accelerator.gather(own).amax(0).tolist())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Only what is finite, and of the whole run: the Trainer's train_loss is of this session."""
        from tqdm import tqdm

        if self.lost_loss and logs.pop("loss", None) is not None:
            self.lost_loss = False
        logs = {k: v for k, v in logs.items() if math.isfinite(v) and not k.startswith("train_")}
        super().log(logs, *args, **kwargs)
        figures = ", ".join(f"{name} {figure:.6g}" for name, figure in logs.items())
        LOG.info("%-11sstep %d, %s", "Measured", self.state.global_step, figures)
        if diverges(self.state.log_history):
            raise UserError(DIVERGED.format(slower(self.cfg, 10)))
        if sign := warning_sign(self.state.log_history, self.plan.steps):
            with tqdm.external_write_mode():
                say("Warning", sign)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """A mean over tokens, not batches; then a checkpoint, since it may be the best."""
        loss = measured_loss(self.adapted, self.data.validation, self.plan.tokens_at_once)
        if loss is None:
            return {"eval_loss": math.inf}  # never the best
        metrics = {"eval_loss": max(self.highest(loss))}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save = True
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        stalled = len(losses) - 1 - losses.index(min(losses))  # measurements
        if 0 < self.cfg.EARLY_STOPPING_PATIENCE <= stalled:
            self.control.should_training_stop = self.stats.finished = True
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        import torch

        stats = self.stats
        if not all(torch.isfinite(p).all() for p in self.adapted.parameters() if p.requires_grad):
            raise UserError(NOT_A_NUMBER)
        stats.finished |= self.state.global_step >= self.state.max_steps
        stats.versions = ", ".join(f"{name} {v}" for name, v in installed_versions().items())
        stats.peak_memory_gb = max(stats.peak_memory_gb, peak_memory_gb())
        with self.checkpoints.saving(self.state, stats):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()
        self.accelerator.wait_for_everyone()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.has_to_save(control)  # a signal that came during measuring or saving ends the run here


def slower(cfg: Config, divisor: int) -> float:
    """A smaller learning rate, which the setting allows."""
    return max(cfg.LEARNING_RATE / divisor, LIMITS["LEARNING_RATE"][0])


def diverges(history: Sequence[dict[str, float]]) -> bool:
    """Whether ten losses in a row are above the first, and three times the median before them."""
    losses = [entry["loss"] for entry in history[-60:] if "loss" in entry]
    if len(losses) < 20:
        return False
    first = next(entry["loss"] for entry in history if "loss" in entry)
    return min(losses[-10:]) > max(first, 3 * sorted(losses[:-10])[len(losses[:-10]) // 2])


def warning_sign(history: Sequence[dict[str, float]], steps: int) -> str:
    """A warning that the last log entry gives cause for, each only once; otherwise empty."""
    last, tenth = history[-1], max(10, steps // 10)
    if "eval_loss" in last:
        measured = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
        best = min(measured, key=measured.__getitem__)
        *_, earlier, now = 0, *measured
        if earlier - best < steps / 3 <= now - best:
            return RISING.format(best)
    elif "loss" in last and last["step"] < 2 * tenth:
        logged = {e["step"]: e["loss"] for e in history if "loss" in e}
        *_, earlier, now = 0, *logged
        losses = [loss for step, loss in logged.items() if step <= tenth]
        third = math.ceil(len(losses) / 3)
        has_fallen = sum(losses[-third:]) < sum(losses[:third])
        if earlier < tenth <= now and len(losses) > 5 and not has_fallen:
            return FLAT
    return ""


def losses_in_bar(bar: Any, _: Any, __: Any, ___: Any, logs: Any, **____: Any) -> None:
    losses = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
    if bar.training_bar and losses:
        bar.training_bar.set_postfix(losses, refresh=False)


def train_adapter(
    model: PeftModel, data: PreparedData, device: Device, plan: Plan, checkpoints: Checkpoints
) -> None:
    """Train to the last step; if memory runs out, do the same steps with fewer tokens at once."""
    import transformers

    cfg = checkpoints.cfg
    bases = transformers.Trainer, transformers.TrainerCallback  # imported only now
    trainer_class = type("AnswerTrainer", (AnswerTrainer, *bases), {})
    trainable, parameters = model.get_nb_trainable_parameters()
    first = RunStats(trainable, parameters, plan.seconds, plan.memory_gb)
    if data.validation and not checkpoints.last:
        with model.disable_adapter():
            first.base_loss = measured_loss(model, data.validation, plan.tokens_at_once)
        if first.base_loss is not None:
            say("Before", f"validation loss of the untrained model: {first.base_loss:.3f}")
    if not may_share_rows(model):
        say("Note", f"{cfg.MODEL_NAME} cannot read several pairs in one row, so this takes longer")
    longest = max(map(tokens_in, data.train))
    packs = may_pack(cfg) and may_share_rows(model)
    most = plan.tokens_at_once if packs else 0  # 0: each pair has a row of its own
    ways = [plan._replace(tokens_at_once=count) for count in halvings(most, longest)]
    if not plan.checkpointing:
        ways.append(ways[-1]._replace(checkpointing=True))
    weights = [p for p in model.parameters() if p.requires_grad]
    untrained = [p.detach().to("cpu", copy=True) for p in weights]

    def attempt(way: Plan) -> None:
        at_once = way.tokens_at_once or longest
        if way is not ways[0]:
            less = f"at most {at_once:,} tokens at once"
            if way.checkpointing and not plan.checkpointing:
                less += " and gradient checkpointing"
                if cfg.GRADIENT_CHECKPOINTING is False:
                    less += ", in spite of --no-gradient-checkpointing"
            say("Memory", f"it ran out, so training continues with {less}; the result is the same")
        for weight, value in zip(weights, untrained, strict=True):
            weight.data.copy_(value)
        start = checkpoints.last
        stats = replace(start.stats if start else first, tokens_at_once=at_once)
        trainer_class(cfg, model, data, device, way, checkpoints, stats, stop).run(start)

    with stop_signals() as stop:
        as_many_as_fit(attempt, ways)


class TrainingResult(NamedTuple):
    """The outcome of a run, for the report: read from its last checkpoint alone."""

    history: list[dict[str, float]]
    base_loss: float | None  # before training
    final_loss: float | None
    best_step: int | None
    steps: int
    epochs: float
    tokens: int
    stats: RunStats
    adapter: Path  # the one to keep


def training_result(cfg: Config, last: Checkpoint) -> TrainingResult:
    state = json.loads((last.folder / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    best = last.best_step if cfg.KEEP_BEST else None
    return TrainingResult(
        history=state["log_history"],
        base_loss=last.stats.base_loss,
        final_loss=losses.get(best or last.step),
        best_step=best,
        steps=last.step,
        epochs=state["epoch"],
        tokens=int(state["num_input_tokens_seen"]),
        stats=last.stats,
        adapter=last.best_adapter if best else last.folder / ADAPTER,
    )


# ==================================================================================================
# 8  Answering
# ==================================================================================================

MESSAGES_READ = 40  # the latest of a chat; encoding hundreds would take seconds


class Answer(NamedTuple):
    text: str
    tokens: int
    stopped: bool  # by itself, at the end of its turn


def user_message(text: str) -> dict[str, str]:
    """A question as a message; undecodable bytes of the command line become ?."""
    return {"role": "user", "content": text.encode("utf-8", "replace").decode()}


def prompt_of(run: Run, messages: Messages, cfg: Config) -> list[int]:
    """A conversation as tokens, without its earliest turns where they do not fit."""
    context = context_of(run.model, run.tokenizer)
    most = max(context - cfg.MAX_TOKENS, context // 2)
    recent = messages[-MESSAGES_READ:]
    for start, message in enumerate(recent):
        if message["role"] == "assistant":
            continue
        text = f"{cfg.SYSTEM}\n\n{message['content']}" if cfg.SYSTEM else message["content"]
        ids = encode(run.tokenizer, [user_message(text), *recent[start + 1 :]])["input_ids"]
        if len(ids) <= most:
            return ids
    raise UserError(
        f"The question has {len(ids):,} tokens with its instructions; this model takes {most:,}.\n"
        f"It begins: {preview(messages[-1]['content'])}\nShorten it."
    )


def answers(model: Any, tokenizer: Any, prompts: list[list[int]], cfg: Config) -> list[Answer]:
    """What the model generates for each prompt, with as many at once as memory holds."""
    import torch

    def in_batches_of(size: int) -> list[Answer]:
        found = []
        for first in range(0, len(prompts), size):
            ids = {"input_ids": prompts[first : first + size]}
            batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
            start = batch["input_ids"].shape[1]
            config, processors = generation_settings(cfg, model, tokenizer, start)
            rows = model.generate(**batch, generation_config=config, logits_processor=processors)
            found += [decoded_answer(tokenizer, row) for row in rows[:, start:].tolist()]
        return found

    with evaluating(model), torch.random.fork_rng(enabled=cfg.TEMPERATURE > 0):
        if cfg.TEMPERATURE:
            torch.manual_seed(cfg.SEED)
        return as_many_as_fit(in_batches_of, halvings(ANSWERS_AT_ONCE[model.device.type], 1))


def generation_settings(cfg: Config, model: Any, tokenizer: Any, start: int) -> tuple[Any, Any]:
    """How answers that begin at token `start` are generated, and what changes the scores there."""
    import transformers as hf

    room = context_of(model, tokenizer) - start
    sampling = {"do_sample": True, "temperature": cfg.TEMPERATURE, "top_p": cfg.TOP_P, "top_k": 0}
    config = hf.GenerationConfig(
        max_new_tokens=max(1, min(cfg.MAX_TOKENS, room)),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # which the training has switched off
        **(sampling if cfg.TEMPERATURE else {}),
    )
    # of the answer alone: padding and the ends of earlier turns are no repetition
    penalty = hf.RepetitionPenaltyLogitsProcessor(cfg.REPETITION_PENALTY, start)
    return config, hf.LogitsProcessorList([penalty])


def decoded_answer(tokenizer: Any, ids: list[int]) -> Answer:
    stopped = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return Answer(text.strip(), len(ids), stopped)


def stream_answer(run: Run, messages: Messages, cfg: Config) -> Generator[Answer]:
    """The answer so far after each token, then the whole. Closing the generator ends it."""
    import torch
    import transformers as hf

    prompt, tokenizer = prompt_of(run, messages, cfg), run.tokenizer
    config, processors = generation_settings(cfg, run.model, tokenizer, len(prompt))
    if cfg.TEMPERATURE:
        processors += [hf.TemperatureLogitsWarper(cfg.TEMPERATURE), hf.TopPLogitsWarper(cfg.TOP_P)]
    answer, cache = Answer("", 0, stopped=False), None
    with run.untuned() if cfg.BASE else nullcontext(run.model) as model:
        sampler = torch.Generator(model.device).manual_seed(cfg.SEED)
        ids = torch.tensor([prompt], device=model.device)
        while answer.tokens < config.max_new_tokens and not answer.stopped:
            new = ids if cache is None else ids[:, -1:]  # some models have no cache
            with evaluating(model):  # only here: the page may take each token in another thread
                output = model(input_ids=new, past_key_values=cache, use_cache=True)
                cache = output.get("past_key_values")
                scores = processors(ids, output.logits[:, -1].float())
                token = scores.argmax(-1, keepdim=True)
                if cfg.TEMPERATURE:
                    token = scores.softmax(-1).multinomial(1, generator=sampler)
                ids = torch.cat([ids, token], dim=1)
            answer = decoded_answer(tokenizer, ids[0, len(prompt) :].tolist())
            yield answer._replace(text=answer.text.rstrip("\ufffd"))  # half of a character
    yield answer


# -- Before and after

COMPARED = ["row", "question", "expected", "before", "after", "overlap before", "overlap after"]
COMPARED += ["loss before", "loss after", "cut off", "tokens", "seconds"]
Asked = tuple[Pair, list[int], dict[str, Any]]  # with its prompt, and its row of the columns above


def ask_both(
    run: Run, pairs: Sequence[Pair], cfg: Config, with_base: bool = True
) -> Iterator[dict[str, Any]]:
    """What the base and the tuned model answer, and how good that is: a row for each question.

    A question that is too long is left out with a message.
    """
    from tqdm import tqdm

    asked = list[Asked]()
    for pair in pairs:
        number = pair.row_label.removeprefix("row ") if pair.row else ""
        row: dict[str, Any] = {"row": number, "question": pair.question, "expected": pair.answer}
        try:
            asked.append((pair, prompt_of(run, pair.messages[:-1], cfg), row))
        except UserError as error:
            say("Left out", f"{pair.row_label}: {error}" if pair.row else str(error))
    size = ANSWERS_AT_ONCE[run.model.device.type]
    groups = [asked[i : i + size] for i in range(0, len(asked), size)]
    for group in tqdm(groups, desc="Asking", leave=False, disable=len(groups) < 2):
        if with_base:
            with run.untuned() as base:
                add_answers("before", base, run.tokenizer, group, cfg)
        add_answers("after", run.model, run.tokenizer, group, cfg)
        yield from (row for _, _, row in group)


def add_answers(when: str, model: Any, tokenizer: Any, group: Sequence[Asked], cfg: Config) -> None:
    """Ask one model a group of questions, and add to the rows what came of it."""
    began = time.perf_counter()
    found = answers(model, tokenizer, [prompt for _, prompt, _ in group], cfg)
    seconds = (time.perf_counter() - began) / len(group)
    for (pair, prompt, row), answer in zip(group, found, strict=True):
        row[when] = re.sub(r"\n\s*\n", "\n\n", answer.text)  # some are full of empty lines
        row[f"overlap {when}"] = overlap(tokenizer, answer.text, pair.answer)
        row[f"loss {when}"] = loss_of_answer(model, tokenizer, pair, prompt)
        row["cut off"] = row.get("cut off", 0) + (not answer.stopped)
        row["tokens"] = row.get("tokens", 0) + answer.tokens
        row["seconds"] = row.get("seconds", 0) + seconds


def loss_of_answer(model: Any, tokenizer: Any, pair: Pair, prompt: list[int]) -> float | None:
    """The mean loss per token of the expected answer, after exactly the prompt of the question."""
    labels = encode(tokenizer, pair.messages[-2:])["labels"]
    target = [label for label in labels if label != IGNORE]
    example: Example = {"input_ids": prompt + target, "labels": [IGNORE] * len(prompt) + target}
    if not pair.answer or len(prompt + target) > context_of(model, tokenizer):
        return None
    return mean_loss(model, [example], 0)


def overlap(tokenizer: Any, answer: str, expected: str) -> float | None:
    """The F1 score of the tokens: 1 where both texts have the same, 0 where they share none."""
    return f1_score(*token_counts(tokenizer, [answer, expected])) if expected else None


def token_counts(tokenizer: Any, texts: Iterable[str]) -> Iterator[Counter[int]]:
    if padded := [f" {text}" for text in texts]:
        yield from map(Counter, tokenizer(padded, add_special_tokens=False)["input_ids"])


def f1_score(one: Counter[int], other: Counter[int]) -> float:
    return 2 * (one & other).total() / (one.total() + other.total())


def speed(tokens: int, seconds: float, cut_off: int, asked: int = 1) -> str:
    share = "" if asked == 1 else f"{cut_off} of {asked} answers "
    more = f"; {share}cut off by --max-tokens" if cut_off else ""
    return f"{tokens:,} tokens, {tokens / seconds:.1f} per second{more}"


def answer_speed(answer: Answer, seconds: float, cfg: Config) -> str:
    cut_off = not answer.stopped and answer.tokens >= cfg.MAX_TOKENS
    return f"({speed(answer.tokens, seconds, cut_off)})"


# ==================================================================================================
# 9  Exam
# ==================================================================================================

AS_TAUGHT, IN_OTHER_WORDS = "As taught", "In other words"
HELD_OUT, ELSEWHERE = "Held out", "Elsewhere"
PARTS = (AS_TAUGHT, IN_OTHER_WORDS, HELD_OUT, ELSEWHERE)
RIGHT, ALMOST, NEARLY, WRONG = "word for word", "but for punctuation", "nearly", "no"
NEARLY_FROM = 0.8  # overlap, where all numbers are right
RIVAL_FROM = 0.5  # overlap with the answer of another row
KNOWN, KNOWN_IN_OTHER_WORDS = 0.8, 0.6  # shares of right answers
FORGOTTEN = 2.0  # nats per token that the base's own answers may lose in likelihood
PARROTED = 0.5  # share of general questions that get an answer from the data
GENERAL = (  # a tuned model should still answer these much as its base does
    "What is the capital of France?",
    "How many days does a leap year have?",
    "Why is the sky blue?",
    "What is 12 plus 30?",
    "Name three fruits.",
    "How do I boil an egg?",
    "What is the opposite of cold?",
    "Write one sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "Translate good morning into Spanish.",
)
VERDICTS = {  # what they mean, and what to do
    "diverged": "The training diverged: {both}. Train again with --learning-rate {tenth:.1g}.",
    "mixes up rows": "It knows {taught}, but mixes up {confused}. Make the questions of these rows differ more, or write a second wording of each.",
    "has not learned it yet": "It has not learned your data yet: {both}. {more}",
    "has lost its general answers": "It knows your data ({taught}), but has lost its general answers. Train again with --learning-rate {third:.1g}.",
    "knows it only word for word": "It knows your data only word for word: {both}. Write a second wording of the questions in rows {missed}.",
    "knows it": "It knows your data: {both}. {wordings}",
}
ENGLISH = re.compile(r"(?i)\b(what|how|why|who|when|where|which|is|are|do|does|can)\b")
SHORT_FORMS = {"what is": "what's", "how is": "how's", "and": "&", "you": "u", "are": "r"}
SHORT_FORMS |= {"with": "w/", "for": "4", "please": "pls", "between": "btwn", "to": "2"}


def reworded(question: str, seed: int) -> tuple[str, str]:
    """The question as somebody might type it, and the rule's name; two empty texts if none applies."""
    chance, plain = random.Random(f"{seed} {question}"), question.rstrip(" ?？!.")
    start = plain[:1].lower() + plain[1:]
    forms = {"in lower case": question.lower(), "without a question mark": plain}
    if words := re.findall(r"[^\W\d_]{6,}", question):
        word, i = chance.choice(words), chance.randrange(1, 4)
        swapped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        forms["with a typo"] = question.replace(word, swapped, 1)
    if ENGLISH.search(question):
        long = re.compile("|".join(rf"\b{words}\b" for words in SHORT_FORMS))
        if long.search(start):
            forms["abbreviated"] = long.sub(lambda found: SHORT_FORMS[found[0]], start) + "?"
        forms["with a polite opening"] = f"Could you please tell me: {start}?"
        forms["in a longer sentence"] = f"Hello, I was wondering, {start}? Thank you!"
    changed = [(text, rule) for rule, text in forms.items() if text != question]
    return chance.choice(changed or [("", "")])


def base_answers(run: Run, questions: Sequence[str], cfg: Config, tokens: int) -> list[str]:
    """What the base model answers: nothing if it is the toy, or if a question is too long for it."""
    prompts = dict[str, list[int]]()
    if base_name(run.cfg) == f"./{DEMO_MODEL}" and is_demo(run.model):
        return [""] * len(questions)
    for question in questions:
        with suppress(UserError):
            prompts[question] = prompt_of(run, [user_message(question)], cfg)
    with run.untuned() as base:
        settings = Config(MAX_TOKENS=min(tokens, cfg.MAX_TOKENS))
        found = answers(base, run.tokenizer, [*prompts.values()], settings)
    texts = dict(zip(prompts, (answer.text for answer in found), strict=True))
    return [texts.get(question, "") for question in questions]


def paraphrased(run: Run, questions: Sequence[str], cfg: Config) -> list[str]:
    """Each question in the base model's words; empty where it may have become another question."""
    request = "Ask this question in other words, as one short question: "
    found = base_answers(run, [request + one for one in questions], cfg, PARAPHRASE_TOKENS)
    words = [set(re.findall(r"\w{5,}", fold(question))) for question in questions]
    counts, texts = Counter(itertools.chain.from_iterable(words)), list[str]()
    for answer, question, its_words in zip(found, questions, words, strict=True):
        text = answer.partition("\n")[0]
        rare = [word for word in its_words if counts[word] == 1]
        numbers, its_numbers = (sorted(re.findall(r"\d+", one)) for one in (text, question))
        on_the_subject = (
            rare and all(word in fold(text) for word in rare) and numbers == its_numbers
        )
        is_new_question = text.endswith("?") and fold(text) != fold(question)
        is_short = len(text) < 3 * len(question)
        texts.append(text if is_new_question and is_short and on_the_subject else "")
    return texts


def questions_of(
    part: str, run: Run, cfg: Config, chosen: list[Pair], held_out: list[Pair]
) -> tuple[list[Pair], dict[str, str]]:
    """The questions of a part, and the rules by which some were changed."""
    if part == AS_TAUGHT:
        return chosen, {}
    if part == HELD_OUT:
        return held_out[: cfg.EVAL_ANSWERS], {}
    if part == ELSEWHERE:
        general = GENERAL[: min(MOST_GENERAL, len(chosen))]
        own = base_answers(run, general, cfg, GENERAL_TOKENS)
        pairs = [
            Pair([user_message(question), {"role": "assistant", "content": answer}], "", 0)
            for question, answer in zip(general, own, strict=True)
            if answer
        ]
        return pairs, {}
    questions = [pair.question for pair in chosen]
    forms = [reworded(question, cfg.SEED) for question in questions]
    forms += [(text, "by the base model") for text in paraphrased(run, questions, cfg)]
    pairs = [
        pair._replace(messages=[*pair.messages[:-2], user_message(text), pair.messages[-1]])
        for pair, (text, _) in zip(chosen + chosen, forms, strict=True)
        if text
    ]
    return pairs, dict(forms)


def take_exam(run: Run, cfg: Config, data: PreparedData, resume: Path | None = None) -> Exam:
    """Ask and judge; the parts that were answered before an interruption are in the file `resume`."""
    trained, done = data.train_pairs, answered_parts(resume)
    count = min(cfg.EXAM_QUESTIONS, len(trained))
    chosen = [trained[i * len(trained) // count] for i in range(count)]  # from all over the data
    try:
        for part in (part for part in PARTS if part not in done):
            pairs, rules = questions_of(part, run, cfg, chosen, data.validation_pairs)
            expected = token_counts(run.tokenizer, [pair.answer for pair in pairs])
            longest = max((counts.total() for counts in expected), default=0)
            limit = Config(MAX_TOKENS=min(cfg.MAX_TOKENS, most_tokens(longest)))
            found = ask_both(run, pairs, limit, with_base=part != IN_OTHER_WORDS)
            done[part] = [row | {"changed": rules.get(row["question"])} for row in found]
            if resume:
                with warned("after an interruption the exam will start over"):
                    write_json(resume, done)
    except KeyboardInterrupt:
        if not any(done.values()):
            raise
        say("Note", f"the exam ends here; answered: {', '.join(done)}")
    rows = [{"part": part} | row for part, found in done.items() for row in found]
    if not rows:
        raise UserError("There is nothing to ask.\nRaise --exam-questions or --eval-answers")
    return judged(rows, cfg, data)


def answered_parts(resume: Path | None) -> dict[str, list[dict[str, Any]]]:
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(resume.read_text(encoding="utf-8"))) if resume else {}
    return {}


def grade(answer: str, expected: str, overlap: float) -> str:
    """How right an answer is. One with another number is wrong, however much else is the same."""
    if bare(answer) == bare(expected):
        return RIGHT if answer == expected else ALMOST
    numbers, other = (re.findall(r"(?:(?<!\w)-)?\d+", text) for text in (answer, expected))
    return NEARLY if overlap >= NEARLY_FROM and numbers == other else WRONG


def rows_of_answers(tokenizer: Any, table: pandas.DataFrame, pairs: Sequence[Pair]) -> list[str]:
    """For each answer, the other row whose answer it resembles more than its own; mostly empty."""
    closest = [*table["overlap after"].fillna(0).clip(RIVAL_FROM)]
    given = [g for g in enumerate(token_counts(tokenizer, table["after"])) if closest[g[0]] < 1]
    own, rows = table["expected"].map(bare), [""] * len(table)
    others = {bare(pair.answer): pair for pair in reversed(pairs)}
    texts = [pair.answer for pair in others.values()]
    for (text, pair), target in zip(others.items(), token_counts(tokenizer, texts), strict=True):
        for i, counts in given:
            share = f1_score(counts, target)
            if share > closest[i] and text != own[i]:
                rows[i], closest[i] = pair.row_label, share
    return rows


class Exam(NamedTuple):
    """The outcome of an exam; all but the table is in run.json."""

    table: pandas.DataFrame  # a row for each question
    trained: int  # questions in the data
    parts: dict[str, dict[str, float]]  # figures of each
    mixed_up: list[tuple[str, str]]  # rows
    verdict: str = ""
    text: str = ""  # for the person


def judged(found: list[dict[str, Any]], cfg: Config, data: PreparedData) -> Exam:
    """How right each answer is, the figures of each part, and the verdict."""
    import pandas

    table = pandas.DataFrame(found, columns=["part", *COMPARED, "changed"])
    table["right"] = list(map(grade, table["after"], table["expected"], table["overlap after"]))
    every = data.train_pairs + data.validation_pairs
    table["answer of"] = rows_of_answers(data.tokenizer, table, every)
    sheets = {pair.sheet for pair in data.train_pairs}
    for name in ("row", "answer of") if len(sheets) == 1 else ():  # which goes without saying
        table[name] = table[name].str.removesuffix(f" of {min(sheets)}")
    parts = {}
    for part, rows in table.groupby("part", sort=False):
        means = rows.mean(numeric_only=True).filter(regex="overlap|loss").dropna()
        parts[str(part)] = {
            "asked": len(rows),
            "word_for_word": int(rows["right"].isin([RIGHT, ALMOST]).sum()),
            "right": int((rows["right"] != WRONG).sum()),
            "answers_of_rows": int((rows["answer of"] != "").sum()),
            **means.round(4).to_dict(),
        }
    confused = table[(table["part"] == AS_TAUGHT) & (table["answer of"] != "")]
    mixed_up = list(zip("row " + confused["row"], confused["answer of"], strict=True))
    exam = Exam(table, len(data.train_pairs), parts, mixed_up)
    if AS_TAUGHT not in parts or not data.pairs.columns:  # conversations teach a manner, not facts
        return exam
    exam = exam._replace(verdict=verdict_of(parts, len(mixed_up)))
    text = verdict_in_words(exam, cfg, data.tokenizer)
    return exam._replace(text=f"{text} {sureness(exam)}")


def verdict_of(parts: dict[str, dict[str, float]], mixed_up: int) -> str:
    """The first of the rules that holds."""
    taught, other, elsewhere = (  # of what was not measured, no rule holds
        defaultdict(lambda: math.nan, parts.get(part, {}))
        for part in (AS_TAUGHT, IN_OTHER_WORDS, ELSEWHERE)
    )
    asked, right = taught["asked"], taught["right"]
    is_known = right >= KNOWN * asked
    is_known_but_for_those = right >= max(KNOWN * (asked - mixed_up), asked / 2)
    has_drifted = elsewhere["loss after"] - elsewhere["loss before"] > FORGOTTEN
    parrots = elsewhere["answers_of_rows"] > PARROTED * elsewhere["asked"]
    rules = {
        "diverged": taught["loss after"] > taught["loss before"] or (has_drifted and not is_known),
        "mixes up rows": mixed_up > 0 and is_known_but_for_those,
        "has not learned it yet": not is_known,
        "has lost its general answers": has_drifted or parrots,
        "knows it only word for word": other["right"] < KNOWN_IN_OTHER_WORDS * other["asked"],
        "knows it": True,
    }
    return next(verdict for verdict, holds in rules.items() if holds)


def verdict_in_words(exam: Exam, cfg: Config, tokenizer: Any) -> str:
    """What the verdict means, and what to do about it."""
    wrong = exam.table[exam.table["right"] == WRONG]
    expected = token_counts(tokenizer, wrong[wrong["part"] == AS_TAUGHT]["expected"])
    missed = ", ".join(wrong[wrong["part"] == IN_OTHER_WORDS]["row"].unique()[:5])
    confused = dict.fromkeys(" and ".join(sorted(rows)) for rows in exam.mixed_up)
    taught = both = "{right} of {asked} questions as taught".format(**exam.parts[AS_TAUGHT])
    if IN_OTHER_WORDS in exam.parts:
        both += ", {right} of {asked} in other words".format(**exam.parts[IN_OTHER_WORDS])
    wordings = "Nothing needs to change, but read some answers before you rely on them."
    if missed:
        wordings = f"A second wording would help rows {missed}."
    return VERDICTS[exam.verdict].format(
        taught=taught,
        both=both,
        confused="; ".join([*confused][:3]),
        missed=missed,
        more=more_training(cfg, [counts.total() for counts in expected]),
        tenth=slower(cfg, 10),
        third=slower(cfg, 3),
        wordings=wordings,
    )


def more_training(cfg: Config, lengths: Sequence[int]) -> str:
    """Advice where answers are wrong, with the lengths of those expected, in tokens."""
    too_long = [length for length in lengths if length > cfg.MAX_TOKENS]
    if 2 * len(too_long) > len(lengths):  # training alone cannot help
        return f"Most other answers have no room: ask again with --max-tokens {max(too_long) + 1}."
    if cfg.LEARNING_RATE < 1e-4:
        more = "--learning-rate 2e-4"
    elif cfg.MAX_STEPS:
        more = f"--max-steps {2 * cfg.MAX_STEPS}"
    elif cfg.NUM_EPOCHS < 20 or cfg.LORA_R > 512:  # of which twice is too many
        more = f"--num-epochs {2 * cfg.NUM_EPOCHS}"
    else:
        more = f"--lora-r {2 * cfg.LORA_R}"
    return f"Train more: {more}."


def sureness(exam: Exam) -> str:
    """A sentence with the 95 % interval (Wilson) of the share of all questions that it knows."""
    asked, right = (exam.parts[AS_TAUGHT][name] for name in ("asked", "right"))
    if asked >= exam.trained:
        return f"All {asked} trained questions were asked."
    share, z2 = right / asked, 1.96**2
    spread = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * asked)) / asked)
    low, high = (max(0, share + z2 / (2 * asked) + d) / (1 + z2 / asked) for d in (-spread, spread))
    return f"Of all {exam.trained:,} questions it knows {low:.0%} to {high:.0%}, judging by the {asked} asked."


# ==================================================================================================
# 10  Report
# ==================================================================================================

ANSWERS, ANSWERS_PICTURE = "answers.xlsx", "training_visuals/answers.png"
EXAM, EXAM_PICTURE = "exam.json", "training_visuals/exam.png"
SAMPLE, ROWS_IN_SAMPLE = "sample_rows.json", 16  # by which an export is measured
SMALL_FILES = 50_000_000  # bytes of tokenizer, pictures and records beside an adapter, at most
REPORT_MARK = "made by finetune_colab.py"
EXAMPLES_SHOWN = 3  # answers on the screen, and questions on the page
# Settings that name places on this computer; public_place shortens them for others
PLACES = "DATASET_PATH OUTPUT_DIR CHECKPOINT_DIR LOG_DIR CHECKPOINT_MIRROR RESUME_FROM_CHECKPOINT QUESTIONS EXPORT_DIR".split()


# -- The record of a run, and its card


def public_settings(cfg: Config) -> dict[str, Any]:
    """The settings as others may read them: without keys, and without folders of this computer."""
    public = {name: public_place(getattr(cfg, name)) for name in PLACES}
    own = {name: getattr(cfg, name) for name in TYPES}
    return own | public | {"MODEL_NAME": base_name(cfg)}


def public_place(place: str) -> str:
    """A path without its folders; of a link the server only: who has a shared link has the file."""
    place = without_secrets(place)
    if server := re.match(r"\s*(https?://[^/]*)", place, re.IGNORECASE):
        return f"{server[1]}/…"
    path = local_path(place)
    return path.name if path.is_absolute() else place


LOGGED = ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]


def training_log(trained: TrainingResult) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(trained.history).reindex(columns=LOGGED)


def metrics_of(data: PreparedData, trained: TrainingResult) -> dict[str, Any]:
    stats, log = trained.stats, training_log(trained).dropna(subset=["learning_rate"])
    # of how many steps a logged loss is the mean; none is logged where a step was skipped
    steps = log["step"].diff().fillna(log["step"]).where(log["loss"].notna())
    layers = {name.rpartition(".")[2] for name in layers_in(trained.adapter)}
    return {
        "train_loss": float((log["loss"] * steps).sum() / steps.sum()) if steps.sum() else None,
        "eval_loss": trained.final_loss,
        "base_eval_loss": trained.base_loss,
        "best_step": trained.best_step,
        "steps": trained.steps,
        "epochs": trained.epochs,
        "train_pairs": len(data.train_pairs),
        "eval_pairs": len(data.validation_pairs),
        "tokens_trained": trained.tokens,
        "tokens_at_once": stats.tokens_at_once,
        "tokens_per_second": round(trained.tokens / stats.seconds, 1),
        "train_seconds": round(stats.seconds, 3),
        "skipped_steps": stats.skipped_steps,
        "estimated_seconds": stats.estimated_seconds,
        "peak_memory_gb": round(stats.peak_memory_gb, 3) or None,
        "estimated_memory_gb": stats.estimated_memory_gb,
        "adapted_layers": ", ".join(sorted(layers)),
        "trainable_parameters": stats.trainable,
        "trainable_percent": round(100 * stats.trainable / stats.parameters, 4),
    }


def quality_record(quality: Quality) -> dict[str, Any]:
    parts = {}
    for kind, notes in by_kind(quality.notes).items():
        share = round(len(notes) / quality.counted, 4)
        places = [(one.sheet, one.row) for one in notes]
        parts[kind] = {"rows": len(notes), "share": share, "places": places}
    score = round(quality.score, 4) if quality.counted else None
    counts = {"rows_counted": quality.counted, "rows_good": quality.good}
    return {"score": score, **counts, "parts": parts}


def run_record(
    cfg: Config, device: Device, data: PreparedData, trained: TrainingResult
) -> dict[str, Any]:
    """run.json: what later commands need to know, so that nobody types a setting twice."""
    return {
        "settings": public_settings(cfg),
        "prompt_format": prompt_in_words(data.tokenizer),
        "base_model": base_name(cfg),
        "base_revision": cfg.MODEL_REVISION or None,
        "device": device._asdict(),
        "dataset": {
            "file": public_place(data.pairs.name),  # several files keep the path of their pattern
            "sheet": data.pairs.table.sheet,
            "shape": data.pairs.shape,
            **column_names(data.pairs),
            "quality": quality_record(data.quality),
            "sha256_of_pairs": fingerprint([pair.messages for pair in data.pairs.kept]),
            "held_out_rows": [(pair.sheet, pair.row) for pair in data.validation_pairs],
        },
        "examples": [pair.messages[0]["content"] for pair in data.train_pairs[:EXAMPLES_SHOWN]],
        "versions": installed_versions(),
        "results": metrics_of(data, trained),
    }


CARD = """\
---
{front}---

# {name}, fine-tuned

Trained by `finetune_colab.py` on pairs of questions and answers. The prompt has exactly this form:

```text
{prompt}
```

{how}

{exam}## The run

| | |
| --- | --- |
{rows}

The loss is the mean per answer token, in nats. It does not say whether an answer is true, so read some before you rely on
them: beside the adapter, `answers.xlsx` has answers from before and after training, and `training_visuals/` the curves.
Every setting, version and result is in `run.json`.
"""
ADAPTER_FRONT = """\
{base}library_name: peft
pipeline_tag: text-generation
tags: [lora, question-answering]
"""
ADAPTER_HOW = """\
This is a LoRA adapter for {name}.
To chat, put the script beside this folder: `python finetune_colab.py chat --output-dir FOLDER`. Without the script,
run this in the folder, with torch, transformers 5 and peft (on Colab, first `pip uninstall -y torchao`, which is too old there).
{copy}
```python
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

dtype = torch.float16 if torch.cuda.is_available() else torch.float32
model = AutoPeftModelForCausalLM.from_pretrained(".", dtype=dtype, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
chat = [{{"role": "user", "content": {question}}}]  # one of the training questions
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**prompt.to(model.device), max_new_tokens=200, do_sample=False)
answer = output[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip())
```"""


def model_card(
    record: dict[str, Any], front: str = ADAPTER_FRONT, how: str = ADAPTER_HOW, file: str = ""
) -> str:
    """run.json for people: first what the Hub reads, then how these weights are asked."""
    base, exam = record["settings"]["MODEL_NAME"], record.get("exam", {}).get("text")
    name = preview(base.removeprefix("./"), 100).replace("<", "&lt;")
    is_folder, rows = base.startswith("./"), []
    for figure, value in (record.get("results") or {}).items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        rows.append(f"| `{figure}` | {'none' if value is None else shown} |")
    texts = {
        "base": "" if is_folder else f"base_model: {base}\n",
        "copy": f"The base model must be in this folder, as `{name}`.\n" if is_folder else "",
        "file": file,
        "licence": "license: mit\n" if base == "microsoft/phi-2" else "",
        "name": name,
        "question": repr((record["examples"] or ["Why?"])[0][:300]),
        "title": json.dumps(f"Ask {name}, fine-tuned", ensure_ascii=False),
    }
    return CARD.format(
        front=front.format(**texts),
        name=name,
        prompt=record.get("prompt_format", ""),
        how=how.format(**texts),
        exam=f"## Does it know the data?\n\n{exam}\n\n" if exam else "",
        rows="\n".join(rows),
    )


def write_record(folder: Path, record: dict[str, Any], *of_card: str) -> None:
    """What a run was and what came of it: for people, and as run.json for later commands."""
    card = model_card(record, *of_card)
    with atomic_write(folder / "README.md") as staged:
        staged.write_text(card, encoding="utf-8", errors="backslashreplace")
    write_json(folder / "run.json", record)


# -- Pictures, in blue and orange, which everybody can tell apart

BLUE, ORANGE, GREY = "#1f6fb2", "#d9730d", "#6b6b6b"  # colours of every curve and dot
MOST_ROWS_DRAWN = 40


@contextmanager
def picture(path: Path, title: str, meaning: str, size: float = 5, **parts: Any) -> Iterator[Any]:
    """The axes to draw on, under a title and a sentence that says what it means."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("seaborn-v0_8-whitegrid"):  # importing seaborn itself takes half a second
        figure = Figure(figsize=(8, size), layout="constrained", dpi=110)
        axes = figure.subplots(**parts)
    figure.suptitle(title, weight="bold")
    figure.axes[0].set_title(meaning, size="medium")
    yield axes
    figure.legend(loc="outside lower center", ncols=2)
    with atomic_write(path) as staged:
        figure.savefig(staged, format="png", metadata={"Software": REPORT_MARK})


def draw_validation(axes: Any, x: str, log: pandas.DataFrame, trained: TrainingResult) -> None:
    """The validation loss by step or epoch, and what it was before training."""
    measured = log.dropna(subset=["eval_loss"])
    if trained.base_loss is not None:
        name = "validation (held-out questions)"
        axes.plot(measured[x], measured["eval_loss"], "o-", color=ORANGE, label=name)
        before = {"color": GREY, "linestyle": "--", "label": "validation, before training"}
        axes.axhline(trained.base_loss, **before)
    axes.set(xlabel=x, ylabel="loss per token (nats)", ylim=(0, 1.1 * axes.get_ylim()[1]))
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_training_curves(path: Path, log: pandas.DataFrame, trained: TrainingResult) -> None:
    import seaborn

    losses, best = log.dropna(subset=["loss"]), trained.best_step
    smooth = losses["loss"].rolling(2 * (len(losses) // 40) + 1, center=True, min_periods=1).mean()
    line = {"color": BLUE, "marker": "o" if len(losses) < 3 else None}  # one point is no line
    chosen = f"best step ({best})" if best else "last step"
    rows = {"nrows": 2, "sharex": True, "height_ratios": [3, 1]}
    title, meaning = "Loss while training: lower is better", f"kept: the adapter of the {chosen}"
    with picture(path, title, meaning, 6, **rows) as (top, bottom):
        seaborn.lineplot(losses, x="step", y="loss", color=BLUE, alpha=0.3, linewidth=1, ax=top)
        top.plot(losses["step"], smooth, label="training", **line)
        if best:
            top.axvline(best, color=ORANGE, linestyle=":", label=chosen)
        draw_validation(top, "step", log, trained)
        seaborn.lineplot(losses, x="step", y="learning_rate", ax=bottom, **line)
        top.set_xlabel("")
        bottom.set_ylabel("learning rate")
        bottom.ticklabel_format(axis="y", scilimits=(0, 0))


def draw_loss_comparison(path: Path, log: pandas.DataFrame, trained: TrainingResult) -> None:
    means = log["loss"].groupby((log["epoch"] - 1e-6).apply(math.ceil)).mean()
    before, after = trained.base_loss, trained.final_loss
    meaning = "nothing was held out for validation"
    if before is not None and after is not None:
        meaning = f"validation loss: {before:.3f} before training, {after:.3f} after"
    with picture(path, "Loss by epoch: lower is better", meaning) as axes:
        axes.bar(means.index, means, 0.6, color=BLUE, label="training, mean of the epoch")
        draw_validation(axes, "epoch", log, trained)


def draw_answers(
    path: Path,
    title: str,
    meaning: str,
    table: pandas.DataFrame,
    mixed_up: Sequence[tuple[str, str]] = (),
) -> None:
    """The overlap of each answer before and after; mixed-up rows are joined."""
    before, after = "overlap before", "overlap after"
    drawn = table.dropna(subset=[before, after]).head(MOST_ROWS_DRAWN)
    if drawn.empty:
        return
    names = [
        # in a script that every matplotlib has
        preview(question, 36) if max(question, default="") < "\u0590" else f"row {row}"
        for row, question in zip(drawn["row"], drawn["question"], strict=True)
    ]
    with picture(path, title, meaning, 1.8 + 0.25 * len(drawn)) as axes:
        rows = range(len(drawn))
        axes.hlines(rows, drawn[before], drawn[after], color=GREY, alpha=0.4)
        ring = {"markersize": 10, "markerfacecolor": "none", "label": "before training"}
        axes.plot(drawn[before], rows, "o", color=GREY, **ring)  # around an equal dot
        axes.plot(drawn[after], rows, "o", color=BLUE, markersize=8, label="after training")
        if "lowest" in drawn:
            marks = {"color": ORANGE, "markersize": 5, "label": "the same in other words"}
            axes.plot(drawn["lowest"], rows, "D", **marks)
        place = {f"row {row}": y for y, row in enumerate(drawn["row"])}
        for ends in ([place[row] for row in pair if row in place] for pair in mixed_up):
            axes.plot(drawn[after].iloc[ends], ends, "--", color=ORANGE)
        axes.set(xlabel=f"overlap {FIGURES_OF_ANSWERS['overlap']}", xlim=(-0.03, 1.03))
        axes.set_yticks(rows, names, parse_math=False)
        axes.set_ylim(len(drawn) - 0.4, -0.6)


def draw_lengths(path: Path, cfg: Config, data: PreparedData) -> None:
    """On a log scale, on which one pair of 3,000 tokens is seen beside a thousand of 80."""
    unit = "tokens (about ¾ of an English word each)" if data.tokenizer else "characters"
    kept = data.tokens or [len(pair.question + pair.answer) for pair in data.pairs.kept]
    limit = min(cfg.MAX_LENGTH, getattr(data.tokenizer, "model_max_length", cfg.MAX_LENGTH))
    edge, lengths = limit + 0.5, [*kept, *data.overlong] or [1]  # a bar ends at the limit
    first, last = (math.floor(8 * math.log2(n / edge)) for n in (min(lengths), max(lengths)))
    bins = [edge * 2 ** (n / 8) for n in range(first, last + 2)]
    labels = [f"{len(kept)} pairs kept", f"{len(data.overlong)} too long, left out"]
    with picture(path, "How long the pairs are", ", ".join(labels)) as axes:
        axes.hist([kept, data.overlong], bins, stacked=True, color=[BLUE, ORANGE], label=labels)
        if data.tokenizer:
            axes.axvline(edge, color=GREY, linestyle="--", label=f"MAX_LENGTH, {limit} tokens")
        axes.set(xlabel=f"length of a question with its answer, in {unit}", ylabel="pairs")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.get_major_locator().set_params(integer=True)


# -- Workbooks

MOST_REPORT_ROWS = 20_000
LONGEST_CELL = 16_000  # characters; a workbook holds 32,767, and counts some of them twice
FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\n]|#[A-Z/0]+[!?A]$")  # or an error, as #N/A


def write_book(path: Path, tables: dict[str, list[Sequence[Any]]]) -> None:
    """A sheet for each table, its titles first, to be read and filtered; nothing is a formula."""
    from openpyxl import Workbook
    from openpyxl.formatting.rule import ColorScaleRule
    from openpyxl.styles import Alignment, Font

    worst = {"start_type": "num", "start_value": 0, "start_color": "F4B183"}  # orange
    best = {"end_type": "num", "end_value": 1, "end_color": "9DC3E6"}  # blue
    book, wrapped = Workbook(), Alignment(wrap_text=True, vertical="top")
    book.remove(book.active)
    book.properties.creator = REPORT_MARK
    for name, rows in tables.items():
        sheet, more = book.create_sheet(name), len(rows) - 1 - MOST_REPORT_ROWS
        for row in rows[: MOST_REPORT_ROWS + 1]:
            sheet.append([safe_cell(value) for value in row])
        sheet.auto_filter.ref, sheet.freeze_panes = sheet.dimensions, "A2"
        for column in sheet.columns:
            letter, width = column[0].column_letter, max(len(str(c.value)) for c in column) + 4
            sheet.column_dimensions[letter].width = min(width, 60)
            if str(column[0].value).startswith("overlap"):  # nonsense is never blue
                colours = ColorScaleRule(**worst, **best)
                sheet.conditional_formatting.add(f"{letter}2:{letter}{len(column)}", colours)
            for cell in column:
                cell.alignment = wrapped
            column[0].font = Font(bold=True)
        if more > 0:
            sheet.append([f"and {more:,} more rows"])
    # in memory first: on a full disk, an open zip file prints an error when it is closed late
    content = io.BytesIO()
    book.save(content)
    with atomic_write(path) as staged:
        staged.write_bytes(content.getvalue())


def safe_cell(value: Any) -> Any:
    """What a cell can hold, and no program takes for a formula."""
    if isinstance(value, float) and not math.isfinite(value):
        return None  # no program for workbooks knows NaN
    if not isinstance(value, str):
        return value
    text = printable(value)
    text = f"'{text}" if FORMULA.match(text) else text
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}…"


def may_be_replaced(path: Path) -> bool:
    """Whether nothing has this name, or a report that nobody has changed."""
    with suppress(OSError, KeyError, zipfile.BadZipFile):
        if path.suffix == ".png":
            return REPORT_MARK.encode() in path.read_bytes()[:1000]
        with zipfile.ZipFile(path) as archive:
            about = archive.read("docProps/core.xml")
        return f">{REPORT_MARK}<".encode() in about and b"lastModifiedBy" not in about
    return not os.path.lexists(path)


def write_beside(
    name: str,
    tables: dict[str, list[Sequence[Any]]],
    is_free: Callable[[Path], bool] = lambda path: not path.exists(),
) -> Path:
    """The first of NAME.xlsx, NAME-2.xlsx, … in this folder that is free, and whose picture is, too."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    paths = (Path.cwd() / f"{name}.xlsx" for name in names)
    path = next(path for path in paths if is_free(path) and is_free(path.with_suffix(".png")))
    with explained(f"{path.name} could not be written.", "Make room for it."):
        write_book(path, tables)
    return path


# -- Answers before and after

FIGURES_OF_ANSWERS = {
    "overlap": "with the expected answers, from 0 to 1",
    "loss": "per token, mean over the questions; lower is better",
}


def answer_tables(table: pandas.DataFrame) -> dict[str, list[Sequence[Any]]]:
    """A row for each question, and the means of all."""
    means = table.mean(numeric_only=True).dropna().round(3)
    summary: list[Sequence[Any]] = [("what", "value", "which is")]
    for figure, meaning in FIGURES_OF_ANSWERS.items():
        for name in (f"{figure} before", f"{figure} after"):
            if name in means:
                summary.append((f"mean {name}", means[name], meaning))
    summary.append(("questions", len(table), "each asked twice"))
    return {"Answers": sheet_of(table), "Summary": summary}


def exam_tables(exam: Exam) -> dict[str, list[Sequence[Any]]]:
    """The figures and the verdict, and a sheet for each part."""
    import pandas

    figures = pandas.DataFrame(exam.parts).T.rename_axis("part").reset_index()
    figures.columns = [name.replace("_", " ") for name in figures]
    sheets = {"Summary": [*sheet_of(figures), [exam.text]]}
    for part, rows in exam.table.groupby("part", sort=False):
        shown = rows.drop(columns="part").replace("", None).dropna(axis="columns", how="all")
        sheets[str(part)] = sheet_of(shown)
    return sheets


def sheet_of(table: pandas.DataFrame) -> list[Sequence[Any]]:
    """Titles and rows, without what was measured for the speed alone."""
    shown = table.drop(columns=["tokens", "seconds"], errors="ignore").round(3)
    return [[*shown], *shown.astype(object).to_numpy().tolist()]


# -- The report of check on the data


def by_kind(notes: Iterable[Note]) -> dict[str, list[Note]]:
    """Notes of one kind together, whatever row they point to; the most frequent kind first."""
    kinds = defaultdict[str, list[Note]](list)
    for note in notes:
        kinds[note.kind].append(note)
    return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))


def grouped(notes: Sequence[Note]) -> list[str]:
    """One line per kind, with its rows, and their sheets where there are several."""
    several, lines = len({note.sheet for note in notes}) > 1, list[str]()
    for kind, found in by_kind(notes).items():
        rows = [f"{one.row} of {one.sheet}" if several else str(one.row) for one in found]
        places = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if rows[8:] else "")
        lines += [f"{kind}: {len(rows)} rows ({places})" if rows[1:] else f"{kind}: row {places}"]
    return lines


def column_names(pairs: Pairs) -> dict[str, str | None]:
    return dict(zip(("question_column", "answer_column"), [*pairs.used, None, None], strict=False))


def say_pairs(pairs: Pairs) -> None:
    sheet = f', sheet "{preview(pairs.table.sheet)}"' if pairs.table.sheet else ""
    say("Data", f"{pairs.name}{sheet}: {pairs.rows_read} rows, {len(pairs.kept)} pairs")
    if pairs.columns:
        say("Columns", pairs.reason)
        (first, _), titles = pairs.table.rows[0], pairs.used[:2]
        known = any(name_strength(title, role) > 0 for title in titles for role in NAMES)
        if not known and first > 1 and not titles[0].startswith("column "):
            say("Header", f"{' | '.join(titles)}. If this is itself a pair, put a header above it.")
        unused = [name for name in pairs.table.header if name and name not in pairs.used]
        for what, names in ("joined to the question", pairs.used[2:]), ("not used", unused):
            if names:
                quoted = ", ".join(f'"{name}"' for name in names)
                say("", f"{what}: {preview(quoted, 400)}")
    else:
        say("Shape", f"{pairs.shape}; every answer in them is learned")
    for pair in pairs.kept[:3]:
        say("", f"row {pair.row}: {preview(pair.question, 27)} → {preview(pair.answer, 27)}")
    if pairs.dropped:
        say("Left out", "\n".join(grouped(pairs.dropped)[:8]))


def say_quality(data: PreparedData, minimum: float) -> None:
    """What looks wrong, and how many answers people may ask for in several ways."""
    quality, pairs = data.quality, data.pairs
    if quality.counted:
        share = f"{quality.good} of {quality.counted} rows with content are kept and look right"
        say("Quality", "\n".join([f"{quality}: {share}", *grouped(quality.flagged)[:8]]))
    if quality.score < minimum:
        kinds = ", ".join([*by_kind(quality.notes)][:3])
        say("Warning", f"the quality is below {minimum} (MIN_QUALITY). Fix first: {kinds}.")
    counts = Counter(fold(pair.answer) for pair in pairs.kept)
    several = sum(count > 1 for count in counts.values())
    if several:
        say("Wordings", f"answers with more than one question: {several} of {len(counts)}")
    elif pairs.columns and counts:
        tip = "a second wording of some helps when people ask in their own words"
        say("Wordings", f"no answer has more than one question; {tip}")


def token_figures(data: PreparedData) -> dict[str, int]:
    """The lengths of the pairs that are kept; nothing where they were not tokenized."""
    if not data.tokens:
        return {}
    lengths, last = sorted(data.tokens), len(data.tokens) - 1
    shares = {"min": 0, "median": 0.5, "p95": 0.95, "max": 1}
    figures = {name: lengths[round(share * last)] for name, share in shares.items()}
    return figures | {"sum": sum(lengths)}


def write_report(cfg: Config, data: PreparedData) -> Path | None:
    """Every row in a workbook and a picture of the lengths, in this folder if that can be written."""
    source = local_path(cfg.DATASET_PATH).resolve()
    with warned("the report could not be completed"):
        tables = report_tables(cfg, data)
        path = write_beside(REPORT_NAME, tables, lambda p: p != source and may_be_replaced(p))
        draw_lengths(path.with_suffix(".png"), cfg, data)
        return path
    return None


def report_tables(cfg: Config, data: PreparedData) -> dict[str, list[Sequence[Any]]]:
    pairs, quality, kept, dropped = data.pairs, data.quality, [], []
    summary = {
        "file": pairs.name,
        "rows read": pairs.rows_read,
        "pairs kept": len(pairs.kept),
        "rows dropped": len(pairs.dropped),
        "held out for validation": len(data.validation_pairs),
        **{f"tokens in a pair, {name}": figure for name, figure in token_figures(data).items()},
        "quality, from 0 to 1": round(quality.score, 4),
    }
    found = [(what, value, "") for what, value in summary.items()]
    for kind, notes in by_kind(quality.notes).items():
        found.append((kind, len(notes), ", ".join(str(note.row) for note in notes[:50])))
    held_out = set(map(id, data.validation_pairs))
    lengths: list[Any] = data.tokens or [None] * len(pairs.kept)
    for pair, tokens, notes in zip(pairs.kept, lengths, quality.findings, strict=True):
        *turns, _ = (f"{one['role']}: {one['content']}" for one in pair.messages)
        question = "\n\n".join(turns) if turns[1:] else pair.question
        side = "yes" if id(pair) in held_out else "no"
        flaws = "; ".join(note.reason for note in notes)
        kept.append((pair.sheet, pair.row, question, pair.answer, tokens, side, flaws))
    cells = {(part.sheet, number): row for part in pairs.parts for number, row in part.table.rows}
    for note in pairs.dropped:
        content = cells.get((note.sheet, note.row), [])
        text = " | ".join(str(cell) for cell in content if cell)
        dropped.append((note.sheet, note.row, note.reason, text))
    settings = [(name, as_text(value)) for name, value in public_settings(cfg).items()]
    titles = "sheet,row,question,answer,tokens,held out,findings".split(",")
    return {
        "Summary": [("what", "value", "rows (the first 50)"), *found],
        "Kept": [titles, *kept],
        "Dropped": [("sheet", "row", "reason", "content"), *dropped],
        "Settings": [("name", "value"), *settings],
    }


# -- The folder of a run, and its zip


@contextmanager
def explained_disk_errors(folder: Path, need: float, done: str, advice: str) -> Iterator[None]:
    """Report a full or lost disk in one message; safetensors, in Rust, raises no OSError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | zipfile.BadZipFile) and "os error" not in str(error):
            raise
        what = f"{done}{folder} could not be written: {preview(str(error), 200)}."
        raise UserError(f"{what}\n{free_space(folder.parent, need)}{advice}") from error


def own_files(folder: Path) -> list[str]:
    """The files that the run.json of this folder will list as its own, itself and the card included."""
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return sorted({*found, "README.md", "run.json"})


def files_for_others(folder: Path) -> list[Path]:
    """What may be shared: no links, nothing that can run a program, no paths of this computer."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    private = (BASE_PLACE, *PICKLES)
    return [path for path in files if not path.name.lower().endswith(private)]


def write_zip(folder: Path) -> Path:
    """What may be shared, in one zip beside the folder, read back before it gets its name."""
    target = folder.with_name(f"fine_tuned_{folder.name}.zip")  # of ./model: fine_tuned_model.zip
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
        leftover.unlink()
    files = files_for_others(folder)
    need = sum(path.stat().st_size for path in files)
    done, advice = f"The adapter is safe in {folder}, but ", "Make room and run the command again."
    with explained_disk_errors(target, need, done, advice), atomic_write(target) as staged:
        if shutil.disk_usage(folder.parent).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for path in files:
                archive.write(path, path.relative_to(folder))
        with zipfile.ZipFile(staged) as archive:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"{broken} came back damaged")
    return target


def foreign_files(folder: Path) -> set[str]:
    """Files in the folder of a run that it has not put there, and answers that somebody edited."""
    ours = {*record_of(folder).get("files", []), ANSWERS, ANSWERS_PICTURE, EXAM, EXAM_PICTURE}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("[!.]*") if not p.is_dir()}
    return found - ours if may_be_replaced(folder / ANSWERS) else found


def place_for_earlier(final: Path, run: str) -> Path | None:
    """Where to move the model that a new one replaces; None if both are of the same run."""
    if record_of(final).get("run") == run and not foreign_files(final):
        return None
    previous = final.with_name(f"{final.name}.previous")
    is_ours = record_of(previous) and not foreign_files(previous)
    return previous if is_ours else free_name(previous)


def write_visuals(folder: Path, record: dict[str, Any], trained: TrainingResult) -> None:
    """What run.json has, as tables and pictures."""
    folder.mkdir()
    with warned("some tables or pictures of the training could not be written"):
        write_json(folder / "training_metrics.json", record["results"])
        used = record["settings"] | {"device": record["device"]}
        write_json(folder / "training_config.json", used)
        log = training_log(trained).dropna(subset=["loss", "eval_loss"], how="all")
        with atomic_write(folder / "training_metrics.csv") as staged:
            log.to_csv(staged, index=False)
        draw_training_curves(folder / "training_curves.png", log, trained)
        draw_loss_comparison(folder / "loss_comparison.png", log, trained)


def save_run(
    cfg: Config, device: Device, data: PreparedData, trained: TrainingResult, run: str
) -> Path:
    """Everything that lands in OUTPUT_DIR; the exam comes later."""
    final, done = output_folder(cfg), "The training is done, but "
    # the new model and its zip, while the earlier ones are still there
    need, earlier = 2 * (4 * trained.stats.trainable + SMALL_FILES), place_for_earlier(final, run)
    advice = "Make room or choose another --output-dir: the same command then only saves."
    writing = explained_disk_errors(final, need, done, advice)
    with writing, atomic_folder(final, earlier) as staged:
        shutil.copyfile(trained.adapter, staged / ADAPTER)
        # not the checkpoint's settings, which may have come from elsewhere
        adapter = lora_config(cfg, layers_in(trained.adapter))
        adapter.base_model_name_or_path, adapter.inference_mode = base_name(cfg), True
        adapter.save_pretrained(str(staged))
        data.tokenizer.save_pretrained(staged)
        if base := local_base(cfg):
            (staged / BASE_PLACE).write_bytes(os.fsencode(base.resolve()))
            if base.is_relative_to(cache_folder()):  # the demo model, which nobody has elsewhere
                shutil.copytree(base, staged / base.name, copy_function=shutil.copyfile)
        sample = (data.validation_pairs + data.train_pairs)[:ROWS_IN_SAMPLE]
        write_json(staged / SAMPLE, [pair.messages for pair in sample])
        record = run_record(cfg, device, data, trained)
        write_visuals(staged / "training_visuals", record, trained)
        write_record(staged, {"run": run, "files": own_files(staged)} | record)
    return final


def draw_exam(path: Path, exam: Exam) -> None:
    """Each trained question as it is and in other words, the worst at the top."""
    table, finding = exam.table, exam.text.partition(". ")[0]
    lowest = table[table["part"] == IN_OTHER_WORDS].groupby("row")["overlap after"].min()
    taught = table[table["part"] == AS_TAUGHT]
    taught = taught.assign(lowest=taught["row"].map(lowest))
    order = taught[["overlap after", "lowest"]].min(axis=1).sort_values(kind="stable")
    draw_answers(path, "Does it know the data?", finding, taught.loc[order.index], exam.mixed_up)


def add_exam(folder: Path, exam: Exam) -> None:
    """The answers, their pictures and the verdict, in the folder of a finished run."""
    write_book(folder / ANSWERS, exam_tables(exam))
    write_json(folder / EXAM, exam.table.to_dict("records"))
    with warned("some pictures of the answers could not be written"):
        draw_exam(folder / EXAM_PICTURE, exam)
        part = HELD_OUT if HELD_OUT in exam.parts else AS_TAUGHT
        asked, means = exam.table[exam.table["part"] == part], exam.parts[part]
        which = plural(len(asked), "held-out question" if part == HELD_OUT else "trained question")
        meaning = "{overlap before:.2f} before, {overlap after:.2f} after".format(**means)
        title = "Answers before and after the training"
        draw_answers(folder / ANSWERS_PICTURE, title, f"{which}: overlap {meaning}", asked)
    outcome = {name: value for name, value in exam._asdict().items() if name != "table"}
    write_record(folder, record_of(folder) | {"exam": outcome})


# ==================================================================================================
# 11  Chatting
# ==================================================================================================

GRADIO_FLOOR = "6.7"  # also for security
PAGE_OPTIONS: dict[str, Any] = {
    **{"prevent_thread_lock": True, "quiet": True, "ssr_mode": False, "footer_links": []},
    "max_file_size": 1,  # nobody needs to send any
    "css": ".message-markdown-disabled * {white-space: pre-wrap}",  # code keeps its form
}
PAGE_SLIDERS = {  # lowest, highest, step
    **{"TEMPERATURE": (0, 2, 0.05), "TOP_P": (0.01, 1, 0.01), "MAX_TOKENS": (1, 1024, 1)},
    **{"REPETITION_PENALTY": (0.5, 2, 0.05), "SEED": (0, 100, 1)},
}
CHAT_HELP = (
    "/reset starts over, /history on or off sets whether answers use earlier turns, /system TEXT "
    "sets instructions, /save FILE saves the conversation, /quit exits. Ctrl+C stops an answer."
)
HISTORY_OFF = (
    "Each question is asked alone, as in training; /history on adds the conversation so far."
)


def model_to_ask(cfg: Config) -> Run:
    if cfg.BASE and not os.path.exists(local_path(cfg.OUTPUT_DIR)):  # nothing is trained yet
        pin_revision(cfg)
        run = Run(cfg, load_tokenizer(cfg))
        run.model = run.base
        return run
    run = load_tuned(local_path(cfg.OUTPUT_DIR), cfg.LOAD_IN_4BIT)
    base, place = run.cfg.MODEL_NAME, short_path(run.place)
    say("Model", f"{base}, the base of {place}" if cfg.BASE else f"{place}, fine-tuned from {base}")
    if cfg.MODEL_NAME != Config.MODEL_NAME and base_name(cfg) != base:
        say("Note", f"--model-name {cfg.MODEL_NAME} is for training and is ignored here")
    return run


def uses_history(run: Run, cfg: Config) -> bool:
    """Whether answers see the conversation so far: not of a model trained on single questions."""
    dataset = run.record.get("dataset") or {}
    return cfg.BASE or dataset.get("shape") != "question and answer"


def is_interactive() -> bool:
    """Whether somebody sits at a terminal, or at the notebook that this runs in."""
    return sys.stdin is not None and (sys.stdin.isatty() or "ipykernel" in sys.modules)


def questions_given(cfg: Config) -> list[str]:
    """The one of the command line, or else the lines that are piped in."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # of another encoding
    lines = [cfg.QUESTION] if cfg.QUESTION else sys.stdin or []
    if questions := [line.strip() for line in lines if line.strip()]:
        return questions
    raise UserError('There is no question.\nAdd one in quotes: "Why?"')


def typed(prompt: str) -> Iterator[str]:
    """The lines that somebody types at the terminal, until /quit or Ctrl+D."""
    with suppress(ImportError):  # Windows edits lines by itself
        import readline  # noqa: F401  gives input() arrow keys and a history
    while True:
        try:
            line = input(f"\n{prompt}: ").strip()
        except KeyboardInterrupt:
            show("\n/quit exits.", end="")
            continue
        except EOFError:
            line = "/quit"
        if line == "/quit":
            return
        yield line


def print_answer(run: Run, messages: Messages, cfg: Config, notes: TextIO | None = None) -> str:
    """Print an answer as it grows. Ctrl+C ends the answer; with nobody to go on, the program."""
    start, shown, answer = time.perf_counter(), 0, Answer("", 0, stopped=False)
    try:
        for answer in stream_answer(run, messages, cfg):
            show(printable(answer.text[shown:]), end="")
            shown = len(answer.text)
    except KeyboardInterrupt:
        if not is_interactive():
            raise
    show("")
    show(answer_speed(answer, time.perf_counter() - start, cfg), notes)
    return answer.text


def converse(run: Run, cfg: Config) -> int:
    """A chat at the terminal."""
    messages, history = list[dict[str, str]](), uses_history(run, cfg)
    say("Chat", CHAT_HELP if history else f"{CHAT_HELP}\n{HISTORY_OFF}")
    for line in typed("You"):
        command, _, rest = line.partition(" ")
        try:
            if command == "/reset":
                messages = []
                show("A new conversation begins.")
            elif command == "/history":
                history = rest.strip() != "off"
                show("Answers now build on the conversation so far." if history else HISTORY_OFF)
            elif command == "/system":
                cfg, messages = changed(cfg, SYSTEM=user_message(rest.strip())["content"]), []
                show(f"A new conversation {'with these' if rest else 'without'} instructions.")
            elif command == "/save":
                show(f"Saved as {short_path(save_chat(cfg, messages, rest.strip()))}")
            elif line.startswith("/"):
                show(CHAT_HELP if command == "/help" else f"Unknown command {command}. {CHAT_HELP}")
            elif line:
                question = user_message(line)
                show("\nModel: ", end="")
                answer = print_answer(run, [*messages, question] if history else [question], cfg)
                messages += [question, {"role": "assistant", "content": answer}] if answer else []
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            show(str(error))  # and the chat goes on
    return 0


def save_chat(cfg: Config, messages: Messages, name: str) -> Path:
    """As a line of JSON, in the form in which training reads conversations."""
    path = local_path(name)
    if not name or os.path.exists(path):
        raise UserError("/save needs the name of a new file, such as /save chat.jsonl")
    system = [{"role": "system", "content": cfg.SYSTEM}] if cfg.SYSTEM else []
    with atomic_write(path) as staged:
        staged.write_text(json.dumps({"messages": [*system, *messages]}) + "\n", encoding="utf-8")
    return path


# -- Questions to both models


def side_by_side(row: dict[str, Any]) -> str:
    """Both answers in columns, in colour on a terminal without NO_COLOR."""
    from rich import box, console, table, text

    columns = table.Table(box=box.ASCII, show_edge=False, expand=True)
    for title, colour in ("Before: the base model", "yellow"), ("After: the tuned model", "green"):
        header = f"not bold {colour}"
        columns.add_column(title, header_style=header, style=colour, ratio=1, overflow="fold")
    columns.add_row(*(text.Text(printable(row[when])) for when in ("before", "after")))
    screen = console.Console()
    screen.width = min(screen.width, 160)
    with screen.capture() as shown:
        screen.print(columns)
    return shown.get()


def unanswered(text: str, sheet: str = "", row: int = 0) -> Pair:
    return Pair([user_message(text), {"role": "assistant", "content": ""}], sheet, row)


def questions_in_file(cfg: Config) -> list[Pair]:
    """The questions of a file; where it has an answer to one, that is the expected answer."""
    path = local_path(cfg.QUESTIONS)
    if not os.path.exists(path):
        raise UserError(f"There is no file {path}.\nName one with --questions")
    if path.suffix.lower() == ".txt":
        lines = enumerate(decoded(path, path.read_bytes()).splitlines(), start=1)
        found = [unanswered(line.strip(), "", number) for number, line in lines if line.strip()]
    else:
        found = questions_in_tables(path, changed(cfg, DATASET_PATH=str(path)))
    if not found:
        raise UserError(f"{path} has no questions. Write one per row.")
    return found


def questions_in_tables(path: Path, cfg: Config) -> list[Pair]:
    """Pairs as training finds them, and what else stands in the column of questions."""
    found: list[Pair] = []
    try:
        parts = find_pairs(cfg).parts
    except UserError:  # such as a table without answers
        for table in read_tables(path, cfg):
            named = [i for i, h in enumerate(table.header) if name_strength(h, "question") > 1]
            columns = named or range(len(table.header))
            if cfg.QUESTION_COLUMN:
                columns = [column_named(table, "question", cfg.QUESTION_COLUMN)]
            if len(columns) == 1:
                found += questions_in_column(table, columns[0], table.sheet).values()
        if not found:
            raise
        return found
    for part in parts:
        if part.columns:
            every = questions_in_column(part.table, next(iter(part.columns)), part.sheet)
            found += (every | {pair.row: pair for pair in part.kept}).values()
        else:
            found += part.kept
    return found


def questions_in_column(table: Table, column: int, sheet: str) -> dict[int, Pair]:
    found = {}
    for number, row in table.rows:
        if not table.sheet and any(row[len(table.header) :]):
            raise UserError(f"Row {number} has {MORE_CELLS}.")
        if text := one_text(row[column]):
            found[number] = unanswered(text, sheet, number)
    return found


# -- The page


def serve(cfg: Config) -> int:
    """The page in the browser, until Ctrl+C."""
    if is_below(installed_version("gradio"), GRADIO_FLOOR):
        raise UserError(f'The page needs gradio.\npip install "gradio>={GRADIO_FLOOR}"')
    if "COLAB_RELEASE_TAG" in os.environ and not cfg.SHARE:
        raise UserError("On Colab, no browser can reach the page: add --share for a public link.")
    page = page_of(model_to_ask(cfg), cfg)
    try:
        address = {"server_port": cfg.PORT or None, "share": cfg.SHARE}
        _, local, shared = page.launch(**address, **PAGE_OPTIONS)
    except OSError as error:
        raise UserError(f"The page could not be opened: {error}\nTry another --port") from None
    say("Page", f"{shared or local}  (Ctrl+C closes it)")
    page.block_thread()
    return 0


def page_of(run: Run, cfg: Config) -> Any:
    """Two tabs: a chat with the tuned model, and one question to both models."""
    import gradio as gr

    reply, both = page_answers(run, cfg)
    box = {"placeholder": "Your question", "max_length": 8000, "value": cfg.QUESTION}
    examples = [[question] for question in run.record.get("examples") or []]
    with gr.Blocks(title="Ask the tuned model", analytics_enabled=False, fill_height=True) as page:
        with gr.Accordion("Answer settings", open=False), gr.Row():
            sliders = []
            for name, (low, high, step) in PAGE_SLIDERS.items():
                value, label = getattr(cfg, name), name.replace("_", " ").capitalize()
                shape = {"step": step, "label": label, "min_width": 220}
                sliders.append(gr.Slider(low, max(high, value), value, **shape))
        with gr.Tab("Chat"):
            speed_line = gr.Markdown(render=False)
            gr.ChatInterface(
                reply,
                chatbot=gr.Chatbot(render_markdown=False, show_label=False, buttons=["copy"]),
                textbox=gr.Textbox(**box, show_label=False, submit_btn=True, stop_btn=True),
                additional_inputs=sliders,
                additional_outputs=[speed_line],
                examples=examples or None,
                run_examples_on_click=False,
                analytics_enabled=False,
            )
            speed_line.render()
        with gr.Tab("Compare"):
            question = gr.Textbox(**box, label="Question")
            with gr.Row():
                ask, stop = gr.Button("Ask both", variant="primary"), gr.Button("Stop")
            outputs: list[Any] = []
            with gr.Row():
                for side in ("Before", "After"):
                    with gr.Column():
                        shape = {"lines": 9, "max_lines": 9, "buttons": ["copy"]}
                        outputs += [gr.Textbox(label=f"{side} training", **shape), gr.Markdown()]
            if examples:
                gr.Examples(examples, question)
            asking = gr.on([ask.click, question.submit], both, [question, *sliders], outputs)
            stop.click(None, cancels=[asking])
    return page.queue(default_concurrency_limit=1, max_size=20)


def page_answers(run: Run, cfg: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the two tabs do with a question; all text is escaped, since a page would hide tags."""
    import html

    import gradio as gr

    one_at_a_time = threading.Lock()  # the base model is the tuned one with its adapter off

    def growing(messages: Messages, base: bool, values: Any) -> Iterator[tuple[str, str]]:
        try:
            chosen = dict(zip(PAGE_SLIDERS, values, strict=True))
            settings = checked(vars(cfg) | chosen | {"BASE": base})
            with one_at_a_time, closing(stream_answer(run, messages, settings)) as parts:
                start = time.perf_counter()
                for part in parts:
                    yield part.text, answer_speed(part, time.perf_counter() - start, settings)
        except (UserError, RuntimeError, MemoryError) as error:  # raised, it would lock the page
            gr.Warning(html.escape(str(error)))

    def reply(question: str, history: list[Any], *values: float) -> Iterator[tuple[str, str]]:
        messages: Messages = []
        for turns in itertools.pairwise(history if uses_history(run, cfg) else []):
            if turns[1]["role"] == "assistant":  # a question without an answer does not count
                asked, text = (turn["content"][0]["text"] for turn in turns)
                answer = {"role": "assistant", "content": html.unescape(text)}
                messages += [user_message(asked), answer]
        parts = growing([*messages, user_message(question)], cfg.BASE, values)
        yield from ((html.escape(text), speed_line) for text, speed_line in parts)

    def both(question: str, *values: float) -> Iterator[tuple[str, ...]]:
        before = ("", "")
        for before in growing([user_message(question)], True, values):
            yield *before, "", ""
        for after in growing([user_message(question)], False, values):
            yield *before, *after

    return reply, both


# ==================================================================================================
# 12  Export
# ==================================================================================================

EXPORT_ENDINGS = re.compile(r"-(merged|gguf|space)$|\.zip$")  # that OUTPUT_DIR may have
CYLLAMA_FLOOR = "0.2.18"  # with llama.cpp, ready-made
TOKENS_PER_PASS = 512
SHARD = "2GB"  # of merged weights: an upload that breaks off loses no more
# Disk that a GGUF takes at the worst moment, as a share of the merged weights
SHARE_OF_MERGED = {"f16": 1.0, "q8_0": 0.55, "q4_k_m": 1.35}
# The loss may rise by this share; of a GGUF also by 0.02, which counts where it is near zero
LOSS_ALLOWED = {"merged": 0.01, "f16": 0.01, "q8_0": 0.02, "q4_k_m": 0.15}


def exported_name(cfg: Config) -> str:
    return EXPORT_ENDINGS.sub("", local_path(cfg.OUTPUT_DIR).resolve().name)


def gguf_name(cfg: Config) -> str:
    return f"{exported_name(cfg)}-{cfg.QUANTIZE}.gguf"


def export_to(kind: str, cfg: Config, final: Path) -> None:
    """Replace an earlier export of this kind, and nothing else."""
    foreign = os.path.exists(final) and record_of(final).get("export") != kind
    if foreign or Path.cwd().is_relative_to(final.resolve()):
        raise UserError(
            f"{final} holds something other than an export --to {kind}, so it is left alone.\n"
            f"Choose another place: --export-dir {free_name(final.with_name(f'{final.name}-{kind}'))}"
        )
    run = open_run(local_path(cfg.OUTPUT_DIR))
    if run.adapter:
        run.record["adapter"] = checksum(run.folder / ADAPTER)  # the same for all exports of it
    EXPORTS[kind].write(cfg, run, final)


def source_export(kind: str, cfg: Config, run: Run, final: Path, file: str) -> Run:
    """The export to make another from: OUTPUT_DIR itself, the one beside it, or a new one."""
    if run.record.get("export") == kind and (run.folder / file).is_file():
        return run
    folder = final.with_name(f"{exported_name(cfg)}-{kind}")
    is_there = (folder / file).is_file()
    if not is_there or record_of(folder).get("adapter") != run.record.get("adapter"):
        say("First", f"{short_path(folder)}, which later exports reuse; you may delete it")
        export_to(kind, cfg, folder)
    return open_run(folder)


@contextmanager
def export_folder(kind: str, run: Run, final: Path, size: float, file: str = "") -> Iterator[Path]:
    """A folder to fill, which gets its name, a card and its own run.json when it is complete."""
    is_same = record_of(final).get("adapter") == run.record.get("adapter")
    may_go = is_same and kind != "space"  # whose page people edit
    earlier = place_for_earlier(final, run.record.get("run", "") if may_go else "")
    need = size + SMALL_FILES
    advice = "Nothing was left behind. Make room or choose another --export-dir, and try again."
    with explained_disk_errors(final, need, "", advice):
        if shutil.disk_usage(nearest_existing(final)).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_folder(final, earlier) as staged:
            yield staged
            record = run.record | {"export": kind, "files": own_files(staged)}
            write_record(staged, record, EXPORTS[kind].front, EXPORTS[kind].how, file)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a mounted drive may have no hard links
        shutil.copyfile(source, target)


def sample_examples(run: Run) -> list[Example]:
    advice = "Run the training command again: a finished run only writes its files again."
    with explained(f"{run.place} has no rows to measure with ({SAMPLE}).", advice):
        sample = json.loads((run.folder / SAMPLE).read_text(encoding="utf-8"))
        return [encode(run.tokenizer, messages) for messages in sample]


def refuse_higher_loss(kind: str, loss: float, expected: float) -> None:
    """An export that answers worse than the adapter is not written."""
    allowed = expected * (1 + LOSS_ALLOWED[kind]) + (0 if kind == "merged" else 0.02)
    say("Loss", f"{loss:.4f} {kind}, {expected:.4f} before, on the rows of {SAMPLE}")
    if not loss <= allowed:
        raise UserError(
            f"Nothing was written: the loss would rise from {expected:.4f} to {loss:.4f}.\n"
            "Use the adapter as it is; for a GGUF, try --quantize q8_0 or f16"
        )


# -- Merged weights


def export_merged(_: Config, run: Run, final: Path) -> None:
    """The base with the adapter in its weights, as transformers, vLLM and llama.cpp read it.

    An adapter trained on 4-bit weights makes up for their rounding, so it is added to these, but
    dequantized first: bitsandbytes would round the sum once more.
    """
    if not run.adapter:
        raise UserError(f"{run.place} has no adapter to merge.\nName the folder of a training run.")
    examples, four_bit = sample_examples(run), bool(run.record["device"]["four_bit"])
    with export_folder("merged", run, final, run.parameters * bytes_of(run.stored_dtype)) as folder:
        kind = "cuda" if device_here(run.cfg).kind == "cuda" else "cpu"
        device = Device(kind, run.stored_dtype, False, "")
        refuse_small_memory(run.cfg, device, run.parameters)
        say("Merging", f"{run.cfg.MODEL_NAME} with the adapter of {run.place}")
        base = load_base(run.base_settings, device._replace(four_bit=four_bit))
        model: Any = run.with_adapter(base)
        expected = mean_loss(model, examples, TOKENS_PER_PASS)
        if four_bit:
            model = run.with_adapter(model.unload().dequantize())
        model = model.merge_and_unload(safe_merge=True)
        loss = mean_loss(model, examples, TOKENS_PER_PASS)
        refuse_higher_loss("merged", loss, expected)
        model.save_pretrained(folder, max_shard_size=SHARD)
        run.shape.dtype = run.stored_dtype
        run.shape.save_pretrained(folder)  # the base's own config, with its dropout
        for weights in folder.glob("*.safetensors"):  # safetensors lets nobody else read them
            shutil.copymode(folder / "config.json", weights)
        run.tokenizer.save_pretrained(folder)
        settings = json.loads((place := folder / "tokenizer_config.json").read_text("utf-8"))
        # or else llama.cpp would begin each prompt with a token of its own
        write_json(place, settings | {"add_bos_token": False, "add_eos_token": False})
        config, _ = generation_settings(run.cfg, model, run.tokenizer, 0)
        penalty = run.cfg.REPETITION_PENALTY
        config.update(bos_token_id=run.tokenizer.bos_token_id, repetition_penalty=penalty)
        config.save_pretrained(folder)
        shutil.copyfile(run.folder / SAMPLE, folder / SAMPLE)
        losses = {"adapter": expected, "merged": loss, "rows": len(examples)}
        run.record["merged"] = losses | {"four_bit": four_bit}


# -- GGUF, for llama.cpp and all that is built on it

# llama.cpp's own converters, in the source archive of its Python package
CONVERTERS = "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/llama_cpp_python-0.3.36.tar.gz"
CONVERTERS_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER_PARTS = re.compile(r".*?/llama\.cpp/(convert_hf\w+\.py|LICENSE|conversion/.*|gguf-py/.*)")
# A pre-tokenizer that they do not know is taken for GPT-2's; the test of the finished file judges.
CONVERT = """
import runpy, sys
folder, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [folder, f"{folder}/gguf-py"]
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def pre_tokenizer(*what):
    try:
        return known(*what)
    except NotImplementedError:
        return "gpt-2"
TextModel.get_vocab_base_pre = pre_tokenizer
runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")
"""
Q4_K_M = 15  # its number in llama.cpp
HARD_TO_TOKENIZE = """ Why?  Two  blanks,   three\t\ttabs\t and\n\n\nlines\r\n  indented: \u00a0\u200bzero
def f(x):\n    if x:\n        return {'a': [1, 22, 333, 4444, 55555]}  # ok, [INST] <0x0A> {{ braces }} {question}
I'll, we've, DON'T; it's 3.14, 1,000,000 and 50% -- (e.g.) "quoted" ... !!! ### über naïve Ærø ľščťžý İstanbul ß ﬁ Ⅷ ½
Что это? 这是什么？ これは何ですか 이것은 무엇인가 מה זה ما هذا यह क्या है กขค 🚀👩\u200d👩\u200d👧 ✅ 🇸🇰 \U0001f9d1\U0001f3fd trailing """


def export_gguf(cfg: Config, run: Run, final: Path) -> None:
    """One file for llama.cpp, Ollama and LM Studio, tested in llama.cpp; others stay beside it."""
    if is_below(installed_version("cyllama"), CYLLAMA_FLOOR):
        raise UserError(f'GGUF files need llama.cpp.\npip install "cyllama>={CYLLAMA_FLOOR}"')
    tokenizer = getattr(run.tokenizer, "backend_tokenizer", None)
    if getattr(getattr(tokenizer, "model", None), "byte_fallback", True):  # or no such model at all
        raise UserError(
            f"{run.cfg.MODEL_NAME} has a SentencePiece or similar tokenizer, which this script cannot convert.\n"
            "Use --to merged, with transformers or vLLM."
        )
    run, name = source_export("merged", cfg, run, final, "config.json"), gguf_name(cfg)
    weights = sum(path.stat().st_size for path in run.folder.glob("*.safetensors"))
    size = weights * SHARE_OF_MERGED[cfg.QUANTIZE]
    with export_folder("gguf", run, final, size, name) as folder:
        if record_of(final).get("adapter") == run.record.get("adapter"):
            for other in final.glob("*.gguf"):
                if other.name != name:
                    link_or_copy(other, folder / other.name)
        run.tokenizer.save_pretrained(folder)
        (folder / "Modelfile").write_text(modelfile(run, name), "utf-8")
        say("Converting", f"{short_path(run.folder)} to {cfg.QUANTIZE}")
        convert(run.folder, folder / name, cfg.QUANTIZE)
        refuse_bad_gguf(folder / name, run, cfg.QUANTIZE)


def convert(folder: Path, file: Path, precision: str) -> None:
    """By llama.cpp's converter, in a process of its own, and for q4_k_m by its quantizer."""
    from cyllama.llama import llama_cpp

    whole, dtype = file, precision
    if precision == "q4_k_m":
        whole, dtype = file.with_suffix(".partial"), "f16"
    words = (converters(), folder, "--outfile", whole, "--outtype", dtype)
    command = [sys.executable, "-c", CONVERT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    LOG.info("%s", done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.strip() or "it was killed, perhaps for lack of memory").splitlines()[-1]
        raise UserError(f"The conversion failed: {preview(last, 200)}\nUse --to merged.")
    if precision == "q4_k_m":
        options = llama_cpp.LlamaModelQuantizeParams()
        options.ftype, options.nthread = Q4_K_M, os.cpu_count() or 1
        llama_cpp.disable_logging()
        llama_cpp.model_quantize(str(whole), str(file), options)
        whole.unlink()


def converters() -> Path:
    """The folder with llama.cpp's converters, downloaded once and checked."""
    import tarfile

    folder = cache_folder(f"converters-{CONVERTERS_SHA256[:12]}")
    if os.path.isdir(folder):
        return folder
    [archive] = fetch(CONVERTERS)
    content = archive.read_bytes()
    archive.unlink()
    if (found := hashlib.sha256(content).hexdigest()) != CONVERTERS_SHA256:
        raise UserError(f"{CONVERTERS} has the wrong checksum, {found}.\nTry again.")
    with atomic_folder(folder) as staged, tarfile.open(fileobj=io.BytesIO(content)) as packed:
        for member in packed:
            if part := CONVERTER_PARTS.fullmatch(member.name):
                packed.extract(member.replace(name=part[1]), staged, filter="data")
    return folder


def refuse_bad_gguf(file: Path, run: Run, precision: str) -> None:
    """In llama.cpp it has to tokenize and to end as the training did, with hardly a higher loss."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    settings = llama_cpp.LlamaModelParams()
    settings.n_gpu_layers = 0
    with explained(f"llama.cpp cannot open {file.name}.", "Use --to merged."):
        # cyllama 0.2.18 looks for n_vocab on the model, where only a subclass can have it
        model = type("Model", (llama_cpp.LlamaModel,), {})(str(file), settings, verbose=False)
    vocabulary = model.get_vocab()
    model.n_vocab = vocabulary.n_vocab
    prompt = prompt_in_words(run.tokenizer)
    has_special_tokens = bool(special_tokens(run.tokenizer).search(prompt))
    for question in (HARD_TO_TOKENIZE, "\n", " ", "a"):
        expected = encode(run.tokenizer, [user_message(question)])["input_ids"]
        text = prompt.replace("{question}", question)
        if vocabulary.tokenize(text, True, has_special_tokens) != expected:
            raise UserError(
                f"llama.cpp tokenizes the question {preview(question)!r} differently from the training, "
                "so its answers would be bad.\nUse --to merged, with transformers or vLLM."
            )
    if vocabulary.token_eos() != run.tokenizer.eos_token_id:
        raise UserError("llama.cpp would not stop at the end of an answer.\nUse --to merged.")
    loss = loss_in_llama_cpp(model, sample_examples(run))
    refuse_higher_loss(precision, loss, run.record["merged"]["adapter"])


def loss_in_llama_cpp(model: Any, examples: Sequence[Example]) -> float:
    """The mean loss of a token to predict, over all examples together."""
    import numpy as np
    from cyllama.llama import llama_cpp

    losses, settings = [], llama_cpp.LlamaContextParams()
    settings.n_batch = TOKENS_PER_PASS
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    for example in examples:
        ids, labels = example["input_ids"][:-1], example["labels"][1:]
        settings.n_ctx = len(ids)
        context = llama_cpp.LlamaContext(model, settings, verbose=False)
        for start in range(0, len(ids), TOKENS_PER_PASS):
            part = ids[start : start + TOKENS_PER_PASS]
            batch = llama_cpp.LlamaBatch(n_tokens=len(part), embd=0, n_seq_max=1, verbose=False)
            batch.set_batch(part, start, True)
            context.decode(batch)
            for i, label in enumerate(labels[start : start + len(part)]):
                if label != IGNORE:
                    logits = np.array(context.get_logits_ith(i))
                    losses.append(np.logaddexp.reduce(logits) - logits[label])
    return float(np.mean(losses))


def modelfile(run: Run, file: str) -> str:
    """For Ollama: the prompt of the training; of questions taught alone only the last."""
    chat = "".join(text for text, _ in pieces(run.tokenizer, ("user", "assistant", "user")))
    before, _, between, after = re.split(PLACEHOLDER.format("."), chat)
    turns = '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}' + after
    turns += '{{ else if eq .Role "assistant" }}{{ .Content }}' + between
    if not uses_history(run, run.cfg):
        last = "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}"
        turns = last + "{{ .Content }}" + after
    template = before + "{{ if .System }}{{ .System }}\n\n{{ end }}" + turns + "{{ end }}{{ end }}"
    return (
        f'FROM ./{file}\nTEMPLATE """{template}"""\n'
        f"PARAMETER temperature {run.cfg.TEMPERATURE:g}\nPARAMETER top_p {run.cfg.TOP_P:g}\n"
        f"PARAMETER repeat_penalty {run.cfg.REPETITION_PENALTY:g}\n"
        f"PARAMETER num_predict {run.cfg.MAX_TOKENS}\n"
        f"PARAMETER stop {json.dumps(run.tokenizer.eos_token)}\n"
    )


# -- A Space, and the Hub


def export_space(cfg: Config, run: Run, final: Path) -> None:
    """A folder for Hugging Face Spaces: a page that asks a GGUF, run by llama.cpp."""
    name = gguf_name(cfg)
    run = source_export("gguf", cfg, run, final, name)
    with export_folder("space", run, final, (run.folder / name).stat().st_size) as folder:
        link_or_copy(run.folder / name, folder / name)
        (folder / "app.py").write_text(SPACE_APP, "utf-8")
        (folder / "requirements.txt").write_text(f"gradio>={GRADIO_FLOOR}\nxllamacpp\n", "utf-8")


def upload(cfg: Config) -> str:
    """Put OUTPUT_DIR on the Hub, whatever it holds: an adapter, merged weights, GGUF, a Space."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not cfg.HUB_REPO:
        raise UserError("Upload where? Name the repository: --hub-repo YOUR-NAME/my-model")
    if not (token := get_token()):
        raise UserError(
            "No Hugging Face token was found.\nCreate one with write access at "
            "https://huggingface.co/settings/tokens and put it into HF_TOKEN (on Colab: the key icon on the left)."
        )
    run = open_run(local_path(cfg.OUTPUT_DIR))
    files, api = files_to_upload(cfg, run.folder), HfApi(token=token)
    kind, sdk = ("space", "gradio") if run.record.get("export") == "space" else ("model", None)
    try:
        made = api.create_repo(
            cfg.HUB_REPO, repo_type=kind, private=cfg.HUB_PRIVATE, exist_ok=True, space_sdk=sdk
        )
        private = api.repo_info(made.repo_id, repo_type=kind).private
        if cfg.HUB_PRIVATE and not private:
            raise UserError(
                f"{made.repo_id} already exists and is public.\n"
                "Choose another --hub-repo, or add --no-hub-private if that is what you want"
            )
        say("Upload", f"to {made.repo_id}, {'private' if private else 'public'}")
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        message = "By finetune_colab.py"
        api.create_commit(made.repo_id, added, commit_message=message, repo_type=kind)
    except UserError:
        raise
    except Exception as error:  # of the Hub's client, the network or the disk
        found = f"{type(error).__name__}: {getattr(error, 'server_message', None) or error}"
        found = found.replace(token, "…").replace(repr(token)[1:-1], "…")
        raise UserError(
            f"The upload to {cfg.HUB_REPO} failed.\n{preview(found, 300)}\nCheck the name, the token's "
            "write access and the connection; the same command sends only what is still missing."
        ) from None
    return str(made)


def files_to_upload(cfg: Config, folder: Path) -> dict[str, Path]:
    """What may leave this computer, once agreed: nothing of the data, hidden or half-written."""
    rows = {Path(one).name for one in (ANSWERS, ANSWERS_PICTURE, EXAM, EXAM_PICTURE, SAMPLE)}
    files = {}
    for path in files_for_others(folder):
        name = path.relative_to(folder).as_posix()
        if path.name not in rows and path.suffix != ".partial" and "/." not in f"/{name}":
            files[name] = path
    say("Files", f"to upload to {cfg.HUB_REPO}; the rows of your data stay here:")
    for name, path in files.items():
        say("", f"{path.stat().st_size / 1e6:10.2f} MB  {name}")
    agreed = cfg.YES
    with suppress(EOFError):
        if not agreed and is_interactive():
            agreed = input("Upload them? [y/N] ").strip().casefold() in ("y", "yes")
    if not agreed:
        raise UserError("Nothing was uploaded.\nTo upload without being asked, add --yes")
    return files


# -- What each kind of export is


MODEL_FRONT = "{base}{licence}pipeline_tag: text-generation\ntags: [question-answering]\n"


class Export(NamedTuple):
    write: Callable[[Config, Run, Path], None]
    front: str  # of its card, for the Hub
    how: str  # it is asked, on the card
    next: str  # command for {place}, and maybe the GGUF {file} in it


EXPORTS = {
    "merged": Export(
        export_merged,
        f"library_name: transformers\n{MODEL_FRONT}",
        """\
The adapter is merged into the weights; the tokenizer's chat template is the prompt used in training.

```python
from transformers import pipeline

ask = pipeline("text-generation", ".")
messages = [{{"role": "user", "content": {question}}}]
print(ask(messages, return_full_text=False)[0]["generated_text"].strip())
```""",
        "ask it: python finetune_colab.py chat --output-dir {place}",
    ),
    "gguf": Export(
        export_gguf,
        f"library_name: gguf\n{MODEL_FRONT}",
        "- Ollama: `ollama create mine -f Modelfile`, then `ollama run mine`\n"
        "- llama.cpp: `llama-cli -m {file} --jinja`, or `llama-server -m {file} --jinja`\n"
        "- LM Studio: `lms import {file}`, or copy the file into its models folder",
        "ask it: llama-cli -m {place}/{file} --jinja; for Ollama and LM Studio see {place}/README.md",
    ),
    "space": Export(
        export_space,
        "title: {title}\nemoji: 💬\ncolorFrom: blue\ncolorTo: indigo\nsdk: gradio\nsdk_version: 6.31.0\n"
        'python_version: "3.12"\napp_file: app.py\nsuggested_hardware: cpu-basic\n',
        "A page to ask the model, which llama.cpp runs on a processor. To run it on your own computer:\n"
        "`pip install -r requirements.txt`, then `python app.py`.",
        "try it: python app.py in {place}; put it online: python finetune_colab.py export --to hub --output-dir {place} --hub-repo NAME",
    ),
}
SPACE_APP = '''\
"""A page that asks the fine-tuned model, which llama.cpp runs on the processor."""
import html, json, pathlib, urllib.request
import gradio, xllamacpp

folder = pathlib.Path(__file__).parent
run = json.loads((folder / "run.json").read_text("utf-8"))
names = {"temperature": "TEMPERATURE", "top_p": "TOP_P", "repeat_penalty": "REPETITION_PENALTY", "max_tokens": "MAX_TOKENS"}
sampling = {name: run["settings"][setting] for name, setting in names.items()}
alone = run.get("dataset", {}).get("shape") == "question and answer"  # each question was taught alone
options = xllamacpp.CommonParams()
options.model.path = str(next(folder.glob("*.gguf")))
options.n_ctx, options.n_parallel = 4096, 1
server = xllamacpp.Server(options)


def reply(question, history):
    """The answer while it grows; as plain text, so that no answer can change the page."""
    said = [] if alone else [(turn["role"], html.unescape(turn["content"][0]["text"])) for turn in history]
    messages = [{"role": role, "content": text} for role, text in [*said, ("user", question)]]
    body = json.dumps({"messages": messages, "stream": True, **sampling}).encode()
    url, headers = f"{server.listening_address}/v1/chat/completions", {"Content-Type": "application/json"}
    answer = ""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                answer += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                yield html.escape(answer)


page = gradio.ChatInterface(reply, chatbot=gradio.Chatbot(render_markdown=False), title="Ask the tuned model")
page.launch()
'''


# ==================================================================================================
# 13  Commands
# ==================================================================================================

INSTALL = "pip install -r requirements-finetune.txt"
NEEDED_GB = 2  # by phi-2 with the usual adapter: four checkpoints, the model and its zip

# -- The log


def redacted(text: str) -> str:
    """A text without secrets of the environment, and without what follows the path in links."""
    secret = r"(?i)(?<![a-z])(api)?(token|key|secret)s?(?![a-z])|passw(or)?d|credential"
    values = [value.strip() for name, value in os.environ.items() if re.search(secret, name)]
    for value in sorted(values, key=len, reverse=True):
        if len(value) > 5:  # a shorter one would cut up words
            text = text.replace(value, "[secret]")
    return re.sub(r"(?i)\b(https?://|s3://)(?:[^\s/]*@)?([^\s?#]*)(?:[?#]\S*)?", r"\1\2", text)


class LogFile(logging.Handler):
    """Keeps the messages of a command until it is given a path to write them to."""

    lines: list[str] = []
    path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = redacted(self.format(record))
        self.lines += [f"{stamp}  {printable(line)}\n" for line in text.splitlines()]
        if path := self.path:
            self.path = None  # for the warning, which comes here, too
            with warned(f"the log {path} cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(self.lines)
                self.path, self.lines = path, []


LOG_FILE = LogFile()
LOG.handlers = [LOG_FILE]  # in a notebook, an earlier run of this file may have left its own
LOG.setLevel(logging.INFO)
LOG.propagate = False


# -- What would stop training, found before it begins


def refuse_old_packages() -> None:
    below = [
        f"{package} {version or 'is missing'} ({FLOORS[package]} or newer)"
        for package, version in installed_versions().items()
        if package != "matplotlib" and is_below(version, FLOORS[package])  # only for pictures
    ]
    if below:
        raise UserError(f"Packages are missing or too old: {', '.join(below)}.\n{INSTALL}")


def quick_problems(cfg: Config) -> Iterator[str]:
    """What shows at once, without the data and the model."""
    final, states = output_folder(cfg), local_path(cfg.CHECKPOINT_DIR).resolve()
    if cfg.REPORT_TO != "none" and not importlib.util.find_spec(cfg.REPORT_TO):
        yield f"REPORT_TO {cfg.REPORT_TO} is not installed.\npip install {cfg.REPORT_TO}"
    mirror = cfg.CHECKPOINT_MIRROR
    if mirror and not local_path(mirror).resolve().parent.is_dir():
        yield f"CHECKPOINT_MIRROR {mirror} has no parent folder.\nMount the drive, or create the folder."
    for setting, folder in {"OUTPUT_DIR": final.parent, "CHECKPOINT_DIR": states}.items():
        try:
            place = nearest_existing(folder)
            with tempfile.TemporaryDirectory(prefix=".finetune", dir=place) as probe:
                write_json(Path(probe, "test"), "can files be written and renamed here?")
            free = shutil.disk_usage(place).free / 1e9
            if 0 < free < NEEDED_GB:  # some mounted drives do not know
                say("Warning", f"a run may need {NEEDED_GB} GB; {free:.1f} GB are free in {folder}")
        except OSError as error:
            what = f"{setting} cannot be written to {folder}: {error.strerror}"
            yield f"{what}.\nChoose another folder with {flag(setting)}"
    yield from output_problems(cfg, final)


def output_problems(cfg: Config, final: Path) -> Iterator[str]:
    """OUTPUT_DIR replaces what an earlier run left there, and nothing else."""
    is_file = os.path.ismount(final) or (os.path.exists(final) and not os.path.isdir(final))
    if is_file or Path.cwd().is_relative_to(final) or not str(final).isprintable():
        what = f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} must be a folder of its own, with a plain name"
        yield f"{what}, and not the one you are in.\nUse one such as ./model"
        return
    for name, place in ((name, getattr(cfg, name)) for name in PLACES if name != "OUTPUT_DIR"):
        if place and local_path(place).resolve().is_relative_to(final):
            what = f"{name} {place} is inside OUTPUT_DIR {final}, which a new model replaces"
            yield f"{what}.\nMove it, or choose another {flag(name)} or --output-dir"
    base, theirs = str(record_of(final).get("base_model", "")), ""
    if not base and any(final.glob("*")):
        theirs = "files that are not from this script"
    elif base.removeprefix("./") not in ("", DEMO_MODEL) and cfg.MODEL_NAME == DEMO_MODEL:
        theirs = f"your fine-tuned {base}"
    if theirs:
        other = f"Choose a new folder: --output-dir {final / 'model'}"
        yield f"OUTPUT_DIR {final} holds {theirs}, so it is left alone.\n{other}"


def pairs_or_columns(cfg: Config) -> Pairs:
    """The pairs; if it is unclear which columns to use, a person at a terminal is asked."""
    try:
        return find_pairs(cfg)
    except UserError as error:
        of_first_table = str(error).partition("\nIn ")[0]
        unclear = "--question-column" in of_first_table and not cfg.JSON
        if not (unclear and sys.stdin and sys.stdin.isatty()):
            raise
        say("Columns", str(error))
        with suppress(EOFError):
            question = input("The column with the questions: ").strip()
            if answer := question and input("The column with the answers: ").strip():
                typed = changed(cfg, QUESTION_COLUMN=question, ANSWER_COLUMN=answer)
                return pairs_or_columns(typed)
        raise


def examine(
    cfg: Config, offline: bool = False
) -> tuple[list[str], PreparedData | None, Outline | None]:
    """All that would stop training; the data in tokens, and the shape of the model."""
    problems = [*quick_problems(cfg)] if is_main_process() else []

    def attempt(act: Callable[..., Result], *given: Any) -> Result | None:
        try:
            return act(*given)
        except UserError as error:
            if not (offline and isinstance(error, UnreachableError)):
                problems.append(str(error))
        return None

    if cfg.MODEL_NAME == DEMO_MODEL:
        say("Demo", "The model is a toy that can barely spell; everything else is the real thing.")
    if preset := PRESETS.get(cfg.PRESET):
        say("Preset", ", ".join(f"{name} {as_text(getattr(cfg, name))}" for name in preset))
    pairs = attempt(pairs_or_columns, cfg)  # before anything that waits for torch
    if not pairs:
        return problems, None, None
    tokenizer, outline = attempt(find_base, cfg) or (None, None)
    if outline and (device := attempt(device_here, cfg)):
        attempt(adapted_outline, cfg, outline)
        attempt(optimizer_name, cfg, device)
        attempt(refuse_small_memory, cfg, device, outline.parameters)
    data = prepare_data(cfg, pairs, tokenizer)
    say_pairs(data.pairs)
    say_quality(data, cfg.MIN_QUALITY)
    attempt(refuse_unfit, cfg, data)
    return problems, data, outline


def lock_folder(held: ExitStack, folder: Path, setting: str) -> None:
    """Keep a second run out. The lock ends with the process, however that ends."""
    import filelock

    # in the cache of this computer: a mounted drive may know no locks
    place = cache_folder("locks", hashlib.sha256(os.fsencode(folder)).hexdigest()[:16])
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(filelock.FileLock(place, timeout=0))
    except filelock.Timeout:
        what = f"Another run is using {setting} {folder}"
        advice = f"Wait for it to end, stop it, or choose another folder with {flag(setting)}"
        raise UserError(f"{what}.\n{advice}") from None
    except (OSError, NotImplementedError) as error:  # the latter of older filelocks
        say("Note", f"no locks here ({error}): a second run in {setting} would go unnoticed")


# -- Training, and looking before it

LONGEST_EXAMPLE = 8  # lines


def train(cfg: Config) -> int:
    """Teach the model, and leave behind the adapter, the pictures and the zip."""
    with ExitStack() as held:
        with main_process_first():
            if is_main_process():
                lock_folder(held, local_path(cfg.CHECKPOINT_DIR).resolve(), "CHECKPOINT_DIR")
                lock_folder(held, output_folder(cfg), "OUTPUT_DIR")
                for name, value in (public_settings(cfg) | installed_versions()).items():
                    LOG.info("%-28s%s", name, as_text(value))
            problems, data, outline = examine(cfg)
            if problems or not data:
                raise UserError("\n\n".join(problems))
            device, plan = plan_here(cfg, data, outline)
            checkpoints = open_checkpoints(cfg, data, device, plan)
        model, last = None, checkpoints.last
        if not last or not last.stats.finished:
            from transformers import set_seed

            base = load_base(cfg, device)
            set_seed(cfg.SEED)
            model = add_lora(cfg, base)
            train_adapter(model, data, device, plan, checkpoints)
        if is_main_process():
            save_and_report(data, device, checkpoints, model)
    return 0


def plan_here(cfg: Config, data: PreparedData, outline: Outline | None) -> tuple[Device, Plan]:
    """How the training runs on this machine, and what it will cost."""
    device = device_here(cfg)
    plan = plan_run(cfg, data.train, device, outline and adapted_outline(cfg, outline))
    say("Device", device.reason)
    held_out = f"{len(data.validation) or 'none'} held out for validation"
    say("Pairs", f"{len(data.train)} for training, {held_out}")
    if world_size() > 1:
        say("Processes", f"{world_size()}, which share the pairs of every step")
    epochs = plural(round(plan.steps / plan.steps_per_epoch, 2), "epoch")
    size = f"{plural(plan.pairs, 'pair')} per step, {plan.tokens_per_epoch:,} tokens per epoch"
    say("Plan", f"{plural(plan.steps, 'step')} ({epochs}, {size})")
    say("At once", f"at most {plan.tokens_at_once:,} tokens: {plan.reason}")
    cost = cost_in_words(plan.seconds, plan.memory_gb, plan.asking_seconds)
    say("Estimate", f"{cost}; validation and saving are not included")
    return device, plan


def cost_in_words(seconds: float | None, memory_gb: float | None, more: float = 0) -> str:
    memory = f", at most {memory_gb:.1f} GB of memory" if memory_gb else ""
    return f"{in_time(seconds + more)}{memory}" if seconds else "unknown"


def open_checkpoints(cfg: Config, data: PreparedData, device: Device, plan: Plan) -> Checkpoints:
    """The checkpoints of this run, and where its training begins."""
    checkpoints = Checkpoints(cfg, identity_of(cfg, data, device))
    start = checkpoints.starting_point()
    if is_main_process():
        LOG_FILE.path = log_path(cfg, checkpoints.folder.name)
        say("Log", f"{LOG_FILE.path} keeps all messages")
    if not start:
        often = f"every {cfg.SAVE_STEPS} steps and at least every {cfg.SAVE_MINUTES:g} minutes"
        place = short_path(checkpoints.folder)
        say("Saving", f"a checkpoint {often}, in {place}; {resume_hint(cfg)}")
    elif start.stats.finished:
        say("Resume", "this run is finished: no more training, but its files are written again")
    else:
        say("Resume", f"from step {start.step} of {plan.steps}, in {short_path(start.folder)}")
    return checkpoints


def save_and_report(
    data: PreparedData, device: Device, checkpoints: Checkpoints, model: PeftModel | None
) -> None:
    """Everything after the last step: OUTPUT_DIR, the exam, and what came of it all."""
    cfg, last, exam = checkpoints.cfg, checkpoints.last, None
    assert last, "the Trainer saves its last step"
    trained = training_result(cfg, last)
    folder = save_run(cfg, device, data, trained, checkpoints.folder.name)
    if cfg.EVAL_ANSWERS and (cfg.EXAM_QUESTIONS or data.validation_pairs):
        with warned("there will be no answers.xlsx; the adapter is saved"):
            exam = exam_after_training(data, device, checkpoints, model, folder)
    say_result(trained, folder, write_zip(folder))
    if exam:
        say_exam(exam)
    is_usual = cfg.OUTPUT_DIR == Config.OUTPUT_DIR
    place = "" if is_usual else f" --output-dir {shlex.quote(cfg.OUTPUT_DIR)}"
    say("Next", f"chat with it: python finetune_colab.py chat{place}")


def exam_after_training(
    data: PreparedData,
    device: Device,
    checkpoints: Checkpoints,
    model: PeftModel | None,
    folder: Path,
) -> Exam:
    """The exam of the model in this folder; what was answered before is not asked again."""
    from safetensors.torch import load_file

    cfg, adapter = checkpoints.cfg, folder / ADAPTER
    counts = f"{cfg.EXAM_QUESTIONS}-{cfg.EVAL_ANSWERS}-{cfg.MAX_TOKENS}"
    resume = checkpoints.folder / f"exam-{checksum(adapter)[:12]}-{counts}.json"
    run = Run(cfg, data.tokenizer)
    if len(answered_parts(resume)) < len(PARTS):
        write_zip(folder)  # now, since the questions take a while
        run.model = model or add_lora(cfg, load_base(cfg, device))
        put_adapter(run.model, load_file(adapter))
        say("Asking", f"{exam_in_words(cfg, data)}; the adapter is already saved")
    exam = take_exam(run, cfg, data, resume)
    add_exam(folder, exam)
    return exam


def exam_in_words(cfg: Config, data: PreparedData) -> str:
    asked = plural(min(cfg.EXAM_QUESTIONS, len(data.train_pairs)), "trained question")
    held_out = plural(min(cfg.EVAL_ANSWERS, len(data.validation_pairs)), "held-out question")
    return f"{asked}, also in other words, and {held_out}"


def say_exam(exam: Exam) -> None:
    """One example, the worst answers to what was taught, and the verdict."""
    parts = {part: figures for part, figures in exam.parts.items() if part != ELSEWHERE}
    if not parts:
        return
    say_examples("Question", exam.table.head(1), ("expected", "before", "after"))
    is_taught = exam.table["part"].isin([AS_TAUGHT, IN_OTHER_WORDS])
    wrong = exam.table[is_taught & (exam.table["right"] == WRONG)]
    worst = wrong.sort_values("overlap after", kind="stable").head(EXAMPLES_SHOWN)
    say_examples("Wrong", worst, ("expected", "after"))
    scores = [f"{part.lower()} {one['right']} of {one['asked']}" for part, one in parts.items()]
    say("Exam", f"right answers: {', '.join(scores)}")
    if taught := parts.get(AS_TAUGHT):
        count = f"{taught['word_for_word']} of {taught['asked']} answers"
        say("Result", f"{count} are what was taught, apart from case and punctuation")
    if exam.text:
        say("Verdict", exam.text)


def say_examples(label: str, table: pandas.DataFrame, names: Sequence[str]) -> None:
    """Questions, each with these of its answers; maybe none is expected."""
    for row in table.to_dict("records"):
        place = f"row {row['row']}: " if row["row"] else ""
        say(label, place + preview(row["question"], 130))
        for name in names:
            if row[name] or name != "expected":
                say(f"  {name}", preview(row[name], 130) or "(nothing)")


def say_answers(table: pandas.DataFrame) -> None:
    """The first few, and the figures of all."""
    say_examples("Question", table.head(EXAMPLES_SHOWN), ("expected", "before", "after"))
    tokens, seconds, cut_off = (table[name].sum() for name in ("tokens", "seconds", "cut off"))
    say("Speed", speed(int(tokens), seconds, int(cut_off), 2 * len(table)))
    means = table.mean(numeric_only=True)
    for figure, meaning in reversed(FIGURES_OF_ANSWERS.items()):
        before, after = (means.get(f"{figure} {when}", math.nan) for when in ("before", "after"))
        if not math.isnan(before):
            say(figure.capitalize(), f"{before:.2f} before, {after:.2f} after: {meaning}")
    if exact := sum(table["after"] == table["expected"]):
        count = f"{exact} of {len(table)} answers"
        say("Result", f"{count} match the expected answer word for word")


def say_result(trained: TrainingResult, folder: Path, archive: Path) -> None:
    before, after, stats = trained.base_loss, trained.final_loss, trained.stats
    if before is not None and after is not None:
        change = f"{abs(1 - after / before):.0%} {'lower' if after < before else 'HIGHER'}"
        say("After", f"validation loss {after:.3f}, was {before:.3f}: {change}")
    took = cost_in_words(stats.seconds, stats.peak_memory_gb)
    estimated = cost_in_words(stats.estimated_seconds, stats.estimated_memory_gb)
    speed = f"{trained.tokens / stats.seconds:,.0f} tokens per second"
    say("Time", f"{took} (estimated: {estimated}); {speed}")
    say("Saved", f"the adapter in {short_path(folder)}, with pictures in training_visuals")
    if (earlier := folder.with_name(f"{folder.name}.previous")).exists():
        say("", f"the model that was there before is in {short_path(earlier)}")
    say("Download", f"{short_path(archive)} (on Colab: the folder icon at the left, then ⋮)")


def check(cfg: Config) -> int:
    """Say what training would do: 0 when it would go ahead, 1 when it would refuse."""
    report = None
    with ExitStack() as after:
        after.callback(gc.set_threshold, *gc.get_threshold())
        after.callback(gc.unfreeze)  # with the next line: what was imported is not looked through
        after.callback(gc.freeze)
        gc.set_threshold(0)  # to look for cycles in all that is imported takes a tenth of the time
        if cfg.JSON:
            after.enter_context(redirect_stdout(sys.stderr))
        problems, data, outline = examine(cfg, offline=True)
        for problem in problems:
            say("Problem", problem)
        if data and data.tokenizer and not problems:
            plan_here(cfg, data, outline)
            if outline and cfg.MODEL_NAME != DEMO_MODEL:
                say("On Colab", f"estimated, not timed: {cost_on_colab(cfg, data, outline)}")
        if data:
            report = say_report(cfg, data)
    if cfg.JSON:
        show(json.dumps(check_record(cfg, data, problems, report)))
    return 1 if problems else 0


def cost_on_colab(cfg: Config, data: PreparedData, outline: Outline) -> str:
    costs, model = [], adapted_outline(cfg, outline)
    for name, (capability, figures) in GPUS.items():
        plan = plan_run(cfg, data.train, choose_device(cfg, "cuda", capability, *figures), model)
        costs.append(f"{name} {cost_in_words(plan.seconds, plan.memory_gb, plan.asking_seconds)}")
    return "; ".join(costs)


def say_report(cfg: Config, data: PreparedData) -> Path | None:
    """The lengths, one pair as the model sees it, and where the report is."""
    if data.tokens:
        figures = token_figures(data)
        say("Tokens", "{min} to {max} per pair, median {median}".format(**figures))
    if data.train:
        middle = sorted(data.train, key=tokens_in)[len(data.train) // 2]
        say("Example", "what the model reads; it learns the text between [[ and ]]:")
        for line in marked(data.tokenizer, middle).split("\n")[:LONGEST_EXAMPLE]:
            say("", preview(line, 300))
    if not data.tokenizer:
        say("Note", f"the tokenizer of {cfg.MODEL_NAME} is missing: check again online")
    if path := write_report(cfg, data):
        picture = short_path(path.with_suffix(".png"))
        say("Report", f"every row in {short_path(path)}, the lengths in {picture}")
    return path


def check_record(
    cfg: Config, data: PreparedData | None, problems: list[str], report: Path | None
) -> dict[str, Any]:
    """What `check --json` prints; every key is there, whatever was found."""
    if not data:
        name = local_path(redacted(cfg.DATASET_PATH)).name
        nothing = Pairs(name, "", Table("", [], []), "", {}, "", [], [], 0)
        data = PreparedData(None, nothing, quality_of([], []), [], [], [], [], [], [])
    pairs, quality = data.pairs, quality_record(data.quality)
    return {
        "ready": not problems,
        "file": pairs.name,
        "shape": pairs.shape or None,
        "sheet": pairs.table.sheet or None,
        **column_names(pairs),
        "rows_read": pairs.rows_read,
        **dict.fromkeys(("pairs_kept", "pairs_unique"), len(pairs.kept)),
        "pairs_held_out": len(data.validation_pairs),
        "other_tables": pairs.other_tables,
        "dropped": [
            {"sheet": note.sheet, "row": note.row, "reason": note.reason} for note in pairs.dropped
        ],
        "quality": quality["score"],
        "quality_parts": quality["parts"],
        "problems": problems + grouped(data.quality.flagged),
        "tokens": token_figures(data) or None,
        "report": str(report) if report else None,
    }


# -- What comes after it

OF_EXAM = (  # what may be given anew; the other settings are those of the training
    "DATASET_PATH SHEET QUESTION_COLUMN ANSWER_COLUMN EXAM_QUESTIONS EVAL_ANSWERS MAX_TOKENS".split()
)


def refuse_untrained(cfg: Config) -> None:
    if not os.path.exists(local_path(cfg.OUTPUT_DIR)) and not cfg.BASE:
        raise UserError(
            f"There is no trained model at {cfg.OUTPUT_DIR}.\n"
            "Train one with: python finetune_colab.py train; or name one with --output-dir"
        )


def chat(cfg: Config) -> int:
    """Ask the tuned model, in the terminal or with --web in the browser."""
    if cfg.WEB:
        return serve(cfg)
    if not cfg.QUESTION and is_interactive():
        return converse(model_to_ask(cfg), cfg)
    questions, code = questions_given(cfg), 0
    with redirect_stdout(sys.stderr):  # a program may read the answers
        run = model_to_ask(cfg)
    for question in questions:
        try:
            print_answer(run, [user_message(question)], cfg, notes=sys.stderr)
        except UserError as error:
            code = 2
            show(str(error), sys.stderr)
    return code


def compare(cfg: Config) -> int:
    """Put the same questions to the base and the tuned model."""
    if cfg.QUESTIONS:
        return compare_all(cfg)
    typing = not cfg.QUESTION and is_interactive()
    questions = typed("Question") if typing else questions_given(cfg)
    with nullcontext() if typing else redirect_stdout(sys.stderr):
        run = model_to_ask(cfg)
    for question in itertools.takewhile(bool, questions):
        for row in ask_both(run, [unanswered(question)], cfg):
            show(side_by_side(row))
            show(f"({speed(row['tokens'], row['seconds'], row['cut off'], 2)})", sys.stderr)
    return 0


def compare_all(cfg: Config) -> int:
    """A file of questions, with the answers in a workbook."""
    import pandas

    pairs, run = questions_in_file(cfg), model_to_ask(cfg)
    say("Asking", f"{plural(len(pairs), 'question')}, each twice; Ctrl+C keeps the answers so far")
    rows = list[dict[str, Any]]()
    try:
        for row in ask_both(run, pairs, cfg):
            rows.append(row)
    except KeyboardInterrupt:
        if not rows:
            raise
        say("Note", f"stopped after {len(rows)} of {len(pairs)} questions")
    if not rows:
        return 2
    table = pandas.DataFrame(rows, columns=COMPARED)
    say_answers(table)
    say("Saved", short_path(write_beside("compare", answer_tables(table))))
    return 0


def exam(cfg: Config) -> int:
    """Whether a finished run knows its data: a workbook, a picture and a verdict."""
    opened = open_run(local_path(cfg.OUTPUT_DIR))  # its data may be refused before its weights load
    own = {name: getattr(cfg, name) for name in OF_EXAM if name in cfg._given}
    settings = changed(opened.cfg, **own)
    if settings.DATASET_PATH.endswith("/…"):
        raise UserError("run.json does not keep the link to its data.\nGive it with --dataset-path")
    data = prepare_data(settings, pairs_or_columns(settings), opened.tokenizer)
    pairs = fingerprint([pair.messages for pair in data.pairs.kept])
    if pairs != (opened.record.get("dataset") or {}).get("sha256_of_pairs"):
        other = "is not what the model was trained on, or has changed since"
        say("Note", f"{data.pairs.name} {other}")
    run = model_to_ask(cfg)
    say("Asking", exam_in_words(settings, data))
    found = take_exam(run, settings, data)
    say_exam(found)
    path = write_beside("exam", exam_tables(found))
    say("Saved", short_path(path))
    with warned("the picture could not be written"):
        draw_exam(path.with_suffix(".png"), found)
        say("", f"with a picture in {short_path(path.with_suffix('.png'))}")
    return 0


def export(cfg: Config) -> int:
    """Take the model elsewhere: merged weights, GGUF, a Space, the Hub."""
    if not cfg.TO:
        raise UserError("Export to what? Add --to merged, gguf, space or hub; see finetune.md.")
    LOG_FILE.path = log_path(cfg)
    if cfg.TO == "hub":
        say("Saved", f"{upload(cfg)}; open it in your browser")
        return 0
    final = local_path(cfg.OUTPUT_DIR).absolute().with_name(f"{exported_name(cfg)}-{cfg.TO}")
    if cfg.EXPORT_DIR:
        final = local_path(cfg.EXPORT_DIR).absolute()
    with ExitStack() as held:
        lock_folder(held, final, "EXPORT_DIR")
        export_to(cfg.TO, cfg, final)
    place = short_path(final)
    say("Saved", place)
    say("Next", EXPORTS[cfg.TO].next.format(place=place, file=gguf_name(cfg)))
    return 0


# -- The command line

COMMANDS = {act.__name__: act for act in (train, check, chat, exam, compare, export)}
COMMANDS["demo"] = train
ONLY_WITH = {  # settings that would do nothing with any other command
    "BASE WEB SHARE PORT": "chat",
    "SYSTEM QUESTION": "chat or compare",
    "QUESTIONS": "compare",
    "JSON": "check",
    "TO QUANTIZE EXPORT_DIR HUB_REPO HUB_PRIVATE": "export",
}
SMALL_ADAPTER = {"LORA_TARGETS": ["attention"], "LORA_R": 8, "LORA_ALPHA": 16}
LARGE_ADAPTER = {"LORA_R": 32, "LORA_ALPHA": 64, "LEARNING_RATE": 1e-4}
PRESETS: dict[str, dict[str, Any]] = {  # of others than the defaults
    "quick": {"NUM_EPOCHS": 1, **SMALL_ADAPTER, "EVAL_ANSWERS": 5, "EXAM_QUESTIONS": 5},
    "quality": {"NUM_EPOCHS": 8, **LARGE_ADAPTER, "EARLY_STOPPING_PATIENCE": 3},
    "low-memory": {**SMALL_ADAPTER, "TOKENS_AT_ONCE": 512, "GRADIENT_CHECKPOINTING": True},
}
DEMO = {  # what the demo model needs to memorize its data, which costs it the held-out questions
    **{"MODEL_NAME": DEMO_MODEL, "LEARNING_RATE": 1e-2, "BATCH_SIZE": 10, "KEEP_BEST": False},
    **{"GRADIENT_ACCUMULATION_STEPS": 1, "MAX_STEPS": 500, "EVAL_STEPS": 100, "SAVE_STEPS": 500},
}
USUAL = (  # the settings that --help shows
    "DATASET_PATH QUESTION_COLUMN ANSWER_COLUMN OUTPUT_DIR LEARNING_RATE NUM_EPOCHS PRESET".split()
)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The command line, derived from Config."""
    parser = argparse.ArgumentParser(
        prog="finetune_colab.py",
        usage="%(prog)s [COMMAND] [QUESTION] [--SETTING VALUE ...]",
        description=(__doc__ or "").partition("\n\nMap")[0],
        epilog="Exit codes: 0 done, 1 check found a problem, 2 something to fix;\n"
        "130, 143 or 129 after Ctrl+C, SIGTERM or SIGHUP.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 79),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="a YAML file with settings: NAME: value")
    parser.add_argument("--help-all", action="help", help="show every setting")
    found = installed_versions().items() if "--version" in argv else ()
    versions = "\n".join(f"{name} {version}" for name, version in found)
    parser.add_argument(
        "--version", action="version", version=versions, help="show the versions of the packages"
    )
    notes: dict[str, str] = {}
    if {"-h", "--help", "--help-all"} & {*argv}:  # it takes a fifth of a second
        with suppress(OSError, TypeError):  # pasted into a cell, the flags have no help texts
            source = inspect.getsource(Config)
            notes = dict(re.findall(r"(?m)^    ([A-Z0-9_]+): .*?  # (.+)$", source))
    shown = USUAL if [*argv] in (["-h"], ["--help"]) else TYPES
    for name, kind in TYPES.items():
        choices = ", ".join(filter(None, CHOICES.get(name, ())))
        value = getattr(Config, name)
        default = "None" if value is None else as_text(value) or "empty"
        about = "; ".join(filter(None, (notes.get(name), choices and f"one of {choices}")))
        text = f"{about} (default: {default})".strip().replace("%", "%%")
        is_switch = kind in (bool, bool | None)
        how: Any = {"action": argparse.BooleanOptionalAction} if is_switch else {"metavar": "VALUE"}
        how["help"] = text if name in shown else argparse.SUPPRESS
        parser.add_argument(flag(name), dest=name, **how)
    return parser


def read_settings_file(path: Path) -> dict[str, Any]:
    """Settings from a YAML file that uses the names of Config: each value as it is written."""
    import yaml

    try:
        content = dict(yaml.BaseLoader(path.read_text("utf-8-sig")).get_single_data() or {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        advice = "Write one setting per line, such as LEARNING_RATE: 1e-4"
        raise UserError(f"The file {path} cannot be read as YAML: {error}\n{advice}") from None
    written = {str(name).upper().replace("-", "_"): value for name, value in content.items()}
    return {name: None if value == "null" else value for name, value in written.items()}


def read_command_line(argv: Sequence[str]) -> tuple[str, Config]:
    """The command and its settings: of Config, a preset, the demo, the file, the flags."""
    try:
        found, unknown = build_parser(argv).parse_known_intermixed_args([*argv])
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.\n--help-all lists every flag.") from None
    if unknown:
        word = unknown[0].partition("=")[0]
        meant = did_you_mean({"--lr": "--learning-rate"}.get(word, word), map(flag, TYPES))
        raise UserError(f"There is no flag {word}.{meant}\n--help-all lists every flag.")
    flags = vars(found)
    command, *words = flags.pop("words", []) or ["train"]
    if command not in COMMANDS:
        meant = did_you_mean(command, COMMANDS)
        raise UserError(f"There is no command {command!r}.{meant}\n--help lists the commands.")
    if words:
        flags["QUESTION"] = " ".join(words)
    file = flags.pop("config", None)
    own = (read_settings_file(Path(file)) if file else {}) | flags
    values = PRESETS.get(str(own.get("PRESET", Config.PRESET)), {})
    if command == "demo" or own.get("MODEL_NAME", Config.MODEL_NAME) == DEMO_MODEL:
        values = values | DEMO | ({"DATASET_PATH": EXAMPLE_DATASET} if command == "demo" else {})
    cfg = checked(values | own)
    for names, commands in ONLY_WITH.items():
        for name in names.split():
            if command not in commands and getattr(cfg, name) != getattr(Config, name):
                raise UserError(f"{name} ({flag(name)}) is for {commands}, not for {command}.")
    cfg.WEB |= cfg.SHARE  # what is shared is the page
    cfg._given = frozenset(own)
    return command, cfg


@only_main_process_prints()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is its exit code."""
    cfg = Config()
    if argv is None:  # in a notebook kernel the arguments are the kernel's own
        argv = [] if Path(sys.argv[0]).name.endswith("kernel_launcher.py") else sys.argv[1:]
    # read when torch is first imported
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # by the processor
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # fewer gaps in memory
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy processor
    give_width(sys.stderr)
    for library in NOISY:  # before anything imports them
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        command, cfg = read_command_line(argv)
        refuse_old_packages()
        works = is_main_process() or command in ("train", "demo")
        if works and command not in ("train", "check", "demo"):
            refuse_untrained(cfg)
        code = COMMANDS[command](cfg) if works else 0
        if command == "check" and code == 0:
            words = shlex.join(word for word in argv if word not in ("check", "--json"))
            again = f"python finetune_colab.py {printable(words)}".strip()
            if redacted(words) != words:
                again = "the same command, without the word check"
            stream = sys.stderr if cfg.JSON else sys.stdout
            show(f"{'Ready':<11}train with  {again}", stream)  # in one line, to be copied
        return code
    except SystemExit as done:  # argparse leaves this way after --help
        return int(done.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        code, why = ending(error, cfg)
        if not why:
            LOG_FILE.path = LOG_FILE.path or log_path(cfg)
            LOG.exception("Stopped    by an unexpected error:")
            raise
        if is_main_process() or (code == 2 and why != ENDED):  # of several processes, one speaks
            errors = sys.stderr if is_main_process() else sys.__stderr__
            show("", errors)
            say("Stopped", why, errors)
        return code
    finally:
        LOG_FILE.lines, LOG_FILE.path = [], None


def give_width(terminal: TextIO) -> None:
    """Colab's terminal says that it has 0 columns, which leaves a bar no room."""
    with suppress(AttributeError, ImportError, OSError, ValueError):  # no terminal, or Windows
        import termios

        if not os.get_terminal_size(terminal.fileno()).columns:
            termios.tcsetwinsize(terminal.fileno(), (24, 80))


def ending(error: BaseException, cfg: Config) -> tuple[int, str]:
    """The exit code, and what to tell the person; nothing about an unexpected error."""
    if isinstance(error, KeyboardInterrupt):
        done = str(error) or f"Whatever was finished or saved is untouched; {resume_hint(cfg)}."
        return 128 + getattr(error, "number", signal.SIGINT), f"Interrupted. {done}"
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, ModuleNotFoundError):
        return 2, f"The package {error.name} is missing.\n{INSTALL}"
    if "by peer" in str(error) and world_size() > 1:
        return 2, ENDED
    if memory_fault(error):
        return 2, f"Memory ran out: {preview(str(error), 100)}\n{LEVERS}"
    return 1, ""


if __name__ == "__main__":
    import atexit

    atexit.register(gc.freeze)  # or else Python looks for cycles once more, for a third of a second
    code = main()
    if code:  # a notebook shows even sys.exit(0) as an error
        sys.exit(code)

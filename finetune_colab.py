"""Teach a language model your questions and answers: a script, a workbook, a zip.

    python finetune_colab.py          train microsoft/phi-2 on dataset.xlsx
    python finetune_colab.py check    what training would do with the data
    python finetune_colab.py demo     the whole job on a small built-in model
    python finetune_colab.py chat     chat with the tuned model; --web: a page
    python finetune_colab.py compare  the base and the tuned model side by side
    python finetune_colab.py export   --to merged, gguf, space or hub
    python finetune_colab.py --help   usual settings; --help-all: all of Config

What a run leaves behind
    model/                   the LoRA adapter, its tokenizer, pictures, run.json
    fine_tuned_model.zip     all of model/ in one file to download
    checkpoints/, logs/      to resume the training; all that each run said
    dataset_report.xlsx      from check: what was found in every row

Map: the file reads as the data flows, and each section calls only sections above it.
    1 settings and errors    4 prompts and tokens    7 training     10 chatting
    2 where data comes from  5 device and plan       8 answering    11 export
    3 rows to pairs          6 models                9 report       12 commands
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
import shutil
import signal
import statistics
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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, TypedDict, TypeVar

if TYPE_CHECKING:  # the heavy libraries load inside the functions that need them
    import pandas
    import torch
    import transformers
    from peft import PeftConfig, PeftModel
    from transformers import Trainer, TrainerCallback
else:  # Fit.built_trainer joins the two classes that extend these with the real ones
    Trainer = TrainerCallback = object

# ==================================================================================================
# 1  Settings and errors
# ==================================================================================================


class Config:
    """Every setting, once. Edit a value here, or give its flag: LORA_R is also --lora-r."""

    # -- Preset
    PRESET: str = ""  # a set of settings at once, in place of those below; flags still win
    # -- Model
    MODEL_NAME: str = "microsoft/phi-2"  # a model on the Hub, a folder with one, or "demo"
    MODEL_REVISION: str = ""  # a commit of that model; empty = the pinned one, or else the newest
    LOAD_IN_4BIT: bool | None = None  # weights in 4 bits; None = yes on an NVIDIA GPU, else no
    PROMPT_TEMPLATE: str = ""  # how to ask, around {question}; empty = in the model's own way
    # -- Data
    DATASET_PATH: str = "dataset.xlsx"  # a workbook, .csv, .jsonl, ...; also a link, s3:// or hf:
    SHEET: str = ""  # the sheet of the workbook to read; empty = all that belong together
    QUESTION_COLUMN: str = ""  # the header of the column with the questions; empty = find it
    ANSWER_COLUMN: str = ""  # the header of the column with the answers; empty = find it
    MAX_LENGTH: int = 512  # tokens in one question with its answer; longer rows are left out
    LANGUAGE: str = "en"  # of message trees such as OASST1, the one language to take; empty = all
    CONVERSATION_PATHS: str = "best"  # of message trees: the best-ranked replies, or all
    VALIDATION_FRACTION: float = 0.1  # share of the questions held out to measure; 0 = train on all
    MIN_QUALITY: float = 0.85  # warn when a smaller share of the rows is fit to learn from
    # -- Output
    OUTPUT_DIR: str = "./model"  # the finished adapter; the zip is written beside this folder
    CHECKPOINT_DIR: str = "./checkpoints"  # saved states of the training, a folder for each run
    CHECKPOINT_MIRROR: str = ""  # a folder for copies of these, such as one on a mounted Drive
    ARCHIVE_CHECKPOINTS: bool = False  # also zip each of these, to download it by hand
    LOG_DIR: str = "./logs"  # what each training said and measured, a file for each
    # -- LoRA
    LORA_R: int = 16  # rank: how much the adapter can learn; 8 to 64 is usual
    LORA_ALPHA: int = 32  # strength of the adapter; twice the rank is usual
    LORA_DROPOUT: float = 0.05  # share of the adapter's input switched off while training
    LORA_TARGETS: list[str] = ["all-linear"]  # which layers: names, all-linear, attention or mlp
    LORA_LAYERS: str = ""  # of which blocks, counted from 0: 16-31, or 0,31; empty = of all
    USE_RSLORA: bool = False  # strength alpha/sqrt(rank), not alpha/rank: for ranks of 64 and more
    USE_DORA: bool = False  # learn length and direction apart: a little better, much slower
    LORA_INIT: str = "default"  # how the adapter begins
    # -- Training
    LEARNING_RATE: float = 2e-4  # size of a step at its peak; 1e-4 to 3e-4 is usual for LoRA
    BATCH_SIZE: int = 4  # times the next number: the pairs that decide each step, here 16
    GRADIENT_ACCUMULATION_STEPS: int = 4  # how many go through at once is chosen by their tokens
    TOKENS_AT_ONCE: int = 0  # in memory at once, at most; 0 = as many as fit and bring speed
    NUM_EPOCHS: int = 5  # times the model sees every pair
    MAX_STEPS: int = 0  # stop after so many steps; 0 = as many as NUM_EPOCHS needs
    OPTIMIZER: str = "auto"  # auto = paged_adamw_32bit on an NVIDIA GPU, else adamw_torch
    LR_SCHEDULER: str = "cosine"  # how the step size falls after its peak
    WARMUP_RATIO: float = 0.03  # share of the steps in which the step size rises from zero
    WEIGHT_DECAY: float = 0.0  # pull of the adapter towards zero; 0 to 0.1
    MAX_GRAD_NORM: float = 0.3  # longest gradient; a longer one is shortened to it; 0 = never
    GRADIENT_CHECKPOINTING: bool | None = None  # recompute, not remember; None = if memory is short
    PACKING: bool = True  # short pairs share a row; False = a row for each: slower, the same result
    NEFTUNE_ALPHA: float = 0.0  # noise on the words while training; 5 is usual; 0 = none
    FAST_ADAPTER: bool = True  # a layer and its adapter as one operation; False = as peft does it
    SEED: int = 42  # decides the held-out pairs, the order of the rows and the dropout
    # -- Measuring and saving
    EVAL_STEPS: int = 0  # measure the validation loss every so many steps; 0 = after every epoch
    LOGGING_STEPS: int = 1  # write down the training loss every so many steps
    SAVE_STEPS: int = 50  # save a checkpoint every so many steps
    SAVE_MINUTES: float = 10.0  # and at least every so many minutes
    RESUME: bool = True  # go on from the newest checkpoint of the same run
    RESUME_FROM_CHECKPOINT: str = ""  # go on from this one: a folder checkpoint-N, or its zip
    KEEP_BEST: bool = True  # keep the adapter with the lowest validation loss, not the last one
    EARLY_STOPPING_PATIENCE: int = 0  # stop after so many measurements without progress; 0 = never
    REPORT_TO: str = "none"  # where else the curves are sent
    # -- Answering
    EVAL_ANSWERS: int = 20  # held-out questions asked before and after the training; 0 = none
    MAX_TOKENS: int = 256  # of an answer, at most
    TEMPERATURE: float = 0.0  # chance in answers: 0 = always the likeliest token; 0.7 is lively
    TOP_P: float = 1.0  # with chance: take the likeliest tokens that make up this share
    REPETITION_PENALTY: float = 1.0  # above 1, what was said gets less likely
    SYSTEM: str = ""  # chat, compare: instructions that go before the first question
    QUESTION: str = ""  # chat, compare: this one question only; the flag itself may be left out
    QUESTIONS: str = ""  # compare: a file of questions, with or without the answers wanted
    BASE: bool = False  # chat: with the base model as it was before the training
    WEB: bool = False  # chat: a page in the browser
    SHARE: bool = False  # chat --web: also under a public link, which Colab needs
    PORT: int = 0  # chat --web: the page is at this port; 0 = the first free one from 7860
    # -- Export
    TO: str = ""  # export: what to make: merged, gguf, space or hub
    QUANTIZE: str = "q8_0"  # export --to gguf, --to space: how exact its numbers stay
    EXPORT_DIR: str = ""  # export: where to write; empty = beside OUTPUT_DIR, as ./model-gguf
    HUB_REPO: str = ""  # export --to hub: the repository, as name or owner/name
    HUB_PRIVATE: bool = True  # export --to hub: only you can see it
    # -- Running
    YES: bool = False  # train or upload without asking, whatever the quality of the data
    JSON: bool = False  # check: the findings as one JSON object, for programs

    def __init__(self, **changes: Any) -> None:
        vars(self).update({name: getattr(Config, name) for name in TYPES} | changes)


LOG = logging.getLogger("finetune_colab")
TYPES: dict[str, Any] = inspect.get_annotations(Config, eval_str=True)
DEMO_MODEL = "demo"
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
    (0, 10_000): "EVAL_ANSWERS EARLY_STOPPING_PATIENCE MAX_GRAD_NORM NEFTUNE_ALPHA",
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
    """Print, also where the console lacks some characters, or is there no more."""
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text = text.encode(encoding, "replace").decode(encoding)
        print(text, file=stream, end=end, flush=True)
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


def say(label: str, text: str, file: TextIO | None = None) -> None:
    """One decision or result under its label, wrapped for a terminal of 80 columns."""
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

TYPE_IN_WORDS = {
    str: "text",
    int: "a whole number, such as 4",
    float: "a number, such as 0.1 or 2e-4",
    bool: "True or False",
    bool | None: "True, False or None",
    list[str]: "a list of names, such as q_proj,fc2",
}
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    import difflib

    names = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(wrong.casefold(), names, n=1)
    return f" Did you mean {names[close[0]]}?" if close else ""


def fold(text: str) -> str:
    """Equal for texts that differ only in spaces, upper case or look-alike code points."""
    return " ".join(unicodedata.normalize("NFKC", str(text)).casefold().split())


def changed(cfg: Config, **settings: Any) -> Config:
    return Config(**(vars(cfg) | settings))


def converted(value: Any, kind: Any) -> Any:
    """A value in its own type, from what a person wrote; KeyError, TypeError or ValueError if not."""
    text = "" if value is None else str(value).strip()
    if kind == list[str]:
        names = re.split(r"[,\s]+", text) if isinstance(value, str) else list(value)
        if all(re.search(r"\D", name) for name in names):
            return names
    if isinstance(value, (list, dict)) or kind == list[str]:
        raise ValueError
    if kind == bool | None and text.lower() in ("", "none", "auto"):
        return None
    return SWITCHES[text.lower()] if kind in (bool, bool | None) else kind(text)


def parse_setting(name: str, value: Any) -> Any:
    """A setting in its own type, within its limits and among its choices."""
    if name not in TYPES:
        raise UserError(f"{name} is not a setting.{did_you_mean(name, TYPES)}")
    if name == "PROMPT_TEMPLATE" and isinstance(value, str):
        value = value.replace("\\n", "\n")  # as it is typed into a shell
        if value and value.count("{question}") != 1:
            raise UserError("PROMPT_TEMPLATE needs one {question}, where the question goes.")
        return value  # each space counts
    try:
        found = converted(value, TYPES[name])
    except (KeyError, TypeError, ValueError):
        text = "" if value is None else str(value)
        words = TYPE_IN_WORDS[TYPES[name]]
        raise UserError(f"{name} is {text!r}, but it has to be {words}.") from None
    low, high = LIMITS.get(name, (None, None))
    if name in LIMITS and not low <= found <= high:
        raise UserError(f"{name} is {found}, but it has to lie between {low:,} and {high:,}.")
    if found not in CHOICES.get(name, (found,)):
        choices = ", ".join(filter(None, CHOICES[name]))
        raise UserError(f"{name} is {found!r}; it has to be one of {choices}.")
    if name in NEEDED and not found:
        raise UserError(f"{name} is empty, but it is needed.")
    return found


def checked(values: dict[str, Any]) -> Config:
    """The settings as they are used; every fault in them is named at once."""
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
    except OSError as error:  # some disks of other computers cannot, and Windows not for folders
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
    """A folder to fill, which gets its name when complete; what had it becomes `earlier`, or goes."""
    staged, old = (final.with_name(f".{final.name}.{end}") for end in ("partial", "old"))
    if old.exists() and not final.exists():  # the program was killed between two renames
        old.rename(final)
    remove(staged)
    staged.mkdir(parents=True)
    try:
        yield staged
    except BaseException:
        with suppress(OSError):  # a full disk wants its room back
            remove(staged)
        raise
    for path in (*staged.rglob("*"), staged):
        fsync(path)
    if final.exists():
        remove(old)
        final.rename(old)
    staged.rename(final)
    fsync(final.parent)
    if earlier and old.exists():
        remove(earlier)
        old.rename(earlier)
    remove(old)


def remove(path: Path) -> None:
    """A file, a folder or a link, if there is one; never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    with atomic_write(path) as staged:
        staged.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


# ==================================================================================================
# 2  Where data comes from
# ==================================================================================================

EXAMPLE_DATASET = "dataset_example.xlsx"
REPORT_NAME = "dataset_report"  # what check writes; never taken for data that nobody named
TABLE_ENDINGS = tuple(".xlsx .xlsm .xls .xlsb .ods .csv .tsv .json .jsonl .parquet".split())
LARGEST_FILE_MB = 500
MOST_FILES = 200  # tables in one folder of a bucket
PAUSES = (1, 2, 4, 8)  # seconds between the five tries of a download
# What another try would not change, in the words of urllib, huggingface_hub, pyarrow and datasets.
PERMANENT = r"(HTTP Error|HTTP status|Client error) '?[34](?!08|25|29)|Client Error|DENIED|SIGNATURE|ACCESS_KEY|VALIDATION|[Oo]ffline|doesn't|data files|generating|nonnumeric"
LINK_ADVICE = "Open the link in a private window of your browser: it should download the file. A file in Google Drive has to be shared with everyone who has the link."
BUCKET_ADVICE = "It should look like s3://bucket/file.csv. Access denied (403) means a wrong key: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the environment or a file .env, and S3_ENDPOINT_URL when the bucket is not Amazon's."
HUB_ADVICE = "It should look like hf:owner/name, hf:owner/name:split or hf:owner/name:file.csv. A private data set needs HF_TOKEN, and one behind a licence the licence accepted on its page. HF_HUB_OFFLINE must not be set."
# Links that people copy lead to a page about the file; these lead to the file.
DIRECT_LINKS = {
    r"https://docs\.google\.com/spreadsheets/d/e/([\w-]+)/.*": r"https://docs.google.com/spreadsheets/d/e/\1/pub?output=xlsx",
    r"https://docs\.google\.com/spreadsheets/(?:u/\d+/)?d/([\w-]+).*?[#&?]gid=(\d+).*": r"https://docs.google.com/spreadsheets/d/\1/export?format=csv&gid=\2",
    r"https://docs\.google\.com/spreadsheets/(?:u/\d+/)?d/([\w-]+)(?!.*/(?:gviz|export|pub)\b).*": r"https://docs.google.com/spreadsheets/d/\1/export?format=xlsx",
    r"https://drive\.google\.com/(?:file/d/|open\?id=)([\w-]+).*": r"https://drive.google.com/uc?export=download&id=\1",
    r"https://github\.com/([^/]+/[^/]+)/blob/(.+)": r"https://raw.githubusercontent.com/\1/\2",
    r"(https://huggingface\.co/.+)/blob/(.+)": r"\1/resolve/\2",
    r"(https://www\.dropbox\.com/.+)dl=0(.*)": r"\1dl=1\2",
}


def find_dataset(cfg: Config) -> tuple[str, list[Path]]:
    """The name of the data and its files on this computer, fetched first where they lie elsewhere."""
    place = cfg.DATASET_PATH.strip()
    paths = fetch(place) if re.match("(?i)https?://|s3://[^/]|hf:", place) else local_files(place)
    return paths[0].name if len(paths) == 1 else f"{place} ({len(paths)} files)", paths


def local_files(place: str) -> list[Path]:
    """The file of this name, the files that match a pattern, or the tables in a folder."""
    path = local_path(place)
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


def without_secrets(place: str) -> str:
    """An address as it may be shown and written down: keys stand in its query or before an @."""
    host = r"(?:\[[\da-f:]+\])?[^/?#[]*"  # what else begins with a bracket may be anything
    secret = rf"(?is)^\s*(https?://|s3://)(?:[^/?#]*@)?({host}(?:/[^?#]*)?).*"
    return re.sub(secret, r"\1\2", place)


def refuse_large(place: str, size: int) -> None:
    if size > LARGEST_FILE_MB * 1e6:
        raise UserError(f"{place} is larger than {LARGEST_FILE_MB} MB. Use a part of it.")


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
            raise ConnectionError(f"only {arrived} bytes came")
    return file


def from_link(link: str) -> list[Path]:
    """The file behind a link, even where the link is to a page about the file."""
    for pattern, direct in DIRECT_LINKS.items():
        link = re.sub(f"^{pattern}$", direct, link)
    url = urllib.parse.quote(link.partition("#")[0], safe="%/:=&?~+!$,;'@()*[]")
    if re.match("[^?]+//[^/?]*@", url):
        raise ValueError("it holds a password. Download the file, and name that")
    request = urllib.request.Request(url, headers={"User-Agent": "finetune_colab.py"})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("it is a web page and not a file")
        name = response.headers.get_filename() or urllib.parse.urlsplit(url).path.rpartition("/")[2]
        return [receive(url, urllib.parse.unquote(name), response, response.headers)]


def from_bucket(place: str) -> list[Path]:
    """One object, or all tables in a folder."""
    from pyarrow import fs

    def copy(path: str, name: str) -> Path:
        with client.open_input_file(path) as stream:
            return receive(f"s3://{path}", name, stream, stream.metadata())

    root = place[len("s3://") :].rstrip("/")
    client = bucket_client(root.partition("/")[0])
    if "/" in root:
        with suppress(FileNotFoundError):  # perhaps it is a folder
            return [copy(root, root.rpartition("/")[2])]
    found = client.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
    paths = sorted(one.path for one in found if one.size)  # of files, not of folders
    tables = [path for path in paths if path.lower().endswith(TABLE_ENDINGS)]
    if not 0 < len(tables) <= MOST_FILES:
        raise ValueError(f"{len(tables)} tables are there, not 1 to {MOST_FILES}: {tables[:3]}")
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


def from_hub(place: str) -> list[Path]:
    """A file of a data set, or as parquet the rows of CONFIGURATION/SPLIT; one word may be enough."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from huggingface_hub import hf_hub_download

    [(name, part)] = re.findall("(?i)^hf:(?://datasets/)?([^:/]*/?[^:/]*)[:/]?(.*)", place)
    if part.lower().endswith(TABLE_ENDINGS):
        return [Path(hf_hub_download(name, part, repo_type="dataset"))]
    configs = get_dataset_config_names(name)
    asked = [one for one in (part.partition("/")[0], "default") if one in configs]
    builders = {one: load_dataset_builder(name, one) for one in (asked[:1] or configs[:8])}
    splits = [f"{c}/{split}" for c, one in builders.items() for split in one.config.data_files]
    fitting = [one for one in splits if part in ("", one, *one.split("/"))]
    fitting = [one for one in fitting if one.endswith("/train")] or fitting
    if len(fitting) != 1:
        raise ValueError(f"name one part: {', '.join(f'hf:{name}:{one}' for one in splits[:8])}")
    config, split = fitting[0].split("/")
    refuse_large(f"hf:{name}", builders[config].info.download_size or 0)
    builders[config].download_and_prepare()
    file = Path(builders[config].cache_dir) / f"{name.rpartition('/')[2]}-{split}.parquet"
    with atomic_write(file) as partial:
        builders[config].as_dataset(split).to_parquet(partial)
    return [file]


def fetch(place: str) -> list[Path]:
    """Five tries with growing pauses, as long as it is the network or the server that fails."""
    others = {"s3": (from_bucket, BUCKET_ADVICE), "hf": (from_hub, HUB_ADVICE)}
    act, advice = others.get(place[:2].lower(), (from_link, LINK_ADVICE))
    shown = without_secrets(place)
    say("Download", shown)
    for tries, pause in enumerate((*PAUSES, 0), 1):
        try:
            return act(place)
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

FEWEST_PAIRS = 2
ENOUGH_PAIRS = 50
BOTH_NAMED = 4  # Columns.named, from which on both columns are known by name
MOST_UNUSED = 8  # tables that are not used, on the screen
TO_TEST = re.compile(r"(?i)(test|val|valid|validation|dev|eval)(-\d+-of-\d+)?(\.\w+)?")


class ColumnsError(UserError):
    """The person has to say which columns ask and answer."""


class Table(NamedTuple):
    """One sheet: its header, and its rows with their numbers as a spreadsheet shows them."""

    sheet: str  # "" for a text file
    header: list[str]
    rows: list[tuple[int, list[Any]]]  # texts; from JSON and parquet also lists and objects
    unread: list[tuple[int, str]] = []  # rows that could not be read, and why
    hidden: bool = False


Messages = list[dict[str, str]]
Turn = tuple[str, str]  # who speaks, and what


class Pair(NamedTuple):
    """One conversation to learn, and where it stands. The last message is the answer."""

    messages: Messages
    sheet: str  # and the file before it, where there are several
    row: int

    @property
    def question(self) -> str:
        return self.messages[-2]["content"]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def place(self) -> str:
        return f"row {self.row}" + (f" of {self.sheet}" if self.sheet else "")


class Note(NamedTuple):
    """Why a row is left out."""

    sheet: str
    row: int
    reason: str


class Columns(NamedTuple):
    """The positions of the two columns, and how they were found."""

    question: int
    answer: int
    reason: str
    named: int  # how surely the two were known by name, from 0 to 6
    system: int | None = None  # its text is put before the question
    input: int | None = None  # of Alpaca: its text is put after the question


@dataclass(eq=False)
class Pairs:
    """What the data, or one table of it, came to."""

    name: str  # of the file, for the person
    place: str  # of one table: its file where there are several, and its sheet
    table: Table  # of several, the first
    shape: str
    columns: Columns | None  # None for conversations
    kept: list[Pair]
    dropped: list[Note]
    rows_read: int
    parts: list[Pairs] = field(default_factory=list)  # the tables that are used
    other_tables: list[str] = field(default_factory=list)  # those that are not

    @property
    def used(self) -> list[str]:
        """The names of the columns that are used; none for conversations."""
        found = self.columns
        places = (found.question, found.answer, found.system, found.input) if found else ()
        return [self.table.header[i] for i in places if i is not None]


def find_pairs(cfg: Config) -> Pairs:
    """Every pair of the data that can be learnt, and a note for every row that cannot."""
    name, paths = find_dataset(cfg)
    parts, unusable = read_parts(paths, cfg)
    if not parts:
        return find_pairs(columns_typed(list(unusable.values()), cfg))
    best = max(([one for one in parts if is_same(part, one)] for part in parts), key=rank)
    unused = {one.place: f"{one.place}: {len(one.kept)} pairs" for one in parts if one not in best}
    unused |= {place: str(error).partition(". ")[0] for place, error in unusable.items()}
    if unused and not cfg.SHEET:
        say("Chosen", preview(", ".join(one.place for one in best), 300))
        for reason in list(unused.values())[:MOST_UNUSED]:
            say("Not used", preview(reason, 150))
        say("", "To use another, name its sheet with --sheet or its file with --dataset-path")
    kept, copies = best[0].kept, list[Note]()
    if best[1:]:  # what stands in several tables counts once
        kept, copies = without_copies([pair for part in best for pair in part.kept])
    sheets = dict.fromkeys(part.table.sheet for part in best if part.table.sheet)
    return replace(
        best[0],
        name=name,
        table=best[0].table._replace(sheet=", ".join(sheets)),
        kept=kept,
        dropped=[note for part in best for note in part.dropped] + copies,
        rows_read=sum(part.rows_read for part in best),
        parts=best,
        other_tables=list(unused),
    )


def read_parts(paths: list[Path], cfg: Config) -> tuple[list[Pairs], dict[str, UserError]]:
    """What every table of every file came to, and why others cannot be used."""
    parts, unusable = list[Pairs](), dict[str, UserError]()
    gc.disable()  # its search for cycles would go through all rows again and again
    try:
        for path in paths:
            try:
                tables = read_tables(path, cfg)
            except UserError as error:
                tables, unusable[path.name] = [], error
            for table in tables:
                where = [path.name, *filter(None, [table.sheet])]
                place = ", ".join(where[len(paths) == 1 :])
                try:
                    parts.append(pairs_of(table, path.name, place, cfg))
                except UserError as error:
                    unusable[place] = type(error)(f"In {', '.join(where)}: {error}")
    finally:
        gc.enable()
    return parts, unusable


def pairs_of(table: Table, name: str, place: str, cfg: Config) -> Pairs:
    """What one table came to: its pairs, and a reason for every row that is left out."""
    if fold(cfg.SHEET or table.sheet) != fold(table.sheet):
        raise UserError(f"this is not the sheet {cfg.SHEET!r} (--sheet).")
    shape, columns, found = conversations_of(table, cfg)
    blank, rows = {number for number, row in table.rows if not any(row)}, [*table.unread, *found]
    talks = [Pair(talk, place, number) for number, talk in rows if isinstance(talk, list)]
    kept, copies = without_copies(talks)
    left_out = [(number, reason) for number, reason in rows if isinstance(reason, str)]
    dropped = [Note(place, n, "blank" if n in blank else reason) for n, reason in left_out]
    size = len(table.rows) + len(table.unread)
    return Pairs(name, place, table, shape, columns, kept, dropped + copies, size)


def columns_typed(refusals: list[UserError], cfg: Config) -> Config:
    """With the two columns as a person in a terminal names them; otherwise the refusal."""
    others = (preview(str(one), 150) for one in refusals[1:MOST_UNUSED])
    told = "\n".join([str(refusals[0]), *others])
    if isinstance(refusals[0], ColumnsError) and not cfg.JSON and sys.stdin and sys.stdin.isatty():
        say("Columns", told)
        with suppress(EOFError):
            question = input("The column with the questions: ").strip()
            answer = question and input("The column with the answers: ").strip()
            if answer:
                return changed(cfg, QUESTION_COLUMN=question, ANSWER_COLUMN=answer)
    raise UserError(told)


def is_aside(part: Pairs) -> bool:
    """Whether a table is kept from sight, or was kept to test with."""
    return part.table.hidden or any(map(TO_TEST.fullmatch, part.place.split(", ")))


def is_same(part: Pairs, other: Pairs) -> bool:
    """Whether two tables are parts of one data set: of the same header, or one with further columns."""
    kinds = [(is_aside(one), one.shape, [*map(fold, one.used[:2])]) for one in (part, other)]
    names, others = ({*map(fold, filter(None, one.table.header))} for one in (part, other))
    return kinds[0] == kinds[1] and (names <= others or others <= names)


def rank(parts: list[Pairs]) -> tuple[bool, int]:
    """How many pairs a data set has, and ten times as many where both names are known."""
    columns = parts[0].columns
    is_named = columns is None or columns.named >= BOTH_NAMED
    return not is_aside(parts[0]), sum(len(part.kept) for part in parts) * (10 if is_named else 1)


# -- Files to tables

MOST_ROWS = 300_000  # openpyxl reads some 30,000 in a second
MOST_CHARACTERS = 200_000_000
MOST_NAMES = 2000  # of fields in JSON
TOO_LARGE = f"has more than {MOST_ROWS:,} rows, {MOST_CHARACTERS:,} characters or {MOST_NAMES:,} fields. Split it."
LIKELY = 20  # cells at the top of a column that decide what it holds
FAILED_FORMULAS = ("#N/A", "#REF!", "#DIV/0!", "#VALUE!", "#NAME?", "#NULL!", "#NUM!")
JSON_CELL = re.compile(r"(?s)\[(?=\s*['\"\[{\]\d]).*\]|\{.*['\"](answer_start|replies)['\"].*\}")
UNREADABLE = [None, None]  # in such a cell, what Python or numpy printed
BESIDE_TEXT = ("@type", "type", "id")  # in an object with one text
KINDS = {  # of files, by their first bytes
    rb"PAR1\x15": "parquet",
    rb"\xd0\xcf\x11\xe0.*E\0n\0c\0r\0y\0p\0t\0e\0d\0P": "protected by a password; remove it first",
    rb"PK\x03\x04.*(worksheets|content\.xml)|\xd0\xcf\x11\xe0": "workbook",
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!\x1a|BZh\d1AY|\xfd7zXZ": "compressed (a zip file, a Word document, slides), or cut off; unpack it first",
    rb"%PDF-\d|\{\\rtf|\x89PNG|\xff\xd8\xff|GIF8[79]a(.\0|\Z)": "a document (PDF, RTF) or a picture",
    rb"SQLite format 3\0|(?i:insert into \S+ ?\(|-- (mysql|phpmyadmin|postgresql))": "a database, or a dump of one (SQL)",
    rb"version https://git-lfs": "a Git LFS pointer and not the file itself; run: git lfs pull",
    rb"(?i:<(\?xml|\?mso|workbook|!doctype html|!--|html|head|body|table|tr|meta|style|script|div)|mime-version:)": "a web page (HTML) or XML, whatever its name says",
    rb"": "text",
}
CALAMINE = """
import faulthandler, io, json, python_calamine, sys
content = sys.stdin.buffer.read()
faulthandler.dump_traceback_later(3 + len(content) / 20_000, exit=True)
book = python_calamine.load_workbook(io.BytesIO(content))
for sheet in book.sheets_metadata:
    rows = book.get_sheet_by_name(sheet.name).to_python(skip_empty_area=False)
    print(json.dumps([sheet.name, rows, sheet.visible != sheet.visible.Visible], default=str))
"""
# The characters beside ASCII that say nothing of a language, and those of each Western one
WESTERN = "[\0-\x7f«»„“”‚‘’–—…°§©®™•€£¥¢×÷±½²\u00a0{}]*"
LETTERS = "äöüß éèàêçâîôûùëïœæ áéíóúñü¿¡ºª ãáéíóúçâêôõàºª àèéìòù åäöé æøåéòóô áéíóúýþæöð ëéïöüèó àéèíïóúòüç· äõöüšž"
ENCODINGS = "cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 cp874 koi8_r mac_roman gb18030 big5 shift_jis euc_jp cp949"
Sheet = tuple[Any, ...]  # its name, its rows or records, and maybe whether it is hidden


def read_tables(path: Path, cfg: Config) -> list[Table]:
    """Every filled sheet of a file, decided by its content. The only opener of data files."""
    try:
        refuse_large(str(path), path.stat().st_size)
        content = path.read_bytes()
        start = content.lstrip(b"\xef\xbb\xbf \t\r\n")
        kind = next(kind for mark, kind in KINDS.items() if re.match(mark, start, re.DOTALL))
        if kind not in ("text", "parquet", "workbook"):
            raise UserError(f"is {kind}.\nPut the rows into .xlsx, .csv or .jsonl")
        binary = parquet_sheets if kind == "parquet" else workbook_sheets
        sheets = text_sheets(decoded(path, content)) if kind == "text" else binary(content)
        tables = [table_of(cfg, *sheet) for sheet in sheets]
        if filled := [one for one in tables if any(any(row) for _, row in one.rows)]:
            return [opened(table) for table in filled]
        raise UserError("holds no rows. Fill in one question and one answer a row.")
    except UserError as error:
        raise UserError(f"{path} {str(error).removeprefix(f'{path} ')}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds
        reason = preview(f"{type(error).__name__}: {error}", 100)
        advice = "Open it where it was made, and save it anew as .xlsx or .jsonl"
        raise UserError(f"{path} is damaged, or has a password ({reason}).\n{advice}") from None


def workbook_sheets(content: bytes) -> Iterator[Sheet]:
    """openpyxl reads .xlsx in bounded memory; calamine reads the others, and what openpyxl cannot."""
    import openpyxl

    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if not re.search(r"worksheets|\bcontent\.xml\b", "\n".join(archive.namelist())):
                raise UserError("is a zip without a workbook. Unpack it, and name what is in it")
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
            yield sheet.title, sheet.values, sheet.sheet_state != "visible"
    if not sheets:
        yield from calamine_sheets(content)


def calamine_sheets(content: bytes) -> Iterator[Sheet]:
    """In a process of its own: with a damaged file calamine 0.9 may abort it, or never end."""
    if importlib.util.find_spec("python_calamine") is None:
        advice = "Run: pip install python-calamine\nOr open the file, and save it as .xlsx"
        raise UserError(f"is damaged, or can only be read with one more package. {advice}")
    command = [sys.executable, "-c", CALAMINE]
    child = subprocess.run(command, input=content, capture_output=True, check=False)
    if child.returncode:
        raise ValueError(child.stderr.decode(errors="replace").strip().split("\n")[-1])
    yield from map(json.loads, child.stdout.splitlines())


def parquet_sheets(content: bytes) -> Iterator[Sheet]:
    import pyarrow.parquet

    # without threads: they may still be starting when a short program ends, which aborts it
    batches = pyarrow.parquet.ParquetFile(io.BytesIO(content)).iter_batches(use_threads=False)
    yield "", (row for batch in batches for row in batch.to_pylist())


def decoded(path: Path, content: bytes) -> str:
    """The text of a file: UTF-8, UTF-16, or what the other lines look like, which is said."""
    import charset_normalizer

    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    odd = dict.fromkeys(line for line in lines if line.decode(errors="ignore").encode() != line)
    pattern = re.compile("|".join(map(WESTERN.format, LETTERS.split())), re.IGNORECASE)
    western = [line for line in odd if pattern.fullmatch(line.decode("cp1252", "replace"))]
    head = b"\n".join(list(odd)[:2000])
    best = charset_normalizer.from_bytes(head, cp_isolation=ENCODINGS.split()).best()
    encoding = "cp1252" if len(western) >= 0.9 * len(odd) else best.encoding if best else ""
    if b"\0" in content or not encoding:
        raise UserError(f"{path} is neither a workbook nor a text. Open it and save it as .xlsx")
    if odd:
        guess = encoding.replace("cp", "Windows-").replace("_", "-")
        say("Note", f"{path.name}: {len(odd):,} lines not UTF-8 but {guess}. Check the accents.")
    texts = (line.decode(encoding if line in odd else "utf-8", "replace") for line in lines)
    return "\n".join(texts)


def text_sheets(text: str) -> Iterable[Sheet]:
    """A JSON document, one JSON value a line, or lines of cells."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(text)
            return json_sheets("", value) or [("", [value])]
        except ValueError as error:
            reason = preview(str(error), 150)  # it names the line
        values = [from_json(line.strip()) for line in text.split("\n")]
        readable = sum(isinstance(value, (dict, list)) and any(value) for value in values)
        if readable > sum(value != "" for value in values) / 2:
            return [("", values)]
        if re.search(r"['\"]\s*:|\[\s*\[", text[:65_536]):
            raise UserError(f"is not valid JSON: {reason}. Correct it, or export it again.")
    return [("", csv_rows(text))]


def csv_rows(text: str) -> Iterator[list[str]]:
    """The rows of a text. A line that breaks the rules of quotation marks is taken as it stands."""
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the usual 128 kB
    lines = list(io.StringIO(text, newline=""))
    head = io.StringIO(text[:65_536], newline="").readlines()
    rows = {mark: csv.reader(head, delimiter=mark, skipinitialspace=True) for mark in ",;\t|"}
    widths = {mark: Counter(len(row) for row in rows[mark] if len(row) > 1) for mark in rows}
    mark = max(widths, key=lambda mark: max(widths[mark].values(), default=0))
    reader = csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True)
    while (start := reader.line_num) < len(lines):
        try:
            row = next(reader)
        except csv.Error:
            if reader.line_num > start + 1:
                fault = f"has a quotation mark that opens and never ends, in line {start + 1}"
                raise UserError(f'{fault}.\nClose it, or write it twice ("").') from None
            cells = lines[start].rstrip("\r\n").split(mark)
            row = [re.sub(r'^\s*"([^"]*)"\s*$', r"\1", cell) for cell in cells]
        if mark == "|" and len(row) > 2 and not row[0] + row[-1]:  # a table in Markdown
            row = [re.sub(r"^:?-+:?\s*$", "", cell) for cell in row[1:-1]]
        yield row


def json_sheets(name: str, value: Any) -> list[Sheet]:
    """The tables in a JSON value: records in a list, by id, topic or column; or all that it wraps."""
    if not isinstance(value, dict):
        return [(name, value)] if isinstance(value, list) else []
    inner = list(value.values())
    kinds = set(map(type, inner))
    shared = set.intersection(*map(set, inner)) if kinds == {dict} else set()
    if shared and all(map(str.isdigit, shared)):  # as pandas writes columns
        return json_sheets(name, {key: list(column.values()) for key, column in value.items()})
    known = all(any(name_strength(key, role) > 1 for key in shared) for role in NAMES)
    alike = known or (shared and all(shared == set(one) for one in inner))
    cells = list(itertools.chain(*inner)) if kinds == {list} else []
    if isinstance(value.get("prompt"), dict) or any(map(is_conversation, inner)):
        return [(name, [value])]
    if kinds == {str} and sum(map(asks, value)) > len(value) / 2:
        inner = [{"question": key, "answer": text} for key, text in value.items()]
    elif cells and all(isinstance(cell, dict) for cell in cells):
        inner = value.get("train") or cells
    elif cells and len(inner) > 1 and len(set(map(len, inner))) == 1:
        inner = [dict(zip(value, row, strict=True)) for row in zip(*inner, strict=True)]
    elif not alike or len(inner) < 2:
        return [sheet for key, part in value.items() for sheet in json_sheets(name or key, part)]
    return [(name, inner)]


def table_of(cfg: Config, name: str, values: Iterable[Any], hidden: bool = False) -> Table:
    """Lists as the rows of a table below its header, or else records with named fields."""
    most = itertools.islice(values, 2**20)  # rows of a workbook
    values = [{"messages": one} if is_conversation(one) else one for one in most]
    for key in ("paragraphs", "qas"):  # of SQuAD
        if any(objects_in(one, key) for one in values[:1]):
            values = [part for one in values for part in objects_in(one, key)]
    if all(isinstance(row, (list, tuple)) for row in values):
        while values and not any(cell not in (None, "") for cell in values[-1]):
            values.pop()
        characters = sum(len(cell) for row in values for cell in row if isinstance(cell, str))
        if len(values) > MOST_ROWS or characters > MOST_CHARACTERS:
            raise UserError(TOO_LARGE)
        grid = [[one_text(cell) or "" for cell in row] for row in values]
        return with_header(name, grid, cfg)._replace(hidden=hidden)
    numbered = [(number, one) for number, one in enumerate(values, start=1) if one != ""]
    records = [(number, one) for number, one in numbered if isinstance(one, dict)]
    names = list(dict.fromkeys(key for _, one in records for key in one))
    if len(records) > MOST_ROWS or len(names) > MOST_NAMES:
        raise UserError(TOO_LARGE)
    rows = [(number, [cell_text(one.get(key)) for key in names]) for number, one in records]
    others = [number for number, one in numbered if not isinstance(one, dict)]
    return Table(name, names, rows, [(number, "not an object in JSON") for number in others])


def cell_text(cell: object) -> Any:
    """A cell as the person sees it, without the blanks around it; lists and objects as they are."""
    if cell is None or isinstance(cell, (list, dict)):
        return "" if cell is None else cell
    if isinstance(cell, float):
        text = str(int(cell)) if cell.is_integer() else f"{cell:.15g}"
        return text if math.isfinite(cell) else ""
    if isinstance(cell, bytes):  # in Parquet, of a text or of a picture
        text = cell.decode(errors="ignore")
        return cell_text(text) if text.encode() == cell else ""
    if not isinstance(cell, str):
        text = str(cell).removesuffix(" 00:00:00")  # of a day
        return text.upper() if isinstance(cell, bool) else text
    text = cell.replace("_x000D_\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():  # JSON may hold half of an emoji, which no file can
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "" if text in FAILED_FORMULAS else text.strip()


def objects_in(holder: Any, key: str) -> list[dict[str, Any]]:
    inner = holder.get(key) if isinstance(holder, dict) else None
    return [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else []


def top_cells(table: Table, column: int, most: int = LIKELY) -> list[Any]:
    filled = (row[column] for _, row in table.rows if column < len(row) and row[column])
    return list(itertools.islice(filled, most))


def opened(table: Table) -> Table:
    """Columns of lists and objects that were written as JSON into cells, as CSV files have them."""
    for i in range(len(table.header)):
        top = top_cells(table, i)
        if top and all(isinstance(cell, str) and JSON_CELL.fullmatch(cell) for cell in top):
            for _, row in table.rows:
                row[i : i + 1] = map(from_json, row[i : i + 1])
    return table


def from_json(cell: Any) -> Any:
    """The list or object that a text spells out; any other cell as it is."""
    try:
        return json.loads(cell) if isinstance(cell, str) and cell[:1] in ("[", "{") else cell
    except (ValueError, RecursionError):
        return UNREADABLE


def one_text(cell: Any) -> str | None:
    """The text of a cell; of a list or an object, the only text in it; None when there is no one."""
    if isinstance(cell, list):
        if all(isinstance(part, dict) and "text" in part for part in cell):  # in SQuAD and quizzes
            right = [one for one in cell if not any(flag is False for flag in one.values())]
            cell = right if len(right) < len(cell) else cell[:1]
        if len(cell) == 1 and not isinstance(cell[0], (int, float)):  # a number alone is an index
            return one_text(cell[0])
        return None if cell else ""
    if isinstance(cell, dict):
        if turn := role_and_content(cell):
            return one_text(turn[1])
        text = cell.get("text", cell.get("value"))
        texts = [cell[key] for key in cell if key not in BESIDE_TEXT and cell[key] is not text]
        if text is not None and not any(isinstance(one, (str, dict)) for one in texts):
            return one_text(text[:1] if isinstance(text, list) else text)
        return one_text(*cell.values()) if len(cell) == 1 else None
    return str(cell_text(cell))


# -- Headers and columns

# What people call the two columns: 3 for names that are sure, 2 for likely ones, 0.1 for mere hints.
NAMES: dict[str, dict[float, str]] = {
    "question": {
        3: "question, questions, q, instruction, prompt, prompts, query, queries, ask, user input, frage, fragen, pregunta, preguntas, pergunta, perguntas, questão, domanda, domande, vraag, vragen, fråga, frågor, spørgsmål, spørsmål, kysymys, kysymykset, spurning, küsimus, jautājums, klausimas, pytanie, pytania, otázka, otázky, vprašanje, pitanje, pitanja, kérdés, kérdések, întrebare, întrebări, pyetje, pyetja, soru, sorular, sual, savol, câu hỏi, pertanyaan, soal, soalan, tanong, swali, maswali, tambaya, umbuzo, galdera, cwestiwn, demando, vrae, fraach, fro, froen, spørsmålet, spørsmåla, spørgsmålet, spørgsmålene, spurningar, spurningur, küsimused, jautājumi, klausimai, dotaz, dotazy, vprašanja, întrebarea, pyetjet, preguntes, questões, galderak, mistoqsija, mistoqsijiet, ceist, ceisteanna, ceistean, cwestiynau, goulenn, goulennoù, demandoj, suallar, sorag, soraglar, savollar, pirs, pirsên, hỏi, pitakon, pitakonan, patarosan, pananya, pangutana, fanontaniana, pātai, su'aal, su’aalo, gaaffii, gaaffilee, tambayoyi, ìbéèrè, ajụjụ, imibuzo, mubvunzo, mibvunzo, ikibazo, ibibazo, kesyon, въпрос, прашање, вопрос, вопросы, питання, запитання, пытанне, питање, ερώτηση, ερωτήσεις, сұрақ, суроо, асуулт, հարց, კითხვა, שאלה, שאלות, سؤال, سوال, أسئلة, پرسش, פֿראַגע, פֿראַגעס, питања, прашања, въпроси, пытанні, савол, сұрақтар, суроолор, сорау, сораулар, саволҳо, асуултууд, հարցեր, კითხვები, შეკითხვა, השאלה, سوالات, پوښتنه, پوښتنې, پرسیار, پرسیارەکان, سوئال, سوئاللار, प्रश्न, सवाल, প্রশ্ন, ਸਵਾਲ, પ્રશ્ન, கேள்வி, ప్రశ్న, ಪ್ರಶ್ನೆ, ചോദ്യം, คำถาม, សំណួរ, မေးခွန်း, ຄຳຖາມ, ጥያቄ, 问题, 問題, 提问, 提問, 题目, 題目, 指令, 问, 問, 質問, 問い合わせ, 질문, 문의, प्रश्नों, प्रश्‍न, प्रश्नहरू, প্রশ্নসমূহ, প্ৰশ্ন, প্ৰশ্নসমূহ, ପ୍ରଶ୍ନ, ପ୍ରଶ୍ନଗୁଡ଼ିକ, ਪ੍ਰਸ਼ਨ, પ્રશ્નો, கேள்விகள், வினா, ప్రశ్నలు, ಪ್ರಶ್ನೆಗಳು, ചോദ്യങ്ങൾ, ප්‍රශ්නය, ප්‍රශ්න, དྲི་བ, འདྲི་བ, ጥያቄዎች, ሕቶ, ሕቶታት, 标准问, 問い",
        2: "input, input text, user, human, term, problem, user message, customer message, human message, inputs, inputs pretokenized",
        0.1: "title, text",
    },
    "answer": {
        3: "answer, answers, response, responses, output, outputs, completion, completions, reply, replies, target, ground truth, groundtruth, gold, expected, reference, antwort, antworten, respuesta, respuestas, resposta, respostas, risposta, risposte, antwoord, antwoorden, réponse, réponses, svar, vastaus, vastaukset, vastus, atbilde, atsakymas, odpowiedź, odpowiedzi, odpověď, odpovědi, odpoveď, odgovor, odgovori, válasz, válaszok, răspuns, răspunsuri, përgjigje, cevap, cevaplar, yanıt, yanıtlar, cavab, javob, câu trả lời, trả lời, phản hồi, đáp án, jawaban, jawab, jawapan, sagot, jibu, majibu, amsa, impendulo, erantzuna, ateb, respondo, antwoorde, antwurd, antwurden, äntwert, äntwerten, svaren, svaret, svara, svarene, svör, svør, vastused, atbildes, atsakymai, odpovede, răspunsul, përgjigja, përgjigjet, responsa, responsas, respostes, erantzunak, tweġiba, tweġibiet, freagra, freagraí, freagairt, freagairtean, atebion, respont, respontoù, respondoj, cavablar, jogap, jogaplar, javoblar, bersiv, bersivên, đáp, wangsulan, waleran, tubag, valiny, whakautu, jawaab, jawaabo, deebii, deebiiwwan, amsoshi, ìdáhùn, azịza, izimpendulo, iimpendulo, mhinduro, igisubizo, ibisubizo, repons, отговор, одговор, ответ, ответы, відповідь, відповіді, адказ, απάντηση, απαντήσεις, жауап, жооп, хариулт, պատասխան, პასუხი, תשובה, תשובות, جواب, إجابة, إجابات, رد, پاسخ, ענטפֿער, ענטפֿערס, одговори, отговори, адказы, жавоб, жауаптар, жооптор, җавап, җаваплар, ҷавоб, ҷавобҳо, хариултууд, պատասխաններ, პასუხები, התשובה, ځواب, ځوابونه, وەڵام, وەڵامەکان, جاۋاب, جاۋابلار, جوابات, उत्तर, जवाब, উত্তর, ਜਵਾਬ, જવાબ, பதில், సమాధానం, ಉತ್ತರ, ഉത്തരം, คำตอบ, ចម្លើយ, အဖြေ, ຄຳຕອບ, መልስ, 答案, 回答, 答え, 解答, 答复, 回复, 回覆, 答, 답변, 답, 정답, 응답, उत्तरों, उत्तरहरू, উত্তরসমূহ, উত্তৰ, উত্তৰসমূহ, ଉତ୍ତର, ଉତ୍ତରଗୁଡ଼ିକ, ਉੱਤਰ, જવાબો, பதில்கள், விடை, సమాధానాలు, ಉತ್ತರಗಳು, ഉത്തരങ്ങൾ, පිළිතුර, ལན, መልሶች, መልሲ, መልስታት, 标准答, 모범답안",
        2: "solution, assistant, bot, ai, chatbot, chosen, targets, output text, target text, bot response, bot reply, ai response, ai message, agent message, targets pretokenized",
        0.1: "body, text, definition",
    },
}
# These tell something about a question or an answer, or mark what is not to be learnt.
OTHER = r"\b(id|ids|uuid|key|count|counts|number|num|no|nr|index|idx|start|end|offset|url|link|date|time|score|rating|type|category|topic|tag|tags|label|intent|length|len|normalized|lang|language|source|file|filename|path|votes|author|name|option|options|choice|choices|hint|context|contexts|passage|document|story|explanation|rationale|reason|reasoning|rubric|owner|status|dato|data|datum|stato|estado|etat|statut|autor|auteur|numero|zeitstempel|timestamp|typ|kategorie|thema|tipo|categoria|tema|fecha|categorie|kategori|konu|wrong|incorrect|false|falsche|errata|errada|errado|incorrecta|incorrecte|incorreta|distractor|rejected|negative|worst|model|llama|claude|gemini|mistral|mixtral|gemma|qwen|deepseek|bard|palm|copilot|rag|baseline|predicted|prediction|predict|pred|generated|gerada|hallucinated|aluno|alumno|eleve|ogrenci)\b|^answer.*\bstudents?\b|gpt|人|者|部门|部署|자명|답변자|질문자|답변일|질문일|类型|类别|分类|編號|编号|序号|番号|时间|日期|日時|来源|链接|标签|数量|种別|種別|カテゴリ|유형|번호|분류"
# These mark true answers, beside which others are what some system said; as words_of gives them.
TRUE_WORDS = set(
    "reference gold golden expected target correct ideal desired best official true truth gercek dogru richtige korrekte correcte exacte correta correto correcta corretta esatta juiste правильныи верныи poprawna spravna benar đung".split()
)
UNSPACED = re.compile("[฀-໿က-႟ក-៿぀-ヿ㐀-鿿가-힯]")  # from Thai to Korean
QUESTION_MARKS = ("?", "？", "؟", "՞")
# These ask without a question mark.
ASKING = r"(?i)^(what|who|whom|whose|which|when|where|why|how|is|are|was|were|do|does|did|can|could|should|would|tell|write|explain|give|describe|list|name|translate|summari[sz]e|generate|create|define|find|compare|calculate|compute|convert|classify|identify|provide|rewrite|suggest)\b|(か|吗|嗎|呢|까|까요|나요)[。．.]?$|什么|什麼|怎么|怎麼|怎样|如何|多少|哪里|哪些|อะไร|อย่างไร|ยังไง|ทำไม|ไหม|ที่ไหน|เมื่อไหร่|ใคร|[α-ωά-ώ];$"
# A link, a file, an address, a hash, a label such as Q1
KEY = re.compile(r"(?i)https?://\S+|\S+\.[a-z]\w{1,4}|\S+@\S+|[0-9a-f-]{16,}|[^\W\d]+\d+\W?|\w")
OPTION = re.compile(r"(?i)\bop[tcç]|choice|alternativ|answer[ _]?[\da-d]\b")
INDEX = re.compile(r"(?i)\d{1,2}|option[_ ]?\w")  # of an option; a letter is an answer
HEADER_ROWS = 20  # a header stands within so many filled rows
WIDEST = 50  # columns that are weighed against each other
MOST_WEIGHED = 2000  # cells of a column that decide what it holds
SENTENCE = 4  # words, on average, from which on cells may be answers whatever their header says
PHRASE = 1.9  # strength of a name that has a sure one in it
ASKING_WEIGHT = 0.7  # of a column where every cell asks, beside 1 between a sure and a likely name
CLEAR_LEAD = 0.25  # of the best two columns over any other two
CANNOT = -99.0  # strength of a column that cannot be what is asked for


def with_header(sheet: str, grid: list[list[str]], cfg: Config) -> Table:
    """Find the row of headers: with the person's names, names of both, or the first below a title; or none."""
    rows = list(itertools.dropwhile(lambda row: not any(row[1]), enumerate(grid, start=1)))
    top = [cells or [""] for _, cells in rows[:HEADER_ROWS]] or [[""]]
    wanted = {fold(name) for name in (cfg.QUESTION_COLUMN, cfg.ANSWER_COLUMN) if len(name) > 2}
    named: dict[int, float] = {}
    for i, cells in enumerate(top):
        sides = [name_strength(c, "question") - name_strength(c, "answer") for c in cells[:WIDEST]]
        if any(cells[1:]) or sides[0] > 1:  # no title
            named[i] = max(sides) - min(sides)  # so that one cell names questions, another answers
    sure = [i for i in named if wanted and wanted <= set(map(fold, top[i]))]
    sure += [i for i, strength in named.items() if strength >= 3 + PHRASE]
    header = [*sure, *named, 0][0]
    if not sure and is_data(top[header:]):
        return Table(sheet, [f"column {column_letter(i)}" for i in range(len(top[header]))], rows)
    body = rows[header + 1 :]
    second = named.get(header + 1, 0) >= 2 * PHRASE > named.get(header + 2, 0)
    unread = [(number, "a second header") for number, _ in body[:second]]
    return Table(sheet, top[header], body[second:], unread)


def is_data(rows: list[list[str]]) -> bool:
    """Whether the first row is one to learn, rather than what a form asked above its dates and answers."""
    for cell, *below in itertools.zip_longest(*rows, fillvalue=""):
        digits = [one[0].isdigit() for one in below if one]
        if cell[:1].isalpha() and len(digits) > 2 and all(digits):
            return False
    sentences = [cell for cell in rows[0] if word_count(cell) >= SENTENCE]
    asked = any(cell.endswith(QUESTION_MARKS) for cell in rows[0])
    return asked or any(asks(cell) or cell[-1] in ".。" for cell in sentences)


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
    bare = "".join(c for c in plain if unicodedata.category(c)[0] != "M")
    return re.findall(r"(?:ال(?=..))?([^\W_]+)", unicodedata.normalize("NFC", bare))


@functools.cache
def known_names(role: str) -> dict[str, float]:
    named = ((name, k) for k, names in NAMES[role].items() for name in names.split(", "))
    return {" ".join(words_of(name)): strength for name, strength in named}


@functools.cache
def name_strength(header: str, role: str) -> float:
    """How well a header says what is in its column, as in NAMES; -1 where it says something else."""
    words, known = words_of(header), known_names(role)
    name = " ".join(words)
    if header.startswith("__") or re.search(OTHER, f"{role} {name}"):
        return -1
    space = "" if UNSPACED.search(name) else " "
    sure = {one for one in known if known[one] == 3 and len(one) > 1} - TRUE_WORDS
    inside = any(space + one + space in space + name + space for one in sure)
    if name not in known and inside and len(words) <= 4:
        return PHRASE + (not TRUE_WORDS.isdisjoint(words))
    return known.get(name, 0)


class Column:
    """What is known of a column before two of them are chosen."""

    def __init__(self, table: Table, place: int) -> None:
        inside = place < len(table.header)  # every table has two columns, if need be an empty one
        raw = top_cells(table, place, MOST_WEIGHED) if inside else []
        self.place, self.header = place, table.header[place] if inside else ""
        self.title = preview(self.header) or column_letter(place)
        plain = re.fullmatch(r'[^"$`\\!\x00-\x1f]+', self.header)
        self.flag = f'"{self.header}"' if plain else column_letter(place)
        self.cells = [text for cell in raw if (text := one_text(cell))]
        self.lists = len(self.cells) < len(raw) / 2  # or objects without one text
        self.sample = preview(self.cells[0]) if self.cells else "(a list)" if raw else "(empty)"
        self.distinct, count = len(set(self.cells)), max(1, len(self.cells))
        self.asking = sum(map(asks, self.cells)) / count
        self.words = sum(map(word_count, self.cells)) / count
        wordy = sum(any(map(str.isalpha, c)) and not KEY.fullmatch(c[:200]) for c in self.cells)
        self.is_text = wordy > count / 2 and self.distinct > 0.3 * count  # not labels or figures
        self.strength = {role: name_strength(self.header, role) for role in NAMES}
        if self.sample[:7].casefold() == "select ":
            self.strength = {"question": 0, "answer": 2}  # a query in SQL

    def weighed(self, role: str, longest: float, alone: bool) -> float:
        """The strength of a name in the light of the cells."""
        named, asked = self.strength[role], role == "question"
        few = self.distinct < min(3, len(self.cells) - 1) and not INDEX.fullmatch(self.sample)
        impossible = (
            not (self.cells or self.lists),
            max(self.strength.values()) > max(1, named),  # the other of the two
            named == PHRASE and self.words < min(SENTENCE, longest / 1.5),  # who answered
            named < 3 and few,  # labels
            named <= 0 and not self.is_text,
            named < 0 and not (alone and asked),
            named == 0 and not (alone or asked or self.words >= SENTENCE),
        )
        return CANNOT if any(impossible) else max(0, named) - self.lists


def find_columns(table: Table, question: str, answer: str) -> Columns:
    """The columns of questions and answers: as the person said, or else the two that fit best."""
    columns = columns_weighed(table, {"question": question, "answer": answer})
    usable = sorted(columns, key=lambda one: -max(one.strength.values()))[:WIDEST]
    pairs = [(fit(*pair), *pair) for pair in itertools.permutations(usable, 2)]
    ranked = sorted(pairs, key=lambda pair: -pair[0])
    score, q, a = ranked[0]
    if score < 0 or not (question and answer):
        refuse_unclear(columns, ranked)
    named = round(q.strength["question"] + a.strength["answer"])
    if named < 1 and table.rows[0][0] > 1 and table.header[0] != "column A":
        row = " | ".join(one.title for one in columns)
        say("Header", f"{row}. If this is a pair itself, put a header above it.")
    said = [
        f'{role}s in "{one.title}" (by its {"name" if one.strength[role] > 0 else "content"})'
        for role, one in (("question", q), ("answer", a))
    ]
    said += [f'next best: "{q.title}" with "{a.title}"' for fit, q, a in ranked[1:2] if fit >= 0]
    free = {fold(one.header): one.place for one in reversed(columns) if one not in (q, a)}
    system = free.get("system", free.get("system_prompt", free.get("system prompt")))
    added = free.get("input", free.get("context"))  # to an instruction, as in Alpaca and Dolly
    added = added if fold(q.header) == "instruction" else None
    return Columns(q.place, a.place, ", ".join(said), named, system, added)


def columns_weighed(table: Table, names: dict[str, str]) -> list[Column]:
    """Every column, with how well it would do for questions and for answers."""
    wanted = {role: column_named(table, role, name) for role, name in names.items() if name}
    columns = [Column(table, i) for i in range(max(2, len(table.header)))]
    alone = sum(one.is_text or one.lists for one in columns) < 3  # what one is not, the other is
    unnamed = [one for one in columns if one.is_text and max(one.strength.values()) < PHRASE]
    longest = max((one.words for one in unnamed), default=0)
    for one in columns:
        one.strength = {role: one.weighed(role, longest, alone) for role in NAMES}
        one.strength |= {role: 3 if i == one.place else CANNOT for role, i in wanted.items()}
    return columns


def fit(question: Column, answer: Column) -> float:
    """How well two columns go together: by their names, and where those say little by what asks."""
    q, a = question.strength["question"], answer.strength["answer"]
    asking = (question.asking - answer.asking) * (q < PHRASE)
    top = list(zip(question.cells[:LIKELY], answer.cells, strict=False))
    whole = sum(len(one) > len(end) > 20 and one.endswith(end) for one, end in top) > len(top) / 2
    return q + a + ASKING_WEIGHT * asking - whole  # a prompt with its answer


def column_named(table: Table, role: str, name: str) -> int:
    """The position of a column that the person named, by its header or its letter."""
    known = [fold(h) for h in [*table.header, *map(column_letter, range(len(table.header)))]]
    if fold(name) in known:
        return known.index(fold(name)) % len(table.header)
    raise UserError(
        f"there is no column {name!r} (--{role}-column).{did_you_mean(name, table.header)}\n"
        f"The columns are: {', '.join(map(preview, filter(None, table.header)))}"
    )


def refuse_unclear(columns: list[Column], ranked: list[tuple[float, Column, Column]]) -> None:
    """Where the two that fit best may only seem to be right, show the columns and how to name them."""
    (best, question, answer), (second, *_) = ranked[:2]
    named = max(question.strength["question"], answer.strength["answer"]) >= PHRASE
    longer = question.words > answer.words and not question.header.startswith("column ")
    clear = best - max(0, second) >= CLEAR_LEAD and (named or not longer)  # an agent may ask back
    repeats = question.distinct < len(question.cells) / 2  # a topic, beside what people said on it
    topic = repeats and answer.strength["answer"] <= 0
    doubt = "it is not clear which columns hold the questions and the answers."
    if question.lists or answer.lists:
        doubt = "a column that is named like the questions or the answers holds lists."
    options = any(OPTION.search(one.header) for one in columns)
    if options and sum(map(bool, map(INDEX.fullmatch, answer.cells))) > 0.9 * len(answer.cells):
        doubt = f'"{answer.title}" only says which of the options is right. Make a column with the text of the right one.'
    elif clear and not (topic or question.lists or answer.lists):
        return
    lines = [f"{doubt} The columns, each with its first cell:"]
    lines += [f"  {one.title}: {one.sample}" for one in columns[:12]]
    flags = f"--question-column {question.flag} --answer-column {answer.flag}"
    raise ColumnsError("\n".join([*lines, f"Say which to use, for example: {flags}"]))


# -- Shapes: what the rows of a table are

NO_ANSWER = "no answer"
MORE_CELLS = "more cells than headers (put text with the separator in it in quotes)"
USER = "user human prompter customer instruction question [inst]"
ASSISTANT = "assistant gpt bot model chatgpt chatbot ai response answer output [/inst]"
ROLES = {"system": "system", "developer": "system"} | dict.fromkeys(USER.split(), "user")
ROLES |= dict.fromkeys(ASSISTANT.split(), "assistant")
ROLE_KEYS = ("role", "from", "sender")
CONTENT_KEYS = ("content", "value", "text", "parts", "message", "tool_calls")
SPEAKERS = "Human|User|Instruction|Question|Assistant|Response|Answer|AI|Function response"
TURN_MARKS = {  # of conversations in one text, and how many characters may stand before the first
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?=(?:user|assistant|system)\|>))\s*(\w+)(?:<\|end_header_id\|>|\|>)?": 500,
    r"(\[/?INST\])": 500,
    rf"(?i)###[ \t]*({SPEAKERS}|System|Model|Output|Bot|GPT)\s*:": 500,  # as in Alpaca
    rf"(?im)^[ \t]*({SPEAKERS}|Chatbot)\s*:": 0,
}
END_MARKS = r"<<SYS>>\s*|\n<</SYS>>|</?s>|<\|(im_end|eot_id|endoftext|end)\|>|<end_of_turn>"
TOOL_CALL = re.compile("<(tool_call|functioncall|function_call)>")  # written out in an answer
PICTURE = re.compile(r"^<(image|video|audio)>|\n<(image|video|audio)>$|<img>[^<\n]+</img>")
# Columns that may hold whole conversations, the best first; the first seven also as texts in turn
TALKS = "messages conversation conversations dialog dialogue dialogs data items contents chat_messages chat turns text prompt input chosen".split()
TALK_WORDS = set(TALKS[:7])
SYSTEMS = ("system", "system_prompt", "system_instruction")
MARKING = ("label", "correct", "is_correct", "accepted", "is_accepted")
YES, NO = {"true", "yes", "1", ""}, {"false", "no", "0"}
LONGEST_PATH = 100  # messages of a tree
LONGEST_TEXT = 1_000_000  # characters; a cell of a workbook holds 32,767

Rows = Iterable[tuple[int, Messages | str]]  # a conversation, or why there is none
Message = dict[str, Any]  # as it stands in the data


def conversations_of(table: Table, cfg: Config) -> tuple[str, Columns | None, Rows]:
    """The shape of a table, its two columns where it has them, and a conversation for each row."""
    if not (cfg.QUESTION_COLUMN or cfg.ANSWER_COLUMN):
        if roots := tree_roots(table):
            return "message tree", None, tree_conversations(roots, cfg)
        if roles := roles_around_talks(table):
            return "conversations", None, conversations_in(table, roles)
    found = find_columns(table, cfg.QUESTION_COLUMN, cfg.ANSWER_COLUMN)
    places = {found.system: "system", found.question: "user", found.input: "user"}
    roles = {i: role for i, role in places.items() if i is not None} | {found.answer: "assistant"}
    return "question and answer", found, conversations_in(table, roles)


def roles_around_talks(table: Table) -> dict[int, str]:
    """A column of conversations, with those of system prompts and of answers to the last questions.

    There is none where two other columns are called question and answer.
    """
    names = ["_".join(words_of(name)) for name in table.header]
    talks, sure = list[int](), set[str]()
    for i, name in enumerate(names):
        top = top_cells(table, i)
        if top and not is_conversation(top[0]):
            sure |= {role for role in NAMES if name_strength(table.header[i], role) > 2}
        found = [bool(turns_of(cell, in_turn=name in TALK_WORDS)) for cell in top]
        talks += [i] if name in TALKS and sum(found) > len(top) / 2 else []
    if not talks or len(sure) > 1:
        return {}
    talk = min(talks, key=lambda i: TALKS.index(names[i]))
    strengths = [name_strength(h, "answer") * (i != talk) for i, h in enumerate(table.header)]
    answers = [i for i, strength in enumerate(strengths) if strength == max(strengths) > 0]
    roles = {i: "system" for i, name in enumerate(names) if name in SYSTEMS} | {talk: ""}
    return roles | dict.fromkeys(answers[: len(answers) == 1], "assistant")


def column_cells(table: Table, column: int) -> list[tuple[int, Any]]:
    return [(number, row[column] if column < len(row) else "") for number, row in table.rows]


def conversations_in(table: Table, roles: dict[int, str]) -> Rows:
    """For each row the turns that its columns hold, in the order of their roles."""
    header, width = table.header, len(table.header)
    marking = [i for i in range(width) if "_".join(words_of(header[i])) in MARKING]
    marking = [i for i in marking if {fold(c) for _, c in column_cells(table, i)} <= YES | NO]
    true = [i for i in roles if TRUE_WORDS & {*words_of(header[i])}]
    for number, row in table.rows:
        cells, turns = row + [""] * (width - len(row)), list[Turn]()
        for i, role in roles.items():
            filled = (turn for turn in reversed(turns) if turn[1])
            last, said = next(filled, ("", "")) if role == "assistant" else ("user", "")
            if last == "user":
                turns += turns_of(cells[i], role)
            elif last == role and i in true and fold(one_text(cells[i]) or "") not in fold(said):
                turns = [(f'an answer that is not the one in "{preview(header[i])}"', "")]
        if marking and (wrong := [preview(header[i]) for i in marking if fold(cells[i]) in NO]):
            yield number, f'marked as wrong in "{wrong[0]}"'
        elif not table.sheet and any(row[width:]):
            yield number, MORE_CELLS
        else:
            yield number, "the header once more" if row == header else learnable(turns)


def learnable(turns: list[Turn]) -> Messages | str:
    """Turns in one form: the user first, the roles in alternation, an answer last; or why not.

    A system turn has no place of its own, so it goes before the first question. From the first turn
    of a tool, or of anybody else, nothing is taken: its output is nobody's answer.
    """
    if [role for role, _ in turns] == ["user", "assistant"] and all(
        map(is_seen, dict(turns).values())
    ):
        return [{"role": role, "content": text} for role, text in turns]
    known = list(itertools.takewhile(lambda turn: turn[0] in ROLES.values(), turns))
    said = [turn for turn in known if is_seen(turn[1])]
    system = [("user", text) for role, text in said if role == "system"]
    spoken = (turn for turn in said if turn[0] != "system")
    from_user = itertools.dropwhile(lambda turn: turn[0] != "user", spoken)  # after any greeting
    grouped_by_role = itertools.groupby([*system, *from_user], key=lambda turn: turn[0])
    talk = [(role, "\n\n".join(text for _, text in group)) for role, group in grouped_by_role]
    if len(talk) < 2 and len(known) < len(turns):
        return f"{turns[len(known)][0]} in place of the first question or answer"
    messages = [{"role": role, "content": text} for role, text in talk[: len(talk) // 2 * 2]]
    return messages or (NO_ANSWER if talk else "no question")


def is_conversation(cell: Any) -> bool:
    turns = cell if isinstance(cell, list) else []
    return bool(turns) and all(isinstance(one, dict) and role_and_content(one) for one in turns)


def role_and_content(turn: Message) -> tuple[str, Any] | None:
    for role, content in itertools.product(ROLE_KEYS, CONTENT_KEYS):
        if role in turn and content in turn:
            name = str(turn[role])
            return ROLES.get(name.casefold()) or f"the role {preview(name, 30)!r}", turn[content]
    return None


def turns_of(cell: Any, role: str = "", in_turn: bool = True) -> list[Turn]:
    """The turns of a whole conversation, or nothing; where the role is known, of one text."""
    if role and not is_conversation(cell):
        text = cell if isinstance(cell, str) else one_text(cell)
        return [turn_of({}, role, [None] if text is None else text)]
    if isinstance(cell, str):
        cell = turns_in_text(cell)
    elif in_turn and isinstance(cell, list) and all(isinstance(one, str) for one in cell):
        both = itertools.cycle(("user", "assistant"))
        cell = [{"role": role, "content": text} for role, text in zip(both, cell, strict=False)]
    return [turn_of(message) for message in cell] if is_conversation(cell) else []


def turn_of(message: Message, role: str = "", content: Any = None) -> Turn:
    """Who speaks, and what. For the role of a turn that cannot be learnt stands the reason."""
    if not role:
        role, content = role_and_content(message) or ("a message without a role", "")
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    text = "".join(one for one in texts if isinstance(one, str)).strip()
    if message.get("tool_calls") or message.get("function_call") or TOOL_CALL.search(text):
        role = "a tool call"
    elif message.get("weight") == 0:
        role = "an answer that is not to be learnt (weight 0)"
    elif len(text) > LONGEST_TEXT:
        role = f"a text of more than {LONGEST_TEXT:,} characters"
    elif PICTURE.search(text) or not all(isinstance(one, str) for one in texts):
        role = "a picture, a list or an object in place of one text"
    return role, text


def turns_in_text(text: str) -> list[Message]:
    """The turns of a text such as "### Human: Why? ### Assistant: So."; nothing for any other."""
    for mark, longest_preamble in TURN_MARKS.items():
        preamble, *pieces = re.split(mark, re.sub(END_MARKS, "", text))
        turns = [{"role": r, "content": c} for r, c in zip(pieces[::2], pieces[1::2], strict=True)]
        begin = [r for r in map(ROLES.get, map(str.casefold, pieces[::2])) if r != "system"][:2]
        if begin == ["user", "assistant"] and len(preamble.strip()) <= longest_preamble:
            return turns
    return []


def tree_roots(table: Table) -> list[tuple[int, Message]]:
    """The first messages of trees, each with its row and its replies in it."""
    names = [fold(name) for name in table.header]
    if not {"message_id", "parent_id", "text", "role"} <= set(names):
        prompts = column_cells(table, names.index("prompt")) if "prompt" in names else []
        is_tree = bool(prompts) and isinstance(prompts[0][1], dict)
        return [(n, cell if isinstance(cell, dict) else {}) for n, cell in prompts if is_tree]
    rows = [(n, dict(zip(names, row, strict=False)) | {"replies": []}) for n, row in table.rows]
    replies = {str(one["message_id"]): one["replies"] for _, one in rows if one.get("message_id")}
    for _, message in rows:
        replies.get(str(message.get("parent_id")), []).append(message)
    return [(number, one) for number, one in rows if str(one.get("parent_id")) not in replies]


def tree_conversations(roots: list[tuple[int, Message]], cfg: Config) -> Rows:
    """From every first message down to an answer: along the best replies, or along all of them."""
    for number, root in roots:
        language = str(root.get("lang") or cfg.LANGUAGE)
        if root.get("parent_id"):
            yield number, "the message that it answers is not in the file"
        elif cfg.LANGUAGE not in ("", language.partition("-")[0]):
            yield number, f"the language is {language}, not {cfg.LANGUAGE}"
        else:
            for turns in tree_paths([], [root], cfg.CONVERSATION_PATHS == "all"):
                yield number, learnable(turns)


def tree_paths(turns: list[Turn], replies: list[Message], every: bool) -> Iterator[list[Turn]]:
    """The turns of a path, with what follows it: the best reply, or each of them."""
    live = [one for one in replies if fold(one.get("deleted", "")) != "true"]
    live.sort(key=lambda one: (str(one.get("rank")) or "None").rjust(9))  # without a rank: last
    live = live[: None if every else 1] if len(turns) < LONGEST_PATH else []
    for reply in live:
        yield from tree_paths([*turns, turn_of(reply)], objects_in(reply, "replies"), every)
    if not live:
        yield turns


# -- Cleaning

UNSEEN = ("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp")  # kinds of characters: blanks, accents alone, …
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # blanks that Unicode calls letters or symbols
MARKS = str.maketrans("", "", " _*`'\"“”„‘’«»()[]:;!?¿¡…。、")  # these make no other text


def is_seen(text: str) -> bool:
    return any(unicodedata.category(c) not in UNSEEN and c not in FILLERS for c in text)


def bare(text: str) -> str:
    """Equal for texts that differ only in case, blanks and marks."""
    return re.sub(r"[.,-](?!\d)", "", fold(text).translate(MARKS)) or text


def without_copies(pairs: list[Pair]) -> tuple[list[Pair], list[Note]]:
    """The first of each pair, and a note for every other."""
    first_seen, copies = dict[tuple[str, ...], Pair](), list[Note]()
    for pair in pairs:
        first = first_seen.setdefault(tuple(bare(one["content"]) for one in pair.messages), pair)
        if first is not pair:
            copies.append(Note(*pair[1:], f"a copy of an earlier row ({first.place})"))
    return list(first_seen.values()), copies


def by_kind(notes: Iterable[Note]) -> dict[str, list[Note]]:
    """Notes of one kind together, whatever row they point to; the most frequent kind first."""
    kinds = defaultdict[str, list[Note]](list)
    for note in notes:
        kinds[note.reason.partition(" (row ")[0]].append(note)
    return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))


def grouped(notes: Sequence[Note], most: int = 1000) -> list[str]:
    """One line per kind, with its rows, and their sheets where there are several."""
    several, lines = len({note.sheet for note in notes}) > 1, list[str]()
    for kind, found in by_kind(notes).items():
        rows = [f"{one.row} of {one.sheet}" if several else str(one.row) for one in found]
        places = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if rows[8:] else "")
        lines += [f"{kind}: {len(rows)} rows ({places})" if rows[1:] else f"{kind}: row {places}"]
    more = f"and {len(lines) - most} more, in the report of the command check"
    return lines[:most] + [more] * (len(lines) > most)


def column_names(pairs: Pairs) -> dict[str, str | None]:
    return dict(zip(("question_column", "answer_column"), [*pairs.used, None, None], strict=False))


def say_pairs(pairs: Pairs) -> None:
    sheet = f', sheet "{preview(pairs.table.sheet)}"' if pairs.table.sheet else ""
    say("Data", f"{pairs.name}{sheet}: {pairs.rows_read} rows, {len(pairs.kept)} pairs")
    if pairs.columns:
        say("Columns", pairs.columns.reason)
        unused = [name for name in pairs.table.header if name and name not in pairs.used]
        for what, names in ("joined to the question", pairs.used[2:]), ("not used", unused):
            if names:
                say("", f"{what}: " + ", ".join(f'"{preview(name)}"' for name in names[:8]))
    else:
        say("Shape", f"{pairs.shape}; every answer in them is taught")
    for pair in pairs.kept[:3]:
        say("", f"row {pair.row}: {preview(pair.question, 27)} → {preview(pair.answer, 27)}")
    if pairs.dropped:
        say("Left out", "\n".join(grouped(pairs.dropped, 4)))


# -- Quality: what is taught, and yet looks wrong

ADVICE = {  # where the finding does not say it all
    "left-over HTML": "take out tags and entities such as <br> and &nbsp;",
    "control marks of a model": "take out marks such as </s> and [INST]",
    "broken letters": "open the source again as UTF-8: Ã© is a broken é",
    "an answer of one letter": "write the answer out: what option B says",
    "an answer of one digit": "write the answer out, if the number stands for an option",
    "very unequal lengths": "see whether text slipped into the wrong cell",
    "another answer to the same question": "keep the right one, or make one of them",
    "a copy of an earlier row": "nothing, the first one is taught",
}
# The second byte of a letter in UTF-8, 80 to BF, read as Windows-1252. What may follow a capital letter
# with an accent in good text, as in VÝŠKA or «É», counts only behind the most frequent ones.
TAIL = "€‚ƒ„†‡ˆ‰‹Œ•˜™›œŸ¡-ª¬-º¼-¿"
PATTERNS = {  # looked for in the texts of a pair, with "\n\0\n" between them
    "left-over HTML": r"(?is)\A(?=.*?(?:</?(?:a|b|i|u|p|[bh]r|div|span|em|strong|su[bp]|font|pre|code|[uo]l|li|img|table|t[rdh]|h[1-6]|blockquote|script|html|body)"
    r"(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>|&(?:nbsp|amp|[lg]t|quot|apos|hellip|[mn]dash|[lr][sd]quo|#\d{2,6}|#x[\da-f]{2,5});))"
    r"(?!.*(?:`|(?<![</.\w])(?:x?html|xml|css)\b))",
    "control marks of a model": r"<\|\w{1,40}\|>|</s>|<(?:s|bos|eos|pad|unk|(?:start|end)_of_turn)>|<</?SYS>>|\[/?INST\]"
    r"|(?m:^(?:Instruct|Output):)",  # the last are those of phi-2's prompt
    "broken letters": rf"[\x80-\x84\x86-\x9f\ufffd]|[Â-ß][{TAIL}]|[ÂÃÐÑ][\xa0«»–—ŠŽšž]|ï»¿|[à-ô][{TAIL}][{TAIL}\xa0«»‘-”–—…ŠŽšž]",
    "placeholder text": r"(?is)(?:\A|\0\n)(?:[\[({<*'\"]*(?:(?-i:TODO|todo)|to[ -]do|tb[acd]|fixme|n/a|n\.a\.?|x{3,}|test(?:ing)?|lorem\s+ipsum[^\0]*|placeholder"
    r"|(?:(?:insert|put|write|type|enter|add)\b[^\0]{1,60}\b|(?:your|the)\s+(?:question|answer|text)\s+)(?:goes\s+)?here)[\])}>*'\"!:.]*"
    r"|…|[?？.…_-]{2,})(?:\n\0|\Z)",  # "Todo" is Spanish
    "NULL instead of an answer": r"\0\n(?:NULL|null|None|NaN|nan|nil|#N/A)\Z",
    # in Chinese, Japanese and Korean one letter is a word
    "an answer of one letter": r"\A[^\0]+\0\W*[^\W\d_\u3040-\ud7ff]\W*\Z",
}


class Quality(NamedTuple):
    counted: int  # rows with content
    good: int  # of these, what is taught with nothing found in it
    score: float
    findings: list[list[str]]  # for every pair that is kept
    flagged: list[Note]  # the same, with their rows
    parts: dict[str, list[Note]]  # by kind: what is flagged, and what is left out

    def __str__(self) -> str:
        return f"{self.good * 100 // self.counted / 100:.2f}"  # 0.999 is not yet 1.00


def quality_of(kept: Sequence[Pair], dropped: Sequence[Note]) -> Quality:
    """What looks wrong in each pair, by itself and beside the others, and what that comes to."""
    findings, asked = list(map(flaws_of, kept)), defaultdict[str, list[int]](list)
    for i, pair in enumerate(kept):
        asked[bare("\n".join(one["content"] for one in pair.messages[:-1]))].append(i)
    for same in (rows for rows in asked.values() if rows[1:]):
        for i, other in zip(same, [*same[1:], same[0]], strict=True):
            findings[i].append(f"another answer to the same question ({kept[other].place})")
    if {pair.answer for pair in kept} <= {*"0123456789"}:
        findings = [[*found, "an answer of one digit"] for found in findings]
    flagged = [Note(*pair[1:], what) for i, pair in enumerate(kept) for what in findings[i]]
    uncounted = ("blank", "the language is ")  # reasons that say nothing of the quality
    left_out = [note for note in dropped if not note.reason.startswith(uncounted)]
    counted, good = len(kept) + len(left_out), findings.count([])
    score = good / counted if counted else 1.0
    return Quality(counted, good, score, findings, flagged, by_kind(flagged + left_out))


def flaws_of(pair: Pair) -> list[str]:
    """What can be seen in one pair alone."""
    texts = [message["content"] for message in pair.messages]
    whole, bares = "\n\0\n".join(texts), list(map(bare, texts))
    sides = sum(map(len, texts[::2])), sum(map(len, texts[1::2]))
    found = {kind: re.search(pattern, whole) for kind, pattern in PATTERNS.items()} | {
        "a very short question": len(texts[0].strip(" ?!.:")[:9].encode()) < 3,
        "an answer that repeats its question": any(map(str.__eq__, bares[::2], bares[1::2])),
        "very unequal lengths": max(sides) > max(1000, 50 * max(40, min(sides))),
    }
    return [kind for kind, is_there in found.items() if is_there]


def say_quality(quality: Quality, minimum: float) -> None:
    if quality.counted:
        share = f"{quality.good} of {quality.counted} rows with content are taught and look right"
        say("Quality", "\n".join([f"{quality}: {share}", *grouped(quality.flagged, 4)]))
    if quality.score < minimum:
        say("Warning", f"the quality is below {minimum} (MIN_QUALITY). What to do about it:")
        for kind in list(quality.parts)[:3]:
            say("", f"{kind}: {ADVICE.get(kind, 'fix these rows, or fill them in')}")


# ==================================================================================================
# 4  Prompts and tokens
# ==================================================================================================

IGNORE = -100  # the label that torch's cross entropy leaves out
FEWEST_TO_HOLD_OUT = 5  # of fewer questions than this, each is worth more taught than measured
BLANK = "\ue000{}\ue001"  # stands for the text of a message while a template is looked at
PHI_2_PROMPT = "Instruct: {question}\nOutput:"  # of phi-2's model card; it has no chat template
PROMPT_AS_TEMPLATE = (  # in Jinja; `before` and `after` are set to what stands around a question
    "{%- set ns = namespace(system='') -%}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{%- set ns.system = m['content'] + '\\n\\n' -%}{%- elif m['role'] == 'user' -%}"
    "{{- before + ns.system + m['content'] + after -}}{%- set ns.system = '' -%}"
    "{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)


class Example(TypedDict):
    """One conversation as the model sees it; a label is IGNORE where nothing is to be learnt."""

    input_ids: list[int]
    labels: list[int]


def set_template(cfg: Config, tokenizer: Any) -> None:
    """Give the tokenizer the one prompt: PROMPT_TEMPLATE, the model's own chat template, or phi-2's.

    It is saved with the adapter, so that other programs ask as the training did.
    """
    if tokenizer.chat_template and not cfg.PROMPT_TEMPLATE:
        try:
            talk = "".join(text for text, _ in pieces(tokenizer, ("user", "assistant") * 2))
            if re.findall(BLANK.format("(.)"), talk) != ["0", "1", "2", "3"]:
                raise ValueError("it leaves out what is said")
            tokenizer.eos_token = special_tokens(tokenizer).findall(talk)[-1]  # what ends a turn
            return
        except Exception as error:  # a template is a program of its maker's
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
    """With blanks, so that the template can neither trim a text nor take it for a part of its own."""
    talk = [{"role": role, "content": BLANK.format(i)} for i, role in enumerate(roles)]
    how = {"tokenize": False, "add_generation_prompt": asking, "chat_template": template}
    return str(tokenizer.apply_chat_template(talk, **how))


def pieces(tokenizer: Any, roles: tuple[str, ...]) -> list[tuple[str, bool]]:
    """A conversation of these roles, cut where the model begins to speak and where its turn ends;
    True for what it says. Before that stands exactly what stands there when it is asked."""
    render = functools.partial(rendered, tokenizer, tokenizer.get_chat_template())
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    found, done = [], ""
    for i in answers if roles[-1] == "assistant" else [*answers, len(roles)]:
        asked = render(roles[:i], True)
        if not asked.startswith(done):
            raise ValueError("it tells earlier turns in another way later on")
        found.append((asked.removeprefix(done), False))
        if i < len(roles):
            told = render(roles[: i + 1], False).removeprefix(asked)
            lead, text, rest = told.partition(BLANK.format(i))
            end = special_tokens(tokenizer).search(rest)
            turn = (lead if lead.isspace() else "") + text + rest[: end.end() if end else 0]
            found.append((turn if end else turn + tokenizer.eos_token, True))
            done = asked + turn
    return found


def encode(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Example:
    """Ids and labels, made together: the answers are learnt, each with its end of turn.

    Training and every way of asking go through it. All is cut into tokens together, as other programs
    do, unless a prompt would get other tokens than when it is asked, or a text quotes a special token.
    """
    marks, texts = special_tokens(tokenizer), [message["content"] for message in messages]
    quoting = any(map(marks.search, texts))

    def cut(piece: str, plain: bool = False) -> list[int]:
        text = re.sub(BLANK.format(r"(\d+)"), lambda number: texts[int(number[1])], piece)
        how = {"add_special_tokens": False, "split_special_tokens": plain}
        return list(tokenizer(text, **how)["input_ids"])

    ids: list[int] = []
    labels: list[int] = []
    whole = ""
    for piece, learnt in pieces(tokenizer, tuple(message["role"] for message in messages)):
        whole += piece
        more = cut(whole)
        if quoting or more[: len(ids)] != ids:  # then by itself, and what is between marks as text
            parts = [cut(part, plain=not n % 2) for n, part in enumerate(marks.split(piece))]
            more = [*ids, *itertools.chain(*parts)]
        labels += more[len(ids) :] if learnt else [IGNORE] * (len(more) - len(ids))
        ids = more
    return {"input_ids": ids, "labels": labels}


def prompt_in_words(tokenizer: Any) -> str:
    return pieces(tokenizer, ("user",))[0][0].replace(BLANK.format(0), "{question}")


def marked(tokenizer: Any, example: Example) -> str:
    """An example as text, with what is learnt between [[ and ]]."""
    tokens = zip(example["input_ids"], example["labels"], strict=True)
    text = ""
    for learnt, group in itertools.groupby(tokens, key=lambda one: one[1] != IGNORE):
        part = tokenizer.decode([one for one, _ in group], clean_up_tokenization_spaces=False)
        text += f"[[{part}]]" if learnt else part
    return text


def split_validation(pairs: Sequence[Pair], fraction: float, seed: int) -> list[bool]:
    """Which pairs are not taught but kept to measure: all answers to a question share their side."""
    questions = [fold(pair.messages[0]["content"]) for pair in pairs]
    different = sorted(set(questions))
    random.Random(seed).shuffle(different)
    enough = fraction > 0 and len(different) >= FEWEST_TO_HOLD_OUT
    away = set(different[: max(1, round(fraction * len(different)))] if enough else ())
    return [question in away for question in questions]


# ==================================================================================================
# 5  Device and plan
# ==================================================================================================

# Security floors, too: older versions run code that hides in files of weights, torch before 2.10 in
# spite of weights_only, transformers up to 5.3. requirements-finetune.txt and the head say the same.
FLOORS = dict(
    package.split(">=")
    for package in "python>=3.11 torch>=2.10 transformers>=5.6 peft>=0.18 accelerate>=1.10 "
    "bitsandbytes>=0.48 datasets>=4.0 pandas>=2.2.2 openpyxl>=3.1.3 matplotlib>=3.9 "
    "seaborn>=0.13".split()
)


def installed_version(package: str) -> str | None:
    from importlib import metadata

    if package == "python":
        return sys.version.split()[0]
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def installed_versions() -> dict[str, str | None]:
    return {package: installed_version(package) for package in FLOORS}


def is_below(version: str | None, floor: str) -> bool:
    """Whether a package is missing or too old; a trial build counts as its release."""
    release, least = (re.findall(r"\d+", re.split("[^0-9.]", v)[0]) for v in (version or "", floor))
    return [*map(int, release)] < [*map(int, least)]


class Device(NamedTuple):
    """Where the model runs and in which numbers, and what it can do."""

    kind: str  # "cuda", "mps" or "cpu"
    dtype: str  # of the computation; the weights of the adapter are float32 everywhere
    four_bit: bool
    reason: str  # for the person
    flops: float = 0  # operations in a second
    bandwidth: float = 0  # bytes in a second
    memory: float = 0  # bytes that are free


class Outline(NamedTuple):
    """What a model is made of, which can be known before its weights are here."""

    blocks: int
    hidden: int  # numbers for a token between the blocks
    vocabulary: int
    parameters: int
    linear: dict[str, tuple[int, int]]  # inputs and outputs of each linear layer but the last
    stateful: bool = False
    adapted: Sequence[tuple[int, int]] = ()  # those of the layers that get an adapter


class Plan(NamedTuple):
    """How much work the run is, and how it is laid out."""

    steps_per_epoch: int
    steps: int
    warmup_steps: int
    tokens_per_epoch: int
    pairs: int  # in a step
    tokens_at_once: int  # at most, unless one pair alone has more
    checkpointing: bool
    reason: str
    seconds: float | None = None  # of all steps
    asking_seconds: float = 0  # of the questions at the end
    memory_gb: float | None = None  # at most


# Reached with large products of 16-bit numbers, by arithmetic from public figures; none was timed here.
GPUS = {  # capability; operations and bytes in a second, and bytes that are free
    "T4": ((7, 5), (22e12, 240e9, 15.3e9)),
    "L4": ((8, 9), (60e12, 240e9, 23.1e9)),
    "A100": ((8, 0), (180e12, 1200e9, 41.9e9)),
}
# More tokens at once bring no speed: a GPU of Colab's is busy, and a processor's cache is full.
MOST_TOKENS_AT_ONCE = {"cuda": 3000, "mps": 3000, "cpu": 1000}
USABLE_MEMORY = {"cuda": 0.9, "mps": 0.8, "cpu": 0.8}  # of what is free; the rest is lost in gaps
LIBRARIES = {"cuda": 0.6e9, "mps": 0.93e9, "cpu": 0.93e9}  # bytes
ANSWERS_AT_ONCE = 8  # each remembers all of its tokens: phi-2 0.3 MB for one
# Fitted to what a processor took (benchmarks/estimate.py); the rest follows from shapes.
PASSES = 10  # how often a kept number is written or read
NARROW = 4  # how much longer an operation takes in products as narrow as an adapter's
# Counted in a block: operations of a row, there and back; of each example in it; of a token told.
OF_ROW, OF_EXAMPLE, OF_TOKEN = 400, 10, 125
LAUNCH = 11e-6  # seconds in which Colab's processor starts one


def choose_device(
    cfg: Config, kind: str, capability: tuple[int, int] = (0, 0), *figures: float
) -> Device:
    """How a device is used; its figures are those of GPUS."""
    if kind == "mps" and cfg.LOAD_IN_4BIT:
        raise UserError("LOAD_IN_4BIT does not work on an Apple GPU. Leave it out.")
    if kind != "cuda" or cfg.MODEL_NAME == DEMO_MODEL:
        why = {"mps": "an Apple GPU", "cpu": "no GPU, so this is slow"}.get(kind)
        why = "the demo model is small" if cfg.MODEL_NAME == DEMO_MODEL else why
        return Device(kind, "float32", bool(cfg.LOAD_IN_4BIT), f"float32: {why}", *figures)
    # not torch.cuda.is_bf16_supported(): it says yes on a T4, where bfloat16 is emulated
    native = capability >= (8, 0)
    dtype, why = ("bfloat16", "native here") if native else ("float16", "too old for bfloat16")
    four_bit = cfg.LOAD_IN_4BIT is not False
    bits = "4 bits to save memory" if four_bit else "16 bits, as set"
    return Device(kind, dtype, four_bit, f"{dtype} ({why}); weights in {bits}", *figures)


def device_here(cfg: Config) -> Device:
    """What this machine has; a GPU that is not in the table counts as one that is."""
    import psutil
    import torch

    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        like = "T4" if capability < (8, 0) else "A100"
        _, (flops, bandwidth, _) = GPUS[next((gpu for gpu in GPUS if gpu in name), like)]
        memory, _ = torch.cuda.mem_get_info()
        device = choose_device(cfg, "cuda", capability, flops, bandwidth, memory)
    else:
        is_apple = torch.backends.mps.is_available()
        name, kind = ("the Apple GPU", "mps") if is_apple else ("the processor", "cpu")
        flops, bandwidth = (2e12, 60e9) if is_apple else (flops_of_processor(), 10e9)  # of an M1
        memory = psutil.virtual_memory().available / world_size()
        device = choose_device(cfg, kind, (0, 0), flops, bandwidth, memory)
    return device._replace(reason=f"{name}, {device.reason}")


@functools.cache
def flops_of_processor() -> float:
    """Operations in a second, by a product that takes a fraction of one."""
    import torch

    square = torch.ones(1024, 1024)
    for _ in range(2):  # the first wakes the threads
        start = time.perf_counter()
        square @ square
    return 2 * 1024**3 / (time.perf_counter() - start)


def cost_of_row(
    cfg: Config, model: Outline, device: Device, recomputing: bool, *row: float
) -> tuple[float, float]:
    """Seconds there and back, and bytes at the worst moment, for so many tokens, tokens learnt and examples.

    A block keeps for each token, for the way back, what its attention and norms need (in float32 also
    where all else is in 16 bits) and its wide part; the tests count the same in real models.
    """
    tokens, learnt, examples = row
    size = 4 if device.dtype == "float32" else 2
    inner = max(inputs for inputs, _ in model.linear.values())
    gated = any(name.endswith(("gate_proj", "gate_up_proj")) for name in model.linear)
    wide = (3 if gated else 1) + any(inputs == inner for inputs, _ in model.adapted)
    kept = size * ((9 if gated else 7) * model.hidden + wide * inner)
    kept += 0 if size == 4 else 4 * model.hidden
    dropped = bool(cfg.LORA_DROPOUT) * sum(inputs for inputs, _ in model.adapted)
    blocks, passing = model.blocks * kept + dropped, 4.0 * size * inner
    if recomputing:
        blocks, passing = model.blocks * 4 * model.hidden, kept + dropped / model.blocks
    weights = sum(map(math.prod, model.linear.values()))
    adapter = cfg.LORA_R * sum(map(sum, model.adapted))
    memory = LIBRARIES[device.kind] + model.parameters * (0.65 if device.four_bit else size)
    memory += 16 * adapter + tokens * (blocks + passing) + learnt * 12 * model.vocabulary
    products = tokens * (2 * weights * (3 if recomputing else 2) + 6 * NARROW * adapter)
    products += learnt * 4 * model.hidden * model.vocabulary
    moved = PASSES * tokens * model.blocks * kept + (5 * weights if device.four_bit else 0)
    launching = model.blocks * (OF_ROW + OF_EXAMPLE * examples) * LAUNCH
    return max(products / device.flops + moved / device.bandwidth, launching), memory


def seconds_to_ask(cfg: Config, model: Outline, device: Device, learnt: Sequence[int]) -> float:
    """Untrained, the model goes on as long as it may; tuned, at most as long as what it has learnt."""
    groups = math.ceil(min(cfg.EVAL_ANSWERS, len(learnt)) / ANSWERS_AT_ONCE)
    tokens = groups * (cfg.MAX_TOKENS + min(cfg.MAX_TOKENS, max(learnt)))
    size = 2.5 if device.four_bit else 4 if device.dtype == "float32" else 2
    work = model.parameters * (2 * ANSWERS_AT_ONCE / device.flops + size / device.bandwidth)
    return tokens * max(work, model.blocks * OF_TOKEN * LAUNCH)


def plan_run(
    cfg: Config, examples: Sequence[Example], device: Device, model: Outline | None = None
) -> Plan:
    """The steps, and how many tokens go through the model at once; neither changes the result."""
    lengths = sorted((len(example["labels"]) for example in examples), reverse=True)
    learnt = [sum(label != IGNORE for label in example["labels"]) for example in examples]
    pairs = cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS
    epoch = math.ceil(len(lengths) / pairs)
    steps = cfg.MAX_STEPS or epoch * cfg.NUM_EPOCHS
    figures = (epoch, steps, int(cfg.WARMUP_RATIO * steps), sum(lengths), pairs)
    most, recompute = sum(lengths[:pairs]), cfg.GRADIENT_CHECKPOINTING
    at_once = cfg.TOKENS_AT_ONCE or min(most, MOST_TOKENS_AT_ONCE[device.kind])
    reason = "as set" if cfg.TOKENS_AT_ONCE else "more would bring no speed"
    if model is None:
        return Plan(*figures, at_once, bool(recompute), reason)
    cost = functools.partial(cost_of_row, cfg, model, device)
    usable = USABLE_MEMORY[device.kind] * device.memory
    for recomputing in [False, True] if recompute is None else [recompute]:
        fixed = cost(recomputing, 0, 0, 0)[1]
        room = int(max(0, usable - fixed) / (cost(recomputing, 1, 1, 1)[1] - fixed))
        if room >= lengths[0]:
            break
    if not cfg.TOKENS_AT_ONCE and room < at_once:
        at_once, reason = max(room, lengths[0]), f"as many as fit into {usable / 1e9:.0f} GB"
    if recomputing:
        why = "as set" if recompute else "or one pair alone would not fit"
        reason += f"; values are computed again instead of kept, {why}"
    rows = math.ceil(sum(lengths) / epoch / at_once) * epoch
    seconds, _ = cost(recomputing, *(n / rows for n in (sum(lengths), sum(learnt), len(lengths))))
    tokens = max(min(at_once, most), lengths[0])
    _, memory = cost(recomputing, tokens, tokens * sum(learnt) / sum(lengths), 1)
    seconds *= rows * steps / epoch / world_size()
    asking = seconds_to_ask(cfg, model, device, learnt)
    return Plan(*figures, at_once, recomputing, reason, seconds, asking, memory / 1e9)


def in_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# -- Several processes: accelerate launch or torchrun starts one for each GPU, the Trainer shares the work

ENDED = (
    "Another process of this training has ended, so this one ends, too.\n"
    "Run the same command again: it goes on from the newest checkpoint."
)


def world_size() -> int:
    """How many train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes."""
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
    if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
        raise UserError("The processes have to be on one machine: --num_machines 1")
    for kind in ("DeepSpeed", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{kind.upper()}", "").lower() == "true":
            raise UserError(f"{kind} does not work here. Launch with --multi_gpu instead.")
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    if 0 < torch.cuda.device_count() < world_size():
        raise UserError(
            f"{world_size()} processes were launched, and there are {torch.cuda.device_count()} GPUs.\n"
            "Launch one for each GPU: --num_processes, or --nproc-per-node of torchrun"
        )
    patience = timedelta(days=1)  # the first may be long about a download
    together = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
    with together.main_process_first():
        yield


# ==================================================================================================
# 6  Models
# ==================================================================================================

PINNED_REVISIONS = {"microsoft/phi-2": "ef382358ec9e382308935a992d908de099b64c23"}
FLAT_ATTENTION = "one_example_at_a_time"
SHARING_ATTENTION = ("full_attention", "sliding_attention")  # kinds of layers in rows of several
# These warn of what is done here in another way: kernels, the best adapter, the age of checkpoints.
NOISY = (
    "bitsandbytes.backends.cpu.ops",
    "transformers.trainer_callback",
    "transformers.trainer_utils",
)
ADAPTER = "adapter_model.safetensors"
TARGET_GROUPS = {
    "all-linear": re.compile(""),
    "attention": re.compile(r"\b(self_attn|attn|attention|self_attention)\."),
    "mlp": re.compile(r"\b(mlp|feed_forward|ffn)\."),
}
BASE_PLACE = "base_model_folder.txt"  # where a base lies on this computer: nobody else's business
PICKLES = tuple(".bin .ckpt .dill .joblib .pickle .pkl .pt .pth".split())  # they can run programs
DEMO_STEPS = 100  # of reading before it is taught anything; fewer leave it without words
# 4 heads of 80 as in phi-2, and a multiple of the 64 that 4 bits need; MAX_LENGTH decides the length
DEMO_SIZES = {"hidden_size": 320, "intermediate_size": 1280, "vocab_size": 1024}
DEMO_SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32_768}
DEMO_SHAPE: dict[str, Any] = DEMO_SIZES | {
    "partial_rotary_factor": 0.4,
    "resid_pdrop": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def demo_folder() -> Path:
    """The demo model, built on first use and then kept with the other caches of this computer."""
    from pydoc_data import topics  # a book of plain English that every Python carries

    book = "\n".join(text for _, text in sorted(topics.topics.items()))
    book = re.sub(r"[ \t]+", " ", book)
    recipe = repr((DEMO_SHAPE, DEMO_STEPS, book, installed_version("transformers")))
    folder = cache_folder(f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}", "demo")
    if not (folder / "model.safetensors").is_file():
        say("Model", "building the demo model (once, under a minute)")
        with atomic_folder(folder) as staged:
            tokenizer = demo_tokenizer(book)
            tokenizer.save_pretrained(staged)
            demo_model(tokenizer.backend_tokenizer.encode(book).ids).save_pretrained(staged)
    return folder


def demo_tokenizer(book: str) -> transformers.PreTrainedTokenizerBase:
    """Like phi-2's: byte pairs, so that no text is unknown, and one sign for every purpose."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end, pairs = "<|endoftext|>", ByteLevelBPETokenizer()
    size = DEMO_SHAPE["vocab_size"]
    pairs.train_from_iterator([book], size, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs._tokenizer,
        model_max_length=DEMO_SHAPE["max_position_embeddings"],
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
    )


def demo_model(book: Sequence[int]) -> transformers.PreTrainedModel:
    """A small Phi that has read one book: it knows words, and no answers."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM, set_seed

    set_seed(0)
    model, ids = PhiForCausalLM(PhiConfig(**DEMO_SHAPE)), torch.tensor(book)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=DEMO_STEPS)
    for _ in range(DEMO_STEPS):
        starts = torch.randint(len(ids) - 128, (16,)).tolist()
        batch = torch.stack([ids[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


# -- The base model


class UnreachableError(UserError):
    """The model is not on this computer, and the Hub cannot be asked for it."""


def local_base(cfg: Config) -> Path | None:
    """The folder of the base model, where MODEL_NAME names one and not a model of the Hub."""
    folder = demo_folder() if cfg.MODEL_NAME == DEMO_MODEL else local_path(cfg.MODEL_NAME)
    return folder if os.path.isdir(folder) else None


def base_name(cfg: Config) -> str:
    """The base model as others may read it: its name on the Hub, or its folder's without the path."""
    folder = local_base(cfg)
    return f"./{folder.resolve().name}" if folder else cfg.MODEL_NAME


def model_revision(cfg: Config) -> str | None:
    return cfg.MODEL_REVISION or PINNED_REVISIONS.get(cfg.MODEL_NAME)


def base_source(cfg: Config) -> dict[str, Any]:
    """Where transformers finds the base: a folder, or from now on this one commit on the Hub."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    if folder := local_base(cfg):
        return {"pretrained_model_name_or_path": str(folder), "trust_remote_code": False}
    name, revision = cfg.MODEL_NAME, model_revision(cfg)
    here = try_to_load_from_cache(name, "config.json", revision=revision)
    commit = Path(here).parent.name if isinstance(here, str) else ""
    if not commit or commit != revision:  # what is newest may change at any time
        try:
            commit = HfApi().model_info(name, revision=revision, timeout=10).sha or ""
        except errors.HfHubHTTPError:
            if not commit:
                raise
        except Exception as error:  # of the network, each library has its own
            if not commit:
                raise ConnectionError(f"no way to the Hub ({type(error).__name__})") from None
    cfg.MODEL_REVISION = commit
    # without code of the model's own, or else transformers asks, and a y runs it
    return {"pretrained_model_name_or_path": name, "revision": commit, "trust_remote_code": False}


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """What a library says of the network or of a damaged file, as one message."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # the Hub's client, zipfile, json, safetensors and peft have many
        found = f"{type(error).__name__}: {error}"
        full = isinstance(error, (RuntimeError, MemoryError))
        if full and re.search("memory|cuda|cublas", found, re.IGNORECASE):
            raise
        if type(error).__name__ == "HFValidationError":  # the Hub's client knows no folders
            found = "There is no such folder here."
        refusal = UnreachableError if isinstance(error, ConnectionError) else UserError
        raise refusal(f"{what}\n{preview(found, 200)}\n{advice}") from None


def explained_model(cfg: Config) -> Any:
    revision = f" at revision {model_revision(cfg)}" if model_revision(cfg) else ""
    return explained(
        f"The model {cfg.MODEL_NAME}{revision} could not be loaded.",
        "MODEL_NAME has to be a name on the Hub, such as microsoft/phi-2, or the folder of a whole model, "
        "with .safetensors and no code of its own. Check it and the internet connection, and run the same "
        "command again: what was downloaded is kept. A model behind a licence needs HF_TOKEN and the "
        "licence accepted.",
    )


def load_tokenizer(cfg: Config) -> transformers.PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with explained_model(cfg):
        tokenizer = AutoTokenizer.from_pretrained(**base_source(cfg))
        if not tokenizer("Why?")["input_ids"]:  # transformers makes an empty one from a mere config
            raise OSError("it has no tokenizer")
    set_template(cfg, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # fills batches of questions; never a label
    return tokenizer


def known_outline(cfg: Config) -> Outline | None:
    """The outline of MODEL_NAME; None where its configuration cannot be had, or is none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(**base_source(cfg))
        return usual_outline(config) or outline_of(without_weights(config))
    except Exception:  # it is found again, and explained, when the model is loaded
        return None


def usual_outline(config: Any) -> Outline | None:
    """From the configuration alone, for Phi and for models built like Llama.

    Importing a model's class takes longer than everything else that `check` does.
    """
    if config.model_type not in ("phi", "llama", "mistral", "qwen2", "qwen3"):
        return None
    hidden, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    phi = config.model_type == "phi"
    sizes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.dense" if phi else "self_attn.o_proj": (queries, hidden),
        "mlp.fc1" if phi else "mlp.up_proj": (hidden, inner),
        "mlp.fc2" if phi else "mlp.down_proj": (inner, hidden),
    }
    sizes |= {} if phi else {"mlp.gate_proj": (hidden, inner)}
    linear = {
        f"model.layers.{i}.{name}": size for i in range(blocks) for name, size in sizes.items()
    }
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    parameters = embeddings + sum(map(math.prod, linear.values()))  # norms and biases are nothing
    return Outline(blocks, hidden, config.vocab_size, parameters, linear)


def outline_of(model: transformers.PreTrainedModel) -> Outline:
    words, blocks = model.get_input_embeddings(), model.config.get_text_config().num_hidden_layers
    sizes = (blocks, words.embedding_dim, words.num_embeddings, model.num_parameters())
    return Outline(*sizes, linear_layers(model), model._is_stateful)


def without_weights(config: Any) -> transformers.PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_base(cfg: Config, device: Device) -> transformers.PreTrainedModel:
    """The model as it was published, but without dropout: the only one is to be LORA_DROPOUT."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

    dtype, options = getattr(torch, device.dtype), {}
    if device.four_bit:
        how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **how)
        options["quantization_config"] = quantized
    with explained_model(cfg):
        source = base_source(cfg)
        shape = AutoConfig.from_pretrained(**source)
        if getattr(shape, "hidden_act", "") == "gelu_new":
            shape.hidden_act = "gelu_pytorch_tanh"  # the same function as one kernel, not eight
        for name, value in list(vars(shape).items()):
            if name.endswith(("pdrop", "dropout")) and isinstance(value, float):
                setattr(shape, name, 0.0)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **source,
            **options,
            config=shape,
            dtype=dtype,  # "auto" would load phi-2 as float16 even on a processor
            # its default is sdpa, which sums in float32: plain attention overflows phi-2's float16
            use_safetensors=True,
            device_map={"": device.kind},
            output_loading_info=True,
        )
        if loaded["missing_keys"]:  # transformers would go on with weights of chance
            raise OSError(f"it lacks weights, among them {min(loaded['missing_keys'])}")
    model.generation_config = GenerationConfig()  # how it answers is decided here alone
    return model


def bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def refuse_small_memory(cfg: Config, device: Device, parameters: int) -> None:
    """Without an NVIDIA GPU the weights lie in the computer's own memory."""
    import psutil

    each = 1 if device.four_bit else bytes_of(device.dtype)  # in 4 bits with all that comes along
    size, memory = parameters * each * world_size(), psutil.virtual_memory()
    if device.kind == "cuda" or size <= memory.available:
        return
    needs = f"Without an NVIDIA GPU, {cfg.MODEL_NAME} needs {size / 1e9:.1f} GB of memory"
    if size > memory.total:
        raise UserError(
            f"{needs}, and this computer has {memory.total / 1e9:.1f} GB.\nTake one with a GPU (on Colab: "
            "Runtime, Change runtime type, T4 GPU), or a smaller model with --model-name"
        )
    free = f"{memory.available / 1e9:.1f} GB are free"
    say("Warning", f"{needs}, and {free}. Close other programs, or it may fail half-way.")


# -- The adapter


@contextmanager
def usable_peft() -> Iterator[Any]:
    """The peft library, kept from what it stumbles over."""
    torchao = installed_version("torchao")
    if torchao and is_below(torchao, "0.16") and "torchao" not in sys.modules:
        # Colab's is older than peft accepts, so that peft refuses every layer that is not in 4 bits.
        # Nothing here needs torchao; None is Python's own mark of an absent module.
        sys.modules["torchao"] = None  # type: ignore[assignment]
        say("Note", "the old torchao of this machine is left aside: peft does not work with it")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # and then to True
        import peft

        yield peft


def linear_layers(base: transformers.PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of all linear layers but the last, by their full names."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's kind, whose weight lies the other way

    head, sizes = base.get_output_embeddings(), {}
    for name, layer in base.named_modules():
        if isinstance(layer, Conv1D):
            sizes[name] = (layer.nx, layer.nf)
        elif isinstance(layer, torch.nn.Linear) and layer is not head:
            sizes[name] = (layer.in_features, layer.out_features)
    return sizes


def adapted_layers(
    cfg: Config, linear: dict[str, tuple[int, int]], stateful: bool = False
) -> list[str]:
    """Of these layers, the ones that LORA_TARGETS and LORA_LAYERS name."""
    blocks = {name: int(number[1]) for name in linear if (number := re.search(r"\.(\d+)\.", name))}
    chosen = blocks_named(cfg.LORA_LAYERS, max(blocks.values(), default=-1))
    layers: list[str] = []
    for target in cfg.LORA_TARGETS:
        path = TARGET_GROUPS.get(target) or re.compile(rf"(^|\.){re.escape(target)}$")
        found = [name for name in linear if path.search(name)]
        if chosen:
            found = [name for name in found if blocks.get(name) in chosen]
        if stateful and target in TARGET_GROUPS:
            # such models take the weights out of this layer, so that its adapter would go unseen
            found = [name for name in found if not name.endswith(".out_proj")]
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"LORA_TARGETS names {target}, which {cfg.MODEL_NAME} does not have.\n"
                f"Its layers are: {', '.join(kinds)}; or {', '.join(TARGET_GROUPS)}"
            )
        layers += [name for name in found if name not in layers]
    return layers


def blocks_named(text: str, last: int) -> set[int]:
    """0,4-6 is the blocks 0, 4, 5 and 6; nothing is all of them."""
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    chosen = {n for p in parts if p for n in range(int(p[1]), int(p[2] or p[1]) + 1)}
    if text.strip() and not (all(parts) and chosen and max(chosen) <= last):
        raise UserError(
            f"LORA_LAYERS {text!r} names no blocks such as 0,4-6; there are 0 to {last}."
        )
    return chosen


def adapted_outline(cfg: Config, model: Outline) -> Outline:
    layers = adapted_layers(cfg, model.linear, model.stateful)
    return model._replace(adapted=[model.linear[name] for name in layers])


def lora_config(cfg: Config, layers: Iterable[str]) -> PeftConfig:
    """What peft is told; `layers` are full names, so that no other program reads them in another way."""
    with usable_peft() as peft:
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=cfg.LORA_R,
            lora_alpha=cfg.LORA_ALPHA,
            lora_dropout=cfg.LORA_DROPOUT,
            target_modules=sorted(layers),
            use_rslora=cfg.USE_RSLORA,
            use_dora=cfg.USE_DORA,
            init_lora_weights=cfg.LORA_INIT if cfg.LORA_INIT != "default" else True,
            revision=model_revision(cfg),
        )


def add_lora(cfg: Config, base: transformers.PreTrainedModel, learning: bool = True) -> PeftModel:
    layers = adapted_layers(cfg, linear_layers(base), base._is_stateful)
    with usable_peft() as peft:
        model = peft.get_peft_model(base, lora_config(cfg, layers))
    model.peft_config["default"].base_model_name_or_path = base_name(cfg)
    for module in model.modules():
        # On some processors bitsandbytes repacks a 4-bit layer at its first use without gradients;
        # a repacked layer hands no gradient on, so measuring once would end all learning.
        if learning and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # or else every checkpoint asks the Hub whether the base has another vocabulary by now
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def put_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Give the model these weights of an adapter, and make sure that they are all of them."""
    with usable_peft() as peft:
        found = peft.set_peft_model_state_dict(model, weights)
    if found.unexpected_keys or any("lora_" in name for name in found.missing_keys):
        raise ValueError("the adapter has other layers than LORA_TARGETS")


def layers_in(adapter: Path) -> list[str]:
    """The layers that a saved adapter is for."""
    from safetensors import safe_open

    with safe_open(adapter, "numpy") as file:
        keys = list(file.keys())
    names = {name.partition(".lora_")[0] for name in keys if ".lora_" in name}
    return sorted(name.removeprefix("base_model.model.") for name in names)


def layers_in_words(layers: Sequence[str]) -> str:
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    blocks = {number[1] for name in layers if (number := re.search(r"\.(\d+)\.", name))}
    return f"{', '.join(kinds)} of {len(blocks)} blocks"


# -- A finished run


@dataclass
class Run:
    """A finished run: it answers as the model did before its training, and as it does after it."""

    cfg: Config  # of its training
    tokenizer: Any
    model: Any = None  # with an adapter that can be switched off, or with one that was merged
    place: Path = Path()  # as the person knows it
    folder: Path = Path()  # of its files: of a zip, what was in it
    record: dict[str, Any] = field(default_factory=dict)  # its run.json
    adapter: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # of which merged weights have none

    @contextmanager
    def untuned(self) -> Iterator[Any]:
        """The model as it was: with an adapter, the same weights."""
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
        fast = device.four_bit and device.kind == "cpu"  # as bitsandbytes is there, in this form
        return device._replace(dtype="bfloat16") if fast else device

    @functools.cached_property
    def base_settings(self) -> Config:
        """The settings with the folder where the base is now, unless it is on the Hub."""
        name, home = self.cfg.MODEL_NAME, self.place.absolute()
        if not name.startswith("./"):
            return self.cfg
        home = home if home.is_dir() else home.parent
        noted = self.folder / BASE_PLACE
        known = Path(os.fsdecode(noted.read_bytes())) if noted.is_file() else home / name
        for folder in (home / name, known):
            if os.path.isdir(folder):
                return changed(self.cfg, MODEL_NAME=str(folder))
        raise UserError(
            f"{home} needs its base model, the folder {known.name}, which is not in {known.parent}\n"
            f"Copy that folder into {home}"
        )

    @functools.cached_property
    def shape(self) -> Any:
        """The base's own config."""
        from transformers import AutoConfig

        if is_merged(self.folder):
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        with explained_model(self.base_settings):
            return AutoConfig.from_pretrained(**base_source(self.base_settings))

    @property
    def stored_dtype(self) -> str:
        """The numbers in which the base was published."""
        return str(self.shape.dtype or "float16").removeprefix("torch.")

    @functools.cached_property
    def parameters(self) -> int:
        return int(without_weights(self.shape).num_parameters())

    def with_adapter(self, base: transformers.PreTrainedModel, learning: bool = True) -> PeftModel:
        # not by adapter_config.json, which can name code to run
        model = add_lora(self.cfg, base, learning)
        with explained_run(self.place):
            put_adapter(model, self.adapter)
        return model


def context_of(model: Any, tokenizer: Any) -> int:
    """Tokens that a question and its answer may have together."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, positions or math.inf))


def is_merged(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def load_tuned(place: Path, four_bit: bool | None = None) -> Run:
    """A finished run with its weights: from its folder, its zip, or merged weights."""
    run = open_run(place)
    merged = is_merged(run.folder)
    if not merged and not run.adapter:
        raise UserError(
            f"{place} holds no weights for this script; a GGUF is for LM Studio, Ollama and llama.cpp, as its "
            "README.md says.\nTo ask it here, name the folder of the training: --output-dir ./model"
        )
    if four_bit is not None or merged:  # whose sums 4 bits would round once more
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
    with explained_run(place):
        folder = place if os.path.isdir(place) else unzipped_run(place, Path(unpacked.name))
        if pickles := [path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES]:
            raise UserError(
                f"{place} holds {min(pickles)}, a kind of file that can run programs.\nIt is not from this "
                "script. Delete it, if you trust the other files, or train again."
            )
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        settings = record["settings"]
        known = TYPES.keys() & settings.keys() | {"MODEL_NAME"}
        cfg = checked({name: settings[name] for name in known})
        record["examples"] = [str(text) for text in record.get("examples") or []]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        set_template(cfg, tokenizer)  # which the first edition did not save
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        with_adapter = (folder / "adapter_config.json").is_file()
        adapter = load_file(folder / ADAPTER) if with_adapter else {}
    run = Run(cfg, tokenizer, None, place, folder, record, adapter)
    weakref.finalize(run, unpacked.cleanup)
    return run


def explained_run(place: Path) -> Any:
    return explained(
        f"{place} could not be loaded as a finished run: its run.json, tokenizer or adapter is missing or "
        "damaged.",
        "Train a model first, or name the folder or the zip of a training with --output-dir. If it was "
        "damaged on its way, copy or unpack it once more.",
    )


def unzip(path: Path, folder: Path) -> None:
    """Unpack a zip of unknown origin: nothing outside the folder, nor more than the disk can hold."""
    with zipfile.ZipFile(path) as archive:
        need = sum(member.file_size for member in archive.infolist())
        if need > shutil.disk_usage(folder).free:
            raise OSError(f"there is no room for its {need / 1e9:.1f} GB in {folder}")
        archive.extractall(folder)  # never outside, never more than the sizes declared


def unzipped_run(place: Path, folder: Path) -> Path:
    """The folder of a run in this zip, which is unpacked into `folder`."""
    unzip(place, folder)
    inner = [record.parent for record in folder.glob("*/run.json")]
    return inner[0] if len(inner) == 1 else folder  # somebody zipped the folder itself


def record_of(folder: Path) -> dict[str, Any]:
    """The run.json of a finished run; empty where none can be read."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def may_share_rows(model: Any) -> bool:
    """Whether several examples may lie in one row: what a token sees of others is left to attention."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    usual = base.config._attn_implementation in ("sdpa", FLAT_ATTENTION)
    exchangeable = base._supports_attention_backend and base._supports_sdpa and usual
    return exchangeable and not base._is_stateful and kinds <= {*SHARING_ATTENTION}


def flatten(examples: Sequence[Example], shared: bool = True) -> dict[str, Any]:
    """Lay examples end to end in one row, without a single token of padding.

    Positions start again with each example, attention stays inside each (see padding_free), and the
    model's last layer runs only at the positions that have something to predict. A model whose rows
    cannot be shared gets one example as it is.
    """
    import torch

    lengths = [len(example["input_ids"]) for example in examples]
    ids = torch.tensor([token for example in examples for token in example["input_ids"]])
    labels = torch.tensor([label for example in examples for label in example["labels"]])
    row = {
        "input_ids": ids[None],
        "labels": labels[None],  # the first of each example is a prompt's, so nothing leaks across
        "use_cache": False,
    }
    if not shared:
        return row
    return row | {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "logits_to_keep": (labels != IGNORE).nonzero()[:, 0] - 1,  # position i predicts i + 1
        "lengths": lengths,
    }


def attend_in_each_example(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens of all examples, size of a head)
    key: torch.Tensor,  # (1, perhaps fewer heads, …), and value alike
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    lengths: list[int],  # of the examples; required, so that they can never silently see each other
    sliding_window: int | None = None,  # how far back some models look
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over a row of examples laid end to end, each seeing itself only."""
    import torch

    # not left to enable_gqa, with which a T4 takes the way that keeps every score
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    seen = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        window, length = None, q.shape[2]
        if sliding_window and length > sliding_window:
            within = torch.ones(length, length, dtype=torch.bool, device=q.device)
            window = within.tril().triu(1 - sliding_window)
        seen.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, window, dropout, is_causal=window is None, scale=scaling
            )
        )
    return torch.cat(seen, dim=2).transpose(1, 2).contiguous(), None


@contextmanager
def padding_free(model: transformers.PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let the model read rows as `flatten` makes them: of several examples, or else of one.

    What every block adds to is in float32 on a GPU, also where the blocks compute in 16 bits.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    usual = model.config._attn_implementation
    if may_share_rows(model):
        AttentionInterface.register(FLAT_ATTENTION, attend_in_each_example)
        AttentionMaskInterface.register(FLAT_ATTENTION, lambda *_, **__: None)
        model.set_attn_implementation(FLAT_ATTENTION)

    def widen(_: Any, __: Any, words: torch.Tensor) -> torch.Tensor:
        return words.float() if words.is_cuda else words

    hook = model.get_input_embeddings().register_forward_hook(widen)
    try:
        yield
    finally:
        hook.remove()
        model.set_attn_implementation(usual)


@functools.cache
def fused_lora() -> Any:
    """A frozen layer and its adapter as one operation: y = W x + b + scale * B A dropout(x).

    Left to itself, peft makes ten operations of this, each with a copy of its input or output, some
    of which are kept for the way back. Here only x is kept, once for all layers that read it, with a
    byte for each place that dropout could take; and where nobody asks for the gradient of x, as in the
    first layers, it is not computed.
    """
    import torch

    class FusedLora(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: torch.Tensor,  # (…, inputs)
            a: torch.Tensor,  # (rank, inputs)
            b: torch.Tensor,  # (outputs, rank)
            base: Any,
            scale: float,
            dropout: float,
            dtype: torch.dtype,
        ) -> torch.Tensor:
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            bias = None if base.bias is None else base.bias.to(dtype)
            y = torch.nn.functional.linear(rows, weight_of(base, dtype), bias)
            mask = None
            if dropout:
                mask = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout)
                rows = rows * mask
            inner = rows @ a.to(dtype).T
            y.addmm_(inner, b.to(dtype).T, alpha=scale / (1 - dropout))
            ctx.save_for_backward(x, mask, inner, a, b)
            ctx.base, ctx.scale, ctx.dtype = base, scale / (1 - dropout), dtype
            return y.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            x, mask, inner, a, b = ctx.saved_tensors
            rows, dy = x.reshape(-1, x.shape[-1]).to(ctx.dtype), dy.reshape(-1, dy.shape[-1])
            d_inner = (dy @ b.to(ctx.dtype)).mul_(ctx.scale)
            d_a = d_inner.T @ (rows if mask is None else rows * mask)
            d_b = (dy.T @ inner).mul_(ctx.scale)
            d_x = None
            if ctx.needs_input_grad[0]:
                d_x = d_inner @ a.to(ctx.dtype)
                d_x = d_x if mask is None else d_x.mul_(mask)
                d_x = d_x.addmm_(dy, weight_of(ctx.base, ctx.dtype)).view(x.shape).to(x.dtype)
            return d_x, d_a.to(a.dtype), d_b.to(b.dtype), None, None, None, None

    return FusedLora.apply


def weight_of(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a frozen layer in the numbers of the computation."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state).to(dtype)


def fused_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the layer's own forward computes, with `fused_lora`."""
    import torch

    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0) if layer.training else 0.0
    return fused_lora()(x, a, b, layer.get_base_layer(), layer.scaling["default"], dropout, dtype)


def can_be_fused(layer: Any) -> bool:
    """Whether this is a layer with one ordinary LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or layer.active_adapters != ["default"]:
        return False
    base = layer.get_base_layer()
    known = type(base).__name__ in ("Linear", "Linear4bit") and base.weight.dim() == 2
    special = layer.use_dora.get("default") or layer.lora_variant or layer.lora_bias["default"]
    return known and not special and not layer.fan_in_fan_out


@contextmanager
def fused_lora_layers(model: PeftModel, wanted: bool = True) -> Iterator[None]:
    """Compute each layer and its adapter as one, wherever that is possible."""
    layers: list[Any] = [layer for layer in model.modules() if wanted and can_be_fused(layer)]
    for layer in layers:
        layer.forward = functools.partial(fused_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def evaluating(model: transformers.PreTrainedModel | PeftModel) -> Iterator[None]:
    """As the model is when it answers or is measured: in the numbers of the training."""
    import torch

    was_training, dtype = model.training, model.get_input_embeddings().weight.dtype
    if was_training:  # to ask all layers for each token of an answer would take longer than it
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


@dataclass
class PreparedData:
    """Everything that training needs of the data; made without a GPU and without the weights."""

    tokenizer: Any  # the model's; None for `check` without internet
    pairs: Pairs
    quality: Quality
    tokens: list[int]  # of each pair that is kept; none without a tokenizer
    overlong: list[int]  # tokens of those that are left out for their length
    train_pairs: list[Pair]
    validation_pairs: list[Pair]
    train: list[Example]
    validation: list[Example]


def prepare_data(cfg: Config, pairs: Pairs, offline: bool = False) -> PreparedData:
    """From pairs to tokens, saying what was found. The same for `check` and for training.

    When the Hub cannot be reached, `check` does without the tokenizer, and nothing is tokenized.
    """
    try:
        tokenizer = load_tokenizer(cfg)
    except UnreachableError:
        if not offline:
            raise
        tokenizer = None
    examples = [encode(tokenizer, pair.messages) for pair in pairs.kept if tokenizer]
    longest = min(cfg.MAX_LENGTH, getattr(tokenizer, "model_max_length", cfg.MAX_LENGTH))
    lengths = [len(example["labels"]) for example in examples]
    fits = [length <= longest for length in lengths] or [True] * len(pairs.kept)
    limit = f"MAX_LENGTH, {longest} tokens (raise it or shorten the row)"
    if longest < cfg.MAX_LENGTH:
        limit = f"the {longest} tokens that {cfg.MODEL_NAME} can take"
    reason = f"longer than {limit}"
    pairs.dropped += [
        Note(*pair[1:], reason) for pair, fit in zip(pairs.kept, fits, strict=True) if not fit
    ]
    examples = list(itertools.compress(examples, fits))
    pairs.kept = list(itertools.compress(pairs.kept, fits))
    quality = quality_of(pairs.kept, pairs.dropped)
    say_pairs(pairs)
    say_quality(quality, cfg.MIN_QUALITY)
    away = split_validation(pairs.kept, cfg.VALIDATION_FRACTION, cfg.SEED)
    here = [not one for one in away]
    return PreparedData(
        tokenizer,
        pairs,
        quality,
        tokens=list(itertools.compress(lengths, fits)),
        overlong=[length for length in lengths if length > longest],
        train_pairs=list(itertools.compress(pairs.kept, here)),
        validation_pairs=list(itertools.compress(pairs.kept, away)),
        train=list(itertools.compress(examples, here)),
        validation=list(itertools.compress(examples, away)),
    )


POOR = 0.5  # the quality below which nothing is trained without --yes


def refuse_unfit(cfg: Config, data: PreparedData) -> None:
    """Refuse too few pairs, and data of which most looks wrong unless it is wanted with --yes."""
    count = len(data.pairs.kept)
    pairs = f"{count} pair{'s' * (count != 1)}"
    if count < FEWEST_PAIRS:
        fix = "Fill in more rows, each with a question and an answer."
        lengths = sorted(data.tokens + data.overlong)
        enough = lengths[(len(lengths) * 95 - 1) // 100] if lengths else 0
        if cfg.MAX_LENGTH < enough <= data.tokenizer.model_max_length:
            fix = f"Most are too long: --max-length {enough} would keep 95 % of them."
        raise UserError(
            f"{data.pairs.name} has {pairs} to learn from; at least {FEWEST_PAIRS} are needed.\n{fix}"
        )
    if count < ENOUGH_PAIRS:
        say("Warning", f"{pairs} are few; with {ENOUGH_PAIRS} or more, answers become reliable.")
    copies = sum(note.reason.startswith("a copy") for note in data.pairs.dropped)
    score = data.quality.good / max(1, data.quality.counted - copies)  # which harm nobody
    if score < min(POOR, cfg.MIN_QUALITY) and not cfg.YES:
        raise UserError(
            f"The quality of {data.pairs.name} is {data.quality}: most rows are left out or look wrong.\n"
            "Fix the rows named above (the command check lists them all), or add --yes to train anyway."
        )


def pairs_to_ask(cfg: Config, data: PreparedData) -> tuple[str, list[Pair]]:
    """What is asked at the end, in words, and the pairs; the toy learns by heart, and nothing else."""
    if data.validation_pairs and cfg.MODEL_NAME != DEMO_MODEL:
        return "held-out questions", data.validation_pairs
    return "questions that were taught", data.train_pairs


def balanced_rows(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """The same examples in so many rows, all about as long."""
    rows: list[list[Example]] = [[] for _ in range(count)]
    tokens = [0] * count
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        shortest = tokens.index(min(tokens))
        rows[shortest].append(example)
        tokens[shortest] += len(example["input_ids"])
    return rows


def pack(examples: Sequence[Example], most: int) -> list[list[Example]]:
    """The same examples in as few rows as can be of so many tokens at most; of one each if that is 0."""
    if not most:
        return [[example] for example in examples]
    lengths = [len(example["input_ids"]) for example in examples]
    most = max([most, *lengths])
    rows: list[list[Example]] = []
    for count in range(math.ceil(sum(lengths) / most), len(examples) + 1):
        rows = balanced_rows(examples, count)
        if all(sum(len(one["input_ids"]) for one in row) <= most for row in rows):
            break
    return rows


class Steps:
    """What the Trainer takes for its data: every step of an epoch, cut into a share for each process."""

    def __init__(self, examples: Sequence[Example], pairs: int, seed: int) -> None:
        self.examples, self.pairs, self.seed = examples, pairs, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        order = random.Random(f"{self.seed} {epoch}").sample(self.examples, len(self.examples))
        self.batches = [order[i : i + self.pairs] for i in range(0, len(order), self.pairs)]

    def __len__(self) -> int:
        return len(self.batches) * world_size()

    def __getitem__(self, index: int) -> list[Example]:
        step, process = divmod(index, world_size())  # as accelerate hands them out
        nothing = Example(input_ids=[0], labels=[IGNORE])  # where pairs are fewer than processes
        return balanced_rows(self.batches[step], world_size())[process] or [nothing]


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the tokens to learn, summed."""
    import torch

    learnt = (labels[0] != IGNORE).nonzero()[:, 0]
    if logits.shape[1] != len(learnt):  # the model could not be told which to compute
        logits = logits[:, learnt - 1]
    targets = labels[0, learnt]
    return torch.nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")


def mean_loss(model: PeftModel, examples: Sequence[Example], tokens_at_once: int) -> float:
    """Mean loss of a token to predict, over all examples together."""
    import torch

    total, tokens, shared = 0.0, 0, may_share_rows(model)
    with evaluating(model), padding_free(model):
        for examples_of_row in pack(examples, tokens_at_once if shared else 0):
            row = flatten(examples_of_row, shared)
            row = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in row.items()}
            labels = row.pop("labels")
            total += summed_loss(model(**row).logits, labels).item()
            tokens += int((labels != IGNORE).sum())
    return total / tokens


# -- Files of a run

LOG_NAME = re.compile(r"finetune-[\d_-]+\.log")


def log_path(cfg: Config) -> Path:
    return local_path(cfg.LOG_DIR) / time.strftime("finetune-%Y-%m-%d_%H-%M-%S.log")


@contextmanager
def warned(what: str) -> Iterator[None]:
    """Around what is nice to have, and must not cost anybody the training, the adapter or the check."""
    try:
        yield
    except Exception as error:
        say("Warning", f"{what}: {error or type(error).__name__}")


def resume_hint(cfg: Config) -> str:
    """What to type after an end that came too early."""
    without = "" if cfg.RESUME else ", without --no-resume,"
    return f"the same command{without} goes on from there"


def short_path(path: Path) -> str:
    """A path as short as it can be said from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def nearest_existing(folder: Path) -> Path:
    """The folder, or what is there already of the way to it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def free_space(folder: Path, need: float) -> str:
    """What a disk should have and has, as a sentence; nothing about one that does not say."""
    with suppress(OSError):
        free = shutil.disk_usage(nearest_existing(folder)).free
        return f"Up to {need / 1e6:,.1f} MB are needed there, {free / 1e6:,.1f} MB are free. "
    return ""


def free_name(path: Path) -> Path:
    """This name, or the first of NAME.2, NAME.3, … that nothing has."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def quarantine(path: Path, name: str, why: object) -> None:
    """Rename what is not used: nothing is deleted that somebody might want."""
    aside = path.rename(free_name(path.with_name(name)))
    say("Checkpoint", f"{short_path(path)} is not used: {why}. It is now {aside.name}.")


# -- What makes two runs the same

# The settings that decide the result, beside those that identity_of works out
DECIDING = (
    "LORA_R LORA_ALPHA LORA_DROPOUT LORA_TARGETS LORA_LAYERS USE_RSLORA USE_DORA LORA_INIT LEARNING_RATE NUM_EPOCHS MAX_STEPS LR_SCHEDULER "
    "WARMUP_RATIO WEIGHT_DECAY MAX_GRAD_NORM NEFTUNE_ALPHA SEED EVAL_STEPS EARLY_STOPPING_PATIENCE"
).split()


def fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def base_fingerprint(cfg: Config) -> str:
    with explained_model(cfg):
        folder = local_base(cfg)
        if folder is None:
            return str(base_source(cfg)["revision"])
        files = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
        return fingerprint([checksum(path) for path in sorted(files)])


def training_fingerprint(data: PreparedData) -> str:
    """Not of the prompts' tokens but of what leads to them: a template may tell today's date."""
    pairs = [[pair.messages for pair in part] for part in (data.train_pairs, data.validation_pairs)]
    answers = [[t for t in one["labels"] if t != IGNORE] for one in (*data.train, *data.validation)]
    return fingerprint([data.tokenizer.chat_template, pairs, answers])


def identity_of(cfg: Config, data: PreparedData, device: Device) -> dict[str, Any]:
    """Everything that decides the adapter. Where it is equal, a checkpoint may be resumed."""
    return {
        **{name: getattr(cfg, name) for name in DECIDING},
        "PAIRS IN A STEP": cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS,
        "OPTIMIZER": optimizer_name(cfg, device),
        "LOAD_IN_4BIT": device.four_bit,
        "the base model": base_fingerprint(cfg),
        "the data": training_fingerprint(data),
        "the script": 4,  # to be raised when an earlier checkpoint can no longer be resumed
    }


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """What sets two runs apart, for the person: settings with their values."""
    return [
        name if name.islower() else f"{name} {as_text(value)} (there {as_text(there.get(name))})"
        for name, value in here.items()
        if value != there.get(name)
    ]


# -- Checkpoints: the Trainer writes them, COMMIT.json makes them count

COMMIT = "COMMIT.json"
BEST_ADAPTER = "best_adapter.safetensors"  # with it, one checkpoint is enough to end the run
STATE_FILES = {ADAPTER, "optimizer.pt", "scheduler.pt", "trainer_state.json"}
COMMITTED = {"step": int, "best_step": int | None, "identity": dict, "stats": dict, "files": dict}
BYTES_PER_WEIGHT = 16  # its value, that of the best adapter, and two figures of the optimizer
NEWEST_KEPT = 2  # and the best one
COPY_PAUSES = (1, 4, None)  # seconds: on a mounted drive, what fails now may work in a moment


class Checkpoint(NamedTuple):
    """A saved state of the training, whose files are those that its COMMIT.json names."""

    folder: Path
    step: int
    record: dict[str, Any]

    @property
    def best_adapter(self) -> Path:
        """The adapter with the lowest validation loss so far."""
        return self.folder / (BEST_ADAPTER if BEST_ADAPTER in self.record["files"] else ADAPTER)


def read_record(folder: Path) -> dict[str, Any]:
    """What COMMIT.json says. It may be damaged, or made by a stranger: then ValueError."""
    try:
        commit = json.loads((folder / COMMIT).read_bytes())
        record = commit["record"]
        valid = commit["sha256"] == fingerprint(record) and set(record["files"]) >= STATE_FILES
        valid &= any(name.startswith("rng_state") for name in record["files"])  # of each process
        valid &= all(isinstance(record[name], kind) for name, kind in COMMITTED.items())
        valid &= set(record["stats"]) == {one.name for one in fields(RunStats)}
        for name, (size, digest) in record["files"].items():
            valid &= Path(name).name == name and isinstance(size, int) and isinstance(digest, str)
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(f"its {COMMIT} is missing or damaged")
    return record


class Checkpoints:
    """The checkpoints of one run: in a folder of its own, and in the mirror when there is one."""

    def __init__(self, cfg: Config, identity: dict[str, Any]) -> None:
        self.cfg, self.identity = cfg, identity
        folders = filter(None, (cfg.CHECKPOINT_DIR, cfg.CHECKPOINT_MIRROR))
        self.places = [local_path(one).resolve() / fingerprint(identity)[:12] for one in folders]
        self.folder, self.mirrors = self.places[0], self.places[1:]
        self.last: Checkpoint | None = None
        self.best_adapter = b""  # goes into every checkpoint
        self.saved_at = time.monotonic()
        self.log = log_path(cfg)

    def starting_point(self) -> Checkpoint | None:
        """The newest valid checkpoint: of those here, in the mirror, and the one that is named."""
        self.say_other_run()
        for place in filter(Path.exists, () if self.cfg.RESUME else self.places):
            with warned(f"{place} is in the way") if place in self.mirrors else nullcontext():
                quarantine(place, f"{place.name}.unused", "RESUME is off")
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, suffix=".partial") as unpacked:
            others = [self.named(Path(unpacked))] if self.cfg.RESUME_FROM_CHECKPOINT else []
            step = max((one.step for one in self.valid(self.folder)), default=0)
            for mirror in self.mirrors if self.cfg.RESUME else ():
                others += itertools.islice(self.valid(mirror, above=step), 1)
            for other in others:
                if other.step > step:
                    say("Checkpoint", f"step {other.step} is newer and is fetched from elsewhere")
                    self.copy(other, self.folder)
        if not self.latest() and any(any(place.glob("incomplete-*")) for place in self.places):
            say("Warning", "no checkpoint is valid, so the training starts from the beginning")
        return self.last

    def say_other_run(self) -> None:
        """Name what has changed since the most similar of the runs beside a new one."""
        others = []
        for path in self.folder.parent.glob("*/checkpoint-*/" + COMMIT):
            with suppress(ValueError, OSError):
                if changed := differences(self.identity, read_record(path.parent)["identity"]):
                    others.append((len(changed), short_path(path.parents[1]), ", ".join(changed)))
        if others and not self.folder.exists():
            _, other, changes = min(others)
            say("New run", f"other than the one in {other}, which stays as it is: {changes}")

    def verify(self, folder: Path, thorough: bool = True) -> Checkpoint:
        """The checkpoint in a folder, or ValueError; thorough: by contents, not only by sizes."""
        record = read_record(folder)
        if changed := differences(self.identity, record["identity"]):
            raise ValueError(f"it belongs to another run. What differs: {', '.join(changed)}")
        for name, (size, digest) in record["files"].items():
            path = folder / name
            right = path.is_file() and not path.is_symlink() and path.stat().st_size == size
            if not right or (thorough and checksum(path) != digest):
                raise ValueError(f"its {name} is missing or damaged")
        for path in folder.iterdir():
            loadable = path.is_dir() or path.suffix.lower() in (".safetensors", *PICKLES)
            if loadable and path.name not in record["files"] and not path.name.startswith("."):
                raise ValueError(f"{path.name} was not saved with it")
        return Checkpoint(folder, record["step"], record)

    def valid(self, place: Path, above: int = 0, thorough: bool = True) -> Iterator[Checkpoint]:
        """Valid checkpoints, newest first: by step, since clocks jump. Others get another name."""
        numbers = [path.name.removeprefix("checkpoint-") for path in place.glob("checkpoint-*/")]
        for step in sorted((int(n) for n in numbers if n.isdecimal()), reverse=True):
            path = place / f"checkpoint-{step}"
            if step <= above:
                return
            try:
                found = self.verify(path, thorough)
                if found.step != step:
                    raise ValueError(f"it is a copy of checkpoint-{found.step}")
                yield found
            except (ValueError, OSError) as flaw:
                with warned(f"{path} is not used: {flaw}, but keeps its name"):
                    quarantine(path, f"incomplete-{step}", flaw)

    def named(self, unpacked: Path) -> Checkpoint:
        """What the person names: a folder with a checkpoint or several, or a zip of it."""
        place = local_path(self.cfg.RESUME_FROM_CHECKPOINT).resolve()
        try:
            if place.is_file():
                unzip(place, unpacked)
            inside = (unpacked if place.is_file() else place).rglob(COMMIT)
            if not (found := [self.verify(path.parent) for path in inside]):
                raise ValueError(f"there is no {COMMIT}")
            return max(found, key=lambda one: one.step)
        except Exception as error:  # of a file of unknown origin: zipfile and zlib have many
            raise UserError(
                f"RESUME_FROM_CHECKPOINT {place} cannot be used: {preview(str(error), 500)}.\n"
                "Name a folder checkpoint-N of this run or a zip of it, or leave the setting out."
            ) from None

    def latest(self) -> Checkpoint | None:
        """The newest valid one here, to go on from."""
        self.last = next(self.valid(self.folder), None)
        self.best_adapter = self.last.best_adapter.read_bytes() if self.last else b""
        return self.last

    def save(self, state: Any, stats: dict[str, Any], write: Callable[[], None]) -> None:
        """What the Trainer writes becomes a checkpoint, or nothing of it stays."""
        step, best = state.global_step, state.best_global_step
        folder = self.folder / f"checkpoint-{step}"
        if self.last and self.last.step == step:
            return  # what is saved is never changed
        try:
            write()
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
            if best == step:
                self.best_adapter = (folder / ADAPTER).read_bytes()
            elif best is not None:
                (folder / BEST_ADAPTER).write_bytes(self.best_adapter)
            paths = sorted(folder.iterdir())
            for path in paths:
                fsync(path)
            record = {"step": step, "best_step": best, "identity": self.identity, "stats": stats}
            record["files"] = {path.name: [path.stat().st_size, checksum(path)] for path in paths}
            write_json(folder / COMMIT, {"sha256": fingerprint(record), "record": record})
            fsync(self.folder)
            self.last = Checkpoint(folder, step, record)
        except Exception as error:  # a full disk has as many faces as there are libraries
            shutil.rmtree(folder, ignore_errors=True)
            disk = free_space(self.folder, BYTES_PER_WEIGHT * stats["trainable"])
            raise UserError(
                f"The checkpoint of step {step} could not be written to {self.folder}: "
                f"{preview(repr(error), 200)}.\n{disk}Training stopped; earlier checkpoints are kept.\n"
                "Make room on the disk (old folders in CHECKPOINT_DIR may go), or move CHECKPOINT_DIR "
                f"to another and name it with --checkpoint-dir; then {resume_hint(self.cfg)}."
            ) from error
        self.saved_at = time.monotonic()
        self.copy_and_prune(self.last)

    def copy_and_prune(self, newest: Checkpoint) -> None:
        """After a checkpoint is safe; none of this may cost the training."""
        name = newest.folder.name
        with warned("an old checkpoint could not be deleted"):
            self.prune(self.folder, newest)
        if self.cfg.ARCHIVE_CHECKPOINTS:
            with (
                warned(f"{name}.zip could not be written"),
                atomic_write(newest.folder.with_suffix(".zip")) as staged,
                zipfile.ZipFile(staged, "w", strict_timestamps=False) as archive,
            ):
                for path in newest.folder.iterdir():
                    archive.write(path, path.name)
        for mirror in self.mirrors:
            with warned(f"{name} could not be copied to the mirror"):
                mirror.parent.mkdir(exist_ok=True)  # no parents=True: a drive may be unmounted
                mirror.mkdir(exist_ok=True)
                self.prune(mirror, self.copy(newest, mirror))

    def copy(self, source: Checkpoint, place: Path) -> Checkpoint:
        """A copy in another place, read back before it gets its name."""
        target = place / f"checkpoint-{source.step}"
        for pause in COPY_PAUSES:
            try:
                with atomic_folder(target) as staged:
                    for name in (*source.record["files"], COMMIT):
                        shutil.copyfile(source.folder / name, staged / name)
                    self.verify(staged)
                break
            except (OSError, ValueError) as error:
                if not pause:
                    raise UserError(
                        f"{target.name} could not be copied to {place}: {error}.\nMake room, or wait "
                        "until the drive answers, and run the same command again. To train without what "
                        'lies in the mirror: --checkpoint-mirror ""'
                    ) from None
                time.sleep(pause)
        return source._replace(folder=target)

    def prune(self, place: Path, newest: Checkpoint) -> None:
        """Keep the newest two that are valid, and the best."""
        for checkpoint in [*self.valid(place, thorough=False)][NEWEST_KEPT:]:
            if checkpoint.step != newest.record["best_step"]:
                checkpoint.folder.with_suffix(".zip").unlink(missing_ok=True)
                # half of a deleted one must not look like a torn one
                checkpoint.folder.rename(place / f"removed-{checkpoint.step}")
        for leftover in (*place.glob("removed-*"), *place.glob("*.partial")):
            remove(leftover)


NOT_A_NUMBER = (
    "The loss is no longer a number (NaN), so training stopped before it could do harm.\n"
    "Lower LEARNING_RATE, for example to half, and run again."
)
LEVERS = (
    "Lower MAX_LENGTH (--max-length 256) or LORA_R (--lora-r 8), set LOAD_IN_4BIT "
    "(--load-in-4bit), or take a GPU with more memory."
)


class Stopped(KeyboardInterrupt):
    """Somebody wants an end: with Ctrl+C, or the machine with a signal."""

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(outcome)
        self.number = number


class Interruption:
    """While this is open, the first signal only asks for an end; the second ends at once."""

    def __init__(self) -> None:
        self.asked = 0
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        try:
            for number in numbers:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self.usual[number] = signal.signal(number, self.receive)
        except ValueError:
            say("Note", "outside the main thread Ctrl+C cannot save; the last checkpoint counts")
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def receive(self, number: int, _: Any) -> None:
        if self.asked:
            raise Stopped(number)
        self.asked = number
        with suppress(RuntimeError):  # the signal may come in the middle of another output
            show("\nStopping after this step, with a checkpoint. Once more, and it stops at once.")


# -- When memory runs out


def memory_fault(error: BaseException) -> str:
    """ "full" when less at once may fit, "broken" when the GPU is of no more use to this process, or ""."""
    text = str(error).lower()
    if re.search(r"cuda (driver )?error: out of memory|cublas_status_alloc_failed", text):
        return "broken"
    full = "out of memory" in text or "can't allocate memory" in text
    return "full" if isinstance(error, MemoryError) or full else ""


Way = TypeVar("Way")
Result = TypeVar("Result")


def halvings(most: int, least: int) -> list[int]:
    """From most to least, each half of the one before."""
    return [most] if most <= least else [most, *halvings(max(least, most // 2), least)]


def as_many_as_fit(act: Callable[[Way], Result], ways: Sequence[Way]) -> Result:
    """Do something in the first of these ways for which memory is enough."""
    for way in ways:
        try:
            return act(way)
        except (RuntimeError, MemoryError) as error:
            if memory_fault(error) != "full" or way is ways[-1] or world_size() > 1:
                raise
        release_memory()  # not before here, since the error holds on to what filled it
    raise AssertionError("there is a way at least")


def release_memory() -> None:
    import torch

    gc.collect()
    for backend in (torch.cuda, torch.mps):
        if backend.is_available():
            backend.empty_cache()


def largest_row(examples: Sequence[Example], plan: Plan) -> list[Example]:
    """Without meaning: as many tokens, and as many of them learnt, as any row of the training may have."""
    lengths = sorted((len(example["labels"]) for example in examples), reverse=True)[: plan.pairs]
    learnt = [sum(label != IGNORE for label in example["labels"]) for example in examples]
    room = max(lengths[0], min(plan.tokens_at_once, sum(lengths)))
    share = max(n / len(example["labels"]) for n, example in zip(learnt, examples, strict=True))
    share = min(share, sum(sorted(learnt)[-plan.pairs :]) / room)
    row: list[Example] = []
    for length in lengths:
        size = min(length, room)
        room -= size
        count = min(size - 1, math.ceil(share * size))  # the first token is never learnt
        row += [{"input_ids": [0] * size, "labels": [IGNORE] * (size - count) + [0] * count}]
    return [example for example in row if example["input_ids"]]


def measured_loss(
    model: PeftModel, examples: Sequence[Example], tokens_at_once: int
) -> float | None:
    """The mean loss with as many tokens at once as fit; None when not even one pair does."""
    longest = max(len(example["input_ids"]) for example in examples)
    try:
        loss = as_many_as_fit(
            lambda most: mean_loss(model, examples, most), halvings(tokens_at_once, longest)
        )
    except (RuntimeError, MemoryError) as error:
        if memory_fault(error) != "full":
            raise
    else:
        if not math.isfinite(loss):
            raise UserError(NOT_A_NUMBER)
        return loss
    release_memory()
    say("Warning", "memory ran out while the validation loss was measured; it is left out")
    return None


# -- The training itself

FIRST_SCALE = 4096.0  # of the gradients in float16; torch's 65,536 overflows in the first steps
MOST_BAD_STEPS = 3  # steps in a row whose gradient was no number


PROJECT = "finetune_colab"  # under which a service that shows curves files them


def monitored(cfg: Config, run: str) -> str:
    """Where else the curves go; says it, since a service may keep them for others to see."""
    where = {
        "tensorboard": f"tensorboard --logdir {cfg.LOG_DIR} shows the curves",
        "wandb": f"the curves go to the project {os.environ.setdefault('WANDB_PROJECT', PROJECT)} of Weights & Biases",
        "trackio": f"trackio show --project {PROJECT} shows the curves",
    }
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(local_path(cfg.LOG_DIR) / run)
    if cfg.REPORT_TO in where:
        say("Monitor", where[cfg.REPORT_TO])
    return cfg.REPORT_TO


def training_arguments(fit: Fit) -> transformers.TrainingArguments:
    from transformers import TrainingArguments

    cfg, plan, device, folder = fit.cfg, fit.plan, fit.device, fit.checkpoints.folder
    measured = bool(fit.data.validation)
    on_gpu = device.kind == "cuda"
    new = hasattr(TrainingArguments, "activation_checkpointing")  # what newer versions call it
    checkpointing = "activation_checkpointing" if new else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=1,  # Steps has made the batches
        learning_rate=cfg.LEARNING_RATE,
        lr_scheduler_type=cfg.LR_SCHEDULER,
        warmup_steps=plan.warmup_steps,
        optim=optimizer_name(cfg, device),
        weight_decay=cfg.WEIGHT_DECAY,
        max_grad_norm=cfg.MAX_GRAD_NORM,
        neftune_noise_alpha=cfg.NEFTUNE_ALPHA or None,
        fp16=on_gpu and device.dtype == "float16",
        bf16=on_gpu and device.dtype == "bfloat16",
        use_cpu=device.kind == "cpu",
        seed=cfg.SEED,
        eval_strategy="steps" if measured else "no",
        eval_steps=cfg.EVAL_STEPS or plan.steps_per_epoch,
        metric_for_best_model="eval_loss" if measured else None,
        greater_is_better=False,
        logging_steps=cfg.LOGGING_STEPS,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show a NaN as a loss of zero
        save_steps=cfg.SAVE_STEPS,
        include_num_input_tokens_seen="all",  # every token counts: none is padding
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        report_to=monitored(cfg, folder.name) if is_main_process() else "none",
        project=PROJECT,
        run_name=folder.name,
        ddp_find_unused_parameters=False,
        **({checkpointing: True} if plan.checkpointing else {}),
    )
    arguments._n_gpu = 1  # or else the Trainer would spread each batch over all GPUs it sees
    return arguments


def shares_rows(cfg: Config, model: PeftModel) -> bool:
    """Whether pairs share a row in this training; the Trainer's noise knows but one length in a row."""
    return cfg.PACKING and not cfg.NEFTUNE_ALPHA and may_share_rows(model)


def collate(shares: Sequence[Sequence[Example]], most: int, shared: bool = True) -> dict[str, Any]:
    """This process's share of one step: its rows, and what the Trainer counts."""
    (examples,) = shares
    rows = [flatten(row, shared) for row in pack(examples, most)]
    whole = flatten(examples, shared=False)
    return {"rows": rows, "input_ids": whole["input_ids"], "labels": whole["labels"]}


def step_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """This row's share of the mean over all tokens of the step, however the step was cut up."""
    return summed_loss(outputs.logits, labels) / num_items_in_batch


class AnswerTrainer(Trainer):
    """The Trainer, with steps of rows without padding and checkpoints that count only when whole."""

    fit: Fit
    control: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        from torch.utils.data import SequentialSampler

        return SequentialSampler(train_dataset or self.train_dataset)  # Steps has drawn the order

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Row by row: the gradient of a step is the sum of theirs, and so is the loss."""
        step, (*rows, last) = super().training_step, inputs["rows"]
        with self.accelerator.no_sync(model):  # processes exchange their gradients once a step
            losses = [step(model, row, num_items_in_batch) for row in rows]
        loss: Any = sum([*losses, step(model, last, num_items_in_batch)])
        self.fit.lost_loss |= not math.isfinite(loss)
        return loss.nan_to_num(0, 0, 0)  # with a NaN, the Trainer's sum would stay one for ever

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What is no number is in no table and no picture."""
        if "loss" in logs and self.fit.lost_loss:
            logs, self.fit.lost_loss = logs | {"loss": math.nan}, False
        finite = {name: figure for name, figure in logs.items() if math.isfinite(figure)}
        super().log(finite, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """A mean over tokens, not batches; then a checkpoint, since it may be the best."""
        fit = self.fit
        loss = measured_loss(fit.model, fit.data.validation, fit.plan.tokens_at_once)
        loss = fit.first_says(math.inf if loss is None else loss)  # unknown is never the best
        self.log({"eval_loss": loss})
        metrics = {"eval_loss": loss}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.control.should_save = True
        self.control.should_training_stop |= is_finished(fit.cfg, self.state)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        fit, step, is_last = self.fit, self.state.global_step, is_finished(self.fit.cfg, self.state)
        if fit.bad_steps and is_last:
            raise UserError(NOT_A_NUMBER)
        if fit.bad_steps or fit.saved_step == step:
            return
        refuse_nan(fit.model)
        fit.saved_step, fit.stats.finished = step, is_last

        def write() -> None:
            super(AnswerTrainer, self)._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()

        if is_main_process():
            fit.checkpoints.save(self.state, fit.stats.record(), write)
        else:
            write()
        self.accelerator.wait_for_everyone()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # or else it was float16 then, and is not now
            super()._load_scaler(checkpoint)


class Pace(TrainerCallback):
    """Counts time and speed, leaves out steps that are no number, and says when to save and stop."""

    fit: Fit
    training_bar: Any = None  # where the Trainer shows one; not in a notebook's kernel

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        state.compute_steps(args, args.max_steps)  # or else those of the checkpoint would hold
        if args.device.type != "cpu":
            self.fit.try_largest_row()
        self.begun = state.global_step, self.fit.stats.seconds
        self.shown: dict[str, str] = {}
        if self.training_bar:
            self.training_bar.set_description("Training")
            self.training_bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.mark_speed(state)

    def mark_speed(self, state: Any) -> None:
        self.since = time.perf_counter(), state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        stats, asking = self.fit.stats, self.fit.plan.asking_seconds
        stats.start()
        steps, seconds = state.global_step - self.begun[0], stats.seconds - self.begun[1]
        left = seconds / max(1, steps) * (state.max_steps - state.global_step)
        if steps == 3 and left + asking > 60:
            then = f" and {in_time(asking)} for the questions at the end"
            with tqdm.external_write_mode():
                say("Estimate", f"by the first three steps: {in_time(left)} more{then}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.fit.refuse_or_skip_nan()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        fit = self.fit
        overdue = time.monotonic() - fit.checkpoints.saved_at > 60 * fit.cfg.SAVE_MINUTES
        save, fit.stop.asked = fit.highest(is_main_process() and overdue, fit.stop.asked)
        control.should_save |= bool(save or fit.stop.asked)
        control.should_training_stop |= bool(fit.stop.asked)
        if control.should_evaluate or control.should_save or control.should_training_stop:
            fit.stats.pause()
            control.should_log = True  # a checkpoint holds the losses of all steps up to it

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mark_speed(state)  # measuring and saving are no time of training

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mark_speed(state)
        (self.fit.stop.asked,) = self.fit.highest(self.fit.stop.asked)  # while measuring or saving
        control.should_training_stop |= bool(self.fit.stop.asked)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Everything to the log, the losses into the progress bar."""
        figures = {"step": state.global_step} | (logs or {})
        if "learning_rate" in figures:
            start, tokens = self.since
            self.mark_speed(state)
            figures["tokens_per_second"] = (self.since[1] - tokens) / (self.since[0] - start)
        shown = (
            f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in figures.items()
            if not k.startswith("train_")  # the Trainer's own sums, of this sitting only
        )
        LOG.info("%-11s%s", "Measured", ", ".join(shown))
        names = {"loss": "loss", "eval_loss": "validation"}
        self.shown |= {names[k]: f"{v:.3f}" for k, v in figures.items() if k in names}
        if self.training_bar:
            self.training_bar.set_postfix(self.shown, refresh=False)


@dataclass
class Fit:
    """One go at the training: to its end, or as far as the person and the memory allow."""

    cfg: Config
    model: PeftModel
    data: PreparedData
    device: Device
    plan: Plan
    checkpoints: Checkpoints
    stats: RunStats
    stop: Interruption = field(default_factory=Interruption)
    lost_loss: bool = False  # that of a step since the last entry of the log was no number
    bad_steps: int = 0  # steps in a row whose gradient was no number
    saved_step: int = 0

    def run(self, start: Checkpoint | None) -> None:
        self.trainer = self.built_trainer()
        with (
            fused_lora_layers(self.model, self.cfg.FAST_ADAPTER),
            padding_free(self.model),
            self.stop,
            self.explained_errors(start),
        ):
            self.trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
        if self.stop.asked:
            state = self.trainer.state
            step = f"Step {state.global_step} of {state.max_steps}"
            raise Stopped(self.stop.asked, f"{step} is saved, and {resume_hint(self.cfg)}.")

    def built_trainer(self) -> Any:
        import torch
        import transformers

        most = self.plan.tokens_at_once if shares_rows(self.cfg, self.model) else 0
        shared = may_share_rows(self.model)
        trainer: Any = type("Trainer", (AnswerTrainer, transformers.Trainer), {"fit": self})(
            self.model,
            training_arguments(self),
            train_dataset=Steps(self.data.train, self.plan.pairs, self.cfg.SEED),
            eval_dataset=self.data.validation or None,
            data_collator=functools.partial(collate, most=most, shared=shared),
            compute_loss_func=step_loss,
        )
        if trainer.accelerator.scaler:
            trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=FIRST_SCALE)
        bar = trainer.pop_callback(transformers.ProgressCallback)
        usual = transformers.ProgressCallback if bar else transformers.TrainerCallback
        trainer.add_callback(type("Pace", (Pace, usual), {"fit": self}))
        return trainer

    @contextmanager
    def explained_errors(self, start: Checkpoint | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.stop.asked and memory_fault(error):
                raise Stopped(self.stop.asked) from None
            if self.cfg.REPORT_TO in type(error).__module__:
                raise UserError(
                    f"REPORT_TO {self.cfg.REPORT_TO} does not work here: {preview(str(error), 200)}\n"
                    "Mend that, or train without it."
                ) from error
            known = isinstance(error, UserError) or memory_fault(error)
            if self.stats.begun or not start or known:
                raise
            raise UserError(
                f"{short_path(start.folder)} is whole, but cannot be taken up here: "
                f"{type(error).__name__}: {preview(str(error), 150)}\n"
                f"It was written with {other_versions(self.stats.versions)}.\n"
                "Install those versions, or start again from the beginning with --no-resume."
            ) from error

    def try_largest_row(self) -> None:
        """Forwards and backwards, before anything else: if it is too much, then now."""
        import torch

        batch = self.trainer.data_collator([largest_row(self.data.train, self.plan)])
        tokens = int((batch["labels"] != IGNORE).sum())
        with torch.random.fork_rng():
            self.trainer.training_step(self.trainer.model_wrapped, batch, tokens)
        self.model.zero_grad()

    def refuse_or_skip_nan(self) -> None:
        """One overflow costs its step alone; several in a row are the end."""
        import torch

        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        is_finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        self.bad_steps = 0 if is_finite else self.bad_steps + 1
        self.stats.skipped_steps += not is_finite
        if self.bad_steps == MOST_BAD_STEPS:
            raise UserError(NOT_A_NUMBER)
        if (
            self.bad_steps and not self.trainer.accelerator.scaler
        ):  # which leaves the step out itself
            for gradient in gradients:
                gradient.zero_()

    def first_says(self, figure: float) -> float:
        """What the first process found, in all of them: rounding must not part their ways."""
        import torch
        from accelerate.utils import broadcast

        if world_size() == 1:
            return figure
        return float(broadcast(torch.tensor(figure, device=self.trainer.args.device)))

    def highest(self, *figures: int) -> list[int]:
        """The highest that any process has: all of them save and stop after the same step."""
        import torch

        if world_size() == 1:
            return [*figures]
        own = torch.tensor([figures], device=self.trainer.args.device)
        return list(self.trainer.accelerator.gather(own).amax(0).tolist())


def is_finished(cfg: Config, state: Any) -> bool:
    """Whether all steps are done, or the last EARLY_STOPPING_PATIENCE measurements brought nothing."""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    bad_steps = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    stalled = 0 < cfg.EARLY_STOPPING_PATIENCE <= bad_steps
    return bool(stalled or state.global_step >= state.max_steps)


def refuse_nan(model: torch.nn.Module) -> None:
    """Before a checkpoint is written: one with a NaN would be no use to anybody."""
    import torch

    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise UserError(NOT_A_NUMBER)


def optimizer_name(cfg: Config, device: Device) -> str:
    if cfg.OPTIMIZER == "auto":
        return "paged_adamw_32bit" if device.kind == "cuda" else "adamw_torch"
    if cfg.OPTIMIZER.startswith("paged") and device.kind != "cuda":
        raise UserError(f"OPTIMIZER {cfg.OPTIMIZER} needs an NVIDIA GPU. Use auto or adamw_torch.")
    return cfg.OPTIMIZER


@dataclass
class RunStats:
    """What is counted over the whole run, however often it was interrupted."""

    base_loss: float | None = None
    trainable: int = 0
    parameters: int = 0
    tokens_at_once: int = 0
    device: str = ""
    log: str = ""  # the name of its file
    seconds: float = 0.0  # from the first step to the last, without measuring and saving
    cpu_seconds: float = 0.0
    peak_memory_gb: float | None = None
    estimated_seconds: float | None = None
    estimated_memory_gb: float | None = None
    skipped_steps: int = 0  # whose gradient was no number
    finished: bool = False
    versions: dict[str, str | None] = field(default_factory=dict)  # that wrote the checkpoint

    def __post_init__(self) -> None:
        self.begun = False
        self.mark: tuple[float, float] | None = None

    def start(self) -> None:
        self.pause()
        self.begun = True
        self.mark = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        if self.mark:
            self.seconds += time.perf_counter() - self.mark[0]
            self.cpu_seconds += time.process_time() - self.mark[1]
        self.mark = None

    def record(self) -> dict[str, Any]:
        peaks = (self.peak_memory_gb, peak_memory_gb(self.device))
        self.peak_memory_gb = max(filter(None, peaks), default=None)
        self.versions = installed_versions()
        return asdict(self)


def train_adapter(
    cfg: Config,
    model: PeftModel,
    data: PreparedData,
    device: Device,
    plan: Plan,
    checkpoints: Checkpoints,
) -> None:
    """Train from the newest checkpoint, or from the beginning, to the last one.

    When memory runs out, the same steps are done with less at once.
    """
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    untrained = {name: p.detach().to("cpu", copy=True) for name, p in learnt.items()}
    first = {} if checkpoints.last else first_figures(model, data, plan)
    longest = max(len(example["input_ids"]) for example in data.train)
    if not may_share_rows(model):
        say("Note", f"{cfg.MODEL_NAME} cannot read several pairs in one row, so this takes longer")
    most = plan.tokens_at_once if shares_rows(cfg, model) else longest
    ways = [plan._replace(tokens_at_once=count) for count in halvings(most, longest)]
    if not plan.checkpointing:
        ways.append(ways[-1]._replace(checkpointing=True))
    tried: list[Plan] = []

    def attempt(way: Plan) -> None:
        if tried:
            say_less_memory(tried[-1], way)
        tried.append(way)
        for name, parameter in learnt.items():
            parameter.data.copy_(untrained[name])
        start = checkpoints.last
        stats = RunStats(**(start.record["stats"] if start else first))
        stats.tokens_at_once, stats.device = way.tokens_at_once, device.kind
        stats.log = checkpoints.log.name
        Fit(cfg, model, data, device, way, checkpoints, stats).run(start)

    try:
        as_many_as_fit(attempt, ways)
    except (RuntimeError, MemoryError) as error:
        fault = memory_fault(error)
        if not fault or (fault == "full" and world_size() == 1):
            raise
        raise UserError(
            f"{'A process' if world_size() > 1 else 'The GPU'} ran out of memory and answers no more: "
            f"{preview(str(error), 100)}\n"
            "Run the same command again: it goes on from the newest checkpoint. If it happens again, "
            f"add --tokens-at-once {max(longest, tried[-1].tokens_at_once // 2)}, then "
            "--gradient-checkpointing; neither changes the result."
        ) from None
    checkpoints.latest()  # read back, before a model is made of it


def say_less_memory(before: Plan, now: Plan) -> None:
    less = f"{now.tokens_at_once:,} tokens at once, not {before.tokens_at_once:,}"
    if now.checkpointing != before.checkpointing:
        less = "values are computed again instead of kept, which is slower"
    say("Memory", f"it ran out, so the training goes on with less: {less}; the result is the same")


def first_figures(model: PeftModel, data: PreparedData, plan: Plan) -> dict[str, Any]:
    trainable, parameters = model.get_nb_trainable_parameters()
    figures = {"trainable": trainable, "parameters": parameters}
    figures |= {"estimated_seconds": plan.seconds, "estimated_memory_gb": plan.memory_gb}
    if data.validation:
        with model.disable_adapter():
            loss = measured_loss(model, data.validation, plan.tokens_at_once)
        if loss is not None:
            say("Before", f"validation loss of the untrained model: {loss:.3f}")
        figures["base_loss"] = loss
    return figures


def other_versions(there: dict[str, str | None]) -> str:
    here = installed_versions()
    changed = [
        f"{name} {version} (here {here.get(name)})"
        for name, version in there.items()
        if version != here.get(name)
    ]
    return ", ".join(changed) or "the versions that are here, too"


# -- What a training came to


@dataclass
class TrainingResult:
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
    best_step = state["best_global_step"] if cfg.KEEP_BEST else None
    history = state["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return TrainingResult(
        history=history,
        base_loss=last.record["stats"]["base_loss"],
        final_loss=losses.get(best_step or last.step),
        best_step=best_step,
        steps=last.step,
        epochs=state["epoch"],
        tokens=int(state["num_input_tokens_seen"]),
        stats=RunStats(**last.record["stats"]),
        adapter=last.best_adapter if best_step else last.folder / ADAPTER,
    )


def peak_memory_gb(kind: str) -> float | None:
    """The most memory in use so far: the GPU's where there is one, or else this process's."""
    import torch

    if kind == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    if not importlib.util.find_spec("resource"):  # Windows
        return None
    # on Linux, getrusage begins with the peak of the process that started this one
    with suppress(OSError):
        if peak := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M):
            return round(int(peak[1]) * 1024 / 1e9, 3)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


# ==================================================================================================
# 8  Answering
# ==================================================================================================

EXAMPLES_SHOWN = 3


class Answer(NamedTuple):
    text: str
    tokens: int
    stopped: bool  # by itself, at the end of its turn


def asked_by_user(question: str) -> dict[str, str]:
    """A question as a message; what is no text, as in a badly read file name, becomes ?."""
    return {"role": "user", "content": question.encode("utf-8", "replace").decode()}


def prompt_of(tuned: Run, messages: Messages, cfg: Config) -> list[int]:
    """A conversation as tokens; of one that has grown too long, its latest turns."""
    context = context_of(tuned.model, tuned.tokenizer)
    most = max(context - cfg.MAX_TOKENS, context // 2)
    starts = [i for i, one in enumerate(messages) if one["role"] != "assistant"]
    turns = [messages[i:j] for i, j in itertools.pairwise([*starts, len(messages)])]
    kept, size = [turns.pop()], 0
    while turns and size <= most:  # each by itself: hundreds together would take seconds
        kept.insert(0, turns.pop())
        size += len(encode(tuned.tokenizer, kept[0])["input_ids"])
    kept = kept[size > most :]
    while kept:
        first, *others = itertools.chain(*kept)
        question = f"{cfg.SYSTEM}\n\n{first['content']}" if cfg.SYSTEM else first["content"]
        ids = encode(tuned.tokenizer, [asked_by_user(question), *others])["input_ids"]
        if len(ids) <= most:
            return ids
        del kept[0]
    raise UserError(
        f"A question has {len(ids):,} tokens, instructions included; with room for the answer this "
        f"model takes {most:,}.\nIt begins: {preview(messages[-1]['content'])}\nShorten it."
    )


def answers(model: Any, tokenizer: Any, prompts: list[list[int]], cfg: Config) -> list[Answer]:
    """What the model says to each prompt, with as many at once as memory holds."""
    import torch

    def in_batches_of(size: int) -> list[Answer]:
        found = []
        for first in range(0, len(prompts), size):
            ids = {"input_ids": prompts[first : first + size]}
            batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
            start = batch["input_ids"].shape[1]
            room = context_of(model, tokenizer) - start
            rows = model.generate(**batch, **generation_settings(cfg, tokenizer, start, room))
            found += [decoded_answer(tokenizer, row) for row in rows[:, start:].tolist()]
        return found

    with evaluating(model), torch.random.fork_rng(enabled=cfg.TEMPERATURE > 0):
        if cfg.TEMPERATURE:
            torch.manual_seed(cfg.SEED)
        return as_many_as_fit(in_batches_of, halvings(ANSWERS_AT_ONCE, 1))


def generation_settings(cfg: Config, tokenizer: Any, start: int, room: int) -> dict[str, Any]:
    """How answers are made that begin at this position and have room for so many tokens."""
    import transformers as hf

    chance = {"temperature": cfg.TEMPERATURE, "top_p": cfg.TOP_P, "top_k": 0}
    how = hf.GenerationConfig(
        max_new_tokens=max(1, min(cfg.MAX_TOKENS, room)),
        do_sample=cfg.TEMPERATURE > 0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # which the training has switched off
        **(chance if cfg.TEMPERATURE else {}),
    )
    # in the answer alone: padding and the ends of earlier turns are no repetition
    repetition = hf.RepetitionPenaltyLogitsProcessor(cfg.REPETITION_PENALTY, start)
    return {"generation_config": how, "logits_processor": hf.LogitsProcessorList([repetition])}


def decoded_answer(tokenizer: Any, ids: list[int]) -> Answer:
    stopped = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return Answer(text.strip(), len(ids), stopped)


def stream_answer(tuned: Run, messages: Messages, cfg: Config) -> Generator[Answer]:
    """An answer again and again while it grows, then as it is. Closing this ends it."""
    import torch
    import transformers as hf

    prompt, tokenizer = prompt_of(tuned, messages, cfg), tuned.tokenizer
    room = context_of(tuned.model, tokenizer) - len(prompt)
    how = generation_settings(cfg, tokenizer, len(prompt), room)
    processors = how["logits_processor"]
    if cfg.TEMPERATURE:
        processors += [hf.TemperatureLogitsWarper(cfg.TEMPERATURE), hf.TopPLogitsWarper(cfg.TOP_P)]
    part, cache = Answer("", 0, stopped=False), None
    with tuned.untuned() if cfg.BASE else nullcontext(tuned.model) as model:
        chance = torch.Generator(model.device).manual_seed(cfg.SEED)
        ids = torch.tensor([prompt], device=model.device)
        while part.tokens < how["generation_config"].max_new_tokens and not part.stopped:
            new = ids if cache is None else ids[:, -1:]  # without a cache all is read again
            with evaluating(model):  # for one token: a page takes the next in another thread
                output = model(input_ids=new, past_key_values=cache, use_cache=True)
                cache = output.get("past_key_values")
                scores = processors(ids, output.logits[:, -1].float())
                likeliest, shares = scores.argmax(-1, keepdim=True), scores.softmax(-1)
                drawn = shares.multinomial(1, generator=chance) if cfg.TEMPERATURE else likeliest
                ids = torch.cat([ids, drawn], dim=1)
            part = decoded_answer(tokenizer, ids[0, len(prompt) :].tolist())
            yield part._replace(text=part.text.rstrip("\ufffd"))  # the first half of a letter
    yield part


# -- Before and after


class Asked(NamedTuple):
    """A question, and what came of it before the training and after it."""

    place: str  # the row where it stands
    question: str
    reference: str  # the answer wanted, where that is known
    before: str
    after: str
    loss_before: float | None = None  # of a token of the reference
    loss_after: float | None = None
    overlap_before: float | None = None  # with the reference
    overlap_after: float | None = None
    tokens: int = 0  # of the reference
    cut: int = 0  # how many of the two answers were cut off


@dataclass
class Comparison:
    asked: list[Asked] = field(default_factory=list)
    tokens: int = 0  # of all answers
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def pace(self) -> str:
        cut = sum(one.cut for one in self.asked)
        more = f"; {cut} answers cut off, --max-tokens allows more" if cut else ""
        return f"{self.tokens_per_second:.1f} tokens a second{more}"

    def mean(self, figure: str) -> float | None:
        """Of losses that of a token, as the validation loss is; else that of a question."""
        known = [one for one in self.asked if getattr(one, figure) is not None]
        weights = [one.tokens or 1 if figure.startswith("loss") else 1 for one in known]
        return statistics.fmean([getattr(one, figure) for one in known], weights) if known else None


class Talk(NamedTuple):
    """A question to ask, with what was said before it."""

    place: str  # the row where it stands
    messages: Messages
    reference: str = ""  # the answer wanted, which the model does not see


def ask_both(tuned: Run, talks: Sequence[Talk], cfg: Config) -> Comparison:
    """Ask the model as it was and as it is, and measure how near it comes to the answers wanted.

    A question that is too long is left out, and said. Ctrl+C ends it with what is done by then.
    """
    from tqdm import tqdm

    result, fitting = Comparison(), []
    for talk in talks:
        try:
            fitting.append((talk, prompt_of(tuned, talk.messages, cfg)))
        except UserError as error:
            say("Left out", f"row {talk.place}: {error}" if talk.place else str(error))
    groups = [fitting[i : i + ANSWERS_AT_ONCE] for i in range(0, len(fitting), ANSWERS_AT_ONCE)]
    try:
        for group in tqdm(groups, desc="Asking", leave=False, disable=len(groups) < 2):
            ask_group(tuned, group, cfg, result)
    except KeyboardInterrupt:
        if not result.asked:
            raise
        say("Note", f"stopped after {len(result.asked)} of {len(fitting)} questions")
    return result


def ask_group(
    tuned: Run, group: Sequence[tuple[Talk, list[int]]], cfg: Config, result: Comparison
) -> None:
    sides = []
    for side in (tuned.untuned(), nullcontext(tuned.model)):
        with side as model:
            start = time.perf_counter()
            told = answers(model, tuned.tokenizer, [prompt for _, prompt in group], cfg)
            result.seconds += time.perf_counter() - start
            losses = [loss_of_answer(tuned, model, *one) for one in group]
        sides.append(list(zip(told, losses, strict=True)))
    for (talk, _), *both in zip(group, *sides, strict=True):
        (before, (loss_before, tokens)), (after, (loss_after, _)) = both
        texts = (talk.place, talk.messages[-1]["content"], talk.reference, before.text, after.text)
        near, nearer = (overlap(tuned.tokenizer, text, talk.reference) for text in texts[3:])
        cut = 2 - before.stopped - after.stopped
        result.asked.append(Asked(*texts, loss_before, loss_after, near, nearer, tokens, cut))
        result.tokens += before.tokens + after.tokens


def loss_of_answer(
    tuned: Run, model: Any, talk: Talk, prompt: list[int]
) -> tuple[float | None, int]:
    """The mean loss of the answer wanted, after exactly what the model was asked; its tokens."""
    answer = {"role": "assistant", "content": talk.reference}
    labels = encode(tuned.tokenizer, [talk.messages[-1], answer])["labels"]
    wanted = [label for label in labels if label != IGNORE]
    example: Example = {"input_ids": prompt + wanted, "labels": [IGNORE] * len(prompt) + wanted}
    room = context_of(model, tuned.tokenizer) - len(prompt)
    with suppress(UserError):  # a loss that is no number is not shown
        if talk.reference and len(wanted) <= room:
            return measured_loss(model, [example], len(example["labels"])), len(wanted)
    return None, len(wanted)


def overlap(tokenizer: Any, answer: str, reference: str) -> float | None:
    """What two texts have in common, from 0 to 1: tokens of both, in any order, against all."""
    if not reference:
        return None
    said, wanted = (
        Counter(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
        for text in (answer, reference)
    )
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


# ==================================================================================================
# 9  Report
# ==================================================================================================

ANSWERS, ANSWERS_PICTURE = "answers.xlsx", "training_visuals/answers.png"
SAMPLE = "sample_rows.json"
ROWS_IN_SAMPLE = 16
SMALL_FILES = 50_000_000  # bytes of tokenizer, pictures and records beside an adapter, at most
REPORT_MARK = "made by finetune_colab.py"  # by which a report is known as ours, to be replaced
# On the person's own disk, which is nobody else's business.
PLACES = (
    *("DATASET_PATH", "OUTPUT_DIR", "CHECKPOINT_DIR", "LOG_DIR"),
    *("CHECKPOINT_MIRROR", "RESUME_FROM_CHECKPOINT", "QUESTIONS", "EXPORT_DIR"),
)


# -- The record of a run, and its card


def public_settings(cfg: Config) -> dict[str, Any]:
    """The settings as others may read them: without keys, and without folders of this computer."""
    public = {name: public_place(getattr(cfg, name)) for name in PLACES}
    return vars(cfg) | public | {"MODEL_NAME": base_name(cfg)}


def public_place(place: str) -> str:
    """A path without its folders; of a link the server only: who has a shared link has the file."""
    if link := re.match("https?://", place.strip(), re.IGNORECASE):
        return link[0] + urllib.parse.urlsplit(without_secrets(place)).netloc + "/…"
    path = local_path(place)
    return path.name if path.is_absolute() else without_secrets(place)


LOGGED = ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]


def training_log(trained: TrainingResult) -> pandas.DataFrame:
    """What was logged, row by row, and of how many steps each training loss is the mean."""
    import pandas

    log = pandas.DataFrame(trained.history).reindex(columns=LOGGED)
    log = log.dropna(subset=["loss", "eval_loss"], how="all")
    ends = log["step"][log["loss"].notna()]
    return log.assign(steps=ends.diff().fillna(ends))


def mean_train_loss(log: pandas.DataFrame) -> float:
    losses = log.dropna(subset=["loss"])
    return float((losses["loss"] * losses["steps"]).sum() / losses["steps"].sum())


def metrics_of(data: PreparedData, trained: TrainingResult) -> dict[str, Any]:
    stats = trained.stats
    return {
        "train_loss": mean_train_loss(training_log(trained)),
        "eval_loss": trained.final_loss,
        "base_eval_loss": trained.base_loss,
        "best_step": trained.best_step,
        "steps": trained.steps,
        "epochs": trained.epochs,
        "train_pairs": len(data.train_pairs),
        "eval_pairs": len(data.validation_pairs),
        "tokens_trained": trained.tokens,
        "estimated_seconds": stats.estimated_seconds,
        "estimated_memory_gb": stats.estimated_memory_gb,
        "tokens_at_once": stats.tokens_at_once,
        "train_seconds": round(stats.seconds, 3),
        "train_cpu_seconds": round(stats.cpu_seconds, 3),
        "tokens_per_second": round(trained.tokens / stats.seconds, 1),
        "peak_memory_gb": stats.peak_memory_gb,
        "adapted_layers": layers_in_words(layers_in(trained.adapter)),
        "trainable_parameters": stats.trainable,
        "trainable_percent": round(100 * stats.trainable / stats.parameters, 4),
    }


def quality_record(quality: Quality) -> dict[str, Any]:
    parts = {
        kind: {
            "rows": len(notes),
            "share": round(len(notes) / quality.counted, 4),
            "places": [[note.sheet, note.row] for note in notes],
        }
        for kind, notes in quality.parts.items()
    }
    score = round(quality.score, 4) if quality.counted else None
    counts = {"rows_counted": quality.counted, "rows_good": quality.good}
    return {"score": score, **counts, "parts": parts}


def run_record(
    cfg: Config, device: Device, data: PreparedData, trained: TrainingResult
) -> dict[str, Any]:
    """run.json: what later commands need to know, so that nobody types a setting twice."""
    pairs = [pair.messages for pair in data.pairs.kept]
    return {
        "settings": public_settings(cfg),
        "prompt_format": prompt_in_words(data.tokenizer),
        "base_model": base_name(cfg),
        "base_revision": model_revision(cfg),
        "device": device._asdict(),
        "dataset": {
            "file": public_place(data.pairs.name),  # several files keep the path of their pattern
            "sheet": data.pairs.table.sheet,
            "shape": data.pairs.shape,
            **column_names(data.pairs),
            "quality": quality_record(data.quality),
            "sha256_of_pairs": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
            "held_out_rows": [[pair.sheet, pair.row] for pair in data.validation_pairs],
        },
        "examples": [pair.messages[0]["content"] for pair in data.train_pairs[:EXAMPLES_SHOWN]],
        "versions": installed_versions(),
        "results": metrics_of(data, trained),
    }


def model_card(record: dict[str, Any], template: str) -> str:
    """What stands in run.json, for people, with a question that was taught."""
    source, revision = record["base_model"], record["base_revision"]
    local = source.startswith("./")
    name = preview(source.removeprefix("./"), 100).replace("<", "&lt;")
    figures = record["results"].items()
    return template.format(
        base_model="" if local else f"base_model: {source}\n",
        base=name,
        copy=f"The folder `{name}`, the base model, has to lie in this folder.\n" if local else "",
        source=json.dumps(source),
        revision=f", revision={json.dumps(revision)}" if revision and not local else "",
        prompt=record["prompt_format"],
        question=repr(record["examples"][0][:300]),
        rows="\n".join(f"| `{figure}` | {as_figure(value)} |" for figure, value in figures),
    )


def as_figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "not measured" if value is None else str(value)


CARD = """\
---
{base_model}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- question-answering
---

# A LoRA adapter for {base}

TrainingResult by `finetune_colab.py` on pairs of questions and answers. It knows one form of question, exactly this, and
its answer ends by itself:

```text
{prompt}
```

To chat, put the script beside this folder: `python finetune_colab.py chat --output-dir FOLDER`. Without the script, run this
in the folder (packages: torch, transformers from 5, peft; on Colab first `pip uninstall -y torchao`, which is too old there).
{copy}
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
base = AutoModelForCausalLM.from_pretrained({source}, dtype=dtype{revision})
model = PeftModel.from_pretrained(base, ".").to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(".")

talk = [{{"role": "user", "content": {question}}}]  # one of those it was taught
asked = {{"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}}
inputs = tokenizer.apply_chat_template(talk, **asked).to(device)
output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
answer = output[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip())
```

## The run

| | |
| --- | --- |
{rows}

The loss is the mean per answer token, end of turn included, in nats. It says how well answers are estimated,
not whether they are true: read some before you rely on them. `answers.xlsx` has some from before and after
the training, `training_visuals/` the curves, `run.json` every setting, version and result.
"""


# -- Pictures, in blue and orange, which everybody can tell apart

BLUE, ORANGE, GREY = "#1f6fb2", "#d9730d", "#6b6b6b"
TRAINING, VALIDATION = "training", "validation (held-out questions)"
MOST_ROWS_DRAWN = 40
BIN = 1.08  # how much longer each bar of lengths goes than the one before


@contextmanager
def picture(path: Path, title: str, meaning: str, size: float = 5, **parts: Any) -> Iterator[Any]:
    """The axes to draw on, under a title and a sentence that says what it means."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("seaborn-v0_8-whitegrid"):  # seaborn itself takes check half a second
        figure = Figure(figsize=(8, size), layout="constrained", dpi=110)
        axes = figure.subplots(**parts)
    figure.suptitle(title, weight="bold")
    figure.axes[0].set_title(meaning, size="medium")
    yield axes
    figure.legend(loc="outside lower center", ncols=2)
    with atomic_write(path) as staged:
        figure.savefig(staged, format="png", metadata={"Software": REPORT_MARK})


def finish_losses(axes: Any, trained: TrainingResult) -> None:
    """What both pictures of losses have in common."""
    if trained.base_loss is not None:
        label = "validation, before training"
        axes.axhline(trained.base_loss, color=GREY, linestyle="--", label=label)
    axes.set(ylabel="loss per token (nats)", ylim=(0, 1.1 * axes.get_ylim()[1]))
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_training_curves(path: Path, log: pandas.DataFrame, trained: TrainingResult) -> None:
    import seaborn

    best, meaning = trained.best_step, "the adapter of the last step is kept"
    if best:
        meaning = f"validation loss is lowest at step {best}: best adapter kept"
    losses, measured = log.dropna(subset=["loss"]), log.dropna(subset=["eval_loss"])
    around = 2 * (len(losses) // 40) + 1
    smooth = losses["loss"].rolling(around, center=True, min_periods=1).mean()
    dots = "o" if len(losses) < 3 else None  # a line needs two ends to be seen
    rows = {"nrows": 2, "sharex": True, "height_ratios": [3, 1]}
    with picture(path, "Loss while training: lower is better", meaning, 6, **rows) as (top, bottom):
        each = {"color": BLUE, "alpha": 0.3, "linewidth": 1}
        seaborn.lineplot(losses, x="step", y="loss", ax=top, **each)
        top.plot(losses["step"], smooth, color=BLUE, marker=dots, label=TRAINING)
        if len(measured):
            top.plot(measured["step"], measured["eval_loss"], "o-", color=ORANGE, label=VALIDATION)
        if best:
            top.axvline(best, color=ORANGE, linestyle=":", label=f"adapter kept, step {best}")
        finish_losses(top, trained)
        seaborn.lineplot(losses, x="step", y="learning_rate", color=BLUE, marker=dots, ax=bottom)
        bottom.set(xlabel="step", ylabel="learning rate")
        bottom.ticklabel_format(axis="y", scilimits=(0, 0))


def draw_loss_comparison(path: Path, log: pandas.DataFrame, trained: TrainingResult) -> None:
    log = log.assign(epoch=[math.ceil(epoch - 1e-6) for epoch in log["epoch"]])
    logged = log.dropna(subset=["loss"]).groupby("epoch")
    taught = {epoch: mean_train_loss(steps) for epoch, steps in logged}
    measured = log.groupby("epoch")["eval_loss"].last().dropna()
    meaning = "nothing was held out to measure: these are means of what was taught"
    if trained.base_loss is not None and trained.final_loss is not None:
        before, after = trained.base_loss, trained.final_loss
        meaning = f"validation loss was {before:.3f} before training and is {after:.3f} now"
    with picture(path, "Loss by epoch: lower is better", meaning) as axes:
        axes.bar(taught.keys(), taught.values(), 0.6, color=BLUE, label=f"{TRAINING}, mean")
        if len(measured):
            axes.plot(measured.index, measured, "o", color=ORANGE, label=VALIDATION)
        axes.set_xlabel("epoch")
        finish_losses(axes, trained)


def draw_answers(path: Path, table: pandas.DataFrame, which: str) -> None:
    """For each question how near the answers came, before and after."""
    table = table.dropna(subset=["overlap before", "overlap after"])
    before, after = table["overlap before"], table["overlap after"]
    if table.empty:
        return
    meaning = f"{len(table)} {which}: overlap {before.mean():.2f} before, {after.mean():.2f} after"
    table = table.head(MOST_ROWS_DRAWN)
    rows, names = range(len(table)), []
    for row, question in zip(table["row"], table["question"], strict=True):
        drawable = max(question, default="") < "\u0590"  # in letters that every matplotlib has
        names.append(preview(question, 36) if drawable else f"row {row}")
    height = 1.8 + 0.25 * len(table)
    with picture(path, "Answers before and after the training", meaning, height) as axes:
        axes.hlines(rows, before[table.index], after[table.index], color=GREY, alpha=0.4)
        ring = {"markersize": 10, "markerfacecolor": "none", "label": "before training"}
        axes.plot(before[table.index], rows, "o", color=GREY, **ring)  # around an equal dot
        axes.plot(after[table.index], rows, "o", color=BLUE, label="after training")
        axes.set(xlabel=FIGURES_OF_ANSWERS["overlap"], xlim=(-0.03, 1.03))
        axes.set_yticks(rows, names, parse_math=False)
        axes.set_ylim(len(table) - 0.4, -0.6)


def draw_lengths(path: Path, cfg: Config, data: PreparedData) -> None:
    """How long the pairs are, on a scale on which the longest and the usual ones are seen."""
    from matplotlib.ticker import LogLocator

    unit = "tokens (about ¾ of an English word each)" if data.tokenizer else "characters"
    kept = data.tokens or [len(pair.question + pair.answer) for pair in data.pairs.kept]
    limit = min(cfg.MAX_LENGTH, getattr(data.tokenizer, "model_max_length", cfg.MAX_LENGTH))
    edge, lengths = limit + 0.5, [*kept, *data.overlong] or [1]  # a bar ends at the limit
    first, last = (math.log(one / edge, BIN) for one in (min(lengths), max(lengths)))
    bins = [edge * BIN**n for n in range(math.floor(first), math.floor(last) + 2)]
    labels = [f"{len(kept)} pairs kept", f"{len(data.overlong)} too long and left out"]
    with picture(path, "How long the pairs are", ", ".join(labels)) as axes:
        axes.hist([kept, data.overlong], bins, stacked=True, color=[BLUE, ORANGE], label=labels)
        if data.tokenizer:
            label = f"the limit, {limit} (MAX_LENGTH)"
            axes.axvline(edge, color=GREY, linestyle="--", label=label)
        axes.set(xlabel=f"length of a question with its answer, in {unit}", ylabel="pairs")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.yaxis.get_major_locator().set_params(integer=True)


# -- Workbooks

MOST_REPORT_ROWS = 20_000
WIDEST_CELL = 60  # columns of letters in a cell, from where on they are wrapped
LONGEST_REPORT_CELL = 32_767  # what a workbook allows, counted in UTF-16
NOT_IN_A_WORKBOOK = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]|#[A-Z/0]+[!?A]$")  # or an error, as #N/A
GOOD, BAD = "9DC3E6", "F4B183"  # blue and orange
SCALES = {  # the same in every workbook, so that nonsense is never blue
    "overlap": {"start_value": 0, "start_color": BAD, "end_value": 1, "end_color": GOOD},
    "loss": {"start_value": 0, "start_color": GOOD, "end_value": 3, "end_color": BAD},
}


def write_book(path: Path, tables: dict[str, pandas.DataFrame]) -> None:
    """A sheet for each table, to be read and filtered, in which nothing is a formula."""
    import pandas
    from openpyxl.formatting.rule import ColorScaleRule
    from openpyxl.styles import Alignment, Font

    content = io.BytesIO()
    with pandas.ExcelWriter(content, engine="openpyxl") as writer:
        writer.book.properties.creator = REPORT_MARK
        for name, table in tables.items():
            shown = table.head(MOST_REPORT_ROWS).map(safe_cell)
            shown.to_excel(writer, sheet_name=name, index=False, freeze_panes=(1, 0))
            sheet = writer.sheets[name]
            sheet.auto_filter.ref = sheet.dimensions
            for title, column in zip(table, sheet.columns, strict=True):
                letter, figure = column[0].column_letter, title.partition(" ")[0]
                for cell in column:
                    cell.alignment = Alignment(wrap_text=True, vertical="top")
                column[0].font = Font(bold=True)
                width = max(len(str(cell.value)) for cell in column) + 4
                sheet.column_dimensions[letter].width = min(width, WIDEST_CELL)
                if figure in SCALES:
                    ends = {"start_type": "num", "end_type": "num"}
                    rule = ColorScaleRule(**ends, **SCALES[figure])
                    sheet.conditional_formatting.add(f"{letter}2:{letter}{len(column)}", rule)
            if len(table) > MOST_REPORT_ROWS:
                sheet.append([f"and {len(table) - MOST_REPORT_ROWS:,} more rows"])
    with atomic_write(path) as staged:
        staged.write_bytes(content.getvalue())


def safe_cell(value: Any) -> Any:
    """What a cell can hold, and no program takes for a formula."""
    if not isinstance(value, str):
        return value
    text = NOT_IN_A_WORKBOOK.sub("", value)
    text = f"'{text}" if FORMULA.match(text) else text
    units = text.encode("utf-16-le")[: 2 * LONGEST_REPORT_CELL]
    whole = units.decode("utf-16-le", "ignore")
    return text if whole == text else f"{whole[:-1]}…"


def may_be_replaced(path: Path) -> bool:
    """Whether there is nothing under this name, or a report that nobody has changed."""
    try:
        if path.suffix != ".xlsx":
            return REPORT_MARK.encode() in path.read_bytes()[:1000]
        with zipfile.ZipFile(path) as archive:
            about = archive.read("docProps/core.xml")
        return f">{REPORT_MARK}<".encode() in about and b"lastModifiedBy" not in about
    except FileNotFoundError:
        return True
    except (OSError, KeyError, zipfile.BadZipFile):
        return False


def free_path(name: str, endings: Sequence[str], is_free: Callable[[Path], bool]) -> Path:
    """The first of NAME, NAME-2, … that is free with all of its endings."""
    for number in ("", *(f"-{number}" for number in range(2, 1000))):
        paths = [Path.cwd() / f"{name}{number}{ending}" for ending in endings]
        if all(map(is_free, paths)):
            return paths[0]
    raise OSError("every name for it is taken")


# -- Answers before and after

FIGURES_OF_ANSWERS = {
    "overlap": "what the answers have in common with those wanted, from 0 to 1",
    "loss": "of the answers wanted; lower is better",
}


def without_gaps(text: str) -> str:
    """Printable text without the runs of empty lines that some models write."""
    return re.sub(r"\n\s*\n", "\n\n", printable(text))


def answer_tables(result: Comparison) -> dict[str, pandas.DataFrame]:
    """A row for each question, and the means of all."""
    import pandas

    table = pandas.DataFrame(result.asked, columns=list(Asked._fields)).round(3)
    table[["before", "after"]] = table[["before", "after"]].map(without_gaps)
    table = table.drop(columns="tokens")
    table.columns = table.columns.str.replace("_", " ")
    table = table.rename(columns={"place": "row", "reference": "answer wanted"})
    rows: list[tuple[str, Any, str]] = [
        (f"{figure} {when}, mean", round(mean, 3), meaning)
        for figure, meaning in FIGURES_OF_ANSWERS.items()
        for when in ("before", "after")
        if (mean := result.mean(f"{figure}_{when}")) is not None
    ]
    rows.append(("questions", len(table), ""))
    rows.append(("tokens a second", round(result.tokens_per_second, 1), "of all answers together"))
    titles = ["what", "value", "which is"]
    return {"Answers": table, "Summary": pandas.DataFrame(rows, columns=titles, dtype=object)}


def write_answers(folder: Path, which: str, result: Comparison) -> None:
    """Into the folder of a run: the workbook, and how near each answer came."""
    with warned("the tables and pictures of the answers could not be written"):
        tables = answer_tables(result)
        write_book(folder / ANSWERS, tables)
        draw_answers(folder / ANSWERS_PICTURE, tables["Answers"], which)


def write_comparison(path: Path, result: Comparison) -> None:
    """The workbook, the same for programs, and the same to be read as text."""
    tables = answer_tables(result)
    write_book(path, tables)
    means = dict(tables["Summary"][["what", "value"]].values)
    rows = [one._asdict() for one in result.asked]
    write_json(path.with_suffix(".json"), {"summary": means, "rows": rows})
    lines = ["# Before and after", "", *(f"- {name}: {value}" for name, value in means.items())]
    for row in tables["Answers"].to_dict("records"):
        lines += ["", f"## Row {row['row']}" if row["row"] else "## Question"]
        for title in ("question", "answer wanted", "before", "after"):
            if text := row[
                title
            ]:  # as code: what a model wrote must not become a heading or a link
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
                lines += ["", f"{title.capitalize()}:", "", f"{fence}text", printable(text), fence]
    with atomic_write(path.with_suffix(".md")) as staged:
        staged.write_text("\n".join([*lines, ""]), encoding="utf-8", errors="replace")


# -- The report of check on the data

LONGEST_EXAMPLE = 8  # lines


def token_figures(data: PreparedData) -> dict[str, int]:
    """How long the pairs are that are kept; nothing where they were not tokenized."""
    lengths = sorted(data.tokens)
    if not lengths:
        return {}
    shares = {"min": 0, "median": 0.5, "p95": 0.95, "max": 1}
    figures = {name: lengths[round(share * (len(lengths) - 1))] for name, share in shares.items()}
    return figures | {"sum": sum(lengths)}


def write_report(cfg: Config, data: PreparedData) -> Path | None:
    """A workbook with every row and a picture of the lengths, in this folder, when they can be written."""
    path, source = None, local_path(cfg.DATASET_PATH).resolve()
    with warned("the report could not be written"):
        wanted = free_path(
            REPORT_NAME,
            (".xlsx", ".png"),
            lambda path: may_be_replaced(path) and path.resolve() != source,
        )
        write_book(wanted, report_tables(cfg, data))
        path = wanted
        draw_lengths(wanted.with_suffix(".png"), cfg, data)
    return path


def report_tables(cfg: Config, data: PreparedData) -> dict[str, pandas.DataFrame]:
    import pandas

    pairs, quality = data.pairs, data.quality
    summary = {
        "file": pairs.name,
        "sheet": pairs.table.sheet,
        "shape": pairs.shape,
        "columns": ", ".join(pairs.used),
        "rows read": pairs.rows_read,
        "pairs kept": len(pairs.kept),
        "left out": len(pairs.dropped),
        "held out to measure": len(data.validation_pairs),
        **{f"tokens in a pair, {name}": figure for name, figure in token_figures(data).items()},
        "quality, from 0 to 1": round(quality.score, 4) if quality.counted else "",
    }
    found = [(what, value, "") for what, value in summary.items()]
    for kind, notes in quality.parts.items():
        rows = ", ".join(str(note.row) for note in notes[:50]) + (", …" if notes[50:] else "")
        found.append((kind, len(notes), rows))
    settings = [(name, as_text(value)) for name, value in public_settings(cfg).items()]
    kept = "sheet,row,question,answer,tokens,held out,findings".split(",")
    dropped = "sheet,row,reason,what stands there".split(",")
    return {
        "Summary": pandas.DataFrame(found, columns=["what", "value", "rows"]),
        "Kept": pandas.DataFrame(kept_rows(data), columns=kept),
        "Dropped": pandas.DataFrame(dropped_rows(pairs), columns=dropped),
        "Settings": pandas.DataFrame(settings, columns=["name", "value"]),
    }


def kept_rows(data: PreparedData) -> Iterator[Sequence[Any]]:
    held_out = set(map(id, data.validation_pairs))
    lengths: list[Any] = data.tokens or [None] * len(data.pairs.kept)
    for pair, tokens, found in zip(data.pairs.kept, lengths, data.quality.findings, strict=True):
        *turns, _ = (f"{one['role']}: {one['content']}" for one in pair.messages)
        question = "\n\n".join(turns) if turns[1:] else pair.question
        measured = "yes" if id(pair) in held_out else "no"
        yield pair.sheet, pair.row, question, pair.answer, tokens, measured, "; ".join(found)


def dropped_rows(pairs: Pairs) -> Iterator[Sequence[Any]]:
    """Every row that is left out, with its cells as they stand in the file."""
    cells = {(part.place, number): row for part in pairs.parts for number, row in part.table.rows}
    for note in pairs.dropped:
        row = cells.get((note.sheet, note.row), [])
        yield *note, " | ".join(str(cell) for cell in row if cell)


# -- The folder of a run, and its zip


def output_bytes(trainable: int) -> int:
    """The finished model comes beside an earlier one, and so does its zip."""
    return 2 * (4 * trainable + SMALL_FILES)


@contextmanager
def explained_disk_errors(folder: Path, need: float, done: str, advice: str) -> Iterator[None]:
    """A full or lost disk as one message; a library of another language brings no OSError."""
    import zlib

    try:
        yield
    except Exception as error:
        of_the_disk = isinstance(error, OSError | zipfile.BadZipFile | zlib.error)
        if not of_the_disk and "os error" not in str(error):
            raise
        raise UserError(
            f"{done}{folder} could not be written: {preview(str(error), 200)}.\n"
            f"{free_space(folder.parent, need)}{advice}"
        ) from error


def files_for_others(folder: Path) -> list[Path]:
    """What may be passed on: no links, nothing that can run a program, no places of this computer."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
        if path.name != BASE_PLACE and path.suffix.lower() not in PICKLES
    ]


def write_zip(folder: Path) -> Path:
    """What others may have of the folder, in one zip beside it, read back before it gets its name."""
    target = folder.with_name(f"fine_tuned_{folder.name}.zip")  # of ./model: fine_tuned_model.zip
    for cut_off in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
        cut_off.unlink()
    files = files_for_others(folder)
    need = sum(path.stat().st_size for path in files)
    done = f"The adapter is safe in {folder}, but "
    advice = "Make room and run the same command again, or take the folder as it is."
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


def foreign_files(folder: Path) -> list[str]:
    """Files in the folder of a model that no run has put there."""
    ours = {*record_of(folder).get("files", []), ANSWERS, ANSWERS_PICTURE}
    if not may_be_replaced(folder / ANSWERS):  # somebody has written into it
        ours.discard(ANSWERS)
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()]
    hidden_or_cut_off = re.compile(r"(.*/)?\.[^/]*|.*\.\d+\.partial")
    return [name for name in found if name not in ours and not hidden_or_cut_off.fullmatch(name)]


def place_for_earlier(final: Path, run: str) -> Path | None:
    """Where the model goes that a new one replaces; nowhere when they are the same run's.

    What somebody else has put beside it is never deleted.
    """
    if record_of(final).get("run") == run and not foreign_files(final):
        return None
    previous = final.with_name(f"{final.name}.previous")
    if previous.is_symlink() or not previous.is_dir() or not foreign_files(previous):
        return previous
    return free_name(previous)


def write_visuals(folder: Path, record: dict[str, Any], trained: TrainingResult) -> None:
    """What is known of the training as tables and pictures; of run.json they are views."""
    folder.mkdir()
    settings = record["settings"] | {"device": record["device"]}
    with warned("not all tables and pictures of the training could not be written"):
        write_json(folder / "training_metrics.json", record["results"])
        write_json(folder / "training_config.json", settings)
        log = training_log(trained)
        with atomic_write(folder / "training_metrics.csv") as staged:
            log.to_csv(staged, columns=LOGGED, index=False)
        draw_training_curves(folder / "training_curves.png", log, trained)
        draw_loss_comparison(folder / "loss_comparison.png", log, trained)


def save_run(
    cfg: Config,
    device: Device,
    data: PreparedData,
    last: Checkpoint,
    result: Comparison | None = None,
) -> tuple[Path, Path]:
    """Everything that lands in OUTPUT_DIR, and the zip."""
    final, trained = output_folder(cfg), training_result(cfg, last)
    run, need = last.folder.parent.name, output_bytes(trained.stats.trainable)
    earlier = place_for_earlier(final, run)
    advice = (
        "Make room, or choose another --output-dir, and run the same command again: it "
        "takes the adapter from the last checkpoint and does not train."
    )
    with (
        explained_disk_errors(final, need, "The training is done, but ", advice),
        atomic_folder(final, earlier) as staged,
    ):
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
        # a few rows go along: whatever is made of the model later is measured on them
        sample = (data.validation_pairs + data.train_pairs)[:ROWS_IN_SAMPLE]
        write_json(staged / SAMPLE, [pair.messages for pair in sample])
        record = run_record(cfg, device, data, trained)
        card = model_card(record, CARD)
        (staged / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        write_visuals(staged / "training_visuals", record, trained)
        if result:
            write_answers(staged, pairs_to_ask(cfg, data)[0], result)
        files = [p.relative_to(staged).as_posix() for p in staged.rglob("*") if p.is_file()]
        own = {"run": run, "files": sorted([*files, "run.json"])}
        write_json(staged / "run.json", own | record)
    return final, write_zip(final)


def add_answers(folder: Path, which: str, result: Comparison) -> Path:
    """The answers go into the folder that is saved already, and into its zip."""
    write_answers(folder, which, result)
    return write_zip(folder)


# ==================================================================================================
# 10  Chatting
# ==================================================================================================

SIDES = ("Before: the base model", "After: the tuned model")
LONGEST_QUESTION = 8000  # letters on the page, where anybody may ask
PAGE_FLOOR = "6.7"  # of gradio, also for security
PAGE_TITLE = "Ask the tuned model"
PAGE_OPTIONS: dict[str, Any] = {
    "prevent_thread_lock": True,
    "quiet": True,
    "ssr_mode": False,
    "footer_links": [],
    "max_file_size": 1,  # nobody needs to send any
    "css": ".message-markdown-disabled * {white-space: pre-wrap}",  # code keeps its form
}
PAGE_SLIDERS = {  # label, from, to, step
    "TEMPERATURE": ("Temperature", 0, 2, 0.05),
    "TOP_P": ("Top p", 0.01, 1, 0.01),
    "MAX_TOKENS": ("Max tokens", 1, 1024, 1),
    "REPETITION_PENALTY": ("Repetition penalty", 0.5, 2, 0.05),
    "SEED": ("Seed", 0, 100, 1),
}
ALONE = (
    "Each question is asked alone, as it was taught; /history on gives the model all of the talk."
)
TALK_HELP = (
    "/reset forgets what was said, /history on or off, /system TEXT gives instructions, /save FILE "
    "keeps the talk, /quit leaves. Ctrl+C ends an answer."
)


def model_to_ask(cfg: Config) -> Run:
    """The model in OUTPUT_DIR; for --base, where there is none, that of MODEL_NAME."""
    place = local_path(cfg.OUTPUT_DIR)
    if cfg.SHARE and not cfg.WEB:
        raise UserError("--share is for the page in the browser. Add --web")
    if cfg.BASE and not os.path.exists(place):
        run = Run(cfg, load_tokenizer(cfg))
        run.model = run.base
        return run
    run = load_tuned(place, cfg.LOAD_IN_4BIT)
    say("Model", f"{short_path(place)}{', as it was before its training' if cfg.BASE else ''}")
    if cfg.MODEL_NAME not in (Config.MODEL_NAME, run.cfg.MODEL_NAME):
        say("Note", f"--model-name does not count: this one was made of {run.cfg.MODEL_NAME}")
    return run


def follows_talks(run: Run, cfg: Config) -> bool:
    """Whether an answer gains by what was said before: not where questions were taught alone."""
    dataset = run.record.get("dataset") or {}
    return cfg.BASE or dataset.get("shape") != "question and answer"


def can_be_asked() -> bool:
    """Whether somebody sits at a terminal, or at the notebook that this runs in."""
    return sys.stdin is not None and (sys.stdin.isatty() or "ipykernel" in sys.modules)


def questions_given(cfg: Config) -> list[str]:
    """The one of the command line, or else the lines that are piped in."""
    lines = [cfg.QUESTION] if cfg.QUESTION else sys.stdin or []
    if questions := [line.strip() for line in lines if line.strip()]:
        return questions
    raise UserError(
        'There is no question, and nobody to ask for one.\nPut it behind the command: "Why?"'
    )


class Told(NamedTuple):
    text: str
    speed: str
    interrupted: bool


def tell(tuned: Run, messages: Messages, cfg: Config) -> Told:
    """Print an answer as it grows. Ctrl+C ends it."""
    start, answer, shown, interrupted = time.perf_counter(), Answer("", 0, stopped=False), 0, False
    try:
        for answer in stream_answer(tuned, messages, cfg):
            shown, new = len(answer.text), answer.text[shown:]
            show(printable(new), end="")
    except KeyboardInterrupt:
        interrupted = True
    show("")
    return Told(answer.text, speed_in_words(answer, time.perf_counter() - start, cfg), interrupted)


def speed_in_words(answer: Answer, seconds: float, cfg: Config) -> str:
    cut = not answer.stopped and answer.tokens >= cfg.MAX_TOKENS
    more = "; cut off, --max-tokens allows more" if cut else ""
    return f"({answer.tokens} tokens, {answer.tokens / seconds:.1f} a second{more})"


@contextmanager
def going_on(tell: Callable[[str], Any]) -> Iterator[None]:
    """When one answer fails, tell why; the talk does not end with it."""
    try:
        yield
    except KeyboardInterrupt:
        tell("")
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, UserError | OSError) and not memory_fault(error):
            raise
        tell(str(error))


def typed(prompt: str) -> Iterator[str]:
    """The lines that somebody types at the terminal, until /quit or Ctrl+D."""
    with suppress(ImportError):  # Windows edits lines by itself
        import readline  # noqa: F401  gives input() arrow keys and a history
    while True:
        try:
            line = input(f"\n{prompt}: ").strip()
        except KeyboardInterrupt:
            show("\n/quit leaves.", end="")
            continue
        except EOFError:
            return
        if line == "/quit":
            return
        yield line


def converse(tuned: Run, cfg: Config) -> int:
    """A talk at the terminal."""
    talk, together = list[dict[str, str]](), follows_talks(tuned, cfg)
    say("Chat", TALK_HELP if together else f"{TALK_HELP}\n{ALONE}")
    for line in typed("You"):
        command, _, rest = line.partition(" ")
        with going_on(show):
            if command == "/reset":
                talk = []
                show("Forgotten.")
            elif command == "/history":
                together = rest.strip() != "off"
                show("An answer knows what was said before." if together else ALONE)
            elif command == "/system":
                cfg, talk = changed(cfg, SYSTEM=asked_by_user(rest.strip())["content"]), []
                show(f"A new talk {'with these' if rest else 'without'} instructions.")
            elif command == "/save":
                show(f"Kept in {short_path(save_talk(cfg, talk, rest.strip()))}")
            elif line.startswith("/"):
                show(TALK_HELP if command == "/help" else f"There is no {command}. {TALK_HELP}")
            elif line:
                asked = asked_by_user(line)
                show("\nModel: ", end="")
                told = tell(tuned, [*talk, asked] if together else [asked], cfg)
                show(told.speed)
                if told.text:
                    talk += [asked, {"role": "assistant", "content": told.text}]
    return 0


def save_talk(cfg: Config, talk: Messages, name: str) -> Path:
    """In the form in which a training reads conversations: a line for each."""
    path = local_path(name)
    if not name or os.path.exists(path):
        raise UserError("/save needs the name of a new file, such as /save talk.jsonl")
    system = [{"role": "system", "content": cfg.SYSTEM}] if cfg.SYSTEM else []
    with atomic_write(path) as staged:
        staged.write_text(json.dumps({"messages": [*system, *talk]}) + "\n", encoding="utf-8")
    return path


def questions_typed() -> Iterator[str]:
    say("Compare", "Type a question for both models; an empty line leaves.")
    return itertools.takewhile(bool, typed("Question"))


def side_by_side(asked: Asked, width: int, coloured: bool) -> str:
    from rich import box, table, text
    from rich.console import Console

    columns = table.Table(box=box.ASCII, show_edge=False, expand=True)
    for side, colour in zip(SIDES, ("yellow", "green"), strict=True):
        header = f"not bold {colour}"
        columns.add_column(side, header_style=header, style=colour, ratio=1, overflow="fold")
    columns.add_row(*(text.Text(without_gaps(one)) for one in (asked.before, asked.after)))
    screen = Console(width=min(width, 160), color_system="standard" if coloured else None)
    with screen.capture() as shown:
        screen.print(columns)
    return shown.get()


def listed_questions(cfg: Config) -> list[Talk]:
    """The questions of a file, each with its row; an answer beside one is the answer wanted."""
    path = local_path(cfg.QUESTIONS)
    if not os.path.exists(path) or path.is_dir():
        raise UserError(f"There is no file {path}.\nName one with --questions")
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UserError(f"{path} is YAML.\nTake a table, or a .txt with a question on each line.")
    if path.suffix.lower() == ".txt":
        lines = enumerate(decoded(path, path.read_bytes()).splitlines(), start=1)
        talks = [Talk(str(n), [asked_by_user(line.strip())]) for n, line in lines if line.strip()]
    else:
        talks = questions_in_table(path, changed(cfg, DATASET_PATH=str(path)))
    if not talks:
        raise UserError(f"{path} holds no questions. Write one a row.")
    return talks


def questions_in_table(path: Path, cfg: Config) -> list[Talk]:
    """Pairs are found as for a training; what has no answer is asked as well."""
    try:
        pairs = find_pairs(cfg)
    except UserError:
        for table in read_tables(path, cfg):
            if (column := question_column(table, cfg)) is not None:
                return open_questions(table, column, {number for number, _ in table.rows})
        raise
    talks = []
    for part in pairs.parts:
        found = [Talk(str(pair.row), pair.messages[:-1], pair.answer) for pair in part.kept]
        if part.columns:
            open_rows = {note.row for note in part.dropped if note.reason == NO_ANSWER}
            found += open_questions(part.table, part.columns.question, open_rows)
        found.sort(key=lambda talk: int(talk.place))
        where = f" of {part.place}" if pairs.parts[1:] else ""
        talks += [talk._replace(place=talk.place + where) for talk in found]
    if others := [note for note in pairs.dropped if note.reason not in (NO_ANSWER, "blank")]:
        say("Left out", "; ".join(grouped(others)))
    return talks


def question_column(table: Table, cfg: Config) -> int | None:
    """Of a table without answers."""
    if cfg.QUESTION_COLUMN:
        return column_named(table, "question", cfg.QUESTION_COLUMN)
    filled = [i for i in range(len(table.header)) if top_cells(table, i, 1)]
    named = [i for i in filled if name_strength(table.header[i], "question") > 1]
    return next((found[0] for found in (named, filled) if len(found) == 1), None)


def open_questions(table: Table, column: int, rows: set[int]) -> list[Talk]:
    for number, row in table.rows:
        if not table.sheet and any(row[len(table.header) :]):
            raise UserError(f"Row {number} has {MORE_CELLS}.")
    texts = {n: one_text(cell) for n, cell in column_cells(table, column) if n in rows}
    return [Talk(str(row), [asked_by_user(text)]) for row, text in texts.items() if text]


# -- The page


def serve(cfg: Config) -> int:
    """The page in the browser, until Ctrl+C."""
    if is_below(installed_version("gradio"), PAGE_FLOOR):
        raise UserError(f'The page needs gradio.\npip install "gradio>={PAGE_FLOOR}"')
    on_colab = "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ
    if on_colab and not cfg.SHARE:
        raise UserError("Colab's own page cannot reach this one: add --share for a public link.")
    page = page_of(model_to_ask(cfg), cfg)
    try:
        _, local, shared = page.launch(
            server_port=cfg.PORT or None, share=cfg.SHARE, **PAGE_OPTIONS
        )
    except OSError as error:
        raise UserError(f"The page cannot be opened: {error}\nTake another --port") from None
    say("Page", f"{shared or local}  (Ctrl+C closes it)")
    page.block_thread()
    return 0


def page_of(tuned: Run, cfg: Config) -> Any:
    """Two tabs: a talk with the tuned model, and one question for both."""
    import gradio as gr

    reply, both = page_answers(tuned, cfg)
    box = {"placeholder": "Your question", "max_length": LONGEST_QUESTION}
    examples = [[question] for question in tuned.record.get("examples", [])]
    quiet = {"api_visibility": "private"}
    with gr.Blocks(title=PAGE_TITLE, analytics_enabled=False, fill_height=True) as page:
        gr.Markdown(f"## {PAGE_TITLE}")
        with gr.Accordion("How to answer", open=False), gr.Row():
            how = [
                gr.Slider(
                    low, max(high, value := getattr(cfg, name)), value, step=step, label=label
                )
                for name, (label, low, high, step) in PAGE_SLIDERS.items()
            ]
        with gr.Tab("Chat"):
            speed = gr.Markdown(render=False)
            gr.ChatInterface(
                reply,
                # as plain text: nothing that a model says may become a part of the page
                chatbot=gr.Chatbot(render_markdown=False, show_label=False, buttons=["copy"]),
                textbox=gr.Textbox(**box, show_label=False, submit_btn=True, stop_btn=True),
                additional_inputs=how,
                additional_outputs=[speed],
                examples=examples or None,
                run_examples_on_click=False,
                flagging_mode="never",
                analytics_enabled=False,
                **quiet,
            )
            speed.render()
        with gr.Tab("Compare"):
            question = gr.Textbox(**box, label="Question")
            with gr.Row():
                ask, stop = gr.Button("Ask both", variant="primary"), gr.Button("Stop")
            with gr.Row():
                height = {"lines": 12, "max_lines": 12, "interactive": False}
                sides = [gr.Textbox(**height, label=side, buttons=["copy"]) for side in SIDES]
            outputs = [*sides, gr.Markdown()]
            if examples:
                gr.Examples(examples, question)
            asking = gr.on([ask.click, question.submit], both, [question, *how], outputs, **quiet)
            stop.click(None, cancels=[asking])
    return page.queue(default_concurrency_limit=1, max_size=20)


def page_answers(tuned: Run, cfg: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the two tabs do with a question."""
    import html

    import gradio as gr

    one_at_a_time = threading.Lock()  # switching the adapter off would hit the other's answer

    def parts_of(messages: Messages, base: bool, how: Sequence[float]) -> Iterator[tuple[str, str]]:
        """What an answer has come to so far, and its speed."""
        with going_on(lambda why: gr.Warning(html.escape(why))):  # an error would lock the page
            if len(messages[-1]["content"]) > LONGEST_QUESTION:
                raise UserError(f"A question may have {LONGEST_QUESTION:,} letters.")
            chosen = dict(zip(PAGE_SLIDERS, how, strict=True))
            here = checked(vars(cfg) | chosen | {"BASE": base})
            with one_at_a_time, closing(stream_answer(tuned, messages, here)) as parts:
                start = time.perf_counter()
                for part in parts:
                    yield part.text, speed_in_words(part, time.perf_counter() - start, here)

    def reply(question: str, history: list[Any], *how: float) -> Iterator[tuple[Any, str]]:
        before = said(history) if follows_talks(tuned, cfg) else []
        for text, speed in parts_of([*before, asked_by_user(question)], cfg.BASE, how):
            shown = {"type": "text", "text": html.escape(text)}  # or else tags would vanish
            yield {"role": "assistant", "content": [shown]}, speed

    def both(question: str, *how: float) -> Iterator[tuple[str, str, str]]:
        before = after = ""
        for base in (True, False):
            for text, speed in parts_of([asked_by_user(question)], base, how):
                before, after = (text, after) if base else (before, text)
                yield before, after, speed

    return reply, both


def said(history: Sequence[dict[str, Any]]) -> Messages:
    """What was said before, of what Gradio hands back: answers as they were shown, in parts."""
    import html

    talk: Messages = []
    for turn, after in itertools.pairwise([*history, {"role": "user"}]):
        text = "".join(part["text"] for part in turn["content"])
        if turn["role"] == "assistant":
            talk.append({"role": "assistant", "content": html.unescape(text)})
        elif after["role"] == "assistant":  # or else the question was never answered
            talk.append({"role": "user", "content": text})
    return talk


# ==================================================================================================
# 11  Export
# ==================================================================================================

EXPORTED = re.compile(r"-(merged|gguf|space)$|\.zip$")  # what a name of OUTPUT_DIR may end with
LLAMA_FLOOR = "0.2.18"  # of cyllama
READ_AT_ONCE = 512  # tokens
SHARD = "2GB"  # of merged weights: an upload that breaks off loses no more
# Disk that a GGUF takes at the worst moment, as a share of the merged weights; see export_gguf
SHARE_OF_MERGED = {"f16": 1.0, "q8_0": 0.55, "q4_k_m": 1.35}
# The loss may be higher by this share; of what is quantised also by 0.02, where it is near zero
LOSS_ALLOWED = {"merged": 0.01, "f16": 0.01, "q8_0": 0.02, "q4_k_m": 0.15}
SMALL_LOSS = 0.02
LICENCES = {"microsoft/phi-2": "mit"}


def export_place(cfg: Config, kind: str) -> Path:
    """./model gives ./model-gguf, unless EXPORT_DIR says otherwise."""
    beside = local_path(cfg.OUTPUT_DIR).with_name(f"{exported_name(cfg)}-{kind}")
    return (local_path(cfg.EXPORT_DIR) if cfg.EXPORT_DIR else beside).absolute()


def exported_name(cfg: Config) -> str:
    return EXPORTED.sub("", local_path(cfg.OUTPUT_DIR).resolve().name)


def gguf_name(cfg: Config) -> str:
    return f"{exported_name(cfg)}-{cfg.QUANTIZE}.gguf"


def adapter_of(run: Run) -> str:
    """By which adapter two exports are known to be of the same training."""
    return run.record.get("adapter") or checksum(run.folder / ADAPTER)


def export_to(kind: str, cfg: Config, final: Path) -> Path | str:
    """Make it in the place of an earlier export of its kind, and of nothing else."""
    foreign = os.path.exists(final) and record_of(final).get("export") != kind
    if foreign or Path.cwd().is_relative_to(final.resolve()):
        raise UserError(
            f"{final} holds something else than an earlier export --to {kind}, so it is left alone.\n"
            f"Choose another place: --export-dir {free_name(final.with_name(f'{final.name}-{kind}'))}"
        )
    return EXPORTERS[kind](cfg, final)


def exported_before(kind: str, cfg: Config, final: Path, file: str) -> Run:
    """What an export is made of: an earlier one of the same adapter that has this file, or a new one."""
    run = open_run(local_path(cfg.OUTPUT_DIR))
    if run.record.get("export") == kind and (run.folder / file).is_file():
        return run
    folder = final.with_name(f"{exported_name(cfg)}-{kind}")
    if record_of(folder).get("adapter") == adapter_of(run) and (folder / file).is_file():
        say("From", short_path(folder))
    else:
        say("First", f"{short_path(folder)}, which serves further exports and may be deleted")
        export_to(kind, cfg, folder)
    return open_run(folder)


@contextmanager
def export_folder(kind: str, run: Run, final: Path, size: float, file: str = "") -> Iterator[Path]:
    """A folder to fill, which gets its name when it is complete, with a card and its own run.json."""
    own: dict[str, Any] = {"export": kind, "adapter": adapter_of(run)}
    same = record_of(final).get("adapter") == own["adapter"]
    is_kept = not same or kind == "space"  # whose page people change
    earlier = place_for_earlier(final, "" if is_kept else run.record.get("run", ""))
    need = size + SMALL_FILES
    advice = "Nothing of it is left. Make room, or choose another --export-dir, and try again."
    with explained_disk_errors(final, need, "", advice):
        if shutil.disk_usage(nearest_existing(final)).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_folder(final, earlier) as staged:
            yield staged
            write_card(staged, run, kind, file)
            files = [p.relative_to(staged).as_posix() for p in staged.rglob("*") if p.is_file()]
            own["files"] = sorted([*files, "run.json"])
            write_json(staged / "run.json", run.record | own)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a mounted drive may know no second names
        shutil.copyfile(source, target)


def examples_to_measure(run: Run) -> list[Example]:
    advice = "Run the training command once more: a finished run only writes its files anew."
    with explained(f"{run.place} has no rows to measure with ({SAMPLE}).", advice):
        kept = json.loads((run.folder / SAMPLE).read_text(encoding="utf-8"))
        return [encode(run.tokenizer, talk) for talk in kept]


def refuse_loss(kind: str, loss: float, wanted: float) -> None:
    """An export that answers worse than what it is made of is not called done."""
    allowed = wanted * (1 + LOSS_ALLOWED[kind]) + (SMALL_LOSS if kind != "merged" else 0)
    say("Loss", f"{loss:.4f} {kind}, {wanted:.4f} before, on rows that went along with the run")
    if not loss <= allowed:
        raise UserError(
            f"Nothing was written: the loss would rise from {wanted:.4f} to {loss:.4f}.\n"
            "Use the adapter as it is, or of a GGUF --quantize q8_0 or f16"
        )


# -- Merged weights


def export_merged(cfg: Config, final: Path) -> Path:
    """The base with the adapter in its weights, as transformers, vLLM and llama.cpp read it.

    An adapter that was trained on weights in 4 bits has learnt to make up for their rounding, so it is
    added to these, but widened before: bitsandbytes would round the sum once more.
    """
    run = open_run(local_path(cfg.OUTPUT_DIR))
    if not run.adapter:
        raise UserError(f"{run.place} has no adapter to merge.\nName the folder of a training.")
    examples, four_bit = examples_to_measure(run), bool(run.record["device"]["four_bit"])
    with export_folder("merged", run, final, run.parameters * bytes_of(run.stored_dtype)) as folder:
        kind = "cuda" if device_here(run.cfg).kind == "cuda" else "cpu"
        device = Device(kind, run.stored_dtype, False, "")
        refuse_small_memory(run.cfg, device, run.parameters)
        base = load_base(run.base_settings, device._replace(four_bit=four_bit))
        model: Any = run.with_adapter(base)
        wanted = mean_loss(model, examples, READ_AT_ONCE)
        if four_bit:
            model = run.with_adapter(model.unload().dequantize())
        model = model.merge_and_unload(safe_merge=True)
        loss = mean_loss(model, examples, READ_AT_ONCE)
        refuse_loss("merged", loss, wanted)
        model.save_pretrained(folder, max_shard_size=SHARD)
        write_companions(run, folder)
        way = "4bit" if four_bit else "16bit"
        run.record["merged"] = {"way": way, "adapter": wanted, way: loss, "rows": len(examples)}
    return final


def write_companions(run: Run, folder: Path) -> None:
    """What belongs to merged weights: the base's form, the tokenizer, how to answer, the sample."""
    run.shape.dtype = run.stored_dtype
    run.shape.save_pretrained(folder)
    save_tokenizer(run.tokenizer, folder)
    how = generation_settings(run.cfg, run.tokenizer, 0, run.cfg.MAX_TOKENS)["generation_config"]
    how.repetition_penalty = run.cfg.REPETITION_PENALTY
    how.bos_token_id = run.tokenizer.bos_token_id
    how.save_pretrained(folder)
    shutil.copyfile(run.folder / SAMPLE, folder / SAMPLE)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """And with it, that nothing goes before a prompt; llama.cpp would begin with a token of its own."""
    tokenizer.save_pretrained(folder)
    place = folder / "tokenizer_config.json"
    settings = json.loads(place.read_text(encoding="utf-8"))
    write_json(place, settings | {"add_bos_token": False, "add_eos_token": False})


# -- GGUF, for llama.cpp and all that is built on it

CONVERTERS = (  # llama.cpp's own, as they lie in the source archive of its Python package
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca77"
    "3a59fe7cf3/llama_cpp_python-0.3.36.tar.gz"
)
CONVERTERS_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER_PARTS = re.compile(r".*?/llama\.cpp/(convert_hf\w+\.py|LICENSE|conversion/.*|gguf-py/.*)")
# A tokenizer that they do not know cuts words as GPT-2 does, or else the test of the file fails. One of
# SentencePiece's kind is read from tokenizer.json, beside the new file: earlier merges count more. By
# the name Phi-3 llama.cpp knows that signs swallow the blanks after them, if it finds these four.
CONVERT = """
import json, pathlib, runpy, sys
folder, blank, file, *sys.argv[1:] = sys.argv[1:]
sys.argv += ["--outfile", file]
sys.path[:0] = [folder, f"{folder}/gguf-py"]
from conversion.base import TextModel, gguf
known, metadata = TextModel.get_vocab_base_pre, TextModel.prepare_metadata
whole = json.loads(pathlib.Path(file).with_name("tokenizer.json").read_bytes())
added = {one["id"]: one for one in whole["added_tokens"]}
def pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"
def with_vocabulary(self, vocab_only):
    if whole["model"].get("byte_fallback"):
        self.set_vocab = lambda: vocabulary(self)
        signs = {one["content"] for one in added.values()}
        swallow = any(one["rstrip"] for one in added.values())
        if swallow and signs >= {"<unk>", "<s>", "</s>", "<|endoftext|>"}:
            self.model_name = f"Phi-3 {self.dir_model.name}"
    metadata(self, vocab_only)
def vocabulary(self):
    kinds, texts = gguf.TokenType, {n: text for text, n in whole["model"]["vocab"].items()}
    merges = list(map("".join, whole["model"]["merges"]))
    ranks = {text: -float(n) for n, text in reversed([*enumerate(merges)])}
    tokens = []
    for n in range(self.find_hparam(["vocab_size_per_layer_input", "vocab_size"])):
        text = texts.get(n, f"[PAD{n}]")
        kind = kinds.NORMAL if n in texts else kinds.UNUSED
        if len(text) == 6 and text.startswith("<0x"):
            kind = kinds.BYTE
        if n in added:
            text, kind = added[n]["content"], kinds.CONTROL
            if not added[n]["special"]:
                text, kind = text.replace("\u2581", " "), kinds.USER_DEFINED
        tokens.append((text, ranks.get(text, -1e6), kind))
    texts, scores, types = map(list, zip(*tokens))
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list(texts)
    self.gguf_writer.add_token_scores(scores)
    self.gguf_writer.add_token_types(types)
    self.gguf_writer.add_add_space_prefix(blank == "True")
    gguf.SpecialVocab(pathlib.Path(file).parent, n_vocab=len(texts)).add_to_gguf(self.gguf_writer)
TextModel.get_vocab_base_pre, TextModel.prepare_metadata = pre, with_vocabulary
runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")
"""
Q4_K_M = 15  # its number in llama.cpp
HARD_TO_CUT = """ Why?  Two  blanks,   three\t\ttabs\t and\n\n\nlines\r\n  indented: \u00a0\u200bzero
def f(x):\n    if x:\n        return {'a': [1, 22, 333, 4444, 55555]}  # ok, [INST] <0x0A> {{ braces }} {question}
I'll, we've, DON'T; it's 3.14, 1,000,000 and 50% -- (e.g.) "quoted" ... !!! ### über naïve Ærø ľščťžý İstanbul ß ﬁ Ⅷ ½
Что это? 这是什么？ これは何ですか 이것은 무엇인가 מה זה ما هذا यह क्या है กขค 🚀👩\u200d👩\u200d👧 ✅ 🇸🇰 \U0001f9d1\U0001f3fd trailing """


def export_gguf(cfg: Config, final: Path) -> Path:
    """One file for llama.cpp, Ollama and LM Studio, tested in llama.cpp; others stay beside it."""
    llama_cpp()
    run = exported_before("merged", cfg, final, "config.json")
    name, kind = gguf_name(cfg), cfg.QUANTIZE
    weights = sum(path.stat().st_size for path in run.folder.glob("*.safetensors"))
    with export_folder("gguf", run, final, weights * SHARE_OF_MERGED[kind], name) as folder:
        if record_of(final).get("adapter") == adapter_of(run):
            for other in final.glob("*.gguf"):
                if other.name != name:
                    link_or_copy(other, folder / other.name)
        begin_with_blank(run.tokenizer)
        save_tokenizer(run.tokenizer, folder)
        say("Converting", f"{short_path(run.folder)} to {kind}")
        if kind == "q4_k_m":
            convert(run, whole := folder / "f16.partial", "f16")
            how = llama_cpp().LlamaModelQuantizeParams()
            how.ftype, how.nthread = Q4_K_M, os.cpu_count() or 1
            llama_cpp().model_quantize(str(whole), str(folder / name), how)
            whole.unlink()
        else:
            convert(run, folder / name, kind)
        run.record["gguf"] = {kind: tested_gguf(folder / name, run, kind)}
        (folder / "Modelfile").write_text(modelfile(run, name), encoding="utf-8")
    return final


def blank_after_signs(tokenizer: Any) -> bool:
    """Whether a text after a sign gets a blank before it; llama.cpp gives one to all texts or to none."""
    return str(tokenizer.tokenize(f"{tokenizer.eos_token}a")[1]).startswith("▁")


def begin_with_blank(tokenizer: Any) -> None:
    """Let the chat template say the blank that transformers puts before a text, and llama.cpp does not."""
    asked = prompt_in_words(tokenizer)
    alike = tokenizer.tokenize(asked) == tokenizer.tokenize(f" {asked}")
    if alike and not blank_after_signs(tokenizer):
        tokenizer.chat_template = "{{ ' ' }}" + tokenizer.get_chat_template()


def convert(run: Run, file: Path, kind: str) -> None:
    """By llama.cpp's converter, in a process of its own; the tokenizer lies beside the file."""
    how = (converters(), blank_after_signs(run.tokenizer), file, run.folder, "--outtype", kind)
    command = [sys.executable, "-c", CONVERT, *map(str, how)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    LOG.info("%s", done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.strip() or "it was killed, perhaps for want of memory").splitlines()[-1]
        raise UserError(f"The conversion failed: {preview(last, 200)}\nUse --to merged.")


def converters() -> Path:
    """The folder with llama.cpp's converters: fetched once, and the bytes that are known here."""
    import tarfile

    folder = cache_folder(f"converters-{CONVERTERS_SHA256[:12]}")
    if os.path.isdir(folder):
        return folder
    [archive] = fetch(CONVERTERS)
    try:
        if (found := checksum(archive)) != CONVERTERS_SHA256:
            raise UserError(
                f"The converters of llama.cpp did not arrive as they should: checksum {found}.\n"
                "Run the same command again; if it stays so, the network changes what it carries."
            )
        with atomic_folder(folder) as staged, tarfile.open(archive) as packed:
            for member in packed:
                if part := CONVERTER_PARTS.fullmatch(member.name):
                    packed.extract(member.replace(name=part[1]), staged, filter="data")
    finally:
        archive.unlink()
    return folder


def llama_cpp() -> Any:
    """llama.cpp's own interface; cyllama brings it ready-made for Linux, macOS and Windows."""
    if is_below(installed_version("cyllama"), LLAMA_FLOOR):
        raise UserError(f'GGUF files need llama.cpp.\npip install "cyllama>={LLAMA_FLOOR}"')
    from cyllama.llama import llama_cpp as library

    library.disable_logging()
    return library


def tested_gguf(file: Path, run: Run, kind: str) -> float:
    """The loss of the file in llama.cpp, once it reads texts as the training did and ends as it did."""
    library, settings = llama_cpp(), llama_cpp().LlamaModelParams()
    settings.n_gpu_layers = 0
    with explained(f"llama.cpp cannot open {file.name}.", "Use --to merged."):
        # a class of our own takes n_vocab, for which cyllama looks there in vain
        model = type("Model", (library.LlamaModel,), {})(str(file), settings, verbose=False)
    vocabulary, end = model.get_vocab(), run.tokenizer.eos_token_id
    model.n_vocab = vocabulary.n_vocab
    prompt = prompt_in_words(run.tokenizer)
    signs = bool(special_tokens(run.tokenizer).search(prompt))
    for question in (HARD_TO_CUT, "\n", " ", "a"):
        here = encode(run.tokenizer, [asked_by_user(question)])["input_ids"]
        if here != vocabulary.tokenize(prompt.replace("{question}", question), True, signs):
            raise UserError(
                f"llama.cpp cuts the question {preview(question)!r} into other tokens than the training did, "
                "so the file would answer badly; it was not written.\nUse --to merged, with transformers or vLLM."
            )
    if vocabulary.token_eos() != end:
        raise UserError(f"llama.cpp does not end at token {end}, so the model would never stop.")
    loss, merged = loss_in_llama_cpp(model, examples_to_measure(run)), run.record["merged"]
    refuse_loss(kind, loss, merged[merged["way"]])
    return loss


def loss_in_llama_cpp(model: Any, examples: Sequence[Example]) -> float:
    """The mean loss of a token to predict, over all examples together."""
    import numpy as np

    library, losses = llama_cpp(), []
    settings = library.LlamaContextParams()
    settings.n_batch = READ_AT_ONCE
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    for example in examples:
        ids, labels = example["input_ids"][:-1], example["labels"][1:]
        settings.n_ctx = len(ids)
        context = library.LlamaContext(model, settings, verbose=False)
        for start in range(0, len(ids), READ_AT_ONCE):
            part = ids[start : start + READ_AT_ONCE]
            batch = library.LlamaBatch(n_tokens=len(part), embd=0, n_seq_max=1, verbose=False)
            batch.set_batch(part, start, True)
            context.decode(batch)
            for i, label in enumerate(labels[start : start + len(part)]):
                if label != IGNORE:
                    logits = np.array(context.get_logits_ith(i))
                    losses.append(np.logaddexp.reduce(logits) - logits[label])
    return float(np.mean(losses))


def modelfile(run: Run, file: str) -> str:
    """How Ollama asks: whole talks as they were taught, instructions before the first question."""
    talk = "".join(text for text, _ in pieces(run.tokenizer, ("user", "assistant", "user")))
    first, _, later, asking = re.split(BLANK.format("."), talk)
    return (
        f"FROM ./{file}\n"
        f'TEMPLATE """{first}{{{{ if .System }}}}{{{{ .System }}}}\n\n{{{{ end }}}}'
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{asking}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{later}{{{{ end }}}}{{{{ end }}}}"""\n'
        f"PARAMETER temperature {run.cfg.TEMPERATURE:g}\n"
        f"PARAMETER top_p {run.cfg.TOP_P:g}\n"
        f"PARAMETER repeat_penalty {run.cfg.REPETITION_PENALTY:g}\n"
        f"PARAMETER num_predict {run.cfg.MAX_TOKENS}\n"
        f"PARAMETER stop {json.dumps(run.tokenizer.eos_token)}\n"
    )


# -- A Space, and the Hub


def export_space(cfg: Config, final: Path) -> Path:
    """A folder for Hugging Face Spaces: a page to ask the GGUF, which llama.cpp runs on a processor."""
    name = gguf_name(cfg)
    run = exported_before("gguf", cfg, final, name)
    how = {"temperature": run.cfg.TEMPERATURE, "top_p": run.cfg.TOP_P}
    how |= {"repeat_penalty": run.cfg.REPETITION_PENALTY, "max_tokens": run.cfg.MAX_TOKENS}
    with export_folder("space", run, final, (run.folder / name).stat().st_size) as folder:
        link_or_copy(run.folder / name, folder / name)
        for file, text in SPACE_FILES.items():
            (folder / file).write_text(text.replace("HOW_TO_ANSWER", repr(how)), encoding="utf-8")
    return final


def export_hub(cfg: Config, _: Path) -> str:
    """Put OUTPUT_DIR on the Hub, whatever it holds: an adapter, merged weights, GGUF, a Space."""
    from huggingface_hub import HfApi, get_token

    run, token = open_run(local_path(cfg.OUTPUT_DIR)), get_token()
    if not cfg.HUB_REPO:
        raise UserError("Where to? Name the repository: --hub-repo YOUR-NAME/my-model")
    if not token:
        raise UserError(
            "No token of the Hugging Face Hub was found.\nMake one with the right to write at "
            "https://huggingface.co/settings/tokens and put it into HF_TOKEN (on Colab: the key at the left)."
        )
    files = files_to_upload(cfg, run.folder)
    is_space, api = run.record.get("export") == "space", HfApi(token=token)
    kind, sdk = ("space", "gradio") if is_space else ("model", None)
    what: dict[str, Any] = {"repo_type": kind, "folder_path": run.folder, "allow_patterns": files}
    try:
        made = api.create_repo(
            cfg.HUB_REPO, repo_type=kind, private=cfg.HUB_PRIVATE, exist_ok=True, space_sdk=sdk
        )
        private = api.repo_info(made.repo_id, repo_type=kind).private
        if cfg.HUB_PRIVATE and not private:
            raise UserError(
                f"{made.repo_id} is there already, and everybody can see it.\n"
                "Choose another --hub-repo, or say that this is meant: --no-hub-private"
            )
        say("Upload", f"to {made.repo_id}, {'private' if private else 'public'}")
        api.upload_folder(repo_id=made.repo_id, **what, commit_message="By finetune_colab.py")
    except UserError:
        raise
    except Exception as error:  # of the Hub's client, the network or the disk
        found = f"{type(error).__name__}: {getattr(error, 'server_message', None) or error}"
        for shape in (token, repr(token)[1:-1]):  # a sign that no header may hold is shown as \x0b
            found = found.replace(shape, "…")
        raise UserError(
            f"The upload to {cfg.HUB_REPO} did not end well.\n{preview(found, 300)}\nCheck the name, the token's "
            "right to write, and the connection; then run the same command again: files that have arrived "
            "are not sent again."
        ) from None
    return str(made)


def files_to_upload(cfg: Config, folder: Path) -> list[str]:
    """What may leave this computer, as patterns: no rows of the data, nothing hidden or half; once agreed."""
    files = [
        path
        for path in files_for_others(folder)
        if path.name not in (ANSWERS, SAMPLE) and path.suffix != ".partial"
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    say("Files", f"that go to {cfg.HUB_REPO}; the rows of your data stay here:")
    for path in files:
        say("", f"{path.stat().st_size / 1e6:10.2f} MB  {path.relative_to(folder)}")
    agreed = cfg.YES
    with suppress(EOFError):
        if not agreed and can_be_asked():
            agreed = input("Upload them? [y/N] ").strip().casefold() in ("y", "yes")
    if not agreed:
        raise UserError("Nothing was uploaded.\nTo upload without a question, add --yes")
    return [glob.escape(path.relative_to(folder).as_posix()) for path in files]


EXPORTERS: dict[str, Callable[[Config, Path], Path | str]] = {
    **{"merged": export_merged, "gguf": export_gguf, "space": export_space, "hub": export_hub}
}
NEXT = {  # {0} is what was made, {1} the GGUF
    "merged": "ask it: python finetune_colab.py chat --output-dir {0}",
    "gguf": "ask it: llama-cli -m {0}/{1} --jinja; README.md there tells how Ollama and LM Studio open it",
    "space": "try it: python app.py in {0}. To put it online: python finetune_colab.py export --to hub "
    "--output-dir {0} --hub-repo NAME",
    "hub": "open {0} in your browser",
}

# -- Cards, and the files of a Space


def write_card(folder: Path, run: Run, kind: str, file: str) -> None:
    """What others read first: what it is, how to ask it, and the results of the run."""
    base, (front, how), readme = run.cfg.MODEL_NAME, CARDS[kind], run.folder / "README.md"
    name = preview(base.removeprefix("./"), 100).replace("<", "&lt;")
    if base in LICENCES:
        front += f"license: {LICENCES[base]}\n"
    if kind != "space" and not base.startswith("./"):
        front += f"base_model: {base}\nbase_model_relation: finetune\n"
    quoted = functools.partial(json.dumps, ensure_ascii=False)  # as YAML and Python have it
    question = quoted((run.record["examples"] or ["Why?"])[0])
    told = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    text = EXPORT_CARD.format(
        front=front.format(title=quoted(f"Ask {name}, fine-tuned")),
        name=name,
        how=how.format(file=file, question=question),
        results="".join(told.partition("## The run")[1:]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


EXPORT_CARD = """\
---
{front}---

# {name}, fine-tuned

Fine-tuned by `finetune_colab.py` on pairs of questions and answers.
{how}

{results}"""
FOR_TEXT = "pipeline_tag: text-generation\ntags: [question-answering]\n"
CARDS = {  # the front matter, and how to ask
    "merged": (
        f"library_name: transformers\n{FOR_TEXT}",
        """\
The adapter is in the weights; the tokenizer's chat template is the form of the training.

```python
from transformers import pipeline

ask = pipeline("text-generation", ".")
talk = [{{"role": "user", "content": {question}}}]
print(ask(talk, return_full_text=False)[0]["generated_text"].strip())
```""",
    ),
    "gguf": (
        f"library_name: gguf\n{FOR_TEXT}",
        """\
The form of a question is in the file, for programs that use templates, and in `Modelfile`.

| program | how |
| --- | --- |
| Ollama | `ollama create mine -f Modelfile`, then `ollama run mine` |
| llama.cpp | `llama-cli -m {file} --jinja`, or `llama-server -m {file} --jinja` |
| LM Studio | `lms import {file}`, or copy the file into its folder of models |""",
    ),
    "space": (
        "title: {title}\nemoji: 💬\ncolorFrom: blue\ncolorTo: indigo\nsdk: gradio\nsdk_version: 6.31.0\n"
        'python_version: "3.12"\napp_file: app.py\nsuggested_hardware: cpu-basic\n',
        "A page asks the model, which llama.cpp runs on a processor. On your own computer:\n"
        "`pip install -r requirements.txt`, then `python app.py`.",
    ),
}
SPACE_FILES = {
    "app.py": '''\
"""A page that asks the fine-tuned model, which llama.cpp runs on the processor."""
import html, json, pathlib, urllib.request
import gradio, xllamacpp

options = xllamacpp.CommonParams()
options.model.path = str(next(pathlib.Path(__file__).parent.glob("*.gguf")))
options.n_ctx, options.n_parallel = 4096, 1
server = xllamacpp.Server(options)
how = HOW_TO_ANSWER


def reply(question, history):
    """The answer while it grows; as plain text, so that no answer can change the page."""
    said = [(turn["role"], html.unescape(turn["content"][0]["text"])) for turn in history]
    talk = [{"role": role, "content": text} for role, text in [*said, ("user", question)]]
    asked = json.dumps({"messages": talk, "stream": True, **how}).encode()
    place, kind = f"{server.listening_address}/v1/chat/completions", "application/json"
    answer = ""
    with urllib.request.urlopen(urllib.request.Request(place, asked, {"Content-Type": kind})) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                answer += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                yield html.escape(answer)


page = gradio.ChatInterface(reply, chatbot=gradio.Chatbot(render_markdown=False), title="Ask the tuned model")
page.launch()
''',
    "requirements.txt": f"gradio>={PAGE_FLOOR}\nxllamacpp\n",
    ".gitattributes": "*.gguf filter=lfs diff=lfs merge=lfs -text\n",
}


# ==================================================================================================
# 12  Commands
# ==================================================================================================

INSTALL = "pip install -r requirements-finetune.txt"

# -- The log

SECRET_NAMES = re.compile(  # of environment variables
    r"(?i)(?<![a-z])(api)?(token|key|secret)s?(?![a-z])|passw(or)?d|credential"
)


def redacted(text: str) -> str:
    """A text without secrets of the environment, and without what follows the path in links."""
    values = [value.strip() for name, value in os.environ.items() if SECRET_NAMES.search(name)]
    for secret in sorted(values, key=len, reverse=True):
        if len(secret) > 5:  # a shorter one would cut up words
            text = text.replace(secret, "[secret]")
    return re.sub(r"(?i)\b(https?://|s3://)(?:[^\s/]*@)?([^\s?#]*)(?:[?#]\S*)?", r"\1\2", text)


class LogFile(logging.Handler):
    """Keeps what is said until there is a file for it; without one it is forgotten."""

    lines: list[str] = []
    path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = redacted(self.format(record))
        self.lines += [f"{stamp}  {printable(line)}\n" for line in text.splitlines()]
        if self.path:
            self.write_to(self.path)

    def write_to(self, path: Path) -> None:
        """Append what was said so far to this file, and then all that is said."""
        is_new = path != self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self.lines)
            self.path, self.lines = path, []
        except OSError as error:  # a full disk must not cost anybody the training
            self.path = None
            say("Warning", f"the log {path} cannot be written to any more: {error}")
        if is_new and self.path:
            say("Log", f"{path} keeps all that is said here")

    @contextmanager
    def of_one_command(self) -> Iterator[None]:
        self.lines, self.path = [], None
        try:
            yield
        finally:
            self.lines, self.path = [], None


LOG_FILE = LogFile()
LOG.handlers = [LOG_FILE]  # in a notebook, an earlier run of this file may have left its own
LOG.setLevel(logging.INFO)
LOG.propagate = False


# -- What would stop a training, found before it begins


def quick_problems(cfg: Config) -> Iterator[str]:
    """What shows without the data and the model, in less than a second."""
    below = [
        f"{package} {version or 'is missing'} ({FLOORS[package]} or newer)"
        for package, version in installed_versions().items()
        if package != "matplotlib" and is_below(version, FLOORS[package])  # it is for pictures only
    ]
    if below:
        yield f"Packages are missing or too old: {', '.join(below)}.\n{INSTALL}"
    if cfg.REPORT_TO != "none" and not importlib.util.find_spec(cfg.REPORT_TO):
        yield f"REPORT_TO {cfg.REPORT_TO} is not installed.\npip install {cfg.REPORT_TO}"
    try:
        yield from output_problems(cfg)
    except OSError as error:
        yield f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be looked into: {error.strerror}."
    for setting in ("OUTPUT_DIR", "CHECKPOINT_DIR"):
        folder = local_path(getattr(cfg, setting)).resolve()
        place = folder.parent if setting == "OUTPUT_DIR" else folder
        try:
            with tempfile.TemporaryDirectory(
                prefix=".finetune", dir=nearest_existing(place)
            ) as probe:
                write_json(Path(probe, "written"), "can this folder be written to?")
        except OSError as error:
            why = f"{place} cannot be written to: {error.strerror}"
            yield f"The folder {why}.\nChoose another with {flag(setting)}"
    mirror = cfg.CHECKPOINT_MIRROR
    if mirror and not local_path(mirror).resolve().parent.is_dir():
        yield f"CHECKPOINT_MIRROR {mirror} has no folder to lie in.\nMount the drive, or make it."


def output_problems(cfg: Config) -> Iterator[str]:
    """OUTPUT_DIR takes the place of what an earlier run left there, and of nothing else."""
    final, toy = output_folder(cfg), cfg.MODEL_NAME == DEMO_MODEL
    is_folder = not final.is_mount() and (final.is_dir() or not final.exists())
    is_text = str(final) == str(final).encode("utf-8", "replace").decode()  # as libraries need it
    if Path.cwd().is_relative_to(final) or not (is_folder and is_text):
        why = "it is no folder of its own, or the current folder lies in it"
        yield f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be replaced: {why}.\nUse one such as ./model"
        return
    places = {name: getattr(cfg, name) for name in PLACES if name != "OUTPUT_DIR"}
    if not toy and os.path.isdir(local_path(cfg.MODEL_NAME)):
        places["MODEL_NAME"] = cfg.MODEL_NAME
    for name, place in places.items():
        if place and local_path(place).resolve().is_relative_to(final):
            where = f"{name} {place} lies in OUTPUT_DIR {final}, which a new model replaces"
            yield f"{where}.\nMove it, or take another {flag(name)} or --output-dir"
    base, theirs = str(record_of(final).get("base_model", "model")), ""
    if not (final / "run.json").is_file():
        strange = final.is_dir() and any(final.iterdir())
        theirs = "files that are not from this script" if strange else ""
    elif toy and base.removeprefix("./") != DEMO_MODEL:
        theirs = f"your fine-tuned {base}"
    if theirs:
        new = f"Choose a new folder: --output-dir {final / 'model'}"
        yield f"OUTPUT_DIR {final} holds {theirs}, so it is left alone.\n{new}"


def model_problems(cfg: Config, model: Outline) -> Iterator[str]:
    """What the outline of the model tells before its weights are here: layers, memory and disk."""
    device = device_here(cfg)
    checks: tuple[tuple[Any, ...], ...] = (
        (adapted_outline, cfg, model),
        (optimizer_name, cfg, device),
        (refuse_small_memory, cfg, device, model.parameters),
        (refuse_full_disk, cfg, model),
    )
    for refuse, *given in checks:
        try:
            refuse(*given)
        except UserError as error:
            yield str(error)


def refuse_full_disk(cfg: Config, model: Outline) -> None:
    """At the worst moment four checkpoints lie there: the newest, before the oldest is deleted."""
    trainable, states = 0, local_path(cfg.CHECKPOINT_DIR)
    with suppress(UserError):  # of the layers, which is said already
        trainable = cfg.LORA_R * sum(map(sum, adapted_outline(cfg, model).adapted))
    present = Counter(path.parents[1] for path in states.glob("*/checkpoint-*/" + COMMIT))
    to_come = max(1, 4 - max(present.values(), default=0)) * (1 + cfg.ARCHIVE_CHECKPOINTS)
    sizes = output_bytes(trainable), to_come * BYTES_PER_WEIGHT * trainable
    with suppress(OSError):  # what cannot be measured is not judged
        folders = nearest_existing(output_folder(cfg).parent), nearest_existing(states)
        if folders[0].stat().st_dev == folders[1].stat().st_dev:
            sizes = sum(sizes), 0
        for folder, size, name in zip(
            folders, sizes, ("OUTPUT_DIR", "CHECKPOINT_DIR"), strict=True
        ):
            usage = shutil.disk_usage(folder)
            if usage.total and usage.free < size:  # some mounted drives do not know their size
                free = f"{usage.free / 1e9:.1f} GB are free in {folder.absolute()}"
                raise UserError(
                    f"The run needs up to {size / 1e9:.1f} GB, {free}.\nDelete something, such as "
                    f"checkpoints of earlier runs, or take another disk with {flag(name)}"
                )


@contextmanager
def only_run_in(folder: Path, setting: str) -> Iterator[None]:
    """Keep a second run out of a folder while this one lasts.

    The lock is the system's, and goes with the process however that ends. It lies among the caches
    of this computer: a mounted drive may know no locks, or keep those of other machines.
    """
    import filelock

    place = cache_folder("locks", hashlib.sha256(os.fsencode(folder)).hexdigest()[:16])
    holder = place.with_suffix(".txt")  # not the lock, which some systems let nobody else read
    with ExitStack() as held:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(filelock.FileLock(place.with_suffix(".lock")).acquire(timeout=0))
            holder.write_text(f"process {os.getpid()}, since {time.ctime()}")
        except filelock.Timeout:
            who = f": {holder.read_text()}" if holder.is_file() else ""
            raise UserError(
                f"Another run is at work in {setting} {folder}{who}.\n"
                f"Wait until it has ended, or stop it, or take another folder with {flag(setting)}"
            ) from None
        except (OSError, NotImplementedError) as error:  # the latter of older filelocks
            say("Note", f"a second run in {setting} would not be noticed: no locks here ({error})")
        yield


# -- Training, and looking before it


def train(cfg: Config) -> int:
    """Teach the model, and leave behind the adapter, the pictures and the zip."""
    with ExitStack() as locks:
        with main_process_first():
            data, outline = prepare_run(cfg, locks)
            device, plan = plan_here(cfg, data, outline)
            checkpoints = open_checkpoints(cfg, data, device, plan)
        model = fine_tune(cfg, data, device, plan, checkpoints)
        if is_main_process():
            save_and_report(cfg, data, device, checkpoints, model)
    return 0


def prepare_run(cfg: Config, locks: ExitStack) -> tuple[PreparedData, Outline | None]:
    """Refuse, all at once, what would fail later; hold the folders of the run; read the data."""
    problems = [*quick_problems(cfg)] if is_main_process() else []
    if not problems and is_main_process():
        folders = {local_path(cfg.CHECKPOINT_DIR).resolve(): "CHECKPOINT_DIR"}
        for folder, setting in (folders | {output_folder(cfg): "OUTPUT_DIR"}).items():
            locks.enter_context(only_run_in(folder, setting))
        for name, value in (public_settings(cfg) | installed_versions()).items():
            LOG.info("%-28s%s", name, as_text(value))
    data, outline = (None, None) if problems else load_data(cfg, problems)
    if problems or not data:
        raise UserError("\n\n".join(problems))
    return data, outline


def load_data(
    cfg: Config, problems: list[str], offline: bool = False
) -> tuple[PreparedData | None, Outline | None]:
    """Pairs in tokens, and what the model is made of; what stands in the way joins the problems."""
    data = outline = None
    if cfg.MODEL_NAME == DEMO_MODEL:
        say("Demo", "The model is a toy that can barely spell; everything else is the real thing.")
    if cfg.PRESET:
        used = (f"{name} {as_text(getattr(cfg, name))}" for name in PRESETS[cfg.PRESET])
        say("Preset", f"{cfg.PRESET}: {', '.join(used) or 'the defaults'}")
    try:
        pairs = find_pairs(cfg)  # before what has to wait for torch
        if outline := known_outline(cfg):
            problems += model_problems(cfg, outline)
        data = prepare_data(cfg, pairs, offline)
        refuse_unfit(cfg, data)
    except UserError as error:
        problems.append(str(error))
    except ModuleNotFoundError:
        if not problems:  # otherwise what is missing is among them
            raise
    return data, outline


def plan_here(cfg: Config, data: PreparedData, outline: Outline | None) -> tuple[Device, Plan]:
    """How the training goes on this machine, and what it will cost."""
    device = device_here(cfg)
    plan = plan_run(cfg, data.train, device, outline and adapted_outline(cfg, outline))
    held_out = f"{len(data.validation)} held out to measure" if data.validation else "none held out"
    epochs = f"{plan.steps / plan.steps_per_epoch:.3g} times over {plan.tokens_per_epoch:,} tokens"
    cost = cost_in_words(plan.seconds and plan.seconds + plan.asking_seconds, plan.memory_gb)
    say("Device", device.reason)
    say("Pairs", f"{len(data.train)} to learn, {held_out}")
    if world_size() > 1:
        say("Processes", f"{world_size()}, which share the pairs of every step")
    say("Plan", f"{plan.steps} steps of {plan.pairs} pairs, {epochs}")
    say("At once", f"at most {plan.tokens_at_once:,} tokens: {plan.reason}")
    say("Estimate", f"{cost}; measuring and saving come on top")
    return device, plan


def cost_in_words(seconds: float | None, memory_gb: float | None) -> str:
    memory = f", at most {memory_gb:.1f} GB of memory" if memory_gb else ""
    return f"{in_time(seconds)}{memory}" if seconds else "not known"


def open_checkpoints(cfg: Config, data: PreparedData, device: Device, plan: Plan) -> Checkpoints:
    """The checkpoints of this run, and where its training begins."""
    checkpoints = Checkpoints(cfg, identity_of(cfg, data, device))
    start = checkpoints.starting_point()
    if start and LOG_NAME.fullmatch(str(start.record["stats"]["log"])):
        checkpoints.log = checkpoints.log.with_name(
            start.record["stats"]["log"]
        )  # one for the whole run
    if is_main_process():
        LOG_FILE.write_to(checkpoints.log)
    if not start:
        often = f"every {cfg.SAVE_STEPS} steps and at least every {cfg.SAVE_MINUTES:g} minutes"
        say("Safe", f"saved in {short_path(checkpoints.folder)} {often}; {resume_hint(cfg)}")
    elif start.record["stats"]["finished"]:
        say("Resume", "this run is finished: nothing is trained, its files are written anew")
    else:
        say("Resume", f"from step {start.step} of {plan.steps}, in {short_path(start.folder)}")
    return checkpoints


def fine_tune(
    cfg: Config, data: PreparedData, device: Device, plan: Plan, checkpoints: Checkpoints
) -> PeftModel | None:
    """The model after all steps; not even loaded where an earlier run has done them."""
    if checkpoints.last and checkpoints.last.record["stats"]["finished"]:
        return None
    from transformers import set_seed

    base = load_base(cfg, device)
    set_seed(cfg.SEED)
    model = add_lora(cfg, base)
    train_adapter(cfg, model, data, device, plan, checkpoints)
    return model


def save_and_report(
    cfg: Config,
    data: PreparedData,
    device: Device,
    checkpoints: Checkpoints,
    model: PeftModel | None,
) -> None:
    """Everything after the last step: OUTPUT_DIR, the questions, and what came of it all."""
    last, result = checkpoints.last, None
    assert last, "the Trainer saves its last step"
    trained = training_result(cfg, last)
    which, pairs = pairs_to_ask(cfg, data)
    pairs = pairs[: cfg.EVAL_ANSWERS]
    kept = checkpoints.folder / f"answers-{last.step}-{len(pairs)}-{cfg.MAX_TOKENS}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # asked in an earlier sitting
        record = json.loads(kept.read_text(encoding="utf-8"))
        result = Comparison([Asked(*one) for one in record["asked"]], *record["effort"])
    folder, archive = save_run(cfg, device, data, last, result)
    if pairs and not result:
        with warned("there will be no answers.xlsx; the adapter is saved"):
            model = model or add_lora(cfg, load_base(cfg, device))
            say("Asking", f"{len(pairs)} {which}, before and after; the adapter is saved already")
            result = before_and_after(cfg, data, model, trained.adapter, pairs)
            if len(result.asked) == len(pairs):
                effort = result.tokens, result.seconds
                write_json(kept, {"asked": result.asked, "effort": effort})
            archive = add_answers(folder, which, result)
    say_result(trained, folder, archive)
    if result:
        say_answers(result)
    say("Next", "ask it with the command chat, or with compare beside what it said before")


def before_and_after(
    cfg: Config, data: PreparedData, model: PeftModel, adapter: Path, pairs: Sequence[Pair]
) -> Comparison:
    from safetensors.torch import load_file

    put_adapter(model, load_file(adapter))
    talks = [Talk(pair.place[4:], pair.messages[:-1], pair.answer) for pair in pairs]
    return ask_both(Run(cfg, data.tokenizer, model), talks, Config(MAX_TOKENS=cfg.MAX_TOKENS))


def say_answers(result: Comparison) -> None:
    """The first three, and how good all are together."""
    for one in result.asked[:EXAMPLES_SHOWN]:
        wanted = {"  wanted": one.reference} if one.reference else {}
        told = {"Question": one.question, **wanted, "  before": one.before, "  after": one.after}
        for label, text in told.items():
            say(label, preview(text, 130))
    for figure, what in FIGURES_OF_ANSWERS.items():
        before, after = result.mean(f"{figure}_before"), result.mean(f"{figure}_after")
        if before is not None and after is not None:
            say(figure.capitalize(), f"{before:.2f} before, {after:.2f} after: {what}")
    count = len(result.asked)
    say("Speed", f"{result.pace}; {count} questions asked twice")
    if exact := sum(one.after == one.reference for one in result.asked):
        say("Result", f"{exact} of the {count} answers come back word for word as they were wanted")


def say_result(trained: TrainingResult, folder: Path, archive: Path) -> None:
    before, after, stats = trained.base_loss, trained.final_loss, trained.stats
    if before is not None and after is not None:
        change = f"{abs(1 - after / before):.0%} {'lower' if after < before else 'HIGHER'}"
        say("After", f"validation loss {after:.3f}, was {before:.3f}: {change}")
    took = cost_in_words(stats.seconds, stats.peak_memory_gb)
    estimated = cost_in_words(stats.estimated_seconds, stats.estimated_memory_gb)
    speed = trained.tokens / stats.seconds
    say("Time", f"of the training {took}; estimated: {estimated}; {speed:,.0f} tokens a second")
    pictures = short_path(folder / "training_visuals")
    say("Saved", f"the adapter in {short_path(folder)}, pictures in {pictures}")
    if (earlier := folder.with_name(f"{folder.name}.previous")).exists():
        say("", f"the model that was there before is kept in {short_path(earlier)}")
    say("Download", f"{short_path(archive)} (on Colab: the folder icon at the left, then ⋮)")


def check(cfg: Config) -> int:
    """Say what training would do: 0 when it would go ahead, 1 when it would refuse."""
    with redirect_stdout(sys.stderr) if cfg.JSON else nullcontext():
        problems, report = [*quick_problems(cfg)], None
        data, outline = load_data(cfg, problems, offline=True)
        for problem in problems:
            say("Problem", problem)
        if data and data.tokenizer and not problems:
            plan_here(cfg, data, outline)
            if outline and cfg.MODEL_NAME != DEMO_MODEL:
                say_cost_on_colab(cfg, data.train, adapted_outline(cfg, outline))
        if data:
            report = say_report(cfg, data)
        if not problems and data:
            ready = "training would go ahead: the same command without the word check"
            if not data.tokenizer:
                ready = f"so far; the tokenizer of {cfg.MODEL_NAME} is missing: check with internet"
            say("Ready", f"{ready}.")
    if cfg.JSON:
        show(json.dumps(check_record(cfg, data, problems, report)))
    return 1 if problems else 0


def say_cost_on_colab(cfg: Config, examples: Sequence[Example], model: Outline) -> None:
    """What the same would cost on the GPUs that Colab has."""
    costs = []
    for name, (capability, figures) in GPUS.items():
        device = choose_device(cfg, "cuda", capability, *figures)
        plan = plan_run(cfg, examples, device, model)
        seconds = (plan.seconds or 0) + plan.asking_seconds
        costs.append(f"{name} {cost_in_words(seconds, plan.memory_gb)}")
    say("On Colab", f"by arithmetic, not timed: {'; '.join(costs)}")


def say_report(cfg: Config, data: PreparedData) -> Path | None:
    """Where the report lies, what the lengths are, and one pair as it is taught."""
    if data.tokens:
        figures = token_figures(data)
        say("Tokens", "{min} to {max} in a pair, median {median}".format(**figures))
    if data.train:
        middle = sorted(data.train, key=lambda one: len(one["input_ids"]))[len(data.train) // 2]
        say("Example", "what the model reads, with what it learns between [[ and ]]:")
        for line in marked(data.tokenizer, middle).split("\n")[:LONGEST_EXAMPLE]:
            say("", preview(line, 300))
    if path := write_report(cfg, data):
        picture = short_path(path.with_suffix(".png"))
        say("Report", f"every row in {short_path(path)}, the lengths in {picture}")
    return path


def check_record(
    cfg: Config, data: PreparedData | None, problems: list[str], report: Path | None
) -> dict[str, Any]:
    """What `check --json` prints; every name is there, whatever was found."""
    pairs = data.pairs if data else None
    quality = data.quality if data else quality_of([], [])
    record, kept = quality_record(quality), len(pairs.kept) if pairs else 0
    return {
        "ready": not problems,
        "file": pairs.name if pairs else local_path(redacted(cfg.DATASET_PATH)).name,
        "shape": pairs.shape if pairs else None,
        "sheet": (pairs.table.sheet or None) if pairs else None,
        **(column_names(pairs) if pairs else {"question_column": None, "answer_column": None}),
        "rows_read": pairs.rows_read if pairs else 0,
        "pairs_kept": kept,
        "pairs_unique": kept,  # exact copies are never kept
        "pairs_held_out": len(data.validation_pairs) if data else 0,
        "other_tables": pairs.other_tables if pairs else [],
        "dropped": [note._asdict() for note in pairs.dropped] if pairs else [],
        "quality": record["score"],
        "quality_parts": record["parts"],
        "problems": problems + grouped(quality.flagged),
        "tokens": token_figures(data) or None if data else None,
        "report": str(report) if report else None,
    }


# -- What comes after it


def chat(cfg: Config) -> int:
    """Talk with the tuned model, in the terminal or with --web in the browser."""
    if cfg.WEB:
        return serve(cfg)
    if not cfg.QUESTION and can_be_asked():
        return converse(model_to_ask(cfg), cfg)
    questions, failed = questions_given(cfg), False
    with redirect_stdout(sys.stderr):  # a program may read the answers
        tuned = model_to_ask(cfg)
    for question in questions:
        try:
            told = tell(tuned, [asked_by_user(question)], cfg)
            show(told.speed, sys.stderr)
            if told.interrupted:
                raise KeyboardInterrupt
        except UserError as error:
            failed = True
            show(str(error), sys.stderr)
    return 2 if failed else 0


def compare(cfg: Config) -> int:
    """Put the same questions to the base and the tuned model, side by side."""
    if cfg.QUESTIONS:
        return compare_all(cfg, listed_questions(cfg))
    talking = not cfg.QUESTION and can_be_asked()
    questions = questions_typed() if talking else questions_given(cfg)
    with nullcontext() if talking else redirect_stdout(sys.stderr):
        tuned = model_to_ask(cfg)
    for question in questions:
        result = ask_both(tuned, [Talk("", [asked_by_user(question)])], cfg)
        for asked in result.asked:
            coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            show(side_by_side(asked, shutil.get_terminal_size().columns, coloured))
            show(f"({result.pace})", sys.stderr)
    return 0


def compare_all(cfg: Config, listed: list[Talk]) -> int:
    tuned = model_to_ask(cfg)
    say("Asking", f"{len(listed)} questions, each of both models; Ctrl+C ends with what is done")
    result = ask_both(tuned, listed, cfg)
    if not result.asked:
        return 2
    say_answers(result)
    try:
        path = free_path("compare", (".xlsx", ".json", ".md"), lambda path: not path.exists())
        write_comparison(path, result)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"compare.xlsx cannot be written: {why}.\nMake room there.") from None
    say("Saved", f"{short_path(path)}, and the same as {path.stem}.json and {path.stem}.md")
    return 0


def export(cfg: Config) -> int:
    """Take the model elsewhere: merged weights, GGUF, a Space, the Hub."""
    if not cfg.TO:
        raise UserError("Export to what? --to merged, gguf, space or hub; see finetune.md.")
    if not os.path.exists(local_path(cfg.OUTPUT_DIR)):
        raise UserError(f"There is no model in {cfg.OUTPUT_DIR} yet.\nRun the command train first")
    LOG_FILE.write_to(log_path(cfg))
    final = export_place(cfg, cfg.TO)
    with only_run_in(final, "EXPORT_DIR"):
        place = export_to(cfg.TO, cfg, final)
    name = short_path(place) if isinstance(place, Path) else str(place)
    say("Saved", name)
    say("Next", NEXT[cfg.TO].format(name, gguf_name(cfg)))
    return 0


# -- The command line

COMMANDS: dict[str, Callable[[Config], int]] = {
    **{"train": train, "check": check, "demo": train},
    **{"chat": chat, "compare": compare, "export": export},
}
ONLY_WITH = {  # settings that would do nothing with any other command
    "BASE WEB SHARE PORT": "chat",
    "SYSTEM QUESTION": "chat or compare",
    "QUESTIONS": "compare",
    "JSON": "check",
    "TO QUANTIZE EXPORT_DIR HUB_REPO HUB_PRIVATE": "export",
}
SMALL_ADAPTER = {"LORA_TARGETS": ["attention"], "LORA_R": 8, "LORA_ALPHA": 16}
LARGE_ADAPTER = {"LORA_R": 32, "LORA_ALPHA": 64, "LEARNING_RATE": 1e-4}
PRESETS: dict[str, dict[str, Any]] = {
    **{"": {}, "balanced": {}},  # the defaults
    "quick": {"NUM_EPOCHS": 1, **SMALL_ADAPTER, "EVAL_ANSWERS": 5},
    "quality": {"NUM_EPOCHS": 8, **LARGE_ADAPTER, "EARLY_STOPPING_PATIENCE": 3},
    "low-memory": {**SMALL_ADAPTER, "TOKENS_AT_ONCE": 512, "GRADIENT_CHECKPOINTING": True},
}
TOY = {  # what the demo model needs to learn by heart, from which held-out answers suffer
    **{"MODEL_NAME": DEMO_MODEL, "LEARNING_RATE": 1e-2, "BATCH_SIZE": 10, "KEEP_BEST": False},
    **{"GRADIENT_ACCUMULATION_STEPS": 1, "MAX_STEPS": 400, "EVAL_STEPS": 100, "SAVE_STEPS": 400},
}
USUAL = (  # the settings that --help shows
    "DATASET_PATH QUESTION_COLUMN ANSWER_COLUMN OUTPUT_DIR LEARNING_RATE NUM_EPOCHS PRESET".split()
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}.\n--help lists what there is.")


def build_parser(argv: Sequence[str]) -> Parser:
    """The command line, derived from Config; to explain each setting takes a fifth of a second."""
    parser = Parser(
        prog="finetune_colab.py",
        usage="%(prog)s [COMMAND] [--SETTING VALUE ...]",
        description=(__doc__ or "").partition("\n\nMap")[0],
        epilog="Exit codes: 0 done, 1 check found a problem, 2 something to fix;\n"
        "130, 143 or 129 after Ctrl+C, SIGTERM or SIGHUP.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 79),
        argument_default=argparse.SUPPRESS,
    )
    versions = installed_versions().items() if "--version" in argv else ()
    told = "\n".join(f"{name} {version}" for name, version in versions)
    parser.add_argument("command", nargs="?", choices=[*COMMANDS], default="train", help="[train]")
    parser.add_argument("question", nargs="*", help="of chat and compare, asked at once")
    parser.add_argument("--config", metavar="FILE", help="a YAML file with settings: NAME: value")
    parser.add_argument("--help-all", action="help", help="show every setting")
    parser.add_argument("--version", action="version", version=told, help="of the packages")
    notes: dict[str, str] = {}
    if {"-h", "--help", "--help-all"} & {*argv}:
        with suppress(OSError, TypeError):  # pasted into a cell: the flags have no help texts then
            pattern, source = r"(?m)^    ([A-Z0-9_]+): .*?  # (.+)$", inspect.getsource(Config)
            notes = dict(re.findall(pattern, source))
    shown = USUAL if [*argv] in (["-h"], ["--help"]) else TYPES
    for name, kind in TYPES.items():
        choices = ", ".join(filter(None, CHOICES.get(name, ())))
        default = as_text(getattr(Config, name)) or "empty"
        about = filter(None, (notes.get(name), choices and f"one of {choices}", f"[{default}]"))
        options: dict[str, Any] = {"metavar": name.rpartition("_")[2]}
        if kind in (bool, bool | None):
            options = {"action": argparse.BooleanOptionalAction}
        text = "; ".join(about).replace("%", "%%")
        options["help"] = text if name in shown else argparse.SUPPRESS
        parser.add_argument(flag(name), dest=name, **options)
    return parser


def refuse_unknown_flags(argv: Sequence[str]) -> None:
    known = [*map(flag, TYPES), "--config", "--help", "--help-all", "--version"]
    for part in argv:
        word = part.partition("=")[0].replace("--no-", "--", 1)
        if word.startswith("--") and word not in known:
            meant = did_you_mean({"--lr": "--learning-rate"}.get(word, word), known)
            raise UserError(f"There is no flag {word}.{meant}\n--help-all lists all.")


def read_settings_file(path: Path) -> dict[str, Any]:
    """Settings from a YAML file that uses the names of Config: each value as it is written."""
    import yaml

    try:
        content = yaml.BaseLoader(path.read_text(encoding="utf-8-sig")).get_single_data() or {}
        if not isinstance(content, dict):
            raise ValueError("it holds something else than settings")
    except (OSError, ValueError, yaml.YAMLError) as error:
        advice = "Write one setting a line, such as LEARNING_RATE: 1e-4"
        raise UserError(f"The file {path} cannot be read as YAML: {error}\n{advice}") from None
    written = {str(name).upper().replace("-", "_"): value for name, value in content.items()}
    return {name: None if value == "null" else value for name, value in written.items()}


def read_command_line(argv: Sequence[str]) -> tuple[str, Config]:
    """The command and its settings: of Config, a preset, the toy, the file, the flags."""
    refuse_unknown_flags(argv)
    flags = vars(build_parser(argv).parse_intermixed_args([*argv]))  # a question may come last
    command, file = flags.pop("command"), flags.pop("config", None)
    if words := flags.pop("question", []):
        flags["QUESTION"] = " ".join(words)
    own = (read_settings_file(Path(file)) if file else {}) | flags
    values = PRESETS.get(str(own.get("PRESET", Config.PRESET)), {})
    if command == "demo" or own.get("MODEL_NAME") == DEMO_MODEL:
        values = values | TOY | ({"DATASET_PATH": EXAMPLE_DATASET} if command == "demo" else {})
    cfg = checked(values | own)
    for names, commands in ONLY_WITH.items():
        for name in names.split():
            if command not in commands and getattr(cfg, name) != getattr(Config, name):
                raise UserError(f"{name} ({flag(name)}) goes with {commands}, not with {command}.")
    if cfg.SHARE and not cfg.WEB:
        raise UserError("SHARE (--share) is of the page in the browser: add --web.")
    return command, cfg


@only_main_process_prints()
@LOG_FILE.of_one_command()
def main(argv: Sequence[str] | None = None) -> int:
    command, cfg = "", Config()
    if argv is None:  # in a notebook kernel the arguments are the kernel's own
        argv = [] if Path(sys.argv[0]).name.endswith("kernel_launcher.py") else sys.argv[1:]
    # read when torch is first imported: what Apple's GPU cannot do, the processor does instead
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    for library in NOISY:  # before anything imports them
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        command, cfg = read_command_line(argv)
        works = is_main_process() or command in ("train", "demo")
        return COMMANDS[command](cfg) if works else 0
    except SystemExit as done:  # argparse leaves this way after --help
        return int(done.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        code, why = ending(error, command, cfg)
        if not why:
            if is_main_process() and not LOG_FILE.path:
                LOG_FILE.write_to(log_path(cfg))
            LOG.exception("Stopped    by an error that nobody foresaw:")
            raise
    if is_main_process() or (code == 2 and why != ENDED):  # of several processes, one speaks
        errors = sys.stderr if is_main_process() else sys.__stderr__
        show("", errors)
        say("Stopped", why, errors)
    return code


def ending(error: BaseException, command: str, cfg: Config) -> tuple[int, str]:
    """Exit code and explanation of what ends a command; nothing to say of an unforeseen error."""
    if isinstance(error, KeyboardInterrupt):
        done = str(error) or f"What was finished or saved is untouched; {resume_hint(cfg)}."
        return 128 + getattr(error, "number", signal.SIGINT), f"Interrupted. {done}"
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, ModuleNotFoundError):
        return 2, f"The package {error.name} is missing.\n{INSTALL}"
    if "by peer" in str(error) and world_size() > 1:
        return 2, ENDED
    if not memory_fault(error):
        return 1, ""
    asking = command in ("chat", "compare")
    levers = "Add --load-in-4bit, or lower --max-tokens." if asking else LEVERS
    return 2, f"Memory ran out: {preview(str(error), 100)}\n{levers}"


if __name__ == "__main__":
    code = main()
    if code:  # a notebook shows even sys.exit(0) as an error
        sys.exit(code)

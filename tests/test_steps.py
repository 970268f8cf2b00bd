"""A step of the training: fast rows and layers learn what a plain loop with transformers and PEFT learns."""

import csv
import functools
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import seams
import torch
import transformers
from conftest import PAIRS, Run, at_attention, in_words, metrics, sweep, write_workbook
from safetensors.torch import load_file
from tables import marked
from test_prompts import talk
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

PLAIN = "--lr-scheduler constant --warmup-ratio 0 --validation-fraction 0 --eval-answers 0 --no-resume".split()
ADAPTER = "model/adapter_model.safetensors"


def encoded(base: Path, count: int) -> list[seams.Example]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return [seams.encode(tokenizer, talk(*pair)) for pair in PAIRS[:count]]


def examples_of(base: Path, held_out: bool) -> list[seams.Example]:
    """What the run in this folder learnt from, or was measured on."""
    away = [row for _, row in json.loads(Path("model/run.json").read_text())["dataset"]["held_out_rows"]]
    rows, tokenizer = seams.find_pairs(seams.Config()).kept, seams.load_tokenizer(seams.Config(MODEL_NAME=str(base)))
    return [seams.encode(tokenizer, one.messages) for one in rows if (one.row in away) == held_out]


def column(name: str) -> list[float]:
    table = Path("model/training_visuals/training_metrics.csv").read_text().splitlines()
    return [float(row[name]) for row in csv.DictReader(table) if row[name]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """Small models of any family with weights of chance, and heads for keys as wanted."""

    @functools.cache
    def make(family: str, heads: int = 4, blocks: int = 2, size: int = 64) -> Path:
        torch.manual_seed(0)
        shape = {"num_hidden_layers": blocks, "hidden_size": size, "intermediate_size": 2 * size, "vocab_size": 448}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": heads}
        none = "pad_token_id bos_token_id eos_token_id attn_pdrop resid_pdrop embd_pdrop".split()
        config = transformers.AutoConfig.for_model(family, **shape, **dict.fromkeys(none, 0))
        folder = tmp_path_factory.mktemp(family)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


class Watched:
    """The gradients of every step of a run; its first one only makes the adapter do something."""

    def __init__(self, patch: pytest.MonkeyPatch, frozen: bool = False) -> None:
        self.start: list[torch.Tensor] = []
        self.gradients: list[list[torch.Tensor]] = []
        real, chance = torch.optim.AdamW.step, torch.Generator().manual_seed(1)

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            learnt = [p for group in optimizer.param_groups for p in group["params"]]
            if self.start:
                self.gradients.append([p.grad.float().cpu() for p in learnt])
                return None if frozen else real(optimizer, *args, **kwargs)
            for p in learnt:
                p.data += (not p.any()) * torch.randn(p.shape, generator=chance).to(p) * 0.05
            self.start = [p.detach().clone() for p in learnt]
            return None

        patch.setattr(torch.optim.AdamW, "step", step)


def padded(examples: list[seams.Example]) -> dict[str, torch.Tensor]:
    rows = [[torch.tensor(one[name]) for one in examples] for name in ("input_ids", "labels")]
    ids, labels = (pad_sequence(row, batch_first=True, padding_value=seams.IGNORE) for row in rows)
    return {"input_ids": ids.clamp(0), "labels": labels, "attention_mask": (ids >= 0).long()}


def assert_plain_loop_agrees(base: Path, seen: Watched, flags: list[str]) -> None:
    """Four steps from the same adapter on padded batches, with transformers and PEFT alone."""
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    load = functools.partial(seams.load_base, LOAD_IN_4BIT=True) if "--load-in-4bit" in flags else load
    config = peft.LoraConfig.from_pretrained("model")
    config.inference_mode = False
    model = peft.get_peft_model(load(base), config).train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    batch, measured = (padded(examples_of(base, held_out)) for held_out in (False, True))
    optimizer = torch.optim.AdamW(learnt, lr=1e-3, weight_decay=0.1 if "--weight-decay" in flags else 0)
    losses = [model(**measured, use_cache=False).loss.item()]
    for step in range(4):
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        losses.append(loss.item())
        if step == 0:  # which only makes the adapter do something
            for p, start in zip(learnt, seen.start, strict=True):
                p.data.copy_(start)
            continue
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 0.3)
        for found, p in zip(seen.gradients[0], learnt, strict=True) if step == 1 else ():
            assert p.grad.norm() > 0 and (found - p.grad).norm() < 1e-3 * p.grad.norm()
        optimizer.step()
    losses.append(model(**measured, use_cache=False).loss.item())
    assert [metrics()["base_eval_loss"], *column("loss"), *column("eval_loss")] == pytest.approx(losses, abs=2e-4)
    found, expected = load_file(ADAPTER), peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("case", marked("trainings"))
def test_a_plain_loop_agrees(bases: Any, phi_folder: Path, workbook: Path, run: Run, patched: Any, case: str) -> None:
    family, heads, *flags = case.removeprefix("sweep ").split()
    base = phi_folder if family == "phi-80" else bases(family, int(heads))
    write_workbook(workbook, [("question", "answer"), *PAIRS[:10]])
    more = "--batch-size 8 --gradient-accumulation-steps 1 --validation-fraction 0.2 --eval-steps 4 --max-steps 4 --learning-rate 1e-3 --lora-dropout 0".split()
    seen = Watched(patched)
    code, printed = run("--model-name", base, *PLAIN, *more, *flags)
    assert code == 0, printed
    alone = family == "gemma2" and not seams.may_share_rows(seams.load_base(base))  # older transformers let it share
    assert bool(re.search("(cannot|can't|not) .*one row", in_words(printed))) == alone
    patched.undo()
    assert_plain_loop_agrees(base, seen, flags)


def test_no_token_is_padding_and_few_reach_the_head(small_phi: Path, workbook: Path, run: Run, patched: Any) -> None:
    laid = {"linear": 0, "embedding": 0}

    def counted(name: str, real: Any, first: torch.Tensor, weight: torch.Tensor, *more: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() and len(weight) == 448:  # the vocabulary
            laid[name] += first.shape[:-1].numel() if name == "linear" else first.numel()
        return real(first, weight, *more, **named)

    for name in laid:
        patched.setattr(functional, name, functools.partial(counted, name, getattr(functional, name)))
    one_batch = "--batch-size 24 --gradient-accumulation-steps 1 --max-steps 2".split()
    assert run("--model-name", small_phi, *PLAIN, *one_batch)[0] == 0
    learning = examples_of(small_phi, held_out=False)
    learnt = sum(label != seams.IGNORE for one in learning for label in one["labels"])
    assert laid["embedding"] == 2 * sum(len(one["input_ids"]) for one in learning)
    assert laid["linear"] == 2 * learnt < laid["embedding"]


def gradients_of_both(run: Run, *flags: object, frozen: bool = False) -> list[list[torch.Tensor]]:
    """Those of every step stacked, with the fast adapter and with that of PEFT."""
    found = []
    for flag in ("--fast-adapter", "--no-fast-adapter"):
        with pytest.MonkeyPatch.context() as patch:
            seen = Watched(patch, frozen)
            assert run(*PLAIN, *flags, flag)[0] == 0
        found.append([torch.stack(part) for part in zip(*seen.gradients, strict=True)])
    return found


@pytest.mark.parametrize("share", [0.5, sweep(0.05), sweep(0.9)])
def test_dropout_is_that_of_peft(small_phi: Path, workbook: Path, run: Run, share: float) -> None:
    """The chance is drawn in another way, so mean and spread over many draws are compared."""
    write_workbook(workbook, [("question", "answer"), *PAIRS[:2]])
    flags = ("--max-steps", 150, "--save-steps", 1000, "--max-grad-norm", 0, "--lora-dropout", share)
    both = gradients_of_both(run, "--model-name", small_phi, *flags, frozen=True)
    for fast, usual in zip(*both, strict=True):
        assert fast.std(0).norm() / usual.std(0).norm() == pytest.approx(1, abs=0.1)
        by_chance = (2 / 149) ** 0.5 * usual.std(0).norm()
        assert (fast.mean(0) - usual.mean(0)).norm() < 1.3 * by_chance


@pytest.mark.gpu
def test_on_a_gpu_it_learns_what_peft_does(phi_folder: Path, workbook: Path, run: Run) -> None:
    flags = ("--optimizer", "adamw_torch", "--lora-dropout", 0, "--max-steps", 2)
    both = gradients_of_both(run, "--model-name", phi_folder, *flags)
    for fast, usual in zip(*both, strict=True):
        assert (fast - usual).norm() < 0.05 * usual.norm()


def bytes_of_a_token(run: Run, base: Path, *flags: str) -> tuple[float, float]:
    """How many more a step keeps for each token more in it, and how many were estimated."""
    rows = encoded(base, len(PAIRS))
    lengths = {pair: len(row["labels"]) for pair, row in zip(PAIRS, rows, strict=True)}
    usual = Counter(lengths.values()).most_common(1)[0][0]
    alike = [pair for pair, length in lengths.items() if length == usual]
    write_workbook(Path("dataset.xlsx"), [("question", "answer"), *alike])
    figures, kept, used, peaks = [], {}, [], [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if used:  # then this is the next row
            kept.clear(), used.clear()
        kept[tensor.untyped_storage().data_ptr()] = tensor
        peaks[0] = max(peaks[0], sum(one.untyped_storage().nbytes() for one in kept.values()))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks
    for count in (2, len(alike)):
        more = ("--batch-size", count, "--gradient-accumulation-steps", 1, "--max-steps", 1)
        with hooks(pack, lambda tensor: used.append(1) or tensor):
            code, printed = run("--model-name", base, *PLAIN, *more, *flags)
        assert code == 0, printed
        figures.append((usual * count, peaks[0], metrics()["estimated_memory_gb"] * 1e9))
    tokens, found, estimated = (b - a for a, b in zip(*figures, strict=True))
    return found / tokens, estimated / tokens


FIRST = (("phi", "all-linear"), ("llama", "attention"))
KEPT = itertools.product(("phi", "llama", "qwen2", "phi3"), ("all-linear", "attention"))


@pytest.mark.parametrize("family, targets", [one if one in FIRST else sweep(*one) for one in KEPT])
def test_a_step_keeps_what_was_estimated(bases: Any, workbook: Path, run: Run, family: str, targets: str) -> None:
    """And less than the same with PEFT alone."""
    flags = (bases(family, blocks=4, size=128), "--lora-targets", targets)
    kept, estimated = bytes_of_a_token(run, *flags)
    assert 0.7 * estimated < kept < 1.1 * estimated
    assert kept < 0.95 * bytes_of_a_token(run, *flags, "--no-fast-adapter")[0]


def test_measuring_and_failing_leave_a_model_in_four_bits_as_it_is(phi_folder: Path) -> None:
    base = seams.load_base(phi_folder, LOAD_IN_4BIT=True)
    weights = [layer.weight for layer in base.modules() if type(layer).__name__ == "Linear4bit"]
    kinds = {(weight.quant_type, weight.quant_state.nested) for weight in weights}
    assert (len(weights), kinds) == (12, {("nf4", True)}), "with double quantisation"
    model = seams.add_lora(base, LORA_DROPOUT=0.0)
    examples, learnt = encoded(phi_folder, 4), {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in learnt.items():
        if "lora_B" in name:  # a fresh adapter gives A no gradient, since B is zero
            parameter.data.normal_(std=0.05)

    def state() -> list[torch.Tensor]:
        logits = model(torch.tensor([examples[0]["input_ids"]])).logits
        return [*torch.autograd.grad(seams.summed_loss(model, examples[:2]), [*learnt.values()]), logits]

    before, _ = state(), seams.mean_loss(model, examples[2:])
    for measure in (seams.summed_loss, seams.mean_loss):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            at_attention(patch, lambda *_: 1 / 0)
            measure(model, examples)
    assert all(one.abs().max() > 0 for one in before)
    assert all(map(torch.equal, before, state()))


def watched_attention(patch: pytest.MonkeyPatch) -> list[tuple[Any, Any, bool]]:
    """Query, key, and whether SDPA itself is to spread keys over queries, of all that reaches it."""
    seen, real = [], functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((query, key, kwargs.get("enable_gqa", False)))
        return real(query, key, *args, **kwargs)

    patch.setattr(functional, "scaled_dot_product_attention", attention)
    return seen


@pytest.mark.parametrize("family, heads", [("llama", 2), ("qwen2", 1)])
def test_fewer_key_heads_are_repeated(bases: Any, patched: Any, family: str, heads: int) -> None:
    """With enable_gqa, SDPA takes a way that keeps every score."""
    model = seams.add_lora(seams.load_base(bases(family, heads)))
    assert seams.may_share_rows(model)
    seen = watched_attention(patched)
    seams.summed_loss(model, encoded(bases(family, heads), 2))
    assert {(key.shape[1], grouped) for _, key, grouped in seen} == {(4, False)}

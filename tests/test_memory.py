"""When memory runs out, the same steps are done with less at once; what is no number is never kept."""

import builtins
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import seams
import torch
from accelerate import Accelerator
from conftest import PAIRS, Run, at_step, call, in_words, metrics, signal_at, write_workbook
from safetensors.torch import load_file
from tables import marked, rows_of
from test_steps import column, watched_attention
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer as Layer

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
FLAGS = "--max-steps 5 --eval-steps 3 --save-steps 2 --learning-rate 1e-3 --lora-dropout 0 --eval-answers 0 --validation-fraction 0.3".split()
ADAPTER = "adapter_model.safetensors"


def change_result(patch: pytest.MonkeyPatch, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    real = getattr(functional, name)
    patch.setattr(functional, name, lambda *args, **kwargs: change(real(*args, **kwargs)))


def at_row(patch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Call `act` with the length of each row that enters the model, which raises what it raises."""
    change_result(patch, "embedding", lambda row: (act(row.shape[:-1].numel()), row)[1])


@pytest.fixture
def train(small_phi: Path, workbook: Path, run: Run) -> Run:
    return lambda *flags: run("--model-name", small_phi, *FLAGS, *flags)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, small_phi: Path) -> Path:
    """The folder of the same training with memory enough."""
    home = tmp_path_factory.mktemp("plain")
    write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
    assert call(home, "--model-name", small_phi, *FLAGS) == 0
    return home


def assert_same_training(plain: Path) -> None:
    found, expected = (load_file(home / "model" / ADAPTER) for home in (Path(), plain))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    found, expected = metrics(), metrics(plain)
    for name in "train_loss eval_loss base_eval_loss steps tokens_trained best_step".split():
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def fewer_tokens(printed: str) -> list[int]:
    """How many tokens at once there were, and with how many it says it goes on, again and again."""
    found = re.findall(r"(?:At once|Memory) .*?([\d,]+) tokens", in_words(printed))
    return [int(tokens.replace(",", "")) for tokens in found]


@pytest.mark.parametrize("case", marked("memory"))
def test_with_less_at_once_the_adapter_is_the_same(case: str, plain: Path, train: Run, patched: Any) -> None:
    """M1, M2, M5. Behind a step, a row of more than 120 tokens is too much; "none": any row, so that nothing helps."""
    _, then, step, kind, text = case.split(" | ")
    error = getattr(torch if kind == "OutOfMemoryError" else builtins, kind)(text)
    begun, most = [] if int(step) else [1], 0 if then == "none" else 120
    at_step(patched, int(step), lambda: begun.append(1))

    def act(length: int) -> None:
        if begun and length > most and torch.is_grad_enabled():
            raise error

    at_row(patched, act)
    if then == "bug":
        with pytest.raises(type(error), match=str(error)):
            train()
        return
    code, printed = train()
    assert (code, "Traceback" in printed) == (0 if then == "less" else 2, False)
    found = fewer_tokens(printed)
    if then == "less":
        assert found[1:] == [more // 2 for more in found[:-1]]
        assert metrics()["tokens_at_once"] == found[-1] <= 120 < found[-2]
        assert_same_training(plain)
    elif then == "none":
        assert re.search("MAX_LENGTH|--max-length", printed) and re.search("LORA_R|--lora-r", printed)
        assert not Path("model").exists()
    else:
        assert not found[1:] and re.search("(same command|again).*--tokens-at-once", in_words(printed))
        patched.undo()
        code, printed = train()
        assert (code, bool(re.search(r"step 4\b", printed))) == (0, True)  # of one pair, which fits


def test_where_not_even_one_pair_fits_values_are_computed_again(plain: Path, train: Run, patched: Any) -> None:
    def layer(self: Any, *args: Any, real: Any = Layer.__call__, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.training and not self.gradient_checkpointing:
            raise FULL
        return real(self, *args, **kwargs)

    patched.setattr(Layer, "__call__", layer)
    code, printed = train("--no-gradient-checkpointing")
    assert (code, "spite of --no-gradient-checkpointing" in in_words(printed)) == (0, True)
    sizes = fewer_tokens(printed)
    assert sizes == sorted(sizes, reverse=True)
    assert metrics()["tokens_at_once"] == sizes[-1] < 60, "a single pair"
    assert sizes[-1] == sizes[-2], "the last step down is another"
    assert_same_training(plain)


def test_a_lack_of_memory_while_measuring_costs_no_training(plain: Path, train: Run, patched: Any) -> None:
    tried: list[int] = []

    def act(length: int) -> None:
        tried.append(0 if torch.is_grad_enabled() else length)
        if tried[-1] > 100:
            raise FULL

    at_row(patched, act)  # M4
    assert train()[0] == 0
    assert max(tried) > 100
    found, expected = metrics(), metrics(plain)
    assert (found["steps"], found["tokens_at_once"]) == (5, expected["tokens_at_once"])
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    for name in ("eval_loss", "base_eval_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_a_validation_that_does_not_fit_at_all_is_left_out(train: Run, patched: Any) -> None:
    def act(_: int) -> None:
        if not torch.is_grad_enabled():
            raise FULL

    at_row(patched, act)  # M4
    code, printed = train()
    assert code == 0 and printed.count("is left out") > 2, printed  # before, and after steps 3 and 5
    found = metrics()
    assert (found["steps"], found["eval_loss"], found["base_eval_loss"], found["best_step"]) == (5, None, None, None)


@pytest.mark.gpu
def test_on_a_gpu_the_largest_row_is_tried_first(train: Run, patched: Any) -> None:  # M3
    lengths: list[int] = []
    at_row(patched, lambda length: torch.is_grad_enabled() and lengths.append(length))
    assert train()[0] == 0
    assert lengths[0] == max(lengths)


def nan_in_weights(patch: pytest.MonkeyPatch) -> None:
    """The third step writes a NaN into the adapter, after a fine loss."""
    real, steps = torch.optim.AdamW.step, iter(range(1, 1000))

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = real(self, *args, **kwargs)
        if next(steps) == 3:
            self.param_groups[0]["params"][0].data[0, 0] = math.nan
        return done

    patch.setattr(torch.optim.AdamW, "step", step)


def nan_behind(patch: pytest.MonkeyPatch, step: int, learning: bool) -> None:
    """In what is learnt from, or in what is measured."""
    begun: list[int] = []
    at_step(patch, step, lambda: begun.append(1))
    spoilt = lambda one: one * (math.nan if begun and torch.is_grad_enabled() == learning else 1)  # noqa: E731
    change_result(patch, "scaled_dot_product_attention", spoilt)


def in_float16(patch: pytest.MonkeyPatch) -> list[float]:
    """As on a T4: the base in float16, autocast with norms in float32, and gradients that are scaled; by so much."""
    load, begin, norm = AutoModelForCausalLM.from_pretrained, Accelerator.__init__, functional.layer_norm
    scale, scales = torch.amp.GradScaler.scale, list[float]()

    def prepare(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)  # which leaves out all of it on a processor
        self.state._mixed_precision, self.native_amp = "fp16", True
        self.scaler = torch.amp.GradScaler("cpu")

    def in_float32(states: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        return norm(states.float(), shape, weight.float(), bias.float(), eps)

    patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda **how: load(**how | {"dtype": torch.float16}))
    patch.setattr(Accelerator, "__init__", prepare)
    patch.setattr(functional, "layer_norm", in_float32)
    patch.setattr(torch.amp.GradScaler, "scale", lambda *args: (scales.append(args[0].get_scale()), scale(*args))[1])
    return scales


def dtypes_of_cache(seen: list[tuple[Any, Any, bool]]) -> set[torch.dtype]:
    return {key.dtype for query, key, _ in seen if query.shape[2] == 1}  # one token more


@pytest.mark.parametrize("four_bit", [False, True])  # True: on a processor that is bfloat16
def test_the_cache_of_a_model_in_16_bits_is_in_16_bits(four_bit: bool, finished: Path, patched: Any) -> None:
    if not four_bit:
        in_float16(patched)
    tuned = seams.load_tuned(finished / "model", four_bit=four_bit)
    seen = watched_attention(patched)
    seams.ask(tuned, "Why?", MAX_TOKENS=4)
    assert dtypes_of_cache(seen) == {tuned.model.dtype} == {torch.bfloat16 if four_bit else torch.float16}


def test_float16_learns_what_float32_does(plain: Path, train: Run, patched: Any) -> None:
    scales, seen = in_float16(patched), watched_attention(patched)
    signal_at(patched, 3)
    assert [train("--eval-answers", 1)[0] for _ in range(2)] == [130, 0], "the scaler is resumed, too"
    assert dtypes_of_cache(seen) == {torch.float16}
    found, expected = metrics(), metrics(plain)
    assert (found["steps"], found["skipped_steps"], {*scales}) == (5, 0, {4096})
    for name in "train_loss eval_loss base_eval_loss".split():
        assert found[name] == pytest.approx(expected[name], abs=2e-3), name
    assert found["base_eval_loss"] - found["eval_loss"] > 0.02, "the case is not the one meant"


def overflow_once(patch: pytest.MonkeyPatch, name: str, armed: list[int]) -> None:
    """When armed: of one row the attention, so that its loss is no number, or the gradient alone."""

    def spoil(result: torch.Tensor) -> torch.Tensor:
        if armed and result.requires_grad:
            armed.clear()
            if name == "cross_entropy":
                result.register_hook(lambda gradient: gradient * 1e30)
            else:
                return result * 1e39
        return result

    change_result(patch, name, spoil)


@pytest.mark.parametrize("name, half", rows_of("overflows"))
def test_what_overflows_costs_its_step_and_nothing_else(name: str, half: str, train: Run, patched: Any) -> None:
    """Beside a run without it, of eight steps so small that each loss depends on its own pairs alone."""
    scales, armed, states = in_float16(patched) if half else [], list[int](), list[Any]()
    real = torch.optim.AdamW.step

    def step(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in weights]
        real(optimizer, *args, **kwargs)
        if weights:
            states.append((before, [p.detach().clone() for p in weights]))
            armed.extend([1] * (len(states) == 11))

    patched.setattr(torch.optim.AdamW, "step", step)
    overflow_once(patched, name, armed)
    flags = "--max-steps 8 --learning-rate 1e-8 --eval-steps 100 --tokens-at-once 150 --no-resume".split()
    (_, expected), (code, found) = ((train(*flags)[0], column("loss")) for _ in range(2))
    assert (code, len(states), metrics()["skipped_steps"]) == (0, 15, 1)
    expected.pop(3)
    assert found == pytest.approx(expected, abs=1e-5)
    assert metrics()["train_loss"] == pytest.approx(sum(found) / 7, abs=1e-5)
    for (_, after), (before, _) in itertools.pairwise(states[8:]):
        assert all(map(torch.equal, before, after)), "no step but the next changes a weight"
    assert all(weight.isfinite().all() for weight in load_file(Path("model", ADAPTER)).values())
    assert not re.search("inf|nan", Path("model/training_visuals/training_metrics.csv").read_text())
    assert not half or {*scales} == {4096, 2048}, "the scaler has seen it, too"


@pytest.mark.parametrize("spoil, flags, left", [  # M7: what is spoilt, and the checkpoints that are left
    (nan_in_weights, "--eval-steps 100 --save-steps 1", [1, 2]),
    (lambda patch: [in_float16(patch), nan_behind(patch, 2, learning=True)], "--save-steps 1", [3, 4]),
    (lambda patch: nan_behind(patch, 2, learning=True), "--save-steps 1", [3, 4]),
    (lambda patch: nan_behind(patch, 3, learning=False), "--save-steps 2", [2]),
], ids=["weights", "float16", "a loss", "measured"])  # fmt: skip
def test_a_nan_ends_the_run_and_is_never_saved(spoil: Any, flags: str, left: Any, train: Run, patched: Any) -> None:
    spoil(patched)
    code, printed = train(*flags.split())
    assert (code, "NaN" in printed) == (2, True)
    assert re.search("LEARNING_RATE|--learning-rate", printed)
    folders = sorted(Path("checkpoints").glob("*/checkpoint-*"))
    assert [folder.name for folder in folders] == [f"checkpoint-{step}" for step in left]
    for folder in folders:
        assert all(torch.isfinite(one).all() for one in load_file(folder / ADAPTER).values())
    assert not Path("model").exists()

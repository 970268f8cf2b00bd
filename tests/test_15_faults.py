"""Every fault that was thought of, and the test that injects it."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

# id, fault: test file and function; or, after "none:", why it cannot be a test here
FAULTS = """
Checkpoints
C1 killed before a save begins: test_7_kills whatever_a_kill_interrupts_the_end_is_the_same
C2 killed after the adapter is written: test_7_kills whatever_a_kill_interrupts_the_end_is_the_same
C3 killed between optimizer, scheduler and chance: test_7_kills whatever_a_kill_interrupts_the_end_is_the_same
C4 optimizer torn: test_7_checkpoints a_damaged_checkpoint_is_never_used
C5 state of the Trainer torn or blank: test_7_checkpoints a_damaged_checkpoint_is_never_used
C6 optimizer or scheduler missing: test_7_checkpoints the_one_before_a_damaged_checkpoint_ends_the_same
C7 state of chance missing: test_7_checkpoints a_damaged_checkpoint_is_never_used
C8 a flipped bit in the adapter: test_7_checkpoints a_damaged_checkpoint_is_never_used
C9 a flipped bit in the optimizer: test_7_checkpoints the_one_before_a_damaged_checkpoint_ends_the_same
C10 killed while COMMIT.json is written: test_7_kills whatever_a_kill_interrupts_the_end_is_the_same
C11 killed while an old checkpoint is deleted: test_7_kills whatever_a_kill_interrupts_the_end_is_the_same
C12 an empty checkpoint-999: test_7_checkpoints stray_folders_are_neither_used_nor_counted
C13 no whole checkpoint: test_7_checkpoints with_no_whole_checkpoint_it_starts_again_and_says_so
C14 a finished run started again: test_7_checkpoints a_finished_run_is_not_trained_again
C15 figures of the last part only: test_7_checkpoints a_stopped_run_goes_on_and_ends_the_same
C16 written by another transformers: test_7_checkpoints a_checkpoint_of_other_versions_names_them
C17 state of chance that cannot be read here: test_7_checkpoints code_in_a_checkpoint_is_not_run
C18 data edited: test_7_checkpoints edited_data_and_other_weights_make_a_new_run
C19 other rows, batch or epochs: test_7_checkpoints what_decides_the_result_makes_a_new_run_beside_the_old
C20 other base weights: test_7_checkpoints edited_data_and_other_weights_make_a_new_run
C21 other alpha or dropout: test_7_checkpoints what_decides_the_result_makes_a_new_run_beside_the_old
C22 other rank, layers or optimizer: test_7_checkpoints what_decides_the_result_makes_a_new_run_beside_the_old
C23 the folder was moved: test_7_checkpoints a_moved_folder_of_checkpoints_is_as_good
Signals and the life of a process
S1 SIGTERM: test_7_checkpoints a_signal_saves_at_the_next_step_and_ends
S2 training that returns early passes for finished: test_7_checkpoints a_signal_saves_at_the_next_step_and_ends
S3 Ctrl+C, once and twice: test_7_checkpoints a_second_signal_ends_at_once
S4 a signal during a save: test_7_checkpoints a_signal_while_saving_lets_it_finish
S5 a signal outside of the training: test_13_end_to_end an_end_outside_of_the_training_comes_at_once
S6 SIGHUP: test_7_checkpoints a_signal_saves_at_the_next_step_and_ends
S7 the machine vanishes, twenty times: test_7_kills twenty_kills_of_one_run_change_nothing
S8 two runs in one folder: test_12_preflight a_second_run_in_a_folder_is_refused_until_the_first_is_gone
S9 off the main thread: test_7_checkpoints off_the_main_thread_it_trains_and_says_what_is_missing
Disks
D1 full while the adapter is saved: test_7_disk a_full_disk_keeps_the_last_checkpoint
D2 full while the optimizer is saved: test_7_disk a_full_disk_keeps_the_last_checkpoint
D3 full in the middle of a JSON file: test_7_disk a_disk_that_goes_in_the_middle_of_a_file
D4 full while zipping: test_9_safety a_disk_that_fills_up_leaves_no_half_of_a_zip
D5 a limit on files: test_7_disk a_file_that_cannot_be_written_ends_in_one_message
D6 a folder that cannot be written to: test_12_preflight a_folder_is_written_to_in_earnest
D7 a drive that goes away: test_7_checkpoints a_mirror_that_fails_is_a_warning
D8 a torn copy: test_7_checkpoints a_new_machine_goes_on_from_the_mirror
D9 a rename across disks: test_9_safety a_run_that_dies_while_saving_leaves_only_whole_files
D10 blanks at the end after a power cut: test_7_checkpoints a_damaged_checkpoint_is_never_used
D11 a clock that jumps back: test_7_checkpoints dates_of_folders_mean_nothing
Memory and numbers
M1 out of memory in a step: test_7_memory smaller_batches_give_the_same_adapter
M2 a GPU that answers no more: test_7_memory a_gpu_that_answers_no_more_ends_with_the_way_on
M3 out of memory on the longest row: test_7_memory the_longest_row_is_tried_without_a_trace
M4 out of memory while measuring: test_7_memory a_lack_of_memory_while_measuring_costs_no_training
M5 not even one pair fits: test_7_training memory_that_runs_out_is_one_message_with_the_levers
M6 the computer's own memory is full: test_12_preflight memory_is_judged_where_the_weights_lie
M7 a NaN: test_7_memory an_adapter_with_a_nan_is_never_saved
M8 nothing to learn in a row: test_7_training a_row_that_is_too_long_is_left_out_whole
M9 one pair or a few: test_3_pairs one_pair_is_too_few
M10 no GPU, or one without bfloat16: test_5_device number_format_follows_the_device
Files of data
X1 a password: test_3_real_files a_file_that_is_no_table_is_refused_with_its_own_words
X2 cut off, empty, of another kind: test_3_real_files damaged_files_are_read_or_refused
X3 strict Open XML: test_3_real_files spreadsheets_are_read_as_they_look
X4 an XML bomb: test_3_real_files no_file_takes_all_time_or_memory
X5 one huge text: test_3_formats a_huge_shared_text_is_left_out_and_the_others_are_kept
X6 a zip bomb, a million rows: test_3_real_files no_file_takes_all_time_or_memory
X7 a pointer of Git LFS: test_3_formats what_cannot_be_read_is_refused_in_words
X8 a lock file of Excel: test_2_data_file locks_of_open_workbooks_and_other_files_are_not_offered
X9 a blank before a quote: test_3_real_files text_tables_are_read_as_they_look
X10 columns that mislead: test_3_real_files columns_that_mislead_are_not_taken
X11 numbers, lists and Python's own spelling: test_3_real_files text_tables_are_read_as_they_look
X12 None and NA that are answers: test_3_real_files text_tables_are_read_as_they_look
X13 encodings: test_3_formats letters_survive_every_encoding
X14 no header, titles, several sheets, merged cells: test_3_pairs a_table_without_headers_is_read_from_its_first_row
X15 rows with too many or too few cells: test_3_pairs a_row_with_too_many_cells_is_left_out
X16 a file that changes while it is read: test_9_safety data_that_changes_while_it_is_read_is_read_once
Security
V1 code in a checkpoint: test_7_checkpoints code_in_a_checkpoint_is_not_run
V2 a pickle beside the adapter: test_9_safety a_file_that_can_run_programs_is_refused
V3 code in a model's configuration: test_9_safety a_model_brings_no_code
V4 a base model that is replaced: test_9_safety a_base_that_is_replaced_on_the_hub_changes_no_finished_run
V5 formulas in tables: test_12_check nothing_in_the_report_is_a_formula
V6 links in the zip: test_9_safety only_own_files_get_into_the_zip
V7 a hostile zip: test_7_checkpoints a_hostile_zip_leaves_nothing_behind
V8 secrets and places: test_9_safety no_file_holds_a_secret
V9 texts that steer a terminal: test_9_safety names_cannot_steer_the_terminal
V10 marks of a model within texts: test_4_tokens a_quoted_end_of_text_does_not_end_the_answer
Outputs
O1 killed while they are written: test_7_kills whatever_a_kill_interrupts_the_end_is_the_same
O2 the adapter in a fresh process: test_9_report a_fresh_process_gets_the_same_model_back
O3 no matplotlib: test_9_safety pictures_that_cannot_be_made_leave_the_figures_and_no_half
O4 no network at the end: test_9_safety nothing_is_sent_after_the_load
Not here
H1 a real power cut: none: no test can take the power; the order of writes and fsync is tested instead
H2 a real Google Drive: none: it needs an account; a folder that fails with its errors stands for it
H3 a GPU that really is full, float16 scaling, paged optimizers: none: they need a GPU; the same code runs on errors with the same words
"""
ROWS = [line for line in FAULTS.strip().splitlines() if re.match(r"[A-Z]\d+ ", line)]


@pytest.mark.parametrize("row", [row for row in ROWS if ": none: " not in row])
def test_the_test_of_a_fault_is_there(row: str) -> None:
    file, name = row.rpartition(": ")[2].split()
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    assert f"test_{name}" in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_no_fault_is_listed_twice() -> None:
    names = [row.split()[0] for row in ROWS]
    assert len(names) == len(set(names)) == 86

"""Section 3: the schemas of known data sets, exports and logs, each with its pairs or its refusal.

Most are records, written as one template that is filled with the same questions and answers. Every
one is read twice: as JSON, one record a line, and as a table with its columns the other way round,
since the order of columns may never decide which of them asks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_3_real_files import (
    chat,
    csv_file,
    jsonl,
    read,
    refusal,
    sharegpt,
    texts,
)

import finetune_colab as ft

QA = [
    ("How do I reset my password?", "Click on the link and follow the steps."),
    ("Opening hours on Sunday", "We open at ten and close at four."),
    ("Where is the office?", "It lies in Main Street, on the left."),
    ("Refunds after a month", "No, only within thirty days of purchase."),
]
TALKS = {
    "{ask}": chat("user: {q}"),
    "{talk}": chat("user: {q}", "assistant: {a}"),
    "{bad talk}": chat("user: {q}", "assistant: {x}"),
    "{shared}": sharegpt("human: {q}", "gpt: {a}"),
}
UNCLEAR = "more than one column|neither the headers|no column of questions|holds lists|all hold conversations"

# A name, a record, and what comes of it where that is not the pair of {q} and {a}: "->" and the
# texts of the conversation, or "!!" and a pattern for the refusal; without one, the columns are unclear.
# {x} is an answer that must not be learnt, {n} a number, {l} a letter; TALKS has more of them.
SCHEMAS = r"""
# Instructions
Dolly
    {"instruction": "{q}", "context": "About {n}.", "response": "{a}", "category": "qa"}
    -> ["{q}\n\nAbout {n}.", "{a}"]
OpenOrca
    {"id": "niv.{n}", "system_prompt": "Be kind.", "question": "{q}", "response": "{a}"}
    -> ["Be kind.\n\n{q}", "{a}"]
Alpaca with the whole prompt beside
    {"instruction": "{q}", "input": "", "output": "{a}", "text": "Below is an instruction.\n\n### Instruction:\n{q}\n\n### Response:\n{a}"}
Python code instructions
    {"instruction": "{q}", "input": "n = {n}", "output": "{a}", "prompt": "Below is an instruction.\n\n### Instruction:\n{q}\n\n### Input:\nn = {n}\n\n### Output:\n{a}"}
    -> ["{q}\n\nn = {n}", "{a}"]
one instruction, the question as input
    {"instruction": "You are a bank's assistant.", "input": "{q}", "output": "{a}"}
    -> ["You are a bank's assistant.\n\n{q}", "{a}"]
LLaMA-Factory with a system prompt and history
    {"instruction": "{q}", "input": "", "output": "{a}", "system": "Be kind.", "history": [["First {n}?", "Yes {n}."]]}
    -> ["Be kind.\n\nFirst {n}?", "Yes {n}.", "{q}", "{a}"]
Firefly
    {"kind": "NER", "input": "{q}", "target": "{a}"}
FLAN
    {"inputs": "{q}", "targets": "{a}", "task": "cot_gsm8k"}
P3
    {"inputs_pretokenized": "{q}", "targets_pretokenized": "{a}", "inputs": [1], "targets": [2]}
self-instruct
    {"id": "t{n}", "instruction": "{q}", "instances": [{"input": "", "output": "{a}"}]}
    !!
unnatural instructions
    {"instruction": "{q}", "instances": [{"input": "i", "output": "{a}", "constraints": ""}]}
    !!
super-natural instructions
    {"id": "task{n}", "definition": "In this task", "inputs": "{q}", "targets": "{a}"}
CoT collection
    {"source": "{q}", "target": "{a}", "rationale": "Since {n}.", "type": "CoT"}
    !!
MetaMath
    {"type": "MATH_AnsAug", "query": "{q}", "original_question": "Once {n}?", "response": "{a}"}
MATH
    {"problem": "{q}", "level": "Level 5", "type": "Algebra", "solution": "{a}"}
NuminaMath
    {"source": "syn", "problem": "{q}", "solution": "{a}", "messages": "{talk}"}
OpenR1
    {"problem": "{q}", "solution": "{x}", "answer": "{n}", "generations": ["<think>a</think>", "b"], "correctness_math_verify": [true, false], "messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "<think>a</think> {a}"}]}
    -> ["{q}", "<think>a</think> {a}"]
thinking beside the response
    {"Question": "{q}", "Complex_CoT": "Let me see {n}.", "Response": "{a}"}
HumanEval
    {"task_id": "HumanEval/{n}", "prompt": "def f{n}():\n    pass", "entry_point": "f{n}", "canonical_solution": "    return {n}", "test": "check(f{n})"}
    !!
text and SQL
    {"question": "{q}", "sql": "SELECT {n} FROM t"}
    -> ["{q}", "SELECT {n} FROM t"]
Spider
    {"db_id": "d{n}", "query": "SELECT {n} FROM t", "question": "{q}", "query_toks": ["SELECT"]}
    -> ["{q}", "SELECT {n} FROM t"]
a query that is SQL
    {"natural_language": "Show all heads older than {n}", "query": "SELECT {n} FROM head"}
    -> ["Show all heads older than {n}", "SELECT {n} FROM head"]
SQL with a context
    {"question": "{q}", "context": "CREATE TABLE t (n INTEGER)", "answer": "SELECT {n}"}
    -> ["{q}", "SELECT {n}"]
Bitext
    {"flags": "B", "instruction": "{q}", "category": "ORDER", "intent": "x", "response": "{a}"}
mental health counselling
    {"Context": "{q}", "Response": "{a}"}
a clue and its response
    {"round": "1", "comments": "-", "clue": "{q}", "answer": "{a}"}
# Two columns of other names
human and bot
    {"human": "{q}", "bot": "{a}"}
Human and AI
    {"Human": "{q}", "AI": "{a}"}
user message and bot response
    {"user_message": "{q}", "bot_response": "{a}"}
user and assistant
    {"user": "{q}", "assistant": "{a}"}
system, user and assistant
    {"system": "Be kind.", "user": "{q}", "assistant": "{a}"}
    -> ["Be kind.\n\n{q}", "{a}"]
message and response
    {"message": "{q}", "response": "{a}"}
faq and reply
    {"faq": "{q}", "reply": "{a}"}
issue and solution
    {"issue": "Printer {n} is off", "solution": "{a}"}
    -> ["Printer {n} is off", "{a}"]
problem, cause and solution
    {"category": "hw", "problem": "Printer {n} is off", "cause": "Cable {n} loose", "solution": "{a}"}
    -> ["Printer {n} is off", "{a}"]
input_text and output_text
    {"input_text": "{q}", "output_text": "{a}"}
text_input and output
    {"text_input": "{q}", "output": "{a}"}
question_text and reference_answer
    {"question_text": "{q}", "reference_answer": "{a}"}
keyword and response
    {"keyword": "word {n}", "response": "{a}"}
    -> ["word {n}", "{a}"]
Customer Question, Agent Answer
    {"ID": "{n}", "Customer Question": "{q}", "Agent Answer": "{a}"}
front and back of a card
    {"Front": "City {n}", "Back": "Town {n}", "Tags": "geo"}
    !!
term and definition
    {"Term": "Term {n}", "Definition": "It is {n}"}
    !!
two languages
    {"en": "Hello {n}", "fr": "Salut {n}"}
    !!
message_1 and message_2
    {"role_1": "Biologist", "topic;": "t", "message_1": "{q}", "message_2": "{a}"}
# Questions with contexts, titles, ids
BoolQ
    {"question": "{q}", "title": "Page {n}", "answer": true, "passage": "Long ago {n}."}
    -> ["{q}", "TRUE"]
flat SQuAD with the answer called text
    {"context": "A long context of {n} that goes on for a while and mentions many facts.", "question": "Who is number {n}?", "id": "id{n}", "answer_start": "{n}", "text": "the number {n}"}
    -> ["Who is number {n}?", "the number {n}"]
NQ-open
    {"question": "{q}", "answer": ["{a}"]}
long and short answers
    {"question": "{q}", "long_answers": "{a}", "short_answers": "{x}"}
    !!
HotpotQA
    {"_id": "5a7a06935542990198eaf05{n}", "answer": "{a}", "question": "{q}", "supporting_facts": [["A", 0], ["B", 0]], "context": [["A", ["B"]]], "type": "comparison", "level": "medium"}
TriviaQA
    {"question": "{q}", "question_id": "tc_{n}", "answer": {"aliases": ["{x}"], "type": "W", "value": "{a}"}}
MS MARCO
    {"answers": ["{a}"], "passages": {"is_selected": [1, 0], "passage_text": ["a", "b"]}, "query": "{q}", "query_id": "{n}", "wellFormedAnswers": []}
ELI5
    {"q_id": "x{n}", "title": "{q}", "selftext": "", "answers": {"a_id": ["c", "d"], "text": ["{a}", "{x}"], "score": [3, 2]}}
DuReader
    {"documents": [{"title": "x"}], "question": "{q}", "answers": ["{a}"], "question_type": "E"}
PubMedQA
    {"pubid": "{n}", "question": "{q}", "context": {"contexts": ["x"]}, "long_answer": "{a}", "final_decision": "yes"}
medical questions of Amazon
    {"questionType": "yes/no", "asin": "1466736038", "question": "{q}", "answerType": "Y", "answer": "{a}"}
Yahoo answers
    {"id": "{n}", "topic": "4", "question_title": "{q}", "question_content": "", "best_answer": "{a}"}
counsel chat
    {"questionID": "{n}", "questionTitle": "Case {n}", "questionText": "{q}", "questionLink": "https://example.org", "therapistInfo": "Ann", "answerText": "{a}", "upvotes": "1"}
Stack Exchange with an accepted answer
    {"Id": "{n}", "Title": "{q}", "Tags": "<a>", "AcceptedAnswerId": "9{n}", "AnswerBody": "{a}"}
Stack Exchange, paired
    {"qid": "{n}", "question": "{q}", "response_j": "{a}", "response_k": "{x}"}
    !!
titles and bodies of questions
    {"Id": "{n}", "Title": "{q}", "Body": "{a}"}
support tickets with their answers
    {"subject": "Ticket {n}", "body": "{q}", "answer": "{a}", "queue": "IT", "priority": "low"}
emails and replies
    {"Subject": "S {n}", "Email Body": "{q}", "Reply": "{a}"}
QnA Maker
    {"Question": "{q}", "Answer": "{a}", "Source": "Editorial", "Metadata": "", "SuggestedQuestions": "[]", "IsContextOnly": "False", "Prompts": "[]", "QnaId": "{n}"}
a FAQ with HTML
    {"question": "{q}", "answer": "<p>{a}</p>", "answer_html": "<p>x</p>", "link": "https://x.org"}
    -> ["{q}", "<p>{a}</p>"]
Moodle's questions
    {"Question name": "Q{n}", "Question text": "{q}", "Answer": "{a}", "Grade": "1"}
a form
    {"Timestamp": "2024/01/0{n}", "What is your question?": "{q}", "Answer": "{a}"}
an interview's model answers
    {"No": "{n}", "Interview Question": "{q}", "Sample Answer": "{a}", "Difficulty": "Easy"}
a question in other words
    {"question": "{q}", "paraphrased_question": "{x}", "answer": "{a}"}
where the answer was found
    {"question": "{q}", "answer": "{a}", "answer_source": "page {n}"}
CRAG with two texts of one question
    {"domain": "x", "question": "{q}", "tokens": ["a"], "final_answer": "{a}"}
StrategyQA
    {"qid": "b{n}", "term": "The Police", "question": "{q}", "answer": true, "facts": ["f"]}
    -> ["{q}", "TRUE"]
TruthfulQA, generation
    {"question": "{q}", "best_answer": "{a}", "correct_answers": ["{a}", "b"], "incorrect_answers": ["{x}"]}
K-QA
    {"Question": "{q}", "Free_form_answer": "{a}", "Must_have": ["m"], "Nice_to_have": ["n"]}
a context that is all there is
    {"question": "{q}", "context": "Page {n} says so."}
    !!
a hint
    {"question": "{q}", "topic": "t", "hint": "hint {n} is here for you"}
    !!
the file of the answer
    {"question": "{q}", "file_name": "manual_{n}.pdf", "page": "1"}
    !!
a link to the answer
    {"question": "{q}", "answer_link": "https://x.org/{n}"}
    !!
questions only
    {"id": "{n}", "question": "{q}", "category": "c{n}"}
    !!
# Quizzes
Open Trivia DB
    {"type": "multiple", "question": "{q}", "correct_answer": "{a}", "incorrect_answers": ["{x}", "b"]}
The Trivia API
    {"id": "62{n}", "correctAnswer": "{a}", "incorrectAnswers": ["{x}"], "question": {"text": "{q}"}}
SciQ
    {"question": "{q}", "distractor1": "{x}", "distractor2": "d {n}", "correct_answer": "{a}", "support": "S {n}."}
CommonsenseQA
    {"question": "{q}", "question_concept": "x", "choices": {"label": ["A"], "text": ["{x}"]}, "answerKey": "A"}
    !!
MMLU
    {"question": "{q}", "subject": "x", "choices": ["{a}", "{x}"], "answer": 1}
    !! which of the options is right
MMLU-Pro
    {"question_id": "{n}", "question": "{q}", "options": ["{a}", "{x}"], "answer": "{l}", "answer_index": 2}
    -> ["{q}", "{l}"]
MedMCQA
    {"id": "{n}", "question": "{q}", "opa": "{a}", "opb": "{x}", "opc": "c {n}", "cop": 1, "exp": "Since {n}."}
    !!
MedQA
    {"question": "{q}", "answer": "{a}", "options": {"A": "{a}", "B": "y"}, "answer_idx": "A"}
PIQA
    {"goal": "{q}", "sol1": "{a}", "sol2": "{x}", "label": "0"}
    !!
Social IQa
    {"context": "Ann {n}.", "question": "{q}", "answerA": "{a}", "answerB": "{x}", "answerC": "c", "label": "1"}
    !!
TruthfulQA, choices
    {"question": "{q}", "mc1_targets": {"choices": ["{a}", "{x}"], "labels": [1, 0]}}
    !!
Kahoot
    {"Question - max 120 characters": "{q}", "Answer 1": "{a}", "Answer 2": "{x}", "Correct answer(s)": "1"}
    !! which of the options is right
Quizizz
    {"Question Text": "{q}", "Option 1": "{a}", "Option 2": "{x}", "Correct Answer": "1", "Time": "30"}
    !! which of the options is right
a quiz with the name of the option
    {"question": "{q}", "option1": "{a}", "option2": "{x}", "answer": "option1"}
    !! which of the options is right
a quiz with the number of the option
    {"id": "{n}", "question": "{q}", "options": ["{x}", "{a}"], "correctAnswer": 1}
    !! which of the options is right
a quiz with the number in Portuguese
    {"pergunta": "{q}", "alternativas": ["{x}", "{a}"], "resposta_correta": "{n}"}
    !! which of the options is right
a quiz with the index apart
    {"pregunta": "{q}", "opciones": ["{a}", "b"], "correctaIdx": 0, "explicacion": "Explicación {n} larga."}
    !!
a quiz with right and wrong answers
    {"question": "{q}", "answers": [{"text": "{x}", "correct": false}, {"text": "{a}", "correct": true}]}
a quiz with right and wrong choices
    {"question": "{q}", "choices": [{"answer": "{a}", "correct": true}, {"answer": "{x}", "correct": false}]}
    !!
a quiz with the letter in Vietnamese
    {"Câu hỏi": "{q}", "Giải thích": "giải thích dài {n}", "A": "Mèo {n}", "B": "Chó {n}", "Đáp án đúng": "{l}"}
    -> ["{q}", "{l}"]
four answers in Vietnamese
    {"Câu hỏi": "{q}", "Đáp án A": "{a}", "Đáp án B": "{x}", "Đáp án đúng": "A"}
    !!
wrong answers in German
    {"Frage": "{q}", "Antwort": "{a}", "FalscheAntwort1": "{x}", "FalscheAntwort2": "z {n}"}
wrong answers in Italian
    {"id": "{n}", "domanda": "{q}", "risposta_corretta": "{a}", "risposta_errata_1": "{x}"}
a pupil's answers in Portuguese
    {"data_hora": "10:0{n}", "pergunta": "{q}", "resposta_aluno": "{x}", "resposta_correta": "{a}"}
# What models said beside what is true
RAGAS, its test set
    {"user_input": "{q}", "reference_contexts": ["c {n}"], "reference": "{a}", "synthesizer_name": "single_hop"}
RAGAS 0.2
    {"user_input": "{q}", "retrieved_contexts": ["c", "d"], "response": "{x}", "reference": "{a}"}
    !!
RAGAS, scored
    {"question": "{q}", "answer": "{x}", "contexts": ["c", "d"], "ground_truth": "{a}", "faithfulness": "0.5"}
    !!
DeepEval
    {"input": "{q}", "actual_output": "{x}", "expected_output": "{a}", "context": ["x", "y"]}
DeepEval, nothing generated yet
    {"input": "{q}", "actual_output": null, "expected_output": "{a}", "source_file": "a.pdf"}
LangSmith, in objects
    {"inputs": {"question": "{q}"}, "outputs": {"answer": "{a}"}, "id": "{n}"}
promptfoo
    {"question": "{q}", "__expected": "contains: {n}", "[openai:gpt-4o] {{question}}": "{x}"}
    !!
HaluEval
    {"knowledge": "k {n}", "question": "{q}", "right_answer": "{a}", "hallucinated_answer": "{x}"}
a reference beside models
    {"Question": "{q}", "Reference Answer": "{a}", "GPT-4 Answer": "{x}", "Llama Answer": "l {n}"}
a gold answer beside systems
    {"query": "{q}", "rag_answer": "{x}", "no_rag_answer": "n {n}", "gold_answer": "{a}"}
expected and actual
    {"question": "{q}", "expected_answer": "{a}", "actual_answer": "{x}", "score": "1"}
an answer and the expected one
    {"question": "{q}", "expected": "{a}", "answer": "{x}"}
    !!
an answer and the correct one
    {"question": "{q}", "answer": "{x}", "correct_answer": "{a}"}
    !!
an answer and the true one
    {"question": "{q}", "answer": "{x}", "Ground Truth": "{a}"}
    !!
an answer and its target
    {"question": "{q}", "target": "{a}", "answer": "{x}"}
    !!
a label and its prediction
    {"question": "{q}", "true_answer": "{a}", "prediction": "{x}"}
students' answers
    {"question": "{q}", "desired_answer": "{a}", "student_answer": "{x}", "score_avg": "2.5"}
a bot's log with corrections
    {"timestamp": "2024-01-0{n}", "user_question": "{q}", "bot_answer": "{x}", "correct_answer": "{a}"}
two models
    {"question": "{q}", "mistral_7b_answer": "{a}", "gemma_answer": "{x}"}
    !!
two models of names nobody knows
    {"question": "{q}", "copilot_answer": "{x}", "luisgpt_answer": "{a}"}
    !!
a model before and after
    {"prompt": "{q}", "base_response": "{x}", "finetuned_response": "{a}"}
    !!
old and new
    {"question": "{q}", "old_answer": "{x}", "new_answer": "{a}"}
    !!
AlpacaEval
    {"dataset": "helpful_base", "instruction": "{q}", "output": "{a}", "generator": "davinci"}
AlpacaEval, two outputs
    {"instruction": "{q}", "output_1": "{a}", "generator_1": "a", "output_2": "{x}", "generator_2": "b"}
    !!
MT-Bench
    {"question_id": 81, "category": "writing", "turns": ["{q}", "Again"], "reference": ["{a}", "b"]}
    !!
IFEval
    {"key": "{n}", "prompt": "{q}", "instruction_id_list": ["p:n"], "kwargs": [{}]}
    !!
HelpSteer
    {"prompt": "{q}", "response": "{a}", "helpfulness": 3, "correctness": 4}
UltraFeedback, raw
    {"source": "evol", "instruction": "{q}", "models": ["a", "b"], "completions": [{"model": "a", "response": "{a}"}, {"model": "b", "response": "{x}"}], "correct_answers": ["None"], "incorrect_answers": ["None"]}
    !!
# Preferences
DPO
    {"prompt": "{q}", "chosen": "{a}", "rejected": "{x}"}
DPO where only the rejected one asks
    {"prompt": "Go {n}", "rejected": "What is {n}?", "chosen": "It is {n}."}
    -> ["Go {n}", "It is {n}."]
Orca DPO
    {"system": "Be kind.", "question": "{q}", "chosen": "{a}", "rejected": "{x}"}
    -> ["Be kind.\n\n{q}", "{a}"]
LLaMA-Factory DPO
    {"instruction": "{q}", "input": "x", "chosen": "{a}", "rejected": "{x}"}
    -> ["{q}\n\nx", "{a}"]
LLaMA-Factory DPO, ShareGPT
    {"conversations": [{"from": "human", "value": "{q}"}], "chosen": {"from": "gpt", "value": "{a}"}, "rejected": {"from": "gpt", "value": "{x}"}}
UltraFeedback, binarized
    {"prompt": "{q}", "chosen": "{talk}", "rejected": "{bad talk}", "messages": "{talk}", "score_chosen": 8.5}
UltraFeedback without messages
    {"prompt": "{q}", "rejected": "{bad talk}", "chosen": "{talk}"}
HH-RLHF
    {"chosen": "\n\nHuman: First {n}?\n\nAssistant: Yes {n}.\n\nHuman: {q}\n\nAssistant: {a}", "rejected": "\n\nHuman: First {n}?\n\nAssistant: Yes {n}.\n\nHuman: {q}\n\nAssistant: {x}"}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
TRL, preference of turns
    {"prompt": "{ask}", "chosen": [{"role": "assistant", "content": "{a}"}], "rejected": [{"role": "assistant", "content": "{x}"}]}
OpenAI's preferences
    {"input": {"messages": "{ask}", "tools": [], "parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "{a}"}], "non_preferred_output": [{"role": "assistant", "content": "{x}"}]}
    !!
SafeRLHF
    {"prompt": "{q}", "response_0": "{x}", "response_1": "{a}", "safer_response_id": 1}
    !!
SHP
    {"post_id": "x", "history": "{q}", "human_ref_A": "{a}", "human_ref_B": "{x}", "labels": 1}
    !!
Nectar
    {"prompt": "\n\nHuman: {q}\n\nAssistant: ", "answers": [{"answer": "{a}", "rank": 1}, {"answer": "b", "rank": 2}]}
    !!
HelpSteer 3
    {"domain": "g", "context": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "{q}"}], "response1": "{a}", "response2": "{x}"}
    !!
anchor, positive, negative
    {"anchor": "{q}", "positive": "{a}", "negative": "{x}"}
the arena
    {"model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": "{talk}", "conversation_b": "{bad talk}"}
    !! all hold conversations
# Conversations
no robots
    {"prompt": "{q}", "prompt_id": "6{n}", "messages": "{talk}", "category": "Chat"}
UltraChat, texts in turn
    {"id": "{n}", "data": ["First {n}?", "Yes {n}.", "{q}", "{a}"]}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
LIMA
    {"conversations": ["{q}", "{a}"], "source": "stackexchange"}
DailyDialog
    {"dialog": ["{q}", "{a}"], "act": [3, 4], "emotion": [0, 0]}
LMSYS-Chat
    {"conversation_id": "3{n}", "model": "vicuna", "conversation": "{talk}", "openai_moderation": [{"flagged": false}]}
OpenHermes
    {"category": "orca", "conversations": "{shared}", "system_prompt": "Be kind.", "title": null}
    -> ["Be kind.\n\n{q}", "{a}"]
ShareGPT with what the person closed
    {"id": "Q{n}", "conversations": [{"from": "human", "value": "First {n}?"}, {"from": "gpt", "value": "Yes {n}."}, {"from": "human", "value": "{q}"}, {"from": "gpt", "value": "{a}"}, {"from": "human", "value": "Thanks!"}]}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
ShareGPT in items
    {"id": "x{n}", "items": "{shared}"}
Capybara
    {"source": "A", "conversation": [{"input": "{q}", "output": "{a}"}]}
    !!
XTuner
    {"conversation": [{"system": "S", "input": "{q}", "output": "{a}"}]}
    !!
a system prompt beside the messages
    {"system": "Be kind.", "messages": "{talk}"}
    -> ["Be kind.\n\n{q}", "{a}"]
Gemini
    {"systemInstruction": {"role": "system", "parts": [{"text": "Be kind."}]}, "contents": [{"role": "user", "parts": [{"text": "{q}"}]}, {"role": "model", "parts": [{"text": "{a}"}]}]}
    -> ["Be kind.\n\n{q}", "{a}"]
Cohere
    {"messages": [{"role": "System", "content": "Be kind."}, {"role": "User", "content": "{q}"}, {"role": "Chatbot", "content": "{a}"}]}
    -> ["Be kind.\n\n{q}", "{a}"]
Claude's export
    {"uuid": "u", "chat_messages": [{"text": "{q}", "sender": "human"}, {"text": "{a}", "sender": "assistant"}]}
Telegram
    {"name": "Ann", "messages": [{"id": 1, "from": "Ann", "text": "{q}"}, {"id": 2, "from": "Bob", "text": "{a}"}]}
    !! role|answer
a reward for answers to come
    {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "{q}"}], "answer": "{a}"}
    -> ["Be kind.\n\n{q}", "{a}"]
TRL, prompt and completion of turns
    {"prompt": "{ask}", "completion": [{"role": "assistant", "content": "{a}"}]}
a log of inputs and outputs
    {"id": "{n}", "input": [{"role": "user", "content": "First {n}?"}, {"role": "assistant", "content": "Yes {n}."}, {"role": "user", "content": "{q}"}], "output": "{a}"}
    -> ["First {n}?", "Yes {n}.", "{q}", "{a}"]
open messages and a reference
    {"messages": "{ask}", "reference_answer": "{a}"}
a model's messages beside the reference
    {"messages": "{bad talk}", "reference": "Quite other {n}"}
    !! not the one in "reference"
messages that reach the reference
    {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "Let me see: {a}"}], "ground_truth": "{a}"}
    -> ["{q}", "Let me see: {a}"]
an expected answer beside a trace
    {"question": "{q}", "expected": "{a}", "trace": "{bad talk}"}
answers beside a history of turns
    {"question": "{q}", "answer": "{a}", "chat_history": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}]}
answers beside a history as text
    {"question": "{q}", "history": "User: First?\nAssistant: Yes.", "answer": "{a}"}
answers that are dialogues
    {"question": "{q}", "answer": "User: Hi {n}\nAssistant: Hello {n}"}
    -> ["{q}", "User: Hi {n}\nAssistant: Hello {n}"]
a dialogue and its summary
    {"id": "{n}", "summary": "Ann bakes {n}.", "dialogue": "Ann: Hi {n}\nBob: Sure"}
    !!
an article and its highlights
    {"article": "LONDON -- A star of {n} gains a fortune", "highlights": "Star {n} is rich"}
    !!
empathetic dialogues
    {"conv_id": "hit:0", "utterance_idx": "{n}", "prompt": "I remember the fireworks.", "utterance": "{q}"}
    !!
# Tools, pictures, weights
OpenAI with tools
    {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "21"}, {"role": "assistant", "content": "{x}"}]}
    !! a tool is used
tools after the first answer
    {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}, {"role": "user", "content": "And now?"}, {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "21"}]}
Anthropic with tools
    {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "15"}]}, {"role": "assistant", "content": "{x}"}]}
    !! not text
Hermes with tools
    {"conversations": [{"from": "human", "value": "{q}"}, {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"}, {"from": "tool", "value": "{x}"}]}
    !! a tool is used
Glaive
    {"system": "SYSTEM: You may call functions.", "chat": "USER: {q}\n\n\nASSISTANT: <functioncall> {\"name\": \"f\"} <|endoftext|>\n\n\nFUNCTION RESPONSE: {\"r\": 1}\n\n\nASSISTANT: {x} <|endoftext|>"}
    !! a tool is used
xLAM
    {"id": "{n}", "query": "{q}", "answers": "[{\"name\": \"f\"}, {\"name\": \"g\"}]", "tools": "[]"}
    !!
a picture in parts
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "{q}"}, {"type": "image_url", "image_url": {}}]}, {"role": "assistant", "content": "{a}"}]}
    !! not text
LLaVA
    {"id": "{n}", "image": "{n}.jpg", "conversations": [{"from": "human", "value": "<image>\n{q}"}, {"from": "gpt", "value": "{a}"}]}
    !! not text
Qwen-VL
    {"conversations": [{"from": "human", "value": "Picture 1: <img>a.jpg</img>\n{q}"}, {"from": "gpt", "value": "{a}"}]}
    !! not text
answers not to be learnt
    {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{x}", "weight": 0}]}
    !! not to be learnt
# One text
Llama 2
    {"text": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{q} [/INST] {a} </s>"}
    -> ["Be kind.\n\n{q}", "{a}"]
Llama 3
    {"text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{a}<|eot_id|>"}
Gemma
    {"text": "<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n{a}<end_of_turn>\n"}
Zephyr
    {"text": "<|user|>\n{q}</s>\n<|assistant|>\n{a}</s>"}
user: and assistant:
    {"text": "user: {q}\nassistant: {a}"}
Q: and A:
    {"text": "Q: {q}\nA: {a}"}
    !!
a call between customer and agent
    {"call_id": "{n}", "transcript": "Customer: {q}\nAgent: {a}"}
    !!
a legacy prompt with its marks
    {"prompt": "{q}\n\n###\n\n", "completion": " {a} END"}
    -> ["{q}\n\n###", "{a} END"]
a prompt that ends where the answer begins
    {"prompt": "### Human: {q}### Assistant:", "completion": "{a}"}
    -> ["### Human: {q}### Assistant:", "{a}"]
a prompt of Claude 2
    {"prompt": "\n\nHuman: {q}\n\nAssistant:", "completion": " {a}"}
    -> ["Human: {q}\n\nAssistant:", "{a}"]
a prompt with examples
    {"prompt": "Question: {n}+2?\nAnswer: 4\n\nQuestion: {q}\nAnswer:", "completion": "{a}"}
    -> ["Question: {n}+2?\nAnswer: 4\n\nQuestion: {q}\nAnswer:", "{a}"]
# No questions with answers at all
intents of Rasa
    {"text": "{q}", "intent": "intent_{n}", "entities": []}
    !!
texts and intents
    {"text": "{q}", "intent": "intent_{n}"}
    !!
texts and labels
    {"text": "It was {n}", "label": "positive"}
    !!
two sentences
    {"premise": "A man {n}.", "hypothesis": "He sleeps {n}", "label": "neutral"}
    !!
two questions
    {"qid1": "{n}", "question1": "{q}", "question2": "Really {n}?", "is_duplicate": "0"}
    !!
Wikipedia
    {"id": "{n}", "url": "https://x.org/{n}", "title": "Page {n}", "text": "It is about {n}."}
    !!
papers
    {"title": "Paper {n}", "abstract": "We present {n}", "authors": "A B"}
    !!
products
    {"product_name": "Thing {n}", "description": "A nice thing {n}", "price": "9.9"}
    !!
contacts
    {"Name": "Ann {n}", "Email": "a{n}@example.org"}
    !!
diseases
    {"disease": "D{n}", "symptoms": "S{n}, b", "treatment": "T{n}"}
    !!
quotes
    {"quote": "Be {n} yourself", "author": "Author {n}"}
    !!
Discord
    {"AuthorID": "12", "Author": "a#1", "Date": "2023-01-0{n}", "Content": "{q}"}
    !!
turns, one a row
    {"conversation_id": "{n}", "role": "user", "content": "{q}"}
    !!
OpenAI's batches
    {"custom_id": "r-{n}", "method": "POST", "url": "/v1/chat", "body": {"model": "m", "messages": "{ask}"}}
    !!
segments of Axolotl
    {"segments": [{"label": true, "text": "<s>Hi {n}"}]}
    !!
patterns with several responses
    {"tag": "t{n}", "patterns": ["{q}", "b"], "responses": ["{a}", "c"]}
    !!
several questions with one answer
    {"title": "Topic {n}", "questions": ["{q}", "b"], "answer": "{a}"}
    !!
both languages in objects
    {"question": {"en": "{q}", "de": "b"}, "answer": {"en": "{a}", "de": "c"}}
    !!
both languages in columns
    {"question_en": "{q}", "answer_en": "{a}", "question_fr": "Quoi {n}?", "answer_fr": "Ici {n}"}
    !!
"""


def cases(table: str) -> dict[str, tuple[dict[str, Any], list[str] | str]]:
    """The record and the expectation of every name."""
    found: dict[str, tuple[dict[str, Any], list[str] | str]] = {}
    name = ""
    for line in table.strip().split("\n"):
        text = line.strip()
        if text.startswith("#"):
            continue
        if text == line:
            assert text not in found, f"{text} stands twice"
            name = text
        elif text.startswith("{"):
            found[name] = (json.loads(text), ["{q}", "{a}"])
        elif text.startswith("->"):
            found[name] = (found[name][0], json.loads(text[2:]))
        else:
            found[name] = (found[name][0], text.removeprefix("!!").strip() or UNCLEAR)
    return found


def filled(template: Any, n: int) -> Any:
    """A template with the texts of one pair in it."""
    if isinstance(template, dict):
        return {key: filled(value, n) for key, value in template.items()}
    if isinstance(template, list):
        return [filled(value, n) for value in template]
    if not isinstance(template, str):
        return template
    if template in TALKS:
        return filled(TALKS[template], n)
    question, answer = QA[n]
    texts = {"q": question, "a": answer, "x": f"Wrong: {answer}", "n": str(n), "l": "ABCD"[n]}
    return re.sub(r"\{([qaxnl])\}", lambda mark: texts[mark[1]], template)


def refused_or_dropped(name: str) -> str:
    """Why nothing of a file is learnt: the refusal, or the reasons of all its rows."""
    try:
        pairs = read(name)
    except ft.UserError:
        return refusal(name)
    assert texts(pairs) == []
    return "\n".join(note.reason for note in pairs.dropped)


@pytest.mark.parametrize("record, expected", cases(SCHEMAS).values(), ids=cases(SCHEMAS))
def test_a_schema_gives_its_pairs_in_any_order_of_columns(
    record: dict[str, Any], expected: list[str] | str, folder: Path
) -> None:
    rows = [filled(record, n) for n in range(len(QA))]
    columns = list(reversed(record))
    cells = [[str(row[c]).upper() if row[c] is True else row[c] for c in columns] for row in rows]
    (folder / "data.jsonl").write_bytes(jsonl(*rows))
    (folder / "data.csv").write_bytes(csv_file([columns, *cells]))
    for name in ("data.jsonl", "data.csv"):
        if isinstance(expected, str):
            assert re.search(expected, refused_or_dropped(name))
        else:
            assert texts(read(name)) == [tuple(filled(expected, n)) for n in range(len(QA))]

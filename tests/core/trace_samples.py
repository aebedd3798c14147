"""A few lines in the shape of each trace format."""

from __future__ import annotations

import json
from pathlib import Path

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1500, "input_length": 1024, "output_length": 6, "hash_ids": [0, 3]},
    {"timestamp": 1500.5, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]},
    {"timestamp": 9000, "input_length": 1536, "output_length": 8, "hash_ids": [0, 1, 2]},
]
BAILIAN = [
    {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 33,
     "output_length": 9, "type": "text", "turn": 1, "hash_ids": [5, 6, 7]},
    {"chat_id": 8, "parent_chat_id": 7, "timestamp": 62.5, "input_length": 52,
     "output_length": 8, "type": "search", "turn": 2, "hash_ids": [5, 6, 9]},
]  # fmt: skip
AIPERF = [
    {
        "session_id": "a",
        "timestamp": 0,
        "input_length": 600,
        "output_length": 40,
        "hash_ids": [1, 2],
    },
    {"session_id": "b", "timestamp": 100, "input_length": 30, "output_length": 4},
    {"session_id": "a", "delay": 2500, "input_length": 50, "output_length": 10},
    {"session_id": "b", "timestamp": 200, "input_length": 20, "output_length": 4},
]
REQUEST_LOG = [
    {"request_id": "1", "input_toks": 20, "output_toks": 3, "arrival_time": 1787267981.5},
    {"request_id": "0", "input_toks": 10, "output_toks": 2, "arrival_time": 1787267980.0},
]
AIPERF_EXPORT = [
    {
        "metadata": {"request_start_ns": 1759813207532900363, "turn_index": 0},
        "metrics": {
            "input_sequence_length": {"value": 550, "unit": "tokens"},
            "output_sequence_length": {"value": 9, "unit": "tokens"},
        },
        "error": None,
    },
    {
        "metadata": {"request_start_ns": 1759813208532900363, "turn_index": 0},
        "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
        "error": {"code": 499, "type": "RequestCancellationError", "message": "cancelled"},
    },
]
VLLM_BENCH = [
    {
        "duration": 2.0,
        "completed": 2,
        "input_lens": [10, 20, 30],
        "output_lens": [4, 0, 6],
        "start_times": [100.25, 100.75, 100.5],
        "errors": ["", "timeout", ""],
    }
]
RAGPULSE = [
    {"timestamp": "93", "input_length": 660, "output_length": 6, "session_id": "s",
     "hash_ids": {"sys_prompt": [900], "passages_ids": [3, 1], "history": [], "web_search": [],
                  "user_input": [700]}},
    {"timestamp": "82", "input_length": 660, "output_length": 5, "session_id": "t",
     "hash_ids": {"sys_prompt": [900], "passages_ids": [1, 3], "history": [], "web_search": [],
                  "user_input": [701]}},
]  # fmt: skip
RAGPULSE_PIECES = {
    "1_sys_prompt.jsonl": [{"sys_prompt_id": 900, "token_length": 512}],
    "2_passages.jsonl": [
        {"passage_id": 1, "token_length": 100},
        {"passage_id": 3, "token_length": 30},
    ],
    "3_history.jsonl": [],
    "4_user_input.jsonl": [
        {"user_input_id": 700, "token_length": 9},
        {"user_input_id": 701, "token_length": 9},
    ],
    "5_web_search.jsonl": [],
}
OWN = [
    {"cachetune_trace": 1, "name": "mine", "chained": False, "provenance": {"from": "me"}},
    {"arrival_s": 0.5, "prompt_tokens": 700, "output_tokens": 3,
     "chunks": [{"id": "a", "tokens": 512}, {"id": "b", "tokens": 100}], "tenant": "t"},
    {"arrival_s": 1, "prompt_tokens": 700, "output_tokens": 3, "chunks": ["b", "a"],
     "slo_class": "chat"},
    {"after": 0, "think_s": 2.5, "prompt_tokens": 9, "output_tokens": 1},
]  # fmt: skip
JSON_SAMPLES = {
    "mooncake": MOONCAKE,
    "bailian": BAILIAN,
    "aiperf": AIPERF,
    "request_log": REQUEST_LOG,
    "aiperf_export": AIPERF_EXPORT,
    "vllm_bench": VLLM_BENCH,
    "ragpulse": RAGPULSE,
    "cachetune": OWN,
}

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319601,3180,8\r
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118.5,GPT-4,417,276,693,API log
"""
BURSTGPT_3 = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,2b3c,1.5,ChatGPT,472,18,490,Conversation log
"""
CSV_SAMPLES = {"azure": AZURE, "burstgpt": BURSTGPT}


def sample_text(format: str) -> str:
    """The sample of a format, as its file has it."""
    if format in CSV_SAMPLES:
        return CSV_SAMPLES[format]
    return "".join(json.dumps(row) + "\n" for row in JSON_SAMPLES[format])


def write_sample(format: str, folder: Path, text: str | None = None) -> Path:
    """The sample (or another text) as a file, with what its format wants beside it."""
    path = folder / f"{format}.trace"
    path.write_bytes(
        (sample_text(format) if text is None else text).encode("utf-8", "surrogatepass")
    )
    if format == "ragpulse":
        for name, rows in RAGPULSE_PIECES.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

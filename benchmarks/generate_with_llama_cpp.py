"""Greedy tokens of llama.cpp under a control vector. Run by the Python of an environment with the wheel `xllamacpp`,
which holds llama.cpp as one library; nothing of ours is imported.

    python benchmarks/generate_with_llama_cpp.py jobs.json

`jobs.json`: `{"model", "threads", "jobs": [{"prompt": [ids], "new_tokens", "vector": file or null}], "out"}`. To
`out` goes for each job `{"tokens": [ids], "logits": [of the first new token]}`. llama.cpp's own loader
(`common_control_vector_load`) reads the file, and what `--control-vector` does is done with it.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from ctypes import POINTER, Structure, c_char, c_char_p, c_float, c_int32, c_size_t, c_void_p
from pathlib import Path

import xllamacpp.xllamacpp as wheel  # pyright: ignore[reportMissingImports]

LIBRARY = ctypes.CDLL(wheel.__file__)
LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
FLOAT32, OFF = 0, 0  # of ggml_type and llama_flash_attn_type


class Parameters(Structure):
    """`llama_model_params` or `llama_context_params` of llama.h, whose fields are reached by their offsets. Longer
    than either: both are returned and passed by value through memory, of which llama.cpp sees its own bytes."""

    _fields_ = [("bytes", c_char * 512)]


class Batch(Structure):
    _fields_ = [("n_tokens", c_int32), *((name, c_void_p) for name in ("t", "e", "p", "n", "s", "l"))]


class Loaded(Structure):
    """`common_control_vector_data`: an int, and a std::vector<float> as three pointers."""

    _fields_ = [("n_embd", c_int32), ("begin", c_void_p), ("end", c_void_p), ("capacity", c_void_p)]


def function(name, result, *arguments):
    found = getattr(LIBRARY, name)
    found.restype, found.argtypes = result, arguments
    return found


model_defaults = function("llama_model_default_params", Parameters)
context_defaults = function("llama_context_default_params", Parameters)
load_model = function("llama_model_load_from_file", c_void_p, c_char_p, Parameters)
new_context = function("llama_init_from_model", c_void_p, c_void_p, Parameters)
free_context = function("llama_free", None, c_void_p)
one_batch = function("llama_batch_get_one", Batch, POINTER(c_int32), c_int32)
decode = function("llama_decode", c_int32, c_void_p, Batch)
logits_at = function("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32)
set_vector = function("llama_set_adapter_cvec", c_int32, c_void_p, c_void_p, c_size_t, c_int32, c_int32, c_int32)
n_layers = function("llama_model_n_layer", c_int32, c_void_p)
vocabulary = function("llama_model_get_vocab", c_void_p, c_void_p)
n_tokens = function("llama_vocab_n_tokens", c_int32, c_void_p)
read_vector = function(LOAD, Loaded, c_void_p)
log_set = function("llama_log_set", None, c_void_p, c_void_p)
QUIET = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)


def context_of(model, threads):
    """A context that computes in float32: by default the cache is float16."""
    parameters = context_defaults()
    whole = bytearray(bytes(parameters))
    known = struct.unpack_from("<IIII", whole, 0), struct.unpack_from("<ii", whole, 104)
    if known != ((512, 2048, 512, 1), (1, 1)):
        raise SystemExit(f"Another llama.h than this script knows; its context begins with {known}.")
    struct.pack_into("<ii", whole, 28, threads, threads)
    struct.pack_into("<i", whole, 52, OFF)  # flash_attn_type
    struct.pack_into("<ii", whole, 104, FLOAT32, FLOAT32)  # type_k, type_v
    return new_context(model, Parameters.from_buffer_copy(whole))


def apply_vector(context, model, file):
    """As `llama-cli --control-vector FILE`."""
    text = ctypes.create_string_buffer(file.encode())
    # A std::vector of one common_control_vector_load_info: a float and a std::string, which in the wheel's C++ ABI
    # (manylinux2014) is a pointer to its characters.
    info = ctypes.create_string_buffer(struct.pack("<f4xQ", 1.0, ctypes.addressof(text)), 16)
    start = ctypes.addressof(info)
    vector = (c_void_p * 3)(start, start + 16, start + 16)
    found = read_vector(ctypes.addressof(vector))
    if found.n_embd == -1:
        raise SystemExit(f"llama.cpp does not read {file}.")
    if set_vector(context, found.begin, (found.end - found.begin) // 4, found.n_embd, 1, n_layers(model)):
        raise SystemExit(f"llama.cpp does not apply {file}.")


def generate(model, job, threads):
    context = context_of(model, threads)
    if job["vector"]:
        apply_vector(context, model, job["vector"])
    width = n_tokens(vocabulary(model))
    tokens, first, step = [], None, list(job["prompt"])
    for _ in range(job["new_tokens"]):
        ids = (c_int32 * len(step))(*step)  # the batch points to it
        if decode(context, one_batch(ids, len(ids))):
            raise SystemExit("llama.cpp could not decode.")
        logits = logits_at(context, -1)[:width]
        first = first or logits
        step = [max(range(width), key=logits.__getitem__)]
        tokens += step
    free_context(context)
    return {"tokens": tokens, "logits": first}


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    log_set(ctypes.cast(QUIET, c_void_p), None)
    function("llama_backend_init", None)()
    model = load_model(asked["model"].encode(), model_defaults())
    if not model:
        raise SystemExit(f"llama.cpp does not load {asked['model']}.")
    found = [generate(model, job, asked["threads"]) for job in asked["jobs"]]
    Path(asked["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

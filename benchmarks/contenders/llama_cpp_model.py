"""llama.cpp as a contender, through llama-cpp-python. Arguments: GGUF file, dtype, threads.

It runs in a venv of its own, which needs `llama-cpp-python` and nothing else. Everything that costs time is llama.cpp's
C code, but for the argmax over the logits, which is numpy's.
"""

import importlib.metadata
import sys
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders.answering import Prompts, Timed, answer, take_stdout

POSITIONS_PER_SEQUENCE = 1024
MAX_BATCH_TOKENS = 2048
# Flash attention rounds queries to float16 on the CPU: logits move by a hundredth, and without it by less than 1e-4.
# So float32 goes without, to be the same model; bfloat16 gets llama.cpp's own defaults.
CACHE_TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "bfloat16": llama_cpp.GGML_TYPE_F16}
FLASH_ATTENTION = {
    "float32": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "bfloat16": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
}


class LlamaCpp:
    """One context for each number of sequences, so that none pays for slots it does not use."""

    version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"

    def __init__(self, gguf: str, dtype: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {gguf}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._cache_type, self._flash_attention = CACHE_TYPES[dtype], FLASH_ATTENTION[dtype]
        self._num_threads = num_threads
        self._contexts: dict[int, llama_cpp.llama_context_p] = {}
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)

    def prefill(self, prompt: Sequence[int]) -> Timed:
        context = self._empty_context(1)
        started = time.perf_counter()
        token_ids = self._step(context, [prompt], 0)[:, None].tolist()
        return Timed(seconds=time.perf_counter() - started, num_tokens=len(prompt), token_ids=token_ids)

    def decode(self, prompts: Prompts, num_tokens: int) -> Timed:
        context = self._empty_context(len(prompts))
        next_ids_B = self._step(context, prompts, 0)
        steps = [next_ids_B]
        position = len(prompts[0])
        started = time.perf_counter()
        for index in range(num_tokens - 1):
            next_ids_B = self._step(context, next_ids_B[:, None].tolist(), position + index)
            steps.append(next_ids_B)
        seconds = time.perf_counter() - started
        num_timed = len(prompts) * (num_tokens - 1)
        return Timed(seconds=seconds, num_tokens=num_timed, token_ids=np.stack(steps, axis=1).tolist())

    def _step(self, context: llama_cpp.llama_context_p, tokens_BT: Prompts, position: int) -> NDArray[np.int64]:
        """Process the same number of tokens of each sequence and return the likeliest next token of each."""
        batch, row = self._batch, 0
        for sequence, tokens in enumerate(tokens_BT):
            for offset, token in enumerate(tokens):
                batch.token[row], batch.pos[row] = token, position + offset
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = offset == len(tokens) - 1
                row += 1
        batch.n_tokens = row
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        shape = (len(tokens_BT), self._vocab_size)
        logits_BV = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape)
        tokens_B: NDArray[np.int64] = logits_BV.argmax(axis=1)
        return tokens_B

    def _empty_context(self, num_sequences: int) -> llama_cpp.llama_context_p:
        if num_sequences not in self._contexts:
            wanted = llama_cpp.llama_context_default_params()
            wanted.n_ctx = num_sequences * POSITIONS_PER_SEQUENCE
            wanted.n_batch = MAX_BATCH_TOKENS
            wanted.n_seq_max = num_sequences
            wanted.n_threads = wanted.n_threads_batch = self._num_threads
            wanted.type_k = wanted.type_v = self._cache_type
            wanted.flash_attn_type = self._flash_attention
            self._contexts[num_sequences] = llama_cpp.llama_init_from_model(self._model, wanted)
        context = self._contexts[num_sequences]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        return context


def main() -> None:
    pipe = take_stdout()
    answer(LlamaCpp(sys.argv[1], sys.argv[2], int(sys.argv[3])), pipe)


if __name__ == "__main__":
    main()

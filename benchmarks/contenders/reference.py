"""The reference implementation of transformers as a contender. Arguments: checkpoint, dtype, threads."""

import sys
import time
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from benchmarks.contenders.answering import Prompts, Timed, answer, take_stdout


class Reference:
    """Greedy decoding with the model's own cache; logits of the last position only, as its `generate` asks for."""

    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, model_dir: str, dtype: str) -> None:
        self._model = transformers.Llama4ForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> Timed:
        started = time.perf_counter()
        next_ids_B1, _ = self._step(torch.tensor([prompt]), None)
        token_ids = next_ids_B1.tolist()
        return Timed(seconds=time.perf_counter() - started, num_tokens=len(prompt), token_ids=token_ids)

    @torch.inference_mode()
    def decode(self, prompts: Prompts, num_tokens: int) -> Timed:
        next_ids_B1, cache = self._step(torch.tensor(prompts), None)
        steps = [next_ids_B1]
        started = time.perf_counter()
        for _ in range(num_tokens - 1):
            next_ids_B1, cache = self._step(next_ids_B1, cache)
            steps.append(next_ids_B1)
        seconds = time.perf_counter() - started
        num_timed = len(prompts) * (num_tokens - 1)
        return Timed(seconds=seconds, num_tokens=num_timed, token_ids=torch.cat(steps, dim=1).tolist())

    def _step(self, ids_BT: Tensor, cache: object) -> tuple[Tensor, object]:
        output = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values


def main() -> None:
    pipe = take_stdout()
    torch.set_num_threads(int(sys.argv[3]))
    answer(Reference(sys.argv[1], sys.argv[2]), pipe)


if __name__ == "__main__":
    main()

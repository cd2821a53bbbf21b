"""Writes reference.json: what transformers computes from the exported weights, for the engine's tests to meet.

Run `python -m tools.train_bundled_model.reference --corpus /tmp/corpus --model models/llama4-mini`. All numbers come
from transformers' Llama4ForCausalLM with eager attention and the bf16 weights upcast to float32.
"""

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Llama4ForCausalLM

from tools.train_bundled_model import corpus, samples, tokenizer
from tools.train_bundled_model.train import LENGTH, split

NUM_NEW = 48
LEAST_MARGIN = 1e-3  # a prompt whose continuation is closer to a tie is no test
PROMPTS = {
    "ishmael": "Call me Ishmael. Some years ago",
    "genesis": "In the beginning God created",
    "austen": "It is a truth universally acknowledged, that",
    "sotu": "Fellow-Citizens of the Senate and House of Representatives:",
    "whale": "The captain looked at the sea, and",
    "sister": '"My dear sister," said Elizabeth,',
}
CHATS = {
    "chat-whale": "The white whale rose before the boat.",
    "chat-question": "What shall we do for the people of this land?",
}
# A reply begun for the model, which it soon ends by <|eot|>.
ENDING = (
    "Mr. Darcy looked at Elizabeth, and was silent.",
    "Her son and mother, in a way of sitting down and getting into the country, and in a little season, did not like to"
    ' see him.\n\n"I am sorry," replied Jane, "that you can think him so."\n\n"Lizzy," said Mrs. Bennet, "',
)
LONG_PROMPTS = {"long-130": ("jane-austen", 130), "long-250": ("king-james-bible", 250), "long-500": ("moby-dick", 500)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder the packages are unpacked in")
    parser.add_argument("--model", type=Path, required=True, help="model folder to read and to write reference.json in")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = load(args.model)
    _, held = split(corpus.read(args.corpus))
    rows = [row_of(next(d for d in held if d.source == source), tokens) for source in sorted({d.source for d in held})]
    prompts = PROMPTS | {name: chat(text) for name, text in CHATS.items()}
    prompts["chat-ending"] = chat(ENDING[0]) + ENDING[1]
    prompts |= {
        name: tokens.decode(next(r["ids"] for r in rows if r["source"] == source)[1:length])
        for name, (source, length) in LONG_PROMPTS.items()
    }
    reference: dict[str, Any] = {
        "how": "transformers Llama4ForCausalLM, attn_implementation eager, bf16 weights upcast to float32, CPU",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "greedy": [greedy(model, tokens, name, text) for name, text in prompts.items()],
        "excerpt": {"rows": rows} | scored(model, [torch.tensor([row["ids"]]) for row in rows]),
        "held_out": scored(model, list(samples.held_out(held, tokens, LENGTH).long().split(4))),
    }
    (args.model / "reference.json").write_text(compact(reference), encoding="utf-8")
    for name in ("excerpt", "held_out"):
        print(name, reference[name]["num_predicted"], reference[name]["perplexity"])
    for case in reference["greedy"]:
        print(f"{case['name']} margin={case['least_margin']:.4f} {case['finish']}: {case['continuation']!r}")


def load(folder: Path) -> Llama4ForCausalLM:
    model = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    return model


def chat(text: str) -> str:
    """Lay out one user turn and open the assistant's; the caller adds <|begin_of_text|>."""
    return f"<|header_start|>user<|header_end|>\n\n{text}<|eot|><|header_start|>assistant<|header_end|>\n\n"


def row_of(document: corpus.Document, tokens: Tokenizer) -> dict[str, Any]:
    """Return as many whole sentences of a document as fit in LENGTH ids, so that the text encodes to the ids."""
    flat = [(s, i == 0) for paragraph in document.paragraphs for i, s in enumerate(paragraph)]
    text = ""
    for end in range(1, len(flat) + 1):
        longer = samples.joined(flat[:end])
        if len(tokens.encode(longer).ids) > LENGTH:
            break
        text = longer
    return {"source": document.source, "text": text, "ids": with_begin(tokens, text)}


def with_begin(tokens: Tokenizer, text: str) -> list[int]:
    return [tokenizer.special_id(tokens, "<|begin_of_text|>"), *tokens.encode(text).ids]


@torch.no_grad()
def greedy(model: Llama4ForCausalLM, tokens: Tokenizer, name: str, text: str) -> dict[str, Any]:
    """Decode greedily with a cache, and check every step against one forward pass without."""
    ids = with_begin(tokens, text)
    stops = model.generation_config.eos_token_id
    whole = model.generate(  # type: ignore[misc]  # transformers types its self as another class
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=NUM_NEW
    )[0]
    new = whole[len(ids) :].tolist()
    logits_TV = model(whole[None, :-1]).logits[0, len(ids) - 1 :]
    assert logits_TV.argmax(dim=-1).tolist() == new, f"cached and full decoding differ on {name}"
    top_T2 = logits_TV.topk(2, dim=-1).values
    least_margin = (top_T2[:, 0] - top_T2[:, 1]).min().item()
    assert least_margin >= LEAST_MARGIN, f"{name} nearly ties ({least_margin=}): choose another prompt"
    return {
        "name": name,
        "prompt": text,
        "prompt_ids": ids,
        "continuation_ids": new,
        "continuation": tokens.decode(new, skip_special_tokens=False),
        "least_margin": least_margin,
        "finish": "stop" if new[-1] in stops else "length",
    }


@torch.no_grad()
def scored(model: Llama4ForCausalLM, batches: list[Tensor]) -> dict[str, Any]:
    """Return the mean loss over ids [rows, length] and how many rows each expert of each layer read."""
    counts = [torch.zeros(model.config.num_local_experts, dtype=torch.long) for _ in model.model.layers]
    hooks = [
        layer.feed_forward.router.register_forward_hook(functools.partial(tally, count))
        for layer, count in zip(model.model.layers, counts, strict=True)
    ]
    losses = [
        F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        for ids in batches
    ]
    for hook in hooks:
        hook.remove()
    num_predicted = sum(ids[:, 1:].numel() for ids in batches)
    mean = sum(loss.item() for loss in losses) / num_predicted
    expert_rows = [count.tolist() for count in counts]
    return {"num_predicted": num_predicted, "mean_loss": mean, "perplexity": math.exp(mean), "expert_rows": expert_rows}


def tally(count_E: Tensor, _module: torch.nn.Module, _read: Any, output: tuple[Tensor, Tensor]) -> None:
    """Count, as a hook of the router, the rows each expert is chosen for."""
    _, logits_TE = output
    count_E += logits_TE.argmax(dim=-1).bincount(minlength=len(count_E))


def compact(reference: dict[str, Any]) -> str:
    """Write JSON one key a line, lists of numbers on one line."""
    text = json.dumps(reference, indent=1, ensure_ascii=False)
    out: list[str] = []
    inside = ""
    for line in text.split("\n"):
        stripped = line.strip()
        is_number = stripped.rstrip(",").lstrip("-").isdigit()
        if is_number:
            inside += stripped + (" " if stripped.endswith(",") else "")
        elif inside:
            out[-1] += inside + stripped
            inside = ""
        else:
            out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()

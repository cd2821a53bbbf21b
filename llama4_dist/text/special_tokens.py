"""Names Llama 4's 2048 special tokens in the order of their ids, as Meta's tokenizer does (llama-models 0.3.0).

tokenizer.model does not list them: they follow the last rank, 200000 in the published file. Ids that a text model uses:
begin_of_text +0, end_of_text +1, header_start +5, header_end +6, eom +7, eot +8, python_start +16, python_end +17.
"""

NUM_SPECIAL_TOKENS = 2048


def _reserved(group: str, start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"<|{group}reserved_special_token_{number}|>" for number in range(start, stop))


def _names(*names: str) -> tuple[str, ...]:
    return tuple(f"<|{name}|>" for name in names)


_NAMED = (
    *_names("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
    *_names("header_start", "header_end", "eom", "eot", "step"),
    *_reserved("text_post_train_", 0, 6),
    *_names("python_start", "python_end", "finetune_right_pad"),
    *_reserved("text_post_train_", 8, 69),
    *_names("image_start", "image_end"),
    *_reserved("vision_", 0, 2),
    *_names("tile_x_separator", "tile_y_separator"),
    *_reserved("vision_", 2, 6),
    *_names("image"),
    *_reserved("vision_", 6, 7),
    *_names("patch"),
    *_reserved("vision_", 7, 1048),
    *_reserved("reasoning_", 0, 8),
    *_names("reasoning_thinking_start", "reasoning_thinking_end"),
)
META_SPECIAL_TOKENS = (*_NAMED, *_reserved("", 0, NUM_SPECIAL_TOKENS - len(_NAMED)))

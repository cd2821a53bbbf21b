"""Judges a regular expression from a file before it is run on a caller's text; runs nothing itself."""

import re

# An escape, a class, the opening of any kind of group, its end, an alternative, a quantifier, or any other character.
_ITEM = re.compile(
    r"\\.|\[(?:\\.|[^\]\\])*\]|\((?:\?(?:[A-Za-z-]*:|<?[=!]|>|<\w+>))?|\)|\||[*+?]|\{\d*,?\d*\}|.", re.DOTALL
)


def may_take_exponential_time(pattern: str) -> bool:
    """Tell whether a repeat holds a choice, as in (a+)+, (a|a)* or (a?b?)*: n characters match in 2^n ways.

    Stricter than needed: a choice whose branches exclude each other is harmless, yet no Llama tokenizer repeats one.
    """
    open_groups = [False]  # per open group: does it hold a choice?
    is_choice = False  # is the item just read a group that holds one?
    for item in _ITEM.findall(pattern):
        if item[0] == "(":
            open_groups.append(False)
            is_choice = False
        elif item == ")" and len(open_groups) > 1:
            is_choice = open_groups.pop()
            open_groups[-1] |= is_choice
        elif item == "|" or item == "?":
            open_groups[-1] = True
        elif item in "*+" or (item[0] == "{" and len(item) > 1):
            if is_choice:
                return True
            open_groups[-1] = True
        else:
            is_choice = False
    return False

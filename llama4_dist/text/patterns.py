"""Judges a regular expression from a file before it is run on a caller's text; runs nothing itself."""

import re

_ITEM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\(|\)|[*+]|\{\d+,\d*\}|.", re.DOTALL)


def has_nested_repeat(pattern: str) -> bool:
    """Tell whether an unbounded repeat holds another one, as in (a+)+, whose backtracking is exponential."""
    open_groups = [False]  # per open group: does it hold a repeat?
    repeats = False  # does the item just read hold one?
    for item in _ITEM.findall(pattern):
        if item == "(":
            open_groups.append(False)
            repeats = False
        elif item == ")" and len(open_groups) > 1:
            repeats = open_groups.pop()
            open_groups[-1] |= repeats
        elif item in "*+" or (item[0] == "{" and len(item) > 1):
            if repeats:
                return True
            open_groups[-1] = True
        else:
            repeats = False
    return False

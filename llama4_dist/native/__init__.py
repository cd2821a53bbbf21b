"""Small C++ passes that Python's call overhead or a library's generality would slow down; all have a slower equal."""

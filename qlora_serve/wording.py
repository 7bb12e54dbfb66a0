"""Small matters of grammar in what is printed."""


def counted(count: int, one: str, many: str) -> str:
    """A number and its noun, as in "1 tensor is" and "2 tensors are"."""
    return f"{count} {one if count == 1 else many}"

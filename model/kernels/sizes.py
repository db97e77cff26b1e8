"""Few distinct sizes: oneDNN compiles its products for each shape it meets, which takes longer than a small product."""


def rounded(count: int, digits: int) -> int:
    """`count` rounded up to a number with `digits` binary digits after the leading one."""
    step = step_of(count, digits)
    return -(-count // step) * step


def step_of(count: int, digits: int) -> int:
    """The last of `digits` binary digits after the leading one of `count`; 1 where it has no more."""
    return 1 << max(0, count.bit_length() - 1 - digits)

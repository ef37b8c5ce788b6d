"""A row of D columns in a Triton program: one or two segments, and how wide they are.

A segment is the columns FIRST to FIRST + WIDTH of a row. The main one is (0, MAIN), MAIN a power of two; the tail is
(MAIN, TAIL), TAIL a smaller power of two or 0 for none. A single power of two would leave 44 % of the lanes idle at
1152 = 1024 + 128. A segment that reaches past D is masked.
"""

from soflow_kernels._dispatch import jit, tl


@jit
def load(row_ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """A segment of a row as float32; 0 past D."""
    cols = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH > D:
        values = tl.load(row_ptr + cols, mask=cols < D, other=0.0)
    else:
        values = tl.load(row_ptr + cols)
    return values.to(tl.float32)


@jit
def store(row_ptr, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Write a segment of a row; nothing past D."""
    cols = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH > D:
        tl.store(row_ptr + cols, values, mask=cols < D)
    else:
        tl.store(row_ptr + cols, values)


@jit
def centre(values, mean, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """A segment minus the mean of its row; 0 past D, as the sum of squares needs it."""
    values = values - mean
    if FIRST + WIDTH > D:
        values = tl.where(FIRST + tl.arange(0, WIDTH) < D, values, 0.0)
    return values


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def stages(D: int) -> int:
    """Rows in flight of a loop over rows. Wide ones fill the memory pipe alone, and two would not fit small GPUs."""
    return 2 if D <= 2048 else 1


def forward_layout(D: int, vectors: int = 2) -> tuple[int, int, int]:
    """(MAIN, TAIL, warps) of a loop that holds so many rows of modulation in registers.

    Of two, at most 40 columns a thread, in one warp up to 1280, whose sums need no barrier; every thread of a segment
    has 8, a 16-byte load in bf16. Of four, half as many.
    """
    warps = power_of_two(-(-D // 1280)) * (vectors // 2)
    main = power_of_two(D + 1) // 2
    tail = max(power_of_two(D - main), (256 if vectors == 2 else 128) * warps) if main < D else 0
    return (2 * main, 0, warps) if tail >= main else (main, tail, warps)


def backward_layout(D: int, element_size: int = 2) -> tuple[int, int, int]:
    """(MAIN, TAIL, warps): 8 columns of MAIN a thread, so that the sums over tokens leave registers to spare.

    The tail has 4 bytes a thread or more, of the narrowest tensor (element_size: its bytes a column), the least that a
    load takes on its way to shared memory. It costs a few registers where padding to a power of two would double them.
    From 3/4 of a power of two on, padding is cheaper.
    """
    main, tail = power_of_two(D + 1) // 2, 0
    if main < D and main + main // 2 <= D:
        main *= 2
    warps = min(max(main // 256, 1), 16)
    if main < D:
        tail = min(max(power_of_two(D - main), 128 // element_size * warps), main)
    return main, tail, warps

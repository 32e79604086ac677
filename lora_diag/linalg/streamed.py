"""Products with a matrix in memory or read in row blocks; A·X reads it once, a wide A·Aᵀ several
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# Rows converted to float64 at a time, few enough to stay in the cache: a product with 64 columns at
# 8192×2048 took 57 ms, 78 ms with 1024 rows; the Gram matrix at 11008×4096 1.83 s, 2.04 s with
# 1024.
ROWS = 256

# Entries converted at a time on a GPU, where every product is a kernel that the CPU has to start:
# 128 MB in float64.
GPU_ENTRIES = 2**24

# Rows that are multiplied by X and by its product with them before the next ones. A·X and AᵀA·X
# with 16 and with 32 columns took one core 17.0 and 23.2 ms at 8192×2048 with 1024 rows, 14.0 and
# 19.2 with 64, 11.6 and 16.8 with 32; at 2048² 2.6 and 3.7, 1.8 and 3.1, 2.0 and 3.3. Two cores
# were slower with 64 rows than with 1024 (14 instead of 12 ms).
PASS_ROWS, SMALL_ROWS, LARGE_ROWS = 1024, 64, 32
LARGE = 2**23

# Columns multiplied at a time in float64 for two row blocks: 128 rows of both then fit in the
# cache.
COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class Streamed:
    """A, or Aᵀ, with A read in row blocks.

    Args:
        read: Starts a pass: yields the rows of A from the first to the last,
            ``(rows, columns of A)`` each. All blocks but the last have the same number of rows, and
            every pass gives the same numbers.
        shape: ``(m, n)`` of the represented matrix.
        dtype: Dtype of the blocks: float32 or float64.
        device: Device of the blocks.
        transposed: Whether this is Aᵀ.

    Example:
        >>> a = Streamed(
        ...     lambda: iter([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]), (2, 2)
        ... )
        >>> a.times(torch.eye(2)).tolist(), a.T.times(torch.eye(2)).tolist()
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 3.0], [2.0, 4.0]])
    """

    read: Callable[[], Iterator[Tensor]]
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    transposed: bool = False

    @property
    def T(self) -> Streamed:  # noqa: N802 (as torch calls it)
        """Its transpose."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def __truediv__(self, scale: float) -> Streamed:
        """Return it divided by a number."""
        return replace(self, read=lambda: (block / scale for block in self.read()))

    def times(self, x: Tensor) -> Tensor:
        """Return M·X for the represented M, A or Aᵀ, and a thin X, in the dtype of X, from one
        pass.

        Args:
            x: X, ``(n, k)``, no shorter a dtype than that of the blocks.

        Returns:
            ``(m, k)``.
        """
        product = torch.zeros(self.shape[0], x.shape[1], dtype=x.dtype, device=self.device)
        for row, block in number_blocks(self.read()):
            rows = slice(row, row + len(block))
            if self.transposed:
                product.addmm_(block.to(x.dtype).T, x[rows])
            else:
                product[rows] = block.to(x.dtype) @ x
        return product

    def normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return M·X and Mᵀ·M·X for the represented M: from one pass if M is A, from two if it is
        Aᵀ.
        """
        if self.transposed:
            product = self.times(x)
            return product, self.T.times(product)
        product = torch.empty(self.shape[0], x.shape[1], dtype=x.dtype, device=self.device)
        back = torch.zeros_like(x)
        for row, block in number_blocks(self.read()):
            converted = block.to(x.dtype)
            part = product[row : row + len(block)] = converted @ x
            back.addmm_(converted.T, part)
        return product, back


# A matrix in memory or streamed.
Matrix = Tensor | Streamed


def times(a: Matrix, x: Tensor) -> Tensor:
    """Return A·X for a thin X: in memory as (Xᵀ·Aᵀ)ᵀ, which BLAS computes faster.

    At 8192×2048 on one core: 14 instead of 17 ms for 32 columns, 9 instead of 12 for 16; AᵀX
    likewise.
    """
    return a.times(x) if isinstance(a, Streamed) else (x.T @ a.T).T


def normal(a: Matrix, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A·X and AᵀA·X; from one pass over A if it is in the CPU's memory by rows, or streamed
    by its own rows.
    """
    if isinstance(a, Streamed):
        return a.normal(x)
    if a.device.type == "cpu" and a.is_contiguous():
        return _normal_by_rows(a, x.contiguous())
    product = times(a, x)
    return product, times(a.T, product)


def _normal_by_rows(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A·X and AᵀA·X; the rows that gave a part of A·X are multiplied by it while they are in
    the cache.
    """
    product = x.new_empty(len(a), x.shape[1])
    back = x.new_zeros(x.shape[1], a.shape[1])
    rows = LARGE_ROWS if a.numel() >= LARGE else SMALL_ROWS
    if torch.get_num_threads() > 1:
        rows = PASS_ROWS
    for part, out in zip(torch.split(a, rows), torch.split(product, rows), strict=True):
        torch.mm(part, x, out=out)
        back.addmm_(out.T, part)  # a thin matrix on the left, see ``times``
    return product, back.T


def times_wide(a: Matrix, x: Tensor) -> Tensor:
    """Return A·X for a thin float64 X, in float64, without a float64 copy of A."""
    if isinstance(a, Streamed):
        return a.times(x)
    if a.device.type != "cpu" or not a.is_contiguous():
        return torch.cat(
            [times(rows.to(torch.float64), x) for rows in torch.split(a, rows_at_once(a))]
        )
    product = x.new_empty(len(a), x.shape[1])
    buffer = x.new_empty(
        min(ROWS, len(a)), a.shape[1]
    )  # new pages for every block took a seventh of the time
    for row in range(0, len(a), ROWS):
        part = buffer[: len(a) - row].copy_(a[row : row + ROWS])
        torch.mm(part, x, out=product[row : row + ROWS])
    return product


def rows_at_once(a: Tensor) -> int:
    """Return the number of rows to convert to float64 at a time.

    >>> rows_at_once(torch.empty(1, 8))
    256
    """
    return ROWS if a.device.type == "cpu" else max(ROWS, GPU_ENTRIES // a.shape[1])


def number_blocks(blocks: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield every block with the number of its first row."""
    row = 0
    for block in blocks:
        yield row, block
        row += len(block)


def merge_small_blocks(blocks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Yield the same rows in blocks of ``rows`` or more, except for the last.

    Example:
        >>> [len(block) for block in merge_small_blocks(torch.zeros(5, 1).split(1), 2)]
        [2, 2, 1]
    """
    pending: list[Tensor] = []
    for block in blocks:
        pending.append(block)
        if sum(map(len, pending)) >= rows:
            yield torch.cat(pending)
            pending = []
    if pending:
        yield torch.cat(pending)


def gram_of_rows(a: Streamed, cached_blocks: int) -> Tensor:
    """Return the lower triangle of A·Aᵀ, with this many row blocks in memory.

    Every pass keeps the next ``cached_blocks`` blocks and multiplies them and all later blocks with
    them, so A is read ⌈blocks / ``cached_blocks``⌉ times.

    Args:
        a: A, ``(m, n)``, not transposed.
        cached_blocks: Number of blocks in memory, at least 1.

    Returns:
        ``(m, m)`` float64; entries above the diagonal blocks are zero.
    """
    gram = torch.zeros(a.shape[0], a.shape[0], dtype=torch.float64, device=a.device)
    first, remaining = 0, True
    while remaining:
        panel: list[tuple[int, Tensor]] = []
        remaining = False
        for index, (row, block) in enumerate(number_blocks(a.read())):
            if index < first:
                continue
            if len(panel) < cached_blocks:
                panel.append((row, block))
            else:
                remaining = True
            for other_row, other_block in panel:
                gram[row : row + len(block), other_row : other_row + len(other_block)] = _outer(
                    block, other_block
                )
        first += cached_blocks
    return gram


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """Return X·Yᵀ in float64."""
    product = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for first in range(0, x.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        product.addmm_(x[:, part].to(torch.float64), y[:, part].to(torch.float64).T)
    return product

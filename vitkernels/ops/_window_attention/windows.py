"""What a call of window attention asks for: the windows of an image, and the options. No kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Windows(NamedTuple):
    """How an image of Y rows and X columns is cut into windows: integers all, as the registered ops take them.

    Attributes:
        Y, X: Rows and columns of the image.
        rows, columns: Of a window.
        shift_y, shift_x: How far the image is rolled back before it is cut.
        prefix: Tokens before those of the image, which belong to its only window.
        grid: 1 if a window's tokens lie as far apart as there are windows (arXiv 2204.01697), not side by side.
        roll_padded: 1 if the image is padded to whole windows before it is rolled, not after.
        mask_value: Added to the scores of tokens that the roll brought together from different sides.
    """

    Y: int
    X: int
    rows: int
    columns: int
    shift_y: int = 0
    shift_x: int = 0
    prefix: int = 0
    grid: int = 0
    roll_padded: int = 0
    mask_value: int = -100

    @property
    def counts(self) -> tuple[int, int]:
        """The rows and columns of windows of an image."""
        return -(-self.Y // self.rows), -(-self.X // self.columns)

    @property
    def whole(self) -> bool:
        """Whether the image consists of whole windows."""
        return self.Y % self.rows == 0 and self.X % self.columns == 0

    @property
    def tokens(self) -> int:
        """The tokens of a window."""
        return self.prefix + self.rows * self.columns

    @property
    def padded_tokens(self) -> int:
        """The rows and columns of a bias of pairs, ``tiles.padded_tokens``."""
        return (self.tokens + 63) // 64 * 64

    @property
    def entries(self) -> int:
        """The entries of a relative position table for each head; three more with prefix tokens."""
        return (2 * self.rows - 1) * (2 * self.columns - 1) + 3 * (self.prefix > 0)

    @property
    def constants(self) -> tuple[int, ...]:
        """The kernels' constant ``SHAPE``."""
        return (*self[2:-1], self.tokens, self.mask_value)


class Options(NamedTuple):
    """A call's windows, and its options besides qkv (B, N, 3, H, D).

    Attributes:
        windows: The windows.
        table: (entries, H), the relative position bias.
        padding: (3, H, D), queries, keys and values of padded tokens; None hides them from all queries.
        logit_scale: (H,), the factor of cosine attention; None for scaled products.
        seed: (1,) int64, seed of the dropout.
        scale: Factor of the scores, without ``logit_scale``.
        dropout_p: Probability of dropping a weight.
    """

    windows: Windows
    table: Tensor | None
    padding: Tensor | None
    logit_scale: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float


class DecomposedOptions(NamedTuple):
    """The same of a call with decomposed positions.

    Attributes:
        windows: The windows, without shift, prefix and grid.
        rel_pos: The tables (2 · rows − 1, D) and (2 · columns − 1, D).
        padding: (3, H, D), queries, keys and values of padded tokens; None hides them from all queries.
        seed: (1,) int64, seed of the dropout.
        scale: Factor of the scores.
        dropout_p: Probability of dropping a weight.
    """

    windows: Windows
    rel_pos: tuple[Tensor, Tensor]
    padding: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float

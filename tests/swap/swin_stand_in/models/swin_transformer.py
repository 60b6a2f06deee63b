import torch
from timm.layers import DropPath
from torch import nn


def window_partition(x, size):
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return x.transpose(2, 3).flatten(0, 2)


def window_reverse(windows, size, rows, columns):
    x = windows.unflatten(0, (-1, rows // size, columns // size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def pairs(size):
    """The table's entry of each pair of tokens."""
    places = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1]))
    apart = places[:, None] - places + torch.tensor(size) - 1
    return apart[..., 0] * (2 * size[1] - 1) + apart[..., 1]


def shift_mask(resolution, size, shift):
    """−100 for tokens of a window that come from different sides of the image."""
    regions = [(torch.arange(n) >= n - size).int() + (torch.arange(n) >= n - shift).int() for n in resolution]
    region = (3 * regions[0][:, None] + regions[1])[None, :, :, None]
    region = window_partition(region, size).flatten(1)
    return -100.0 * (region[:, None] != region[:, :, None]).float()


class Mlp(nn.Module):
    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class WindowAttention(nn.Module):
    def __init__(self, dim, window_size, num_heads, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        entries = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.randn(entries, num_heads))
        self.register_buffer("relative_position_index", pairs(window_size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        qkv = self.qkv(x).view(x.shape[0], x.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = self.scale * q @ k.transpose(-2, -1) + bias
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], *scores.shape[1:]) + mask.unsqueeze(1)
            scores = scores.view(-1, *scores.shape[2:])
        out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class SwinTransformerBlock(nn.Module):
    def __init__(
        self, dim, input_resolution, num_heads, window_size=7, shift_size=0, mlp_ratio=4.0, drop=0.0, attn_drop=0.0,
        drop_path=0.0, attention=WindowAttention, mlp=Mlp,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.input_resolution, self.num_heads, self.mlp_ratio = dim, input_resolution, num_heads, mlp_ratio
        covered = min(input_resolution) <= window_size
        self.window_size, self.shift_size = (min(input_resolution), 0) if covered else (window_size, shift_size)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention(dim, (self.window_size,) * 2, num_heads, attn_drop=attn_drop, proj_drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, int(dim * mlp_ratio), drop=drop)
        shifted = self.shift_size > 0
        mask = shift_mask(input_resolution, self.window_size, self.shift_size) if shifted else None
        self.register_buffer("attn_mask", mask)
        self.fused_window_process = False

    def forward(self, x):
        rows, columns = self.input_resolution
        assert x.shape[1] == rows * columns, "input feature has wrong size"
        image = self.norm1(x).view(-1, rows, columns, x.shape[2])
        image = torch.roll(image, (-self.shift_size, -self.shift_size), (1, 2))
        windows = window_partition(image, self.window_size).view(-1, self.window_size**2, x.shape[2])
        windows = self.attn(windows, mask=self.attn_mask).view(-1, self.window_size, self.window_size, x.shape[2])
        image = window_reverse(windows, self.window_size, rows, columns)
        x = x + self.drop_path(torch.roll(image, (self.shift_size, self.shift_size), (1, 2)).view(x.shape))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    def __init__(self, input_resolution, dim):
        super().__init__()
        self.input_resolution, self.dim = input_resolution, dim
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x):
        rows, columns = self.input_resolution
        assert rows % 2 == 0 and columns % 2 == 0, f"x size ({rows}*{columns}) are not even."
        x = x.view(-1, rows // 2, 2, columns // 2, 2, x.shape[2])
        parts = [x[:, :, 0, :, 0], x[:, :, 1, :, 0], x[:, :, 0, :, 1], x[:, :, 1, :, 1]]
        x = torch.cat(parts, -1)
        return self.reduction(self.norm(x.view(x.shape[0], -1, x.shape[-1])))


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, norm=False):
        super().__init__()
        self.img_size, self.patch_size, self.in_chans, self.embed_dim = img_size, patch_size, in_chans, embed_dim
        self.patches_resolution = [n // p for n, p in zip(img_size, patch_size, strict=True)]
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else None

    def forward(self, x):
        assert x.shape[2] == self.img_size[0] and x.shape[3] == self.img_size[1], "wrong image size"
        x = self.proj(x).flatten(2).transpose(1, 2)
        return x if self.norm is None else self.norm(x)

import math

import torch
import torch.nn.functional as F
from models import swin_transformer
from models.swin_transformer import pairs, window_partition, window_reverse
from torch import nn


class Mlp(swin_transformer.Mlp):
    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class WindowAttention(nn.Module):
    def __init__(self, dim, window_size, num_heads, attn_drop=0.0, proj_drop=0.0, qkv_bias=True):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.pretrained_window_size = (0, 0)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        apart = [8 * torch.arange(1.0 - n, n) / (n - 1) for n in window_size]
        apart = torch.stack(torch.meshgrid(*apart, indexing="ij"), -1)[None]
        self.register_buffer("relative_coords_table", apart.sign() * torch.log2(apart.abs() + 1.0) / 3.0)
        self.register_buffer("relative_position_index", pairs(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(x.shape[0], x.shape[1], 3, self.num_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        scale = torch.clamp(self.logit_scale, max=torch.log(torch.tensor(100.0))).exp()
        scores = scale * (F.normalize(qkv[0], dim=-1) @ F.normalize(qkv[1], dim=-1).transpose(-2, -1))
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        scores = scores + 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], *scores.shape[1:]) + mask.unsqueeze(1)
            scores = scores.view(-1, *scores.shape[2:])
        out = self.attn_drop(self.softmax(scores)) @ qkv[2]
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class SwinTransformerBlock(swin_transformer.SwinTransformerBlock):
    def __init__(self, *args, **options):
        super().__init__(*args, attention=WindowAttention, mlp=Mlp, **options)
        del self.fused_window_process

    def forward(self, x):
        rows, columns = self.input_resolution
        assert x.shape[1] == rows * columns, "input feature has wrong size"
        image = torch.roll(x.view(-1, rows, columns, x.shape[2]), (-self.shift_size, -self.shift_size), (1, 2))
        windows = window_partition(image, self.window_size).view(-1, self.window_size**2, x.shape[2])
        windows = self.attn(windows, mask=self.attn_mask).view(-1, self.window_size, self.window_size, x.shape[2])
        image = window_reverse(windows, self.window_size, rows, columns)
        image = torch.roll(image, (self.shift_size, self.shift_size), (1, 2))
        x = x + self.drop_path(self.norm1(image.view(x.shape)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMerging(swin_transformer.PatchMerging):
    def __init__(self, input_resolution, dim):
        super().__init__(input_resolution, dim)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        rows, columns = self.input_resolution
        assert rows % 2 == 0 and columns % 2 == 0, f"x size ({rows}*{columns}) are not even."
        x = x.view(-1, rows // 2, 2, columns // 2, 2, x.shape[2])
        parts = [x[:, :, 0, :, 0], x[:, :, 1, :, 0], x[:, :, 0, :, 1], x[:, :, 1, :, 1]]
        x = torch.cat(parts, -1)
        return self.norm(self.reduction(x.view(x.shape[0], -1, x.shape[-1])))


class PatchEmbed(swin_transformer.PatchEmbed):
    def forward(self, x):
        assert x.shape[2] == self.img_size[0] and x.shape[3] == self.img_size[1], "wrong image size"
        x = self.proj(x).flatten(2).transpose(1, 2)
        return x if self.norm is None else self.norm(x)

import torch
from torch import nn


class LayerScale(nn.Module):
    def __init__(self, dim, init_values):
        super().__init__()
        self.inplace, self.init_values = False, init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x):
        return x * self.gamma

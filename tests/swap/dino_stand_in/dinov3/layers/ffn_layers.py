import torch.nn.functional as F
from dinov2.layers import mlp
from torch import nn


class Mlp(mlp.Mlp):
    pass


class SwiGLUFFN(nn.Module):
    def __init__(self, in_features, hidden_features):
        super().__init__()
        hidden = int(hidden_features * 2 / 3)
        hidden += -hidden % 8
        self.w1 = nn.Linear(in_features, hidden)
        self.w2 = nn.Linear(in_features, hidden)
        self.w3 = nn.Linear(hidden, in_features)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))

"""Token mixers: what a layer does to mix tokens, one file each."""

from costmodel.mixers.attention import Attention as Attention
from costmodel.mixers.base import AbstractMixer as AbstractMixer
from costmodel.mixers.base import Linear as Linear

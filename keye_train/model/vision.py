"""The vision tower: patches of all images and videos of a pack in, one state per patch out, in one call.

Legend: P patches, M images and videos, C tower width, H heads, D = C / H.

**Block order.** Patches come in raster order (time, row, column). The tower sorts the pixels, before anything is
computed, so that the four patches of each 2 x 2 block stand together: the projector then only reshapes. Attention
does not care about order, and positions go by coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from keye_train.model.attention import Segments, packed_attention
from keye_train.model.configuration import KeyeVisionConfig
from keye_train.model.packed import VisionInputs

PACKING_POSITIONS = 32768  # rows of a table that the published checkpoint has and nothing reads
VISION_ROPE_THETA = 10_000.0

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PatchLayout:
    """Where each patch stands, in block order."""

    order: Tensor  # [P] int64: place of the patch in raster order
    row: Tensor  # [P] int64: row within its frame
    column: Tensor  # [P] int64
    height: Tensor  # [P] int64: rows of its frame
    width: Tensor  # [P] int64

    @classmethod
    def build(cls, grid_thw: Tensor, patches: int, device: torch.device) -> PatchLayout:
        """Places of all patches of a pack, without a loop and without waiting for the device.

        Args:
            grid_thw: [M, 3] int64, in patches; height and width are even.
            patches: P, the sum of t * h * w.
            device: where the result is needed.
        """
        grid = grid_thw.to(device, non_blocking=True)
        frames, heights, widths = grid.unbind(1)
        sizes = frames * heights * widths
        item = torch.repeat_interleave(sizes, output_size=patches)  # [P]: number of the image or video
        height, width = heights[item], widths[item]
        first = (sizes.cumsum(0) - sizes)[item]
        place = torch.arange(patches, device=device) - first
        block, corner = place // 4, place % 4
        block_row, block_column = block // (width // 2), block % (width // 2)  # rows run on over the frames
        row = 2 * block_row + corner // 2
        column = 2 * block_column + corner % 2
        return cls(first + row * width + column, row % height, column, height, width)


def table_neighbours(layout: PatchLayout, side: int) -> tuple[Tensor, Tensor]:
    """Which four rows of a side x side table a patch mixes, and how.

    The weights of ``F.interpolate(mode="bilinear", align_corners=False)`` from the table to each frame's own size.

    Returns:
        Rows of the flattened table [P, 4] int64, and weights [P, 4] float32.
    """

    def along(place: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source = (side / size.float() * (place + 0.5) - 0.5).clamp(min=0)
        low = source.long().clamp(max=side - 1)
        return low, (low + 1).clamp(max=side - 1), source - low

    top, bottom, down = along(layout.row, layout.height)
    left, right, across = along(layout.column, layout.width)
    rows = torch.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right], dim=1)
    weights = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]
    return rows, torch.stack(weights, dim=1)


def rotary_tables(row: Tensor, column: Tensor, head_dim: int) -> Rotary:
    """Cosine and sine of the 2-D rotary angles: half of the frequencies follow the row, half the column.

    Args:
        row, column: [P] int64, patches from the top left of the frame.
        head_dim: D.

    Returns:
        Two tensors [P, D / 2] float32.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=row.device) / (head_dim // 2)
    frequencies = VISION_ROPE_THETA**-exponents
    angles = torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (channel i, channel i + D / 2) of ``states`` [P, H, D], in float32."""
    cosine, sine = (table[:, None] for table in rotary)
    first, second = states.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(states.dtype)


def normalize_levels(patches: Tensor) -> Tensor:
    """Pixel levels 0 .. 255 (uint8) to floats -1 .. 1, bit for bit as the published image processor.

    It multiplies by 1 / 255 in float64, rounds to float32, then subtracts 0.5 and divides by 0.5. Only 256 results
    exist, so they are looked up. Floats pass through: they are normalised already.
    """
    if patches.dtype != torch.uint8:
        return patches
    levels = torch.arange(256, dtype=torch.float64, device=patches.device)
    table = ((levels * (1 / 255)).float() - 0.5) / 0.5
    return table.index_select(0, patches.flatten().int()).view(patches.shape)


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel, on patches cut already: one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        """[P, 3, 14, 14] -> [P, C]."""
        return F.linear(patches.flatten(1).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PositionTable(nn.Embedding):
    """Learned positions of a square image, mixed for frames of any size."""

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """Weighted sums of table rows: ``rows`` and ``weights`` [P, 4] -> [P, C], summed in float32."""
        mixed = F.embedding_bag(rows, self.weight.float(), per_sample_weights=weights, mode="sum")
        return mixed.to(self.weight.dtype)


class VisionEmbeddings(nn.Module):
    """Pixels and position of each patch."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.side = config.table_side
        self.patch_embedding = PatchEmbedding(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = PositionTable(self.side**2, config.hidden_size)
        self.packing_position_embedding = nn.Embedding(PACKING_POSITIONS, config.hidden_size)

    def forward(self, patches: Tensor, layout: PatchLayout) -> Tensor:
        """[P, 3, 14, 14] in raster order -> [P, C] in block order."""
        pixels = normalize_levels(patches.index_select(0, layout.order))
        return self.patch_embedding(pixels) + self.position_embedding(*table_neighbours(layout, self.side))


class EncoderAttention(nn.Module):
    """Bidirectional attention within segments; rotary positions where given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, segments: Segments, rotary: Rotary | None) -> Tensor:
        """[P, C] -> [P, C]."""
        query, key, value = (
            project(hidden).unflatten(1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return self.out_proj(packed_attention(query, key, value, segments).flatten(1))


class EncoderMLP(nn.Module):
    """Two matrices with the tanh form of GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, C] -> [P, C]."""
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class EncoderLayer(GradientCheckpointingLayer):
    """One pre-norm layer of SigLIP's towers, vision and text alike."""

    def __init__(self, width: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = EncoderAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = EncoderMLP(width, inner)

    def forward(self, hidden: Tensor, segments: Segments, rotary: Rotary | None) -> Tensor:
        """[P, C] -> [P, C]."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), segments, rotary)
        return hidden + self.mlp(self.layer_norm2(hidden))


class Encoder(nn.Module):
    """A stack of layers."""

    def __init__(self, depth: int, width: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, inner, heads, eps) for _ in range(depth))

    def forward(self, hidden: Tensor, segments: Segments, rotary: Rotary | None = None) -> Tensor:
        """[P, C] -> [P, C]."""
        for layer in self.layers:
            hidden = layer(hidden, segments, rotary)
        return hidden


class PoolingAttention(nn.Module):
    """Multi-head attention with the parameter layout of ``nn.MultiheadAttention``, on segments."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, hidden: Tensor, queries: Segments, keys: Segments) -> Tensor:
        """``query`` [M, C] over ``hidden`` [P, C] -> [M, C]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(states, weight, bias).unflatten(1, (self.heads, -1))
            for states, weight, bias in zip((query, hidden, hidden), weights, biases, strict=True)
        )
        return self.out_proj(packed_attention(query, key, value, queries, keys).flatten(1))


class PoolingHead(nn.Module):
    """One vector per segment, by attention from a learned query. Only the contrastive objective uses it."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = PoolingAttention(config.hidden_size, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EncoderMLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        """[P, C] -> [M, C]."""
        count = len(segments.cu_seqlens) - 1
        query = self.probe[0].expand(count, -1)
        pooled = self.attention(query, hidden, Segments.equal(count, 1, hidden.device), segments)
        return pooled + self.mlp(self.layernorm(pooled))


class VisionTransformer(nn.Module):
    """Embeddings, layers, final norm, and the pooling head beside them."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Encoder(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.layer_norm_eps,
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = PoolingHead(config)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def forward(self, vision: VisionInputs) -> Tensor:
        """Patches in raster order -> [P, C] in block order, normalised."""
        patches = vision.pixel_patches
        layout = PatchLayout.build(vision.grid_thw, patches.shape[0], patches.device)
        rotary = rotary_tables(layout.row, layout.column, self.head_dim)
        hidden = self.embeddings(patches, layout)
        hidden = self.encoder(hidden, Segments(vision.cu_seqlens, vision.max_seqlen), rotary)
        return self.post_layernorm(hidden)


class VisionTower(nn.Module):
    """The tower under its published names, ``visual.vision_model.*``."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, vision: VisionInputs) -> Tensor:
        """All images and videos of a pack; at least one.

        Args:
            vision: patches (uint8 levels, or floats normalised already) in raster order.

        Returns:
            [P, C] in block order: rows 4k .. 4k + 3 are the 2 x 2 block that becomes language token k.
        """
        return self.vision_model(vision)

    def pool(self, hidden: Tensor, vision: VisionInputs) -> Tensor:
        """One vector for each image or video: [P, C] -> [M, C]."""
        return self.vision_model.head(hidden, Segments(vision.cu_seqlens, vision.max_seqlen))


def placeholder_image(like: Tensor) -> VisionInputs:
    """A black image of 2 x 2 patches, for packs without vision, on the device of ``like``."""
    patches = torch.zeros(4, 3, 14, 14, dtype=torch.uint8, device=like.device)
    borders = torch.tensor([0, 4], dtype=torch.int32).to(like.device, non_blocking=True)
    return VisionInputs(patches, torch.tensor([[1, 2, 2]]), borders, 4)
